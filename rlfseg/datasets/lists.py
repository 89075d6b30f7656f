"""Annotation files, read once in the driver: whole or refused, and every fault named with its place."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlfseg.errors import ConfigError, DataError

T = TypeVar("T")
KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a mark; DataError if it can't be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error})") from error


def read_json(path: Path, keys: tuple[str, ...] = ()) -> Any:
    """The tree of a JSON file.

    Args:
        path: The file.
        keys: Lists that it must have at the top.

    Returns:
        The tree.

    Raises:
        DataError: Missing, cut short, not JSON, nested beyond reason, or without those lists.
    """
    try:
        tree = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not whole JSON ({error}); was it cut short? Fetch it again") from error
    if keys and not (isinstance(tree, dict) and all(isinstance(tree.get(key), list) for key in keys)):
        raise DataError(f"{path}: must be an object with the lists {', '.join(keys)}")
    return tree


def read_items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that is one JSON list, one at a time: a tree of a million polygons needs gigabytes.

    Args:
        path: The file.

    Yields:
        Its place, such as `[7]`, and the object.

    Raises:
        DataError: Missing, not such a list, or cut short: names the last whole object.
    """
    text, decoder = read_text(path), json.JSONDecoder()
    at, number = _skip_blanks(text, 0), 0
    if text[at : at + 1] != "[":
        raise DataError(f"{path}: must be a JSON list of objects, it begins with {text[at : at + 20]!a}")
    at = _skip_blanks(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: broken after {number:,} whole items ({error}); was it cut short?") from error
        yield f"[{number}]", as_object(item, f"[{number}]", path)
        number, at = number + 1, _skip_blanks(text, at)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            raise DataError(f"{path}: ends after {number:,} whole items without a closing ]; was it cut short?")
    if text[_skip_blanks(text, at + 1) :]:
        raise DataError(f"{path}: goes on behind its closing ], after {number:,} items")


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r") and at < len(text):
        at += 1
    return at


def as_object(value: Any, where: str, source: Path) -> dict[str, Any]:
    """`value` itself, if it is a JSON object; else DataError with its place."""
    if not isinstance(value, dict):
        raise DataError(f"{source}, {where}: must be an object, this is {brief(value)}")
    return value


def brief(value: Any) -> str:
    """A value for a message, in ASCII: short, however large, deep or entangled it is."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()


def storable(text: str) -> str:
    """A text as Arrow can hold it: lone surrogates as JSON escapes them."""
    return text.encode(errors="backslashreplace").decode()


def field(row: dict[str, Any], key: str, kind: type[T], where: str, source: Path) -> T:
    """A value of an object, if it is of the right kind.

    Args:
        row: The object.
        key: The value's name.
        kind: dict, list, str or int.
        where: The object's place, for the message.
        source: Its file, for the message.

    Returns:
        The value.

    Raises:
        DataError: Absent or of another kind.
    """
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{source}, {where}: {key!r} must be {KINDS[kind]}, this is {brief(value)}")
    return value


def size_of(row: dict[str, Any], where: str, source: Path) -> tuple[int, int]:
    """(height, width) in pixels as an object declares them; DataError where it doesn't."""
    return field(row, "height", int, where, source), field(row, "width", int, where, source)


def pictures_folder(given: str | None, *usual: Path) -> Path:
    """The folder of the pictures: as given, else the first of the usual ones that exists.

    Args:
        given: From the settings.
        *usual: Where the data set's own layout has it.

    Returns:
        The folder, absolute.

    Raises:
        ConfigError: None of them is a folder.
    """
    tried = [Path(given).absolute()] if given is not None else list(usual)
    for folder in tried:
        if folder.is_dir():
            return folder
    raise ConfigError(f"images: {' and '.join(map(str, tried))} is no folder; give the pictures' own, --images FOLDER")
