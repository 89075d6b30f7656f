"""Segment Anything behind three functions: load, embed an image once, answer prompts of equal N in one call.

Frames. `SAM's frame` is the padded square that its networks see: the image's long side resized to `img_size` (1024 in
the released models), padded right and bottom. Low-res logits and mask prompts live in that frame at a quarter of its
patch grid's resolution: side `4 * embedding side`, 256 for the released models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional

from rlfseg.config import ASSETS, SamConfig
from rlfseg.device import choose_device
from rlfseg.errors import ConfigError, ModelError

TINY_WEIGHTS = ASSETS / "sam" / "model.safetensors"
PROMPT_LOGIT = 10.0  # SAM's own logits run from about -20 to +10, and its first LayerNorm saturates there
CHUNK, CHUNK_PIXELS = 64, 2**26  # prompts a decoder call, and pixels of their masks at full size, which are floats


@dataclass(frozen=True)
class Embedding:
    """An image as SAM's decoder wants it.

    Attributes:
        features: Float [1, C, h, w] of the image encoder.
        input_size: (H, W) of the image inside SAM's frame.
        original_size: (H, W) of the image itself.
    """

    features: Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from the image to SAM's frame; a side of a pixel or two is rounded, so they may differ."""
        return self.input_size[1] / self.original_size[1], self.input_size[0] / self.original_size[0]


class SamModel:
    """A loaded SAM, ready to embed and to predict; holds no state between calls."""

    def __init__(self, sam: Sam, device: torch.device | str = "cpu"):
        self.sam = sam.to(device).eval().requires_grad_(False)

    @classmethod
    def load(cls, config: SamConfig) -> SamModel:
        """Loads the shipped tiny SAM or an official checkpoint.

        Args:
            config: Checkpoint, architecture and device.

        Returns:
            The model in evaluation mode.

        Raises:
            ModelError: The file is missing or holds other weights.
            ConfigError: The architecture is neither given nor in the file's name, or there is no GPU and one is asked
                for.
        """
        device, path = choose_device(config.device), find_weights(config)
        if config.checkpoint == "tiny":
            sam = build_tiny()
            sam.load_state_dict({k: v.float() for k, v in load_file(path).items()})
            return cls(sam, device)
        sam = sam_model_registry[_architecture(path, config.model)]()
        try:
            # weights_only: an official .pth is a pickle, and a pickle from anywhere may run code
            sam.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (UnpicklingError, EOFError, RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(f"sam.checkpoint: {path} holds no weights of an official SAM: {error}") from error
        return cls(sam, device)

    @torch.no_grad()
    def embed(self, image: UInt8[np.ndarray, "H W 3"]) -> Embedding:
        """Runs the image encoder once for an RGB image of any size."""
        size, side = image.shape[:2], self.sam.image_encoder.img_size
        input_size = _fit(size, side)
        pixels = torch.from_numpy(np.array(image)).to(self.sam.device).permute(2, 0, 1)[None].float()
        pixels = functional.interpolate(pixels, input_size, mode="bilinear", antialias=True, align_corners=False)
        return Embedding(self.sam.image_encoder(self.sam.preprocess(pixels)), input_size, (size[0], size[1]))

    @torch.no_grad()
    def predict(
        self,
        embedding: Embedding,
        points: Float[np.ndarray, "B N 2"],
        *,
        masks: UInt8[np.ndarray, "B H W"] | None = None,
        logits: Float[np.ndarray, "B h w"] | None = None,
    ) -> tuple[UInt8[np.ndarray, "B H W"], Float[np.ndarray, "B h w"], Float[np.ndarray, " B"]]:
        """Answers B prompts on one image, each N positive points and a mask.

        Args:
            embedding: Of the image.
            points: Pixel coordinates (x, y) in the original image.
            masks: Binary masks at original size, for the first round; or
            logits: low-res logits of the round before, fed back unchanged.

        Returns:
            Binary masks at original size, low-res logits in SAM's frame, SAM's own estimates of IoU.
        """
        if (masks is None) == (logits is None):
            raise ValueError("give either masks or logits")
        xy = torch.from_numpy(np.array(points, dtype=np.float32))
        xy = (xy + 0.5) * torch.tensor(embedding.scale) - 0.5  # pixel centres
        height, width = embedding.original_size
        prompts: Any = logits if masks is None else masks
        at_once, parts = max(1, min(CHUNK, CHUNK_PIXELS // (height * width))), []
        for n in range(0, len(xy), at_once):
            own = prompts[n : n + at_once]
            prompt = torch.from_numpy(np.array(own))[:, None] if masks is None else self.mask_prompt(own)
            parts.append([x.cpu().numpy() for x in self._decode(embedding, xy[n : n + at_once], prompt)])
        full, low, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
        return full, low, iou

    def mask_prompt(self, masks: UInt8[np.ndarray, "B H W"]) -> Float[Tensor, "B 1 h w"]:
        """Binary masks at original size -> logits -10, +10 in SAM's frame: long side fitted, padded right and below."""
        side = 4 * self.sam.prompt_encoder.image_embedding_size[0]
        size = _fit((masks.shape[1], masks.shape[2]), side)
        soft = torch.from_numpy(np.array(masks)).float()[:, None]
        soft = functional.interpolate(soft, size, mode="bilinear", antialias=True, align_corners=False)
        logits = (soft * 2 - 1) * PROMPT_LOGIT
        return functional.pad(logits, (0, side - size[1], 0, side - size[0]), value=-PROMPT_LOGIT)

    def _decode(self, embedding: Embedding, points: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = self.sam.device
        labels = torch.ones(points.shape[:2], dtype=torch.int, device=device)
        sparse, dense = self.sam.prompt_encoder(
            points=(points.to(device), labels), boxes=None, masks=prompt.float().to(device)
        )
        low, iou = self.sam.mask_decoder(
            image_embeddings=embedding.features,
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,  # several points leave nothing ambiguous
        )
        full = self.sam.postprocess_masks(low, embedding.input_size, embedding.original_size)
        return (full[:, 0] > self.sam.mask_threshold).to(torch.uint8), low[:, 0].float(), iou[:, 0].float()


def build_tiny() -> Sam:
    """An untrained Sam of 1.2 M parameters: 128 px frame, patches of 8, so 16 x 16 embeddings and 64 x 64 logits."""
    width, side, patch = 96, 128, 8
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=patch,
            embed_dim=width,
            depth=4,
            num_heads=4,
            out_chans=width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(side // patch, side // patch),
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=width,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, num_heads=4, mlp_dim=256),
            iou_head_hidden_dim=width,
        ),
    )


def find_weights(config: SamConfig) -> Path:
    """The file that `SamModel.load` reads; nothing of it is read.

    Args:
        config: Checkpoint and architecture.

    Returns:
        Its path.

    Raises:
        ModelError: There is no such file.
        ConfigError: The architecture is neither given nor in the file's name.
    """
    tiny = config.checkpoint == "tiny"
    path = TINY_WEIGHTS if tiny else Path(config.checkpoint)
    if not path.is_file():
        fix = "install rlfseg again" if tiny else "give `tiny` or the path of an official sam_vit_*.pth"
        raise ModelError(f"sam.checkpoint: no file {path}; {fix}")
    if not tiny:
        _architecture(path, config.model)
    return path


def _architecture(path: Path, named: str | None) -> str:
    known = [name for name in ("vit_h", "vit_l", "vit_b") if name in (named or path.name)]
    if not known:
        raise ConfigError(f"sam.model: not told by the file name {path.name}; give one of vit_h, vit_l, vit_b")
    return known[0]


def _fit(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """(H, W) with the long side scaled to `side`, rounded half up as SAM does."""
    scale = side / max(size[:2])
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))
