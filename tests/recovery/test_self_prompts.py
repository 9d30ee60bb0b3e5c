"""Prompts that a model writes itself: where the user's turn begins and ends, what is kept, and that seeds settle it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.tiny import TOPICS, build_model, build_tokenizer
from remend.data.examples import load_examples, prompt_id
from remend.data.order import derive_seed
from remend.data.templates import Encoded, render
from remend.errors import FileError, InputError
from remend.models.find import find_model, hash_files
from remend.models.load import load_model, load_tokenizer
from remend.models.sampling.rollout import Rollout
from remend.recovery.self_prompt_filters import Counts
from remend.recovery.self_prompts import (
    UserTurn,
    beginning,
    collect,
    generate,
    stats_path,
    user_turn,
    write_self_prompts,
    written,
)

EOS = 2
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


class Fake:
    """Writes texts by seed alone, now and then without an end; remembers the sizes of its batches."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.sizes: list[int] = []
        self.asked: set[tuple[int, float]] = set()

    def __call__(
        self, prompts: Sequence[Encoded], *, seeds: Sequence[int], max_new_tokens: int = 96, temperature: float = 1.0
    ) -> list[Rollout]:
        self.sizes.append(len(prompts))
        self.asked.add((max_new_tokens, temperature))
        return [self.one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one(self, prompt: Encoded, seed: int) -> Rollout:
        first = ["Tell", "Name", "Draw", "Can", "Sing", "Sell", "Bake"][seed % 7]
        topics = [TOPICS[(seed >> shift) % len(TOPICS)] for shift in (3, 7, 11, 15)]
        tokens = self.tokenizer(f"{first} {' and '.join(topics)} on day {seed % 1000}?")["input_ids"]
        clipped = seed % 5 == 0
        return Rollout(prompt.id, prompt.tokens, tuple(tokens if clipped else [*tokens, EOS]), clipped)


def rollout(tokenizer: Any, text: str, end: int | None = EOS) -> Rollout:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Rollout("0", (), tuple(tokens if end is None else [*tokens, end]), end is None)


def spoken_by(template: str | None, *extra: str) -> Any:
    """The tiny tokenizer with another chat template."""
    tokenizer = build_tokenizer(extra)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("system", ["", "<|im_start|>system\nBe kind.<|im_end|>\n"])
def test_the_turn_begins_after_the_user_header(system: str) -> None:
    tokenizer = spoken_by(SYSTEM) if system else build_tokenizer()
    turn = user_turn(tokenizer, (0,))
    assert turn.text == f"{system}<|im_start|>user\n"
    assert render(tokenizer, "Hello there").startswith(turn.text + "Hello there<|im_end|>")
    assert turn.tokens == tuple(tokenizer(turn.text, add_special_tokens=False)["input_ids"])
    assert turn.ends == (0, EOS)  # the template's end of turn, beside what ends an answer
    assert (turn.closing, turn.chat) == ("", True)
    assert "<|im_start|>" in turn.marks


def test_a_template_may_close_the_turn_with_plain_text_or_a_token_of_its_own() -> None:
    tokenizer = spoken_by(BRACKETS)
    turn = user_turn(tokenizer, (EOS,))
    assert (turn.text, turn.closing, turn.ends) == ("[INST]", "[/INST]", (EOS,))
    assert written(tokenizer, turn, rollout(tokenizer, " Why is it? [/INST] Because", end=None)) == "Why is it?"
    assert written(tokenizer, turn, rollout(tokenizer, " Why is it?", end=None)) is None
    assert written(tokenizer, turn, rollout(tokenizer, " Why is it?")) == "Why is it?"
    tokenizer = spoken_by(BRACKETS, "[/INST]")
    turn, token = user_turn(tokenizer, (EOS,)), tokenizer.convert_tokens_to_ids("[/INST]")
    assert (turn.closing, turn.ends) == ("", (EOS, token))
    assert written(tokenizer, turn, rollout(tokenizer, " Why is it?", end=token)) == "Why is it?"


def test_a_turn_that_did_not_end_is_none_and_special_tokens_stay_visible(tokenizer: Any) -> None:
    turn = user_turn(tokenizer, (EOS,))
    assert written(tokenizer, turn, rollout(tokenizer, "Tell me about rain", end=None)) is None
    assert written(tokenizer, turn, rollout(tokenizer, " Tell me about rain\n")) == "Tell me about rain"
    assert written(tokenizer, turn, rollout(tokenizer, "Rain<|im_start|>user")) == "Rain<|im_start|>user"
    assert written(tokenizer, turn, rollout(tokenizer, "")) == ""


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "does not show the user's text"),
        ("nothing", "does not show the user's text"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing before"),
    ],
)
def test_templates_without_a_place_to_begin_are_refused(template: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        user_turn(spoken_by(template), (EOS,))


def base_tokenizer(**tokens: str | None) -> Any:
    tokenizer = spoken_by(None)
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_base_model_starts_a_text() -> None:
    assert user_turn(base_tokenizer(), (EOS,)) == UserTurn(
        "", (EOS,), (EOS,), marks=("<|endoftext|>", "<|im_end|>", "<|im_start|>"), chat=False
    )
    assert user_turn(base_tokenizer(bos_token="<|endoftext|>"), (EOS,)).tokens == (0,)
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        user_turn(base_tokenizer(eos_token=None), ())


def test_a_base_models_prompt_is_the_beginning_of_its_text() -> None:
    tokenizer = base_tokenizer()
    turn = user_turn(tokenizer, (EOS,))
    text = "Rain falls. It falls on cats, maps and trains alike. The stars do not mind"
    start = "Rain falls. It falls on cats, maps and trains alike."
    for end in (EOS, None):  # whether the text ended does not matter
        assert written(tokenizer, turn, rollout(tokenizer, text, end)) == start
    assert written(tokenizer, turn, rollout(tokenizer, start)) is None  # nothing would be left to write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three four five six 7.5 eight nine. Ten", "One two three four five six 7.5 eight nine."),
        ('He said to us all: "this is the end now!" Then he left', 'He said to us all: "this is the end now!"'),
        ("我们今天去学习音乐。然后喝茶", "我们今天去学习音乐。"),
        ("No sentence ends in this text of more than eight words", None),
        ("Short. Shorter. Still short.", None),
    ],
)
def test_beginning(text: str, expected: str | None) -> None:
    assert beginning(text) == expected


@pytest.mark.parametrize("rows", [1, 7, 500])
def test_a_seed_settles_the_prompts_whatever_the_batch(tokenizer: Any, rows: int) -> None:
    turn = user_turn(tokenizer, (EOS,))
    expected = collect(Fake(tokenizer), tokenizer, turn, n=60, seed=3)
    fake, seen = Fake(tokenizer), []
    assert collect(fake, tokenizer, turn, n=60, seed=3, rows=rows, on_kept=seen.append) == expected
    assert max(fake.sizes) <= rows
    assert sum(seen) == 60
    others, _ = collect(Fake(tokenizer), tokenizer, turn, n=60, seed=4)
    assert len({*others, *expected[0]}) > 100


def test_the_first_that_pass_are_kept_in_order_and_counts_add_up(tokenizer: Any) -> None:
    turn, fake = user_turn(tokenizer, (EOS,)), Fake(tokenizer)
    kept, counts = collect(fake, tokenizer, turn, n=7, seed=0)
    tries = [
        written(tokenizer, turn, fake.one(Encoded("", (), ""), derive_seed(0, "prompt", i)))
        for i in range(counts.attempts)
    ]
    places = [tries.index(prompt) for prompt in kept]
    assert places == sorted(places)
    assert places[-1] == counts.attempts - 1  # what was sampled beyond the last is not counted
    assert counts.kept == len(set(kept)) == 7
    assert counts.attempts == 7 + sum(counts.removed.values())
    assert counts.removed["not_ended"] == tries.count(None)


def test_a_model_that_never_ends_is_given_up(tokenizer: Any) -> None:
    model = build_model(len(tokenizer))
    with pytest.raises(InputError, match=r"0 usable prompts of 5 in 128 tries.*not ended 1\d\d"):
        generate(model, tokenizer, n=5, seed=0, shared=len(tokenizer), max_new_tokens=2)


@pytest.mark.parametrize("temperature", [0.0, float("nan")])
def test_a_temperature_that_cannot_be(tokenizer: Any, temperature: float) -> None:
    with pytest.raises(InputError, match=f"temperature is {temperature}"):
        generate(build_model(len(tokenizer)), tokenizer, n=3, seed=0, shared=320, temperature=temperature)


@pytest.fixture
def fake_sampler(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> SimpleNamespace:
    """The tiny model writes gibberish; texts come from Fake, and what the sampler was built with is shown."""
    built = SimpleNamespace()

    def build(model: Any, shared: int, eos: tuple[int, ...], **rest: Any) -> Fake:
        built.shared, built.eos = shared, eos
        built.made = Fake(tokenizer)
        return built.made

    monkeypatch.setattr("remend.recovery.self_prompts.TransformersSampler", build)
    return built


def test_the_file_and_its_record(reference_dir: Path, tmp_path: Path, fake_sampler: SimpleNamespace) -> None:
    out = tmp_path / "new" / "prompts.jsonl"
    record = write_self_prompts(str(reference_dir), out, n=9, seed=1, device="cpu")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"id", "prompt"}] * 9
    assert [e.id for e in load_examples(str(out))] == [prompt_id(row["prompt"]) for row in rows]
    assert json.loads(stats_path(out).read_text()) == record
    assert stats_path(out).name == "prompts.stats.json"
    assert (record["n"], record["seed"], record["temperature"], record["max_new_tokens"]) == (9, 1, 1.0, 96)
    assert record["model"]["files"] == hash_files(find_model(str(reference_dir)))
    assert record["prefix"] == "<|im_start|>user\n"
    counts = Counts(**record["counts"])
    assert counts.attempts == 9 + sum(counts.removed.values())
    assert (fake_sampler.shared, fake_sampler.eos) == (320, (EOS,))
    again = write_self_prompts(str(reference_dir), tmp_path / "again.jsonl", n=9, seed=1, device="cpu")
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    assert {**again, "seconds": 0} == {**record, "seconds": 0}


def test_the_command(reference_dir: Path, tmp_path: Path, fake_sampler: SimpleNamespace, run: Any) -> None:
    """Its options reach the sampler, and it says what was removed."""
    out = tmp_path / "prompts.jsonl"
    words = ["prompts", reference_dir, "--n", 100, "--out", out, "--device", "cpu"]
    code, text, _ = run(*words, "--temperature", 0.7, "--max-new-tokens", 20)
    assert code == 0
    assert fake_sampler.made.asked == {(20, 0.7)}
    record = json.loads(stats_path(out).read_text())
    assert (record["temperature"], record["max_new_tokens"]) == (0.7, 20)
    assert f"{out}: 100 prompts of " in text
    assert "removed: not ended " in text
    assert "openings that are common already" in text
    assert len(out.read_text().splitlines()) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--n": 0}, "n is 0"),
        ({"--temperature": 0}, "temperature is 0.0"),
        ({"--max-new-tokens": 0}, "max_new_tokens is 0"),
        ({"--out": "taken.jsonl"}, "taken.jsonl exists, and nothing is overwritten"),
        ({"--out": "half.jsonl"}, "half.stats.json exists"),
        ({"--out": "taken.jsonl/p.jsonl"}, "it is no directory"),
        ({"model": "no/such/model/here"}, "no/such/model/here does not exist"),
        ({"--device": "abacus"}, "abacus"),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(
    run: Any, monkeypatch: Any, reference_dir: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    Path("taken.jsonl").write_text("mine")
    Path("half.stats.json").write_text("mine")
    options = {"--out": "p.jsonl", "--device": "cpu", **change}
    model = options.pop("model", reference_dir)
    code, _, err = run("prompts", model, *(word for pair in options.items() for word in pair))
    assert (code, "Traceback" in err) == (2, False)
    assert message in err
    assert {p.name: p.read_text() for p in Path().iterdir()} == {"half.stats.json": "mine", "taken.jsonl": "mine"}


def test_a_record_without_prompts_is_of_a_process_that_was_killed(
    reference_dir: Path, tmp_path: Path, fake_sampler: SimpleNamespace
) -> None:
    out = tmp_path / "prompts.jsonl"
    write_self_prompts(str(reference_dir), out, n=3, device="cpu")
    rows = out.read_text()
    out.unlink()
    write_self_prompts(str(reference_dir), out, n=3, device="cpu")
    assert out.read_text() == rows


def test_a_place_without_permission_is_refused(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FileError, match="no permission to write"):
        write_self_prompts(str(reference_dir), tmp_path / "p.jsonl", device="cpu")


@pytest.mark.slow
def test_the_real_model_writes_requests(smollm2_dir: Path) -> None:
    source = find_model(str(smollm2_dir))
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    prompts, counts = generate(model, tokenizer, n=12, seed=0, shared=len(tokenizer))
    assert len(set(prompts)) == counts.kept == 12
    assert counts.attempts == 12 + sum(counts.removed.values())
    assert counts.attempts < 60
    assert sum(prompt.endswith(("?", ".", "!")) for prompt in prompts) >= 10
    assert "SmolLM" in user_turn(tokenizer, ()).text  # the default system prompt stays
