"""Rectified latent flow (section 3.2, Eq. 2) and dynamic selection between two labels (Eq. 4).

Letters: `z1` latent of the image, at t = 1; `z0` latent of the mask, at t = 0; `c` text states; `v = z1 - z0`, which
points from the mask to the image. The paper swaps the names once (3.2) and is followed in its formulas.
Shapes: B samples, C H W of a latent, L D of the text. A velocity model is any callable `v(z_t, t, c)` with z_t
[B, C, H, W], t [B] in [0, 1] and c [B, L, D]; scaling t to a UNet's own range is its business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def interpolate(
    z1: Float[Tensor, "B C H W"], z0: Float[Tensor, "B C H W"], t: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """Section 3.2: the point z_t of the straight path, z1 at t = 1 and z0 at t = 0; one t a sample."""
    t = t.view(-1, 1, 1, 1)
    return t * z1 + (1 - t) * z0


def velocity(z1: Float[Tensor, "B C H W"], z0: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Section 3.2: the path's constant velocity dz_t / dt = z1 - z0, the same at every t."""
    return z1 - z0


def loss_per_sample(
    v_pred: Float[Tensor, "B C H W"], z1: Float[Tensor, "B C H W"], z0: Float[Tensor, "B C H W"]
) -> Float32[Tensor, " B"]:
    """Eq. 2, inside the expectation: mean over C, H, W of (v_theta - (z1 - z0))^2; float32 whatever comes in."""
    return (v_pred.float() - velocity(z1.float(), z0.float())).square().flatten(1).mean(dim=1)


def flow_loss(
    v: Velocity,
    z1: Float[Tensor, "B C H W"],
    z0: Float[Tensor, "B C H W"],
    t: Float[Tensor, " B"],
    text: Float[Tensor, "B L D"],
) -> Float32[Tensor, " B"]:
    """Eq. 2 at given times: the loss of each sample with one label a sample, by one call of `v`."""
    return loss_per_sample(v(interpolate(z1, z0, t), t, text), z1, z0)


def sample_time(
    mode: Literal["uniform", "one", "mixed"], seed: int, epoch: int, ids: Sequence[str]
) -> Float32[Tensor, " B"]:
    """Section 3.2: one t a sample, a pure function of (seed, epoch, id): the same on any worker and after a resume.

    Args:
        mode: `uniform`: t ~ U[0, 1), the paper's (3.2); `one`: t = 1, the only time that one-step sampling asks for;
            `mixed`: t = 1 for half of the samples by chance, uniform for the others.
        seed: The run's seed.
        epoch: Number of the epoch; every epoch draws anew.
        ids: One id a sample.

    Returns:
        Times in [0, 1], float32, in the order of the ids.
    """
    u = torch.tensor([_hash_to_unit(f"{seed}/{epoch}/{i}") for i in ids], dtype=torch.float32)
    return {"uniform": u, "one": torch.ones_like(u), "mixed": (2 * u).clamp(max=1)}[mode]


def _hash_to_unit(key: str) -> float:
    # 24 bits, as many as a float32 holds: with more, rounding could lift a time to 1.
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=3).digest()
    return int.from_bytes(digest, "big") / 2**24


def select(
    loss_original: Float[Tensor, " B"], loss_refined: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Eq. 4: each sample's smaller loss, and whether it is the refined label's; a tie is the refined label's."""
    indicator = loss_original < loss_refined  # 1_rds: 1 where the original is easier to learn
    return torch.where(indicator, loss_original, loss_refined), ~indicator


def selection_loss(
    v: Velocity,
    z1: Float[Tensor, "B C H W"],
    z0: Float[Tensor, "B C H W"],
    z0_refined: Float[Tensor, "B C H W"],
    t: Float[Tensor, " B"],
    text: Float[Tensor, "B L D"],
    *,
    has_refined: Bool[Tensor, " B"],
    v_frozen: Velocity | None = None,
    few_calls: bool = False,
) -> tuple[Float32[Tensor, " B"], Bool[Tensor, " B"]]:
    """Eq. 4 from latents: equal to computing both losses in full, in value and gradient, but cheaper.

    The refined label's loss is computed with gradient, the original's without; only the samples that turn out to learn
    from the original (15 % in the paper) are computed again with gradient. That is the fewest operations. With
    `few_calls` both losses come from one call without gradient, and the chosen one from a second with it: more
    operations, but no call of one or two samples, which takes a GPU as long as one of eight. Where z_t doesn't depend
    on the label, which is at t = 1 and where the labels are equal, one prediction serves both losses.

    Args:
        v: Velocity model, called with gradient; must be deterministic (no dropout).
        z1: Image latents.
        z0: Latents of the original masks.
        z0_refined: Latents of the refined masks; anything where `has_refined` is false.
        t: Times in [0, 1], shared by a sample's two losses as are `z1` and `text`.
        text: Text states.
        has_refined: Whether a sample has a refined label; if not, it learns from the original.
        v_frozen: The same model for calls without gradient, such as the module inside a DDP wrapper; default: `v`.
        few_calls: Save calls of the model rather than operations.

    Returns:
        Each sample's loss, and whether it learns from the refined label.
    """
    z0_refined = torch.where(has_refined.view(-1, 1, 1, 1), z0_refined, z0)
    apart = (z0 != z0_refined).flatten(1).any(dim=1) & (t != 1)  # elsewhere z_t is one for both labels
    way = _choose_first if few_calls else _choose_last
    loss, chose_refined = way(v, v if v_frozen is None else v_frozen, z1, z0, z0_refined, t, text, apart)
    return loss, chose_refined & has_refined


def _choose_last(
    v: Velocity, frozen: Velocity, z1: Tensor, z0: Tensor, z0_refined: Tensor, t: Tensor, text: Tensor, apart: Tensor
) -> tuple[Tensor, Tensor]:
    """By the fewest operations."""
    v_pred = v(interpolate(z1, z0_refined, t), t, text)
    loss_refined = loss_per_sample(v_pred, z1, z0_refined)
    loss_original = loss_per_sample(v_pred, z1, z0)  # right where z_t is shared; the rest follows
    rows = apart.nonzero().squeeze(1)
    if len(rows):
        with torch.no_grad():
            rivals = flow_loss(frozen, z1[rows], z0[rows], t[rows], text[rows])
        loss_original = loss_original.index_copy(0, rows, rivals)

    loss, chose_refined = select(loss_original, loss_refined)
    rows = (apart & ~chose_refined).nonzero().squeeze(1)
    if len(rows):
        loss = loss.index_copy(0, rows, flow_loss(v, z1[rows], z0[rows], t[rows], text[rows]))
    return loss, chose_refined


def _choose_first(
    v: Velocity, frozen: Velocity, z1: Tensor, z0: Tensor, z0_refined: Tensor, t: Tensor, text: Tensor, apart: Tensor
) -> tuple[Tensor, Tensor]:
    """By the fewest calls."""
    rows, refined = apart.nonzero().squeeze(1), torch.ones_like(apart)
    if len(rows):
        both, labels = rows.repeat(2), torch.cat([z0[rows], z0_refined[rows]])
        with torch.no_grad():
            losses = flow_loss(frozen, z1[both], labels, t[both], text[both])
        refined[rows] = select(*losses.chunk(2))[1]

    chosen = torch.where(refined.view(-1, 1, 1, 1), z0_refined, z0)
    v_pred = v(interpolate(z1, chosen, t), t, text)
    loss, by_one_prediction = select(loss_per_sample(v_pred, z1, z0), loss_per_sample(v_pred, z1, z0_refined))
    loss = torch.where(apart, loss_per_sample(v_pred, z1, chosen), loss)
    return loss, torch.where(apart, refined, by_one_prediction)
