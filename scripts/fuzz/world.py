"""A small valid world of files, of which one is mutated, and the reader of the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]
WIDTH, HEIGHT = 14, 10
MARK = "ran-code-of-a-pickle"  # a file that a hostile pickle would make


@dataclass(frozen=True, kw_only=True)
class World:
    """Files, what mutates each of some of them, and what reads the whole; it raises what a user would see."""

    files: dict[str, bytes]
    mutations: dict[str, Mutation]
    read: Callable[[Path], object]

    def place(self, folder: Path) -> None:
        """Writes the valid world."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def mutated(self, rng: random.Random) -> tuple[str, bytes]:
        """A file's name and what to put there."""
        name = rng.choice(sorted(self.mutations))
        return name, self.mutations[name](rng, self.files[name])


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()
