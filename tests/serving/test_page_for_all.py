"""The page for everybody: errors in words, phones, keyboards, screen readers, dark rooms; and what it is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from rlfseg.draw import PALETTE
from tests.serving.browser import (
    PAGE_KEY,
    ask_for,
    check_canvas,
    check_legend,
    choose_way,
    contrast,
    give_key,
    hand_over,
    masks_of,
    opened,
    reached_by_tab,
    unnamed,
)
from tests.serving.harness import Service, phrases_of, png, scene

PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "reduced_motion": "reduce"}


# --- errors --------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_and_reached(page: Page) -> None:
    page.get_by_role("button", name="Segment").click()
    expect(page.get_by_role("alert")).to_have_text("Choose a picture first.")
    expect(page.get_by_label("Picture")).to_be_focused()
    hand_over(page, "drop", "one.png", png(scene(1)))
    page.get_by_role("button", name="Segment").click()
    expect(page.get_by_role("alert")).to_have_text("Say what to look for.")
    expect(page.get_by_label("Phrases")).to_be_focused()


def test_errors_of_the_service_are_text(page: Page, asked: dict[str, Any]) -> None:
    def fail(status: int, body: str, **headers: str) -> None:
        page.unroute_all()
        page.route("**/v1/segment", lambda route: route.fulfill(status=status, body=body, headers=headers))
        page.get_by_role("button", name="Segment").click()

    alert = page.get_by_role("alert")
    page.get_by_label("Phrases").fill("\n".join(f"phrase {n}" for n in range(17)))
    page.get_by_role("button", name="Segment").click()
    expect(alert).to_have_text(re.compile(r"^phrases: 17 are more than 16\. \(422 invalid, request \w{32}\)$"))
    expect(page.locator(".panel")).to_have_count(0)
    markup = "<img src=x onerror=alert(1)>"
    problem = {"error": {"kind": "overloaded", "message": f"{markup} waits"}, "request_id": "7"}
    fail(503, json.dumps(problem), **{"Retry-After": "2"})
    expect(alert).to_have_text(f"{markup} waits. Try again in 2 s. (503 overloaded, request 7)")
    assert page.locator("#error *").count() == 0
    fail(502, "<h1>Bad gateway</h1>")
    expect(alert).to_have_text("The service answered 502 Bad Gateway.")
    page.unroute_all()
    page.route("**/v1/segment", lambda route: route.abort())
    page.get_by_role("button", name="Segment").click()
    expect(alert).to_have_text("The service can't be reached.")


def test_the_models_are_asked_for_again_after_a_503(browser: Browser, url: str) -> None:
    problem = json.dumps({"error": {"kind": "starting", "message": "no front answers yet"}, "request_id": "7"})
    with opened(browser, "about:blank") as page:
        page.route("**/v1/models", lambda route: route.fulfill(status=503, body=problem))
        page.goto(url)
        alert = page.get_by_role("alert")
        expect(alert).to_have_text("no front answers yet. (503 starting, request 7)")
        hand_over(page, "drop", "one.png", png(scene(1)))
        expect(page.locator("#preview")).to_be_visible()
        page.get_by_label("Phrases").fill(phrases_of(1)[0])
        with page.expect_response("**/v1/models"):
            page.get_by_role("button", name="Segment").click()
        expect(alert).to_have_text("no front answers yet. (503 starting, request 7)")
        page.unroute_all()
        ask_for(page, phrases_of(1)[0])
        expect(page.get_by_text("Model: calibrated")).to_be_visible()
        expect(page.get_by_label("Model")).to_have_value("calibrated")


def test_phrases_are_text_and_one_that_fails_says_so(page: Page) -> None:
    hand_over(page, "drop", "<b>one</b>.png", png(scene(1)))
    markup = "<b onclick=alert(1)>ring</b>"
    image = ask_for(page, markup, "x" * 1001, "ring " * 200)
    rows = page.locator("tbody th")
    expect(rows.nth(0)).to_contain_text(markup)
    expect(rows.nth(1)).to_contain_text(image["phrases"][1]["error"]["message"])
    expect(rows.nth(1).get_by_role("checkbox")).to_be_disabled()
    expect(rows.nth(2)).to_contain_text("Only its beginning was read")
    assert page.locator("b b, tbody b, .panel h2 b").count() == 0


# --- for everybody -------------------------------------------------------------------------------------------------


def test_a_phone_scrolls_in_one_direction(browser: Browser, keyed: str) -> None:
    def widths() -> list[int]:
        return list(page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]"))

    with opened(browser, keyed, **PHONE) as page:
        box = page.get_by_role("dialog").bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 320
        give_key(page, PAGE_KEY)
        assert max(widths()) <= 320
        hand_over(page, "drop", f"{'long' * 30}.png", png(scene(1)))
        ask_for(page, "ring" * 60, "red ring")
        assert page.locator("#shown").bounding_box()["y"] < 320  # the answer is in sight
        choose_way(page, "AOS")
        expect(page.locator(".panel")).to_have_count(2)
        page.locator("summary").first.click()
        assert max(widths()) <= 320
        page.route(
            "**/v1/segment",
            lambda route: route.fulfill(
                status=500,
                body=json.dumps({"error": {"kind": "x" * 200, "message": "y" * 200}, "request_id": "z" * 32}),
            ),
        )
        page.get_by_role("button", name="Segment").click()
        expect(page.get_by_role("alert")).to_contain_text("y" * 200)
        expect(page.get_by_role("alert")).to_be_in_viewport()
        assert max(widths()) <= 320


def test_everything_has_a_name_and_is_reached_in_order(page: Page, asked: dict[str, Any]) -> None:
    page.locator("summary").click()
    page.get_by_role("slider").fill("0.4")
    assert unnamed(page) == []
    reached = reached_by_tab(page, 18)
    question = [*["scenes"] * 4, "phrases", "model", "way", "steps", "go"]
    answer = ["threshold", "own", "input", "input", "png", "json", "summary", "pre", "copy"]
    assert reached == [(name, "solid") for name in question + answer]


def test_what_a_screen_reader_is_told(page: Page, asked: dict[str, Any]) -> None:
    first, second = phrases_of(1)[:2]
    a, b = (f"{100 * m.mean():.1f} %" for m in masks_of(asked))
    panel = page.get_by_role("region", name="One step")
    label = f"one.png with masks: 1 {first}, {a}; 2 {second}, {b}"
    expect(panel.get_by_role("img", name=label, exact=True)).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("2 phrases on one.png")
    expect(panel.get_by_role("table")).to_match_aria_snapshot(
        f"""
        - table:
          - rowgroup:
            - row:
              - columnheader "Phrase"
              - columnheader "Score"
              - columnheader "Area"
          - rowgroup:
            - row:
              - rowheader:
                - checkbox "1 {first}" [checked]
              - cell
              - cell "{a}"
            - row:
              - rowheader:
                - checkbox "2 {second}" [checked]
              - cell
              - cell "{b}"
        """
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(browser: Browser, url: str, scheme: str) -> None:
    with opened(browser, url, color_scheme=scheme) as page:
        pairs = [("--ink", "--paper"), ("--soft", "--paper"), ("--soft", "--card"), ("--accent", "--card")]
        pairs += [("--accent", "--paper"), ("--on-accent", "--accent"), ("--bad", "--bad-paper")]
        assert {pair: ratio for pair in pairs if (ratio := contrast(page, *pair)) < 4.5} == {}


# --- what it is made of --------------------------------------------------------------------------------------------


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(browser: Browser, url: str, root: Path) -> None:
    answer = httpx.get(url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son[a-z]+=|\sstyle=|<style", answer.text)
    scripts = "".join(path.read_text() for path in (root / "serve" / "page").glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", scripts)
    with opened(browser, "about:blank") as page:
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else "data"))
        page.goto(url)
        expect(page.get_by_text("Model: calibrated")).to_be_visible()
        assert hosts - {"data"} == {url.removeprefix("http://")}


def test_colours_are_those_of_overlays(root: Path) -> None:
    written = re.findall(r"\[(\d+), (\d+), (\d+)\]", (root / "serve" / "page" / "masks.js").read_text())
    assert [tuple(map(int, colour)) for colour in written] == list(PALETTE)


def test_page_files_are_short(root: Path) -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (root / "serve" / "page").iterdir()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


# --- the real service ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_the_page_of_the_real_service(browser: Browser, service: Service) -> None:
    with opened(browser, service.url) as page:
        give_key(page, service.key)
        hand_over(page, "drop", "one.png", png(scene(1)))
        image = ask_for(page, *phrases_of(1)[:2])
        check_canvas(page.locator(".panel"), scene(1), masks_of(image))
        check_legend(page.locator(".panel"), image)
