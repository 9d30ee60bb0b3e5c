"""Which combinations of settings make no sense, and which have no effect: one `if` a rule, with what is then said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from remend.data import tasks
from remend.recovery.bootstrap import bootstrap_budget, reuses_repair
from remend.recovery.settings import SELF, RecoverConfig
from remend.recovery.streams import SELF_PROMPTS, Stream
from remend.training.teachers import TEACHERS


def problems(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    """Combinations that make no sense, each with the reason."""
    for stream in streams:
        yield from _stream_problems(config, stream)
    on_policy, trained = any(s.on_policy for s in streams), [s for s in streams if s.weight]
    product = config.batch_size * config.gradient_accumulation
    if config.prompts_per_step and config.gradient_accumulation > 1 and config.prompts_per_step != product:
        yield (
            f"prompts_per_step is {config.prompts_per_step}, and batch_size · gradient_accumulation is "
            f"{config.batch_size} · {config.gradient_accumulation} = {product}; leave gradient_accumulation out, or "
            "prompts_per_step"
        )
    if not trained:
        yield "every stream has weight 0: nothing would be trained"
    if trained and all(_gives_back(config, s) for s in trained):
        yield (
            f"teacher {next(s for s in streams if _gives_back(config, s)).teacher.name} without demonstrations gives "
            "the student's own answer back: there is nothing to learn. Add a stream with a healthy teacher and a "
            "weight, or demonstrations: true"
        )
    if (config.select == "best" or config.patience) and not config.eval_every:
        yield "select: best and patience need evaluations; set eval_every, e.g. 10"
    template = config.demonstration_template
    if template is not None and any(template.count(part) != 1 for part in ("{prompt}", "{demonstration}")):
        yield "demonstration_template must hold {prompt} and {demonstration}, each once"
    if config.bootstrap == "repair" and not (config.repair and reuses_repair(config, streams)):
        yield (
            "bootstrap: repair trains on the answers that repair was fitted to: the reference's, at temperature 1, to "
            "the prompts of one stream. That wants repair: true and a single stream with the reference as teacher, "
            "policy: on, temperature: 1 and no demonstrations; bootstrap: on samples for any stream what it lacks"
        )
    if config.bootstrap == "repair" and config.repair_text:
        yield (
            "bootstrap: repair trains on answers of the teacher, and repair_text is fitted to in place of these; leave "
            "one of them out"
        )
    if config.bootstrap in ("auto", "on") and not on_policy:
        yield f"bootstrap: {config.bootstrap} has nothing to prepare: every stream is off-policy throughout"


def problems_of_length(config: RecoverConfig) -> Iterator[str]:
    """What makes no sense in a run of so many steps; asked once these are known."""
    if config.select == "best" and config.eval_every > config.steps > 0:
        yield f"select: best would never look: eval_every {config.eval_every} is above steps {config.steps}"
    if (config.bootstrap_steps or 0) > config.steps:
        yield f"bootstrap_steps {config.bootstrap_steps} is above steps {config.steps}: nothing would be on-policy"


def warnings_of_length(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    """Settings that have no effect in a run of so many steps."""
    updates = config.updates_per_rollout or 1
    if config.warm_up > config.steps > 0:
        yield f"warmup_steps {config.warm_up} is above steps {config.steps}: the peak learning rate is never reached"
    if updates > config.steps > 0 and any(s.on_policy for s in streams):
        yield f"updates_per_rollout {updates} is above steps {config.steps}: one round of sampling feeds the whole run"
    evaluations = config.steps // config.eval_every if config.eval_every else 0
    if 0 < evaluations <= (config.patience or 0):
        yield f"patience {config.patience} has no effect: {config.steps} steps have {evaluations} evaluations"


def warnings(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    """Settings that have no effect, however long the run is."""
    on_policy, updates = any(s.on_policy for s in streams), config.updates_per_rollout or 1
    if config.demonstration_template and not any(s.demonstrations for s in streams):
        yield "demonstration_template has no effect, since no stream uses demonstrations"
    for kind in TEACHERS.entries.values():
        for key in kind.recipe_keys:
            if getattr(config, key) != _default(key) and not any(key in s.teacher.recipe_keys for s in streams):
                yield f"{key} has no effect, since no stream has teacher: {kind.word}"
    if config.self_prompts and not any(s.data == SELF for s in streams):
        yield "self_prompts has no effect, since no stream has data: self"
    if updates > 1 and not on_policy:
        yield "updates_per_rollout has no effect: no stream samples from the student"
    asked = (not s.teacher.brings_prompts and (s.on_policy < 1 or config.bootstrap != "off") for s in streams)
    if config.off_policy_passes != _default("off_policy_passes") and not any(asked):
        yield "off_policy_passes has no effect, since no teacher is asked for completions to train on"
    if len(streams) == 1 and streams[0].share != 1:
        yield f"share of {streams[0].name} has no effect, since it is the only stream"
    yield from _unused_beside_brought_prompts(config, streams)
    for stream in streams:
        yield from _stream_warnings(config, stream)
    if config.bootstrap_steps and config.bootstrap == "off":
        yield "bootstrap_steps has no effect with bootstrap: off"


def notes_of_length(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    """What is allowed in a run of so many steps, and may not be meant."""
    budget, be = bootstrap_budget(config), "is" if config.bootstrap == "on" else "may be"
    # repair's answers are there already, and serve as many steps as they do
    whole = config.bootstrap in ("auto", "on") and budget >= config.steps > 0
    if whole and any(s.on_policy for s in streams):
        yield (
            f"bootstrap {be} all of the run: at most {budget} of {config.steps} steps, so nothing {be} on-policy; "
            "policy: off says that plainly, a lower bootstrap_steps leaves steps for the student's own completions"
        )


def _gives_back(config: RecoverConfig, stream: Stream) -> bool:
    """Whether the teacher says what the student says. Under a fresh adapter the base is the student as it came in."""
    own = stream.teacher.moving and (not stream.teacher.healthy or config.lora is not None)
    return own and not stream.demonstrations


def _default(key: str) -> object:
    return RecoverConfig.model_fields[key].get_default(call_default_factory=True)


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
    if caution := stream.loss.caution:
        yield caution


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
