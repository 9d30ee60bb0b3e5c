from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from helpers.tiny import build_model
from remend.degrade.making.channels import best, kept_width, narrowed, scores
from remend.degrade.width import prune_width
from remend.errors import InputError
from remend.models.sampling.rollout import Rollout

TOKENS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
ROLLOUTS = [Rollout("a", (5, 6, 7), (8, 9), False), Rollout("b", (11, 12), (13, 14, 15, 16), False)]
HEAD = 16  # width 64 over 4 heads


def silenced(model: Any, channels: list[torch.Tensor] | None, groups: list[torch.Tensor] | None) -> Any:
    """The slow reference: what was dropped gives nothing, in the model of full width."""
    for i, layer in enumerate(model.model.layers):
        if channels is not None:
            gone = [c for c in range(layer.mlp.down_proj.in_features) if c not in channels[i].tolist()]
            layer.mlp.down_proj.weight.data[:, gone] = 0
        if groups is not None:
            for group in set(range(2)) - set(groups[i].tolist()):
                for head in (2 * group, 2 * group + 1):
                    layer.self_attn.o_proj.weight.data[:, head * HEAD : (head + 1) * HEAD] = 0
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_narrow_model_equals_the_wide_one_with_what_was_dropped_silenced(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        reference: Any = build_model(320)
    else:
        reference = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=320,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=HEAD,
                initializer_range=0.15,
            )
        ).eval()
    channels = [torch.randperm(128)[:96].sort().values for _ in range(2)]
    groups = [torch.tensor([1]), torch.tensor([0])]
    student = narrowed(reference, channels, groups)
    assert student.model.layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (2 * HEAD, 64)
    with torch.no_grad():
        assert not torch.allclose(student(TOKENS).logits, reference(TOKENS).logits, atol=1e-2)
        expected = silenced(reference, channels, groups)(TOKENS).logits
        torch.testing.assert_close(student(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)


def test_biases_are_cut_with_their_channels() -> None:
    reference = build_model(320)
    config = reference.config
    config.mlp_bias = config.attention_bias = True
    torch.manual_seed(0)
    reference = type(reference)(config).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    channels, groups = [torch.arange(3, 99)] * 2, [torch.tensor([1])] * 2
    student = narrowed(reference, channels, groups)
    with torch.no_grad():
        expected = silenced(reference, channels, groups)(TOKENS).logits
        torch.testing.assert_close(student(TOKENS).logits, expected, atol=5e-5, rtol=1e-5)


def test_scores_are_mean_activation_times_column_norm_and_mean_norm_of_a_group() -> None:
    model = build_model(320).double()
    found_channels, found_groups = scores(model, ROLLOUTS)
    for i, layer in enumerate(model.model.layers):
        inputs: dict[str, list[torch.Tensor]] = {"down": [], "o": []}
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _m, a, k=inputs: k["down"].append(a[0])),
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, k=inputs: k["o"].append(a[0])),
        ]
        with torch.no_grad():
            for rollout in ROLLOUTS:
                model(torch.tensor([rollout.prompt + rollout.completion]))
        for hook in hooks:
            hook.remove()
        x = torch.cat([t[0] for t in inputs["down"]]).tolist()
        assert len(x) == 11
        weight = layer.mlp.down_proj.weight.tolist()
        for c in (0, 17, 127):
            mean = sum(abs(row[c]) for row in x) / 11
            norm = sum(row[c] ** 2 for row in weight) ** 0.5
            assert found_channels[i][c].item() == pytest.approx(mean * norm, rel=1e-9)
        y = torch.cat([t[0] for t in inputs["o"]]).tolist()
        for g in range(2):
            mean = sum(sum(v**2 for v in row[g * 32 : g * 32 + 32]) ** 0.5 for row in y) / 11
            assert found_groups[i][g].item() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("width", "drop", "kept"),
    [(1536, 0.25, 1152), (128, 0.25, 96), (100, 0.25, 64), (48, 0.5, 32), (20, 0.25, 15), (128, 0.05, 122)],
)
def test_widths_are_multiples_of_32_where_something_is_left_to_drop(width: int, drop: float, kept: int) -> None:
    assert kept_width(width, drop) == kept


def test_the_best_are_kept_in_their_order() -> None:
    assert best(torch.tensor([3.0, 1.0, 5.0, 3.0, 4.0]), 3).tolist() == [0, 2, 4]


def test_the_saved_model_is_standard_and_its_channels_are_on_record(reference_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = prune_width(str(reference_dir), out, ffn=0.25, heads=1, samples=3)
    student = AutoModelForCausalLM.from_pretrained(out)
    config = student.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (96, 2, 1)
    assert config.head_dim == HEAD
    kept = load_file(out / "remend" / "width.safetensors")
    assert record["kept_channels"] == hashlib.sha256((out / "remend" / "width.safetensors").read_bytes()).hexdigest()
    channels = [kept[f"model.layers.{i}.mlp.channels"] for i in range(2)]
    groups = [kept[f"model.layers.{i}.self_attn.groups"] for i in range(2)]
    assert {t.dtype for t in kept.values()} == {torch.int32}
    reference = AutoModelForCausalLM.from_pretrained(reference_dir)
    for i, channel in enumerate(channels):
        name = f"model.layers.{i}.mlp.up_proj"
        wide = reference.get_submodule(name).weight
        assert torch.equal(student.get_submodule(name).weight, wide[channel.long()])
    with torch.no_grad():
        expected = silenced(reference, channels, groups)(TOKENS).logits
        torch.testing.assert_close(student(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)
    assert record["bits_per_weight"] == 16.0
    assert record["probe"]["kl"] > 0


def test_dead_channels_go_first_and_cost_nothing(reference_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 40:72] = 0
    model.save_pretrained(tmp_path / "dead")
    copy_tokenizer(reference_dir, tmp_path / "dead")
    record = prune_width(str(tmp_path / "dead"), tmp_path / "out", ffn=0.25, samples=3)
    kept = load_file(tmp_path / "out" / "remend" / "width.safetensors")["model.layers.0.mlp.channels"].tolist()
    assert kept == [c for c in range(128) if not 40 <= c < 72]
    assert record["probe"]["kl"] < 1e-6


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ffn": 1.0}, "ffn is 1.0; allowed is a share"),
        ({"ffn": -0.1}, "ffn is -0.1"),
        ({"ffn": 0.0, "heads": 0}, "drop nothing"),
        ({"ffn": 0.001}, "leaves 128; it must drop some"),
        ({"heads": 2}, "can't drop 2 of 2 groups of heads a block; allowed is 0 to 1"),
        ({"heads": -1}, "can't drop -1"),
    ],
)
def test_a_width_that_can_not_be_is_refused(
    reference_dir: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune_width(str(reference_dir), tmp_path / "out", probe=False, **settings)
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=320))
    with pytest.raises(InputError, match=r"block 0 of GPT2LMHeadModel is not made of mlp\.gate_proj"):
        narrowed(other, [torch.arange(8)], None)


def test_a_head_count_that_the_architecture_refuses_is_an_input_error() -> None:
    reference = build_model(320, width=64)
    config = reference.config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 8, 8
    torch.manual_seed(0)
    reference = type(reference)(config).eval()
    with pytest.raises(InputError, match=r"can't have num_attention_heads 7.*not a multiple"):
        narrowed(reference, None, [torch.arange(7)] * 2)
