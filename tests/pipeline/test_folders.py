"""Output folders: one job at a time in each, and none for settings that never worked."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from rlfseg.errors import ConfigError, DataError, ModelError
from rlfseg.pipeline.folders import alone, begin, unclaim

HOLD = """
import sys
from pathlib import Path
from rlfseg.pipeline.folders import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_start_ends_at_once_until_the_first_is_gone_however_it_ends(tmp_path: Path) -> None:
    begin(tmp_path / "out", {})
    line = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=f"{tmp_path / 'out'}: this job runs already"), alone(tmp_path / "out"):
            pytest.fail("both run")
        first.kill()
    assert begin(tmp_path / "out", {}) == "resume"
    with alone(tmp_path / "out"):
        pass
    with pytest.raises(ModelError, match="of its own"), alone(tmp_path / "out"):
        raise ModelError("an error of its own")
    with alone(tmp_path / "out"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_the_job_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(fd: int) -> bool:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", refuse)
    worked = False
    with caplog.at_level(logging.WARNING), alone(tmp_path):
        worked = True
    assert worked
    assert "can't be locked" in caplog.text


@pytest.mark.parametrize(
    ("error", "begun", "is_left"),
    [
        (ConfigError("a"), False, False),
        (ModelError("a"), False, False),
        (ModelError("a"), True, True),
        (DataError("a"), False, True),
        (None, False, True),
    ],
)
def test_settings_that_never_worked_claim_no_folder(
    tmp_path: Path, error: Exception | None, begun: bool, is_left: bool
) -> None:
    begin(tmp_path / "out", {})
    with alone(tmp_path / "out"):
        unclaim(tmp_path / "out", error, lambda: begun)
    assert (tmp_path / "out").exists() == is_left


def test_a_start_that_could_not_even_claim_its_folder_may_be_made_again(tmp_path: Path) -> None:
    """On a disk that was full, or killed at that."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "._STARTED.json.tmp").write_text('{"sch')
    assert begin(tmp_path / "out", {}) == "new"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["_STARTED.json"]
