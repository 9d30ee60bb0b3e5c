"""The page of a run under way, served on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.made_reports import made_run
from helpers.pages import check_page
from remend.report.running import page_now
from remend.report.watch import Watcher
from remend.report.writing import html


@pytest.fixture
def under_way(tmp_path: Path) -> Path:
    """A run that has no summary yet."""
    path = made_run(tmp_path / "run", streams=("recover", "keep"))
    (path / "summary.json").rename(tmp_path / "summary.json")
    sums = [{"id": "a", "tokens": 10, "kl": 25.0}, {"id": "b", "tokens": 30, "kl": 75.0}]
    (path / "baseline.json").write_text(json.dumps({"on_reference": sums}))
    (path / "repair.json").write_text(json.dumps({"kl": 1.1, "seconds": 3.0, "kept": True}))
    (path / "streams-baseline.json").write_text(json.dumps({"keep": {"kl": 0.0, "nll": 0.5}}))
    return path


@pytest.fixture
def server(under_way: Path) -> Iterator[Watcher]:
    with Watcher(under_way) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        content: str = answer.read().decode()
    return content


def test_the_page_says_how_far_the_run_is(under_way: Path) -> None:
    page = page_now(under_way)
    assert page.verdict == "Step 24 of 24: held-out KL 1.000 after step 12, 60% of the gap closed so far."
    text = html(page)
    assert 'http-equiv="refresh" content="5"' in text
    assert "Loss and held-out KL: keep" in check_page(text).text
    tiles = {tile.label: tile.value for tile in page.tiles}
    assert tiles["Step"] == "24 of 24"
    assert not {tile.tone for tile in page.tiles} - {""}, "nothing is judged before the end"
    (under_way / "metrics.jsonl").unlink()
    assert (
        page_now(under_way).verdict
        == "Before the first step: held-out KL 1.100 after repair, 56% of the gap closed so far."
    )
    for name in ("repair.json", "baseline.json", "streams-baseline.json"):
        (under_way / name).unlink()
    assert page_now(under_way).verdict.endswith("the degraded model is not measured yet.")
    assert "No step is done yet." in html(page_now(under_way))


def test_a_quiet_run_is_said(under_way: Path) -> None:
    for path in under_way.iterdir():
        os.utime(path, (1e9, 1e9))
    assert f"remend recover --resume {under_way}" in page_now(under_way).warnings[0]


def test_it_is_served_anew_until_the_run_is_complete(server: Watcher, under_way: Path) -> None:
    before = {path.name for path in under_way.iterdir()}
    assert "Step 24 of 24" in read(server.address)
    with (under_way / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 24, "eval/kl": 0.5}) + "\n")
    assert "held-out KL 0.500 after step 24" in read(server.address)
    assert {path.name for path in under_way.iterdir()} == before, "nothing is written"
    (under_way.parent / "summary.json").rename(under_way / "summary.json")
    done = read(server.address)
    assert "64% of the KL gap closed" in done
    assert "refresh" not in done
    (under_way / "summary.json").write_text("{")
    assert "can't be read now" in read(server.address)


def test_only_this_machine_may_ask(server: Watcher) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for address, host in ((server.address + "manifest.json", "localhost:1"), (server.address, "evil.example:80")):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(address, Host=host)


def test_ctrl_c_ends_it(under_way: Path) -> None:
    command = [sys.executable, "-m", "remend", "report", "--watch", str(under_way)]
    ours = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # tests in the background ignore it, and hand that on
    try:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, ours)
    with started as process:
        assert process.stdout
        address = process.stdout.readline().split()[0]
        assert "Step 24 of 24" in read(address)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (0, "no longer served\n", "")


def test_what_can_not_be_watched(run: Any, tmp_path: Path) -> None:
    code, _, error = run("report", "--watch", tmp_path)
    assert code == 2
    assert "is no remend run" in error
    code, _, error = run("report", "--watch", tmp_path, tmp_path)
    assert code == 2
    assert "one run's directory" in error
