r"""Measure rlfseg's ways against the plain ones, as ratios in one run.

In: nothing.
Out: a table, OUT/bench.json (a list of its rows), OUT/machine.json, an MLflow run.

    ray job submit --entrypoint-num-gpus 1 --working-dir . \
        --runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://HEAD:5000"}}' -- \
        python -m jobs.bench data model --out /nfs/bench
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("bench"))
