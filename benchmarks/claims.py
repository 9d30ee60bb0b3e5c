"""What became of the paper's claims: docs/measurements/claims.md, written from committed records.

    python benchmarks/claims.py [--records FOLDER] [--out PAGE]

The records are those that `remend study paper-small` leaves in OUT/records/; copy finished ones into
docs/measurements/records/paper-small/. Nothing is run. A test says when the page is out of date.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remend.report.certainty import lost_to
from remend.studies.from_records import results_of_records
from remend.studies.plan import read_study
from time_tables import markdown
from verdicts import CLAIMS, NOT_MEASURED, OURS, Claim, Figures, Judged, as_points, as_share

ROOT = Path(__file__).resolve().parent.parent
STUDY = "paper-small"
RECORDS = ROOT / "docs" / "measurements" / "records" / STUDY
PAGE = ROOT / "docs" / "measurements" / "claims.md"
MADE = "<!-- Written by benchmarks/claims.py from records/paper-small. Change that, then run it. -->"

RIVALS = (
    ("torchao's quantization-aware training (with Unsloth)", "Gemma 3 4B and 12B, Qwen3-4B, Llama-3.2-3B; int4, groups "
     "of 128", "mostly 33 to 45% of the benchmark loss won back (wikitext, bbh, mmlu-pro); its headline is up to 66.9%",
     "PyTorch blog, quantization-aware-training-in-torchao-ii"),
    ("Recover-LoRA", "Qwen3-4B, 4 bits with 2-bit gate and up", "80 to 95% on 9 of 12 benchmarks, without data",
     "arXiv 2606.04238"),
    ("Thinking Machines, the old checkpoint as teacher", "Qwen3-8B, trained on internal documents", "instruction "
     "following 79 → 83, of 85 before the training; the documents' questions 36 → 41", "their blog on on-policy "
     "distillation"),
    ("optipfair, layers removed, then distilled", "gemma-3-270m, 18 → 14 layers", "53.0% of the loss won back",
     "Hugging Face, oopere/gemma-3-270m-14L-distilled"),
)  # fmt: skip
"""Who, on what, what they say, where; read from public sources and not run again."""


def page(results: Mapping[str, Any]) -> str:
    """The page as Markdown, of a study's results."""
    figures = Figures(results)
    judged = [(claim, claim.judge(figures)) for claim in CLAIMS]
    return "\n".join([*_head(results), *_claims(judged), *_rules(), *_table(figures), *_rivals()]).rstrip() + "\n"


def _head(results: Mapping[str, Any]) -> Iterator[str]:
    states = [cell["state"] for cell in results["cells"]]
    trained = sum(row["how"] != "none" for row in results["rows"])
    yield from ("# What became of the paper's claims?", "", MADE, "", _sdft(results), "")
    yield (
        f"arXiv 2604.15794 claims five things. `recipes/studies/{STUDY}.yaml` looks at them on SmolLM2-135M that "
        f"learned a task first. {states.count('done')} of its {len(states)} cells have a committed record, in "
        f"{trained} rows of methods. Nothing of the paper's size was run here: a verdict is about this model, these "
        "tasks and budgets."
    )
    yield from (
        "",
        "    python benchmarks/claims.py        (after the commands of the table, and copying their records)",
        "",
    )


def _sdft(results: Mapping[str, Any]) -> str:
    """The first paragraph: whether on-policy distillation loses to a rival."""
    methods, pairs = results["methods"], results["certainty"]["pairs"]
    rivals = [
        pair for pair in pairs if sum(methods[pair[side]].startswith("on-policy") for side in ("first", "second")) == 1
    ]
    if not rivals:
        return "Whether on-policy distillation (SDFT) loses to a rival is not yet measured."
    lost = lost_to(pairs, methods)
    if lost:
        return f"**SDFT loses to a rival in {len(lost)} of {len(rivals)} comparisons.** {'. '.join(lost)}."
    return f"On-policy distillation (SDFT) is worse than no rival beyond chance, in {len(rivals)} comparisons."


def _claims(judged: Sequence[tuple[Claim, Judged]]) -> Iterator[str]:
    rows = [
        [
            claim.name,
            f"{claim.claimed}; {claim.on}",
            "<br>".join(one.measured) or "–",
            "<br>".join(one.on) or "–",
            f"**{one.verdict}**",
            f"`remend study {STUDY} --out runs/{STUDY} {claim.cells}`".replace(" `", "`"),
        ]
        for claim, one in judged
    ]
    yield from ("## The claims", "")
    yield markdown(["claim", "claimed, and on what", "measured here (95%)", "on what", "verdict", "command"], rows)
    yield ""


def _rules() -> Iterator[str]:
    yield from ("## The rules", "")
    yield (
        "The verdicts are given by `benchmarks/verdicts.py`, by these rules. The paper's method is the first of "
        f"{', '.join(f'`{name}`' for name in OURS)} that a degradation has cells of: off- then on-policy is the "
        "paper's own. Intervals are over seeds and items where there are several seeds, else over items. Where neither "
        f"of the two verdicts holds it is “not seen”, and “{NOT_MEASURED}” without cells."
    )
    yield ""
    yield from (f"- **{claim.name}**: {claim.rule}" for claim in CLAIMS)
    yield ""


def _table(figures: Figures) -> Iterator[str]:
    yield from ("## All that was measured", "")
    if not figures.rows:
        yield from ("Not yet measured.", "")
        return
    rows = []
    for row in figures.rows:
        value = as_points(row) if row["unit"] == "points" else as_share(row)
        p = "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        seeds = str(row["seeds"])
        rows.append([row["group"], row["method"], row["measure"], seeds, str(row["items"]), value, p, row["verdict"]])
    yield f"Against the degraded student. p is adjusted by Holm over all {len(rows)} rows."
    yield ""
    columns = ["degradation", "method", "measure", "seeds", "items", "value (95%)", "p, Holm", "verdict"]
    yield markdown(columns, rows)
    yield from ("", *(f"- {sentence}" for sentence in figures.results["correlation"].get("quotable", [])), "")


def _rivals() -> Iterator[str]:
    yield from ("## Claimed by others, on other models", "")
    yield "Read from public sources and not run again. None of these can be read beside a figure above."
    yield ""
    yield markdown(["who", "on what", "claim", "where"], RIVALS)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    given.out.write_text(page(results_of_records(read_study(STUDY), given.records)), encoding="utf-8")


if __name__ == "__main__":
    main()
