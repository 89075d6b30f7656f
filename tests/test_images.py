"""images.py: every odd picture as people see it, masks of exactly two values, and the way to the network and back."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torchvision.transforms.v2.functional import resize

from rlfseg import images
from rlfseg.errors import BadSample, DataError

MASKS = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda s: arrays(np.uint8, s, elements=st.integers(0, 1))
)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def loaded(data: bytes) -> NDArray[np.uint8]:
    return images.load_image(data, name="x")


def quadrants(width: int = 40, height: int = 20) -> Image.Image:
    """Red, green / blue, white."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def png(width: int, height: int) -> bytes:
    """An empty 1-bit PNG of any size, without ever holding its pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks
    )


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("image-01", part="load")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quadrants(), form, exif=exif.tobytes())
    # The EXIF standard: where the stored row 0 and column 0 are on display.
    at = np.asarray(quadrants())
    turned = {
        1: at,
        2: at[:, ::-1],
        3: at[::-1, ::-1],
        4: at[::-1],
        5: at.transpose(1, 0, 2),
        6: at[::-1].transpose(1, 0, 2),
        7: at[::-1, ::-1].transpose(1, 0, 2),
        8: at[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    seen = loaded(data)
    assert seen.shape == turned.shape
    centres = seen[seen.shape[0] // 4 :: seen.shape[0] // 2, seen.shape[1] // 4 :: seen.shape[1] // 2].astype(int)
    truth = turned[turned.shape[0] // 4 :: turned.shape[0] // 2, turned.shape[1] // 4 :: turned.shape[1] // 2]
    assert abs(centres - truth).max() < 30


@pytest.mark.fault("image-03")
@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = loaded(encoded(Image.fromarray(ramp), form))
    assert (image == (ramp // 257)[..., None]).all()


def test_a_bit_depth_without_a_range_is_refused() -> None:
    with pytest.raises(BadSample, match=r"^x: .*unsupported bit depth"):
        loaded(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


@pytest.mark.fault("image-04")
def test_transparency_is_laid_on_white() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 255, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    image = loaded(encoded(palette, "PNG", transparency=0))
    assert image.shape == (8, 8, 3)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 1].tolist() == [10, 20, 30]
    half = loaded(encoded(Image.new("RGBA", (2, 2), (0, 0, 255, 128)), "PNG"))
    assert half[0, 0].tolist() == [127, 127, 255]  # 255 (1 - 128 / 255) = 127
    for mode, hidden in (("LA", (9, 0)), ("L", 9), ("RGB", (9, 9, 9)), ("I;16", 9)):
        options = {} if mode == "LA" else {"transparency": hidden}
        assert (loaded(encoded(Image.new(mode, (2, 2), hidden), "PNG", **options)) == 255).all(), mode


@pytest.mark.fault("image-06", part="load")
def test_cmyk_and_ycck_become_rgb() -> None:
    cmyk = encoded(Image.new("RGB", (16, 16), "red").convert("CMYK"), "JPEG", quality=95)
    # YCCK after Adobe: the stored inks are inverted, and the three of them are Y, Cb, Cr: for no cyan, full magenta and
    # yellow those of the colour (0, 255, 255), with an inverted black of 255. Pillow inverts what it stores; the last
    # byte of Adobe's marker says what the components are.
    planes = [*Image.new("RGB", (16, 16), "cyan").convert("YCbCr").split(), Image.new("L", (16, 16), 255)]
    ycck = encoded(Image.merge("CMYK", [plane.point(lambda v: 255 - v) for plane in planes]), "JPEG", quality=95)
    last = ycck.index(b"Adobe") + 11
    assert ycck[last] == 0
    for data in (cmyk, ycck[:last] + b"\x02" + ycck[last + 1 :]):
        image = loaded(data)
        assert image.shape == (16, 16, 3)
        assert abs(image.astype(int) - [255, 0, 0]).max() <= 10


@pytest.mark.fault("image-07", part="batch")
def test_a_bomb_is_named_and_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(20_000, 20_000))
    (tmp_path / "b.png").write_bytes(png(13_000, 13_000))
    quadrants().save(tmp_path / "c.png")
    assert (tmp_path / "a.png").stat().st_size < 60_000  # the row says 48 kB
    code = """if True:
        import resource, sys, time
        from rlfseg import images
        from rlfseg.errors import BadSample
        images.load_image(sys.argv[1] + "/c.png", name="warm")
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        for path in images.list_images(sys.argv[1]):
            try:
                images.load_image(path, name=path.name)
                print("good", path.name)
            except BadSample as error:
                print(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100 << 10, grown
        assert time.process_time() - start < 1  # of this process alone: a busy machine makes no difference
    """
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line.split(" pixels")[0] for line in done.stdout.splitlines()]
    assert [line.split()[0] for line in said] == ["a.png:", "b.png:", "good"]
    assert all("too many" in line for line in said[:2])


@pytest.mark.fault("image-09")
def test_contents_decide_not_names(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(quadrants(), "WEBP", lossless=True))
    (tmp_path / "b.jpg").write_text("<html><title>404 Not Found</title></html>")
    (tmp_path / "c.png").touch()
    assert (images.load_image(tmp_path / "a.jpg", name="a") == np.asarray(quadrants())).all()
    for name in ("b.jpg", "c.png"):
        for load in (images.load_image, images.load_mask):
            with pytest.raises(BadSample, match=f"^{name}: not a picture"):
                load(tmp_path / name, name=name)
    with pytest.raises(BadSample, match=r"^gone.png: no such file"):
        images.load_image(tmp_path / "gone.png", name="gone.png")


def test_postscript_is_never_handed_to_an_interpreter() -> None:
    with pytest.raises(BadSample, match="not a picture"):
        loaded(encoded(quadrants(), "EPS"))


@pytest.mark.fault("image-10", part="load")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_a_truncated_picture_is_refused(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, form)
    with pytest.raises(BadSample, match=r"^x: "):
        loaded(data[: len(data) // 2])


@pytest.mark.fault("image-11", part="load")
@pytest.mark.parametrize("size", [(1, 1), (1, 600), (600, 1), (3, 500)])
def test_tiny_and_thin_pictures_keep_their_shape(size: tuple[int, int]) -> None:
    image = loaded(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"))
    assert image.shape == (size[1], size[0], 3)
    tensor = images.image_to_tensor(image, 64)
    assert tensor.shape == (3, 64, 64)
    score = images.tensor_to_score(tensor, image.shape[:2])
    assert score.shape == image.shape[:2]


@pytest.mark.fault("image-13", part="load")
@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert sum(1 for _ in ImageSequence.Iterator(Image.open(io.BytesIO(data)))) == 3
    image = loaded(data)
    assert image.shape == (10, 12, 3)
    assert abs(image.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.fault("image-14", part="list")
def test_suffixes_of_any_case_are_listed(tmp_path: Path) -> None:
    for name in ("A.JPG", "b.JPEG", "c.png", "d.PNG", "notes.txt", "._c.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in images.list_images(tmp_path)] == ["A.JPG", "b.JPEG", "c.png", "d.PNG"]
    with pytest.raises(DataError, match="not a folder"):
        images.list_images(tmp_path / "gone")


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_bytes_give_a_picture_or_a_clear_refusal(junk: bytes, form: str, data: st.DataObject) -> None:
    whole = encoded(quadrants(), form)
    at = data.draw(st.integers(0, len(whole)))
    try:
        image = images.load_image(whole[:at] + junk + whole[at + len(junk) :], name="x", max_pixels=100_000)
    except BadSample:
        return
    except Warning:
        return  # Pillow warns about odd metadata, and tests make that an error
    assert image.dtype == np.uint8
    assert image.ndim == 3


# --- masks ---------------------------------------------------------------------------------------------------------


def eye(size: int = 7) -> NDArray[np.uint8]:
    return np.eye(size, dtype=np.uint8)


@pytest.mark.fault("raster-10", part="load")
def test_every_coding_of_a_mask_gives_the_same() -> None:
    truth = images.mask_to_tensor(eye(), 16)
    same = [eye().astype(bool), eye(), eye() * 255, eye().astype(np.float32), eye() * 255.0, eye().astype(">i4")]
    for coded in same:
        assert torch.equal(images.mask_to_tensor(images.to_binary(coded, file="x"), 16), truth)
    values = [eye() * 2, eye() + 1, eye() * 0.5, np.where(eye(), np.nan, 0), eye() * 254, -eye().astype(int)]
    shapes = [np.array([[0, 1], [255, 0]]), eye()[None], np.zeros((0, 3)), np.full((2, 2), "1")]
    for coded in values + shapes:
        with pytest.raises(BadSample, match=r"^x \[7\]: a mask must"):
            images.to_binary(coded, file="x", sample="7")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P"])
@pytest.mark.parametrize("top", [1, 255])
def test_masks_of_every_mode(mode: str, top: int) -> None:
    if mode == "1":
        image = Image.fromarray(eye().astype(bool))
    elif mode == "P":
        image = Image.fromarray(eye() * top)
        image.putpalette([0, 0, 0, 200, 30, 30] * 128)
    else:
        image = Image.fromarray(eye() * top).convert(mode)
    assert (images.load_mask(encoded(image, "PNG"), name="x") == eye()).all()


def test_a_black_and_white_palette_is_read_by_colour() -> None:
    image = Image.fromarray(1 - eye())
    image.putpalette([255, 255, 255, 0, 0, 0])
    assert (images.load_mask(encoded(image, "PNG"), name="x") == eye()).all()


def test_masks_that_are_no_masks_are_refused() -> None:
    smeared = encoded(Image.fromarray(eye(64) * 255), "JPEG")
    clear = Image.new("LA", (4, 4), (255, 100))
    for data in (smeared, encoded(quadrants(), "PNG"), encoded(clear, "PNG")):
        with pytest.raises(BadSample, match=r"^m.png \[7\]: "):
            images.load_mask(data, name="m.png", sample="7")


# --- the square ------------------------------------------------------------------------------------------------------


def test_a_picture_reaches_the_network_in_range() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    truth = resize(torch.from_numpy(image).permute(2, 0, 1).float(), [32, 32], antialias=True) / 127.5 - 1
    tensor = images.image_to_tensor(image, 32)
    torch.testing.assert_close(tensor, truth)
    edges = images.image_to_tensor(np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), 255)]).astype(np.uint8)[0], 4)
    assert edges.min() == edges.max() == -1


@pytest.mark.parametrize("size", [(37, 53), (1, 40), (301, 7), (90, 200)])
def test_a_picture_in_bands_is_the_picture_in_one(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    for side in (16, 64):
        truth = torch.nn.functional.interpolate(whole, size=(side, side), mode="bilinear", antialias=True)[0]
        for band in (1, 1000, 2**22):
            monkeypatch.setattr(images, "BAND", band)
            assert torch.equal(images.image_to_tensor(image, side), truth / 127.5 - 1)  # to the bit


def test_a_large_picture_is_never_floats_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stretched, sizes = images._stretch, list[int]()
    monkeypatch.setattr(images, "_stretch", lambda p, size: (sizes.append(p.numel()), stretched(p, size))[1])
    images.image_to_tensor(np.zeros((4000, 5000, 3), np.uint8), 512)
    assert max(sizes) <= 3 * 2**22


def test_a_picture_of_millions_of_rows_fills_no_memory() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8), 16_000).reshape(-1, 1, 1).repeat(3, axis=2)
    tensor = images.image_to_tensor(image, 512)  # rows first, it would be 25 GB
    truth = torch.linspace(-1, 1, 512)[None, :, None].expand(3, 512, 512)
    torch.testing.assert_close(tensor, truth, rtol=0, atol=0.02)
    assert tensor.is_contiguous()


@pytest.mark.fault("raster-09")
def test_a_resized_mask_has_two_values() -> None:
    tensor = images.mask_to_tensor(images.load_mask(encoded(Image.fromarray(eye() * 255), "PNG"), name="x"), 16)
    assert tensor.shape == (3, 16, 16)
    assert tensor.unique().tolist() == [-1, 1]


@given(MASKS, st.integers(1, 12))
def test_a_mask_shrinks_by_majority_of_area(mask: NDArray[np.uint8], side: int) -> None:
    big = np.kron(mask[:3, :3], np.ones((side, side), np.uint8))  # blocks: a whole number of pixels a target pixel
    square = np.zeros((3 * side, 3 * side), np.uint8)
    square[: big.shape[0], : big.shape[1]] = big
    tensor = images.mask_to_tensor(square, 3)
    cover = square.reshape(3, side, 3, side).mean(axis=(1, 3))
    assert ((tensor[0].numpy() == 1) == (cover >= 0.5)).all()
    assert (tensor == tensor[:1]).all()


def test_scores_are_clamped_means_at_the_pictures_size() -> None:
    decoded = torch.zeros(2, 3, 4, 4)
    decoded[0] = torch.tensor([3.0, 0.0, 3.0])[:, None, None]  # mean 2, clamped to 1
    decoded[1] = torch.tensor([-1.0, 0.5, -1.0])[:, None, None]  # mean -0.5 -> 0.25
    score = images.tensor_to_score(decoded, (7, 9))
    assert score.shape == (2, 7, 9)
    torch.testing.assert_close(score[0], torch.ones(7, 9))
    torch.testing.assert_close(score[1], torch.full((7, 9), 0.25))
    assert images.tensor_to_score(decoded.bfloat16()[0], (2, 2)).dtype == torch.float32
    assert images.tensor_to_score(torch.full((3, 4, 4), torch.nan), (8, 8)).isnan().all()


@pytest.mark.fault("metric-06", part="resize")
def test_scores_go_up_to_the_pictures_frame() -> None:
    truth = np.zeros((427, 640), np.uint8)
    truth[:, 321] = 1  # one pixel wide
    small = np.zeros((64, 64), np.uint8)
    small[:, 32] = 1  # the column of 10 pixels that holds it
    predicted = images.tensor_to_score(images.mask_to_tensor(small, 64), truth.shape).numpy() >= 0.5
    assert predicted.shape == truth.shape
    at_original = (predicted & (truth == 1)).sum() / (predicted | (truth == 1)).sum()
    assert at_original == pytest.approx(1 / 10, abs=0.02)  # 64 x 64 would say 1


# --- run lengths -----------------------------------------------------------------------------------------------------


@given(MASKS)
def test_rle_is_cocos_and_reversible(mask: NDArray[np.uint8]) -> None:
    counts = images.rle_encode(mask)
    assert counts.encode() == coco.encode(np.asfortranarray(mask))["counts"]
    assert (images.rle_decode(counts, mask.shape) == mask).all()


@given(MASKS, st.text(st.characters(max_codepoint=130), max_size=4), st.data())
def test_damaged_rle_gives_zeros_and_ones_or_a_refusal(mask: NDArray[np.uint8], junk: str, data: st.DataObject) -> None:
    counts = images.rle_encode(mask)
    at = data.draw(st.integers(0, len(counts)))
    try:
        decoded = images.rle_decode(counts[:at] + junk + counts[at + len(junk) :], mask.shape)
    except DataError:
        return
    assert decoded.shape == mask.shape
    assert decoded.max() <= 1


def test_a_mask_of_as_many_pixels_as_one_may_allow_is_decoded() -> None:
    assert images.rle_decode([3, 2, 170_000_000 - 5], (10_000, 17_000)).sum() == 2


@pytest.mark.parametrize("counts", ["", "0", "o", "é", "\0", "9" * 500, "oooooooo1"])
def test_nonsense_rle_is_refused(counts: str) -> None:
    with pytest.raises(DataError, match="RLE counts"):
        images.rle_decode(counts, (3, 3))
    with pytest.raises(DataError, match="pixels is outside"):
        images.rle_decode(counts, (100_000, 100_000))
