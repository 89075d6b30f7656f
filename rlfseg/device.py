"""Which device and which arithmetic: chosen sensibly, refused clearly."""

from __future__ import annotations

import os

import torch

from rlfseg.errors import ConfigError


def choose_device(wanted: str) -> str:
    """`cuda` or `cpu`; `auto` takes the GPU where there is one.

    Args:
        wanted: `auto`, `cpu` or `cuda`.

    Returns:
        A name that torch takes.

    Raises:
        ConfigError: A GPU is asked for and this process sees none.
    """
    # Whoever hides GPUs after torch has counted them, which importing diffusers makes it do, is believed too
    there = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError("device: cuda is asked for and this process sees no GPU; use cpu or auto")
    return "cuda" if wanted != "cpu" and there else "cpu"


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """bf16 on a GPU and fp32 on a CPU, unless told otherwise; never fp16, in which the autoencoder overflows."""
    if wanted == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
