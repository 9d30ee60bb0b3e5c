"""What is trained on is what the chat template writes: the tokens of the whole conversation, parted at the prompt."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import TEMPLATE, build_tokenizer
from remend.data.answers import with_answer
from remend.data.examples import Answer, answer_of, example_of
from remend.data.templates import encode
from remend.errors import InputError

EOS = 2
ANSWER = "m['content']"
THOUGHTFUL = (  # as Qwen3's: an empty block where there is no thought, and none in what went before
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ m['reasoning_content'] or '' }}\n</think>\n\n"
    "{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALLING = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "plain": TEMPLATE,
    "trims": TEMPLATE.replace(ANSWER, f"{ANSWER} | trim"),
    "capitals": TEMPLATE.replace(ANSWER, f"{ANSWER} | upper"),
    "thoughts": THOUGHTFUL,
    "calls": CALLING,
    "blank before the answer": TEMPLATE.replace("assistant\n{% endif %}", "assistant{% endif %}"),
    "wants a system turn": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE,
}
OPENED = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about tea."}]


def chatty(template: str) -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    made.chat_template = template
    return made


def pair(made: Any, answer: Answer, eos: Any = (EOS,), **row: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return with_answer(made, example_of({"prompt": CHAT, **row}, "row"), answer, eos)


def whole(made: Any, turn: dict[str, Any], **context: Any) -> list[int]:
    """By transformers alone, up to the last token that ends an answer."""
    ids = list(made.apply_chat_template([*CHAT, turn], return_dict=False, **context))
    return ids[: len(ids) - ids[::-1].index(EOS)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text", ["Yes, it is.", "  two blanks", "\n\nlines", "1234", "a <|im_end|> in the middle", "e "]
)
def test_the_tokens_are_those_of_the_whole_conversation(name: str, text: str) -> None:
    made = chatty(TEMPLATES[name])
    prompt, completion = pair(made, text)
    assert [*prompt, *completion] == whole(made, {"role": "assistant", "content": text})
    shown = encode(made, example_of({"prompt": CHAT}, "row")).tokens
    assert prompt == shown[: len(prompt)]
    assert len(shown) - len(prompt) <= 1  # what is missing went into the completion's first token
    assert completion[-1] == EOS


def test_for_plain_chatml_prompt_and_completion_are_what_each_gives_alone() -> None:
    made = build_tokenizer()
    for text in ("Yes.", " Yes.", "It is warm\n\nindeed ", "<think>\nhm\n</think>\n\nYes."):
        prompt, completion = pair(made, text)
        assert prompt == encode(made, example_of({"prompt": CHAT}, "row")).tokens
        assert completion == (*made.encode(text, add_special_tokens=False), EOS)


def test_thoughts_tool_calls_and_parts_are_trained_on_as_the_template_shows_them() -> None:
    thought = {"role": "assistant", "content": "Warm.", "reasoning_content": "leaves, water"}
    call = {"role": "assistant", "content": None, "tool_calls": [WEATHER]}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Warm."}]}
    for template, turn in ((THOUGHTFUL, thought), (CALLING, call)):
        made = chatty(template)
        answer = answer_of({"messages": [*CHAT, turn]}, "row")
        assert [*sum(pair(made, answer), ())] == whole(made, turn)
    made = chatty(TEMPLATE)
    assert pair(made, answer_of({"prompt": "a", "completion": [parts]}, "row")) == pair(made, "Warm.")
    tools = [{"type": "function", "function": {"name": "weather"}}]
    made = chatty(CALLING)
    assert [*sum(pair(made, answer_of({"completion": [call]}, "row"), tools=tools), ())] == whole(
        made, call, tools=tools
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [WEATHER]},
        {"content": "", "tool_calls": [{"type": "function", "function": {**WEATHER["function"], "arguments": "{}"}}]},
        {"content": "Warm.", "name": "bob"},
        {"content": "Warm.", "final": False, "step": 0},
        {"content": "Warm.", "tool_calls": None},
    ],
)
def test_the_template_is_given_the_turn_as_the_row_gives_it(turn: dict[str, Any]) -> None:
    made = chatty(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | string if m.content is defined }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "{{ m.name }}{% if m.final is defined %}{{ m.final }}{{ m.step }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [*CHAT, {"role": "assistant", **turn}]
    row = {"messages": messages}
    prompt, completion = with_answer(made, example_of(row, "row"), answer_of(row, "row"), (EOS,))
    # older releases of transformers show a template the fields without a value; newer ones leave them out, as we do
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    written = made.apply_chat_template(said, tokenize=False)
    assert made.decode([*prompt, *completion]) + "\n" == written


def in_front(text: str) -> str:
    """A template that writes a text in front of every answer, and opens the answer with it."""
    begun = TEMPLATE.replace(ANSWER, f"('{text}' if m['role'] == 'assistant' else '') + {ANSWER}")
    return begun.replace("assistant\n", f"assistant\n{text}")


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<seed:think>", "<seed:think>"),
        ("<|START_THINKING|>", "<|START_THINKING|>"),
        ("<reasoning>\n", "<reasoning>"),
        ("<thought></thought>", "<thought>"),
    ],
)
def test_a_block_of_any_name_is_not_written_twice(text: str, tag: str) -> None:
    made = chatty(in_front(text))
    with pytest.raises(InputError, match=re.escape(f"the chat template writes {tag} beside the answer's own")):
        pair(made, f"{tag}hm</>Yes.")
    assert made.decode(pair(made, "hm</>Yes.")[1]) == "hm</>Yes.<|im_end|>"
    assert made.decode(pair(made, "<b>Yes.</b>")[1]) == "<b>Yes.</b><|im_end|>"


ARGUMENTS = {"city": 'Zürich "HB"\n8001', "days": [1, {"hot": True, "wind": None}], "part": 0.5}


@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS), '{"part": 5e-1}'])
@pytest.mark.parametrize("way", ["c.function.arguments | tojson", "c.function.arguments"])
def test_arguments_of_calls_are_known_in_any_form(given: Any, way: str) -> None:
    made = chatty(CALLING.replace("c['function'] | tojson", "c.function.name }} {{ " + way))
    call = {"type": "function", "function": {"name": "weather", "arguments": given}}
    assert "weather" in made.decode(pair(made, {"role": "assistant", "content": None, "tool_calls": [call]})[1])


def test_calls_without_their_arguments_or_by_the_content_alone_are_refused() -> None:
    for template, content in ((CALLING.replace("'] | tojson", "'].name"), ""), (TEMPLATE, 'weather of "Bern"')):
        with pytest.raises(InputError, match="does not show the answer's tool calls"):
            pair(chatty(template), {"role": "assistant", "content": content, "tool_calls": [WEATHER]})


def test_an_own_thought_in_the_block_that_the_prompt_opens_is_not_doubled() -> None:
    made = chatty(OPENED)
    _, completion = pair(made, "<think>\nhm\n</think>\n\nYes.")
    assert made.decode(completion) == "hm\n</think>\n\nYes.<|im_end|>"


def test_chat_template_kwargs_reach_the_answer_too() -> None:
    made = chatty(THOUGHTFUL)
    quiet = {"enable_thinking": False}
    prompt, completion = pair(made, "Yes.", chat_template_kwargs=quiet)
    assert made.decode(completion) == "Yes.<|im_end|>"
    assert [*prompt, *completion] == whole(made, {"role": "assistant", "content": "Yes."}, **quiet)


REFUSED = [
    (OPENED, "Yes.", ["assistant\\n<think>\\n'", "assistant\\nYes.<|im_end|>"]),
    (THOUGHTFUL, "<think>\nhm\n</think>\n\nYes.", ["does not show all of the answer's content", "</think>\\n\\nYes."]),
    (TEMPLATE, {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}, ["the answer's reasoning_content"]),
    (TEMPLATE, {"role": "assistant", "content": "Yes.", "thinking": "hm"}, ["the answer's thinking"]),
    (TEMPLATE, {"role": "assistant", "content": "Yes.", "tool_calls": [WEATHER]}, ["the answer's tool calls"]),
    (
        TEMPLATE.replace(ANSWER, "('<think></think>' if m['role'] == 'assistant' else '') + m['content']"),
        "<think>hm</think>Yes.",
        ["<think> beside the answer's own"],
    ),
    (
        TEMPLATE.replace(
            "{% for", "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('never') }}{% endif %}{% for"
        ),
        "Yes.",
        ["the chat template refuses the messages: never"],
    ),
    (
        OPENED.replace("<think>\n", "{% if enable_thinking | default(true) %}<think>\n{% endif %}"),
        "Yes.",
        ['Give the rows "chat_template_kwargs": {"enable_thinking": false}'],
    ),
]


@pytest.mark.parametrize(("template", "answer", "parts"), REFUSED)
def test_an_answer_that_the_template_shows_otherwise_is_refused_with_both_texts(
    template: str, answer: Answer, parts: list[str]
) -> None:
    with pytest.raises(InputError) as raised:
        pair(chatty(template), answer)
    for part in parts:
        assert part in str(raised.value)


def test_what_the_template_writes_after_the_end_is_not_trained_on() -> None:
    made = chatty(TEMPLATE + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}")
    for eos in ((EOS,), (0, EOS)):
        assert made.decode(pair(made, "Yes.", eos)[1]) == "Yes.<|im_end|>"
    assert (
        made.decode(pair(made, "Yes.", (7,))[1]) == "Yes.<|im_end|>"
    )  # sampling would not end there: its own is added


def with_prefix_space(template: str | None) -> PreTrainedTokenizerFast:
    """As SentencePiece does it: ▁ in front of whatever is tokenized."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"▁\nabcdefghijklmnopqrstuvwxyz.", "▁i", "▁it", "it", "▁Be"]
    core = Tokenizer(
        models.BPE({w: i for i, w in enumerate([*words, "I", "B", "T", "▁I"])}, [("▁", "I"), ("▁", "i"), ("i", "t")])
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = template
    return made


def test_no_blank_slips_in_at_the_border_of_prompt_and_answer() -> None:
    made = with_prefix_space("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    example = example_of({"prompt": "it is"}, "row")
    prompt, completion = with_answer(made, example, "It is.", (EOS,))
    assert made.convert_ids_to_tokens(completion)[:2] == ["I", "t"]
    bare = with_prefix_space(None)
    prompt, completion = with_answer(bare, example, "It is.", (EOS,))
    assert [*prompt, *completion] == [*bare("it is It is.")["input_ids"], EOS]
    assert prompt == tuple(bare("it is")["input_ids"])


def test_a_token_across_the_border_belongs_to_the_completion() -> None:
    made = build_tokenizer(("\n\n",))
    prompt, completion = pair(made, "\nYes.")
    assert made.decode(completion) == "\n\nYes.<|im_end|>"
    assert [*prompt, *completion] == whole(made, {"role": "assistant", "content": "\nYes."})


def test_without_a_template_thoughts_are_refused() -> None:
    made = build_tokenizer()
    made.chat_template = None
    with pytest.raises(InputError, match="has reasoning_content, and the tokenizer has no chat template"):
        with_answer(made, example_of({"prompt": "a"}, "row"), {"content": "b", "reasoning_content": "c"}, (EOS,))
