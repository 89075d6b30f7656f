r"""Measure an adapter, or masks already made, at original size.

In: a folder of `prepare` with true masks; an adapter, or a folder of `predict`, `refine` or `prepare`.
Out: OUT/results.json, results.md, iou_by_threshold.png, best.png, worst.png, an MLflow run.

    ray job submit --working-dir . -- \
        python -m jobs.evaluate --adapter runs/a/train-1/adapter --samples runs/a/test --sampling.rescale aos \
        --out runs/a/test-aos
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("evaluate"))
