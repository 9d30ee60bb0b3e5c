"""Upload a finished model to the Hugging Face hub. Nothing else in remend uploads anything.

remend push runs/mine ORG/mine
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from remend.console import stage
from remend.errors import FileError, InputError, RemendError
from remend.files.run_directory import MANIFEST, SUMMARY
from remend.models.adapters import is_adapter
from remend.models.find import complete, is_gguf, require_readable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class PushError(RemendError):
    """The hub did not take the model: no login, no permission, no network."""


def push(source: str | Path, repo: str, *, public: bool = False) -> str:
    """Upload a run's recovered model, or any complete model's directory, into a repository of the hub.

    The repository is made where there is none, private unless `public`. What stood in it stays in its history.

    Args:
        source: a finished run (its model/ is taken), an export's directory, or another model's.
        repo: ORG/NAME, or NAME for one of your own.
        public: for everybody to see.

    Returns:
        The repository's address.

    Raises:
        InputError: a directory that holds no complete model, a malformed name, a repository of another visibility.
        PushError: not logged in, no permission, no answer from the hub.
    """
    directory = model_of(Path(source))
    if not _REPO.fullmatch(repo):
        raise InputError(f'repo is "{repo}"; write ORG/NAME, or NAME for one of your own, e.g. me/my-model')
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with stage(f"uploading {directory} to {repo}"):
        return _uploaded(api, directory, repo, public)


def model_of(source: Path) -> Path:
    """The directory that is uploaded. Raises InputError where it holds no complete model."""
    of_run = (source / MANIFEST).is_file()
    if of_run and not (source / SUMMARY).is_file():
        raise InputError(
            f"the run {source} is not complete, so its model is not measured; finish it with remend recover --resume "
            f"{source}, then push it"
        )
    directory = source / "model" if of_run else source
    if problem := _lacks(directory):
        raise InputError(
            f"{directory} is no complete model: {problem}. Give a finished run, an export's directory or a model that "
            "transformers opens"
        )
    return directory


def _lacks(directory: Path) -> str | None:
    """What a directory lacks of a model, or None."""
    if not directory.is_dir():
        return "there is no such directory"
    if any(is_gguf(path) for path in directory.glob("*.gguf")):
        return None
    if is_adapter(directory):
        return None if (directory / "adapter_model.safetensors").is_file() else "it has no adapter_model.safetensors"
    if not (directory / "config.json").is_file():
        return "it has no config.json"
    if not complete(directory):
        return "some of its .safetensors files are missing"
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        return f"it has no tokenizer ({', '.join(_TOKENIZERS)})"
    try:
        require_readable(directory, str(directory))
    except FileError as error:
        return str(error)
    return None


def _uploaded(api: HfApi, directory: Path, repo: str, public: bool) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        if "/" not in repo:
            repo = f"{api.whoami()['name']}/{repo}"
        made = api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.repo_info(made.repo_id).private)
        if private == public:
            word, other = ("private", "public") if private else ("public", "private")
            advice = "leave --public out" if private else "say --public"
            raise InputError(
                f"{made.repo_id} exists and is {word}, and would have to be {other}; {advice}, change it on the hub, "
                "or name another repository"
            )
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=directory,
            commit_message="Uploaded by remend push",
            ignore_patterns=[".*", "**/.*"],
        )
        return str(made)
    except LocalTokenNotFoundError:
        raise PushError(f"you are not logged in to the hub: {login}") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code == 401:
            raise PushError(f"the hub does not know your login: {login}") from None
        if code == 403:
            raise PushError(
                f"you may not write to {repo}: it is another's, or your token may not write. Name a repository of your "
                f"own or of an organisation of yours, or {login}"
            ) from None
        raise PushError(f"the hub did not take {directory}: {_said(error)}") from None
    except RemendError:
        raise
    except Exception as error:  # which HTTP client is inside is the library's own matter
        raise PushError(
            f"the hub at {api.endpoint} can't be reached ({_said(error)}); nothing is lost: run the command again when "
            "the network is there"
        ) from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
