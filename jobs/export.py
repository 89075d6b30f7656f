r"""Write an adapter for diffusers, or refined labels as HDF5.

In: an adapter, or a folder of `refine`.
Out: OUT/pytorch_lora_weights.safetensors for `pipe.load_lora_weights(OUT)`; or OUT/*.h5 in the paper's layout and
OUT/index.parquet.

    ray job submit --working-dir . -- \
        python -m jobs.export --adapter /nfs/a/train-1/adapter --out /nfs/a/diffusers
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("export"))
