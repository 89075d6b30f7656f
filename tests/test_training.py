"""One training process: steps against torch by hand, and resuming to the last bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ModelError
from rlfseg.flow import sample_time
from rlfseg.images import image_to_tensor, mask_to_tensor
from rlfseg.metrics import iou
from rlfseg.segmenter import Segmenter
from rlfseg.training import PROGRESS, STATE, Batch, Labelled, TrainState, learning_rate

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
CARD = Card(base="tiny", resolution=64, threshold=0.5)
LORA = LoraConfig(rank=4, targets=EVERY_LAYER)
FAST = OptimizerConfig(lr=2e-3, warmup_steps=0)
FULL = LoraConfig(full=True)


def make(lora: LoraConfig = LORA, total: int = 100, **settings: Any) -> TrainState:
    backbone = Backbone.load(TINY)
    backbone.add_lora(lora)
    config = TrainConfig(**{"latents": "", "out": "", "backbone": TINY, "lora": lora, "optimizer": FAST} | settings)
    return TrainState(config, backbone, total_steps=total)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Four batches of two drawn scenes; the second of each has a refined label, its exact mask."""
    backbone = Backbone.load(TINY)
    scenes = [draw_scene(i) for i in range(8)]
    z1 = backbone.encode(torch.stack([image_to_tensor(s.image, 64) for s in scenes]))
    exact, coarse = (
        backbone.encode(torch.stack([mask_to_tensor(getattr(s.phrases[0], name), 64) for s in scenes]))
        for name in ("mask", "coarse")
    )
    has_refined = torch.arange(8) % 2 == 1
    refined = torch.where(has_refined[:, None, None, None], exact, coarse)
    parts = [slice(i, i + 2) for i in range(0, 8, 2)]
    return [
        Batch(
            ids=[f"scene-{i}" for i in range(8)][p],
            phrases=[s.phrases[0].caption for s in scenes][p],
            z1=z1[p],
            z0=coarse[p],
            z0_refined=refined[p],
            has_refined=has_refined[p],
        )
        for p in parts
    ]


def weights(state: TrainState) -> list[Tensor]:
    return [w.detach().clone() for w in state.weights]


# --- a step -------------------------------------------------------------------------------------------------------


def test_a_step_is_equation_4_and_adamw_by_hand(batches: list[Batch]) -> None:
    batch = batches[0]
    state, naive = make(), make()
    got = state.step(batch)
    text = naive.backbone.text(batch.phrases)
    t = sample_time("uniform", 42, 0, batch.ids).view(-1, 1, 1, 1)
    losses = []
    for z0 in (batch.z0, batch.z0_refined):
        v = naive.backbone.velocity.unet(
            t * batch.z1 + (1 - t) * z0, 1000 * t.flatten(), encoder_hidden_states=text
        ).sample
        losses.append(((v - (batch.z1 - z0)) ** 2).mean(dim=(1, 2, 3)))
    original, refined = losses
    chosen = torch.where(batch.has_refined & (refined <= original), refined, original)
    chosen.mean().backward()
    assert got["loss"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert got["chose_refined"] == float(refined[1] <= original[1])
    norm = math.sqrt(sum(float((w.grad**2).sum()) for w in naive.weights if w.grad is not None))
    assert got["grad_norm"] == pytest.approx(norm, rel=1e-3)
    optimizer = torch.optim.AdamW(naive.weights, lr=FAST.lr, betas=FAST.betas, weight_decay=FAST.weight_decay)
    for w in naive.weights:
        assert w.grad is not None
        w.grad *= min(1, (FAST.clip or math.inf) / norm)
    optimizer.step()
    # Adam's first step has the sign of the gradient: where that is noise, so is the step
    far = sum(int((a - b).abs().gt(1e-4).sum()) for a, b in zip(state.weights, naive.weights, strict=True))
    assert far < 0.01 * sum(w.numel() for w in state.weights)


def test_training_learns(batches: list[Batch]) -> None:
    state = make(t_sampling="one")
    losses = [state.step(batches[0])["loss"] for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert state.step_number == 12


@pytest.mark.parametrize("clip", [1e-3, None])
def test_clipping_clips(batches: list[Batch], clip: float | None) -> None:
    state = make(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, clip=clip))
    told = state.step(batches[0])["grad_norm"]
    norm = math.sqrt(sum(float((w.grad**2).sum()) for w in state.weights if w.grad is not None))
    assert told > 0.1
    assert norm == pytest.approx(clip or told, rel=1e-3)


def test_selection_can_be_fixed_to_one_label(batches: list[Batch]) -> None:
    batch = batches[0]
    swapped = dataclasses.replace(batch, z0=batch.z0_refined, z0_refined=batch.z0)
    original, refined = make(selection="original").step(batch), make(selection="refined").step(batch)
    assert original["loss"] != refined["loss"]
    assert refined["loss"] == pytest.approx(make(selection="original").step(swapped)["loss"], rel=1e-5)


@pytest.mark.fault("lora-08")
def test_gradient_checkpointing_changes_no_gradient(batches: list[Batch]) -> None:
    plain, saving = make(), make()
    saving.backbone.velocity.eval()
    saving.backbone.velocity.unet.enable_gradient_checkpointing()
    assert any(getattr(m, "gradient_checkpointing", False) for m in saving.backbone.velocity.modules())
    first = [w.clone() for n, w in saving.backbone.velocity.named_parameters() if "lora_B" in n]
    for step in range(2):
        plain.step(batches[step])
        saving.step(batches[step])
        if step == 0:  # later the weights differ by rounding
            for a, b in zip(plain.weights, saving.weights, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    last = [w for n, w in saving.backbone.velocity.named_parameters() if "lora_B" in n]
    assert all((a != b).any() for a, b in zip(first, last, strict=True))


def test_only_trainable_weights_move(batches: list[Batch]) -> None:
    state = make()
    frozen = {n: w.clone() for n, w in state.backbone.velocity.named_parameters() if not w.requires_grad}
    state.step(batches[0])
    for name, weight in state.backbone.velocity.named_parameters():
        assert name not in frozen or torch.equal(weight, frozen[name])
    assert all(w.grad is None for w in (*state.backbone.vae.parameters(), *state.backbone.text_encoder.parameters()))


# --- schedule -----------------------------------------------------------------------------------------------------


def test_learning_rates() -> None:
    constant = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(constant, s, 10) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    cosine = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="cosine")
    assert [learning_rate(cosine, s, 10) for s in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.fault("lora-03")
@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_resuming_is_exact_to_the_bit(batches: list[Batch], tmp_path: Path, lora: LoraConfig) -> None:
    card = dataclasses.replace(CARD, full=lora.full)
    optimizer = OptimizerConfig(lr=2e-3, warmup_steps=3, schedule="cosine")
    whole = make(lora, 4, optimizer=optimizer)
    expected = [whole.step(b) for b in batches]
    first = make(lora, 4, optimizer=optimizer)
    got = [first.step(b) for b in batches[:2]]
    first.epoch = 7
    first.save(tmp_path, card)
    second = make(lora, 4, optimizer=optimizer)
    second.load(tmp_path)
    assert (second.step_number, second.epoch) == (2, 7)
    second.epoch = 0
    got += [second.step(b) for b in batches[2:]]
    assert got == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, second.weights, strict=True))
    # What was saved is an adapter as any other
    loaded, _ = adapter.load(tmp_path, device="cpu")
    z, t, text = batches[0].z1, torch.ones(2), loaded.text(batches[0].phrases)
    with torch.no_grad():
        torch.testing.assert_close(loaded.velocity(z, t, text), first.backbone.velocity(z, t, text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [STATE, PROGRESS, "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_damaged_checkpoints_are_refused_by_name(saved: Path, fresh: TrainState, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"garbage" * 100)
    try:
        with pytest.raises(ModelError, match=str(saved)):
            fresh.load(saved)
        assert fresh.step_number == 0
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(batches: list[Batch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    state, folder = make(LoraConfig(rank=2)), tmp_path_factory.mktemp("checkpoint")
    state.step(batches[0])
    state.save(folder, CARD)
    return folder


@pytest.fixture(scope="module")
def fresh() -> TrainState:
    return make(LoraConfig(rank=2))


def test_a_checkpoint_of_another_training_is_refused(saved: Path) -> None:
    for other in (
        LoraConfig(rank=3),
        LoraConfig(rank=2, targets=("to_q",)),
        LoraConfig(rank=2, targets=EVERY_LAYER),
        FULL,
    ):
        with pytest.raises(ModelError, match=str(saved)):
            make(other).load(saved)


# --- validation ---------------------------------------------------------------------------------------------------


def test_validation_is_the_mean_iou_of_one_step_masks_and_changes_nothing(batches: list[Batch]) -> None:
    state = make()
    state.step(batches[0])
    before = weights(state)
    scenes = [draw_scene(i, split="val", size=48) for i in range(3)]
    labelled = [
        Labelled(image=s.image, phrases=[p.caption for p in s.phrases], masks=np.stack([p.mask for p in s.phrases]))
        for s in scenes
    ]
    got = state.validate(labelled, CARD).results()
    segmenter = Segmenter(state.backbone, CARD)
    pairs = [(segmenter(s.image, [p.caption])[0].mask, p.mask) for s in scenes for p in s.phrases]
    assert got["miou"] == pytest.approx(np.mean([iou(a, b) for a, b in pairs]), abs=2e-3)
    assert got["n_samples"] == len(pairs)
    assert all(torch.equal(a, b) for a, b in zip(before, state.weights, strict=True))
