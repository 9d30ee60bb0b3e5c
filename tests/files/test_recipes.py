"""The shipped recipe and the page about settings stay in step with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from remend.files.settings import build
from remend.files.yaml_files import read_yaml
from remend.recovery.settings import RecoverConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_is_valid(path: Path) -> None:
    config = build(RecoverConfig, read_yaml(path), str(path))
    assert config.steps > 0


def test_every_setting_is_documented_with_its_default() -> None:
    rows = dict(
        re.findall(
            r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs" / "explanation" / "defaults.md").read_text(), flags=re.M
        )
    )
    assert set(rows) == set(RecoverConfig.model_fields)
    words = {None: {"none", "the smaller of 64 and 10%"}, False: {"false"}, True: {"true"}}
    for name, field in RecoverConfig.model_fields.items():
        said = rows[name].strip()
        if name == "ema":
            assert said == "{rate: 0.01, every: 1}"
        elif name == "placement":
            placed = field.get_default(call_default_factory=True)
            assert said == placed.student == placed.teacher == "auto"
        elif field.is_required():
            assert said == "required"
        elif "auto" in (field.default, repr(field.default)):  # of steps too, which are a number beside
            assert said == "auto"
        elif isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert float(said) == field.default, name
        elif field.default in words:
            assert said in words[field.default], name
        else:
            assert said == field.default, name
