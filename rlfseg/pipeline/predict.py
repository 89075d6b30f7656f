"""Predict: masks for phrases on many pictures; batches are filled across pictures and phrases, sizes mixed freely."""

from __future__ import annotations

import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa

from rlfseg import adapter, draw, images
from rlfseg.config import PredictConfig, SamplingConfig, as_dict
from rlfseg.errors import BadSample, ConfigError, DataError
from rlfseg.pipeline.folders import file_name, read_table, write_json
from rlfseg.pipeline.rows import OK, Row, Rows, refused
from rlfseg.pipeline.samples import LoadSample, open_samples
from rlfseg.pipeline.stages import Stage, Summary, connect, gpus_per_worker, run_stage
from rlfseg.segmenter import Result, Segmenter, checked_phrase

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

ASKED = pa.schema([("path", pa.string()), ("phrases", pa.list_(pa.string()))])


def run(config: PredictConfig) -> Summary:
    """Segments every picture of `config.images`.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        BadSample: A picture can't be decoded and `on_error` is `stop`.
        ConfigError: There are no pictures, or a picture has no phrases.
        ModelError: The adapter can't be loaded.
    """
    out = Path(config.out).absolute()
    folder = adapter.resolve(config.adapter)
    rows, load = _plan(config, _phrases(config))
    settings = as_dict(config)
    connect()
    return run_stage(
        Stage(
            name="predict",
            rows=rows,
            load=load,
            work=Predictor,
            kwargs={
                "reference": str(folder.absolute()),
                "device": config.device,
                "sampling": config.sampling,
                "threshold": config.threshold,
                "png": out / "png" if config.png else None,
                "overlays": out / "overlays" if config.overlays else None,
            },
            schema=SCHEMA,
            out=out,
            run=config.run,
            gpus=gpus_per_worker(config.run, config.device),
            identity={
                k: settings[k]
                for k in ("images", "phrases", "phrases_file", "sampling", "threshold", "png", "overlays")
            }
            | {"adapter": adapter.version(folder)},
            on_error=config.on_error,
            finalize=partial(_report, out),
        )
    )


class Predictor:
    """The per-batch work: holds one segmenter.

    Args:
        reference: Adapter folder.
        device: `auto`, `cpu` or `cuda`.
        sampling: How masks are sampled.
        threshold: Score above which a pixel is mask; None: the adapter's own.
        png: Folder for a PNG a mask; None: none.
        overlays: Folder for an overlay a picture; None: none.
        segmenter: A loaded one, instead of `reference`.
    """

    def __init__(
        self,
        reference: str = "tiny",
        *,
        device: str = "auto",
        sampling: SamplingConfig | None = None,
        threshold: float | None = None,
        png: Path | None = None,
        overlays: Path | None = None,
        segmenter: Segmenter | None = None,
    ):
        self.segmenter = segmenter or Segmenter.load(reference, device=device)
        self.sampling, self.threshold, self.png, self.overlays = sampling, threshold, png, overlays

    def __call__(self, rows: Rows) -> Rows:
        """Rows `id`, `image`, `captions` in; columns of SCHEMA out."""
        results = self.segmenter.segment(
            [r["image"] for r in rows],
            [r["captions"] for r in rows],
            sampling=self.sampling,
            threshold=self.threshold,
        )
        return [self._row(row, own) for row, own in zip(rows, results, strict=True)]

    def _row(self, row: Row, results: list[Result]) -> Row:
        if results and all(r.failed for r in results):
            return refused(row, "the network gave NaN for every phrase")
        masks = [None if r.failed else r.mask for r in results]
        self._draw(row, results)
        return {
            "id": row["id"],
            "status": OK,
            "height": row["image"].shape[0],
            "width": row["image"].shape[1],
            "captions": [r.caption for r in results],
            "masks": [None if m is None else images.rle_encode(m) for m in masks],
            "scores": [None if r.failed else r.confidence for r in results],
            "areas": [None if m is None else int(m.sum()) for m in masks],
            "outcomes": [_outcome(r) for r in results],
        }

    def _draw(self, row: Row, results: list[Result]) -> None:
        name, good = file_name(row["id"]), [r for r in results if not r.failed]
        if self.png is not None:
            for n, r in enumerate(good):
                draw.save(self.png / name / f"{n:02d}-{file_name(r.caption)}.png", r.mask * 255)
        if self.overlays is not None:
            picture = draw.overlay(
                row["image"],
                [r.mask for r in good],
                [r.caption for r in good],
                notes=[f"{r.confidence:.2f}" for r in good],
            )
            draw.save(self.overlays / f"{name}.png", picture)


def _outcome(result: Result) -> str:
    if result.failed:
        return "failed: the network gave NaN"
    return "ok: the phrase is longer than the text encoder takes and was cut" if result.truncated else OK


# --- what to work on -------------------------------------------------------------------------------------------------


def _phrases(config: PredictConfig) -> list[str]:
    lines = Path(config.phrases_file).read_text(encoding="utf-8").splitlines() if config.phrases_file else []
    try:
        return [checked_phrase(p) for p in (*config.phrases, *(line for line in lines if line.strip()))]
    except BadSample as error:
        raise ConfigError(str(error)) from error


def _plan(config: PredictConfig, phrases: list[str]) -> tuple[pa.Table, Callable[[Row], Row]]:
    """Index rows and how to load one."""
    source = Path(config.images)
    if (source / "_STARTED.json").is_file():
        samples = open_samples(source)
        return samples.rows, LoadPrepared(samples.folder, phrases)
    if source.suffix == ".parquet" and source.is_file():
        asked = {path: [*own, *phrases] for path, own in _listed(source).items()}
    else:
        asked = {str(p.absolute()): phrases for p in _files(config.images)}
    if not asked:
        raise ConfigError(
            f"images: {config.images} names no picture; give a picture, a folder, a glob or a Parquet file"
        )
    silent = next((path for path, own in asked.items() if not own), None)
    if silent is not None:
        raise ConfigError(f"phrases: empty, and {silent} brings none of its own; give e.g. --phrases '[\"red ring\"]'")
    return pa.table({"id": list(asked), "captions": list(asked.values())}), load_picture


def _listed(source: Path) -> dict[str, list[str]]:
    """Pictures and their phrases in a Parquet file with the columns `path` and `phrases`; DataError names a bad row."""
    try:
        table = read_table(source, ["path", "phrases"]).cast(ASKED)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"images: {source}: needs `path`, text, and `phrases`, lists of text ({error})") from error
    asked: dict[str, list[str]] = {}
    for n, row in enumerate(table.to_pylist()):
        path = str(Path(row["path"] or "").absolute())
        if not row["path"] or "\0" in path:
            raise DataError(f"images: {source}, row {n}: {row['path']!a} is no path")
        try:
            asked.setdefault(path, []).extend(checked_phrase(p or "") for p in row["phrases"] or ())
        except BadSample as error:
            raise DataError(f"images: {source}, row {n}: {error.reason}") from error
    return asked


def _files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return images.list_images(path)
    if path.is_file():
        return [path]
    return sorted(Path(p) for p in glob.glob(pattern, recursive=True))


def load_picture(row: Row) -> Row:
    """Decodes the picture at the path that is the row's id.

    Args:
        row: An index row.

    Returns:
        The row with `image`, uint8 RGB [H, W, 3].

    Raises:
        BadSample: It can't be decoded.
    """
    return row | {"image": images.load_image(row["id"], name=row["id"])}


class LoadPrepared:
    """Loads pictures of a folder of `prepare`; their own captions are asked where no phrases are given."""

    def __init__(self, folder: Path, phrases: list[str]):
        self.load, self.phrases = LoadSample(folder), phrases

    def __call__(self, row: Row) -> Row:
        """Reads one sample.

        Args:
            row: An index row.

        Returns:
            The row with pixels.

        Raises:
            BadSample: It is damaged, or a phrase of it is empty.
        """
        loaded = self.load(row)
        captions = self.phrases or [checked_phrase(c) for c in loaded["captions"]]
        return {"id": row["id"], "image": loaded["image"], "captions": captions}


def _report(out: Path, counts: Row) -> Row:
    """Bad pictures in a file of their own."""
    write_json(out / "refused.json", counts["refused"])
    return counts
