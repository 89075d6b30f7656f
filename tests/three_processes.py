"""One of the three processes of test_training_processes.py: a training over gloo that is left and gone on with.

python tests/three_processes.py FOLDER RANK      reads FOLDER/batches.pt, writes FOLDER/three-RANK.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from rlfseg.adapter import Card
from rlfseg.training import Batch, TrainState
from tests.trained import make

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/three", rank=rank, world_size=3)
batches = [Batch(**b) for b in torch.load(folder / "batches.pt")]


def started(settle: bool) -> TrainState:
    """A training as every process starts it."""
    state = make()
    state.model = DistributedDataParallel(
        state.backbone.velocity, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    if settle:
        state.settle(len(batches[0].ids))
    return state


def second_step(settle: bool) -> list[list[Tensor]]:
    """The weights after two steps: without a break, and with one between them."""
    saved, ends = folder / f"saved-{settle}", list[list[Tensor]]()
    whole = started(settle)
    whole.step(batches[rank])
    if rank == 0:
        whole.save(saved, Card(base="tiny", resolution=64))
    distributed.barrier()
    whole.step(batches[rank + 1])
    ends.append([w.detach().clone() for w in whole.weights])
    again = started(settle)
    again.load(saved)
    again.step(batches[rank + 1])
    ends.append([w.detach().clone() for w in again.weights])
    return ends


torch.save({settle: second_step(settle) for settle in (True, False)}, folder / f"three-{rank}.pt")
distributed.destroy_process_group()
