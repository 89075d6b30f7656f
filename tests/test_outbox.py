"""The other side is a list and a switch: `Side` takes what comes, or is away, or refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlfseg import outbox
from rlfseg.outbox import PAUSE, Away, Number, Outbox, Refused


class Side:
    def __init__(self) -> None:
        self.away = False
        self.refuses: set[str] = set()
        self.got: list[Number] = []
        self.tags: dict[str, str] = {}
        self.tries = 0
        self.time = 0.0

    def deliver(self, numbers: Sequence[Number], tags: Mapping[str, str]) -> None:
        self.tries += 1
        if self.away:
            raise Away("no route to host")
        if any(n.key in self.refuses for n in numbers):
            raise Refused("bad name")
        self.got += numbers
        self.tags |= tags


def number(step: int, key: str = "loss") -> Number:
    return Number(key, step / 10, step, 1000 + step)


@pytest.fixture
def side() -> Side:
    return Side()


@pytest.fixture
def box(side: Side, tmp_path: Path) -> Outbox:
    return Outbox(side.deliver, unsent=tmp_path / "deep" / "unsent.jsonl", clock=lambda: side.time)


def test_a_full_disk_loses_numbers_and_nothing_else(
    side: Side, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side.away = True
    (tmp_path / "unsent").symlink_to("/dev/full")
    box = Outbox(side.deliver, unsent=tmp_path / "unsent", clock=lambda: side.time)
    box.add([number(1)])
    box.close()
    assert "1 numbers were not recorded and are lost" in caplog.text
    assert "No space left on device" in caplog.text


def test_kept_in_an_outage_and_sent_in_order_when_it_is_over(side: Side, box: Outbox, tmp_path: Path) -> None:
    for step in range(10):
        side.away = 3 <= step < 7
        side.time += PAUSE
        box.add([number(step)], {"latest": str(step)})
    box.close()
    assert [n.step for n in side.got] == list(range(10))
    assert side.tags == {"latest": "9"}
    assert not (tmp_path / "deep").exists()


@pytest.mark.fault("mlflow-07")
def test_a_server_that_is_silent_for_a_minute_costs_a_twentieth_of_the_time(side: Side, box: Outbox) -> None:
    deliver = side.deliver

    def slow(*what: Any) -> None:
        side.time += 60.0
        deliver(*what)

    side.away, box._deliver = True, slow
    for step in range(1000):
        side.time += 10.0
        box.add([number(step)])
    assert side.tries == pytest.approx(10_000 / 1200, abs=1)


def test_an_outage_costs_one_try_a_pause_and_one_warning(
    side: Side, box: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    side.away = True
    for step in range(100):
        box.add([number(step)])
    assert side.tries == 1
    side.time = PAUSE
    box.add([number(100)])
    assert side.tries == 2
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no route to host" in caplog.text


def test_what_never_arrived_is_in_the_file(side: Side, box: Outbox, tmp_path: Path) -> None:
    box.add([number(1)])
    side.away = True
    box.add([number(2), number(3)])
    box.close()
    lines = (tmp_path / "deep" / "unsent.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"key": "loss", "value": 0.2, "step": 2, "time": 1002},
        {"key": "loss", "value": 0.3, "step": 3, "time": 1003},
    ]


def test_the_end_tries_again_at_once(side: Side, box: Outbox) -> None:
    side.away = True
    box.add([number(1)])
    side.away = False
    box.close()
    assert [n.step for n in side.got] == [1]


def test_refused_numbers_do_not_block_the_rest(side: Side, box: Outbox, tmp_path: Path) -> None:
    side.refuses = {"bad"}
    box.add([number(1, "bad")])
    box.add([number(2)])
    box.close()
    assert [n.step for n in side.got] == [2]
    assert json.loads((tmp_path / "deep" / "unsent.jsonl").read_text())["key"] == "bad"


def test_calls_keep_their_order_and_a_refused_one_is_named(
    side: Side, box: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    def upload(name: str) -> None:
        if side.away:
            raise Away("down")
        if name == "b":
            raise Refused("gone")
        done.append(name)

    side.away = True
    for name in "abc":
        box.call(f"file {name}", lambda name=name: upload(name))  # type: ignore[misc]
    side.away = False
    box.close("status", lambda: done.append("status"))
    assert done == ["status", "a", "c"]
    assert "file b" in caplog.text


def test_memory_is_bounded_and_the_loss_is_told(
    side: Side, box: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "MOST_KEPT", 5)
    side.away = True
    for step in range(8):
        box.add([number(step)])
    side.away = False
    box.close()
    assert [n.step for n in side.got] == [3, 4, 5, 6, 7]
    assert "3 numbers were dropped" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
def test_nothing_is_lost_doubled_or_reordered(events: list[tuple[int, bool]]) -> None:
    side, sent = Side(), 0
    box = Outbox(side.deliver, unsent=Path("never"), clock=lambda: side.time)
    for count, side.away in events:
        side.time += PAUSE
        box.add([number(sent + i) for i in range(count)])
        sent += count
    side.away = False
    box.close()
    assert [n.step for n in side.got] == list(range(sent))
