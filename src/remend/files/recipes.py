"""The recipes that ship with the package: list them, copy one and own it."""

from __future__ import annotations

import json
from pathlib import Path

from remend.errors import FileError, InputError, did_you_mean
from remend.files.atomic import write_text


def folder() -> Path:
    """Where the recipes are: inside an installed package, or beside the sources of a checkout."""
    package = Path(__file__).parent.parent
    for place in (package / "files" / "shipped", package.parent.parent / "recipes"):
        if place.is_dir():
            return place
    raise FileError(f"the recipes are missing from {package}; install remend again")


def names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def studies() -> list[str]:
    """Names of all studies, sorted, as they are copied: studies/small."""
    return sorted(f"studies/{path.stem}" for path in (folder() / "studies").glob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of a recipe or study. Raises InputError that lists the known ones."""
    known = [*names(), *studies()]
    if name not in known:
        raise InputError(f'unknown recipe "{name}"; known: {", ".join(known)}.{did_you_mean(name, known)}')
    return folder() / f"{name}.yaml"


def about(name: str) -> str:
    """A recipe's first comment line."""
    return path_of(name).read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


SAMPLE = "prompts.jsonl"
"""What a recipe names as its data where any prompts will do; a sample is copied with it."""


def copy(name: str, directory: str | Path = ".") -> list[Path]:
    """Copy a recipe or study into a directory, which is made where it is missing; the new files.

    A recipe that reads SAMPLE brings a sample of prompts along, unless a file of that name is there.

    Raises InputError for an unknown name or where the file is there already, FileError where it can't be written.
    """
    source, target = path_of(name), Path(directory) / f"{name.rpartition('/')[2]}.yaml"
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} is there already and is left as it is; name another directory")
    written, sample = [target], target.with_name(SAMPLE)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, source.read_text(encoding="utf-8"))
        if f"data: {SAMPLE}" in source.read_text(encoding="utf-8") and not (sample.exists() or sample.is_symlink()):
            write_text(sample, _sample_prompts())
            written.append(sample)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{target} can't be written: {error.strerror or error}") from None
    return written


def _sample_prompts() -> str:
    """The bundled training prompts, one {"prompt": "…"} a line."""
    bundled = (Path(__file__).parent.parent / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in bundled]
    return "".join(
        json.dumps({"prompt": row["prompt"]}, ensure_ascii=False) + "\n" for row in rows if row["split"] == "train"
    )
