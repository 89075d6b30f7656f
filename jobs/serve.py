r"""Serve models over HTTP on one machine; on a cluster use `serve deploy serve/config.yaml`.

In: adapters by name.
Out: a page and an API on http://127.0.0.1:8000; docs/serving.md tells how to open it to others safely.

    python -m jobs.serve --models.photos runs/a/train-1/adapter
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("serve"))
