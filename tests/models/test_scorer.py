"""Body and head: positions aligned with completion tokens, and heads that scale or cap their logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM

from helpers.tiny import build_model
from remend.errors import InputError
from remend.models.scorer import LEAST_OPENING, Packed, Scorer, pack, scorer

CPU = torch.device("cpu")
VOCABULARY = 64
PAIRS = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14]), ([20, 21, 22, 23, 24, 25], [26, 27, 28]), ([30, 31], [32])]
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_model(VOCABULARY)


@torch.no_grad()
def slow_states(model: Any, pairs: Any, skip: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Hidden states, logits and targets of each completion token, one unpadded sequence after the other."""
    states, logits, targets = [], [], []
    for prompt, completion in pairs:
        tokens = torch.tensor([[*prompt, *completion]])
        hidden = model.base_model(input_ids=tokens).last_hidden_state[0]
        own = model(input_ids=tokens).logits[0]
        for t, token in enumerate(completion):
            if t >= skip:
                states.append(hidden[len(prompt) + t - 1])
                logits.append(own[len(prompt) + t - 1])
                targets.append(token)
    return torch.stack(states), torch.stack(logits), targets


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_packed_states_equal_those_of_single_sequences(model: LlamaForCausalLM, skip: int) -> None:
    parts = scorer(model)
    batch = pack(PAIRS, device=CPU, skip_first=skip)
    states, logits, targets = slow_states(model, PAIRS, skip)
    with torch.no_grad():
        ours = batch.gather(parts.hidden(batch.tokens_BT))
        torch.testing.assert_close(ours, states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts.head(ours), logits, rtol=1e-4, atol=1e-4)
    assert batch.targets_N.tolist() == targets
    assert batch.rows_N.tolist() == [row for row, (_, c) in enumerate(PAIRS) for _ in c[skip:]]
    assert len(targets) == sum(max(0, len(c) - skip) for _, c in PAIRS)


def test_other_prompts_keep_the_same_completion_tokens_in_order(model: LlamaForCausalLM) -> None:
    """How a teacher that sees a longer prompt is aligned with the student."""
    longer = [([*range(40, 40 + 3 * (i % 2)), *prompt], completion) for i, (prompt, completion) in enumerate(PAIRS)]
    student, teacher = (pack(pairs, device=CPU) for pairs in (PAIRS, longer))
    assert torch.equal(student.targets_N, teacher.targets_N)
    assert torch.equal(student.rows_N, teacher.rows_N)
    with torch.no_grad():
        ours = teacher.gather(scorer(model).hidden(teacher.tokens_BT))
    torch.testing.assert_close(ours, slow_states(model, longer)[0], rtol=1e-4, atol=1e-5)


def test_the_layout_of_a_batch() -> None:
    batch = pack([([1, 2], [3, 4]), ([5], [6])], device=CPU)
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.columns_N.tolist() == [1, 2, 0]
    assert all(x.dtype == torch.int64 for x in (batch.tokens_BT, batch.rows_N, batch.columns_N, batch.targets_N))


def test_pack_refuses_an_empty_prompt() -> None:
    with pytest.raises(InputError, match="a prompt has no tokens"):
        pack([([1], [2]), ([], [3])], device=CPU)


def test_the_head_keeps_the_shared_ids_only(model: LlamaForCausalLM) -> None:
    states, logits, _ = slow_states(model, PAIRS)
    torch.testing.assert_close(scorer(model, 10).head(states), logits[:, :10], rtol=1e-4, atol=1e-5)
    assert scorer(model, 10**6).head(states).shape == logits.shape
    assert scorer(model, 10).shared == 10


def test_the_head_is_the_models_own_parameter() -> None:
    tied, untied = build_model(VOCABULARY), build_model(VOCABULARY, tied=False)
    assert scorer(tied).head.weight_VD is tied.model.embed_tokens.weight
    assert scorer(untied).head.weight_VD is untied.lm_head.weight
    assert scorer(untied).head.bias_V is None


def test_a_bias_of_the_head_is_applied() -> None:
    model = build_model(VOCABULARY, tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    parts = scorer(model, 20)
    states, logits, _ = slow_states(model, PAIRS)
    torch.testing.assert_close(parts.head(states), logits[:, :20], rtol=1e-4, atol=1e-4)
    assert parts.head.bias_V is not None
    assert parts.head.bias_V.shape == (20,)


def special_models() -> dict[str, Any]:
    torch.manual_seed(0)
    gemma = transformers.Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0, sliding_window=64)
    return {
        "gemma2": transformers.Gemma2ForCausalLM(gemma).eval(),
        "granite": transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=8.0)).eval(),
        "cohere": transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.0625)).eval(),
    }


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_scaled_and_capped_logits_are_repeated(name: str) -> None:
    model = special_models()[name]
    parts = scorer(model)
    states, logits, _ = slow_states(model, PAIRS)
    torch.testing.assert_close(parts.head(states), logits, rtol=1e-4, atol=1e-5)
    plain = states @ model.get_output_embeddings().weight.T
    assert float((plain - logits).detach().abs().max()) > 0.1  # the model does change its logits
    assert parts.softcap == (2.0 if name == "gemma2" else None)


class Shifted(LlamaForCausalLM):
    """Changes its logits in a way that no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-1, 1, output.logits.shape[-1])
        return output


def test_unknown_treatment_of_logits_is_refused() -> None:
    torch.manual_seed(0)
    model = Shifted(build_model(VOCABULARY).config).eval()
    with pytest.raises(InputError, match="Shifted computes its logits in a way that remend does not know"):
        scorer(model)


def test_a_head_of_another_width_is_refused_by_name() -> None:
    """ELECTRA's states become narrower between body and head."""
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ElectraConfig(**sizes, hidden_size=32, intermediate_size=32, is_decoder=True)
    with pytest.raises(InputError, match=r"ElectraForCausalLM computes .* states of width 32, and its head.* 64 x 16"):
        scorer(transformers.ElectraForCausalLM(config).eval())


def test_a_model_without_a_head_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="LlamaModel has no output embedding"):
        scorer(model.model)


def test_gradients_reach_body_and_head() -> None:
    model = build_model(VOCABULARY, tied=False)
    parts: Scorer = scorer(model)
    batch = pack(PAIRS, device=CPU)
    parts.head(batch.gather(parts.hidden(batch.tokens_BT))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_checkpointing_gives_the_same_gradients_and_leaves_no_trace() -> None:
    """Recomputed layers: equal loss and gradients, fewer saved tensors, and the model stays in evaluation mode."""
    pairs = [([1, 2, 3], [4, 5, 6, 7]), ([8, 9], [10, 11])]
    batch = pack(pairs, device=torch.device("cpu"))
    results = []
    for checkpointing in (False, True):
        model = build_model(VOCABULARY)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5  # in training mode this would change everything
        parts, saved = scorer(model, checkpointing=checkpointing), 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = parts.head(batch.gather(parts.hidden(batch.tokens_BT))).square().sum()
        loss.backward()
        assert not any(m.training for m in model.modules())
        results.append((loss.detach(), saved, {n: p.grad for n, p in model.named_parameters()}))
    (plain, many, gradients), (recomputed, few, same) = results
    torch.testing.assert_close(plain, recomputed)
    assert few < many / 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same[name], rtol=1e-5, atol=1e-6)


def _batch_with_one_opening(tokens: int) -> Packed:
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=generator).tolist()

    opening = draw(tokens)
    return pack([([*opening, *draw(n)], draw(m)) for n, m in ((3, 9), (1, 4), (5, 7))], device=CPU)


def test_what_all_rows_open_with_is_run_once_with_the_same_states_and_gradients() -> None:
    model = build_model(VOCABULARY).double()
    parts, batch = scorer(model), _batch_with_one_opening(11)
    assert parts.prefixes
    found = []
    for each in (parts, replace(parts, prefixes=False)):
        seen: list[int] = []
        hook = model.base_model.register_forward_pre_hook(
            lambda _m, _a, given, seen=seen: seen.append(given["input_ids"].numel()), with_kwargs=True
        )
        states_ND = each.states(batch)
        hook.remove()
        model.zero_grad()
        states_ND.square().sum().backward()
        found.append(
            (states_ND.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(seen))
        )
    (ours, our_grads, our_tokens), (whole, whole_grads, whole_tokens) = found
    assert whole_tokens - our_tokens == 2 * 11
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-9)
    for a, b in zip(our_grads, whole_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tokens", [0, LEAST_OPENING - 1])
def test_a_short_opening_is_run_with_the_rows(tokens: int) -> None:
    model = build_model(VOCABULARY)
    calls: list[int] = []
    parts, batch = scorer(model), _batch_with_one_opening(tokens)
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    parts.states(batch)
    assert len(calls) == 1


def test_an_opening_ends_before_the_first_position_that_is_asked_for() -> None:
    rows = [
        ([7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22]),
        ([7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 23]),
    ]
    parts, batch = scorer(build_model(VOCABULARY).double()), pack(rows, device=CPU)
    whole_ND = batch.gather(parts.hidden(batch.tokens_BT))
    torch.testing.assert_close(parts.states(batch), whole_ND, rtol=1e-9, atol=1e-9)


def test_layers_that_see_a_window_only_run_whole_rows() -> None:
    models = special_models()
    assert not scorer(models["gemma2"]).prefixes
    assert scorer(models["granite"]).prefixes
    assert scorer(models["cohere"]).prefixes


def test_what_a_model_does_in_front_of_its_head_is_in_the_states() -> None:
    """ModernBERT's decoder has a layer and a norm there. Gradients reach them."""
    config = transformers.ModernBertDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    torch.manual_seed(0)
    model: Any = transformers.ModernBertDecoderForCausalLM(config).eval()
    parts, batch = scorer(model), pack([((5, 6, 7), (8, 9)), ((5, 4), (3,))], device=torch.device("cpu"))
    logits_NV = parts.head(parts.states(batch))
    whole = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits[0, 2:4]
    assert torch.allclose(logits_NV[:2], whole, atol=1e-5)
    logits_NV.sum().backward()
    assert bool(model.lm_head.dense.weight.grad.any())
