"""The recipe's keys: which values each takes, and what a bad one is told."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.registering import restored
from remend.errors import InputError
from remend.files.settings import build, parse_overrides
from remend.maths.losses import LOSSES
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
    assert made.lora is None
    lora = config(lora={"rank": 4}).lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (4, None, "all-linear")
    named = config(lora={"targets": "q_proj, k_proj"}).lora  # as a command line gives them
    assert named is not None
    assert named.targets == ["q_proj", "k_proj"]


def test_every_setting_is_described() -> None:
    for name, field in RecoverConfig.model_fields.items():
        assert field.description, name
        assert "%%" not in field.description, name  # nothing formats these texts with %


def test_unknown_and_lost_keys_are_refused() -> None:
    text = message(learning_rat=1e-4)
    assert text.startswith('r.yaml: unknown key "learning_rat". Did you mean "learning_rate"? Known: student, teacher,')
    for key, value in (("scales", "learned"), ("importance_clip", 5.0)):
        assert message(**{key: value}).startswith(f'r.yaml: "{key}" is gone since version 0.2: ')
    assert message(scales="lerned") == (
        "r.yaml: \"scales\" is 'lerned': it used to be one of fixed, learned, and the key is gone; leave it out"
    )


def test_a_loss_may_be_its_name_alone_and_a_tuple_is_given_as_a_list() -> None:
    with restored(LOSSES):
        LOSSES.register("two", source="made for the test")(lambda s_NV, t_NV, *, w=(0.1, 0.2): (s_NV - t_NV).sum(-1))
        made = config(loss={"name": "two", "w": [1, "1e-4"]}).loss
        assert (made and made.parameters) == {"w": (1.0, 1e-4)}
        assert config(loss={"name": "two", "w": [1, "1e-4"]}) == config(loss=made)
    assert config(loss="jsd") == config(loss={"name": "jsd"})
    assert "unknown loss" in message(loss="jsdd")
    assert message(loss=5) == (
        'r.yaml: "loss" is 5: a loss is its name, as jsd, or a mapping with name and parameters: {name: jsd, beta: 0.5}'
    )
    assert message(beta=1, loss="jsd").endswith("give null for it: beta=0.5 loss=null, or loss.name=jsd beta=null")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InputError) as raised:
        build(RecoverConfig, {"student": "s", "steps": -1, "beta": 2, "colour": "red"}, "r.yaml")
    lines = str(raised.value).split("\n")
    assert len(lines) == 5
    assert all(line.startswith("r.yaml: ") for line in lines)
    for part in ('"teacher" is missing (the healthy model', '"out" is missing'):
        assert sum(part in line for line in lines) == 1
    assert 'r.yaml: "steps" is -1: allowed: a number of steps from 0 to 1000000, or auto' in lines
    assert 'r.yaml: "beta" is 2.0: input should be less than or equal to 1' in lines
    assert any('unknown key "colour"' in line for line in lines)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("steps", ["60", 1.5, True]),
        ("batch_size", [0]),
        ("gradient_accumulation", [0]),
        ("learning_rate", [0, 1.5, "fast", True, float("nan")]),
        ("beta", [-0.1]),
        ("temperature", [0, float("inf")]),
        ("max_grad_norm", [float("inf")]),
        ("max_new_tokens", [10**12, [16, 10**12]]),
        ("max_new_tokens", [0]),
        ("weight_decay", [1]),
        ("max_grad_norm", [float("nan")]),
        ("dtype", ["float16"]),
        ("held_out", [0]),
        ("seed", [-1, 2**31]),
        ("student", ["", 3]),
        ("device", [""]),
        ("trust_remote_code", ["yes"]),
        ("keep_checkpoints", [0]),
        ("lora", [5]),
        ("alignment", [5]),
    ],
)
def test_bad_values_name_key_and_value(key: str, values: list[object]) -> None:
    for value in values:
        assert message(**{key: value}).startswith(f'r.yaml: "{key}" is '), value


def test_names_of_other_tools_that_mean_the_same() -> None:
    other = {"num_train_epochs": 2, "save_steps": 4, "save_total_limit": 3, "eval_steps": 5, "bf16": True}
    made = build(
        RecoverConfig, {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "output_dir": "o", **other}, "r"
    )
    assert (made.student, made.teacher, made.out) == ("s", "t", "o")
    assert (made.epochs, made.save_every, made.keep_checkpoints, made.eval_every, made.dtype) == (
        2,
        4,
        3,
        5,
        "bfloat16",
    )
    stream = config(streams={"a": {"max_completion_length": 9}}).streams
    assert stream is not None
    assert stream["a"].max_new_tokens == 9
    assert "bf16: true is dtype: bfloat16, and dtype: float32 is given too" in message(bf16=True, dtype="float32")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("fp16", True, '"fp16" is no key here: float16 is for inference alone: training in it needs loss scaling'),
        ("fp16", True, "float32 where the GPU has no bfloat16 (auto chooses); save_dtype: float16 writes"),
        ("bf16", False, "false is dtype: float32; auto"),
        ("push_to_hub", True, '"push_to_hub" is no key here: a finished run is uploaded by remend push RUN ORG/NAME'),
        ("fsdp", "full_shard", "accelerate launch; a model is not sharded over them yet"),
        ("deepspeed", "ds.json", "accelerate launch"),
        ("logging_steps", 10, "every step is a row of metrics.jsonl"),
        ("max_length", 512, "a prompt has at most max_prompt_tokens, an answer max_new_tokens"),
        ("lora_r", 8, "lora.r=16"),
        ("dtype", "float16", "\"dtype\" is 'float16': float16 is for inference alone"),
    ],
)
def test_keys_of_other_tools_are_told_what_to_do_instead(key: str, value: object, part: str) -> None:
    assert part in message(**{key: value})


def test_no_hint_is_a_key() -> None:
    assert not RecoverConfig.hints.keys() & {*RecoverConfig.model_fields, *RecoverConfig.aliases}
    assert set(RecoverConfig.aliases.values()) <= set(RecoverConfig.model_fields)


def test_numbers_as_people_write_them() -> None:
    # YAML 1.1 reads 1e-4 as a string
    made = config(**parse_overrides(["learning_rate=1e-4", "beta=1", "temperature=0.7"]))
    assert (made.learning_rate, made.beta, made.temperature) == (1e-4, 1.0, 0.7)
    assert isinstance(made.beta, float)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"rnak": 3}, 'unknown key "lora.rnak". Did you mean "rank"? Known: rank, alpha, targets'),
        ({"rank": 0}, '"lora.rank" is 0'),
        ({"rank": 1.5}, '"lora.rank" is 1.5'),
        ({"alpha": -1}, '"lora.alpha" is -1'),
        ({"targets": 5}, "lora.targets"),
    ],
)
def test_bad_lora_settings(value: object, part: str) -> None:
    assert part in message(lora=value)


@pytest.mark.parametrize(("key", "value"), [("measure", "angle"), ("weight", 0)])
def test_bad_alignment_settings(key: str, value: object) -> None:
    assert f'"alignment.{key}" is ' in message(alignment={key: value})
