r"""Write a data set as HDF5 shards in the paper's layout, with an index.

In: drawn scenes, or a data set in its own form: PhraseCut, RefCOCO, RefCOCO+, G-Ref, gRefCOCO, COCO, COCO-Stuff,
LabelMe, HDF5, or images with mask PNGs and a list of phrases (docs/data.md).
Out: OUT/*.h5, OUT/index.parquet.

    ray job submit --working-dir . -- \
        python -m jobs.prepare --source folder --path /nfs/photos/index.json --splits '[train]' --out /nfs/a/train
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("prepare"))
