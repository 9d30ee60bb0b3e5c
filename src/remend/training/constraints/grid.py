"""A student on a quantization grid stays on it in training.

Legend: O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remend.compression.grids import Grid, decode, encode, off_borders, snap, stacked, within_cell
from remend.compression.solvers import gptq
from remend.compression.stored_grid import GRID_FILE, StoredGrid
from remend.errors import InputError
from remend.models.activations.walk import Sites
from remend.models.find import OWN_FOLDER
from remend.models.matrices import Matrix, by_key
from remend.models.protocols import CausalLM
from remend.models.written import RECORD
from remend.training.constraints.fitting import Priors, anchored_gram, targets
from remend.training.constraints.kind import (
    REPAIR_ANSWERS,
    REPAIRED_RATE,
    Calibration,
    Constraint,
    ConstraintKind,
    Shapes,
    Start,
    StudentFacts,
    other_shapes,
)

FINE_GRID_RATE = 5e-5
"""A repaired grid of 4 bits and more wants smaller steps than other repaired students
(docs/measurements/degradations.md): its cells are narrow, and what GPTQ compensated
for is lost when weights cross their borders by noise."""

FINE_GRID_ANSWERS = 400
"""A grid of 4 bits and more loses so little that what further answers win is not worth their time
(docs/measurements/degradations.md)."""

COARSE_LEVELS = 8
"""Codes of a grid of up to 3 bits."""

BORDER_UPDATES = 8
"""A repaired grid's masters start at least so many full updates inside their cells. With it, 28 steps at 1e-4 took GGUF
q4_0 of SmolLM2 0.4 to 3.7% (95%) below its repaired KL; without it, at 5e-5, the interval was -4 to 3%."""


@dataclass
class _Held:
    """One matrix in training: where it is served, what the optimizer moves, the grid that it is on."""

    matrix: Matrix
    master: Tensor
    grid: Grid


class OnGrid(Constraint):
    """Some matrices stay on the quantization grid that they came on; all other parameters are free.

    Scales and zeros stay as stored: deriving them anew from trained weights is not idempotent.

    Args:
        model: holds the quantized weights already.
        stored: the grid as read from the student's directory.
        origin: matrices [O, I] of the model before quantization (the teacher's), by key. Where keys and shapes agree,
            a master starts at the original weight, moved as far as its code demands: it still rounds to the student's
            code, but remembers on which side of it the lost weight was. Elsewhere it starts on the grid point.
        masters: where masters start instead, by name, e.g. the weights that one-shot repair rounded.
        margin: in the weights' unit. Values of `masters`, and original weights that round to another code than the
            student's, start at least this far inside their cell, where the cell is wide enough. A weight then changes
            its code when its gradient insists, not when one noisy step happens to push it over the border.

    Raises:
        InputError: the model lacks a matrix of the grid, its weights are not the ones that the grid describes, or a
            start value rounds to another weight.
    """

    def __init__(
        self,
        model: CausalLM,
        stored: StoredGrid,
        *,
        origin: Mapping[str, Tensor] | None = None,
        masters: Mapping[str, Tensor] | None = None,
        margin: float = 0.0,
    ) -> None:
        self.format, self.carried = stored.format, stored.carried
        stored.check(model)
        parameters, parts = dict(model.named_parameters()), by_key(model)
        self._parameters = {parts[name].parameter: parameters[parts[name].parameter] for name in stored.matrices}
        self._held: dict[str, _Held] = {}
        self._beside: dict[str, tuple[Matrix, Tensor]] = {}
        for name, (codes, grid) in stored.matrices.items():
            weight = parts[name].weight_OI
            codes, grid = codes.to(weight.device), grid.to(weight.device)
            start, source = (masters or {}).get(name), (origin or {}).get(name)
            if start is not None:
                master = off_borders(self._start(name, start, weight, grid), codes, grid, self.format, margin)
            elif source is not None and source.shape == codes.shape:
                master = self._from_origin(source.detach().to(weight.device), codes, grid, margin)
            else:
                master = weight.clone()
            self._held[name] = _Held(parts[name], master, grid)
        self._free = {n: p for n, p in parameters.items() if n not in self._parameters and p.requires_grad}
        for key, matrix in parts.items():  # experts that were skipped, of a parameter whose others are on the grid
            if matrix.parameter in self._parameters and key not in self._held:
                self._beside[key] = (matrix, matrix.weight_OI)

    def _from_origin(self, source: Tensor, codes: Tensor, grid: Grid, margin: float) -> Tensor:
        """The original weight where it rounds to its code; where it does not (GPTQ), inside the cell by `margin`.

        Codes that made good what others lost would else fall back at the first noisy step.
        """
        master = within_cell(source, codes, grid, self.format)
        inside = off_borders(master, codes, grid, self.format, margin)
        return torch.where(encode(source.float(), grid, self.format) == codes, master, inside)

    def _start(self, name: str, start: Tensor, weight: Tensor, grid: Grid) -> Tensor:
        master = start.detach().to(weight.device, torch.float32, copy=True)
        if master.shape != weight.shape or not torch.equal(
            decode(encode(master, grid, self.format), grid, self.format), weight.detach().float()
        ):
            raise InputError(f"the start value of {name} does not round to the weight that the model holds")
        return master

    def masters(self) -> dict[str, Tensor]:
        held = {name: one.master for name, one in self._held.items()}
        return {**held, **{key: weight_OI for key, (_, weight_OI) in self._beside.items()}, **self._free}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Straight-through: the gradient at the served weight, unchanged."""
        masters = [(one.matrix, one.master) for one in self._held.values()] + list(self._beside.values())
        for matrix, master in masters:
            gradient = self._parameters[matrix.parameter].grad
            master.grad = None if gradient is None else matrix.of(gradient)
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def project(self) -> None:
        for one in self._held.values():
            weight_OI = one.matrix.weight_OI
            if weight_OI.is_contiguous():
                snap(one.master, one.grid, self.format, out=weight_OI)
            else:  # `snap` writes into groups of a row, which lie apart here
                rows_OI = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
                snap(one.master, one.grid, self.format, out=rows_OI)
                weight_OI.copy_(rows_OI)

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Codes, scales and zeros as `remend/grid.safetensors`."""
        matrices = {name: (encode(m.master, m.grid, self.format), m.grid) for name, m in self._held.items()}
        StoredGrid(self.format, matrices, self.carried).write(directory)


class GridKind(ConstraintKind):
    """Students whose linear weights lie on a quantization grid."""

    def holds(self, facts: StudentFacts) -> bool:
        return facts.recognised.stored is not None

    def describe(self, facts: StudentFacts) -> str:
        """The grid's name."""
        return _stored(facts).format.name

    def lost(self, facts: StudentFacts) -> str | None:
        promised = facts.record.get("kind") == "quantization"
        if not promised or facts.directory is None or facts.recognised.stored or facts.as_dense:
            return None
        return (
            f"{facts.directory / RECORD} says that the student lies on the grid {facts.record.get('format')}, and "
            f"{OWN_FOLDER}/{GRID_FILE} is missing there"
        )

    def check(self, model: CausalLM, facts: StudentFacts) -> None:
        """Repair would write the grid's points, whatever the weights were."""
        _stored(facts).check(model)

    def hold(
        self, model: CausalLM, facts: StudentFacts, *, origin: CausalLM | None, start: Start | None, rate: float
    ) -> Constraint:
        start = start or Start()
        originals = {k: m.weight_OI for k, m in by_key(origin).items()} if origin is not None else None
        stored, margin = start.stored or _stored(facts), BORDER_UPDATES * rate
        return OnGrid(model, stored, origin=originals, masters=start.masters, margin=margin)

    def no_repair(self, facts: StudentFacts, ours: Shapes, theirs: Shapes | None) -> str | None:
        return other_shapes(ours, theirs)

    def repair(self, model: CausalLM, facts: StudentFacts, calibration: Calibration) -> Start:
        """The teacher's weights are rounded anew."""
        return repair_grid(model, _stored(facts), calibration)

    def learning_rate(self, facts: StudentFacts, *, repaired: bool) -> float:
        usual = super().learning_rate(facts, repaired=repaired)
        return FINE_GRID_RATE if _fine(facts) and usual == REPAIRED_RATE else usual

    def repair_answers(self, facts: StudentFacts) -> int:
        return FINE_GRID_ANSWERS if _fine(facts) else REPAIR_ANSWERS


def _fine(facts: StudentFacts) -> bool:
    return _stored(facts).format.levels > COARSE_LEVELS


def _stored(facts: StudentFacts) -> StoredGrid:
    assert facts.recognised.stored is not None
    return facts.recognised.stored


@torch.no_grad()
def repair_grid(student: CausalLM, stored: StoredGrid, calibration: Calibration) -> Start:
    """Round the teacher's weights anew onto the student's grid, each layer compensating for those before it.

    The student's weights are changed in place.

    Returns:
        The grid with its new codes, and for each matrix the compensated weights that were rounded, float32 masters. Of
        a student on the disk its journal has the codes, and nothing has the masters.
    """
    healthy, masters, matrices = Priors(calibration.teacher), dict[str, Tensor](), dict(stored.matrices)
    journal = calibration.journal

    def visit(sites: Sites) -> None:
        gram_II = anchored_gram(sites)
        found = targets(sites, healthy, gram_II, stored.matrices)
        # rows don't influence one another, so layers that read one input are rounded as one, unless each has an outer
        # scale
        alone = stored.format.rule == "two scales"
        for some in [[one] for one in found] if alone else [found] if found else []:
            part = [matrices[matrix.key][1].to(target_OI.device) for matrix, target_OI in some]
            rounded = gptq(torch.cat([target_OI for _, target_OI in some]), gram_II, stored.format, stacked(part))
            rows = [len(target_OI) for _, target_OI in some]
            pieces = zip(some, part, torch.split(rounded.codes, rows), torch.split(rounded.weight, rows), strict=True)
            for (matrix, _), grid, codes, weight in pieces:
                codes, weight = codes.clone(), weight.clone()
                matrix.weight_OI.copy_(decode(codes, grid, stored.format))
                if journal:
                    journal.note(f"{matrix.key}.codes", codes)
                else:
                    matrices[matrix.key], masters[matrix.key] = (codes, grid), weight

    walked = calibration.walk(student, visit, "repairing on the grid")
    for key in walked.unchanged & masters.keys():
        matrices[key] = stored.matrices[key]
        del masters[key]
    if journal:
        return Start(walked=walked)
    return Start(StoredGrid(stored.format, matrices, stored.carried), masters, walked)
