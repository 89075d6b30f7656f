"""Stable Diffusion as a velocity model: diffusers for the networks, peft for LoRA.

Shapes: B phrases or images, C latent channels, h = w = resolution / f, T text tokens, D width of text states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from jaxtyping import Float
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from rlfseg.config import BackboneConfig, LoraConfig
from rlfseg.device import choose_device, choose_dtype
from rlfseg.errors import ConfigError, ModelError
from rlfseg.hub import resolve_base, resolve_tiny

TIME_SCALE = 1000.0  # the UNet's time embedding was trained on 0..1000; the flow's time runs over 0..1
TEXT_CACHE = 1024  # phrases; a state of SD's is 236 kB
LORA_WEIGHTS = "adapter_model.safetensors"  # peft's name
# What peft raises on settings and weights that it can't use; it has no error of its own for that.
UNUSABLE = (RuntimeError, OSError, ValueError, TypeError, AttributeError, LookupError, ImportError, SafetensorError)


class Velocity(nn.Module):
    """v_theta(z_t, t, c): a UNet with the flow's time scaled to its own, in this one place.

    Args:
        unet: Of diffusers, with an adapter or without.

    Attributes:
        dtype: Type that latents and text are cast to; None: left to autocast, as LoRA beside a bf16 base needs it.
    """

    dtype: torch.dtype | None = None

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, z: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], text: Float[Tensor, "B T D"]) -> Tensor:
        """Velocity z1 - z0 as predicted at z_t and t in [0, 1], Float [B, C, h, w]."""
        if self.dtype is not None:
            z, text = z.to(self.dtype), text.to(self.dtype)
        velocity: Tensor = self.unet(z, t * TIME_SCALE, encoder_hidden_states=text, return_dict=False)[0]
        return velocity


class Backbone:
    """The frozen autoencoder and text encoder, and the UNet with or without an adapter.

    Attributes:
        velocity: The velocity model; train its parameters that require a gradient.
        source: Folder that the weights came from.
        resolution: Side of images and masks in pixels.

    Args:
        source: A diffusers folder.
        resolution: Side of images and masks in pixels.
        device: `cpu` or `cuda`.
        dtype: Arithmetic of the frozen parts.
        unet: Replaces the folder's own.
    """

    def __init__(
        self,
        source: Path,
        *,
        resolution: int,
        device: str,
        dtype: torch.dtype,
        unet: nn.Module | None = None,
    ):
        self.source, self.resolution, self.device, self.dtype = source, resolution, device, dtype
        # fp16 on disk is only storage: the autoencoder overflows in fp16, LoRA needs fp32 beside it
        try:
            self.vae = AutoencoderKL.from_pretrained(
                source / "vae", torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
            self.text_encoder = CLIPTextModel.from_pretrained(
                source / "text_encoder", dtype=dtype, local_files_only=True, use_safetensors=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
            unet = unet or self._read_unet(dtype)
        except (OSError, ValueError) as error:
            raise ModelError(f"backbone.base: {source} can't be loaded as a diffusers folder: {error}") from error
        parts: tuple[nn.Module, ...] = (self.vae, self.text_encoder, unet)
        for part in parts:
            part.to(device).eval().requires_grad_(False)
        self.velocity = Velocity(unet)
        self.tiny: Any = None  # an AutoencoderTiny
        self._text_cache: LRUCache[str, Tensor] = LRUCache(TEXT_CACHE)
        self._black: Tensor | None = None

    def _read_unet(self, dtype: torch.dtype) -> nn.Module:
        unet: nn.Module = UNet2DConditionModel.from_pretrained(
            self.source / "unet", torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return unet

    @classmethod
    def load(cls, config: BackboneConfig, *, unet: nn.Module | None = None) -> Backbone:
        """Loads a base without an adapter; `unet` replaces the folder's own (full fine-tuning)."""
        device = choose_device(config.device)
        return cls(
            resolve_base(config.base),
            resolution=config.resolution,
            device=device,
            dtype=choose_dtype(config.dtype, device),
            unet=unet,
        )

    # --- latents -------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels a latent cell and side: 8 in SD, 4 in the drawn world."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, pixels: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B C h w"]:
        """Pixels in [-1, 1] -> scaled latents: the posterior's mode, so that latents can be cached."""
        if self.tiny is None:
            return self._encode(pixels)
        with torch.no_grad():
            # scaled already; the module's own forward would round latents to bytes
            approximate: Tensor = self.tiny.encode(pixels.to(self.device, self.dtype)).latents.float()
            return approximate

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist.mode()
        return latents.float() * float(self.vae.config.scaling_factor)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 R R"]:
        """Scaled latents -> pixels, about [-1, 1] and not clamped."""
        latents = latents.to(self.device, self.dtype)
        if self.tiny is None:
            pixels: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        else:
            pixels = self.tiny.decode(latents, return_dict=False)[0]
        return pixels.float()

    def black(self) -> Float[Tensor, "1 C h w"]:
        """z_b of Eq. 6: the latent of a black image, encoded once, by the autoencoder of the training latents."""
        if self._black is None:
            self._black = self._encode(-torch.ones(1, 3, self.resolution, self.resolution))
        return self._black

    def use_tiny(self, reference: str) -> None:
        """Lets a small AutoencoderTiny encode and decode from now on: an approximation, many times faster.

        Args:
            reference: `tiny` (shipped, for the drawn world), a folder, or `hf:owner/name@revision`.

        Raises:
            ModelError: It can't be loaded, or its latents are of another shape than the base's.
        """
        folder = resolve_tiny(reference)
        try:
            tiny = AutoencoderTiny.from_pretrained(
                folder, torch_dtype=self.dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"fast.autoencoder: {folder} can't be loaded as an AutoencoderTiny: {error}") from error
        theirs = (tiny.config.latent_channels, 2 ** (len(tiny.config.encoder_block_out_channels) - 1))
        if theirs != (ours := (self.vae.config.latent_channels, self.factor)):
            raise ModelError(
                f"fast.autoencoder: {reference} makes latents of {theirs[0]} channels at 1/{theirs[1]} of the side, "
                f"the base {self.source} has {ours[0]} at 1/{ours[1]}"
            )
        self.tiny = tiny.to(self.device).eval().requires_grad_(False)

    # --- text ----------------------------------------------------------------------------------------------------

    def text(self, phrases: Sequence[str]) -> Float[Tensor, "B T D"]:
        """States of CLIP's text encoder, padded to its full length; each phrase is encoded once and kept.

        Longer phrases than the encoder takes are cut: see `too_long`.
        """
        states = {p: self._text_cache[p] for p in set(phrases) if p in self._text_cache}
        new = [p for p in dict.fromkeys(phrases) if p not in states]
        if new:
            states |= zip(new, self._encode_text(new), strict=True)
            self._text_cache.update((p, states[p].clone()) for p in new)  # a view would keep those of all
        return torch.stack([states[p] for p in phrases])

    @torch.no_grad()
    def _encode_text(self, phrases: list[str]) -> Tensor:
        ids = self.tokenizer(
            phrases,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        states: Tensor = self.text_encoder(ids.to(self.device, non_blocking=True)).last_hidden_state
        return states.float()

    def too_long(self, phrase: str) -> bool:
        """Whether the text encoder sees only the beginning of a phrase."""
        return bool(len(self.tokenizer(phrase).input_ids) > self.tokenizer.model_max_length)

    # --- adapters ------------------------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig, *, seed: int = 42) -> None:
        """Adds an untrained LoRA (it changes nothing yet), or with `full` frees all weights of the UNet.

        Args:
            config: Rank, alpha, target modules, or `full`.
            seed: Seed of the LoRA's A matrices.

        Raises:
            ConfigError: A target matches no layer.
        """
        if config.full:
            if self.dtype != torch.float32:  # what was read in bf16 is rounded for good
                self.velocity.unet = self._read_unet(torch.float32).to(self.device).eval()
            self.velocity.unet.requires_grad_(True)
            return
        unet = self.velocity.unet
        names = [name for name, _ in unet.named_modules()]
        dead = [t for t in config.targets if not any(n == t or n.endswith("." + t) for n in names)]
        if dead or not config.targets:
            raise ConfigError(f"lora.targets: {dead or 'an empty list'} matches no layer of {self.source / 'unet'}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # every worker starts from the same A
            self.velocity.unet = get_peft_model(
                unet,
                PeftLoraConfig(
                    r=config.rank,
                    lora_alpha=config.alpha or config.rank,  # type: ignore[arg-type]  # any number: it is divided by r
                    lora_dropout=0.0,
                    init_lora_weights="gaussian",
                    target_modules=list(config.targets),
                ),
            )
        for weight in self.trainable():
            weight.data = weight.data.float()
        compute_lora(self.velocity.unet)

    def load_lora(self, folder: Path, *, trainable: bool = False) -> None:
        """Puts a saved LoRA on the UNet.

        Args:
            folder: An adapter folder in peft's format.
            trainable: Whether its weights require a gradient.

        Raises:
            ModelError: Its keys or shapes don't fit this base: loading it would silently change nothing, or leave
                weights as they are drawn at random.
        """
        try:
            model = PeftModel.from_pretrained(self.velocity.unet, str(folder), is_trainable=trainable)
            with safe_open(folder / LORA_WEIGHTS, "pt") as file:
                missing = sorted(get_peft_model_state_dict(model).keys() - set(file.keys()))
        except UNUSABLE as error:
            raise ModelError(f"adapter {folder} doesn't fit the base {self.source}: {error}") from error
        if missing:
            raise ModelError(f"adapter {folder} lacks weights for the base {self.source}: {first_of(missing)}")
        if not all(bool(w.any()) for n, w in model.named_parameters() if ".lora_B." in n):
            raise ModelError(f"adapter {folder} has lora_B weights that are zero")
        for weight in (w for n, w in model.named_parameters() if ".lora_" in n):
            weight.data = weight.data.float()
        self.velocity.unet = model.to(self.device).eval()

    def load_weights(self, folder: Path) -> None:
        """Copies saved weights into the trainable ones, in place, so that an optimizer keeps hold of them.

        Args:
            folder: Written by `adapter.save` with the same settings.

        Raises:
            ModelError: The file is missing or damaged, or the names differ.
        """
        unet = self.velocity.unet
        is_lora = isinstance(unet, PeftModel)
        path = folder / (LORA_WEIGHTS if is_lora else "unet/diffusion_pytorch_model.safetensors")
        try:
            weights = load_file(path)
            found: Any = set_peft_model_state_dict(unet, weights) if is_lora else unet.load_state_dict(weights)
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: other names or shapes
            raise ModelError(f"{path} can't be read into {self.source}: {' '.join(str(error).split())}") from error
        if found.unexpected_keys:
            raise ModelError(f"{path}: {first_of(found.unexpected_keys)} belong to no layer of {self.source}")
        if missing := [name for name in found.missing_keys if ".lora_" in name]:  # of the base's own none is there
            raise ModelError(f"{path} lacks weights for {self.source}: {first_of(missing)}")

    def fuse(self) -> None:
        """Makes the UNet ready for inference only: LoRA folded into its weights, all of them in the arithmetic's type.

        The same function, without LoRA's extra products and without autocast's casts before every layer.
        """
        if isinstance(self.velocity.unet, PeftModel):
            self.velocity.unet = self.velocity.unet.merge_and_unload()
        self.velocity.to(self.dtype)
        self.velocity.dtype = self.dtype
        if self.device != "cpu":
            for part in (self.velocity, self.vae):
                part.to(memory_format=torch.channels_last)  # what tensor cores want of convolutions

    def trainable(self) -> list[nn.Parameter]:
        """The weights that training changes, as a list: an iterator would be spent by its first reader."""
        return [w for w in self.velocity.parameters() if w.requires_grad]

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 arithmetic where the backbone is bf16 and the UNet's weights are not all of it, else none."""
        if self.dtype == torch.bfloat16 and self.velocity.dtype is None:
            return torch.autocast(self.device.split(":")[0], torch.bfloat16)
        return nullcontext()


def first_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compute_lora(unet: nn.Module) -> None:
    """Computes a LoRA in fewer operations than peft does; the same function and gradients.

    One that is wider than its layer by merged weights: W + BA first, then one product instead of three. It pays where
    rank (in + out) >= in out, by channels: never in SD at the paper's rank, and almost everywhere in the drawn world,
    whose layers are about as wide as that rank. A narrow one beside them, but without peft's cast of all its input to
    the weights' type, which autocast takes back.

    Args:
        unet: With one LoRA on it, without dropout; its layers are changed in place.
    """
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            parts: Any = layer  # peft names no types
            a, b = parts.lora_A["default"].weight, parts.lora_B["default"].weight
            fan_in, fan_out = a.shape[1], b.shape[0]
            is_wide = len(a) * (fan_in + fan_out) >= fan_in * fan_out
            layer.forward = partial(_merged_forward if is_wide else _added_forward, layer)


def _merged_forward(layer: Any, x: Tensor, *_: object, **__: object) -> Tensor:
    base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = base.weight + layer.scaling["default"] * (b.flatten(1) @ a.flatten(1)).view_as(base.weight)
    return _product(base, x, weight, base.bias)


def _added_forward(layer: Any, x: Tensor, *_: object, **__: object) -> Tensor:
    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    low = _product(base, x, layer.lora_A["default"].weight, None)
    beside: Tensor = layer.lora_B["default"](low)
    through: Tensor = base(x)
    return through + (beside if scaling == 1 else scaling * beside)


def _product(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear or convolutional layer does, with another weight."""
    if isinstance(base, nn.Conv2d):
        return functional.conv2d(x, weight, bias, base.stride, base.padding, base.dilation, base.groups)
    return functional.linear(x, weight, bias)


def count_cut(base: Path, phrases: Iterable[str]) -> int:
    """How many phrases a base's text encoder sees only the beginning of; reads its tokenizer alone."""
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True)
    of_phrase = Counter(phrases)
    lengths = map(len, tokenizer(list(of_phrase)).input_ids) if of_phrase else ()
    return sum(n for n, length in zip(of_phrase.values(), lengths, strict=False) if length > tokenizer.model_max_length)
