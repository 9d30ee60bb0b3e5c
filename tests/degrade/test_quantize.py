"""Quantizing a model: GPTQ through the walk, what is skipped, and what the record says."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.tiny import build_model
from remend.compression.grids import GridFormat, decode, encode
from remend.compression.solvers import gptq
from remend.compression.stored_grid import StoredGrid
from remend.data.examples import bundled
from remend.data.templates import encode as encode_prompt
from remend.degrade.making import job
from remend.degrade.making.job import Damage
from remend.degrade.making.onto_grid import quantize_in_place
from remend.degrade.quantize import Quantize, quantize
from remend.errors import InputError
from remend.models.find import find_model
from remend.models.load import load_model
from remend.models.matrices import matrices
from remend.models.sampling.rollout import Rollout

INT3 = GridFormat.parse("int3-g64")
CPU = torch.device("cpu")
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def calibrated(reference_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Damage:
    """A job on the tiny model with a little calibration text."""
    reference = load_model(find_model(str(reference_dir)), dtype=torch.float32, device=CPU)
    reference.requires_grad_(False)
    monkeypatch.setattr(job, "CALIBRATION_TOKENS", 24)
    settings = Quantize.model_validate({"samples": 12})
    return Damage(reference, copy.deepcopy(reference), tokenizer, find_model(str(reference_dir)), settings)


def slow_inputs(model: Any, rollouts: list[Rollout], name: str) -> Tensor:
    """What a layer of `model` sees: one sequence at a time, through the whole model, no padding. Float64 [N, I]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda layer, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for rollout in rollouts:
            model(torch.tensor([[*rollout.prompt, *rollout.completion]]))
    handle.remove()
    return torch.cat(seen)


def test_gptq_of_a_model_is_gptq_of_each_layer_on_what_it_sees(calibrated: Damage) -> None:
    """Slow reference: for three layers the inputs of a model whose earlier layers are quantized and no others."""
    stored = quantize_in_place(calibrated.student, INT3, "gptq", damage=calibrated)
    order = list(matrices(calibrated.student))
    text = calibrated.calibration()
    for name in (FIRST, "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        partly = copy.deepcopy(calibrated.reference)
        for earlier in order[: order.index(name)]:
            codes, grid = stored.matrices[f"{earlier}.weight"]
            partly.get_submodule(earlier).weight.data.copy_(decode(codes, grid, INT3))
        x_NI = slow_inputs(partly, text, name)
        expected = gptq(calibrated.reference.get_submodule(name).weight, (x_NI.T @ x_NI).float(), INT3)
        codes, grid = stored.matrices[f"{name}.weight"]
        # sums in another order move a weight over a border now and then
        assert float((codes == expected.codes).float().mean()) > 0.97, name
        ours = decode(codes, grid, INT3).double()
        theirs = decode(expected.codes, expected.grid, INT3).double()
        healthy = calibrated.reference.get_submodule(name).weight.double()
        ours_lost, theirs_lost = (float((x_NI @ (w - healthy).T).square().sum()) for w in (ours, theirs))
        assert ours_lost == pytest.approx(theirs_lost, rel=0.05), name


def test_gptq_costs_less_than_rounding_to_nearest(calibrated: Damage) -> None:
    rounded = copy.deepcopy(calibrated.reference)
    quantize_in_place(rounded, INT3, "rtn")
    quantize_in_place(calibrated.student, INT3, "gptq", damage=calibrated)
    held_out = [encode_prompt(calibrated.tokenizer, e) for e in bundled("held_out")[:8]]
    divergence = []
    for model in (calibrated.student, rounded):
        total = 0.0
        for prompt in held_out:
            ids = torch.tensor([prompt.tokens])
            with torch.no_grad():
                p, q = (m(ids).logits.double().log_softmax(-1) for m in (calibrated.reference, model))
            total += float((p.exp() * (p - q)).sum(-1).mean())
        divergence.append(total)
    assert divergence[0] < divergence[1]


@pytest.fixture
def made(reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Quantizes the tiny model by GPTQ into a new directory: (directory, record)."""
    monkeypatch.setattr(job, "CALIBRATION_TOKENS", 8)

    def make(name: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        record = quantize(
            str(reference_dir), tmp_path / name, format="int3-g64", method="gptq", samples=4, device="cpu", **options
        )
        return tmp_path / name, record

    return make


def test_what_gptq_writes_lies_on_its_grid_and_is_described(made: Any) -> None:
    path, record = made("a")
    stored = StoredGrid.read(path)
    assert stored is not None
    tensors, on_grid, zeros = load_file(path / "model.safetensors"), 0, 0
    for name, (codes, grid) in stored.matrices.items():
        assert decode(codes, grid, INT3).equal(tensors[name]), name
        assert decode(encode(tensors[name], grid, INT3), grid, INT3).equal(tensors[name]), name
        on_grid, zeros = on_grid + codes.numel(), zeros + int((tensors[name] == 0).sum())
    everything = build_model(320).num_parameters()
    assert (record["kind"], record["method"], record["format"]) == ("quantization", "gptq", "int3-g64-asym")
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "a student for recoveries" in card
    assert "format: int3-g64-asym" in card
    assert (record["matrices"], record["weights_on_grid"], record["weights_in_all"]) == (14, on_grid, everything)
    assert record["bits_per_weight"] == 3 + 2 * 16 / 64
    assert record["packed_bytes"] == on_grid * 3.5 / 8 + 2 * (everything - on_grid)
    assert record["sparsity"] == zeros / on_grid
    assert record["calibration"]["prompts"] == 4
    assert record["probe"]["kl"] > 0


def test_skipped_layers_stay_as_they_are(made: Any, reference_dir: Path) -> None:
    skip = ["*.down_proj", "model.layers.1.self_attn.*"]
    path, record = made("a", skip=skip, probe=False)
    before, after = load_file(reference_dir / "model.safetensors"), load_file(path / "model.safetensors")
    same = {n.removesuffix(".weight") for n in before if "_proj" in n and before[n].equal(after[n])}
    assert same == {n.removesuffix(".weight") for n in before if any(fnmatchcase(n, f"{p}.weight") for p in skip)}
    assert len(same) == 6
    assert (record["skip"], record["matrices"]) == (skip, 8)
    assert record["packed_bytes"] > made("b", probe=False)[1]["packed_bytes"]


def test_seed_samples_and_data_change_what_gptq_gives(made: Any, prompt_file: Path) -> None:
    def sums(name: str, **options: Any) -> list[float]:
        path, _ = made(name, probe=False, **options)
        return [float(t.double().sum()) for t in load_file(path / "model.safetensors").values()]

    base = sums("base")
    assert sums("seed", seed=1) != base
    assert sums("data", data=str(prompt_file)) != base


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_calibration_file_is_refused(made: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"empty\.jsonl"):
        made("a", data=str(tmp_path / "empty.jsonl"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("skip", [[], ["*.down_proj"]])
def test_a_model_without_matrices_is_told_so_and_not_its_skip(skip: list[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=0, num_attention_heads=1))
    with pytest.raises(InputError, match=r"^LlamaForCausalLM has no weight matrix beside its head"):
        job.chosen_matrices(model, skip)
