r"""Read everything in files and folders, and fail at the first damage.

In: HDF5 files, pictures, lists of phrases, Parquet files, adapters, folders of any command.
Out: exit code 0 if all is whole, else 1 and what is damaged.

    ray job submit --working-dir . -- \
        python -m jobs.verify /nfs/a/train /nfs/a/refined /nfs/a/latents /nfs/a/train-1
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("verify"))
