"""What is written is there whole or not at all, and what was there is never lost."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components import prepare
from components.cli import main
from pnp_core import files
from pnp_core.files import (
    atomic_file,
    atomic_folder,
    read_json,
    recover,
    recover_all,
    write_directory,
    write_json,
    write_state,
    write_tensors,
    write_text,
)
from tests import toy

pytest_plugins = ["tests.toy"]

ROOT = Path(__file__).parent.parent


def test_a_broken_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(KeyError), atomic_file(tmp_path / "a.json") as path:
        path.write_text("2")
        raise KeyError
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == 1
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["a.json", "folder", "folder/old"]


@pytest.mark.parametrize("kind", ["tensors", "state", "text", "directory"])
def test_a_write_that_fails_half_way_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "result"
    content = {"x": torch.zeros(250_000)}
    writes: dict[str, Callable[[], None]] = {
        "tensors": lambda: write_tensors(path, content, {}),
        "state": lambda: write_state(path, content),
        "text": lambda: write_text(path, "x" * 1_000_000),
        "directory": lambda: write_directory(
            path, lambda folder: save_file(content, folder / "weights.safetensors")
        ),
    }
    if kind == "directory":
        path.mkdir()
        (path / "old").touch()
    else:
        path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # the kernel refuses, as when full
    try:
        with pytest.raises(OSError, match=r"Could not write .*/result: .*is untouched"):
            writes[kind]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert (path / "old").exists() if kind == "directory" else path.read_text() == "old"
    writes[kind]()
    assert not path.is_file() or path.read_bytes() != b"old"


def test_what_is_written_may_be_read_by_whom_other_new_files_may(tmp_path: Path) -> None:
    content = {"x": torch.zeros(4)}
    umask = os.umask(0o027)
    try:
        write_tensors(tmp_path / "shard", content, {})
        write_directory(
            tmp_path / "guide", lambda folder: save_file(content, folder / "weights.safetensors")
        )
    finally:
        os.umask(umask)
    for written in (tmp_path / "shard", tmp_path / "guide/weights.safetensors"):
        assert written.stat().st_mode & 0o777 == 0o640


def fill(path: Path, text: str) -> None:
    """Write a folder of two files, one of them in a folder below."""
    with atomic_folder(path) as folder:
        (folder / "below").mkdir()
        for name in ("a", "below/b"):
            (folder / name).write_text(text)


def texts(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "below/b")}


Renames = Callable[..., None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Renames:
    """``refuse(2)`` makes the second rename from now on fail; ``refuse(2, 3)`` also the third."""
    rename = os.replace

    def refuse(*numbers: int, error: BaseException | None = None) -> None:
        count = 0

        def replace(source: Path, target: Path) -> None:
            nonlocal count
            count += 1
            if count in numbers:
                raise error or OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)

    return refuse


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_stays_whichever_of_the_renames_fails(
    tmp_path: Path, refuse: Renames, number: int
) -> None:
    path = tmp_path / "guide"
    fill(path, "old")
    refuse(number)
    with pytest.raises(OSError, match=r"Could not write .*/guide: .*Input/output.* is untouched"):
        fill(path, "new")
    assert texts(path) == {"old"}
    assert list(tmp_path.iterdir()) == [path]
    refuse()
    fill(path, "new")
    assert texts(path) == {"new"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_put_back_is_kept_and_named_and_put_back_by_the_next_run(
    tmp_path: Path, refuse: Renames
) -> None:
    path, old = tmp_path / "guide", tmp_path / ".guide.old"
    fill(path, "old")
    refuse(2, 3)
    with pytest.raises(OSError, match=r"is whole, in .*/\.guide\.old, and the next run"):
        fill(path, "new")
    assert not path.exists() and texts(old) == {"old"}
    refuse()
    assert recover(path)
    assert texts(path) == {"old"} and list(tmp_path.iterdir()) == [path]
    assert not recover(path)


def test_an_interruption_between_the_renames_puts_the_folder_back(
    tmp_path: Path, refuse: Renames
) -> None:
    path = tmp_path / "guide"
    fill(path, "old")
    refuse(2, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fill(path, "new")
    assert texts(path) == {"old"} and list(tmp_path.iterdir()) == [path]


def test_a_first_write_that_fails_does_not_claim_that_something_was_there(
    tmp_path: Path, refuse: Renames
) -> None:
    refuse(1)
    with pytest.raises(OSError, match=r"Could not write .*/guide: .*There was nothing before\."):
        fill(tmp_path / "guide", "new")
    refuse(1)
    with pytest.raises(OSError, match=r"Could not write .*/a\.json: .*There was nothing before\."):
        write_json(tmp_path / "a.json", 1)
    assert not list(tmp_path.iterdir())


def test_a_file_stays_when_its_rename_fails(tmp_path: Path, refuse: Renames) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    refuse(1)
    with pytest.raises(OSError, match=r"Could not write .*/a\.json: .*is untouched"):
        write_json(path, 2)
    assert read_json(path) == 1 and list(tmp_path.iterdir()) == [path]


def test_json_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json is damaged \(.*\): bring it back"):
        read_json(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from pnp_core.files import atomic_folder

rename, path, number, count = os.replace, Path(sys.argv[1]), int(sys.argv[2]), 0

def replace(source, target):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = replace
with atomic_folder(path) as folder:
    (folder / "below").mkdir()
    for name in ("a", "below/b"):
        (folder / name).write_text("new")
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_killed_before_either_rename_loses_nothing(tmp_path: Path, number: int) -> None:
    path = tmp_path / "guide"
    fill(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(number)])
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == (number == 1)
    assert recover_all(tmp_path) == ([] if number == 1 else [path])
    assert texts(path) == {"old"}
    fill(path, "newer")
    assert texts(path) == {"newer"}


def test_an_old_folder_left_beside_its_finished_successor_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "guide"
    fill(tmp_path / ".guide.old", "old")
    fill(path, "new")
    assert list(tmp_path.iterdir()) == [path] and texts(path) == {"new"}
    fill(tmp_path / ".guide.old", "old")
    assert recover_all(tmp_path) == []
    assert list(tmp_path.iterdir()) == [path] and texts(path) == {"new"}


def test_a_link_to_a_folder_is_replaced_without_touching_what_it_leads_to(tmp_path: Path) -> None:
    path = tmp_path / "guide"
    fill(tmp_path / "kept", "old")
    path.symlink_to(tmp_path / "kept")
    fill(path, "new")
    assert not path.is_symlink() and texts(path) == {"new"}
    assert texts(tmp_path / "kept") == {"old"}
    assert {p.name for p in tmp_path.iterdir()} == {"guide", "kept"}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """What is flushed to disk and renamed, in order, by name."""
    happened: list[tuple[str, ...]] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        happened.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        happened.append(("rename", Path(source).name, Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    yield happened


def test_content_is_on_disk_before_the_rename_and_the_rename_before_the_old_one_goes(
    tmp_path: Path, order: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "parent"
    write_text(parent / "file", "x")
    assert order == [("flush", "file"), ("rename", "file", "file"), ("flush", "parent")]

    fill(parent / "guide", "old")
    order.clear()
    remove = files.remove

    def removing(path: Path) -> None:
        order.append(("remove", path.name))
        remove(path)

    monkeypatch.setattr(files, "remove", removing)
    fill(parent / "guide", "new")
    first = next(n for n, what in enumerate(order) if what[0] == "rename")
    flushed = {name for _, name in order[:first]}
    assert {"a", "b", "below", "parent"} < flushed and len(flushed) == 5
    assert order[first : first + 1] == [("rename", "guide", ".guide.old")]
    assert order[first + 1][0::2] == ("rename", "guide")
    assert order[first + 2 :] == [("flush", "parent"), ("remove", ".guide.old")]


def test_a_rename_that_the_disk_does_not_confirm_is_told_and_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guide"
    fill(path, "old")
    flush = files.flush

    def failing(what: Path) -> None:
        if what == tmp_path and (tmp_path / ".guide.old").exists():
            raise OSError(errno.EIO, "Input/output error")
        flush(what)

    monkeypatch.setattr(files, "flush", failing)
    with pytest.raises(OSError, match="The new one is there, but a power cut may still take it"):
        fill(path, "new")
    assert texts(path) == {"new"} and texts(tmp_path / ".guide.old") == {"old"}


BEGUN = """
import os, sys, time
from pathlib import Path
from pnp_core.files import atomic_file, atomic_folder

with atomic_folder(Path("guide")) as folder, atomic_file(Path("a.json")) as file:
    (folder / "half").touch()
    file.touch()
    print("begun", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_had_begun_is_removed_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", BEGUN], stdout=subprocess.PIPE, cwd=tmp_path, env=environment
        )
        for _ in range(2)
    ]
    try:
        assert all(w.stdout and w.stdout.readline() == b"begun\n" for w in writers)
        assert len(list(tmp_path.iterdir())) == 4
        writers[0].kill()
        writers[0].wait()
        recover_all(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2, "those of the one that lives"
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    (tmp_path / ".mine.new").mkdir()
    recover_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".mine.new"], "of someone else"


def test_a_reader_that_puts_back_does_not_disturb_whoever_replaces_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guide"
    fill(path, "old")
    rename, readers = os.replace, []

    def replace(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == ".guide.old":  # between the two renames
            readers.append(threading.Thread(target=recover, args=[path]))
            readers[0].start()
            readers[0].join(timeout=0.2)

    monkeypatch.setattr(os, "replace", replace)
    fill(path, "new")
    readers[0].join(timeout=10)
    assert texts(path) == {"new"}
    recover(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_stage_begins_by_putting_back_what_an_interrupted_one_was_replacing(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_params(world, toy.toy_params())
    main(prepare.run)
    os.replace("data/prepared", "data/.prepared.old")
    seen = []
    main(lambda params: seen.append(Path("data/prepared/manifest.json").exists()))
    assert seen == [True]
    assert "data/prepared: put back; a run was stopped while" in capsys.readouterr().out
