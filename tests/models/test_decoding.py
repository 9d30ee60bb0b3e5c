"""Rollouts of any architecture are the model's own: a cache is believed only where plain passes say the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from helpers.architectures import MODELS, VOCABULARY, build
from helpers.tiny import build_model
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import pack, scorer


def prompts() -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    lengths = (4, 19, 11)
    return [
        Encoded(str(i), tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()), "")
        for i, length in enumerate(lengths)
    ]


def greedy(model: PreTrainedModel, eos: tuple[int, ...]) -> list[Rollout]:
    sampler = TransformersSampler(model, VOCABULARY, eos)
    return sampler(prompts(), max_new_tokens=10, temperature=0.0, seeds=[1, 2, 3])


@torch.no_grad()
def own_logits(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """One plain pass over a row alone: [T, V] at the positions that predict its completion."""
    tokens = torch.tensor([[*rollout.prompt, *rollout.completion]])
    return model(input_ids=tokens, use_cache=False).logits[0, len(rollout.prompt) - 1 : -1].float()


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield build(request.param)


def test_rollouts_are_those_of_plain_passes_also_where_a_row_ends_early(
    model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    free = greedy(model, ())
    rollouts = greedy(model, (free[0].completion[3], free[1].completion[5]))
    assert min(len(r.completion) for r in rollouts) < 10
    for rollout in [*free, *rollouts]:
        logits = own_logits(model, rollout)
        chosen = logits[torch.arange(len(logits)), list(rollout.completion)]
        assert torch.allclose(chosen, logits.amax(-1), atol=1e-4)
    slow = {"RecurrentGemmaForCausalLM", "RwkvForCausalLM"}
    assert ("decoded without one" in capsys.readouterr().err) == (type(model).__name__ in slow)


@torch.no_grad()
def test_scores_are_those_of_plain_passes(model: PreTrainedModel) -> None:
    rollouts = greedy(model, ())
    parts = scorer(model)
    batch = pack([(r.prompt, r.completion) for r in rollouts], device=parts.device)
    ours = parts.head(parts.states(batch)).float()
    own = torch.cat([own_logits(model, r) for r in rollouts])
    assert torch.allclose(ours.log_softmax(-1), own.log_softmax(-1), atol=1e-4)


class _Forgetful(LlamaForCausalLM):
    """A cache of its own that no one can pass in, as custom code may have it."""

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **_: object) -> object:
        return super().forward(input_ids=input_ids, use_cache=False)


class _Smoothing(LlamaForCausalLM):
    """Rows depend on each other."""

    def forward(self, *args: object, **inputs: object) -> object:
        output = super().forward(*args, **inputs)
        output.logits = output.logits + output.logits.mean(0, keepdim=True)
        return output


def like_llama(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    plain = build_model(VOCABULARY, seed=3)
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def test_a_model_that_ignores_its_cache_is_read_anew_for_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedy(like_llama(_Forgetful), ()) == greedy(build_model(VOCABULARY, seed=3), ())
    assert "decoded without one" in capsys.readouterr().err


def test_a_model_whose_rows_see_each_other_is_refused() -> None:
    with pytest.raises(InputError, match="other logits beside other rows than alone"):
        greedy(like_llama(_Smoothing), ())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mixtral", "qwen3-next"])
def test_a_cache_is_believed_in_bfloat16_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    greedy(build(name).to(torch.bfloat16), ())
    assert "decoded without one" not in capsys.readouterr().err


def test_the_check_costs_five_short_passes_once_per_model() -> None:
    model, widths = build_model(VOCABULARY), []
    with model.register_forward_pre_hook(
        lambda _m, _a, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    ):
        greedy(model, ())
        first = len(widths)
        greedy(model, ())
    assert first - (len(widths) - first) == 5
    assert sum(widths[:5]) < 30
