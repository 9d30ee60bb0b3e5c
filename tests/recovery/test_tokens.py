"""What student and teacher can't read or end is told by the checks, row by row, before anything is sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.recovering import torn_copy
from helpers.tiny import TEMPLATE, build_model, build_tokenizer, prompts
from remend.degrade.finetune import finetune
from remend.degrade.quantize import quantize
from remend.diagnosis.job import diagnose
from remend.errors import InputError
from remend.evaluation.job import evaluate
from remend.recovery.job import recover, settings
from remend.recovery.plan import Checked
from remend.recovery.preflight import preflight
from remend.recovery.self_prompts import write_self_prompts
from remend.training.write_cache import cache_teacher

MARKS = TEMPLATE.replace("<|im_start|>", "<|turn|>")


def found(recipe: dict[str, Any], **changes: Any) -> Checked:
    return preflight(settings(overrides={**recipe, **changes}))


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def saved(path: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def gpt2(path: Path, positions: int = 48) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=positions, bos_token_id=0, eos_token_id=2
    )
    return saved(path, transformers.GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """36 short prompts and the row `long`, in a file."""
    rows = [{"prompt": text, "completion": "It is.", "id": str(i)} for i, text in enumerate(prompts(36))]
    return write_rows(tmp_path / "mixed.jsonl", [*rows, {"prompt": "word " * 40, "completion": "It is.", "id": "long"}])


@pytest.mark.parametrize("padding", [0, 6])
def test_tokens_that_the_student_added_are_unknown_to_its_teacher(
    recipe: dict[str, Any], tmp_path: Path, reference_dir: Path, padding: int
) -> None:
    """A teacher with as many rows reads them, and they mean nothing to it."""
    added = build_tokenizer(("<|turn|>",))
    added.chat_template = MARKS
    student = saved(tmp_path / "chat", build_model(len(added)), added)
    teacher = saved(tmp_path / "base", build_model(320 + padding, seed=1), build_tokenizer())
    problems = found(recipe, student=str(student), teacher=str(teacher)).problems
    (problem,) = problems
    assert f"'<|turn|>' (320), and teacher {teacher} knows no such token" in problem
    assert problem.startswith("rows ")
    assert problem.count(",") >= 40  # every row
    assert not found(recipe, student=str(student), teacher=str(teacher), data="self").plan  # those to be written, too
    with pytest.raises(InputError, match=r"'<\|turn\|>' \(320\), and base knows no such token"):
        diagnose(str(student), [str(teacher)], tmp_path / "diagnosis", rows=8, device="cpu")


def test_an_end_that_the_teacher_does_not_share_is_a_problem(recipe: dict[str, Any], tmp_path: Path) -> None:
    added = build_tokenizer(("<|done|>",))
    added.eos_token = "<|done|>"
    student = saved(tmp_path / "chat", build_model(len(added)), added)
    (problem,) = found(recipe, student=str(student)).problems
    assert "answers end at '<|done|>', token 320, which is none of the 320 token ids" in problem
    added.eos_token = "<|im_end|>"  # the generation config alone tells of it
    added.save_pretrained(student)
    (student / "generation_config.json").write_text('{"eos_token_id": [2, 320]}')
    assert "answers end at '<|done|>', token 320" in found(recipe, student=str(student)).problems[0]
    (student / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    checked = found(recipe, student=str(student))
    assert not checked.problems
    assert "ends answers at token 99999, and the model has 321 rows" in "\n".join(checked.warnings)


def test_a_token_without_a_row_is_told_in_every_verb(recipe: dict[str, Any], tmp_path: Path, mixed: str) -> None:
    added = build_tokenizer(("<|turn|>",))
    added.chat_template = MARKS
    model = str(saved(tmp_path / "short", build_model(320), added))
    text = r"rows 0, 1, .*the text holds '<\|turn\|>', which is token 320, and the model has rows for 320 tokens"
    (problem,) = found(recipe, student=model, data=mixed).problems[-1:]
    assert "the model has rows for 320 tokens" in problem
    cpu = {"device": "cpu"}
    with pytest.raises(InputError, match=text):
        cache_teacher(model, tmp_path / "cache", data=mixed, **cpu)
    with pytest.raises(InputError, match=text):
        finetune(model, tmp_path / "tuned", data=mixed, steps=1, **cpu)
    with pytest.raises(InputError, match="the model has rows for 320 tokens"):
        quantize(model, tmp_path / "q", format="int4-g32-sym", method="gptq", data=mixed, samples=4, **cpu)
    with pytest.raises(InputError, match="the model has rows for 320 tokens"):
        diagnose(model, [str(recipe["student"])], tmp_path / "d", data=mixed, **cpu)
    with pytest.raises(InputError, match="the model has rows for 320 tokens"):
        evaluate(model, ["tooluse-short"], tmp_path / "e.json", limit=2, max_new_tokens=8, **cpu)


def test_a_pad_token_without_a_row_is_never_read(recipe: dict[str, Any], tmp_path: Path, mixed: str) -> None:
    padded = build_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    teacher = saved(tmp_path / "padded", build_model(320), padded)
    student = saved(tmp_path / "student", build_model(320, seed=1), padded)
    checked = found(recipe, student=str(student), teacher=str(teacher))
    assert any("pad token 320 has no row in its embedding of 320" in warning for warning in checked.warnings)
    assert recover(**{**recipe, "student": str(student), "teacher": str(teacher)}).model.is_dir()
    finetune(str(teacher), tmp_path / "tuned", data=mixed, steps=2, probe=False, device="cpu")


def test_a_prompt_of_no_tokens_is_told_by_its_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Regex, normalizers

    bare = build_tokenizer()
    bare.chat_template = None
    bare.backend_tokenizer.normalizer = normalizers.Replace(Regex("\u200b"), "")
    student = saved(tmp_path / "bare", build_model(320), bare)
    rows = [{"prompt": text if i % 5 else "\u200b" * i, "id": f"r{i}"} for i, text in enumerate(prompts(20), start=1)]
    (problem,) = found(recipe, student=str(student), data=write_rows(tmp_path / "d.jsonl", rows), held_out=6).problems
    assert "the tokenizer makes no tokens of the prompt" in problem
    assert all(name in problem for name in ("r5", "r10", "r15", "r20"))  # on both sides of the split


def test_nothing_goes_beyond_learned_positions(recipe: dict[str, Any], tmp_path: Path, mixed: str) -> None:
    model = str(gpt2(tmp_path / "gpt2"))
    student = tmp_path / "q"
    quantize(model, student, format="int4-g32-sym", probe=False, device="cpu")
    ours = {**recipe, "student": str(student), "teacher": model, "data": mixed}
    checked = found(ours)
    assert not checked.problems
    (warning,) = [w for w in checked.warnings if "positions" in w]
    assert (
        "over 40 (the model has 48 positions, 8 of them for the answer) tokens and are dropped, not cut (long)"
        in warning
    )
    assert recover(**ours).model.is_dir()
    (problem,) = found(ours, max_new_tokens=64, out=str(tmp_path / "other")).problems
    assert "an answer may have 64 tokens, and the model has 48 positions" in problem
    cpu = {"device": "cpu", "data": mixed}
    record = cache_teacher(model, tmp_path / "cache", max_new_tokens=8, held_out=4, **cpu)
    assert ["long"] in record["dropped"].values()
    tuned = finetune(model, tmp_path / "tuned", steps=9, probe=False, **cpu)
    assert tuned["data"]["dropped"] == 1
    diagnose(model, [str(student)], tmp_path / "d", max_new_tokens=8, **cpu)
    with pytest.raises(InputError, match="48 positions"):
        write_self_prompts(model, tmp_path / "self.jsonl", n=2, device="cpu")
    more = str(gpt2(tmp_path / "more", positions=96))
    quantize(more, tmp_path / "g", format="int4-g32-sym", method="gptq", samples=37, **cpu)


def test_a_demonstration_beyond_the_positions_is_not_measured(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = str(gpt2(tmp_path / "gpt2", positions=64))
    student = tmp_path / "q"
    quantize(model, student, format="int4-g32-sym", probe=False, device="cpu")
    rows = [{"prompt": f"T{i}", "demonstration": "Look." if i % 2 else "0123456789" * 3} for i in range(20)]
    keep = {
        "data": write_rows(tmp_path / "task.jsonl", rows),
        "teacher": "initial",
        "demonstrations": True,
        "held_out": 8,
    }
    streams = {"recover": {"data": recipe.pop("data"), "held_out": recipe.pop("held_out")}, "keep": keep}
    ours = {**recipe, "student": str(student), "teacher": model, "streams": streams, "eval_every": 2}
    finished = recover(**ours, demonstration_template="{prompt} {demonstration}")
    assert not any("dropped" in warning for warning in finished.summary["warnings"])  # no prompt was too long
    assert finished.model.is_dir()


@pytest.mark.parametrize(
    ("rope", "part"),
    [
        (
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "beyond 24 tokens, where the model's rope takes other",
        ),
        ({"rope_type": "default", "rope_theta": 1e4}, "beyond the 24 positions that the model's configuration names"),
    ],
)
def test_lengths_that_the_model_was_not_made_for_are_a_warning(
    recipe: dict[str, Any], tmp_path: Path, mixed: str, rope: dict[str, Any], part: str
) -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    model.config.max_position_embeddings, model.config.rope_parameters = 24, rope
    student = saved(tmp_path / "student", model, tokenizer)
    checked = found(recipe, student=str(student), data=mixed)
    assert not checked.problems
    assert any(part in warning and "long" in warning for warning in checked.warnings)


def test_a_date_that_only_some_rows_show_is_a_warning(
    recipe: dict[str, Any], tmp_path: Path, reference_dir: Path
) -> None:
    dated = build_tokenizer()
    dated.chat_template = "{% if tools %}{{ tools | tojson }}{{ strftime_now('%d %b') }}{% endif %}" + TEMPLATE
    student = Path(shutil.copytree(reference_dir, tmp_path / "dated"))
    saved(student, build_model(len(dated), seed=3), dated)
    rows: list[dict[str, Any]] = [{"prompt": f"What is {i}?"} for i in range(60)]
    for tools in ([], [{"type": "function", "function": {"name": "f"}}]):
        rows[-1]["tools"] = tools
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        warnings = found(recipe, student=str(student), data=str(data), max_prompt_tokens=200).warnings
        assert any("writes the date or time into the prompts" in w for w in warnings) == bool(tools)


def test_a_run_is_not_resumed_with_prompts_of_another_day(
    recipe: dict[str, Any], tmp_path: Path, reference_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = build_tokenizer()
    dated.chat_template = "{{ strftime_now('%H:%M:%S.%f') }}" + TEMPLATE
    student = Path(shutil.copytree(reference_dir, tmp_path / "dated"))
    model = build_model(len(dated), seed=3)
    saved(student, model, dated)
    ours = {**recipe, "student": str(student), "max_prompt_tokens": 200}
    assert any("writes the date or time into the prompts" in w for w in found(ours).warnings)
    finished = recover(**ours)
    with pytest.raises(InputError, match=r"the prompts are other tokens than when the run in .* began"):
        recover(resume=torn_copy(finished.out, tmp_path / "torn", step=2))
    plain = recover(**{**recipe, "out": str(tmp_path / "plain")})
    assert recover(resume=torn_copy(plain.out, tmp_path / "plain-torn", step=2)).model.is_dir()
