"""Predict: masks for phrases on many pictures; batches are filled across pictures and phrases, sizes mixed freely.

    load    CPU tasks    reads, decodes and stretches a picture to the network's square
    work    actors       the networks alone, on squares
    finish  CPU tasks    scores at the picture's own size, mask, RLE, PNGs and overlays

The three run at the same time on different pictures: a GPU waits neither for a disk nor for a drawing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlfseg import adapter, images
from rlfseg.config import FastConfig, PredictConfig, SamplingConfig, as_dict
from rlfseg.errors import BadSample, ConfigError
from rlfseg.pipeline.bases import fetch_autoencoder, open_adapter
from rlfseg.pipeline.cluster import arithmetic, connect, gpus_per_worker
from rlfseg.pipeline.folders import file_name, write_json
from rlfseg.pipeline.pictures import Asked, find
from rlfseg.pipeline.rows import OK, Row, Rows, score_bytes
from rlfseg.pipeline.stages import Stage, Summary, run_stage
from rlfseg.results import NESTED, Result, checked_phrase

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
    folder, card = open_adapter(config.adapter, config.sampling)
    autoencoder = fetch_autoencoder(config.fast.autoencoder)
    pictures = find(config.images, phrases, config.phrases_column, pixels=config.pixels, but=out)
    settings = as_dict(config)
    connect()
    gpus = gpus_per_worker(config.run, config.device)
    return run_stage(
        Stage(
            name="predict",
            rows=pictures.rows,
            load=Load(pictures.read, card.resolution),
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
                overlays=(out / "overlays", pictures.read) if config.overlays else None,
            ),
            schema=SCHEMA,
            out=out,
            run=config.run,
            weigh=partial(score_bytes, card.resolution),
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
        lines = Path(config.phrases_file).read_text(encoding="utf-8-sig").splitlines() if config.phrases_file else []
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
    """

    def __init__(self, read: Callable[[Row], Asked], resolution: int):
        self.read, self.resolution = read, resolution

    def __call__(self, row: Row) -> Row:
        """Reads one picture.

        Args:
            row: An index row.

        Returns:
            `index` (the index row), `id`, `captions`, `size` (H, W) and `square` float32 [3, R, R].

        Raises:
            BadSample: It can't be decoded.
        """
        image, captions = self.read(row)
        square = images.image_to_tensor(image, self.resolution).numpy()
        return {"index": row, "id": row["id"], "captions": captions, "size": image.shape[:2], "square": square}


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
        return [row | {"status": OK, "squares": squares} for row, squares in zip(rows, found, strict=True)]


class Finish:
    """Squares -> masks at the picture's own size, and what is drawn of them.

    Args:
        threshold: Score above which a pixel is mask.
        png: Folder for a PNG a mask; None: none.
        overlays: Folder for an overlay a picture, and what reads an index row's picture again: photographs that went
            past the networks would hold up a GPU; None: none.
    """

    def __init__(
        self,
        threshold: float,
        *,
        png: Path | None = None,
        overlays: tuple[Path, Callable[[Row], Asked]] | None = None,
    ):
        self.threshold, self.png, self.overlays = threshold, png, overlays

    def __call__(self, row: Row) -> Row:
        """Finishes one picture.

        Args:
            row: As `Predictor` gives it.

        Returns:
            Columns of SCHEMA.

        Raises:
            BadSample: The network gave NaN for every phrase, or the picture can't be read again.
        """
        name, phrases = file_name(row["id"]), list[Row]()
        masks: list[NDArray[np.uint8]] = []  # to be drawn over the picture together
        for n, square in enumerate(row["squares"]):
            # One at a time: at the size of a photograph, the scores of all phrases are gigabytes
            result: Result = square.at(row["size"], self.threshold)
            phrases.append(_measured(result))
            if self.png is not None and not result.failed:
                _save(self.png / name / f"{n:02d}-{file_name(result.caption)}.png", result.mask * 255)
            if self.overlays is not None and not result.failed:
                masks.append(result.mask)
            del result  # before the next one's
        good = [phrase for phrase in phrases if phrase["mask"] is not None]
        if phrases and not good:
            raise BadSample("the network gave NaN for every phrase", file="predict", sample=row["id"])
        if self.overlays is not None:
            folder, read = self.overlays
            _save(folder / f"{name}.png", _overlay(read(row["index"])[0], masks, good))
        place = {"id": row["id"], "height": row["size"][0], "width": row["size"][1]}
        return place | {column: [phrase[one] for phrase in phrases] for column, one in NESTED.items()}


def _measured(result: Result) -> Row:
    """A phrase's part of each list of SCHEMA."""
    if result.failed:
        failed = "failed: the network gave NaN"
        return {"caption": result.caption, "mask": None, "score": None, "area": None, "outcome": failed}
    cut = "ok: the phrase is longer than the text encoder takes and was cut"
    return {
        "caption": result.caption,
        "mask": images.rle_encode(result.mask),
        "score": result.confidence,
        "area": int(np.count_nonzero(result.mask)),
        "outcome": cut if result.truncated else OK,
    }


def _overlay(image: NDArray[np.uint8], masks: list[NDArray[np.uint8]], phrases: list[Row]) -> NDArray[np.uint8]:
    from rlfseg import draw  # with matplotlib: only where something is drawn

    notes = [f"{phrase['score']:.2f}" for phrase in phrases]
    return draw.overlay(image, masks, [phrase["caption"] for phrase in phrases], notes=notes)


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    from rlfseg import draw

    draw.save(path, picture)


def _report(out: Path, notes: tuple[str, ...], counts: Row) -> Row:
    """Bad pictures in a file of their own."""
    write_json(out / "refused.json", counts["refused"])
    return counts | {"notes": notes}
