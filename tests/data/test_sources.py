"""Rows from files of every kind that people have, in every shape; all broken rows at once."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pytest
from transformers import PreTrainedTokenizerFast

from remend.data import sources
from remend.data.answers import with_answer
from remend.data.examples import Example, completion_of, load_examples, load_pairs, shapes_text
from remend.data.sources import read_rows
from remend.data.templates import encode
from remend.errors import FileError, InputError

ROWS = [{"prompt": "007", "completion": "bond, james"}, {"prompt": "Zeile\nzwei – ja", "completion": '"quoted"'}]


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def jsonl(path: Path) -> Path:
    path.write_text(lines(ROWS), encoding="utf-8")
    return path


def excel(path: Path) -> Path:
    """JSON lines as PowerShell writes them."""
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace("\n", "\r\n").encode())
    return path


def table(path: Path, separator: str, encoding: str) -> Path:
    with path.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def zipped(path: Path, of: Path) -> Path:
    path.write_bytes(gzip.compress(of.read_bytes()))
    return path


def saved(path: Path, *, split: bool) -> Path:
    data = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"train": data, "test": data.select([1])}) if split else data).save_to_disk(str(path))
    return path


def splits(path: Path) -> Path:
    path.mkdir()
    (path / "train.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (path / "test.jsonl").write_text(lines(ROWS[1:]), encoding="utf-8")
    return path


def parquet(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    return path


def feather(path: Path) -> Path:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as stream:
        stream.write_table(table)
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "JSON lines": lambda d: jsonl(d / "a.jsonl"),
    "JSON lines, other name": lambda d: jsonl(d / "a.txt"),
    "JSON lines with a mark and CRLF": lambda d: excel(d / "a.jsonl"),
    "JSON lines, gzipped": lambda d: zipped(d / "a.jsonl.gz", jsonl(d / "a.jsonl")),
    "CSV": lambda d: table(d / "a.csv", ",", "utf-8"),
    "CSV of Excel, gzipped": lambda d: zipped(d / "a.csv.gz", table(d / "a.csv", ",", "utf-8-sig")),
    "TSV": lambda d: table(d / "a.tsv", "\t", "utf-8"),
    "parquet": lambda d: parquet(d / "a.parquet"),
    "data set on disk": lambda d: saved(d / "saved", split=False),
    "arrow file": lambda d: next(saved(d / "saved", split=False).glob("*.arrow")),
    "arrow file of another form": lambda d: feather(d / "a.arrow"),
    "data sets on disk": lambda d: saved(d / "saved", split=True),
    "folder of splits": lambda d: splits(d / "folder"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    source = FILES[kind](tmp_path)
    assert [row for _, row in read_rows(str(source))] == ROWS
    assert len({where for where, _ in read_rows(str(source))}) == 2
    assert [(e.prompt, completion_of(e.row, "x")) for e in load_examples(str(source))] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]


@pytest.mark.parametrize("make", [lambda p: saved(p, split=True), splits])
def test_a_split_of_a_folder_is_named_behind_a_colon(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "folder")
    assert [row for _, row in read_rows(f"{source}:test")] == ROWS[1:]
    with pytest.raises(InputError, match='has no split "dev"; it has: train, test'):
        read_rows(f"{source}:dev")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl.gz", b"\x1f\x8b\x08", "no whole gzip file"),
        ("a.parquet", b"PAR1\xff", "no parquet file that can be read"),
        ("a.arrow", b"ARROW1", "no arrow file that can be read"),
        ("a.zip", b"PK\x03\x04", "unpack it first. What is read: a file"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns of its header have one name"),
        ("a.csv", b"prompt,completion\na,b,c\nd\n", "a.csv:2: the row has 3 values and the header 2 columns"),
        ("a.csv", b'prompt\n"a', "not valid CSV: unexpected end of data"),
        ("a.csv", b"prompt\n", "is empty"),
        ("a.json", b"[]", "is empty"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((FileError, InputError), match=why.replace(".", r"\.")):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("folder", [False, True])
def test_an_arrow_file_that_leads_outside_itself_is_refused(tmp_path: Path, folder: bool) -> None:
    path = next(saved(tmp_path / "saved", split=False).glob("*.arrow"))
    content = bytearray(path.read_bytes())
    at = content.index(ROWS[0]["prompt"].encode()) - 64  # where each text begins stands before the texts
    content[at : at + 64] = b"\x7f" * 64
    path.write_bytes(content)
    with pytest.raises(FileError, match="no arrow file that can be read"):
        read_rows(str(path.parent if folder else path))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".arrow", ".parquet"])
def test_a_pipe_is_refused(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(FileError, match="is a pipe or socket; give a file"):
        read_rows(str(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_text_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 2**20)
    content = b" " * 2**21
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(InputError, match="holds over 1 MiB of text, which is more than is read at once"):
        read_rows(str(tmp_path / f"a{suffix}"))


def test_a_parquet_column_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pr\x97mpt"))
    with pytest.raises(FileError, match="no parquet file that can be read"):
        read_rows(str(path))


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAPED: list[tuple[Mapping[str, Any], str, Any, str | None]] = [
    ({"prompt": "Hi", "completion": "Hello"}, "prompt", "Hi", "Hello"),
    ({"messages": TURNS}, "messages", TURNS[:1], "Hello"),
    ({"messages": TURNS[:1]}, "messages", TURNS[:1], None),
    ({"messages": json.dumps(TURNS)}, "messages", TURNS[:1], "Hello"),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
        "ShareGPT",
        [{"role": "system", "content": "Be kind."}, TURNS[0]],
        "Hello",
    ),
    ({"conversations": TURNS}, "ShareGPT", TURNS[:1], "Hello"),
    ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "Alpaca", "Add.\n\n1 + 1", "2"),
    ({"instruction": "Hi", "input": "", "output": "Hello", "text": "### Hi"}, "Alpaca", "Hi", "Hello"),
    (
        {"instruction": "Why?", "output": "So.", "history": [["Hi", "Hello"]]},
        "Alpaca",
        [*TURNS, {"role": "user", "content": "Why?"}],
        "So.",
    ),
    ({"text": "one two three four"}, "plain text", "one two", " three four"),
    ({"text": "字" * 20}, "plain text", "字" * 10, "字" * 10),
]


@pytest.mark.parametrize(("row", "shape", "prompt", "answer"), SHAPED)
def test_rows_of_other_tools_are_recognised(
    tmp_path: Path, row: Mapping[str, Any], shape: str, prompt: Any, answer: str | None
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    (example,) = load_examples(str(path))
    assert (example.prompt, example.plain) == (prompt, shape == "plain text")
    assert shapes_text([example]) == f"1 row, {shape}"
    if answer is None:
        with pytest.raises(InputError, match="the row has no completion"):
            load_pairs(str(path))
    else:
        assert load_pairs(str(path)) == [(example, answer)]


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "gsm.csv"
    path.write_text("question,answer,note\n1 + 1?,2,x\n", encoding="utf-8")
    columns = {"prompt": "question", "completion": "answer"}
    (example,) = load_examples(str(path), columns=columns)
    assert example.row == {"prompt": "1 + 1?", "completion": "2", "note": "x"}
    with pytest.raises(InputError, match=r'gsm\.csv:2: columns names "q", and the row has: question, answer, note'):
        load_examples(str(path), columns={"prompt": "q"})
    with pytest.raises(InputError, match=r'columns can\'t give "promt". Did you mean "?prompt'):
        load_examples(str(path), columns={"promt": "question"})
    with pytest.raises(InputError, match=r"Known shapes: .*needs a mapping, as in columns: \{prompt: question"):
        load_examples(str(path))


def test_all_bad_rows_are_named_at_once_up_to_twenty(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * (i % 2)}) + "\n" for i in range(50)), encoding="utf-8")
    with pytest.raises(InputError) as raised:
        load_examples(str(path))
    odd = ", ".join(map(str, range(3, 40, 2)))
    assert str(raised.value) == f"{path}:1, {odd} and 5 more rows: the prompt is empty"
    path.write_text(
        "".join(json.dumps({"prompt": "", f"key{i}": i} if i % 2 else {f"key{i}": i}) + "\n" for i in range(50))
    )
    with pytest.raises(InputError) as raised:
        load_examples(str(path))
    said = str(raised.value).splitlines()  # each row of even number lacks something else
    assert len(said) == 21
    assert said[0].startswith(f'{path}:1: the row has no "prompt" (it has: key0)')
    assert said[1].startswith(f"{path}:2, 4, 6, ")
    assert said[-1] == "… and 6 more rows"
    path.write_text('{"prompt": "a"}\n{\n{"prompt": "b"}\n[\n', encoding="utf-8")
    with pytest.raises(InputError) as raised:
        load_examples(str(path))
    assert [line.partition(": ")[0] for line in str(raised.value).splitlines()] == [f"{path}:2", f"{path}:4"]


def test_rows_that_lack_the_same_share_a_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": ""}, {"prompt": " "}, {"prompt": "b"}, {"prompt": ""}]))
    with pytest.raises(InputError) as raised:
        load_examples(str(path))
    assert str(raised.value) == f"{path}, 2, 3 and 5: the prompt is empty"


def test_a_plain_text_is_told_what_it_could_be(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Say hello.\nSay goodbye.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts\.txt is plain text.*CSV file with the header prompt, or JSON lines"):
        load_examples(str(path))
    path.write_text('{"prompt": "a"}\n', encoding="utf-8")
    assert len(load_examples(str(path))) == 1


def test_a_folder_is_read_without_progress_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert len(load_examples(str(tmp_path))) == 2
    assert capsys.readouterr().err == ""


def test_a_text_is_continued_without_a_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "the cat sat on the mat and looked at the dog"
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"prompt": "the cat"}), encoding="utf-8")
    plain, chat = load_examples(str(path))
    assert plain.key != Example("x", plain.prompt, {}).key
    assert encode(tokenizer, plain).text == plain.prompt
    assert encode(tokenizer, chat).text != chat.prompt or not tokenizer.chat_template
    prompt, completion = with_answer(tokenizer, plain, completion_of(plain.row, "x"), [int(tokenizer.eos_token_id)])
    assert prompt + completion == (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
