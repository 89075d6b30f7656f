"""The base of an adapter, there before actors begin: each of them would fetch it, all at once."""

from __future__ import annotations

from rlfseg.adapter import Card


def fetch_base(card: Card) -> None:
    """Downloads a base of the hub, unless the cache has it.

    Args:
        card: Of the adapter.

    Raises:
        ModelError: The hub can't be reached and has not been asked before, or it is no base.
    """
    if card.base.startswith("hf:"):  # what lies on this disk is nothing to wait for
        from rlfseg.backbone import resolve_base  # torch and diffusers take seconds to import

        resolve_base(card.base)
