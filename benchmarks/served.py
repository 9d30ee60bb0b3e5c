"""How far is a served model from the measured one? llama.cpp's answers beside transformers', by type of GGUF.

    python benchmarks/served.py [--types f32,q8_0,…] [--tokens 40] [--out DIR]          (needs pip install xllamacpp)

The weights are equal bit for bit, but llama.cpp multiplies packed weights with activations that it rounds to 8 bits,
and keeps keys and values in float16. SmolLM2 is put on each type's grid and exported; transformers (float32)
answers five prompts greedily, and llama.cpp answers them too and is asked, along transformers' answers, for its
log-probabilities. One thread each.

Printed: prompts whose ids and answers are equal, how often llama.cpp's first choice is transformers' next token, and
|Δ log p| of those tokens, mean and largest (of tokens among llama.cpp's first hundred).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.llama_cpp import LlamaCpp

TYPES = ("f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4")
PROMPTS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "How many days has a week?",
    "List two reasons to read:\n\n1. It is calm.",
)
CHOICES = 100


def remend(*words: str) -> None:
    """Run remend's command line."""
    done = subprocess.run([sys.executable, "-m", "remend", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"remend {' '.join(words)}:\n{done.stdout.decode()[-2000:]}")


def compare(source: Path, file: Path, tokens: int) -> str:
    """The figures of one file, as a row of a table."""
    tokenizer, engine = AutoTokenizer.from_pretrained(source), LlamaCpp(file, context=512)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    ids_equal = answers_equal = first = 0
    gaps: list[float] = []
    total = 0
    for prompt in PROMPTS:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids_equal += engine.tokens(text) == ids
        with torch.no_grad():
            whole = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
            log_p_TV = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        answer = whole[0, len(ids) :].tolist()
        greedy = {"n_predict": len(answer), "temperature": 0.0, "return_tokens": True, "cache_prompt": True}
        answers_equal += engine.ask("completion", prompt=ids, **greedy)["tokens"] == answer
        for at, token in enumerate(answer):
            one = {**greedy, "n_predict": 1, "n_probs": CHOICES}
            choices = engine.ask("completion", prompt=ids + answer[:at], **one)["completion_probabilities"][0]
            by_id = {choice["id"]: choice["logprob"] for choice in choices["top_logprobs"]}
            total, first = total + 1, first + (choices["top_logprobs"][0]["id"] == token)
            if token in by_id:
                gaps.append(abs(by_id[token] - float(log_p_TV[at, token])))
    count = len(PROMPTS)
    return (
        f"{ids_equal} of {count} | {answers_equal} of {count} | {first / total:.1%} | "
        f"{sum(gaps) / len(gaps):.4f} | {max(gaps):.3f} |"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        out = chosen.out or Path(temporary)
        print("| type | equal ids | equal answers | same first choice | mean ∣Δ log p∣ | largest |")
        print("| --- | --- | --- | --- | --- | --- |")
        if not (out / "smollm2").is_dir():
            remend("export", "smollm2", "--format", "dense", "--out", str(out / "smollm2"))
        for kind in chosen.types.split(","):
            source = out / "smollm2"
            if kind != "f32":
                source = out / kind
                if not source.is_dir():
                    made = ("--format", f"gguf:{kind}", "--no-probe", "--out", str(source))
                    remend("degrade", "quantize", str(out / "smollm2"), *made)
            if not (out / f"{kind}-gguf").is_dir():
                remend("export", str(source), "--format", f"gguf:{kind}", "--out", str(out / f"{kind}-gguf"))
            print(f"| {kind} | {compare(source, out / f'{kind}-gguf' / 'model.gguf', chosen.tokens)}", flush=True)


if __name__ == "__main__":
    main()
