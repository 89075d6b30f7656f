"""On a GPU (`pytest -m gpu tests/test_gpu.py`): CUDA's arithmetic and graphs, and every stage with GPU actors."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
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


def test_scores_of_many_phrases_do_not_pile_up_on_it() -> None:
    segmenter = Segmenter.load("tiny", device="cuda", fast=FastConfig(max_batch=4))
    z1, peaks = segmenter.encode(PICTURES[:1]), list[int]()
    for phrases in (40, 40, 4000):  # the first time fills caches
        torch.cuda.reset_peak_memory_stats()
        [squares] = segmenter.squares(z1, [["red ring"] * phrases])
        peaks.append(torch.cuda.max_memory_allocated())
        assert {s.score.device.type for s in squares} == {"cpu"}
        worst = max(float((s.score - squares[0].score).abs().max()) for s in squares)  # of a copy that isn't there yet
        assert worst < ROUNDING["bf16"]
    assert peaks[2] - peaks[1] < 2**20  # of 64 MiB


@pytest.mark.parametrize("selection", ["dynamic", "refined", "original"])
@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 0.01), ("bf16", 0.05)])
def test_a_training_step_is_that_of_the_cpu_but_for_rounding(dtype: str, rounding: float, selection: str) -> None:
    here = make(selection=selection)
    there = make(selection=selection, backbone=replace(TINY, device="cuda", dtype=dtype))
    [batch, *_] = drawn_batches()
    assert there.step(batch)["loss"] == pytest.approx(here.step(batch)["loss"], rel=rounding)
    assert {(w.dtype, w.device.type) for w in there.weights} == {(torch.float32, "cuda")}
    assert there.optimizer.defaults["fused"]
    assert torch.cosine_similarity(gradients(here), gradients(there).cpu(), dim=0) > 1 - rounding


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.-wrapped:UserWarning")  # diffusers
def test_a_compiled_step_with_all_settings_of_speed_is_that_of_the_cpu_but_for_rounding() -> None:
    speed = SpeedConfig(compile=True, gradient_checkpointing=True, channels_last=True, tf32=False)
    here, there = make(), make(backbone=replace(TINY, device="cuda", dtype="fp32"), speed=speed)
    [batch, *_] = drawn_batches()
    assert there.step(batch)["loss"] == pytest.approx(here.step(batch)["loss"], rel=0.01)
    assert torch.cosine_similarity(gradients(here), gradients(there).cpu(), dim=0) > 0.99


# --- stages, with real actors on it ---------------------------------------------------------------------------------


class Chain:
    """Runs commands in one folder.

    Args:
        folder: Where all of them write.
        configs: Those of the quickstart.
    """

    def __init__(self, folder: Path, configs: Path):
        self.folder, self.configs = folder, configs
        for labels in ("coarse", "exact"):
            self("prepare", labels, "--shapes.count=12", f"--shapes.labels={labels}")

    def __call__(self, command: str, out: str, *flags: str) -> str:
        """Runs a command into `out`; what it says of itself."""
        said = io.StringIO()
        with redirect_stdout(said):
            code = cli.main(command, [*flags, f"--out={self.folder / out}"])
        assert code == 0, said.getvalue()
        return said.getvalue()

    def refine(self, out: str, *flags: str) -> str:
        """Refines the coarse labels."""
        config = f"--config={self.configs / 'refine.yaml'}"
        return self("refine", out, config, f"--samples={self.folder / 'coarse'}", "--run.workers=1", *flags)

    def evaluate(self, out: str, *flags: str) -> str:
        """Measures the shipped adapter."""
        off = ["--overlays=0", "--tracking.enabled=false", "--run.workers=1"]
        return self("evaluate", out, "--adapter=tiny", f"--samples={self.folder / 'exact'}", *off, *flags)

    def masks(self, name: str) -> dict[tuple[str, int], Any]:
        """The masks of `refine`, by id and number."""
        rows = [r for p in (self.folder / name).glob("data/*.parquet") for r in pq.read_table(p).to_pylist()]
        return {
            (r["id"], n): rle_decode(m, (r["height"], r["width"]))
            for r in rows
            for n, m in enumerate(r["masks"])
            if m is not None
        }

    def miou(self, name: str) -> float:
        """What `evaluate` found."""
        return float(json.loads((self.folder / name / "results.json").read_text())["miou"])


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, ray: ModuleType, root: Path) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"), root / "jobs" / "configs" / "quickstart")


def test_refining_on_it_gives_the_masks_of_the_cpu(chain: Chain) -> None:
    assert "1 worker, 1 GPU, fp32" in chain.refine("refined")
    assert "1 worker, CPU, fp32" in chain.refine("refined-cpu", "--sam.device=cpu")
    ours, theirs = (chain.masks(name) for name in ("refined", "refined-cpu"))
    assert ours.keys() == theirs.keys()
    assert np.mean([iou(ours[k], theirs[k]) for k in ours]) > 0.97


def test_evaluating_on_it_gives_the_figures_of_the_cpu(chain: Chain) -> None:
    assert "1 worker, 1 GPU, bf16" in chain.evaluate("gpu")
    assert "1 worker, CPU, fp32" in chain.evaluate("cpu", "--device=cpu")
    assert chain.miou("gpu") == pytest.approx(chain.miou("cpu"), abs=0.02)


def test_encoding_and_training_on_it_give_an_adapter_for_the_cpu(chain: Chain) -> None:
    chain.refine("refined")  # done already where the test of it ran
    config, samples = f"--config={chain.configs / 'encode.yaml'}", f"--samples={chain.folder / 'refined'}"
    assert "1 worker, 1 GPU, bf16" in chain("encode", "latents", config, samples, "--run.workers=1")
    config, latents = f"--config={chain.configs / 'train.yaml'}", f"--latents={chain.folder / 'latents'}"
    few = ["--workers=1", "--max_steps=4", "--batch_size=4", "--tracking.enabled=false"]
    assert "1 worker, 1 GPU, bf16" in chain("train", "train", config, latents, *few)
    loaded, _ = adapter.load(chain.folder / "train" / "adapter", device="cpu")
    assert all(bool(w.isfinite().all()) for w in loaded.velocity.parameters())
