"""Read an exported artifact back and compare it with the model that was measured: weights and logits, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from remend.compression.containers import Measured, container_of
from remend.errors import FileError
from remend.files.atomic import JsonObject
from remend.models.find import ModelSource, find_model
from remend.models.load import load_model
from remend.models.protocols import CausalLM

SEQUENCES, LENGTH = 4, 48


def verify(exported: str | Path, measured_dir: str | Path, *, trust_remote_code: bool = False) -> JsonObject:
    """Load both in float32 on the CPU and compare.

    Args:
        exported: a directory that `export` wrote, or the GGUF file in it.
        measured_dir: the model that was measured: a directory, GGUF file or hub id.

    Returns:
        `weights_equal` (every parameter, bit for bit), `different` (ten names of those that are not),
        `max_weight_difference`, `max_logit_difference` (over 4 sequences of 48 random tokens) and `read_by`.

    Raises:
        FileError: one of the two can't be read.
    """
    old = _load(find_model(str(measured_dir), trust_remote_code=trust_remote_code))
    return _compare(Path(exported), old, trust_remote_code)


def compare_file(target: Path, measured: Measured) -> JsonObject:
    """`verify` against the measured model's own files. Raises FileError when anything differs."""
    old = _load(measured.source)  # anew: a writer may have packed the loaded one in place
    check = _compare(target, old, measured.source.trust_remote_code)
    if not check["weights_equal"] or check["max_logit_difference"] != 0:
        raise FileError(
            f"what was written is not what was measured: {len(check['different'])} tensors differ "
            f"({', '.join(check['different'][:3]) or 'none'}), by {check['max_weight_difference']:.3g} at most, "
            f"the logits by {check['max_logit_difference']:.3g}. "
            "Nothing was kept; use --format dense, and report this model"
        )
    return check


def _load(source: ModelSource) -> CausalLM:
    return load_model(source, dtype=torch.float32, device=torch.device("cpu"))


def _compare(exported: Path, old: CausalLM, trust_remote_code: bool) -> JsonObject:
    files = sorted(exported.glob("*.gguf")) if exported.is_dir() else [exported]
    source = find_model(str(files[0] if files else exported), trust_remote_code=trust_remote_code)
    check = compare(_load(source), old)
    container = container_of(source)
    if container is None or container.differing is None or source.path is None:
        return {**check, "read_by": "transformers"}
    different = container.differing(source.path, old)
    return {
        **check,
        "weights_equal": check["weights_equal"] and not different,
        "different": (check["different"] or different)[:10],
        "read_by": f"{container.reader}, and transformers",
    }


@torch.no_grad()
def compare(new: CausalLM, old: CausalLM) -> JsonObject:
    """Compare the parameters and logits of two models of one architecture."""
    ours, theirs = dict(new.named_parameters()), dict(old.named_parameters())
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    different = sorted((ours.keys() | theirs.keys()) - set(shared))
    different += [n for n in shared if not torch.equal(ours[n], theirs[n])]
    largest = max((float((ours[n] - theirs[n]).abs().max()) for n in shared), default=0.0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(m.get_input_embeddings().num_embeddings for m in (new, old))
    ids_BT = torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=generator)
    difference = float((new(input_ids=ids_BT).logits - old(input_ids=ids_BT).logits).abs().max())
    return {
        "weights_equal": not different,
        "different": different[:10],
        "max_weight_difference": largest,
        "max_logit_difference": difference,
        "tokens_compared": SEQUENCES * LENGTH,
    }
