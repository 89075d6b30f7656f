"""The engine of a model replica, called without Ray: batches, isolation, and latents that are kept."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlfseg.config import FastConfig, SamplingConfig, ServeConfig
from rlfseg.errors import ModelError
from rlfseg.images import image_to_tensor
from rlfseg.segmenter import Segmenter
from serve.messages import Answer, Ask
from serve.model import Engine, Loaded, Model, warm_up
from serve.refusal import Refusal
from tests.serving.harness import scene

PHRASES = ("red ring", "blue star")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    found = Loaded.load("tiny", device="cpu")
    found.segmenter.card = replace(found.segmenter.card, eps_aos=0.3, eps_hss=0.2)
    return found


@pytest.fixture(autouse=True)
def _log_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve, where a test has started it, keeps its log for itself."""
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)


@pytest.fixture
def encoded(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the autoencoder was given."""
    calls: list[int] = []
    encode = loaded.segmenter.backbone.encode
    monkeypatch.setattr(loaded.segmenter.backbone, "encode", lambda x: (calls.append(len(x)), encode(x))[1])
    return calls


def ask(index: int, phrases: tuple[str, ...] = PHRASES, **sampling: Any) -> Ask:
    square = image_to_tensor(scene(index), 64).numpy()
    return Ask(
        request=f"request-{index}",
        key=f"scene {index}",
        square=square,
        phrases=phrases,
        sampling=SamplingConfig(**sampling),
    )


def scores(answer: Answer | Refusal) -> np.ndarray[Any, Any]:
    assert isinstance(answer, Answer), answer
    return np.stack([square.score.numpy() for square in answer.squares])


def test_a_mixed_batch_equals_the_segmenter(loaded: Loaded) -> None:
    asks = [ask(0), ask(1, PHRASES[:1]), ask(2, rescale="aos"), ask(3, steps=2), ask(0)]
    answers = Engine(1)([(loaded, a) for a in asks])
    for answer, own, n in zip(answers, asks, (0, 1, 2, 3, 0), strict=True):
        expected = loaded.segmenter(scene(n), own.phrases, sampling=own.sampling)
        np.testing.assert_allclose(scores(answer), np.stack([r.score for r in expected]), atol=1e-4)
        assert isinstance(answer, Answer)
        assert [s.gamma for s in answer.squares] == pytest.approx([r.gamma for r in expected], abs=1e-3)
        assert answer.threshold == expected[0].threshold


def test_a_known_picture_is_not_encoded_again(loaded: Loaded, encoded: list[int]) -> None:
    engine = Engine(1)
    first = engine([(loaded, ask(0)), (loaded, ask(0, ("white cross",))), (loaded, ask(1))])
    second = engine([(loaded, ask(0, ("green square",))), (loaded, ask(2))])
    assert encoded == [2, 1]
    assert [a.cached for a in (*first, *second) if isinstance(a, Answer)] == [False, False, False, True, False]
    fresh = Engine(0)([(loaded, ask(0, ("green square",)))])
    np.testing.assert_allclose(scores(second[0]), scores(fresh[0]), atol=1e-4)


def test_memory_for_latents_is_bounded(loaded: Loaded, encoded: list[int]) -> None:
    latent = loaded.segmenter.encode([scene(0)])
    size = latent.numel() * latent.element_size()
    encoded.clear()
    engine = Engine(2.5 * size / 2**20)
    for n in (0, 1, 0, 2, 0, 1):  # 1 was asked least recently when 2 came
        engine([(loaded, ask(n))])
    assert encoded == [1, 1, 1, 1]
    assert engine.latents.currsize <= engine.latents.maxsize
    assert all(z.untyped_storage().nbytes() == size for z in engine.latents.values())  # no view of a whole batch


def test_without_memory_nothing_is_kept(loaded: Loaded, encoded: list[int]) -> None:
    engine = Engine(0)
    for _ in range(2):
        engine([(loaded, ask(0))])
    assert encoded == [1, 1]


def test_models_of_one_base_share_latents(loaded: Loaded, encoded: list[int]) -> None:
    engine = Engine(1)
    other = Loaded(segmenter=Segmenter(loaded.segmenter.backbone, loaded.segmenter.card), version="other")
    one, two = engine([(loaded, ask(0)), (other, ask(0))])
    assert encoded == [1]
    assert isinstance(one, Answer)
    assert isinstance(two, Answer)
    assert (one.version, two.version) == (loaded.version, "other")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("odd"), KeyError("a token"), OSError(5)])
def test_what_fails_fails_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    squares = loaded.segmenter.squares

    def broken(z1: torch.Tensor, phrases: Any, **kwargs: Any) -> Any:
        if any("poison" in own for own in phrases):
            raise error
        return squares(z1, phrases, **kwargs)

    monkeypatch.setattr(loaded.segmenter, "squares", broken)
    engine = Engine(1)
    good, bad, also_good = engine([(loaded, ask(0)), (loaded, ask(1, ("poison",))), (loaded, ask(2))])
    assert isinstance(bad, Refusal)
    assert bad.kind == "failed"
    assert str(error) not in bad.message
    [logged] = [r for r in caplog.records if r.exc_info]
    assert "request-1" in logged.getMessage()
    assert logged.exc_info
    assert logged.exc_info[1] is error
    assert scores(good).shape == scores(also_good).shape == (2, 64, 64)
    assert not engine.broken


def test_what_a_batch_held_is_free_before_its_pictures_are_tried_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU whose memory was too small for all of them."""
    squares, held = loaded.segmenter.squares, list[weakref.ref[torch.Tensor]]()

    def full(z1: torch.Tensor, phrases: Any, **kwargs: Any) -> Any:
        if len(z1) > 1:
            activations = torch.ones(9)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None
        return squares(z1, phrases, **kwargs)

    monkeypatch.setattr(loaded.segmenter, "squares", full)
    for answer in Engine(1)([(loaded, ask(0)), (loaded, ask(1))]):
        assert scores(answer).shape == (2, 64, 64)


def test_one_thread_compiles_and_computes(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    """CUDA graphs are of the thread that has recorded them."""
    threads: list[int] = []

    def noted(*_: Any) -> list[Any]:
        threads.append(threading.get_ident())
        return []

    monkeypatch.setattr("serve.model.hide_unreserved_gpus", lambda: None)
    monkeypatch.setattr("serve.model.serve.multiplexed", lambda **_: lambda function: function)
    monkeypatch.setattr("serve.model.serve.batch", lambda **_: lambda function: function)
    monkeypatch.setattr(Loaded, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(Loaded, "compile", noted)
    monkeypatch.setattr(Engine, "__call__", noted)
    monkeypatch.setattr("serve.model.warm_up", noted)

    async def used() -> None:
        model: Any = Model.__new__(Model)
        await Model.__init__(model, ServeConfig(models={"a": "tiny", "b": "tiny"}, fast=FastConfig(compile=True)))
        several = threading.Barrier(4)  # which `to_thread` would go on to choose from
        await asyncio.gather(*(asyncio.to_thread(several.wait) for _ in range(4)))
        for _ in range(4):
            await model.batched([])

    asyncio.run(used())
    assert len(threads) == 2 + 1 + 4
    assert len(set(threads)) == 1


def test_compiling_covers_aos_where_it_is_calibrated(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    warm: list[str] = []
    monkeypatch.setattr(loaded.segmenter, "warm_up", lambda *, sampling: warm.append(sampling.rescale))
    loaded.compile()
    monkeypatch.setattr(loaded.segmenter, "card", replace(loaded.segmenter.card, eps_aos=None))
    loaded.compile()
    assert warm == ["none", "aos", "none"]


def test_a_broken_gpu_is_told_to_serve(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(loaded.segmenter, "squares", broken)
    engine = Engine(1)
    engine([(loaded, ask(0))])
    assert engine.broken


def test_a_model_that_works_gets_warm(loaded: Loaded) -> None:
    warm_up(Engine(1), loaded)


@pytest.mark.parametrize("wrong", [KeyError("unet"), float("nan")])
def test_a_model_that_does_not_work_never_gets_ready(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, wrong: Exception | float
) -> None:
    encode = loaded.segmenter.backbone.encode

    def broken(pictures: torch.Tensor) -> torch.Tensor:
        if isinstance(wrong, Exception):
            raise wrong
        return encode(pictures) * wrong

    monkeypatch.setattr(loaded.segmenter.backbone, "encode", broken)
    with pytest.raises(ModelError, match=loaded.version):
        warm_up(Engine(1), loaded)


def test_nan_is_not_remembered(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = loaded.segmenter.backbone.encode
    monkeypatch.setattr(loaded.segmenter.backbone, "encode", lambda x: encode(x) * float("nan"))
    engine = Engine(1)
    [answer] = engine([(loaded, ask(0))])
    assert np.isnan(scores(answer)).all()
    monkeypatch.undo()
    [answer] = engine([(loaded, ask(0))])
    assert np.isfinite(scores(answer)).all()


def test_answers_carry_no_more_than_their_own_scores(loaded: Loaded) -> None:
    answers = Engine(1)([(loaded, ask(n)) for n in range(3)])
    for answer in answers:
        assert isinstance(answer, Answer)
        for square in answer.squares:
            assert square.score.untyped_storage().nbytes() == 64 * 64 * 4
