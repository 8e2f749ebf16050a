"""The page in a real browser (Debian's Chromium), against the real server; what it shows is compared with LLM's own."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest

from pronghorn import LLM, PromptError, SamplingParams
from tiny import STORY, save_tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEPT = Path(__file__).parents[1] / "build" / "page"  # screenshots
PROMPT = "<b>Once</b> upon\n  a time & é"  # markup, line ends, spaces, and more than ASCII

pytest.importorskip("playwright", reason="the browser tests need playwright (the extra `test`)")
if CHROMIUM is None:
    pytest.skip("there is no chromium (Debian: apt-get install chromium)", allow_module_level=True)


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """A server, and its address."""
    command = [sys.executable, "-m", "pronghorn", "serve", "--port", "0", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if found := re.search(r"(http://\S+): serving", line):
            return server, found[1] + "/"
    raise AssertionError("".join(lines))


def end(server: subprocess.Popen[str]) -> None:
    server.terminate()
    assert server.stderr is not None
    server.stderr.read()
    server.stderr.close()
    assert server.wait() == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny` speaks bytes, which are seldom whole characters, and may end; `slow` takes seconds, and never ends."""
    folder = tmp_path_factory.mktemp("page")
    slow = save_tiny(
        folder / "slow", hidden_size=512, num_hidden_layers=6, max_position_embeddings=20000, eos_token_id=None
    )
    settings = json.loads((slow / "tokenizer_config.json").read_text())
    (slow / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    found = {"tiny": save_tiny(folder / "tiny"), "slow": slow}
    stories = Path(os.environ.get("PRONGHORN_TEST_DATA", "/nowhere")) / "models/stories260K"
    return {**found, "stories": stories} if stories.is_dir() else found


@pytest.fixture(scope="module")
def address(models: dict[str, Path]) -> Iterator[str]:
    server, address = start(*(f"-m{name}={path}" for name, path in models.items()))
    yield address
    end(server)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Pages:
    """Opens the page, each time in a browser that nobody has used; `faults` is what was refused or broken there."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser, self.address = browser, address
        self.faults: list[str] = []

    def open(self, fragment: str = "", at: str | None = None, ready: bool = True, **options: Any) -> Page:
        at = at or self.address
        page = self.browser.new_context(**options).new_page()
        page.set_default_timeout(60000)
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy', e.violatedDirective))"
        )
        page.on("console", lambda message: self.faults.append(message.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(at) or self.faults.append(request.url))
        page.goto(at + fragment)
        if ready:
            page.wait_for_selector("[name=model] option", state="attached")
        return page


@pytest.fixture
def pages(browser: Browser, address: str) -> Iterator[Pages]:
    pages = Pages(browser, address)
    yield pages
    for context in browser.contexts:
        context.close()
    assert not pages.faults


def fill(page: Page, prompt: str | None = None, mode: str = "Completion", **values: object) -> None:
    page.locator(".modes label", has_text=mode).click()
    for name, value in values.items():
        field = page.locator(f"[name={name}]")
        field.select_option(str(value)) if name == "model" else field.fill(str(value))
    if prompt is not None:
        page.fill("[name=prompt]", prompt)


def until(page: Page, condition: str) -> None:
    """Waits for it; Playwright's own way needs `eval`, which the page's policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(5)


def run(page: Page) -> str:
    """The last answer's text, once it is there."""
    page.evaluate("window.before = document.querySelector('#turns').lastElementChild")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('#turns').lastElementChild !== window.before")
    until(page, "!document.querySelector('#run').hidden")
    return text_of(page)


def text_of(page: Page) -> str:
    return str(page.locator(".assistant").last.evaluate("(turn) => turn.textContent"))


def focused(page: Page) -> dict[str, Any]:
    """The token that has the focus, and what the popover tells of it."""
    return dict(
        page.evaluate(
            """() => ({
                token: document.activeElement.classList.contains("token"),
                index: [...document.querySelectorAll(".token")].indexOf(document.activeElement),
                described: document.activeElement.getAttribute("aria-describedby"),
                shown: !document.querySelector("#popover").hidden,
                rows: [...document.querySelectorAll("#popover .row")].map((row) =>
                    [row.querySelector("code").textContent, row.querySelector("span").textContent]),
                chosen: document.querySelector("#popover .chosen code")?.textContent,
            })"""
        )
    )


def percent(logprob: float) -> str:
    p = 100 * math.exp(logprob)
    return f"{p:.1f} %" if p >= 0.1 else f"{p:.1g} %"


def test_completion(pages: Pages, models: dict[str, Path]) -> None:
    page = pages.open()
    with LLM(models["tiny"]) as llm:
        for seed in range(100):  # to one that ends by itself: that token has no text
            params = SamplingParams(
                max_tokens=60, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=seed, logprobs=5
            )
            out = llm.generate(PROMPT, params)
            if out.finish_reason == "stop" and len(out.token_ids) > 20:
                break
    assert out.finish_reason == "stop"
    assert "�" in out.text
    fill(page, PROMPT, model="tiny", max_tokens=60, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=seed)
    assert run(page) == out.text
    assert page.locator("#count").text_content() == str(len(out.token_ids))
    assert page.locator("#used-seed").text_content() == str(seed)
    assert re.fullmatch(r"\d+ ms", page.locator("#ttft").text_content() or "")
    shades = page.evaluate(
        """() => [...document.querySelectorAll(".token")].map((token) =>
            [token.tokens.length, token.textContent, Number(token.style.getPropertyValue("--surprise"))])"""
    )
    assert sum(n for n, _, _ in shades) == len(out.token_ids)
    assert shades[-1][1] == ""  # the end
    assert out.logprobs
    position = 0
    for n, _, surprise in shades:  # shaded by the probabilities of the tokens in it, that is their product
        logprob = sum(token.logprob for token in out.logprobs[position : position + n])
        assert surprise == pytest.approx(1 - math.exp(logprob), abs=1e-3)
        position += n


def test_stop_string_and_seed(pages: Pages, models: dict[str, Path]) -> None:
    """A stop string cuts a token; and without a seed, the one that was taken is told."""
    page = pages.open()
    fill(page, "x", model="tiny", max_tokens=20, temperature=1)
    with LLM(models["tiny"]) as llm:
        while True:  # a seed is drawn for each run, and not every text has a character to stop at
            text = run(page)
            seed = int(page.locator("#used-seed").text_content() or "")
            params = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.95, "seed": seed}
            assert text == llm.generate("x", SamplingParams(**params)).text
            if found := [char for char in text[3:] if char.isascii() and char.isprintable() and char != "\\"]:
                break
        stop = found[0]
        out = llm.generate("x", SamplingParams(**params, stop=[stop, "\n\n"]))
    fill(page, "x", seed=seed, stop=f"{stop}\n\\n\\n")
    assert run(page) == out.text != text
    assert page.locator("#count").text_content() == str(len(out.token_ids))


def test_stream_and_stop(pages: Pages, models: dict[str, Path], address: str) -> None:
    page = pages.open()
    fill(page, "Go on", model="slow", max_tokens=15000, temperature=0)
    page.focus("#run")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.token').length > 3")  # before the end
    assert page.locator("#halt").evaluate("(stop) => stop === document.activeElement")
    until(page, "Number(document.querySelector('#speed').textContent) > 0")
    assert int(page.locator("#count").text_content() or "") < 15000
    page.keyboard.press("Escape")
    page.wait_for_selector("#run", state="visible")
    assert page.locator("#run").evaluate("(run) => run === document.activeElement")
    text, count = text_of(page), int(page.locator("#count").text_content() or "")
    assert page.locator("#status").text_content() == f"stopped after {count} tokens"
    with LLM(models["slow"]) as llm:
        whole = llm.generate("Go on", SamplingParams(max_tokens=count)).text
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"�"}  # half a character was not shown yet
    metrics, deadline = "", time.monotonic() + 60
    while 'num_requests_running{model_name="slow"} 0.0' not in metrics:  # what nobody reads, ends
        assert time.monotonic() < deadline, metrics
        metrics = urlopen(address + "metrics").read().decode()


def test_drafts_are_told_live(pages: Pages, models: dict[str, Path]) -> None:
    server, address = start(f"-m{models['slow']}", "--draft", "ngram")
    try:
        page = pages.open(at=address)
        fill(page, "ab" * 20, max_tokens=15000, temperature=0)
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelector('#drafts').textContent.endsWith('%')")
        assert page.locator("#halt").is_visible()
        assert re.fullmatch(r"\d+ %", page.locator("#drafts").text_content() or "")
        page.keyboard.press("Escape")
    finally:
        end(server)


def test_chat(pages: Pages, models: dict[str, Path]) -> None:
    page = pages.open()
    fill(page, STORY, "Chat", model="tiny", max_tokens=12, temperature=0.8, seed=5, system="Be brief.")
    params = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=5)
    messages = [{"role": "system", "content": "Be brief."}]
    with LLM(models["tiny"]) as llm:
        for said in (STORY, "<i>And</i> then?"):
            page.fill("[name=prompt]", said)
            messages.append({"role": "user", "content": said})
            answer = llm.generate(llm.chat_prompt(messages), params).text
            assert run(page) == answer
            assert page.locator("[name=prompt]").input_value() == ""
            messages.append({"role": "assistant", "content": answer})
        turns = page.locator(".turn").evaluate_all("(turns) => turns.map((turn) => turn.textContent)")
        assert turns == [message["content"] for message in messages[1:]]
        page.fill("[name=seed]", "6")  # nothing new is said: the last answer is made again
        again = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=6)
        assert run(page) == llm.generate(llm.chat_prompt(messages[:-1]), again).text != messages[-1]["content"]
        assert page.locator(".turn").count() == 4
        page.fill("[name=prompt]", "A line")
        page.press("[name=prompt]", "Shift+Enter")
        page.press("[name=prompt]", "Enter")
        until(page, "document.querySelectorAll('.turn').length === 6")
        assert page.locator(".user").last.text_content() == "A line\n"
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_alternatives(pages: Pages, models: dict[str, Path]) -> None:
    """By keyboard and by pointer: what the popover says is what LLM says."""
    page = pages.open()
    fill(page, PROMPT, model="tiny", max_tokens=40, temperature=0, seed=1)
    run(page)
    with LLM(models["tiny"]) as llm:
        out = llm.generate(PROMPT, SamplingParams(max_tokens=40, logprobs=5))
    assert out.logprobs
    spans = page.evaluate("[...document.querySelectorAll('.token')].map((token) => token.tokens.length)")
    page.focus("[name=prompt]")
    page.keyboard.press("Tab")
    position = 0
    for index, n in enumerate(spans):  # from token to token
        seen = focused(page)
        assert seen["token"]
        assert seen["index"] == index
        assert seen["shown"]
        assert seen["described"] == "popover"
        tokens = out.logprobs[position : position + n]
        wanted = tokens[0].top if n == 1 else [(token.token_id, token.logprob) for token in tokens]
        assert [row[1] for row in seen["rows"]] == [percent(logprob) for _, logprob in wanted]
        if n == 1:  # greedy: the likeliest
            assert seen["rows"][0][0] == seen["chosen"]
        position += n
        page.keyboard.press("ArrowRight")
    assert focused(page)["index"] == len(spans) - 1
    assert position == len(out.token_ids)
    page.keyboard.press("Home")
    assert focused(page)["index"] == 0
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert focused(page)["index"] == len(spans) - 2
    page.keyboard.press("Escape")
    assert not focused(page)["shown"]
    page.keyboard.press("Tab")  # the tokens are one stop
    assert not focused(page)["token"]
    page.locator(".token").nth(1).hover()
    assert focused(page)["shown"]
    page.hover("header")
    assert not focused(page)["shown"]


def test_lines_of_tokens(pages: Pages) -> None:
    """Arrow keys that go up and down find the nearest token of the next line; and the text goes on in the prompt's."""
    page = pages.open(viewport={"width": 900, "height": 700})
    fill(page, "x" * 30, model="slow", max_tokens=200, temperature=0)
    run(page)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(".token mark")].map((mark) => {
            const { left, top, width } = mark.getBoundingClientRect();
            return [left + width / 2, top];
        })"""
    )
    prompt = page.locator("[name=prompt]").bounding_box()
    assert prompt
    assert boxes[0][1] < prompt["y"] + 35  # the first line
    assert boxes[0][0] > prompt["x"] + 100  # after the prompt
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowDown")
    down = focused(page)["index"]
    lines = sorted({round(top) for _, top in boxes})
    assert round(boxes[down][1]) == lines[1]
    on_line = [i for i, box in enumerate(boxes) if round(box[1]) == lines[1]]
    assert abs(boxes[down][0] - boxes[0][0]) == min(abs(boxes[i][0] - boxes[0][0]) for i in on_line)
    page.keyboard.press("ArrowUp")
    assert round(boxes[focused(page)["index"]][1]) == lines[0]


def test_link(pages: Pages) -> None:
    """A link makes the very text again, in another browser: whole or stopped, of a completion or of a conversation."""
    page = pages.open()
    fill(page, PROMPT, model="tiny", max_tokens=30, temperature=1.1, top_k=99, stop="zq\\n")
    text = run(page)
    page.fill("[name=stop]", "of no matter to what is there")
    page.click("#share")
    link = page.url
    assert "prompt=" in link.partition("#")[2]
    other = pages.open(link.partition("/#")[2].join(("#", "")))
    assert other.locator("[name=prompt]").input_value() == PROMPT
    assert run(other) == text
    assert other.locator("#notice").is_hidden()

    fill(page, "Hi", "Chat", model="tiny", seed="", system="Sing.", stop="")
    run(page)
    page.fill("[name=prompt]", "<script>document.title = 'taken'</script>")
    text = run(page)
    page.click("#share")
    other = pages.open("#" + page.url.partition("#")[2])
    assert other.locator(".turn").count() == 2
    assert run(other) == text
    assert other.title() == page.title() == "pronghorn"

    old = page.url.partition("#")[2].replace("fingerprint=fp_", "fingerprint=fp_0")
    other = pages.open("#" + old)
    assert run(other) == text
    assert "another build or model" in (other.locator("#notice").text_content() or "")
    for fragment, said in (
        ("#mode=chat&messages=[1]", "the link is broken"),
        ("#mode=chat&messages={", "the link is broken"),
        ("#model=unheard-of&prompt=x", "unheard-of is not served here"),
    ):
        other.evaluate("(fragment) => { location.hash = fragment; }", fragment)
        until(other, f"document.querySelector('#notice').textContent.includes('{said}')")


def test_errors_are_shown(pages: Pages, models: dict[str, Path]) -> None:
    page = pages.open()
    fill(page, "y" * 400, model="tiny")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#notice", state="visible")
    with LLM(models["tiny"]) as llm, pytest.raises(PromptError, match="context") as raised:
        llm.generate("y" * 400)
    assert page.locator("#notice").text_content() == str(raised.value)
    assert [fault for fault in pages.faults if "400" not in fault] == []  # the browser logs the status
    pages.faults.clear()
    assert page.locator("[name=prompt]").input_value() == "y" * 400  # nothing is lost
    page.fill("[name=temperature]", "-1")
    page.keyboard.press("Control+Enter")
    assert page.locator("[name=temperature]").evaluate("(field) => field === document.activeElement")
    page.fill("[name=temperature]", "1")
    page.context.set_offline(True)
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('#notice').textContent.startsWith('the server does not answer')")
    pages.faults.clear()


def test_key(pages: Pages, models: dict[str, Path]) -> None:
    """The key goes with each request, and stays in the tab."""
    server, address = start(f"-m{models['tiny']}", PRONGHORN_API_KEYS="sesame")
    try:
        page = pages.open(at=address, ready=False)
        until(page, "document.querySelector('#notice').textContent.startsWith('an API key is needed')")
        pages.faults.clear()
        page.fill("[name=key]", "sesame")
        page.keyboard.press("Tab")
        page.wait_for_selector("[name=model] option", state="attached")
        page.wait_for_selector("#notice", state="hidden")
        fill(page, "x", max_tokens=5)
        assert run(page)
        page.reload()
        page.wait_for_selector("[name=model] option", state="attached")
        assert page.evaluate("Object.keys(localStorage)") == ["theme"]
    finally:
        end(server)


def test_themes(pages: Pages) -> None:
    def brightness(page: Page) -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"\d+", colour)[:3])) / 3

    page = pages.open(color_scheme="light")
    assert brightness(page) > 200
    page.emulate_media(color_scheme="dark")
    assert brightness(page) < 50
    page.click("#theme")
    assert brightness(page) > 200
    page.reload()
    assert brightness(page) > 200
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    assert brightness(page) < 50
    page.click("#theme")
    assert brightness(page) > 200


def test_phone(pages: Pages) -> None:
    # A seed, and a model that never ends: another text may have fewer tokens than are touched here.
    asked = "#model=slow&seed=1&temperature=1&max_tokens=100"
    page = pages.open(asked, viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)
    assert page.locator("[name=temperature]").is_hidden()
    page.fill("[name=prompt]", STORY)
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for selector in ("#run", "#share", "#theme", "[name=model]", "[name=prompt]"):
        box = page.locator(selector).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    page.locator(".token").nth(2).tap()
    box = page.locator("#popover").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    page.locator("summary").tap()
    assert page.locator("[name=temperature]").is_visible()


def test_policy_is_in_force(pages: Pages) -> None:
    """What the other tests look for would be seen."""
    page = pages.open()
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
    page.wait_for_timeout(100)
    assert any(fault.startswith("policy style-src") for fault in pages.faults)
    pages.faults.clear()


def test_the_composer_covers_the_conversation(pages: Pages) -> None:
    """Whatever scrolls under it: the tokens lie above the text that a completion goes on from, but not above this."""
    page = pages.open(viewport={"width": 900, "height": 420})
    fill(page, "Go on", "Chat", model="slow", max_tokens=300, temperature=0)
    run(page)
    page.locator("#sheet").evaluate("(sheet) => { sheet.scrollTop = 60; }")
    page.fill("[name=prompt]", "a line\n" * 5)
    covered = page.evaluate(
        """() => {
            const box = document.querySelector(".prompt").getBoundingClientRect();
            const marks = [...document.querySelectorAll(".token mark")].map((mark) => mark.getBoundingClientRect());
            const middles = marks.map((r) => [r.left + r.width / 2, r.top + r.height / 2]);
            return middles.filter(([x, y]) => x > box.left && x < box.right && y > box.top && y < box.bottom)
                .map(([x, y]) => document.elementFromPoint(x, y).closest(".prompt") !== null);
        }"""
    )
    assert covered
    assert all(covered)


CONTROLS = """() => [...document.querySelectorAll("button, input, select, textarea, summary")]
    .filter((one) => !one.ariaHidden && one.checkVisibility())
    .map((one) => [one.name || one.id || one.tagName, one.ariaLabel
        || [...(one.labels ?? [])].map((label) => label.textContent.trim()).join(" ") || one.textContent.trim()])"""
CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const over = (colour, below) => {  // as it is seen: sRGB, on what is below
        canvas.fillStyle = `rgb(${below.join(" ")})`; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const ground = (one) =>
        one ? over(getComputedStyle(one).backgroundColor, ground(one.parentElement)) : [255, 255, 255];
    const light = (rgb) => rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const own = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
        || (/^(INPUT|TEXTAREA|SELECT)$/.test(one.tagName) && !/range|radio|checkbox/.test(one.type));
    return [...document.querySelectorAll("body *")].filter((one) => own(one) && one.checkVisibility()
        && !one.disabled && one.id !== "echo" && !one.closest("option, .spoken")).map((one) => {
        const below = ground(one);
        const [a, b] = [light(over(getComputedStyle(one).color, below)), light(below)];
        return [one.tagName + " " + (one.id || one.className || one.textContent.trim()),
            (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(pages: Pages, scheme: str) -> None:
    """Each control has a name, and each text, on the darkest shade too, 4.5 times its ground's light (WCAG 2.2, AA)."""
    page = pages.open(color_scheme=scheme)
    for mode in ("Completion", "Chat"):
        fill(page, STORY, mode, model="tiny", max_tokens=40, temperature=1.5, seed=1)
        run(page)
        page.locator(".token").nth(3).focus()
        assert [name for name, label in page.evaluate(CONTROLS) if not label] == []
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 30
        assert [(name, ratio) for name, ratio in contrasts if ratio < 4.5] == []


def test_nothing_moves_for_those_who_want_none(pages: Pages) -> None:
    page = pages.open(reduced_motion="reduce")
    fill(page, "Go on", model="slow", max_tokens=15000, temperature=0)
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelectorAll('.token').length > 3")
    assert page.evaluate("document.getAnimations().length") == 0
    page.emulate_media(reduced_motion="no-preference")
    until(page, "document.getAnimations().length === 1")  # the caret
    page.keyboard.press("Escape")
    page.wait_for_selector("#run", state="visible")


def test_screenshots(pages: Pages, models: dict[str, Path]) -> None:
    """For people to look at."""
    KEPT.mkdir(parents=True, exist_ok=True)
    model = "stories" if "stories" in models else "tiny"
    desk = {"viewport": {"width": 1280, "height": 800}}
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    for scheme in ("light", "dark"):
        for kind, options in (("", desk), ("-phone", phone)):
            page = pages.open(color_scheme=scheme, **options)
            page.locator("#settings").evaluate("(settings) => { settings.open = true; }")
            fill(page, STORY, model=model, max_tokens=150, temperature=0.7, seed=3)
            page.locator("#settings").evaluate("(settings, open) => { settings.open = open; }", not kind)
            run(page)
            page.locator(".token").nth(20).hover()
            path = KEPT / f"completion{kind}-{scheme}.png"
            page.screenshot(path=path)
            print(f"kept {path}")
            assert path.stat().st_size > 10000
