"""Everything that is known before training is said at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.families import with_tensors
from helpers.tiny import build_model, build_tokenizer, prompts
from remend.degrade.depth import prune_depth
from remend.errors import CheckError
from remend.recovery.job import check, recover, settings
from remend.recovery.plan import Checked, Plan
from remend.recovery.preflight import preflight
from remend.training.write_cache import cache_teacher


def found(recipe: dict[str, Any], **changes: Any) -> Checked:
    return preflight(settings(overrides={**recipe, **changes}))


def plan_of(recipe: dict[str, Any], **changes: Any) -> Plan:
    checked = found(recipe, **changes)
    assert checked.plan is not None, checked.problems
    return checked.plan


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_good_recipe_has_no_findings(recipe: dict[str, Any]) -> None:
    result = check(**recipe)
    assert result.problems == []
    assert result.warnings == [
        "6 prompts are held out to measure the recovery: an interval over fewer than 16 says little. Give more "
        "prompts, a larger held_out, or eval_data"
    ]
    assert found(recipe, held_out=16).warnings == []
    plan = plan_of(recipe)
    assert (len(plan.prompts.main.train), len(plan.prompts.main.held_out)) == (34, 6)
    assert plan.constraint == "int3-g64-asym"
    assert plan.shared == 320
    assert plan.parameters == 94_528
    assert not Path(str(recipe["out"])).exists()


def test_all_problems_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "bad.jsonl", [{"prompt": "fine"}, {"question": "no prompt"}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    result = found(recipe, teacher=str(tmp_path / "nowhere"), data=data)
    assert len(result.problems) == 3
    text = "\n".join(result.problems)
    assert "holds another run" in text
    assert "nowhere does not exist" in text
    assert 'bad.jsonl:2: the row has no "prompt"' in text
    with pytest.raises(CheckError) as caught:
        recover(**{**recipe, "teacher": str(tmp_path / "nowhere"), "data": data})
    assert caught.value.problems == result.problems


def test_teacher_that_is_the_student(recipe: dict[str, Any]) -> None:
    assert "is the student's own model" in found(recipe, teacher=recipe["student"] + "/.").problems[0]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"teacher": "ema"}, "teacher ema is a view of the student, which is damaged"),
        ({"teacher": "live"}, "teacher live is a view of the student"),
        ({"teacher": "initial"}, "give teacher: initial to a stream"),
        ({"teacher": "base"}, "teacher base is the student without its adapter, and there is none"),
        ({"teacher": "base", "lora": {}}, "base without demonstrations gives the student's own answer back"),
        ({"teacher": "base", "lora": {}, "diagnose_every": 2}, "base has the student's own"),
        ({"lora": {"targets": ["x_proj"]}}, "lora.targets: x_proj is no linear layer"),
        ({"lora": {}, "merge": True}, "would take the student off what it is held to"),
        ({"merge": True}, "has no adapter to fold in"),
        ({"top_k": 10_000}, "top_k is 10000; the vocabulary has"),
        ({"streams": {"a": {"demonstrations": True}}}, "has no demonstration"),
        ({"alignment": {"layers": [5]}}, "alignment.layers is [5]; allowed are the student's layers, 0 to 1"),
        ({"alignment": {"layers": []}}, "or none for all"),
        ({"alignment": {}, "streams": {"a": {"teacher": "initial"}, "b": {}}}, "needs a frozen model as the teacher"),
        (
            {"attn_implementation": "flash_attention_2"},
            "sdpa takes torch's own flash kernel where the arithmetic is bf",
        ),
        ({"attn_implementation": "spda"}, "attn_implementation spda can't be used for "),
        ({"attn_implementation": "spda"}, "Usable here: eager, sdpa, flex_attention; or leave it out"),
        ({"attn_implementation": "kernels-community/other"}, "kernels-community/other can't be used for "),
        ({"report_to": "tensorbord"}, 'unknown report_to "tensorbord"; known: '),
    ],
)
def test_what_cannot_be_is_refused(recipe: dict[str, Any], change: dict[str, Any], part: str) -> None:
    assert any(part in problem for problem in found(recipe, **change).problems)


def test_different_tokenizers_are_a_problem(recipe: dict[str, Any], tmp_path: Path) -> None:
    other = build_tokenizer()
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    a, b = "r", "s"
    words = vocabulary["model"]["vocab"]
    words[a], words[b] = words[b], words[a]
    path = tmp_path / "other"
    shutil.copytree(recipe["teacher"], path)
    (path / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (problem,) = found(recipe, teacher=str(path)).problems
    assert "2 of 320 shared token ids have different meanings" in problem


def test_padded_vocabulary_is_aligned_with_a_warning(recipe: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    build_model(len(tokenizer) + 64, seed=3).save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    result = found(recipe, teacher=str(tmp_path / "padded"))
    assert result.problems == []
    assert "aligned on the first 320 ids" in result.warnings[0]
    done = recover(**{**recipe, "teacher": str(tmp_path / "padded"), "steps": 1})
    assert done.summary["recovered"]["kl"] > 0
    assert done.summary["warnings"] == result.warnings


def test_template_and_end_of_sequence_warnings(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(recipe["teacher"], path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    text = "\n".join(found(recipe, teacher=str(path)).warnings)
    assert "end-of-sequence token differs: '<|im_end|>' for the student" in text
    assert "chat template differs" in text
    student = tmp_path / "student"
    shutil.copytree(recipe["student"], student)
    (student / "generation_config.json").write_text('{"eos_token_id": [0]}')
    assert "generation config ends answers at token [0]" in "\n".join(found(recipe, student=str(student)).warnings)
    (student / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    said = "\n".join(found(recipe, student=str(student)).warnings)
    assert "ends answers at token 99999, and the model has" in said
    assert "rollouts end at either" not in said


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_files_that_do_not_hold_the_model_are_a_problem(recipe: dict[str, Any], tmp_path: Path, role: str) -> None:
    path = tmp_path / "broken"
    tensors = load_file(Path(recipe[role]) / "model.safetensors")
    lacking = {name: value for name, value in tensors.items() if name != "model.layers.0.mlp.up_proj.weight"}
    with_tensors(Path(recipe[role]), path, lacking)
    (path / "degradation.json").unlink(missing_ok=True)  # its hashes would tell first
    problems = found(recipe, **{role: str(path)}).problems
    assert any("1 tensors are missing (model.layers.0.mlp.up_proj.weight)" in problem for problem in problems)
    with_tensors(Path(recipe[role]), path, {**tensors, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})
    (path / "degradation.json").unlink(missing_ok=True)  # its hashes would tell first
    problems = found(recipe, **{role: str(path)}).problems
    assert any("no place for (model.layers.0.mlp.up_proj.weight_scale)" in problem for problem in problems)


@pytest.mark.parametrize(("long", "severity"), [(5, "warnings"), (20, "problems")])
def test_prompts_over_the_limit_are_dropped_and_named(
    recipe: dict[str, Any], tmp_path: Path, long: int, severity: str
) -> None:
    rows: list[Any] = [{"id": f"long-{i}", "prompt": f"word {i} " * 80} for i in range(long)]
    rows += [{"prompt": p} for p in prompts(40)]
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": p} for p in prompts(2)])
    changes = {"data": write_rows(tmp_path / "long.jsonl", rows), "eval_data": held, "held_out": None}
    result = found(recipe, **changes, max_prompt_tokens=120)
    text = "\n".join(getattr(result, severity))
    assert "dropped, not cut" in text
    assert "long-" in text
    assert (result.plan is None) == (severity == "problems")
    if result.plan:
        assert sum(map(len, result.plan.prompts.dropped.values())) == long
        assert all(len(p.tokens) <= 120 for p in [*result.plan.prompts.main.train, *result.plan.prompts.main.held_out])


def test_eval_data_is_never_trained_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": p} for p in prompts(3)])
    values = {k: v for k, v in recipe.items() if k != "held_out"}
    result = found(values, eval_data=held)
    assert result.plan is not None
    assert len(result.plan.prompts.main.held_out) == 3
    assert len(result.plan.prompts.main.train) == 37
    assert "3 training prompts are also in eval_data" in result.warnings[0]
    assert "held_out has no effect" in "\n".join(found(recipe, eval_data=held).warnings)
    nothing = found(values, data=held, eval_data=held)
    assert "no example is left to train on" in nothing.problems[0]


def test_beta_close_to_an_end_warns(recipe: dict[str, Any]) -> None:
    assert "close to 0 but is no forward KL" in found(recipe, beta=0.01).warnings[0]
    assert "close to 1 but is no reverse KL" in found(recipe, beta=0.99).warnings[0]
    assert "close to 1 but is no reverse KL" in found(recipe, loss={"name": "jsd", "beta": 0.99}).warnings[0]
    between = found(recipe, beta=0.5, held_out=16)
    assert between.warnings == []
    assert between.verdict().endswith("; loss generalised JSD, beta 0.5")
    assert "loss" not in found(recipe).verdict()


def test_disk_too_small(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    (problem,) = found(recipe).problems
    assert "0.1 MiB are free" in problem
    assert "keep_checkpoints" in problem


def test_what_a_run_has_written_already_needs_no_room(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from remend.files.settings import build
    from remend.recovery.preflight import preflight
    from remend.recovery.settings import RecoverConfig

    usage, checkpoints = shutil.disk_usage("/"), tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    checkpoints.mkdir(parents=True)
    config = build(RecoverConfig, recipe, "test")
    assert "are there already" not in preflight(config, resuming=True).problems[0]
    (checkpoints / "a.safetensors").write_bytes(bytes(2**20))
    assert "2.6 MiB" in preflight(config, resuming=True).problems[0]
    assert "of which 1.0 MiB are there already" in preflight(config, resuming=True).problems[0]
    (checkpoints / "b.safetensors").write_bytes(bytes(2**21))
    assert preflight(config, resuming=True).problems == []


def test_a_layer_map_must_fit_the_teacher(recipe: dict[str, Any], reference_dir: Path, tmp_path: Path) -> None:
    for given in ([0], [1, 0], [-1, 1]):
        problems = found(recipe, layer_map=given).problems
        assert any(f"layer_map {given} must name, rising from 0, one of the teacher's" in text for text in problems)
    (problem,) = found(recipe, layer_map=[0, 2]).problems
    assert "layer_map, [0, 2], does not fit a student of 2 layers and a teacher of 2" in problem
    prune_depth(str(reference_dir), tmp_path / "cut", layers=[0], method="list", probe=False)
    values = {**recipe, "student": str(tmp_path / "cut"), "repair": True}
    assert plan_of(values).facts.layer_map == [1]
    build_model(320, layers=1).save_pretrained(tmp_path / "shallow")
    build_tokenizer().save_pretrained(tmp_path / "shallow")
    result = found(values, teacher=str(tmp_path / "shallow"))
    assert result.plan is not None
    assert result.plan.facts.layer_map is None
    assert "degradation.json, [1], does not fit a student of 1 layers and a teacher of 1" in "\n".join(result.warnings)


@pytest.mark.parametrize("why", ["an adapter is trained", "a cache holds none", "have other shapes", None])
def test_a_repair_that_does_nothing_is_said(
    recipe: dict[str, Any], prompt_file: Path, tmp_path: Path, why: str | None
) -> None:
    values: dict[str, Any] = {**recipe, "repair": True}
    if why == "an adapter is trained":
        values["lora"] = {"rank": 2}
    elif why == "have other shapes":
        build_model(320, width=32).save_pretrained(tmp_path / "other")
        build_tokenizer().save_pretrained(tmp_path / "other")
        values["teacher"] = str(tmp_path / "other")
    elif why == "a cache holds none":
        cache_teacher(recipe["teacher"], tmp_path / "cache", data=str(prompt_file), max_new_tokens=4, k=8, held_out=6)
        streams = {"recover": {"teacher": str(tmp_path / "cache"), "policy": "off"}}
        values |= {"teacher": None, "data": None, "held_out": None, "streams": streams}
    result = found(values)
    said = [note for note in result.notes if "is not repaired before training" in note]
    assert result.plan is not None
    assert len(said) == (why is not None) == (not result.plan.repairs)
    assert all(str(why) in note for note in said)
    if why != "an adapter is trained":
        rate = plan_of(values, learning_rate=None).learning_rate
        assert rate == (2e-4 if why else 1e-4)  # the rate after a repair belongs to a repair that is made
    without = plan_of(values, repair=False)
    assert not any("not repaired" in note for note in without.notes)
    assert not without.repairs


def test_a_gpu_that_emulates_bfloat16_gets_float32_and_is_told(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remend.recovery.preflight.choose_device", lambda name: torch.device("cuda"))
    native = {"told": False}
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or native["told"]
    )
    plan = plan_of(recipe, dtype="auto")
    assert plan.dtype == torch.float32
    assert plan.chosen[-1] == "dtype float32: this GPU has no bfloat16 of its own, and emulates it"
    assert "dtype: auto takes float32" in "\n".join(found(recipe, dtype="bfloat16").warnings)
    native["told"] = True
    plan = plan_of(recipe, dtype="auto")
    assert (plan.dtype, len(plan.chosen)) == (torch.bfloat16, 1)
    assert found(recipe, dtype="bfloat16", held_out=16).warnings == []


def test_a_place_that_cannot_be_written(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (problem,) = found(recipe, out=str(tmp_path / "file" / "run")).problems
    assert f"can't be written: {tmp_path / 'file'} is a file" in problem
    (problem,) = found(recipe, out="/sys/run").problems
    assert problem.startswith("out /sys/run can't be written to /sys: ")
    assert problem.endswith("name a directory that you may write to")


def test_a_place_inside_a_model(recipe: dict[str, Any]) -> None:
    for key, what in (("student", "the student"), ("teacher", f"teacher {recipe['teacher']}")):
        (problem,) = found(recipe, out=f"{recipe[key]}/runs/one").problems
        assert f"lies inside the own directory of {what}" in problem
    assert found(recipe, out=f"{recipe['student']}-runs/one").problems == []


def test_a_directory_with_the_name_of_a_view(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recipe["teacher"], "base")
    shutil.copytree(recipe["teacher"], "ema")
    assert "The directory base is written ./base" in "\n".join(found(recipe, teacher="base").problems)
    assert "The directory ema is written ./ema" in "\n".join(found(recipe, teacher="ema").problems)
    for given in ("./base", Path("base"), Path("ema")):
        assert found(recipe, teacher=given).problems == []
    assert plan_of(recipe, teacher=Path("base")).reference == "./base"


def test_a_path_is_no_id_of_the_hub(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (Path("smollm2"), Path("org") / "model"):
        assert "does not exist: no such directory" in found(recipe, student=given).problems[0]
    streams = {"a": {"teacher": Path("ema")}}
    assert any("./ema does not exist" in problem for problem in found(recipe, streams=streams).problems)
