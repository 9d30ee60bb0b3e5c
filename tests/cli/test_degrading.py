"""`remend degrade`: each registered kind of damage has its verb, made from its settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import remend
from helpers.patching import replace_everywhere
from helpers.registering import restored
from remend.degrade import DEGRADATIONS
from remend.degrade.kinds import DegradeSettings
from remend.degrade.making.job import Changed, Damage
from remend.models.find import find_model, hash_files
from remend.models.load import load_tokenizer
from remend.models.lora import LoraConfig
from remend.studies.study import study

VERBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "quantize": (remend.quantize, {"format": "int4-g32-sym", "skip": ["*.k_proj", "*.v_proj"], "seed": 2}),
    "prune": (remend.prune, {"method": "wanda", "sparsity": "2:4", "samples": 3}),
    "depth": (remend.prune_depth, {"layers": 1, "method": "angular", "samples": 3}),
    "width": (remend.prune_width, {"ffn": 0.5, "heads": 1, "samples": 3}),
    "finetune": (remend.finetune, {"data": "task.jsonl", "steps": 2, "learning_rate": 1e-2, "lora": {"rank": 4}}),
}


def words_of(settings: dict[str, Any]) -> list[str]:
    """The options that give these settings."""
    words = []
    for name, value in settings.items():
        name = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            words += words_of({f"{name[2:]}-{inner}": part for inner, part in value.items()})
        else:
            words += [word for part in (value if isinstance(value, list) else [value]) for word in (name, str(part))]
    return words


def described(directory: Path) -> dict[str, Any]:
    """degradation.json without what differs between two runs of the same."""
    record = json.loads((directory / "degradation.json").read_text())
    record.get("calibration", {}).pop("seconds", None)
    return {key: value for key, value in record.items() if key not in ("seconds", "sha256")}  # which is of the record


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)


class Blur(DegradeSettings):
    """Shrink every weight."""

    factor: float = Field(0.5, gt=0, description="What weights are multiplied with.")
    only: list[str] = Field(default_factory=list, description="Parts of names.")
    often: list[int] = Field(default_factory=lambda: [1, 2], description="factors by number")
    names: dict[str, int] = Field(default_factory=dict, description="what no option can hold")

    def change(self, damage: Damage) -> Changed:
        for name, weight in damage.student.named_parameters():
            if any(part in name for part in self.only):
                weight.data.mul_(self.factor)
        return Changed(damage.student, {"kind": "blur", "factor": self.factor} if self.only else {})


@pytest.fixture
def blur() -> Iterator[str]:
    """A kind of damage from outside the package."""
    with restored(DEGRADATIONS):
        DEGRADATIONS.register("blur", source="made up")(Blur)
        yield "blur"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"model": str}, 'has a field "model", and that name is an argument of its command and function; call the'),
        ({"out": str}, 'a field "out", and that name is an argument of its command'),
        ({"kind": str}, 'a field "kind", and that name is what a study calls the kind itself'),
        ({"help": str}, 'a field "help", and that name is an option of every command'),
        ({"title": str}, 'a field "title", and that name is a part of every DegradeSettings'),
        ({"no_probe": bool}, 'a field "no_probe", and that name is also the option --no-probe of another field'),
        ({"lora": LoraConfig, "lora_rank": int}, 'a field "lora_rank", and that name is also the option --lora-rank'),
    ],
)
@pytest.mark.filterwarnings("ignore:Field name")
def test_a_field_whose_name_is_taken_is_refused_when_its_kind_is_registered(
    run: Any, fields: dict[str, type], part: str
) -> None:
    body: dict[str, Any] = {"__annotations__": fields, "__module__": __name__}
    body |= {name: Field(None, description="x") for name in fields}
    with pytest.raises(remend.RemendError, match=re.escape(part)) as raised, restored(DEGRADATIONS):
        DEGRADATIONS.register("odd", source="made up")(type("Odd", (DegradeSettings,), body))
    assert str(raised.value).startswith(f'kind of degradation "odd": {__name__}.Odd has a field ')
    assert run("degrade", "--help")[0] == 0


def test_every_kind_is_covered_here() -> None:
    assert set(VERBS) == set(DEGRADATIONS.names())


@pytest.mark.parametrize("kind", VERBS)
def test_every_field_is_an_option_with_its_default_and_description(run: Any, kind: str) -> None:
    code, out, _ = run("degrade", kind, "--help")
    assert code == 0
    said = " ".join(out.replace("│", " ").split())
    for name, field in DEGRADATIONS.get(kind).model_fields.items():
        option = f"--{name.replace('_', '-')}"
        assert option in said
        if not isinstance(field.default, bool) and isinstance(field.default, str | int | float):
            assert f"[default: {field.default}]" in said.partition(f"{option} ")[2].partition(" --")[0]


@pytest.mark.parametrize("kind", VERBS)
def test_a_verb_does_what_the_function_does_with_the_same_seed(run: Any, reference_dir: Path, kind: str) -> None:
    (function, settings), healthy = VERBS[kind], hash_files(find_model(str(reference_dir)))
    code, out, err = run("degrade", kind, reference_dir, *words_of(settings), "--no-probe", "--out", "by-verb")
    assert (code, "Traceback" in err) == (0, False), err
    assert out.startswith("by-verb: ")
    record = function(str(reference_dir), "by-function", **settings, probe=False)
    written = json.loads(Path("by-function/degradation.json").read_text())
    assert written.pop("sha256")
    assert record == written
    assert record["reference"]["files"] == healthy == hash_files(find_model(str(reference_dir)))  # it is left as it was
    assert described(Path("by-verb")) == described(Path("by-function"))
    for path in Path("by-function").glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(Path("by-verb") / path.name)
        assert all(ours[name].equal(theirs[name]) for name in ours)
        assert ours.keys() == theirs.keys()
    assert AutoModelForCausalLM.from_pretrained("by-function").num_parameters() > 0  # plain transformers opens it
    with pytest.raises(remend.RemendError, match="is not empty"):
        function(str(reference_dir), "by-function", **settings)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("--method depth --layers 1 --by angular --samples 3", "depth --layers 1 --method angular --samples 3"),
        ("--method depth --layers 0,", "depth --layers 0,"),
        ("--method width --ffn 0.5 --heads 1 --samples 3", "width --ffn 0.5 --heads 1 --samples 3"),
    ],
)
def test_prune_still_makes_what_depth_and_width_make(run: Any, reference_dir: Path, older: str, newer: str) -> None:
    assert run("degrade", "prune", reference_dir, *older.split(), "--no-probe", "--out", "older")[0] == 0
    kind, *words = newer.split()
    assert run("degrade", kind, reference_dir, *words, "--no-probe", "--out", "newer")[0] == 0
    assert described(Path("older")) == described(Path("newer"))
    if "0," in newer:
        assert described(Path("newer"))["layer_map"] == [1]
    help_of_prune = run("degrade", "prune", "--help")[1]
    assert "--by" not in help_of_prune  # it is hidden
    assert "2:4" in help_of_prune  # and no emoji takes the place of :4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ("--method", "depth", "--layers", "1", "--sparsity", "0.3", "--skip", "*"),
            "--sparsity, --skip has no effect",
        ),
        (("--method", "width", "--scope", "global"), "--scope has no effect with --method width, which takes --ffn"),
        (("--method", "width", "--by", "angular"), "--by has no effect with --method width"),
        (("--layers", "1"), "--layers has no effect with --method magnitude, which takes --sparsity, --scope, --skip"),
        (("--method", "wanda", "--ffn", "0.5", "--heads", "1"), "--ffn, --heads has no effect with --method wanda"),
        (("--method", "depth", "--layers", "0,", "--by", "angular"), "--by chooses layers, and --layers 0, names them"),
    ],
)
def test_options_of_another_way_to_prune_are_refused(
    run: Any, reference_dir: Path, words: tuple[str, ...], part: str
) -> None:
    code, _, err = run("degrade", "prune", reference_dir, *words, "--out", "x", "--no-probe")
    assert (code, part in err, Path("x").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("quantize --format int5-g64", 'unknown format "int5-g64"'),
        ("quantize --method magic", 'unknown quantization method "magic"; known: gptq, rtn'),
        (
            "quantize --format int4-g128",
            "group 128 of int4-g128-asym does not divide the input width of model.layers.0.self_attn.q_proj (64)",
        ),
        ("prune --sparsity 1.5", 'sparsity "1.5" can\'t be used'),
        ("prune --method depth --layers 2", "can't remove 2 of 2 blocks"),
        ("prune --method wanda --samples 0", "the calibration set is empty"),
        ("depth --layers one", 'layers "one" is neither a number nor a list like 23,24,25'),
        ("depth --layers 0,1 --method angular", 'a list of blocks goes with method "list"'),
        ("width --ffn 0", "ffn 0 and heads 0 drop nothing"),
        ("finetune --data task.jsonl --steps 0", '"steps" is 0: input should be greater than or equal to 1'),
        ("finetune --data nowhere.jsonl", "nowhere.jsonl can't be read"),
    ],
)
def test_bad_degradations(run: Any, reference_dir: Path, words: str, part: str) -> None:
    kind, *rest = words.split()
    code, _, err = run("degrade", kind, reference_dir, *rest, "--out", "x", "--no-probe")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors), Path("x").exists()) == (2, 1, False)
    assert part in errors[0]


def test_an_unknown_keyword_is_named_with_the_one_that_was_meant(reference_dir: Path) -> None:
    with pytest.raises(remend.RemendError, match=r'quantize: unknown key "fromat". Did you mean "format"\? Known: '):
        remend.quantize(str(reference_dir), "x", fromat="int3-g64")


def test_what_was_made_is_said(run: Any, reference_dir: Path) -> None:
    words = ("--format", "int4-g32-sym", "--data", "absent.jsonl", "--out", "q")
    code, out, err = run("degrade", "quantize", reference_dir, *words)
    assert code == 0
    assert "quantization int4-g32-sym rtn: 4.5 bits per weight, 0.1 MiB as packed" in out
    assert "probe: KL 0." in out
    assert "data absent.jsonl has no effect: quantizing to int4-g32-sym (rtn) needs no calibration" in err
    assert "sparsity" not in out  # a grid has zeros, and nobody asked for them


def test_the_zeros_of_a_pruned_model_are_said(run: Any, reference_dir: Path) -> None:
    code, out, _ = run("degrade", "prune", reference_dir, "--sparsity", "0.5", "--no-probe", "--out", "p")
    assert code == 0
    tensors = load_file("p/model.safetensors")
    pruned = [t for name, t in tensors.items() if "proj" in name]
    share = sum(int((t == 0).sum()) for t in pruned) / sum(t.numel() for t in pruned)
    assert f"sparsity: {share:.2%} of the weights in 14 matrices are zero" in out


@pytest.mark.parametrize("kind", VERBS)
def test_device_and_trust_are_handed_on(
    run: Any, reference_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    command = ("degrade", kind, reference_dir, *words_of(VERBS[kind][1]), "--out", "x", "--no-probe")
    code, _, err = run(*command, "--device", "abacus")
    assert (code, 'device "abacus" can\'t be used here' in err) == (2, True)
    trusted = []
    load = load_tokenizer

    def listen(source: Any) -> Any:
        trusted.append(source.trust_remote_code)
        return load(source)

    replace_everywhere(monkeypatch, load, listen)
    assert run(*command, "--device", "cpu", "--trust-remote-code")[0] == 0
    assert trusted == [True]


def test_a_kind_from_outside_has_a_verb_and_is_a_studys_kind(run: Any, reference_dir: Path, blur: str) -> None:
    assert "Shrink every weight." in run("degrade", "--help")[1]
    said = " ".join(run("degrade", blur, "--help")[1].split())
    assert ("PydanticUndefined" in said, "--names" in said, "[default: 1,2]" in said) == (False, False, True)
    words = ("--factor", "0.25", "--only", "o_proj", "--only", "up_proj", "--no-probe", "--out", "blurred")
    code, out, _ = run("degrade", blur, reference_dir, *words)
    assert (code, out.startswith("blurred: blur: ")) == (0, True)
    before, after = (load_file(Path(d) / "model.safetensors") for d in (reference_dir, "blurred"))
    changed = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert changed == {"o_proj", "up_proj"}
    assert run("degrade", blur, reference_dir, "--factor", "0", "--out", "x")[0] == 2
    code, _, err = run("degrade", blur, reference_dir, "--no-probe", "--out", "x")
    assert (code, Path("x").exists()) == (2, False)
    assert 'error: Blur.change describes its damage without a "kind"' in err
    assert "making the damage blur" in err
    text = "\n".join((
        f"model: {reference_dir}",
        "degradations: {soft: {kind: blur, factor: 0.9}}",
        "methods: {none: none}",
        "tasks: {tooluse-short: {rows: 8}}",
        "seeds: [0]",
        "budget: {tokens: 100}",
    ))  # fmt: skip
    Path("soft.yaml").write_text(text)
    assert [cell["name"] for cell in study("soft.yaml", "out", dry_run=True)["cells"]] == ["soft/none/0"]
    Path("soft.yaml").write_text(text.replace("factor", "facter"))
    with pytest.raises(remend.RemendError, match=r'degradations.soft: unknown key "facter". Did you mean "factor"'):
        study("soft.yaml", "out", dry_run=True)


def test_the_help_needs_no_torch() -> None:
    """In a process of its own, since this one has it."""
    code = (
        "import sys; from remend.cli import build_app; from typer.testing import CliRunner\n"
        "for words in (['--help'], ['degrade', 'quantize', '--help'], ['cache-teacher', '--help']):\n"
        "    assert CliRunner().invoke(build_app(), words).exit_code == 0\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_what_to_do_with_a_damaged_model_is_said_in_commands(run: Any, reference_dir: Path) -> None:
    Path("base").symlink_to(reference_dir)  # which is also the name of a teacher
    code, out, _ = run("degrade", "quantize", "base", "--no-probe", "--out", "student/")
    assert code == 0
    assert "remend check --student student --teacher ./base\n" in out
    assert "remend recover --student student --teacher ./base --out student-recovered\n" in out
    code, out, err = run("check", "--student", "student", "--teacher", "./base", "--no-files")
    assert code == 0, err
