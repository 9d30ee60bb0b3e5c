"""The tables of time_to_recover.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from time_lines import LINES

SHARES = (0.70, 0.80, 0.85)
PACKAGES = ("remend", "torch", "transformers", "trl")


def seconds_to(points: Sequence[Sequence[float]], limit: float) -> float | None:
    """When the first measurement was at or below `limit`, if any was."""
    return next((seconds for seconds, kl in points if kl <= limit), None)


def to_share(result: Mapping[str, Any], share: float) -> float | None:
    """Seconds until so much of the gap was closed."""
    return seconds_to(result["curve"], (1 - share) * result["degraded"]["kl"])


def figures(value: float | None, form: str = ".0f") -> str:
    """A number, or a dash for one that never came."""
    return "–" if value is None else format(value, form)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


TO = tuple(f"s to {share:.0%}" for share in SHARES)


def speed_table(done: Mapping[str, dict[str, Any]]) -> str:
    """TRL is represented by its line that reaches 70% first, or else by the one that ends lowest."""
    rivals = {n: r for n, r in done.items() if n.startswith("TRL")}
    best = min(
        rivals,
        key=lambda n: (to_share(rivals[n], SHARES[0]) or float("inf"), rivals[n]["recovered"]["kl"]),
        default=None,
    )
    theirs = to_share(done[best], SHARES[0]) if best else None
    limit = done[best]["curve"][-1][0] if best else None
    rows = []
    for name, result in done.items():
        ours, at = to_share(result, SHARES[0]), None
        if limit is not None:
            at = [kl for seconds, kl in result["curve"] if seconds <= limit][-1]
        ratio = figures(ours / theirs, ".2f") if ours is not None and theirs else "–"
        reached = [figures(to_share(result, share)) for share in SHARES]
        end, own = figures(result["recovered"]["kl"], ".3f"), figures(result["recovered"]["kl_on_policy"], ".3f")
        if result["rounded"]:
            end += f" ({result['rounded']['kl']:.3f} on the grid)"
            own += f" ({result['rounded']['kl_on_policy']:.3f} on the grid)"
        rows.append((name, *reached, ratio, figures(at, ".3f"), end, own, figures(result["curve"][-1][0])))
    heads = ("line", *TO, "70% time over TRL's", f"KL at {figures(limit)} s", "KL", "KL on its own answers", "s in all")
    return f"TRL's times are those of {best or 'no line yet'}.\n\n" + markdown(heads, rows)


def prompts_table(done: Mapping[str, dict[str, Any]]) -> str:
    """What is left of the gap at equal steps."""
    rows = []
    for name, r in done.items():
        interval = "{:.2f} to {:.2f}".format(*r["gap_closed_kl_95"]) if r["gap_closed_kl_95"] else "–"
        gap = f"{figures((r['gap_closed'] or {}).get('kl'), '.2f')} ({interval})"
        kl = (f"{r[when]['kl']:.3f}" for when in ("degraded", "recovered"))
        rows.append((name, str(r["steps"]), *kl, gap, f"{r['recovered']['kl_on_policy']:.3f}"))
    heads = ("prompts, student", "steps", "degraded KL", "KL", "gap closed (95%)", "KL on its own answers")
    return markdown(heads, rows)


def bootstrap_table(done: Mapping[str, dict[str, Any]]) -> str:
    """Also: how soon each is where on-policy alone ended, on the same student."""
    students = {line.name: line.degradation for line in LINES}
    rows = []
    for name, r in done.items():
        alone = f"on-policy, {students[name]}"
        end = seconds_to(r["curve"], done[alone]["recovered"]["kl"]) if alone in done else None
        reached = [figures(to_share(r, share)) for share in SHARES]
        last = (f"{r['recovered'][key]:.3f}" for key in ("kl", "kl_on_policy"))
        memory = figures(r.get("peak_rss_mib"))
        rows.append((name, students[name], *reached, figures(end), *last, figures(r["curve"][-1][0]), memory))
    heads = ("line", "student", *TO, "s to on-policy's last KL", "KL", "KL on its own answers", "s in all", "peak MiB")
    return markdown(heads, rows)


TABLES = {"speed": speed_table, "options": bootstrap_table, "prompts": prompts_table, "bootstrap": bootstrap_table}


def show(results: Mapping[str, dict[str, Any]], tables: Sequence[str]) -> None:
    """Print what is done, table by table, with machine and settings."""
    for table in tables:
        done = {line.name: results[line.name] for line in LINES if table in line.tables and line.name in results}
        if not done:
            continue
        last = next(reversed(done.values()))
        machine, versions = last["hardware"], {k: v for r in done.values() for k, v in r["versions"].items()}
        gpus = ", ".join(machine["gpus"]) + ", " if last.get("device") == "cuda" else ""
        loads = [r["load_at_start"][0] for r in done.values()]
        packages = ", ".join(f"{n} {versions[n]}" for n in PACKAGES if n in versions)
        print(
            f"\n{table}: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{gpus}{last['dtype']}, seed {last['seed']}, "
            f"{last.get('at_once', 1)} at once, load average at a line's start {min(loads):.1f} to {max(loads):.1f}; "
            + packages
        )
        print("\n" + TABLES[table](done), flush=True)
