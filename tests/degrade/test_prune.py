from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from remend.degrade.making import job
from remend.degrade.making.zeros import Sparsity, zero_smallest
from remend.degrade.prune import prune
from remend.errors import InputError
from remend.files.reading import read_object
from remend.files.signed import signed
from remend.models.sampling.rollout import Rollout


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: m.weight.detach()
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")
    }


@pytest.fixture
def original(reference_dir: Path) -> dict[str, torch.Tensor]:
    return linear_weights(AutoModelForCausalLM.from_pretrained(reference_dir))


def pruned(reference_dir: Path, out: Path, **settings: object) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    record = prune(str(reference_dir), out, samples=3, probe=False, **settings)  # type: ignore[arg-type]
    return record, linear_weights(AutoModelForCausalLM.from_pretrained(out))


@pytest.mark.parametrize(
    ("text", "share", "pattern"),
    [("0.5", 0.5, None), ("0.125", 0.125, None), ("2:4", 0.5, (2, 4)), ("1:4", 0.75, (1, 4))],
)
def test_sparsity_is_a_share_of_zeros_or_n_kept_of_m(text: str, share: float, pattern: object) -> None:
    assert Sparsity.parse(text) == Sparsity(text, share, pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.1", "nan", "inf", "half", "", "4:4", "5:4", "0:4", "2:4:8"])
def test_sparsity_out_of_range_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(InputError, match="allowed is a share of zeros between 0 and 1"):
        Sparsity.parse(text)


def test_magnitude_zeroes_the_smallest_half_of_each_matrix(
    reference_dir: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    record, weights = pruned(reference_dir, tmp_path / "out")
    for name, before in original.items():
        slow = sorted(abs(v) for v in before.flatten().tolist())
        border = slow[len(slow) // 2]
        expected = torch.where(before.abs() >= border, before, 0.0)
        assert torch.equal(weights[name], expected), name
    assert record["sparsity"] == 0.5
    assert record["bits_per_weight"] == 9.0
    assert record["packed_bytes"] == packed_by_hand(reference_dir, 0.5)
    assert read_object(tmp_path / "out" / "degradation.json") == signed(record)


def packed_by_hand(reference_dir: Path, sparsity: float) -> int:
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    inside = sum(w.numel() for w in linear_weights(model).values())
    outside = sum(p.numel() for p in model.parameters()) - inside
    return int(inside * (16 * (1 - sparsity) + 1) / 8 + 2 * outside)


def test_global_magnitude_has_one_threshold_and_an_exact_count(
    reference_dir: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    record, weights = pruned(reference_dir, tmp_path / "out", sparsity="0.3", scope="global")
    everything = sorted(abs(v) for w in original.values() for v in w.flatten().tolist())
    border = everything[round(0.3 * len(everything))]
    for name, before in original.items():
        assert torch.equal(weights[name], torch.where(before.abs() >= border, before, 0.0)), name
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert zeros == round(0.3 * len(everything))
    assert record["sparsity"] == zeros / len(everything)


def test_global_threshold_cuts_equal_magnitudes_exactly() -> None:
    weights = [torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[-1.0, 1.0], [0.5, 3.0]])]
    zero_smallest(weights, 0.05)
    assert weights[1].tolist() == [[-1.0, 1.0], [0.5, 3.0]]  # not even one of seven
    zero_smallest(weights, 3 / 7)
    assert weights[0].tolist() == [[0.0, 0.0, 2.0]]  # the first two of the four that are 1
    assert weights[1].tolist() == [[-1.0, 1.0], [0.0, 3.0]]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_n_of_every_m_neighbours_are_kept(
    reference_dir: Path, tmp_path: Path, method: str, pattern: str, kept: int, of: int
) -> None:
    record, weights = pruned(reference_dir, tmp_path / "out", method=method, sparsity=pattern)
    for name, weight in weights.items():
        counts = (weight.reshape(-1, of) != 0).sum(1)
        assert counts.eq(kept).all(), name
        assert not weight[weight == 0].signbit().any(), "a mask leaves plain zeros, not negative ones"
    assert record["format"] == pattern
    assert record["sparsity"] == 0.5


def test_wanda_compares_within_each_row_and_leaves_what_it_keeps(
    reference_dir: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _, weights = pruned(reference_dir, tmp_path / "out", method="wanda")
    for name, weight in weights.items():
        assert (weight == 0).sum(1).eq(weight.shape[1] // 2).all(), name
        kept = weight != 0
        assert torch.equal(weight[kept], original[name][kept])
    by_size = {n: w.abs() >= w.abs().median(1, keepdim=True).values for n, w in original.items()}
    assert any(not torch.equal(weights[n] != 0, by_size[n]) for n in weights), "inputs had no say"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[list[Rollout]]:
    """The calibration text of every job that follows."""
    seen: list[list[Rollout]] = []
    write = job.completions

    def spy(*args: Any, **settings: Any) -> list[Rollout]:
        seen.append(write(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(job, "completions", spy)
    return seen


def inputs_of(model: Any, name: str, text: list[Rollout]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        for rollout in text:
            model(torch.tensor([rollout.prompt + rollout.completion]))
    hook.remove()
    return torch.cat(seen)


def test_wanda_scores_a_layer_by_what_the_pruned_ones_before_it_give(
    reference_dir: Path, original: dict[str, torch.Tensor], tmp_path: Path, texts: list[list[Rollout]]
) -> None:
    _, weights = pruned(reference_dir, tmp_path / "out", method="wanda")
    name = "model.layers.1.mlp.gate_proj"  # everything in front of it was pruned before it was scored
    agreement = {}
    for model in (tmp_path / "out", reference_dir):
        x = inputs_of(AutoModelForCausalLM.from_pretrained(model).double(), name, texts[0])
        score = original[name].double().abs() * x.square().sum(0).sqrt()
        expected = score >= score.sort(1).values[:, [score.shape[1] // 2]]
        agreement[model] = float(((weights[name] != 0) == expected).double().mean())
    assert agreement[tmp_path / "out"] > 0.999  # not 1: in float32 a near tie may fall otherwise
    assert agreement[reference_dir] < 0.99


def test_sparsegpt_loses_less_of_a_layers_output_than_wanda(
    reference_dir: Path, original: dict[str, torch.Tensor], tmp_path: Path, texts: list[list[Rollout]]
) -> None:
    lost = {}
    for method in ("wanda", "sparsegpt"):
        _, weights = pruned(reference_dir, tmp_path / method, method=method)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
            x = inputs_of(AutoModelForCausalLM.from_pretrained(reference_dir), name, texts[-1])
            lost[method, name] = float(((weights[name] - original[name]) @ x.T).square().sum())
    assert texts[0] == texts[1]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        assert lost["sparsegpt", name] < 0.9 * lost["wanda", name], lost


def test_skipped_layers_stay_as_they_are(
    reference_dir: Path, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    record, weights = pruned(reference_dir, tmp_path / "out", method="wanda", skip=["*.down_proj"])
    for name, weight in weights.items():
        assert torch.equal(weight, original[name]) == name.endswith("down_proj"), name
    assert record["matrices"] == 12
    assert record["skip"] == ["*.down_proj"]
    left = record["decoder"]["untouched"]
    assert left == sum(w.numel() for n, w in weights.items() if n.endswith("down_proj")) / record["decoder"]["weights"]
    assert record["sparsity"] == pytest.approx(0.5 * (1 - left))  # of the whole decoder


def test_head_and_embeddings_are_never_pruned(reference_dir: Path, tmp_path: Path) -> None:
    pruned(reference_dir, tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(reference_dir)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(before.get_output_embeddings().weight, after.get_output_embeddings().weight)


def test_a_width_that_m_does_not_divide_is_refused_with_the_layers(reference_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3 divides.*model\.layers\.0\.self_attn\.q_proj \(64\).* and 11 more"):
        prune(str(reference_dir), tmp_path / "out", sparsity="1:3", probe=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random"}, 'unknown pruning method "random"; known: magnitude, sparsegpt, wanda'),
        ({"scope": "model"}, 'unknown scope "model"; allowed: layer, global'),
        ({"scope": "global", "sparsity": "2:4"}, "fixes the share of zeros in every layer"),
        ({"scope": "global", "method": "wanda"}, "scope global is for magnitude"),
        ({"skip": ["*.nothing"]}, "matches no linear layer"),
        ({"method": "wanda", "samples": 0}, "calibration set is empty"),
    ],
)
def test_what_can_not_be_done_is_refused(
    reference_dir: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune(str(reference_dir), tmp_path / "out", probe=False, **settings)  # type: ignore[arg-type]
