"""Inspect: what is in files of samples, by anyone: read in a child process first, then counted, then shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlfseg import draw, hdf5
from rlfseg.audit import Contents, contact_sheet
from rlfseg.config import InspectConfig
from rlfseg.errors import ConfigError
from rlfseg.hdf5 import Sample, Seen
from rlfseg.pipeline.folders import write_json
from rlfseg.pipeline.stages import Summary


def run(config: InspectConfig) -> Summary:
    """Prints a table and writes it as JSON, with a contact sheet.

    Args:
        config: Settings of the command.

    Returns:
        Counts, the problems as refusals, and seconds.

    Raises:
        ConfigError: No HDF5 file is named.
    """
    start, out = time.monotonic(), Path(config.out).absolute()
    files = shards_of(config.files)
    contents, looked_at = Contents(), list(hdf5.preflight(files))
    for found in looked_at:
        contents.add(found)
    counts = {"files": len(files), **contents.as_dict()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "contents.json", counts)
    # What crashed the process that read it isn't opened in this one.
    dead = {problem.file for problem in contents.problems if problem.sample is None}
    good = [found for found in looked_at if isinstance(found, Seen) and found.file not in dead]
    step = max(1, -(-len(good) // max(1, config.pictures)))
    if shown := [_sample(found) for found in good[::step][: config.pictures]]:
        draw.save(out / "contact_sheet.png", contact_sheet(shown))
    print("\n".join(_lines({k: v for k, v in counts.items() if k != "problems"})))
    return Summary(
        name="inspect",
        out=str(out),
        rows_in=len(looked_at),
        rows_out=len(looked_at) - len(contents.problems),
        refused={_name(p.file, p.sample): p.reason for p in contents.problems},
        seconds=time.monotonic() - start,
    )


def shards_of(files: Sequence[str]) -> list[Path]:
    """The HDF5 files among what a user names.

    Args:
        files: Files, or folders that hold HDF5 files.

    Returns:
        Their paths, each as it was named.

    Raises:
        ConfigError: A folder without any.
    """
    paths: list[Path] = []
    for path in map(Path, files):
        inside = hdf5.list_shards(path) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"files: {path} holds no HDF5 file (.h5, .hdf5, .hdf)")
        paths += inside
    return paths


def _sample(found: Seen) -> Sample:
    return hdf5.read_sample(found.file, found.id)


def _name(file: str, sample: str | None) -> str:
    return file if sample is None else f"{file} [{sample}]"


def _lines(tree: dict[str, Any], indent: str = "  ") -> list[str]:
    """Nested counts as lines; texts from files by `repr`, so that none of them can move the terminal's cursor."""
    lines = []
    for key, value in tree.items():
        name = key if key.isprintable() else repr(key)
        if isinstance(value, dict) and set(value) == {"min", "median", "max"}:
            lines.append(f"{indent}{name}: {value['min']} to {value['max']}, median {value['median']}")
        elif isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")] if value else []
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
