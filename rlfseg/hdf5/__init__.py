"""Samples in HDF5: the paper's layout (A.3.2), written whole or not at all, and read with suspicion.

    {id}/image                  uint8 [H, W, 3], RGB
    {id}/mask/{caption}         uint8 {0, 1} [H, W], gzip, one chunk
    {id}/instances/{caption}    ours: uint8 {0, 1} [n, H, W], gzip, a chunk each; their OR is the mask

A name is the escaped id or caption (`escape`), with `#2`, `#3` ... where it is taken: one phrase asked twice stays two.
The attributes `id` and `caption` hold them exactly, `task` a phrase's id in the source, `coco_id` a picture's in COCO,
`digest` a hash of the whole sample, which `verify` compares; phrases keep their order.
Without these attributes, as in the authors' own files, a name is taken literally and nested groups are joined with `/`;
a name that isn't UTF-8 is read as Latin-1. Captions that differ only in case or in Unicode normal form are different;
text with a lone surrogate is refused, since neither HDF5 nor Arrow nor a tokenizer can hold it.

    samples.py    what a sample is, and how texts become names
    writing.py    files, whole or not at all
    reading.py    one sample at a time, `Reader` for many files
    check.py      what no file is believed: links, filters, sizes
    child.py      files of others, read in a child process first
    index.py      a row an image over all shards, Parquet
"""

from rlfseg.hdf5.child import Seen, preflight
from rlfseg.hdf5.index import (
    INDEX,
    INDEX_SCHEMA,
    SUFFIXES,
    add_columns,
    build_index,
    id_hash,
    list_shards,
    read_index,
)
from rlfseg.hdf5.reading import Reader, iter_ids, read_captions, read_image, read_sample
from rlfseg.hdf5.samples import Labelled, Sample, check_sample, escape, unescape
from rlfseg.hdf5.writing import write_shard

__all__ = [
    "INDEX",
    "INDEX_SCHEMA",
    "SUFFIXES",
    "Labelled",
    "Reader",
    "Sample",
    "Seen",
    "add_columns",
    "build_index",
    "check_sample",
    "escape",
    "id_hash",
    "iter_ids",
    "list_shards",
    "preflight",
    "read_captions",
    "read_image",
    "read_index",
    "read_sample",
    "unescape",
    "write_shard",
]
