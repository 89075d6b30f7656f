r"""Refine polygon-like labels with SAM (Eq. 3, Algorithm 1).

In: a folder of `prepare`.
Out: OUT/data/*.parquet: a refined mask a phrase, or why the original was kept.

    ray job submit --working-dir . -- \
        python -m jobs.refine --samples /nfs/a/train --sam.checkpoint /nfs/sam_vit_h_4b8939.pth --run.workers 8 \
        --out /nfs/a/refined
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("refine"))
