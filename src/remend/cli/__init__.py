"""The command line: parses, calls one function a verb, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import remend
from remend.cli import grading, measuring, studying
from remend.cli.imports import taken_out
from remend.cli.show import print_line, show, show_cache, show_damage
from remend.errors import InputError, RemendError
from remend.files import recipes
from remend.plugins import import_installed, import_modules

app = typer.Typer(
    help="Bring a degraded language model back, with its own healthy past as the teacher.",
    epilog="--import MODULE, anywhere: import a module of yours that registers a loss, a teacher, a task, …",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
degrade = typer.Typer(help="Make a damaged student from a healthy model.", no_args_is_help=True)
app.add_typer(degrade, name="degrade")
task = typer.Typer(help="List the tasks, and write rows of those that make their own.", no_args_is_help=True)
app.add_typer(task, name="tasks")
recipe = typer.Typer(help="List the recipes that ship with remend, and copy one.", no_args_is_help=True)
app.add_typer(recipe, name="recipes")
measuring.add_to(app)
grading.add_to(app)
studying.add_to(app)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe file, then key=value …", metavar="[RECIPE.yaml] [KEY=VALUE]…")
]
Student = Annotated[str | None, typer.Option(help="The damaged model: a directory, GGUF file, hub id[@revision].")]
Teacher = Annotated[
    str | None, typer.Option(help="The healthy reference, named likewise; smollm2 is the embedded model.")
]
Data = Annotated[str | None, typer.Option(help="Training prompts: JSON lines with a prompt, or a datasets id.")]
As = Annotated[str | None, typer.Option("--as", help="dense: train weights freely whose grid can't be held.")]
Out = Annotated[str | None, typer.Option(help="A new directory for everything that is written.")]


@app.command()
def demo(
    out: Out = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the recovery.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of rollouts and order.")] = 0,
    model: Annotated[str, typer.Option(help="The healthy model to start from.")] = "smollm2",
) -> None:
    """Quantize a real model to 3 bits so that it babbles, bring it back, and show the difference."""
    from remend.studies.demo import STEPS

    show(remend.demo(out, model=model, steps=STEPS if steps is None else steps, seed=seed))


@app.command()
def recover(
    words: Overrides = None,
    student: Student = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    as_: As = None,
    resume: Annotated[str | None, typer.Option(help="Continue the interrupted run in this directory.")] = None,
) -> None:
    """Recover a degraded student: remend recover RECIPE.yaml [key=value …], or with the four options."""
    recipe, overrides = _arguments(words, as_, student=student, teacher=teacher, data=data, out=out)
    show(remend.recover(recipe, resume=resume, **overrides))


@app.command()
def check(
    words: Overrides = None,
    student: Student = None,
    teacher: Teacher = None,
    data: Data = None,
    out: Out = None,
    as_: As = None,
    files: Annotated[bool, typer.Option(help="Also look at the files that the recipe names.")] = True,
) -> None:
    """Check a recipe without training: every problem and warning at once."""
    recipe, overrides = _arguments(words, as_, student=student, teacher=teacher, data=data, out=out)
    found = remend.check(recipe, files=files, **overrides)
    console = Console(highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print("warning:", warning, markup=False)
    found.raise_problems()
    for note in found.notes:
        console.print("note:", note, markup=False)
    console.print(found.verdict(), markup=False)


Model = Annotated[str, typer.Argument(help="The healthy model: a directory, GGUF file, hub id[@revision], smollm2.")]
NewDirectory = Annotated[str, typer.Option(help="A new directory.")]
Skip = Annotated[list[str] | None, typer.Option(help="Layers to leave as they are, e.g. '*.down_proj'; repeatable.")]
Seed = Annotated[int, typer.Option(help="Seed of calibration text and training order.")]
Calibration = Annotated[str | None, typer.Option(help="Prompts for calibration; by default bundled ones.")]
Samples = Annotated[int, typer.Option(help="Calibration prompts; the reference answers them itself.")]
Probe = Annotated[bool, typer.Option(help="Measure the damage on the demo's held-out prompts.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a model directory run its own Python.")]


@degrade.command()
def quantize(
    model: Model,
    out: NewDirectory,
    format: Annotated[str, typer.Option(help="int3-g64, int4-g32-sym, gguf:q4_0, nf4, nvfp4, …")] = "int3-g64",
    method: Annotated[str, typer.Option(help="How weights are put on the grid: rtn or gptq.")] = "rtn",
    skip: Skip = None,
    data: Calibration = None,
    samples: Samples = 48,
    seed: Seed = 0,
    probe: Probe = True,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Quantize every linear layer of the decoder onto a grid."""
    rest: dict[str, Any] = {"data": data, "samples": samples, "seed": seed, "probe": probe}
    rest |= {"device": device, "trust_remote_code": trust_remote_code}
    show_damage(out, remend.quantize(model, out, format=format, method=method, skip=skip or (), **rest))


@degrade.command()
def prune(
    context: typer.Context,
    model: Model,
    out: NewDirectory,
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt (zeros); depth (whole layers); width (channels, heads).")
    ] = "magnitude",
    sparsity: Annotated[str, typer.Option(help="Share of zeros, 0.5, or how many of how many stay, 2:4.")] = "0.5",
    scope: Annotated[str, typer.Option(help="The share holds in every layer, or over all: layer, global.")] = "layer",
    layers: Annotated[str, typer.Option(help="depth: how many to remove, or which: 5; 23,24; 23, is that one.")] = "5",
    by: Annotated[str, typer.Option(help="depth: choose layers by block-influence or angular.")] = "block-influence",
    ffn: Annotated[float, typer.Option(help="width: share of feed-forward channels to remove.")] = 0.25,
    heads: Annotated[int, typer.Option(help="width: key-value head groups to remove from each layer.")] = 0,
    skip: Skip = None,
    data: Calibration = None,
    samples: Samples = 48,
    seed: Seed = 0,
    probe: Probe = True,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Set weights to zero, or remove layers, channels and heads."""
    _only_of(context, method, layers)
    rest: dict[str, Any] = {"data": data, "samples": samples, "seed": seed, "probe": probe}
    rest |= {"device": device, "trust_remote_code": trust_remote_code}
    if method == "depth":
        chosen, how = parse_layers(layers, by)
        done = remend.prune_depth(model, out, layers=chosen, method=how, **rest)
    elif method == "width":
        done = remend.prune_width(model, out, ffn=ffn, heads=heads, **rest)
    else:
        done = remend.prune(model, out, method=method, sparsity=sparsity, scope=scope, skip=skip or (), **rest)
    show_damage(out, done)


@degrade.command()
def finetune(
    model: Model,
    data: Annotated[str, typer.Option(help="Rows with a prompt and a completion: JSON lines or a datasets id.")],
    out: NewDirectory,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; by default one epoch.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, in place of steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's peak.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Longer rows are dropped, never cut.")] = 1024,
    lora_rank: Annotated[int | None, typer.Option(help="Train an adapter of this rank and fold it in.")] = None,
    seed: Seed = 0,
    probe: Probe = True,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Fine-tune on a task by cross-entropy of its completions: how forgetting is produced."""
    lora = None if lora_rank is None else {"rank": lora_rank}
    rest: dict[str, Any] = {
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "lora": lora,
        "seed": seed,
        "probe": probe,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    done = remend.finetune(model, out, data=data, steps=steps, epochs=epochs, learning_rate=learning_rate, **rest)
    show_damage(out, done)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A run's directory, or a model.")],
    out: NewDirectory,
    format: Annotated[str, typer.Option(help="dense, compressed-tensors, gguf or gguf:q4_0 …")] = "dense",
    trust_remote_code: Trust = False,
) -> None:
    """Write a model in the container that is served, read it back and compare it with what was measured."""
    done = remend.export(source, out, format=format, trust_remote_code=trust_remote_code)
    print_line(f"{out}: {done['container']}, {done['bytes']} bytes; check: {done['check']}")


@app.command()
def prompts(
    model: Model,
    out: Annotated[str, typer.Option(help="A new file of JSON lines; NAME.stats.json beside it says how it was made.")],
    n: Annotated[int, typer.Option("--n", help="How many prompts.")] = 512,
    seed: Annotated[int, typer.Option(help="Settles the prompts.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the sampling; lower is plainer and less varied.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="A prompt that is longer is dropped, never cut.")] = 96,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Let a model write prompts itself: what users would ask, sampled from its chat template's user turn."""
    from remend.recovery.self_prompt_filters import Counts

    rest: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "device": device}
    rest["trust_remote_code"] = trust_remote_code
    done = remend.write_self_prompts(model, out, n=n, seed=seed, **rest)
    counts = Counts(**done["counts"])
    print_line(f"{out}: {counts.kept} prompts of {counts.attempts} tries, {done['seconds']:.1f} s")
    print_line(f"removed: {counts.describe()}")


@app.command("cache-teacher")
def cache_teacher(
    model: Model,
    data: Annotated[str, typer.Option(help="Prompts that the teacher answers: JSON lines or a datasets id.")],
    out: NewDirectory,
    k: Annotated[int, typer.Option("--k", help="Tokens stored by name at each position; the rest is one tail.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a completion.")] = 48,
    held_out: Annotated[int | None, typer.Option(help="Prompts set apart, answered greedily.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out prompts of their own, in place of that.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are dropped, never cut.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Of the sampling; scores are stored at 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of split and sampling.")] = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Store a teacher's completions and its top-k scores of them, for where it does not fit beside the student."""
    rest: dict[str, Any] = {"held_out": held_out, "eval_data": eval_data, "max_prompt_tokens": max_prompt_tokens}
    rest |= {"k": k, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "device": device}
    rest["trust_remote_code"] = trust_remote_code
    show_cache(out, remend.cache_teacher(model, out, data=data, **rest))


@task.command("ls")
def list_tasks(plain: Annotated[bool, typer.Option("--plain", help="One name a line.")] = False) -> None:
    """List the tasks."""
    width = max(map(len, remend.tasks.names()))
    for name in remend.tasks.names():
        print_line(name if plain else f"{name:<{width}}  {remend.tasks.get(name).about}")


@task.command("write")
def write_task(
    name: Annotated[str, typer.Argument(help="A task of remend tasks ls.")],
    out: Annotated[str, typer.Option(help="A new file of JSON lines.")],
    n: Annotated[int, typer.Option("--n", help="How many rows.")],
    split: Annotated[str, typer.Option(help="train or held_out; they share no item.")] = "train",
    seed: Annotated[int, typer.Option(help="Settles the rows.")] = 0,
) -> None:
    """Write a task's rows: prompt, demonstration and answer."""
    path = remend.tasks.write(name, out, split=split, n=n, seed=seed)
    print_line(f"{path}: {n} rows of {name} ({split}, seed {seed})")


@recipe.command("ls")
def list_recipes(plain: Annotated[bool, typer.Option("--plain", help="One name a line.")] = False) -> None:
    """List the recipes."""
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        print_line(name if plain else f"{name:<{width}}  {recipes.about(name)}")


@recipe.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe of remend recipes ls.")],
    directory: Annotated[str, typer.Argument(help="Where the copy goes.")],
) -> None:
    """Copy a recipe, to change and own it."""
    print_line(str(recipes.copy(name, directory)))


@app.command()
def version() -> None:
    """Print the version."""
    print_line(remend.__version__)


OWN_OPTIONS = {"depth": ("layers", "by"), "width": ("ffn", "heads")}
ZEROS_OPTIONS = ("sparsity", "scope", "skip")
"""What each method of prune takes; a method that OWN_OPTIONS lacks sets weights to zero."""


def _only_of(context: typer.Context, method: str, layers: str) -> None:
    """Raise InputError for options on the command line that the chosen method has no use for."""
    taken = OWN_OPTIONS.get(method, ZEROS_OPTIONS)
    known = [*ZEROS_OPTIONS, *OWN_OPTIONS["depth"], *OWN_OPTIONS["width"]]
    given = [n for n in known if str(context.get_parameter_source(n)).endswith("COMMANDLINE")]
    idle = [f"--{name}" for name in given if name not in taken]
    if idle:
        raise InputError(
            f"{', '.join(idle)} has no effect with --method {method}, which takes --{', --'.join(taken)}; leave it out"
        )
    if "by" in given and "," in layers:
        raise InputError(f"--by chooses layers, and --layers {layers} names them; leave one of them out")


def parse_layers(text: str, by: str) -> tuple[int | list[int], str]:
    """'5' is a number of layers to choose, '23,24' are the layers themselves, '23,' is one of them."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f'layers "{text}" is neither a number nor a list like 23,24,25') from None
    return (numbers[0], by) if "," not in text and numbers else (numbers, "list")


def _arguments(
    words: list[str] | None, held_as: str | None, **options: str | None
) -> tuple[Path | None, dict[str, Any]]:
    from remend.files.settings import parse_overrides

    if held_as not in (None, "dense"):
        raise InputError(f'--as is "{held_as}"; allowed is dense')
    words = list(words or []) + (["as_dense=true"] if held_as else [])
    recipe = Path(words.pop(0)) if words and "=" not in words[0] else None
    return recipe, {**parse_overrides(words), **{k: v for k, v in options.items() if v is not None}}


def main() -> None:
    """Entry point: errors that a user can mend are printed without a traceback, with exit code 2."""
    try:
        words, modules = taken_out(sys.argv[1:])
        import_installed()
        import_modules(modules)
        app(args=words)
    except RemendError as error:
        for line in str(error).split("\n"):
            sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; a recovery goes on with remend recover --resume DIR, a study as it began\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
