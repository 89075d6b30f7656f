"""Training on fewer workers than asked for, and on a number of them that changes: every step is the same."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlfseg.pipeline.curve import read_curve
from tests.drills.test_cluster import started
from tests.drills.training import STEPS, Training

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]


@pytest.mark.usefixtures("clock")
def test_fewer_workers_than_asked_for_do_the_same_steps(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    """Of 8 logical CPUs two workers of 5 have no room: one does the work of both. Equal but for rounding."""
    training = Training(root, latents, tmp_path / "train", "--min_workers=1", "--cpus=5")
    training.finish()
    assert {row["workers"] for row in read_curve(training.out)} == {1}
    check_same_steps(training.out, undisturbed.out)


def check_same_steps(out: Path, undisturbed: Path) -> None:
    """Equal but for the order of sums, which grows from step to step."""
    for one, two in zip(read_curve(out), read_curve(undisturbed), strict=True):
        assert one["step"] == two["step"]
        for figure in ("loss", "lr", "grad_norm"):
            assert one[figure] == pytest.approx(two[figure], rel=2e-2), f"{figure} of step {one['step']}"


# The command, but that Ray looks for room every second, each process writes down what it learns, and two processes wait
# at step 5 until a node is lost, one process at step 9 until another has come: so much for a test that needs no luck
WATCHED = """
import json, os, sys, time
from functools import partial
from rlfseg import cli
from rlfseg.pipeline import train

def work(loop_config):
    import ray
    from rlfseg.pipeline import loop
    from rlfseg.training import TrainState
    out, step = loop_config["job"].out, TrainState.step
    world = ray.train.get_context().get_world_size()

    def watched(state, *batches, weight):
        while state.step_number == (9 if world == 1 else 5 if not (out / "lost").exists() else -1):
            time.sleep(0.05)
        figures = step(state, *batches, weight=weight)
        row = {"step": state.step_number, "epoch": state.epoch, "ids": [i for b in batches for i in b.ids]}
        with (out / f"seen-{os.getpid()}.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + chr(10))
        return figures

    TrainState.step = watched
    return loop.work(loop_config)

train.work, train.ScalingConfig = work, partial(train.ScalingConfig, elastic_resize_monitor_interval_s=1.0)
sys.exit(cli.main("train", sys.argv[1:]))
"""


@pytest.mark.usefixtures("clock")
def test_a_node_is_lost_and_another_comes_and_each_step_is_the_same(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    """Two workers, then one, then two: a step's phrases are those of a run of two, and each is seen once an epoch."""
    training = Training(root, latents, tmp_path / "train", "--min_workers=1", "--cpus=5")
    line = [sys.executable, "-c", WATCHED, *training.line[3:]]
    with started(tmp_path, root, nodes=2) as cluster, (tmp_path / "errors").open("w") as errors:
        with subprocess.Popen(line, env=cluster.env, cwd=tmp_path, stdout=errors, stderr=errors) as driver:

            def wait_for(step: int, workers: int) -> None:
                while not any((r["step"], r["workers"]) == (step, workers) for r in read_curve(training.out)):
                    assert driver.poll() is None, (tmp_path / "errors").read_text()[-3000:]
                    time.sleep(0.05)

            wait_for(5, 2)
            cluster.lose()
            (training.out / "lost").touch()
            wait_for(9, 1)
            cluster.add()
        assert driver.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    worlds = [int(row["workers"]) for row in read_curve(training.out)]
    assert worlds[:3] == [2, 2, 2]  # before the checkpoint that one worker went on from
    assert 1 in worlds
    assert worlds[9:] == [2] * (STEPS - 9)
    check_same_steps(training.out, undisturbed.out)

    seen = dict[tuple[int, int], set[str]]()
    for part in training.out.glob("seen-*.jsonl"):
        for row in map(json.loads, part.read_text().splitlines()):
            seen.setdefault((row["epoch"], row["step"]), set()).update(row["ids"])
    assert sorted(step for _, step in seen) == list(range(1, STEPS + 1))
    assert {len(ids) for ids in seen.values()} == {8}  # also where a step was taken twice: the same phrases
    for epoch in {epoch for epoch, _ in seen}:
        steps = [ids for (e, _), ids in seen.items() if e == epoch]
        assert len(set.union(*steps)) == 8 * len(steps)
    first = load_file(training.out / "adapter" / "adapter_model.safetensors")
    second = load_file(undisturbed.out / "adapter" / "adapter_model.safetensors")
    far = sum(float(((first[k] - second[k]) ** 2).sum()) for k in second)
    assert far < 1e-3 * sum(float((w**2).sum()) for w in second.values())
