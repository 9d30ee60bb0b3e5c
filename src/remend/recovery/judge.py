"""Judge a student on held-out prompts before, during and after recovery.

Three views, all in nats a token of forward KL(reference ‖ student) unless said otherwise: on the reference's greedy
completions; on the student's own seeded samples, since a student can look well on text that it would never write; and
samples to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from remend.console import stage
from remend.data.order import derive_seed
from remend.data.templates import Encoded, display
from remend.files.atomic import json_line, read_json, write_json, write_text
from remend.files.run_directory import REPAIR, RunDirectory
from remend.maths.gap import bootstrap_gap_closed, gap_closed_divergence, gap_closed_score
from remend.models.sampling.answers import answer, kept, spoken
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer, scorer
from remend.recovery.preflight import Preflight
from remend.recovery.settings import RecoverConfig
from remend.training.measure import PromptSums, compare, pool
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import Teacher, policy_of

SHOWN = 4
"""How many held-out prompts are answered for people to read."""

FITTED = 32
"""Of the answers that repair was fitted to, so many are measured."""


@dataclass(frozen=True)
class HeldOut:
    """One model's measurement: sums a prompt on the reference's and on its own completions, and greedy answers."""

    on_reference: list[PromptSums]
    on_policy: list[PromptSums]
    answers: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> HeldOut:
        """Inverse of to_json."""
        return HeldOut(
            [PromptSums(**s) for s in value["on_reference"]],
            [PromptSums(**s) for s in value["on_policy"]],
            value["answers"],
        )

    def figures(self) -> dict[str, Any]:
        """Means over tokens, as in summary.json. A cached reference can't score the student's own answers: None."""
        ours = pool(self.on_reference)
        return {
            "kl": ours["kl"],
            "top1_agreement": ours["top1_agreement"],
            "kl_on_policy": pool(self.on_policy)["kl"] if self.on_policy else None,
            "perplexity": ours["perplexity"],
        }


def summarize(degraded: HeldOut, recovered: HeldOut, seed: int) -> dict[str, Any]:
    """The part of summary.json that says how much was won back."""
    before, after = degraded.figures(), recovered.figures()
    interval = bootstrap_gap_closed(
        [s.kl for s in degraded.on_reference], [s.kl for s in recovered.on_reference], seed=seed
    )
    gap = gap_closed_divergence(before["kl"], after["kl"])
    return {
        "degraded": before,
        "recovered": after,
        "reference_perplexity": pool(degraded.on_reference)["reference_perplexity"],
        "gap_closed": {
            "kl": gap,
            "kl_on_policy": gap_closed_divergence(before["kl_on_policy"], after["kl_on_policy"])
            if before["kl_on_policy"] is not None
            else None,
            "top1_agreement": gap_closed_score(1.0, before["top1_agreement"], after["top1_agreement"]),
        }
        if gap is not None
        else None,
        "gap_closed_kl_95": interval if gap is not None else None,
    }


class Judge:
    """Measures models against one reference, in memory or cached, on the main stream's held-out prompts."""

    def __init__(
        self,
        reference: Teacher | TeacherCache,
        checked: Preflight,
        config: RecoverConfig,
        directory: RunDirectory,
    ) -> None:
        self.reference, self.checked, self.config = reference, checked, config
        self.directory = directory
        # measured without demonstrations, whatever the main stream's teacher is shown
        self.prompts = [replace(p, shown=None) for p in checked.main.held_out]
        self.examples = checked.main.examples
        self.tokens = checked.main.stream.lengths[1]
        self.completions = self._reference_completions()
        self._kept: dict[int, Tensor] = {}  # of the reference on them, which does not move: N · D numbers

    def _sample(self, model: Any, prompts: list[Encoded], title: str, temperature: float) -> list[Rollout]:
        seeds = [derive_seed(self.config.seed, "held-out", i) for i in range(len(prompts))]
        settings: dict[str, Any] = {"shared": self.checked.shared, "temperature": temperature, "seeds": seeds}
        return answer(model, self.checked.tokenizer, prompts, title, max_new_tokens=self.tokens, **settings)

    def _reference_completions(self) -> list[Rollout]:
        reference, title = self.reference, "reference answers the held-out prompts"
        if isinstance(reference, TeacherCache):
            return reference.held_out
        return kept(
            self.directory,
            "reference.jsonl",
            self.prompts,
            self.checked.tokenizer,
            lambda: self._by(reference, title),
        )

    def _by(self, reference: Teacher, title: str) -> list[Rollout]:
        model, worn = policy_of(reference)
        with worn:
            return self._sample(model, self.prompts, title, 0.0)

    def _text(self, rollout: Rollout) -> str:
        return spoken(self.checked.tokenizer, rollout)

    def _compare(self, student: Scorer, rollouts: list[Rollout], title: str) -> list[PromptSums]:
        with stage(title, len(rollouts)) as advance:
            kept = self._kept if rollouts is self.completions else None
            return compare(student, self.reference, rollouts, on_rows=advance, kept=kept)

    def own_answers(self, model: Any, count: int, title: str) -> tuple[list[Rollout], list[PromptSums]]:
        """The model's own seeded samples at temperature 1 to the first prompts, and its divergence on them.

        A cached reference can't score them: no sums.
        """
        own = self._sample(model, self.prompts[:count], title, 1.0)
        if isinstance(self.reference, TeacherCache):
            return own, []
        return own, self._compare(scorer(model, self.checked.shared), own, "measuring its own answers")

    def measure(self, model: Any, name: str) -> HeldOut:
        """All three views of one model."""
        student = scorer(model, self.checked.shared)
        on_reference = self._compare(student, self.completions, f"measuring the {name} model")
        _, on_policy = self.own_answers(model, len(self.prompts), f"the {name} model answers")
        shown = self._sample(model, self.prompts[:SHOWN], "sampling answers to read", 0.0)
        return HeldOut(on_reference, on_policy, [self._text(r) for r in shown])

    def baseline(self, student: Any) -> HeldOut:
        """The degraded student's measurement, made once a run."""
        path = self.directory.path / "baseline.json"
        if path.is_file():
            return HeldOut.from_json(read_json(path))
        measured = self.measure(student, "degraded")
        write_json(path, measured.to_json())
        return measured

    def after_repair(self, student: Any, seconds: float, answers: Sequence[Rollout]) -> list[PromptSums]:
        """Measure the repaired student on the reference's answers; writes repair.json and held_out_repaired.jsonl.

        repair.json's `kept` is false where its KL is above that of the student as it came in. `kl_fitted` is on some
        of the `answers` that repair was fitted to: where it is far below, repair is short of text.
        """
        ours = scorer(student, self.checked.shared)
        sums = self._compare(ours, self.completions, "measuring the repaired model")
        fitted = [replace(r, shown=None) for r in answers[:FITTED] if r.completion]
        rows = [{"id": s.id, "tokens": s.tokens, "kl_sum": s.kl} for s in sums]
        write_text(self.directory.path / "held_out_repaired.jsonl", "".join(json_line(row) for row in rows))
        figures = pool(sums)
        shown = {key: figures[key] for key in ("kl", "top1_agreement", "perplexity")}
        kept = figures["kl"] <= self.baseline(student).figures()["kl"]
        on_fitted = pool(self._compare(ours, fitted, "and on what it was fitted to"))["kl"] if fitted else None
        record = {**shown, "kl_fitted": on_fitted, "seconds": round(seconds, 1), "kept": kept}
        write_json(self.directory.path / REPAIR, record)
        return sums

    def final(self, recovered: Any) -> HeldOut:
        """The recovered model's measurement; writes held_out.jsonl (by prompt) and samples.jsonl."""
        measured = self.measure(recovered, "recovered")
        degraded = HeldOut.from_json(read_json(self.directory.path / "baseline.json"))
        pairs = zip(degraded.on_reference, measured.on_reference, strict=True)
        rows = [{"id": a.id, "tokens": a.tokens, "kl_sum_degraded": a.kl, "kl_sum_recovered": b.kl} for a, b in pairs]
        write_text(self.directory.path / "held_out.jsonl", "".join(json_line(row) for row in rows))
        samples = []
        for i, rollout in enumerate(self.completions[:SHOWN]):
            samples.append(
                {
                    "id": rollout.id,
                    "prompt": self._prompt(rollout),
                    "reference": self._text(rollout),
                    "degraded": degraded.answers[i],
                    "recovered": measured.answers[i],
                }
            )
        write_text(self.directory.path / "samples.jsonl", "".join(json_line(row) for row in samples))
        return measured

    def _prompt(self, rollout: Rollout) -> str:
        if rollout.id in self.examples:
            return display(self.examples[rollout.id].prompt)
        text: str = self.checked.tokenizer.decode(rollout.prompt, skip_special_tokens=True)  # of a cache
        return text

    def quick(self, student: Scorer) -> dict[str, float]:
        """KL and agreement on the reference's completions, during training."""
        figures = pool(compare(student, self.reference, self.completions, kept=self._kept))
        return {"kl": figures["kl"], "top1_agreement": figures["top1_agreement"]}
