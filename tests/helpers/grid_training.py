"""A tiny model on a grid, and a few steps of training it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from helpers.tiny import build_model
from remend.compression.grids import GridFormat
from remend.compression.stored_grid import StoredGrid
from remend.degrade.making.onto_grid import quantize_in_place
from remend.training.constraints import Constraint

TOKENS = torch.arange(3, 35).view(2, 16)


VOCABULARY = 64
FORMATS = ["int3-g64-asym", "int4-g32-sym", "int4-g32-zp", "gguf:q4_0", "gguf:q4_1", "gguf:q8_0", "gguf:mxfp4"]
FORMATS += ["mxfp4", "nvfp4", "nf4", "fp8-e4m3"]  # gguf:tq2_0's 256 divides no row of the tiny model


def pair(name: str = FORMATS[0]) -> tuple[LlamaForCausalLM, LlamaForCausalLM, StoredGrid]:
    """A model, its quantized copy, and the grid of the copy."""
    origin = build_model(VOCABULARY)
    student = copy.deepcopy(origin)
    return origin, student, quantize_in_place(student, GridFormat.parse(name))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def train(model: LlamaForCausalLM, constraint: Constraint, steps: int) -> None:
    optimizer = torch.optim.AdamW(constraint.masters().values(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        constraint.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        constraint.project()
