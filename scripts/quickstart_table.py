"""Gathers the quickstart's figures into results.json, prints them, and says where to look."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROWS = (
    ("miou_base", "test-base", "base without the adapter, one step"),
    ("miou_one_step", "test-one-step", "trained just now, one step (Eq. 5)"),
    ("miou_five_steps", "test-five-steps", "five Euler steps (Table 9)"),
    ("miou_aos", "test-aos", "one step with AOS (Eq. 6-7)"),
    ("miou_hss", "test-hss", "one step with HSS (Eq. 8-10)"),
    ("miou_shipped", "test-shipped", "the shipped adapter, one step"),
    ("iou_coarse_labels", "labels-coarse", "polygon-like labels against exact masks"),
    ("iou_refined_labels", "labels-refined", "the same labels refined by SAM"),
)


def main(out: Path, seconds: int) -> None:
    """Reads each evaluation's results.json."""
    found = {key: json.loads((out / folder / "results.json").read_text()) for key, folder, _ in ROWS}
    results = {"seconds": seconds} | {key: found[key]["miou"] for key, _, _ in ROWS}
    results["n_test"] = found["miou_one_step"]["n_samples"]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    table = Table(
        title=f"{results['n_test']} phrases on held-out scenes, exact masks, original size; {seconds} s in all"
    )
    for name in ("", "mIoU", "oIoU", "P@0.9", "AP (pooled)", "boundary IoU"):
        table.add_column(name, justify="left" if not name else "right")
    for key, _, what in ROWS:
        r = found[key]
        table.add_row(what, *(f"{r[k]:.3f}" for k in ("miou", "oiou", "p@0.9", "ap_pooled", "boundary_iou")))
    Console(width=110).print(table)
    print(f"""
First       source .venv/bin/activate
Look at     {out}/test-one-step/best.png and worst.png, {out}/masks/overlays/, {out}/train-1/curves.png
Compare     mlflow ui --backend-store-uri sqlite:///{Path("runs/mlflow.db").absolute()}
In Python   from rlfseg import Segmenter; Segmenter.load("{out}/train-1/adapter")("picture.png", ["red ring"])
Try next    rlfseg predict --images {out}/test --phrases '[star, blue circle]' --overlays true --out runs/stars
            rlfseg train --help        the paper's setting: jobs/configs/paper/, jobs/paper.sh
""")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
