"""Which releases of transformers unpack what compressed-tensors packed exactly; remend refuses the others by name."""

from __future__ import annotations

import pytest
from transformers.integrations import compressed_tensors

needs_exact_unpacking = pytest.mark.skipif(
    not hasattr(compressed_tensors, "CompressedTensorsDequantize"),
    reason="this transformers unpacks otherwise: remend refuses, as a test of test_recognise.py asserts",
)
