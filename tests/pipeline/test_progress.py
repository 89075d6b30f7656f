"""The progress line: on a terminal it tells rows, speed and time to go; in a log it says a line a minute."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from rich.progress import Task

from rlfseg.pipeline.progress import Progress, _Speed

JOB = """
import threading
from rlfseg.pipeline.progress import Progress
looks, seen = iter([40, 40, 60, 80, 100]), threading.Event()
def count():
    n = next(looks, 100)
    if n == 100:
        seen.set()
    return n
with Progress("predict", total=120, count=count, tell=lambda: "loss 0.5", every=0.01{more}):
    seen.wait(30)
"""


def on_a_terminal(code: str) -> str:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=follower, stdout=follower, env=environment) as job:
        os.close(follower)
        said = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            said += part
        assert job.wait() == 0
    os.close(leader)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())


def test_a_terminal_sees_rows_speed_and_time_to_go() -> None:
    said = on_a_terminal(JOB.format(more=""))
    assert "predict" in said
    assert "100/120" in said
    assert re.search(r"\d+\.\d images/s", said)
    assert re.search(r"\d:\d\d:\d\d", said)
    assert "loss 0.5" in said


def in_a_log(more: str) -> list[str]:
    job = [sys.executable, "-c", JOB.format(more=more)]
    done = subprocess.run(job, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_log_sees_a_line_now_and_then() -> None:
    assert in_a_log("") == []  # it is over within a minute
    lines = in_a_log(", unit='steps', line_every=0.0")
    assert lines[0].startswith("predict: 40 of 120 steps")
    assert re.fullmatch(r"predict: 80 of 120 steps, \d+\.\d steps/s, \d:\d\d:\d\d to go, loss 0\.5", lines[2])


def test_what_was_done_before_counts_for_no_speed() -> None:
    task: Task = Progress("x", total=1000, count=lambda: 900).bar.tasks[0]
    assert (task.completed, task.speed) == (900, None)
    assert _Speed("images").render(task).plain == ""


def line_after(*looks: tuple[float, int]) -> str:
    """What a log says after looks at (seconds since the start, rows)."""
    moments = [(0.0, 16), *looks]
    now = iter(moments)
    state = next(now)
    progress = Progress("predict", total=416, count=lambda: state[1], clock=lambda: state[0])
    for state in now:  # noqa: B007 -- read by the two above
        progress._look()
    return progress._line()


def test_rows_that_come_minutes_apart_have_a_speed_and_a_time_to_go() -> None:
    looks = [(float(s), 16 + 8 * (s // 240)) for s in range(1, 961)]  # 8 rows every four minutes
    assert line_after(*looks[:239]) == "predict: 16 of 416 images"
    assert line_after(*looks[:240]) == "predict: 24 of 416 images, 0.033 images/s, 3:16:00 to go"
    assert line_after(*looks) == "predict: 48 of 416 images, 0.033 images/s, 3:04:00 to go"


def test_two_workers_that_come_together_are_no_burst_of_speed() -> None:
    assert line_after((240, 24), (241, 32)).endswith("0.066 images/s, 1:36:24 to go")


def test_a_folder_that_fails_for_a_moment_ends_no_line_and_hides_no_error() -> None:
    looks = iter([5, OSError("stale handle"), 7, OSError("gone")])

    def count() -> int:
        found = next(looks)
        if isinstance(found, OSError):
            raise found
        return found

    progress = Progress("predict", total=10, count=count, every=1000)
    done = [progress.bar.tasks[0].completed]
    for _ in range(2):
        progress._look()
        done.append(progress.bar.tasks[0].completed)
    assert done == [5, 5, 7]
    with pytest.raises(KeyError, match="its own"), progress:
        raise KeyError("its own")
    assert progress.bar.tasks[0].completed == 7
