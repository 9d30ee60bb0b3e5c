"""Settings: unknown keys refused, every problem told at once, YAML and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from remend.errors import FileError, InputError
from remend.files.settings import Gone, Settings, build, merged, parse_overrides, read_yaml
from remend.recovery.settings import RecoverConfig

NEEDED = {"student": "s", "teacher": "t", "data": "d.jsonl", "out": "o"}


def config(**values: Any) -> RecoverConfig:
    return build(RecoverConfig, {**NEEDED, **values}, "r.yaml")


def message(**values: Any) -> str:
    with pytest.raises(InputError) as raised:
        config(**values)
    return str(raised.value)


def test_defaults_are_the_documented_ones() -> None:
    made = config()
    assert (made.beta, made.temperature, made.gradient_accumulation) == (0.0, 1.0, 1)
    assert made.trust_remote_code is False
    assert made.held_out is None


def test_every_setting_is_described() -> None:
    for name, field in RecoverConfig.model_fields.items():
        assert field.description, name
        assert "%%" not in field.description, name  # nothing formats these texts with %


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().steps = 3  # type: ignore[misc]


def test_unknown_key_is_refused_with_the_nearest() -> None:
    text = message(learning_rat=1e-4)
    assert text.startswith('r.yaml: unknown key "learning_rat". Did you mean "learning_rate"? Known: student, teacher,')


class Inner(Settings):
    gone: ClassVar = {"width": Gone(3, "since version 9: it served nobody")}


class Outer(Settings):
    gone: ClassVar = {"speed": Gone(None, "since version 8: it cost too much")}
    inner: Inner


def test_a_key_that_is_gone_is_refused_with_the_reason_unless_it_has_its_old_default() -> None:
    assert build(Outer, {"speed": None, "inner": {"width": 3}}, "r.yaml") == Outer(inner=Inner())
    with pytest.raises(InputError) as raised:
        build(Outer, {"speed": 3, "inner": {"width": None}}, "r.yaml")
    assert message(scales="learned").startswith('r.yaml: "scales" is gone since version 0.2: ')
    assert message(importance_clip=5.0).startswith('r.yaml: "importance_clip" is gone since version 0.2: ')
    assert str(raised.value).split("\n") == [
        'r.yaml: "inner.width" is gone since version 9: it served nobody',
        'r.yaml: "speed" is gone since version 8: it cost too much',
    ]


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InputError) as raised:
        build(RecoverConfig, {"student": "s", "steps": -1, "beta": 2, "colour": "red"}, "r.yaml")
    lines = str(raised.value).split("\n")
    assert len(lines) == 6
    assert all(line.startswith("r.yaml: ") for line in lines)
    for part in ('"teacher" is missing (the healthy reference', '"data" is missing', '"out" is missing'):
        assert sum(part in line for line in lines) == 1
    assert 'r.yaml: "steps" is -1: input should be greater than or equal to 0' in lines
    assert 'r.yaml: "beta" is 2.0: input should be less than or equal to 1' in lines
    assert any('unknown key "colour"' in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "60"),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", 0),
        ("gradient_accumulation", 0),
        ("learning_rate", 0),
        ("learning_rate", 1.5),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", float("nan")),
        ("beta", -0.1),
        ("temperature", 0),
        ("temperature", float("inf")),
        ("max_new_tokens", 0),
        ("weight_decay", 1),
        ("max_grad_norm", float("nan")),
        ("dtype", "float16"),
        ("held_out", 0),
        ("seed", -1),
        ("seed", 2**31),
        ("student", ""),
        ("student", 3),
        ("device", ""),
        ("trust_remote_code", "yes"),
        ("keep_checkpoints", 0),
    ],
)
def test_bad_values_name_key_and_value(key: str, value: object) -> None:
    assert message(**{key: value}).startswith(f'r.yaml: "{key}" is ')


def test_numbers_as_people_write_them() -> None:
    # YAML 1.1 reads 1e-4 as a string
    made = config(**parse_overrides(["learning_rate=1e-4", "beta=1", "temperature=0.7"]))
    assert (made.learning_rate, made.beta, made.temperature) == (1e-4, 1.0, 0.7)
    assert isinstance(made.beta, float)


def test_read_yaml(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# comment\nstudent: s\nsteps: 3\nlearning_rate: 1e-4\neval_data: null\n")
    values = read_yaml(path)
    assert values == {"student": "s", "steps": 3, "learning_rate": "1e-4", "eval_data": None}
    assert config(**values).learning_rate == 1e-4


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
    with pytest.raises(FileError, match=r"latin\.yaml can't be read: 'utf-8' codec"):
        read_yaml(tmp_path / "latin.yaml")


def test_overrides() -> None:
    words = ["steps=20", "beta=0.5", "out=a=b", "eval_data=", "trust_remote_code=true", "student=smollm2"]
    assert parse_overrides(words) == {
        "steps": 20, "beta": 0.5, "out": "a=b", "eval_data": None, "trust_remote_code": True, "student": "smollm2",
    }  # fmt: skip
    assert parse_overrides([]) == {}
    assert parse_overrides(["steps=1", "steps=2"]) == {"steps": 2}


@pytest.mark.parametrize("word", ["steps", "=3", ""])
def test_overrides_without_key_or_value(word: str) -> None:
    with pytest.raises(InputError, match=r"is not of the form key=value, e\.g\. steps=20"):
        parse_overrides([word])


@pytest.mark.parametrize("word", ["out=[1", "out=2026-02-30"])
def test_overrides_that_are_no_yaml(word: str) -> None:
    with pytest.raises(InputError, match='the value of "out" can\'t be read'):
        parse_overrides([word])


def test_dotted_overrides_open_a_mapping() -> None:
    words = ["lora.rank=4", "steps=2", "lora.targets=[q_proj, v_proj]"]
    assert parse_overrides(words) == {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "steps": 2}
    assert parse_overrides(["lora.rank=4", "lora=null"]) == {"lora": None}


def test_a_mapping_over_a_mapping_changes_the_keys_that_it_names() -> None:
    recipe = {"steps": 1, "lora": {"rank": 4, "alpha": 9}}
    assert merged(recipe, {"lora": {"rank": 2}}) == {"steps": 1, "lora": {"rank": 2, "alpha": 9}}
    assert merged(recipe, {"lora": None})["lora"] is None
    assert merged({"lora": None}, {"lora": {"rank": 2}})["lora"] == {"rank": 2}
    assert recipe["lora"] == {"rank": 4, "alpha": 9}


REQUIRED = {"student": "a", "teacher": "b", "data": "c", "out": "d"}


def test_lora_is_off_unless_asked_for() -> None:
    assert build(RecoverConfig, REQUIRED, "x").lora is None
    lora = build(RecoverConfig, {**REQUIRED, "lora": {"rank": 4}}, "x").lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (4, None, "all-linear")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"rnak": 3}, r'unknown key "lora\.rnak"\. Did you mean "rank"\? Known: rank, alpha, targets'),
        ({"rank": 0}, r'"lora\.rank" is 0'),
        ({"rank": 1.5}, r'"lora\.rank" is 1\.5'),
        ({"alpha": -1}, r'"lora\.alpha" is -1'),
        ({"targets": "some"}, r'"lora\.targets.*is \'some\''),
        (5, '"lora" is 5'),
    ],
)
def test_bad_lora_settings(value: object, part: str) -> None:
    with pytest.raises(InputError, match=part):
        build(RecoverConfig, {**REQUIRED, "lora": value}, "x")
