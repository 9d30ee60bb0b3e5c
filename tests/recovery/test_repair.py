"""Which text a repair is fitted to, and that training begins with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers.tiny import build_model, build_tokenizer, put_on_grid
from remend.compression.recognise import Recognised
from remend.data.order import Order
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.files.run_directory import RunDirectory
from remend.models.activations.walk import completions
from remend.recovery.calibration_text import calibration_prompts
from remend.recovery.job import RecoverResult, check, recover
from remend.recovery.repair import REPAIR_ANSWERS, repair
from remend.training.constraints import StudentFacts


def test_a_padded_teacher_writes_no_calibration_text_that_the_student_can_not_read() -> None:
    tokenizer = build_tokenizer()
    student, padded = build_model(len(tokenizer)), build_model(len(tokenizer) + 512)
    # an id that only the teacher has is the likeliest
    padded.get_input_embeddings().weight.data[len(tokenizer) :] = 9.0
    facts = StudentFacts(Recognised("remend", put_on_grid(student, "int3-g64"), False, "it lies on a grid"))
    asked = [Encoded(str(i), (1, 40 + i), "") for i in range(3)]
    result = repair(
        student,
        padded,
        facts,
        lambda: completions(padded, tokenizer, asked, max_new_tokens=64, seed=0, shared=len(tokenizer)),
    )
    assert result.seconds > 0
    assert len(result.answers) == 3
    assert max(token for row in result.answers for token in row.completion) < len(tokenizer)


def test_calibration_prompts_are_as_many_as_asked_or_as_rows_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Encoded(str(i), tuple(range(10)), "") for i in range(5)]

    def chosen(samples: int) -> list[str]:
        return [p.id for p in calibration_prompts(prompts, samples, 0)]

    assert len(set(chosen(4))) == 4
    assert chosen(12).count("3") >= 2  # answered again, with other draws
    first = {prompt.id for _, prompt in Order(prompts, 0).take(0, 2)}
    assert not first & set(chosen(3))  # training begins with what repair has not seen
    monkeypatch.setattr("remend.recovery.calibration_text.MOST_ROWS", 3 * (10 + 64))
    assert len(chosen(5)) == 3
    monkeypatch.setattr("remend.recovery.calibration_text.MOST_ROWS", 1)
    assert len(chosen(5)) == 1


def test_the_first_steps_train_on_the_answers_that_repair_was_fitted_to(repaired_run: RecoverResult) -> None:
    """6 answers twice are 12 completions: three steps of 4."""
    assert len(RunDirectory(repaired_run.out).rows(REPAIR_ANSWERS)) == 6
    assert [row["on_policy"] for row in repaired_run.metrics] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_a_model_that_cant_be_walked_is_refused_before_it_is_measured(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without repair it is recovered."""
    once = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: once(self, once(self, x)))
    with pytest.raises(InputError, match=r"several times a pass, model.layers.0.mlp.gate_proj.*repair: false"):
        recover(**{**recipe, "repair": True})
    assert not Path(recipe["out"]).exists()
    assert recover(**{**recipe, "out": f"{recipe['out']}-without"}).metrics


def test_a_model_that_only_numbers_show_to_be_unlike_is_refused_before_anything_is_sampled_or_written(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is given the tokens of a batch in another order."""
    once = LlamaMLP.forward

    def time_first(self: LlamaMLP, x_BTD: Tensor) -> Tensor:
        given = once(self, x_BTD.transpose(0, 1).flatten(0, 1)).unflatten(0, x_BTD.shape[1::-1])
        return given.transpose(0, 1)  # type: ignore[no-any-return]

    monkeypatch.setattr(LlamaMLP, "forward", time_first)
    monkeypatch.setattr("remend.recovery.written_prompts.generate", lambda *a, **k: pytest.fail("sampled"))
    unlike = {**recipe, "repair": True, "data": "self"}
    assert not check(**unlike).problems
    with pytest.raises(InputError, match="each token once, in their order"):
        recover(**unlike)
    assert not Path(recipe["out"]).exists()
