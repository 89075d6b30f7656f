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
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class Progress:
    """Shows how far a job is, once a second; silent where the output is no terminal.

    Args:
        name: What is going on.
        total: Rows in all.
        count: Rows done so far.
        every: Seconds between two looks.
    """

    def __init__(self, name: str, *, total: int, count: Callable[[], int], every: float = 1.0):
        self.count, self.every, self.stopped = count, every, threading.Event()
        console = Console(file=sys.stderr)
        self.bar = Bar(
            TextColumn("{task.description:10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=total)
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
