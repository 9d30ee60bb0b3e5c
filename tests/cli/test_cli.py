"""The command line: what it prints, and that bad input ends with one clear message, exit code 2 and nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import remend
from remend.cli import STORY, build_app, main
from remend.console import console, stage, warn
from remend.errors import InputError
from remend.recovery.settings import RecoverConfig


@pytest.fixture
def recipe_file(recipe: dict[str, object], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_version_and_help(run: Any) -> None:
    for words in ("version", "--version"):
        assert run(words)[:2] == (0, f"{remend.__version__}\n")
    assert run("recover", "-h")[0] == 0
    code, out, _ = run("--help")
    assert code == 0
    verbs = "demo recover check degrade export prompts cache-teacher diagnose track correlate report eval compare study"
    assert all(f" {verb} " in out for verb in verbs.split())


def test_check_prints_what_would_run(run: Any, recipe_file: Path) -> None:
    code, out, _ = run("check", recipe_file)
    assert code == 0
    assert "ok: 34 training and 6 held-out prompts, 0.1M parameters, 320 shared token ids; held to int3-g64-asym" in out


def test_check_answers_what_one_asks_before_paying(
    run: Any, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("check", recipe_file)
    assert code == 0
    for part in (
        "Held: int3-g64-asym. Training keeps the student on it.",
        "3 of 34 training prompts, as the model will read them:",
        "   <|im_start|>user",
        "→ the student's answer follows, up to 8 tokens; all of it is trained on",
        "A step trains on 4 answers, at most 32 tokens",
        "128 in 4 steps",
        "loading",
        "measuring",
        "in all",
        "Times: no run was recorded on this machine; a guess",
        "Memory of training: program",
        "model/",
        "checkpoints/",
        "learning rate 1e-3: as given",
    ):
        assert part in out, (part, out)
    long = ("ok: ", "warning: ", "learning rate", "Written to")  # with paths in them, which are not cut
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(long))


def test_check_can_measure(run: Any, recipe_file: Path) -> None:
    code, out, err = run("check", recipe_file, "--measure")
    assert (code, "Times: a step that was timed now." in out) == (0, True), err
    code, _, err = run("check", recipe_file, "--measure", "--no-files")
    assert (code, "--measure loads the models, and --no-files looks at none" in err) == (2, True)


def test_check_warns_of_memory(run: Any, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remend.recovery.forecast.free_bytes", lambda device: 10**6)
    code, _, err = run("check", recipe_file)
    assert (code, "of memory, and below 1 MiB are free. A smaller batch_size" in err) == (0, True)


def test_problems_of_settings_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom remend import cli\nsys.argv = ['remend', 'check', '--student', 'a', '--teacher', 'b', "
        "'--data', 'c', 'stepz=3']\ntry: cli.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), 'unknown key "stepz"' in done.stderr) == ("False", True)


def test_recover_from_a_recipe_with_overrides(run: Any, recipe_file: Path, tmp_path: Path) -> None:
    code, out, err = run("recover", recipe_file, "steps=2", "beta=0.5", f"out={tmp_path / 'other'}")
    assert (code, "Traceback" in err) == (0, False)
    assert "gap closed" in out
    assert "2 steps" in out
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert summary["training_loss"] == "generalised JSD, beta 0.5"
    assert summary["kl_direction"] == "forward KL, teacher‖student"
    assert yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())["steps"] == 2


def test_recover_without_a_recipe_and_export_what_it_made(run: Any, recipe: dict[str, object], tmp_path: Path) -> None:
    four = [w for k in ("student", "teacher", "data", "out") for w in (f"--{k}", recipe[k])]
    rest = ("steps=1", "max_new_tokens=4", "warmup_steps=0", "repair=false", "held_out=4", "device=cpu")
    code, said, _ = run("recover", *four, *rest)
    assert code == 0
    _, _, told = said.partition("What to do next:")
    run_it = str(recipe["out"])
    assert all(text in told for text in (f"{run_it}/report.html", "vllm serve ", f"remend export {run_it} "))
    assert (Path(str(recipe["out"])) / "report.html").is_file()
    code, out, _ = run("export", recipe["out"], "--format", "dense", "--out", tmp_path / "e")
    assert (code, "all weights equal bit for bit" in out) == (0, True)
    assert f"vllm serve {tmp_path / 'e'}\n" in out
    code, _, err = run("export", recipe["out"], "--format", "gguf:bogus", "--out", tmp_path / "b")
    assert (code, 'unknown format "gguf:bogus"' in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "no/such/place/model"}, "no/such/place/model does not exist"),
        ({"data": "missing.jsonl"}, "data file missing.jsonl can't be read"),
        ({"data": "bad.jsonl"}, "bad.jsonl:2: the prompt is empty"),
        ({"stepz": 3}, 'unknown key "stepz". Did you mean "steps"?'),
        ({"beta": 1.5}, '"beta" is 1.5'),
        ({"steps": "many"}, "\"steps\" is 'many'"),
        ({"device": "abacus"}, 'device "abacus" can\'t be used here'),
        ({"held_out": 40}, "none is left to train on"),
    ],
)
def test_bad_settings(
    run: Any, recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "good"}\n{"prompt": "  "}\n')
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    before = sorted(tmp_path.rglob("*"))
    for verb in ("check", "recover"):
        code, _, err = run(verb, "recipe.yaml")
        assert (code, err.count("error:"), "Traceback" in err) == (2, 1, False)
        assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("recover none.yaml", ["can't be read"]),
        ("check list.yaml", ["must be a mapping"]),
        ("check broken.yaml", ["is not valid YAML"]),
        ("recover student=x", ['"teacher" is missing']),
        ("recover recipe.yaml steps", ['"steps" is not of the form key=value']),
        ("check student=x teacher=y data=z out=o --as thin", ['--as is "thin"; allowed is dense']),
        ("recover --resume kept", ["is no remend run"]),
        ("recover recipe.yaml out=kept", ["is not empty"]),
        ("demo --out kept", ["is not empty"]),
    ],
)
def test_bad_words(
    run: Any, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, words: str, messages: list[str]
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    Path("list.yaml").write_text("- a\n- b\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("kept").mkdir()
    Path("kept/notes.txt").write_text("mine")
    code, _, err = run(*words.split())
    assert code == 2
    assert all(message in err for message in messages)
    assert [path.read_text() for path in Path("kept").iterdir()] == ["mine"]


def test_unreadable_models(run: Any, recipe_file: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    for name in ("empty", "pickled", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    for file in Path(recipe["teacher"]).iterdir():
        content = file.read_bytes()
        half = content[: len(content) // 2] if file.suffix == ".safetensors" else content
        (tmp_path / "cut" / file.name).write_bytes(half)
    for name, message in (
        ("empty", "has no config.json"),
        ("text.gguf", "is not a GGUF file"),
        ("pickled", "never unpickles"),
        ("cut", "can't be read"),
    ):
        code, _, err = run("recover", recipe_file, f"teacher={tmp_path / name}")
        assert (code, message in err, "Traceback" in err) == (2, True, False), name


@pytest.mark.parametrize(("key", "name"), [("teacher", "some-org/some-model"), ("data", "some-org/some-data")])
def test_hub_id_without_network(
    run: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    """With what the libraries take from HF_HUB_OFFLINE=1, as on a machine without network."""
    for switch in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{switch}.HF_HUB_OFFLINE", True)
    code, _, err = run("recover", recipe_file, f"{key}={name}")
    assert (code, "run with a network" in err.lower(), name in err, "Traceback" in err) == (2, True, True, False)
    assert not (tmp_path / "run").exists()


def test_options_words_and_a_recipe_are_one_thing(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        remend, "recover", lambda recipe, resume, **keys: seen.append((recipe, keys)) or sys.exit(0), raising=False
    )
    words = (
        "--steps 3 --learning-rate 1e-4 --lora-rank 8 --no-repair --loss jsd --max-new-tokens [4,8] --reference base"
    )
    assert run("recover", recipe_file, *words.split(), "--reference", "base", "beta=0.5")[0] == 0
    ((recipe, keys),) = seen
    assert recipe == recipe_file
    assert keys == {
        "beta": 0.5,
        "steps": 3,
        "learning_rate": "1e-4",
        "lora": {"rank": 8},
        "repair": False,
        "loss": "jsd",
        "max_new_tokens": [4, 8],
        "reference": "base",
    }
    code, _, err = run("recover", recipe_file, "--steps", "3", "steps=4")
    assert (code, "steps is given as --steps and as steps=…" in err) == (2, True)


def test_a_student_and_a_teacher_are_enough(run: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(recipe["out"]).parent)
    code, out, err = run("check", "--student", recipe["student"], "--teacher", recipe["teacher"], "--device", "cpu")
    assert "data: self (the teacher writes the prompts)" in err
    assert "out: runs/20" in err
    assert err.partition("out: ")[2].splitlines()[0].endswith("-student")
    assert not Path("runs").exists()
    assert code in (0, 2), out  # the tiny tokenizer has no chat template, so prompts can't be written


def test_every_key_of_a_recipe_has_an_option_and_a_heading() -> None:
    from remend.recovery.settings import RecoverConfig

    placed = [name for names in RecoverConfig.groups.values() for name in names]
    assert sorted(placed) == sorted(RecoverConfig.model_fields)
    assert set(RecoverConfig.aliases.values()) <= set(placed)


def test_a_key_by_two_names_is_refused(run: Any, recipe_file: Path) -> None:
    code, _, err = run("check", recipe_file, "max_steps=3", "steps=3")
    assert (code, "max_steps is another name of steps, and both are given" in err) == (2, True)
    assert run("check", recipe_file, "max_steps=3")[0] == 0  # over the recipe's


def test_an_interrupted_run_says_how_it_goes_on(
    run: Any, recipe: dict[str, Any], recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("remend.recovery.run.carry_out", interrupted)
    code, _, err = run("recover", recipe_file)
    assert (code, "interrupted before anything was written; give the same command again" in err) == (130, True)


def test_a_signal_before_the_line_is_read_is_no_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_app() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("remend.cli.build_app", build_app)
    code, _, err = run("recipes")
    assert (code, err) == (143, "")


def test_every_verb_has_its_place_in_the_help() -> None:
    command = typer.main.get_group(build_app())
    shown = command.list_commands(typer.Context(command))
    assert shown == [verb for verbs in STORY.values() for verb in verbs]
    assert shown.index("degrade") < shown.index("diagnose") < shown.index("recover") < shown.index("export")


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_hides_progress_and_keeps_warnings(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def recover(*_: Any, **__: Any) -> None:
        with stage("training"):
            warn("[red]steps")
        raise InputError("no more")

    monkeypatch.setattr(remend, "recover", recover)
    monkeypatch.setattr("sys.argv", ["remend", "recover", "steps=1", option])
    with pytest.raises(SystemExit) as stopped:
        main()
    console.quiet = False
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "warning: [red]steps\nerror: no more\n"


def test_verbose_shows_where_an_error_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def recover(*_: Any, **__: Any) -> None:
        raise InputError("no more")

    monkeypatch.setattr(remend, "recover", recover)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "")
    monkeypatch.setattr("sys.argv", ["remend", "-v", "recover", "steps=1"])
    with pytest.raises(SystemExit):
        main()
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no more\n")


def test_options_of_other_tools_are_told_what_to_do_instead(run: Any, recipe: dict[str, Any]) -> None:
    words = [f"{key}={value}" for key, value in recipe.items()]
    for option, part in (
        (["--fp16"], "--fp16 is no option here: float16 is for inference alone"),
        (["fp16=true"], '"fp16" is no key here: float16 is for inference alone'),
        (["--push-to-hub", "true"], "remend push RUN ORG/NAME"),
        (["--dry-run"], "remend check says what a run would do"),
    ):
        code, _, err = run("check", *words, *option)
        assert (code, err.count("\n")) == (2, 1)
        assert part in err
    code, _, err = run("eval", "m", "--tasks", "hellaswag", "--batch_size", "auto")
    assert (code, err) == (2, "error: --tasks is no option here: it is task here: --task lm-eval:hellaswag,ifeval\n")
    code, _, err = run("check", *words, "--nope", "1")
    assert "--torch-dtype" not in err  # what is no option is not suggested
    words = [word for word in words if not word.startswith("dtype")]
    code, _, err = run("check", *words, "--dtype", "float16")
    assert (code, err.count("\n")) == (2, 1)
    assert "needs loss scaling" in err


def test_options_are_understood_with_underscores(run: Any, recipe_file: Path) -> None:
    code, _, err = run("check", recipe_file, "--batch_size", "0", "--max_new_tokens=0")
    assert code == 2
    assert '"batch_size" is 0' in err
    assert '"max_new_tokens" is 0' in err


def test_the_recipe_may_be_an_option(run: Any, recipe_file: Path) -> None:
    assert run("check", "--config", recipe_file)[0] == 0
    code, _, err = run("check", recipe_file, "--config", recipe_file)
    assert (code, "two recipes are given" in err) == (2, True)


def test_help_cuts_no_name_and_loses_no_bracket(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("recover", "--help")
    assert code == 0
    headings = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Arguments:", "Options:", *(f"{name}:" for name in RecoverConfig.groups)]
    assert "--gradient-checkpointing / --no-gradient-checkpointing" in out
    assert "id[@revision]" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    _, out, _ = run("--help")
    assert out.index("Make a damaged model:") < out.index("Bring it back:") < out.index("Serve:")
    assert "private unless you say --public." in " ".join(out.split())  # whole, not cut after a line
