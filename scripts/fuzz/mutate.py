"""Mutations decided by a random generator alone: of bytes, trees, and PNG, whose checksums would hide the rest."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from typing import Any

EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    1 << 63,
    (1 << 64) - 1,
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "a/b", "../../x", "/etc/passwd", "\ud800", "é", "🐕", "x" * 5000, "1e9", "nan", "7"),
    *([], {}, [[]], [{}], [None], {"": None}, [[[[[[[[]]]]]]]], [0] * 3000, ["7"], {"size": [3, 3], "counts": "04"}),
)


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some of: flipped bits, bytes and numbers at the edges of their types, parts cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 16, 64, 1000))
        what = rng.randrange(8)
        if what == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif what == 1 and changed:
            changed[at % len(changed)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
        elif what in (2, 3):
            width, edge = rng.choice((2, 4, 8)), rng.choice(EDGES)
            changed[at : at + width] = (edge % (1 << 8 * width)).to_bytes(width, rng.choice(("big", "little")))
        elif what == 4:
            del changed[at : at + length]
        elif what == 5:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
        elif what == 6:
            changed[at:at] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def of_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of dicts and lists in which some values are odd, missing, doubled or those of others."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(tree)
        if not places:
            return rng.choice(ODD)
        owner, key = rng.choice(places)
        what = rng.randrange(6)
        if what == 0:
            del owner[key]
        elif what == 1 and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif what == 2:
            other, place = rng.choice(places)
            owner[key] = copy.deepcopy(other[place])
        else:
            owner[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value in a tree, as its owner and its key there."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    inner = [place for key in keys for place in _places(tree[key])]
    return [(tree, key) for key in keys] + inner


def of_json(rng: random.Random, data: bytes) -> bytes:
    """JSON with an odd tree, or damaged as text, or nested without end."""
    what = rng.random()
    if what < 0.7:
        return json.dumps(of_tree(rng, json.loads(data)), ensure_ascii=rng.random() < 0.5).encode(
            errors="surrogatepass"
        )
    if what < 0.72:
        return rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"1" * 100_000, b""))
    return of_bytes(rng, data)


def of_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines of JSON, one of them odd."""
    lines = data.splitlines(keepends=True)
    n = rng.randrange(len(lines))
    lines[n] = of_json(rng, lines[n]) + b"\n"
    return b"".join(lines)


def of_png(rng: random.Random, data: bytes) -> bytes:
    """A PNG with odd bytes; mostly with checksums that are right again, so that a decoder goes on."""
    changed = of_bytes(rng, data)
    if rng.random() < 0.3:
        return changed
    out, at = changed[:8], 8
    while at + 12 <= len(changed):
        (length,) = struct.unpack_from(">I", changed, at)
        body = changed[at + 4 : at + 8 + length]
        if at + 12 + length > len(changed):
            break
        out += struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + changed[at:]
