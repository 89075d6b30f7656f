"""Encode: images and masks become latents once, so that training never touches a pixel.

An image is encoded once for all its phrases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, EncodeConfig, as_dict
from rlfseg.errors import DataError
from rlfseg.hub import resolve_base
from rlfseg.images import image_to_tensor, mask_to_tensor, rle_decode
from rlfseg.pipeline.cluster import arithmetic, connect, gpus_per_worker
from rlfseg.pipeline.folders import weights
from rlfseg.pipeline.rows import OK, Row, Rows, refused
from rlfseg.pipeline.samples import LoadSample, open_samples
from rlfseg.pipeline.stages import Stage, Summary, run_stage

CHUNK = 32  # images or masks in one call of the autoencoder
ROW_GROUP = 8  # rows, so that who reads latents reads hardly any but what it needs; at 512 px 2.5 MB
# Bytes and a shape, not tensors of a framework's own type: any Parquet reader can use them.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("shape", pa.list_(pa.int32())),  # [C, h, w] of every latent
        ("z1", pa.binary()),  # float16, C order
        ("z0", pa.list_(pa.binary())),  # a phrase
        ("z0_refined", pa.list_(pa.binary())),  # a phrase; null where the original was kept
    ]
)


def run(config: EncodeConfig) -> Summary:
    """Encodes `config.samples`: original labels, and refined ones where the folder has them.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        BadSample: A sample can't be read and `on_error` is `stop`.
        ModelError: The base can't be loaded.
    """
    samples = open_samples(config.samples)
    encoder = weights(resolve_base(config.backbone.base) / "vae")  # of a base, all that latents depend on
    backbone = {k: as_dict(config.backbone)[k] for k in ("base", "resolution")} | {"weights": encoder}
    connect()
    gpus = gpus_per_worker(config.run, config.backbone.device)
    dtype = arithmetic(config.backbone.dtype, gpus)
    return run_stage(
        Stage(
            name="encode",
            rows=samples.rows,
            load=LoadSample(samples.folder),
            work=Encoder,
            kwargs={"config": config.backbone},
            schema=SCHEMA,
            out=Path(config.out).absolute(),
            run=config.run,
            row_group=ROW_GROUP,
            gpus=gpus,
            arithmetic=dtype,
            identity=samples.identity | {"backbone": backbone | {"dtype": dtype}},
            on_error=config.on_error,
        )
    )


class Encoder:
    """The per-image work: holds one autoencoder.

    Args:
        config: The base and the resolution.
        backbone: A loaded one; default: the one that the config names.
    """

    def __init__(self, config: BackboneConfig, backbone: Backbone | None = None):
        self.backbone = backbone or Backbone.load(config)

    def __call__(self, rows: Rows) -> Rows:
        """Rows with `image`, `labels`, and after refining `masks` and `outcomes`, in; columns of SCHEMA out."""
        side = self.backbone.resolution
        images = self._encode([r["image"] for r in rows], lambda a: image_to_tensor(a, side))
        originals = [m for r in rows for m in r["labels"]]
        refined = [refined_masks(r) for r in rows]
        new = [m for masks in refined for m in masks if m is not None]
        z0 = iter(self._encode(originals + new, lambda a: mask_to_tensor(a, side)))
        z0_original = [[next(z0) for _ in r["labels"]] for r in rows]
        z0_refined = [[None if m is None else next(z0) for m in masks] for masks in refined]
        parts = zip(rows, images, z0_original, z0_refined, strict=True)
        return [self._row(*part) for part in parts]

    def _row(self, row: Row, z1: Tensor, z0: list[Tensor], z0_refined: list[Tensor | None]) -> Row:
        if not all(bool(z.isfinite().all()) for z in (z1, *z0, *(z for z in z0_refined if z is not None))):
            return refused(row, "the autoencoder gave NaN or infinity")
        return {
            "id": row["id"],
            "status": OK,
            "captions": row["captions"],
            "shape": list(z1.shape),
            "z1": to_bytes(z1),
            "z0": [to_bytes(z) for z in z0],
            "z0_refined": [None if z is None else to_bytes(z) for z in z0_refined],
        }

    def _encode(self, arrays: Sequence[NDArray[np.uint8]], tensor: Callable[[Any], Tensor]) -> list[Tensor]:
        parts = (torch.stack([tensor(a) for a in arrays[n : n + CHUNK]]) for n in range(0, len(arrays), CHUNK))
        return [z for part in parts for z in self.backbone.encode(part).cpu()]


def refined_masks(row: Row) -> list[NDArray[np.uint8] | None]:
    """The refined label of each phrase, None where the original was kept or nothing was refined."""
    if "masks" not in row:
        return [None] * len(row["labels"])
    if len(row["masks"]) != len(row["labels"]):
        raise DataError(
            f"{row['id']}: {len(row['masks'])} refined masks for {len(row['labels'])} phrases; refine again"
        )
    size = row["image"].shape[:2]
    decoded = (
        rle_decode(m, size) if o == "refined" else None for m, o in zip(row["masks"], row["outcomes"], strict=True)
    )
    return [d if d is None or not np.array_equal(d, m) else None for d, m in zip(decoded, row["labels"], strict=True)]


def to_bytes(z: Tensor) -> bytes:
    """A latent as float16 in C order."""
    return z.to(torch.float16).numpy().tobytes()


def from_bytes(data: Sequence[bytes], shape: Sequence[int]) -> Tensor:
    """Latents [B, C, h, w] float32 from what `to_bytes` gave."""
    flat = np.frombuffer(b"".join(data), dtype=np.float16).reshape(len(data), *shape)
    return torch.from_numpy(flat.astype(np.float32))
