"""The zoo's table: the command runs, and each fault that it is there for gets its mark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from campaign.cells import Job, blocks_left_out, load, matrices, on_whole_grid, recovered, same_model, two_of_four
from campaign.table import apart, as_markdown, do, lost
from campaign.zoo import make

TABLE = str(Path(__file__).with_name("table.py"))


def test_the_command_tries_what_is_missing_and_writes_a_table(tmp_path: Path) -> None:
    out, before = tmp_path / "out", tmp_path / "before.json"
    out.mkdir()
    tried = {"rtn": {"mark": "r", "seconds": 1.0, "jobs": {"rtn": ["r", "no room"]}}}
    (out / "opt.json").write_text(json.dumps(tried))
    before.write_text(json.dumps({"opt": {"rtn": "ok"}}))
    words = ["llama", "phi3", "opt", "--cells", "rtn,heads", "--out", str(out), "--before", str(before)]
    done = subprocess.run([sys.executable, TABLE, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]  # for opt, which worked before
    page = (out / "table.md").read_text()
    assert "| llama | ok | ok |" in page
    assert "| phi3 | ok | r |" in page
    assert "| opt | r |  |" in page
    table = json.loads((out / "table.json").read_text())
    assert table["counts"] == {"ok": 3, "r": 2}
    assert table["worked_before"] == ["opt rtn (r)"]
    assert "can't be cut" in table["models"]["phi3"]["heads"]["jobs"]["heads"][1]


Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-OSS, whose experts are stored transposed."""
    directory = tmp_path_factory.mktemp("zoo") / "gpt-oss"
    make("gpt-oss", directory)
    return directory


def changed(reference: Path, directory: Path, *changes: Change) -> Path:
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    with torch.no_grad():
        for change in changes:
            change(model)
    model.save_pretrained(directory)
    (directory / "degradation.json").write_text(json.dumps({"bits_per_weight": 4.5, "sparsity": 0.5}))
    return directory


def rounded(model: Any) -> None:
    for weight in matrices(model).values():
        groups = weight.reshape(-1, 32)
        scale = groups.abs().amax(1, keepdim=True) / 7
        weight.copy_(((groups / scale).round() * scale).reshape(weight.shape))


def pruned(model: Any) -> None:
    for weight in matrices(model).values():
        fours = weight.reshape(-1, 4)
        weight.copy_((fours * (fours.abs() >= fours.abs().sort(1).values[:, 2:3])).reshape(weight.shape))


def an_expert_is_left(model: Any) -> None:
    model.model.layers[1].mlp.experts.down_proj[2].normal_()


def the_router_is_moved(model: Any) -> None:
    model.model.layers[0].mlp.router.weight.mul_(1.01)


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("degradation", "tampering", "fault"),
    [
        (rounded, nothing, ""),
        (rounded, an_expert_is_left, "2% of the decoder's matrix weights were not reached"),
        (rounded, the_router_is_moved, "changed though they are no matrices of the decoder: model.layers.*.mlp.router"),
        (pruned, nothing, ""),
        (pruned, an_expert_is_left, "2% of the decoder's matrix weights were not reached"),
    ],
)
def test_a_tampered_student_is_silently_wrong(
    reference: Path, tmp_path: Path, degradation: Change, tampering: Change, fault: str
) -> None:
    student = changed(reference, tmp_path / "student", degradation, tampering)
    check = on_whole_grid if degradation is rounded else two_of_four
    mark, text = do(Job("try", ["version"], partial(check, reference, student)), tmp_path, 60)
    assert mark == ("S" if fault else "ok"), text
    assert fault in text


def test_a_record_that_is_untrue_is_a_fault(reference: Path, tmp_path: Path) -> None:
    for degradation, check in ((rounded, on_whole_grid), (pruned, two_of_four)):
        student = changed(reference, tmp_path / degradation.__name__, degradation)
        assert check(reference, student) == ""
        (student / "degradation.json").write_text(json.dumps({"bits_per_weight": 4.1, "sparsity": 0.42}))
        assert " said, and " in check(reference, student)


def test_an_export_of_another_model_is_silently_wrong(reference: Path, tmp_path: Path) -> None:
    same, other = changed(reference, tmp_path / "same"), changed(reference, tmp_path / "other", the_router_is_moved)
    assert same_model(reference, same, "dense") == ""
    assert same_model(reference, other, "dense") == "tensors differ: model.layers.*.mlp.router.weight"


def test_depth_without_another_block_than_it_says_is_silently_wrong(reference: Path, tmp_path: Path) -> None:
    def shallow(gone: int) -> Change:
        def remove(model: Any) -> None:
            del model.model.layers[gone]
            model.config.num_hidden_layers = 3
            del model.config.layer_types[gone]

        return remove

    for gone, fault in ((1, ""), (2, "from the reference without blocks [1]")):
        student = changed(reference, tmp_path / str(gone), shallow(gone))
        (student / "degradation.json").write_text(json.dumps({"removed_layers": [1]}))
        assert fault in (text := blocks_left_out(reference, student))
        assert bool(text) == bool(fault)


def test_a_recovery_that_left_its_grid_or_zeros_is_silently_wrong(reference: Path, tmp_path: Path) -> None:
    for student, fault in ((rounded, "left the grid"), (pruned, "zeros came back")):
        before = changed(reference, tmp_path / student.__name__, student)
        if student is rounded:
            (before / "remend").mkdir()
            (before / "remend" / "grid.safetensors").touch()
        run = tmp_path / f"run-{student.__name__}"
        changed(before, run / "model", an_expert_is_left)
        assert recovered(reference, before, run) == f"{fault}: model.layers.*.mlp.experts.down_proj"


def test_a_recovery_whose_file_tells_of_another_grid_is_silently_wrong(reference: Path, tmp_path: Path) -> None:
    student, run = changed(reference, tmp_path / "rtn", rounded), tmp_path / "run"
    changed(student, run / "model")
    stored = {}
    for name, weight in matrices(load(student)).items():
        experts = {f"{name}.{e}": w for e, w in enumerate(weight)} if weight.ndim == 3 else {name: weight}
        for own, weight_OI in experts.items():
            weight_OI = weight_OI.contiguous()
            scales_OG = weight_OI.unflatten(1, (-1, 32)).abs().amax(2) / 7
            stored[f"{own}.scales"] = scales_OG
            stored[f"{own}.codes"] = (weight_OI / scales_OG.repeat_interleave(32, 1) + 8).round().to(torch.uint8)
    for directory in (student, run / "model"):
        (directory / "remend").mkdir()
        save_file(stored, directory / "remend" / "grid.safetensors")
    (run / "summary.json").write_text(json.dumps({"degraded": {"kl": 0.1}, "recovered": {"kl": 0.2}}))
    assert recovered(reference, student, run) == "nothing was won back: KL was 0.10000, and is 0.20000"
    stored["model.layers.1.mlp.experts.down_proj.2.codes"][5] = 0
    save_file(stored, run / "model" / "remend" / "grid.safetensors")
    assert recovered(reference, student, run) == "not scale times code: model.layers.*.mlp.experts.down_proj.*"


def test_weights_that_a_file_lacks_are_a_fault(reference: Path, tmp_path: Path) -> None:
    model = load(reference)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.router.bias" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(AssertionError, match=r"missing_keys.*layers\.2\.mlp\.router\.bias"):
        load(tmp_path)


def _sleep(seconds: float) -> list[str]:
    time.sleep(seconds)
    return []


def test_what_a_command_comes_to(tmp_path: Path) -> None:
    def mark(*words: str) -> str:
        return do(Job("try", words, lambda: ""), tmp_path, 60)[0]

    assert mark("version") == "ok"
    assert mark("export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")) == "r"
    assert mark("export", "--no-such-option") == "X"  # a mistake of the table itself is no refusal
    assert apart(lambda: os._exit(9), 60, tmp_path / "crash.log") == ["X", "the process died with 9"]
    assert apart(partial(_sleep, 60), 0.2, tmp_path / "hang.log") == ["X", "no end after 0 s"]


def test_the_page_groups_reasons_and_names_what_worked_before() -> None:
    def row(mark: str, text: str) -> dict[str, dict[str, Any]]:
        return {"rtn": {"mark": mark, "seconds": 1.0, "jobs": {"rtn": [mark, text]}}}

    rows = {
        "llama": row("ok", ""),
        "phi": row("r", "a phi model has 3 of 4"),
        "opt": row("r", "an opt model has 2 of 4"),
        "gpt2": row("X", "IndexError"),
    }
    worse = lost(rows, {"llama": {"rtn": "ok"}, "opt": {"rtn": "ok"}, "gpt2": {"rtn": "r"}})
    assert worse == ["opt rtn (r)"]
    exported = {"mixtral": {"c-t": rows["phi"]["rtn"]}}
    assert lost(exported, {"mixtral": {"c-t": "ok", "rtn": "S"}}) == []
    assert lost(exported, {"mixtral": {"c-t": "ok", "rtn": "ok"}}) == ["mixtral c-t (r)"]
    page = as_markdown(rows, worse)
    assert "| gpt2 | X |" in page
    assert "- opt rtn (r)" in page
    assert "- `MODEL model has N of N`: phi rtn, opt rtn" in page
