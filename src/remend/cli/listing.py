"""What comes with remend: tasks, recipes, its version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

import remend
from remend.cli.show import print_line
from remend.files import recipes

task = typer.Typer(help="List the tasks, and write rows of those that make their own.", no_args_is_help=True)
recipe = typer.Typer(help="List the recipes that ship with remend, and copy one.", no_args_is_help=True)


Plain = Annotated[bool, typer.Option("--plain", help="One name per line.")]


def _list(about: Mapping[str, str], plain: bool) -> None:
    width = max(map(len, about))
    for name, text in about.items():
        print_line(name if plain else f"{name:<{width}}  {text}")


@task.command("ls")
def list_tasks(plain: Plain = False) -> None:
    """List the tasks."""
    _list({name: remend.tasks.get(name).about for name in remend.tasks.names()}, plain)


@task.command("write")
def write_task(
    name: Annotated[str, typer.Argument(help="A task; remend tasks ls lists them.")],
    out: Annotated[str, typer.Option(help="A new file of JSON lines.")],
    n: Annotated[int, typer.Option("--n", help="How many rows.")],
    split: Annotated[str, typer.Option(help="train or held_out; they share no item.")] = "train",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Write a task's rows: prompt, demonstration and answer."""
    path = remend.tasks.write(name, out, split=split, n=n, seed=seed)
    print_line(f"{path}: {n} rows of {name} ({split}, seed {seed})")


@recipe.command("ls")
def list_recipes(plain: Plain = False) -> None:
    """List the recipes, and the studies that `remend study` runs."""
    _list({name: recipes.about(name) for name in (*recipes.names(), *recipes.studies())}, plain)


@recipe.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe; remend recipes ls lists them.")],
    directory: Annotated[str, typer.Argument(help="Where the copy goes; by default here.")] = ".",
) -> None:
    """Copy a recipe, to change and own it; one that reads prompts.jsonl brings a sample of it."""
    for path in recipes.copy(name, directory):
        print_line(str(path))


def version() -> None:
    """Print the version."""
    print_line(remend.__version__)


def add_to(app: typer.Typer) -> None:
    """Put the verbs of this module into the command line."""
    app.add_typer(task, name="tasks")
    app.add_typer(recipe, name="recipes")
    app.command(hidden=True)(version)
