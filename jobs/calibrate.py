r"""Choose threshold and eps on a validation split and write them into the adapter.

In: an adapter folder and a folder of `prepare`.
Out: the adapter's rlfseg.yaml, OUT/calibration.json, OUT/calibration.png.

    ray job submit --working-dir . \
        --runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://HEAD:5000"}}' -- \
        python -m jobs.calibrate --adapter /nfs/a/train-1/adapter --samples /nfs/a/val --out /nfs/a/calibration
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("calibrate"))
