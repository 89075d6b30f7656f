"""A client of the service (`serve/`): sends pictures, asks again when it is busy, turns answers into arrays.

from rlfseg.client import Client

with Client("http://127.0.0.1:8000", key="...") as client:
    [answer] = client.segment(["picture.jpg"], ["red ring"])
    answer.phrases[0].mask  # uint8 {0, 1} [H, W]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np
import stamina
from numpy.typing import NDArray

from rlfseg.errors import BadSample, ServiceError
from rlfseg.images import rle_decode

Json = dict[str, Any]
BUSY = (429, 502, 503)
NOT_BEGUN = ("overloaded", "starting", "stopping", "short")  # kinds of 503; a load balancer's own tells nothing
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PhraseAnswer:
    """What the service found for a phrase.

    Attributes:
        phrase: The phrase.
        error: Why there is no mask; None: there is one.
        score: Mean score inside the mask.
        area: Pixels of the mask.
        box: [left, top, right, bottom), None where the mask is empty.
        truncated: Whether the text encoder saw only the beginning of the phrase.
        rle: COCO's size and counts.
    """

    phrase: str
    error: str | None = None
    score: float = 0.0
    area: int = 0
    box: tuple[int, int, int, int] | None = None
    truncated: bool = False
    rle: Json | None = None

    @property
    def mask(self) -> NDArray[np.uint8]:
        """uint8 {0, 1} [H, W]; raises BadSample where there is none."""
        if self.rle is None:
            raise BadSample(self.error or "no mask", file="service", sample=self.phrase)
        height, width = self.rle["size"]
        return rle_decode(self.rle["counts"], (height, width))


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureAnswer:
    """What the service found on a picture.

    Attributes:
        name: The picture's.
        error: Why it was not segmented; None: it was.
        kind: Kind of that error, such as `picture`, `too_large` or `overloaded`; None: it was segmented.
        model: Name and version of the model that answered, such as `tiny 0f3c9a1b2d4e`.
        phrases: One a phrase, in order; empty where it was not segmented.
    """

    name: str
    error: str | None
    kind: str | None
    model: str
    phrases: list[PhraseAnswer]


class Client:
    """A connection to a service.

    Args:
        url: Of the service, such as http://127.0.0.1:8000.
        key: API key; None: $RLFSEG_API_KEY, if set.
        retries: How often a busy service is asked again; it says itself how long to wait.
        timeout: Seconds for a whole answer.
    """

    def __init__(self, url: str, *, key: str | None = None, retries: int = 5, timeout: float = 120.0):
        key = key or os.environ.get("RLFSEG_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self.retries = retries

    def __enter__(self) -> Client:
        """Ready as it is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.http.close()

    def segment(
        self, images: Sequence[str | os.PathLike[str] | bytes], phrases: Sequence[str], **options: str | float
    ) -> list[PictureAnswer]:
        """Masks for phrases on pictures.

        Args:
            images: Paths, or the bytes of image files.
            phrases: What to look for in each.
            **options: `model`, `threshold`, `steps`, `rescale`, as the service takes them.

        Returns:
            One answer a picture, in order; a picture that failed has an `error`.

        Raises:
            ServiceError: The service can't be reached, refuses the request, or stays busy.
        """
        files = [("images", _file(image, n)) for n, image in enumerate(images)]
        fields = {"phrases": list(phrases)} | {name: str(value) for name, value in options.items()}
        answer = self.request("POST", "/v1/segment", files=files, data=fields)
        return [_picture(entry) for entry in answer["images"]]

    def models(self) -> list[Json]:
        """The models that `segment` may name; raises ServiceError."""
        return list(self.request("GET", "/v1/models")["models"])

    def request(self, method: str, path: str, **kwargs: Any) -> Json:
        """Any request, asked again while the service is busy.

        Args:
            method: Such as GET.
            path: Such as /v1/batches.
            **kwargs: As `httpx.Client.request` takes them.

        Returns:
            The answer's JSON.

        Raises:
            ServiceError: The service can't be reached, refuses the request, or stays busy.
        """
        try:
            for attempt in stamina.retry_context(on=_wait, attempts=self.retries + 1, timeout=None):
                with attempt:
                    reply = self.http.request(method, path, **kwargs)
                    if _is_busy(reply):
                        reply.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise ServiceError(_problem(error.response)) from None
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.http.base_url}: {type(error).__name__}: {error}") from None
        whole = reply.is_success or "images" in _json(reply)  # where each picture failed, each says why
        if not whole:
            raise ServiceError(_problem(reply))
        return _json(reply)


def _is_busy(reply: httpx.Response) -> bool:
    """Whether asking again is safe: what begins a batch is asked again only where the service itself began none."""
    begins = reply.request.method == "POST" and reply.request.url.path.rstrip("/").endswith("/v1/batches")
    return reply.status_code in BUSY and (not begins or _fault(reply).get("kind") in NOT_BEGUN)


def _wait(error: Exception) -> bool | float:
    """Whether to ask again, and in how many seconds; True: by stamina's own growing waits."""
    if isinstance(error, httpx.HTTPStatusError):
        seconds = error.response.headers.get("Retry-After", "")
        return min(float(seconds), LONGEST_WAIT_S) if seconds.isdecimal() else True
    return isinstance(error, httpx.ConnectError)


def _file(image: str | os.PathLike[str] | bytes, n: int) -> tuple[str, bytes]:
    if isinstance(image, bytes):
        return f"{n}", image
    try:
        return Path(image).name, Path(image).read_bytes()
    except OSError as error:
        raise BadSample(f"can't be read: {error.strerror}", file=str(image)) from error


def _picture(entry: Json) -> PictureAnswer:
    model, error = entry.get("model", {}), entry.get("error", {})
    return PictureAnswer(
        name=entry["name"],
        error=error.get("message"),
        kind=error.get("kind"),
        model=f"{model.get('name', '')} {model.get('version', '')}".strip(),
        phrases=[_phrase(p) for p in entry.get("phrases", [])],
    )


def _phrase(entry: Json) -> PhraseAnswer:
    if entry["status"] == "error":
        return PhraseAnswer(phrase=entry["phrase"], error=entry["error"]["message"])
    return PhraseAnswer(
        phrase=entry["phrase"],
        score=entry["score"],
        area=entry["area"],
        box=tuple(entry["box"]) if entry["box"] else None,
        truncated=entry["truncated"],
        rle=entry["mask"] if entry["mask"]["format"] == "rle" else None,
    )


def _json(reply: httpx.Response) -> Json:
    try:
        tree = reply.json()
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _fault(reply: httpx.Response) -> Json:
    error = _json(reply).get("error")
    return error if isinstance(error, dict) else {}


def _problem(reply: httpx.Response) -> str:
    told = _fault(reply).get("message") or reply.text[:200]
    return f"{reply.request.url}: {reply.status_code}: {told}"
