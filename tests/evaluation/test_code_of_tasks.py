"""What task files of lm-evaluation-harness may run, and what the command must have said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.patching import without_the_harness_tasks
from remend.errors import CheckError, FileError, InputError
from remend.evaluation import harness

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def no_tasks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_harness_tasks(monkeypatch)


TASK = "task: mine\ndataset_path: json\noutput_type: generate_until\n"


def folder(tmp_path: Path, text: str) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK + text)
    (tmp_path / "tasks" / "u.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(doc): return ''\n")
    return tmp_path / "tasks"


def test_python_of_a_task_file_is_refused(tmp_path: Path) -> None:
    found = harness.Tasks(folder(tmp_path, "doc_to_text: !function u.f\n"))
    with pytest.raises(CheckError, match=r"mine\.yaml has Python of its own run \(!function\).* say --allow-code"):
        found.check(["lm-eval:mine"], allow_code=False)
    found.check(["lm-eval:mine"], allow_code=True)
    assert not (tmp_path / "ran").exists()


def test_python_of_a_file_that_it_takes_in(tmp_path: Path) -> None:
    place = folder(tmp_path, "include: ../elsewhere\n")
    (tmp_path / "elsewhere").write_text("doc_to_text: !function tasks.u.f\n")
    with pytest.raises(CheckError, match=r"elsewhere has Python of its own"):
        harness.Tasks(place).check(["lm-eval:mine"], allow_code=False)


def test_templates_and_metrics_run_nothing(tmp_path: Path) -> None:
    from lm_eval import utils

    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}"
    before = utils.env
    with harness._guarded(allow_code=False):
        import evaluate

        with pytest.raises(Exception, match="unsafe"):
            utils.apply_template(evil, {})
        assert utils.apply_template("{{ a | regex_replace('b', 'c') }}\n", {"a": "ab"}) == "ac\n"
        with pytest.raises(InputError, match=r"the metric \./mine is Python of somebody's own; .* say --allow-code"):
            evaluate.load("./mine")
        assert type(evaluate.load("code_eval")).__name__ == "CodeEval"
    assert utils.env is before
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("before", ["0", None])
def test_the_variable_that_allows_code_is_left_alone(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    else:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", before)
    with harness._guarded(allow_code=True):
        assert os.environ.get("HF_ALLOW_CODE_EVAL") == before
    assert os.environ.get("HF_ALLOW_CODE_EVAL") == before


@pytest.mark.parametrize("tag", ["!%66unction u.f", "!function u.f"])
def test_python_that_the_harness_finds_is_refused_however_it_is_spelt(tmp_path: Path, tag: str) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    place = folder(tmp_path, f"doc_to_text: {tag}\n")
    with (
        harness._guarded(allow_code=False),
        pytest.raises(InputError, match=r"Python of its own run \(u\.f of .*tasks"),
    ):
        load_yaml(place / "mine.yaml", resolve_func=True)
    assert not (tmp_path / "ran").exists()
    with harness._guarded(allow_code=True):
        load_yaml(place / "mine.yaml", resolve_func=True)
    assert (tmp_path / "ran").exists()


def test_a_pipe_among_task_files_is_told_before_anything_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "task.yaml")
    with pytest.raises(FileError, match=r"task\.yaml can't be read: it is a pipe or socket; give a file"):
        harness.Tasks(tmp_path)


def test_a_template_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import utils

    from remend.data import bounded_templates

    monkeypatch.setattr(bounded_templates, "SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ question }}"
    with harness._guarded(allow_code=False):
        for _ in range(2):
            with pytest.raises(InputError, match=r"the task's template '\{% for i.* does not come to an end"):
                utils.apply_template(endless, {"question": "?"})
        later = "{% if question == '!' %}" + endless + "{% endif %}{{ question }}"
        assert utils.apply_template(later, {"question": "?"}) == "?"
        with pytest.raises(InputError, match="does not come to an end"):
            utils.apply_template(later, {"question": "!"})
