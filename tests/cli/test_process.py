"""The whole life of a process: a signal ends it with 130 or 143 and without a word, or its work was done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import remend

HURT = "import os, signal\ndef hurt(*_): os.kill(os.getpid(), signal.{name})\n"
MOMENTS = {
    "while remend is imported": (
        "import sys\nclass Finder:\n    def find_spec(self, name, *_):\n        if name == 'remend.cli': hurt()\n"
        "sys.meta_path.insert(0, Finder())\n"
    ),
    "while a plugin is imported": "hurt()\n",
    "when its import is undone": "try:\n    hurt()\nfinally:\n    raise ValueError('in the clean-up')\n",
    "after the work": "import atexit\natexit.register(hurt)\n",
    "after everything": "class Last:\n    def __del__(self, hurt=hurt): hurt()\nlast = Last()\n",
}
"""A module that sends a signal to its own process at that moment. The first is imported before remend's is."""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(moment: str, name: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "hurting.py").write_text(HURT.format(name=name) + MOMENTS[moment])
    before = "import sys; sys.path.append('')\n" + ("import hurting\n" if moment == next(iter(MOMENTS)) else "")
    started = f"{before}sys.argv[1:] = ['version', '--import', 'hurting']\nfrom remend.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", started], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    if moment == "after everything":
        assert (done.returncode, done.stdout) == (0, f"{remend.__version__}\n")
    else:
        assert done.returncode == code
        assert done.stdout == (f"{remend.__version__}\n" if moment == "after the work" else "")
