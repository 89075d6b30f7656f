from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from rlfseg import draw
from rlfseg.datasets.shapes import draw_scene
from rlfseg.draw import colour

GREY = np.full((64, 64, 3), 100, dtype=np.uint8)


def square(top: int, left: int, side: int) -> NDArray[np.uint8]:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def share(picture: NDArray[np.uint8], rgb: tuple[int, int, int]) -> float:
    """Share of pixels that have just this colour."""
    return float((picture == np.array(rgb)).all(axis=-1).mean())


def tinted(i: int, opacity: float = 0.42) -> tuple[int, ...]:
    return tuple(round((1 - opacity) * 100 + opacity * c) for c in colour(i))


@pytest.mark.parametrize(("size", "width"), [((64, 64), 384), ((100, 50), 400), ((480, 640), 640), ((1, 1), 384)])
def test_small_pictures_are_enlarged_by_whole_factors(size: tuple[int, int], width: int) -> None:
    image = np.full((*size, 3), 7, dtype=np.uint8)
    out = draw.overlay(image, [], [])
    assert out.shape == (size[0] * width // size[1], width, 3)
    assert (out == 7).all()


def test_a_tall_and_narrow_picture_stays_small_and_gets_a_margin() -> None:
    out = draw.overlay(np.zeros((500, 3, 3), dtype=np.uint8), [np.ones((500, 3), dtype=np.uint8)], ["a thin line"])
    assert out.shape[1] == 384
    assert out.shape[0] < 2100


def test_inside_is_tinted_outside_untouched_and_the_input_is_left_alone() -> None:
    before = GREY.copy()
    out = draw.overlay(GREY, [square(16, 16, 32)], ["box"])
    assert tuple(out[32 * 6, 32 * 6]) == tinted(0)
    assert tuple(out[8 * 6, 8 * 6]) == (100, 100, 100)
    assert (before == GREY).all()


def test_holes_stay_visible_and_have_an_outline() -> None:
    ring = square(16, 16, 32) - square(24, 24, 16)
    out = draw.overlay(GREY, [ring], ["ring"])
    assert tuple(out[32 * 6, 32 * 6]) == (100, 100, 100)
    row = out[32 * 6]
    outline = (row == np.array(colour(0))).all(axis=1).nonzero()[0]
    edges = [16 * 6, 24 * 6 - 2, 40 * 6, 48 * 6 - 2]  # two pixels wide, on the mask's side of each edge
    assert outline.tolist() == sorted(edges + [e + 1 for e in edges])


def test_equal_masks_share_their_pixels_fairly() -> None:
    mask = square(8, 8, 48)
    out = draw.overlay(GREY, [mask, mask, mask], ["a", "b", "c"])[: 64 * 6]
    for i in range(3):
        assert share(out, tinted(i)) == pytest.approx(  # type: ignore[arg-type]
            ((48 * 6 - 4) / (64 * 6)) ** 2 / 3, rel=0.06
        )
        assert share(out, colour(i)) > 0.004


@given(arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))), st.integers(1, 4))
def test_each_covered_pixel_goes_to_one_of_its_masks(masks: NDArray[np.bool_], band: int) -> None:
    shares = np.stack(list(draw._share_out(list(masks), band)))
    assert (shares.sum(axis=0) == masks.any(axis=0)).all()
    assert not (shares & ~masks).any()


def test_legend_names_every_phrase_in_its_colour() -> None:
    captions = [f"{c} thing" for c in ("red", "blue", "very tall", "odd", "wide", "flat", "round", "old", "new", "dim")]
    strip = draw.legend(captions, 640)
    for i in range(len(captions)):
        assert share(strip, colour(i)) * strip.size / 3 > 100
    assert len({colour(i) for i in range(40)}) == 40
    assert draw.legend([], 640).shape == (0, 640, 3)


@pytest.mark.parametrize("caption", ["word " * 200, "x" * 500, "two\nlines", "chien é, пёс", ""])
def test_legend_keeps_its_width(caption: str) -> None:
    strip = draw.legend([caption, "next"], 384, notes=["0.81", ""])
    assert strip.shape[1] == 384
    assert strip.shape[0] <= 70
    assert (strip[:, -8:] == 255).all()
    assert (strip != 255).any()


def test_overlay_of_a_scene_has_all_its_phrases() -> None:
    scene = draw_scene(2)
    out = draw.overlay(scene.image, [p.mask for p in scene.phrases], [p.caption for p in scene.phrases])
    picture, strip = out[:384], out[384:]
    for i in range(len(scene.phrases)):
        assert share(picture, colour(i)) > 0
        assert share(strip, colour(i)) > 0


def test_contact_sheet_places_pictures_of_any_size() -> None:
    one, two, three = (np.full((h, w, 3), v, dtype=np.uint8) for h, w, v in ((10, 10, 10), (20, 40, 20), (5, 20, 30)))
    sheet = draw.contact_sheet([[one, two], [three]], titles=["image", "label"], notes=["first", "second"], cell=100)
    assert sheet.shape[1] == 2 * 110 + 10
    counts = [share(sheet, (v, v, v)) * sheet.size / 3 for v in (10, 20, 30)]
    assert counts == pytest.approx([100 * 100, 100 * 50, 100 * 25])
    assert draw.contact_sheet([]).shape[2] == 3


def test_curves_are_written_with_gaps_where_values_are_not_finite(tmp_path: Path) -> None:
    series = {"loss": ([0, 1, 2, 3], [1.0, float("nan"), float("inf"), 0.1]), "val": ([0, 3], [2.0, 1.0])}
    path = draw.curves(tmp_path / "deep" / "loss.png", series, title="Training", y="loss")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > 600
    for i in range(2):
        assert share(picture, colour(i)) > 1e-4


def test_iou_curve_names_the_best_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(draw, "curves", lambda path, series, **rest: seen.update(series=list(series), **rest) or path)
    draw.iou_by_threshold(tmp_path / "a.png", [0.2, 0.4, 0.6], {"test": [0.5, 0.75, 0.6], "flat": [0.3, 0.3, 0.3]})
    assert seen["series"] == ["test: 0.750 at 0.40", "flat: 0.300 at 0.20"]
    assert seen["marks"] == {"test: 0.750 at 0.40": (0.4, 0.75), "flat: 0.300 at 0.20": (0.2, 0.3)}


def test_pictures_are_saved_as_they_are(tmp_path: Path) -> None:
    path = draw.save(tmp_path / "new" / "a.png", GREY)
    assert (np.asarray(Image.open(path)) == GREY).all()


def test_no_global_plotting_state() -> None:
    code = "import sys, pathlib, rlfseg.draw as d; d.curves(pathlib.Path(sys.argv[1]), {'a': ([0], [1])}); "
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True)
