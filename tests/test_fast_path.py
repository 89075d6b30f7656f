"""The fast one-step path against the plain one: tiny autoencoder, few shapes, compilation, bf16, CUDA graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from rlfseg import segmenter as module
from rlfseg.config import FastConfig, SamplingConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ModelError
from rlfseg.segmenter import Segmenter, few_shapes

Array = np.ndarray[Any, Any]
AOS = SamplingConfig(rescale="aos", eps=0.3)


def picture(n: int, size: tuple[int, int] = (64, 64)) -> Array:
    return np.asarray(Image.fromarray(draw_scene(n, split="test").image).resize(size[::-1]))


@pytest.fixture(scope="module")
def plain() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


# --- tiny autoencoder ----------------------------------------------------------------------------------------------


def untrained(folder: Path, channels: int = 8, stages: int = 3) -> AutoencoderTiny:
    torch.manual_seed(0)
    model = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * stages,
        decoder_block_out_channels=(8,) * stages,
        num_encoder_blocks=(1,) * stages,
        num_decoder_blocks=(1,) * stages,
    )
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def test_a_tiny_autoencoder_encodes_and_decodes_but_for_the_black_image(tmp_path: Path, plain: Segmenter) -> None:
    tiny = untrained(tmp_path)
    fast = Segmenter.load("tiny", device="cpu", fast=FastConfig(autoencoder=str(tmp_path))).backbone
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = fast.encode(pixels)
    torch.testing.assert_close(latents, tiny.encoder(pixels))  # no scaling, no rounding to bytes
    torch.testing.assert_close(fast.decode(latents), tiny.decoder(latents))
    torch.testing.assert_close(fast.black(), plain.backbone.black())  # Eq. 6 means the training latents' one
    assert (fast.encode(pixels) - plain.backbone.encode(pixels)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "told"), [({"channels": 4}, "latents of 4 channels at 1/4"), ({"stages": 4}, "8 channels at 1/8")]
)
def test_a_tiny_autoencoder_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, int], told: str) -> None:
    untrained(tmp_path, **changes)
    with pytest.raises(ModelError, match=f"{told}.*has 8 at 1/4"):
        Segmenter.load("tiny", device="cpu", fast=FastConfig(autoencoder=str(tmp_path)))


def test_what_is_no_tiny_autoencoder_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder of an AutoencoderTiny"):
        Segmenter.load("tiny", device="cpu", fast=FastConfig(autoencoder=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(ModelError, match="can't be loaded as an AutoencoderTiny"):
        Segmenter.load("tiny", device="cpu", fast=FastConfig(autoencoder=str(tmp_path)))


def test_the_shipped_one_finds_nearly_the_same_masks(plain: Segmenter) -> None:
    fast = Segmenter.load("tiny", device="cpu", fast=FastConfig(autoencoder="tiny"))
    scenes = [draw_scene(n, split="test") for n in range(24)]
    pictures, phrases = [s.image for s in scenes], [[p.caption for p in s.phrases] for s in scenes]

    def miou(segmenter: Segmenter) -> float:
        found = segmenter.segment(pictures, phrases)
        pairs = [
            (r.mask, p.mask) for own, s in zip(found, scenes, strict=True) for r, p in zip(own, s.phrases, strict=True)
        ]
        return float(np.mean([(a & b).sum() / max(1, (a | b).sum()) for a, b in pairs]))

    assert miou(fast) > miou(plain) - 0.1
    pixels = torch.stack([module.images.image_to_tensor(p, 64) for p in pictures])
    theirs, ours = plain.backbone.encode(pixels), fast.backbone.encode(pixels)
    assert (ours - theirs).square().mean() < 0.2 * theirs.var()


# --- few shapes, compilation ----------------------------------------------------------------------------------------


def test_batches_are_padded_to_few_sizes_and_results_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    buffer = torch.zeros(24, 2)

    def as_a_cuda_graph(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """Every call's result lies in the same memory."""

        def call(x: torch.Tensor, y: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sizes.append(len(x))
            assert len(y) == len(x)
            assert len(fixed) == 1
            buffer[: len(x)] = function(x, y, fixed)
            return buffer[: len(x)], buffer[: len(x), 0]

        return call

    monkeypatch.setattr(torch, "compile", as_a_cuda_graph)
    call = few_shapes(lambda x, y, fixed: x + y + fixed, 24, "cpu")
    results = {n: call(torch.full((n, 2), float(n)), torch.ones(n, 2), torch.full((1, 2), 100.0)) for n in range(1, 25)}
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24]
    for n, (both, first) in results.items():
        torch.testing.assert_close(both, torch.full((n, 2), n + 101.0))
        torch.testing.assert_close(first, torch.full((n,), n + 101.0))


def test_more_than_eight_samplings_are_compiled_on_whatever_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps its settings for each thread, and beyond its own limit of 8 it goes on uncompiled without a word."""
    graphs: list[int] = []

    def counts(graph: torch.fx.GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counts))
    call = few_shapes(lambda x, factor: x * factor, 8, "cpu")
    for factor in range(2, 14):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(call, torch.ones(2, 2), factor).result()[0, 0] == factor
    assert len(graphs) == 12


@pytest.mark.parametrize(
    ("sampling", "compiled"),
    [
        (SamplingConfig(), True),
        (AOS, True),
        (SamplingConfig(steps=3), False),
        (SamplingConfig(rescale="hss", eps=0.3, hss_steps=3), False),
    ],
)
def test_what_calls_the_network_often_is_not_unrolled_into_a_graph(
    plain: Segmenter, monkeypatch: pytest.MonkeyPatch, sampling: SamplingConfig, compiled: bool
) -> None:
    called: list[Any] = []

    def as_if(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return lambda *given: (called.append(function), function(*given))[1]

    monkeypatch.setattr(torch, "compile", as_if)
    fast = Segmenter(plain.backbone, plain.card, compile=True)
    a, b = (s(picture(3), ["red ring"], sampling=sampling)[0].score for s in (plain, fast))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert [f.__name__ for f in called] == ["encode", "_masks"][: 1 + compiled]


TWENTY = """
import json, sys
from functools import partial
import numpy as np, torch
graphs = []
def backend(graph, inputs, **_):
    graphs.append(len(inputs))
    return graph.forward
torch.compile = partial(torch.compile, backend=backend)
from rlfseg.config import FastConfig, SamplingConfig
from rlfseg.segmenter import Segmenter
aos = SamplingConfig(rescale="aos", eps=0.3)
plain = Segmenter.load("tiny", device="cpu")
fast = Segmenter.load("tiny", device="cpu", fast=FastConfig(compile=True, max_batch=16))
fast.warm_up(sampling=aos)
fast.warm_up()
warm, worst, gammas = len(graphs), 0.0, []
for n in range(20):
    image = np.random.default_rng(n).integers(256, size=(20 + 9 * n, 210 - 7 * n, 3), dtype=np.uint8)
    phrases = ["red ring", "blue star", "cross"][: 1 + n % 3]
    fast(image, phrases)
    for a, b in zip(plain(image, phrases, sampling=aos), fast(image, phrases, sampling=aos), strict=True):
        assert a.score.shape == b.score.shape == image.shape[:2]
        worst = max(worst, float(np.abs(a.score - b.score).max()))
        gammas.append((a.gamma, b.gamma))
print(json.dumps({"warm": warm, "all": len(graphs), "worst": worst, "gammas": gammas}))
"""


@pytest.mark.slow
@pytest.mark.fault("numeric-03")
def test_twenty_sizes_of_pictures_need_few_compilations_and_none_after_warm_up() -> None:
    """With a backend that runs the graphs as they are, so that what is counted is what was captured.

    AOS is part of the graph: one graph a size of batch for encoding, one for all the rest. In a process of its own: the
    shape checks of this one would be captured too.
    """
    done = subprocess.run([sys.executable, "-c", TWENTY], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["warm"] == 15  # batches of 1, 2, 4, 8 and 16, encoded and under two samplings
    assert told["all"] == told["warm"]
    assert told["worst"] < 1e-3
    np.testing.assert_allclose(*zip(*told["gammas"], strict=True), atol=1e-3)
    assert max(g for g, _ in told["gammas"]) > 0


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_bf16_without_autocast_is_near_fp32(plain: Segmenter) -> None:
    fast = Segmenter.load("tiny", device="cpu", dtype="bf16")
    seen: list[torch.dtype] = []
    unet = fast.backbone.velocity.unet
    hook = unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend([args[0].dtype, kwargs["encoder_hidden_states"].dtype]), with_kwargs=True
    )
    for sampling in (None, AOS):
        a, b = (s(picture(3), ["red ring", "star"], sampling=sampling) for s in (plain, fast))
        hook.remove()
        assert np.mean([np.abs(x.score - y.score).mean() for x, y in zip(a, b, strict=True)]) < 0.02
    assert set(seen) == {torch.bfloat16}
    assert {w.dtype for w in unet.parameters()} == {torch.bfloat16}
