"""Checkpoints that are whole or don't count: damaged, torn by a kill, on a full disk, in a bucket."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs
import pytest

from rlfseg.errors import ConfigError, ResourceError
from rlfseg.pipeline import checkpoints
from rlfseg.pipeline.checkpoints import REGISTRY, SEAL, Store


def save(content: str, size: int = 1000) -> Callable[[Path], None]:
    """What a training writes: two files, one of them in a folder."""

    def write(folder: Path) -> None:
        (folder / "unet").mkdir(parents=True)
        (folder / "state.pt").write_bytes(content.encode() * size)
        (folder / "unet" / "weights").write_text(content)

    return write


def contents(store: Store) -> list[str]:
    """Of the whole checkpoints, newest first."""
    return [(folder / "unet" / "weights").read_text() for _, folder in store.whole()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "checkpoints"), "train-1")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FIRST_WAIT", 0.01)


# --- whole or not -------------------------------------------------------------------------------------------------


def test_the_newest_comes_first_and_is_read_back_as_it_was_written(store: Store) -> None:
    assert contents(store) == []
    for step in (2, 10, 9):
        store.keep(step, save(f"at {step}"))
    assert contents(store) == ["at 10", "at 9", "at 2"]


@pytest.mark.parametrize("name", ["state.pt", "unet/weights", SEAL])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "one bit"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    store: Store, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    store.keep(1, save("good"))
    path = Path(store.keep(2, save("bad")).path) / name
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"truncated": content[:-1], "empty": b"", "one bit": flipped}[harm])
    assert contents(store) == ["good"]
    assert f"{path.parent if name != 'unet/weights' else path.parents[1]} is passed over: {name}" in caplog.text


@pytest.mark.fault("ckpt-01")
def test_strays_of_a_dead_attempt_mix_with_nothing(store: Store) -> None:
    """A worker died while it uploaded step 4; the retry reaches step 4 again."""
    whole = Path(store.keep(4, save("dead")).path)
    stray = whole.with_name("step-00000004-00000000")
    stray.mkdir()
    (whole / "state.pt").rename(stray / "state.pt")
    (whole / SEAL).unlink()
    kept = Path(store.keep(4, save("retry")).path)
    assert contents(store) == ["retry"]
    (kept / "left over by somebody").write_text("?")
    assert contents(store) == ["retry"]
    assert {p.name for p in kept.iterdir()} == {"state.pt", "unet", SEAL, "left over by somebody"}


@pytest.mark.fault("ckpt-03")
@pytest.mark.parametrize("where", ["while saving", "while uploading", "before the seal"])
def test_a_kill_in_the_middle_leaves_the_one_before(store: Store, where: str) -> None:
    store.keep(1, save("before"))
    code = f"""
import os, signal
from pathlib import Path
from rlfseg.pipeline import checkpoints
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def upload(local, target, **_):
    Path(target, "state.pt").write_bytes(Path(local, "state.pt").read_bytes()[:100]); die()
def save(folder):
    (folder / "state.pt").write_bytes(b"x" * 1000)
    if {where!r} == "while saving": die()
if {where!r} == "while uploading": checkpoints.copy_files = upload
if {where!r} == "before the seal": checkpoints.seal = die
checkpoints.Store({store.storage!r}, {store.name!r}).keep(2, save)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert contents(store) == ["before"]
    store.keep(2, save("after"))
    assert contents(store) == ["after", "before"]


def test_what_deaths_left_behind_is_swept_away(store: Store) -> None:
    kept = store.keep(1, save("kept"))
    store.keep(2, save("never reported"))
    (Path(store.folder) / "step-00000003-half").mkdir()
    (Path(store.folder) / REGISTRY).write_text("{}")
    store.sweep({kept.path})
    assert sorted(p.name for p in Path(store.folder).iterdir()) == [REGISTRY, Path(kept.path).name]


# --- storage that fails -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_what_fails_once_is_tried_again(store: Store) -> None:
    tries = []

    def flaky(folder: Path) -> None:
        tries.append(folder)
        if len(tries) < 3:
            raise OSError(5, "Input/output error")
        save("third")(folder)

    store.keep(1, flaky)
    assert contents(store) == ["third"]
    assert not any(folder.exists() for folder in tries)


@pytest.mark.usefixtures("impatient")
def test_what_reads_back_differently_does_not_count(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = checkpoints.copy_files

    def lossy(local: str, target: str, **settings: object) -> None:
        copy(local, target, **settings)
        (Path(target) / "state.pt").write_bytes(b"short")

    monkeypatch.setattr(checkpoints, "copy_files", lossy)
    with pytest.raises(ResourceError, match=r"step 3 can't be written.*state.pt is not what was written"):
        store.keep(3, save("x"))
    assert list(store.newest_first()) == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of that size; skips where mounting isn't allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.drill
@pytest.mark.fault("ckpt-04")
@pytest.mark.usefixtures("impatient")
def test_a_full_disk_is_told_and_the_one_before_is_kept(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "200k") as disk:
        store = Store(str(disk), "train-1")
        store.keep(1, save("first", 20_000))
        with pytest.raises(ResourceError, match=rf"written to {disk}: the disk is full. The one before is kept"):
            store.keep(2, save("second", 20_000))
        assert contents(store) == ["first"]
        assert len(list(store.newest_first())) == 1  # what didn't fit takes no room
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        store.keep(2, save("second", 20_000))
        assert contents(store) == ["second", "first"]


@pytest.mark.usefixtures("impatient")
def test_a_file_system_that_takes_no_more_is_told(store: Store) -> None:
    """The same without the right to mount: a limit on the size of files, in a process of its own."""
    store.keep(1, save("first"))
    code = f"""
import resource, signal
from rlfseg.errors import ResourceError
from rlfseg.pipeline import checkpoints
checkpoints.FIRST_WAIT = 0.01
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoints.Store({store.storage!r}, {store.name!r}).keep(2, lambda f: (f / "state.pt").write_bytes(b"x" * 20_000))
except ResourceError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "the checkpoint of step 2 can't be written" in told
    assert "File too large" in told
    assert contents(store) == ["first"]


@pytest.mark.fault("ckpt-04")
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("uploading", [False, True])
def test_the_disk_that_is_full_is_named(store: Store, monkeypatch: pytest.MonkeyPatch, uploading: bool) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if uploading:
        monkeypatch.setattr(checkpoints, "copy_files", full)
    place = "the disk is full" if uploading else f"the disk of {tempfile.gettempdir()} here is full"
    with pytest.raises(ResourceError, match=rf"can't be written to {store.storage}: {place}\. The one before"):
        store.keep(3, save("x") if uploading else full)


# --- Ray's list of checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", '{"checkpoint_results": [{"checkpoint_dir_name": "step-', "GONE"])
def test_half_a_list_is_dropped_and_a_whole_one_kept(store: Store, text: str) -> None:
    name = Path(store.keep(1, save("x")).path).name
    registry = Path(store.folder) / REGISTRY
    store.ready()
    whole = f'{{"checkpoint_results": [{{"checkpoint_dir_name": "{name}"}}]}}'
    registry.write_text(whole)
    store.ready()
    assert registry.exists()
    registry.write_text(whole.replace(name, "step-00000009-gone") if text == "GONE" else text)
    store.ready()
    assert not registry.exists()
    assert contents(store) == ["x"]


# --- other storage ------------------------------------------------------------------------------------------------


def test_what_pyarrow_does_not_know_goes_through_fsspec() -> None:
    store = Store("memory://runs/checkpoints", "train-1")
    assert isinstance(store.filesystem, pyarrow.fs.PyFileSystem)
    store.keep(1, save("x"))
    assert contents(store) == ["x"]


def test_storage_that_is_none() -> None:
    with pytest.raises(ConfigError, match="storage: 'nowhere://bucket/runs' is no folder and no URI"):
        Store("nowhere://bucket/runs", "train-1")


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_bucket(bucket_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(bucket_uri, "train-1")
    for step in (1, 2):
        store.keep(step, save(f"at {step}", 200_000))
    assert contents(store) == ["at 2", "at 1"]
    newest = next(store.newest_first())
    with store.filesystem.open_output_stream(f"{newest.path}/state.pt") as file:
        file.write(b"short")
    assert contents(store) == ["at 1"]
    assert "passed over: state.pt is not what was written" in caplog.text
    store.discard(newest)
    assert len(list(store.newest_first())) == 1
