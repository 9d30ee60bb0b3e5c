"""Which combinations of settings make no sense, and which have no effect: one row a rule.

A row says when it applies, given the recipe and its streams, and what is then said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from remend.data import tasks
from remend.recovery.bootstrap import asks_for_pools, bootstrap_budget, reuses_repair
from remend.recovery.settings import EMA_RATE, SELF, RecoverConfig
from remend.recovery.streams import SELF_PROMPTS, Stream


class Rule(NamedTuple):
    """A row of a table: `when` it applies, and what it `says`."""

    when: Callable[[RecoverConfig, Sequence[Stream]], bool]
    says: Callable[[RecoverConfig, Sequence[Stream]], str]


def said(table: Sequence[Rule], config: RecoverConfig, streams: Sequence[Stream]) -> list[str]:
    """What the rules that apply say, in the table's order."""
    return [rule.says(config, streams) for rule in table if rule.when(config, streams)]


def _gives_back(config: RecoverConfig, stream: Stream) -> bool:
    """Whether the teacher says what the student says. Under a fresh adapter the base is the student as it came in."""
    own = stream.teacher.moving and (not stream.teacher.healthy or config.lora is not None)
    return own and not stream.demonstrations


def _whole_template(text: str | None) -> bool:
    return text is None or all(text.count(part) == 1 for part in ("{prompt}", "{demonstration}"))


PROBLEMS = [
    Rule(
        lambda c, s: not any(x.weight for x in s),
        lambda c, s: "every stream has weight 0: nothing would be trained",
    ),
    Rule(
        lambda c, s: any(x.weight for x in s) and all(_gives_back(c, x) for x in s if x.weight),
        lambda c, s: (
            f"teacher {next(x for x in s if _gives_back(c, x)).teacher.name} without demonstrations gives the "
            "student's own answer back: there is nothing to learn. Add a stream with a healthy teacher and a weight, or"
            " demonstrations: true"
        ),
    ),
    Rule(
        lambda c, s: (c.select == "best" or bool(c.patience)) and not c.eval_every,
        lambda c, s: "select: best and patience need evaluations; set eval_every, e.g. 10",
    ),
    Rule(
        lambda c, s: bool(c.save_every and c.save_every % c.updates_a_round),
        lambda c, s: (
            f"save_every {c.save_every} is no multiple of updates_per_rollout {c.updates_per_rollout}: a run resumed "
            "inside a round would sample other rollouts. Choose a multiple"
        ),
    ),
    Rule(
        lambda c, s: c.select == "best" and c.eval_every > c.steps > 0,
        lambda c, s: f"select: best would never look: eval_every {c.eval_every} is above steps {c.steps}",
    ),
    Rule(
        lambda c, s: (c.bootstrap_steps or 0) > c.steps,
        lambda c, s: f"bootstrap_steps {c.bootstrap_steps} is above steps {c.steps}: nothing would be on-policy",
    ),
    Rule(
        lambda c, s: not _whole_template(c.demonstration_template),
        lambda c, s: "demonstration_template must hold {prompt} and {demonstration}, each once",
    ),
    Rule(
        lambda c, s: c.bootstrap == "repair" and not (c.repair and reuses_repair(c, s)),
        lambda c, s: (
            "bootstrap: repair trains on the answers that repair was fitted to: the reference's, at temperature 1, to "
            "the prompts of one stream. That wants repair: true and a single stream with the reference as teacher, "
            "policy: on, temperature: 1 and no demonstrations; bootstrap: on samples for any stream what it lacks"
        ),
    ),
    Rule(
        lambda c, s: asks_for_pools(c) and not any(x.on_policy for x in s),
        lambda c, s: f"bootstrap: {c.bootstrap} has nothing to prepare: every stream is off-policy throughout",
    ),
]

WARNINGS = [
    Rule(
        lambda c, s: bool(c.demonstration_template) and not any(x.demonstrations for x in s),
        lambda c, s: "demonstration_template has no effect, since no stream uses demonstrations",
    ),
    Rule(
        lambda c, s: (c.ema.rate, c.ema.every) != (EMA_RATE, 1) and not any(x.teacher.name == "ema" for x in s),
        lambda c, s: "ema has no effect, since no stream has teacher: ema",
    ),
    Rule(
        lambda c, s: bool(c.self_prompts) and not any(x.data == SELF for x in s),
        lambda c, s: "self_prompts has no effect, since no stream has data: self",
    ),
    Rule(
        lambda c, s: (c.updates_per_rollout or 1) > 1 and not any(x.on_policy for x in s),
        lambda c, s: "updates_per_rollout has no effect: no stream samples from the student",
    ),
    Rule(
        lambda c, s: (c.updates_per_rollout or 1) > c.steps > 0 and any(x.on_policy for x in s),
        lambda c, s: (
            f"updates_per_rollout {c.updates_per_rollout} is above steps {c.steps}: one round of sampling feeds the "
            "whole run"
        ),
    ),
    Rule(
        lambda c, s: c.off_policy_passes != _default("off_policy_passes") and not any(_asked(c, x) for x in s),
        lambda c, s: "off_policy_passes has no effect, since no teacher is asked for completions to train on",
    ),
    Rule(
        lambda c, s: 0 < _evaluations(c) <= (c.patience or 0),
        lambda c, s: f"patience {c.patience} has no effect: {c.steps} steps have {_evaluations(c)} evaluations",
    ),
    Rule(
        lambda c, s: len(s) == 1 and s[0].share != 1,
        lambda c, s: f"share of {s[0].name} has no effect, since it is the only stream",
    ),
]

LATE_WARNINGS = [
    Rule(
        lambda c, s: bool(c.bootstrap_steps) and c.bootstrap == "off",
        lambda c, s: "bootstrap_steps has no effect with bootstrap: off",
    ),
]

NOTES = [
    Rule(
        lambda c, s: asks_for_pools(c) and any(x.on_policy for x in s) and bootstrap_budget(c) >= c.steps > 0,
        lambda c, s: (
            f"bootstrap {'is' if c.bootstrap == 'on' else 'may be'} all of the run: at most {bootstrap_budget(c)} of "
            f"{c.steps} steps, so nothing {'is' if c.bootstrap == 'on' else 'may be'} on-policy; policy: off says that "
            "plainly, a lower bootstrap_steps leaves steps for the student's own completions"
        ),
    ),
]


def _asked(config: RecoverConfig, stream: Stream) -> bool:
    """Whether the stream's teacher is asked for completions to train on."""
    return not stream.teacher.brings_prompts and (stream.on_policy < 1 or config.bootstrap != "off")


def _evaluations(config: RecoverConfig) -> int:
    return config.steps // config.eval_every if config.eval_every else 0


def _default(key: str) -> object:
    return RecoverConfig.model_fields[key].default


def problems(config: RecoverConfig, streams: Sequence[Stream]) -> list[str]:
    """Combinations that make no sense, each with the reason."""
    return [p for stream in streams for p in _stream_problems(config, stream)] + said(PROBLEMS, config, streams)


def warnings(config: RecoverConfig, streams: Sequence[Stream]) -> list[str]:
    """Settings that have no effect."""
    of_streams = [w for stream in streams for w in _stream_warnings(config, stream)]
    brought = list(_unused_beside_brought_prompts(config, streams))
    return said(WARNINGS, config, streams) + brought + of_streams + said(LATE_WARNINGS, config, streams)


def notes(config: RecoverConfig, streams: Sequence[Stream]) -> list[str]:
    """What is allowed and may not be meant."""
    return said(NOTES, config, streams)


def _stream_problems(config: RecoverConfig, stream: Stream) -> Iterator[str]:
    where = f"streams.{stream.name}: " if config.streams else ""
    if not re.fullmatch(r"[\w-]+", stream.name):
        yield f"{where}a stream's name is part of file names; allowed are letters, digits, _ and -"
    if stream.task is not None and stream.task not in tasks.names():
        yield f'{where}unknown task "{stream.task}"; known: {", ".join(tasks.names())}'
    if stream.data == SELF and stream.held_out and stream.held_out >= (config.self_prompts or SELF_PROMPTS):
        yield f"{where}held_out {stream.held_out} leaves no self-written prompt to train on; raise self_prompts"
    if stream.demonstrations and stream.data == SELF:
        yield f"{where}self-written prompts have no demonstrations; give data with them"
    if stream.skip_first >= stream.lengths[0]:
        yield (
            f"{where}skip_first_tokens {stream.skip_first} leaves nothing of rollouts of {stream.lengths[0]} tokens; "
            "lower it, or raise max_new_tokens"
        )
    yield from (f"{where}{reason}" for reason in stream.teacher.refuses(stream))


def _stream_warnings(config: RecoverConfig, stream: Stream) -> Iterator[str]:
    if stream.task and not (stream.demonstrations and config.bootstrap == "auto"):
        yield f"task of {stream.name} has no effect without demonstrations and bootstrap: auto"
    beta = stream.loss.parameters.get("beta") if stream.loss.name == "jsd" else None
    for near, name in ((0.0, "forward KL"), (1.0, "reverse KL")):
        if isinstance(beta, float) and abs(beta - near) < 0.05:
            yield (
                f"beta {beta:g} is close to {near:g} but is no {name}: the generalised JSD shrinks there "
                f"(about {abs(beta - near):g} of the KL), so the same learning rate does less; "
                f"{near:g} is the {name} itself"
            )


def _unused_beside_brought_prompts(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    alone = all(s.teacher.brings_prompts for s in streams)
    for stream in streams:
        if not stream.teacher.brings_prompts:
            continue
        given = (config.streams or {}).get(stream.name)
        keys = [
            key
            for key in ("eval_data", "held_out", "temperature", "max_new_tokens")
            if (given is not None and getattr(given, key) is not None)
            or (alone and getattr(config, key) != _default(key))
        ]
        if keys:
            yield (
                f"{', '.join(keys)} of {stream.name} changes nothing that is trained on or measured: the cached "
                "teacher brings its own prompts and completions"
            )
