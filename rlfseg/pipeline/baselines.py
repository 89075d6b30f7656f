"""The bench's opponents: what a competent user writes today with diffusers, accelerate, peft and segment-anything.

Nothing here is made slow on purpose: models are loaded once, no gradients are kept where none are needed, weights have
the type that the device likes. But each does the obvious thing: a phrase after the other, a mask after the other, the
autoencoder inside the training loop, both losses in full. They share no line with rlfseg.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from peft import LoraConfig
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import functional as vision
from transformers import CLIPTextModel, CLIPTokenizer

Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]


class Pipeline:
    """One-step segmentation with diffusers, a phrase at a time.

    Args:
        folder: A diffusers folder.
        resolution: Side of the square that images are stretched to, in pixels.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, resolution: int, device: str):
        self.resolution, self.device = resolution, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        kwargs: Any = {"torch_dtype": self.dtype, "local_files_only": True}
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", **kwargs).to(device).eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", **kwargs).to(device).eval()
        text_encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=self.dtype)
        self.text_encoder = text_encoder.to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    @torch.inference_mode()
    def __call__(self, image: Image, phrase: str) -> NDArray[np.float32]:
        """Scores float32 [H, W] in [0, 1] of one phrase on an image, uint8 RGB [H, W, 3]."""
        z1 = self.encode(self.preprocess(image))
        t = torch.tensor([1000.0], device=self.device)
        velocity = self.unet(z1, t, encoder_hidden_states=self.text([phrase])).sample
        mask = self.vae.decode((z1 - velocity) / self.vae.config.scaling_factor).sample
        score = mask.float().mean(dim=1, keepdim=True).clamp(-1, 1) / 2 + 0.5
        scores: NDArray[np.float32] = vision.resize(score, list(image.shape[:2]), antialias=True)[0, 0].cpu().numpy()
        return scores

    def preprocess(self, image: Image) -> Tensor:
        """A picture as float [1, 3, R, R] in [-1, 1]."""
        pixels = torch.from_numpy(image.copy()).to(self.device).permute(2, 0, 1)[None].float()
        resized: Tensor = vision.resize(pixels, [self.resolution, self.resolution], antialias=True)
        return (resized / 127.5 - 1).to(self.dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents of pixels [B, 3, R, R]."""
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        return latents

    def text(self, phrases: Sequence[str]) -> Tensor:
        """Text states [B, T, D]."""
        longest = self.tokenizer.model_max_length
        ids = self.tokenizer(
            list(phrases), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).input_ids
        states: Tensor = self.text_encoder(ids.to(self.device)).last_hidden_state
        return states


class LoraScript:
    """Training as in diffusers' LoRA scripts: accelerate around a loop that encodes what it trains on.

    Args:
        pipeline: The base; its UNet gets a LoRA.
        rank: Of the LoRA, whose alpha is the same.
        targets: Its layers.
        lr: Learning rate.
    """

    def __init__(self, pipeline: Pipeline, *, rank: int, targets: Sequence[str], lr: float = 1e-4):
        self.pipeline = pipeline
        bf16 = pipeline.device == "cuda"
        self.accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not bf16)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        pipeline.unet.add_adapter(config)
        for weight in (w for w in pipeline.unet.parameters() if w.requires_grad):
            weight.data = weight.data.float()
        weights = [w for w in pipeline.unet.parameters() if w.requires_grad]
        self.weights, optimizer = weights, torch.optim.AdamW(weights, lr=lr)
        self.unet, self.optimizer = self.accelerator.prepare(pipeline.unet, optimizer)

    def step(self, images: Tensor, masks: Tensor, phrases: Sequence[str]) -> float:
        """One step on images and masks [B, 3, R, R] in [-1, 1]; the loss."""
        with torch.no_grad():
            z1, z0 = self.pipeline.encode(images), self.pipeline.encode(masks)
            text = self.pipeline.text(phrases)
        t = torch.rand(len(z1), device=z1.device)
        return self._update(self.loss(z1, z0, t, text).mean())

    def step_of_two_losses(self, z1: Tensor, z0: Tensor, z0_refined: Tensor, t: Tensor, text: Tensor) -> float:
        """One step of Eq. 4 as it is printed: both losses in full, then the smaller of each sample; the loss."""
        original, refined = self.loss(z1, z0, t, text), self.loss(z1, z0_refined, t, text)
        return self._update(torch.minimum(original, refined).mean())

    def loss(self, z1: Tensor, z0: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Eq. 2 a sample, [B]."""
        s = t.view(-1, 1, 1, 1)
        with self._autocast():
            velocity = self.unet(s * z1 + (1 - s) * z0, 1000 * t, encoder_hidden_states=text).sample
        return functional.mse_loss(velocity.float(), (z1 - z0).float(), reduction="none").mean(dim=(1, 2, 3))

    def _autocast(self) -> AbstractContextManager[object]:
        return self.accelerator.autocast() if self.pipeline.device == "cuda" else nullcontext()

    def _update(self, loss: Tensor) -> float:
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def refine(
    sam: Sam, image: Image, masks: Sequence[Mask], *, anchors: int, rounds: int, tau: float, seed: int, again: bool
) -> list[Mask]:
    """Algorithm 1 with `SamPredictor`, a mask after the other.

    Args:
        sam: The model.
        image: uint8 RGB [H, W, 3].
        masks: uint8 {0, 1} [H, W], one object each.
        anchors: N.
        rounds: T_max.
        tau: IoU of two rounds at which a mask counts as settled.
        seed: Of k-means.
        again: Whether the image is set for each mask again, and not once.

    Returns:
        The refined masks.
    """
    predictor, refined = SamPredictor(sam), []
    if not again:
        predictor.set_image(image)
    for mask in masks:
        if again:
            predictor.set_image(image)
        refined.append(_refine_one(predictor, mask, anchors, rounds, tau, seed))
    return refined


def _refine_one(predictor: SamPredictor, mask: Mask, anchors: int, rounds: int, tau: float, seed: int) -> Mask:
    pixels = np.argwhere(mask)[:, ::-1]
    centres = KMeans(anchors, n_init=1, random_state=seed).fit(pixels.astype(np.float64)).cluster_centers_.round(6)
    points = np.unique([pixels[np.square(pixels - c).sum(axis=1).argmin()] for c in centres], axis=0)
    side = 4 * predictor.model.prompt_encoder.image_embedding_size[0]
    logits, previous = _as_logits(mask, side), mask.astype(bool)
    for _ in range(rounds):
        found, _, low = predictor.predict(points, np.ones(len(points)), mask_input=logits, multimask_output=False)
        logits, moved, previous = low, previous, found[0]
        if (moved & previous).sum() >= tau * (moved | previous).sum():
            break
    return previous.astype(np.uint8)


def _as_logits(mask: Mask, side: int) -> NDArray[np.float32]:
    """A mask as SAM's prompt: long side fitted, padded right and below, -10 and 10; float32 [1, side, side]."""
    scale = side / max(mask.shape)
    height, width = (int(n * scale + 0.5) for n in mask.shape)
    fitted = vision.resize(torch.from_numpy(mask)[None].float(), [height, width], antialias=True)
    padded = functional.pad(fitted * 20 - 10, (0, side - width, 0, side - height), value=-10.0)
    logits: NDArray[np.float32] = padded.numpy()
    return logits
