"""Judge a student on held-out prompts before, during and after recovery.

`Judge` measures the main stream in three views, all in nats per token of forward KL(reference ‖ student) unless said
otherwise: on the reference's greedy completions; on the student's own seeded samples, since a student can look well on
text that it would never write; and samples to read.

`SideJudge` measures the streams beside the main one: is the task kept while the rest is won back? It does so on fixed
completions of the stream's held-out prompts: the rows' own answers where they have them (demonstrations), else the
teacher's greedy ones from before training. `kl` is the forward KL(teacher ‖ student) with the teacher as it is now,
shown its demonstration if the stream says so; `nll` the student's negative log-likelihood; both nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from remend.console import stage
from remend.data.answers import ending, with_answer
from remend.data.examples import demonstration_of
from remend.data.order import derive_seed
from remend.data.templates import Encoded, display
from remend.errors import InputError, shortened
from remend.files.atomic import JsonObject, json_line, write_json, write_text
from remend.files.reading import read_object, understood
from remend.files.run_directory import DAMAGED, REPAIR, WORST
from remend.maths.gap import bootstrap_gap_closed, gap_closed_divergence, gap_closed_score
from remend.maths.losses import Target
from remend.models.activations.apart import divided
from remend.models.activations.walk import Walked
from remend.models.load import eos_ids
from remend.models.protocols import CausalLM
from remend.models.sampling.answers import answer, answered_once, as_text, pieces
from remend.models.sampling.rollout import Draws, Rollout
from remend.models.scorer import Scorer
from remend.recovery.begin import Run
from remend.recovery.bootstrap import Verdict, judge_demonstrations, judge_rollouts, likelihood_gain, score_gain
from remend.recovery.prompts import StreamData
from remend.recovery.rounds import Source
from remend.training.measure import PromptSums, compare, pool
from remend.training.teachers import Teacher

SHOWN = 4
"""How many held-out prompts are answered for people to read."""

SHOWN_WORST = 10
"""Of so many held-out prompts, those with the highest KL, the KL of each token is kept for the report."""

MOST_TOKENS = 200
"""Of a longer answer the first so many tokens are kept."""

FITTED = 32
"""Of the answers that repair was fitted to, so many are measured."""

SIDE_ROWS = 64
"""Held-out rows of a stream beside the main one that are measured at most."""

GATE_PROMPTS = 16
"""Held-out prompts that the gate lets the student answer."""

BASELINE, SIDE_BASELINE = "baseline.json", "streams-baseline.json"


@dataclass(frozen=True)
class HeldOut:
    """One model's measurement: sums per prompt on the reference's and on its own completions, and greedy answers."""

    on_reference: list[PromptSums]
    on_policy: list[PromptSums]
    answers: list[str]

    @staticmethod
    def read(path: Path) -> HeldOut:
        """As its fields were written. Raises FileError for a damaged file."""
        value = read_object(path, DAMAGED)
        with understood(path, DAMAGED):
            on_reference, on_policy = ([_sums(s) for s in value[of]] for of in ("on_reference", "on_policy"))
            return HeldOut(on_reference, on_policy, [str(answer) for answer in value["answers"]])

    def figures(self) -> dict[str, Any]:
        """Means over tokens, as in summary.json. A cached reference can't score the student's own answers: None."""
        ours = pool(self.on_reference)
        return {
            "kl": ours["kl"],
            "top1_agreement": ours["top1_agreement"],
            "kl_on_policy": pool(self.on_policy)["kl"] if self.on_policy else None,
            "perplexity": ours["perplexity"],
        }


def _sums(given: Mapping[str, Any]) -> PromptSums:
    """As JSON gives them. Raises TypeError for others."""
    sums = PromptSums(**given)
    numbers = (sums.tokens, sums.kl, sums.agree, sums.nll, sums.reference_nll)
    if not isinstance(sums.id, str) or any(type(number) not in (int, float) for number in numbers):
        raise TypeError(f"{shortened(given)} are no sums of a prompt")
    return sums


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


@dataclass(frozen=True)
class Judge:
    """Measures models against one reference, on the main stream's held-out prompts; `prepare_judge` makes it.

    run: whose held-out prompts they are.
    reference: what is measured against.
    prompts: without demonstrations, whatever the main stream's teacher is shown.
    completions: the reference's greedy answers to them.
    """

    run: Run
    reference: Teacher
    prompts: Sequence[Encoded]
    completions: Sequence[Rollout]
    _kept: dict[int, Target] = field(default_factory=dict)  # of the reference on them, which does not move

    def measure(self, model: CausalLM, name: str) -> HeldOut:
        """All three views of one model."""
        return self._measured(model, name)[0]

    def _measured(self, model: CausalLM, name: str) -> tuple[HeldOut, list[Rollout]]:
        """`measure`, and the model's own sampled answers."""
        student = self.run.parts(model)
        on_reference = self._compare(student, self.completions, f"measuring the {name} model")
        own, on_policy = self.own_answers(model, len(self.prompts), f"the {name} model answers")
        shown = _sample(self.run, model, self.prompts[:SHOWN], "generating sample answers for the report", 0.0)
        return HeldOut(on_reference, on_policy, [as_text(self.run.plan.tokenizer, r) for r in shown]), own

    def measure_degraded(self, student: CausalLM) -> HeldOut:
        """The measurement of the student as it came in; writes baseline.json."""
        measured = self.measure(student, "degraded")
        write_json(self.run.directory.path / BASELINE, asdict(measured))
        return measured

    def measure_repaired(
        self, student: CausalLM, before: HeldOut, seconds: float, answers: Sequence[Rollout], walked: Walked
    ) -> tuple[list[PromptSums], JsonObject]:
        """Measure a student repaired on `answers`; writes repair.json and held_out_repaired.jsonl.

        Where `kl_fitted`, which is on some of those answers, is far below the held-out KL, repair is short of text.

        `walked` is what the walk over them found.

        Returns:
            The sums, and what repair.json says: repair is `kept` where its KL is not above that of the student as it
            came in, and the text that it held apart says nothing else.
        """
        directory, ours = self.run.directory.path, self.run.parts(student)
        sums = self._compare(ours, self.completions, "measuring the repaired model")
        fitted = [replace(r, shown=None) for r in divided(answers)[0][:FITTED] if r.completion]
        rows = [{"id": s.id, "tokens": s.tokens, "kl_sum": s.kl} for s in sums]
        write_text(directory / "held_out_repaired.jsonl", "".join(json_line(row) for row in rows))
        figures = pool(sums)
        helped = figures["kl"] <= before.figures()["kl"] and not walked.worse
        on_fitted = pool(self._compare(ours, fitted, "measuring on the calibration text"))["kl"] if fitted else None
        measured = {key: figures[key] for key in ("kl", "top1_agreement", "perplexity")}
        record: JsonObject = {**measured, "kl_fitted": on_fitted, "seconds": round(seconds, 1), "kept": helped}
        record |= {"unexplained": [*walked.unexplained], "held_back": [*walked.held_back]}
        record["apart"] = dict(zip(("before", "after"), walked.apart, strict=True)) if walked.apart else None
        write_json(directory / REPAIR, record)
        return sums, record

    def measure_recovered(self, model: CausalLM, before: HeldOut) -> HeldOut:
        """The recovered model's measurement; writes held_out.jsonl (per prompt), samples.jsonl and worst.jsonl."""
        measured, own = self._measured(model, "recovered")
        directory = self.run.results
        pairs = zip(before.on_reference, measured.on_reference, strict=True)
        rows = [
            {"id": a.id, "tokens": a.tokens}
            | {"kl_sum_degraded": a.kl, "kl_sum_recovered": b.kl}
            | {"agree_degraded": a.agree, "agree_recovered": b.agree}
            for a, b in pairs
        ]
        write_text(directory / "held_out.jsonl", "".join(json_line(row) for row in rows))
        samples = [
            {
                "id": rollout.id,
                "prompt": self._prompt(rollout),
                "reference": as_text(self.run.plan.tokenizer, rollout),
                "degraded": before.answers[i],
                "recovered": measured.answers[i],
            }
            for i, rollout in enumerate(self.completions[:SHOWN])
        ]
        write_text(directory / "samples.jsonl", "".join(json_line(row) for row in samples))
        worst = self._worst(self.run.parts(model), measured, own)
        write_text(directory / WORST, "".join(json_line(row) for row in worst))
        return measured

    def _worst(self, student: Scorer, measured: HeldOut, own: Sequence[Rollout]) -> list[JsonObject]:
        """The held-out prompts with the highest KL a token, worst first, with the KL of each token of two texts: the
        reference's answer, and the student's own where it was measured."""
        mean = {i: s.kl / s.tokens for i, s in enumerate(measured.on_reference) if s.tokens}
        worst = sorted(mean, key=lambda i: -mean[i])[:SHOWN_WORST]
        texts = {"reference": self.completions, **({"own": own} if measured.on_policy else {})}
        rows: list[JsonObject] = [
            {"id": self.completions[i].id, "prompt": self._prompt(self.completions[i]), "kl": mean[i]} for i in worst
        ]
        for name, rollouts in texts.items():
            chosen, by_token = [rollouts[i] for i in worst], dict[int, Tensor]()
            compare(student, self.reference, chosen, by_token=by_token)
            for row, tokens in zip(rows, self._tokens(chosen, by_token), strict=True):
                row[name] = tokens
        return rows

    def _tokens(self, rollouts: Sequence[Rollout], by_token: Mapping[int, Tensor]) -> list[list[JsonObject]]:
        """Of each completion: its tokens as text, with their KL and how many tokens the student puts before them."""
        return [
            [
                {"text": text, "kl": round(float(kl), 3), "rank": int(rank)}
                for text, (kl, rank) in zip(
                    pieces(self.run.plan.tokenizer, rollout.completion[:MOST_TOKENS]),
                    by_token[i][:MOST_TOKENS].tolist(),
                    strict=True,
                )
            ]
            for i, rollout in enumerate(rollouts)
        ]

    def own_answers(self, model: CausalLM, count: int, title: str) -> tuple[list[Rollout], list[PromptSums]]:
        """The model's own seeded samples at temperature 1 to the first prompts, and its divergence on them.

        A reference that brings its completions along can't score others: no sums.
        """
        own = _sample(self.run, model, self.prompts[:count], title, 1.0)
        if self.reference.held_out is not None:
            return own, []
        return own, self._compare(self.run.parts(model), own, "measuring its own answers")

    def quick(self, student: Scorer) -> dict[str, float]:
        """KL and agreement on the reference's completions, during training."""
        return figures_of(compare(student, self.reference, self.completions, kept=self._kept))

    def answered(self, prompts: Sequence[Encoded], file: str) -> list[Rollout]:
        """The reference's greedy answers to other prompts, sampled once per run and kept in `file`."""
        length = self.run.prompts.main.stream.lengths[1]
        return _greedy_answers(self.run, self.reference, prompts, file, "the reference answers prompts", length)

    def _compare(self, student: Scorer, rollouts: Sequence[Rollout], title: str) -> list[PromptSums]:
        with stage(title, len(rollouts)) as advance:
            kept_targets = self._kept if rollouts is self.completions else None
            return compare(student, self.reference, rollouts, on_rows=advance, kept=kept_targets)

    def _prompt(self, rollout: Rollout) -> str:
        example = self.run.prompts.main.examples.get(rollout.id)
        if example is not None:
            return display(example.prompt)
        return self.run.plan.tokenizer.decode(rollout.prompt, skip_special_tokens=True)  # the teacher brought it


def figures_of(sums: Sequence[PromptSums]) -> dict[str, float]:
    """kl and top1_agreement."""
    pooled = pool(sums)
    return {key: pooled[key] for key in ("kl", "top1_agreement")}


def prepare_judge(run: Run, reference: Teacher) -> Judge | None:
    """The judge, once the reference has answered the held-out prompts; None in a process that only shares the steps."""
    if not run.main:
        return None
    prompts = [replace(p, shown=None) for p in run.prompts.main.held_out]
    completions = reference.held_out
    if completions is None:
        title, length = "reference answers the held-out prompts", run.prompts.main.stream.lengths[1]
        completions = _greedy_answers(run, reference, prompts, "reference.jsonl", title, length)
    return Judge(run, reference, prompts, completions)


def _greedy_answers(
    run: Run, teacher: Teacher, prompts: Sequence[Encoded], file: str, title: str, length: int
) -> list[Rollout]:
    """A teacher's answers to prompts of `length` tokens at most, sampled once per run and kept in `file`."""
    plan = run.plan

    def write() -> list[Rollout]:
        with teacher.policy() as model:
            rows = run.rows_at_once
            return answer(model, plan.tokenizer, prompts, title, max_new_tokens=length, shared=plan.shared, rows=rows)

    return answered_once(run.directory, file, prompts, plan.tokenizer, write)


def _sample(run: Run, model: CausalLM, prompts: Sequence[Encoded], title: str, temperature: float) -> list[Rollout]:
    return answer(
        model,
        run.plan.tokenizer,
        prompts,
        title,
        max_new_tokens=run.prompts.main.stream.lengths[1],
        shared=run.plan.shared,
        draws=Draws(temperature, [derive_seed(run.plan.config.seed, "held-out", i) for i in range(len(prompts))]),
        rows=run.rows_at_once,
    )


@dataclass(frozen=True)
class SideJudge:
    """Measures the streams beside the main one; `prepare_side_judge` makes it.

    run: whose streams they are.
    sources: by name, with their teachers as at the start.
    student: as it is trained.
    completions: of the streams that are measured, and of all that have demonstrations.
    """

    run: Run
    sources: Mapping[str, Source]
    student: Scorer
    completions: Mapping[str, Sequence[Rollout]]

    def measure(self) -> dict[str, dict[str, float]]:
        """kl and nll of each stream beside the main one."""
        figures = {}
        for name, rollouts in self.completions.items():
            if name == self.run.prompts.main.stream.name:
                continue
            sums = compare(self.student, self.sources[name].teacher, rollouts)
            tokens = sum(s.tokens for s in sums)
            figures[name] = {"kl": pool(sums)["kl"], "nll": sum(s.nll for s in sums) / tokens}
        return figures

    def baseline(self) -> dict[str, dict[str, float]]:
        """`measure` before training; writes streams-baseline.json."""
        measured = self.measure()
        write_json(self.run.directory.path / SIDE_BASELINE, measured)
        return measured

    def goal(self, name: str, figures: Mapping[str, float]) -> float:
        """What selection goes by: the answers' nll where the teacher moves with the student, else the KL."""
        stream = self.sources[name].stream
        return figures["nll" if stream.teacher.moving and stream.demonstrations else "kl"]

    def demonstration_gains(self) -> list[Verdict]:
        """For each stream with demonstrations: do they help its teacher?"""
        verdicts = []
        for data in self.run.prompts.streams:
            name, stream = data.stream.name, data.stream
            teacher = self.sources[name].teacher
            if not stream.demonstrations or teacher.train is not None:
                continue
            gains = {"nll": likelihood_gain(teacher, self.completions[name])}
            if stream.task:
                rows = self.run.rows_at_once
                gains["score"] = score_gain(data, teacher, self.run.plan.tokenizer, self.student.shared, rows)
            verdicts.append(judge_demonstrations(name, gains, self.run.plan.config.seed))
        return verdicts


def gate_verdict(student: CausalLM, judge: Judge, side: SideJudge) -> Verdict:
    """Whether the student as it is can learn from its own answers, and the teachers from demonstrations."""
    own, sums = judge.own_answers(student, GATE_PROMPTS, "the gate lets the student answer")
    verdicts = [judge_rollouts(own, sums, judge.completions[:GATE_PROMPTS])] if sums else []
    verdicts += side.demonstration_gains()
    reasons = [reason for verdict in verdicts for reason in verdict.reasons]
    return Verdict(reasons, {name: value for verdict in verdicts for name, value in verdict.figures.items()})


def prepare_side_judge(run: Run, sources: Sequence[Source], student: Scorer) -> SideJudge:
    """The judge of the streams beside the main one, once their teachers have answered what the rows don't answer."""
    named = {source.stream.name: source for source in sources}
    streams = run.prompts.streams
    completions: dict[str, Sequence[Rollout]] = {
        s.stream.name: _row_answers(run, s, student) for s in streams if s.stream.demonstrations
    }
    for data in streams:
        name, length, prompts = data.stream.name, data.stream.lengths[1], data.held_out[:SIDE_ROWS]
        if data is run.prompts.main or not prompts or name in completions:
            continue
        teacher, title = named[name].teacher, f"the teacher of {name} answers"
        completions[name] = (
            _greedy_answers(run, teacher, prompts, f"reference-{name}.jsonl", title, length)
            if teacher.held_out is None
            else teacher.held_out[:SIDE_ROWS]
        )
    return SideJudge(run, named, student, completions)


def _row_answers(run: Run, data: StreamData, student: Scorer) -> list[Rollout]:
    """The held-out rows' own answers as completions, but for those that end beyond the model's positions."""
    positions = data.room.positions if data.room else None
    tokenizer, eos = run.plan.tokenizer, eos_ids(student.model, run.plan.tokenizer)
    rollouts = []
    for prompt in data.held_out[:SIDE_ROWS]:
        example = data.examples[prompt.id]
        text = demonstration_of(example.row, f'row "{prompt.id}"')
        try:
            asked, completion = with_answer(tokenizer, example, text, eos)
        except InputError:  # the template shows answers in another form; these are only measured
            asked = prompt.tokens
            completion = (*tokenizer(text, add_special_tokens=False)["input_ids"], *ending(tokenizer, eos))
        shown = prompt.shown and prompt.shown[: len(prompt.shown) - len(prompt.tokens) + len(asked)]
        if positions is None or len(shown or asked) + len(completion) <= positions:
            rollouts.append(Rollout(prompt.id, asked, completion, False, shown))
    return rollouts
