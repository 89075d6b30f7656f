"""SamModel against segment_anything's own SamPredictor and ResizeLongestSide, with the shipped tiny SAM."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from rlfseg.config import SamConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ConfigError, ModelError
from rlfseg.metrics import iou
from rlfseg.refine import anchors
from rlfseg.sam import SamModel, build_tiny

SIDE = 128  # of the tiny SAM's frame; mask prompts have half of it
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def model() -> SamModel:
    return SamModel.load(SamConfig(device="cpu"))


@pytest.fixture
def prompts(model: SamModel) -> Iterator[list[dict[str, Any]]]:
    """What SAM's prompt encoder is asked while a test runs."""
    seen: list[dict[str, Any]] = []
    hook = model.sam.prompt_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    yield seen
    hook.remove()


def picture(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[Array, Array]:
    """A red rectangle (top, left, bottom, right) on grey, and its mask."""
    image = np.full((height, width, 3), 110, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[box[0] : box[2], box[1] : box[3]] = 1
    image[mask == 1] = (214, 48, 44)
    return image, mask


def object_of(index: int) -> tuple[Array, Array, Array]:
    scene = draw_scene(index, split="test")
    return scene.image, scene.phrases[0].instances[0], scene.phrases[0].coarse_instances[0]


# --- the mask prompt ----------------------------------------------------------------------------------------------


@pytest.mark.fault("sam-01")
def test_the_mask_prompt_is_logits_and_helps(model: SamModel, prompts: list[dict[str, Any]]) -> None:
    image, square = picture(64, 64, (14, 20, 40, 46))
    embedding, points = model.embed(image), anchors(square, 1, 0)
    refined = model.predict(embedding, points[None], masks=square[None])[0][0]
    given = prompts[0]["masks"]
    assert given.shape == (1, 1, 64, 64)
    assert given.dtype == torch.float32
    assert ((given[0, 0] > 0).numpy() == (square == 1)).all()
    assert given.abs().min() >= 8
    without = predictor(model, image).predict(points, np.ones(1), multimask_output=False)[0][0]
    assert iou(refined, square) >= max(0.8, iou(without.astype(np.uint8), square))


@pytest.mark.fault("sam-03")
def test_the_mask_prompt_lies_in_sams_padded_frame(model: SamModel, prompts: list[dict[str, Any]]) -> None:
    image, mask = picture(320, 640, (110, 520, 230, 640))
    refined = model.predict(model.embed(image), anchors(mask, 4, 0)[None], masks=mask[None])[0][0]
    prompt = prompts[0]["masks"][0, 0].numpy()
    official = ResizeLongestSide(SIDE // 2).apply_image(mask * 255) > 127
    assert official.shape == (32, 64)
    assert iou((prompt[:32] > 0).astype(np.uint8), official.astype(np.uint8)) > 0.95
    assert (prompt[32:] == -10).all()
    shift = np.abs(np.mean(np.nonzero(refined), axis=1) - np.mean(np.nonzero(mask), axis=1))
    assert shift.max() < 10  # two pixels of the tiny SAM's frame
    assert iou(refined, mask) > 0.8


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (97, 33), (1, 600), (600, 1), (3, 500), (1, 1)])
def test_any_size_fits_the_frame_as_segment_anything_fits_it(
    model: SamModel, prompts: list[dict[str, Any]], size: tuple[int, int]
) -> None:
    image, mask = np.full((*size, 3), 90, np.uint8), np.ones(size, np.uint8)
    height, width = ResizeLongestSide.get_preprocess_shape(*size, SIDE)
    embedding = model.embed(image)
    assert embedding.input_size == (max(1, height), max(1, width))
    corner = np.array([[[size[1] - 1, size[0] - 1]]], np.float32)
    full, low, _ = model.predict(embedding, corner, masks=mask[None])
    assert full.shape == (1, *size)
    assert low.shape == (1, 64, 64)
    x, y = prompts[0]["points"][0][0, 0].tolist()
    assert width / size[1] * (size[1] - 1) - 1 <= x < max(1, width)
    assert (
        height / size[0] * (size[0] - 1) - 1 <= y < max(1, height)
    )  # the last pixel of the picture, not of the padding


# --- points -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("sam-05")
def test_points_are_x_y_and_inside_the_object(model: SamModel, prompts: list[dict[str, Any]]) -> None:
    image, mask = picture(100, 1000, (35, 880, 66, 921))
    points = anchors(mask, 5, 0)
    assert len(points) == 5
    assert all(mask[int(y), int(x)] for x, y in points)
    model.predict(model.embed(image), points[None], masks=mask[None])
    sent, labels = prompts[0]["points"]
    assert (labels == 1).all()
    x, y = sent[0].T / (SIDE / 1000)
    assert ((x > 875) & (x < 925) & (y > 30) & (y < 70)).all()


# --- against the official predictor -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (90, 140), (140, 90)])
def test_answers_are_those_of_the_official_predictor(model: SamModel, size: tuple[int, int]) -> None:
    image, mask = picture(*size, (20, 16, 52, 48))
    points = anchors(mask, 4, 0)
    full, low, score = model.predict(model.embed(image), points[None], masks=mask[None])
    official = predictor(model, image)
    theirs, their_score, their_low = official.predict(
        as_official(points, size),
        np.ones(len(points)),
        mask_input=model.mask_prompt(mask[None])[0].numpy(),
        multimask_output=False,
    )
    np.testing.assert_allclose(low, their_low, atol=0.3)  # they round the resized image to uint8
    np.testing.assert_allclose(score, their_score, atol=0.01)
    assert iou(full[0], theirs[0].astype(np.uint8)) > 0.98
    # second round: their logits of the first, unchanged
    again = model.predict(model.embed(image), points[None], logits=their_low)[1]
    their_again = official.predict(
        as_official(points, size), np.ones(len(points)), mask_input=their_low, multimask_output=False
    )[2]
    np.testing.assert_allclose(again, their_again, atol=0.3)


@pytest.mark.parametrize(("prompts", "pixels"), [(3, 2**26), (64, 3 * 64 * 64 + 1), (64, 1)])
def test_one_call_with_many_prompts_equals_one_by_one(
    model: SamModel, monkeypatch: pytest.MonkeyPatch, prompts: int, pixels: int
) -> None:
    monkeypatch.setattr("rlfseg.sam.CHUNK", prompts)
    monkeypatch.setattr("rlfseg.sam.CHUNK_PIXELS", pixels)
    image, _, _ = object_of(0)
    rng = np.random.default_rng(0)
    n = 5  # two calls to the decoder
    masks = np.zeros((n, 64, 64), np.uint8)
    for mask in masks:
        top, left = rng.integers(0, 40, size=2)
        mask[top : top + 20, left : left + 16] = 1
    points = np.stack([anchors(m, 3, 0) for m in masks])
    embedding = model.embed(image)
    full, low, score = model.predict(embedding, points, masks=masks)
    for i in range(n):
        one_full, one_low, one_score = model.predict(embedding, points[i : i + 1], masks=masks[i : i + 1])
        np.testing.assert_allclose(low[i], one_low[0], atol=1e-3)
        np.testing.assert_allclose(score[i], one_score[0], atol=1e-4)
        assert (full[i] != one_full[0]).sum() <= 2


def test_the_shipped_sam_betters_coarse_labels(model: SamModel) -> None:
    gains = []
    for index in range(6):
        image, exact, coarse = object_of(index)
        refined = model.predict(model.embed(image), anchors(coarse, 8, 0)[None], masks=coarse[None])[0][0]
        gains.append(iou(refined, exact) - iou(coarse, exact))
    assert np.mean(gains) > 0.05


def test_masks_and_logits_are_one_or_the_other(model: SamModel) -> None:
    with pytest.raises(ValueError, match="either masks or logits"):
        model.predict(model.embed(np.zeros((8, 8, 3), np.uint8)), np.zeros((1, 1, 2), np.float32))


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_as_vit_b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sam_model_registry, "vit_b", build_tiny)


@pytest.mark.usefixtures("tiny_as_vit_b")
@pytest.mark.parametrize(("name", "architecture"), [("sam_vit_b_01ec64.pth", None), ("mine.pth", "vit_b")])
def test_an_official_checkpoint_loads(model: SamModel, tmp_path: Path, name: str, architecture: str | None) -> None:
    torch.save(model.sam.state_dict(), tmp_path / name)
    got = SamModel.load(SamConfig(checkpoint=str(tmp_path / name), model=architecture, device="cpu"))  # type: ignore[arg-type]
    image = object_of(0)[0]
    torch.testing.assert_close(got.embed(image).features, model.embed(image).features, rtol=0, atol=0)
    assert not any(w.requires_grad for w in got.sam.parameters())


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.usefixtures("tiny_as_vit_b")
def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    for name, save in {"sam_vit_b_zip.pth": torch.save, "sam_vit_b_old.pth": save_pickle}.items():
        save({"weights": Malicious(tmp_path / "ran")}, tmp_path / name)
        with pytest.raises(ModelError, match=name):
            SamModel.load(SamConfig(checkpoint=str(tmp_path / name), device="cpu"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("tiny_as_vit_b")
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_other_files_are_refused_by_name(model: SamModel, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sam_vit_b.pth"
    if content is None:
        weights: dict[str, Tensor] = model.sam.state_dict()
        weights.popitem()
        torch.save(weights, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"sam_vit_b\.pth"):
        SamModel.load(SamConfig(checkpoint=str(path), device="cpu"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.pth"):
        SamModel.load(SamConfig(checkpoint=str(tmp_path / "nowhere.pth"), device="cpu"))
    (tmp_path / "mine.pth").touch()
    with pytest.raises(ConfigError, match=r"sam\.model"):
        SamModel.load(SamConfig(checkpoint=str(tmp_path / "mine.pth"), device="cpu"))


def save_pickle(tree: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(tree, protocol=2))


def predictor(model: SamModel, image: Array) -> SamPredictor:
    official = SamPredictor(model.sam)
    official.set_image(image)
    return official


def as_official(points: Array, size: tuple[int, int]) -> Array:
    """They scale a point (x, y) as if pixels had no width: x s instead of (x + 1/2) s - 1/2. This undoes it."""
    height, width = ResizeLongestSide.get_preprocess_shape(*size, SIDE)
    scale = np.array([width / size[1], height / size[0]])
    return ((points + 0.5) * scale - 0.5) / scale
