"""The shipped base through Backbone, against diffusers called by hand, and what a wrong base or LoRA is answered."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlfseg.backbone import Backbone, Velocity
from rlfseg.config import ASSETS, EVERY_LAYER, BackboneConfig, LoraConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ConfigError, ModelError
from rlfseg.hub import resolve_base
from rlfseg.images import image_to_tensor, mask_to_tensor, tensor_to_score
from rlfseg.metrics import iou

BASE = ASSETS / "base"
TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(TINY)


def inputs(backbone: Backbone, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(n, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    return z, torch.linspace(0.1, 0.9, n), backbone.text(["red ring", "blue star"][:n])


# --- latents ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("rf-05")
def test_masks_come_back_from_their_latents_and_black_stays_black(backbone: Backbone) -> None:
    masks = [draw_scene(i, split="test").phrases[0].mask for i in range(12)]
    decoded = backbone.decode(backbone.encode(torch.stack([mask_to_tensor(m, 64) for m in masks])))
    scores = tensor_to_score(decoded, (64, 64)).detach().numpy()
    assert np.mean([iou((s > 0.5).astype(np.uint8), m) for s, m in zip(scores, masks, strict=True)]) >= 0.97
    assert tensor_to_score(backbone.decode(backbone.black()), (64, 64)).mean() < 0.05


@pytest.mark.fault("rf-05")
def test_latents_are_the_scaled_mode_as_diffusers_gives_it(backbone: Backbone) -> None:
    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    pixels = image_to_tensor(draw_scene(0).image, 64)[None]
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        back = vae.decode(expected / vae.config.scaling_factor).sample
    got = backbone.encode(pixels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(backbone.decode(got), back, rtol=0, atol=1e-5)
    assert got.shape[-1] * backbone.factor == 64
    torch.testing.assert_close(backbone.black(), backbone.encode(torch.full((1, 3, 64, 64), -1.0)))


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("rf-01")
def test_the_unet_sees_a_thousand_t_once(backbone: Backbone) -> None:
    z, _, text = inputs(backbone)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = backbone.velocity.unet.time_proj.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        got = backbone.velocity(z, torch.tensor([0.1, 0.9]), text)
        expected = backbone.velocity.unet(z, torch.tensor([100.0, 900.0]), encoder_hidden_states=text).sample
    hook.remove()
    assert torch.equal(got, expected)
    times, embedded = seen[0]
    torch.testing.assert_close(times, torch.tensor([100.0, 900.0]))
    assert torch.cosine_similarity(embedded[0], embedded[1], dim=0) < 0.6  # unscaled: 0.98


# --- text ---------------------------------------------------------------------------------------------------------


def test_each_phrase_is_encoded_once(backbone: Backbone) -> None:
    counted: list[int] = []
    hook = backbone.text_encoder.register_forward_pre_hook(
        lambda m, args, kwargs: counted.append(len((args or (kwargs["input_ids"],))[0])), with_kwargs=True
    )
    first = backbone.text(["white cross", "green circle", "white cross"])
    second = backbone.text(["green circle", "purple star"])
    hook.remove()
    assert counted == [2, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], second[0])
    assert not torch.equal(first[0], first[1])


def test_long_phrases_are_told(backbone: Backbone) -> None:
    fits, long = "red " * 30, "red " * 31  # 32 tokens with begin and end
    assert not backbone.too_long(fits.strip())
    assert backbone.too_long(long.strip())
    assert torch.equal(*backbone.text([long + "ring", long + "star"]))
    assert backbone.text(["ring " * 200]).shape == (1, 32, 96)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def test_a_new_lora_changes_nothing_and_is_all_that_trains(backbone: Backbone) -> None:
    z, t, text = inputs(backbone)
    with_lora = Backbone.load(TINY)
    with_lora.add_lora(LoraConfig(rank=4, alpha=9, targets=EVERY_LAYER))
    with torch.no_grad():
        torch.testing.assert_close(with_lora.velocity(z, t, text), backbone.velocity(z, t, text), rtol=0, atol=1e-5)
    names = {n for n, w in with_lora.velocity.named_parameters() if w.requires_grad}
    assert names == {n for n, _ in with_lora.velocity.named_parameters() if ".lora_" in n}
    assert isinstance(with_lora.trainable(), list)
    assert len(with_lora.trainable()) == len(names)
    assert not backbone.trainable()
    again = Backbone.load(TINY)
    again.add_lora(LoraConfig(rank=4, targets=EVERY_LAYER))
    assert all(torch.equal(a, b) for a, b in zip(with_lora.trainable(), again.trainable(), strict=True))


def test_the_paper_s_lora_on_sd_has_12_75_million_parameters() -> None:
    """Rank 64 on attention, by hand from SD v1.5's widths; no weight is made."""
    with torch.device("meta"):
        sd = Backbone.__new__(Backbone)  # of a backbone, its UNet alone
        sd.source, sd.velocity = Path("sd"), Velocity(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
        sd.velocity.requires_grad_(False)
        sd.add_lora(LoraConfig())
    assert (LoraConfig().rank, LoraConfig().alpha) == (64, None)
    # A transformer block has two attentions of four layers each, C -> C but for the keys and values of text, 768 -> C
    by_hand = sum(blocks * 64 * (6 * 2 * c + 2 * (768 + c)) for c, blocks in ((320, 5), (640, 5), (1280, 6)))
    assert sum(w.numel() for w in sd.trainable()) == by_hand
    assert round(by_hand / 1e6, 2) == 12.75
    assert {m.scaling["default"] for m in sd.velocity.modules() if isinstance(m, LoraLayer)} == {1.0}


def test_lora_weights_stay_fp32_on_a_bf16_base() -> None:
    backbone = Backbone.load(BackboneConfig(base="tiny", resolution=64, device="cpu", dtype="bf16"))
    backbone.add_lora(LoraConfig(rank=2))
    assert {w.dtype for w in backbone.trainable()} == {torch.float32}
    assert backbone.vae.dtype == backbone.text_encoder.dtype == torch.bfloat16
    z, t, text = inputs(backbone)
    with backbone.autocast():
        backbone.velocity(z, t, text).float().square().mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in backbone.trainable())


@pytest.mark.parametrize("targets", [("to_q", "to_nowhere"), ()])
def test_targets_that_match_nothing_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        Backbone.load(TINY).add_lora(LoraConfig(targets=targets))


# --- bases --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("ingest-06")
def test_what_is_no_base_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"unet/config\.json"):
        resolve_base(str(tmp_path))
    with pytest.raises(ModelError, match="hf:nobody/nothing"):
        resolve_base("hf:nobody/nothing")
    assert resolve_base("tiny") == BASE


@pytest.mark.parametrize("content", [b"", b"x" * 1000])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "base"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=str(folder)):
        Backbone.load(BackboneConfig(base=str(folder), resolution=64, device="cpu"))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "base"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        UNet2DConditionModel.from_pretrained(BASE / "unet").state_dict(),
        folder / "unet" / "diffusion_pytorch_model.bin",
    )
    with pytest.raises(ModelError, match=str(folder)):
        Backbone.load(BackboneConfig(base=str(folder), resolution=64, device="cpu"))


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="device"):
        Backbone.load(BackboneConfig(base="tiny", resolution=64, device="cuda"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("target", ["to_q", "conv1", "conv_in", "ff.net.0.proj"])
def test_lora_in_fewer_operations_is_peft_s(target: str, rank: int, dtype: Literal["fp32", "bf16"]) -> None:
    """Wider than its layer (rank 64 on 64 to 128) and narrow: peft's own forward is the truth, with gradients."""
    backbone = Backbone.load(replace(TINY, dtype=dtype))
    backbone.add_lora(LoraConfig(rank=rank, alpha=rank // 2, targets=(target,)))
    weights = backbone.trainable()
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    layers = [m for m in backbone.velocity.modules() if isinstance(m, LoraLayer)]
    z, t = torch.randn(2, 8, 16, 16, generator=generator), torch.tensor([0.3, 1.0])

    def run() -> list[Tensor]:
        with backbone.autocast():
            out = backbone.velocity(z, t, backbone.text(["red ring", ""]))
        return [out.detach().float(), *torch.autograd.grad(out.float().square().mean(), weights)]

    found = run()
    assert all("forward" in vars(layer) for layer in layers)
    for layer in layers:
        vars(layer).pop("forward")
    for ours, peft in zip(found, run(), strict=True):
        largest = float(peft.abs().max())
        if dtype == "fp32":
            torch.testing.assert_close(ours, peft, rtol=1e-3, atol=1e-5 + 1e-4 * largest)
        else:
            assert float((ours - peft).norm() / peft.norm()) < 0.05


def test_a_kept_phrase_keeps_its_own_states_alone() -> None:
    backbone = Backbone.load(BackboneConfig(base="tiny", resolution=64, device="cpu"))
    states = backbone.text([f"ring {n}" for n in range(5)])
    kept = backbone.text(["ring 3"])
    assert torch.equal(kept[0], states[3])
    assert {held.untyped_storage().nbytes() for held in backbone._text_cache.values()} == {4 * states[0].numel()}
