"""The verbs around a recovery: demo, recover, check, export, prompts, cache-teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import remend
from remend.cli.from_settings import FIXED, MODEL, Values, command, options_of, parameter, recipe_options
from remend.cli.show import print_line, show, show_cache, show_export
from remend.cli.show_check import show_check
from remend.errors import InputError
from remend.files.launch import go_alone, rank
from remend.files.run_directory import RunDirectory
from remend.files.settings import PLACEMENT, Placement
from remend.recovery.settings import RecoverConfig
from remend.training.cache_settings import CacheSettings

Out = Annotated[str | None, typer.Option(help="A new directory for everything that is written.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a model directory run its own Python.")]


def demo(
    out: Out = None,
    steps: Annotated[int | None, typer.Option(help="Training steps after the repair; by default 4.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    model: Annotated[str, typer.Option(help="The healthy model to start from.")] = "smollm2",
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the same student without repair too, and show both on one page.")
    ] = False,
) -> None:
    """Quantize a real model to 3 bits so that it babbles, bring it back, and show the difference."""
    from remend.recovery.job import result_of
    from remend.studies.demo import COMPARISON, PLAIN_RUN, STEPS

    result = remend.demo(out, model=model, steps=STEPS if steps is None else steps, seed=seed, compare=compare)
    show(result)
    if compare:
        print_line("\nBy training alone:")
        show(result_of(RunDirectory(result.out / PLAIN_RUN)))
        print_line(f"\nboth on one page: {result.out / COMPARISON / 'report.html'}")


WORDS = parameter(
    "words",
    list[str] | None,
    typer.Argument(
        help="A recipe file, then any keys as key=value; they and the options go over the recipe's.",
        metavar="RECIPE.yaml KEY=VALUE",
    ),
    None,
)
AS = parameter("as_", str | None, typer.Option("--as", help="dense: the same as --as-dense.", metavar="dense"), None)
CONFIG = parameter(
    "config", str | None, typer.Option(help="The recipe file, as an option.", metavar="RECIPE.yaml"), None
)
RESUME = parameter(
    "resume",
    str | None,
    typer.Option(
        help="Continue the interrupted run in this directory; with more --steps also a finished one.", metavar="DIR"
    ),
    None,
)
FILES = parameter("files", bool, typer.Option(help="Also look at the files that the recipe names."), True)
MEASURE = parameter(
    "measure",
    bool,
    typer.Option("--measure", help="Load the models and time a step of them, for a better estimate of the time."),
    False,
)


def _recover(fixed: Values, given: Values) -> None:
    recipe, overrides = _arguments(fixed, given)
    result = remend.recover(recipe, resume=fixed["resume"], **overrides)
    if rank() == 0:
        show(result)


def _check(fixed: Values, given: Values) -> None:
    recipe, overrides = _arguments(fixed, given)
    if fixed["measure"] and not fixed["files"]:
        raise InputError("--measure loads the models, and --no-files looks at none; leave one out")
    checked = remend.check(recipe, files=fixed["files"], **overrides)
    go_alone()  # the others are gone, and wouldn't join what is measured
    show_check(checked, measure=fixed["measure"])


def export(
    source: Annotated[str, typer.Argument(help="A run's directory, or a model.")],
    out: Annotated[str, typer.Option(help="A new directory.")],
    format: Annotated[
        str, typer.Option(help="dense, compressed-tensors, gguf or gguf:q4_0 …; a wrong name lists all.")
    ] = "dense",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of one file of weights, such as 5GB; by default transformers' limit.")
    ] = None,
    placement: Annotated[Placement, typer.Option(help=f"{PLACEMENT}.")] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Write a model in the format that will be served, read it back, and compare it with what was measured."""
    done = remend.export(
        source,
        out,
        format=format,
        max_shard_size=max_shard_size,
        placement=placement,
        trust_remote_code=trust_remote_code,
    )
    show_export(out, done)


def push(
    source: Annotated[str, typer.Argument(help="A finished run, or a complete model's directory.")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the hub, or NAME for one of your own.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; without this it is private.")] = False,
) -> None:
    """Upload a finished model to the Hugging Face hub: private unless you say --public."""
    from remend.exporting.push import push as upload

    print_line(upload(source, repo, public=public))


def prompts(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[str, typer.Option(help="A new file of JSON lines; NAME.stats.json beside it says how it was made.")],
    n: Annotated[int, typer.Option("--n", help="How many prompts.")] = 512,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longer prompts are dropped, never cut.")] = 96,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps.")] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Let a model write prompts itself: what users would ask, sampled from its chat template's user turn."""
    from remend.recovery.self_prompt_filters import Counts

    done = remend.write_self_prompts(
        model,
        out,
        n=n,
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    counts = Counts(**done["counts"])
    print_line(f"{out}: {counts.kept} prompts of {counts.attempts} tries, {done['seconds']:.1f} s")
    print_line(f"removed: {counts.describe()}")


def _cache_teacher(fixed: Values, given: Values) -> None:
    show_cache(fixed["out"], remend.cache_teacher(fixed["model"], fixed["out"], **given))


def _arguments(fixed: Values, given: Values) -> tuple[Path | None, Values]:
    """The recipe and what goes over it: words of the form key=value, and options. Raises InputError for both of one."""
    from remend.files.settings import parse_overrides

    if fixed["as_"] not in (None, "dense"):
        raise InputError(f'--as is "{fixed["as_"]}"; allowed is dense')
    words = list(fixed["words"] or [])
    recipe = Path(words.pop(0)) if words and "=" not in words[0] else None
    if recipe and fixed["config"]:
        raise InputError(f"two recipes are given, {recipe} and --config {fixed['config']}; leave one out")
    recipe = Path(fixed["config"]) if fixed["config"] else recipe
    overrides = parse_overrides(words)
    if twice := sorted(overrides.keys() & given.keys()):
        raise InputError(f"{twice[0]} is given as --{twice[0].replace('_', '-')} and as {twice[0]}=…; leave one out")
    return recipe, {**overrides, **given, **({"as_dense": True} if fixed["as_"] else {})}


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    options = recipe_options(RecoverConfig)
    about = "Recover a degraded student: by a recipe, or with --student and --teacher alone."
    app.command()(demo)
    app.command("recover")(command((WORDS, CONFIG, AS, RESUME), options, _recover, about))
    about = "Check a recipe without training: every problem and warning at once."
    app.command("check")(command((WORDS, CONFIG, AS, FILES, MEASURE), options, _check, about))
    for verb in (export, push, prompts):
        app.command()(verb)
    about = "Store a teacher's completions and its top-k scores of them, for where it does not fit beside the student."
    app.command("cache-teacher")(command(FIXED, options_of(CacheSettings), _cache_teacher, about))
