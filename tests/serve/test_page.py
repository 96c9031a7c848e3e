"""The chat page in a real browser: pip install playwright, and a Chromium of the system's."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from seavlm.serve.limits import Key, Keys
from seavlm.serve.server import Settings
from seavlm.text.language import LANGUAGES
from tests.serve.conftest import Live, serving

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

PHONE, DESK = {"width": 390, "height": 800}, {"width": 1280, "height": 800}

LIKELIEST = 'localStorage["seavlm.settings"] ??= JSON.stringify({temperature: 0});'

# Replies that are written when the test says so: said(side, text) and ended(side).
SLOW = """
const real = fetch, writers = window.writers = [];
window.fetch = (where, about) => {
  if (!String(where).includes("chat/completions")) return real(where, about);
  let writer;
  const stream = new ReadableStream({start: control => { writer = control; }});
  about.signal.addEventListener("abort", () => writer.error(new DOMException("stopped", "AbortError")));
  writers.push(writer);
  return Promise.resolve(new Response(stream));
};
const bytes = chunk => new TextEncoder().encode("data: " + JSON.stringify(chunk) + "\\n\\n");
const put = (side, chunk) => writers.at(side).enqueue(bytes(chunk));
window.said = (side, content) => put(side, {choices: [{delta: {content}}]});
window.ended = side => {
  put(side, {choices: [{delta: {}, finish_reason: "stop"}]});
  put(side, {choices: [], usage: {completion_tokens: 7}});
  writers.at(side).close();
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as found:
        opened = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Live]:
    """A server of two models."""
    with serving(Settings(), models=("nano", "nano-global")) as found:
        yield found


class Pages:
    """Opens pages, and sees to it that nothing went wrong in them and nobody else was spoken to."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.wrong: list[str] = []

    def open(self, url: str, size: dict[str, int] = PHONE, script: str = "", **how: Any) -> Any:
        context = self.browser.new_context(viewport=size, locale="en", **how)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.on("request", lambda asked: self._asked(asked.url, url))
        self.contexts.append(context)
        context.add_init_script(LIKELIEST + script)
        page = context.new_page()
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", self._said)
        page.goto(url)
        wait(page, "models.length > 0 || $('settings').open")
        return page

    def _asked(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.wrong.append(f"asked for {asked}")

    def _said(self, message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.wrong.append(message.text)


@pytest.fixture
def pages(browser: Any) -> Iterator[Pages]:
    found = Pages(browser)
    yield found
    for context in found.contexts:
        context.close()
    assert found.wrong == []


@pytest.fixture
def page(pages: Pages, live: Live) -> Any:
    return pages.open(live.url)


@pytest.fixture
def slow(pages: Pages, two: Live) -> Any:
    """Two models, whose replies the test writes."""
    page = pages.open(two.url, DESK, SLOW)
    page.click("#compare")
    return page


def wait(page: Any, what: str, seconds: float = 10) -> None:
    """Playwright's own waiting needs eval, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(what):
        assert time.monotonic() < end, f"never: {what}"
        page.wait_for_timeout(15)


def ask(page: Any, text: str, *pictures: Path) -> list[str]:
    """The replies."""
    if pictures:
        attach(page, *pictures)
    page.fill("#text", text)
    page.keyboard.press("Enter")
    return replies(page)


def attach(page: Any, *files: Any) -> None:
    before = page.evaluate("files.length")
    page.set_input_files("#file", list(files))
    wait(page, f"files.length === {before + len(files)}")


def replies(page: Any) -> list[str]:
    wait(page, "!running && talk.turns.at(-1).replies.length")
    return page.locator(".turn").last.locator(".reply > .said").all_inner_texts()


def picture(size: tuple[int, int], form: str, **how: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, form, **how)
    return {"name": f"one.{form}", "mimeType": f"image/{form.lower()}", "buffer": file.getvalue()}


def test_a_picture_is_asked_about_in_khmer(page: Any, root: Path) -> None:
    page.select_option("#language", "km")
    assert page.get_attribute("html", "lang") == "km" and page.get_attribute("#send", "aria-label") == "ផ្ញើ"
    assert ask(page, "នេះជាអ្វី?", root / "docs" / "elephant.png") == ["ដំរី"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.reload()  # the talk is still there
    page.wait_for_selector(".reply")
    assert page.locator(".user img").count() == 1 and page.input_value("#language") == "km"
    page.click("text=ព្យាយាមម្ដងទៀត")
    assert replies(page) == ["ដំរី"] and page.evaluate("talk.turns.length") == 1
    page.click("text=កែសម្រួល")
    assert page.input_value("#text") == "នេះជាអ្វី?" and page.locator("#files img").count() == 1
    page.keyboard.press("Escape")  # after all not
    assert page.input_value("#text") == "" and page.evaluate("talk.turns[0].replies[0].text") == "ដំរី"
    page.click("text=កែសម្រួល")
    assert ask(page, "What is this?") == ["elephant"] and page.locator(".user img").count() == 1


def test_every_language_has_every_word(pages: Pages, two: Live) -> None:
    page = pages.open(two.url)
    page.click("#compare")
    words = page.evaluate("WORDS")
    assert set(words) == set(LANGUAGES)
    for code, own in words.items():
        assert set(own) == set(words["en"]) and all(own.values()), code
        assert [word for word, text in own.items() if "{}" in text] == ["busy"], code
    for code in LANGUAGES:
        page.select_option("#language", code)
        assert page.inner_text("h2 >> nth=0") == words[code]["hello"]
        for width in (360, 700, 1000, 1280, 1400):
            page.set_viewport_size({"width": width, "height": 700})
            right = page.evaluate("$('options').getBoundingClientRect().right")
            assert right <= width and page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                code
            )
    texts = {code: own["question"] for code, own in words.items()}
    told = page.evaluate("texts => Object.values(texts).map(languageOf)", texts)
    unknown = {"en", "id", "ms", "tl"}  # letters do not tell these apart
    assert told == ["" if code in unknown else code for code in texts]


def test_two_models_answer_side_by_side(pages: Pages, two: Live, root: Path) -> None:
    page = pages.open(two.url, DESK)
    sent: list[dict[str, Any]] = []
    page.on("request", lambda asked: sent.append(asked.post_data_json) if asked.method == "POST" else None)
    ask(page, "What is this?", root / "docs" / "elephant.png")
    assert [one["model"] for one in sent] == ["nano"]
    assert page.is_hidden("#other")
    page.click("#compare")
    assert page.get_attribute("#compare", "aria-pressed") == "true"
    first = ask(page, "这是什么？", root / "docs" / "watermelon.png")
    assert [one["model"] for one in sent[1:]] == ["nano", "nano-global"] and len(first) == 2
    turn = page.locator(".turn").last
    assert turn.locator(".reply h2").all_inner_texts() == ["nano", "nano-global"]
    for end in turn.locator(".reply .end").all_inner_texts():
        assert "s to the first token" in end
    left, right = (turn.locator(".reply").nth(side).bounding_box() for side in (0, 1))
    assert left["y"] == right["y"] and left["width"] == right["width"] and left["x"] < right["x"]
    page.set_viewport_size(PHONE)
    left, right = (turn.locator(".reply").nth(side).bounding_box() for side in (0, 1))
    assert left["x"] == right["x"] and left["y"] < right["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.select_option("#model", "nano-global")
    page.select_option("#other", "nano")
    page.evaluate("talk.turns[1].replies.forEach((reply, side) => { reply.text = 'side ' + side; })")
    ask(page, "这是什么？")
    for side, model in enumerate(["nano-global", "nano"]):  # each goes on from what its side has said
        asked = sent[3 + side]
        told = [one["content"] for one in asked["messages"] if one["role"] == "assistant"]
        assert asked["model"] == model and told == ["elephant", f"side {side}"]
    turn.get_by_text("Retry").click()
    replies(page)
    assert len(sent) == 7
    page.reload()
    wait(page, "models.length > 0")
    assert page.input_value("#model") == "nano-global" and page.is_visible("#other")


def test_both_are_stopped_and_told_once(slow: Any) -> None:
    slow.fill("#text", "x")
    slow.keyboard.press("Enter")
    wait(slow, "writers.length === 2")
    assert slow.locator(".reply[aria-busy=true]").count() == 2 and slow.is_hidden("#send")
    slow.evaluate("said(0, '**one')")
    slow.evaluate("said(1, 'သည်')")
    wait(slow, "document.querySelectorAll('.reply > .said')[1].textContent === 'သည်'")
    assert slow.inner_text("#news") == ""  # not while it is written
    slow.wait_for_timeout(80)
    slow.evaluate("said(0, ' two**\\n\\n- a')")
    wait(slow, "document.querySelector('.reply li')")
    assert slow.inner_text(".reply strong") == "one two"
    slow.evaluate("ended(0)")
    wait(slow, "document.querySelectorAll('.reply[aria-busy=true]').length === 1")
    slow.keyboard.press("Escape")
    wait(slow, "!running")
    assert slow.locator(".reply > .said").all_inner_texts() == ["one two\n\na", "သည်"]
    assert "Stopped" in slow.inner_text(".reply:last-child .end")
    assert slow.inner_text("#news") == "Stopped" and slow.evaluate("document.activeElement.id") == "text"

    slow.locator(".turn > .tools button").click()  # again, both
    wait(slow, "writers.length === 4")
    slow.select_option("#language", "th")  # drawn anew under way
    for side in (2, 3):
        slow.evaluate(f"said({side}, 'ช้าง'); setTimeout(() => ended({side}), 20)")
    wait(slow, "!running")
    assert slow.locator("#news p").all_text_contents() == ["nano: ช้าง", "nano-global: ช้าง"]
    assert slow.get_attribute("#news p", "lang") == "th"
    assert all("โทเค็น/วินาที" in end for end in slow.locator(".reply .end").all_inner_texts())
    assert slow.get_attribute(".reply:last-child > .said", "lang") == "th"
    assert slow.locator(".reply > .said").all_inner_texts() == ["ช้าง", "ช้าง"]


def test_what_does_not_change_stays(slow: Any) -> None:
    slow.click("#compare")
    slow.fill("#text", "x")
    slow.keyboard.press("Enter")
    wait(slow, "writers.length === 1")
    slow.evaluate("said(0, 'first\\n\\nsecond')")
    wait(slow, "document.querySelectorAll('.reply p').length >= 2")
    slow.evaluate("window.kept = document.querySelector('.reply .said p')")
    slow.wait_for_timeout(80)
    slow.evaluate("said(0, ' grows'); ended(0)")
    wait(slow, "!running")
    assert slow.evaluate("kept === document.querySelector('.reply .said p')")  # a selection in it, too
    assert slow.locator(".reply .said p").all_inner_texts() == ["first", "second grows"]


def show(page: Any, text: str) -> Any:
    reply = {"text": "x", "files": [], "replies": [{"model": "nano", "text": text}]}
    page.evaluate("turn => { talk.turns = [turn]; show(); }", reply)
    return page.locator(".reply > .said")


def test_markdown(page: Any) -> None:
    said = show(
        page,
        "# Head\none **b** *i* `c` ~~s~~ 2 * 3 * 4 snake_case_name \\*\n"
        "1. one\n2. two\n   - in\n     more\n\n- a\n\n- b\n\n> q\n\n"
        "| ก | n |\n|:--|--:|\n| ข | 1 |\n\n```py\nx = '<b>'\n\n# y\n```\nend\n\n---\n```\nopen",
    )
    html = said.evaluate('said => said.innerHTML.replace(/ (style|tabindex|type|class)="[^"]*"/g, \'\')')
    assert html == (
        "<h3>Head</h3>"
        "<p>one <strong>b</strong> <em>i</em> <code>c</code> <s>s</s> 2 * 3 * 4 snake_case_name *</p>"
        '<ol start="1"><li>one</li><li>two<ul><li>in<br>more</li></ul></li></ol>'
        "<ul><li>a</li><li>b</li></ul><blockquote><p>q</p></blockquote>"
        "<div><table><thead><tr><th>ก</th><th>n</th></tr></thead>"
        "<tbody><tr><td>ข</td><td>1</td></tr></tbody></table></div>"
        "<div><div><span>py</span><button>Copy</button></div>"
        "<pre><code>x = '&lt;b&gt;'\n\n# y</code></pre></div>"
        "<p>end</p><hr>"
        "<div><div><span></span><button>Copy</button></div><pre><code>open</code></pre></div>"
    )
    said.locator("button").first.click()
    wait(page, "document.querySelector('.bar button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "x = '<b>'\n\n# y"


def test_what_a_model_writes_is_never_html(pages: Pages, live: Live) -> None:
    page = pages.open(live.url)
    said = show(
        page,
        '<img src=x onerror="document.title=1"> <script>document.title=1</script> '
        "[a](javascript:document.title=1) [b](JaVaScRiPt:1) [c](data:text/html,1) "
        "![d](https://example.org/d.png) [e](https://example.org/?a=1&b=2) <https://example.org/f>\n\n"
        '```"><img src=x onerror=1>\n</code><img src=x>\n```\n\n'
        "| <img src=x> | b |\n|-|-|\n| <svg/onload=1> | c |",
    )
    assert said.locator("img, script, svg, iframe").count() == 0 and page.title() != "1"
    links = said.locator("a").evaluate_all("links => links.map(one => [one.href, one.rel, one.target])")
    addresses = ["https://example.org/d.png", "https://example.org/?a=1&b=2", "https://example.org/f"]
    assert links == [[address, "noopener noreferrer nofollow", "_blank"] for address in addresses]
    assert "javascript:" in said.inner_text()
    # and if it ever became HTML, it would not run
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"document.title=1\">')"
    )
    wait(page, "document.body.lastElementChild.complete")
    page.wait_for_timeout(50)
    assert page.title() != "1" and "Content Security Policy" in pages.wrong.pop()


@pytest.mark.parametrize(
    "text", ["*" * 20000, "`" * 9999 + "x", "[" * 20000, "_a" * 9000, "- " * 5000, "|" * 9000, "> " * 300]
)
def test_markdown_that_means_harm_is_drawn_at_once(page: Any, text: str) -> None:
    took = page.evaluate(
        "text => { const t = performance.now(); markdown(text, make('div')); return performance.now() - t; }",
        text,
    )
    assert took < 1500


def test_keyboard(page: Any) -> None:
    page.focus("#text")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#text") == "one\ntwo" and page.evaluate("talk.turns.length") == 0
    composer = page.context.new_cdp_session(page)  # an input method writes a syllable; Enter takes it
    composer.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    composer.send("Input.dispatchKeyEvent", {"type": "keyDown", **enter})
    composer.send("Input.insertText", {"text": "你"})
    assert page.input_value("#text").startswith("one\ntwo你") and page.evaluate("talk.turns.length") == 0
    page.keyboard.press("Enter")
    replies(page)
    assert page.evaluate("talk.turns.length") == 1

    page.focus("#menu")
    seen = ["menu"]
    for _ in range(14):
        page.keyboard.press("Tab")
        name, label, outline = page.evaluate("""() => {
            const one = document.activeElement, style = getComputedStyle(one);
            return [one.id || one.textContent, one.ariaLabel || one.textContent, style.outlineStyle];
        }""")
        assert outline != "none" and label, name
        seen.append(name)
        if name == "send":
            break
    tools = ["Edit", "Retry", "Copy", "curl", "Python"]
    assert seen == ["menu", "language", "fresh", "options", "talk", *tools, "pick", "text", "send"]


def test_pictures_come_by_drop_by_paste_and_by_hand(page: Any, root: Path) -> None:
    data = base64.b64encode((root / "docs" / "elephant.png").read_bytes()).decode()
    bring = """([data, kind, text]) => {
        const carried = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
        if (data) carried.items.add(new File([bytes], "e.png", {type: "image/png"}));
        if (text) carried.setData("text/plain", text);
        const how = {bubbles: true, cancelable: true, dataTransfer: carried, clipboardData: carried};
        const event = kind === "paste" ? new ClipboardEvent(kind, how) : new DragEvent(kind, how);
        document.getElementById("text").dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    assert page.evaluate(bring, [data, "dragover", ""]) and page.locator("body.drop").count() == 1
    assert page.evaluate(bring, [data, "drop", ""])
    wait(page, "files.length === 1")
    assert page.locator("body.drop").count() == 0
    assert page.evaluate(bring, [data, "paste", ""])
    wait(page, "files.length === 2")
    assert not page.evaluate(bring, [data, "paste", "a word"])  # text that brings a picture along
    assert not page.evaluate(bring, ["", "drop", "a word"])
    attach(page, root / "docs" / "pineapple.png", root / "docs" / "watermelon.png")
    assert page.evaluate("files.map(file => file.name)") == [
        "e.png",
        "e.png",
        "pineapple.png",
        "watermelon.png",
    ]
    page.get_by_label("Delete: e.png").first.click()
    assert page.locator("#files img").count() == 3
    page.set_input_files("#file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
    page.wait_for_selector("#notice:not([hidden])")
    assert page.inner_text("#notice") == "This file cannot be read: no.png"
    ask(page, "What is this?")
    assert page.locator(".user img").count() == 3 and page.locator(".error:visible").count() == 0


def test_a_large_photograph_is_made_smaller_and_stands_upright(page: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    attach(page, picture((3000, 1500), "JPEG", exif=exif), picture((40, 30), "PNG"))
    sizes, kinds = [], []
    for url in page.evaluate("files.map(file => file.url)"):
        kinds.append(url[:16])
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        sizes.append(sent.size)
        assert not sent.getexif()
    assert sizes == [(1024, 2048), (40, 30)] and kinds == ["data:image/jpeg;", "data:image/png;b"]


def test_a_pdf(page: Any, root: Path) -> None:
    pytest.importorskip("pypdfium2")
    file = io.BytesIO()
    Image.open(root / "docs" / "elephant.png").convert("RGB").save(file, "PDF")
    attach(page, {"name": "page.pdf", "mimeType": "application/pdf", "buffer": file.getvalue()})
    assert page.inner_text("#files .paper") == "page.pdf"
    assert ask(page, "What is this?") != [""] and page.locator(".error:visible").count() == 0
    assert page.inner_text(".user .paper") == "page.pdf"


def test_history(page: Any, root: Path) -> None:
    ask(page, "What is this?", root / "docs" / "elephant.png")
    page.click("#fresh")
    assert page.locator(".turn").count() == 0
    ask(page, "ນີ້ແມ່ນຫຍັງ?", root / "docs" / "pineapple.png")
    page.click("#menu")
    names = page.locator("#chats li > :first-child")
    wait(page, "$('history').open")
    assert names.all_inner_texts() == ["ນີ້ແມ່ນຫຍັງ?", "What is this?"]
    assert names.first.get_attribute("lang") == "lo" and names.first.get_attribute("aria-current") == "true"
    names.last.click()
    wait(page, "talk.title === 'What is this?'")
    assert page.inner_text(".reply > .said") == "elephant" and page.locator(".user img").count() == 1
    page.click("#menu")
    wait(page, "$('history').open")
    page.once("dialog", lambda asked: asked.dismiss())
    page.click("#chats li:last-child > :last-child")
    assert names.count() == 2
    page.on("dialog", lambda asked: asked.accept())
    page.click("#chats li:last-child > :last-child")
    wait(page, "document.querySelectorAll('#chats li').length === 1")
    page.keyboard.press("Escape")
    assert page.locator(".turn").count() == 0  # it was the one on the screen
    page.reload()
    page.click("#menu")
    wait(page, "$('history').open")
    assert names.all_inner_texts() == ["ນີ້ແມ່ນຫຍັງ?"]


def test_a_full_browser_loses_the_oldest_pictures_and_no_word(
    pages: Pages, live: Live, tmp_path: Path
) -> None:
    """In a browser with a disk, as what is kept in memory alone is not freed."""
    context = pages.browser.browser_type.launch_persistent_context(
        tmp_path, executable_path=CHROMIUM, args=["--no-sandbox"], locale="en"
    )
    pages.contexts.append(context)
    page = context.new_page()
    page.goto(live.url)
    room = context.new_cdp_session(page)
    room.send("Storage.overrideQuotaForOrigin", {"origin": live.url, "quotaSize": 2_500_000})
    saved = page.evaluate("""async () => {
        const noise = () => String.fromCharCode(33 + Math.random() * 90), kept = [];
        for (let at = 0; at < 8; at++) {
            const file = {kind: "image", name: "n", url: Array.from({length: 400000}, noise).join("")};
            const turns = [{text: "t" + at, files: [file], replies: [{model: "nano", text: "r"}]}];
            kept.push(await chats.save({id: "c" + at, at, title: "t" + at, turns}));
        }
        return kept;
    }""")
    assert saved == [True] * 8
    kept = page.evaluate("""async () => {
        const heads = await chats.list();
        return Promise.all(heads.map(async head => [head.title, (await chats.turns(head.id))[0]]));
    }""")
    assert [title for title, _ in kept] == [f"t{number}" for number in range(7, -1, -1)]
    assert [turn["text"] for _, turn in kept] == [title for title, _ in kept]
    pictures = [bool(turn["files"][0]["url"]) for _, turn in kept]
    assert pictures == sorted(pictures, reverse=True) and 4 <= sum(pictures) < 8
    none = "throw new DOMException('', 'QuotaExceededError')"
    page.evaluate(f"() => {{ IDBObjectStore.prototype.put = () => {{ {none}; }}; }}")
    ask(page, "x")
    wait(page, "!$('notice').hidden")
    assert page.inner_text("#notice").startswith("The browser's storage is full")


def test_a_key_is_asked_for_and_errors_are_told(pages: Pages) -> None:
    digest = hashlib.sha256(b"open sesame").hexdigest()
    keys = Keys(keys=[Key(name="one", sha256=digest, requests_per_minute=1)])
    with serving(Settings(keys=keys)) as live:
        page = pages.open(live.url)
        assert page.inner_text("#why") == "This server asks for an API key."
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        wait(page, "$('settings').open && !$('why').hidden")
        page.fill("#key", "open sesame")
        page.click("#settings button")
        wait(page, "models[0] === 'nano'")
        assert ask(page, "x") and page.locator(".error:visible").count() == 0
        ask(page, "y")
        told = page.locator(".turn").last.locator(".error").inner_text()
        assert told.startswith("The server is busy. Try again in ") and "limit of this key" in told
        assert page.locator("#news").inner_text().startswith("The server is busy")
        page.select_option("#language", "ta")  # what is told is told in the language of now
        assert page.locator(".turn").last.locator(".error").inner_text().startswith("சேவையகம்")

        assert httpx.get(f"{live.url}/page/chat.js").headers["cache-control"] == "no-cache"
        assert httpx.get(f"{live.url}/page/app.py").status_code == 404
        assert httpx.get(f"{live.url}/page/%2e%2e/app.py").status_code in (401, 404)
        assert httpx.get(f"{live.url}/page/%2e%2e%2fv1/models").status_code in (401, 404)


def test_a_server_that_is_gone(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "x")
    assert page.inner_text(".error:visible") == "The server cannot be reached."
    page.unroute("**/v1/chat/completions")
    page.get_by_text("Retry").click()
    assert replies(page) != [""] and page.locator(".error:visible").count() == 0
    page.evaluate("settings.temperature = 9")
    ask(page, "y")
    assert "temperature" in page.locator(".error:visible").inner_text()
    page.evaluate("settings.temperature = ''")
    sent: list[Any] = []
    page.on("request", lambda asked: sent.append(asked.post_data_json) if asked.method == "POST" else None)
    ask(page, "z")  # what has failed is no part of the conversation
    assert [one["content"] for one in sent[0]["messages"] if one["role"] == "user"] == ["x", "z"]


def test_settings(page: Any) -> None:
    page.select_option("#language", "th")
    page.click("#options")
    page.fill("#system", "สุภาพ")
    page.check("#answer")
    page.fill("#length", "3")
    page.fill("#temperature", "")
    page.keyboard.press("Enter")
    sent: list[Any] = []
    page.on("request", lambda asked: sent.append(asked.post_data_json) if asked.method == "POST" else None)
    ask(page, "x")
    assert sent[0]["messages"][0] == {"role": "system", "content": "สุภาพ\n\nตอบเป็นภาษาไทย"}
    assert sent[0]["max_tokens"] == 3 and "temperature" not in sent[0]


def test_what_is_copied_runs(page: Any, root: Path) -> None:
    said = ask(page, "นี่คืออะไร", root / "docs" / "elephant.png")
    page.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == said[0] == "ช้าง"
    environment = {**os.environ, "SEAVLM_API_KEY": "none", "PYTHONUTF8": "1"}
    for name, command in (("curl", ["bash", "-s"]), ("Python", [sys.executable, "-"])):
        page.get_by_role("button", name=name).click()
        copied = page.evaluate("navigator.clipboard.readText()")
        done = subprocess.run(
            command, input=copied, capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        found = (
            json.loads(done.stdout)["choices"][0]["message"]["content"]
            if name == "curl"
            else done.stdout.strip()
        )
        assert found == "ช้าง"


def test_scripts_have_room(page: Any) -> None:
    words = {
        "my": "ကျွန်ုပ်တို့သည်မြန်မာနိုင်ငံတွင်နေထိုင်ကြသည်" * 6,
        "km": "ខ្ញុំស្រឡាញ់ប្រទេសកម្ពុជាណាស់" * 8,
        "th": "ที่นี่มีช้างอยู่ในป่าใหญ่" * 9,
        "lo": "ຂ້ອຍຮັກປະເທດລາວຫຼາຍ" * 9,
        "ta": "மொழிபெயர்ப்பாளர்களுக்கானவழிகாட்டி" * 6,
        "zh": "这是一头大象" * 20,
    }
    for code, text in words.items():
        said = show(page, text)
        assert said.get_attribute("lang") == code
        size, line, over = said.evaluate(
            """one => {
                const style = getComputedStyle(one), over = one.scrollWidth > one.clientWidth;
                return [parseFloat(style.fontSize), parseFloat(style.lineHeight), over];
            }"""
        )
        assert size >= 16 and line / size >= {"my": 1.9, "km": 1.9, "zh": 1.6}.get(code, 1.7) and not over
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), code
    # A line ends where a word ends: no line begins with a Thai letter that cannot begin a word.
    lines = show(page, words["th"]).evaluate("""one => {
        const text = one.firstChild.firstChild, found = [];
        for (let at = 0, last = -1; at < text.length; at++) {
            const range = document.createRange(); range.setStart(text, at); range.setEnd(text, at + 1);
            const top = range.getBoundingClientRect().top;
            if (top > last + 5) { found.push(""); last = top; }
            found[found.length - 1] += text.data[at];
        }
        return found;
    }""")
    assert len(lines) > 3
    assert all(line.startswith(("ที่", "นี่", "มี", "ช้าง", "อยู่", "ใน", "ป่า", "ใหญ่")) for line in lines), lines
    sizes = page.evaluate("""[...document.querySelectorAll("input, textarea, select")].map(
        one => parseFloat(getComputedStyle(one).fontSize))""")
    assert min(sizes) >= 16  # or a phone zooms in


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "axe-core@4"]
    fetched = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    if fetched.returncode:
        pytest.skip(f"npm: {fetched.stderr[-200:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(pages: Pages, two: Live, axe: str, scheme: str, root: Path) -> None:
    page = pages.open(two.url, DESK, color_scheme=scheme)
    page.evaluate(axe)

    def look(where: str) -> None:
        wrong = page.evaluate("""async () => (await axe.run()).violations.map(
            one => [one.id, one.nodes.map(node => node.html + node.failureSummary)])""")
        assert wrong == [], where

    look("empty")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark != "rgb(255, 255, 255)") == (scheme == "dark")
    page.click("#compare")
    ask(page, "What is this?", root / "docs" / "elephant.png")
    page.evaluate("settings.temperature = 9")
    ask(page, "x")
    text = "# H\n[a](https://example.org) `c`\n\n> q\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n|c|d|"
    page.evaluate("text => { talk.turns[0].replies[0].text = text; show(); }", text)
    attach(page, root / "docs" / "elephant.png")
    page.locator(".user button").first.click()
    look("two replies, an error, a turn that is edited")
    for opener in ("#menu", "#options"):
        page.click(opener)
        page.wait_for_timeout(50)
        look(opener)
        page.keyboard.press("Escape")
