"""A model that learned a task and forgot to talk: two streams against three baselines.

Prints the table of docs/measurements/streams.md.

python benchmarks/forgetting.py --out runs/forgetting [--steps 24] [--task tooluse-short] [--rows 128]

SmolLM2 is fine-tuned on a short task until it has forgotten; then:

    two streams      recover (reference as teacher, general prompts) and keep (the student as it came in, task prompts)
    recovery alone   the first of the two, with all rows of a step
    off-policy       both streams on their teachers' completions
    SFT on a mix     cross-entropy on the reference's answers to general prompts and on the task's demonstrations

The second stream has weight 2. The two streams take --steps steps of 10 rows; each baseline as many of them as come
within a step of the same number of trained tokens. How long its completions are is known when it has run: it runs again
where it was further off. The general answers of the mix end at the 48 tokens where the rollouts of the streams do, and
with the end token that fine-tuning puts behind every answer: that baseline also learns to stop early.

The task score is the share of held-out rows that greedy answers solve, the KL that to the base on the bundled held-out
prompts. Intervals (95%) are paired: over the task's rows, and over the general prompts. Results are kept in
results.json; what is there is not run again. Runs on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from remend.data import tasks
from remend.data.examples import load_examples
from remend.data.order import Order
from remend.data.templates import encode
from remend.files.atomic import json_line, write_json, write_text
from remend.files.reading import read_object
from remend.files.run_directory import METRICS, SUMMARY, RunDirectory
from remend.maths.gap import bootstrap_gap_closed
from remend.maths.paired import gap_closed, paired_bootstrap
from remend.models.device import choose_device
from remend.models.find import find_model
from remend.models.load import eos_ids, load_model, load_tokenizer
from remend.models.sampling.answers import answer, answered_once
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import scorer
from remend.studies.demo import write_prompts
from remend.training.measure import compare, pool
from remend.training.teachers.frozen import Frozen

MODEL, ROWS, GENERAL_TOKENS, TOKENS, SEED = "smollm2", 128, 48, 96, 0
GENERAL, TASK = 6, 4
"""Prompts a step of each kind."""
KEEP = 2
"""Weight of the stream that holds the task. With 1, three of 64 rows were lost; 2 was tried on rows of another seed."""
FINE_TUNING = ("--steps", "40", "--batch-size", "8", "--learning-rate", "2e-4")
RATE = "1e-4"
TRIES = 3
"""Runs of a baseline until its trained tokens are as near to the two streams' as whole steps allow."""
FORGOTTEN, KEPT, CLOSED = 0.3, 0.95, 0.80
"""What is asked for: KL of the fine-tuned model, share of the task gain kept, share of the general gap closed."""
TWO = "two streams"


def remend(*words: str) -> None:
    """Run the command line. Stops the benchmark when it fails."""
    subprocess.run([sys.executable, "-m", "remend", *words], check=True)


def load(spec: str) -> Any:
    """A model in float32 on the CPU, or the GPU where there is one."""
    return load_model(find_model(spec), dtype=torch.float32, device=choose_device("auto"))


class Measure:
    """Task score and general KL of one model after another, on the same rows and reference answers."""

    def __init__(self, folder: Path, task: str, rows: int) -> None:
        self.folder, self.task, self.rows = folder, tasks.get(task), tasks.get(task).rows("held_out", rows, SEED)
        self.tokenizer, self.reference = load_tokenizer(find_model(MODEL)), load(MODEL)
        self.completions = self.answers(self.reference, load_examples(str(folder / "held_out.jsonl")), GENERAL_TOKENS)

    def answers(self, model: Any, examples: list[Any], tokens: int) -> list[Rollout]:
        """Greedy answers, all rows at once."""
        prompts, ends = [encode(self.tokenizer, e) for e in examples], eos_ids(model, self.tokenizer)
        sampler = TransformersSampler(model, len(self.tokenizer), ends, max_rows=len(prompts))
        return sampler(prompts, max_new_tokens=tokens, temperature=0.0, seeds=[0] * len(prompts))

    def general_answers(self) -> dict[str, str]:
        """The reference's answer to every general training prompt, by id; sampled once."""
        prompts = [encode(self.tokenizer, e) for e in load_examples(str(self.folder / "train.jsonl"))]

        def write() -> list[Rollout]:
            title = "the reference answers the general prompts"
            return answer(self.reference, self.tokenizer, prompts, title, max_new_tokens=GENERAL_TOKENS)

        found = answered_once(RunDirectory(self.folder), "general_answers.jsonl", prompts, self.tokenizer, write)
        return {r.id: self.tokenizer.decode(r.completion, skip_special_tokens=True) for r in found}

    def __call__(self, spec: str) -> dict[str, Any]:
        """The two figures, with each row's grade and each prompt's KL."""
        model = load(spec)
        said = self.answers(model, load_examples(str(self.folder / "task_held_out.jsonl")), TOKENS)
        texts = [self.tokenizer.decode(r.completion, skip_special_tokens=True) for r in said]
        found = tasks.score(self.task, self.rows, texts, mode="paper")
        sums = compare(scorer(model), Frozen(scorer(self.reference)), self.completions)
        graded = {"score": found["score"], "n": found["n"], "items": found["items"]}
        return {**graded, "kl": pool(sums)["kl"], "kl_sums": [row.kl for row in sums]}


def streams(*names: str, **common: Any) -> str:
    """The recipe's streams as YAML on one line."""
    both = {
        "recover": {"data": "{folder}/train.jsonl", "eval_data": "{folder}/held_out.jsonl", "share": GENERAL},
        "keep": {
            "data": "{folder}/task_train.jsonl",
            "eval_data": "{folder}/task_held_out.jsonl",
            "teacher": "initial",
            "share": TASK,
            "weight": KEEP,
        },
    }
    return json.dumps({name: {**both[name], **common} for name in names})


def recover(folder: Path, name: str, given: str, steps: int) -> None:
    """One recovery by streams."""
    words = [f"student={folder / 'sft'}", f"teacher={MODEL}", f"out={folder / name}", f"steps={steps}"]
    words += [
        f"batch_size={GENERAL + TASK}",
        f"learning_rate={RATE}",
        "save_every=0",
        "updates_per_rollout=1",
        f"seed={SEED}",
    ]
    remend("recover", *words, "streams=" + given.replace("{folder}", str(folder)))


def sft_on_mix(folder: Path, steps: int, measure: Measure) -> None:
    """Go on fine-tuning on the reference's answers and the task's demonstrations, in the streams' proportion."""
    general, task = (Order(load_examples(str(folder / f)), SEED) for f in ("train.jsonl", "task_train.jsonl"))
    said = measure.general_answers()
    rows = [{"prompt": e.prompt, "completion": said[e.id]} for _, e in general.take(0, steps * GENERAL)]
    rows += [{"prompt": e.prompt, "completion": e.row["demonstration"]} for _, e in task.take(0, steps * TASK)]
    write_text(folder / "mix.jsonl", "".join(map(json_line, rows)))
    words = ["--steps", str(steps), "--batch-size", str(GENERAL + TASK), "--learning-rate", RATE, "--seed", str(SEED)]
    source = str(folder / "sft")
    remend("degrade", "finetune", source, "--data", str(folder / "mix.jsonl"), "--out", str(folder / "mix"), *words)


def trained(folder: Path) -> tuple[int, int]:
    """Steps and tokens of a run or a fine-tuning."""
    tokens: list[int] = [row["tokens"] for row in RunDirectory(folder).rows(METRICS) if "loss" in row]
    return len(tokens), sum(tokens)


def steps_alone(both: Path, budget: int) -> int:
    """About so many steps of the recovery stream alone, by how long its completions were beside the other."""
    rows = [row for row in RunDirectory(both).rows(METRICS) if "recover/tokens" in row]
    mean = sum(row["recover/tokens"] for row in rows) / (len(rows) * GENERAL)
    return max(1, round(float(budget / (mean * (GENERAL + TASK)))))


def whole(folder: Path) -> bool:
    """Whether a run or a fine-tuning came to its end."""
    return (folder / SUMMARY).is_file() or (folder / "degradation.json").is_file()


def to_budget(folder: Path, steps: int, budget: int | None, make: Callable[[int], None]) -> None:
    """Run `make(steps)`, and again while more than one step more or fewer would be nearer to the budget of tokens."""
    for number in range(TRIES):
        if not whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            make(steps)
        done, tokens = trained(folder)
        steps = max(1, round(done * budget / tokens)) if budget else done
        if abs(steps - done) <= 1 or number == TRIES - 1:
            return
        print(f"{folder.name}: {tokens} tokens in {done} steps; {budget} are wanted, so {steps} steps", flush=True)
        shutil.rmtree(folder)


def prepare(folder: Path, task: str, rows: int, prompts: int | None) -> None:
    """Prompts, task rows and the student that forgot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder, prompts)
    for split, n in (("train", 320), ("held_out", rows)):
        target = folder / f"task_{split}.jsonl"
        if not target.exists():
            remend("tasks", "write", task, "--split", split, "--n", str(n), "--out", str(target), "--seed", str(SEED))
    if not (folder / "sft" / "degradation.json").exists():
        data = str(folder / "task_train.jsonl")
        remend("degrade", "finetune", MODEL, "--data", data, "--out", str(folder / "sft"), *FINE_TUNING)


def right(result: Mapping[str, Any]) -> list[float]:
    """1 or 0 for each of the task's rows."""
    return [float(item["correct"]) for item in result["items"]]


def spread(interval: tuple[float, float] | None, form: str) -> str:
    """An interval in words."""
    return "–" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def table(results: Mapping[str, Any]) -> str:
    """The page's table."""
    base, sft = results["base"], results["fine-tuned"]
    heads = ("model", "task score", "task gain kept (95%)", "general KL", "gap closed (95%)", "steps", "trained tokens")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, r in results.items():
        kept_of = gap_closed(right(sft), right(base), right(r), SEED)
        gain = kept_share(results, name)
        gap = f"{1 - r['kl'] / sft['kl']:.2f} ({spread(bootstrap_gap_closed(sft['kl_sums'], r['kl_sums']), '.2f')})"
        cells = (
            name,
            f"{r['score']:.1%} of {r['n']}",
            f"{'–' if gain is None else format(gain, '.0%')} ({spread(kept_of.interval, '.0%')})",
            f"{r['kl']:.3f}",
            gap,
            str(r.get("steps", "–")),
            str(r.get("tokens", "–")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept_share(results: Mapping[str, Any], name: str) -> float | None:
    """Of the task score that fine-tuning won; None where it won nothing."""
    won = results["fine-tuned"]["score"] - results["base"]["score"]
    return (results[name]["score"] - results["base"]["score"]) / won if won > 0 else None


def verdicts(results: Mapping[str, Any]) -> str:
    """What was asked for and came, and which baseline beats the two streams in what."""
    sft, two = results["fine-tuned"], results[TWO]
    share, gap = kept_share(results, TWO), 1 - two["kl"] / sft["kl"]
    said = "of the task gain kept" if share is not None else "of the task gain kept (there was no gain)"
    asked = (
        (sft["kl"] > FORGOTTEN, f"fine-tuned KL > {FORGOTTEN}: {sft['kl']:.3f}"),
        ((share or 0) >= KEPT, f">= {KEPT:.0%} {said}: {share or 0:.1%}"),
        (gap >= CLOSED, f">= {CLOSED:.0%} of the general gap closed: {gap:.1%}"),
    )
    lines = [f"{'PASS' if met else 'FAIL'}  {what}" for met, what in asked]
    lost = paired_bootstrap(right(sft), right(two), SEED)
    lines.append(
        f"task score of the two streams − fine-tuned: {two['score'] - sft['score']:+.1%} ({spread(lost, '+.1%')})"
    )
    for name in list(results)[list(results).index(TWO) + 1 :]:
        r, better = results[name], []
        score, kl = two["score"] - r["score"], two["kl"] / r["kl"]
        if score < 0:
            better.append("the task score")
        if kl > 1:
            better.append("the general KL")
        beats = f"beats the two streams on {' and '.join(better)}" if better else "beats the two streams on neither"
        scores = spread(paired_bootstrap(right(r), right(two), SEED), "+.1%")
        lower = bootstrap_gap_closed(r["kl_sums"], two["kl_sums"], seed=SEED)
        ratio = spread(lower and (1 - lower[1], 1 - lower[0]), ".2f")
        lines.append(f"{name}: {beats}. Two streams − it: task score {score:+.1%} ({scores})")
        lines[-1] += f"; two streams over it: general KL {kl:.2f} ({ratio})"
    return "\n".join(lines)


def methods(folder: Path, measure: Measure) -> dict[str, tuple[str, Callable[[int], None]]]:
    """Directory and maker of what is trained, by name; the two streams first: they set the budget."""
    both = ("recover", "keep")
    return {
        TWO: ("both", lambda n: recover(folder, "both", streams(*both), n)),
        "recovery stream alone": ("alone", lambda n: recover(folder, "alone", streams("recover"), n)),
        "off-policy, both streams": ("off", lambda n: recover(folder, "off", streams(*both, policy="off"), n)),
        "SFT on a mix": ("mix", lambda n: sft_on_mix(folder, n, measure)),
    }


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--task", default="tooluse-short")
    parser.add_argument("--steps", type=int, default=24, help="of the two streams")
    parser.add_argument("--rows", type=int, default=ROWS, help="held-out rows of the task")
    parser.add_argument("--prompts", type=int, help="at most so many general prompts for training, and for measuring")
    arguments = parser.parse_args()
    folder, path = arguments.out, arguments.out / "results.json"
    prepare(folder, arguments.task, arguments.rows, arguments.prompts)
    measure = Measure(folder, arguments.task, arguments.rows)
    results: dict[str, Any] = read_object(path) if path.exists() else {}
    other = next((n for n, r in results.items() if r["n"] != arguments.rows or "kl_sums" not in r), None)
    if other:
        sys.exit(f'{path} holds "{other}" of {results[other]["n"]} rows, made otherwise; give another --out')

    def note(name: str, spec: str, place: str) -> None:
        results[name] = measure(spec)
        if place:
            results[name] |= dict(zip(("steps", "tokens"), trained(folder / place), strict=True))
        write_json(path, results)

    for name, spec, place in (("base", MODEL, ""), ("fine-tuned", str(folder / "sft"), "sft")):
        if name not in results:
            note(name, spec, place)
    for name, (place, make) in methods(folder, measure).items():
        if name in results:
            continue
        budget = results[TWO]["tokens"] if name != TWO else None
        first = steps_alone(folder / "both", budget) if budget and place == "alone" else arguments.steps
        to_budget(folder / place, first, budget, make)
        model = folder / place / "model"
        note(name, str(model if model.is_dir() else folder / place), place)
        print(table(results), flush=True)
    print(table(results) + "\n\n" + verdicts(results))


if __name__ == "__main__":
    main()
