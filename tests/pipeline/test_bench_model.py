"""The bench's opponents do the same work as we do, and its clocks and scales are right."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from rlfseg import cli, flow
from rlfseg.config import ASSETS, BenchConfig
from rlfseg.errors import DataError
from rlfseg.pipeline import baselines, bench_data, bench_model
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.timing import peak_memory, race

BASE, SIDE = ASSETS / "base", 64


@pytest.fixture(scope="module")
def script() -> baselines.LoraScript:
    pipeline = baselines.Pipeline(BASE, SIDE, "cpu")
    return baselines.LoraScript(pipeline, rank=4, targets=("to_q", "to_v"))


def test_ways_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]
    lasting = {"a": iter([99.0, 1.0, 2.0, 30.0]), "b": iter([99.0, 5.0, 4.0, 6.0])}

    def way(name: str) -> None:
        order.append(name)
        clock[0] += next(lasting[name])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert race(lambda: way("a"), lambda: way("b"), rounds=3) == [2.0, 5.0]
    assert order == ["a", "b"] * 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    def way() -> None:
        np.ones(300_000_000, np.uint8).sum()

    peaks = [peak_memory(way), peak_memory(lambda: None), peak_memory(way)]
    assert peaks[1] < 50e6
    assert all(290e6 < peak < 400e6 for peak in (peaks[0], peaks[2]))


def test_a_suite_that_fails_takes_none_of_the_others_rows_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: BenchConfig) -> list[Row]:
        raise DataError("this one fails")

    row = Row(name="a", ours=2.0, baseline=6.0, ratio=3.0, goal=4.0, unit="s")
    monkeypatch.setattr(bench_data, "measure", lambda config: [row])
    monkeypatch.setattr(bench_model, "measure", fails)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert cli.main("bench", ["data", "model", f"--tracking.uri={uri}", f"--out={tmp_path / 'out'}"]) == 1
    told = capsys.readouterr()
    assert "this one fails" in told.err
    assert "missed" in told.out
    assert [r["name"] for r in json.loads((tmp_path / "out" / "bench.json").read_text())] == ["a"]
    [run] = mlflow.MlflowClient(uri).search_runs(["1"])
    assert (run.data.metrics, run.info.status) == ({"bench/data/a": 3.0}, "FAILED")


def test_the_table_the_list_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        bench_data: [Row(name="a", ours=2.0, baseline=6.0, ratio=3.0, goal=4.0, unit="s")],
        bench_model: [Row(name="b", ours=2.0, baseline=6.0, ratio=3.0, goal=1.0, unit="s")],
    }
    for suite, own in rows.items():
        monkeypatch.setattr(suite, "measure", lambda config, own=own: own)
    off = ["--tracking.enabled=false", f"--out={tmp_path}"]
    assert cli.main("bench", ["data", "model", *off]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["name"], r["verdict"]) for r in found] == [("a", "missed"), ("b", "reached")]
    assert {"name", "ours", "baseline", "ratio", "goal", "unit"} < found[0].keys()
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["settings"]["rounds"] == 3
    assert "diffusers" in machine["opponents"]
    assert cli.main("bench", ["speed", *off]) == 2


def test_rows_without_an_opponent_have_no_verdict() -> None:
    row = Row(name="x", ours=3.0, baseline=None, ratio=None, goal=None, unit="s")
    assert (row.verdict, row.figure) == ("", 3.0)


def test_the_script_has_our_loss(script: baselines.LoraScript) -> None:
    z1, z0, z0_refined = torch.randn(3, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([0.3, 1.0]), script.pipeline.text(["red ring", "star"])

    def v(z: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = script.unet(z, 1000 * t, encoder_hidden_states=text).sample
        return out

    with torch.no_grad():
        torch.testing.assert_close(script.loss(z1, z0, t, text), flow.flow_loss(v, z1, z0, t, text))
        chosen, _ = flow.selection_loss(v, z1, z0, z0_refined, t, text, has_refined=torch.ones(2, dtype=torch.bool))
    told = script.step_of_two_losses(z1, z0, z0_refined, t, text)
    assert told == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert all(w.grad is None or not w.grad.any() for w in script.weights)  # zeroed behind each step


@pytest.mark.slow
def test_every_row_of_the_quick_suite(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The suite itself checks that masks, scores and choices are the same before it measures."""
    out = tmp_path_factory.mktemp("bench")
    rows = list(bench_model.measure(BenchConfig(what=("model",), quick=True, rounds=1, out=str(out))))
    assert len(rows) == 8
    assert all(row.ratio and row.ratio > 0 for row in rows)
    assert list(out.iterdir()) == []
