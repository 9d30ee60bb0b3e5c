"""Degradations of the tiny model."""

from __future__ import annotations

import pytest

from remend.degrade.making import job


@pytest.fixture(autouse=True)
def short_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model 4 prompts say enough."""
    if "smollm2_dir" not in request.fixturenames:
        monkeypatch.setattr(job, "PROBE_PROMPTS", 4)
