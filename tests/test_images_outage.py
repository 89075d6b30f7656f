"""images.py where files can't be read: what a disk or mount does is no fault of the picture, a job goes on later."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlfseg import images
from rlfseg.errors import BadSample, DataError


def encoded(form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


class Failing(io.FileIO):
    """A file whose disk or mount fails, at once or after its header."""

    number, good = errno.EIO, 0

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.good:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(size)


@pytest.mark.parametrize("good", [0, 4096])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOMEM, errno.ETIMEDOUT])
def test_a_mount_that_fails_is_no_fault_of_the_picture(tmp_path: Path, number: int, good: int) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    with Failing(tmp_path / "a.png") as file:
        file.number, file.good = number, good
        with pytest.raises(DataError, match=r"^a\.png can't be read: .*; start again") as caught:
            images.load_image(file, name="a.png")
    assert not isinstance(caught.value, BadSample)


def test_too_many_open_files_are_no_fault_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "a.png")

    monkeypatch.setattr("builtins.open", full)
    for load in (images.load_image, images.load_mask, images.load_labels):
        with pytest.raises(DataError, match=r"^a\.png can't be read: Too many open files; start again") as caught:
            load(tmp_path / "a.png", name="a.png")
        assert not isinstance(caught.value, BadSample)


def test_what_the_system_says_of_one_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.png", tmp_path / ("x" * 300), tmp_path / "loop"):
        with pytest.raises(BadSample, match=r"^x: can't be decoded"):
            images.load_image(path, name="x")

    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(BadSample, match="Permission denied"):
        images.load_image(tmp_path / "file", name="x")


def test_an_offset_that_leads_nowhere_is_damage(tmp_path: Path) -> None:
    data = bytearray(encoded("JPEG2000"))
    at = data.index(b"ftyp")
    data[at - 4 : at] = (1).to_bytes(4, "big")  # then a length of 8 bytes follows
    data[at + 4 : at + 12] = (1 << 62).to_bytes(8, "big")
    (tmp_path / "a.jp2").write_bytes(data)
    with pytest.raises(BadSample, match=r"^a\.jp2: can't be decoded: .*Invalid argument") as caught:
        images.load_image(tmp_path / "a.jp2", name="a.jp2")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EINVAL  # a number, as if the system had failed
