"""Deliveries that wait while the other side is away: what tracking knows of outages and names, without MLflow."""

from __future__ import annotations

import dataclasses
import json
import logging
import posixpath
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

PAUSE = 30.0  # seconds between two tries while the other side is away
SHARE = 20  # of that time, in which a try may take one: a server that doesn't even refuse costs a minute each
NUMBERS_A_CALL = 1000
LONGEST_NAME, LONGEST_PARAM = 250, 1000  # what MLflow takes, and of its 6,000 what people read
CUT = "cut here, whole in config.yaml]"
MOST_KEPT = 200_000  # numbers in memory during an outage: some 60 MB

logger = logging.getLogger(__name__)


class Away(Exception):
    """The other side gave no usable answer; the same may work later."""


class Refused(Exception):
    """The other side will never take this."""


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """One value of a metric at a step; `key` is as `metric_name` makes it, `time` in milliseconds since 1970."""

    key: str
    value: float
    step: int
    time: int


def metric_name(name: str) -> str:
    """The name under which MLflow keeps a metric or parameter, the same in every process; a kept name stays as it is.

    `p@0.5` becomes `p_at_0.5`, and `IoU[person]` becomes `IoU/person`, which MLflow's pages group. Any other character
    that MLflow refuses becomes `_`, and then the name ends in six digits of its hash: two names never become one.
    """
    name = unicodedata.normalize("NFC", name)
    plain = re.sub(r"\[([^\[\]/]+)\]$", r"/\1", name.replace("@", "_at_"))
    clean = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", plain)).lstrip("/.") or "_"
    if clean == plain and len(clean) <= LONGEST_NAME:
        return clean
    return f"{clean[: LONGEST_NAME - 7]}-{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def parameter(value: Any) -> str:
    """The text by which MLflow keeps a setting: what is longer than 1,000 characters ends in how long it was."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    tail = f" ... [{len(text)} characters, {CUT}"
    return text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - len(tail)] + tail


class Outbox:
    """Numbers, tags and calls (uploads) on their way, kept while the other side is away.

    Sending never raises. The first failure is logged, then the end of the outage; between two tries lie 30 seconds, so
    that an outage costs little. Refused numbers are logged, kept for the file of unsent ones, and don't block the rest.

    Args:
        deliver: Sends some numbers and tags in one call; raises `Away` or `Refused`. Twice must do no harm.
        unsent: JSON-lines file for the numbers that are left at the end; written only if there are any.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        deliver: Callable[[Sequence[Number], Mapping[str, str]], None],
        *,
        unsent: Path,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._deliver, self._unsent, self._clock = deliver, unsent, clock
        self._numbers: list[Number] = []
        self._tags: dict[str, str] = {}
        self._calls: list[tuple[str, Callable[[], object]]] = []
        self._refused: list[Number] = []
        self._dropped = 0
        self._away = False
        self._next_try = 0.0

    def add(self, numbers: Sequence[Number] = (), tags: Mapping[str, str] | None = None) -> None:
        """Sends numbers and tags, now or later; of two values of a tag the later counts."""
        self._numbers += numbers
        self._tags |= tags or {}
        self._send()

    def call(self, what: str, call: Callable[[], object]) -> None:
        """Makes a call, now or later; `what` is its name in the log. It raises `Away` or `Refused`."""
        self._calls.append((what, call))
        self._send()

    def close(self, what: str = "", call: Callable[[], object] | None = None) -> None:
        """Tries once more, with one last call before those that wait, and reports what never arrived."""
        if call is not None:
            self._calls.insert(0, (what, call))  # an upload that always fails must not hold it up
        self._next_try = 0.0
        self._send()
        for name, _ in self._calls:
            logger.warning("not recorded: %s", name)
        left = self._refused + self._numbers
        if left:
            lines = "".join(json.dumps(dataclasses.asdict(n)) + "\n" for n in left)
            try:
                self._unsent.parent.mkdir(parents=True, exist_ok=True)
                self._unsent.write_text(lines, encoding="utf-8")
                logger.warning("%d numbers were not recorded, they are in %s", len(left), self._unsent)
            except OSError as error:  # a full disk is often why they were not sent either
                logger.warning("%d numbers were not recorded and are lost: %s: %s", len(left), self._unsent, error)
        if self._dropped:
            logger.warning("%d numbers were dropped in an outage", self._dropped)

    def _send(self) -> None:
        if (start := self._clock()) >= self._next_try:
            try:
                self._send_numbers()
                self._send_calls()
            except Away as error:
                self._note_outage(error, self._clock() - start)
            else:
                if self._away:
                    logger.warning("tracking is back; what was kept has been sent")
                self._away = False
        excess = max(0, len(self._numbers) - MOST_KEPT)
        self._dropped += excess
        del self._numbers[:excess]

    def _send_numbers(self) -> None:
        while self._numbers or self._tags:
            part, tags = self._numbers[:NUMBERS_A_CALL], dict(self._tags)
            try:
                self._deliver(part, tags)
            except Refused as error:
                logger.warning("refused: %d numbers and %d tags: %s", len(part), len(tags), error)
                self._refused += part
            del self._numbers[: len(part)]
            self._tags = {}

    def _send_calls(self) -> None:
        while self._calls:
            what, call = self._calls[0]
            try:
                call()
            except Refused as error:
                logger.warning("refused: %s: %s", what, error)
            del self._calls[0]

    def _note_outage(self, error: Away, took: float) -> None:
        if not self._away:
            logger.warning("tracking is away; everything is kept and sent later: %s", error)
        self._away = True
        self._next_try = self._clock() + max(PAUSE, SHARE * took)
