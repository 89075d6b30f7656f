"""A progress line that tells what is safely on disk, also after a resume."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text


class _Speed(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else "")


class Progress:
    """Shows how far a job is, how fast, and how long it will take: a bar on a terminal, elsewhere a line a minute.

    Args:
        name: What is going on.
        total: Rows in all.
        count: Rows done so far; what is done at the start counts for no speed.
        unit: What a row is, in the plural.
        tell: What else is to be said, now.
        every: Seconds between two looks.
        line_every: Seconds between two lines where the output is no terminal.
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
    ):
        self.count, self.tell, self.every, self.line_every = count, tell, every, line_every
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
        )
        self.task = self.bar.add_task(name, total=total, completed=count(), told="")
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
        said = time.monotonic()
        while not self.stopped.wait(self.every):
            self._look()
            if self.bar.disable and time.monotonic() - said >= self.line_every:
                said = time.monotonic()
                print(self._line(), file=sys.stderr, flush=True)

    def _look(self) -> None:
        self.bar.update(self.task, completed=self.count(), told=self.tell())

    def _line(self) -> str:
        task = self.bar.tasks[0]
        to_go = f"{timedelta(seconds=round(task.time_remaining))} to go" if task.time_remaining is not None else ""
        done = f"{task.description}: {task.completed:g} of {task.total:g} {self.speed.unit}"
        return ", ".join(filter(None, [done, self.speed.render(task).plain, to_go, task.fields["told"]]))
