"""Tasks: how rows are read and made, seeded and with splits that share nothing; scoring; the command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import remend
from remend import cli
from remend.data import tasks
from remend.data.examples import completion_of, example_of, load_pairs
from remend.data.tasks import science_short, tooluse_short
from remend.errors import FileError, InputError

TOOLS, SCIENCE = "tooluse-short", "science-short"
BOTH = pytest.mark.parametrize("name", [TOOLS, SCIENCE])
MADE = ["general", SCIENCE, TOOLS]
CHOICE = "Which mass?\nC.CCO is no option\n\nA: 532.0\nB: C[C@@H](O)N: x\nC: 147.2\nD: 455.4"


def call(action: str, **inputs: Any) -> dict[str, str]:
    return {"Action": action, "Action_Input": json.dumps(inputs)}


def test_names_and_the_unknown() -> None:
    assert {"general", "science", SCIENCE, "tooluse", TOOLS} <= set(tasks.names())
    assert remend.tasks.get(TOOLS) is tasks.form(TOOLS) is tasks.FORMS.get(TOOLS)
    assert isinstance(tasks.form(TOOLS), tasks.Form)
    assert all(tasks.get(name).columns[0] == "prompt" for name in tasks.names())
    with pytest.raises(InputError, match=r'unknown task "tooluse_short"; known: general, .*, tooluse-short. Did you'):
        tasks.get("tooluse_short")
    with pytest.raises(InputError, match=r"tooluse makes no rows of its own.* is tooluse-short"):
        tasks.get("tooluse").rows("held_out", 3)


# Rows as they are read


def test_options_are_read_from_the_end_of_the_prompt() -> None:
    task = tasks.get("science")
    row = {"prompt": [{"role": "system", "content": "A: no"}, {"role": "user", "content": CHOICE}], "answer": "C"}
    assert task.options(row) == {"A": "532.0", "B": "C[C@@H](O)N: x", "C": "147.2", "D": "455.4"}
    assert task.choices(row) == ["A", "B", "C", "D"]
    assert task.gold(row) == "C"
    long = {"prompt": "A: x\nB: y\n\n(A) one\nmore\n(B) two\nlines\n\nGive the letter.", "answer": "B"}
    assert task.options(long) == {"A": "one\nmore", "B": "two\nlines"}


def test_messages_and_ids() -> None:
    task, golden = tasks.get("tooluse"), [call("getAnime", animeId=98765)]
    messages = [{"role": "user", "content": "Do it."}]
    row = {"prompt": messages, "golden_answer": golden}
    assert task.messages(row) == task.messages({**row, "prompt": "Do it."}) == messages
    canonical = json.dumps(messages, sort_keys=True) + "\n" + json.dumps(golden, sort_keys=True)
    assert task.id(row) == tasks.row_id(row) == hashlib.sha256(canonical.encode()).hexdigest()[:12]
    assert task.id({**row, "prompt": [{"content": "Do it.", "role": "user"}]}) == task.id(row)
    assert task.id({**row, "id": 7}) == "7"
    others = [
        {**row, "golden_answer": []},
        {"prompt": "Do it.", "golden_answer": golden},
        {**row, "prompt": "Do that."},
    ]
    assert len({task.id(other) for other in (row, *others)}) == 4
    with pytest.raises(InputError):
        tasks.row_id({"answer": "A"})


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("tooluse", {"id": "r1", "prompt": "p", "answer": "B"},
         'row r1: the column "golden_answer" is missing (it has: id, prompt, answer); rows of this task need prompt, '),
        ("tooluse", {"golden_answer": []}, 'the row: the column "prompt" is missing (it has: golden_answer)'),
        ("tooluse", {"id": 3, "prompt": [], "golden_answer": []}, "row 3: the prompt is an empty list"),
        ("science", {"id": "r1", "prompt": CHOICE, "answer": None}, 'row r1: the column "answer" is missing'),
        ("general", {"id": "r1", "prompt": "p"}, 'row r1: the column "checks" is missing'),
        ("science", ["p"], "the row: a row must be an object, got list"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_asked(name: str, row: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.get(name).check(row)
    assert message in str(caught.value)
    with pytest.raises(InputError, match=r"^data.jsonl:4: "):
        tasks.get(name).check(row, "data.jsonl:4")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("tooluse", {"prompt": CHOICE, "golden_answer": []}, "this task is no choice between letters"),
        ("science", {"prompt": CHOICE, "answer": "E"}, "the answer is E; the prompt's options are A, B, C, D"),
        ("science", {"prompt": CHOICE, "answer": 2}, "the answer is 2; the prompt's options are A, B, C, D"),
        ("science", {"prompt": "Which?", "answer": "A"}, 'the prompt has no options as lines "A: …", "B: …": Which?'),
        ("science", {"prompt": "Which?\nA: this", "answer": "A"}, 'the prompt has no options as lines "A: …"'),
        ("science", {"prompt": CHOICE}, 'the column "answer" is missing'),
    ],
)
def test_rows_without_letters_to_score(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.get(name).gold({"id": "r1", **row})
    assert str(caught.value).startswith(f"row r1: {message}")


# Rows as they are made


@BOTH
def test_rows_are_what_data_reads(name: str) -> None:
    for row in tasks.get(name).rows("train", 40):
        assert example_of(row, "row").prompt == row["prompt"]
        assert isinstance(row["prompt"], str)
        assert completion_of(row, "row") == row["demonstration"]
        assert row["id"] == tasks.row_id(row)
        assert len(row["id"]) == 12
        assert row == json.loads(json.dumps(row))
    assert ("golden_answer" in row) == (name == TOOLS)


@pytest.mark.parametrize("name", MADE)
def test_rows_depend_on_split_seed_and_place_alone(name: str) -> None:
    task = tasks.get(name)
    rows = task.rows("train", 60, seed=3)
    assert rows == task.rows("train", 60, seed=3) == json.loads(json.dumps(rows))
    assert rows[:20] == task.rows("train", 20, seed=3)
    assert {r["id"] for r in rows}.isdisjoint(r["id"] for r in task.rows("train", 60, seed=4))
    held_out = {r["prompt"] for r in task.rows("held_out", 360)}
    assert len(held_out) == 360
    assert held_out.isdisjoint(r["prompt"] for r in task.rows("train", 360))


def test_rows_are_the_same_in_another_process() -> None:
    code = (
        "from remend import tasks\n"
        "for n in ('general', 'science-short', 'tooluse-short'):\n"
        "    print(*[r['id'] for r in tasks.get(n).rows('train', 20)])"
    )
    here = [[r["id"] for r in tasks.get(name).rows("train", 20)] for name in ("general", SCIENCE, TOOLS)]
    env = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, text=True)
    assert [line.split() for line in done.stdout.splitlines()] == here


def test_the_first_rows_stay_what_they_are() -> None:
    """Rows are data that results refer to: they must not drift with Python's random module or a reordered list."""
    first = {(name, split): tasks.get(name).rows(split, 3) for name in ("general", TOOLS) for split in tasks.SPLITS}
    assert [r["id"] for r in first["general", "held_out"]] == ["8dd7ef077281", "71dfc44d5aaa", "5a8a6508d342"]
    assert [r["id"] for r in first[TOOLS, "train"][:2]] == ["b881d1800d0b", "fa82ee089a90"]
    assert first[TOOLS, "held_out"][0]["id"] == "aadaf37431e8"


@pytest.mark.parametrize(
    ("split", "n", "message"),
    [
        ("heldout", 4, 'split is "heldout"; allowed: train, held_out. Did you mean "held_out"'),
        ("train", 0, "n is 0; allowed is 1 or more"),
        ("train", -3, "n is -3"),
    ],
)
def test_rows_refuse_bad_arguments(split: str, n: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        tasks.get(TOOLS).rows(split, n)
    assert message in str(caught.value)


def test_a_split_that_is_used_up_says_so() -> None:
    one = tasks.Task("one", "", lambda draw: {"prompt": f"p{draw.index % 3}", "answer": "A"}, lambda *_: None)  # type: ignore[arg-type,return-value]
    assert len(one.rows("train", 3)) == 3
    with pytest.raises(InputError, match=r"one has no 5 distinct rows of train: after 3 it found no new one"):
        one.rows("train", 5)


def actions_of(row: dict[str, Any]) -> set[str]:
    lines = row["prompt"].split("\n")
    return {lines[i - 1].partition(":")[0] for i, line in enumerate(lines) if line.startswith("Parameters: ")}


def test_tool_splits_share_no_api() -> None:
    train, held = (tasks.get(TOOLS).rows(split, 1500, seed) for split, seed in (("train", 0), ("held_out", 5)))
    assert {r["tool"] for r in train}.isdisjoint(r["tool"] for r in held)
    assert set().union(*map(actions_of, train)).isdisjoint(set().union(*map(actions_of, held)))
    assert set(tooluse_short.THINGS["train"]).isdisjoint(tooluse_short.THINGS["held_out"])


def test_science_splits_share_no_fact_of_an_element() -> None:
    train, held = (tasks.get(SCIENCE).rows(split, 1500, seed) for split, seed in (("train", 0), ("held_out", 5)))
    items = [{item for row in part for item in row["items"]} for part in (train, held)]
    assert items[0].isdisjoint(items[1])
    facts = Counter(item.partition(":")[0] for item in items[1])
    assert facts["number"] == facts["symbol"] == 23
    assert facts["mass"] == 20


def test_tool_rows_are_varied() -> None:
    rows = tasks.get(TOOLS).rows("train", 400)
    assert Counter(len(r["golden_answer"]) for r in rows) == {1: 350, 2: 50}
    assert set(Counter(len(actions_of(r)) for r in rows)) == {1, 2, 3}
    assert len({r["tool"] for r in rows}) > 300
    several = [r for r in rows if len(actions_of(r)) == 3]
    order = Counter(
        [line.partition(":")[0] for line in r["prompt"].split("\n") if line.partition(":")[0] in actions_of(r)].index(
            r["golden_answer"][0]["Action"]
        )
        for r in several
    )
    assert min(order.values()) > len(several) / 5  # the right action stands anywhere


def test_tool_requests_name_every_value_that_is_asked_for() -> None:
    for row in tasks.get(TOOLS).rows("held_out", 400):
        question = row["prompt"].rpartition("Question: ")[2].lower()
        for golden in row["golden_answer"]:
            assert golden["Action"] in actions_of(row)
            documented = row["prompt"].split(f"{golden['Action']}: ")[1].split("Parameters: ")[1].split("\n")[0]
            given = json.loads(golden["Action_Input"])
            assert {k for k, v in json.loads(documented).items() if v.startswith("Required")} <= set(given)
            assert set(given) <= set(json.loads(documented))
            for value in given.values():
                assert str(value).lower() in question


def test_letters_and_kinds_are_balanced() -> None:
    rows = tasks.get(SCIENCE).rows("train", 400)
    assert Counter(r["answer"] for r in rows) == dict.fromkeys("ABCD", 100)
    assert Counter(r["subtask"] for r in rows) == dict.fromkeys(science_short.KINDS, 50)
    assert len({(r["answer"], r["subtask"]) for r in rows}) == 32


def options_of(row: dict[str, Any]) -> dict[str, str]:
    return dict(line.split(": ") for line in row["prompt"].split("\n")[-4:])  # type: ignore[misc]


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_options_are_distinct_and_their_rank_tells_nothing(split: str) -> None:
    ranks: Counter[int] = Counter()
    for row in tasks.get(SCIENCE).rows(split, 1600):
        options = options_of(row)
        assert list(options) == list("ABCD")
        assert len(set(options.values())) == 4
        if options["A"][0].isdigit():
            numbers = {k: float(v) for k, v in options.items()}
            assert min(numbers.values()) >= 0
            ranks[sorted(numbers, key=numbers.__getitem__).index(row["answer"])] += 1
    assert all(0.2 < ranks[i] / ranks.total() < 0.3 for i in range(4))


def test_answers_agree_with_the_table() -> None:
    """Against molmass's own formula parser and the table, not against the code that wrote the questions."""
    molmass = pytest.importorskip("molmass")
    table = {e.name.lower(): e for e in molmass.ELEMENTS}
    checked: Counter[str] = Counter()
    for row in tasks.get(SCIENCE).rows("train", 400) + tasks.get(SCIENCE).rows("held_out", 400):
        kind, right = row["subtask"], options_of(row)[row["answer"]]
        question = row["prompt"].split("\n\n")[1]
        words = question.rstrip("?").replace("charge ", "").split()
        named = next((table[w] for w in words if w in table), None)
        checked[kind] += 1
        if kind == "molar_mass":
            assert abs(molmass.Formula(words[-1]).mass - float(right)) < 0.06
        elif kind == "neutrons_of_isotope":
            assert named is not None
            common = max(named.isotopes.values(), key=lambda i: i.abundance)
            assert common.massnumber - named.number == int(right)
        elif kind == "electrons_of_ion":
            assert named is not None
            charge = int(words[-1][-1] + words[-1][:-1])
            assert named.number - charge == int(right)
        elif kind == "heaviest_atom":
            masses = {name: table[name.lower()].mass for name in options_of(row).values()}
            assert right == (max if "heaviest" in question else min)(masses, key=masses.__getitem__)
        elif kind == "number_of_element":
            assert named is not None
            assert named.number == int(right)
        elif kind == "symbol_of_element":
            assert named is not None
            assert named.symbol == right
        elif kind == "name_by_symbol":
            assert table[right.lower()].symbol in words
        else:
            assert str(table[right.lower()].number) in words
    assert set(checked) == set(science_short.KINDS)


def test_well_known_answers() -> None:
    by_name = {e.name: e for e in science_short.table()}
    assert by_name["iron"].number == 26
    assert by_name["chlorine"].mass_number == 35
    assert by_name["technetium"].mass is None
    pairs = {
        "calcium chlorine": "CaCl2",
        "aluminium oxygen": "Al2O3",
        "magnesium nitrogen": "Mg3N2",
        "sodium iodine": "NaI",
    }
    for names, formula in pairs.items():
        metal, other = names.split()
        assert science_short.Compound(by_name[metal], by_name[other]).formula == formula


def test_without_molmass_only_its_rows_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    science_short.table.cache_clear()
    science_short.held_out.cache_clear()
    monkeypatch.setattr(science_short, "find_spec", lambda name: None)
    with pytest.raises(FileError, match=r"science-short computes its facts with the package molmass.*remend\[tasks\]"):
        tasks.get(SCIENCE).rows("train", 1)
    assert tasks.get(SCIENCE).grade("<answer>B</answer>", {"answer": "B"}).correct


@BOTH
@pytest.mark.parametrize("mode", tasks.MODES)
def test_demonstrations_are_correct(name: str, mode: str) -> None:
    task = tasks.get(name)
    rows = task.rows("train", 300, seed=1) + task.rows("held_out", 100, seed=1)
    found = tasks.score(task, rows, [r["demonstration"] for r in rows], mode=mode)
    assert found["score"] == 1, [item for item in found["items"] if not item["correct"]][:3]
    assert {item["reason"] for item in found["items"]} == {"correct"}


@BOTH
@pytest.mark.parametrize("mode", tasks.MODES)
def test_another_rows_demonstration_is_wrong(name: str, mode: str) -> None:
    task = tasks.get(name)
    rows = task.rows("train", 200)
    others = [r["demonstration"] for r in (*rows[1:], rows[0])]
    found = tasks.score(task, rows, others, mode=mode)["score"]
    assert found < (0.4 if name == SCIENCE else 0.01)


@BOTH
def test_prompts_are_short_in_words(name: str) -> None:
    assert max(len(r["prompt"]) for r in tasks.get(name).rows("train", 400)) < 640


@pytest.mark.slow
@BOTH
def test_prompts_fit_200_tokens_of_the_real_tokenizer(name: str, smollm2_dir: Path) -> None:
    from remend.data.templates import encode
    from remend.models.find import find_model
    from remend.models.load import load_tokenizer

    tokenizer = load_tokenizer(find_model(str(smollm2_dir)))
    for split in tasks.SPLITS:
        rows = tasks.get(name).rows(split, 1000)
        assert max(len(encode(tokenizer, example_of(r, "row")).tokens) for r in rows) < 200


# Scoring


def test_score_names_rows_whose_grader_raises_and_goes_on() -> None:
    task = tasks.get(SCIENCE)
    rows = [*task.rows("train", 2), {"id": "bad", "prompt": "?"}, {"prompt": "p", "answer": "C"}, {}]
    answers = [rows[0]["demonstration"], None, "B", "C", "A"]
    found = tasks.score(task, rows, answers)  # type: ignore[arg-type]
    assert {k: found[k] for k in ("task", "grader", "n", "score", "raised")} == {
        "task": SCIENCE, "grader": "paper", "n": 5, "score": 0.4, "raised": 3,
    }  # fmt: skip
    assert [item["correct"] for item in found["items"]] == [True, False, False, True, False]
    assert [item["id"] for item in found["items"]][2:] == ["bad", tasks.row_id(rows[3]), "row 5"]
    assert "the response must be a text, got NoneType" in found["items"][1]["reason"]
    assert found["items"][2]["reason"].startswith("the grader raised on row bad: InputError: the row needs an answer")
    assert json.loads(json.dumps(found)) == found


def test_score_refuses_what_does_not_fit() -> None:
    task = tasks.get(SCIENCE)
    row = {"prompt": "p", "answer": "C"}
    with pytest.raises(InputError, match=r"there are 1 answers for 2 rows"):
        tasks.score(task, [row, row], ["A"])
    with pytest.raises(InputError, match=r"no rows to score"):
        tasks.score(task, [], [])
    with pytest.raises(InputError, match=r'mode is "both"'):
        tasks.score(task, [row], ["A"], mode="both")


# The command line


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["remend", "tasks", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), *capsys.readouterr()


def test_ls(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "ls", "--plain")[:2] == (0, "".join(f"{name}\n" for name in tasks.names()))
    code, out, _ = run(capsys, monkeypatch, "ls")
    assert (code, len(out.splitlines())) == (0, len(tasks.names()))
    assert "science-short  four-choice questions" in out


@BOTH
def test_write(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "rows.jsonl"
    code, said, _ = run(capsys, monkeypatch, "write", name, "--split", "held_out", "--n", 9, "--out", out, "--seed", 2)
    assert (code, said) == (0, f"{out}: 9 rows of {name} (held_out, seed 2)\n")
    rows = tasks.get(name).rows("held_out", 9, seed=2)
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == rows
    assert [(e.id, text) for e, text in load_pairs(str(out))] == [(r["id"], r["demonstration"]) for r in rows]
    assert [p.name for p in out.parent.iterdir()] == ["rows.jsonl"]


def test_what_can_not_be_written_leaves_everything_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine")
    for words, message in (
        (("tool-use", "--n", 3, "--out", tmp_path / "new"), 'unknown task "tool-use"; known: general, science, '),
        ((TOOLS, "--n", 0, "--out", tmp_path / "new"), "n is 0; allowed is 1 or more"),
        ((TOOLS, "--n", 3, "--out", out), f"out {out} exists; name a new file"),
        ((TOOLS, "--n", 3, "--out", out / "below"), "can't be written"),
    ):
        code, _, err = run(capsys, monkeypatch, "write", *words)
        assert code == 2
        assert message in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert out.read_text() == "mine"
