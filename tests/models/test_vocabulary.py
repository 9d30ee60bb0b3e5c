"""Vocabularies compared token by token."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import build_tokenizer
from remend.models.vocabulary import compare_vocabularies, cutting_warnings, template_warnings


def vocabulary(count: int, **changes: int) -> dict[str, int]:
    return {**{f"t{i}": i for i in range(count)}, **changes}


@pytest.mark.parametrize("rows", [100, 128])
def test_equal_vocabularies_and_equal_padding_match_in_silence(rows: int) -> None:
    match = compare_vocabularies(vocabulary(100), vocabulary(100), rows, rows)
    assert (match.shared, match.problems, match.warnings) == (rows, [], [])


def test_padded_sizes_meet_at_the_smaller() -> None:
    """The case of 151,936 against 152,064 rows over 151,665 tokens."""
    for student, teacher in ((152064, 151936), (151936, 152064)):
        match = compare_vocabularies(vocabulary(151665), vocabulary(151665), student, teacher)
        assert match.shared == 151936
        assert match.problems == []
        assert len(match.warnings) == 1
        assert f"the first 151936 ids (student has {student} rows, teacher {teacher})" in match.warnings[0]


def test_a_different_meaning_is_a_problem_that_names_the_first() -> None:
    student, teacher = vocabulary(100), vocabulary(100)
    teacher["t40"], teacher["t41"] = 41, 40
    match = compare_vocabularies(student, teacher, 100, 100)
    assert match.shared == 0
    (problem,) = match.problems
    assert "2 of 100 shared token ids have different meanings" in problem
    assert "id 40 is 't40' for the student, 't41' for the teacher" in problem
    match = compare_vocabularies(vocabulary(100), {f"u{i}": i for i in range(100)}, 100, 100)
    assert "100 of 100 shared token ids" in match.problems[0]


def test_a_difference_above_the_shared_rows_does_not_matter() -> None:
    student = {**vocabulary(100), "<a>": 100}
    teacher = {**vocabulary(100), "<b>": 100}
    assert compare_vocabularies(student, teacher, 101, 101).problems
    match = compare_vocabularies(student, teacher, 100, 101)
    assert (match.shared, match.problems) == (100, [])


def test_a_token_that_one_side_added_is_left_out() -> None:
    added = {**vocabulary(100), "<tool>": 100}
    for student, teacher in ((added, vocabulary(100)), (vocabulary(100), added)):
        match = compare_vocabularies(student, teacher, 128, 128)
        assert (match.shared, match.problems) == (100, [])
        assert "aligned on the first 100 ids" in match.warnings[0]
        assert "neither sampled nor scored" in match.warnings[0]
    grown = compare_vocabularies(added, vocabulary(100), 101, 100)
    assert (grown.shared, grown.problems, len(grown.warnings)) == (100, [], 1)


def test_too_little_in_common_is_a_problem() -> None:
    teacher = vocabulary(100)
    del teacher["t10"]
    match = compare_vocabularies(vocabulary(100), teacher, 100, 100)
    assert match.shared == 10
    assert "share only the first 10 token ids" in match.problems[0]
    assert compare_vocabularies(vocabulary(20), vocabulary(100), 20, 100).problems


def test_real_tokenizers_with_an_added_token() -> None:
    plain, added = build_tokenizer(), build_tokenizer(extra=("<tool>",))
    size = len(plain)
    match = compare_vocabularies(plain.get_vocab(), added.get_vocab(), size, size + 1)
    assert (match.shared, match.problems, len(match.warnings)) == (size, [], 1)


def tokenizer_with(eos: str | None, template: str | None) -> SimpleNamespace:
    return SimpleNamespace(eos_token=eos, chat_template=template)


def test_template_warnings() -> None:
    same = tokenizer_with("<end>", "{{ a }}")
    assert template_warnings(same, tokenizer_with("<end>", "{{ a }}\n")) == []
    assert template_warnings(tokenizer_with("<end>", None), tokenizer_with("<end>", "")) == []
    (eos,) = template_warnings(same, tokenizer_with("</s>", "{{ a }}"))
    assert "'<end>' for the student, '</s>' for the teacher; the student's is used" in eos
    (template,) = template_warnings(same, tokenizer_with("<end>", None))
    assert "the chat template differs" in template
    assert len(template_warnings(same, tokenizer_with(None, None))) == 2


def test_tokenizers_of_one_vocabulary_that_cut_otherwise_are_noticed(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    assert cutting_warnings(tokenizer, other) == []
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (warning,) = cutting_warnings(tokenizer, PreTrainedTokenizerFast(tokenizer_object=core))
    assert "the student's tokens are used" in warning
