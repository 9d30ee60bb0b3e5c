"""Streams: how a recipe is resolved, what makes no sense, how a step is shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remend.errors import InputError
from remend.files.settings import build
from remend.maths.losses import choose, of_beta
from remend.recovery.rules import notes_of_length, problems, problems_of_length, warnings, warnings_of_length
from remend.recovery.settings import RecoverConfig
from remend.recovery.streams import reference_of, resolve, rows_of
from remend.training.teachers.cache import RECORD

PLAIN = {"data": "d", "teacher": "t"}


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """The name of a cached teacher; nobody opens it here."""
    (tmp_path / RECORD).touch()
    return str(tmp_path)


def config(**values: Any) -> RecoverConfig:
    return build(RecoverConfig, {"student": "s", "out": "o", **values}, "r")


def all_problems(made: RecoverConfig) -> list[str]:
    return [*problems(made, resolve(made)), *problems_of_length(made)]


def all_warnings(made: RecoverConfig) -> list[str]:
    return [*warnings(made, resolve(made)), *warnings_of_length(made, resolve(made))]


def two(**adapt: Any) -> dict[str, Any]:
    return {"recover": {"data": "p.jsonl", "teacher": "t"}, "adapt": {"data": "q.jsonl", "teacher": "ema", **adapt}}


def test_a_recipe_without_streams_is_one() -> None:
    (stream,) = resolve(config(teacher="t", data="d", beta=0.5, max_new_tokens=7))
    assert (stream.name, stream.teacher.name, stream.data, stream.loss) == ("recover", "t", "d", of_beta(0.5))
    assert (stream.lengths, stream.on_policy, stream.skip_first, stream.top_k) == ((7, 7), 1.0, 0, None)
    assert resolve(config(streams={"recover": PLAIN}, top_k=9)) == resolve(config(**PLAIN, top_k=9))


def test_streams_inherit_and_override() -> None:
    made = config(streams=two(demonstrations=True, policy=0.25, beta=1, max_new_tokens="4→8"), temperature=0.5)
    recover, adapt = resolve(made)
    assert (recover.temperature, recover.loss, recover.on_policy, recover.skip_first) == (0.5, of_beta(0), 1.0, 0)
    assert (adapt.temperature, adapt.loss, adapt.on_policy, adapt.skip_first) == (0.5, of_beta(1), 0.25, 3)
    shared = resolve(config(streams=two(), top_k=5, skip_first_tokens=2, max_new_tokens="4→8"))
    assert {(s.top_k, s.skip_first, s.lengths) for s in shared} == {(5, 2, (4, 8))}
    assert [adapt.length_at(step, 5) for step in range(1, 6)] == [4, 5, 6, 7, 8]
    assert reference_of(made) == "t"
    assert [s.on_policy for s in resolve(config(teacher="t", streams={"a": {"data": "d", "policy": False}}))] == [0.0]


def test_a_loss_by_name_stands_in_place_of_beta() -> None:
    """In the recipe or in a stream; the nearer level counts, whichever of the two it gives."""
    jsd = {"name": "jsd", "beta": 0.25}
    made = config(loss=jsd, streams={"a": PLAIN, "b": {**PLAIN, "beta": 1}, "c": {**PLAIN, "loss": {"name": "jsd"}}})
    assert [s.loss for s in resolve(made)] == [choose("jsd", {"beta": 0.25}), of_beta(1.0), of_beta(0.5)]
    assert (made.beta, made.model_dump()["loss"]) == (None, jsd)
    assert build(RecoverConfig, made.model_dump(), "as written") == made
    over = config(beta=1.0, streams={"a": PLAIN, "b": {**PLAIN, "loss": {"name": "forward_kl"}}})
    assert [s.loss for s in resolve(over)] == [of_beta(1.0), of_beta(0.0)]
    assert config(beta=None, **PLAIN).beta == 0.0


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"loss": {"name": "jds"}}, r'"loss" is .*: unknown loss "jds"; known: .*jsd.* Did you mean "jsd"\?'),
        ({"loss": {"name": "jsd", "beta": 2}}, '"loss" is .*beta is 2.0; allowed is above 0 and below 1'),
        ({"loss": {"beta": 0.5}}, r'"loss\.name" is missing'),
        ({"loss": "jds"}, "\"loss\" is 'jds': unknown loss"),
        ({"loss": {"name": "jsd"}, "beta": 0.0}, r"beta \(0\) is given too, and both choose the loss; leave one out"),
        (
            {"streams": {"a": {**PLAIN, "beta": 1, "loss": {"name": "jsd"}}}},
            r'"streams\.a\.loss" is .*beta \(1\) is given',
        ),
    ],
)
def test_a_loss_that_cannot_be_chosen(values: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        config(**PLAIN, **values)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r'streams.a: "teacher" is missing.*\n.*streams.b: "data" is missing'):
        resolve(config(streams={"a": {"data": "d"}, "b": {"teacher": "t"}}))
    with pytest.raises(InputError, match='"teacher" is missing'):
        reference_of(config(streams={"a": {"data": "d", "teacher": "ema", "demonstrations": True}}))


@pytest.mark.parametrize(
    ("shares", "size", "expected"),
    [((1, 1), 8, (4, 4)), ((3, 2), 10, (6, 4)), ((2, 1), 8, (5, 3)), ((100, 1), 4, (3, 1)), ((1, 1, 1), 4, (2, 1, 1))],
)
def test_a_step_is_shared_out(shares: tuple[int, ...], size: int, expected: tuple[int, ...]) -> None:
    streams = resolve(config(teacher="t", streams={f"s{i}": {"data": "d", "share": s} for i, s in enumerate(shares)}))
    assert tuple(rows_of(streams, size).values()) == expected


def test_more_streams_than_prompts() -> None:
    with pytest.raises(InputError, match="1 prompts and there are 2 streams"):
        rows_of(resolve(config(streams=two())), 1)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"streams": two(teacher="live")}, "live without demonstrations is the student itself"),
        ({"teacher": "t", "streams": {"a": {"data": "d", "teacher": "ema"}}}, "gives the student's own answer back"),
        ({"streams": two(data="self", demonstrations=True)}, "self-written prompts have no demonstrations"),
        ({"streams": two(demonstrations=True, max_new_tokens=3)}, "skip_first_tokens 3 leaves nothing"),
        ({"streams": {k: {**v, "weight": 0} for k, v in two().items()}}, "every stream has weight 0"),
        ({"streams": two(), "select": "best"}, "need evaluations; set eval_every"),
        ({"streams": two(), "patience": 2}, "need evaluations; set eval_every"),
        ({"streams": two(), "demonstration_template": "{prompt}"}, "must hold {prompt} and {demonstration}"),
        ({"streams": {"a": {"data": "d", "teacher": "t", "policy": "off"}}, "bootstrap": "on"}, "nothing to prepare"),
        ({"streams": two(), "bootstrap": "repair"}, "wants repair: true and a single stream"),
        ({"streams": {"a": PLAIN}, "bootstrap": "repair", "repair": False}, "wants repair: true"),
        ({"streams": {"a": {**PLAIN, "temperature": 0.5}}, "bootstrap": "repair"}, "temperature: 1"),
        ({"streams": {"../a": {"data": "d", "teacher": "t"}}}, "a stream's name is part of file names"),
        ({"streams": two(task="chess")}, 'unknown task "chess"; known: general, science, science-short'),
        ({"streams": two(data="self", teacher="t", held_out=9), "self_prompts": 9}, "leaves no self-written prompt"),
        ({"streams": two(), "bootstrap": "on", "bootstrap_steps": 99}, "nothing would be on-policy"),
        ({"streams": two(), "select": "best", "eval_every": 99}, "select: best would never look"),
        (
            {"streams": {**two(teacher="initial"), "recover": {"data": "d", "teacher": "t", "weight": 0}}},
            "teacher initial without demonstrations gives the student's own answer back",
        ),
    ],
)
def test_nonsense_is_refused_with_the_reason(values: dict[str, Any], part: str) -> None:
    made = config(**values)
    found = all_problems(made)
    assert any(part in line for line in found), found


@pytest.mark.parametrize(
    ("stream", "part"),
    [
        ({"policy": "on"}, "scored its own completions only"),
        ({"policy": "off", "demonstrations": True}, "has seen no demonstrations"),
        ({"policy": "off"}, "brings its own prompts"),
        ({"policy": "off", "top_k": 5}, "cut to its own top k"),
    ],
)
def test_what_a_cached_teacher_cannot_do(cache: str, stream: dict[str, Any], part: str) -> None:
    made = config(streams={"a": {"data": "d", "teacher": cache, **stream}})
    assert any(part in line for line in all_problems(made))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"demonstration_template": "{prompt} {demonstration}"}, "demonstration_template has no effect"),
        ({"ema": {"rate": 0.1}, "streams": None, "teacher": "t", "data": "d"}, "ema has no effect"),
        ({"self_prompts": 5}, "self_prompts has no effect"),
        ({"bootstrap_steps": 5}, "bootstrap_steps has no effect"),
        ({"steps": 48, "updates_per_rollout": 60, "save_every": 0}, "updates_per_rollout 60 is above steps 48"),
        ({"off_policy_passes": 3}, "off_policy_passes has no effect"),
        ({"steps": 48, "patience": 6, "eval_every": 8}, "patience 6 has no effect: 48 steps have 6 evaluations"),
        ({"streams": {"a": {"data": "d", "teacher": "t", "share": 2}}}, "share of a has no effect"),
    ],
)
def test_settings_without_effect_are_said(values: dict[str, Any], part: str) -> None:
    made = config(**{"streams": two(), **values})
    assert any(part in line for line in all_warnings(made))
    assert not all_warnings(config(streams=two()))


def test_what_a_cached_teacher_brings_itself_is_said(cache: str) -> None:
    alone = {"streams": {"a": {"teacher": cache, "policy": "off", "held_out": 3}}, "temperature": 0.5}
    found = list(warnings(config(**alone), resolve(config(**alone))))
    assert any(line.startswith("held_out, temperature of a changes nothing") for line in found)
    beside = {"streams": {"a": {"teacher": cache, "policy": "off"}, **two()}, "temperature": 0.5, "eval_data": "e"}
    assert not any("changes nothing" in line for line in warnings(config(**beside), resolve(config(**beside))))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bootstrap": "on", "bootstrap_steps": 48}, "bootstrap is all of the run: at most 48 of 48 steps"),
        ({"bootstrap": "auto", "bootstrap_steps": 48}, "bootstrap may be all of the run"),
        ({"bootstrap": "on", "bootstrap_steps": 9, "updates_per_rollout": 48}, "at most 48 of 48 steps"),
        ({"bootstrap": "on", "bootstrap_steps": 23}, None),
        ({"bootstrap": "on"}, None),
    ],
)
def test_a_run_that_is_all_bootstrap_is_told(values: dict[str, Any], said: str | None) -> None:
    made = config(streams=two(), steps=48, save_every=0, **values)
    assert not all_problems(made)
    found = list(notes_of_length(made, resolve(made)))
    assert (said in found[0]) if said else found == []


@pytest.mark.parametrize(
    ("values", "selects"),
    [
        ({}, "last"),
        ({"eval_every": 8}, "best"),
        ({"eval_every": 8, "select": "last"}, "last"),
        ({"steps": 48, "eval_every": 49}, "last"),  # of 48 steps none is evaluated
        ({"eval_every": 8, "steps": 0}, "last"),
    ],
)
def test_the_best_is_saved_where_some_are_evaluated(values: dict[str, Any], selects: str) -> None:
    assert config(teacher="t", data="d", **values).selects == selects


@pytest.mark.parametrize(
    ("values", "each"),
    [
        ({}, 2),
        ({"save_every": 0}, 2),
        ({"save_every": 5}, 2),  # a checkpoint waits for the end of a round
        ({"bootstrap": "on", "bootstrap_steps": 3}, 1),  # the last step of bootstrap ends a round
        ({"steps": 1}, 1),
        ({"updates_per_rollout": 1}, 1),
        ({"updates_per_rollout": 5}, 5),
    ],
)
def test_a_round_of_sampling_feeds_two_steps_where_nothing_is_said(values: dict[str, Any], each: int) -> None:
    made = config(streams=two(), **values)
    assert made.updates_a_round == each
    assert not all_problems(made)
