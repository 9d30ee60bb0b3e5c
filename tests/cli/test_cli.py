"""The command line: what it prints, and that bad input ends with one clear message, exit code 2 and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.tiny import build_model
from remend.models import adapters
from remend.models.load import save_model


@pytest.fixture
def recipe_file(recipe: dict[str, object], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_check_prints_what_would_run(run: Any, recipe_file: Path) -> None:
    code, out, _ = run("check", recipe_file)
    assert code == 0
    assert "ok: 34 training and 6 held-out prompts, 0.1M parameters, 320 shared token ids; held to int3-g64-asym" in out


def test_recover_from_a_recipe_with_overrides(run: Any, recipe_file: Path, tmp_path: Path) -> None:
    code, out, err = run("recover", recipe_file, "steps=2", "beta=0.5", f"out={tmp_path / 'other'}")
    assert (code, "Traceback" in err) == (0, False)
    assert "gap closed" in out
    assert "2 steps" in out
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert summary["training_loss"] == "generalised JSD, beta 0.5"
    assert summary["kl_direction"] == "forward KL, teacher‖student"
    assert yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())["steps"] == 2


def test_recover_without_a_recipe(run: Any, recipe: dict[str, object]) -> None:
    four = [w for k in ("student", "teacher", "data", "out") for w in (f"--{k}", recipe[k])]
    code, _, _ = run("recover", *four, "steps=1", "max_new_tokens=4", "warmup_steps=0", "device=cpu")
    assert code == 0
    assert (Path(str(recipe["out"])) / "report.html").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "no/such/place/model"}, "no/such/place/model does not exist"),
        ({"data": "missing.jsonl"}, "data file missing.jsonl can't be read"),
        ({"stepz": 3}, 'unknown key "stepz". Did you mean "steps"?'),
        ({"beta": 1.5}, '"beta" is 1.5'),
        ({"steps": "many"}, "\"steps\" is 'many'"),
        ({"batch_size": 0}, '"batch_size" is 0'),
        ({"temperature": 0}, '"temperature" is 0'),
        ({"device": "abacus"}, 'device "abacus" can\'t be used here'),
        ({"held_out": 40}, "none is left to train on"),
    ],
)
def test_bad_settings(
    run: Any, recipe: dict[str, object], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    before = sorted(tmp_path.rglob("*"))
    for verb in ("check", "recover"):
        code, _, err = run(verb, path)
        assert code == 2
        assert message in err
        assert err.count("error:") == 1
        assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"', "rows.jsonl:2: not valid JSON"),
        ('{"question": "a"}', 'rows.jsonl:2: the row has no "prompt"'),
        ('{"prompt": "  "}', "rows.jsonl:2: the prompt is empty"),
        ('{"prompt": 7}', "rows.jsonl:2: prompt must be a string or a list of messages, got int"),
        ('["a"]', "rows.jsonl:2: a row must be an object"),
        ('{"prompt": [{"role": "user"}]}', "rows.jsonl:2: message 1 (user) has no text"),
        ('{"prompt": []}', "rows.jsonl:2: the prompt is an empty list"),
    ],
)
def test_bad_rows(run: Any, recipe_file: Path, tmp_path: Path, row: str, message: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "good"}\n' + row + "\n")
    code, _, err = run("recover", recipe_file, f"data={data}")
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_bad_recipes(run: Any, tmp_path: Path) -> None:
    code, _, err = run("recover", tmp_path / "none.yaml")
    assert (code, "can't be read" in err) == (2, True)
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    code, _, err = run("check", tmp_path / "list.yaml")
    assert (code, "must be a mapping" in err) == (2, True)
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    code, _, err = run("check", tmp_path / "broken.yaml")
    assert (code, "is not valid YAML" in err) == (2, True)
    code, _, err = run("recover", "student=x")
    assert code == 2
    assert all(f'"{key}" is missing' in err for key in ("teacher", "data", "out"))
    code, _, err = run("recover", "recipe.yaml", "steps")
    assert (code, '"steps" is not of the form key=value' in err) == (2, True)


def test_unreadable_models(run: Any, recipe_file: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(recipe["teacher"]).iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    for path, message in (
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "text.gguf", "is not a GGUF file"),
        (pickled, "never unpickles"),
        (cut, "can't be read"),
    ):
        code, _, err = run("recover", recipe_file, f"teacher={path}")
        assert code == 2, path
        assert message in err
        assert "Traceback" not in err


def test_hub_id_without_network(recipe_file: Path, tmp_path: Path) -> None:
    """In its own process, with the hub's own offline switch, as on a machine without network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    for key in ("teacher=some-org/some-model", "data=some-org/some-data"):
        done = subprocess.run(
            [sys.executable, "-m", "remend", "recover", str(recipe_file), key],
            capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2
        assert key.partition("=")[2] in done.stderr
        assert "run with a network" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_out_of_another_run_and_resume_of_none(run: Any, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, _, err = run("recover", recipe_file)
    assert (code, "is not empty" in err) == (2, True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    code, _, err = run("recover", "--resume", tmp_path / "run")
    assert (code, "is no remend run" in err) == (2, True)
    code, _, err = run("demo", "--out", tmp_path / "run")
    assert (code, "is not empty" in err) == (2, True)


def test_version_and_help(run: Any) -> None:
    import remend as package

    assert run("version")[:2] == (0, f"{package.__version__}\n")
    code, out, _ = run("--help")
    assert code == 0
    assert all(verb in out for verb in ("demo", "recover", "check", "degrade"))


def test_degrade_prune_finetune_and_export(run: Any, reference_dir: Path, tmp_path: Path) -> None:
    code, out, _ = run("degrade", "prune", reference_dir, "--sparsity", "0.5", "--out", tmp_path / "p", "--no-probe")
    assert (code, "sparsity: 50" in out) == (0, True)
    rows = tmp_path / "task.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    words = ("--data", rows, "--steps", "1", "--no-probe", "--out", tmp_path / "f")
    code, out, _ = run("degrade", "finetune", reference_dir, *words)
    assert (code, "fine-tuning full" in out) == (0, True)
    code, out, _ = run("export", tmp_path / "p", "--format", "dense", "--out", tmp_path / "e")
    assert (code, "'weights_equal': True" in out) == (0, True)
    code, _, err = run("export", tmp_path / "p", "--format", "gguf:bogus", "--out", tmp_path / "b")
    assert (code, 'unknown format "gguf:bogus"' in err) == (2, True)
    code, _, err = run("check", "student=x", "teacher=y", "data=z", "out=o", "--as", "thin")
    assert (code, '--as is "thin"; allowed is dense' in err) == (2, True)


def test_what_a_student_does_not_hold_ends_before_training(
    run: Any, recipe: dict[str, Any], reference_dir: Path, tmp_path: Path
) -> None:
    """A mask, a grid and an adapter's base that the files don't have any more."""
    run("degrade", "prune", reference_dir, "--sparsity", "0.5", "--no-probe", "--out", tmp_path / "mask")
    run("degrade", "quantize", reference_dir, "--format", "int3-g64", "--no-probe", "--out", tmp_path / "grid")
    for name in ("mask", "grid"):
        shutil.copy(reference_dir / "model.safetensors", tmp_path / name)
    tokenizer, other = AutoTokenizer.from_pretrained(reference_dir), build_model(320, seed=5)
    adapted = AutoModelForCausalLM.from_pretrained(reference_dir)
    adapters.add_lora(adapted, rank=4, base=str(reference_dir))
    save_model(adapted, tokenizer, tmp_path / "adapter")
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    settings = tmp_path / "adapter" / "adapter_config.json"
    changed = {**json.loads(settings.read_text()), "base_model_name_or_path": str(tmp_path / "other")}
    settings.write_text(json.dumps(changed))
    parts = {"mask": "the files hold no zeros", "grid": "does not lie on its grid", "adapter": "has other weights"}
    for name, part in parts.items():
        words = [f"{k}={recipe[k]}" for k in ("teacher", "data")] + [f"student={tmp_path / name}"]
        code, _, err = run("recover", *words, f"out={tmp_path / name}-out", "steps=1", "warmup_steps=0", "device=cpu")
        assert (code, part in err, "Traceback" in err) == (2, True, False), err
        assert not (tmp_path / f"{name}-out" / "summary.json").exists()
