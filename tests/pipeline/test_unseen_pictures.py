"""A node that doesn't see the pictures, for want of a mount: that is no fault of theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import cloudpickle

from rlfseg.errors import BadSample, ConfigError
from rlfseg.hdf5 import Labelled, Sample, write_shard
from rlfseg.pipeline.pictures import Asked, Pictures, find

BLACK = np.zeros((4, 9, 3), np.uint8)


def pictures(folder: Path, kind: str) -> Pictures:
    """Two of them in `photos`, and what finds them."""
    photos = folder / "photos"
    photos.mkdir()
    for name in "ab":
        if kind == "HDF5":
            ring = Labelled(caption="ring", mask=np.ones((4, 9), np.uint8))
            write_shard(photos / f"{name}.h5", [Sample(id=name, image=BLACK, phrases=(ring,))])
        else:
            Image.fromarray(BLACK).save(photos / f"{name}.png")
    if kind == "list":
        pq.write_table(pa.table({"path": [str(p) for p in photos.iterdir()]}), folder / "list.parquet")
    return find(str(folder / "list.parquet" if kind == "list" else photos), ["ring"], "phrases")


@pytest.mark.parametrize("kind", ["folder", "list", "HDF5"])
def test_it_ends_the_job_and_refuses_none_of_them(tmp_path: Path, kind: str) -> None:
    found, photos = pictures(tmp_path, kind), tmp_path / "photos"
    row = min(found.rows.to_pylist(), key=lambda row: str(row["id"]))

    def read() -> Asked:
        """In another process."""
        reader = cloudpickle.loads(cloudpickle.dumps(found.read))
        asked: Asked = reader(row)
        return asked

    assert len(read()) == 2
    told = rf"^images: {photos} is not seen by .*; all nodes must share it"
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=told):
        read()
    photos.mkdir()  # where it would be mounted
    with pytest.raises(ConfigError, match=told):
        read()
    photos.rmdir()
    (tmp_path / "elsewhere").rename(photos)
    next(photos.glob("a.*")).unlink()  # one that is gone is refused alone
    with pytest.raises(BadSample, match=r"a\.(png|h5)"):
        read()
