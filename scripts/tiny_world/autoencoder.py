"""Step 1 of the drawn world: the autoencoder, AutoencoderKL of SD's kind (f = 4), on pictures and masks.

Gate (a): exact masks of unseen scenes through encode and decode keep an IoU of at least 0.97.
"""

from __future__ import annotations

import numpy as np
import torch
from common import Average, Clock, Log, mask_to_unit, mean_iou, parser, scenes, to_unit
from diffusers import AutoencoderKL

LATENT_CHANNELS = 8


def build() -> AutoencoderKL:
    """An untrained autoencoder: 64 x 64 x 3 <-> 16 x 16 x 8; without attention, so it takes any size."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def mask_ceiling(vae: AutoencoderKL, masks: torch.Tensor) -> float:
    """Mean IoU of masks [B, 3, H, W] with themselves after encode and decode."""
    score = vae.decode(vae.encode(masks).latent_dist.mode()).sample.mean(1).clamp(-1, 1) / 2 + 0.5
    return mean_iou(score, masks[:, 0] / 2 + 0.5)


def main() -> None:
    """Trains, checks gate (a), writes a diffusers folder."""
    args = parser(__doc__ or "", 18, "runs/tiny_world/vae").parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    log, rng = Log(args.out), np.random.default_rng(args.seed)
    train, held_out = scenes(args.scenes), scenes(200, held_out=True)
    images = np.stack([s.image for s in train])
    masks = [m for s in train for p in s.phrases for m in (p.mask, p.coarse)]
    unseen = to_unit(np.stack([s.image for s in held_out]))
    unseen_masks = mask_to_unit(np.stack([p.mask for s in held_out for p in s.phrases]))

    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    average = Average(vae)
    clock = Clock(optimizer, 2e-3, args.minutes)
    for step in clock:
        # Two masks in one: twice the edges a step.
        pairs = [masks[i] | masks[j] for i, j in rng.integers(len(masks), size=(4, 2))]
        x = torch.cat([to_unit(images[rng.integers(len(images), size=4)]), mask_to_unit(np.stack(pairs))])
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
        error = (out - x).abs() + (out - x).square()
        loss = error.mean() + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 250 == 0:
            z = posterior.mean.detach()
            log(step=step, seconds=clock.elapsed, loss=loss.item(), masks=error[4:].mean().item(),
                pictures=error[:4].mean().item(), latent_std=z.std().item(),
                noise_std=posterior.std.mean().item(), ceiling=mask_ceiling(vae, unseen_masks[:96]))  # fmt: skip
    average.copy_to(vae)
    vae.eval()
    with torch.no_grad():
        z = vae.encode(unseen).latent_dist.mode()
        error = (vae.decode(z).sample.clamp(-1, 1) - unseen).square().mean().item()
    std = torch.cat([z, vae.encode(unseen_masks[:200]).latent_dist.mode()]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    vae.save_pretrained(args.out)
    log(step=step, seconds=clock.elapsed, gate_a_mask_iou=mask_ceiling(vae, unseen_masks),
        picture_psnr=10 * np.log10(4 / error), scaling_factor=1 / std)  # fmt: skip


if __name__ == "__main__":
    main()
