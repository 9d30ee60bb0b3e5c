"""A diagnosis end to end on the tiny model: its figures against slow ones, its words, its cache, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import remend
from helpers.tiny import build_model, build_tokenizer, prompts
from remend.degrade.depth import prune_depth
from remend.diagnosis import severity
from remend.diagnosis.subjects import degraded_of, find
from remend.errors import FileError, InputError
from remend.recovery.job import recover


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path_factory.getbasetemp() / "diagnosis-cache"
    monkeypatch.setenv("REMEND_CACHE", str(root))


def diagnose(reference: Path, students: list[Any], out: Path, data: Path, **more: Any) -> dict[str, Any]:
    options = {"data": str(data), "max_new_tokens": 8, "device": "cpu", **more}
    return remend.diagnose(str(reference), [str(s) for s in students], out, **options)


@pytest.fixture
def diagnosis(reference_dir: Path, student_dir: Path, tmp_path: Path, prompt_file: Path) -> dict[str, Any]:
    return diagnose(reference_dir, [student_dir], tmp_path / "out", prompt_file)


def test_the_file_holds_what_was_promised(diagnosis: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text()) == diagnosis
    assert (tmp_path / "out" / "report.html").is_file()
    assert [layer["layer"] for layer in diagnosis["layers"]] == [0, 1]
    assert {"layer", "cka", "cka_low", "cka_high", "l2", "procrustes", "knn"} <= set(diagnosis["layers"][0])
    assert {"kl", "reverse_kl", "top1_agreement"} <= set(diagnosis["behaviour"])
    assert diagnosis["severity"] in severity.SEVERITIES
    assert diagnosis["rows"] + diagnosis["rows_left_out"] == diagnosis["sequences"] == 40
    assert "debiased" in diagnosis["estimator"]["name"]
    assert any("40 rows" in w for w in diagnosis["warnings"])
    for layer in diagnosis["layers"]:
        assert layer["cka_low"] <= layer["cka"] <= layer["cka_high"]
        assert layer["rerun"] == pytest.approx(1.0, abs=1e-9)
        assert layer["random"] < layer["cka"]


def test_behaviour_against_a_slow_second_computation(
    diagnosis: dict[str, Any], reference_dir: Path, student_dir: Path, tokenizer: Any
) -> None:
    teacher, student = (AutoModelForCausalLM.from_pretrained(p).double() for p in (reference_dir, student_dir))
    kl = reverse = agree = tokens = 0.0
    for text in prompts():
        chat = [{"role": "user", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 8 and (not answer or answer[-1] != tokenizer.eos_token_id):
                answer.append(int(teacher(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            p, q = (
                torch.log_softmax(m(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1], -1)
                for m in (teacher, student)
            )
        kl += float((p.exp() * (p - q)).sum())
        reverse += float((q.exp() * (q - p)).sum())
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(answer)
    assert diagnosis["behaviour"]["tokens"] == tokens
    assert diagnosis["behaviour"]["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert diagnosis["behaviour"]["reverse_kl"] == pytest.approx(reverse / tokens, rel=1e-4)
    assert diagnosis["behaviour"]["top1_agreement"] == pytest.approx(agree / tokens)
    low, high = diagnosis["behaviour"]["kl_95"]
    assert low < diagnosis["behaviour"]["kl"] < high


def test_every_sentence_rests_on_numbers_that_are_there(diagnosis: dict[str, Any]) -> None:
    def at(pointer: str) -> Any:
        value: Any = diagnosis
        for part in pointer.split("/")[1:]:
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value

    for sentence in [*diagnosis["sentences"], diagnosis["recommendation"]]:
        assert sentence["rests_on"]
        for pointer in sentence["rests_on"]:
            assert at(pointer) is not None
    assert f"{diagnosis['behaviour']['kl']:.3f}" in diagnosis["sentences"][0]["text"]
    assert f"{diagnosis['layers'][diagnosis['ranking'][0]]['cka']:.3f}" in diagnosis["sentences"][1]["text"]


def test_a_copy_is_undamaged_and_exactly_aligned(
    reference_dir: Path, tmp_path: Path, prompt_file: Path, tokenizer: Any
) -> None:
    AutoModelForCausalLM.from_pretrained(reference_dir).save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    diagnosis = diagnose(reference_dir, [tmp_path / "copy"], tmp_path / "out", prompt_file)
    assert diagnosis["severity"] == "none"
    assert [layer["cka"] for layer in diagnosis["layers"]] == [1.0, 1.0]
    assert diagnosis["behaviour"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert diagnosis["behaviour"]["top1_agreement"] == 1.0
    assert "nothing to recover" in diagnosis["recommendation"]["text"]


def test_another_model_is_broken_and_not_worth_it(
    reference_dir: Path, tmp_path: Path, prompt_file: Path, tokenizer: Any
) -> None:
    build_model(len(tokenizer), seed=77).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    diagnosis = diagnose(reference_dir, [tmp_path / "other"], tmp_path / "out", prompt_file)
    assert diagnosis["severity"] == "broken"
    certain, wide = ([{"layer": 0, "cka": 0.1, "cka_high": high, "random": 0.2}] for high in (0.15, 0.7))
    for layers, said in ((certain, "Recovery is not worth it"), (wide, "Whether recovery is worth it can't be said")):
        figures = {"severity": "broken", "layers": layers, "null_max": 0.1}
        assert severity.recommendation(figures, "dense").text.startswith(said)
    assert "worth it" in diagnosis["recommendation"]["text"]


def test_fewer_layers_are_matched_by_their_map(reference_dir: Path, tmp_path: Path, prompt_file: Path) -> None:
    prune_depth(str(reference_dir), tmp_path / "short", layers=[0], method="list", probe=False)
    diagnosis = diagnose(reference_dir, [tmp_path / "short"], tmp_path / "recorded", prompt_file)
    assert diagnosis["layer_map"] == [1]
    assert diagnosis["kind"] == "smaller"
    assert len(diagnosis["grid"]) == 1
    assert len(diagnosis["grid"][0]) == 2
    (tmp_path / "short" / "degradation.json").unlink()
    again = diagnose(reference_dir, [tmp_path / "short"], tmp_path / "inferred", prompt_file)
    assert again["layer_map"] == [1]
    given = diagnose(reference_dir, [tmp_path / "short"], tmp_path / "given", prompt_file, layer_map=[0])
    assert given["layer_map"] == [0]
    with pytest.raises(InputError, match="layer_map"):
        diagnose(reference_dir, [tmp_path / "short"], tmp_path / "bad", prompt_file, layer_map=[2])


def test_a_recovered_run_is_compared_with_what_it_was_made_from(
    recipe: dict[str, Any], reference_dir: Path, student_dir: Path, tmp_path: Path, prompt_file: Path
) -> None:
    result = recover(**{**recipe, "steps": 8, "save_every": 0})
    diagnosis = diagnose(reference_dir, [student_dir, result.out], tmp_path / "out", prompt_file)
    (after,) = diagnosis["others"]
    change = after["compared_with"]
    assert change["name"] == diagnosis["name"]
    assert after["behaviour"]["kl"] < diagnosis["behaviour"]["kl"]
    assert change["gap_closed_kl"] == pytest.approx(1 - after["behaviour"]["kl"] / diagnosis["behaviour"]["kl"])
    for row, before, now in zip(change["layers"], diagnosis["layers"], after["layers"], strict=True):
        assert row["change"] == pytest.approx(now["cka"] - before["cka"], abs=1e-6)
        assert row["low"] <= row["change"] <= row["high"]
    assert diagnosis["compared_with"] is None


def test_the_second_time_the_reference_is_not_asked_again(
    reference_dir: Path, student_dir: Path, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remend.diagnosis import reference

    options = {"cache": str(tmp_path / "cache"), "sites": ["attention", "mlp"]}
    first = diagnose(reference_dir, [student_dir], tmp_path / "a", prompt_file, **options)

    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("the reference was run again")

    monkeypatch.setattr(reference, "answer", refuse)
    monkeypatch.setattr(reference, "capture", refuse)
    second = diagnose(reference_dir, [student_dir], tmp_path / "b", prompt_file, **options)
    for key in ("layers", "behaviour", "sites", "grid", "stretches", "norms"):
        assert first[key] == second[key]
    assert set(first["sites"]) == {"attention", "mlp"}
    with pytest.raises(AssertionError, match="again"):
        diagnose(reference_dir, [student_dir], tmp_path / "c", prompt_file, **{**options, "seed": 1})


@pytest.mark.parametrize("name", ["completions.jsonl", "rows.safetensors", "states-00000.safetensors", "done.json"])
def test_a_cache_that_changed_is_made_again(
    reference_dir: Path,
    student_dir: Path,
    tmp_path: Path,
    prompt_file: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    first = diagnose(reference_dir, [student_dir], tmp_path / "a", prompt_file, cache=str(tmp_path / "cache"))
    (damaged,) = tmp_path.glob(f"cache/diagnosis/*/{name}")
    content = bytearray(damaged.read_bytes())
    content[-10] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    second = diagnose(reference_dir, [student_dir], tmp_path / "b", prompt_file, cache=str(tmp_path / "cache"))
    assert "changed since it was written" in " ".join(capsys.readouterr().err.split())
    assert (first["layers"], first["behaviour"]) == (second["layers"], second["behaviour"])
    third = diagnose(reference_dir, [student_dir], tmp_path / "c", prompt_file, cache=str(tmp_path / "cache"))
    assert "changed since" not in capsys.readouterr().err
    assert third["layers"] == second["layers"]


def test_two_processes_that_fill_one_cache_leave_it_whole(
    reference_dir: Path,
    student_dir: Path,
    tmp_path: Path,
    prompt_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from remend.diagnosis import reference

    capture = reference.capture

    def beside_another(parts: Any, name: str, *rest: Any, **options: Any) -> Any:
        (folder,) = tmp_path.glob("cache/diagnosis/*")
        (folder / "done.json").write_text('{"files": {}}')  # the other one's record, while this one still reads
        return capture(parts, name, *rest, **options)

    monkeypatch.setattr(reference, "capture", beside_another)
    diagnose(reference_dir, [student_dir], tmp_path / "a", prompt_file, cache=str(tmp_path / "cache"))
    monkeypatch.undo()
    capsys.readouterr()
    diagnose(reference_dir, [student_dir], tmp_path / "b", prompt_file, cache=str(tmp_path / "cache"))
    assert "changed since it was written" not in " ".join(capsys.readouterr().err.split())


def test_answers_that_are_cut_at_their_row_give_the_same_rows(
    reference_dir: Path, student_dir: Path, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remend.diagnosis import reference

    every = diagnose(reference_dir, [student_dir], tmp_path / "a", prompt_file, cache=str(tmp_path / "c1"))
    monkeypatch.setattr(reference, "WHOLE", 5)
    half = diagnose(reference_dir, [student_dir], tmp_path / "b", prompt_file, cache=str(tmp_path / "c2"))
    assert (every["whole_answers"], half["whole_answers"]) == (40, 20)
    assert half["behaviour"]["tokens"] < every["behaviour"]["tokens"]
    assert list(half["kl_sums"]) == list(every["kl_sums"])[:20]
    for name in ("cka", "l2", "procrustes"):
        ours, theirs = ([layer[name] for layer in one["layers"]] for one in (half, every))
        assert ours == pytest.approx(theirs, abs=1e-5)
    first = list(every["kl_sums"].values())[:20]
    assert half["behaviour"]["kl"] == pytest.approx(sum(kl for _, kl in first) / sum(n for n, _ in first), rel=1e-4)


def test_a_layer_that_is_not_finite_is_named(
    reference_dir: Path, tmp_path: Path, prompt_file: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = 3e38  # a number, and its products are none
    model.save_pretrained(tmp_path / "huge")
    tokenizer.save_pretrained(tmp_path / "huge")
    with pytest.raises(InputError, match="not finite"):
        diagnose(reference_dir, [tmp_path / "huge"], tmp_path / "out", prompt_file)
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_one_message(
    reference_dir: Path, student_dir: Path, tmp_path: Path, prompt_file: Path
) -> None:
    with pytest.raises(InputError, match="rows is 3"):
        diagnose(reference_dir, [student_dir], tmp_path / "o", prompt_file, rows=3)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts(3)))
    with pytest.raises(InputError, match="3 prompts"):
        diagnose(reference_dir, [student_dir], tmp_path / "o", few)
    with pytest.raises(InputError, match="unknown site nose"):
        diagnose(reference_dir, [student_dir], tmp_path / "o", prompt_file, sites=["nose"])
    with pytest.raises(InputError, match="given twice"):
        diagnose(reference_dir, [student_dir, student_dir], tmp_path / "o", prompt_file)
    with pytest.raises(InputError, match="no student"):
        diagnose(reference_dir, [], tmp_path / "o", prompt_file)
    with pytest.raises(FileError, match="does not exist"):
        diagnose(reference_dir, [tmp_path / "absent"], tmp_path / "o", prompt_file)
    other = tmp_path / "tongue"
    shutil.copytree(student_dir, other)
    vocabulary = build_tokenizer()
    table = json.loads(vocabulary.backend_tokenizer.to_str())
    table["model"]["vocab"] = {t: (i + 1) % len(vocabulary) if i > 5 else i for t, i in table["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises((InputError, FileError)):
        diagnose(reference_dir, [other], tmp_path / "o", prompt_file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(InputError, match="full"):
        diagnose(reference_dir, [student_dir], tmp_path / "full", prompt_file)


def test_students_are_named_apart(reference_dir: Path, student_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(student_dir, tmp_path / "a" / "model")
    shutil.copytree(student_dir, tmp_path / "b" / "model")
    named = find([str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"), str(student_dir)])
    assert [s.name for s in named] == ["a", "b", "student"]
    assert degraded_of(named) == [None, 0, 0]


@pytest.mark.parametrize(
    ("kl", "agreement", "repetition", "word"),
    [
        (0.0, 1.0, 0.0, "none"),
        (0.009, 0.98, 0.0, "none"),
        (0.009, 0.90, 0.0, "mild"),
        (0.2, 0.9, 0.0, "mild"),
        (0.3, 0.9, 0.0, "severe"),
        (0.2, 0.7, 0.0, "severe"),
        (1.6, 0.9, 0.0, "broken"),
        (0.2, 0.4, 0.0, "broken"),
        (0.2, 0.9, 0.6, "broken"),
    ],
)
def test_severity_is_the_worst_of_three(kl: float, agreement: float, repetition: float, word: str) -> None:
    behaviour = {"kl": kl, "top1_agreement": agreement}
    assert severity.severity(behaviour, {"repetition": repetition}, {"repetition": 0.1}) == word


def test_prompts_that_leave_no_position_for_an_answer_are_refused_with_the_models_positions(
    tokenizer: Any, tmp_path: Path, prompt_file: Path
) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "student")
    why = r"have over 8 \(the model has 16 positions, 8 of them for the answer\) tokens .*; lower --max-new-tokens, or"
    with pytest.raises(InputError, match=rf"0 prompts are there.*40 of 40 prompts {why}"):
        diagnose(tmp_path / "model", [tmp_path / "student"], tmp_path / "out", prompt_file)
