"""Errors: kinds, standard types, suggestions."""

from __future__ import annotations

import pytest

from remend.errors import CheckError, FileError, InputError, RemendError, TrainingError, did_you_mean


@pytest.mark.parametrize(
    ("kind", "standard"),
    [(InputError, ValueError), (FileError, OSError), (TrainingError, ArithmeticError), (CheckError, ValueError)],
)
def test_every_kind_is_also_a_standard_type(kind: type[Exception], standard: type[Exception]) -> None:
    assert issubclass(kind, RemendError)
    assert issubclass(kind, standard)


def test_file_error_prints_its_message_alone() -> None:
    assert str(FileError("model x does not exist")) == "model x does not exist"
    assert str(FileError("two", "arguments")) == "two"  # an OSError would print "[Errno two] arguments"
    assert str(FileError()) == ""


def test_check_error_lists_all_problems() -> None:
    error = CheckError(f"problem {i}" for i in range(3))
    assert error.problems == ["problem 0", "problem 1", "problem 2"]
    assert str(error) == "problem 0\nproblem 1\nproblem 2"


def test_did_you_mean_names_the_nearest_only() -> None:
    assert did_you_mean("batchsize", ["steps", "batch_size", "beta"]) == ' Did you mean "batch_size"?'
    assert did_you_mean("zzz", ["steps", "batch_size"]) == ""
    assert did_you_mean("x", []) == ""
