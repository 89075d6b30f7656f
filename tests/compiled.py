"""What test_training.py asks of a compiled UNet, in a process without beartype, which torch can't compile.

The compiled training runs under data parallelism, as `pipeline/loop.py` has it, with gradient checkpointing.

python tests/compiled.py FOLDER      saves the adapter into FOLDER, prints JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, SpeedConfig, TrainConfig
from rlfseg.segmenter import Segmenter
from rlfseg.training import Batch, TrainState

torch.set_num_threads(1)
CARD = Card(base="tiny", resolution=64)


def make(compiled: bool) -> TrainState:
    tiny, lora = BackboneConfig(base="tiny", resolution=64, device="cpu"), LoraConfig(rank=16, targets=EVERY_LAYER)
    backbone = Backbone.load(tiny)
    backbone.add_lora(lora)
    speed = SpeedConfig(compile=compiled, gradient_checkpointing=compiled)
    optimizer = OptimizerConfig(lr=2e-3)
    return TrainState(TrainConfig(out="", backbone=tiny, lora=lora, optimizer=optimizer, speed=speed), backbone, 100)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def batch(phrases: int, seed: int) -> Batch:
    """Two labels a phrase, of which some samples learn from the one and some from the other."""
    rng = torch.Generator().manual_seed(seed)
    z1, z0, refined = (torch.randn(phrases, 8, 16, 16, generator=rng) for _ in range(3))
    ids, words = [f"{seed}-{n}" for n in range(phrases)], [f"ring {n}" for n in range(phrases)]
    both = torch.ones(phrases, dtype=torch.bool)
    return Batch(ids=ids, phrases=words, z1=z1, z0=z0, z0_refined=refined, has_refined=both)


eager, state = make(False), make(True)
segmenter = Segmenter(state.backbone, CARD)
rng = np.random.default_rng(0)
seconds = []
for n in range(20):
    start = time.perf_counter()
    segmenter(rng.integers(0, 255, (20 + 7 * n, 90 - 3 * n, 3), dtype=np.uint8), ["red ring"])
    seconds.append(time.perf_counter() - start)
of_pictures = graphs()
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
# 3 MB of gradients in buckets of 1: the graph is cut between them, as it is for SD's 51 MB in buckets of 25
buckets = {"gradient_as_bucket_view": True, "broadcast_buffers": False, "bucket_cap_mb": 1}
state.model = DistributedDataParallel(state.backbone.velocity, **buckets)
figures = []
for seed in range(4):
    figures.append((state.step(batch(4, seed)), eager.step(batch(4, seed))))
state.save(Path(sys.argv[1]), CARD)
told = {"figures": figures, "graphs_of_20_pictures": of_pictures, "graphs": graphs(), "seconds": seconds}
print(json.dumps(told))
distributed.destroy_process_group()
