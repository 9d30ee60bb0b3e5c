"""What a study's file may say, what is refused, and what a dry run tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from remend.errors import CheckError, FileError, InputError
from remend.evaluation import harness
from remend.studies.plan import read_study
from remend.studies.study import lines, shipped_studies, study

STUDY: dict[str, Any] = {
    "model": "smollm2",
    "degradations": {"int3": {"kind": "quantize", "format": "int3-g64"}, "cut": {"kind": "depth", "layers": 5}},
    "methods": {"none": "none", "sft": "sft", "sdft": {"how": "on-policy+repair", "recipe": {"learning_rate": 1e-4}}},
    "tasks": {"tooluse-short": {"rows": 8}},
    "seeds": [0, 1],
    "budget": {"tokens": 3840},
}


TRUSTED = {"trust_remote_code": True}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def names(path: Path, only: Any = None) -> list[str]:
    return [cell["name"] for cell in study(path, path.parent / "out", dry_run=True, only=only)["cells"]]


def test_the_grid_and_its_directories(tmp_path: Path) -> None:
    each = ["none/0", "sft/0", "sft/1", "sdft/0", "sdft/1"]
    assert names(write(tmp_path)) == [f"{group}/{cell}" for group in ("int3", "cut") for cell in each]
    both = write(tmp_path, tasks={"tooluse-short": {}, "general": {}})
    assert names(both)[0] == "int3-tooluse-short/none/0"
    many = {"a": {"path": "smollm2"}, "b": {"path": "org/other", "parameters": "3.1e9"}}
    path = write(tmp_path, model=None, models=many)
    assert names(path)[0] == "a-int3/none/0"
    assert read_study(path).models["b"].parameters == 3.1e9  # YAML 1.1 reads it as a text
    assert not (tmp_path / "out").exists()


def test_only_names_cells_and_brings_the_degraded_student(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert names(path, "cut/sdft") == ["cut/none/0", "cut/sdft/0", "cut/sdft/1"]
    assert names(path, ["*/*/1"]) == [f"{g}/{c}" for g in ("int3", "cut") for c in ("none/0", "sft/1", "sdft/1")]
    with pytest.raises(InputError, match=r'only "cot" names no cell; cells are int3/none/0, int3/sft/0'):
        names(path, "cot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"degradation": {}}, r'unknown key "degradation". Did you mean "degradations"'),
        ({"degradations": {"x": {"kind": "quantise"}}},
         r'degradations.x: unknown kind of degradation "quantise"; known: depth, .*, width. Did you mean "quantize"'),
        ({"degradations": {"x": {"format": "int3"}}}, "degradations.x: kind is missing"),
        ({"degradations": {"x": {"kind": "quantize", "fmt": "int3", "format": "int3-g64"}}},
         r'degradations.x: unknown key "fmt". Did you mean "format"'),
        ({"degradations": {"x": {"kind": "quantize", "format": "int99"}}}, "degradations.x: .*int99"),
        ({"degradations": {"x": {"kind": "prune", "sparsity": "4:2"}}}, r"degradations.x: .*4:2"),
        ({"degradations": {}}, "degradations is empty"),
        ({"methods": {"none": "none", "x": "sdft"}},
         r'methods.x: unknown method "sdft"; known: none, repair, sft, sft-teacher'),
        ({"methods": {"none": "none", "x": "on-policy+repare"}}, r'"repare"; known: repair.*Did you mean "repair"'),
        ({"methods": {"x": "sft"}}, "methods has 0 with how: none; it needs one"),
        ({"methods": {"none": "none", "x": "sft+bootstrap"}}, "bootstrap goes before on-policy steps"),
        ({"methods": {"none": "none", "x": "sft+cka"}}, "cka needs the reference"),
        ({"methods": {"none": "none+repair"}}, "none does nothing"),
        ({"methods": {"none": "none", "x": {"how": "sft", "recipe": {"steps": 3}}}},
         "recipe.steps is set by the study"),
        ({"methods": {"none": "none", "x": {"how": "sft", "recipe": {"lerning_rate": 1.0}}}},
         r'method x: unknown key "lerning_rate". Did you mean "learning_rate"'),
        ({"methods": {"none": "none", "x": {"how": "off-policy", "recipe": {"streams": {"keep": {}}}}}},
         "streams.keep: a cell's streams are recover and task"),
        ({"methods": {"none": "none", "x": {"how": "sft", "recipe": {"streams": {"task": {}}}}}}, "trains on labels"),
        ({"tasks": {"tooluse-shirt": {}}}, r'unknown task "tooluse-shirt"; known: .* Did you mean "tooluse-short"'),
        ({"tasks": {"science": {}}}, r"science makes no rows of its own; give train:"),
        ({"tasks": {"general": {"options": {"max_new": 3}}}},
         r'unknown option "max_new". Did you mean "max_new_tokens"'),
        ({"tasks": {"general": {"options": {"grader": "peper"}}}}, r'tasks.general.options: grader is "peper"'),
        ({"benchmarks": {"hellaswag": {}}}, r'unknown benchmark "hellaswag"; known: .*lm-eval:NAME'),
        ({"benchmarks": {"tooluse-short": {}}}, "is a task and a benchmark"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; give each once"),
        ({"budget": {}}, r'budget: "tokens" is missing'),
        ({"model": None}, "neither model nor models"),
        ({"recipe": {"data": "x"}}, "recipe.data is set by the study"),
        ({"recipe": {"beta": 2.0}}, r'method sft: "beta" is 2.0'),
        ({"data": {"train": "tiny"}}, "tiny names what is made for the model tiny"),
        ({"speed": {"device": "x", "parameters": 1, "tokens_per_second": {"on": 1}}}, r'unknown method "on"'),
        ({"degradations": {"a/b": {"kind": "depth", "layers": 5}}}, r'"a/b" is part of a path'),
        ({"degradations": {"A": {"kind": "depth", "layers": 5}, "a": {"kind": "depth", "layers": 4}}},
         "two cells would have one directory, cells/A/none/0 and cells/a/none/0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_study(write(tmp_path, **changes))


def test_a_method_can_be_a_rival_on_some_degradations(tmp_path: Path) -> None:
    methods = {
        "none": "none",
        "sft": "sft",
        "end": {"how": "sft", "degradations": ["cut"], "recipe": {"train": "last"}},
    }
    path = write(tmp_path, methods=methods, seeds=[0])
    assert names(path) == ["int3/none/0", "int3/sft/0", "cut/none/0", "cut/sft/0", "cut/end/0"]
    plan = read_study(path)
    assert plan.draft(plan.cells[-1]).train == "last"
    methods["end"]["degradations"] = ["cot"]
    with pytest.raises(InputError, match=r'methods\.end: "cot" is no degradation\. Did you mean "cut"'):
        read_study(write(tmp_path, methods=methods))
    with pytest.raises(InputError, match="none is what the others are held against"):
        read_study(write(tmp_path, methods={"none": {"how": "none", "degradations": ["cut"]}}))


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_study(write(tmp_path, seeds=[], tasks={"x": {}}, methods={"none": "none", "y": "z"}))
    assert len(str(caught.value).split("\n")) >= 3


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no study"):
        study(path, out)
    (out / "study.json").write_text('{"study": "other", "models": {"model": "smollm2"}}')
    with pytest.raises(InputError, match=r'holds the study "other" of smollm2, and this is "mine" of smollm2'):
        study(path, out, dry_run=True)
    begun = '{"study": "mine", "models": {"model": "smollm2"}, "imports": ["json", "mine_outside"]}'
    (out / "study.json").write_text(begun)
    with pytest.raises(InputError, match="was begun with --import mine_outside; give that again"):
        study("a study that needs it to be read.yaml", out)
    (out / "study.json").write_text(begun.replace("mine_outside", "csv"))
    assert study(path, out, dry_run=True)["cells"]
    with pytest.raises(InputError, match="is a file"):
        study(path, out / "letter.txt")
    with pytest.raises(InputError, match="jobs is 0"):
        study(path, tmp_path / "new", jobs=0)
    with pytest.raises(
        FileError,
        match=r'no such file.* ships with remend: full, paper, paper-small, small, tiny. Did you mean "small"',
    ):
        study("smal", out)


def test_tasks_of_the_harness_are_checked_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    changes: dict[str, Any] = {"benchmarks": {"lm-eval:helaswag": {}, "lm-eval:humaneval": {}}}
    path = write(tmp_path, **changes)
    assert study(path, out, dry_run=True)["total"]["cells"] == 10  # that needs no package
    with pytest.raises(CheckError) as caught:
        study(path, out)
    said = str(caught.value)
    assert 'benchmarks.lm-eval:helaswag: unknown task "lm-eval:helaswag"' in said
    assert "benchmarks.lm-eval:humaneval: task lm-eval:humaneval runs code" in said
    assert not out.exists()

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(harness.importlib, "import_module", absent)
    with pytest.raises(FileError, match=r"pip install 'remend\[eval\]'"):
        study(path, out)


def test_the_cost_scales_with_size_and_method(tmp_path: Path) -> None:
    speed = {"device": "a toy", "parameters": 134.5e6, "tokens_per_second": {"sft": 100, "on-policy": 10}}
    dry = study(write(tmp_path, speed={**speed, "overhead_minutes": 6}), tmp_path / "out", dry_run=True)
    cells = {cell["name"]: cell for cell in dry["cells"]}
    assert cells["int3/none/0"]["hours"] == pytest.approx(0.1)
    assert cells["int3/sft/0"]["hours"] == pytest.approx(0.1 + 38.4 / 3600)
    assert cells["int3/sdft/0"]["hours"] == pytest.approx(0.1 + 384 / 3600)
    assert cells["int3/sdft/0"]["steps"] == 10  # 8 completions of 48 tokens
    assert dry["total"]["trained"] == 8
    assert dry["total"]["tokens"] == 8 * 3840
    said = "\n".join(lines(dry))
    assert "10 cells, 8 of them trained, 0 done before" in said
    larger = write(tmp_path, model=None, models={"b": {"path": "org/x", "parameters": 1345e6}}, speed=speed)
    hours = study(larger, tmp_path / "out", dry_run=True)["cells"][1]["hours"]
    assert hours == pytest.approx(384 / 3600)
    assert study(write(tmp_path), tmp_path / "out", dry_run=True)["total"]["hours"] is None


def test_a_methods_recipe_goes_over_the_studys(tmp_path: Path) -> None:
    recipe = {"learning_rate": 3e-4, "batch_size": 4}
    methods = {
        "none": "none",
        "a": {"how": "on-policy+cka+bootstrap", "recipe": {"learning_rate": 1e-5, "alignment": {"weight": 0.1}}},
        "b": {"how": "off-policy", "recipe": {"streams": {"task": {"weight": 3.0}}}},
    }
    plan = read_study(write(tmp_path, recipe=recipe, methods=methods))
    a, b = (next(cell for cell in plan.cells if cell.method.name == name) for name in "ab")
    drafts = plan.draft(a), plan.draft(b)
    assert [d.learning_rate for d in drafts] == [1e-5, 3e-4]
    assert [d.batch_size for d in drafts] == [4, 4]
    assert (drafts[0].alignment.measure, drafts[0].alignment.weight) == ("cka", 0.1)
    assert (drafts[0].bootstrap, drafts[1].bootstrap) == ("on", "off")
    assert drafts[1].streams["task"].weight == 3.0
    assert set(plan.draft(plan.cells[0]).streams) == {"recover"}  # nothing is trained, so the task has no part


@pytest.mark.parametrize("name", shipped_studies())
def test_every_shipped_study_can_be_costed(name: str, tmp_path: Path) -> None:
    dry = study(name, tmp_path / "out", dry_run=True)
    assert dry["total"]["hours"] is not None
    assert [len(dry["cells"]), dry["total"]["trained"]] == {
        "tiny": [30, 27],
        "small": [30, 27],
        "full": [264, 252],
        "paper-small": [342, 300],
        "paper": [108, 96],
    }[name]
    hours = {
        "tiny": (0.05, 0.167),
        "small": (2, 27 * 0.2),
        "full": (24, 96),
        "paper-small": (24, 96),
        "paper": (200, 400),
    }[name]
    assert hours[0] < dry["total"]["hours"] < hours[1]
    if name == "small":
        assert max(cell["hours"] for cell in dry["cells"]) <= 0.2  # 12 minutes


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"recipe": TRUSTED}, "recipe.trust_remote_code"),
        (
            {"models": {"a": {"path": "smollm2", "recipe": {"trust_remote_code": True}}}, "model": None},
            "models.a.recipe",
        ),
        (
            {"degradations": {"x": {"kind": "quantize", "format": "int3-g64", "trust_remote_code": True}}},
            "degradations.x",
        ),
        (
            {"benchmarks": {"lm-eval:humaneval": {"options": {"allow_code": True}}}},
            "benchmarks.lm-eval:humaneval.options",
        ),
    ],
)
def test_a_study_lets_no_code_run(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"{key}.* is set, and a file never lets code run, whoever wrote it"):
        study(path, tmp_path / "out")
    assert study(path, tmp_path / "out", dry_run=True, trust_remote_code=True, allow_code=True)["cells"]
