"""The walk on models as they differ: it sees what their own passes multiply, or says why it can't be sure."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from helpers.random_text import random_text
from helpers.tiny import build_model, build_tokenizer
from helpers.watching import architecture, watched
from remend.data.templates import Encoded
from remend.errors import InputError
from remend.models.activations.walk import Sites, block_states, check_walk, walk
from remend.models.activations.walkable import seen_of_skeleton
from remend.models.matrices import matrices
from remend.models.sampling.rollout import Rollout

TEXT = random_text()[:6]
"""Of unequal lengths, so that batches are padded."""

WAYS = {
    "gpt2": "Conv1D, blocks called by position",
    "falcon": "blocks that give tuples, what a child gave changed in place",
    "falcon-alibi": "the same with alibi",
    "bloom": "alibi by position",
    "gptj": "blocks that give tuples, attention beside the MLP",
    "opt": "an MLP that sees [tokens, width]",
    "opt-proj": "layers before the first block and after the last",
    "deepseek-dense": "a layer that sees [batch, 1, time, width]",
    "deepseek-v3": "experts with shared ones",
    "qwen2-moe": "shared experts behind a gate, [tokens, width]",
    "mixtral": "experts",
    "gpt-oss": "experts that are stored transposed, with biases",
    "jamba": "layers that see some positions by another way than their module",
    "gemma3-mm": "a tower beside the decoder",
}


def visited(model: Any, text: list[Rollout], **more: Any) -> dict[str, Sites]:
    """The sites of each matrix. Every matrix is visited once."""
    seen: dict[str, Sites] = {}

    def visit(sites: Sites) -> None:
        for matrix in sites.matrices:
            assert matrix.name not in seen
            seen[matrix.name] = sites

    walk(model, text, visit, **more)
    assert seen.keys() == matrices(model).keys()
    return seen


@pytest.mark.parametrize("name", list(WAYS))
def test_the_walk_sees_what_the_models_own_passes_multiply(name: str) -> None:
    model = architecture(name)
    seen, own = visited(model, TEXT), watched(model, TEXT)
    assert own.grams
    for matrix, sites in seen.items():
        assert sites.rows == own.rows.get(matrix, 0) or name == "jamba", matrix
        if sites.rows:
            assert float((sites.gram_II - own.grams[matrix]).norm() / own.grams[matrix].norm()) < 1e-4, matrix
        else:
            assert not sites.gram_II.any(), matrix


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen2-moe", "deepseek-v2", "opt", "falcon"])
def test_with_itself_as_teacher_each_matrix_ought_to_give_what_it_gives(name: str) -> None:
    """Σ y xᵀ = W Σ x xᵀ, for experts too."""
    model = architecture(name)
    for sites in visited(model, TEXT, teacher=copy.deepcopy(model)).values():
        for matrix, cross_OI in zip(sites.matrices, sites.cross_OI or (), strict=True):
            assert cross_OI is not None, matrix.name
            assert torch.allclose(cross_OI, matrix.weight_OI @ sites.gram_II, rtol=1e-3, atol=1e-2), matrix.name


def test_an_experts_second_matrix_sees_what_the_changed_first_gives() -> None:
    model, seen = architecture("mixtral"), {}

    def visit(sites: Sites) -> None:
        (matrix,) = sites.matrices[:1]
        seen[matrix.name] = sites.gram_II
        if "gate_up_proj" in matrix.name:
            matrix.weight_OI.zero_()

    walk(model, TEXT, visit)
    down = [gram_II for name, gram_II in seen.items() if "down_proj" in name]
    assert len(down) == 3 * 4
    assert not any(gram_II.any() for gram_II in down)


def test_an_expert_that_no_token_reaches_is_visited_with_no_rows() -> None:
    model = architecture("gpt-oss")
    for layer in model.model.layers:
        layer.mlp.router.bias[2] = -1e4
    for name, sites in visited(model, TEXT, teacher=copy.deepcopy(model)).items():
        unreached = name.endswith("proj.2")
        assert (sites.rows == 0) == unreached, name
        if unreached:
            assert sites.gram_II.shape == 2 * (sites.matrices[0].in_features,)
            assert not sites.gram_II.any()
            assert sites.cross_OI is None


class Expert(nn.Module):
    """One that some tokens reach, as models with code of their own keep them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32, bias=False), nn.Linear(32, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down(self.up(x_ND).relu())  # type: ignore[no-any-return]


class Listed(nn.Module):
    """Experts in a list; a token's is chosen by the sign of one of its numbers, and the last is never."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND, chosen_N = x_BTD.flatten(0, 1), (x_BTD[..., 0] > 0).long().flatten()
        y_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            if (chosen_N == number).any():
                y_ND[chosen_N == number] = expert(x_ND[chosen_N == number])
        return y_ND.view_as(x_BTD)


def test_experts_that_are_layers_of_their_own_see_their_tokens_alone() -> None:
    model: Any = build_model(len(build_tokenizer()))
    for layer in model.model.layers:
        layer.mlp = Listed(64)
    model.requires_grad_(False)
    seen, own = visited(model, TEXT, teacher=copy.deepcopy(model)), watched(model, TEXT)
    for name, sites in seen.items():
        assert sites.rows == own.rows.get(name, 0), name
        if sites.rows:
            assert float((sites.gram_II - own.grams[name]).norm() / own.grams[name].norm()) < 1e-4, name
    assert {name for name, sites in seen.items() if not sites.rows} == {n for n in seen if "experts.2" in n}


class PerHead(nn.Module):
    """An MLP whose first layer sees several rows of each token, in another order of dimensions."""

    def __init__(self, width: int, order: str) -> None:
        super().__init__()
        self.up, self.down, self.order = nn.Linear(width // 4, 16), nn.Linear(64, width), order

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTHW = x_BTD.unflatten(-1, (4, -1))
        if self.order == "heads last":
            return self.down(self.up(x_BTHW).flatten(2))  # type: ignore[no-any-return]
        if self.order == "heads first":
            return self.down(self.up(x_BTHW.transpose(1, 2)).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
        x_NHW = x_BTHW.flatten(0, 1)
        return self.down(self.up(x_NHW).flatten(1)).view_as(x_BTD)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["heads last", "heads first", "tokens"])
def test_a_layer_may_see_several_rows_of_a_token(order: str) -> None:
    model: Any = build_model(len(build_tokenizer()))
    for layer in model.model.layers:
        layer.mlp = PerHead(64, order)
    model.requires_grad_(False)
    seen, own = visited(model, TEXT, teacher=copy.deepcopy(model)), watched(model, TEXT)
    for name, sites in seen.items():
        assert sites.rows == own.rows[name], name
        assert float((sites.gram_II - own.grams[name]).norm() / own.grams[name].norm()) < 1e-4, name


def test_blocks_may_give_a_list() -> None:
    model = build_gpt()
    seen, own = visited(model, TEXT), watched(model, TEXT)
    for name, sites in seen.items():
        assert float((sites.gram_II - own.grams[name]).norm() / own.grams[name].norm()) < 1e-4, name


def build_gpt() -> Any:
    """The first GPT, whose layers are Conv1D and whose blocks give lists."""
    config = OpenAIGPTConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return OpenAIGPTLMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "bloom", "opt-proj", "gpt-oss"])
def test_states_between_blocks_are_those_of_a_plain_pass(name: str) -> None:
    """What blocks chosen by influence rest on."""
    model = architecture(name)
    passed = list(block_states(model, TEXT[:1]))
    tokens = torch.tensor([[*TEXT[0].prompt, *TEXT[0].completion]])
    plain = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for index, before_ND, after_ND in passed[:-1]:  # the last hidden state comes after the final norm
        assert torch.allclose(before_ND, plain[index][0], atol=1e-5)
        assert torch.allclose(after_ND, plain[index + 1][0], atol=1e-5)


# what can't be walked ------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp(self.mlp(x_BTD))  # type: ignore[no-any-return]


class TimeFirst(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp(x_BTD.transpose(0, 1).flatten(0, 1)).unflatten(0, x_BTD.shape[1::-1]).transpose(0, 1)  # type: ignore[no-any-return]


def twice(model: Any) -> None:
    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)


def time_first(model: Any) -> None:
    model.model.layers[1].mlp = TimeFirst(model.model.layers[1].mlp)


def shared(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def looped(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def tied(model: Any) -> None:
    """One parameter in two layers, as Zamba 2 shares a block."""
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight


def batch_wide(model: Any) -> None:
    """What a token becomes depends on the other sequences of its batch."""
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x_BTD: forward(x_BTD) + x_BTD.mean(0, keepdim=True)


def changed_between(model: Any) -> None:
    """What the second block computes depends on more than it is given."""
    forward = model.model.layers[1].forward
    counts = iter(range(1000))
    model.model.layers[1].forward = lambda x, **more: forward(x * (1 + next(counts)), **more)


REFUSED = [
    (twice, r"several times a pass, model.layers.1.mlp.mlp.gate_proj \(2 times\)"),
    (time_first, r"does not give model.layers.1.mlp.mlp.\w+ each token once, in their order"),
    (shared, r"several times a pass, model.layers.0.mlp.gate_proj"),
    (tied, r"several times a pass, model.layers.0.mlp.gate_proj \(2 times\)"),
    (batch_wide, r"computes of a sequence in a batch something else than of it alone \(block 1\)"),
    (looped, "does not run each of its blocks once"),
    (changed_between, "computes more between its blocks"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED)
def test_a_model_that_cant_be_walked_is_refused_and_what_works_is_named(change: Any, why: str) -> None:
    model: Any = build_model(len(build_tokenizer()))
    change(model)
    with pytest.raises(InputError, match=f"LlamaForCausalLM .*{why}.*rtn and magnitude.*repair: false"):
        walk(model, TEXT, lambda sites: pytest.fail("visited"))


def test_hidden_states_of_another_shape_are_named() -> None:
    with pytest.raises(InputError, match=r"Gemma3n.* blocks that give \(4, 2, 8, 64\)"):
        check_walk(architecture("gemma3n"), [Encoded(row.id, row.prompt, "") for row in TEXT])


def test_experts_that_compute_in_another_way_are_refused() -> None:
    model = architecture("mixtral")
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda *args: 1.5 * forward(*args)
    with pytest.raises(InputError, match=r"makes of the products of .*layers.0.mlp.experts what remend does not know"):
        walk(model, TEXT, lambda sites: pytest.fail("visited"))


def test_what_shapes_alone_tell_is_known_of_a_model_without_weights() -> None:
    gemma = architecture("gemma3n")
    with torch.device("meta"):
        odd, plain = type(gemma)(gemma.config), build_model(320)
    assert "blocks that give (4, 2, 8, 64)" in str(seen_of_skeleton(odd))
    assert seen_of_skeleton(plain) is None
    tied(plain)
    assert "several times a pass, model.layers.0.mlp.gate_proj (2 times)" in str(seen_of_skeleton(plain))


@pytest.mark.parametrize("name", list(WAYS))
def test_nothing_is_said_of_the_skeleton_of_a_model_that_can_be_walked(name: str) -> None:
    model = architecture(name)
    with torch.device("meta"):
        assert seen_of_skeleton(type(model)(model.config)) is None


def test_torch_says_nothing_of_kernels_that_need_numbers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, logger = architecture("mixtral"), logging.getLogger("torch._subclasses.fake_tensor")
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    assert seen_of_skeleton(skeleton) is None
    assert not caplog.records
    assert not logger.disabled
