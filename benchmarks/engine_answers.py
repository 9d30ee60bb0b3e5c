"""What vLLM answers, in a process and an environment of its own: benchmarks/engines.py runs it. One engine a process.

python benchmarks/engine_answers.py MODEL DTYPE REQUEST.json RESULT.json

REQUEST: `prompts` (ids), `answers` (ids, another engine's), `tokens` (how many) and `ends` (ids that end an answer).
RESULT: `answers` (vLLM's own, greedy), and `log_p` of the given answers' tokens under vLLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """See the module."""
    import vllm

    model, dtype, asked, result = sys.argv[1:]
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    engine = vllm.LLM(model=model, dtype=dtype, enforce_eager=True, max_model_len=1024)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=request["tokens"], stop_token_ids=request["ends"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    answers = [list(output.outputs[0].token_ids) for output in engine.generate(prompts, greedy, use_tqdm=False)]
    given = zip(request["prompts"], request["answers"], strict=True)
    whole = [{"prompt_token_ids": prompt + answer} for prompt, answer in given]
    scored = engine.generate(whole, vllm.SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    log_p = []
    for output, answer in zip(scored, request["answers"], strict=True):
        rows = output.prompt_logprobs[-len(answer) :]
        log_p.append([row[token].logprob for row, token in zip(rows, answer, strict=True)])
    Path(result).write_text(json.dumps({"answers": answers, "log_p": log_p}), encoding="utf-8")


if __name__ == "__main__":
    main()
