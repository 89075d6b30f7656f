"""An adapter and what it stands on, there before actors begin: each of them would fetch it, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.config import SamplingConfig
from rlfseg.hub import resolve_base, resolve_tiny
from rlfseg.pipeline.folders import weights


class Opened(NamedTuple):
    """An adapter as a job has found it when it began: `calibrate` may write its card anew at any time."""

    folder: Path
    card: Card


def open_adapter(reference: str, sampling: SamplingConfig) -> Opened:
    """Finds an adapter, refuses what its actors would refuse, and has its base there before they ask for it.

    Args:
        reference: See `adapter.resolve`.
        sampling: How masks will be sampled.

    Returns:
        Its folder and card.

    Raises:
        ConfigError: Settings of sampling don't go together, or rescaling has no eps.
        ModelError: It or its base isn't there, or the hub can't be reached.
    """
    folder = adapter.resolve(reference).absolute()
    card = adapter.read_card(folder)
    check_sampling(sampling, card)
    fetch_base(card)
    return Opened(folder, card)


def check_sampling(config: SamplingConfig, card: Card) -> None:
    """Refuses on the driver what the actors would refuse.

    Args:
        config: How masks are sampled.
        card: Of the adapter, for its eps.

    Raises:
        ConfigError: Settings don't go together, or rescaling has no eps.
    """
    if config.rescale != "none":
        from rlfseg import sampling  # torch takes seconds to import

        sampling.check(config.steps, config.rescale, card.eps(config))


def fetch_base(card: Card) -> None:
    """Downloads a base of the hub, unless the cache has it.

    Args:
        card: Of the adapter.

    Raises:
        ModelError: The hub can't be reached and has not been asked before, or it is no base.
    """
    if card.base.startswith("hf:"):  # what lies on this disk is nothing to wait for
        resolve_base(card.base)


def fetch_autoencoder(reference: str | None) -> str | None:
    """Downloads a tiny autoencoder of the hub, unless the cache has it.

    Args:
        reference: See `FastConfig.autoencoder`; None: the base's own is used.

    Returns:
        The reference with a hash of its weights, for the identity of a job; None without one.

    Raises:
        ModelError: It isn't there, or the hub can't be reached.
    """
    return None if reference is None else f"{reference} ({weights(resolve_tiny(reference))})"
