"""What a GGUF file says of rotary positions is in the model that is read, and in the one that is saved from it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import remend
from helpers.gguf_files import rewritten
from helpers.tiny import build_model, build_tokenizer
from remend.errors import InputError
from remend.models.find import find_model
from remend.models.load import check_weights, load_config, load_model, load_tokenizer, save_model

CPU = torch.device("cpu")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A model whose rope is not scaled, and its GGUF file."""
    where, tokenizer = tmp_path_factory.mktemp("plain"), build_tokenizer()
    model = build_model(len(tokenizer))
    save_model(model, tokenizer, where / "model")
    remend.export(str(where / "model"), where / "gguf", format="gguf")
    return model, where / "gguf" / "model.gguf"


def scaled(model: LlamaForCausalLM, **rope: object) -> LlamaForCausalLM:
    """A model of the same weights with another rope: what the file was made from."""
    settings = model.config.to_dict() | {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    other = LlamaForCausalLM(type(model.config)(**settings)).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    ids = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(1))
    out: torch.Tensor = model(input_ids=ids).logits  # type: ignore[operator]
    return out


def factors(
    original: int, width: int = 16, factor: float = 8.0, high: float = 4.0, theta: float = 10000.0
) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's convert_hf_to_gguf.py writes it, with low_freq_factor 1."""
    out = []
    for freq in (1.0 / (theta ** (2 * i / width)) for i in range(width // 2)):
        wavelen = 2 * math.pi / freq
        smooth = (original / wavelen - 1) / (high - 1)
        slow = factor if wavelen > original else 1 / ((1 - smooth) / factor + smooth)
        out.append(1.0 if wavelen < original / high else slow)
    return np.array(out, dtype=np.float32)


HEADERS = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "a factor alone is linear": ({"factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 128},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "yarn with its own ramp, of the whole context": (
        {"type": "yarn", "factor": 8.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_scaling_of_the_header_is_applied_and_saved(
    plain: tuple[LlamaForCausalLM, Path], tmp_path: Path, name: str
) -> None:
    given, rope = HEADERS[name]
    file = rewritten(plain[1], tmp_path / "m.gguf", header={f"llama.rope.scaling.{k}": v for k, v in given.items()})
    made_from, source = logits(scaled(plain[0], **rope)), find_model(str(file))
    assert (made_from - logits(plain[0])).abs().max() > 0.1, "the scaling matters"
    loaded = load_model(source, dtype=torch.float32, device=CPU)
    assert torch.equal(logits(loaded), made_from)
    assert load_config(source).rope_parameters["rope_type"] == rope["rope_type"]
    assert check_weights(source) == []
    save_model(loaded, load_tokenizer(source), tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), made_from)


@pytest.mark.parametrize(("original", "high"), [(64, 4.0), (128, 4.0), (100, 3.0), (16, 4.0)])
def test_the_factors_of_llama_3_are_solved_for(
    plain: tuple[LlamaForCausalLM, Path], tmp_path: Path, original: int, high: float
) -> None:
    rope = {**LLAMA3, "high_freq_factor": high, "original_max_position_embeddings": original}
    slowed = factors(original, high=high)
    assert 1 < len(set(slowed.tolist())) <= 8
    file = rewritten(plain[1], tmp_path / "m.gguf", tensors={"rope_freqs.weight": slowed})
    made_from = logits(scaled(plain[0], **rope))
    assert (made_from - logits(plain[0])).abs().max() > 0.1
    loaded = load_model(find_model(str(file)), dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(loaded), made_from, rtol=1e-4, atol=1e-4)
    save_model(loaded, load_tokenizer(find_model(str(file))), tmp_path / "saved")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), made_from, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_31_and_32_give_their_own_parameters(
    plain: tuple[LlamaForCausalLM, Path], tmp_path: Path, factor: float
) -> None:
    head = {"llama.rope.dimension_count": 128, "llama.rope.freq_base": 500000.0}
    slowed = factors(8192, 128, factor, theta=500000.0)
    file = rewritten(plain[1], tmp_path / "m.gguf", header=head, tensors={"rope_freqs.weight": slowed})
    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    assert load_config(find_model(str(file))).rope_parameters == rope


REFUSED = {
    "longrope": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "scaled by longrope"),
    "factors of no rule": ({}, {"rope_freqs.weight": np.full(8, 4.0, np.float32)}, "rope_freqs.weight"),
    "too many factors": ({}, {"rope_freqs.weight": factors(64, width=32)}, "rope_freqs.weight"),
    "factors of a text's length": (
        {},
        {f"rope_factors_{k}.weight": np.full(8, 2.0, np.float32) for k in ("long", "short")},
        "rope_factors_long",
    ),
    "another sharpness": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.5},
        {},
        "attn_factor = 1.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_applied_is_refused(plain: tuple[LlamaForCausalLM, Path], tmp_path: Path, name: str) -> None:
    header, tensors, reason = REFUSED[name]
    source = find_model(str(rewritten(plain[1], tmp_path / "m.gguf", header=header, tensors=tensors)))
    for open_it in (load_config, check_weights, lambda s: load_model(s, dtype=torch.float32, device=CPU)):
        with pytest.raises(InputError, match=reason):
            open_it(source)


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {}),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, {}),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}),
    ],
)
def test_what_scales_nothing_changes_nothing(
    plain: tuple[LlamaForCausalLM, Path], tmp_path: Path, header: dict[str, str | float], tensors: dict[str, np.ndarray]
) -> None:
    source = find_model(str(rewritten(plain[1], tmp_path / "m.gguf", header=header, tensors=tensors)))
    assert torch.equal(logits(load_model(source, dtype=torch.float32, device=CPU)), logits(plain[0]))
