"""Pictures to leave out of a set, named by its own ids, by their files or by their ids in COCO."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlfseg.datasets.coco import id_in_name
from rlfseg.datasets.lists import read_text
from rlfseg.datasets.records import Record
from rlfseg.errors import ConfigError

# A number may be the id of one picture and COCO's of another, so a list is read as of one kind.
KINDS: dict[str, Callable[[Record], str | None]] = {
    "ids": lambda record: record.id,
    "file names": lambda record: os.path.basename(record.image),
    "COCO ids": lambda record: record.coco_id,
}


class Exclusion(NamedTuple):
    """Ids of the pictures to leave out, and how many of the entries that were given name some; empty: none was."""

    ids: frozenset[str]
    note: str


def exclusion(records: Sequence[Record], given: str | None) -> Exclusion:
    """Finds the pictures that `exclude_ids` names, by whichever kind of name most of its entries are.

    Args:
        records: The set, one at least.
        given: A text file with an entry a line, or entries with commas between; an entry is an id, a file's name or a
            COCO id. None: nothing is to be excluded.

    Returns:
        Their ids, and a line for the user.

    Raises:
        ConfigError: An entry on the command line names no picture: a slip, or a file that isn't there.
        DataError: The file isn't UTF-8.
    """
    if given is None or not records:
        return Exclusion(frozenset(), "")
    is_file = os.path.isfile(given)  # Path's own raises where a text is too long for a name
    entries = read_text(Path(given)).splitlines() if is_file else given.split(",")
    wanted = {entry.strip() for entry in entries if entry.strip()}
    of_kinds = {kind: _named(kind, records, wanted) for kind in KINDS}
    kind = max(of_kinds, key=lambda kind: len(of_kinds[kind]))
    named = of_kinds[kind]
    if not is_file and (unknown := wanted - set(named)):
        raise ConfigError(f"exclude_ids: {min(unknown)!a:.80} is neither a file nor the id of a picture in this set")
    note = f"exclude_ids: {len(named)} of {len(wanted)} {kind} are in this set"
    if not named:  # no error: one list may serve several sets
        note += f"; NOTHING is excluded: ids here are like {records[0].id!a:.80}"
        note += f", those given like {min(wanted)!a:.80}" if wanted else ", the list is empty"
    return Exclusion(frozenset().union(*named.values()), note)


def _named(kind: str, records: Sequence[Record], wanted: set[str]) -> dict[str, set[str]]:
    """Entry -> ids of the pictures that it names, if entries are of this kind."""
    ids: dict[str | None, set[str]] = {}
    for record in records:
        ids.setdefault(KINDS[kind](record), set()).add(record.id)
    names = {entry: (id_in_name(entry) or entry) if kind == "COCO ids" else entry for entry in wanted}
    return {entry: ids[name] for entry, name in names.items() if name in ids}
