"""A job of a study in a process of its own: python -m remend.studies.worker JOB.json FAILED.txt."""

from __future__ import annotations

import sys

from remend.studies.work import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
