"""A chat template is a stranger's code: one without end, or with too much of it, is refused."""

from __future__ import annotations

import time

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.tiny import TEMPLATE, build_tokenizer
from remend.data import bounded_templates
from remend.data.bounded_templates import bounded
from remend.data.templates import render
from remend.errors import InputError

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{% set x = 10 ** (10 ** 8) %}"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    monkeypatch.setattr(bounded_templates, "_tried", set())


def tokenizer_with(opening: str) -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    made.chat_template = opening + TEMPLATE
    return made


@pytest.mark.parametrize("opening", [LOOPS, POWER])
def test_one_without_end_is_refused(opening: str) -> None:
    began = time.monotonic()
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(InputError, match="can't be used: what it writes does not come to an end within 1 seconds"):
            render(tokenizer_with(opening), "Hi")
    assert time.monotonic() - began < 30


def test_one_that_writes_too_much_is_refused() -> None:
    with pytest.raises(InputError, match="is too much for the memory"):
        render(tokenizer_with("{{ 'x' * 3000000000 }}"), "Hi")
    with pytest.raises(InputError, match="is too much for the memory"):
        render(tokenizer_with("{% for i in range(200) %}{{ 'x' * 100000 }}{% endfor %}"), "Hi")


def test_others_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = render(tokenizer_with(""), "Hi")
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    monkeypatch.setattr("os.fork", lambda: pytest.fail("tried again"))
    assert render(tokenizer_with(""), "Hi") == text


def test_what_a_template_raises_is_no_matter_of_the_trial() -> None:
    def raises() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        bounded("any", raises)
    with pytest.raises(InputError, match="refuses the messages: no"):
        render(tokenizer_with("{{ raise_exception('no') }}"), "Hi")


def test_one_that_loops_for_later_messages_alone_is_refused() -> None:
    tokenizer = tokenizer_with("{% if messages[0].content == 'slow' %}" + LOOPS + "{% endif %}")
    assert "Hi" in render(tokenizer, "Hi")
    began = time.monotonic()
    with pytest.raises(InputError, match="does not come to an end within 1 seconds"):
        render(tokenizer, "slow")
    assert time.monotonic() - began < 15


def test_one_that_writes_too_much_of_later_messages_is_refused() -> None:
    long = "{% if messages[0].content == 'long' %}{{ 'x' * 20000000 }}{% endif %}"
    tokenizer = tokenizer_with(long)
    assert "Hi" in render(tokenizer, "Hi")
    with pytest.raises(InputError, match="is too much for the memory"):
        render(tokenizer, "long")
