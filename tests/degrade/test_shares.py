"""A degradation says which of the decoder's weights it reached, and does not pass over any in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from helpers.tiny import build_tokenizer
from remend.compression.recognise import recognise
from remend.degrade.making.job import chosen_matrices
from remend.degrade.making.shares import require_known, shares
from remend.degrade.prune import prune
from remend.degrade.quantize import quantize
from remend.errors import InputError
from remend.exporting import export
from remend.models.matrices import account

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, tokenizer = tmp_path_factory.mktemp("mixtral"), build_tokenizer()
    torch.manual_seed(0)
    config = T.MixtralConfig(
        **SMALL, vocab_size=len(tokenizer), num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )
    T.MixtralForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_experts_are_on_the_grid_and_routers_stay(mixtral: Path, tmp_path: Path) -> None:
    record = quantize(str(mixtral), tmp_path / "out", format="int4-g32-sym", probe=False)
    assert record["decoder"]["on_grid"] == 1.0
    assert record["decoder"]["routers"] == 2 * 3 * 32
    before, after = (T.AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (mixtral, tmp_path / "out"))
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"):
        assert not torch.equal(before[f"model.layers.1.{name}"], after[f"model.layers.1.{name}"])
        groups = after[f"model.layers.1.{name}"].reshape(-1, 32)
        assert max(len(row.unique()) for row in groups) <= 16
    assert torch.equal(before["model.layers.1.mlp.gate.weight"], after["model.layers.1.mlp.gate.weight"])


def test_what_is_skipped_counts_at_16_bits(mixtral: Path, tmp_path: Path) -> None:
    every = quantize(str(mixtral), tmp_path / "a", format="int4-g32-sym", probe=False)
    some = quantize(str(mixtral), tmp_path / "b", format="int4-g32-sym", probe=False, skip=["*experts*"])
    left = some["decoder"]["untouched"]
    assert 0.5 < left < 1
    assert some["bits_per_weight"] == pytest.approx(every["bits_per_weight"] * (1 - left) + 16 * left)


@pytest.mark.parametrize("pattern", ["*.down_proj", "*.experts.down_proj", "*.down_proj.?"])
def test_a_skip_pattern_reaches_experts(mixtral: Path, pattern: str) -> None:
    model: Any = T.AutoModelForCausalLM.from_pretrained(mixtral)
    kept = chosen_matrices(model, [pattern])
    assert set(account(model).matrices) - set(kept) == {
        f"model.layers.{block}.mlp.experts.down_proj.{expert}" for block in range(2) for expert in range(3)
    }
    reached = [matrix.key for matrix in kept.values()]
    assert shares(model, "on_grid", reached, [pattern])["untouched"] > 0.1
    with pytest.raises(InputError, match=r"were not reached"):
        shares(model, "on_grid", reached, [])


def test_a_pattern_that_matches_nothing_is_shown_an_expert(mixtral: Path) -> None:
    with pytest.raises(InputError, match=r'"nothing" matches .* model\.layers\.0\.mlp\.experts\.gate_up_proj\.0'):
        chosen_matrices(T.AutoModelForCausalLM.from_pretrained(mixtral), ["nothing"])


def test_every_expert_has_its_pattern(mixtral: Path, tmp_path: Path) -> None:
    record = prune(str(mixtral), tmp_path / "out", sparsity="2:4", probe=False)
    assert (record["decoder"]["masked"], record["sparsity"]) == (1.0, 0.5)
    state = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in ("gate_up_proj", "down_proj"):
        kept = (state[f"model.layers.0.mlp.experts.{name}"].reshape(-1, 4) != 0).sum(-1)
        assert int(kept.max()) == 2


class Strange(T.LlamaForCausalLM):
    """A model with a product that is kept in no layer that remend knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.blend = torch.nn.Parameter(torch.zeros(3, 64, 64))


def test_parameters_that_nobody_can_read_are_named_before_the_work() -> None:
    model: Any = Strange(T.LlamaConfig(**SMALL, vocab_size=16))
    with pytest.raises(InputError, match=r"\d+% of .* Strange .* model\.layers\.0\.mlp\.blend.*--skip"):
        require_known(account(model), [], model)
    require_known(account(model), ["*.blend"], model)
    reached = {matrix.key for matrix in account(model).matrices.values()}
    assert 0.1 < shares(model, "on_grid", reached, ["*.blend"])["untouched"] < 1


def test_a_matrix_that_was_not_reached_is_a_refusal() -> None:
    model: Any = T.LlamaForCausalLM(T.LlamaConfig(**SMALL, vocab_size=16))
    keys = [matrix.key for matrix in account(model).matrices.values()]
    with pytest.raises(InputError, match=r"were not reached: model\.layers\.0\.self_attn\.q_proj"):
        shares(model, "on_grid", keys[1:], [])
    assert shares(model, "masked", keys[1:], ["*0.self_attn.q_proj"])["masked"] < 1


def test_the_command_prints_the_shares(mixtral: Path, tmp_path: Path, run: Any) -> None:
    words = ("--format", "int4-g32-sym", "--no-probe", "--out", tmp_path / "out")
    _, said, _ = run("degrade", "quantize", mixtral, *words)
    weights = json.loads((tmp_path / "out" / "degradation.json").read_text())["decoder"]["weights"]
    assert f"decoder: 100.0% on the grid, 0.0% untouched of {weights} matrix weights" in said
    assert "192 weights of routers stay dense" in said


def gpt_oss(out: Path) -> Path:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = T.GptOssConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        head_dim=16,
    )
    T.GptOssForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def gpt2(out: Path) -> Path:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = T.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    T.GPT2LMHeadModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def jetmoe(out: Path) -> Path:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "kv_channels": 16, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = T.JetMoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64, **sizes
    )
    T.JetMoeForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def dbrx(out: Path) -> Path:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    attention = {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}
    ffn = {"moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32, "ffn_hidden_size": 64}
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": len(tokenizer), "max_seq_len": 64}
    T.DbrxForCausalLM(T.DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("build", [gpt_oss, gpt2, jetmoe, dbrx])
def test_files_that_hold_matrices_in_other_ways_show_their_pattern(build: Any, tmp_path: Path) -> None:
    prune(str(build(tmp_path / "whole")), tmp_path / "pruned", sparsity="2:4", probe=False)
    (tmp_path / "pruned" / "degradation.json").unlink()
    found = recognise(tmp_path / "pruned")
    assert (found.mask, found.pattern, found.sparsity) == (True, "2:4", 0.5)
    assert not recognise(tmp_path / "whole").mask


@pytest.mark.parametrize("build", [gpt_oss, gpt2])
def test_a_grid_with_inputs_first_is_read_and_held(build: Any, tmp_path: Path) -> None:
    quantize(str(build(tmp_path / "whole")), tmp_path / "q", format="int4-g32-sym", probe=False)
    stored = recognise(tmp_path / "q").stored
    assert stored is not None
    stored.check(T.AutoModelForCausalLM.from_pretrained(tmp_path / "q"))
    with pytest.raises(InputError, match="no linear layers of their own"):
        export(str(tmp_path / "q"), tmp_path / "out", format="compressed-tensors")
    assert export(str(tmp_path / "q"), tmp_path / "dense", format="dense")["check"]["weights_equal"]


@pytest.mark.parametrize("kind", ["quantize", "prune"])
def test_experts_that_calibration_does_not_reach_are_changed_without_it_and_named(
    kind: str, tmp_path: Path, run: Any
) -> None:
    """The router never chooses expert 2 of the second block."""
    whole = gpt_oss(tmp_path / "whole")
    model = T.AutoModelForCausalLM.from_pretrained(whole)
    model.model.layers[1].mlp.router.bias.data[2] = -1e4
    model.save_pretrained(whole)
    amount = ("--format", "int4-g32-sym") if kind == "quantize" else ("--sparsity", "2:4")
    states = []
    for method in ("gptq", "rtn") if kind == "quantize" else ("wanda", "magnitude"):
        words = (whole, "--out", tmp_path / method, "--method", method, *amount, "--samples", 3, "--no-probe")
        code, said, err = run("degrade", kind, *words)
        assert code == 0, err
        assert ("no calibration token came to 2 matrices" in said) == (len(states) == 0)
        states.append(T.AutoModelForCausalLM.from_pretrained(tmp_path / method).state_dict())
    calibrated, plain = (state["model.layers.1.mlp.experts.down_proj"] for state in states)
    assert torch.equal(calibrated[2], plain[2])
    assert not torch.equal(calibrated[1], plain[1])
    record = json.loads((tmp_path / ("gptq" if kind == "quantize" else "wanda") / "degradation.json").read_text())
    experts = "model.layers.1.mlp.experts"
    assert record["calibration"]["unreached"] == [f"{experts}.gate_up_proj.2", f"{experts}.down_proj.2"]
    assert record["decoder"]["untouched"] == 0
