r"""Show what is in files of samples: counts, sizes, captions, masks, problems, a contact sheet.

In: HDF5 files or folders of some, of any origin.
Out: a table, OUT/contents.json, OUT/contact_sheet.png.

    ray job submit --working-dir . -- \
        python -m jobs.inspect /nfs/a/train /nfs/their_phrasecut.h5 --out /nfs/look
"""

import sys

from rlfseg import cli

if __name__ == "__main__":
    sys.exit(cli.main("inspect"))
