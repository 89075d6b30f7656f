"""What clients send and get; the OpenAPI page is made from this file.

Frames: a mask is [height, width] of the picture as people see it (EXIF rotation applied); a box is
[left, top, right, bottom] in pixels, right and bottom exclusive; a polygon's points are (x, y), pixel centres at .5.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Output = Literal["rle", "png", "polygons", "score"]
Rescale = Literal["none", "aos", "hss"]
# A grey picture of 2 x 2 pixels, so that the examples work as they stand.
PIXELS = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR42mNsYGBiYAAAApIAhOoU7S4AAAAASUVORK5CYII="


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- asked ---------------------------------------------------------------------------------------------------------


class Options(Strict):
    """How to segment."""

    phrases: list[str] = Field(min_length=1, description="What to look for in each picture.", examples=[["red ring"]])
    model: str | None = Field(None, description="A name of `GET /v1/models`; default: its first.")
    threshold: float | None = Field(
        None, ge=0, le=1, description="Score above which a pixel is mask; default: the model's own."
    )
    steps: int = Field(1, ge=1, le=1000, description="Euler steps; with rescale aos or hss it must be 1.")
    rescale: Rescale = Field("none", description="Rescale the single step: adaptive one-step or hybrid step sampling.")
    output: Output = Field("rle", description="Form of the masks.")
    stream: bool = Field(False, description="Answer NDJSON: a line a picture as soon as it is done, then a summary.")


class Picture(Strict):
    """A picture in JSON."""

    data: str = Field(description="The bytes of an image file in base64.", examples=[PIXELS])
    name: str = Field("", max_length=200, description="Only repeated in the answer.", examples=["a.png"])


class SegmentRequest(Options):
    """Pictures and phrases."""

    images: list[Picture] = Field(min_length=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"images": [{"data": PIXELS, "name": "a.png"}], "phrases": ["red ring", "blue star"]},
                {"images": [{"data": PIXELS}], "phrases": ["red ring"], "output": "png", "threshold": 0.5},
            ]
        }
    )


class SegmentForm(Options):
    """The same as multipart/form-data: `images` are files, and `images` and `phrases` may be repeated."""

    images: list[Annotated[str, Field(json_schema_extra={"format": "binary"})]] = Field(min_length=1)


class BatchRequest(Strict):
    """Pictures that lie on the server's disks."""

    manifest: str | None = Field(
        None,
        description="A Parquet file with columns `path` and `phrases`, or JSONL with a line such as "
        '{"path": "a.jpg", "phrases": ["dog"]}; its relative paths start at its own folder.',
        examples=["shop/list.jsonl"],
    )
    images: list[str] = Field(default_factory=list, description="Or paths.", examples=[["shop/a.jpg"]])
    phrases: list[str] = Field(default_factory=list, description="Asked of every picture, after its own.")
    model: str | None = Field(None, description="A name of `GET /v1/models`; default: its first.")
    threshold: float | None = Field(None, ge=0, le=1, description="Default: the model's.")
    steps: int = Field(1, ge=1, le=1000)
    rescale: Rescale = "none"
    overlays: bool = Field(False, description="Also draw the masks over each picture.")
    png: bool = Field(False, description="Also write each mask as a PNG.")


# --- answered ------------------------------------------------------------------------------------------------------


class Fault(BaseModel):
    """Why there is no answer."""

    kind: str = Field(examples=["picture"])
    message: str = Field(examples=["images[0]: not a picture"])


class Problem(BaseModel):
    """A whole request that is not answered."""

    error: Fault
    request_id: str


class Rle(BaseModel):
    """COCO's compressed run lengths, column by column."""

    format: Literal["rle"] = "rle"
    size: tuple[int, int] = Field(description="Height and width.")
    counts: str


class Png(BaseModel):
    """A PNG of 8 bits, 0 and 255, in base64."""

    format: Literal["png"] = "png"
    data: str


class Score(BaseModel):
    """A PNG of 16 bits, 0 to 65535 for a score of 0 to 1, in base64."""

    format: Literal["score"] = "score"
    data: str


class Ring(BaseModel):
    """An outline and the holes in it."""

    outer: list[tuple[float, float]]
    holes: list[list[tuple[float, float]]]


class Polygons(BaseModel):
    """Outlines of the mask, to a thousandth of a pixel: a pixel is mask where its centre lies inside."""

    format: Literal["polygons"] = "polygons"
    size: tuple[int, int] = Field(description="Height and width.")
    rings: list[Ring]


Mask = Annotated[Rle | Png | Score | Polygons, Field(discriminator="format")]


class Found(BaseModel):
    """A phrase's mask."""

    phrase: str
    status: Literal["ok"] = "ok"
    score: float = Field(description="Mean score inside the mask, 0 where it is empty.")
    area: int = Field(description="Pixels of the mask.")
    box: tuple[int, int, int, int] | None = Field(description="Null where the mask is empty.")
    threshold: float
    gamma: float = Field(description="Factor of AOS or HSS; 0 without.")
    clipped: bool = Field(description="Whether gamma ran into its limit.")
    truncated: bool = Field(description="Whether the text encoder saw only the beginning of the phrase.")
    mask: Mask


class Unanswered(BaseModel):
    """A phrase without a mask."""

    phrase: str
    status: Literal["error"] = "error"
    error: Fault


class ModelVersion(BaseModel):
    """Which weights answered."""

    name: str = Field(examples=["tiny"])
    version: str = Field(description="Hash of the adapter's files.", examples=["0f3c9a1b2d4e"])


class Timing(BaseModel):
    """Milliseconds."""

    decode: float = Field(description="Reading the picture.")
    wait: float = Field(description="Waiting for the model and for the batch to fill.")
    encode: float = Field(description="Image to latent, of the whole batch; 0 where it was known.")
    network: float = Field(description="Latent to scores, of the whole batch.")
    draw: float = Field(description="Scores to masks in the form asked for.")


class Segmented(BaseModel):
    """A picture and what was found on it."""

    index: int = Field(description="Its place in the request, from 0.")
    name: str
    status: Literal["ok"] = "ok"
    height: int
    width: int
    model: ModelVersion
    cached: bool = Field(description="Whether its latent was still known from an earlier request.")
    batch: int = Field(description="Pictures that went through the network with it, itself included.")
    phrases: list[Found | Unanswered]
    timing_ms: Timing


class Refused(BaseModel):
    """A picture that could not be segmented."""

    index: int = Field(description="Its place in the request, from 0.")
    name: str
    status: Literal["error"] = "error"
    error: Fault


class SegmentAnswer(BaseModel):
    """One entry a picture, in order. The status is 200 if any picture was segmented."""

    request_id: str
    images: list[Segmented | Refused]
    total_ms: float
    error: Fault | None = Field(None, description="Where no picture was segmented: the first one's error.")


class StreamEnd(BaseModel):
    """The last line of an NDJSON answer, after a line a picture."""

    done: Literal[True] = True
    request_id: str
    ok: int
    failed: int
    total_ms: float


class Model(BaseModel):
    """A model that requests may name."""

    name: str
    default: bool
    version: str
    base: str
    resolution: int = Field(description="Side in pixels to which pictures are stretched for the network.")
    threshold: float
    rescale: list[Rescale] = Field(description="What it is calibrated for.")


class Models(BaseModel):
    """The models and what one request may ask."""

    models: list[Model]
    limits: dict[str, float]


class Batch(BaseModel):
    """A batch job."""

    id: str = Field(pattern="^[0-9a-f]{32}$")
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    images: int = Field(description="Pictures in all.")
    done: int = Field(description="Pictures whose results are on disk, refused ones among them.")
    refused: int | None = Field(description="Pictures that could not be segmented; null until the end.")
    results: str = Field(description="Folder of the results on the server's disks.")
    created: str = Field(description="UTC, ISO 8601.")
    error: str | None = Field(None, description="Why it failed.")


class Batches(BaseModel):
    """All batches, newest first."""

    batches: list[Batch]


class State(BaseModel):
    """Whether the service lives, or takes requests."""

    status: Literal["ok"] = "ok"


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for errors of these statuses."""
    return {status: {"model": Problem} for status in statuses}
