"""From an image's latent to its mask's: one step (Eq. 5), K steps (Table 9), AOS (Eq. 6-7) and HSS (Eq. 8-10).

Letters: `z1` latent of the image, at t = 1; `z0` latent of the mask, at t = 0; `dz` the single step from z1 to z0;
`z_b` latent of a black image. Shapes: B samples, C H W of a latent, L D of the text. A velocity model is any callable
`v(z_t, t, c)` with z_t [B, C, H, W], t [B] in [0, 1] and c [B, L, D], trained to give z1 - z0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from rlfseg.errors import ConfigError

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sample(NamedTuple):
    """Mask latents, and how the step that led to them was rescaled.

    Attributes:
        z0: Mask latents [B, C, H, W].
        gamma: Each sample's factor of Eq. 7 or 10, after clipping, float32 [B]; 0 where nothing was rescaled.
        clipped: Whether gamma ran into its upper limit, bool [B].
    """

    z0: Tensor
    gamma: Tensor
    clipped: Tensor


def one_step(
    v: Velocity, z1: Float[Tensor, "B C H W"], text: Float[Tensor, "B L D"]
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Eq. 5: (z0, dz) by a single step from t = 1 to t = 0."""
    dz = -v(z1, _times(z1, 1.0), text)  # v points from mask to image, and Delta t = -1
    return z1 + dz, dz


def euler(
    v: Velocity,
    z1: Float[Tensor, "B C H W"],
    text: Float[Tensor, "B L D"],
    steps: int,
    dz: Float[Tensor, "B C H W"] | None = None,
) -> Float[Tensor, "B C H W"]:
    """Table 9, Eq. 8: z0 by K equal Euler steps at t = 1, 1 - 1/K, ..., 1/K.

    Args:
        v: Velocity model.
        z1: Image latents.
        text: Text states.
        steps: K, 1 or more.
        dz: The single step of Eq. 5 where it is known already; it saves the first of the K calls.

    Returns:
        Mask latents.
    """
    dz = one_step(v, z1, text)[1] if dz is None else dz
    z = z1 + dz / steps
    for k in range(1, steps):
        z = z - v(z, _times(z, 1 - k / steps), text) / steps
    return z


def rescale(
    z1: Float[Tensor, "B C H W"],
    dz: Float[Tensor, "B C H W"],
    reference: Float[Tensor, "B C H W"],
    eps: float,
    gamma_max: float | None,
) -> Sample:
    """What AOS and HSS share: lengthens the single step by its mean shortfall from a reference, where it is near it.

    Args:
        z1: Image latents.
        dz: The single step of Eq. 5.
        reference: Latents that the step should have reached: z_b (Eq. 6-7) or the multi-step result (Eq. 9-10).
        eps: Width of the stable region S, in units of the latents.
        gamma_max: Upper limit of gamma; None: none, as in the paper.

    Returns:
        z0' = z1 + (1 + gamma) dz, with one gamma a sample; gamma is 0 where S is empty or nothing moves in it.
    """
    deviation = (reference - (z1 + dz)).abs()
    stable = deviation < eps  # Eq. 6, 9: S, over C, H and W
    above = (deviation * stable).sum(dim=(1, 2, 3), dtype=torch.float32)
    below = (dz.abs() * stable).sum(dim=(1, 2, 3), dtype=torch.float32)
    gamma = torch.where(below > 0, above / below, 0)  # Eq. 7, 10
    limit = float("inf") if gamma_max is None else gamma_max
    z0 = z1 + (1 + gamma.clamp(max=limit)).view(-1, 1, 1, 1) * dz
    return Sample(z0.to(z1.dtype), gamma.clamp(max=limit), gamma > limit)


def aos(
    z1: Float[Tensor, "B C H W"],
    dz: Float[Tensor, "B C H W"],
    z_black: Float[Tensor, "... C H W"],
    eps: float,
    gamma_max: float | None,
) -> Sample:
    """Adaptive one-step sampling, Eq. 6-7: `rescale` against z_b, so that the background reaches black."""
    return rescale(z1, dz, z_black.expand_as(z1), eps, gamma_max)


def hss(
    v: Velocity,
    z1: Float[Tensor, "B C H W"],
    text: Float[Tensor, "B L D"],
    dz: Float[Tensor, "B C H W"],
    eps: float,
    gamma_max: float | None,
    steps: int = 5,
) -> Sample:
    """Hybrid step sampling, Eq. 8-10: `rescale` against the result of K steps, K = 5 in the paper (A.2)."""
    return rescale(z1, dz, euler(v, z1, text, steps, dz), eps, gamma_max)


def sample(
    v: Velocity,
    z1: Float[Tensor, "B C H W"],
    text: Float[Tensor, "B L D"],
    *,
    steps: int = 1,
    rescale: Literal["none", "aos", "hss"] = "none",
    eps: float | None = None,
    gamma_max: float | None = 0.25,
    hss_steps: int = 5,
    z_black: Float[Tensor, "... C H W"] | None = None,
) -> Sample:
    """Mask latents by any of this file's ways, named as in `SamplingConfig`.

    Args:
        v: Velocity model.
        z1: Image latents.
        text: Text states.
        steps: Euler steps.
        rescale: Rescale the single step by AOS or HSS.
        eps: Width of the stable region, in units of the latents; needed where there is rescaling.
        gamma_max: Upper limit of gamma; None: none, as in the paper.
        hss_steps: K of HSS.
        z_black: Latent of a black image of the same size, by the autoencoder of the training latents; needed by AOS.

    Returns:
        Mask latents, with gamma 0 where nothing is rescaled.

    Raises:
        ConfigError: Rescaling of more than one step, or without `eps` or `z_black`.
    """
    check(steps, rescale, eps)
    if rescale == "none":
        zero = torch.zeros(len(z1), device=z1.device)
        return Sample(euler(v, z1, text, steps), zero, zero > 0)
    assert eps is not None
    if rescale == "hss":
        return hss(v, z1, text, one_step(v, z1, text)[1], eps, gamma_max, hss_steps)
    if z_black is None:
        raise ConfigError("z_black=None with rescale=aos: pass the latent of a black image, or set rescale=hss or none")
    return aos(z1, one_step(v, z1, text)[1], z_black, eps, gamma_max)


def check(steps: int, rescale: Literal["none", "aos", "hss"], eps: float | None) -> None:
    """Refuses settings that don't go together, without any network.

    Args:
        steps: As in `sample`.
        rescale: As in `sample`.
        eps: As in `sample`.

    Raises:
        ConfigError: Rescaling of more than one step, or without `eps`.
    """
    if rescale != "none" and steps != 1:
        raise ConfigError(f"steps={steps} with rescale={rescale}: needs a single step; set steps=1 or rescale=none")
    if rescale != "none" and eps is None:
        raise ConfigError(f"eps=null with rescale={rescale}: run `calibrate` on a validation split, or set eps=0.1")


def _times(z: Tensor, t: float) -> Float32[Tensor, " B"]:
    # float32 also for bf16 latents: bf16 can't tell t = 0.8 from 0.801, and a UNet is given 1000 t.
    return torch.full((len(z),), t, dtype=torch.float32, device=z.device)
