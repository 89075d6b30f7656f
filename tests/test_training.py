"""One training in a plain process: steps, many processes, numbers that are not finite, checkpoints, validation."""

from __future__ import annotations

import copy
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
from rlfseg.config import EVERY_LAYER, LoraConfig, OptimizerConfig, SpeedConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ModelError
from rlfseg.flow import sample_time
from rlfseg.metrics import iou
from rlfseg.segmenter import Segmenter
from rlfseg.training import PROGRESS, STATE, Batch, Labelled, TrainState, learning_rate
from tests.trained import FAST, LORA, drawn_batches, eight, gradients, joined, make, weights

CARD = Card(base="tiny", resolution=64, threshold=0.5)
FULL = LoraConfig(full=True)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return drawn_batches()


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


def test_betas_weight_decay_and_schedule_are_adamws(batches: list[Batch]) -> None:
    """Three steps by the update's formula, in float64, on the gradients that the steps had."""
    (b1, b2), decay = (0.5, 0.7), 0.5
    config = OptimizerConfig(lr=1e-3, betas=(b1, b2), weight_decay=decay, clip=None, warmup_steps=2, schedule="cosine")
    state = make(total=5, optimizer=config)
    rates = (0.5e-3, 1e-3, 1e-3)  # warm-up, then the cosine's first of three steps
    naive = [w.double() for w in weights(state)]
    m, v = ([torch.zeros_like(w) for w in naive] for _ in range(2))
    for n, (batch, lr) in enumerate(zip(batches[:3], rates, strict=True), 1):
        state.step(batch)
        for i, mine in enumerate(state.weights):
            assert mine.grad is not None
            g = mine.grad.double()
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
            step = (m[i] / (1 - b1**n)) / ((v[i] / (1 - b2**n)).sqrt() + 1e-8)
            naive[i] = naive[i] * (1 - lr * decay) - lr * step
    for a, b in zip(state.weights, naive, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


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


class Wrapper(torch.nn.Module):
    """As DDP wraps the model: a pass without gradient through it would upset its bookkeeping of gradients."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module, self.passes = module, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert torch.is_grad_enabled()
        self.passes += 1
        return self.module(*args, **kwargs)


def test_passes_without_gradient_go_through_the_unwrapped_model(batches: list[Batch]) -> None:
    plain, wrapped = make(), make()
    wrapped.model = wrapper = Wrapper(wrapped.backbone.velocity)
    with_gradient: list[bool] = []
    hook = wrapped.backbone.velocity.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    batch = eight(batches, 1)  # of eight phrases with two labels, one learns from the original
    assert wrapped.step(batch) == pytest.approx(plain.step(batch), rel=1e-4)
    hook.remove()
    assert (with_gradient, wrapper.passes) == ([True, False, True], 2)


# --- many batches a step ------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch(batches: list[Batch]) -> None:
    parts, whole = make(), make()
    a, b = parts.step(*batches[:3]), whole.step(joined(batches[:3]))
    assert a == pytest.approx(b, rel=1e-4)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-3, atol=1e-6)
    assert parts.step_number == 1


@pytest.mark.fault("dist-03")
def test_the_schedule_moves_once_a_step_however_many_batches_it_has(batches: list[Batch]) -> None:
    schedule = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine")
    one, four = make(total=6, optimizer=schedule), make(total=6, optimizer=schedule)
    rates = []
    for _ in range(4):
        told = one.step(batches[0])["lr"], four.step(*batches)["lr"]
        assert told == (one.optimizer.param_groups[0]["lr"], four.optimizer.param_groups[0]["lr"])
        rates.append(told)
    assert [a for a, _ in rates] == [b for _, b in rates]
    # Warm-up: 1/2, 1; then the cosine's first of four steps, and its second: 1/2 (1 + cos(pi / 4))
    assert [a for a, _ in rates] == pytest.approx([5e-4, 1e-3, 1e-3, 0.5e-3 * (1 + math.sqrt(0.5))])


# --- numbers that are not finite ----------------------------------------------------------------------------------


def test_a_step_whose_gradient_is_not_finite_moves_no_weight(batches: list[Batch]) -> None:
    state = make()
    state.step(batches[0])
    before, moments = weights(state), copy.deepcopy(state.optimizer.state_dict()["state"])
    broken = dataclasses.replace(batches[1], z0=batches[1].z0.clone().index_fill_(0, torch.tensor([0]), math.nan))
    for times in (1, 2):
        figures = state.step(broken)
        assert math.isnan(figures["loss"])
        assert (figures["skipped"], state.bad_steps, state.step_number) == (1.0, times, 1 + times)
    assert all(torch.equal(a, b) for a, b in zip(before, state.weights, strict=True))
    assert all(
        torch.equal(a[k], b[k])
        for a, b in zip(moments.values(), state.optimizer.state_dict()["state"].values(), strict=True)
        for k in a
    )
    figures = state.step(batches[1])
    assert (figures["skipped"], state.bad_steps) == (0.0, 0)
    assert all(bool(w.isfinite().all()) for w in state.weights)
    assert not all(torch.equal(a, b) for a, b in zip(before, state.weights, strict=True))


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


def test_what_the_paper_gives_and_what_is_ours() -> None:
    config = TrainConfig(out="")
    o = config.optimizer
    assert (config.lora.rank, o.lr, config.batch_size, config.epochs, config.seed) == (64, 1e-4, 8, 10, 42)
    assert (config.backbone.resolution, config.selection, config.t_sampling) == (512, "dynamic", "uniform")
    # Ours
    assert (o.weight_decay, o.betas, o.clip, o.schedule, o.warmup_steps) == (0.01, (0.9, 0.999), 1.0, "constant", 0)
    assert (config.lora.alpha, config.accumulate, config.init) == (None, 1, None)


# --- checkpoints --------------------------------------------------------------------------------------------------


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


def test_a_resume_may_trade_batch_size_for_accumulate(batches: list[Batch], tmp_path: Path) -> None:
    """What is advised where memory runs out."""
    first, second = make(batch_size=4), make(batch_size=2, accumulate=2)
    first.step(joined(batches[:2]))
    first.save(tmp_path, CARD)
    second.load(tmp_path)
    told = first.step(joined(batches[2:])), second.step(*batches[2:])
    assert told[1] == pytest.approx(told[0], rel=1e-4)
    torch.testing.assert_close(gradients(second), gradients(first), rtol=1e-3, atol=1e-6)
    with pytest.raises(ModelError, match=r"batch_size x accumulate \(4 then, 8 now\)"):
        make(batch_size=4, accumulate=2).load(tmp_path)


@pytest.mark.parametrize("before", [True, False])
def test_resuming_with_another_order_in_memory_goes_on_as_before(
    batches: list[Batch], tmp_path: Path, before: bool
) -> None:
    first = make(speed=SpeedConfig(channels_last=before))
    for batch in batches[:2]:  # in the first step LoRA's A has no gradient
        first.step(batch)
    first.save(tmp_path, CARD)
    resumed = make(speed=SpeedConfig(channels_last=not before))
    assert resumed.optimizer.defaults["fused"]
    resumed.load(tmp_path)
    for state in (first, resumed):
        state.step(batches[2])
    for a, b in zip(first.weights, resumed.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # the learning rate is 2e-3


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


def test_other_settings_are_refused_by_name_and_free_ones_are_not(saved: Path, fresh: TrainState) -> None:
    mine = fresh.config
    try:
        fresh.config = dataclasses.replace(mine, seed=7, optimizer=OptimizerConfig(lr=1.0))
        with pytest.raises(ModelError, match=r"other settings: optimizer .*'lr': 0.002.* then, .*'lr': 1.0.*; seed"):
            fresh.load(saved)
        assert fresh.step_number == 0
        fresh.config = dataclasses.replace(mine, out="elsewhere", max_failures=9, speed=SpeedConfig(tf32=False))
        fresh.load(saved)
        assert fresh.step_number == 1
    finally:
        fresh.config, fresh.step_number = mine, 0


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
    sums, failed = state.validate(labelled, CARD)
    got = sums.results()
    assert failed == 0
    segmenter = Segmenter(state.backbone, CARD)
    pairs = [(segmenter(s.image, [p.caption])[0].mask, p.mask) for s in scenes for p in s.phrases]
    assert got["miou"] == pytest.approx(np.mean([iou(a, b) for a, b in pairs]), abs=2e-3)
    assert got["n_samples"] == len(pairs)
    assert all(torch.equal(a, b) for a, b in zip(before, state.weights, strict=True))


def test_a_nan_of_the_network_counts_as_an_empty_mask_and_ends_nothing() -> None:
    state, scene = make(), draw_scene(0, split="val", size=48)
    state.weights[0].data.fill_(math.nan)
    masks = np.stack([p.mask for p in scene.phrases])
    sums, failed = state.validate([Labelled(image=scene.image, phrases=["ring"] * len(masks), masks=masks)], CARD)
    got = sums.results()
    assert (failed, got["n_samples"], got["miou"]) == (len(masks), len(masks), 0)
