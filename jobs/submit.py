r"""Run a command as a Ray job, from another machine or from another job, and exit with its code.

In: a command with its settings after `--`, and the repository that it is to run from.
Out: what the job prints.

    ray job submit --working-dir . -- \
        python -m jobs.submit --address http://other-head:8265 -- \
        predict --images /nfs/photos --phrases '[dog]' --out /nfs/masks
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("submit"))
