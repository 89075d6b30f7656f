"""Debian's Chromium, the API in this process for it to talk to, and what a page's canvas should show."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Response, expect, sync_playwright

from rlfseg import adapter
from rlfseg.config import LimitsConfig, ServeConfig
from rlfseg.draw import PALETTE
from serve.api import build_api
from serve.catalog import Catalog
from serve.guard import Keys
from serve.model import Answer, Ask, Engine, Loaded
from serve.refusal import Refusal
from serve.work import Work
from tests.serving.harness import Array, png
from tests.serving.played import Counted

FILL = 0x78 / 255  # opacity of a mask on the page
PAGE_KEY = "a-key-for-the-page"


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        # Root may run it only without its sandbox; nothing but our own page is opened
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A tab with the page, in which no script fails and nothing against the page's policy is tried."""
    context = browser.new_context(**options)
    page = context.new_page()
    wrong: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert wrong == []


# --- the service ---------------------------------------------------------------------------------------------------


def models(folder: Path) -> dict[str, str]:
    """The shipped adapter twice: calibrated for AOS and HSS, and not."""
    shipped = adapter.resolve("tiny")
    made = {}
    for name, eps in (("calibrated", 0.5), ("plain", None)):
        path = folder / name
        path.mkdir()
        for file in shipped.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        adapter.write_card(path, replace(adapter.read_card(path), eps_aos=eps, eps_hss=eps))
        made[name] = str(path)
    return made


@contextmanager
def serving(references: dict[str, str], loaded: dict[str, Loaded], keys: Keys | None = None) -> Iterator[str]:
    """The API over HTTP, on a thread of this process and without Ray; yields its address."""
    engine, network = Engine(16), ThreadPoolExecutor(1)

    async def ask(name: str, asked: Ask) -> Answer:
        [found] = await asyncio.get_running_loop().run_in_executor(network, engine, [(loaded[name], asked)])
        if isinstance(found, Refusal):
            raise found
        return found

    async def ready() -> bool:
        return True

    config = ServeConfig(models=references, auth=False, limits=LimitsConfig(phrases=16))
    catalog, meters = Catalog(references), Counted()
    work = Work(config, catalog, ask, meters)
    api = build_api(config, catalog=catalog, work=work, batches=None, keys=keys, ready=ready, meters=meters)
    server = uvicorn.Server(uvicorn.Config(api, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:  # what comes before the server is up waits here
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


# --- handing files to the page -------------------------------------------------------------------------------------

HAND_OVER = """([kind, name, type, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const options = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(kind === "drop"
    ? new DragEvent("drop", { ...options, dataTransfer: data })
    : new ClipboardEvent("paste", { ...options, clipboardData: data }));
}"""


def hand_over(page: Page, kind: str, name: str, data: bytes) -> None:
    """Drops or pastes a file."""
    page.evaluate(HAND_OVER, [kind, name, "image/png", base64.b64encode(data).decode()])


def give_key(page: Page, key: str) -> None:
    """Types the key that the page asks for."""
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use key").click()
    page.get_by_role("dialog").wait_for(state="hidden")


def ask_for(page: Page, *phrases: str) -> dict[str, Any]:
    """Types phrases, presses the button and returns the service's answer once its masks are shown."""
    page.get_by_label("Phrases, one a line").fill("\n".join(phrases))
    with page.expect_response("**/v1/segment") as response:
        page.get_by_role("button", name="Segment").click()
    page.get_by_role("status").filter(has_text="phrase").wait_for()
    return answer_of(response.value)


def choose_way(page: Page, name: str) -> None:
    """Clicks the word beside a radio button, as one does: the button itself is unseen."""
    radio = page.get_by_role("radio", name=name)
    page.locator("#ways label", has=radio).click()
    expect(radio).to_be_checked()


def answer_of(response: Response) -> dict[str, Any]:
    """The only picture of an answer."""
    assert response.ok, response.text()
    [image] = response.json()["images"]
    return dict(image)


def asked_here(url: str, picture: Array, phrases: Sequence[str], options: dict[str, str]) -> dict[str, Any]:
    """The same question without a browser."""
    data = {"phrases": list(phrases), "output": "score", **options}
    reply = httpx.post(f"{url}/v1/segment", files=[("images", ("a.png", png(picture)))], data=data, timeout=60)
    [image] = reply.json()["images"]
    return dict(image)


# --- what the canvas should show -----------------------------------------------------------------------------------


def scores_of(image: dict[str, Any]) -> list[Array]:
    """The scores of an answer by Pillow, uint16 [H, W] a phrase."""
    data = [base64.b64decode(p["mask"]["data"]) for p in image["phrases"]]
    return [np.asarray(Image.open(io.BytesIO(d))).astype(np.uint16) for d in data]


def masks_of(image: dict[str, Any], threshold: float | None = None) -> list[Array]:
    """Masks of an answer at a threshold, bool [H, W] a phrase."""
    limit = image["phrases"][0]["threshold"] if threshold is None else threshold
    return [scores > limit * 65535 for scores in scores_of(image)]


def decoded(data: bytes) -> Array:
    """A picture's file as uint8 RGB."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def canvas_of(panel: Locator) -> Array:
    """What a panel shows, uint8 RGB."""
    url = panel.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    return decoded(base64.b64decode(url.partition(",")[2]))


def check_canvas(panel: Locator, picture: Array, masks: list[Array]) -> None:
    """Exactly the masks' pixels differ from the picture's; well inside of one mask alone they have its colour."""
    shown = canvas_of(panel)
    zoom = shown.shape[0] // picture.shape[0]
    assert shown.shape == (picture.shape[0] * zoom, picture.shape[1] * zoom, 3)
    enlarged = picture.repeat(zoom, 0).repeat(zoom, 1)
    union = np.logical_or.reduce(masks)
    assert np.array_equal((shown != enlarged).any(axis=2), union.repeat(zoom, 0).repeat(zoom, 1))
    centre = shown[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(float)
    for n, mask in enumerate(masks):
        others = np.logical_or.reduce([m for i, m in enumerate(masks) if i != n] or [np.zeros_like(mask)])
        alone = mask & ~others
        blend = picture * (1 - FILL) + np.array(PALETTE[n]) * FILL
        assert abs(centre - blend)[alone].max(initial=0) <= 2


def check_legend(panel: Locator, image: dict[str, Any], threshold: float | None = None) -> None:
    """Each phrase with its mean score and its part of the picture, computed here."""
    wanted = []
    for entry, scores, mask in zip(image["phrases"], scores_of(image), masks_of(image, threshold), strict=True):
        mean = scores[mask].mean() / 65535 if mask.any() else 0.0
        wanted.append([entry["phrase"], f"{mean:.2f}", f"{100 * mask.mean():.1f} %"])
    rows = panel.locator("tbody tr").all()
    assert [[r.locator("label > span").last.inner_text(), *r.locator("td").all_inner_texts()] for r in rows] == wanted


# --- who can see and reach it --------------------------------------------------------------------------------------

REACHED = """() => {
  const active = document.activeElement;
  const seen = active.matches("[type=radio], [type=file]") ? active.nextElementSibling : active;
  const name = active.id || active.name || active.className || active.parentElement.id || active.tagName;
  return [name.toLowerCase(), getComputedStyle(seen).outlineStyle];
}"""


def reached_by_tab(page: Page, count: int) -> list[tuple[str, str]]:
    """What the Tab key reaches after the picture, in order, and the style of the outline that shows where one is."""
    page.get_by_label("Picture", exact=True).focus()
    found = []
    for _ in range(count):
        page.keyboard.press("Tab")
        found.append(tuple(page.evaluate(REACHED)))
    return found


def unnamed(page: Page) -> list[str]:
    """Roles of what one can use but not call by a name, of Chromium's own accessibility tree."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    usable = {"button", "checkbox", "radio", "textbox", "slider", "spinbutton", "combobox", "image", "dialog", "region"}
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    assert usable - {"dialog"} <= {role for role, _ in named} | {"image"}
    return [role for role, name in named if role in usable and not name.strip()]


def contrast(page: Page, ink: str, paper: str) -> float:
    """Ratio of two colours of the style sheet (WCAG 2, 1 to 21)."""
    values = page.evaluate(
        "(names) => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(name))",
        [ink, paper],
    )
    light, dark = sorted((_luminance(v.strip()) for v in values), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
