"""remend plan on the command line: a table of bytes, which settings fit, and one message for what can't be."""

from __future__ import annotations

from typing import Any


def test_bytes_by_phase_and_kind_and_what_fits(run: Any) -> None:
    code, out, err = run("plan", "--shape", "Qwen2.5-7B", "--gpu", 80, "--gpus", 8)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "Qwen2.5-7B: 7.62 billion parameters" in said
    for phase in ("loading", "repair", "sampling", "training", "measuring"):
        assert any(line.split()[:1] == [phase] for line in out.splitlines()), phase
    for kind in ("student", "teacher", "masters", "gradients", "moments", "Gram matrices", "activations"):
        assert any(line.strip().startswith(kind) for line in out.splitlines()), kind
    assert "train: scales fits one GPU of 80 GB with repair: false" in said
    assert "train: all does not fit one GPU of 80 GB" in said
    assert "8 GPUs share the prompts of a step; each holds both models" in said
    assert "A repair alone, block by block (steps: 0, placement: disk), fits" in said
    assert "What would fit" not in said


def test_a_number_of_parameters_says_what_it_is_taken_for(run: Any) -> None:
    code, out, _ = run("plan", "--params", "7b", "--memory", 24)
    assert code == 0
    said = " ".join(out.split())
    assert "note: taken for Qwen2.5-7B, which has 7.62 billion parameters" in said
    assert "What would fit:" in said
    assert "is the largest that fits" in said
    assert "GPU" not in said


def test_bad_input_is_one_message(run: Any) -> None:
    for words, message in (
        (("--shape", "Qwen9-7B", "--gpu", 80), "is not known; allowed: Qwen2.5-0.5B"),
        (("--params", "seven", "--gpu", 80), "allowed is a number of parameters from 1m to 10t"),
        (("--params", "7b", "--gpu", 0), "--gpu is 0; allowed is a number of GB above 0"),
        (("--gpu", 80), "give the model either by --shape"),
    ):
        code, out, err = run("plan", *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert "Traceback" not in err
