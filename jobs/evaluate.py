r"""Measure an adapter, or predictions of any system, by named protocols.

In: a folder of `prepare` with true masks; an adapter, or predictions in Parquet, HDF5 or PNGs.
Out: OUT/results.json, results.md, curves.json, curves and overlays as PNGs, an MLflow run.

    ray job submit --working-dir . \
        --runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://HEAD:5000"}}' -- \
        python -m jobs.evaluate --adapter /nfs/a/train-1/adapter --samples /nfs/a/test --sampling.rescale aos \
        --protocol '[rlfseg,clipseg]' --out /nfs/a/test-aos
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("evaluate"))
