"""How a training step is computed changes its time and memory, not its result."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlfseg import adapter
from rlfseg.backbone import Backbone
from rlfseg.config import LoraConfig, OptimizerConfig, SpeedConfig
from rlfseg.flow import flow_loss, sample_time
from rlfseg.training import Batch, TrainState, speed_up
from tests.trained import TINY, drawn_batches, eight, gradients, joined, make


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return drawn_batches()


def test_bf16_arithmetic_leaves_the_trained_weights_and_their_moments_in_fp32(batches: list[Batch]) -> None:
    # rank 4 on layers wider than it: the LoRA has products of its own
    exact, rough = make(), make(backbone=dataclasses.replace(TINY, dtype="bf16"))
    seen: set[torch.dtype] = set()
    for module in rough.backbone.velocity.modules():
        if type(module) in (torch.nn.Conv2d, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    a, b = exact.step(batches[0]), rough.step(batches[0])
    assert seen == {torch.bfloat16}
    assert {w.dtype for w in rough.weights} == {torch.float32}
    moments = [v for s in rough.optimizer.state.values() for k, v in s.items() if k != "step"]
    assert {m.dtype for m in moments} == {torch.float32}
    assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
    assert torch.cosine_similarity(gradients(exact), gradients(rough), dim=0) > 0.95


def test_all_weights_of_the_unet_start_as_they_are_in_the_file_also_beside_bf16() -> None:
    backbone = Backbone.load(dataclasses.replace(TINY, dtype="bf16"))
    backbone.add_lora(LoraConfig(full=True))
    own = load_file(backbone.source / "unet" / "diffusion_pytorch_model.safetensors")
    got = backbone.velocity.unet.state_dict()
    assert got.keys() == own.keys()
    assert all(torch.equal(got[name], weight.float()) for name, weight in own.items())
    assert any((weight.float() != weight.bfloat16().float()).any() for weight in own.values())  # bf16 would round them
    assert len(backbone.trainable()) == len(own)
    assert {w.dtype for w in backbone.vae.parameters()} == {torch.bfloat16}


def test_fused_adamw_is_adamw(batches: list[Batch]) -> None:
    states = {fused: make(optimizer=OptimizerConfig(lr=2e-3, fused=fused)) for fused in (True, False)}
    for fused, state in states.items():
        assert state.optimizer.defaults["fused"] is fused
        state.step(batches[0])
    for a, b in zip(states[True].weights, states[False].weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_channels_last_reorders_weights_and_changes_nothing(batches: list[Batch]) -> None:
    plain, reordered = make(), make(speed=SpeedConfig(channels_last=True))
    kernels = [w for w in reordered.backbone.velocity.parameters() if w.ndim == 4 and min(w.shape) > 1]
    assert kernels
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    assert plain.step(batches[0]) == pytest.approx(reordered.step(batches[0]), rel=1e-3)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_of_products_and_of_convolutions(tf32: bool) -> None:
    """The flags alone, which a CPU ignores; `test_gpu.py` has what they do."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    backbone = make().backbone
    try:
        for device, expected in (("cpu", not tf32), ("cuda:0", tf32)):
            products.allow_tf32 = convolutions.allow_tf32 = not tf32
            backbone.device = device
            speed_up(backbone, SpeedConfig(tf32=tf32))
            assert (products.allow_tf32, convolutions.allow_tf32) == (expected, expected)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@pytest.mark.parametrize("wanted", [True, False])
def test_compiling_is_of_the_velocity(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether, not what comes of it, which takes a minute (`slow` below)."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    backbone = make().backbone
    speed_up(backbone, SpeedConfig(compile=wanted))
    assert compiled == [backbone.velocity] * wanted


def test_checkpointing_and_channels_last_together_change_no_gradient(batches: list[Batch]) -> None:
    plain, both = make(), make(speed=SpeedConfig(gradient_checkpointing=True, channels_last=True))
    for batch in batches[:2]:  # in the first step LoRA's A has no gradient
        plain.step(batch)
        both.step(batch)
    assert torch.cosine_similarity(gradients(plain), gradients(both), dim=0) > 0.999


@pytest.fixture
def compiled(root: Path, tmp_path: Path) -> dict[str, Any]:
    """What tests/compiled.py came to: beartype, which checks shapes in this process, can't be compiled."""
    script = [sys.executable, str(root / "tests" / "compiled.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1])) | {"folder": tmp_path}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # four compilations
@pytest.mark.fault("lora-05")
@pytest.mark.fault("numeric-03")
def test_a_compiled_training_under_ddp_equals_an_eager_one_and_saves_the_same_names(compiled: dict[str, Any]) -> None:
    for a, b in compiled["figures"]:
        assert a == pytest.approx(b, rel=1e-2)
    weights = load_file(compiled["folder"] / "adapter_model.safetensors")
    assert not [k for k in weights if {"module", "_orig_mod"} & set(k.split("."))]
    loaded, _ = adapter.load(compiled["folder"], device="cpu")
    trained = [w for n, w in loaded.velocity.named_parameters() if ".lora_B." in n]
    assert trained
    assert all(bool(w.any()) for w in trained)
    assert compiled["graphs_of_20_pictures"] == 1  # pictures of 20 sizes are one size to the UNet
    assert compiled["graphs"] <= 8
    first, *later = compiled["seconds"]
    assert np.quantile(later, 0.95) < 0.2 * first  # the first is compiled, which takes a hundred times as long


@pytest.mark.fault("lora-08")
def test_gradient_checkpointing_changes_no_gradient(batches: list[Batch]) -> None:
    plain, saving = make(), make(speed=SpeedConfig(gradient_checkpointing=True))
    saving.backbone.velocity.eval()
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


class Kept:
    """Bytes that autograd keeps for the backward pass: those alive, and their peak; weights don't count."""

    def __init__(self, state: TrainState):
        self.weights = {w.untyped_storage().data_ptr() for w in state.backbone.velocity.parameters()}
        self.holders: dict[int, int] = {}
        self.alive = self.peak = 0

    def pack(self, tensor: Tensor) -> Held:
        return Held(self, tensor)


class Held:
    """A tensor that autograd keeps; gone when the graph is."""

    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor, self.key = kept, tensor, tensor.untyped_storage().data_ptr()
        self.bytes = 0 if self.key in kept.weights else tensor.untyped_storage().nbytes()
        kept.holders[self.key] = kept.holders.get(self.key, 0) + 1
        if kept.holders[self.key] == 1:
            kept.alive += self.bytes
            kept.peak = max(kept.peak, kept.alive)

    def __del__(self) -> None:
        self.kept.holders[self.key] -= 1
        if self.kept.holders[self.key] == 0:
            self.kept.alive -= self.bytes


def peak(state: TrainState, work: Callable[[], object]) -> int:
    kept = Kept(state)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        work()
    gc.collect()
    assert kept.alive == 0
    return kept.peak


def test_selection_keeps_little_more_than_one_forward_pass(batches: list[Batch]) -> None:
    state = make()
    one_label = peak(state, lambda: make_step(state, eight(batches, 0), "refined"))
    for originals, limit in ((0, 1.02), (1, 1.02 + 1 / 8), (8, 2.02)):
        got = peak(state, lambda n=originals: make_step(state, eight(batches, n), "dynamic"))  # type: ignore[misc]
        print(f"{originals} of 8 learn from the original: {got / one_label:.2f} x one label's bytes")
        assert got < limit * one_label

    def naive() -> None:
        batch = eight(batches, 1)
        t, text = sample_time("uniform", 42, 0, batch.ids), state.backbone.text(batch.phrases)
        both = [flow_loss(state.model, batch.z1, z0, t, text) for z0 in (batch.z0, batch.z0_refined)]
        torch.minimum(*both).mean().backward()

    both_labels = peak(state, naive)
    print(f"both losses in full: {both_labels / one_label:.2f} x")
    assert both_labels > 1.9 * one_label


def make_step(state: TrainState, batch: Batch, selection: str) -> None:
    state.config = dataclasses.replace(state.config, selection=selection)  # type: ignore[arg-type]
    chosen = state.step(batch)["chose_refined"]
    wanted = float((batch.z0_refined < batch.z0).flatten(1).all(dim=1).float().mean())
    assert chosen == (wanted if selection == "dynamic" else 1)  # the only one that there is


def test_gradient_checkpointing_keeps_less(batches: list[Batch]) -> None:
    plain, saving = make(), make(speed=SpeedConfig(gradient_checkpointing=True))
    batch = joined(batches)
    less, all_of_it = peak(saving, lambda: saving.step(batch)), peak(plain, lambda: plain.step(batch))
    print(f"gradient checkpointing keeps {less / all_of_it:.2f} of the bytes")
    assert less < 0.5 * all_of_it
