"""Held-out measures of the streams beside the main one: is the task kept while the rest is won back?

On fixed completions of the stream's held-out prompts: the rows' own answers where they have them (demonstrations), else
the teacher's greedy ones from before training. `kl` is the forward KL(teacher ‖ student) with the teacher as it is
now, shown its demonstration if the stream says so; `nll` the student's negative log-likelihood; both nats a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from remend.data.examples import demonstration_of
from remend.files.atomic import read_json, write_json
from remend.files.run_directory import RunDirectory
from remend.models.sampling.answers import answer, kept
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import Scorer
from remend.models.tokens import eos_ids
from remend.recovery.bootstrap import Verdict, judge_demonstrations, likelihood_gain
from remend.recovery.distillation import Lane
from remend.recovery.preflight import Preflight
from remend.recovery.prompts import StreamData
from remend.recovery.settings import RecoverConfig
from remend.recovery.task_gain import score_gain
from remend.training.measure import compare, pool
from remend.training.supervised import ending
from remend.training.teachers.cache import TeacherCache
from remend.training.teachers.views import policy_of

ROWS = 64
"""Held-out rows of a stream that are measured at most."""

BASELINE = "streams-baseline.json"


class SideStreams:
    """See the module docstring.

    Args:
        lanes, checked, config: of the run; teachers are as at the start.
        student: as it is trained.
        directory: the teacher's answers and the measures before training are kept there.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        checked: Preflight,
        config: RecoverConfig,
        student: Scorer,
        directory: RunDirectory,
    ) -> None:
        self.config, self.tokenizer, self.student = config, checked.tokenizer, student
        self.directory, self.main = directory, checked.main
        self.data = {s.stream.name: s for s in checked.streams}
        self.lanes = {lane.stream.name: lane for lane in lanes}
        self._completions = {
            name: self._answers(data) for name, data in self.data.items() if data.stream.demonstrations
        }
        for name, data in self.data.items():
            if data is not self.main and data.held_out and name not in self._completions:
                self._completions[name] = self._taught(data)

    @property
    def _measured(self) -> list[str]:
        return [name for name in self._completions if name != self.main.stream.name]

    def _answers(self, data: StreamData) -> list[Rollout]:
        """The held-out rows' own answers as completions."""
        ends = eos_ids(self.student.model, self.tokenizer)
        close, found = ending(self.tokenizer, ends), []
        for prompt in data.held_out[:ROWS]:
            text = demonstration_of(data.examples[prompt.id].row, f'row "{prompt.id}"')
            tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append(Rollout(prompt.id, prompt.tokens, (*tokens, *close), False, prompt.shown))
        return found

    def _taught(self, data: StreamData) -> list[Rollout]:
        """The teacher's greedy answers before training, from the run's directory or sampled into it."""
        teacher, title = self.lanes[data.stream.name].teacher, f"the teacher of {data.stream.name} answers"
        if isinstance(teacher, TeacherCache):
            return teacher.held_out[:ROWS]
        prompts, length = data.held_out[:ROWS], data.stream.lengths[1]
        model, worn = policy_of(teacher)

        def write() -> list[Rollout]:
            with worn:
                return answer(model, self.tokenizer, prompts, title, max_new_tokens=length, shared=self.student.shared)

        return kept(self.directory, f"reference-{data.stream.name}.jsonl", prompts, self.tokenizer, write)

    def measure(self) -> dict[str, dict[str, float]]:
        """kl and nll of each stream beside the main one."""
        found = {}
        for name in self._measured:
            sums = compare(self.student, self.lanes[name].teacher, self._completions[name])
            tokens = sum(s.tokens for s in sums)
            found[name] = {"kl": pool(sums)["kl"], "nll": sum(s.nll for s in sums) / tokens}
        return found

    def baseline(self) -> dict[str, dict[str, float]]:
        """`measure` before training, made once a run."""
        path = self.directory.path / BASELINE
        if not path.is_file():
            write_json(path, self.measure())
        measured: dict[str, dict[str, float]] = read_json(path)
        return measured

    def goal(self, name: str, figures: Mapping[str, float]) -> float:
        """What selection goes by: the answers' nll where the teacher moves with the student, else the KL."""
        stream = self.data[name].stream
        return figures["nll" if stream.moving and stream.demonstrations else "kl"]

    def demonstration_gains(self) -> list[Verdict]:
        """For each stream with demonstrations: do they help its teacher?"""
        found = []
        for name, data in self.data.items():
            teacher: Any = self.lanes[name].teacher
            if not data.stream.demonstrations or isinstance(teacher, TeacherCache):
                continue
            device = self.student.device
            gains = {"nll": likelihood_gain(teacher, self._completions[name], device=device)}
            if data.stream.task:
                gains["score"] = score_gain(data, teacher, self.student, self.tokenizer)
            found.append(judge_demonstrations(name, gains, self.config.seed))
        return found
