"""Rollouts of any architecture are the model's own: a cache is believed only where plain passes say the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
    PreTrainedModel,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
)

from helpers.architectures import MODELS, VOCABULARY, build
from helpers.tiny import build_model
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.models.sampling.rollout import Rollout
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import pack, scorer

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


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


def test_the_check_costs_seven_short_passes_once_per_model() -> None:
    model, widths = build_model(VOCABULARY), []
    with model.register_forward_pre_hook(
        lambda _m, _a, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    ):
        greedy(model, ())
        first = len(widths)
        greedy(model, ())
    assert first - (len(widths) - first) == 7
    assert sum(widths[:7]) < 50


READERS = {
    "xlnet": (XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64), "give a model"),
    "bert": (BertConfig(**SMALL), 'set "is_decoder": true'),
    "xlm": (XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=2), 'set "causal": true'),
}


@pytest.mark.parametrize("name", READERS)
def test_a_model_that_reads_ahead_is_refused_by_name_before_it_is_scored_or_sampled(name: str) -> None:
    config, way = READERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for ask in (scorer, lambda model: greedy(model, ())):
        with pytest.raises(InputError, match=f"reads ahead: its logits change with later tokens .*{way}"):
            ask(model)


def test_a_model_whose_mask_sees_earlier_tokens_alone_is_taken() -> None:
    """XLM's own code states by an assertion that it takes no cache of ours."""
    torch.manual_seed(0)
    config = XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=2, causal=True)
    rollouts = greedy(XLMWithLMHeadModel(config).eval(), ())
    assert all(len(r.completion) == 10 for r in rollouts)


class _ReadsPadding(LlamaForCausalLM):
    """Right for rows of one length; padding changes what stands before it."""

    def forward(self, input_ids: Tensor, **inputs: object) -> object:
        output = super().forward(input_ids=input_ids, **inputs)
        padded_B = (input_ids[:, -1] == 0) & (len(input_ids) > 1)
        output.logits = output.logits + padded_B[:, None, None]
        output.logits[padded_B, :, 3] += 5
        return output


def test_a_padded_row_is_compared_with_the_row_alone() -> None:
    with pytest.raises(InputError, match="reads ahead"):
        scorer(like_llama(_ReadsPadding))


def test_a_window_shorter_than_the_rows_is_tried_once_rows_leave_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Moshi's cache gives other logits beyond its window."""
    torch.manual_seed(0)
    config = MoshiConfig(**SMALL, audio_vocab_size=8, sliding_window=12, head_dim=16, initializer_range=0.3)
    model = MoshiForCausalLM(config).eval()
    short = [Encoded("a", (3, 4, 5), "")]
    TransformersSampler(model, 64, ())(short, max_new_tokens=9, temperature=0.0, seeds=[1])
    assert "decoded without one" not in capsys.readouterr().err
    for rollout in greedy(model, ()):
        assert torch.equal(own_logits(model, rollout).argmax(-1), torch.tensor(rollout.completion))
    assert "other logits than a plain pass in rows of 15 tokens" in capsys.readouterr().err
