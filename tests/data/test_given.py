"""Rows that Python hands over where settings name a file."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from remend.data.examples import load_examples
from remend.data.given import as_files, rows_from_python, write_rows
from remend.data.sources import read_rows
from remend.errors import InputError

ROWS = [{"prompt": "One", "score": np.float32(0.5), "seen": date(2026, 1, 2)}, {"prompt": "Zwei", "n": torch.tensor(3)}]


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with rows_from_python():
        yield


def taken(folder: Path, **values: Any) -> dict[str, Any]:
    return as_files(values, lambda name: folder / f"{name}.jsonl")


def test_rows_are_read_from_memory_and_the_same_from_the_file_that_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = taken(out / "data", data=ROWS, eval_data=({"prompt": "Drei"},), steps=2)
    assert values == {"data": str(out / "data/data.jsonl"), "eval_data": str(out / "data/eval_data.jsonl"), "steps": 2}
    rows = [row for _, row in read_rows(values["data"])]
    assert rows == [{"prompt": "One", "score": 0.5, "seen": "2026-01-02"}, {"prompt": "Zwei", "n": 3}]
    before = load_examples(values["data"])
    assert not out.exists()
    write_rows(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remend.data.sources.table_at", lambda source: None)
        assert load_examples(values["data"]) == before


def test_rows_go_into_the_temporary_directory_that_becomes_out(tmp_path: Path) -> None:
    taken(tmp_path / "out" / "data", data=ROWS)
    write_rows(tmp_path / "out", tmp_path / "temporary")
    assert (tmp_path / "temporary/data/data.jsonl").is_file()
    assert not (tmp_path / "out").exists()


def test_streams_tasks_and_splits(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "One", "answer": None}, {"prompt": "Two", "answer": "2"}])
    values = taken(tmp_path, streams={"keep": {"data": rows, "teacher": "initial"}, "recover": {"data": "file.jsonl"}})
    assert values["streams"]["keep"] == {"data": str(tmp_path / "keep-data.jsonl"), "teacher": "initial"}
    assert values["streams"]["recover"] == {"data": "file.jsonl"}
    assert [row for _, row in read_rows(values["streams"]["keep"]["data"])] == [
        {"prompt": "One"},
        {"prompt": "Two", "answer": "2"},
    ]
    assert taken(tmp_path, data={"science": ROWS})["data"] == {"science": str(tmp_path / "science-data.jsonl")}
    both = DatasetDict({"train": rows, "test": rows})
    assert taken(tmp_path, data=both)["data"] == str(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=r"splits dev, test; give one of them, as data\[\"dev\"\]"):
        taken(tmp_path, data=DatasetDict({"dev": rows, "test": rows}))
    with pytest.raises(InputError, match=r"list\(data.take\(1000\)\)"):
        taken(tmp_path, data=rows.to_iterable_dataset())


def test_bad_rows_are_named_by_their_place(tmp_path: Path) -> None:
    values = taken(tmp_path, data=[{"prompt": "One"}, {"question": "Two"}, {"prompt": ""}])
    with pytest.raises(InputError) as caught:
        load_examples(values["data"])
    assert 'data[1]: the row has no "prompt"' in str(caught.value)
    assert "data[2]: the prompt is empty" in str(caught.value)
    with pytest.raises(InputError, match=r"data\[0\]: the row holds what JSON has no form for: a object"):
        taken(tmp_path, data=[{"prompt": "One", "image": object()}])
    with pytest.raises(InputError, match=r"data.jsonl is empty; it needs rows with a prompt"):
        read_rows(taken(tmp_path, data=[])["data"])


def test_rows_are_forgotten_outside(tmp_path: Path) -> None:
    name = taken(tmp_path, data=ROWS)["data"]
    with rows_from_python():
        assert len(read_rows(name)) == 2
