"""Sums over calibration tokens: exact in float32, near enough where the passes run in bfloat16."""

from __future__ import annotations

import pytest
import torch

from remend.models.activations.passes import ROWS, products
from remend.models.device import mixed_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens", [1, ROWS, 2 * ROWS + 3])
def test_sums_of_products_match_float64(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x_NI = torch.randn(tokens, 12, generator=generator)
    x_NI[0] *= 300  # as the first token of a sequence does in some channels
    y_NO = x_NI @ torch.randn(12, 5, generator=generator) + torch.randn(tokens, 5, generator=generator)
    exact_OI = y_NO.double().T @ x_NI.double()
    size_OI = y_NO.double().abs().T @ x_NI.double().abs()
    exactly, roughly = (mixed_precision(dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    for precision, share in ((None, 1e-5), (exactly, 1e-5), (roughly, 2**-7)):
        found_OI = products(y_NO, x_NI, precision)
        assert found_OI.dtype == torch.float32
        assert bool(((found_OI - exact_OI).abs() <= share * size_OI).all())


def test_a_bfloat16_gram_can_be_factored_with_the_pull_of_repair() -> None:
    x_NI = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).repeat(60, 1)  # of low rank
    gram_II = products(x_NI, x_NI, mixed_precision(torch.bfloat16, CPU))
    _, failed = torch.linalg.cholesky_ex(gram_II + torch.diag(0.1 * gram_II.diagonal()))
    assert not failed
