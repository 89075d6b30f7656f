r"""Segment one picture by phrases, here or by a service.

In: a picture and phrases.
Out: OUT/NAME-00.png, -01.png ... a phrase each, OUT/NAME-overlay.png.

    ray job submit --working-dir . -- \
        python -m jobs.segment /nfs/picture.jpg 'red ring' 'blue star' --out /nfs/masks
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("segment"))
