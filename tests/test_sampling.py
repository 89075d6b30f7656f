"""Eq. 5 to 10 and Table 9 against fields with known integrals and against the paper's sums in plain numpy."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlfseg.config import SamplingConfig
from rlfseg.errors import ConfigError
from rlfseg.sampling import aos, euler, hss, one_step, rescale, sample

B, SHAPE = 3, (4, 5, 6)
TEXT = torch.zeros(B, 1, 1)
STEPS = (1, 2, 5, 15)


@pytest.fixture
def z() -> tuple[Tensor, Tensor]:
    """Latents (z1, z0) of images and masks."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, *SHAPE, generator=g), torch.randn(B, *SHAPE, generator=g)


def constant(v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda z, t, text: v


def naive_rescale(z1: Tensor, dz: Tensor, reference: Tensor, eps: float) -> tuple[Any, float]:
    """Eq. 6-7 for one sample, position by position."""
    z1_, dz_, ref = (x.double().numpy().ravel() for x in (z1, dz, reference))
    inside = [i for i in range(len(z1_)) if abs(ref[i] - (z1_[i] + dz_[i])) < eps]
    below = sum(abs(dz_[i]) for i in inside)
    gamma = sum(abs(ref[i] - (z1_[i] + dz_[i])) for i in inside) / below if below > 0 else 0.0
    return (z1_ + dz_ * (1 + gamma)).reshape(z1.shape), gamma


# --- direction and step size --------------------------------------------------------------------------------------


@pytest.mark.fault("rf-03")
@pytest.mark.parametrize("steps", STEPS)
def test_true_velocity_lands_on_the_mask_and_swapped_ends_do_not(z: tuple[Tensor, Tensor], steps: int) -> None:
    z1, z0 = z
    torch.testing.assert_close(euler(constant(z1 - z0), z1, TEXT, steps), z0, rtol=0, atol=1e-5)
    assert (euler(constant(z0 - z1), z1, TEXT, steps) - z0).abs().mean() > 1


def test_one_step_is_equation_5(z: tuple[Tensor, Tensor]) -> None:
    z1, z0 = z
    got, dz = one_step(constant(z1 - z0), z1, TEXT)
    assert torch.equal(dz, z0 - z1)
    assert torch.equal(got, z1 + dz)
    assert torch.equal(euler(constant(z1 - z0), z1, TEXT, 1), got)


@pytest.mark.parametrize("steps", STEPS)
def test_times_go_down_from_1_and_never_reach_0(z: tuple[Tensor, Tensor], steps: int) -> None:
    seen = []

    def v(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert len(t.unique()) == 1
        seen.append(t[0].item())
        return z

    euler(v, z[0].bfloat16(), TEXT.bfloat16(), steps)
    np.testing.assert_allclose(seen, np.arange(steps, 0, -1) / steps, rtol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_on_a_field_with_a_known_polygon(steps: int) -> None:
    # dz/dt = z: each of the K steps back multiplies by 1 - 1/K
    z1 = torch.ones(B, *SHAPE)
    expected = z1 * (1 - 1 / steps) ** steps
    torch.testing.assert_close(euler(lambda z, t, text: z, z1, TEXT, steps), expected, rtol=1e-5, atol=1e-7)
    # dz/dt = t: the sum of K left ends
    expected = z1 - sum(k / steps for k in range(1, steps + 1)) / steps
    torch.testing.assert_close(
        euler(lambda z, t, text: t.view(-1, 1, 1, 1).expand_as(z), z1, TEXT, steps), expected, rtol=1e-5, atol=1e-6
    )


def test_a_known_first_step_saves_a_call(z: tuple[Tensor, Tensor]) -> None:
    calls = []

    def v(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        calls.append(t[0].item())
        return z.sin() * t.view(-1, 1, 1, 1)

    whole = euler(v, z[0], TEXT, 5)
    dz = one_step(v, z[0], TEXT)[1]
    calls.clear()
    assert torch.equal(euler(v, z[0], TEXT, 5, dz), whole)
    assert len(calls) == 4


# --- AOS and HSS --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 3))
def test_rescale_equals_the_paper_s_sums(seed: int, eps: float) -> None:
    g = torch.Generator().manual_seed(seed)
    z1, dz, reference = (torch.randn(B, *SHAPE, generator=g) for _ in range(3))
    got = rescale(z1, dz, reference, eps, None)
    for i in range(B):
        z0, gamma = naive_rescale(z1[i], dz[i], reference[i], eps)
        assert got.gamma[i].item() == pytest.approx(gamma, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(got.z0[i].numpy(), z0, rtol=1e-4, atol=1e-4)
    assert not got.clipped.any()


def test_gamma_by_hand() -> None:
    # z0 = (1, 5); black = (1.5, 0): S holds the first only; gamma = 0.5 / 2
    z1, dz = torch.tensor([[[[3.0, 2.0]]]]), torch.tensor([[[[-2.0, 3.0]]]])
    got = aos(z1, dz, torch.tensor([[[1.5, 0.0]]]), eps=1.0, gamma_max=None)
    assert got.gamma.tolist() == [0.25]
    assert got.z0.flatten().tolist() == [3 - 2 * 1.25, 2 + 3 * 1.25]


def test_gamma_is_a_sample_s_own(z: tuple[Tensor, Tensor]) -> None:
    z1, z0 = z
    black, dz = torch.zeros(1, *SHAPE), z0 - z1
    together = aos(z1, dz, black, 0.3, None)
    alone = [aos(z1[i : i + 1], dz[i : i + 1], black, 0.3, None) for i in range(B)]
    torch.testing.assert_close(together.z0, torch.cat([a.z0 for a in alone]))
    assert len(together.gamma.unique()) == B


def test_stable_region_is_elementwise() -> None:
    # One pixel, two channels: only one channel is near black, so it alone counts.
    z1, dz = torch.zeros(1, 2, 1, 1), torch.tensor([0.5, 4.0]).view(1, 2, 1, 1)
    assert aos(z1, dz, torch.tensor([0.6, 9.0]).view(1, 2, 1, 1), 0.2, None).gamma.item() == pytest.approx(0.1 / 0.5)


def test_empty_region_and_still_latents_give_gamma_0(z: tuple[Tensor, Tensor]) -> None:
    z1, z0 = z
    empty = rescale(z1, z0 - z1, z0 + 10, eps=0.1, gamma_max=None)
    assert (empty.gamma == 0).all()
    assert torch.equal(empty.z0, z1 + (z0 - z1))
    still = rescale(z1, torch.zeros_like(z1), z1 + 0.05, eps=0.1, gamma_max=None)
    assert (still.gamma == 0).all()
    assert torch.equal(still.z0, z1)


def test_dark_picture_is_clipped_and_counted() -> None:
    # z1 of a dark picture lies near black: on S nearly nothing moves, and gamma grows out of noise.
    g = torch.Generator().manual_seed(0)
    black = torch.zeros(1, *SHAPE)
    z1 = black.expand(2, -1, -1, -1) + 0.05 * torch.randn(2, *SHAPE, generator=g)
    z1[1] += 2  # the second picture is bright
    z0 = black.repeat(2, 1, 1, 1)
    z0[:, :, :2] = 4  # the object
    dz = (z0 - z1) * torch.where(z0 > 0, 1.0, torch.tensor([0.5, 0.99]).view(2, 1, 1, 1))  # falls short on background
    free, clipped = aos(z1, dz, black, 0.2, None), aos(z1, dz, black, 0.2, 0.25)
    assert free.gamma[0] == pytest.approx(1, abs=1e-4)
    assert not free.clipped.any()
    assert clipped.gamma.tolist() == [0.25, pytest.approx(free.gamma[1].item())]
    assert clipped.clipped.tolist() == [True, False]
    error = [(s.z0[0, :, :2] - 4).abs().mean().item() for s in (free, clipped)]
    assert error[0] > 3.5
    assert error[1] < 1.1


def test_nan_stays_in_its_sample_and_visible(z: tuple[Tensor, Tensor]) -> None:
    z1, z0 = z
    dz = z0 - z1
    dz[1, 0, 0, 0] = torch.nan
    got = aos(z1, dz, torch.zeros(1, *SHAPE), 0.3, 0.25)
    assert got.z0.isnan().flatten(1).any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("steps", [2, 5])
def test_hss_measures_against_k_steps(z: tuple[Tensor, Tensor], steps: int) -> None:
    def v(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return 0.3 * z.sin() + t.view(-1, 1, 1, 1)

    z1 = z[0]
    dz = one_step(v, z1, TEXT)[1]
    got = hss(v, z1, TEXT, dz, 0.5, None, steps)
    multi = euler(v, z1, TEXT, steps)
    for i in range(B):
        z0, gamma = naive_rescale(z1[i], dz[i], multi[i], 0.5)
        assert gamma > 0.1
        assert got.gamma[i].item() == pytest.approx(gamma, rel=1e-4)
        np.testing.assert_allclose(got.z0[i].numpy(), z0, rtol=1e-4, atol=1e-5)


# --- the front door -----------------------------------------------------------------------------------------------


def v_any(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return 0.3 * z.sin() + t.view(-1, 1, 1, 1)


def test_sample_leads_to_each_way(z: tuple[Tensor, Tensor]) -> None:
    z1, black = z[0], torch.zeros(*SHAPE)
    dz = one_step(v_any, z1, TEXT)[1]
    plain = sample(v_any, z1, TEXT, steps=5)
    assert torch.equal(plain.z0, euler(v_any, z1, TEXT, 5))
    assert not plain.gamma.any()
    assert not plain.clipped.any()
    by_aos = sample(v_any, z1, TEXT, rescale="aos", eps=0.5, gamma_max=None, z_black=black)
    assert torch.equal(by_aos.z0, aos(z1, dz, black, 0.5, None).z0)
    by_hss = sample(v_any, z1, TEXT, rescale="hss", eps=0.5, hss_steps=3)
    assert torch.equal(by_hss.z0, hss(v_any, z1, TEXT, dz, 0.5, 0.25, 3).z0)


def test_defaults_are_the_config_s() -> None:
    defaults = {k: p.default for k, p in inspect.signature(sample).parameters.items() if k not in ("v", "z1", "text")}
    assert defaults.pop("z_black") is None
    assert defaults == dataclasses.asdict(SamplingConfig())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rescale": "aos", "steps": 2, "eps": 0.1}, "steps=2 with rescale=aos"),
        ({"rescale": "hss", "steps": 5, "eps": 0.1}, "steps=5 with rescale=hss"),
        ({"rescale": "aos"}, "eps=null with rescale=aos"),
        ({"rescale": "hss"}, "eps=null with rescale=hss"),
        ({"rescale": "aos", "eps": 0.1}, "z_black=None with rescale=aos"),
    ],
)
def test_what_does_not_go_together_is_refused(z: tuple[Tensor, Tensor], wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sample(v_any, z[0], TEXT, **wrong)


@pytest.mark.parametrize("way", ["none", "aos", "hss"])
def test_bf16_latents_stay_bf16(z: tuple[Tensor, Tensor], way: Any) -> None:
    got = sample(v_bf16, z[0].bfloat16(), TEXT.bfloat16(), rescale=way, eps=0.5, z_black=torch.zeros(SHAPE).bfloat16())
    assert got.z0.dtype == torch.bfloat16
    assert got.gamma.dtype == torch.float32


def v_bf16(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return v_any(z, t, text).to(z.dtype)
