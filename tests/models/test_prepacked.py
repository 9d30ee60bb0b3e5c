"""Packed weights give the same products, for as long as they are asked for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers.tiny import build_model
from remend.models.sampling import prepacked as packing
from remend.models.sampling.prepacked import packed_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Small(nn.Module):
    """Two layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 32, bias=False)
        self.device = torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both, one after the other."""
        y: torch.Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("rows", [1, 8, 70])
def test_products_are_those_of_the_plain_layers(rows: int) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(rows, 3, 48)
    exact = x.double() @ model.first.weight.double().T + model.first.bias.double()
    exact = exact @ model.second.weight.double().T
    with torch.no_grad(), packed_linears(model):
        assert "forward" in vars(model.first)
        torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_under_autocast_they_are_autocasts_own(frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = Small().requires_grad_(not frozen), torch.randn(8, 1, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with packed_linears(model):
            ours = model(x)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits


def test_layers_are_left_as_they_were() -> None:
    model = build_model(64)
    own = model.model.layers[0].mlp.down_proj
    own.forward = nullcontext  # somebody else's: stays

    def fail() -> None:
        with packed_linears(model):
            assert "forward" in vars(model.lm_head)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert own.forward is nullcontext
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == ["model.layers.0.mlp.down_proj"]


def test_a_model_too_large_to_hold_twice_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_BYTES", 1000)
    model = Small()
    with packed_linears(model):
        assert "forward" not in vars(model.first)


def test_bfloat16_is_multiplied_on_processors_that_cant_pack_it_too() -> None:
    torch.manual_seed(0)
    model, x = Small().to(torch.bfloat16), torch.randn(2, 3, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(x)
        with packed_linears(model):
            torch.testing.assert_close(model(x), plain, rtol=0.05, atol=0.05)
