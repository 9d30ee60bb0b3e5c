"""Programs of a model run apart: shown with a real bubblewrap where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remend.errors import FileError
from remend.evaluation import sandbox
from remend.evaluation.sandbox import CodeEval, require_sandbox, run_program


@pytest.fixture
def bwrap() -> str:
    require_sandbox.cache_clear()
    try:
        return require_sandbox()
    except FileError as error:
        pytest.skip(str(error))


def test_a_program_passes_at_its_end_alone(bwrap: str) -> None:
    assert run_program("assert 1 + 1 == 2").passed
    assert run_program("assert 1 == 2").result == "failed: AssertionError: "
    assert not run_program("import os; os._exit(0)").passed
    assert not run_program("raise SystemExit(0)").passed
    assert not run_program("print('passed'); assert False").passed
    assert run_program("while True: pass", 1.0).result == "timed out"


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
        "import socket; assert len(socket.if_nameindex()) > 1",
        "open('/usr/x', 'w')",
        "open('/x', 'w').write('x' * 2**25)",
        "'a' * 2**32",
        "import os; assert [n for n in os.environ if n not in ('PATH', 'HOME', 'PWD', 'LC_CTYPE', 'OMP_NUM_THREADS')]",
        "import os; assert [p for p in os.listdir('/proc') if p.isdecimal() and int(p) > 20]",
    ],
)
def test_what_it_can_not_reach(program: str, bwrap: str) -> None:
    assert not run_program(program).passed


def test_files_of_the_user_are_not_there(bwrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    (tmp_path / "secret").write_text("s")
    there = [str(tmp_path / "secret"), str(Path.home() / ".cache"), str(Path.cwd()), "/etc/passwd"]
    assert run_program(f"import os; assert not any(map(os.path.exists, {there})), 'seen'").passed
    assert run_program("import os; assert 'SECRET' not in os.environ").passed
    assert run_program("import os; assert os.listdir('/tmp') == []; open('/tmp/a', 'w').write('x')").passed
    assert not Path("/tmp/a").exists() or Path("/tmp/a").read_text() != "x"


def test_as_code_eval_counts(bwrap: str) -> None:
    programs = [["def add(a, b): return a * b", "def add(a, b): return a + b"]]
    shares, results = CodeEval().compute(references=["assert add(2, 3) == 5"], predictions=programs, k=[1, 2, 10])
    assert shares == {"pass@1": 0.5, "pass@2": 1.0}
    assert [about["passed"] for _, about in results[0]] == [False, True]


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    require_sandbox.cache_clear()
    with pytest.raises(FileError, match=r"runs isolated by bubblewrap .* not installed; .*apt install bubblewrap"):
        run_program(f"open({str(ran)!r}, 'w')")
    with pytest.raises(FileError, match="apt install bubblewrap"):
        CodeEval().compute(references=["pass"], predictions=[[f"open({str(ran)!r}, 'w')"]])
    assert not ran.exists()
    require_sandbox.cache_clear()


def test_one_that_can_not_isolate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    require_sandbox.cache_clear()
    with pytest.raises(FileError, match=r"can't isolate anything here \(No permissions .*\); allow user namespaces"):
        run_program("pass")
    require_sandbox.cache_clear()
