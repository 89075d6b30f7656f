"""Step 2 of the drawn world: a small SAM that turns points and a polygon-like mask into the object's exact mask.

Two rounds a step, as Algorithm 1 runs it: first the coarse mask as prompt, then the model's own logits.
"""

from __future__ import annotations

import numpy as np
import torch
from common import Average, Clock, Log, mean_iou, parser, scenes
from safetensors.torch import save_file
from torch.nn import functional

from rlfseg.sam import SamModel, build_tiny

N_POINTS = 8


def spread_points(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """N points (x, y) by four rounds of k-means on the mask's pixels, each snapped to the nearest; float32 [N, 2]."""
    pixels = np.argwhere(mask)[:, ::-1].astype(np.float32)
    centres = pixels[rng.integers(len(pixels), size=N_POINTS)]
    for _ in range(4):
        nearest = np.square(pixels[:, None] - centres).sum(2).argmin(1)
        for k in range(N_POINTS):
            if (nearest == k).any():
                centres[k] = pixels[nearest == k].mean(0)
    return pixels[np.square(pixels[:, None] - centres).sum(2).argmin(0)]


def decode(sam, features, points, prompt):
    """Low-res logits [B, h, w] and IoU estimates [B] of B prompts, each on its own image's features [B, C, h, w]."""
    labels = torch.ones(points.shape[:2], dtype=torch.int)
    sparse, dense = sam.prompt_encoder(points=(points * 2 + 0.5, labels), boxes=None, masks=prompt)
    low, iou = sam.mask_decoder(
        # The decoder adds ONE image's features to all prompts; several images go in by the other addend.
        image_embeddings=torch.zeros_like(features[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=features + dense,
        multimask_output=False,
    )
    return low[:, 0], iou[:, 0]


def loss_of(low, iou, truth):
    """Cross-entropy, dice and the error of the IoU estimate, as SAM trains."""
    p = low.sigmoid()
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
    with torch.no_grad():
        a, b = low > 0, truth > 0.5
        real = (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)
    weight = 1 + 4 * truth  # objects cover a tenth of the picture
    cross = functional.binary_cross_entropy_with_logits(low, truth, weight=weight)
    return cross + dice.mean() + 0.1 * (iou - real).square().mean()


def evaluate(sam, held_out, rng):
    """Mean IoU of coarse labels, and of one and three rounds of refinement, with the exact masks of unseen scenes."""
    model, rows = SamModel(sam), {"coarse": [], "one": [], "three": []}
    for scene in held_out:
        exact = np.concatenate([p.instances for p in scene.phrases])
        coarse = np.concatenate([p.coarse_instances for p in scene.phrases])
        points = np.stack([spread_points(m, rng) for m in coarse])
        embedding = model.embed(scene.image)
        mask, low, _ = model.predict(embedding, points, masks=coarse)
        rows["one"].append(mean_iou(torch.from_numpy(mask), torch.from_numpy(exact)))
        for _ in range(2):
            mask, low, _ = model.predict(embedding, points, logits=low)
        rows["three"].append(mean_iou(torch.from_numpy(mask), torch.from_numpy(exact)))
        rows["coarse"].append(mean_iou(torch.from_numpy(coarse), torch.from_numpy(exact)))
    return {k: float(np.mean(v)) for k, v in rows.items()}


def main() -> None:
    """Trains and writes model.safetensors in fp16."""
    p = parser(__doc__ or "", 10, "runs/tiny_world/sam")
    p.add_argument("--images", type=int, default=6, help="images a step")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    log, rng = Log(args.out), np.random.default_rng(args.seed)
    train, held_out = scenes(args.scenes), scenes(100, held_out=True)

    sam = build_tiny()
    sam.train()
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-3, weight_decay=0.01)
    average, clock = Average(sam), Clock(optimizer, 1e-3, args.minutes)
    for step in clock:
        batch = [train[i] for i in rng.integers(len(train), size=args.images)]
        pixels = torch.from_numpy(np.stack([s.image for s in batch])).permute(0, 3, 1, 2).float()
        pixels = functional.interpolate(pixels, (128, 128), mode="bilinear", antialias=True, align_corners=False)
        features = sam.image_encoder(sam.preprocess(pixels))
        exact = [np.concatenate([p.instances for p in s.phrases]) for s in batch]
        coarse = np.concatenate([p.coarse_instances for s in batch for p in s.phrases])
        features = features.repeat_interleave(torch.tensor([len(e) for e in exact]), dim=0)
        truth = torch.from_numpy(np.concatenate(exact)).float()
        points = torch.from_numpy(np.stack([spread_points(m, rng) for m in coarse]))
        low, iou = decode(sam, features, points, (torch.from_numpy(coarse).float()[:, None] * 2 - 1) * 10)
        loss = loss_of(low, iou, truth)
        low, iou = decode(sam, features, points, low[:, None].detach())
        loss = (loss + loss_of(low, iou, truth)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for w in sam.parameters() if w.grad is not None], 1.0)
        optimizer.step()
        average.update(step)
        if step % 250 == 0:
            log(step=step, seconds=clock.elapsed, loss=loss.item())
    average.copy_to(sam)
    log(step=step, seconds=clock.elapsed, held_out=evaluate(sam, held_out, rng))
    save_file({k: v.half().contiguous() for k, v in sam.state_dict().items()}, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
