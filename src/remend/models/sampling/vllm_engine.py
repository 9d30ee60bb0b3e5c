"""Answers from vLLM: a Sampler over its offline `LLM`, fed with the token ids that the chat template gives.

`make test-engines` runs it with the real engine, on a CPU. Its answers may depend on the batch, since it composes
batches by itself, and may differ from transformers' where two tokens are nearly as likely.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

from remend.data.templates import Encoded
from remend.errors import FileError, InputError
from remend.models.find import ModelSource, fetch_model
from remend.models.sampling.rollout import Rollout

ROWS = 1024
"""Prompts handed over at once: it schedules them itself, and each such batch is kept when it is done."""

LONG = 200_000
"""Tokens of all answers from which on the engine compiles the model first. That takes a minute or more, in which it
gives tens of thousands of tokens without."""


class VllmSampler:
    """A Sampler; `eos` are the ids that end an answer, and `tokens` is how many all answers have at most.

    Raises InputError when vLLM is not installed, or the model is no transformers directory and no hub id, and FileError
    with the engine's own message where it can't load the model.
    """

    def __init__(self, source: ModelSource, *, dtype: str, eos: Sequence[int], tokens: int) -> None:
        if source.kind not in ("directory", "hub"):
            raise InputError(
                f"engine vllm reads transformers directories and hub ids, and {source.spec} is a {source.kind}; "
                "use engine hf, or write the model as a directory with remend export first"
            )
        # in a process of its own the engine would only say that it ended, not why
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            vllm = importlib.import_module("vllm")
        except ImportError:
            raise InputError("engine vllm needs the package vllm, which is not installed: pip install vllm") from None
        path = fetch_model(source, weights=True).path
        try:
            trust, eager = source.trust_remote_code, tokens < LONG
            self._model = vllm.LLM(model=str(path), dtype=dtype, trust_remote_code=trust, enforce_eager=eager)
        except Exception as error:  # it raises many kinds
            raise FileError(f"vllm can't load {source.spec}: {engine_message(error)}") from error
        self._parameters, self._eos = vllm.SamplingParams, list(eos)

    def __call__(
        self, prompts: Sequence[Encoded], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Rollout]:
        shared = {"temperature": temperature, "top_p": 1.0, "max_tokens": max_new_tokens, "stop_token_ids": self._eos}
        each = [self._parameters(seed=seed, **shared) for seed in seeds]
        asked = [{"prompt_token_ids": list(prompt.tokens)} for prompt in prompts]
        rollouts = []
        for prompt, output in zip(prompts, self._model.generate(asked, each, use_tqdm=False), strict=True):
            first = output.outputs[0]
            clipped = first.finish_reason == "length"
            rollouts.append(Rollout(prompt.id, prompt.tokens, tuple(first.token_ids), clipped))
        return rollouts


def engine_message(error: BaseException) -> str:
    """What an engine's error says, and the first one that led to it, on one line."""
    said = [error]
    while cause := said[-1].__cause__ or said[-1].__context__:
        said.append(cause)
    lines = [f"{type(one).__name__}: {' '.join(str(one).split())[:600]}" for one in (said[0], said[-1])]
    return " because of ".join(dict.fromkeys(lines))
