"""Where remend keeps what makes a later command quicker or better informed."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """REMEND_CACHE, or remend's folder in the user's cache directory."""
    named = os.environ.get("REMEND_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remend"
