"""A progress line that tells what is safely on disk, also after a resume."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
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
    """Shows how far a job is, how fast, and how long it will still take, once a second; silent where the output is no
    terminal.

    Args:
        name: What is going on.
        total: Rows in all.
        count: Rows done so far; what is done at the start counts for no speed.
        unit: What a row is, in the plural.
        every: Seconds between two looks.
    """  # noqa: D205  two lines say it all

    def __init__(self, name: str, *, total: int, count: Callable[[], int], unit: str = "images", every: float = 1.0):
        self.count, self.every, self.stopped = count, every, threading.Event()
        console = Console(file=sys.stderr)
        self.bar = Bar(
            TextColumn("{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(unit),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=total, completed=count())
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
        self.bar.update(self.task, completed=self.count())
        self.bar.stop()

    def _watch(self) -> None:
        while not self.stopped.wait(self.every):
            self.bar.update(self.task, completed=self.count())
