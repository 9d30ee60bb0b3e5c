"""Answers from vLLM: a Sampler over its offline `LLM`, fed with the token ids that the chat template gives.

Not tested here: vLLM runs on no machine that this project is tested on. Its answers may depend on the batch, since it
composes batches by itself, and may differ from transformers' where two tokens are nearly as likely.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from remend.data.templates import Encoded
from remend.errors import FileError, InputError
from remend.models.find import ModelSource, fetch_model
from remend.models.sampling.rollout import Rollout

ROWS = 1024
"""Prompts handed over at once: it schedules them itself, and each such batch is kept when it is done."""


class VllmSampler:
    """A Sampler; `eos` are the ids that end an answer.

    Raises InputError when vLLM is not installed, or the model is no transformers directory and no hub id.
    """

    def __init__(self, source: ModelSource, *, dtype: str, eos: Sequence[int]) -> None:
        if source.kind not in ("directory", "hub"):
            raise InputError(
                f"engine vllm reads transformers directories and hub ids, and {source.spec} is a {source.kind}; "
                "use engine hf, or write the model as a directory with remend export first"
            )
        try:
            vllm = importlib.import_module("vllm")
        except ImportError:
            raise InputError("engine vllm needs the package vllm, which is not installed: pip install vllm") from None
        path = fetch_model(source, weights=True).path
        try:
            self._model = vllm.LLM(model=str(path), dtype=dtype, trust_remote_code=source.trust_remote_code)
        except Exception as error:  # it raises many kinds
            raise FileError(
                f"vllm can't load {source.spec}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
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
