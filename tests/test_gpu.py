"""On a GPU (`pytest -m gpu tests/test_gpu.py`): CUDA's arithmetic and graphs, and every stage with GPU actors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rlfseg import adapter, cli
from rlfseg.config import FastConfig, SamplingConfig, SpeedConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.images import rle_decode
from rlfseg.metrics import iou
from rlfseg.segmenter import Segmenter
from tests.trained import TINY, drawn_batches, gradients, make

pytestmark = pytest.mark.gpu
AOS = SamplingConfig(rescale="aos", eps=0.3)
ROUNDING = {"fp32": 2e-3, "bf16": 0.02}  # of scores in [0, 1], in the mean
PICTURES = [np.asarray(Image.fromarray(draw_scene(n, split="test").image).resize((64, 50 + 9 * n))) for n in range(6)]
PHRASES = [["red ring", "star", "blue cross"][: 1 + n % 3] for n in range(6)]


def difference(a: Segmenter, b: Segmenter) -> float:
    """The largest of the phrases' mean differences in score."""
    pairs = zip(*(s.segment(PICTURES, PHRASES, sampling=AOS) for s in (a, b)), strict=True)
    return max(float(np.abs(x.score - y.score).mean()) for own in pairs for x, y in zip(*own, strict=True))


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_rounds_the_factors_of_fp32_products(tf32: bool) -> None:
    make(backbone=replace(TINY, device="cuda", dtype="fp32"), speed=SpeedConfig(tf32=tf32))
    a = torch.randn(512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cuda()
    error = ((a.float() @ a.float()).double() - a @ a).abs().max()
    assert (error > 1e-3) == tf32


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scores_are_those_of_the_cpu_but_for_rounding(dtype: str) -> None:
    there = Segmenter.load("tiny", device="cuda", dtype=dtype)
    assert difference(Segmenter.load("tiny", device="cpu"), there) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_give_the_same_masks(dtype: str) -> None:
    slow = Segmenter.load("tiny", device="cuda", dtype=dtype)
    fast = Segmenter.load("tiny", device="cuda", dtype=dtype, fast=FastConfig(compile=True, max_batch=2))
    fast.warm_up(sampling=AOS)
    for _ in range(3):  # the first calls record, the later ones replay
        assert difference(slow, fast) < ROUNDING[dtype]


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 0.01), ("bf16", 0.05)])
def test_a_training_step_is_that_of_the_cpu_but_for_rounding(dtype: str, rounding: float) -> None:
    here, there = make(), make(backbone=replace(TINY, device="cuda", dtype=dtype))
    [batch, *_] = drawn_batches()
    assert there.step(batch)["loss"] == pytest.approx(here.step(batch)["loss"], rel=rounding)
    assert {(w.dtype, w.device.type) for w in there.weights} == {(torch.float32, "cuda")}
    assert there.optimizer.defaults["fused"]
    assert torch.cosine_similarity(gradients(here), gradients(there).cpu(), dim=0) > 1 - rounding


def test_every_stage_runs_on_it_says_so_and_finds_what_the_cpu_finds(
    tmp_path: Path, ray: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = root / "jobs" / "configs" / "quickstart"

    def run(command: str, out: str, *flags: str) -> str:
        assert cli.main(command, [*flags, f"--out={tmp_path / out}"]) == 0
        return capsys.readouterr().out

    def at(name: str) -> str:
        return str(tmp_path / name)

    for labels in ("coarse", "exact"):
        run("prepare", labels, "--shapes.count=12", f"--shapes.labels={labels}")
    refine = [f"--config={configs / 'refine.yaml'}", f"--samples={at('coarse')}", "--run.workers=1"]
    assert "1 worker, 1 GPU" in run("refine", "refined", *refine)
    assert "CPU" in run("refine", "refined-cpu", *refine, "--sam.device=cpu")
    encode = [f"--config={configs / 'encode.yaml'}", f"--samples={at('refined')}", "--run.workers=1"]
    assert "1 worker, 1 GPU, bf16" in run("encode", "latents", *encode)
    train = [f"--config={configs / 'train.yaml'}", f"--latents={at('latents')}", "--workers=1", "--max_steps=4"]
    assert "1 worker, 1 GPU, bf16" in run("train", "train", *train, "--batch_size=4", "--tracking.enabled=false")
    loaded, _ = adapter.load(tmp_path / "train" / "adapter", device="cpu")
    assert all(w.isfinite().all() for w in loaded.velocity.parameters())
    measure = ["--adapter=tiny", f"--samples={at('exact')}", "--overlays=0", "--tracking.enabled=false"]
    assert "1 GPU, bf16" in run("evaluate", "gpu", *measure, "--run.workers=1")
    assert "CPU, fp32" in run("evaluate", "cpu", *measure, "--run.workers=1", "--device=cpu")

    ours, theirs = (masks(tmp_path / name) for name in ("refined", "refined-cpu"))
    assert ours.keys() == theirs.keys()
    assert np.mean([iou(ours[k], theirs[k]) for k in ours]) > 0.97
    there, here = (json.loads((tmp_path / name / "results.json").read_text())["miou"] for name in ("gpu", "cpu"))
    assert there == pytest.approx(here, abs=0.02)


def masks(folder: Path) -> dict[tuple[str, int], Any]:
    """The masks of `refine`, by id and number."""
    rows = [r for p in folder.glob("data/*.parquet") for r in pq.read_table(p).to_pylist()]
    return {
        (r["id"], n): rle_decode(m, (r["height"], r["width"]))
        for r in rows
        for n, m in enumerate(r["masks"])
        if m is not None
    }
