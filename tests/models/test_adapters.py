"""LoRA beside frozen weights: scored, sampled, saved and loaded as what it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.tiny import build_model
from remend.data.templates import Encoded
from remend.errors import FileError, InputError
from remend.models import adapters
from remend.models.find import find_model, hash_files
from remend.models.load import check_weights, load_config, load_model, load_tokenizer, save_model
from remend.models.sampling.transformers_engine import TransformersSampler
from remend.models.scorer import pack, scorer
from remend.training.constraints import Adapter

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 23).unsqueeze(0)


def adapted(reference_dir: Path, **settings: Any) -> Any:
    """The tiny model with an adapter that does something."""
    model = AutoModelForCausalLM.from_pretrained(reference_dir).eval()
    adapters.add_lora(model, **{"rank": 4, "base": str(reference_dir), **settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=generator)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def saved(reference_dir: Path, tokenizer: Any, tmp_path: Path) -> Path:
    save_model(adapted(reference_dir), tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_fresh_adapter_changes_nothing_and_alone_is_trainable(reference_dir: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(reference_dir).eval()
    model = AutoModelForCausalLM.from_pretrained(reference_dir).eval()
    adapters.add_lora(model, rank=3)
    assert logits(model).equal(logits(plain))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * 2 * 7  # A and B of seven matrices in two layers
    assert shapes["model.layers.0.mlp.down_proj.lora_A.default.weight"] == (3, 128)
    assert shapes["model.layers.1.self_attn.k_proj.lora_B.default.weight"] == (32, 3)
    assert not any("lm_head" in n or "embed" in n for n in shapes)
    assert Adapter(model).masters().keys() == shapes.keys()
    assert all(t.dtype == torch.float32 for t in Adapter(model).masters().values())


def test_logits_are_those_of_the_dense_sum(reference_dir: Path) -> None:
    """Against W + alpha / rank · B A, written out in float64."""
    model = adapted(reference_dir, alpha=6).double()
    dense = AutoModelForCausalLM.from_pretrained(reference_dir).eval().double()
    parameters = dict(model.named_parameters())
    for name, layer in dense.named_modules():
        if f"{name}.lora_A.default.weight" in parameters:
            a, b = (parameters[f"{name}.lora_{k}.default.weight"].detach() for k in "AB")
            layer.weight.data += 6 / 4 * b @ a
    assert torch.allclose(logits(model), logits(dense), atol=1e-12)
    assert not torch.allclose(logits(model), logits(build_model(320).double()), atol=1e-2)


def test_rank_alpha_targets_and_seed_have_their_effect(reference_dir: Path) -> None:
    def first(**settings: Any) -> tuple[set[str], Tensor]:
        model = AutoModelForCausalLM.from_pretrained(reference_dir)
        adapters.add_lora(model, **{"rank": 4, **settings})
        masters = Adapter(model).masters()
        return {n.split(".")[4] for n in masters}, next(iter(masters.values()))

    _, base = first()
    assert first()[1].equal(base)
    assert not first(seed=1)[1].equal(base)
    assert first(rank=2)[1].shape[0] == 2
    assert first(targets=["q_proj", "mlp.up_proj"])[0] == {"q_proj", "up_proj"}
    assert not torch.allclose(logits(adapted(reference_dir, alpha=32)), logits(adapted(reference_dir)), atol=1e-3)
    assert logits(adapted(reference_dir, alpha=8)).equal(logits(adapted(reference_dir)))  # the default is 2 · rank


def test_the_draw_of_an_adapter_leaves_the_global_stream_alone(reference_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    adapters.add_lora(model, rank=2)
    assert torch.rand(2).equal(expected)


@pytest.mark.parametrize("targets", [["q_proj", "nothing"], "q_proj_x", ["lm_head"], [], ["_proj"]])
def test_targets_that_are_no_linear_layer(targets: Any) -> None:
    with pytest.raises(InputError, match=r"allowed: all-linear, or a list of down_proj, gate_proj, .*v_proj"):
        adapters.add_lora(build_model(320), rank=2, targets=targets)


def test_one_adapter_a_model(reference_dir: Path) -> None:
    with pytest.raises(InputError, match="carries an adapter already"):
        adapters.add_lora(adapted(reference_dir), rank=2)


def test_scorer_sees_the_adapter(reference_dir: Path) -> None:
    model = adapted(reference_dir)
    parts = scorer(model)
    with torch.no_grad():
        assert torch.allclose(parts.head(parts.hidden(TOKENS)), logits(model), atol=1e-5)


def test_sampling_thin_batches_weight_first_gives_the_models_own_greedy_answer(reference_dir: Path) -> None:
    model = adapted(reference_dir)
    prompts = [Encoded(str(i), tuple(range(3 + i, 9 + i)), "") for i in range(3)]
    rollouts = TransformersSampler(model, 320, (2,))(prompts, max_new_tokens=6, temperature=0.0, seeds=[0] * 3)
    plain = build_model(320)
    differs = False
    for rollout in rollouts:
        tokens = list(rollout.prompt)
        with torch.no_grad():
            for token in rollout.completion:
                assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
                differs |= token != int(plain(torch.tensor([tokens])).logits[0, -1].argmax())
                tokens.append(token)
    assert differs  # the base would have answered otherwise


def test_saved_and_loaded_again_the_logits_are_equal(reference_dir: Path, saved: Path) -> None:
    names = {p.name for p in saved.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not {"config.json", "model.safetensors"} & names
    source = find_model(str(saved))
    assert source.kind == "adapter"
    assert source.base is not None
    assert source.base.path == reference_dir
    loaded = load_model(source, dtype=torch.float32, device=CPU)
    assert logits(loaded).equal(logits(adapted(reference_dir)))
    assert len(Adapter(loaded).masters()) == 2 * 2 * 7
    assert load_config(source).hidden_size == 64
    assert load_tokenizer(source).chat_template


def test_peft_and_transformers_open_what_is_saved(reference_dir: Path, saved: Path) -> None:
    expected = logits(adapted(reference_dir))
    base = AutoModelForCausalLM.from_pretrained(reference_dir).eval()
    assert logits(PeftModel.from_pretrained(base, saved).eval()).equal(expected)
    assert logits(AutoPeftModelForCausalLM.from_pretrained(saved).eval()).equal(expected)
    assert logits(AutoModelForCausalLM.from_pretrained(saved).eval()).equal(expected)


def test_an_adapter_that_peft_saved_is_loaded(reference_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    loaded = load_model(find_model(str(tmp_path / "theirs")), dtype=torch.float32, device=CPU)
    assert logits(loaded).equal(logits(wrapped))
    assert len(Adapter(loaded).masters()) == 4


def test_a_merged_model_is_plain_and_gives_the_same_logits(reference_dir: Path) -> None:
    model = adapted(reference_dir)
    expected = logits(model)
    adapters.merge(model)
    assert set(model.state_dict()) == set(build_model(320).state_dict())
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not adapters.is_adapted(model)
    with pytest.raises(InputError, match="carries no adapter"):
        Adapter(model)


def test_an_adapter_hashes_its_base_too(reference_dir: Path, saved: Path) -> None:
    hashes = hash_files(find_model(str(saved)))
    theirs = hash_files(find_model(str(reference_dir)))
    assert hashes["base/model.safetensors"] == theirs["model.safetensors"]
    assert len(hashes["adapter_model.safetensors"]) == 64


def test_a_base_named_relative_to_the_adapter(reference_dir: Path, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(reference_dir, tmp_path / "base")
    rename(saved, "../base")
    base = find_model(str(saved)).base
    assert base is not None
    assert base.path is not None
    assert base.path.resolve() == (tmp_path / "base").resolve()


def rename(directory: Path, base: Any, **others: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base, **others}))


@pytest.mark.parametrize(
    ("build", "part"),
    [
        ({"width": 32}, r"down_proj.lora_A.weight is \(4, 128\), and the base needs \(4, 64\)"),
        ({"layers": 1}, r"model.layers.1.*which the base has no place for"),
        ({"layers": 3}, r"model.layers.2.* is missing in it"),
        ({"seed": 5}, r"the shapes agree, but that base has other weights"),
    ],
)
def test_an_adapter_for_another_base(tmp_path: Path, saved: Path, build: dict[str, Any], part: str) -> None:
    build_model(320, **build).save_pretrained(tmp_path / "other")
    rename(saved, str(tmp_path / "other"))
    with pytest.raises(InputError, match=f"(?s)adapter .* does not fit its base .*other: .*{part}"):
        load_model(find_model(str(saved)), dtype=torch.float32, device=CPU)


def test_an_adapter_whose_modules_the_base_lacks(saved: Path, reference_dir: Path) -> None:
    rename(saved, str(reference_dir), target_modules=["c_attn"])
    with pytest.raises(InputError, match=r"does not fit its base .*c_attn"):
        load_model(find_model(str(saved)), dtype=torch.float32, device=CPU)


def test_an_adapter_on_the_head_is_refused(tmp_path: Path, reference_dir: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = build_model(320, tied=False)
    model.save_pretrained(tmp_path / "untied")
    model.name_or_path = str(tmp_path / "untied")
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "a")
    rename(tmp_path / "a", str(tmp_path / "untied"))
    with pytest.raises(InputError, match="changes the model's head"):
        load_model(find_model(str(tmp_path / "a")), dtype=torch.float32, device=CPU)


def test_adapters_that_cannot_be_read(saved: Path) -> None:
    rename(saved, None)
    with pytest.raises(FileError, match="names no base_model_name_or_path"):
        find_model(str(saved))
    rename(saved, str(saved))
    with pytest.raises(FileError, match="is an adapter itself"):
        find_model(str(saved))
    rename(saved, "/nowhere/at/all")
    with pytest.raises(FileError, match="does not exist"):
        find_model(str(saved))
    rename(saved, "x", peft_type="IA3")
    with pytest.raises(FileError, match="of the kind IA3; remend works with LORA"):
        find_model(str(saved))
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(FileError, match=r"adapter_config.json can't be read"):
        find_model(str(saved))


def test_weights_of_an_adapter_that_cannot_be_used(saved: Path) -> None:
    source, weights = find_model(str(saved)), saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for i, (k, v) in enumerate(tensors.items()) if i}, weights)
    with pytest.raises(InputError, match="is missing in it"):
        load_model(source, dtype=torch.float32, device=CPU)
    weights.write_bytes(b"nonsense")
    with pytest.raises(FileError, match="can't be read"):
        load_model(source, dtype=torch.float32, device=CPU)
    weights.unlink()
    with pytest.raises(FileError, match="it is missing"):
        load_model(source, dtype=torch.float32, device=CPU)
    (saved / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="never unpickles"):
        load_model(source, dtype=torch.float32, device=CPU)


def test_numbers_of_an_adapter_that_are_none(saved: Path) -> None:
    source, weights = find_model(str(saved)), saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if "lora_B" in n)
    for kind, called in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({**tensors, name: tensors[name].to(kind)}, weights)
        with pytest.raises(FileError, match=f"{name} is stored as {called}"):
            check_weights(source)
        with pytest.raises(FileError, match=f"{name} is stored as {called}"):
            load_model(source, dtype=torch.float32, device=CPU)
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    with pytest.raises(FileError, match=f"numbers of {name} are NaN"):
        load_model(source, dtype=torch.float32, device=CPU)


def test_dropout_is_on_in_passes_that_keep_gradients_alone(reference_dir: Path, tmp_path: Path) -> None:
    """And it draws the same where the global generator is in the same state, whatever runs between."""
    plain, model = adapted(reference_dir), adapted(reference_dir, dropout=0.5)
    assert logits(model).equal(logits(plain))
    parts = scorer(model, dropout=7)
    batch = pack([((3, 4, 5), (6, 7, 8)), ((3, 4, 5), (9, 8))], device=CPU)
    with torch.no_grad():
        assert parts.states(batch).equal(scorer(plain).states(batch))
    torch.manual_seed(1)
    first, after = parts.states(batch), torch.rand(())
    torch.manual_seed(1)
    assert parts.states(batch).equal(first)
    assert torch.rand(()).equal(after)
    assert not parts.states(batch).allclose(first)
    torch.manual_seed(1)
    assert not scorer(model, dropout=8).states(batch).allclose(first)
    assert not first.allclose(scorer(plain).states(batch))
    assert logits(model).equal(logits(plain))
    assert scorer(model).states(batch).equal(scorer(plain).states(batch))  # of a recipe without it
    adapters.save_adapter(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_layers_that_are_computed_again_drop_the_same(reference_dir: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(reference_dir, dropout=0.5)
        parts = replace(scorer(model, checkpointing=checkpointing, dropout=7), prefixes=False)
        torch.manual_seed(1)
        parts.states(pack([((3, 4, 5), (6, 7, 8))], device=CPU)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradients[1][name].allclose(g, rtol=1e-4, atol=1e-7) for name, g in gradients[0].items())
