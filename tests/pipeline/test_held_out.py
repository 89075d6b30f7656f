"""What training validates on: samples that can't be used are left out by name instead of ending it."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from rlfseg import hdf5
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, LoraConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.loop import _held_out
from rlfseg.training import TrainState

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Four samples: one is whole, one has an empty phrase too, one has no other, one lost its picture."""
    out = tmp_path / "val"
    begin(out, {})
    scenes = {name: draw_scene(n, split="val", size=32) for n, name in enumerate(("whole", "part", "mute", "damaged"))}
    empty = hdf5.Labelled(caption=" ", mask=np.ones((32, 32), np.uint8))
    phrases = {
        name: tuple(hdf5.Labelled(caption=p.caption, mask=p.mask) for p in scene.phrases)
        for name, scene in scenes.items()
    }
    phrases |= {"part": (empty, *phrases["part"]), "mute": (empty,)}
    samples = [hdf5.Sample(id=name, image=scene.image, phrases=phrases[name]) for name, scene in scenes.items()]
    hdf5.write_shard(out / "a.h5", samples)
    hdf5.build_index(out)
    with h5py.File(out / "a.h5", "a") as file:
        del file["damaged/image"]
    finish(out, {}, {"rows_in": 4})
    return out


def test_empty_phrases_and_damaged_samples_are_left_out_of_validation_by_name(odd: Path) -> None:
    config = TrainConfig(out="", latents="", val_samples=str(odd), backbone=TINY)
    held_out, left_out = _held_out(config, 0, 1)
    whole, part = (draw_scene(n, split="val", size=32) for n in (0, 1))
    by_size = sorted(held_out, key=lambda s: not np.array_equal(s.image, whole.image))
    for sample, scene in zip(by_size, (whole, part), strict=True):
        np.testing.assert_array_equal(sample.image, scene.image)
        assert sample.phrases == [p.caption for p in scene.phrases]
        np.testing.assert_array_equal(sample.masks, [p.mask for p in scene.phrases])
    damaged, *empty = sorted(left_out)
    assert damaged.startswith(f"left out of validation: {odd / 'a.h5'} [damaged]: ")
    assert empty == [f"left out of validation: 1 empty phrases of {name}" for name in ("mute", "part")]
    backbone = Backbone.load(TINY)
    backbone.add_lora(LoraConfig(rank=2))
    sums, _ = TrainState(config, backbone, total_steps=1).validate(held_out, Card(base="tiny", resolution=64))
    assert sums.results()["n_samples"] == len(whole.phrases) + len(part.phrases)


def test_ranks_share_them(odd: Path) -> None:
    config = TrainConfig(out="", latents="", val_samples=str(odd), val_images=3, backbone=TINY)
    alone, shares = _held_out(config, 0, 1), [_held_out(config, rank, 2) for rank in range(2)]
    assert sum(len(held_out) for held_out, _ in shares) == len(alone[0])
    assert sorted(line for _, lines in shares for line in lines) == sorted(alone[1])
    assert _held_out(TrainConfig(out="", latents=""), 0, 1) == ([], [])
