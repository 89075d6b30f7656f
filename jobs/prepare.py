r"""Write a data set as HDF5 shards in the paper's layout, with an index.

In: drawn scenes, or a folder of images with mask PNGs and a list of phrases (index.json, .jsonl or .csv).
Out: OUT/*.h5, OUT/index.parquet.

    ray job submit --working-dir . -- \
        python -m jobs.prepare --source folder --path photos/index.json --splits '[train]' --out runs/a/train
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("prepare"))
