"""Settings of any job: YAML, overrides on the command line, keys that are gone, problems told at once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ValidationError

import remend
from remend.degrade.depth import Depth
from remend.degrade.quantize import Quantize
from remend.diagnosis.settings import DiagnoseSettings
from remend.errors import FileError, InputError
from remend.files.settings import Gone, Settings, build, merged, parse_overrides, takes
from remend.files.yaml_files import read_yaml
from remend.recovery.settings import RecoverConfig


class Inner(Settings):
    gone: ClassVar = {"width": Gone(3, "since version 9: it served nobody")}


class Outer(Settings):
    gone: ClassVar = {"speed": Gone(None, "since version 8: it cost too much")}
    inner: Inner
    steps: int = 1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Outer(inner=Inner()).steps = 3  # type: ignore[misc]


def test_a_key_that_is_gone_is_refused_with_the_reason_unless_it_has_its_old_default() -> None:
    assert build(Outer, {"speed": None, "inner": {"width": 3}}, "r.yaml") == Outer(inner=Inner())
    with pytest.raises(InputError) as raised:
        build(Outer, {"speed": 3, "inner": {"width": None}, "stesp": 2}, "r.yaml")
    assert str(raised.value).split("\n") == [
        'r.yaml: "inner.width" is gone since version 9: it served nobody',
        'r.yaml: "speed" is gone since version 8: it cost too much',
        'r.yaml: unknown key "stesp". Did you mean "steps"? Known: inner, steps',
    ]


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# comment\nstudent: s\nsteps: 3\nlearning_rate: 1e-4\neval_data: null\n")
    assert read_yaml(path) == {"student": "s", "steps": 3, "learning_rate": "1e-4", "eval_data": None}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"steps: [1", "is not valid YAML"),
        (b"a: b: c", "is not valid YAML"),
        (b"out: 2026-02-30", "is not valid YAML"),  # a date that does not exist
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"- 1\n- 2\n", "must be a mapping of keys to values, e.g. 'steps: 60'; it holds list"),
        (b"", "it holds NoneType"),
        (b"1: 2\n", "must be a mapping"),
    ],
)
def test_bad_recipes(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_yaml(path)
    assert str(path) in str(raised.value)
    assert part in str(raised.value)


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"recipe .*missing.yaml can't be read: No such file or directory"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(FileError, match="can't be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("out: größer".encode("latin-1"))
    with pytest.raises(FileError, match=r"latin\.yaml can't be read: no UTF-8 text at byte 7"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (["steps=1", "steps=2"], {"steps": 2}),
        (["beta=0.5", "out=a=b", "eval_data=", "on=true"], {"beta": 0.5, "out": "a=b", "eval_data": None, "on": True}),
        (["lora.rank=4", "steps=2", "lora.targets=[q, v]"], {"lora": {"rank": 4, "targets": ["q", "v"]}, "steps": 2}),
        (["lora.rank=4", "lora=null"], {"lora": None}),
    ],
)
def test_overrides(words: list[str], values: dict[str, Any]) -> None:
    assert parse_overrides(words) == values


@pytest.mark.parametrize(
    ("word", "part"),
    [
        *((word, r"is not of the form key=value, e\.g\. steps=20") for word in ("steps", "=3", "")),
        *((word, 'the value of "out" can\'t be read') for word in ("out=[1", "out=2026-02-30")),
    ],
)
def test_overrides_that_cannot_be_read(word: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        parse_overrides([word])


def test_a_whole_number_beyond_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"steps: 0x{'f' * 5000}\n")
    with pytest.raises(InputError, match="a whole number of 20000 binary digits is larger than any"):
        build(RecoverConfig, read_yaml(tmp_path / "recipe.yaml"), "recipe")


def test_a_mapping_over_a_mapping_changes_the_keys_that_it_names() -> None:
    recipe = {"steps": 1, "lora": {"rank": 4, "alpha": 9}}
    assert merged(recipe, {"lora": {"rank": 2}}) == {"steps": 1, "lora": {"rank": 2, "alpha": 9}}
    assert merged(recipe, {"lora": None})["lora"] is None
    assert merged({"lora": None}, {"lora": {"rank": 2}})["lora"] == {"rank": 2}
    assert recipe["lora"] == {"rank": 4, "alpha": 9}
    jsd = {"loss": {"name": "jsd", "beta": 0.5}}
    assert merged(jsd, {"loss": {"beta": 0.1}}) == {"loss": {"name": "jsd", "beta": 0.1}}
    assert merged(jsd, {"loss": {"name": "forward_kl"}}) == {"loss": {"name": "forward_kl"}}  # beta was the jsd's
    assert merged({"loss": {"beta": 0.1}}, {"loss": {"name": "jsd"}}) == {"loss": {"name": "jsd", "beta": 0.1}}


def test_a_functions_signature_and_docstring_show_the_settings_that_it_takes() -> None:
    @takes(Outer)
    def act(steps: int, **overrides: object) -> None:
        """Do it."""

    assert list(inspect.signature(act).parameters) == ["steps", "inner"]
    shown = inspect.signature(remend.finetune).parameters
    assert (shown["data"].default, shown["batch_size"].default) == (inspect.Parameter.empty, 4)
    assert (shown["learning_rate"].annotation, shown["dtype"].annotation) == (
        float | None,
        Literal["auto", "float32", "bfloat16"],
    )
    assert "    batch_size: rows per micro-batch\n" in (remend.finetune.__doc__ or "")
    inspect.signature(remend.recover).bind("recipe.yaml", steps=2)  # what the recipe gives may be left out
    for function in (remend.quantize, remend.prune, remend.prune_depth, remend.prune_width, remend.finetune,
                     remend.cache_teacher, remend.diagnose, remend.evaluate, remend.recover, remend.check):  # fmt: skip
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_paths_count_as_texts_and_sequences_as_lists(tmp_path: Path) -> None:
    values = {"skip": ("a",), "data": tmp_path}
    assert build(Quantize, values, "x") == Quantize(skip=["a"], data=str(tmp_path))
    for layers in ((0, 2), range(0, 3, 2)):
        assert build(Depth, {"layers": layers}, "x") == Depth(layers=[0, 2])
    assert build(DiagnoseSettings, {"reference": "r", "students": ("s",), "out": "o", "cache": tmp_path}, "x").cache
    with pytest.raises(TypeError, match="layers"):
        remend.prune_depth("model", tmp_path / "out")  # type: ignore[call-arg]
