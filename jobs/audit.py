r"""Find the images that two sets share, by COCO ids and by perceptual hashes.

In: two folders of `prepare`, or of pictures.
Out: OUT/audit.json, OUT/exclude_ids.txt for `prepare --exclude_ids`, OUT/pairs.png.

    ray job submit --working-dir . -- \
        python -m jobs.audit /nfs/a/train /nfs/a/test --run.workers 8 --out /nfs/a/audit
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("audit"))
