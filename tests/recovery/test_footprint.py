"""What a run holds in memory: worked out by hand, and against the bytes of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.alive import peak_of
from helpers.facts import FACTS, SMALL, STREAM
from helpers.tiny import build_model, put_on_grid
from remend.compression.formats import GridFormat
from remend.compression.grids import fit
from remend.compression.packed_linear import PackedLinear, pack_layers, packed_bytes
from remend.compression.solvers import gptq, least_squares
from remend.maths.losses.forward_kl import forward_kl, forward_kl_with_gradient
from remend.models.adapters import add_lora
from remend.models.frozen_base import narrow, over_the_same_weights
from remend.models.frozen_linear import NarrowLinear
from remend.models.sampling.kv_cache import decoding_cache
from remend.models.sizes import size_of
from remend.recovery.estimate import Facts, FrozenBase, Train
from remend.recovery.footprint import (
    BUFFERS,
    KINDS,
    LOSS,
    MEASURE,
    NAMED,
    PROGRAM,
    gram_bytes,
    memory_of,
    moments_of,
    room_of_cache,
)
from remend.recovery.memory import activation_bytes
from remend.recovery.rows_at_once import bytes_of_row, rows_at_once, rows_that_fit
from remend.training.constraints import Constraint
from remend.training.constraints.adapter import Adapter
from remend.training.constraints.grid import OnGrid
from remend.training.constraints.scales import OnScales
from remend.training.optimizers import OPTIMIZERS

STEPS = replace(FACTS, streams=[replace(STREAM, on_policy=0.0)])
"""Training on the teacher's answers, so that a step is what holds most."""

PLAIN = PROGRAM + NAMED * 5_000


def test_kinds_by_hand() -> None:
    """8 rows of 40 tokens keep 3,000 bytes a token and three states of each completion; 80 positions have logits."""
    memory = memory_of(STEPS)
    assert memory.parts == {
        "program": PLAIN,
        "student": 8_000_000,
        "teacher": 8_000_000,
        "codes": 160_000,
        "masters": 4_000_000,
        "moments": 12_000_000,
        "activations": 8 * 40 * 3_000 + 3 * 4 * 80 * 100,
        "logits": LOSS * 4 * 80 * 5_000,
    }
    came = PLAIN + 16_160_000
    assert memory.phases["loading"] == came - BUFFERS
    assert memory.phases["training"] == memory.peak == sum(memory.parts.values())
    assert memory.phases["saving"] == came + 4_000_000 + 1_000_000
    # measuring: 8 completions of 10 tokens; sampling: 16 rows with room for 84 tokens, and the weights once more
    measured = MEASURE * 4 * 80 * 5_000 + 8 * 80 * 100
    assert memory.phases["baseline"] == came + max(16 * 84 * 400 * 4 + 8_000_000 + 16 * 24 * 5_000, measured)
    assert set(KINDS) >= {kind for held in memory.by_phase.values() for kind in held}


def test_an_update_needs_gradients_in_place_of_activations() -> None:
    """The larger of the two counts; with several micro-batches the gradients of the earlier ones are there too."""
    long = replace(STEPS, activation=10, chunk=10)
    assert memory_of(long).parts["gradients"] == 6_000_000
    assert "activations" not in memory_of(long).parts
    several = memory_of(replace(STEPS, micro_batches=2)).parts
    assert (several["gradients"], several["activations"]) == (6_000_000, memory_of(STEPS).parts["activations"])
    trained = memory_of(replace(long, head_trained=True)).parts
    assert trained["gradients"] == 6_000_000 + 4 * 5_000 * 100
    scales = memory_of(replace(long, train="scales", trained=600_000, held=0)).parts
    assert scales["gradients"] == 2_400_000 + 2 * 4 * SMALL.largest


def test_what_all_prompts_open_with_is_run_once() -> None:
    """Of 8 rows of 40 tokens 10 are shared; their keys and values are repeated, and joined with the others."""
    shared = replace(STEPS, streams=[replace(STREAM, on_policy=0.0, opening=10)])
    kept = 3_000 * (8 * 30 + 10) + 2 * 4 * 400 * 8 * 10
    assert memory_of(shared).parts["activations"] == kept + 3 * 4 * 80 * 100
    again = memory_of(replace(shared, recomputes=True)).parts
    assert again == memory_of(replace(STEPS, recomputes=True)).parts


def test_a_mapped_file_counts_where_it_is_written() -> None:
    mapped = replace(FACTS, mapped=True)
    assert "student" not in memory_of(mapped).by_phase["loading"]
    assert memory_of(mapped).parts["student"] == 4 * 1_000_000  # the numbers on the grid are written
    free = replace(mapped, codes=0, scales=0, held=0)
    assert memory_of(free).parts["student"] == 4 * 1_500_000
    assert "student" not in memory_of(replace(mapped, train="norms", held=0)).parts
    assert "teacher" not in memory_of(replace(FACTS, reference_mapped=True)).parts


def test_moments_by_optimizer() -> None:
    """A GPU has none of those on the host; in 8 bits two numbers of 256 take 520 bytes."""
    assert SMALL.parameters == SMALL.matrices + SMALL.embeddings  # no vectors
    gpu = replace(STEPS, device="cuda")
    assert "moments" not in memory_of(replace(gpu, optimizer="adamw-host")).parts
    assert memory_of(replace(STEPS, optimizer="adamw-host")).parts == memory_of(STEPS).parts
    eighth = replace(STEPS, optimizer="adamw-8bit")
    assert memory_of(eighth).parts["moments"] == 1_500_000 * 520 // 256
    vectors = replace(SMALL, matrices=1_400_000)
    assert memory_of(replace(eighth, student=vectors)).parts["moments"] == 800_000 + 1_400_000 * 520 // 256


def test_moments_in_8_bits_of_real_tensors() -> None:
    """A norm's stay in float32; a matrix' are held with a scale for each 256 numbers."""
    kind = OPTIMIZERS.get("adamw-8bit")
    if problem := kind.problem(torch.device("cpu")):
        pytest.skip(problem)
    norm, matrix = torch.zeros(64), torch.zeros(128, 64)
    optimizer = kind.make([{"params": [norm, matrix], "weight_decay": 0.0}], 1e-3)
    for master in (norm, matrix):
        master.grad = torch.ones_like(master)
    optimizer.step()
    held = sum(t.nbytes for t in (*kind.state(optimizer, norm).values(), *kind.state(optimizer, matrix).values()))
    size = replace(SMALL, parameters=64 + 128 * 64, matrices=128 * 64, embeddings=0, width=64)
    facts = replace(STEPS, student=size, trained=size.parameters, optimizer="adamw-8bit")
    assert memory_of(facts).parts["moments"] == held


def test_on_a_gpu() -> None:
    gpu = memory_of(replace(STEPS, device="cuda", itemsize=2, reference_itemsize=2))
    assert "program" not in gpu.parts
    assert gpu.parts["teacher"] == 4_000_000
    assert gpu.parts["weights laid out"] == 2 * (1_500_000 + 500_000)  # autocast's copies
    less = memory_of(replace(STEPS, recomputes=True))
    assert less.parts["activations"] == 8 * 40 * (4 * 100 * 2 + 3_000 // 2) + 3 * 4 * 80 * 100
    assert memory_of(replace(FACTS, copies=2)).parts["teachers' copies"] == 12_000_000
    # repair computes in float32, so that the teacher is there twice
    repaired = memory_of(replace(FACTS, device="cuda", itemsize=2, reference_itemsize=2, repair=100)).by_phase["repair"]
    assert repaired["teacher"] == 4_000_000 + 8_000_000


ADAPTER = replace(STEPS, train="adapter", trained=48_000, held=0)
NARROW = FrozenBase(numbers=1_400_000, held=2_800_000, packed=False, shared=False)
VECTORS = replace(SMALL, matrices=1_400_000)
"""A tenth of a million numbers are norms' and biases'."""


def test_a_frozen_base_in_its_files_dtype() -> None:
    """Linear layers take two bytes a number; a model over the base copies vectors alone, on a GPU in bfloat16 more."""
    facts = replace(ADAPTER, student=VECTORS, reference=VECTORS, base=NARROW)
    own = 4 * 600_000 + 2_800_000 + 4 * 100_000
    memory = memory_of(facts)
    assert memory.parts["student"] == own + 4 * 48_000
    assert memory.parts["teacher"] == 8_000_000
    assert memory.by_phase["loading"]["student"] == own  # the teacher beside it is more than one float32 copy
    shared = replace(facts, base=replace(NARROW, shared=True))
    assert memory_of(shared).parts["teacher"] == 4 * 100_000
    assert memory_of(shared).by_phase["loading"]["student"] == 8_000_000  # while it is read
    gpu = memory_of(replace(shared, device="cuda", itemsize=2, reference_itemsize=2))
    assert gpu.parts["teacher"] == 2 * 600_000
    assert gpu.parts["weights laid out"] == 2 * 500_000  # the head's copy, none of frozen layers
    assert gpu.by_phase["loading"]["student"] == own


def test_a_base_of_codes() -> None:
    """They are widened layer by layer, and not laid out for sampling."""
    packed = FrozenBase(numbers=1_400_000, held=800_000, packed=True, shared=False)
    memory = memory_of(replace(ADAPTER, student=VECTORS, reference=VECTORS, base=packed))
    assert memory.parts["student"] == 4 * 700_000 + 800_000 + 4 * 48_000
    assert memory.parts["weights laid out"] == 4 * 250 * 100
    mapped = memory_of(replace(ADAPTER, student=VECTORS, mapped=True, base=packed)).by_phase
    assert mapped["loading"]["student"] == 800_000 + 4 * 100_000
    moments = moments_of(replace(ADAPTER, student=VECTORS, base=packed, streams=[STREAM]))
    assert moments["sampling"]["weights laid out"] == 4 * (500_000 + 250 * 100)


@pytest.mark.parametrize("format", ["int4-g32", "int8-g32", "mxfp4"])
def test_bytes_of_a_real_packed_base(format: str) -> None:
    model = build_model(320)
    stored = put_on_grid(model, format)
    pack_layers(model, stored)
    held = sum(
        packed_bytes(stored.format, c.shape[1], c.numel(), g.scales.numel()) for c, g in stored.matrices.values()
    )
    buffers = [b for m in model.modules() if isinstance(m, PackedLinear) for b in m.buffers(recurse=False)]
    assert held == sum(buffer.nbytes for buffer in buffers)


def test_bytes_of_a_real_base_that_two_models_share() -> None:
    base, size = build_model(320), size_of(build_model(320), build_model(320).config)
    base.to(torch.bfloat16).to(torch.float32)
    narrow(base, torch.bfloat16)
    student, teacher = over_the_same_weights(base), over_the_same_weights(base)
    held = {
        t.data_ptr(): t.nbytes
        for model in (base, student, teacher)
        for t in (*model.parameters(), *(m.held for m in model.modules() if isinstance(m, NarrowLinear)))
    }
    frozen = FrozenBase(size.matrices, 2 * size.matrices, packed=False, shared=True)
    facts = replace(facts_of_tiny("adapter", 0, 0, 0), base=frozen)
    parts = memory_of(facts).parts
    assert parts["student"] + parts["teacher"] == sum(held.values())


def test_blocks_that_come_one_by_one() -> None:
    """Embeddings and a norm stay; of a block the student's own copy, the teacher's, and the weights as they were."""
    size = replace(SMALL, parameters=2_000_100, groups=((1, 1),))  # a norm of 100, and blocks of 750,000
    facts = replace(FACTS, student=size, reference=size, by_block=True, reference_by_block=True, repair=1, chunk=1)
    memory = memory_of(facts)
    loaded = memory.by_phase["loading"]
    assert loaded["student"] == loaded["teacher"] == 4 * 500_100
    baseline = memory.by_phase["baseline"]
    assert baseline["blocks"] == 4 * 750_000
    assert baseline["weights laid out"] == 4 * (500_000 + 100)  # the head, and one matrix of 100 rows
    repaired = memory.by_phase["repair"]
    assert repaired["blocks"] == 3 * 4 * 750_000 + 500_000  # and what is written of it, with its codes
    assert repaired["weights laid out"] == 4 * 750_000
    assert "masters" not in repaired
    assert memory.by_phase["saving"]["blocks"] == 2 * 4 * 750_000
    mapped = memory_of(replace(facts, mapped=True, reference_mapped=True)).by_phase
    assert not {"student", "teacher", "blocks"} & mapped["baseline"].keys()
    on_gpu = replace(facts, device="cuda", itemsize=2, reference_itemsize=2)
    assert memory_of(on_gpu).by_phase["loading"]["teacher"] == 2 * 500_100
    assert memory_of(on_gpu).by_phase["repair"]["teacher"] == 6 * 500_100


def test_twice_the_blocks_take_hardly_more() -> None:
    size = replace(SMALL, parameters=2_000_100)
    double = replace(size, parameters=3_500_100, matrices=3_000_000, layers=4)
    one, two = (
        memory_of(
            replace(FACTS, student=own, reference=own, by_block=True, reference_by_block=True, repair=8, steps=0)
        ).phases["repair"]
        for own in (size, double)
    )
    assert two <= one  # there are as many codes, of more blocks


def test_rows_that_are_sampled_at_once() -> None:
    """With less free memory fewer rows have a cache and logits at once, and moments on the host leave room for more."""
    few = moments_of(replace(FACTS, rows_at_once=4))["sampling"]
    assert few["cache"] == 4 * room_of_cache(30, 10) * 400 * 4
    each = bytes_of_row(SMALL, 40, 3_000)
    assert rows_at_once(FACTS, 40_000_000) == rows_that_fit(40_000_000 - 4 * 2_500_000 - 12_000_000, each, 64)
    gpu = replace(FACTS, device="cuda", optimizer="adamw-host")
    assert rows_at_once(gpu, 40_000_000) == rows_that_fit(40_000_000 - 4 * 2_500_000, each, 512)
    assert rows_at_once(gpu, 10**12) == 512


def test_repair_holds_masters_and_codes_twice_at_its_end() -> None:
    """Of a model with hardly any text or vocabulary what remains are weights: the masters and their copies."""
    small = replace(SMALL, vocabulary=1, groups=((1, 1),), width=1)
    facts = replace(FACTS, student=small, reference=small, repair=1, streams=[replace(STREAM, held_out=0)])
    held = memory_of(facts).by_phase["repair"]
    assert (held["masters"], held["codes"]) == (8_000_000, 160_000 + 1_000_000)


def facts_of_tiny(train: Train, trained: int, codes: int, scales: int) -> Facts:
    model = build_model(320)
    size = size_of(model, model.config)
    return replace(
        FACTS,
        student=size,
        reference=size,
        train=train,
        codes=codes,
        scales=scales,
        trained=trained,
        held=codes if train == "all" else 0,
        activation=0,
        chunk=1,
        streams=[replace(STREAM, rows=1, answer=0, held_out=0, on_policy=0.0)],
        batch=1,
    )


def made(train: Train) -> tuple[Any, Constraint, int, int]:
    """A tiny model under a constraint; the numbers of its codes, and bytes of scales and zeros."""
    model = build_model(320)
    stored = put_on_grid(model, "int4-g32")
    codes = sum(codes.numel() for codes, _ in stored.matrices.values())
    grids = [grid for _, grid in stored.matrices.values()]
    scales = sum(part.nbytes for grid in grids for part in (grid.scales, grid.zeros) if part is not None)
    if train == "adapter":
        add_lora(model, rank=4)
        return model, Adapter(model), codes, scales
    if train == "all":
        model.get_input_embeddings().weight.requires_grad_(False)
        return model, OnGrid(model, stored), codes, scales
    return model, OnScales(model, stored, scales=train == "scales"), codes, scales


@pytest.mark.parametrize("train", ["all", "scales", "norms", "adapter"])
def test_bytes_of_real_tensors(train: Train) -> None:
    """Weights, masters, gradients and AdamW's moments of a step that was taken."""
    model, constraint, codes, scales = made(train)
    weights, masters = sum(p.nbytes for p in model.parameters()), constraint.masters()
    served = {p.data_ptr() for p in model.parameters()}
    trained = sum(tensor.numel() for tensor in masters.values())
    apart = sum(t.nbytes for t in masters.values() if t.ndim == 2 and t.data_ptr() not in served)
    optimizer = torch.optim.AdamW(list(masters.values()), lr=1e-4)
    model(input_ids=torch.arange(12).unsqueeze(0)).logits.logsumexp(-1).sum().backward()
    constraint.take_gradients()
    gradients = sum(t.grad.nbytes for t in masters.values() if t.grad is not None)
    optimizer.step()
    moments = sum(
        state.nbytes for of in optimizer.state.values() for key, state in of.items() if key.startswith("exp_avg")
    )
    size = size_of(build_model(320), model.config)
    expected = {"adapter": 4 * size.sides, "norms": 5 * 64}.get(train)
    assert expected is None or trained == expected
    parts = memory_of(facts_of_tiny(train, trained, codes, scales)).parts
    one = 2 * 4 * size.largest if train == "scales" else 0
    assert parts["student"] == weights
    assert parts["codes"] == scales
    assert parts["moments"] == moments
    assert parts.get("gradients", 0) - one == gradients
    assert parts.get("masters", 0) == (apart if train == "all" else 0)


def test_the_cache_of_keys_and_values() -> None:
    """Its buffers grow by half when they are full."""
    model, prompt, answer = build_model(320), 40, 90
    cache = decoding_cache(model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(3, prompt, dtype=torch.long), past_key_values=cache, use_cache=True)
        for _ in range(answer - 1):
            model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))
    assert held == 3 * room_of_cache(prompt, answer) * size_of(model, model.config).cached * 4


@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (2048, 128), (256, 256)])
def test_what_a_closed_form_solution_holds(rows: int, columns: int) -> None:
    """GPTQ and least squares beside what repair hands them: a gram and its anchored copy, targets and crossed sums."""
    x_NI, weight_OI = torch.randn(2 * columns, columns), torch.randn(rows, columns)
    gram_II, fmt = x_NI.T @ x_NI, GridFormat.parse("int4-g32")
    grid, cross_OI = fit(weight_OI, fmt), weight_OI @ (x_NI.T @ x_NI)
    solved = peak_of(lambda: least_squares(gram_II, cross_OI.T, prior_OI=weight_OI)) + 2 * gram_II.nbytes
    rounded = peak_of(lambda: gptq(weight_OI, gram_II, fmt, grid)) + 2 * gram_II.nbytes
    # beside these: crossed sums and priors of the layers one by one and together; or targets, apart and together
    held = max(solved + 4 * weight_OI.nbytes, rounded + 3 * weight_OI.nbytes)
    assert 0.98 < gram_bytes(rows, columns, grid=True) / held < 1.12


def test_logits_of_a_chunk() -> None:
    """Both models' logits, and what the divergence makes of them."""
    ours_NV, theirs_NV = torch.randn(16, 500), torch.randn(16, 500)

    def tensors(work: Callable[[Tensor, Tensor], object]) -> float:
        return 2 + peak_of(lambda: work(ours_NV, theirs_NV)) / ours_NV.nbytes

    assert round(tensors(forward_kl_with_gradient)) == LOSS
    assert round(tensors(forward_kl)) == MEASURE


def test_sampling_is_told_apart_from_the_steps() -> None:
    moments = moments_of(FACTS)
    assert list(moments) == ["loading", "baseline", "sampling", "training", "saving", "measuring"]
    assert sum(moments["sampling"].values()) <= memory_of(FACTS).phases["training"]
    assert moments["sampling"]["cache"] == 16 * room_of_cache(30, 10) * 400 * 4
    assert "sampling" not in memory_of(FACTS).phases


@pytest.mark.parametrize("train", ["all", "scales", "norms", "adapter"])
def test_what_a_backward_pass_keeps(train: Train) -> None:
    """Summed over the tensors that autograd keeps of a real model under a real constraint."""
    model, _, _, _ = made(train)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(60).reshape(2, 30), use_cache=False)
    estimate = activation_bytes(model.config, 2, 30, train=train)
    assert 0.85 < estimate / sum(kept.values()) < 1.15
