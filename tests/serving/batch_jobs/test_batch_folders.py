"""Records and folders of batches that are not what they should be, and the room that they take."""

from __future__ import annotations

import fcntl
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stamina

from rlfseg.config import BatchesConfig, LimitsConfig, ServeConfig, WorkersConfig
from serve.batches import Batches
from serve.catalog import Catalog
from serve.front import _resume
from serve.refusal import Refusal
from tests.serving.jobs import HAVE, FakeRay, asked, batches

# --- records and folders that are not what they should be ----------------------------------------------------------


def test_what_was_refused_is_never_started(config: ServeConfig, jobs: FakeRay) -> None:
    service, jobs.refused = batches(config, jobs), ("",)
    with pytest.raises(Refusal, match="did not take"):
        service.create(asked())
    jobs.refused = ()
    service.resume()
    assert (service.list(), jobs.jobs, list(service.out.glob("*"))) == ([], {}, [service.out / ".lock"])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"model": 1}', "[" * 100_000, "\xff"])
def test_a_damaged_record_harms_no_other(config: ServeConfig, jobs: FakeRay, text: str) -> None:
    service = batches(config, jobs)
    bad, good = service.create(asked()), service.create(asked())
    (service.out / bad.id / "batch.json").write_bytes(text.encode("latin-1"))
    jobs.jobs.clear()
    service.resume()
    assert service.list() == [good]
    assert list(jobs.jobs) == [f"{good.id}-2"]
    assert len(service.list()) < len([service.create(asked()), *service.list()])
    for ask in (service.get, service.cancel):
        with pytest.raises(Refusal, match="damaged"):
            ask(bad.id)


def test_damaged_results_harm_no_other(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    bad, good = service.create(asked()), service.create(asked())
    Path(bad.results).mkdir()
    (Path(bad.results) / "_SUCCESS.json").write_text("{")
    assert service.list() == [good]


def test_a_batch_that_ray_does_not_take_again_keeps_no_other_from_going_on(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs, {"CPU": 20.0})
    first, second, third = (service.create(asked()).id for _ in range(3))
    jobs.jobs.clear()
    jobs.refused = (second,)
    with pytest.raises(Refusal, match="1 of the batches"):
        service.resume()
    assert set(jobs.jobs) == {f"{first}-2", f"{third}-2"}
    assert {batch.state for batch in service.list()} == {"queued"}
    jobs.refused = ()
    service.resume()
    assert f"{second}-2" in jobs.jobs


def test_the_front_tries_until_all_batches_go_on(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    jobs.jobs.clear()
    jobs.without_agent = 20  # more often than one submission is repeated
    with stamina.set_testing(True, attempts=9):
        _resume(service)
    assert list(jobs.jobs) == [f"{batch.id}-2"]


# --- room ----------------------------------------------------------------------------------------------------------


def test_two_fronts_do_not_both_take_the_last_cpu(config: ServeConfig, jobs: FakeRay) -> None:
    each, refused = 6, []
    have = {"CPU": 2.0 + each}
    other = batches(config, jobs, have)

    def create() -> None:
        try:
            other.create(asked())
        except Refusal as refusal:
            refused.append(refusal.kind)

    thread = threading.Thread(target=create)

    def counted() -> dict[str, float]:  # while the first one counts, another front is asked too
        thread.start()
        thread.join(0.5)  # it has to wait, or else is done by then
        return have

    first = Batches(config, Catalog(config.models), lambda: jobs, counted).create(asked())
    thread.join()
    assert (list(jobs.jobs), refused) == ([f"{first.id}-1"], ["short"])


def test_who_waits_too_long_for_another_front_is_told_to_ask_again(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(replace(config, limits=LimitsConfig(deadline_s=0.1)), jobs)
    with (service.out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Refusal, match="ask again") as refusal:
            service.create(asked())
    assert refusal.value.status == 503
    assert service.create(asked()).state == "queued"


def test_a_batch_that_would_wait_for_ever_is_refused_with_the_sum(config: ServeConfig, jobs: FakeRay) -> None:
    each = 1 + 2 + 3  # a worker, a loader before and after it, and what Ray Data itself takes
    service = batches(config, jobs, {"CPU": 2 + 2 * each})  # room for the service's two replicas and two batches
    first = service.create(asked())
    service.create(asked())
    with pytest.raises(
        Refusal, match=rf"takes {each} CPUs; this Ray has 14, of which .* 2 and 2 running .* 12"
    ) as refusal:
        service.create(asked())
    assert refusal.value.status == 503
    service.cancel(first.id)
    service.create(asked())
    assert len(jobs.jobs) == 3


def test_gpus_are_counted_too(config: ServeConfig, jobs: FakeRay) -> None:
    with_gpu = BatchesConfig(out=config.batches.out, roots=config.batches.roots, run=WorkersConfig(gpus=1))
    short = ServeConfig(gpus=0.5, batches=with_gpu)
    with pytest.raises(Refusal, match=r"takes 1 GPUs; this Ray has 1, of which the service holds 0\.5"):
        batches(short, jobs, HAVE | {"GPU": 1.0}).create(asked())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"steps": 51}, "51 is more than 50"), ({"steps": 2, "rescale": "aos"}, "needs a single step")],
)
def test_steps_are_limited_as_those_of_requests(
    config: ServeConfig, jobs: FakeRay, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        batches(config, jobs).create(asked(**fields))
    assert (refusal.value.status, jobs.jobs) == (422, {})


def test_an_unknown_model_is_refused(config: ServeConfig, jobs: FakeRay) -> None:
    with pytest.raises(Refusal, match="tiny") as refusal:
        batches(config, jobs).create(asked(model="/etc"))
    assert refusal.value.status == 404
