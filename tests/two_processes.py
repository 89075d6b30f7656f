"""One of the two processes of test_training_processes.py: data parallelism over gloo, with gradient checkpointing.

python tests/two_processes.py FOLDER RANK      reads FOLDER/batches.pt, writes FOLDER/RANK.pt
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, SpeedConfig, TrainConfig
from rlfseg.training import Batch, TrainState

OWN = {0: [[0, 2], [1, 3]], 1: [[1], [2]]}  # of three batches a step, rank 0 has two
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

tiny = BackboneConfig(base="tiny", resolution=64, device="cpu")
lora = LoraConfig(rank=4, targets=EVERY_LAYER)
config = TrainConfig(
    out="",
    backbone=tiny,
    lora=lora,
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine"),
    speed=SpeedConfig(gradient_checkpointing=True),
)
backbone = Backbone.load(tiny)
backbone.add_lora(lora)
state = TrainState(config, backbone, 6)
reductions = 0


def counted(group, bucket):  # torch looks at annotations, and doesn't know those that are text
    """The usual reduction, counted once a backward pass."""
    global reductions
    reductions += bucket.is_last()
    return allreduce_hook(group, bucket)


model = DistributedDataParallel(backbone.velocity, gradient_as_bucket_view=True, broadcast_buffers=False)
model.register_comm_hook(distributed.group.WORLD, counted)
state.model = model
batches = [Batch(**b) for b in torch.load(folder / "batches.pt")]
steps, gradient = [], torch.empty(0)
for own in OWN[rank]:
    steps.append(state.step(*(batches[n] for n in own), weight=2 / 3))
    if not len(gradient):
        gradient = torch.cat([w.grad.flatten().clone() for w in state.weights if w.grad is not None])
told = reductions
weights = [w.detach().clone() for w in state.weights]

# One process meets NaN: none may move
hurt = batches[0]
if rank == 1:
    hurt = dataclasses.replace(hurt, z1=hurt.z1 * math.nan)
steps.append(state.step(hurt))
assert all(torch.equal(a, b) for a, b in zip(weights, state.weights, strict=True))

result = {k: [s[k] for s in steps] for k in ("lr", "grad_norm", "skipped")}
result = {k: v if k == "skipped" else v[:2] for k, v in result.items()}
result |= {"gradient": gradient, "weights": weights, "reductions": told}
if rank == 0:
    state.save(folder / "saved", Card(base="tiny", resolution=64))
    saved = load_file(folder / "saved" / "adapter_model.safetensors")
    result |= {"saved_keys": list(saved), "zero_lora_b": sum(not w.any() for n, w in saved.items() if "lora_B" in n)}
torch.save(result, folder / f"{rank}.pt")
distributed.destroy_process_group()
