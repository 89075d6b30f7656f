"""The page in a real Chromium, over real HTTP: what it shows is what the scores say, and what it gives is the same."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect
from scipy.ndimage import binary_erosion

from rlfseg.datasets.shapes import draw_scene
from rlfseg.draw import PALETTE
from tests.serving.browser import (
    FILL,
    PAGE_KEY,
    answer_of,
    ask_for,
    asked_here,
    canvas_of,
    check_canvas,
    check_legend,
    choose_way,
    decoded,
    give_key,
    hand_over,
    masks_of,
    opened,
    scores_of,
)
from tests.serving.harness import phrases_of, png, saved, scene

SCENES = (34, 48, 59, 30)  # of the split "test", that lie in the page
ODD_PHRASES = (
    "it's",
    "$(touch broken) `touch broken`",
    "@a;type=text/html",
    '"red" \\ ring; touch broken',
    "<ü 犬 %41",
)


# --- masks ---------------------------------------------------------------------------------------------------------


def test_a_dropped_picture_two_phrases_and_the_slider(page: Page, asked: dict[str, Any]) -> None:
    panel, slider = page.locator(".panel"), page.get_by_role("slider", name="Threshold")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    check_canvas(panel, scene(1), masks_of(asked))
    check_legend(panel, asked)
    areas = {sum(m.sum() for m in masks_of(asked))}
    for threshold in (0.03, 0.9, 0.97):
        slider.fill(str(threshold))
        expect(page.locator("#limit")).to_have_text(f"{threshold:.2f}")
        check_canvas(panel, scene(1), masks_of(asked, threshold))
        check_legend(panel, asked, threshold)
        areas.add(sum(m.sum() for m in masks_of(asked, threshold)))
    assert len(areas) == 4, "the slider had nothing to change"
    slider.press("ArrowLeft")
    expect(page.locator("#limit")).to_have_text("0.96")
    check_canvas(panel, scene(1), masks_of(asked, 0.96))
    page.get_by_role("button", name="Model’s own").click()
    check_canvas(panel, scene(1), masks_of(asked))
    assert requests == []


def test_a_mask_is_switched_off_by_its_phrase(page: Page, asked: dict[str, Any]) -> None:
    panel = page.locator(".panel")
    assert panel.locator(".numbers .swatch").all_inner_texts() == ["1", "2"]
    page.get_by_role("slider", name="Threshold").fill("0.9")
    expect(page.locator("#limit")).to_have_text("0.90")
    panel.get_by_role("checkbox", name=phrases_of(1)[1]).uncheck()
    first, second = masks_of(asked, 0.9)
    check_canvas(panel, scene(1), [first, np.zeros_like(second)])
    assert panel.locator(".numbers .swatch").all_inner_texts() == ["1"]


def test_overlapping_masks_take_turns(page: Page) -> None:
    hand_over(page, "drop", "one.png", png(scene(1)))
    image = ask_for(page, phrases_of(1)[0], phrases_of(1)[0])
    shown = canvas_of(page.locator(".panel"))
    zoom = shown.shape[0] // 64
    inner = binary_erosion(masks_of(image)[0].repeat(zoom, 0).repeat(zoom, 1), iterations=3)  # without the outline
    turns = np.array(PALETTE[:2])[np.arange(shown.shape[1]) // 12 % 2]  # stripes of 12 pixels
    blend = scene(1).repeat(zoom, 0).repeat(zoom, 1) * (1 - FILL) + turns * FILL
    assert inner.any()
    assert abs(shown - blend)[inner].max() <= 2


def test_a_number_stands_inside_its_mask(page: Page, asked: dict[str, Any]) -> None:
    for number, mask in zip(page.locator(".numbers .swatch").all(), masks_of(asked), strict=True):
        x, y = number.evaluate("(e) => [parseFloat(e.style.left), parseFloat(e.style.top)]")
        assert mask[int(y * mask.shape[0] / 100), int(x * mask.shape[1] / 100)]


def test_a_drawn_scene_is_one_click(page: Page) -> None:
    buttons = page.get_by_role("group", name="drawn scene").get_by_role("button").all()
    for index, button in zip(SCENES, buttons, strict=True):
        picture = decoded(base64.b64decode(button.locator("img").evaluate("(i) => i.src.split(',')[1]")))
        drawn = draw_scene(index, split="test").image
        assert np.array_equal(picture, np.clip(np.round(drawn / 8) * 8, 0, 255))  # fewer colours: a smaller page
        with page.expect_response("**/v1/segment") as response:
            button.click()
        page.get_by_role("status").filter(has_text=f"scene-{index}.png").wait_for()
        image = answer_of(response.value)
        check_canvas(page.locator(".panel"), picture, masks_of(image))
        assert all(m.any() for m in masks_of(image)), "phrases that the shipped model finds"


# --- pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_is_pasted_and_asked_about_by_keys_alone(page: Page) -> None:
    hand_over(page, "paste", "from the clipboard.png", png(scene(2)))
    expect(page.locator("#chosen")).to_have_text("from the clipboard.png, 64 × 64")
    page.get_by_label("Phrases").focus()
    page.keyboard.type(phrases_of(2)[0])
    with page.expect_response("**/v1/segment") as response:
        page.keyboard.press("Control+Enter")
    page.get_by_role("status").filter(has_text="1 phrase on").wait_for()
    check_canvas(page.locator(".panel"), scene(2), masks_of(answer_of(response.value)))


def test_a_turned_photograph_is_shown_as_people_see_it(page: Page) -> None:
    turned = Image.fromarray(scene(1)[:32].repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    page.get_by_label("Picture").set_input_files(
        {"name": "turned.jpg", "mimeType": "image/jpeg", "buffer": saved(turned, "JPEG", exif=exif, quality=95)}
    )
    image = ask_for(page, phrases_of(1)[0])
    assert (image["height"], image["width"]) == (512, 256)
    page.locator(".panel").get_by_role("checkbox").uncheck()
    shown, upright = canvas_of(page.locator(".panel")), np.asarray(turned.transpose(Image.Transpose.ROTATE_270))
    assert shown.shape == (1024, 512, 3)
    assert abs(shown[::2, ::2].astype(int) - upright).mean() < 4


def test_a_large_photograph_is_made_smaller(page: Page) -> None:
    large = scene(1).repeat(32, 0).repeat(24, 1)  # 2048 x 1536
    hand_over(page, "drop", "large.png", png(large))
    image = ask_for(page, phrases_of(1)[0])
    assert 990_000 < image["height"] * image["width"] <= 1_000_000
    assert abs(image["height"] / image["width"] - 4 / 3) < 0.01
    expect(page.locator("#chosen")).to_contain_text("large.small.jpg")
    assert canvas_of(page.locator(".panel")).shape == (image["height"], image["width"], 3)


def test_what_is_no_picture_is_said(page: Page) -> None:
    hand_over(page, "drop", "letter.png", b"Dear all")
    expect(page.get_by_role("alert")).to_have_text("This browser can't read letter.png as a picture.")


def test_a_file_that_is_none_leaves_no_old_picture_behind(page: Page) -> None:
    hand_over(page, "drop", "one.png", png(scene(1)))
    expect(page.locator("#preview")).to_be_visible()
    hand_over(page, "drop", "letter.png", b"Dear all")
    expect(page.locator("#preview")).to_be_hidden()
    expect(page.locator("#chosen")).to_be_empty()
    page.get_by_role("button", name="Segment").click()
    expect(page.get_by_role("alert")).to_have_text("Choose a picture first.")
    hand_over(page, "drop", "two.png", png(scene(2)))
    expect(page.locator("#preview")).to_be_visible()


# --- two ways side by side -----------------------------------------------------------------------------------------


def test_aos_and_steps_stand_beside_one_step(page: Page, url: str, asked: dict[str, Any]) -> None:
    ways = {"AOS": ("One step, AOS", {"rescale": "aos"}), "steps": ("5 steps", {"steps": "5"})}
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    left = page.get_by_role("region", name="One step", exact=True)
    for way, (title, options) in ways.items():
        choose_way(page, way)
        right = page.get_by_role("region", name=title)
        right.wait_for()
        image = asked_here(url, scene(1), phrases_of(1)[:2], options)
        check_canvas(right, scene(1), masks_of(image))
        check_legend(right, image)
        check_canvas(left, scene(1), masks_of(asked))
        a, b = left.bounding_box(), right.bounding_box()
        assert a is not None
        assert b is not None
        assert a["y"] == b["y"]
        assert a["x"] + a["width"] < b["x"]
        gammas = [f"γ = {p['gamma']:.3f}{', at its limit' * p['clipped']}" for p in image["phrases"] if p["gamma"]]
        assert right.locator("small").all_inner_texts() == gammas
        assert bool(gammas) == (way == "AOS")
    page.get_by_role("slider", name="Threshold").fill("0.8")
    expect(page.locator("#limit")).to_have_text("0.80")
    check_canvas(right, scene(1), masks_of(image, 0.8))
    check_canvas(left, scene(1), masks_of(asked, 0.8))
    choose_way(page, "nothing")
    expect(page.locator(".panel")).to_have_count(1)
    assert len(requests) == 2  # the first result was not asked for again


def test_what_a_model_is_not_calibrated_for_is_not_offered(page: Page) -> None:
    expect(page.get_by_role("radio", name="AOS")).to_be_enabled()
    page.get_by_label("Model").select_option("plain")
    expect(page.get_by_role("radio", name="AOS")).to_be_disabled()
    expect(page.get_by_text("plain is not calibrated for AOS or HSS.")).to_be_visible()


def test_an_answer_that_comes_late_replaces_no_newer_one(page: Page) -> None:
    held: list[Route] = []
    hand_over(page, "drop", "one.png", png(scene(1)))
    page.route("**/v1/segment", lambda route: route.continue_() if held else held.append(route))
    page.get_by_label("Phrases").fill(phrases_of(1)[0])
    with page.expect_request("**/v1/segment"):
        page.get_by_role("button", name="Segment").click()
    image = ask_for(page, phrases_of(1)[1])
    held[0].fulfill(status=503, body="late")
    check_legend(page.locator(".panel"), image)
    expect(page.get_by_role("alert")).to_be_empty()


# --- the key -------------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for_and_stays_in_the_tab(browser: Browser, keyed: str) -> None:
    with opened(browser, keyed) as page:
        dialog, field = page.get_by_role("dialog", name="This service needs a key"), page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("another-key")
        field.press("Enter")
        expect(dialog.get_by_role("alert")).to_have_text("The service refused that key.")
        field.fill(PAGE_KEY)
        dialog.get_by_role("button", name="Use key").click()
        expect(dialog).to_be_hidden()
        expect(page.get_by_text("Model: calibrated")).to_be_visible()
        page.reload()
        expect(page.get_by_text("Model: calibrated")).to_be_visible()
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [[PAGE_KEY], [], ""]
        with page.context.new_page() as other:
            other.goto(keyed)
            expect(other.get_by_role("dialog")).to_be_visible()
            other.keyboard.press("Escape")
            expect(other.get_by_role("alert")).to_have_text("This service needs an API key.")
            hand_over(other, "drop", "one.png", png(scene(1)))
            other.get_by_label("Phrases").fill(phrases_of(1)[0])
            other.get_by_role("button", name="Segment").click()
            give_key(other, PAGE_KEY)
            other.get_by_role("status").filter(has_text="1 phrase on one.png").wait_for()
            expect(other.get_by_text("Model: calibrated")).to_be_visible()
            expect(other.get_by_label("Model")).to_be_visible()


# --- to take away --------------------------------------------------------------------------------------------------


def test_the_json_follows_the_slider(page: Page, asked: dict[str, Any], url: str) -> None:
    """Its figures are those of the scores, and of the service where it is asked with that threshold."""
    for threshold in (0.9, 0.97):
        page.get_by_role("slider", name="Threshold").fill(str(threshold))
        expect(page.locator("#limit")).to_have_text(f"{threshold:.2f}")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save JSON").click()
        [saved_image] = json.loads(Path(download.value.path()).read_text())["images"]
        again = asked_here(url, scene(1), phrases_of(1)[:2], {"threshold": str(threshold)})
        masks = zip(scores_of(asked), masks_of(asked, threshold), strict=True)
        for entry, own, other, (scores, mask) in zip(
            saved_image["phrases"], asked["phrases"], again["phrases"], masks, strict=True
        ):
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if mask.any() else None
            figures = {"area": mask.sum(), "box": box, "threshold": threshold}
            assert entry == own | figures | {"score": pytest.approx(scores[mask].mean() / 65535 if mask.any() else 0)}
            assert {name: other[name] for name in figures} == figures
            assert entry["area"] != own["area"]
        assert {**saved_image, "phrases": asked["phrases"]} == asked


def test_downloads_hold_what_is_seen(page: Page, asked: dict[str, Any], tmp_path: Path) -> None:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save JSON").click()
    assert download.value.suggested_filename == "one.one-step.json"
    assert json.loads(Path(download.value.path()).read_text())["images"] == [asked]
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    assert download.value.suggested_filename == "one.one-step.png"
    sheet, shown = decoded(Path(download.value.path()).read_bytes()), canvas_of(page.locator(".panel"))
    assert sheet.shape[1] == shown.shape[1]
    assert sheet.shape[0] > shown.shape[0]  # the legend
    differs = (sheet[: shown.shape[0]] != shown).any(axis=2)
    assert 0 < differs.mean() < 0.01  # the numbers
    assert (sheet[shown.shape[0] :] < 128).any()
    page.locator("summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save its picture").click()
    assert download.value.suggested_filename == "one.png"
    assert Path(download.value.path()).read_bytes() == png(scene(1))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no `curl`")
def test_the_curl_line_gives_the_same_answer(browser: Browser, keyed: str, tmp_path: Path) -> None:
    name = """it's "one"; $HOME,\\ ü.png"""
    (tmp_path / name).write_bytes(png(scene(1)))
    with opened(browser, keyed) as page:
        give_key(page, PAGE_KEY)
        hand_over(page, "drop", name, png(scene(1)))
        ask_for(page, *ODD_PHRASES)
        with page.expect_response("**/v1/segment") as response:
            choose_way(page, "AOS")
        panel = page.get_by_role("region", name="One step, AOS")
        page.get_by_role("slider", name="Threshold").fill("0.3")
        expect(page.locator("#limit")).to_have_text("0.30")
        image, line = answer_of(response.value), panel.locator("code").text_content() or ""
        scores = panel.locator("td:nth-of-type(1)").all_inner_texts()
    assert PAGE_KEY not in line
    env = {"PATH": "/usr/bin:/bin", "RLFSEG_API_KEY": PAGE_KEY, "HOME": str(tmp_path)}
    for shell in ("sh", "bash"):
        ran = subprocess.run([shell, "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        [again] = json.loads(ran.stdout)["images"]
        assert [p["phrase"] for p in again["phrases"]] == list(ODD_PHRASES)
        assert [p["mask"] for p in again["phrases"]] == [p["mask"] for p in image["phrases"]]
        assert [f"{p['score']:.2f}" for p in again["phrases"]] == scores
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_curl_line_is_copied(browser: Browser, url: str) -> None:
    with opened(browser, url, permissions=["clipboard-read", "clipboard-write"]) as page:
        hand_over(page, "drop", "one.png", png(scene(1)))
        ask_for(page, "it's")
        page.locator("summary").click()
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        line = page.locator("code").text_content()
        assert page.evaluate("navigator.clipboard.readText()") == line
        assert "--form-string 'phrases=it'\\''s'" in str(line)
