"""The models that requests may name: the configured list and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from rlfseg import adapter
from rlfseg.adapter import Card
from serve.refusal import Refusal
from serve.schema import Model, Rescale


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model by its name."""

    name: str
    reference: str
    version: str
    card: Card


class Catalog:
    """Cards of the configured models, read when the service starts.

    Args:
        references: Name -> reference; the first is the default.

    Raises:
        ModelError: A reference holds no adapter.
    """

    def __init__(self, references: dict[str, str]):
        self.entries: dict[str, Entry] = {}
        for name, reference in references.items():
            folder = adapter.resolve(reference)
            self.entries[name] = Entry(
                name=name, reference=reference, version=adapter.version(folder), card=adapter.read_card(folder)
            )

    def __getitem__(self, name: str | None) -> Entry:
        """The model of that name, or the default; raises Refusal where there is none."""
        if name is None:
            return next(iter(self.entries.values()))
        if name not in self.entries:
            raise Refusal("not_found", f"model: {name[:100]!r} is none of {', '.join(self.entries)}")
        return self.entries[name]

    def check(self, entry: Entry, rescale: Rescale) -> None:
        """Raises Refusal if the model is not calibrated for a way of rescaling."""
        if rescale not in _calibrated(entry.card):
            raise Refusal("invalid", f"rescale: {rescale} needs a model calibrated for it, and {entry.name} is not")

    def listed(self) -> list[Model]:
        """What `GET /v1/models` tells."""
        return [
            Model(
                name=e.name,
                default=n == 0,
                version=e.version,
                base=e.card.base.rpartition("/")[2],  # a folder of the server is nobody's business
                resolution=e.card.resolution,
                threshold=e.card.threshold,
                rescale=_calibrated(e.card),
            )
            for n, e in enumerate(self.entries.values())
        ]


def _calibrated(card: Card) -> list[Rescale]:
    ways: list[Rescale] = ["none"]
    ways += ["aos"] if card.eps_aos is not None else []
    ways += ["hss"] if card.eps_hss is not None else []
    return ways
