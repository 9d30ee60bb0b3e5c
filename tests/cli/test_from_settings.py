"""Options made from fields: what each type of field takes on the command line."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from remend.cli.from_settings import command, options_of
from remend.errors import InputError
from remend.files.settings import Settings


class Inner(Settings):
    size: int = Field(16, description="how large")
    names: Literal["all"] | list[str] = Field("all", description="all, or ends of names")


class Outer(Settings):
    files: list[str] = Field(description="what is read")
    layers: int | list[int] = Field(5, description="how many, or which")
    sites: list[Literal["mlp", "attention"]] = Field(["mlp"], description="where")
    share: str | float = Field("0.5", description="auto, or a share")
    careful: bool = Field(True, description="take care")
    rate: float | None = Field(None, description="[of] learning")
    inner: Inner | None = Field(None, description="more")


@pytest.fixture
def given() -> Any:
    """What the settings get from words."""

    def parse(*words: str) -> tuple[dict[str, Any], str]:
        seen: list[dict[str, Any]] = []
        app = typer.Typer(rich_markup_mode=None)
        app.command()(command((), options_of(Outer), lambda fixed, values: seen.append(values), "Do it."))
        done = CliRunner().invoke(app, words, env={"COLUMNS": "160"}, catch_exceptions=False)
        return (seen or [{}])[0], done.output

    return parse


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("", {}),
        ("--files b", {"files": ["a", "b"]}),
        ("--layers 7", {"layers": 7}),
        ("--layers 7,", {"layers": [7]}),
        ("--layers 1,2", {"layers": [1, 2]}),
        ("--sites mlp,attention", {"sites": ["mlp", "attention"]}),
        ("--share 0.25 --rate 1e-3", {"share": "0.25", "rate": 1e-3}),
        ("--no-careful", {"careful": False}),
        ("--careful", {"careful": True}),
        ("--inner-size 3 --inner-names q,k", {"inner": {"size": 3, "names": ["q", "k"]}}),
        ("--inner-names all", {"inner": {"names": "all"}}),
    ],
)
def test_only_what_is_written_is_given(given: Any, words: str, values: dict[str, Any]) -> None:
    settings = given("--files", "a", *words.split())[0]
    assert settings == {"files": ["a"], **values}
    Outer(**settings)


def test_the_help_and_what_is_refused(given: Any) -> None:
    said = " ".join(given("--help")[1].split())
    for part in (
        "Do it.",
        "What is read; repeatable. [required]",
        "Where; with commas between. [default: mlp]",
        "auto, or a share. [default: 0.5]",
        "[of] learning.",
        "How large.",
    ):
        assert part in said
    assert "Missing option '--files'" in given()[1]
    with pytest.raises(InputError, match='layers "one" is neither a number nor a list like 23,24,25'):
        given("--files", "a", "--layers", "one")
