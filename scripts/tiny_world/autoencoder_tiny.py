"""Beside the steps of the drawn world: a small AutoencoderTiny that imitates its autoencoder, as TAESD does SD's.

The encoder learns the autoencoder's latents, the decoder what the autoencoder makes of latents and of masks' latents.
Small enough for a few minutes; `--resume` goes on from what an earlier start wrote.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import Average, Clock, Log, mask_to_unit, mean_iou, parser, scenes, to_unit
from diffusers import AutoencoderKL, AutoencoderTiny

WIDTH = 24


def build(latent_channels: int) -> AutoencoderTiny:
    """An untrained one: 64 x 64 x 3 <-> 16 x 16 x C, 0.13 M parameters."""
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(WIDTH,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    )


@torch.no_grad()
def teach(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Scaled latents of pictures or masks [B, 3, H, W]: what `AutoencoderTiny.encode(x).latents` is to give."""
    return vae.encode(x).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def ceiling(tiny: AutoencoderTiny, masks: torch.Tensor, latents: torch.Tensor) -> float:
    """Mean IoU of masks [B, 3, H, W] with what the small decoder makes of their latents."""
    score = tiny.decode(latents).sample.mean(1).clamp(-1, 1) / 2 + 0.5
    return mean_iou(score, masks[:, 0] / 2 + 0.5)


def main() -> None:
    """Trains and writes a diffusers folder."""
    p = parser(__doc__ or "", 8, "runs/tiny_world/autoencoder_tiny")
    p.add_argument("--vae", type=Path, default=Path("rlfseg/assets/base/vae"), help="the autoencoder to imitate")
    p.add_argument("--resume", action="store_true", help="go on from OUT")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    log, rng = Log(args.out), np.random.default_rng(args.seed + args.resume)
    vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False)
    train, held_out = scenes(args.scenes), scenes(100, held_out=True)
    pictures = np.stack([s.image for s in train])
    masks = [m for s in train for phrase in s.phrases for m in (phrase.mask, phrase.coarse)]
    unseen = to_unit(np.stack([s.image for s in held_out]))
    unseen_masks = mask_to_unit(np.stack([phrase.mask for s in held_out for phrase in s.phrases]))
    targets, mask_targets = teach(vae, unseen), teach(vae, unseen_masks)

    tiny = AutoencoderTiny.from_pretrained(args.out) if args.resume else build(vae.config.latent_channels)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    average = Average(tiny)
    clock = Clock(optimizer, 2e-3, args.minutes)
    for step in clock:
        some = [masks[i] for i in rng.integers(len(masks), size=8)]
        x = torch.cat([to_unit(pictures[rng.integers(len(pictures), size=8)]), mask_to_unit(np.stack(some))])
        z = teach(vae, x)
        # Masks that a UNet makes are not quite masks' latents: the decoder learns to forgive
        noisy = z + 0.2 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        encoded, decoded = tiny.encode(x).latents, tiny.decode(noisy).sample
        of_latents, of_pixels = (encoded - z).square().mean(), (decoded - x).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        (of_latents + of_pixels).backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 100 == 0:
            log(step=step, seconds=clock.elapsed, latents=of_latents.item(), pixels=of_pixels.item(),
                mask_iou=ceiling(tiny, unseen_masks, mask_targets))  # fmt: skip
    average.copy_to(tiny)
    tiny.eval().save_pretrained(args.out)
    with torch.no_grad():
        error = (tiny.encode(unseen).latents - targets).square().mean().item()
    log(step=step, seconds=clock.elapsed, mask_iou=ceiling(tiny, unseen_masks, mask_targets),
        latents_of_pictures=error, variance_of_latents=targets.var().item())  # fmt: skip


if __name__ == "__main__":
    main()
