"""Draws docs/masks.png: the first scenes of the test split, what the shipped model makes of them, and the truth."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from rlfseg import Segmenter, draw
from rlfseg.datasets.shapes import draw_scene
from rlfseg.metrics import iou

COLUMNS, TARGET = 4, Path(__file__).resolve().parents[1] / "docs" / "masks.png"


def main() -> None:
    scenes = [draw_scene(n, split="test", size=64) for n in range(COLUMNS)]
    phrases = [[p.caption for p in s.phrases] for s in scenes]
    truth = [[p.mask for p in s.phrases] for s in scenes]
    found = Segmenter.load("tiny").segment([s.image for s in scenes], phrases)
    masks = [[r.mask for r in own] for own in found]
    notes = [[f"{iou(m, t):.2f}" for m, t in zip(*pair, strict=True)] for pair in zip(masks, truth, strict=True)]
    rows = [
        [draw.overlay(s.image, m, p, notes=n) for s, m, p, n in zip(scenes, masks, phrases, notes, strict=True)],
        [draw.overlay(s.image, t, p) for s, t, p in zip(scenes, truth, phrases, strict=True)],
    ]
    sheet = draw.contact_sheet(rows, notes=["one step, with IoU", "truth"])
    Image.fromarray(sheet).quantize(64).save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
