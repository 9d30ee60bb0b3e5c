"""What is written is durable before it replaces anything, and only what remend made is removed."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

import remend.files.atomic as atomic
from remend.errors import FileError
from remend.files.atomic import OLD, TEMPORARY, new_directory, put_aside, remove_temporary, write_text, writing
from remend.files.lock import take


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_and_the_name_of_it_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(atomic, "flush", lambda path: flushed.append((path.name[:12], names(tmp_path))))
    write_text(tmp_path / "a.json", "{}")
    (content, before), (parent, after) = flushed
    assert (content, parent) == (TEMPORARY, tmp_path.name[:12])
    assert "a.json" not in before
    assert after == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "{}"


def test_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are flushed while the old one stands; the parent after the rename; then the old one goes."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    seen: list[tuple[str, bool, bool]] = []

    def flush(path: Path) -> None:
        aside = any(name.startswith(OLD) for name in names(tmp_path))
        seen.append((path.name if path != tmp_path else "parent", (target / "old").exists(), aside))

    monkeypatch.setattr(atomic, "flush", flush)
    with new_directory(target) as made:
        (made / "sub").mkdir()
        (made / "sub" / "one").touch()
    before = [name for name, old_stands, _ in seen if old_stands]
    assert {"sub", "one", made.name} <= set(before)
    assert seen[len(before)] == ("parent", False, True)  # renamed, and the old one is still there under its other name
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("mask", ["027", "002"])
def test_the_umask_holds(tmp_path: Path, mask: str) -> None:
    script = (
        "from pathlib import Path; from remend.files.atomic import *\n"
        f"write_text(Path({str(tmp_path)!r}) / 'file', 'x')\n"
        f"with new_directory(Path({str(tmp_path)!r}) / 'folder') as d: (d / 'in').touch(0o600)\n"
    )
    subprocess.run(["sh", "-c", f'umask {mask}; exec "$0" -c "$1"', sys.executable, script], check=True)
    allowed = 0o777 & ~int(mask, 8)
    assert (tmp_path / "file").stat().st_mode & 0o777 == allowed & 0o666
    assert (tmp_path / "folder" / "in").stat().st_mode & 0o777 == allowed & 0o666
    assert (tmp_path / "folder").stat().st_mode & 0o777 == allowed


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as living:
        dead = tmp_path / f"{TEMPORARY}out-dead"
        dead.mkdir()
        (dead / "half").touch()
        with new_directory(tmp_path / "other"):
            pass
        assert dead.is_dir()  # it was to become something else
        remove_temporary(tmp_path, "out")
        assert not dead.exists()
        assert living.is_dir()
    assert names(tmp_path) == ["other", "out"]


def test_a_small_file_s_leftovers_go_too_and_what_is_being_written_stays(tmp_path: Path) -> None:
    for name in ("a.json-dead", "a.json-living", "b.json-dead"):
        (tmp_path / f"{TEMPORARY}{name}").touch()
    with (tmp_path / f"{TEMPORARY}a.json-living").open() as held:
        assert take(held.fileno())
        write_text(tmp_path / "a.json", "{}")
    assert names(tmp_path) == [f"{TEMPORARY}a.json-living", f"{TEMPORARY}b.json-dead", "a.json"]


def test_what_was_moved_aside_and_not_replaced_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / f"{OLD}model-x"
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "weights").touch()
    remove_temporary(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").is_file()


@pytest.mark.parametrize("after", [1, 2])
def test_an_end_in_the_middle_of_replacing_leaves_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A signal after the first rename leaves the old directory, and after the second the new one; nothing else."""
    write_text(tmp_path / "model" / "weights", "old")
    rename, calls = Path.rename, []

    def ended(path: Path, to: Path) -> Path:
        done = rename(path, to)
        calls.append(path)
        if len(calls) == after:
            raise KeyboardInterrupt
        return done

    def replaced() -> None:
        with new_directory(tmp_path / "model") as directory:
            (directory / "weights").write_text("new")
            monkeypatch.setattr(Path, "rename", ended)

    with pytest.raises(KeyboardInterrupt):
        replaced()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == ("old" if after == 1 else "new")


def test_hidden_files_of_others_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".env").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / f"{TEMPORARY}link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{TEMPORARY}file").touch()
    remove_temporary(tmp_path)
    assert names(tmp_path) == [".env", ".git", "elsewhere"]
    assert (tmp_path / "elsewhere" / "mine").is_file()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")  # dangling, until it is written
    with new_directory(tmp_path / "out") as made:
        (made / "config.json").touch()
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk" / "model") == ["config.json"]


def test_a_mount_point_is_filled_with_config_json_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "volume"
    target.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == target)
    moved: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (moved.append(self.name), rename(self, to))[1])
    with new_directory(target) as made:
        for name in ("config.json", "model.safetensors", "a.json"):
            (made / name).touch()
    assert names(target) == ["a.json", "config.json", "model.safetensors"]
    assert moved[-1] == "config.json"


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("m" * 250)
    with new_directory(target) as made:
        (made / "config.json").touch()
    assert (target / "config.json").is_file()


def test_a_place_that_can_t_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileError, match=r"can't be written: (Not a directory|File exists)"),
        new_directory(tmp_path / "file" / "out"),
    ):
        pass


def test_names_aside_are_free(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "cell").mkdir()
        put_aside(tmp_path / "cell")
    assert names(tmp_path) == ["cell.aside-1", "cell.aside-2"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), Exception("No space left on device (os error 28)")])
def test_a_full_disk_is_one_message_whoever_notices_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(FileError, match="the disk is full"), writing(tmp_path / "file"):
        raise error


def test_what_is_no_error_of_the_system_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file"):
        raise ZeroDivisionError
