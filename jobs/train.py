r"""Train an adapter by rectified flow with dynamic selection (Eq. 2, 4).

In: a folder of `encode`, and of `prepare` for validation.
Out: OUT/adapter, OUT/curves.png, OUT/overlays, checkpoints, an MLflow run.

    ray job submit --working-dir . \
        --runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://HEAD:5000"}}' -- \
        python -m jobs.train --latents /nfs/a/latents --val_samples /nfs/a/val --workers 8 --out /nfs/a/train-1
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("train"))
