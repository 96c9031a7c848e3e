"""The chat page in a real browser: pip install playwright, and a Chromium of the system's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Live

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as found:
        opened = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.goto(live.url)
    yield opened
    opened.close()
    assert [text for text in wrong if "status of 400" not in text] == []  # which one test provokes


def ask(page: Any, text: str) -> str:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_function("() => !running && talk.at(-1).role === 'assistant'")
    return page.inner_text(".assistant:last-of-type > div")


def test_a_picture_is_asked_about_in_khmer(page: Any, root: Path) -> None:
    page.select_option("#language", "km")
    assert page.get_attribute("html", "lang") == "km" and page.inner_text("#send") == "ផ្ញើ"
    page.set_input_files("#file", str(root / "docs" / "elephant.png"))
    page.wait_for_selector("#pictures img")
    assert ask(page, "នេះជាអ្វី?") == "ដំរី"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.reload()  # the talk is still there
    page.wait_for_selector(".assistant")
    assert page.locator(".user img").count() == 1 and page.input_value("#language") == "km"
    page.locator(".assistant button").first.click()  # again
    page.wait_for_function("() => !running && talk.length === 2 && talk[1].text === 'ដំរី'")
    page.locator(".user button").first.click()  # edit
    assert page.input_value("#text") == "នេះជាអ្វី?" and page.locator("#pictures img").count() == 1


def test_what_a_model_writes_is_never_html(page: Any) -> None:
    evil = '<img src=x onerror="document.title=1">**b** `c`\n\n- one\n- two\n\n```\n<script>1</script>\n```'
    page.evaluate("text => { talk = [{role: 'assistant', text}]; save(); }", evil)
    assert page.locator(".assistant img").count() == 0 and page.title() != "1"
    assert page.inner_text(".assistant strong") == "b" and page.locator(".assistant li").count() == 2
    assert page.inner_text(".assistant pre") == "<script>1</script>"


def test_errors_are_told(page: Any) -> None:
    page.evaluate("settings.temperature = 9")
    page.fill("#text", "x")
    page.click("#send")
    page.wait_for_selector(".error")
    assert "temperature" in page.inner_text(".error > div")
