"""Prompts from files: every bad row is named; held-out prompts are chosen by their text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from remend.data.examples import (
    COMPLETION_KEYS,
    Example,
    completion_of,
    data_hash,
    demonstration_of,
    example_of,
    load_examples,
    load_pairs,
    prompt_id,
    prompt_key,
    split_held_out,
    without,
)
from remend.data.sources import read_lines
from remend.errors import FileError, InputError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def examples(count: int) -> list[Example]:
    return [example_of({"prompt": f"question {i}"}, "x:1") for i in range(count)]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_strings_messages_and_ids(tmp_path: Path) -> None:
    source = write(
        tmp_path / "d.jsonl", {"prompt": "Hi"}, {"prompt": CHAT, "id": 7}, {"prompt": "Hi", "id": None, "x": 1}
    )
    first, second, third = load_examples(source)
    assert first.prompt == "Hi"
    assert first.id == third.id == prompt_id("Hi")
    assert len(first.id) == 12
    assert (second.prompt, second.id) == (CHAT, "7")
    assert third.row["x"] == 1


def test_empty_lines_are_skipped_and_numbers_stay_true(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}')
    assert [where for where, _ in read_lines(path)] == [f"{path}:1", f"{path}:4"]
    assert [e.prompt for e in load_examples(str(path))] == ["a", "b"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c"])
def test_line_separators_inside_a_string_do_not_end_the_row(tmp_path: Path, character: str) -> None:
    path = tmp_path / "d.jsonl"
    prompt = f"one{character}two"
    row = json.dumps({"prompt": prompt}, ensure_ascii=False)
    path.write_text(row + "\n" + row + "\n", encoding="utf-8", newline="\n")
    assert [e.prompt for e in load_examples(str(path))] == [prompt, prompt]


BAD_ROWS: list[tuple[Any, str]] = [
    ([1], 'a row must be an object like {"prompt": "…"}, got list'),
    ("text", "a row must be an object"),
    (None, "got NoneType"),
    ({"question": "a", "label": 1}, 'the row has no "prompt" (it has: question, label)'),
    ({"text": "alone"}, "text must hold at least two words"),
    ({"messages": "a"}, "messages must be a list of messages, got str"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages holds the assistant's alone"),
    ({"conversations": ["a"]}, "conversations must be a list of turns"),
    (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        'turn 1 of conversations is from "narrator"; known: human',
    ),
    ({"conversations": [{"from": "human", "value": None}]}, "message 1 (user) has no text in its content"),
    ({"instruction": 1}, "instruction and input must be texts"),
    ({"instruction": "a", "history": ["b"]}, "history must be a list of [question, answer]"),
    ({}, 'the row has no "prompt" (it has: nothing)'),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": 5}, "prompt must be a string or a list of messages, got int"),
    ({"prompt": None}, "got NoneType"),
    ({"prompt": {"role": "user", "content": "a"}}, "got dict"),
    ({"prompt": []}, "the prompt is an empty list of messages"),
    ({"prompt": ["a"]}, 'message 1 must be an object with "role" and "content"'),
    ({"prompt": [{"content": "a"}]}, 'message 1 must be an object with "role" and "content"'),
    ({"prompt": [{"role": 1, "content": "a"}]}, 'message 1 must be an object with "role" and "content"'),
    ({"prompt": [*CHAT, {"role": "user"}]}, "message 3 (user) has no text in its content"),
    ({"prompt": [{"role": "user", "content": " "}]}, "message 1 (user) has no text in its content"),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 (user) has no text in its content"),
    ({"prompt": [*CHAT, {"role": "assistant", "content": "a"}]}, "the last message is the assistant's"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "has a part of type image; supported are texts and",
    ),
    ({"prompt": [*CHAT, {"role": "assistant", "content": None}, *CHAT]}, "message 3 (assistant) has no text in its"),
    ({"prompt": [*CHAT, {"role": "assistant", "tool_calls": ["f"]}, *CHAT]}, "has tool_calls that are no list of"),
    ({"prompt": "a", "tools": ["f"]}, "tools must be a list of objects"),
    ({"prompt": "a", "tools": "hammer"}, "tools is a text that is no JSON; rename the column"),
    ({"prompt": "a", "tools": "[" * 100_000}, "tools is a text that is no JSON"),
    ({"prompt": "a", "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, got list"),
    ({"prompt": "a", "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs can't set tokenize"),
    ({"prompt": "a", "tools": [{"name": "\ud83d"}]}, "half of a surrogate pair"),
    ({"prompt": "a", "id": "\ud83d"}, "the id holds half of a surrogate pair"),
    ({"prompt": "half an emoji \ud83d"}, "prompt"),  # json accepts it, UTF-8 has no form for it
    ({"prompt": [{"role": "user", "content": "\udc00"}]}, "prompt"),
]


@pytest.mark.parametrize(("row", "part"), BAD_ROWS)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: Any, part: str) -> None:
    source = write(tmp_path / "d.jsonl", {"prompt": "good"}, row)
    with pytest.raises(InputError) as raised:
        load_examples(source)
    assert str(raised.value).startswith(f"{source}:2: ")
    assert part in str(raised.value)


def test_files_that_are_no_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"d\.jsonl:2: not valid JSON: Expecting value \(column 12\)"):
        load_examples(str(path))
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"data .*d\.jsonl is empty"):
        load_examples(str(path))
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"d\.jsonl is not UTF-8 text: invalid start byte at byte 12"):
        load_examples(str(path))
    with pytest.raises(FileError, match=r"missing\.jsonl can't be read: No such file"):
        load_examples(str(tmp_path / "missing.jsonl"))
    with pytest.raises(FileError, match=r":0 can't be read: UnicodeDecodeError"):
        load_examples(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(FileError, match="is a folder without data files"):
        load_examples(str(tmp_path / "none"))


def test_a_folder_that_holds_a_whole_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remend.data.sources.MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(FileError, match="is a folder with over 3 files; name the data's own"):
        load_examples(str(tmp_path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("value", "part"), [("1" * 5000, "a whole number of too many digits"), ("[" * 200_000, "nested too deeply")]
)
def test_json_that_python_cannot_read_is_one_message(tmp_path: Path, suffix: str, value: str, part: str) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_text(f'{{"prompt": "a", "n": {value}}}\n', encoding="utf-8")
    with pytest.raises(InputError, match=rf"d{suffix}(:1)?: the row holds .*{part}"):
        load_examples(str(path))


def test_tools_tell_prompts_apart() -> None:
    rows = [
        {"prompt": "a", **more}
        for more in ({}, {"tools": []}, {"tools": [{"name": "f"}]}, {"tools": '[{"name": "f"}]'})
    ]
    none, empty, one, text = (example_of(row, "x") for row in rows)
    assert none.id == empty.id == prompt_id("a")
    assert one.id == text.id != none.id
    assert len({data_hash([e]) for e in (none, empty, one, text)}) == 2


def test_hub_ids_with_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, part: str | None, revision: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, part, revision, split))
        return [{"prompt": "a"}, {"prompt": ""}] if name == "org/bad" else [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("org/name", "org/name@v1.0", "org/name@abc:test", "org/name/part:validation"):
        assert [e.prompt for e in load_examples(source)] == ["a"]
    assert calls == [
        ("org/name", None, None, "train"),
        ("org/name", None, "v1.0", "train"),
        ("org/name", None, "abc", "test"),
        ("org/name", "part", None, "validation"),
    ]
    with pytest.raises(InputError, match="org/bad:1: the prompt is empty"):
        load_examples("org/bad")


def test_hub_failures_become_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise KeyError("no such\nthing")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileError) as raised:
        load_examples("org/name")
    assert 'data "org/name": no such file' in str(raised.value)
    assert "KeyError" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_are_equal_for_equal_prompts_only() -> None:
    turned = [dict(reversed(list(message.items()))) for message in CHAT]
    assert prompt_key(CHAT) == prompt_key(turned)
    assert prompt_key(CHAT) != prompt_key(CHAT[::-1])
    assert prompt_key("Hello") != prompt_key([{"role": "user", "content": "Hello"}])
    assert prompt_key("é") != prompt_key("e")


def keys(found: list[Example]) -> list[str]:
    return [prompt_key(e.prompt) for e in found]


def test_split_is_a_partition_and_repeats_itself() -> None:
    everything = examples(50)
    train, held_out = split_held_out(everything, 7, seed=0)
    assert (train, held_out) == split_held_out(everything, 7, seed=0)
    assert len(held_out) == 7
    assert sorted(keys(train) + keys(held_out)) == sorted(keys(everything))
    assert train == [e for e in everything if e in train]  # the order of the file
    assert set(keys(split_held_out(everything, 7, seed=1)[1])) != set(keys(held_out))


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (19, 1), (40, 4), (640, 64), (900, 64)])
def test_default_is_a_tenth_and_no_more_than_64(count: int, expected: int) -> None:
    train, held_out = split_held_out(examples(count), None, seed=0)
    assert (len(train), len(held_out)) == (count - expected, expected)


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    everything = examples(60)
    shuffled = random.Random(0).sample(everything, len(everything))
    assert keys(split_held_out(everything, 9, seed=3)[1]) == keys(split_held_out(shuffled, 9, seed=3)[1])


def test_adding_rows_moves_few_prompts() -> None:
    before = set(keys(split_held_out(examples(100), 10, seed=0)[1]))
    after = set(keys(split_held_out(examples(110), 10, seed=0)[1]))
    assert len(before & after) >= 7


def test_equal_prompts_fall_on_the_same_side() -> None:
    once = examples(30)
    again = [Example(f"copy-{e.id}", e.prompt, e.row) for e in once]
    train, held_out = split_held_out([*once, *again], 8, seed=0)
    assert len(held_out) == 8
    assert len(set(keys(held_out))) == 8
    assert not set(keys(train)) & set(keys(held_out))
    assert len(train) == 2 * 22
    assert set(keys(held_out)) == set(keys(split_held_out(once, 8, seed=0)[1]))


@pytest.mark.parametrize("held_out", [5, 6])
def test_something_must_be_left_to_train_on(held_out: int) -> None:
    with pytest.raises(
        InputError, match=rf"held_out is {held_out}, and the data have 5 distinct prompts \(rows: 10\):"
    ):
        split_held_out([*examples(5), *examples(5)], held_out, seed=0)
    assert len(split_held_out(examples(5), 4, seed=0)[0]) == 1


def test_one_prompt_alone_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"held_out is 1, and the data have 1 distinct prompt \(rows: 1\):"):
        split_held_out(examples(1), None, seed=0)


def test_without_compares_prompts_not_ids() -> None:
    everything = examples(6)
    others = [Example("another id", everything[2].prompt, {}), Example(everything[3].id, "another prompt", {})]
    assert without(everything, others) == [*everything[:2], *everything[3:]]
    assert without(everything, []) == everything


def test_data_hash_sees_ids_prompts_and_order() -> None:
    a, b = examples(2)
    assert data_hash([a, b]) == data_hash(iter([a, b]))
    assert len({data_hash(x) for x in ([a, b], [b, a], [a], [Example("other", a.prompt, a.row), b])}) == 4


@pytest.mark.parametrize("key", COMPLETION_KEYS)
def test_completions_under_every_key(tmp_path: Path, key: str) -> None:
    ((example, text),) = load_pairs(write(tmp_path / "d.jsonl", {"prompt": "Hi", key: " Hello\n"}))
    assert (example.prompt, text) == ("Hi", " Hello\n")


def test_completions_as_messages(tmp_path: Path) -> None:
    turn = [{"role": "assistant", "content": "Hello."}]
    whole, parts = load_pairs(
        write(tmp_path / "d.jsonl", {"messages": [*CHAT, *turn]}, {"prompt": CHAT, "completion": turn})
    )
    assert whole[0].prompt == parts[0].prompt == CHAT
    assert whole[1] == parts[1] == "Hello."
    assert whole[0].id == prompt_id(CHAT)
    assert load_examples(write(tmp_path / "e.jsonl", {"messages": [*CHAT, *turn]}))[0].prompt == CHAT


def test_a_demonstration_goes_before_a_bare_answer_and_null_is_no_completion() -> None:
    assert completion_of({"answer": "B", "demonstration": "Since …, B", "completion": None}, "x") == "Since …, B"


def test_an_answer_may_hold_thoughts_tool_calls_and_parts_and_a_text_is_a_text(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "assistant", "content": "a", "reasoning_content": "b"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "a", "tool_calls": [], "reasoning_content": None},
    ]
    source = write(tmp_path / "d.jsonl", *({"messages": [*CHAT, turn]} for turn in turns))
    thought, called, parts, plain = (answer for _, answer in load_pairs(source))
    assert (thought, parts, plain) == (turns[0], turns[2], "a")
    assert called == {"role": "assistant", "tool_calls": [call]}
    assert completion_of({"completion": [turns[2]]}, "x") == "a"
    for turn, what in ((turns[0], "reasoning_content"), (turns[1], "tool_calls")):
        with pytest.raises(InputError, match=f"^x: the demonstration has {what}, and it is read as a text here"):
            demonstration_of({"prompt": "a", "demonstration": [turn]}, "x")


BAD_COMPLETIONS: list[tuple[Any, str]] = [
    (
        {"prompt": "a", "golden_answer": []},
        "has no completion .it has: prompt, golden_answer.; allowed keys: completion,",
    ),
    ({"prompt": "a", "completion": " "}, "the completion is empty"),
    ({"prompt": "a", "response": 5}, "response must be a text or one assistant message in a list, got int"),
    ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "completion must be a text .* got list"),
    ({"prompt": "a", "completion": []}, "got list"),
    ({"prompt": "a", "answer": "\ud800"}, "half of a surrogate pair"),
    ({"messages": CHAT}, "the row has no completion"),
    ({"messages": CHAT[:1] + CHAT[:1] + [{"role": "assistant", "content": ""}]}, "the messages is empty"),
]


@pytest.mark.parametrize(("row", "part"), BAD_COMPLETIONS)
def test_rows_without_a_usable_completion_are_named(tmp_path: Path, row: Any, part: str) -> None:
    source = write(tmp_path / "d.jsonl", {"prompt": "a", "answer": "b"}, row)
    with pytest.raises(InputError, match=rf"d\.jsonl:2: .*{part}"):
        load_pairs(source)
