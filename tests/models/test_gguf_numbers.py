"""What a GGUF header says of norms, caps, windows and scales is in the model that is read, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from remend.errors import InputError
from remend.models.find import find_model
from remend.models.load import load_config

GEMMA = {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 16}
LAYER_NORM, RMS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"


def file_of(where: Path, architecture: str, fields: dict[str, int | float], *, without: str = "") -> Path:
    """A file whose header describes a model, with hardly a tensor in it."""
    file, writer = where / "model.gguf", gguf.GGUFWriter(where / "model.gguf", architecture)
    sizes = {"context_length": 512, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128}
    header: dict[str, int | float] = {**sizes, "attention.head_count": 4, "attention.head_count_kv": 2, **fields}
    for name, value in header.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if name != without:
            add(f"{architecture}.{name}", value)  # type: ignore[arg-type]
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("gemma2", {**GEMMA, "attn_logit_softcapping": 7.0}, {"attn_logit_softcapping": 7.0}),
        ("gemma2", {**GEMMA, "final_logit_softcapping": 0.0}, {"final_logit_softcapping": None}),
        ("gemma2", GEMMA, {"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0}),
        ("gemma2", {**GEMMA, "block_count": 46, "embedding_length": 96}, {"query_pre_attn_scalar": 24}),
        ("gemma3", {**GEMMA, "block_count": 62, "embedding_length": 96}, {"query_pre_attn_scalar": 24}),
        ("gemma4", {**GEMMA, "final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
        ("nemotron", {LAYER_NORM: 0.25}, {"norm_eps": 0.25}),
        ("falcon", {LAYER_NORM: 0.25}, {"layer_norm_epsilon": 0.25}),
        ("phi3", {RMS: 0.25, "attention.sliding_window": 47}, {"sliding_window": 47}),
        ("gpt-oss", {RMS: 0.25, "attention.sliding_window": 47}, {"sliding_window": 47}),
    ],
)
def test_numbers_of_the_header_are_in_the_configuration(
    tmp_path: Path, architecture: str, fields: dict[str, int | float], expected: dict[str, object]
) -> None:
    config = load_config(find_model(str(file_of(tmp_path, architecture, fields))))
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_number_that_nothing_is_computed_of_is_refused(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama", {RMS: 1e-6, "residual_scale": 0.5})
    with pytest.raises(InputError, match=r"llama.residual_scale = 0.5, of which transformers computes nothing"):
        load_config(find_model(str(file)))


@pytest.mark.parametrize("name", ["attention.head_count", RMS])
def test_a_header_that_lacks_what_makes_the_model_is_refused(tmp_path: Path, name: str) -> None:
    file = file_of(tmp_path, "llama", {RMS: 1e-6}, without=name)
    with pytest.raises(InputError, match=r"lacks llama\.attention\.(head_count|layer_norm_epsilon)"):
        load_config(find_model(str(file)))
