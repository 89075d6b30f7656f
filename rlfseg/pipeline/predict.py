"""Predict: masks for phrases on many pictures; batches are filled across pictures and phrases, sizes mixed freely.

    load    CPU tasks    reads, decodes and stretches a picture to the network's square
    work    actors       the networks alone, on squares
    finish  CPU tasks    scores at the picture's own size, mask, RLE, PNGs and overlays

The three run at the same time on different pictures: a GPU waits neither for a disk nor for a drawing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from rlfseg import adapter, images
from rlfseg.config import FastConfig, PredictConfig, SamplingConfig, as_dict
from rlfseg.errors import BadSample, ConfigError
from rlfseg.pipeline import effective
from rlfseg.pipeline.bases import fetch_autoencoder, fetch_base
from rlfseg.pipeline.folders import file_name, write_json
from rlfseg.pipeline.pictures import Asked, find
from rlfseg.pipeline.rows import OK, Row, Rows
from rlfseg.pipeline.stages import Stage, Summary, arithmetic, connect, gpus_per_worker, run_stage
from rlfseg.results import Result, Square, checked_phrase

if TYPE_CHECKING:  # imported where it is used: the driver and the CPU tasks need no networks
    from collections.abc import Callable

    from rlfseg.segmenter import Segmenter

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("masks", pa.list_(pa.string())),  # COCO RLE counts; null where the phrase failed
        ("scores", pa.list_(pa.float32())),  # mean score inside the mask
        ("areas", pa.list_(pa.int64())),  # pixels
        ("outcomes", pa.list_(pa.string())),  # `ok`, `ok: phrase cut`, or `failed: ` and why
    ]
)


def run(config: PredictConfig) -> Summary:
    """Segments every picture of `config.images`.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        BadSample: A picture can't be decoded and `on_error` is `stop`.
        ConfigError: There are no pictures, a picture has no phrases, or settings of sampling don't go together.
        DataError: A list of pictures is damaged, or a server can't be reached.
        ModelError: The adapter can't be loaded.
    """
    out, phrases = Path(config.out).absolute(), _phrases(config)
    folder = adapter.resolve(config.adapter).absolute()
    card = adapter.read_card(folder)
    effective.check_sampling(config.sampling, card)
    fetch_base(card)
    autoencoder = fetch_autoencoder(config.fast.autoencoder)
    pictures = find(config.images, phrases, config.phrases_column, pixels=config.pixels)
    settings = as_dict(config)
    connect()
    gpus = gpus_per_worker(config.run, config.device)
    return run_stage(
        Stage(
            name="predict",
            rows=pictures.rows,
            load=Load(pictures.read, card.resolution, keep=config.overlays),
            work=Predictor,
            kwargs={
                "reference": str(folder),
                "device": config.device,
                "fast": config.fast,
                "sampling": config.sampling,
            },
            finish=Finish(
                card.threshold if config.threshold is None else config.threshold,
                png=out / "png" if config.png else None,
                overlays=out / "overlays" if config.overlays else None,
            ),
            schema=SCHEMA,
            out=out,
            run=config.run,
            gpus=gpus,
            arithmetic=arithmetic("auto", gpus),
            identity={k: settings[k] for k in ("images", "sampling", "threshold", "pixels", "png", "overlays")}
            | {"phrases": phrases, "pictures": pictures.fingerprint, "adapter": adapter.version(folder)}
            | {"autoencoder": autoencoder},
            on_error=config.on_error,
            finalize=partial(_report, out, config.sampling.idle),
        )
    )


def _phrases(config: PredictConfig) -> list[str]:
    try:
        lines = Path(config.phrases_file).read_text(encoding="utf-8").splitlines() if config.phrases_file else []
        return [checked_phrase(p) for p in (*config.phrases, *(line for line in lines if line.strip()))]
    except BadSample as error:
        raise ConfigError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"phrases_file: {config.phrases_file} can't be read: {error}") from error


class Load:
    """Index row -> a picture in the network's frame, its size and its phrases.

    Args:
        read: Index row -> picture and phrases.
        resolution: Side of the network's square.
        keep: Hand the picture on, for those who draw on it.
    """

    def __init__(self, read: Callable[[Row], Asked], resolution: int, *, keep: bool = False):
        self.read, self.resolution, self.keep = read, resolution, keep

    def __call__(self, row: Row) -> Row:
        """Reads one picture.

        Args:
            row: An index row.

        Returns:
            `id`, `captions`, `size` (H, W), `square` float32 [3, R, R], and `image` uint8 [H, W, 3] to be kept.

        Raises:
            BadSample: It can't be decoded.
        """
        image, captions = self.read(row)
        square = images.image_to_tensor(image, self.resolution).numpy()
        loaded = {"id": row["id"], "captions": captions, "size": image.shape[:2], "square": square}
        return loaded | ({"image": image} if self.keep else {})


class Predictor:
    """The networks: holds one segmenter.

    Args:
        reference: Adapter folder.
        device: `auto`, `cpu` or `cuda`.
        fast: How masks are computed faster.
        sampling: How masks are sampled.
        segmenter: A loaded one, instead of `reference`.
    """

    def __init__(
        self,
        reference: str = "tiny",
        *,
        device: str = "auto",
        fast: FastConfig | None = None,
        sampling: SamplingConfig | None = None,
        segmenter: Segmenter | None = None,
    ):
        if segmenter is None:
            from rlfseg.segmenter import Segmenter

            segmenter = Segmenter.load(reference, device=device, fast=fast)
        self.segmenter, self.sampling = segmenter, sampling

    def __call__(self, rows: Rows) -> Rows:
        """Rows of `Load` in; the same with `squares`, a Square a phrase, instead of `square` out."""
        import torch

        z1 = self.segmenter.encode_squares(torch.from_numpy(np.stack([row.pop("square") for row in rows])))
        found = self.segmenter.squares(z1, [row["captions"] for row in rows], sampling=self.sampling)
        # A slice of the batch's scores would be sent with all of them
        own = [[replace(s, score=s.score.cpu().clone()) for s in squares] for squares in found]
        return [row | {"status": OK, "squares": squares} for row, squares in zip(rows, own, strict=True)]


class Finish:
    """Squares -> masks at the picture's own size, and what is drawn of them.

    Args:
        threshold: Score above which a pixel is mask.
        png: Folder for a PNG a mask; None: none.
        overlays: Folder for an overlay a picture; None: none.
    """

    def __init__(self, threshold: float, *, png: Path | None = None, overlays: Path | None = None):
        self.threshold, self.png, self.overlays = threshold, png, overlays

    def __call__(self, row: Row) -> Row:
        """Finishes one picture.

        Args:
            row: As `Predictor` gives it.

        Returns:
            Columns of SCHEMA.

        Raises:
            BadSample: The network gave NaN for every phrase.
        """
        squares: list[Square] = row["squares"]
        results = [square.at(row["size"], self.threshold) for square in squares]
        if results and all(r.failed for r in results):
            raise BadSample("the network gave NaN for every phrase", file="predict", sample=row["id"])
        masks = [None if r.failed else r.mask for r in results]
        self._draw(row, results)
        return {
            "id": row["id"],
            "height": row["size"][0],
            "width": row["size"][1],
            "captions": [r.caption for r in results],
            "masks": [None if m is None else images.rle_encode(m) for m in masks],
            "scores": [None if r.failed else r.confidence for r in results],
            "areas": [None if m is None else int(m.sum()) for m in masks],
            "outcomes": [_outcome(r) for r in results],
        }

    def _draw(self, row: Row, results: list[Result]) -> None:
        if self.png is None and self.overlays is None:
            return
        from rlfseg import draw

        name, good = file_name(row["id"]), [(n, r) for n, r in enumerate(results) if not r.failed]
        if self.png is not None:
            for n, r in good:
                draw.save(self.png / name / f"{n:02d}-{file_name(r.caption)}.png", r.mask * 255)
        if self.overlays is not None:
            picture = draw.overlay(
                row["image"],
                [r.mask for _, r in good],
                [r.caption for _, r in good],
                notes=[f"{r.confidence:.2f}" for _, r in good],
            )
            draw.save(self.overlays / f"{name}.png", picture)


def _outcome(result: Result) -> str:
    if result.failed:
        return "failed: the network gave NaN"
    return "ok: the phrase is longer than the text encoder takes and was cut" if result.truncated else OK


def _report(out: Path, notes: tuple[str, ...], counts: Row) -> Row:
    """Bad pictures in a file of their own."""
    write_json(out / "refused.json", counts["refused"])
    return counts | {"notes": notes}
