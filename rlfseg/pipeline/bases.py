"""What an adapter stands on, there before actors begin: each of them would fetch it, all at once."""

from __future__ import annotations

from rlfseg.adapter import Card
from rlfseg.hub import resolve_base, resolve_tiny
from rlfseg.pipeline.folders import weights


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
