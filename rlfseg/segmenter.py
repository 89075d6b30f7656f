"""Masks from words: the front door for Python users, and what every stage and service calls.

from rlfseg import Segmenter
results = Segmenter.load("tiny")("picture.jpg", ["red ring", "blue star"])
results[0].mask     # uint8 {0, 1} [H, W], the picture's own size
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rlfseg import adapter, images, sampling
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import SamplingConfig
from rlfseg.errors import BadSample
from rlfseg.results import Result, Square, checked_phrase

__all__ = ["Picture", "Result", "Segmenter", "Square", "checked_phrase", "to_array"]

Picture = images.Source | NDArray[np.uint8]


class Segmenter:
    """A backbone with an adapter, and how it was calibrated.

    Args:
        backbone: With or without an adapter.
        card: Its card.
        max_batch: Most phrases in one UNet call; bounds memory.
    """

    def __init__(self, backbone: Backbone, card: Card, *, max_batch: int = 32):
        self.backbone, self.card, self.max_batch = backbone, card, max_batch

    @classmethod
    def load(
        cls, reference: str = "tiny", *, device: str = "auto", dtype: str = "auto", base_only: bool = False
    ) -> Segmenter:
        """Loads `tiny` (shipped), a folder, `hf:owner/name@revision`, `models:/name@alias` or `runs:/id/adapter`.

        Args:
            reference: The adapter.
            device: `auto`, `cpu` or `cuda`.
            dtype: `auto`, `fp32` or `bf16`.
            base_only: Leave the adapter off.

        Returns:
            Ready to call.

        Raises:
            ModelError: It can't be loaded.
        """
        backbone, card = adapter.load(adapter.resolve(reference), device=device, dtype=dtype, base_only=base_only)
        backbone.fuse()  # one adapter is served: its extra products cost time and change nothing
        return cls(backbone, card)

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
            For each picture a square a phrase, on the backbone's device.
        """
        config = sampling or SamplingConfig()
        owners = [i for i, own in enumerate(phrases) for _ in own]
        flat = [p for own in phrases for p in own]
        found: list[list[Square]] = [[] for _ in phrases]
        for start in range(0, len(flat), self.max_batch):
            part = slice(start, start + self.max_batch)
            decoded, gamma, clipped = self._masks(z1[owners[part]], flat[part], config)
            scores = images.tensor_to_square(decoded)
            for n, owner in enumerate(owners[part]):
                caption = flat[start + n]
                found[owner].append(
                    Square(
                        caption=caption,
                        score=scores[n],
                        gamma=gamma[n],
                        clipped=clipped[n],
                        truncated=self.backbone.too_long(caption),
                    )
                )
        return found

    def encode(self, pictures: Sequence[NDArray[np.uint8]]) -> Float[Tensor, "I C h w"]:
        """Latents z1 of pictures of any sizes."""
        pixels = torch.stack([images.image_to_tensor(p, self.backbone.resolution) for p in pictures])
        return self.backbone.encode(pixels)

    @torch.no_grad()
    def _masks(self, z1: Tensor, phrases: list[str], config: SamplingConfig) -> tuple[Tensor, list[float], list[bool]]:
        calibrated = self.card.eps_hss if config.rescale == "hss" else self.card.eps_aos
        with self.backbone.autocast():
            latents = sampling.sample(
                self.backbone.velocity,
                z1,
                self.backbone.text(phrases),
                steps=config.steps,
                rescale=config.rescale,
                eps=calibrated if config.eps is None else config.eps,
                gamma_max=config.gamma_max,
                hss_steps=config.hss_steps,
                z_black=self.backbone.black() if config.rescale == "aos" else None,
            )
        return self.backbone.decode(latents.z0), latents.gamma.tolist(), latents.clipped.tolist()


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
