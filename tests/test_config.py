"""Settings and errors: frozen, strict, and the same in every process."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import pydantic
import pytest
from PIL import Image

from rlfseg.config import (
    BackboneConfig,
    LoraConfig,
    PredictConfig,
    RefineConfig,
    SamplingConfig,
    TrainConfig,
    as_dict,
    digest,
    flatten,
    without_passwords,
)
from rlfseg.errors import BadSample, ConfigError, DataError, ModelError, ResourceError, RlfsegError
from rlfseg.images import MOST_PIXELS


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://u:p/w@host:5432/db", "postgresql://host:5432/db"),
        ("mysql+pymysql://user@host/db", "mysql+pymysql://host/db"),
        ("s3://KEY:SE%2FCRET@bucket/runs?region=x", "s3://bucket/runs?region=x"),
        ("https://token@host/a@b", "https://host/a@b"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("hf:owner/name@main", "hf:owner/name@main"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("models:/name@alias", "models:/name@alias"),
    ],
)
def test_what_others_may_read_has_no_user_and_no_password(uri: str, shown: str) -> None:
    assert without_passwords({"a": [uri, 1], "b": {"c": uri}, "d": None}) == {
        "a": [shown, 1],
        "b": {"c": shown},
        "d": None,
    }


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BackboneConfig().resolution = 64  # type: ignore[misc]


def test_no_more_pixels_may_be_allowed_than_pillow_opens() -> None:
    assert PredictConfig(images="x", out="y", pixels=MOST_PIXELS).pixels == 2 * Image.MAX_IMAGE_PIXELS  # type: ignore[operator]
    with pytest.raises(pydantic.ValidationError, match="pixels"):
        PredictConfig(images="x", out="y", pixels=MOST_PIXELS + 1)


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [({"ranks": 4}, "ranks"), ({"rank": 0}, "rank"), ({"alpha": -1.0}, "alpha"), ({"rank": "many"}, "rank")],
)
def test_wrong_settings_are_refused_by_name(kwargs: dict[str, object], field: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=field):
        LoraConfig(**kwargs)  # type: ignore[arg-type]


def test_the_papers_values() -> None:
    config = TrainConfig(latents="a", out="b")
    assert (config.lora.rank, config.optimizer.lr, config.batch_size, config.epochs, config.seed) == (
        64,
        1e-4,
        8,
        10,
        42,
    )
    assert config.backbone.resolution == 512
    assert config.t_sampling == "uniform"
    assert config.lora.targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert (SamplingConfig().steps, SamplingConfig().hss_steps) == (1, 5)


def test_as_dict_comes_back_through_json() -> None:
    config = TrainConfig(latents="a", out="b", lora=LoraConfig(rank=3, targets=("to_q",)))
    tree = as_dict(config)
    assert json.loads(json.dumps(tree)) == tree
    assert TrainConfig(**tree) == config


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_digest_tells_settings_apart_and_not_their_order() -> None:
    assert digest({"a": 1, "b": {"c": 2}}) == digest({"b": {"c": 2}, "a": 1}) != digest({"a": 1, "b": {"c": 3}})


def test_digest_is_the_same_in_another_process_and_stays_light() -> None:
    code = (
        "import sys; from rlfseg.config import *; "
        "print(digest(as_dict(RefineConfig(samples='s', out='o'))), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [digest(as_dict(RefineConfig(samples="s", out="o"))), "False", "False"]


def test_errors_are_of_one_family() -> None:
    assert issubclass(BadSample, DataError)
    for kind in (ConfigError, DataError, ModelError, ResourceError):
        assert issubclass(kind, RlfsegError)


@pytest.mark.parametrize("sample", ["img [7]", None])
def test_a_bad_sample_survives_the_way_between_processes(sample: str | None) -> None:
    error = BadSample("mask holds 7", file="a.h5", sample=sample)
    back = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(back) is BadSample
    assert (back.reason, back.file, back.sample, str(back)) == ("mask holds 7", "a.h5", sample, str(error))
    assert str(error) == ("a.h5 [img [7]]: mask holds 7" if sample else "a.h5: mask holds 7")
