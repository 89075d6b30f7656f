"""Step 4 of the drawn world: the adapter, a rectified flow from pictures to masks; also gates (b) and (c).

    gate (b)  python adapter.py --scratch --full --overfit 64     a UNet from scratch learns 64 scenes by heart
    gate (c)  python adapter.py [--full]                          LoRA comes within 0.03 mIoU of full fine-tuning
    shipped   python adapter.py --minutes 40                      exact masks, as many scenes as fit in the time

Everything but the loop is the product's own code: `Backbone`, `TrainState`, `Segmenter`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from base import build_unet
from common import Average, Clock, Log, parser, scenes

from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, TrainConfig, as_dict
from rlfseg.datasets.shapes import Scene
from rlfseg.images import image_to_tensor, mask_to_tensor
from rlfseg.training import Batch, Labelled, TrainState

HARD = {"top", "bottom", "left", "right", "striped", "dotted"}  # words of the phrases that are learned last


def encode(backbone: Backbone, arrays: list[np.ndarray], tensor) -> torch.Tensor:
    """Latents of many images or masks, in fp16."""
    side = backbone.resolution
    chunks = (arrays[n : n + 128] for n in range(0, len(arrays), 128))
    return torch.cat([backbone.encode(torch.stack([tensor(a, side) for a in c])).half() for c in chunks])


class Latents:
    """All phrases of many scenes as latents in memory."""

    def __init__(self, backbone: Backbone, items: list[Scene], seed: int, hard: int):
        self.z1 = encode(backbone, [s.image for s in items], image_to_tensor)
        pairs = [(n, p) for n, s in enumerate(items) for p in s.phrases]
        self.owner = torch.tensor([n for n, _ in pairs])
        self.phrases = [p.caption for _, p in pairs]
        self.z0 = encode(backbone, [p.mask for _, p in pairs], mask_to_tensor)
        self.times = np.array([hard if HARD & set(p.split()) else 1 for p in self.phrases])
        self.rng = np.random.default_rng(seed)

    def batches(self, size: int):
        """Endless shuffled batches."""
        for epoch in itertools.count():
            order = self.rng.permutation(np.repeat(np.arange(len(self.phrases)), self.times))
            for n in range(0, len(order) - size + 1, size):
                rows = torch.from_numpy(order[n : n + size])
                z0 = self.z0[rows].float()
                yield Batch(
                    ids=[f"{epoch}/{i}" for i in rows.tolist()],
                    phrases=[self.phrases[i] for i in rows],
                    z1=self.z1[self.owner[rows]].float(),
                    z0=z0,
                    z0_refined=z0,
                    has_refined=torch.zeros(size, dtype=torch.bool),
                )


def labelled(items: list[Scene]) -> list[Labelled]:
    """Scenes as validation wants them."""
    return [
        Labelled(image=s.image, phrases=[p.caption for p in s.phrases], masks=np.stack([p.mask for p in s.phrases]))
        for s in items
    ]


def main() -> None:
    """Trains, measures on unseen scenes, writes an adapter folder."""
    p = parser(__doc__ or "", 40, "runs/tiny_world/adapter")
    p.add_argument("--base", default="runs/tiny_world/base", help="folder of step 3")
    p.add_argument("--base-name", default="tiny", help="how the adapter's card calls the base")
    p.add_argument("--scratch", action="store_true", help="forget the base's UNet")
    p.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    p.add_argument("--overfit", type=int, default=0, help="train and measure on so many scenes")
    p.add_argument("--rank", type=int, default=64)
    p.add_argument("--batch", type=int, default=16, help="phrases a step")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--times", default="one", choices=["one", "uniform", "mixed"])
    p.add_argument("--hard", type=int, default=1, help="how often an epoch has a phrase with a place or a texture")
    p.add_argument("--decay", type=float, default=0.995, help="of the averaged weights")
    p.add_argument("--resume", type=Path, help="adapter folder to go on from")
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    log = Log(args.out)
    train = scenes(args.overfit or args.scenes)
    held_out = labelled(train if args.overfit else scenes(100, held_out=True))

    config = TrainConfig(
        latents="in memory", out=str(args.out), batch_size=args.batch, t_sampling=args.times, seed=args.seed,
        backbone=BackboneConfig(base=args.base, resolution=64, device="cpu"),
        lora=LoraConfig(rank=args.rank, targets=EVERY_LAYER, full=args.full),
        optimizer=OptimizerConfig(lr=args.lr, betas=(0.9, 0.99)),
    )  # fmt: skip
    backbone = Backbone.load(config.backbone, unet=build_unet() if args.scratch else None)
    latents = Latents(backbone, train, args.seed, args.hard)
    backbone.add_lora(config.lora, seed=args.seed)
    if args.resume:
        backbone.load_weights(args.resume)
    state = TrainState(config, backbone, 10**9)
    card = Card(base=args.base_name, resolution=64, full=args.full, data=f"drawn scenes, exact masks, {len(train)}")
    log(trainable=sum(w.numel() for w in state.weights), phrases=len(latents.phrases), args=str(vars(args)))

    average, clock = Average(backbone.velocity, args.decay), Clock(state.optimizer, args.lr, args.minutes)
    for step, batch in zip(clock, latents.batches(args.batch), strict=False):
        # The clock's learning rate, by time, in place of the config's
        state.config = replace(config, optimizer=replace(config.optimizer, lr=state.optimizer.param_groups[0]["lr"]))
        figures = state.step(batch)
        average.update(step)
        if step % 100 == 0:
            log(step=step, seconds=clock.elapsed, **figures)
        if step % 1000 == 999:
            log(step=step, seconds=clock.elapsed, raw_miou=state.validate(held_out[:50], card).results()["miou"])
    average.copy_to(backbone.velocity)
    figures = state.validate(held_out, card).results()
    log(step=step, seconds=clock.elapsed, held_out=figures)
    config = replace(config, out="adapter", backbone=replace(config.backbone, base=args.base_name))
    adapter.save(backbone, args.out, replace(card, metrics=figures, config=as_dict(config)))


if __name__ == "__main__":
    main()
