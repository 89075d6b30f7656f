"""Blank pictures for annotations whose photographs aren't at hand: every outline and label map can then be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def complete(folder: Path, photos: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
    """A new folder with all pictures.

    Args:
        folder: To be made.
        photos: Photographs, used where they are there.
        sizes: A picture's file name -> (width, height).

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    for name, size in sizes.items():
        if (photos / name).is_file():
            (folder / name).symlink_to(photos / name)
        else:
            Image.new("RGB", size, "grey").save(folder / name)
    return folder
