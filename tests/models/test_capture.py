"""States of layers at chosen tokens, also where a layer's output is not [batch, time, width]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.architectures import build
from remend.errors import InputError
from remend.models.activations.capture import by_token, capture
from remend.models.layers import decoder_layers
from remend.models.sampling.rollout import Rollout
from remend.models.scorer import scorer

ROWS = [((3, 4, 5), (6, 7, 8)), ((9,), (10, 11)), ((12, 13, 14, 15), (16, 17, 18, 19)), ((20, 21), (22, 23))]


@torch.no_grad()
@pytest.mark.parametrize("name", ["falcon-h1", "gemma3n", "gpt2", "mamba", "opt"])
def test_rows_are_the_states_that_a_sequence_has_alone(name: str) -> None:
    model, picks = build(name), [0, 1, 3, 1]
    rollouts = [Rollout(str(i), prompt, completion, True) for i, (prompt, completion) in enumerate(ROWS)]
    rows = capture(scorer(model), name, rollouts, picks)["residual"]
    outputs: list[Tensor] = []
    for block in decoder_layers(model):
        block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for i, (prompt, completion) in enumerate(ROWS):
        outputs.clear()
        model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)
        at = len(prompt) + picks[i]
        alone = [states[:, 0, at] if name == "gemma3n" else states[0, at] for states in outputs]
        assert torch.allclose(rows[i], torch.stack(alone).flatten(1), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 5), (4, 2, 3, 5), (2, 3, 4, 5)])
def test_one_state_per_token_is_found(shape: tuple[int, ...]) -> None:
    states = torch.arange(torch.Size(shape).numel()).view(shape)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    found = by_token((states, None) if len(shape) == 3 else states, tokens)
    assert found.shape[:2] == (2, 3)
    own: Any = {2: lambda b, t: states[3 * b + t], 3: lambda b, t: states[b, t]}.get(len(shape))
    own = own or (lambda b, t: states[:, b, t] if shape[0] == 4 else states[b, t])
    assert all(torch.equal(found[b, t], own(b, t).flatten()) for b in range(2) for t in range(3))


@pytest.mark.parametrize("shape", [(3, 2, 5), (5, 5), (2, 4, 5), (4, 3, 2, 5)])
def test_what_has_no_state_per_token_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="one state per token"):
        by_token(torch.zeros(shape), torch.zeros(2, 3, dtype=torch.long))
