"""A cached teacher: what is stored against the model's own log-softmax, determinism, and what bad input says."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import remend
from helpers.registering import restored
from helpers.tiny import build_tokenizer, prompts
from remend.data.examples import load_examples, prompt_key, split_held_out
from remend.errors import FileError, InputError, RemendError
from remend.maths.losses import Head, chunked_loss_sum, divergence, of_beta
from remend.models.find import find_model, hash_files
from remend.models.load import load_model
from remend.models.sampling.rollout import Rollout
from remend.training import write_cache
from remend.training.teachers import TEACHERS
from remend.training.teachers.cache import PROMPTS, RECORD, TeacherCache, is_cache

K = 12
SETTINGS: dict[str, Any] = {"k": K, "max_new_tokens": 7, "held_out": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(reference_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "teacher"
    remend.cache_teacher(str(reference_dir), out, data=str(data), **SETTINGS)
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(scope="module")
def teacher(reference_dir: Path) -> Any:
    return load_model(find_model(str(reference_dir)), dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def own_log_probabilities(teacher: Any, rollout: Rollout) -> Tensor:
    """[completion tokens, V]: one sequence, nothing batched, padded or chunked; float64 after the model."""
    logits = teacher(torch.tensor([[*rollout.prompt, *rollout.completion]])).logits[0]
    return torch.log_softmax(logits[len(rollout.prompt) - 1 : -1].double(), -1)


def test_targets_are_the_teachers_own_top_k(made: Path, teacher: Any) -> None:
    cache = TeacherCache.open(made)
    rollouts = [*cache.held_out, *cache.train[::-1]]
    target = cache.score(rollouts)
    exact = torch.cat([own_log_probabilities(teacher, r) for r in rollouts])
    assert len(target) == len(exact) == cache.record["tokens"]
    ordered = exact.sort(-1, descending=True)
    clear = (ordered.values[:, :-1] - ordered.values[:, 1:])[:, :K].amin(1) > 1e-5  # no near-ties, which rounding turns
    assert clear.sum() > 0.9 * len(exact)
    assert torch.equal(target.ids_NK[clear], ordered.indices[clear, :K])
    # float16: half a unit in the last place, relative to the value
    torch.testing.assert_close(target.log_p_NK.double(), ordered.values[:, :K], rtol=2**-11, atol=1e-5)
    tail = ordered.values[:, K:].logsumexp(-1)
    torch.testing.assert_close(target.log_tail_N.double(), tail, rtol=1e-5, atol=1e-5)


def test_a_part_and_skipped_tokens(made: Path) -> None:
    cache = TeacherCache.open(made)
    some = [cache.train[3], cache.held_out[1], cache.train[0]]
    apart = [cache.score([r]) for r in some]
    joined = cache.score(some)
    assert torch.equal(joined.ids_NK, torch.cat([t.ids_NK for t in apart]))
    skipped = cache.score(some, skip_first=2)
    assert torch.equal(skipped.folded_NK1, torch.cat([t[2:].folded_NK1 for t in apart]))
    assert len(cache.score(some, skip_first=99)) == len(cache.score([])) == 0
    assert cache.score([]).ids_NK.shape == (0, K)
    # what else a rollout carries does not matter
    assert torch.equal(cache.score([replace(some[0], id="x", off_policy=False)]).ids_NK, apart[0].ids_NK)
    with pytest.raises(InputError, match="is not of the cached teacher"):
        cache.score([replace(some[0], completion=(1, 2, 3))])


def test_the_teacher_itself_costs_nothing_but_rounding(made: Path, teacher: Any) -> None:
    """Forward KL of the teacher against its own cache: the second-order effect of float16."""
    cache = TeacherCache.open(made)
    exact = torch.cat([own_log_probabilities(teacher, r) for r in cache.train])
    identity = Head(torch.eye(exact.shape[1]))
    total = chunked_loss_sum(exact.float(), identity, cache.score(cache.train), of_beta(0.0), rows=64)
    assert 0 <= float(total) / len(exact) < 1e-5


def test_completions(made: Path, data: Path, teacher: Any, tokenizer: Any) -> None:
    cache = TeacherCache.open(made)
    train, held_out = split_held_out(load_examples(str(data)), 6, 0)
    assert [r.id for r in cache.train] == [e.id for e in train]
    assert [r.id for r in cache.held_out] == [e.id for e in held_out]
    assert not {prompt_key(e.prompt) for e in train} & {prompt_key(e.prompt) for e in held_out}
    for rollout in cache.held_out:  # greedy
        assert rollout.completion == tuple(own_log_probabilities(teacher, rollout).argmax(-1).tolist())
    assert len({r.completion for r in cache.train}) > 10
    for rollout in cache.train:
        assert rollout.clipped == (rollout.completion[-1] != tokenizer.eos_token_id)
        assert rollout.off_policy
        assert 1 <= len(rollout.completion) <= 7
        assert tokenizer.decode(rollout.prompt).startswith("<|im_start|>user")


def test_the_record(made: Path, teacher: Any, reference_dir: Path) -> None:
    cache = TeacherCache.open(made)
    record, errors = cache.record, cache.record["errors"]
    assert (cache.k, cache.shared, record["seed"], record["temperature"], record["max_new_tokens"]) == (K, 320, 0, 1, 7)
    assert record["files"] == hash_files(find_model(str(reference_dir)))
    assert record["bytes_per_token"] == K * 6 + 4
    assert record["bytes"] == sum(p.stat().st_size for p in made.glob("*.safetensors"))
    assert record["prompts"] == {"train": 34, "held_out": 6}
    exact = torch.cat([own_log_probabilities(teacher, r) for r in [*cache.train, *cache.held_out]])
    p = exact.exp().sort(-1, descending=True).values
    tail, entropy = p[:, K:].sum(-1), -(p * p.log()).sum(-1)
    folded = torch.cat([p[:, :K], tail[:, None]], 1)
    lost = entropy + (folded * folded.log()).sum(-1)
    close = {"rel": 1e-4}
    assert errors["tail_mean"] == pytest.approx(float(tail.mean()), **close)
    assert errors["tail_max"] == pytest.approx(float(tail.max()), **close)
    assert errors["entropy"] == pytest.approx(float(entropy.mean()), **close)
    assert errors["entropy_lost"] == pytest.approx(float(lost.mean()), **close)
    stored = cache.score([*cache.train, *cache.held_out]).folded_NK1.double()
    rounding = divergence(stored, folded.log())
    assert errors["rounding_kl"] == pytest.approx(float(rounding.mean()), rel=0.05)
    assert 0 < errors["rounding_kl"] < 1e-5
    assert 0 < errors["rounding_max"] < 2e-4 * 1.01  # max of p |log p| · 2^-11 is 1.8e-4


def test_it_is_deterministic_and_open_to_other_readers(
    reference_dir: Path, data: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    remend.cache_teacher(str(reference_dir), out, data=str(data), **SETTINGS)
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted(p.name for p in made.iterdir()) == [PROMPTS, "scores-00000.safetensors", RECORD]
    for name in names:
        assert (out / name).read_bytes() == (made / name).read_bytes()
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.5}])
def test_settings_have_an_effect(
    reference_dir: Path, data: Path, made: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    remend.cache_teacher(str(reference_dir), tmp_path / "other", data=str(data), **{**SETTINGS, **change})
    before = {r.id: r.completion for r in TeacherCache.open(made).train}
    after = {r.id: r.completion for r in TeacherCache.open(tmp_path / "other").train}
    both = before.keys() & after.keys()
    assert sum(before[i] != after[i] for i in both) > len(both) / 2


def test_shards(reference_dir: Path, data: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_cache, "SHARD_BYTES", 2000)
    remend.cache_teacher(str(reference_dir), tmp_path / "small", data=str(data), **SETTINGS)
    whole, small = TeacherCache.open(made), TeacherCache.open(tmp_path / "small")
    assert len(small.record["shards"]) > 5
    for shard in small.record["shards"]:
        tensors = load_file(tmp_path / "small" / shard["file"])
        assert {n: (t.dtype, len(t)) for n, t in tensors.items()} == {
            "ids": (torch.int32, shard["rows"]),
            "log_p": (torch.float16, shard["rows"]),
            "log_tail": (torch.float32, shard["rows"]),
        }
        assert shard["rows"] * small.record["bytes_per_token"] <= 2000
    assert small.train == whole.train
    for rollouts in (small.train, small.held_out[::-1]):
        a, b = small.score(rollouts), whole.score(rollouts)
        assert torch.equal(a.ids_NK, b.ids_NK)
        assert torch.equal(a.folded_NK1, b.folded_NK1)


def test_k_the_whole_vocabulary_leaves_no_tail(reference_dir: Path, data: Path, tmp_path: Path) -> None:
    done = remend.cache_teacher(str(reference_dir), tmp_path / "all", data=str(data), **{**SETTINGS, "k": 320})
    assert {done["errors"][name] for name in ("tail_mean", "tail_max", "entropy_lost")} == {0.0}
    cache = TeacherCache.open(tmp_path / "all")
    assert torch.isneginf(cache.score(cache.train).log_tail_N).all()


def test_eval_data_and_dropped_prompts(reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(prompts(12))]
    rows.append({"id": "long", "prompt": "tell me about everything " * 30})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:3]))
    rest = {"max_new_tokens": 3, "max_prompt_tokens": 60, "k": 4, "device": "cpu"}
    done = remend.cache_teacher(
        str(reference_dir),
        tmp_path / "out",
        data=str(tmp_path / "train.jsonl"),
        eval_data=str(tmp_path / "eval.jsonl"),
        **rest,
    )
    cache = TeacherCache.open(tmp_path / "out")
    assert [r.id for r in cache.held_out] == ["p0", "p1", "p2"]
    assert [r.id for r in cache.train] == [f"p{i}" for i in range(3, 12)]
    assert done["dropped"] == {"train": ["long"], "held_out": []}
    err = " ".join(capsys.readouterr().err.split())
    assert "1 of 10 training prompts have over max_prompt_tokens = 60 tokens and are dropped, not cut (long)" in err
    assert "3 training prompts are also in eval_data and are left out" in err
    with pytest.raises(InputError, match=r"are dropped, not cut .*; none is left"):
        remend.cache_teacher(
            str(reference_dir), tmp_path / "none", data=str(tmp_path / "train.jsonl"), max_prompt_tokens=3
        )
    with pytest.raises(InputError, match="no prompt is left to train on"):
        remend.cache_teacher(
            str(reference_dir),
            tmp_path / "none",
            data=str(tmp_path / "eval.jsonl"),
            eval_data=str(tmp_path / "train.jsonl"),
        )
    assert not (tmp_path / "none").exists()


def test_repeated_prompts_keep_their_own_completions(reference_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text((json.dumps({"prompt": "Tell me"}) + "\n") * 5 + '{"prompt": "Other"}\n')
    remend.cache_teacher(
        str(reference_dir), tmp_path / "out", data=str(tmp_path / "d.jsonl"), **{**SETTINGS, "held_out": 1}
    )
    cache = TeacherCache.open(tmp_path / "out")
    assert len(cache.train) + len(cache.held_out) in (2, 6)
    assert len(cache.score(cache.train)) == sum(len(r.completion) for r in cache.train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; allowed is 1 to the 320 tokens"),
        ({"k": 321}, "k is 321; allowed is 1 to the 320 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed is 1 or more"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"held_out": 0}, "held_out is 0; allowed is 1 or more"),
        ({"held_out": 40}, "none is left to train on"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed is above 0"),
        ({"device": "abacus"}, 'device "abacus" can\'t be used here'),
        ({"data": "missing.jsonl"}, "data file missing.jsonl can't be read"),
    ],
)
def test_bad_settings(reference_dir: Path, data: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RemendError) as caught:
        remend.cache_teacher(str(reference_dir), tmp_path / "out", **{**SETTINGS, "data": str(data), **change})
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_empty_data_and_occupied_directories(reference_dir: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        remend.cache_teacher(str(reference_dir), tmp_path / "out", data=str(tmp_path / "empty.jsonl"))
    for name in ("notes.txt", "inputs"):
        out = tmp_path / name.partition(".")[0] / "out"
        (out / name).mkdir(parents=True)
        with pytest.raises(InputError, match="is not empty"):
            remend.cache_teacher(str(reference_dir), out, data=str(data))
    with pytest.raises(FileError, match="does not exist"):
        remend.cache_teacher("no/such/place/model", tmp_path / "out", data=str(data))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_no_model_can_not_be_stored(data: Path, tmp_path: Path) -> None:
    class Gentle(TEACHERS.get("frozen")):  # type: ignore[misc]
        @classmethod
        def claims(cls, name: str) -> bool:
            return name.startswith("gentle:")

    with restored(TEACHERS):
        TEACHERS.register("gentle", source="made for the test")(Gentle)
        for name, kind in (("ema", "ema"), ("gentle:reference", "gentle")):
            with pytest.raises(InputError, match=f'^"{name}" is the teacher "{kind}" in a recipe, and no model'):
                remend.cache_teacher(name, tmp_path / "out", data=str(data))


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        value = json.loads((path / name).read_text())
        changed = change(value)
        if isinstance(changed, dict):
            changed.pop("sha256", None)  # as whoever writes a cache by hand
        (path / name).write_text(json.dumps(changed))

    return apply


def test_a_changed_record_of_the_cache(copied: Path) -> None:
    text = (copied / RECORD).read_text()
    (copied / RECORD).write_text(text.replace('"temperature"', '"temperbture"'))
    with pytest.raises(FileError, match="changed since it was written"):
        TeacherCache.open(copied)


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(len(content) * keep)])

    return apply


def drop_a_line(path: Path) -> None:
    lines = (path / PROMPTS).read_text().splitlines(keepends=True)
    (path / PROMPTS).write_text("".join(lines[:-1]))


SHARD = "scores-00000.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
        (cut(SHARD, 0.5), f"{SHARD} has "),
        (lambda path: (path / PROMPTS).unlink(), f"{PROMPTS} is missing"),
        (cut(PROMPTS, 0.5), "is damaged"),
        (drop_a_line, f"{PROMPTS} changed since it was written"),
        (cut(RECORD, 0.5), f"{RECORD} can't be read"),
        (edit(RECORD, lambda r: {**r, "version": 2}), "has version 2, and this remend reads 1"),
        (edit(RECORD, lambda r: []), f"{RECORD} can't be read: it holds a list"),
        (edit(RECORD, lambda r: {**r, "version": True}), "has version True"),
        (edit(RECORD, lambda r: {**r, "shards": "abc"}), "is damaged (TypeError"),
        (edit(RECORD, lambda r: {**r, "k": "x"}), "must be whole numbers"),
        (edit(RECORD, lambda r: {**r, "files": 3}), "files is no object"),
        (edit(RECORD, lambda r: {**r, "shards": [{**s, "file": f"../{s['file']}"} for s in r["shards"]]}), "no file's"),
        (edit(RECORD, lambda r: {n: v for n, v in r.items() if n != "k"}), f"is damaged ({RECORD} lacks k)"),
        (edit(RECORD, lambda r: {**r, "vocabulary": {}}), f"is damaged ({RECORD} lacks the vocabulary)"),
        (edit(RECORD, lambda r: {n: v for n, v in r.items() if n != "tokens"}), "is damaged (KeyError: 'tokens')"),
        (edit(RECORD, lambda r: {**r, "shards": []}), "is damaged (IndexError"),
        (lambda path: (path / RECORD).unlink(), "is no cached teacher"),
    ],
)
def test_damaged_caches(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied)
    with pytest.raises(RemendError) as caught:
        TeacherCache.open(copied)
    assert message in str(caught.value)
    assert "cache-teacher" in str(caught.value) or "can't be read" in str(caught.value)


def test_damage_that_reading_scores_finds(copied: Path) -> None:
    cache = TeacherCache.open(copied)
    content = bytearray((copied / SHARD).read_bytes())
    content[:8] = b"\xff" * 8
    (copied / SHARD).write_bytes(content)
    with pytest.raises(FileError, match="is damaged"):
        cache.score(cache.train[:1])


def test_one_flipped_bit_of_the_scores(copied: Path) -> None:
    content = bytearray((copied / SHARD).read_bytes())
    content[-50] ^= 64
    (copied / SHARD).write_bytes(content)
    with pytest.raises(FileError, match="changed since it was written: its SHA-256 is another one"):
        TeacherCache.open(copied)


@pytest.mark.parametrize(
    "row",
    [
        [1],
        {"id": 1},
        {"id": "a", "prompt": "x", "completion": [1], "clipped": 0, "split": "train", "shard": 0, "start": 0},
        {"id": "a", "prompt": [1], "completion": [1], "clipped": 0, "split": [], "shard": 0, "start": 0},
        {"id": "a", "prompt": [1], "completion": [1], "clipped": 0, "split": "train", "shard": 0, "start": 10**9},
        {"id": "a", "prompt": [1], "completion": [-1], "clipped": 0, "split": "train", "shard": 0, "start": 0},
    ],
)
def test_rows_of_another_shape(row: object, copied: Path) -> None:
    record = json.loads((copied / RECORD).read_text())
    del record["prompts_sha256"]  # as of a cache of an older version
    (copied / RECORD).write_text(json.dumps(record))
    (copied / PROMPTS).write_text(json.dumps(row) + "\n" + (copied / PROMPTS).read_text())
    with pytest.raises(FileError, match="is damaged"):
        TeacherCache.open(copied)


def test_a_damaged_cache_stops_a_recovery_with_one_message(
    copied: Path, student_dir: Path, reference_dir: Path, tmp_path: Path, run: Any
) -> None:
    (copied / SHARD).write_bytes((copied / SHARD).read_bytes()[:-10])
    stream = f"streams={{r: {{teacher: {copied}, policy: off}}}}"
    words = (f"student={student_dir}", f"teacher={reference_dir}", stream, f"out={tmp_path / 'run'}")
    code, _, err = run("check", *words)
    assert code == 2
    assert err.count("error: ") == 1
    assert "write it again with remend cache-teacher" in err


def test_is_cache(made: Path, reference_dir: Path, tmp_path: Path) -> None:
    assert is_cache(made)
    assert is_cache(str(made))
    assert not any(map(is_cache, (reference_dir, tmp_path / "none", "smollm2", "org/name")))
    with pytest.raises(InputError, match="is no cached teacher"):
        TeacherCache.open(reference_dir)


def test_the_students_vocabulary(made: Path, tokenizer: Any) -> None:
    cache = TeacherCache.open(made)
    assert cache.check(tokenizer) == cache.check(tokenizer, 320) == cache.check(tokenizer, 384) == []
    # more tokens behind the teacher's are no contradiction
    assert cache.check(build_tokenizer(extra=("<|tool|>",)), 321) == []
    with pytest.raises(InputError, match=r"the student has 300 token ids and the cached teacher .* is over 320"):
        cache.check(tokenizer, 300)

    class Other:
        """The same size, two tokens exchanged."""

        eos_token, chat_template = tokenizer.eos_token, tokenizer.chat_template

        def get_vocab(self) -> dict[str, int]:
            vocabulary = dict(tokenizer.get_vocab())
            a, b = list(vocabulary)[10:12]
            return {**vocabulary, a: vocabulary[b], b: vocabulary[a]}

    with pytest.raises(InputError, match="has another vocabulary than the student"):
        cache.check(Other())
    changed = build_tokenizer()
    changed.chat_template, changed.eos_token = "{{ messages }}", "<|endoftext|>"
    assert [text.split(" differs")[0] for text in cache.check(changed)] == [
        "the end-of-sequence token",
        "the chat template",
    ]


def test_padding_rows_of_the_teacher_are_no_part_of_it(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    from helpers.tiny import build_model

    build_model(384).save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    remend.cache_teacher(str(tmp_path / "padded"), tmp_path / "out", data=str(data), **SETTINGS)
    cache = TeacherCache.open(tmp_path / "out")
    assert cache.shared == 320
    target = cache.score(cache.train)
    assert int(target.ids_NK.max()) < 320
    torch.testing.assert_close(target.folded_NK1.exp().sum(1), torch.ones(len(target)), rtol=0, atol=3e-3)


def test_the_command(reference_dir: Path, data: Path, tmp_path: Path, run: Any) -> None:
    words = ("cache-teacher", reference_dir, "--data", data, "--max-new-tokens", 5, "--held-out", 4, "--k", 9)
    code, out, err = run(*words, "--out", tmp_path / "c")
    assert code == 0
    assert "36 training and 4 held-out completions" in out
    assert "58 bytes per token" in out
    assert "cut to the top 9:" in out
    assert "rounding of what is stored: KL" in out
    assert "the teacher answers the training prompts" in err
    code, out, err = run(*words, "--out", tmp_path / "c")
    assert (code, out) == (2, "")
    assert err == f"error: out {tmp_path / 'c'} is not empty; name a new directory\n"
    code, _, err = run(*words, "--out", tmp_path / "d", "--k", 0)
    assert (code, "Traceback" in err, (tmp_path / "d").exists()) == (2, False, False)
    assert "k is 0; allowed is 1 to the 320 tokens" in err
