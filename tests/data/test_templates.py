"""Prompts to token ids: templates, special tokens, limits."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers.tiny import TEMPLATE, build_tokenizer
from remend.data.examples import Example, Prompt
from remend.data.templates import DEMONSTRATION, display, encode, encode_within, render, with_demonstration
from remend.errors import InputError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def example(prompt: Prompt, name: str = "a") -> Example:
    return Example(name, prompt, {})


def plain_tokenizer(frame: str) -> PreTrainedTokenizerFast:
    """Without a chat template; `frame` is what it puts around plain text, such as 'start $A'."""
    made = build_tokenizer()
    made.chat_template = None
    parts = frame.replace("start", "<|im_start|>").replace("end", "<|im_end|>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=parts, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return made


def test_a_string_is_one_user_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render(tokenizer, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, "Hi") == render(tokenizer, [{"role": "user", "content": "Hi"}])


def test_messages_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, CHAT) == expected


def test_without_a_template_a_string_stays_and_messages_are_refused() -> None:
    bare = plain_tokenizer("$A")
    assert render(bare, "Hi") == "Hi"
    with pytest.raises(InputError, match="the tokenizer has no chat template; give a string instead"):
        render(bare, CHAT)


def test_a_template_that_refuses_gives_one_line() -> None:
    picky = build_tokenizer()
    picky.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(InputError, match=r"^the chat template refuses the messages: no system$"):
        render(picky, CHAT)
    assert render(picky, "Hi").endswith("assistant\n")


def test_tokens_end_where_the_answer_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(tokenizer, example(CHAT, "x"))
    assert encoded.id == "x"
    assert tokenizer.decode(encoded.tokens) == encoded.text == render(tokenizer, CHAT)
    assert encoded.tokens.count(1) == 3


def test_a_template_gets_no_second_special_tokens() -> None:
    made = plain_tokenizer("start $A end")
    made.chat_template = TEMPLATE
    encoded = encode(made, example("Hi"))
    assert encoded.tokens[:2] != (1, 1)
    assert encoded.tokens[-1] != 2
    assert encoded.tokens.count(1) == 2


@pytest.mark.parametrize("frame", ["$A", "start $A", "$A end", "start $A end"])
def test_plain_text_gets_the_tokenizers_own_tokens_but_stays_open(frame: str) -> None:
    made = plain_tokenizer(frame)
    tokens = encode(made, example("Hi there")).tokens
    inner = tuple(made("Hi there", add_special_tokens=False)["input_ids"])
    assert tokens == ((1, *inner) if "start" in frame else inner)


def test_long_prompts_are_left_out_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [example("word " * n, str(n)) for n in (1, 30, 3, 60)]
    whole = {row.id: encode(tokenizer, row) for row in rows}
    limit = len(whole["3"].tokens)
    kept, dropped = encode_within(tokenizer, rows, limit)
    assert kept == [whole["1"], whole["3"]]  # a prompt of just the limit stays
    assert dropped == ["30", "60"]
    assert encode_within(tokenizer, rows, limit - 1)[1] == ["30", "3", "60"]


BRACES = ['{"a": {prompt}}', "{demonstration}", "{0} {} {missing}", "plain"]


@pytest.mark.parametrize("prompt", BRACES)
@pytest.mark.parametrize("answer", BRACES)
def test_braces_in_prompt_and_demonstration_are_text(prompt: str, answer: str) -> None:
    before, between, after = DEMONSTRATION.replace("{demonstration}", "{prompt}").split("{prompt}")
    assert with_demonstration(prompt, answer) == before + prompt + between + answer + after
    assert with_demonstration(prompt, answer, "{demonstration}|{prompt}") == f"{answer}|{prompt}"


def test_a_demonstration_goes_into_the_last_user_message() -> None:
    chat = [*CHAT, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    shown = with_demonstration(chat, "worked", "{prompt} / {demonstration}")
    assert shown == [*chat[:-1], {"role": "user", "content": "b / worked"}]
    assert chat[-1]["content"] == "b"


def test_a_demonstration_needs_a_user_to_end_with() -> None:
    with pytest.raises(InputError, match="a demonstration goes into the user's message, and the prompt ends with the"):
        with_demonstration([*CHAT, {"role": "tool", "content": "c"}], "worked")


def test_display_shows_the_last_user_message() -> None:
    assert display("Hi") == "Hi"
    assert display([*CHAT, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]) == "b"
    assert display([*CHAT, {"role": "tool", "content": "c"}]) == "Hello"
    assert display([{"role": "system", "content": "s"}]) == "s"
