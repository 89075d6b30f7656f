r"""Encode images and masks into latents, once.

In: a folder of `refine` (both labels) or of `prepare` (original labels only).
Out: OUT/data/*.parquet: latents in fp16.

    ray job submit --working-dir . -- \
        python -m jobs.encode --samples /nfs/a/refined --run.workers 8 --out /nfs/a/latents
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("encode"))
