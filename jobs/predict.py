r"""Segment many pictures by phrases.

In: a picture, a folder, a glob, a Parquet file with `path` and `phrases`, or a folder of `prepare`.
Out: OUT/data/*.parquet (COCO RLE), OUT/png, OUT/overlays, OUT/refused.json.

    ray job submit --working-dir . -- \
        python -m jobs.predict --adapter /nfs/a/train-1/adapter --images /nfs/photos --phrases '[dog, red car]' \
        --overlays true --out /nfs/masks
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("predict"))
