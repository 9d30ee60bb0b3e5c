"""How much a model can read, against what the model itself does at its last position and one beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from remend.errors import InputError
from remend.models.room import Room, room_of

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT = {
    "vocab_size": 320,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 48,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}

TABLES = {
    "gpt2": transformers.GPT2Config(**GPT),
    "gptj": transformers.GPTJConfig(**GPT, rotary_dim=8),
    "bigcode": transformers.GPTBigCodeConfig(**GPT),
    "ctrl": transformers.CTRLConfig(**GPT, dff=64),
    "opt": transformers.OPTConfig(
        vocab_size=320,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
        pad_token_id=1,
    ),
    "whisper": transformers.WhisperConfig(
        vocab_size=320,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_target_positions=48,
        pad_token_id=0,
    ),
    "mpt": transformers.MptConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=1, max_seq_len=48),
}
ROBERTA = {
    "roberta": transformers.RobertaConfig(**SMALL, max_position_embeddings=48, pad_token_id=1, is_decoder=True),
    "xlm-roberta": transformers.XLMRobertaConfig(**SMALL, max_position_embeddings=48, pad_token_id=2, is_decoder=True),
}
ENDLESS = {
    "llama": transformers.LlamaConfig(**SMALL, max_position_embeddings=48),
    "bloom": transformers.BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=2),
    "xglm": transformers.XGLMConfig(
        vocab_size=320, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2, max_position_embeddings=48
    ),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=16, max_position_embeddings=48),
}


@torch.no_grad()
def reads(config: Any, length: int) -> bool:
    try:
        AutoModelForCausalLM.from_config(config)(torch.full((1, length), 5))
    except (IndexError, RuntimeError):
        return False
    return True


def room(config: Any) -> Room:
    with torch.device("meta"):
        return room_of(AutoModelForCausalLM.from_config(config), config)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_ends_where_the_model_ends(name: str) -> None:
    positions = room(TABLES[name]).positions
    assert positions == 48
    assert reads(TABLES[name], 48)
    assert not reads(TABLES[name], 49)


@pytest.mark.parametrize("name", ROBERTA)
def test_positions_that_are_counted_from_behind_the_padding_are_fewer_than_promised(name: str) -> None:
    positions = room(ROBERTA[name]).positions
    assert positions == 47 - ROBERTA[name].pad_token_id
    assert reads(ROBERTA[name], positions)
    assert not reads(ROBERTA[name], positions + 1)


@pytest.mark.parametrize("name", ENDLESS)
def test_computed_positions_set_no_limit(name: str) -> None:
    assert room(ENDLESS[name]).positions is None
    assert reads(ENDLESS[name], 60)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "length"),
    [
        (
            transformers.Phi3Config(
                **SMALL,
                max_position_embeddings=96,
                original_max_position_embeddings=24,
                rope_parameters=LONG,
                pad_token_id=0,
            ),
            24,
        ),
        (
            transformers.LlamaConfig(
                **SMALL,
                max_position_embeddings=40,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            ),
            40,
        ),
    ],
)
def test_beyond_a_ropes_original_length_a_short_row_depends_on_its_neighbours(config: Any, length: int) -> None:
    assert room(config).factors == length
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    short = torch.arange(1, 21)[None]
    alone = model(short).logits
    for beyond, same in ((0, True), (8, False)):
        rows = torch.cat([short, torch.zeros(1, length + beyond - 20, dtype=torch.long)], 1)
        assert torch.allclose(model(rows).logits[:, :20], alone, atol=1e-5) is same


def test_room_of_two_and_the_limit_of_a_prompt() -> None:
    both = Room(100, None, 64, None).less(Room(90, 48, 32, 16))
    assert both == Room(90, 48, 32, 16)
    assert both.prompt_limit(40, 8) == (40, "")
    assert both.prompt_limit(1024, 8) == (40, "40 (the model has 48 positions, 8 of them for the answer)")
    assert Room(100).prompt_limit(1024, 8) == (1024, "")
    with pytest.raises(InputError, match="an answer may have 48 tokens, and the model has 48 positions"):
        both.prompt_limit(1024, 48)
