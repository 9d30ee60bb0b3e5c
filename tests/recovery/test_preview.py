"""What check shows of a run's prompts, as the model will read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.tiny import build_tokenizer, prompts
from remend.recovery.job import settings
from remend.recovery.plan import Plan
from remend.recovery.preflight import preflight
from remend.recovery.preview import LONGEST, cut, previews
from remend.training.write_cache import cache_teacher


def plan_of(recipe: dict[str, Any], **changes: Any) -> Plan:
    checked = preflight(settings(overrides={**recipe, **changes}))
    assert checked.plan is not None, checked.problems
    return checked.plan


def text_of(pieces: Any) -> str:
    return "".join(piece.text for piece in pieces)


def test_three_prompts_with_special_tokens(recipe: dict[str, Any]) -> None:
    plan = plan_of(recipe)
    (stream,) = previews(plan)
    assert (stream.name, stream.prompts, len(stream.shown)) == ("recover", 34, 3)
    first = stream.shown[0]
    assert text_of(first.pieces).startswith("<|im_start|>user\nTell me about")
    assert text_of(first.pieces).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert first.tokens == len(plan.prompts.main.train[0].tokens)
    assert first.answer == "the student's answer follows, up to 8 tokens; all of it is trained on"
    assert not any(piece.trained for piece in first.pieces)


def test_who_answers_and_what_is_trained_on(recipe: dict[str, Any]) -> None:
    def answer(**changes: Any) -> str:
        return previews(plan_of(recipe, **changes))[0].shown[0].answer

    assert answer(skip_first_tokens=2).endswith("it is trained on but for its first 2 tokens")
    assert "up to 4 tokens at first and 8 at the end" in answer(max_new_tokens=[4, 8])
    assert answer(streams={"a": {"policy": "off"}}).startswith("the teacher's answer follows")
    assert "(30% of the time, else the teacher's)" in answer(streams={"a": {"policy": 0.3}})
    assert "in the first steps the teacher's" in answer(bootstrap="on")


def test_streams_share_the_three(recipe: dict[str, Any]) -> None:
    streams = {"main": {}, "keep": {"teacher": "initial", "weight": 0}}
    plan = plan_of(recipe, streams=streams)
    main, keep = previews(plan)
    assert (len(main.shown), len(keep.shown)) == (1, 1)
    assert keep.shown[0].answer.endswith("none of it is trained on (weight 0)")


def test_a_demonstration_is_the_teachers_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": text, "demonstration": f"worked {i}"} for i, text in enumerate(prompts())]
    data = tmp_path / "shown.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = previews(plan_of(recipe, data=str(data), streams={"a": {"demonstrations": True}}))[0].shown[0]
    assert "worked" in text_of(shown.teacher)
    assert "worked" not in text_of(shown.pieces)
    assert shown.answer.endswith("it is trained on but for its first 3 tokens")


def test_stored_answers_are_marked(recipe: dict[str, Any], tmp_path: Path, reference_dir: Path) -> None:
    cache = tmp_path / "cache"
    cache_teacher(str(reference_dir), cache, data=recipe["data"], max_new_tokens=8, held_out=6)
    kept = {k: v for k, v in recipe.items() if k not in ("data", "held_out", "max_new_tokens")}
    plan = plan_of(kept, teacher=str(cache), streams={"a": {"policy": "off", "skip_first_tokens": 1}})
    brought = plan.teachers[str(cache)].brings()
    assert brought is not None
    rollout, shown = brought[0][0], previews(plan)[0].shown[0]
    trained = text_of(piece for piece in shown.pieces if piece.trained)
    assert trained == plan.tokenizer.decode(list(rollout.completion[1:]))
    assert shown.answer == ""


def test_prompts_that_are_not_written_yet(recipe: dict[str, Any]) -> None:
    (stream,) = previews(plan_of(recipe, data="self", self_prompts=32))
    assert stream.prompts is None
    assert "(a prompt that the reference writes)" in text_of(stream.shown[0].pieces)


def test_long_texts_are_cut_in_the_middle() -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer("a b c d e f g h i j " * 40)["input_ids"]
    first, gap, last = cut(tokenizer, tokens)
    assert gap.left_out == len(tokens) - LONGEST
    assert text_of([first]) == tokenizer.decode(tokens[: LONGEST // 2])
    assert text_of([last]) == tokenizer.decode(tokens[-LONGEST // 2 :])


def test_nothing_steers_the_terminal() -> None:
    tokenizer = build_tokenizer()
    (piece,) = cut(tokenizer, tokenizer("red \x1b[31m here")["input_ids"])
    assert "\x1b" not in piece.text
    assert "red" in piece.text
