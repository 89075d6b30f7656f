"""Step 5 of the drawn world: puts the trained weights into the package as fp16, and their logs into docs/tiny_world."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from rlfseg import adapter

ROOT = Path(__file__).resolve().parents[2]


def halve(path: Path, target: Path) -> None:
    """Writes a safetensors file's float32 weights as float16."""
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = load_file(path)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, target, metadata={"format": "pt"}
    )


def copy_text(path: Path, target: Path) -> None:
    """Copies a text file without the line in which diffusers notes the folder that it was made in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in path.read_text().splitlines(keepends=True) if '"_name_or_path": "/' not in line]
    target.write_text("".join(kept))


def main() -> None:
    """Copies base, SAM, adapter and the tiny autoencoder, of those that were trained."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--runs", type=Path, default=Path("runs/tiny_world"), help="folder of steps 1 to 4")
    runs = p.parse_args().runs
    for part in ("base", "sam", "adapter", "autoencoder_tiny"):
        if not (runs / part).is_dir():
            continue  # what is shipped stays
        assets = ROOT / "rlfseg" / "assets" / part
        shutil.rmtree(assets, ignore_errors=True)
        for path in sorted((runs / part).rglob("*")):
            target = assets / path.relative_to(runs / part)
            if path.suffix == ".safetensors":
                halve(path, target)
            elif path.suffix in (".json", ".yaml", ".md", ".txt") and path.is_file():
                copy_text(path, target)
    assets = ROOT / "rlfseg" / "assets"
    card = adapter.read_card(assets / "adapter")
    if not card.base_weights:  # trained before cards had it
        adapter.write_card(assets / "adapter", replace(card, base_weights=adapter.weights_hash(assets / "base")))
    for part in ("vae", "base", "sam", "adapter", "autoencoder_tiny"):
        log = runs / part / "log.jsonl"
        if log.is_file():
            (ROOT / "docs" / "tiny_world").mkdir(parents=True, exist_ok=True)
            shutil.copy(log, ROOT / "docs" / "tiny_world" / f"{part}.jsonl")


if __name__ == "__main__":
    main()
