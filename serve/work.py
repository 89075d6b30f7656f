"""The work on a request: each picture is decoded, asked of the model and drawn for itself, and fails for itself."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from rlfseg.config import SamplingConfig, ServeConfig
from serve import incoming, masks
from serve.catalog import Catalog, Entry
from serve.incoming import Decoded, Source
from serve.messages import Answer, Ask
from serve.meters import Meters
from serve.refusal import Refusal
from serve.schema import Fault, Found, ModelVersion, Options, Refused, Segmented, Timing, Unanswered

log = logging.getLogger("ray.serve")
PAUSE_S = 0.1
THREADS = 4  # decoding and drawing take several times a picture's size in memory, each
AskModel = Callable[[str, Ask], Awaitable[Answer]]
Entries = list[Found | Unanswered]
T = TypeVar("T")


class Room:
    """What is left of the size that an answer may have; several threads take from it.

    Args:
        most_mb: In MiB.
    """

    def __init__(self, most_mb: float):
        self.most_mb, self.left, self.lock = most_mb, int(most_mb * 2**20), threading.Lock()

    def take(self, size: int) -> None:
        """Takes so many bytes; raises Refusal where they are not left."""
        with self.lock:
            if size > self.left:
                raise Refusal(
                    "too_large", f"the answer would be larger than {self.most_mb:g} MiB; ask for less at once"
                )
            self.left -= size


class Admission:
    """A request's way into the model's queue: once one of its pictures found a place, the others wait for theirs."""

    def __init__(self) -> None:
        self.asking, self.admitted = 0, False

    async def __call__(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Asks until there is a place; who asks sets the deadline.

        Args:
            ask: Asks about one picture; raises Refusal.

        Returns:
            Its answer.

        Raises:
            Refusal: The queue is full and has no place for the request, or the model refuses the picture.
        """
        while True:
            self.asking += 1
            try:
                answer = await ask()
                self.admitted = True
                return answer
            except Refusal as refusal:
                if refusal.kind != "overloaded":
                    raise
                full = refusal
            finally:
                self.asking -= 1
            while not self.admitted:
                if not self.asking:
                    raise full
                await asyncio.sleep(PAUSE_S)  # another one of its pictures may have found a place
            await asyncio.sleep(PAUSE_S)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the pictures of a request share."""

    request: str
    options: Options
    entry: Entry
    room: Room
    admission: Admission = field(default_factory=Admission)


class Work:
    """Pictures in, entries of an answer out.

    Args:
        config: Settings of the service.
        catalog: Its models.
        ask: Asks a model, by its name, about one picture; raises Refusal.
        meters: What is counted.
    """

    def __init__(self, config: ServeConfig, catalog: Catalog, ask: AskModel, meters: Meters):
        self.config, self.catalog, self.ask, self.meters = config, catalog, ask, meters
        self.threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))

    async def pictures(
        self, sources: Sequence[Source], options: Options, entry: Entry, *, request: str, until: float
    ) -> AsyncIterator[Segmented | Refused]:
        """Each picture's entry as soon as it is there; stopping to listen gives up the rest.

        Args:
            sources: The pictures.
            options: Checked.
            entry: The model to ask.
            request: Id of the request, for logs.
            until: Time of the event loop's clock by which all must be done.

        Yields:
            An entry a picture, in the order in which they get ready.
        """
        gate = asyncio.Semaphore(self.config.batch_size)  # a large request fills a batch, not the whole queue
        shared = Shared(request=request, options=options, entry=entry, room=Room(self.config.limits.answer_mb))

        async def one(index: int, source: Source) -> Segmented | Refused:
            try:
                async with asyncio.timeout_at(until), gate:
                    return await self._segmented(index, source, shared)
            except TimeoutError:
                refusal = Refusal("deadline", f"images[{index}]: not done within {self.config.limits.deadline_s:g} s")
            except Refusal as error:
                refusal = error
            except Exception:  # one picture must not fail the others, whatever it ran into
                log.exception("images[%d] failed", index)
                refusal = Refusal(
                    "failed", f"images[{index}]: internal error; the server's log has it under this request's id"
                )
            self.meters.error(refusal.kind)
            return Refused(index=index, name=source.name, error=Fault(kind=refusal.kind, message=refusal.message))

        tasks = [asyncio.create_task(one(n, source)) for n, source in enumerate(sources)]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _segmented(self, index: int, source: Source, shared: Shared) -> Segmented:
        limits, options, entry, clock = self.config.limits, shared.options, shared.entry, [time.perf_counter()]
        picture = await self._in_thread(
            lambda: incoming.decode(source, f"images[{index}]", limits=limits, resolution=entry.card.resolution)
        )
        clock.append(time.perf_counter())
        good = tuple(p.strip() for p in options.phrases if not incoming.phrase_fault(p, limits))
        sampling = SamplingConfig(steps=options.steps, rescale=options.rescale)
        ask = Ask(request=shared.request, key=picture.key, square=picture.square, phrases=good, sampling=sampling)
        answer = await shared.admission(lambda: self.ask(entry.name, ask))
        clock.append(time.perf_counter())
        entries = await self._in_thread(lambda: self._draw(picture, answer, options, shared.room))
        clock.append(time.perf_counter())
        decode, asked, draw = (1000 * (b - a) for a, b in pairwise(clock))
        timing = Timing(
            decode=decode,
            wait=max(0.0, asked - answer.encode_ms - answer.network_ms),
            encode=answer.encode_ms,
            network=answer.network_ms,
            draw=draw,
        )
        self.meters.picture(timing, cached=answer.cached)
        return Segmented(
            index=index,
            name=source.name,
            height=picture.size[0],
            width=picture.size[1],
            model=ModelVersion(name=entry.name, version=answer.version),
            cached=answer.cached,
            batch=answer.batch,
            phrases=entries,
            timing_ms=timing,
        )

    def _draw(self, picture: Decoded, answer: Answer, options: Options, room: Room) -> Entries:
        limit = answer.threshold if options.threshold is None else options.threshold
        squares = iter(answer.squares)
        entries: Entries = []
        for phrase in options.phrases:  # one at a time: scores of a large picture are large
            try:
                fault = incoming.phrase_fault(phrase, self.config.limits)
                if fault:
                    raise Refusal("invalid", fault)
                found = masks.found(phrase, next(squares).at(picture.size, limit), options.output)
                room.take(masks.length(found.mask))
                entries.append(found)
            except Refusal as error:
                self.meters.error(error.kind)
                entries.append(Unanswered(phrase=phrase, error=Fault(kind=error.kind, message=error.message)))
        return entries

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)
