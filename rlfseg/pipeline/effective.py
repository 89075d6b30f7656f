"""What an evaluation computes and on what, resolved before it begins and written beside its figures."""

from __future__ import annotations

from pathlib import Path

import rlfseg
from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.config import EvaluateConfig, as_dict
from rlfseg.hdf5.check import Place, stored_text
from rlfseg.hdf5.reading import opened
from rlfseg.pipeline.bases import Opened
from rlfseg.pipeline.predictions import Predictions
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import Samples

MASK_THRESHOLD = 0.5  # for predictions already made, where none is given
AS_GIVEN = ("clipseg_side", "refer_side", "present_only", "resamples", "seed")


def what(config: EvaluateConfig, samples: Samples, used: Opened | None, found: Predictions | None) -> Row:
    """The settings that took effect, and what tells the inputs from others.

    Args:
        config: Settings of the command.
        samples: The set.
        used: The adapter, or None.
        found: The predictions, where there is no adapter.

    Returns:
        Plain values for JSON: `threshold` and `threshold_from`, the protocols' settings, `adapter` with `sampling`, or
        `predictions` with `png_values`, `samples` and how their `truth` was made.
    """
    settings = as_dict(config)
    threshold, threshold_from = _threshold(config, None if used is None else used.card)
    effective: Row = {"rlfseg": rlfseg.__version__, "threshold": threshold, "threshold_from": threshold_from}
    effective |= {k: settings[k] for k in AS_GIVEN}
    if used is None:
        mark = None if found is None else found.fingerprint
        effective |= {"predictions": str(Path(config.predictions or "").absolute()), "predictions_fingerprint": mark}
        effective |= {"png_values": config.png_values}
    else:
        effective |= {"adapter": config.adapter, "adapter_version": adapter.version(used.folder)}
        effective |= {"base": used.card.base, "base_only": config.base_only, "autoencoder": config.fast.autoencoder}
        effective |= {"sampling": settings["sampling"] | {"eps": used.card.eps(config.sampling)}}
    marks = {"samples": str(Path(config.samples).absolute()), "samples_fingerprint": samples.fingerprint}
    return effective | marks | {"truth": _truth(samples)}


def _threshold(config: EvaluateConfig, card: Card | None) -> tuple[float, str]:
    """The score above which a pixel is mask, and who says so."""
    if config.threshold is not None:
        return config.threshold, "--threshold"
    if card is None:
        return MASK_THRESHOLD, "the default for predictions"
    return card.threshold, f"the adapter's card, {'not ' if card.eps_aos is None else ''}calibrated"


def _truth(samples: Samples) -> dict[str, str | None]:
    """Data set and rasteriser of the true masks, as a shard names them."""
    shard = next(iter(samples.rows["shard"].to_pylist()), None)
    if shard is None:
        return {}
    path = str(samples.folder / shard)
    with opened(path) as file, Place(path).reading():
        return {name: stored_text(file, name) for name in ("source", "rasteriser")}


def notes(config: EvaluateConfig, effective: Row) -> tuple[str, ...]:
    """What makes figures mean something else than their protocol's name says, a line each."""
    rule = effective["truth"].get("rasteriser")
    if "phrasecut" not in config.protocols or rule == "pil":
        return ()
    drawn = f"drawn by {rule}" if rule else "not known to be drawn by pil"
    return (f"phrasecut: the true masks are {drawn}; PhraseCut's own figures are on masks drawn by pil",)
