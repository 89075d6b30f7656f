"""Many processes over gloo: they equal one, start again to the same bits, and stop together."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlfseg.config import OptimizerConfig
from rlfseg.training import Batch
from tests.trained import drawn_batches, gradients, make


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return drawn_batches()


@pytest.fixture(scope="module")
def two_processes(batches: list[Batch], tmp_path_factory: pytest.TempPathFactory, root: Path) -> list[dict[str, Any]]:
    """What two processes over gloo came to; see tests/two_processes.py."""
    folder = tmp_path_factory.mktemp("two")
    together(root / "tests" / "two_processes.py", folder, batches, 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def together(script: Path, folder: Path, batches: list[Batch], count: int) -> None:
    torch.save([dataclasses.asdict(b) for b in batches], folder / "batches.pt")
    line = [sys.executable, str(script), str(folder)]
    ranks = [subprocess.Popen([*line, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(count)]
    errors = [process.communicate(timeout=500)[1] for process in ranks]
    assert [p.returncode for p in ranks] == [0] * count, errors


@pytest.mark.fault("dist-03")
@pytest.mark.fault("dist-04")
def test_two_processes_equal_one_on_the_same_global_batch(
    batches: list[Batch], two_processes: list[dict[str, Any]]
) -> None:
    """Gradient checkpointing is on in both processes; one has two of the three batches."""
    schedule = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine")
    one = make(total=6, optimizer=schedule)
    figures = [one.step(*batches[:3])]
    first_gradient = gradients(one).clone()
    figures.append(one.step(*batches[1:4]))
    for rank in two_processes:
        assert rank["lr"] == [f["lr"] for f in figures]
        assert rank["grad_norm"] == pytest.approx([f["grad_norm"] for f in figures], rel=1e-3)
        torch.testing.assert_close(rank["gradient"], first_gradient, rtol=1e-3, atol=1e-6)
    first, second = two_processes
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_without_sync_until_the_last_batch_each_step_talks_once(two_processes: list[dict[str, Any]]) -> None:
    assert [rank["reductions"] for rank in two_processes] == [2, 2]


def test_three_processes_that_start_again_come_to_the_same_bits(
    batches: list[Batch], tmp_path: Path, root: Path
) -> None:
    """Of two the sum is the same in any order, of three it isn't; see tests/three_processes.py."""
    together(root / "tests" / "three_processes.py", tmp_path, batches, 3)
    for rank in range(3):
        ends = torch.load(tmp_path / f"three-{rank}.pt")
        same = {how: all(map(torch.equal, *end)) for how, end in ends.items()}
        assert same == {True: True, False: False}, "False: had nothing been settled; if that is the same too, drop it"


@pytest.mark.fault("lora-05")
def test_an_adapter_trained_in_many_processes_loads_into_a_plain_unet(two_processes: list[dict[str, Any]]) -> None:
    keys = two_processes[0]["saved_keys"]
    assert keys
    assert not [k for k in keys if {"module", "_orig_mod"} & set(k.split("."))]
    assert two_processes[0]["zero_lora_b"] == 0


def test_one_bad_process_stops_the_step_in_all(two_processes: list[dict[str, Any]]) -> None:
    assert [rank["skipped"] for rank in two_processes] == [[0.0, 0.0, 1.0]] * 2
