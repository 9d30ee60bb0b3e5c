"""The one optimisation loop.

What is trained, and on what signal, is an Objective: `prepare(step)` samples the step's rollouts and cuts them into
micro-batches, and calling it on a micro-batch returns sums of losses, never means. Only this file divides by tokens,
accumulates, clips, steps, logs and saves:

    gradient = Σ_streams weight_s · ( Σ micro-batches, processes  ∇ loss_sum_s ) / N_s

with N_s the stream's completion tokens in the whole step (arXiv 2604.15794's objective). So 8 prompts in
one micro-batch, 8 micro-batches of one prompt and 2 processes of 4 give one gradient, to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from remend.errors import InputError, TrainingError
from remend.files.environment import memory_mib
from remend.files.run_directory import METRICS, TIMING, Checkpoint, RunDirectory
from remend.training.agreement import require_alike
from remend.training.constraints import Constraint
from remend.training.optimizers import OPTIMIZERS, Group, OptimizerKind
from remend.training.stopping import Stopped, Wish, at_the_end_of_a_round

if TYPE_CHECKING:
    from accelerate import Accelerator

M = TypeVar("M")
"""A micro-batch: whatever the objective cuts a step into."""


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives: for each stream the sum of its loss over positions and their number."""

    sums: Mapping[str, tuple[Tensor, int]]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared(Generic[M]):
    """A step's micro-batches with, for each stream, the positions they hold together; ids for error messages.

    `means` are figures to log, each as (sum, number): processes may hold unequal numbers.
    """

    micro_batches: Sequence[M]
    tokens: Mapping[str, int]
    ids: Sequence[str]
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Objective(Protocol[M]):
    """A step function with its preparation."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of each stream's mean loss in the sum."""

    def prepare(self, step: int) -> Prepared[M]:
        """Sample everything that step `step` (from 1) trains on."""

    def __call__(self, micro_batch: M) -> StepOutput:
        """Sums of the losses of one micro-batch, with gradients attached."""


class Follower(Protocol):
    """State that follows the trained weights, e.g. a moving average, and belongs into a checkpoint."""

    def updated(self, step: int) -> None:
        """After the update of step `step`."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""


@dataclass(frozen=True)
class Optimization:
    """AdamW for `steps` steps. Its rate warms up on a line to `peak`, then a cosine takes it to `final` · peak.

    ends: steps at which further segments end, whose rate is `final` · peak.
    weight_decay: of matrices; vectors have none.
    max_grad_norm: the limit of the gradients' norm, over all of them.
    optimizer: how its moments are held, see training/optimizers.
    """

    steps: int
    peak: float
    warmup: int
    final: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ends: tuple[int, ...] = ()
    optimizer: str = "adamw"

    @property
    def last(self) -> int:
        """The last step of all segments."""
        return self.ends[-1] if self.ends else self.steps

    def ends_a_round(self, step: int, together: int) -> bool:
        """Whether the steps that were sampled with this one are done; each segment begins with a new round."""
        return (step - self._began(step)) % together == 0 or step in (self.steps, *self.ends)

    def _began(self, step: int) -> int:
        """The last step before a step's segment."""
        return max((end for end in (self.steps, *self.ends) if end < step), default=0)

    def saves_at(self, step: int, every: int, together: int = 1) -> bool:
        """Whether a checkpoint is due after a step: every so many of a segment, and at its end; never if 0.

        Of steps that are sampled `together` the last one's turn comes: a checkpoint cuts no round of sampling, so that
        no trajectory depends on when it is written.
        """
        if not every or not self.ends_a_round(step, together):
            return False
        done = step - self._began(step)
        return step in (self.steps, *self.ends) or done // every > (done - together) // every

    def rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 1."""
        if step > self.steps:
            return self.peak * self.final
        if step <= self.warmup:
            return self.peak * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass(frozen=True)
class Saving:
    """Where rows and checkpoints go, and where to go on.

    every, keep: a checkpoint every so many steps of a segment and after its last (0: none); the last `keep` stay.
    together: steps that one round of sampling feeds.
    first: a checkpoint before the first step too.
    about: what a checkpoint's state says beside its step.
    resume: continue from this checkpoint; the trajectory is the uninterrupted one.
    """

    run: RunDirectory
    every: int
    keep: int
    resume: Checkpoint | None = None
    together: int = 1
    first: bool = False
    about: Mapping[str, int] = field(default_factory=dict)


Hook = Callable[[int], Mapping[str, float] | None]
"""Called with the number of steps done; what it returns is logged as a row of its own."""


@dataclass(frozen=True)
class Watch:
    """Who looks on.

    hooks: called after every step (a hook decides itself whether it is its turn).
    on_step: gets each training row with `seconds`, for progress bars.
    stop: asked in the main process before the first step, and after each step's hooks.
    """

    hooks: Sequence[Hook] = ()
    on_step: Callable[[Mapping[str, float]], None] = lambda row: None
    stop: Callable[[], bool] = lambda: False


def train(
    objective: Objective[M],
    constraint: Constraint,
    accelerator: Accelerator,
    optimization: Optimization,
    saving: Saving,
    *,
    watch: Watch | None = None,
    follower: Follower | None = None,
) -> int:
    """Run the loop to `optimization.last`; returns the number of steps done, fewer where `watch.stop` said so.

    Args:
        objective: what is trained on.
        constraint: what is held; it owns the master weights.
        accelerator: processes, trackers; its own device may be another (precision is the objective's own matter).
        optimization: learning rates and the number of steps.
        saving: where rows and checkpoints go.
        watch: hooks, progress and an early end.
        follower: what moves along with the weights and is saved with them.

    Raises:
        TrainingError: loss or gradient is NaN or infinite, or the processes hold different weights; files stay as the
            last good step left them.
        Stopped: a signal came, and a checkpoint was saved after the last step.
    """
    watch, resume = watch or Watch(), saving.resume
    kind = OPTIMIZERS.get(optimization.optimizer)
    optimizer = kind.make(_groups(constraint.masters(), optimization.weight_decay), optimization.peak)
    state = _State(constraint, kind, optimizer, follower)
    device, start = next(iter(constraint.masters().values())).device, resume.step if resume else 0
    if resume is not None:
        _restore(resume, state)
    elif saving.first and accelerator.is_main_process:
        _save(saving, 0, state)
    if _asked_to_stop(watch, accelerator, device):
        return start
    with at_the_end_of_a_round() as wish:
        for step in range(start + 1, optimization.last + 1):
            began = time.perf_counter()
            torch.manual_seed(step)  # whatever still draws from the global stream draws the same after a resume
            rate = optimization.rate_at(step)
            row, ids = _gradients(objective, accelerator, device, step, saving)
            norm = _update(constraint, optimizer, rate, optimization.max_grad_norm, accelerator)
            if not math.isfinite(norm):
                raise TrainingError(_not_finite("gradient norm", norm, step, ids, saving))
            if follower:
                follower.updated(step)
            seconds = time.perf_counter() - began
            row |= {"learning_rate": rate, "grad_norm": norm}
            _log(saving, accelerator, step, row)
            if accelerator.is_main_process:
                saving.run.append(TIMING, {"step": step, "seconds": round(seconds, 4), **memory_mib(device)})
            watch.on_step({"step": step, **row, "seconds": seconds})
            for hook in watch.hooks:
                _log(saving, accelerator, step, hook(step) or {})
            ends = optimization.ends_a_round(step, saving.together) and _wished(wish, accelerator, device)
            saves = ends or optimization.saves_at(step, saving.every, saving.together)
            if saves or step == optimization.last:
                require_alike(accelerator, constraint.masters(), f"after step {step}")
            if saves and accelerator.is_main_process:
                _save(saving, step, state)
            if ends:
                raise Stopped(ends)
            if _asked_to_stop(watch, accelerator, device):
                return step
    return optimization.last


def _update(
    constraint: Constraint, optimizer: torch.optim.Optimizer, rate: float, limit: float, accelerator: Accelerator
) -> float:
    """Move the masters by the gradients that are there; the gradient norm. One that is not finite moves nothing."""
    constraint.take_gradients()
    norm = _clip(constraint.masters(), limit, accelerator)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        constraint.project()
    return norm


def _asked_to_stop(watch: Watch, accelerator: Accelerator, device: torch.device) -> bool:
    """What the main process says; all follow it."""
    said = torch.tensor([float(accelerator.is_main_process and watch.stop())], device=device)
    return bool(_over_processes(accelerator, said))


def _wished(wish: Wish, accelerator: Accelerator, device: torch.device) -> int:
    """The signal that one of the processes got, 0 for none; all of them end after the same step."""
    if accelerator.num_processes == 1:
        return wish.number
    heard = accelerator.gather(torch.tensor([wish.number], device=device))
    return int(cast(Tensor, heard).max())


def _log(saving: Saving, accelerator: Accelerator, step: int, values: Mapping[str, float]) -> None:
    if values and accelerator.is_main_process:
        saving.run.append(METRICS, {"step": step, **values})
        accelerator.log(dict(values), step=step)


def _gradients(
    objective: Objective[M], accelerator: Accelerator, device: torch.device, step: int, saving: Saving
) -> tuple[dict[str, float], Sequence[str]]:
    """Backward passes of one step, summed over micro-batches and processes, divided once: its row, and its ids."""
    prepared = objective.prepare(step)
    streams = sorted(objective.weights)
    counts = torch.tensor([prepared.tokens.get(s, 0) for s in streams], dtype=torch.float64, device=device)
    totals = _over_processes(accelerator, counts)
    sums = torch.zeros(len(streams), dtype=torch.float64, device=device)
    metrics: dict[str, float] = {}
    for micro in prepared.micro_batches:
        output = objective(micro)
        loss = torch.zeros((), device=device)
        for i, stream in enumerate(streams):
            if stream in output.sums:
                loss = loss + objective.weights[stream] * output.sums[stream][0] / totals[i].item()
                sums[i] += output.sums[stream][0].detach().double()
        if loss.requires_grad:  # a micro-batch of completions shorter than what is skipped gives none
            torch.autograd.backward(loss)  # accelerate's own divides and scales as its configuration says
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    sums = _over_processes(accelerator, sums)
    names = sorted(prepared.means)
    parts = torch.tensor([prepared.means[n] for n in names], dtype=torch.float64, device=device).reshape(-1, 2)
    pairs = zip(names, _over_processes(accelerator, parts).tolist(), strict=True)
    metrics.update((name, total / max(1.0, number)) for name, (total, number) in pairs)
    means = {s: float(sums[i] / totals[i]) for i, s in enumerate(streams) if totals[i] > 0}
    loss_value = sum(objective.weights[s] * m for s, m in means.items())
    if not math.isfinite(loss_value):
        raise TrainingError(_not_finite("loss", loss_value, step, prepared.ids, saving))
    values: dict[str, float] = {"loss": loss_value, "tokens": int(totals.sum()), **metrics}
    if len(streams) > 1:
        values.update({f"{s}/loss": m for s, m in means.items()})
        values.update({f"{s}/tokens": int(n) for s, n in zip(streams, totals, strict=True)})
    return values, prepared.ids


def _over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    if accelerator.num_processes == 1 or not tensor.numel():
        return tensor
    return cast(Tensor, accelerator.reduce(tensor, reduction="sum"))


def _clip(masters: Mapping[str, Tensor], limit: float, accelerator: Accelerator) -> float:
    """Sum gradients over processes, clip them together, return their norm before clipping."""
    if accelerator.num_processes > 1:  # every process must join every sum, also one whose share had nothing to train on
        for tensor in masters.values():
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    with_grad = [t for t in masters.values() if t.grad is not None]
    for tensor in with_grad:
        tensor.grad = _laid_out_as(tensor, _over_processes(accelerator, cast(Tensor, tensor.grad)))
    return float(torch.nn.utils.clip_grad_norm_(with_grad, limit, foreach=True))


def _laid_out_as(master: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its master's order in memory: fused AdamW walks through both as they lie there, unasked.

    They differ where a parameter holds [I, O] (GPT-OSS's experts, Conv1D) and its master is [O, I].
    """
    return gradient if gradient.stride() == master.stride() else torch.empty_like(master).copy_(gradient)


def _groups(masters: Mapping[str, Tensor], weight_decay: float) -> list[Group]:
    groups: list[Group] = [
        {"params": [t for t in masters.values() if t.ndim >= 2], "weight_decay": weight_decay},
        {"params": [t for t in masters.values() if t.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _not_finite(what: str, value: float, step: int, ids: Sequence[str], saving: Saving) -> str:
    saved = saving.run.checkpoints()
    last = f"the last good checkpoint is {saved[-1].path}" if saved else "no checkpoint was saved before it"
    return (
        f"the {what} is {value} at step {step} (prompts {', '.join(ids)}); training stopped before the "
        f"update, and {last}. "
        "A lower learning_rate or max_grad_norm often helps; bad prompts can be taken out by these ids."
    )


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds: masters, their moments, and what follows the weights."""

    constraint: Constraint
    kind: OptimizerKind
    optimizer: torch.optim.Optimizer
    follower: Follower | None


def _save(saving: Saving, step: int, state: _State) -> None:
    masters = state.constraint.masters()
    tensors = {
        f"{name}.{key}": tensor
        for name, master in masters.items()
        for key, tensor in state.kind.state(state.optimizer, master).items()
    }
    # rollouts and prompt order derive from seed and step, so the only random state is the step itself
    followed = state.follower.state() if state.follower else {}
    kept = state.constraint.kept()
    saving.run.save_checkpoint(step, masters, tensors, saving.keep, followed, saving.about, kept)


@torch.no_grad()
def restore_masters(checkpoint: Checkpoint, constraint: Constraint) -> None:
    """Put a checkpoint's masters in place; the model then wears them as served.

    Raises InputError where it holds more than is trained here: an earlier version trained embeddings too.
    """
    saved = checkpoint.masters()
    extra = sorted(set(saved) - set(constraint.masters()))
    if extra:
        raise InputError(
            f"the checkpoint {checkpoint.path} holds weights that are not trained here ({', '.join(extra[:3])}); an "
            "earlier version of remend wrote it, and only that one can continue or measure it"
        )
    constraint.take_kept(checkpoint.kept())
    for name, master in constraint.masters().items():
        master.copy_(saved[name])
    constraint.project()


@torch.no_grad()
def _restore(checkpoint: Checkpoint, state: _State) -> None:
    restore_masters(checkpoint, state.constraint)
    moments = checkpoint.optimizer()
    for name, master in state.constraint.masters().items():
        names = {key: f"{name}.{key}" for key in state.kind.saved}
        if saved := {key: moments[full] for key, full in names.items() if full in moments}:
            state.kind.restore(state.optimizer, master, saved, checkpoint.step)
    if state.follower:
        state.follower.load(checkpoint.follower())
