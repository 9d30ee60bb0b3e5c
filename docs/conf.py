"""Settings of Sphinx, which builds the site of these pages (`make docs`). The pages are read well without it, too."""

import re
from typing import Any

project = "remend"
author = "the remend authors"
extensions = ["myst_parser"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px", "description": "Bring a degraded model back"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
html_show_copyright = False
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # commands with … in them are no valid shell

NAVIGATION = {
    "Start": ["tutorial"],
    "How to": [
        "how-to/index",
        *("how-to/quantized-model", "how-to/gguf", "how-to/pruned-model", "how-to/forgetting", "how-to/adapter"),
        *("how-to/large-teacher", "how-to/larger-than-memory"),
        *("how-to/no-data", "how-to/processes", "how-to/resume", "how-to/read-a-diagnosis", "how-to/evaluate"),
        *("how-to/serve", "how-to/study"),
    ],
    "Reference": [
        *("reference/cli", "reference/recipe", "reference/data", "reference/streams", "reference/runs"),
        *("reference/export", "reference/degradations", "reference/glossary"),
    ],
    "Explanation": [
        *("explanation/how-it-works", "explanation/what-is-used", "explanation/diagnosis", "explanation/defaults"),
        *("explanation/architecture", "explanation/statistics", "explanation/papers"),
    ],
    "Extending": [
        *("extending/index", "extending/loss", "extending/teacher", "extending/constraint", "extending/container"),
        *("extending/degradation", "extending/task"),
    ],
    "Measurements": [
        *("measurements/degradations", "measurements/results", "measurements/speed", "measurements/scale"),
        *("measurements/zoo", "measurements/reliability", "measurements/claims"),
        *("measurements/after-repair", "measurements/streams", "measurements/diagnosis"),
        *("measurements/evaluation", "measurements/runs"),
    ],
}
"""The pages in the order of the sidebar. A page that is missing here is a warning, and warnings fail."""

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:README|CONTRIBUTING|recipes|src|tests|benchmarks)[^)]*\)")
"""A link to a file of the repository that is no page."""


def _read(app: Any, page: str, source: list[str]) -> None:
    """Links out of docs/ become names of files; the start page gets the sidebar's list."""
    source[0] = OUTSIDE.sub(r"\1", source[0])
    if page == "index":
        for caption, pages in NAVIGATION.items():
            lines = [f":caption: {caption}", ":maxdepth: 1", ":hidden:", "", *pages]
            source[0] += "\n\n```{toctree}\n" + "\n".join(lines) + "\n```\n"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read)
