"""Eq. 2 and 4 against hand arithmetic, naive loops and naive gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlfseg.flow import flow_loss, interpolate, loss_per_sample, sample_time, select, selection_loss, velocity

B, SHAPE = 6, (4, 3, 5)


class Field(nn.Module):
    """A small velocity model that depends on all it is given, and notes the size and gradient of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls.append((len(z), torch.is_grad_enabled()))
        mixed: Tensor = self.mix(z) * (1 + t.view(-1, 1, 1, 1)) + text.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return mixed.tanh()


@pytest.fixture
def batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    z1, z0, z0_refined = (torch.randn(B, *SHAPE, generator=g) for _ in range(3))
    return {
        "z1": z1,
        "z0": z0,
        "z0_refined": z0_refined,
        "t": torch.rand(B, generator=g),
        "text": torch.randn(B, 2, 3, generator=g),
    }


def naive_selection(v: Field, b: dict[str, Any], has_refined: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 as it is printed: both losses in full, sample by sample."""
    losses, chosen = [], []
    for i in range(B):
        z1, t, text = b["z1"][i : i + 1], b["t"][i : i + 1], b["text"][i : i + 1]
        both = []
        for z0 in (b["z0"][i : i + 1], b["z0_refined"][i : i + 1]):
            z_t = t.item() * z1 + (1 - t.item()) * z0
            both.append(((v(z_t, t, text) - (z1 - z0)) ** 2).mean())
        refined = bool(has_refined[i]) and not both[0] < both[1]
        losses.append(both[1] if refined else both[0])
        chosen.append(refined)
    return torch.stack(losses), torch.tensor(chosen)


def gradients(v: Field, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(v.parameters())))


# --- section 3.2 and Eq. 2 ----------------------------------------------------------------------------------------


def test_path_ends_are_image_at_1_and_mask_at_0(batch: dict[str, Any]) -> None:
    z1, z0 = batch["z1"], batch["z0"]
    assert torch.equal(interpolate(z1, z0, torch.ones(B)), z1)
    assert torch.equal(interpolate(z1, z0, torch.zeros(B)), z0)


def test_each_sample_has_its_own_time(batch: dict[str, Any]) -> None:
    z1, z0, t = batch["z1"].double(), batch["z0"].double(), batch["t"].double()
    by_hand = np.stack([ti * a + (1 - ti) * b for ti, a, b in zip(t.numpy(), z1.numpy(), z0.numpy(), strict=True)])
    np.testing.assert_allclose(interpolate(z1, z0, t).numpy(), by_hand, rtol=1e-15, atol=1e-15)


def test_velocity_is_the_derivative_of_the_path(batch: dict[str, Any]) -> None:
    z1, z0 = batch["z1"].double(), batch["z0"].double()
    slope = interpolate(z1, z0, torch.full((B,), 0.6).double()) - interpolate(z1, z0, torch.full((B,), 0.4).double())
    torch.testing.assert_close(velocity(z1, z0), slope / 0.2, rtol=0, atol=1e-6)


def test_loss_by_hand() -> None:
    z1, z0 = torch.tensor([[[[3.0, 1.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]]], [[[2.0, 0.0]]]])
    v_pred = torch.tensor([[[[1.0, 3.0]]], [[[-2.0, 0.0]]]])
    # v = (2, 0) and (-2, 0): errors (-1, 3) and (0, 0)
    assert loss_per_sample(v_pred, z1, z0).tolist() == [(1 + 9) / 2, 0]


def test_loss_is_taken_in_float32(batch: dict[str, Any]) -> None:
    z1, z0, v_pred = (batch[k].bfloat16() for k in ("z1", "z0", "z0_refined"))
    loss = loss_per_sample(v_pred, z1, z0)
    exact = (v_pred.double() - (z1.double() - z0.double())).square().mean(dim=(1, 2, 3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


# --- times --------------------------------------------------------------------------------------------------------

IDS = [f"image{i}/phrase" for i in range(20_000)]


def test_uniform_times_are_uniform() -> None:
    t = sample_time("uniform", 42, 0, IDS).numpy()
    assert t.min() >= 0
    assert t.max() < 1
    share, _ = np.histogram(t, bins=10, range=(0, 1))
    assert abs(share / len(IDS) - 0.1).max() < 0.01


def test_times_other_than_uniform() -> None:
    assert (sample_time("one", 42, 0, IDS) == 1).all()
    mixed = sample_time("mixed", 42, 0, IDS)
    assert (mixed == 1).float().mean().item() == pytest.approx(0.5, abs=0.015)
    assert mixed[mixed < 1].mean().item() == pytest.approx(0.5, abs=0.015)


def test_times_are_keyed_by_seed_epoch_and_id_alone() -> None:
    t = sample_time("uniform", 42, 3, IDS[:100])
    assert torch.equal(sample_time("uniform", 42, 3, IDS[:100][::-1]).flip(0), t)
    torch.manual_seed(7)
    assert torch.equal(sample_time("uniform", 42, 3, IDS[:100]), t)
    for other in (sample_time("uniform", 42, 4, IDS[:100]), sample_time("uniform", 43, 3, IDS[:100])):
        assert abs(np.corrcoef(other, t)[0, 1]) < 0.3
    # neither runs into the other: seed 1, epoch 23 isn't seed 12, epoch 3
    assert not torch.equal(sample_time("uniform", 1, 23, IDS[:9]), sample_time("uniform", 12, 3, IDS[:9]))


def test_times_are_the_same_in_any_process() -> None:
    # b2sum -l 24 of "42/1/a" and so on, over 2^24
    expected = [int(digest, 16) / 2**24 for digest in ("9f5246", "87ed0a", "d3d4f3")]
    assert sample_time("uniform", 42, 1, ["a", "b/c", "é"]).tolist() == expected


# --- Eq. 4 --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_select_takes_the_smaller_loss_and_ties_go_to_the_refined(pairs: list[tuple[int, int]]) -> None:
    original, refined = torch.tensor(pairs, dtype=torch.float32).T
    loss, chose_refined = select(original, refined)
    assert loss.tolist() == [min(p) for p in pairs]
    assert chose_refined.tolist() == [r <= o for o, r in pairs]


@pytest.mark.parametrize("times", ["uniform", "mixed", "one"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("few_calls", [False, True])
def test_selection_equals_the_naive_way_with_gradients(
    batch: dict[str, Any], times: str, seed: int, few_calls: bool
) -> None:
    torch.manual_seed(seed)
    v, has_refined = Field(), torch.rand(B) < 0.8
    batch["z0_refined"] = torch.where(torch.rand(B, 1, 1, 1) < 0.2, batch["z0"], batch["z0_refined"])  # some are equal
    batch["t"] = {"uniform": batch["t"], "mixed": torch.tensor([1, 0.3, 1, 0.2, 0.9, 1]), "one": torch.ones(B)}[times]
    loss, chosen = selection_loss(v, **batch, has_refined=has_refined, few_calls=few_calls)
    naive_loss, naive_chosen = naive_selection(v, batch, has_refined)
    assert chosen.tolist() == naive_chosen.tolist()
    torch.testing.assert_close(loss, naive_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(v, loss), gradients(v, naive_loss), rtol=1e-4, atol=1e-6)


def test_both_labels_get_chosen_in_these_tests(batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    _, chosen = naive_selection(Field(), batch, torch.ones(B, dtype=torch.bool))
    assert 0 < chosen.sum() < B


def test_only_originals_that_win_are_computed_again_with_gradient(batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    v, v_frozen = Field(), Field()
    v_frozen.load_state_dict(v.state_dict())
    has_refined = torch.tensor([True, True, True, True, True, False])
    batch["z0_refined"][4] = batch["z0"][4]  # equal labels need one pass
    _, chosen = selection_loss(v, **batch, has_refined=has_refined, v_frozen=v_frozen)
    assert v_frozen.calls == [(4, False)]
    assert v.calls == [(B, True), (int((~chosen[:4]).sum()), True)]
    assert chosen[4:].tolist() == [True, False]


def test_few_calls_are_one_without_gradient_and_one_with_it(batch: dict[str, Any]) -> None:
    v, v_frozen = Field(), Field()
    batch["z0_refined"][4] = batch["z0"][4]
    has_refined = torch.tensor([True, True, True, True, True, False])
    selection_loss(v, **batch, has_refined=has_refined, v_frozen=v_frozen, few_calls=True)
    assert v_frozen.calls == [(2 * 4, False)]
    assert v.calls == [(B, True)]


def test_under_autocast_few_calls_leave_the_gradient_of_trained_weights(batch: dict[str, Any]) -> None:
    """Autocast keeps the weights that it has cast, and those of the call without gradient would serve the other too."""
    v = Field()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = selection_loss(v, **batch, has_refined=torch.ones(B, dtype=torch.bool), few_calls=True)
        naive, _ = naive_selection(v, batch, torch.ones(B, dtype=torch.bool))
    for ours, theirs in zip(gradients(v, loss), gradients(v, naive), strict=True):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("few_calls", [False, True])
def test_at_t_1_one_call_serves_both_losses(batch: dict[str, Any], few_calls: bool) -> None:
    v, every = Field(), torch.ones(B, dtype=torch.bool)
    selection_loss(v, **batch | {"t": torch.ones(B)}, has_refined=every, few_calls=few_calls)
    assert v.calls == [(B, True)]


@pytest.mark.parametrize("t", [0.5, 1.0])
@pytest.mark.parametrize("few_calls", [False, True])
def test_without_a_refined_label_it_is_never_looked_at(batch: dict[str, Any], t: float, few_calls: bool) -> None:
    v, none = Field(), torch.zeros(B, dtype=torch.bool)
    batch |= {"t": torch.full((B,), t), "z0_refined": torch.full((B, *SHAPE), torch.nan)}
    loss, chosen = selection_loss(v, **batch, has_refined=none, few_calls=few_calls)
    assert v.calls == [(B, True)]
    assert not chosen.any()
    plain = flow_loss(v, *(batch[k] for k in ("z1", "z0", "t", "text")))
    torch.testing.assert_close(gradients(v, loss), gradients(v, plain))


@pytest.mark.parametrize("few_calls", [False, True])
def test_nan_of_the_model_is_not_selected_away(batch: dict[str, Any], few_calls: bool) -> None:
    def v(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return torch.full_like(z, torch.nan)

    loss, _ = selection_loss(v, **batch, has_refined=torch.ones(B, dtype=torch.bool), few_calls=few_calls)
    assert loss.isnan().all()
