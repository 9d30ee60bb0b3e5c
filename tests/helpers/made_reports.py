"""Made-up content for reports: a diagnosis with the keys that remend diagnose writes, and a finished run's files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

ANSWERS = (
    "The eruption of a volcano is a complex process that involves several factors. It begins in the Earth's mantle, "
    "a layer of hot, viscous rock beneath the crust. When magma rises, it can be either …",
    "A beekeeper's day is filled with the sweet scent of honey and the sound of buzzing bees.\n\nIn spring the "
    "beekeeper checks each hive, feeds weak colonies and looks for the queen.",
    "The knight moves two squares in one direction and then one square to the side. It is the only piece that can "
    "jump over others.",
    "Bread rises because yeast eats sugar and gives off carbon dioxide, which the gluten of the dough holds. …",
)
BROKEN = (
    "The eruption of the the the the the volcano the the the earth the the the the the the the the the the …",
    "A beekeeper is a beekeeper who is a beekeeper who is a beekeeper who is a beekeeper …",
    "",
    "Bread bread is bread.",
)
MENDED = (
    "The eruption of a volcano is a natural process that involves magma. It begins in the Earth's mantle, a layer of "
    "hot rock beneath the crust. When pressure rises, it can be …",
    "A beekeeper's day in spring is filled with checking each hive and looking for the queen.",
    "The knight moves two squares in one direction and then one square to the side.",
    "Bread rises because yeast gives off gas, which the dough holds. …",
)
PROMPTS = (
    "What causes a volcano to erupt?",
    "What does a beekeeper do during the spring?",
    "How does the knight move in chess?",
    "Why does bread rise?",
)


def made_layers(count: int, start: float, fall: float, places: list[int], seed: int) -> list[dict[str, Any]]:
    """Layers whose CKA falls from `start` by `fall`, most around a third of the depth."""
    draw, found = random.Random(seed), []
    for layer in range(count):
        value = start - fall / (1 + math.exp(-(layer - count / 3) / 2.5)) + draw.gauss(0, 0.006)
        wide = 0.012 + 0.03 * (1 - value)
        found.append(
            {
                "layer": layer,
                "reference_layer": places[layer],
                "cka": value,
                "cka_low": value - wide,
                "cka_high": min(1.0, value + wide),
                "l2": 1.2 * (1 - value) + 0.05,
                "procrustes": 0.8 * (1 - value) + 0.02,
                "knn": max(0.0, value - 0.25),
                "rerun": 1.0,
                "random": 0.31 - 0.004 * layer,
            }
        )
    return found


def made_norms(count: int, layers: int) -> list[dict[str, Any]]:
    """One massive dimension, its share rising to the middle."""
    return [
        {
            "layer": i,
            "median_norm": 12.0 + 7 * i,
            "largest_norm": 31.0 + 12 * i,
            "massive": 3 if i == layers // 2 else 0,
            "top_dimension": 138,
            "top_dimension_share": 0.05 + 0.6 * math.sin(math.pi * i / max(1, layers - 1)),
        }
        for i in range(count)
    ]


def made_tokens(text: str, scale: float, seed: int) -> list[dict[str, Any]]:
    """The words of an answer as tokens with a KL and a rank."""
    draw = random.Random(seed)
    words = [f" {word}" for word in text.split(" ")]
    return [
        {"text": w, "kl": round(draw.expovariate(1 / scale), 3), "rank": int(draw.random() * 3 * scale)} for w in words
    ]


def made_student(
    name: str,
    severity: str,
    *,
    kl: float,
    cka: tuple[float, float],
    layers: int,
    reference_layers: int,
    answers: tuple[str, ...],
    positions: int,
    seed: int,
) -> dict[str, Any]:
    """One student's part of a diagnosis."""
    places = [round(i * (reference_layers - 1) / max(1, layers - 1)) for i in range(layers)]
    rows = made_layers(layers, *cka, places, seed)
    ranking = sorted(range(layers), key=lambda i: rows[i]["cka"])
    worst, agreement = rows[ranking[0]], math.exp(-0.5 * kl)
    return {
        "name": name,
        "student": f"/models/{name}",
        "layer_map": places,
        "layers": rows,
        "null_max": 0.041,
        "rows": 251,
        "rows_left_out": 5,
        "ranking": ranking,
        "entry": layers // 3,
        "sites": {},
        "grid": [
            [round(max(-0.02, rows[i]["cka"] - 0.035 * abs(places[i] - j)), 4) for j in range(reference_layers)]
            for i in range(layers)
        ],
        "positions": [
            {
                "position": t,
                "kl": kl * (0.8 + 0.4 * t / positions + 0.15 * math.sin(2.1 * t + seed)),
                "top1_agreement": agreement * (1 - 0.003 * t),
                "sequences": 256 - 3 * t if 3 * t < 250 else 6,
            }
            for t in range(positions)
        ],
        "stretches": [
            {"start": 0, "end": 3, "rows": 42, "cka": cka[0] - 0.6 * cka[1]},
            {"start": 4, "end": 11, "rows": 70, "cka": cka[0] - 0.7 * cka[1]},
        ],
        "norms": {
            "student": made_norms(layers, layers),
            "reference": made_norms(reference_layers, reference_layers),
        },
        "behaviour": {
            "kl": kl,
            "kl_95": [kl * 0.93, kl * 1.08],
            "reverse_kl": kl * 1.3,
            "top1_agreement": agreement,
            "entropy": 1.9,
            "reference_entropy": 1.32,
            "perplexity": 2.08 * math.exp(kl),
            "reference_perplexity": 2.08,
            "median_rank": 1.0,
            "mean_rank": 300.0 * kl,
            "tokens": 7421,
        },
        "token_kl": [made_tokens(text, kl, seed + i) for i, text in enumerate(ANSWERS)],
        "kl_sums": {f"prompt-{i}": [30, 30 * kl] for i in range(256)},
        "kind": "grid",
        "own_answers": {"repetition": 0.42, "clipped_share": 0.9, "answers": 16},
        "reference_answers": {"repetition": 0.03, "clipped_share": 0.8, "answers": 16},
        "samples": [
            {"id": f"prompt-{i}", "prompt": PROMPTS[i], "reference": ANSWERS[i], "student": answers[i]}
            for i in range(4)
        ],
        "severity": severity,
        "compared_with": None,
        "sentences": [
            {
                "text": f"Damage of {name}: {severity}. Its next-token distribution is {kl:.3f} nats per token from "
                f"the reference's, and {agreement:.0%} of its first choices are the same.",
                "rests_on": ["/severity", "/behaviour/kl", "/behaviour/kl_95", "/behaviour/top1_agreement"],
            },
            {
                "text": f"Least aligned of {name} is layer {worst['layer']}: CKA {worst['cka']:.3f}; shuffled rows "
                "reach 0.041.",
                "rests_on": ["/ranking/0", f"/layers/{ranking[0]}/cka", "/null_max"],
            },
        ],
        "recommendation": {
            "text": f"Recover {name}: remend recipes cp quantized . (its weights lie on a grid, which is kept).",
            "rests_on": ["/severity", "/kind"],
        },
    }


def made_diagnosis(students: int = 2, layers: int = 30, positions: int = 32) -> dict[str, Any]:
    """The content of diagnosis.json: a damaged student and what is recovered from it; the third has fewer layers."""
    found = [
        made_student(
            "int3-g64",
            "broken",
            kl=2.5,
            cka=(0.93, 0.55),
            layers=layers,
            reference_layers=layers,
            answers=BROKEN,
            positions=positions,
            seed=1,
        )
    ]
    for i in range(1, students):
        count = layers if i % 2 else max(4, layers - 5)
        student = made_student(
            "recovered" if i == 1 else f"recovered-{i}",
            "severe",
            kl=0.62 + 0.2 * (i - 1),
            cka=(0.985, 0.17 + 0.1 * (i - 1)),
            layers=count,
            reference_layers=layers,
            answers=MENDED,
            positions=positions,
            seed=1 + i,
        )
        student["compared_with"] = {
            "name": "int3-g64",
            "rows": 248,
            "layers": [
                {
                    "reference_layer": at,
                    "change": student["layers"][k]["cka"] - found[0]["layers"][at]["cka"],
                    "low": student["layers"][k]["cka"] - found[0]["layers"][at]["cka"] - 0.03,
                    "high": student["layers"][k]["cka"] - found[0]["layers"][at]["cka"] + 0.03,
                }
                for k, at in enumerate(student["layer_map"])
            ],
            "gap_closed_kl": 1 - student["behaviour"]["kl"] / 2.5,
            "gap_closed_kl_95": [0.97 - student["behaviour"]["kl"] / 2.5, 1.03 - student["behaviour"]["kl"] / 2.5],
        }
        found.append(student)
    return {**found[0], "others": found[1:], **made_about()}


def made_about() -> dict[str, Any]:
    """What a diagnosis says of itself."""
    return {
        "reference": "smollm2",
        "reference_files": {"model.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        "estimator": {
            "name": "debiased linear CKA (HSIC_1 of Song et al. 2012, arXiv 2010.15327), float64",
            "site": "residual stream after each block, before the final norm",
            "row_policy": "one seeded completion token per sequence, teacher-forced on the reference's greedy answers; "
            "none whose norm is above 10 times its layer's median in either model",
            "interval": "95%, delete-group jackknife over 20 groups of rows",
            "null": "largest CKA over all layers in 200 shuffles of the rows",
            "neighbours": 10,
            "dtype": "float32",
        },
        "data": "bundled prompts, held-out ones first",
        "data_hash": "8b63da839055b6c018c1474ab92089cd6b386496deaf2cb5dd47621509b40c4a",
        "sequences": 256,
        "max_new_tokens": 32,
        "seed": 0,
        "limits": {"kl": [0.01, 0.25, 1.5], "top1_agreement": [0.97, 0.8, 0.5]},
        "disclaimer": "CKA and its companions compare representations; they can change while behaviour does not, and "
        "the other way round (arXiv 2210.16156).",
        "warnings": [],
        "environment": made_environment(["remend", "diagnose", "--reference", "smollm2", "--out", "d"]),
        "seconds": 131.2,
    }


def made_environment(command: list[str]) -> dict[str, Any]:
    """As run.environment gives it."""
    return {
        "versions": {"python": "3.11.7", "remend": "0.1.0", "torch": "2.13.0", "gguf": None},
        "platform": "Linux",
        "hardware": {
            "machine": "x86_64",
            "processor": "a processor",
            "cores": 2,
            "threads": 2,
            "memory_gib": 23.5,
            "gpus": [],
        },
        "git_commit": "d2948adfdbbd06644eda9bf73e9dd2bdf2529a76",
        "command": command,
    }


def write_diagnosis(path: Path, diagnosis: dict[str, Any]) -> Path:
    """A diagnosis' directory."""
    path.mkdir(parents=True)
    (path / "diagnosis.json").write_text(json.dumps(diagnosis), encoding="utf-8")
    return path


def made_summary(**changes: Any) -> dict[str, Any]:
    """A finished run's summary."""
    return {
        "degraded": {"kl": 2.5, "top1_agreement": 0.33, "kl_on_policy": 1.68, "perplexity": 40.0},
        "recovered": {"kl": 0.9, "top1_agreement": 0.58, "kl_on_policy": 0.8, "perplexity": 7.1},
        "reference_perplexity": 2.08,
        "gap_closed": {"kl": 0.64, "kl_on_policy": 0.52, "top1_agreement": 0.37},
        "gap_closed_kl_95": [0.61, 0.67],
        "kl_direction": "forward KL, teacher‖student",
        "training_loss": "forward KL, teacher‖student",
        "constraint": "grid int3-g64",
        "repair": {"kl": 1.1, "top1_agreement": 0.5, "perplexity": 8.1, "seconds": 90.0},
        "steps": 24,
        "learning_rate": 2e-4,
        "selected": {"step": 24},
        "streams": {},
        "tokens_trained": 8408,
        "seconds": 449.3,
        "training_seconds": 187.9,
        "peak_rss_mib": 4743,
        "held_out_prompts": 24,
        "warnings": [],
        "notes": ["a note"],
        **changes,
    }


def made_run(path: Path, *, streams: tuple[str, ...] = (), track: bool = False, **recipe: Any) -> Path:
    """A finished run's directory, without weights."""
    path.mkdir(parents=True)
    settings = {
        "student": "models/int3",
        "teacher": "smollm2",
        "data": "train.jsonl",
        "out": str(path),
        "streams": {name: {"teacher": None if i == 0 else "initial"} for i, name in enumerate(streams)} or None,
        "steps": 24,
        "seed": 0,
        "ema": {"rate": 0.01, "every": 1},
        **recipe,
    }
    sides = {name: {"before": {"kl": 0.0, "nll": 0.5}, "after": {"kl": 0.01, "nll": 0.6}} for name in streams[1:]}
    summary = made_summary(streams=sides)
    manifest = {
        "kind": "recover",
        "recipe": settings,
        "reference": "smollm2",
        "answer_tokens": 48,
        "data": {"train": "aa", "held_out": "bb"},
        "models": {"student": {"model.safetensors": "cc"}, "teacher": {"model.gguf": "dd"}},
        "prompts": {"train": 396, "held_out": 24},
        "streams": {name: {"train": 396, "held_out": 24} for name in streams or ("recover",)},
        "shared_vocabulary": 49152,
        "dtype": "bfloat16",
        **made_environment(["remend", "recover", "recipe.yaml"]),
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (path / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    _lines(path / "metrics.jsonl", [_step(step, streams) for step in range(1, 25)] + [{"step": 12, "eval/kl": 1.0}])
    _lines(path / "timing.jsonl", [{"step": s, "seconds": 8.0, "rss_mib": 4000 + s} for s in range(1, 25)])
    draw = random.Random(5)
    ids = [f"prompt-{i}" for i in range(24)]
    before = [round(draw.uniform(60, 180), 2) for _ in ids]
    each = zip(ids, before, strict=True)
    sums = [
        {"id": i, "tokens": 48, "kl_sum_degraded": b, "kl_sum_recovered": round(b * draw.uniform(0.15, 0.55), 2)}
        for i, b in each
    ]
    _lines(path / "held_out.jsonl", sums)
    _lines(path / "held_out_repaired.jsonl", [{"id": i, "tokens": 48, "kl_sum": 53.0} for i in ids])
    worst = [
        {
            "id": f"prompt-{i}",
            "prompt": PROMPTS[i],
            "kl": 1.1 - 0.1 * i,
            "reference": made_tokens(ANSWERS[i], 0.9, 20 + i),
            "own": made_tokens(MENDED[i], 0.6, 30 + i),
        }
        for i in range(4)
    ]
    _lines(path / "worst.jsonl", worst)
    each = zip(PROMPTS, ANSWERS, BROKEN, MENDED, strict=True)
    _lines(
        path / "samples.jsonl",
        [
            {"id": f"prompt-{i}", "prompt": p, "reference": a, "degraded": b, "recovered": c}
            for i, (p, a, b, c) in enumerate(each)
        ],
    )
    if track:
        rows = [
            {
                "step": step,
                "stage": {0: "degraded", 24: "recovered"}.get(step, "training"),
                "kl": 2.5 - 0.06 * step,
                "top1_agreement": 0.3 + 0.01 * step,
                "cka": [0.9 - 0.02 * i + 0.002 * step for i in range(6)],
                "reference_layers": list(range(6)),
                "rows": 8,
            }
            for step in range(0, 25, 6)
        ]
        _lines(path / "track.jsonl", rows)
    return path


def _step(step: int, streams: tuple[str, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "loss": 2.5 / (1 + 0.1 * step), "tokens": 300 + step}
    for name in streams:
        row |= {f"{name}/loss": 2.5 / (1 + 0.1 * step), f"{name}/tokens": 150}
    rate = 2e-4 * min(step / 3, 1 - 0.03 * step)
    return {**row, "learning_rate": rate, "grad_norm": 3.0 + 8 / step, "clipped_share": 0.5}


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
