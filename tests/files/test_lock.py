"""One process at a time writes a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import remend.files.lock as lock
from remend.errors import FileError, InputError
from remend.files.lock import only_writer

HOLDER = """
import sys, time
from pathlib import Path
from remend.files.lock import only_writer
with only_writer(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_is_told_who_the_first_is_and_comes_in_when_that_is_dead(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with (
            pytest.raises(InputError, match=rf"another process \(process {holder.pid} on .+\) is at work in the run"),
            only_writer(tmp_path, "run"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with only_writer(tmp_path, "run") as known:
        assert known


def test_it_is_free_again_in_the_same_process(tmp_path: Path) -> None:
    for _ in range(2):
        with only_writer(tmp_path, "run") as known:
            assert known
            with pytest.raises(InputError, match=f"process {os.getpid()}"), only_writer(tmp_path, "run"):
                pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with only_writer(tmp_path, "run") as known:
        assert not known


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_is_never_taken_through_a_link(tmp_path: Path, there: bool) -> None:
    victim, place = tmp_path / "victim", tmp_path / "run"
    place.mkdir()
    if there:
        victim.write_text("precious")
    (place / lock.LOCK).symlink_to(victim)
    with pytest.raises(FileError, match="is a link, or no plain file, and is not written"), only_writer(place, "run"):
        pass
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"
    (place / lock.LOCK).unlink()
    victim.write_text("precious")
    os.link(victim, place / lock.LOCK)
    with pytest.raises(InputError, match="is a link, so the run can't be locked"), only_writer(place, "run"):
        pass
    assert victim.read_text() == "precious"
