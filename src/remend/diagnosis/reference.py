"""What all students are measured on: the reference's answers, its rows, the states behind its logits, two anchors.

Made once and kept in a cache by the hashes of the reference's files, the prompts and the settings. Files appear one by
one, each under a temporary name first; done.json comes last and says that all are there.

completions.jsonl      the reference's greedy answers, as token ids;  answers.json  their SHA-256
states-00000.safetensors  …  the states behind its logits, one file a batch, read again batch by batch
rows.safetensors       one row a sequence, layer and site
done.json              the key's parts, anchors, SHA-256 of all other files

What is not as it was written is told of and made again.

Legend: L layers, S sequences, D width, N completion tokens of a batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from remend.console import stage, warn
from remend.data.order import derive_seed
from remend.data.templates import Encoded
from remend.errors import FileError, InputError
from remend.files.atomic import new_file, write_json
from remend.files.hashes import damaged, hash_directory, hash_file
from remend.files.reading import read_object
from remend.files.run_directory import RunDirectory
from remend.files.signed import SIGNATURE, as_signed, signed
from remend.maths import cka
from remend.models.activations.capture import LEAST_ROWS, Batch, as_layers, capture, pick_positions, usable
from remend.models.blocks import by_block
from remend.models.blocks.opening import born
from remend.models.protocols import CausalLM, Tokenizer
from remend.models.sampling.answers import answer, read_answers, write_answers
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, scorer

VERSION = 4
COMPLETIONS, ANSWERED, DONE = "completions.jsonl", "answers.json", "done.json"
WHOLE = 128
"""At least so many sequences, and at least half of them, are read to the end of the answer, for behaviour. Of the
others a pass stops at the token whose row is kept."""

ANCHOR_ROWS = 128
"""Sequences of the anchors: the estimator is unbiased, so fewer rows only make it noisier."""


@dataclass(frozen=True)
class Conditions:
    """What the reference's answers and rows depend on, beside its files and the prompts."""

    max_new_tokens: int
    shared: int
    seed: int
    sites: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class ReferenceAnswers:
    """What a student is measured on.

    rollouts: prompts with the reference's answers, and picks: which token of each gives the row. The first `whole`
        answers are whole, the others end with that token.
    rows: by site [L, S, D], in the main process; empty in the others.
    anchors: by name and reference layer, the CKA of the residual stream with a re-run and with random weights.
    """

    folder: Path
    rollouts: list[Rollout]
    picks: list[int]
    whole: int
    rows: Mapping[str, Tensor]
    anchors: dict[str, list[float]]

    def states(self, batch: int) -> Tensor:
        """[N, D] of a batch's whole answers, as the reference made them."""
        states_ND: Tensor = load_file(self.folder / f"states-{batch:05d}.safetensors")["states"]
        return states_ND


def key_of(hashes: Mapping[str, str], prompts: Sequence[Encoded], conditions: Conditions) -> str:
    """The folder's name: settled by everything that the answers and rows depend on."""
    parts = {"version": VERSION, "files": dict(hashes), "prompts": [p.tokens for p in prompts], **vars(conditions)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def reference_answers(
    parts: Scorer,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    conditions: Conditions,
    folder: Path,
    state: PartialState,
) -> ReferenceAnswers:
    """Read them from the cache, or make them.

    Raises InputError where the reference answers with nothing, or its layers are not finite.
    """
    place = RunDirectory(folder)
    if state.is_main_process and not _whole(folder, DONE) and not _whole(folder, ANSWERED):
        length, shared = conditions.max_new_tokens, conditions.shared
        answers = answer(parts.model, tokenizer, prompts, "the reference answers", max_new_tokens=length, shared=shared)
        write_answers(place, COMPLETIONS, tokenizer, answers)
        write_json(folder / ANSWERED, signed({"files": {COMPLETIONS: hash_file(folder / COMPLETIONS)}}))
    state.wait_for_everyone()
    rollouts = [r for r in read_answers(place, COMPLETIONS, prompts) if r.completion]
    if len(rollouts) < LEAST_ROWS:
        raise InputError(
            f"the reference answered {len(rollouts)} of {len(prompts)} prompts with at least one token, and "
            f"{LEAST_ROWS} is the least; give prompts that it answers"
        )
    draws = [derive_seed(conditions.seed, "row", r.id) / 2**63 for r in rollouts]
    picks = pick_positions([len(r.completion) for r in rollouts], draws)
    whole = min(len(rollouts), max(WHOLE, len(rollouts) // 2))
    rollouts[whole:] = [
        replace(r, completion=r.completion[: pick + 1]) for r, pick in zip(rollouts[whole:], picks[whole:], strict=True)
    ]
    if not (folder / DONE).is_file():
        _pass(parts, rollouts, picks, whole, conditions, folder, state)
    state.wait_for_everyone()
    done = read_object(folder / DONE)
    kept = load_file(folder / "rows.safetensors") if state.is_main_process else {}
    return ReferenceAnswers(folder, rollouts, picks, whole, kept, done["anchors"])


def _whole(folder: Path, record: str) -> bool:
    """Whether a record is there and all that it names is as it was written. One that is not is told of and removed."""
    path = folder / record
    if not path.is_file():
        return False
    try:
        facts = read_object(path)
        files = facts.get("files")
        if SIGNATURE in facts and as_signed(facts) and isinstance(files, dict) and not damaged(folder, files):
            return True
    except FileError:
        pass
    warn(f"the cache {folder} changed since it was written; what {record} stands for is made again")
    path.unlink()
    return False


def _pass(
    parts: Scorer,
    rollouts: Sequence[Rollout],
    picks: Sequence[int],
    whole: int,
    conditions: Conditions,
    folder: Path,
    state: PartialState,
) -> None:
    turn = (state.process_index, state.num_processes)

    def keep(batch: Batch, states_ND: Tensor) -> None:
        kept_ND = states_ND[batch.of_first(whole)].cpu().contiguous()
        if len(kept_ND):
            _save(folder / f"states-{batch.number:05d}.safetensors", {"states": kept_ND})

    with stage("the reference reads its answers", len(rollouts)) as advance:
        mine = capture(
            parts,
            "the reference",
            rollouts,
            picks,
            sites=conditions.sites,
            consume=keep,
            turn=turn,
            on_rows=advance,
        )
    rows = {site: as_layers(gathered(rows), len(rollouts)) for site, rows in mine.items()}
    state.wait_for_everyone()
    if state.is_main_process:
        anchors = _anchors(parts, rollouts, picks, rows, conditions)
        _save(folder / "rows.safetensors", rows)
        about = {**vars(conditions), "sequences": len(rollouts), "anchors": anchors}
        # another process that made the same may have written its own record meanwhile, which this one replaces
        files = {name: digest for name, digest in hash_directory(folder).items() if name != DONE}
        write_json(folder / DONE, signed({**about, "files": files}))


def gathered(mine: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What all processes hold, by sequence."""
    return dict(gather_object(list(mine.items())))


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with new_file(path) as temporary:
        save_file(tensors, temporary)


def _anchors(
    parts: Scorer,
    rollouts: Sequence[Rollout],
    picks: Sequence[int],
    rows: Mapping[str, Tensor],
    conditions: Conditions,
) -> dict[str, list[float]]:
    """CKA of the reference with a re-run of itself, and with the same architecture at random weights."""
    count = min(ANCHOR_ROWS, len(rollouts))
    anchors = {}
    for name, title, model in (
        ("rerun", "anchor: the reference once more", parts),
        ("random", "anchor: random weights", scorer(random_model(parts.model, conditions.seed), conditions.shared)),
    ):
        with stage(title, count) as advance:
            mine = capture(model, title, rollouts[:count], picks[:count], on_rows=advance)
        other = as_layers(mine["residual"], count)
        keep_S = usable(rows["residual"][:, :count], other)
        anchors[name] = [
            cka.debiased_cka(theirs[:count][keep_S], ours[keep_S])
            for theirs, ours in zip(rows["residual"], other, strict=True)
        ]
    return anchors


def random_model(model: CausalLM, seed: int) -> CausalLM:
    """The same architecture with the weights that it is born with, seeded.

    Of a model whose blocks are on the disk each block is drawn by itself, when it runs: those are other weights.
    """
    if by_block(model):
        return born(model, seed)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "random weights") % 2**31)
        made = cast("Callable[[object], CausalLM]", type(model))(config)
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return made.to(dtype).to(model.device).eval().requires_grad_(False)
