"""Who trains on what, when: `ingest.plan` against its own promises, counted in the open."""

from __future__ import annotations

import pytest

from rlfseg.pipeline.ingest import Latents, plan

LATENTS = Latents(
    files=tuple(f"{n}.parquet" for n in range(11)),
    phrases=tuple(tuple((n + row) % 4 for row in range(7)) for n in range(11)),
    shape=(8, 16, 16),
)
EVERY = {(f, row, k) for f, rows in enumerate(LATENTS.phrases) for row, count in enumerate(rows) for k in range(count)}


def ranks(world: int, batch: int, epoch: int = 0, start: int = 0) -> list[list[tuple[int, int, int]]]:
    return [plan(LATENTS, seed=42, epoch=epoch, rank=r, world=world, batch=batch, start=start) for r in range(world)]


@pytest.mark.fault("dist-02")
@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 8), (2, 3), (3, 5), (8, 2)])
def test_every_phrase_once_but_for_a_short_tail(world: int, batch: int) -> None:
    seen = [sample for own in ranks(world, batch) for sample in own]
    assert len(seen) == len(set(seen))
    assert set(seen) <= EVERY
    assert len(EVERY) - len(seen) < world * batch


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 5), (4, 7)])
def test_equal_steps_on_every_rank_whatever_the_blocks(world: int, batch: int) -> None:
    assert {len(own) for own in ranks(world, batch)} == {LATENTS.steps(world, batch) * batch}


def test_epochs_differ_and_the_same_epoch_does_not() -> None:
    assert ranks(2, 4, epoch=0) == ranks(2, 4, epoch=0)
    assert ranks(2, 4, epoch=0) != ranks(2, 4, epoch=1)


def test_resume_goes_on_at_the_very_step() -> None:
    whole, rest = ranks(2, 4), ranks(2, 4, start=3)
    assert rest == [own[3 * 4 :] for own in whole]
