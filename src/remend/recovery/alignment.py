"""Representation alignment as a second training signal (after arXiv 2606.05682): off by default.

While student and teacher score the same completion tokens, the outputs of chosen blocks are kept, and

    cka  1 − debiased linear CKA of a micro-batch's completion tokens, a layer's mean
    l2   ‖student − teacher‖² / ‖teacher‖², a layer's mean

is added to the divergence. The two are balanced by their gradients at those blocks' outputs: at the first step and
every BALANCE_EVERY steps the factor is set so that the alignment's gradient is `weight` times as long as the
divergence's.

`problems` says what a recipe asks for in vain, and `aligned` wraps the step function where the recipe asks for it.
Beside these two calls and the recipe's key, nothing else knows of it.

Legend: N completion tokens, D width, B batch, T time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from remend.errors import InputError
from remend.maths.cka import cka_alignment
from remend.models.activations.capture import by_token
from remend.models.layers import decoder_layers, infer_layer_map
from remend.models.scorer import pack
from remend.recovery.distillation import Distillation, MicroBatch
from remend.recovery.settings import RecoverConfig
from remend.training.loop import Prepared, StepOutput
from remend.training.teachers import NamedTeacher, Teacher
from remend.training.teachers.frozen import Frozen

BALANCE_EVERY = 10

LEAST_TOKENS = 8
"""A micro-batch with fewer completion tokens gives no alignment: CKA needs 4, and is wild there."""


@dataclass(frozen=True)
class Alignment:
    """What is aligned.

    measure: cka or l2.
    weight: length of its gradient as a share of the divergence's.
    student, teacher: the blocks that are compared, pair by pair.
    """

    measure: str
    weight: float
    student: Sequence[nn.Module]
    teacher: Sequence[nn.Module]

    def loss(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor | None:
        """Mean over layers of states [N, D] at the same tokens; None for too small a micro-batch."""
        if len(ours[0]) < LEAST_TOKENS:
            return None
        measure = _cka if self.measure == "cka" else _l2
        return torch.stack([measure(a_ND, b_ND) for a_ND, b_ND in zip(ours, theirs, strict=True)]).mean()


def problems(config: RecoverConfig, teacher: NamedTeacher, layers: int) -> Iterator[str]:
    """What stands against the recipe's alignment: of the first stream's teacher, and of the student's number of layers.

    `layers` is 0 where the student could not be read.
    """
    if config.alignment is None:
        return
    if teacher.no_layers:
        yield (
            f"alignment needs a frozen model as the teacher of the first stream, and {teacher.name} is none: its "
            "layers are not there, or move with the student. Name a model, or leave alignment out"
        )
    chosen = config.alignment.layers
    wrong = [layer for layer in chosen or [] if layers and not 0 <= layer < layers]
    if chosen is not None and (not chosen or wrong):
        yield (
            f"alignment.layers is {chosen}; allowed are the student's layers, 0 to {(layers or 1) - 1}, or none for all"
        )


def aligned(objective: Distillation, config: RecoverConfig, layer_map: Sequence[int] | None) -> Distillation | Aligned:
    """The step function, with an alignment of the first stream's blocks where the recipe asks for it.

    `layer_map` has for each of the student's layers the teacher's; None finds it by the weights.
    """
    if config.alignment is None:
        return objective
    student, teacher = objective.student.model, objective.rounds.sources[0].teacher.model
    if teacher is None:
        raise InputError("alignment needs a teacher whose layers are in memory")
    placed = layer_map or infer_layer_map(student, teacher)
    chosen = range(len(placed)) if config.alignment.layers is None else config.alignment.layers
    ours, theirs = list(decoder_layers(student)), list(decoder_layers(teacher))
    alignment = Alignment(
        config.alignment.measure,
        config.alignment.weight,
        [ours[layer] for layer in chosen],
        [theirs[placed[layer]] for layer in chosen],
    )
    return Aligned(objective, alignment)


class Aligned:
    """A step function with a second signal; see the module docstring."""

    def __init__(self, plain: Distillation, alignment: Alignment) -> None:
        self.plain, self.alignment = plain, alignment
        self.scale = 0.0
        self._step = self._balanced = 0
        # the blocks are looked at whole: what all prompts open with is not run apart
        self._whole = replace(plain, student=replace(plain.student, prefixes=False))

    @property
    def weights(self) -> Mapping[str, float]:
        return self.plain.weights

    def prepare(self, step: int) -> Prepared[MicroBatch]:
        self._step = step
        return self.plain.prepare(step)

    def __call__(self, micro_batch: MicroBatch) -> StepOutput:
        source, rollouts = micro_batch
        trained = sum(map(source.trained_tokens, rollouts))
        if source is not self.plain.rounds.sources[0] or not trained:
            return self.plain(micro_batch)
        whole = replace(source, teacher=_at_once(source.teacher)), rollouts
        name = source.stream.name
        if self._balanced != self._step and (self._step - 1) % BALANCE_EVERY == 0:
            # a pass of its own: the divergence's gradient can be taken once only
            output, ours, theirs = self._seen(whole)
            self._balance(whole, output.sums[name][0] / trained, ours, theirs)
        output, ours, theirs = self._seen(whole)
        total = output.sums[name][0]
        if (loss := self.alignment.loss(*self._at_tokens(whole, ours, theirs))) is not None:
            total = total + self.scale * trained * loss  # weighted as if it were a mean over tokens too
        return StepOutput({name: (total, trained)})

    def _seen(self, micro_batch: MicroBatch) -> tuple[StepOutput, list[Tensor], list[Tensor]]:
        """The divergence, and the outputs of both sides' blocks on the way."""
        with _watched(self.alignment.student) as ours, _watched(self.alignment.teacher) as theirs:
            output = self._whole(micro_batch)
        if len(theirs) != len(ours):
            raise InputError(
                f"alignment looks at the blocks of teacher {micro_batch[0].stream.teacher.name}, which does not run "
                "each of its model's blocks once when it scores; leave alignment out, or name a plain model"
            )
        return output, ours, theirs

    def _at_tokens(
        self, micro_batch: MicroBatch, ours: Sequence[Tensor], theirs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states [N, D] that predict the completion tokens, of both sides."""
        source, rollouts = micro_batch
        device, skip = self.plain.student.device, source.stream.skip_first
        own = pack([(r.prompt, r.completion) for r in rollouts], device=device, skip_first=skip)
        shown = pack([(r.shown or r.prompt, r.completion) for r in rollouts], device=device, skip_first=skip)
        return (
            [own.gather(by_token(states, own.tokens_BT)) for states in ours],
            [shown.gather(by_token(states, shown.tokens_BT)) for states in theirs],
        )

    def _balance(
        self, micro_batch: MicroBatch, divergence: Tensor, ours: Sequence[Tensor], theirs: Sequence[Tensor]
    ) -> None:
        """Set the factor. `divergence` is a mean over tokens; its graph is spent."""
        self._balanced = self._step
        alignment = self.alignment.loss(*self._at_tokens(micro_batch, ours, theirs))
        if alignment is None:
            return
        lengths = [_length_of_gradient(alignment, ours, keep=True), _length_of_gradient(divergence, ours, keep=False)]
        if lengths[0] > 0:
            self.scale = self.alignment.weight * lengths[1] / lengths[0]

    def updated(self, step: int) -> None:
        self.plain.updated(step)

    def state(self) -> dict[str, Tensor]:
        return {**self.plain.state(), "alignment.scale": torch.tensor(self.scale, dtype=torch.float64)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self.plain.load(saved)
        self.scale = float(saved["alignment.scale"])


def _at_once(teacher: Teacher) -> Teacher:
    """The teacher, with whole rows run through its model: what all prompts open with is not run apart."""
    if isinstance(teacher, Frozen):
        teacher = copy.copy(teacher)
        teacher.parts = replace(teacher.parts, prefixes=False)
    return teacher


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Outputs of the blocks in the forward pass inside, in order."""
    states: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    # gone before the backward pass, where recomputed layers would call them again
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _length_of_gradient(loss: Tensor, states: Sequence[Tensor], *, keep: bool) -> float:
    gradients = torch.autograd.grad(loss, list(states), retain_graph=keep, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _cka(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    return 1 - cka_alignment(ours_ND, theirs_ND)


def _l2(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    dtype = torch.promote_types(ours_ND.dtype, torch.float32)
    theirs_ND = theirs_ND.to(dtype)
    return (ours_ND.to(dtype) - theirs_ND).square().sum() / theirs_ND.square().sum().clamp(min=1e-12)
