"""Prompts to token ids: templates, special tokens, limits."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers.tiny import TEMPLATE, build_tokenizer
from remend.data.examples import Example, Prompt, example_of
from remend.data.templates import (
    DEMONSTRATION,
    display,
    encode,
    encode_within,
    render,
    template_text,
    with_demonstration,
    writes_the_time,
)
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


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It tells the weather."}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function']['name'] }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if quiet %}<think></think>{% endif %}{% endif %}"
)
IN_PARTS = TEMPLATE.replace(
    "{{ m['content'] }}", "{% for p in m['content'] %}{% if p is mapping %}{{ p['text'] }}{% endif %}{% endfor %}"
)


def with_template(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    made.chat_template = template
    return made


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("variables", [{"quiet": True}, '{"quiet": true}', None])
def test_tools_and_variables_of_a_row_reach_the_template(tools: object, variables: object) -> None:
    made = with_template(WITH_TOOLS)
    encoded = encode(made, example_of({"prompt": CHAT, "tools": tools, "chat_template_kwargs": variables}, "x"))
    expected = made.apply_chat_template(
        CHAT, tools=TOOLS, quiet=bool(variables), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(encoded.tokens) == list(expected)
    assert "It tells the weather." in encoded.text


def test_tool_turns_are_rendered_as_transformers_does() -> None:
    made, chat = with_template(WITH_TOOLS), [*CHAT, CALL, {"role": "tool", "content": "5 degrees", "name": "weather"}]
    text = encode(made, example_of({"prompt": chat}, "x")).text
    assert text == made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<call>weather</call>" in text
    with pytest.raises(InputError, match=r"does not show the tool calls of message 3 \(assistant\)"):
        render(build_tokenizer(), chat)


def test_tools_that_nothing_shows_are_refused() -> None:
    for made, part in (
        (build_tokenizer(), "shows no tools"),
        (plain_tokenizer("$A"), "no chat template that could show"),
    ):
        with pytest.raises(InputError, match=part):
            encode(made, example_of({"prompt": "Hi", "tools": TOOLS}, "x"))


def test_of_named_templates_the_fitting_one_is_taken() -> None:
    made = with_template({"default": TEMPLATE, "tool_use": WITH_TOOLS, "rag": "RAG " + TEMPLATE})
    assert encode(made, example("Hi")).text == render(build_tokenizer(), "Hi")
    assert "weather" in encode(made, example_of({"prompt": "Hi", "tools": TOOLS}, "x")).text
    named = {"prompt": "Hi", "chat_template_kwargs": {"chat_template": "rag"}}
    assert encode(made, example_of(named, "x")).text.startswith("RAG ")
    for other in (made, build_tokenizer()):
        with pytest.raises(InputError, match='chat_template is "rags", and the tokenizer has no template of that name'):
            encode(other, example_of({"prompt": "Hi", "chat_template_kwargs": {"chat_template": "rags"}}, "x"))
    with pytest.raises(InputError, match=r"the chat template refuses the messages: .*no default"):
        encode(with_template({"tool_use": WITH_TOOLS}), example("Hi"))
    assert template_text(made) == template_text(with_template(dict(reversed(made.chat_template.items()))))


def test_text_parts_are_rendered_by_a_template_that_takes_them_and_else_as_their_text() -> None:
    two, one = [{"role": "user", "content": parts("a ", "b")}], [{"role": "user", "content": parts("a b")}]
    takes, texts_alone, printing = with_template(IN_PARTS), build_tokenizer(), with_template(WITH_TOOLS)
    assert render(takes, two) == takes.apply_chat_template(two, tokenize=False, add_generation_prompt=True)
    for made in (takes, texts_alone, printing):  # one would raise, the other write Python's brackets
        assert render(made, one) == render(texts_alone, "a b")
    with pytest.raises(InputError, match="takes a content that is one text; join the text parts"):
        render(texts_alone, two)


def test_a_question_that_the_template_does_not_show_is_refused() -> None:
    with pytest.raises(InputError, match=r"shows nothing of the last message \(user\)"):
        render(with_template(IN_PARTS), "Hi")  # it takes parts, and goes through a text letter by letter
    loud = with_template(TEMPLATE.replace("m['content']", "m['content'] | upper | trim"))
    assert "HI" in render(loud, " hi ")


def test_all_rows_that_cannot_be_read_are_named() -> None:
    made = plain_tokenizer("$A")
    made.backend_tokenizer.normalizer = normalizers.Replace(Regex("[\u200b\x01]"), "")
    made.add_tokens(["<new>"])
    rows = [
        example(text, name)
        for name, text in {"a": "one", "b": "\u200b", "c": "<new> x", "d": "\x01", "e": "y <new>"}.items()
    ]
    with pytest.raises(InputError) as raised:
        encode_within(made, rows, 100, rows=len(made) - 1)
    empty, beyond = str(raised.value).split("\n")
    assert empty.startswith("rows b, d: the tokenizer makes no tokens of the prompt")
    assert beyond.startswith(
        f"rows c, e: the text holds '<new>', which is token {len(made) - 1}, and the model has rows for"
    )
    kept, dropped = encode_within(made, [rows[0], rows[2]], 100, rows=len(made))
    assert (len(kept), dropped) == (2, [])


def test_a_template_that_asks_for_the_time_is_known() -> None:
    dated = "{% if date is defined %}{{ date }}{% else %}{{ strftime_now('%d %b') }}{% endif %}"
    assert writes_the_time(with_template(dated + TEMPLATE), example("Hi"))
    fixed = example_of({"prompt": "Hi", "chat_template_kwargs": {"date": "26 Jul"}}, "x")
    assert not writes_the_time(with_template(dated + TEMPLATE), fixed)
    assert not writes_the_time(build_tokenizer(), example("Hi"))
