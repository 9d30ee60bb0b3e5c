"""The parts of remend eval against slow references: letters, pass@k, near ties, batches, names, the harness."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.architectures import build
from helpers.patching import without_the_harness_tasks
from helpers.tiny import build_model
from remend.data import tasks
from remend.data.order import batches_by_length
from remend.errors import CheckError, FileError, InputError
from remend.evaluation import harness, letters
from remend.evaluation.generation import token_cap
from remend.evaluation.job import evaluate
from remend.evaluation.letters import Choice
from remend.evaluation.results import pass_at
from remend.evaluation.settings import parse_data, parse_tasks
from remend.models.find import ModelSource
from remend.models.sampling.vllm_engine import VllmSampler, engine_message
from remend.models.scorer import scorer

VOCABULARY = 64
EOS = 2


# Letters


def slowly(model: LlamaForCausalLM, context: tuple[int, ...], ending: tuple[int, ...]) -> float:
    """log p(ending | context) in float64, token by token."""
    exact, total = copy.deepcopy(model).double(), 0.0
    for at, token in enumerate(ending):
        with torch.no_grad():
            logits = exact(torch.tensor([[*context, *ending[:at]]])).logits[0, -1]
        total += float(torch.log_softmax(logits, -1)[token])
    return total


def test_log_likelihoods_are_those_of_a_slow_computation() -> None:
    model = build_model(VOCABULARY, seed=3)
    choices = [
        Choice("one token", (5, 6, 7), {"A": (9,), "B": (10,), "C": (11,)}),
        Choice("two, one stem", (8,), {"A": (9, 12), "B": (9, 13)}),
        Choice("unequal", (4, 4, 4, 20, 21), {"A": (9,), "B": (30, 31, 32), "C": (30, 33)}),
    ]
    together = letters.log_likelihoods(scorer(model), choices)
    for c, found in zip(choices, together, strict=True):
        assert list(found) == list(c.endings)
        assert found == pytest.approx({k: slowly(model, c.context, e) for k, e in c.endings.items()}, abs=1e-4)
        assert letters.log_likelihoods(scorer(model), [c])[0] == pytest.approx(found, abs=1e-4)


def test_a_shared_first_turn_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(VOCABULARY, seed=3)
    parts, turns, seen = scorer(model), None, []
    first = (5, 6, 7, 8, 9, EOS)
    ends = {"A": (9,), "B": (10,), "C": (11,)}
    choices = [Choice(str(i), (*first, 20 + i, 30, EOS, *range(40, 42 + i)), ends, len(first)) for i in range(6)]
    choices.append(Choice("other", (3, 4, EOS, 20, EOS, 21), ends, 3))
    body = type(model.model).forward

    def counted(self: Any, *args: Any, **rest: Any) -> Any:
        seen.append(rest["input_ids"].shape[1])
        return body(self, *args, **rest)

    monkeypatch.setattr(type(model.model), "forward", counted)
    turns = letters.FirstTurns(parts)
    found = [letters.log_likelihoods(parts, [c], turns=turns)[0] for c in choices]
    # the first turn, the rest, the whole of the first row as a check; then the rests alone
    whole = [len(c) for c in choices]
    assert seen == [6, whole[0] - 6, whole[0], *(n - 6 for n in whole[1:6]), 3, whole[6] - 3]
    for c, one in zip(choices, found, strict=True):
        assert one == pytest.approx({k: slowly(model, c.context, e) for k, e in c.endings.items()}, abs=1e-4)
    again = letters.FirstTurns(parts)  # a score does not hang on what was scored before
    assert letters.log_likelihoods(parts, [choices[4]], turns=again)[0] == found[4]


def test_a_model_whose_cache_gives_something_else_is_computed_whole() -> None:
    model = build_model(VOCABULARY, seed=3)

    def shift(_body: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
        if given.get("past_key_values") is not None:
            output.last_hidden_state = output.last_hidden_state + 1.0

    model.model.register_forward_hook(shift, with_kwargs=True)
    parts = scorer(model)
    turns = letters.FirstTurns(parts)
    c = Choice("x", (5, 6, EOS, 8, EOS, 9), {"A": (9,), "B": (10,)}, 3)
    plain = letters.log_likelihoods(parts, [c])
    assert letters.log_likelihoods(parts, [c], turns=turns) == plain
    assert letters.log_likelihoods(parts, [c], turns=turns) == plain


def test_a_model_of_states_alone_is_computed_whole() -> None:
    parts = scorer(build("mamba"))
    c = Choice("x", (5, 6, EOS, 8, EOS, 9), {"A": (9,), "B": (10,)}, 3)
    assert letters.log_likelihoods(parts, [c], turns=letters.FirstTurns(parts)) == letters.log_likelihoods(parts, [c])


def test_the_first_turn_is_told_where_several_end(tokenizer: Any) -> None:
    ends = (tokenizer.eos_token_id,)
    both = tuple(tokenizer("Rules.<|im_end|>Tell me<|im_end|>")["input_ids"])
    made = letters.choice(tokenizer, "x", both, "AB", ends=ends)
    assert tokenizer.decode(made.context[: made.turn]) == "Rules.<|im_end|>"
    assert letters.choice(tokenizer, "x", tuple(tokenizer("Tell<|im_end|>")["input_ids"]), "AB", ends=ends).turn == 0
    assert letters.choice(tokenizer, "x", both, "AB").turn == 0


def test_what_is_scored_is_the_letter_after_the_tag(tokenizer: Any) -> None:
    prompt = tuple(tokenizer("Tell me")["input_ids"])
    made = letters.choice(tokenizer, "x", prompt, "ABCD")
    assert tokenizer.decode(made.context) == "Tell me<answer>\n"
    assert {k: tokenizer.decode(e) for k, e in made.endings.items()} == {k: k for k in "ABCD"}
    assert len(made) == len(made.context) + 1

    class Blind:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3]}

    with pytest.raises(InputError, match="does not tell the letters A, B apart"):
        letters.choice(Blind(), "x", prompt, "AB")


def test_damaged_weights_are_named() -> None:
    model = build_model(VOCABULARY, seed=3)
    parts = scorer(model)
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        letters.log_likelihoods(parts, [Choice("x", (5,), {"A": (9,), "B": (10,)})])


def test_a_tie_is_no_choice() -> None:
    tied = letters.item("x", "A", {"A": -1.0, "B": -1.0, "C": -2.0})
    assert (tied["correct"], tied["answer"]) == (False, "")
    assert tied["reason"] == "A and B are equally likely: no choice"
    wrong = letters.item("x", "C", {"A": -1.0, "B": -1.5, "C": -2.0})
    assert wrong["reason"] == "chose A, wanted C (-1.00 nats)"
    assert wrong["probability"] == pytest.approx(math.exp(-2) / (math.exp(-1) + math.exp(-1.5) + math.exp(-2)))
    assert letters.item("x", "A", {"A": -1.0, "B": -1.5})["margin"] == 0.5


def test_one_letter_for_all_is_chance_and_the_right_ones_are_not() -> None:
    golds = list("AAAABCD") * 6
    likes = {"A": -1.0, "B": -2.0, "C": -3.0, "D": -4.0}
    always = letters.summary([letters.item(str(i), gold, likes) for i, gold in enumerate(golds)], seed=0)
    assert always["shuffled"] == pytest.approx(4 / 7)  # its score, far above 1/4, and yet it knows nothing
    assert (always["chance"], always["p_shuffled"]) == (0.25, 1.0)
    assert (always["picks"]["A"], always["golds"]["B"]) == (42, 6)
    assert always["mass"] == pytest.approx(sum(map(math.exp, likes.values())))
    knowing = [letters.item(str(i), gold, {**likes, gold: -0.5}) for i, gold in enumerate(golds)]
    assert letters.summary(knowing, seed=0)["p_shuffled"] < 0.001


# pass@k


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [at < correct for at in range(n)]
        subsets = list(itertools.combinations(answers, k))
        assert pass_at(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_refuses_what_cannot_be() -> None:
    for n, correct, k in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(InputError, match="allowed: 0 ≤ correct ≤ n and 1 ≤ k ≤ n"):
            pass_at(n, correct, k)


# Batches and names


def test_batches_hold_rows_of_like_length_within_both_limits() -> None:
    lengths = [5, 100, 7, 6, 90, 1, 400]
    found = batches_by_length(lengths, rows=3, tokens=200, longest_first=True)
    assert found == [[6], [1, 4], [2, 3, 0], [5]]
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert batches_by_length([]) == []
    assert batches_by_length(lengths, tokens=20) == [[5, 0, 3], [2], [4], [1], [6]]
    assert batches_by_length([2, 1, 2, 1], rows=3) == [[1, 3, 0], [2]]
    assert token_cap(build_model(VOCABULARY)) > 10_000


def test_names_and_data_as_they_are_typed() -> None:
    assert parse_tasks("tooluse, science") == ["tooluse", "science"]
    mixed = ["general", "lm-eval:hellaswag", "lm-eval:ifeval", "science", "lm-eval:mmlu"]
    assert parse_tasks("general,lm-eval:hellaswag,ifeval,science,lm-eval:mmlu,") == mixed
    assert parse_data(None) is None
    assert parse_data(["rows.jsonl"]) == "rows.jsonl"
    assert parse_data(["a=b.jsonl"]) == "a=b.jsonl"  # a file of that name: "a" is no task
    assert parse_data(["science=a.jsonl", "tooluse=b=c.jsonl"]) == {"science": "a.jsonl", "tooluse": "b=c.jsonl"}
    for texts in (["a.jsonl", "b.jsonl"], ["science=a", "science=b"], ["science=a", "b"]):
        with pytest.raises(InputError, match="need the task before each"):
            parse_data(texts)


def test_vllm_reads_directories_only() -> None:
    with pytest.raises(InputError, match="x is a gguf; use engine hf"):
        VllmSampler(ModelSource("x", "gguf", Path("x")), dtype="float32", eos=(1,), tokens=1)


def test_what_an_engine_said_first_and_last_is_shown() -> None:
    try:
        try:
            raise KeyError("weight 'x.codes'")
        except KeyError as error:
            raise RuntimeError("the engine\n has ended") from error
    except RuntimeError as error:
        said = engine_message(error)
    assert said == "RuntimeError: the engine has ended because of KeyError: \"weight 'x.codes'\""
    assert engine_message(ValueError("no")) == "ValueError: no"


# lm-evaluation-harness


def sample(doc: int, **metrics: Any) -> dict[str, Any]:
    found = {"doc_id": doc, "filter": "none", "metrics": list(metrics), "target": doc, **metrics}
    return {**found, "filtered_resps": [(-1.5, False), (-2.5, False)]}


def test_the_harness_results_become_parts() -> None:
    found = {
        "results": {"hellaswag": {"acc,none": 0.5, "acc_norm,none": 1.0, "bits,none": 4.0}},
        "samples": {
            "hellaswag": [sample(0, acc=1.0, acc_norm=1.0, bits=3.0), sample(1, acc=0.0, acc_norm=1.0, bits=5.0)]
        },
    }
    parts = harness.parts_of(found, "hellaswag")
    assert [(p["task"], p["grader"], p["score"]) for p in parts] == [
        ("lm-eval:hellaswag", "acc", 0.5),
        ("lm-eval:hellaswag", "acc_norm", 1.0),
    ]
    assert parts[1]["metric"] == "HellaSwag, accuracy by log-likelihood per character"
    assert parts[0]["items"][0] == {"id": "0", "correct": 1.0, "answer": [-1.5, -2.5], "target": "0"}


def test_log_likelihoods_that_are_not_finite_are_named() -> None:
    broken = {**sample(0, acc=0.0), "filtered_resps": [(-math.inf, False), (-2.5, False)]}
    with pytest.raises(InputError, match="not finite"):
        harness.parts_of({"results": {}, "samples": {"hellaswag": [broken]}}, "hellaswag")


def test_a_group_names_its_tasks_and_lists_are_averaged() -> None:
    found = {
        "results": {"a": {}, "b": {}, "mmlu": {}},
        "groups": {"mmlu": {"acc,none": 0.75}},
        "samples": {"a": [sample(0, acc=True)], "b": [sample(0, acc=[True, False])]},
    }
    (part,) = harness.parts_of(found, "mmlu")
    assert [(i["id"], i["correct"]) for i in part["items"]] == [("a/0", 1.0), ("b/0", 0.5)]
    assert (part["score"], part["reported"], part["n"]) == (0.75, 0.75, 2)


def test_without_the_package_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(harness.importlib, "import_module", absent)
    with pytest.raises(FileError, match=r"pip install 'remend\[eval\]'"):
        harness.Tasks()


def test_unknown_names_and_code_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manager = SimpleNamespace(all_tasks=["hellaswag", "humaneval"])
    module = SimpleNamespace(TaskManager=lambda include_path: manager, __file__="lm_eval/__init__.py")
    monkeypatch.setattr(harness.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(harness.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(harness, "require_sandbox", lambda: "bwrap")
    found = harness.Tasks(tmp_path)
    with pytest.raises(
        CheckError, match=r'(?s)unknown task "lm-eval:helaswag".*Did you mean "lm-eval:hellaswag".*code'
    ):
        found.check(["lm-eval:helaswag", "lm-eval:humaneval"], allow_code=False)
    found.check(["lm-eval:hellaswag", "lm-eval:humaneval"], allow_code=True)

    def missing() -> str:
        raise FileError("bubblewrap is not installed")

    monkeypatch.setattr(harness, "require_sandbox", missing)
    with pytest.raises(CheckError, match="task lm-eval:humaneval: bubblewrap is not installed"):
        found.check(["lm-eval:humaneval"], allow_code=True)


YAML = """task: rain
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def test_a_local_task_runs_without_a_network(
    reference_dir: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [
        {"question": f"Tell me about rain {i}.", "options": ["tea", "stars", "maps"], "gold": i % 3} for i in range(7)
    ]
    data = folder / "rain.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "rain.yaml").write_text(YAML.replace("FILE", str(data)), encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    without_the_harness_tasks(monkeypatch)
    out = tmp_path / "r.json"
    found = evaluate(str(reference_dir), ["lm-eval:rain"], out, include=str(folder), device="cpu", batch_rows=3)
    acc, norm = found["results"]
    assert [(p["task"], p["grader"], p["n"]) for p in (acc, norm)] == [
        ("lm-eval:rain", "acc", 7),
        ("lm-eval:rain", "acc_norm", 7),
    ]
    assert acc["score"] == pytest.approx(acc["reported"])
    model = LlamaForCausalLM.from_pretrained(reference_dir).eval()
    for item, row in zip(acc["items"], rows, strict=True):
        context = tuple(tokenizer(row["question"])["input_ids"])
        slow = [slowly(model, context, tuple(tokenizer(f" {o}")["input_ids"])) for o in row["options"]]
        assert item["answer"] == pytest.approx(slow, abs=1e-3)
        assert item["correct"] == float(slow.index(max(slow)) == row["gold"])
    assert evaluate(str(reference_dir), ["lm-eval:rain"], out, include=str(folder), device="cpu") == found
    mine = {"include": str(folder), "device": "cpu"}
    shown = evaluate(str(reference_dir), ["lm-eval:rain"], tmp_path / "shown.json", num_fewshot=2, **mine)
    assert (shown["data"]["lm-eval"]["num_fewshot"], "num_fewshot" in found["data"]["lm-eval"]) == (2, False)
    assert shown["results"][0]["items"][0]["answer"] != found["results"][0]["items"][0]["answer"]
    with pytest.raises(CheckError, match="num_fewshot concern lm-eval: tasks, and none is given"):
        evaluate(str(reference_dir), ["general"], tmp_path / "s.json", num_fewshot=2)
    with pytest.raises(CheckError, match="unknown task"):
        evaluate(str(reference_dir), ["lm-eval:snow"], tmp_path / "s.json", include=str(folder), device="cpu")


def test_science_rows_have_letters() -> None:
    assert [name for name in tasks.names() if tasks.form(name).letters] == ["science", "science-short"]
