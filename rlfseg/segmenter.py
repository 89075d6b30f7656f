"""Masks from words: the front door for Python users, and what every stage and service calls.

from rlfseg import Segmenter
results = Segmenter.load("tiny")("picture.jpg", ["red ring", "blue star"])
results[0].mask     # uint8 {0, 1} [H, W], the picture's own size

A picture is encoded once for all its phrases and a phrase once for all pictures; phrases of many pictures go through
the UNet together; LoRA is folded into its weights; AOS is part of the step. `FastConfig` has what else can be had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rlfseg import adapter, images, sampling
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import FastConfig, SamplingConfig
from rlfseg.errors import BadSample
from rlfseg.results import Result, Square, checked_phrase

__all__ = ["Picture", "Result", "Segmenter", "Square", "checked_phrase", "to_array"]

Picture = images.Source | NDArray[np.uint8]


class Segmenter:
    """A backbone with an adapter, and how it was calibrated.

    Args:
        backbone: With or without an adapter.
        card: Its card.
        max_batch: Most phrases in one UNet call, and pictures in one encoding; bounds a GPU's memory.
        compile: Compile both, where one call of the UNet is all; see `few_shapes`. On a GPU always call it from the
            same thread then, of which CUDA graphs are.
    """

    def __init__(self, backbone: Backbone, card: Card, *, max_batch: int = 32, compile: bool = False):
        self.backbone, self.card, self.max_batch = backbone, card, max_batch
        self._encode: Callable[..., Tensor] | None = None
        self._step: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._masks
        if compile:
            self._encode = few_shapes(backbone.encode, max_batch, backbone.device)
            self._step = few_shapes(self._masks, max_batch, backbone.device)

    @classmethod
    def load(
        cls,
        reference: str = "tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        base_only: bool = False,
        fast: FastConfig | None = None,
    ) -> Segmenter:
        """Loads `tiny` (shipped), a folder, `hf:owner/name@revision`, `models:/name@alias` or `runs:/id/adapter`.

        Args:
            reference: The adapter.
            device: `auto`, `cpu` or `cuda`.
            dtype: `auto`, `fp32` or `bf16`.
            base_only: Leave the adapter off.
            fast: How masks are computed faster.

        Returns:
            Ready to call.

        Raises:
            ModelError: It can't be loaded.
        """
        backbone, card = adapter.load(adapter.resolve(reference), device=device, dtype=dtype, base_only=base_only)
        backbone.fuse()  # one adapter is served: its extra products cost time and change nothing
        fast = fast or FastConfig()
        if fast.autoencoder is not None:
            backbone.use_tiny(fast.autoencoder)
        return cls(backbone, card, max_batch=fast.max_batch, compile=fast.compile)

    def __call__(
        self,
        image: Picture,
        phrases: Sequence[str],
        *,
        sampling: SamplingConfig | None = None,
        threshold: float | None = None,
    ) -> list[Result]:
        """One result a phrase, in order, at the picture's own size.

        Args:
            image: A path, bytes, a file, a PIL image or uint8 RGB [H, W, 3].
            phrases: What to look for.
            sampling: Steps, AOS or HSS; default: one step.
            threshold: Score above which a pixel is mask; default: the adapter's own.

        Returns:
            Mask and score of each phrase at the picture's size.

        Raises:
            BadSample: The picture can't be decoded, or a phrase is empty.
        """
        return self.segment([to_array(image)], [phrases], sampling=sampling, threshold=threshold)[0]

    def segment(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        phrases: Sequence[Sequence[str]],
        *,
        sampling: SamplingConfig | None = None,
        threshold: float | None = None,
    ) -> list[list[Result]]:
        """Many pictures of any sizes, each with its phrases: one encoding a picture, phrases batched across pictures.

        Args:
            pictures: uint8 RGB [H, W, 3] each.
            phrases: For each picture.
            sampling: Steps, AOS or HSS; default: one step.
            threshold: Score above which a pixel is mask; default: the adapter's own.

        Returns:
            For each picture a result a phrase.

        Raises:
            BadSample: A phrase is empty.
        """
        checked = [[checked_phrase(p) for p in own] for own in phrases]
        if not any(checked):
            return [[] for _ in phrases]
        limit = self.card.threshold if threshold is None else threshold
        found = self.squares(self.encode(pictures), checked, sampling=sampling)
        return [[s.at(p.shape[:2], limit) for s in own] for p, own in zip(pictures, found, strict=True)]

    def squares(
        self,
        z1: Float[Tensor, "I C h w"],
        phrases: Sequence[Sequence[str]],
        *,
        sampling: SamplingConfig | None = None,
    ) -> list[list[Square]]:
        """What each phrase means on each encoded picture, in the network's frame; phrases batched across pictures.

        Args:
            z1: Latents of the pictures, from `encode`.
            phrases: For each picture; none of them empty.
            sampling: Steps, AOS or HSS; default: one step.

        Returns:
            For each picture a square a phrase: on the CPU, in memory of its own.
        """
        config = sampling or SamplingConfig()
        owners = [i for i, own in enumerate(phrases) for _ in own]
        flat = [p for own in phrases for p in own]
        found: list[list[Square]] = [[] for _ in phrases]
        parts = [slice(n, n + self.max_batch) for n in range(0, len(flat), self.max_batch)]
        z_black = self.backbone.black() if config.rescale == "aos" else None
        index = torch.tensor(owners, dtype=torch.long, device=z1.device)  # once: a copy to a GPU waits for its queue
        # Compiled, a sampler is unrolled: of many steps it would take minutes, for the first who asks for so many
        step = self._step if config.steps == 1 and config.rescale != "hss" else self._masks
        calls = (self._queued(step(z1[index[part]], self.backbone.text(flat[part]), z_black, config)) for part in parts)
        # The next call is queued on the GPU before one is waited for; after the last there is nothing to queue
        for part, (wait, _) in zip(parts, pairwise(chain(calls, [list[Tensor]])), strict=True):
            scores, gamma, clipped = wait()
            numbers = zip(gamma.tolist(), clipped.tolist(), strict=True)
            for owner, caption, score, (g, c) in zip(owners[part], flat[part], scores, numbers, strict=True):
                long = self.backbone.too_long(caption)
                # A copy of its own: a slice would take its whole batch along to another process
                found[owner].append(Square(caption=caption, score=score.clone(), gamma=g, clipped=c, truncated=long))
        return found

    def _queued(self, results: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Queues what brings the results of a queued call to the CPU; gives what waits for them."""
        done = [x.to("cpu", non_blocking=True) for x in results]
        if self.backbone.device == "cpu":
            return lambda: done
        event = torch.cuda.Event()  # not the whole queue: the next call will be in it
        event.record()

        def wait() -> list[Tensor]:
            event.synchronize()
            return done

        return wait

    def encode(self, pictures: Sequence[NDArray[np.uint8]]) -> Float[Tensor, "I C h w"]:
        """Latents z1 of pictures of any sizes."""
        return self.encode_squares(torch.stack([images.image_to_tensor(p, self.backbone.resolution) for p in pictures]))

    def encode_squares(self, pixels: Float[Tensor, "I 3 R R"]) -> Float[Tensor, "I C h w"]:
        """Latents z1 of pictures that are in the network's frame already."""
        encode = self._encode or self.backbone.encode
        return torch.cat([encode(part.to(self.backbone.device)) for part in pixels.split(self.max_batch)])

    @torch.no_grad()
    def _masks(
        self, z1: Tensor, text: Tensor, z_black: Tensor | None, config: SamplingConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole way from latents to scores [B, R, R], gamma and clipped [B]: one graph where it is compiled."""
        with self.backbone.autocast():
            latents = sampling.sample(
                self.backbone.velocity,
                z1,
                text,
                steps=config.steps,
                rescale=config.rescale,
                eps=self.card.eps(config),
                gamma_max=config.gamma_max,
                hss_steps=config.hss_steps,
                z_black=z_black,
            )
        return images.tensor_to_square(self.backbone.decode(latents.z0)), latents.gamma, latents.clipped

    def warm_up(self, *, sampling: SamplingConfig | None = None) -> None:
        """Runs every size of batch, so that nobody waits for a compilation later, or for the recording of a graph."""
        side = self.backbone.resolution
        sizes = {min(2**k, self.max_batch) for k in range(self.max_batch.bit_length() + 1)}
        for n in [*sizes] * (1 if self.backbone.device == "cpu" else 2):  # a CUDA graph is recorded by a second call
            z1 = self.encode_squares(torch.zeros(n, 3, side, side))
            self.squares(z1[:1], [["warm-up"] * n], sampling=sampling)


# Of a function, for all models of a process: each of the sizes under each sampling and eps. Beyond its 8, torch would
# go on uncompiled without a word
RECOMPILE_LIMIT = 256


def few_shapes(function: Callable[..., Any], most: int, device: str) -> Callable[..., Any]:
    """A function of batches, compiled, whose batches are padded to the next power of two: few shapes, few compilations.

    Args:
        function: Takes tensors and settings; tensors of more than one row are batches of the same length, and so is
            every result.
        most: Largest batch.
        device: On `cuda` the compiled function becomes CUDA graphs.

    Returns:
        A function with the same results, in memory of their own.
    """
    fast = torch.compile(function, dynamic=False, mode="default" if device == "cpu" else "reduce-overhead")

    def call(batch: Tensor, *others: Any) -> Any:
        n = len(batch)
        size = min(1 << (n - 1).bit_length(), most)

        def padded(x: Any) -> Any:
            is_batch = isinstance(x, Tensor) and len(x) == n
            return torch.cat([x, x[-1:].expand(size - n, *x.shape[1:])]) if is_batch else x

        torch.compiler.cudagraph_mark_step_begin()
        # By call, since torch keeps its settings for each thread
        with torch._dynamo.config.patch(recompile_limit=max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)):
            done = fast(*map(padded, (batch, *others)))
        # A CUDA graph writes each call's results to the same place
        return done[:n].clone() if isinstance(done, Tensor) else tuple(x[:n].clone() for x in done)

    return call


def to_array(image: Picture) -> NDArray[np.uint8]:
    """Any kind of picture as uint8 RGB [H, W, 3].

    Args:
        image: A path, bytes, a file, a PIL image or an array.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        BadSample: It can't be decoded, or the array is none of a picture.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            reason = f"an image array must be uint8 [H, W, 3], this one is {image.dtype} {list(image.shape)}"
            raise BadSample(reason, file="segmenter")
        return image
    name = os.fspath(image) if isinstance(image, str | os.PathLike) else getattr(image, "name", "image")
    return images.load_image(image, name=str(name))
