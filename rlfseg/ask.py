"""`rlfseg segment`: phrases on one picture, by the model here or by a service; masks and an overlay as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlfseg import draw, images
from rlfseg.config import SegmentConfig
from rlfseg.errors import BadSample, ConfigError

Found = tuple[str, NDArray[np.uint8], float]


def run(config: SegmentConfig) -> None:
    """Writes a PNG a phrase and an overlay, and prints what was found.

    Args:
        config: Settings of the command.

    Raises:
        BadSample: The picture can't be decoded, or a phrase failed.
        ServiceError: The service can't be reached, or refuses.
    """
    picture = images.load_image(config.image, name=config.image)
    found = _by_service(config) if config.url else _here(config, picture)
    out, stem = Path(config.out), Path(config.image).stem
    out.mkdir(parents=True, exist_ok=True)
    for n, (phrase, mask, score) in enumerate(found):
        if mask.shape != picture.shape[:2]:
            raise BadSample(f"the service's mask is {mask.shape}, the picture {picture.shape[:2]}", file=config.image)
        path = draw.save(out / f"{stem}-{n:02d}.png", mask * np.uint8(255))
        print(f"{phrase}: {int(mask.sum())} pixels, score {score:.2f}; {path}")
    captions, masks, scores = zip(*found, strict=True)
    overlay = draw.overlay(picture, masks, captions, notes=[f"{score:.2f}" for score in scores])
    print(draw.save(out / f"{stem}-overlay.png", overlay))


def _here(config: SegmentConfig, picture: NDArray[np.uint8]) -> list[Found]:
    from rlfseg.segmenter import Segmenter  # a service's client needs no networks

    segmenter = Segmenter.load(config.model or "tiny", device=config.device)
    results = segmenter(picture, config.phrases, sampling=config.sampling, threshold=config.threshold)
    return [(r.caption, r.mask, r.confidence) for r in results]


def _by_service(config: SegmentConfig) -> list[Found]:
    from rlfseg.client import Client

    options = {
        "model": config.model,
        "threshold": config.threshold,
        "steps": config.sampling.steps,
        "rescale": config.sampling.rescale,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with Client(str(config.url), key=_key(config), retries=config.retries) as client:
        [answer] = client.segment([config.image], config.phrases, **given)
    if answer.error:
        raise BadSample(answer.error, file=config.image)
    return [(p.phrase, p.mask, p.score) for p in answer.phrases]


def _key(config: SegmentConfig) -> str | None:
    if config.key_file is None:
        return None
    try:
        return Path(config.key_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"key_file: {config.key_file}: {error.strerror}") from error
