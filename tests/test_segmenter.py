"""Segmenter: any pictures and phrases in, masks of the pictures' own sizes out; against the same steps done by hand."""

from __future__ import annotations

import dataclasses
import inspect
import io
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from rlfseg import adapter, tracking
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import ASSETS, EVERY_LAYER, BackboneConfig, LoraConfig, SamplingConfig, TrackingConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import BadSample, ConfigError
from rlfseg.segmenter import Result, Segmenter, to_array

BASE = ASSETS / "base"
Array = np.ndarray[Any, Any]
PHRASES = ["red ring", "blue star", "white cross"]
SIZES = [(1, 1), (1, 600), (600, 1), (3, 500), (64, 64), (90, 41)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of random weights, large enough to be seen."""
    backbone = Backbone.load(BackboneConfig(base="tiny", resolution=64, device="cpu"))
    backbone.add_lora(LoraConfig(rank=4, alpha=8, targets=EVERY_LAYER))
    generator = torch.Generator().manual_seed(0)
    for weight in backbone.trainable():
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("adapter")
    adapter.save(backbone, path, Card(base="tiny", resolution=64, threshold=0.4, eps_aos=0.3, eps_hss=0.2))
    return path


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Segmenter:
    return Segmenter.load(str(folder), device="cpu")


def picture(index: int = 0, size: tuple[int, int] = (64, 64)) -> Array:
    image = Image.fromarray(draw_scene(index, split="test").image)
    return np.asarray(image.resize(size[::-1]))


def scores(results: list[Result]) -> Array:
    return np.stack([r.score for r in results])


# --- the same by hand ---------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(folder: Path, image: Array, phrase: str) -> Array:
    """Eq. 5 with diffusers, peft and transformers alone, for a picture of the network's own size."""
    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    unet = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(BASE / "unet"), folder)
    tokenizer, encoder = (
        CLIPTokenizer.from_pretrained(BASE / "tokenizer"),
        CLIPTextModel.from_pretrained(BASE / "text_encoder"),
    )
    ids = tokenizer(phrase, padding="max_length", max_length=32, return_tensors="pt").input_ids
    z1 = vae.encode(torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    z0 = z1 - unet(z1, 1000, encoder_hidden_states=encoder(ids).last_hidden_state).sample
    decoded: Array = vae.decode(z0 / vae.config.scaling_factor).sample[0].mean(dim=0).numpy()
    return (decoded.clip(-1, 1) + 1) / 2


def test_one_step_is_what_one_writes_with_diffusers(folder: Path, segmenter: Segmenter) -> None:
    for phrase in PHRASES[:2]:
        expected = by_hand(folder, picture(), phrase)
        [result] = segmenter(picture(), [phrase])
        np.testing.assert_allclose(result.score, expected, atol=1e-3)
        assert result.threshold == 0.4
        near = np.abs(expected - 0.4) < 1e-3
        assert np.array_equal(result.mask[~near], (expected > 0.4)[~near])


def test_fused_equals_unfused_and_the_adapter_matters(folder: Path, segmenter: Segmenter) -> None:
    assert type(segmenter.backbone.velocity.unet) is UNet2DConditionModel
    unfused = Segmenter(*adapter.load(folder, device="cpu"))
    assert isinstance(unfused.backbone.velocity.unet, PeftModel)
    got = scores(segmenter(picture(), PHRASES))
    np.testing.assert_allclose(got, scores(unfused(picture(), PHRASES)), atol=1e-3)
    off = Segmenter.load(str(folder), device="cpu", base_only=True)
    assert np.abs(got - scores(off(picture(), PHRASES))).max() > 0.03


# --- batches ------------------------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once_and_each_phrase_once(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[int]] = {"vae": [], "text": [], "unet": []}
    backbone = segmenter.backbone
    vae, text = backbone.vae.encode, backbone._encode_text
    monkeypatch.setattr(backbone.vae, "encode", lambda x: (calls["vae"].append(len(x)), vae(x))[1])
    monkeypatch.setattr(backbone, "_encode_text", lambda p: (calls["text"].append(len(p)), text(p))[1])
    hook = backbone.velocity.register_forward_hook(lambda m, args, out: calls["unet"].append(len(out)))
    words = ["one ring", "two rings", "three rings"]
    segmenter.segment([picture(0), picture(1)], [words, words[:2]])
    segmenter(picture(2), words)
    hook.remove()
    assert calls == {"vae": [2, 1], "text": [3], "unet": [5, 3]}


def test_a_mixed_batch_equals_one_by_one(segmenter: Segmenter) -> None:
    pictures = [picture(i, size) for i, size in enumerate(SIZES)]
    phrases = [PHRASES[: i % 3 + 1] for i in range(len(SIZES))]
    together = segmenter.segment(pictures, phrases)
    few = Segmenter(segmenter.backbone, segmenter.card, max_batch=2).segment(pictures, phrases)
    for image, own, results, in_parts in zip(pictures, phrases, together, few, strict=True):
        assert [r.caption for r in results] == own
        alone = np.concatenate([scores(segmenter(image, [phrase])) for phrase in own])
        np.testing.assert_allclose(scores(results), alone, atol=1e-3)
        np.testing.assert_allclose(scores(in_parts), alone, atol=1e-3)


def test_scores_do_not_pile_up_where_they_are_computed(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Segmenter(segmenter.backbone, segmenter.card, max_batch=2)
    step, batches, most = few._step, list[weakref.ref[torch.Tensor]](), 0

    def watched(*inputs: Any) -> tuple[torch.Tensor, ...]:
        nonlocal most
        done = step(*inputs)
        batches.append(weakref.ref(done[0]))
        most = max(most, sum(batch() is not None for batch in batches))
        return done

    monkeypatch.setattr(few, "_step", watched)
    [squares] = few.squares(few.encode([picture()]), [PHRASES * 7])
    assert len(batches) == 11
    assert most <= 3  # what is taken apart, what is waited for, what is queued
    assert {s.score.untyped_storage().nbytes() for s in squares} == {64 * 64 * 4}


def test_no_phrases_no_results(segmenter: Segmenter) -> None:
    assert segmenter(picture(), []) == []
    assert [len(r) for r in segmenter.segment([picture(0), picture(1)], [[], ["red ring"]])] == [0, 1]


@pytest.mark.parametrize("size", SIZES)
def test_results_have_the_pictures_own_size(segmenter: Segmenter, size: tuple[int, int]) -> None:
    [result] = segmenter(picture(0, size), ["red ring"])
    assert result.score.shape == result.mask.shape == size
    assert result.score.dtype == np.float32
    assert result.mask.dtype == np.uint8
    assert 0 <= result.score.min() <= result.score.max() <= 1


# --- references ---------------------------------------------------------------------------------------------------


def test_mlflow_references_give_the_same_masks(
    folder: Path, segmenter: Segmenter, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{shutil.copy(migrated, tmp_path)}"
    with tracking.Run.start(TrackingConfig(uri=uri), params={}, system_metrics=False) as run:
        run.log_artifacts(folder, "adapter")
        model = tracking.log_model_folder(run, folder, code_paths=())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    for reference in (f"runs:/{run.id}/adapter", str(model)):
        loaded = Segmenter.load(reference, device="cpu")
        assert loaded.card == segmenter.card
        np.testing.assert_array_equal(scores(loaded(picture(), PHRASES)), scores(segmenter(picture(), PHRASES)))


def test_revisions_reach_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(BASE if repository == "owner/base" else tmp_path / "adapter")

    shutil.copytree(folder, tmp_path / "adapter")
    card = adapter.read_card(folder)
    adapter.write_card(tmp_path / "adapter", dataclasses.replace(card, base="hf:owner/base@0123abc"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Segmenter.load("hf:owner/adapter@v2", device="cpu")
    adapter.resolve("hf:owner/adapter")
    assert asked == [("owner/adapter", "v2"), ("owner/base", "0123abc"), ("owner/adapter", None)]


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.fault("numeric-01")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_fails_its_own_item_and_is_never_an_empty_mask(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    good = scores([r[0] for r in segmenter.segment([picture(i) for i in range(3)], [["red ring"]] * 3)])
    encode = segmenter.backbone.encode

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        z1 = encode(pixels)
        z1[1, 0, 3, 3] = bad
        return z1

    monkeypatch.setattr(segmenter.backbone, "encode", broken)
    results = [r[0] for r in segmenter.segment([picture(i) for i in range(3)], [["red ring"]] * 3)]
    assert [r.failed for r in results] == [False, True, False]
    np.testing.assert_allclose(scores(results)[[0, 2]], good[[0, 2]], atol=1e-4)
    for attribute in ("mask", "confidence"):
        with pytest.raises(BadSample, match="red ring"):
            getattr(results[1], attribute)
    assert segmenter.backbone.vae.dtype == torch.float32


def test_the_autoencoder_is_never_fp16() -> None:
    with pytest.raises(ValueError, match="dtype"):
        BackboneConfig(dtype="fp16")  # type: ignore[arg-type]


def test_long_phrases_are_flagged(segmenter: Segmenter) -> None:
    long = " ".join(["ring"] * 120)
    first, second, short = segmenter(picture(), [f"{long} red", f"{long} blue", "ring"])
    assert (first.truncated, second.truncated, short.truncated) == (True, True, False)
    np.testing.assert_allclose(first.score, second.score, atol=1e-4)
    assert np.abs(first.score - short.score).max() > 1e-3


@pytest.mark.parametrize("phrase", ["", "  ", "\n"])
def test_empty_phrases_are_refused(segmenter: Segmenter, phrase: str) -> None:
    with pytest.raises(BadSample, match="empty"):
        segmenter(picture(), ["red ring", phrase])


# --- pictures -----------------------------------------------------------------------------------------------------


def test_every_kind_of_picture_gives_the_same(segmenter: Segmenter, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    expected = segmenter(picture(), ["red ring"])[0].score
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), Image.fromarray(picture())]
    with (tmp_path / "a.png").open("rb") as file:
        for kind in [*kinds, file]:
            assert np.array_equal(segmenter(kind, ["red ring"])[0].score, expected)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), b"no picture"]
)
def test_what_is_no_picture_is_refused(image: Any) -> None:
    with pytest.raises(BadSample):
        inspect.unwrap(to_array)(image)  # without the type check that only tests make


# --- sampling -----------------------------------------------------------------------------------------------------


def test_rescaling_uses_the_cards_eps(segmenter: Segmenter) -> None:
    def gammas(**settings: Any) -> list[float]:
        results = segmenter(picture(), PHRASES, sampling=SamplingConfig(**settings))
        assert [r.clipped for r in results] == [r.gamma == settings.get("gamma_max") for r in results]
        return [r.gamma for r in results]

    for rescale, eps in (("aos", 0.3), ("hss", 0.2)):
        calibrated = gammas(rescale=rescale, gamma_max=None)
        assert min(calibrated) > 0
        assert calibrated == gammas(rescale=rescale, gamma_max=None, eps=eps)
        assert calibrated != gammas(rescale=rescale, gamma_max=None, eps=1.0)
        limit = min(calibrated) / 2
        assert gammas(rescale=rescale, gamma_max=limit) == pytest.approx([limit] * 3)
    assert gammas() == [0, 0, 0]


def test_rescaling_before_calibration_is_refused(segmenter: Segmenter) -> None:
    fresh = Segmenter(segmenter.backbone, Card(base="tiny", resolution=64))
    with pytest.raises(ConfigError, match="eps"):
        fresh(picture(), ["red ring"], sampling=SamplingConfig(rescale="aos"))


def test_thresholds(segmenter: Segmenter) -> None:
    areas = [segmenter(picture(), ["red ring"], threshold=t)[0].mask.mean() for t in (0.0, 0.2, 0.6, 1.0)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[-1] == 0
    result = segmenter(picture(), ["red ring"], threshold=0.2)[0]
    assert result.confidence == pytest.approx(float(result.score[result.score > 0.2].mean()))
    assert result.mask is result.mask  # compared with the threshold once
    assert segmenter(picture(), ["red ring"], threshold=1.0)[0].confidence == 0


@pytest.mark.parametrize("kind", ["rotated", "transparent", "grey16"])
def test_a_pillow_image_is_read_as_its_file_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(picture()).crop((0, 0, 20, 40)).save(path, exif=exif)
    elif kind == "transparent":
        Image.new("RGBA", (9, 5), (200, 0, 0, 0)).save(path)
    else:
        Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(path)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(to_array(opened), to_array(path))
