"""Who trains on what, when: `ingest.plan` against its own promises, counted in the open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlfseg.pipeline.ingest import GROUP, WINDOW, plan

COUNTS = np.array([(n + n // 7) % 4 for n in range(77)])
EVERY = {(n, k) for n, count in enumerate(COUNTS) for k in range(count)}
Phrases = list[tuple[int, int]]


def ranks(world: int, lanes: int, batch: int, epoch: int = 0, start: int = 0) -> list[Phrases]:
    return [
        [
            (int(n), int(k))
            for n, k in plan(COUNTS, seed=42, epoch=epoch, lanes=lanes, batch=batch, rank=r, world=world, start=start)
        ]
        for r in range(world)
    ]


@pytest.mark.fault("dist-02")
@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 8), (2, 3), (3, 5), (8, 2)])
def test_every_phrase_once_but_for_a_short_tail(world: int, batch: int) -> None:
    seen = [phrase for own in ranks(world, world, batch) for phrase in own]
    assert len(seen) == len(set(seen))
    assert set(seen) <= EVERY
    assert len(EVERY) - len(seen) < world * batch


@pytest.mark.fault("dist-06")
@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 5), (4, 7)])
def test_equal_steps_on_every_rank_whatever_the_files(world: int, batch: int) -> None:
    assert {len(own) for own in ranks(world, world, batch)} == {len(EVERY) // (world * batch) * batch}


@given(lanes=st.integers(1, 9), world=st.integers(1, 9), batch=st.integers(1, 5), start=st.integers(0, 3))
def test_a_step_is_the_same_phrases_however_many_processes_are_left(
    lanes: int, world: int, batch: int, start: int
) -> None:
    world = min(world, lanes)
    alone = ranks(1, lanes, batch)[0]
    size = lanes * batch
    steps = [set(alone[n : n + size]) for n in range(start * size, len(alone), size)]
    shares = [len(range(r, lanes, world)) * batch for r in range(world)]
    for number, expected in enumerate(steps):
        parts = [
            own[number * share : (number + 1) * share]
            for own, share in zip(ranks(world, lanes, batch, start=start), shares, strict=True)
        ]
        together = [phrase for part in parts for phrase in part]
        assert len(together) == size
        assert set(together) == expected


def test_epochs_differ_and_the_same_epoch_does_not() -> None:
    assert ranks(2, 2, 4, epoch=0) == ranks(2, 2, 4, epoch=0)
    assert ranks(2, 2, 4, epoch=0) != ranks(2, 2, 4, epoch=1)


def test_resume_goes_on_at_the_very_step() -> None:
    whole, rest = ranks(2, 2, 4), ranks(2, 2, 4, start=3)
    assert rest == [own[3 * 4 :] for own in whole]


def test_phrases_are_shuffled_well_and_neighbours_come_from_few_groups() -> None:
    counts = np.full(40 * GROUP, 3)
    order = plan(counts, seed=1, epoch=0, lanes=1, batch=1, rank=0, world=1)
    window = order[: WINDOW * GROUP * 3, 0] // GROUP
    assert len(set(window.tolist())) == WINDOW  # so a part of an epoch needs few files
    samples = order[: WINDOW * GROUP * 3, 0].astype(float)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.05
    assert sorted(map(tuple, order.tolist())) == [(n, k) for n in range(len(counts)) for k in range(3)]
