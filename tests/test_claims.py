"""The page of claims says what the committed records say, and its rules give the verdicts that they state."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from helpers.made_records import made_record, write_made
from remend.errors import InputError
from remend.studies.from_records import results_of_records
from remend.studies.grid import Study
from remend.studies.plan import read_study

ROOT = Path(__file__).parents[1]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("claims")


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("verdicts")


@pytest.fixture(scope="module")
def plan() -> Study:
    return read_study("paper-small")


def records(plan: Study, folder: Path, figures: dict[str, dict[str, Any]], **common: Any) -> Path:
    """Records of cells of the study, each with its own training; figures by group and method, a list by seed."""
    cells = {cell.name: cell for cell in plan.cells}
    made = []
    for name, given in figures.items():
        for seed in plan.spec.seeds if not name.endswith("/none") else (0,):
            cell = cells[f"{name}/{seed}"]
            recipe = json.loads(json.dumps(plan.draft(cell).model_dump(mode="json", exclude={"out"})))
            budget = plan.budget.tokens if cell.method.steps else None
            settled = {"how": cell.method.how, "teacher": cell.method.teacher, "recipe": recipe, "budget": budget}
            own = {key: value[seed] if isinstance(value, list) else value for key, value in given.items()}
            made.append(made_record(cell.name, **{**settled, **common, **own}))
    return write_made(folder, *made)


def task(share: float) -> dict[str, float]:
    return {"tooluse-short": share, "general": 0.15}


def test_the_page_is_current(claims: Any, plan: Study) -> None:
    page = claims.page(results_of_records(plan, claims.RECORDS))
    assert claims.PAGE.read_text(encoding="utf-8") == page, "docs/measurements/claims.md: python benchmarks/claims.py"


def test_without_records_nothing_is_measured(claims: Any, verdicts: Any, plan: Study, tmp_path: Path) -> None:
    results = results_of_records(plan, tmp_path / "none")
    assert [claim.judge(verdicts.Figures(results)).verdict for claim in verdicts.CLAIMS] == ["not yet measured"] * 5
    assert "SDFT) loses to a rival is not yet measured" in claims.page(results)


@pytest.mark.parametrize(
    ("degraded", "recovered", "verdict"),
    [
        (0.3, [0.8, 0.8, 0.8], "seen"),
        (0.3, [0.34, 0.35, 0.33], "contradicted"),
        (0.78, [0.8, 0.8, 0.8], "not testable here"),
        (0.3, [0.3, 0.45, 0.54], "not seen"),  # seeds that differ by so much say little
    ],
)
def test_quantization(
    verdicts: Any, plan: Study, tmp_path: Path, degraded: float, recovered: list[float], verdict: str
) -> None:
    """Of a score of 84%: won back in all, won back by less than 15 points, hardly lost, and between."""
    group = "int3-g64-tooluse-short"
    figures = {
        f"{group}/none": {"scores": task(degraded), "reference": 0.84},
        f"{group}/sdft": {"scores": [task(share) for share in recovered]},
        f"{group}/sft": {"scores": task(degraded)},
    }
    results = results_of_records(plan, records(plan, tmp_path / "records", figures))
    judged = verdicts.quantization(verdicts.Figures(results))
    assert judged.verdict == verdict
    (text,) = judged.measured
    assert text.startswith(f"{group}: +{100 * (sum(recovered) / 3 - degraded):.1f} points (")
    assert f"of {100 * (0.84 - degraded):.1f} lost" in text
    assert "beside SFT at equal tokens" in text
    assert judged.on == [f"{group} by sdft, 3 seeds, 200 items"]


@pytest.mark.parametrize(
    ("kl", "kept", "verdict"), [(0.2, 0.9, "seen"), (1.8, 0.84, "contradicted"), (0.2, 0.4, "contradicted")]
)
def test_forgetting(verdicts: Any, plan: Study, tmp_path: Path, kl: float, kept: float, verdict: str) -> None:
    group = "forgetting-tooluse-short"
    figures = {
        f"{group}/none": {"scores": task(0.84), "reference": 0.0},
        f"{group}/off-then-on": {"scores": task(kept), "kl": (2.0, kl)},
        f"{group}/sdft": {"scores": task(0.0)},  # the paper's own method goes before it
    }
    folder = records(plan, tmp_path / "records", figures, stands_on=False)
    assert verdicts.forgetting(verdicts.Figures(results_of_records(plan, folder))).verdict == verdict


@pytest.mark.parametrize(("kl", "score", "verdict"), [(0.2, 0.8, "seen"), (0.2, 0.35, "contradicted")])
def test_pruning(verdicts: Any, plan: Study, tmp_path: Path, kl: float, score: float, verdict: str) -> None:
    group = "ffn-10-tooluse-short"
    figures = {
        f"{group}/none": {"scores": task(0.3), "reference": 0.84},
        f"{group}/repair-sdft": {"scores": task(score), "kl": (2.0, kl)},
    }
    folder = records(plan, tmp_path / "records", figures)
    assert verdicts.pruning(verdicts.Figures(results_of_records(plan, folder))).verdict == verdict


@pytest.mark.parametrize(("first", "second", "verdict"), [(0.2, 0.6, "seen"), (0.6, 0.2, "contradicted")])
def test_bootstrap_and_the_first_paragraph(
    claims: Any, verdicts: Any, plan: Study, tmp_path: Path, first: float, second: float, verdict: str
) -> None:
    group = "nf4-tooluse-short"
    figures = {
        f"{group}/none": {"scores": task(0.7), "reference": 0.84},
        f"{group}/off-then-on": {"scores": task(0.8), "kl": (2.0, first)},
        f"{group}/sdft": {"scores": task(0.8), "kl": (2.0, second)},
        f"{group}/repair": {"scores": task(0.8), "kl": (2.0, 0.1)},
    }
    results = results_of_records(plan, records(plan, tmp_path / "records", figures))
    assert verdicts.bootstrap(verdicts.Figures(results)).verdict == verdict
    page = claims.page(results)
    paragraph = page.split("\n\n")[2]
    assert paragraph.startswith("**SDFT loses to a rival in ")
    assert f"{group}: sdft is worse than repair by KL gap closed, −" in paragraph
    assert "| nf4-tooluse-short | repair | KL gap closed | 3 | 32 | 95% (" in page


def test_records_of_something_else_are_refused(plan: Study, tmp_path: Path) -> None:
    figures = {"nf4-tooluse-short/none": {"scores": task(0.7), "reference": 0.84}}
    folder = records(plan, tmp_path / "records", figures)
    write_made(folder, made_record("nf5-tooluse-short/none/0", how="none"))
    with pytest.raises(
        InputError, match=r"records of no cell of the study paper-small: nf5-tooluse-short--none--0\.json"
    ):
        results_of_records(plan, folder)
    other = records(plan, tmp_path / "other", figures, how="sft")
    with pytest.raises(InputError, match="is of another training than the study's cell nf4-tooluse-short/none/0"):
        results_of_records(plan, other)
