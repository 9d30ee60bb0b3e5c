"""The pages in headless Chromium: no console message, nothing wider than the window, at a desk and on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.made_reports import made_diagnosis, made_run, write_diagnosis
from remend.report import report

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

HOLDER = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe id="page" src="{page}" width="{width}" height="1600"></iframe><p id="sizes"></p>
<script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument.documentElement
  for (const fold of page.querySelectorAll("details")) fold.open = true
  const texts = [...page.querySelectorAll(".plot text")].map((text) => text.getBoundingClientRect().height)
  document.getElementById("sizes").textContent =
    `width ${{page.scrollWidth}} height ${{page.scrollHeight}} letters ${{Math.min(...texts).toFixed(1)}}`
  const box = page.querySelector(".filter input")
  if (!box) return
  box.value = "VOLCANO"
  box.dispatchEvent(new Event("input"))
  document.getElementById("sizes").textContent += ` filter ${{page.querySelector(".filter span").textContent}}`
}}
</script>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    diagnosis = write_diagnosis(root / "diagnosis", made_diagnosis(3))
    run = made_run(root / "run", streams=("recover", "keep"), track=True)
    long = made_run(root / ("a-very-long-name-" * 8), data="x" * 200)
    return {
        "diagnosis": report([diagnosis]),
        "recovery": report([run]),
        "comparison": report([diagnosis, run, long], root / "compared"),
    }


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("name", ["diagnosis", "recovery", "comparison"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 0)])  # 1 is light, 0 dark
def test_a_page_fits_its_window_and_says_nothing_on_the_console(
    pages: dict[str, Path], name: str, width: int, scheme: int, tmp_path: Path
) -> None:
    assert BROWSER is not None
    # a window can't be as narrow as a phone, a frame can
    holder = tmp_path / "holder.html"
    holder.write_text(HOLDER.format(page=pages[name].resolve().as_uri(), width=width), encoding="utf-8")
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += [
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1600",
    ]
    options += [f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=5000"]
    command = [BROWSER, *options, holder.as_uri()]
    shown = subprocess.run([*command, "--dump-dom"], capture_output=True, text=True, timeout=120, check=True)
    sizes = re.search(r"width (\d+) height (\d+) letters ([\d.]+)", shown.stdout)
    assert sizes, shown.stderr[-2000:]
    assert int(sizes[1]) <= width
    assert int(sizes[2]) > 2000
    assert float(sizes[3]) >= 8  # pixels a letter's line is high
    assert ("filter 1 of 4" in shown.stdout) == (name == "recovery")  # the script runs, and leaves one prompt
    assert "CONSOLE" not in shown.stderr
    drawn = subprocess.run(
        [*command, f"--screenshot={picture}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # not blank
