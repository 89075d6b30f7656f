"""The model replica: pictures of many requests go through the network together; adapters come and go by request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from cachetools import LRUCache
from ray import serve
from torch import Tensor

from rlfseg import adapter
from rlfseg.config import FastConfig, SamplingConfig, ServeConfig
from rlfseg.errors import ModelError, RlfsegError
from rlfseg.pipeline.cluster import hide_unreserved_gpus
from serve.messages import Answer, Ask
from serve.refusal import Refusal

if TYPE_CHECKING:
    from rlfseg.segmenter import Segmenter  # only replicas need networks: importing diffusers takes ten seconds

log = logging.getLogger("ray.serve")
FAILED = "the network failed on this picture; the server's log has the cause under this request's id"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, and the version of its files."""

    segmenter: Segmenter
    version: str

    @classmethod
    def load(cls, reference: str, *, device: str = "auto", fast: FastConfig | None = None) -> Loaded:
        """Loads an adapter by its reference; raises ModelError."""
        from rlfseg.segmenter import Segmenter

        folder = adapter.resolve(reference)
        segmenter = Segmenter.load(str(folder), device=device, fast=fast)
        return cls(segmenter=segmenter, version=adapter.version(folder))

    def compile(self) -> None:
        """Compiles every size of batch, of one step and of AOS where that is calibrated."""
        rescales: list[Literal["none", "aos"]] = ["none", "aos"] if self.segmenter.card.eps_aos else ["none"]
        for rescale in rescales:
            self.segmenter.warm_up(sampling=SamplingConfig(rescale=rescale))


class Engine:
    """The work on a batch, without Ray. Latents of recent pictures are kept and shared by models of one base.

    For one thread at a time, and always the same where models are compiled on a GPU, since CUDA graphs are of a thread.

    Args:
        cache_mb: Memory for them, in MiB.
    """

    def __init__(self, cache_mb: float):
        self.latents: LRUCache[tuple[str, int, str], Tensor] = LRUCache(int(cache_mb * 2**20), getsizeof=_bytes)
        self.broken = False

    def __call__(self, batch: Sequence[tuple[Loaded, Ask]]) -> list[Answer | Refusal]:
        """Answers a batch; what fails, fails alone.

        Args:
            batch: Each picture with the model that it is for.

        Returns:
            For each an answer or a refusal, in order.
        """
        groups: dict[tuple[int, SamplingConfig], list[int]] = {}
        for n, (loaded, ask) in enumerate(batch):
            groups.setdefault((id(loaded), ask.sampling), []).append(n)
        answers: dict[int, Answer | Refusal] = {}
        for members in groups.values():
            answers |= self._isolated(batch[members[0]][0], {n: batch[n][1] for n in members})
        return [answers[n] for n in range(len(batch))]

    def _isolated(self, loaded: Loaded, asks: dict[int, Ask]) -> dict[int, Answer | Refusal]:
        try:
            return dict(zip(asks, self._run(loaded, list(asks.values())), strict=True))
        except Exception as error:  # whatever it ran into, the other pictures must not
            if len(asks) == 1:
                [ask] = asks.values()
                log.exception("a picture of request %s failed in the network", ask.request)
                self.broken = self.broken or _is_fatal(error)
                known = isinstance(error, RlfsegError)
                return dict.fromkeys(asks, Refusal("invalid", str(error)) if known else Refusal("failed", FAILED))
        # Behind the error, which holds all that the batch had on a GPU
        return {n: a for one in asks.items() for n, a in self._isolated(loaded, dict([one])).items()}

    def _run(self, loaded: Loaded, asks: list[Ask]) -> list[Answer]:
        start = time.perf_counter()
        z1, known = self._encode(loaded.segmenter, asks)
        encoded = time.perf_counter()
        squares = loaded.segmenter.squares(z1, [ask.phrases for ask in asks], sampling=asks[0].sampling)
        end = time.perf_counter()
        return [
            Answer(
                squares=own,
                version=loaded.version,
                threshold=loaded.segmenter.card.threshold,
                cached=cached,
                batch=len(asks),
                encode_ms=1000 * (encoded - start) if not cached else 0.0,
                network_ms=1000 * (end - encoded),
            )
            for own, cached in zip(squares, known, strict=True)
        ]

    def _encode(self, segmenter: Segmenter, asks: list[Ask]) -> tuple[Tensor, list[bool]]:
        """Latents of the pictures [I, C, h, w], and which of them were known."""
        base = (segmenter.card.base, segmenter.backbone.resolution)
        keys = [(*base, ask.key) for ask in asks]
        latents = {key: z for key in keys if (z := self.latents.get(key)) is not None}
        known = [key in latents for key in keys]
        new = {key: ask.square for key, ask in zip(keys, asks, strict=True) if key not in latents}
        if new:
            encoded = segmenter.encode_squares(torch.from_numpy(np.stack(list(new.values())))).cpu()
            latents |= {key: z.clone() for key, z in zip(new, encoded, strict=True)}
            for key in new:
                if latents[key].isfinite().all() and _bytes(latents[key]) <= self.latents.maxsize:
                    self.latents[key] = latents[key]
        return torch.stack([latents[key] for key in keys]).to(segmenter.backbone.device), known


def warm_up(engine: Engine, loaded: Loaded) -> None:
    """Runs the network once, so that who asks first does not wait for it.

    Args:
        engine: Of the replica.
        loaded: The model.

    Raises:
        ModelError: It gives no scores; the log has the cause.
    """
    side = loaded.segmenter.backbone.resolution
    black = -np.ones((3, side, side), np.float32)
    ask = Ask(request="warm-up", key="", square=black, phrases=("warm-up",), sampling=SamplingConfig())
    [answer] = engine([(loaded, ask)])
    if isinstance(answer, Refusal):
        raise ModelError(f"version {loaded.version} does not work: {answer.message}")
    if not all(square.score.isfinite().all() for square in answer.squares):
        raise ModelError(f"version {loaded.version} does not work: it gives NaN for a black picture")


class Model:
    """The deployment; ready once its models are loaded and the network has run once.

    Args:
        config: Settings of the service.
    """

    async def __init__(self, config: ServeConfig):  # type: ignore[misc]  # Serve awaits it
        hide_unreserved_gpus()
        torch.set_num_threads(max(1, int(config.cpus)))
        if config.gpus and config.gpus < 1 and config.device != "cpu":
            torch.cuda.set_per_process_memory_fraction(config.gpus)  # Ray's fraction is bookkeeping only
        self.config, self.engine = config, Engine(config.cache_mb)

        # One thread: a network takes one batch at a time, and CUDA graphs are of the thread that has recorded them
        network, loop = ThreadPoolExecutor(1, "network"), asyncio.get_running_loop()

        async def load(name: str) -> Loaded:
            loaded = await asyncio.to_thread(Loaded.load, config.models[name], device=config.device, fast=config.fast)
            if config.fast.compile:
                await loop.run_in_executor(network, loaded.compile)
            return loaded

        async def answer(batch: list[tuple[Loaded, Ask]]) -> list[Answer | Refusal]:
            return await loop.run_in_executor(network, self.engine, batch)

        self.load = serve.multiplexed(max_num_models_per_replica=config.resident)(load)
        self.batched = serve.batch(max_batch_size=config.batch_size, batch_wait_timeout_s=config.batch_wait_s)(answer)
        for name in reversed(list(config.models)[: config.resident]):  # the default last, so that it stays longest
            loaded = await self.load(name)
        await loop.run_in_executor(network, warm_up, self.engine, loaded)

    async def segment(self, name: str, ask: Ask) -> Answer | Refusal:
        """Answers one picture, together with others that are waiting.

        Args:
            name: Of the model; the caller also routes by it.
            ask: The picture and its phrases.

        Returns:
            The answer, or why there is none.
        """
        try:
            # Outside the batch: while a model is loaded, batches of others go on; and a picture holds on to its own
            # model, even if that gives way to another meanwhile. Loading goes on though who asked first goes away
            loaded = await asyncio.shield(asyncio.ensure_future(self.load(name)))
        except RlfsegError:
            log.exception("model %s can't be loaded for request %s", name, ask.request)
            return Refusal("failed", f"model {name!r} can't be loaded; the server's log has the cause")
        answer: Answer | Refusal = await self.batched((loaded, ask))
        return answer

    async def ready(self) -> bool:
        """True: a replica answers only once it is ready."""
        return True

    def check_health(self) -> None:
        """Has Serve replace the replica after an error from which a GPU's process does not recover."""
        if self.engine.broken:
            raise RuntimeError("the GPU reported an error from which this process can't recover")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_fatal(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)
