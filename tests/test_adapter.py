"""The adapter folder against peft and diffusers themselves, in this process and in a fresh one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import ASSETS, EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, TrainConfig
from rlfseg.errors import ModelError
from rlfseg.training import Batch, TrainState

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
CARD = Card(base="tiny", resolution=64, threshold=0.4, eps_aos=0.2, metrics={"miou": 0.5}, config={"seed": 42})
WEIGHTS = "adapter_model.safetensors"
NETWORK = "diffusion_pytorch_model.safetensors"

# What someone without rlfseg does with the folder.
BY_HAND = """
import sys, torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
base, folder, inputs, out = sys.argv[1:]
unet = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base, subfolder="unet"), folder).eval()
z, t, text = torch.load(inputs)
with torch.no_grad():
    torch.save(unet(z, 1000 * t, encoder_hidden_states=text).sample, out)
"""


def trained(lora: LoraConfig, steps: int = 2) -> TrainState:
    """A state after some steps on noise: what is learned does not matter here."""
    backbone = Backbone.load(TINY)
    backbone.add_lora(lora)
    config = TrainConfig(
        latents="", out="", backbone=TINY, lora=lora, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=0)
    )
    state = TrainState(config, backbone, total_steps=10)
    for _ in range(steps):
        state.step(batch())
    return state


def batch() -> Batch:
    z1, z0 = torch.randn(2, 2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(2, dtype=torch.bool)
    return Batch(ids=["a", "b"], phrases=["red ring", "blue star"], z1=z1, z0=z0, z0_refined=z0, has_refined=none)


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    return z, torch.tensor([1.0, 0.3]), backbone.text(["red ring", "blue star"])


@torch.no_grad()
def velocity(backbone: Backbone) -> Tensor:
    return backbone.velocity(*inputs(backbone))


@pytest.fixture(scope="module")
def base() -> Backbone:
    return Backbone.load(TINY)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An adapter of rank 8 and alpha 32, and the velocity of the model that was saved."""
    state, folder = trained(LoraConfig(rank=8, alpha=32, targets=EVERY_LAYER)), tmp_path_factory.mktemp("adapter")
    adapter.save(state.backbone, folder, CARD)
    return folder, velocity(state.backbone)


# --- exact, wherever it is loaded ---------------------------------------------------------------------------------


@pytest.mark.fault("lora-01")
def test_peft_gives_the_same_in_a_fresh_process(base: Backbone, saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = saved
    torch.save(inputs(base), tmp_path / "inputs.pt")
    arguments = [str(p) for p in (ASSETS / "base", folder, tmp_path / "inputs.pt", tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", BY_HAND, *arguments], check=True, capture_output=True)
    assert (torch.load(tmp_path / "out.pt") - expected).abs().max() < 1e-5
    assert (velocity(base) - expected).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 32)


def test_load_gives_the_same(base: Backbone, saved: tuple[Path, Tensor]) -> None:
    folder, expected = saved
    backbone, card = adapter.load(folder, device="cpu")
    assert card == dataclasses.replace(CARD, base_weights=adapter.weights_hash(ASSETS / "base"))
    torch.testing.assert_close(velocity(backbone), expected, rtol=0, atol=1e-5)
    backbone.fuse()
    assert type(backbone.velocity.unet) is UNet2DConditionModel
    torch.testing.assert_close(velocity(backbone), expected, rtol=0, atol=1e-4)
    without, _ = adapter.load(folder, device="cpu", base_only=True)
    torch.testing.assert_close(velocity(without), velocity(base), rtol=0, atol=0)


def test_diffusers_loads_the_export(base: Backbone, saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = saved
    assert adapter.export(folder, tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "base", safety_checker=None, feature_extractor=None)
    pipe.load_lora_weights(tmp_path)
    z, t, text = inputs(base)
    with torch.no_grad():
        got = pipe.unet(z, 1000 * t, encoder_hidden_states=text).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.fault("lora-05")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_wrappers_leave_no_trace_in_the_keys(tmp_path: Path) -> None:
    state = trained(LoraConfig(rank=4), steps=0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        state.model = DistributedDataParallel(torch.compile(state.model, backend="eager"))  # type: ignore[arg-type]
        state.step(batch())
        state.step(batch())
    finally:
        torch.distributed.destroy_process_group()
    adapter.save(state.backbone, tmp_path / "adapter", CARD)
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    assert not [k for k in weights if "module." in k or "_orig_mod." in k]
    assert len([k for k in weights if "lora_B" in k]) * 2 == len(weights)
    assert all(w.any() for k, w in weights.items() if "lora_B" in k)
    backbone, _ = adapter.load(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(velocity(backbone), velocity(state.backbone), rtol=0, atol=1e-5)


@pytest.mark.fault("lora-05")
def test_a_wrapped_unet_is_refused(tmp_path: Path) -> None:
    for inside in (False, True):
        backbone = trained(LoraConfig(rank=2), steps=0).backbone
        wrapped = torch.compile(backbone.velocity.unet.base_model.model if inside else backbone.velocity.unet)
        if inside:
            backbone.velocity.unet.base_model.model = wrapped
        else:
            backbone.velocity.unet = wrapped
        with pytest.raises(ModelError, match="unwrap"):
            adapter.save(backbone, tmp_path / str(inside), CARD)


def test_all_weights_are_saved_and_loaded(base: Backbone, tmp_path: Path) -> None:
    state = trained(LoraConfig(full=True), steps=1)
    expected = velocity(state.backbone)
    assert (expected - velocity(base)).abs().max() > 1e-2
    adapter.save(state.backbone, tmp_path, dataclasses.replace(CARD, full=True))
    backbone, card = adapter.load(tmp_path, device="cpu")
    assert card.full
    torch.testing.assert_close(velocity(backbone), expected, rtol=0, atol=1e-6)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    z, t, text = inputs(base)
    with torch.no_grad():
        torch.testing.assert_close(theirs(z, 1000 * t, text).sample, expected, rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="whole UNet"):
        adapter.export(tmp_path, tmp_path / "out")
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(ModelError, match=str(tmp_path)):
        adapter.load(tmp_path, device="cpu")


# --- what doesn't fit is refused ----------------------------------------------------------------------------------


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    """The shipped base with a narrower, untrained UNet."""
    folder = Path(shutil.copytree(ASSETS / "base", tmp_path / "other"))
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "block_out_channels": [32, 48, 64]}).save_pretrained(folder / "unet")
    return folder


@pytest.mark.fault("lora-07")
@pytest.mark.filterwarnings("ignore:.*missing adapter keys:UserWarning", "ignore:Found missing:UserWarning")
@pytest.mark.parametrize(
    "fault", ["other base", "wrong prefix", "zero", "truncated", "no weights", "no lora_A", "a lora_A less"]
)
def test_an_adapter_that_would_change_nothing_is_refused(
    saved: tuple[Path, Tensor], other_base: Path, tmp_path: Path, fault: str
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "adapter"))
    weights = load_file(folder / WEIGHTS)
    if fault == "other base":
        adapter.write_card(folder, dataclasses.replace(CARD, base=str(other_base)))
    elif fault == "wrong prefix":
        save_file({f"module.{k}": w for k, w in weights.items()}, folder / WEIGHTS)
    elif fault == "zero":
        save_file({k: w * ("lora_A" in k) for k, w in weights.items()}, folder / WEIGHTS)
    elif "lora_A" in fault:  # which peft draws at random where it is missing
        of_a = [k for k in weights if "lora_A" in k]
        save_file(
            {k: w for k, w in weights.items() if k not in of_a[: 1 if "less" in fault else None]}, folder / WEIGHTS
        )
    elif fault == "truncated":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    else:
        (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=str(folder)):
        adapter.load(folder, device="cpu")
    if fault in ("no lora_A", "a lora_A less"):
        backbone = Backbone.load(TINY)
        backbone.add_lora(LoraConfig(rank=8, alpha=32, targets=EVERY_LAYER))
        with pytest.raises(ModelError, match=r"lacks weights for .*lora_A\."):
            backbone.load_weights(folder)


def test_a_whole_unet_with_weights_missing_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapter.save(trained(LoraConfig(full=True), steps=0).backbone, folder, dataclasses.replace(CARD, full=True))
    weights = load_file(folder / "unet" / NETWORK)
    save_file({k: w for k, w in weights.items() if k != "conv_in.bias"}, folder / "unet" / NETWORK, {"format": "pt"})
    with pytest.raises(ModelError, match=r"unet lacks weights: conv_in\.bias"):
        adapter.load(folder, device="cpu")
    backbone = Backbone.load(TINY)
    backbone.add_lora(LoraConfig(full=True))
    with pytest.raises(ModelError, match=r"can't be read into .*conv_in\.bias"):
        backbone.load_weights(folder)


def copy_of_base(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """The shipped base with other weights."""
    shutil.copytree(ASSETS / "base", folder)
    for path in (folder / "unet" / NETWORK, folder / "vae" / NETWORK):
        changed = {k: change(f"{path.parent.name}.{k}", w).contiguous() for k, w in load_file(path).items()}
        save_file(changed, path, metadata={"format": "pt"})
    return folder


@pytest.mark.fault("lora-07")
@pytest.mark.parametrize("part", ["unet.conv_in.bias", "vae.decoder.conv_in.bias"])
def test_an_adapter_of_another_base_of_the_same_shape_is_refused(
    saved: tuple[Path, Tensor], tmp_path: Path, part: str
) -> None:
    other = copy_of_base(tmp_path / "base", lambda name, w: w * 1.01 if name == part else w)
    folder = Path(shutil.copytree(saved[0], tmp_path / "adapter"))
    card = dataclasses.replace(adapter.read_card(folder), base=str(other))
    adapter.write_card(folder, card)
    for base_only in (False, True):
        with pytest.raises(ModelError, match=f"another base.*{adapter.weights_hash(other)}.*{card.base_weights}"):
            adapter.load(folder, device="cpu", base_only=base_only)
    adapter.write_card(folder, dataclasses.replace(card, base_weights=""))  # a card from before there was a hash
    assert adapter.load(folder, device="cpu")[1].base == str(other)


@pytest.mark.fault("lora-07")
def test_the_base_in_another_precision_is_the_same_base_and_the_adapter_changes_what_it_says(
    saved: tuple[Path, Tensor], tmp_path: Path
) -> None:
    same = copy_of_base(tmp_path / "base", lambda name, w: w.float())
    folder = Path(shutil.copytree(saved[0], tmp_path / "adapter"))
    adapter.write_card(folder, dataclasses.replace(adapter.read_card(folder), base=str(same)))
    on, off = (velocity(adapter.load(folder, device="cpu", base_only=off)[0]) for off in (False, True))
    torch.testing.assert_close(on, saved[1], rtol=0, atol=1e-5)
    assert (on - off).abs().max() > 1e-2


@pytest.mark.parametrize("text", [None, "base: tiny", "base: tiny\nresolution: 64\nspeed: 3", "a: [", "- 1"])
def test_cards_are_checked(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / adapter.CARD).write_text(text)
    with pytest.raises(ModelError, match=str(tmp_path)):
        adapter.read_card(tmp_path)


def test_cards_come_back_and_tell_people(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, data="später", eps_hss=None)
    adapter.write_card(tmp_path, card)
    assert adapter.read_card(tmp_path) == card
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| miou | 0.5000 |" in text
    assert "base_model" not in text  # a hub has no `tiny`
    hub = dataclasses.replace(card, base="hf:owner/name@abc", config={"lora": {"rank": 8, "alpha": None}})
    front = yaml.safe_load(adapter.model_card(hub).split("---")[1])
    assert front["base_model"] == "owner/name"
    assert "LoRA, rank 8, alpha 8" in adapter.model_card(hub)
    assert "später" in text
    assert "not calibrated" in adapter.model_card(Card(base="tiny", resolution=64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", adapter.CARD]


def test_references(tmp_path: Path) -> None:
    for place in ("", "adapter", "artifacts/adapter"):
        folder = tmp_path / (place.replace("/", "-") or "plain")
        (folder / place).mkdir(parents=True)
        adapter.write_card(folder / place, CARD)
        assert adapter.resolve(str(folder)) == folder / place
    for nothing in (str(tmp_path / "nowhere"), "hf:nobody/nothing"):
        with pytest.raises(ModelError, match=nothing):
            adapter.resolve(nothing)
    # what only the driver's node has: a worker's node says which it is
    with pytest.raises(ModelError, match=f"is no folder on {os.uname().nodename}; .* a folder that all of them see"):
        adapter.resolve(str(tmp_path / "nowhere"))
