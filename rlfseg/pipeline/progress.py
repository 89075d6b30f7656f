"""A progress line that tells what is safely on disk, also after a resume."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

SHARE = 20  # of the time between two looks, in which a look may take one: there may be 100,000 files to count


class _Speed(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} {self.unit}/s" if speed >= 1 else f"{speed:.2g} {self.unit}/s")


class Progress:
    """Shows how far a job is, how fast, and how long it will take: a bar on a terminal, elsewhere a line a minute.

    The speed is that of this start from its beginning, as in the closing line: rows come in blocks, minutes apart or
    several at once, so that a short while tells nothing.

    Args:
        name: What is going on.
        total: Rows in all.
        count: Rows done so far; what is done at the start counts for no speed.
        unit: What a row is, in the plural.
        tell: What else is to be said, now.
        every: Seconds between two looks.
        line_every: Seconds between two lines where the output is no terminal.
        clock: Seconds, from any beginning.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        count: Callable[[], int],
        unit: str = "images",
        tell: Callable[[], str] = str,
        every: float = 1.0,
        line_every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.count, self.tell, self.every, self.line_every, self.clock = count, tell, every, line_every, clock
        self.speed, self.stopped = _Speed(unit), threading.Event()
        console = Console(file=sys.stderr)
        self.bar = Bar(
            TextColumn("{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            self.speed,
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[told]}"),
            console=console,
            disable=not console.is_terminal,
            get_time=clock,
            speed_estimate_period=math.inf,
        )
        self.task = self.bar.add_task(name, total=total, completed=count(), told="")
        self.bar.advance(self.task, 0)  # the speed counts from here
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        """Starts watching."""
        self.bar.start()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shows the last state and stops."""
        self.stopped.set()
        self.thread.join()
        self._look()
        self.bar.stop()

    def _watch(self) -> None:
        said, wait = self.clock(), self.every
        while not self.stopped.wait(wait):
            start = time.monotonic()
            self._look()
            wait = max(self.every, SHARE * (time.monotonic() - start))
            if self.bar.disable and self.clock() - said >= self.line_every:
                said = self.clock()
                print(self._line(), file=sys.stderr, flush=True)

    def _look(self) -> None:
        with suppress(OSError, ValueError, RayError):  # it may be back in a moment, and the job tells better errors
            self.bar.update(self.task, completed=self.count(), told=self.tell())

    def _line(self) -> str:
        task = self.bar.tasks[0]
        to_go = f"{timedelta(seconds=round(task.time_remaining))} to go" if task.time_remaining is not None else ""
        done = f"{task.description}: {task.completed:g} of {task.total:g} {self.speed.unit}"
        return ", ".join(filter(None, [done, self.speed.render(task).plain, to_go, task.fields["told"]]))
