"""Which combinations of settings make no sense, and which have no effect."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from remend.data import tasks
from remend.recovery.settings import BASE, EMA_RATE, SELF, RecoverConfig
from remend.recovery.streams import SELF_PROMPTS, Stream, asks_for_pools, bootstrap_budget, reuses_repair
from remend.training.teachers.cache import is_cache


def problems(config: RecoverConfig, streams: Sequence[Stream], caches: Mapping[str, bool]) -> list[str]:
    """Combinations that make no sense, each with the reason. `caches` says which teachers are caches."""
    found = [p for stream in streams for p in _stream_problems(config, stream, caches.get(stream.teacher, False))]
    if not any(s.weight for s in streams):
        found.append("every stream has weight 0: nothing would be trained")
    # under a fresh adapter the base is the student as it came in
    own = [s for s in streams if s.moving and (s.teacher != BASE or config.lora) and not s.demonstrations]
    if any(s.weight for s in streams) and all(s in own for s in streams if s.weight):
        found.append(
            f"teacher {own[0].teacher} without demonstrations gives the student's own answer back: there is "
            "nothing to learn. Add a stream with a healthy teacher and a weight, or demonstrations: true"
        )
    if (config.select == "best" or config.patience) and not config.eval_every:
        found.append("select: best and patience need evaluations; set eval_every, e.g. 10")
    if config.save_every and config.save_every % config.updates_a_round:
        found.append(
            f"save_every {config.save_every} is no multiple of updates_per_rollout {config.updates_per_rollout}: a run "
            "resumed inside a round would sample other rollouts. Choose a multiple"
        )
    if config.select == "best" and config.eval_every > config.steps > 0:
        found.append(f"select: best would never look: eval_every {config.eval_every} is above steps {config.steps}")
    if config.bootstrap_steps and config.bootstrap_steps > config.steps:
        found.append(
            f"bootstrap_steps {config.bootstrap_steps} is above steps {config.steps}: nothing would be on-policy"
        )
    text = config.demonstration_template
    if text is not None and not all(text.count(part) == 1 for part in ("{prompt}", "{demonstration}")):
        found.append("demonstration_template must hold {prompt} and {demonstration}, each once")
    if config.bootstrap == "repair" and not (config.repair and reuses_repair(config, streams)):
        found.append(
            "bootstrap: repair trains on the answers that repair was fitted to: the reference's, at temperature 1, to "
            "the prompts of one stream. That wants repair: true and a single stream with the reference as teacher, "
            "policy: on, temperature: 1 and no demonstrations; bootstrap: on samples for any stream what it lacks"
        )
    if asks_for_pools(config) and not any(s.on_policy for s in streams):
        found.append(f"bootstrap: {config.bootstrap} has nothing to prepare: every stream is off-policy throughout")
    return found


def _stream_problems(config: RecoverConfig, stream: Stream, cached: bool) -> Iterator[str]:
    where = f"streams.{stream.name}: " if config.streams else ""
    if stream.teacher == "live" and not stream.demonstrations:
        yield f"{where}teacher live without demonstrations is the student itself: it teaches nothing"
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
    if cached and stream.on_policy:
        yield f"{where}a cached teacher has scored its own completions only, never the student's; set policy: off"
    if cached and stream.data:
        yield f"{where}a cached teacher brings its own prompts; leave data out"
    if cached and stream.demonstrations:
        yield f"{where}a cached teacher has seen no demonstrations; leave them out, or name the model"
    if cached and stream.top_k:
        yield f"{where}the cache {stream.teacher} was cut to its own top k when it was made; leave top_k out"


def notes(config: RecoverConfig, streams: Sequence[Stream]) -> list[str]:
    """What is allowed and may not be meant."""
    budget = bootstrap_budget(config)
    if not asks_for_pools(config) or not any(s.on_policy for s in streams) or not budget >= config.steps > 0:
        return []
    may = "is" if config.bootstrap == "on" else "may be"
    return [
        f"bootstrap {may} all of the run: at most {budget} of {config.steps} steps, so nothing {may} on-policy; "
        "policy: off says that plainly, a lower bootstrap_steps leaves steps for the student's own completions"
    ]


def _unused_counts(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    sampled = [s for s in streams if not is_cache(s.teacher) and (s.on_policy < 1 or config.bootstrap != "off")]
    if config.off_policy_passes != _default("off_policy_passes") and not sampled:
        yield "off_policy_passes has no effect, since no teacher is asked for completions to train on"
    evaluations = config.steps // config.eval_every if config.eval_every else 0
    if config.patience and evaluations and config.patience >= evaluations:
        yield f"patience {config.patience} has no effect: {config.steps} steps have {evaluations} evaluations"
    if len(streams) == 1 and streams[0].share != 1:
        yield f"share of {streams[0].name} has no effect, since it is the only stream"


def _unused_of_caches(config: RecoverConfig, streams: Sequence[Stream]) -> Iterator[str]:
    alone = all(is_cache(s.teacher) for s in streams)
    for stream in streams:
        if not is_cache(stream.teacher):
            continue
        given, named = (config.streams or {}).get(stream.name), []
        for key in ("eval_data", "held_out", "temperature", "max_new_tokens"):
            said = given is not None and getattr(given, key) is not None
            if said or (alone and getattr(config, key) != _default(key)):
                named.append(key)
        if named:
            yield (
                f"{', '.join(named)} of {stream.name} changes nothing that is trained on or measured: the cached "
                "teacher brings its own prompts and completions"
            )


def _default(key: str) -> object:
    return RecoverConfig.model_fields[key].default


def warnings(config: RecoverConfig, streams: Sequence[Stream]) -> list[str]:
    """Settings that have no effect."""
    found = []
    if config.demonstration_template and not any(s.demonstrations for s in streams):
        found.append("demonstration_template has no effect, since no stream uses demonstrations")
    if (config.ema.rate, config.ema.every) != (EMA_RATE, 1) and not any(s.teacher == "ema" for s in streams):
        found.append("ema has no effect, since no stream has teacher: ema")
    if config.self_prompts and not any(s.data == SELF for s in streams):
        found.append("self_prompts has no effect, since no stream has data: self")
    asked = config.updates_per_rollout or 1
    if asked > 1 and not any(s.on_policy for s in streams):
        found.append("updates_per_rollout has no effect: no stream samples from the student")
    elif asked > config.steps > 0:
        found.append(
            f"updates_per_rollout {asked} is above steps {config.steps}: one round of sampling feeds the whole run"
        )
    found += [*_unused_counts(config, streams), *_unused_of_caches(config, streams)]
    for stream in streams:
        if stream.task and not (stream.demonstrations and config.bootstrap == "auto"):
            found.append(f"task of {stream.name} has no effect without demonstrations and bootstrap: auto")
        beta = stream.loss.parameters.get("beta") if stream.loss.name == "jsd" else None
        for near, name in ((0.0, "forward KL"), (1.0, "reverse KL")):
            if isinstance(beta, float) and abs(beta - near) < 0.05:
                found.append(
                    f"beta {beta:g} is close to {near:g} but is no {name}: the generalised JSD shrinks there "
                    f"(about {abs(beta - near):g} of the KL), so the same learning rate does less; "
                    f"{near:g} is the {name} itself"
                )
    if config.bootstrap_steps and config.bootstrap == "off":
        found.append("bootstrap_steps has no effect with bootstrap: off")
    return found
