"""Refine: labels through SAM (Eq. 3, Algorithm 1), one embedding an image, all its objects in lockstep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from rlfseg import hdf5, refine
from rlfseg.config import RefineConfig, as_dict
from rlfseg.images import rle_encode
from rlfseg.pipeline.cluster import connect, gpus_per_worker
from rlfseg.pipeline.folders import good_rows, weights
from rlfseg.pipeline.rows import OK, Row, Rows
from rlfseg.pipeline.samples import LoadSample, open_samples
from rlfseg.pipeline.stages import Stage, Summary, run_stage
from rlfseg.refine import Answer, Prompt
from rlfseg.sam import Embedding, SamModel, find_weights

SCHEMA = pa.schema(
    [
        hdf5.INDEX_SCHEMA.field("id"),
        ("status", pa.string()),
        *list(hdf5.INDEX_SCHEMA)[1:],
        ("masks", pa.list_(pa.string())),  # COCO RLE counts of the label to use
        ("outcomes", pa.list_(pa.string())),  # `refined`, or `kept: ` and why
        ("rounds", pa.list_(pa.int32())),
        ("iou", pa.list_(pa.float32())),  # with the original
        ("sam_iou", pa.list_(pa.float32())),  # SAM's own estimate; null where SAM wasn't asked
    ]
)


def run(config: RefineConfig) -> Summary:
    """Refines every label of `config.samples`.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals, seconds, and as figures how many labels were refined and why the others were kept.

    Raises:
        BadSample: A sample can't be read and `on_error` is `stop`.
        ConfigError: The checkpoint's architecture isn't told.
        ModelError: The SAM checkpoint can't be loaded.
    """
    samples = open_samples(config.samples)
    out = Path(config.out).absolute()
    settings = as_dict(config)
    sam = weights(find_weights(config.sam))
    connect()
    return run_stage(
        Stage(
            name="refine",
            rows=samples.rows,
            load=LoadSample(samples.folder),
            work=Refiner,
            kwargs={"config": config},
            schema=SCHEMA,
            out=out,
            run=config.run,
            gpus=gpus_per_worker(config.run, config.sam.device),
            arithmetic="fp32",
            identity=samples.identity
            | {k: settings[k] for k in ("anchors", "max_rounds", "tau", "guard", "seed")}
            | {"sam_weights": sam},
            on_error=config.on_error,
            finalize=partial(_count, out),
        )
    )


class Refiner:
    """The per-image work: holds one SAM.

    Args:
        config: Algorithm 1's settings.
        sam: A loaded SAM; default: the one that the config names.
    """

    def __init__(self, config: RefineConfig, sam: SamModel | None = None):
        self.config = config
        self.sam = sam or SamModel.load(config.sam)

    def __call__(self, rows: Rows) -> Rows:
        """Rows with `image`, `labels` and `instances` in; columns of SCHEMA out."""
        return [self._image(row) for row in rows]

    def _image(self, row: Row) -> Row:
        c = self.config
        refined = refine.refine_image(
            self._predict(self.sam.embed(row["image"])),
            row["labels"],
            row["instances"],
            n_anchors=c.anchors,
            max_rounds=c.max_rounds,
            tau=c.tau,
            guard=c.guard,
            seed=c.seed,
        )
        return {k: row.get(k) for k in hdf5.INDEX_SCHEMA.names} | {
            "status": OK,
            "masks": [rle_encode(r.mask) for r in refined],
            "outcomes": [r.status for r in refined],
            "rounds": [r.rounds for r in refined],
            "iou": [r.iou for r in refined],
            "sam_iou": [r.sam_iou for r in refined],
        }

    def _predict(self, embedding: Embedding) -> refine.Predict:
        def predict(prompts: Sequence[Prompt]) -> list[Answer]:
            points = np.stack([p.points for p in prompts])
            if prompts[0].logits is None:
                masks, low, iou = self.sam.predict(
                    embedding, points, masks=np.stack([p.mask for p in prompts if p.mask is not None])
                )
            else:
                masks, low, iou = self.sam.predict(
                    embedding, points, logits=np.stack([p.logits for p in prompts if p.logits is not None])
                )
            return [Answer(mask=m, logits=z, iou=float(i)) for m, z, i in zip(masks, low, iou, strict=True)]

        return predict


def _count(out: Path, counts: Row) -> Row:
    """Adds how many labels were refined, and why the others were kept, the commonest first."""
    outcomes = Counter(outcome for row in good_rows(out, ["outcomes"]) for outcome in row["outcomes"])
    return counts | {"figures": dict(outcomes.most_common())}
