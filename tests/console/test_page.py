"""The console in a real browser, against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, Route, expect

from support.serving import CONTEXT, MODEL_NAME, Server

DESKTOP = {"width": 1280, "height": 800}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 700}, "is_mobile": True, "has_touch": True}


def ask(page: Page, text: str, *, max_tokens: int | None = 20) -> Locator:
    """Asks the model something; returns its answer's place."""
    if max_tokens is not None:
        page.fill("#max_tokens", str(max_tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return page.locator(".message.assistant").last


def settle(page: Page) -> None:
    """Waits until no answer is under way."""
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".message.assistant.writing")).to_have_count(0)


def answer_with(page: Page, text: str) -> None:
    """From now on, the server's answer is this text, one character an event."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in text
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )


def test_an_answer_streams_in_and_is_counted(page: Page, server: Server) -> None:
    page.evaluate(
        """() => {
            window.lengths = new Set();
            const note = () => {
                const text = document.querySelector(".message.assistant .text");
                if (text) window.lengths.add(text.textContent.length);
                requestAnimationFrame(note);
            };
            note();
        }"""
    )
    page.locator("#temperature").fill("0")
    answer = ask(page, "hello", max_tokens=900)
    expect(page.locator("#stop")).to_be_visible()
    settle(page)
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 900}
    wanted = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "top_p": 0.95}, timeout=60).json()
    text = wanted["choices"][0]["message"]["content"]
    assert " ".join(answer.locator(".text").inner_text().split()) == " ".join(text.split())
    expect(answer.locator(".facts-line")).to_contain_text("Ended at the token limit · 900 tokens · ")
    expect(page.locator("#context")).to_contain_text(f"of {CONTEXT:,} tokens of context")
    # It grew before it was complete.
    assert page.evaluate("window.lengths.size") > 3
    expect(page.locator("#model")).to_have_text(MODEL_NAME)


def test_stop_keeps_what_has_come_and_frees_the_server(page: Page, server: Server) -> None:
    answer = ask(page, "write for ever", max_tokens=CONTEXT)
    expect(answer.locator(".text")).not_to_be_empty()
    expect(page.locator("#figure-running")).to_have_text("1")
    page.keyboard.press("Escape")
    settle(page)
    expect(answer.locator(".facts-line")).to_contain_text("Stopped")
    server.wait_idle()
    expect(page.locator("#figure-running")).to_have_text("0")
    # The button does what the key does, and the next question carries the cut answer along.
    answer = ask(page, "and again", max_tokens=CONTEXT)
    expect(answer.locator(".text")).not_to_be_empty()
    page.click("#stop")
    settle(page)
    server.wait_idle()
    expect(page.locator(".message")).to_have_count(4)


def test_every_control_reaches_the_server(page: Page) -> None:
    bodies: list[dict[str, Any]] = []

    def keep(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        route.continue_()

    page.route("**/v1/chat/completions", keep)
    page.fill("#system", "Be brief.")
    for name, value in {"temperature": "1.25", "top_p": "0.5", "min_p": "0.1"}.items():
        page.locator(f"#{name}").fill(value)
    for name, value in {"top_k": "12", "seed": "77"}.items():
        page.fill(f"#{name}", value)
    ask(page, "first", max_tokens=5)
    settle(page)
    (body,) = bodies
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
    ]
    sampling = {"temperature": 1.25, "top_p": 0.5, "min_p": 0.1, "top_k": 12, "seed": 77, "max_tokens": 5}
    assert {name: body[name] for name in sampling} == sampling

    page.click("#reset")
    ask(page, "second", max_tokens=None)
    page.keyboard.press("Escape")
    settle(page)
    assert [message["role"] for message in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert not {"top_k", "seed", "max_tokens"} & set(bodies[1])


def test_a_wrong_value_is_marked_and_not_sent(page: Page) -> None:
    page.fill("#top_k", "7")
    page.fill("#top_k", "-3")
    expect(page.locator("#top_k")).to_have_attribute("aria-invalid", "true")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hello", max_tokens=3)
    assert sent.value.post_data_json["top_k"] == 7


def test_a_visit_later_finds_everything_as_it_was(page: Page) -> None:
    ask(page, "remember me", max_tokens=8)
    settle(page)
    page.fill("#seed", "5")
    page.fill("#prompt", "half a thou")
    said = page.locator("#messages").inner_text()
    page.reload()
    assert page.locator("#messages").inner_text() == said
    assert page.input_value("#seed") == "5"
    assert page.input_value("#prompt") == "half a thou"

    page.keyboard.press("Alt+n")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(page.locator(".message")).to_have_count(0)


def test_damaged_memory_does_no_harm(page: Page) -> None:
    for damaged in ("{", "null", "[]", '{"messages":[1,{"role":"user"}],"settings":{"temperature":"hot"}}'):
        page.evaluate("value => { window.remembered = value; }", damaged)
        page.evaluate(
            "addEventListener('pagehide', () => localStorage.setItem('mainspring.console.v1', remembered))"
        )
        page.reload()
        expect(page.locator("#welcome")).to_be_visible()
        assert page.input_value("#temperature") == "0.7"


def test_what_the_model_writes_is_never_html(page: Page) -> None:
    attack = (
        "<img src=x onerror='window.hit=1'><script>window.hit=1</script> <b>bold</b> "
        "[a](javascript:window.hit=1) [b](https://example.org/x) `<i>code</i>`\n\n"
        "```html\n<script>window.hit=1</script>\n```\n"
    )
    answer_with(page, attack)
    answer = ask(page, "<img src=x onerror='window.hit=1'>")
    settle(page)
    assert page.evaluate("window.hit === undefined")
    assert page.locator("#messages :is(img, script, b, i, iframe)").count() == 0
    links = answer.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert links == ["https://example.org/x"]
    expect(answer.locator(".text")).to_contain_text("<script>window.hit=1</script> <b>bold</b>")
    expect(page.locator(".message.user .text")).to_have_text("<img src=x onerror='window.hit=1'>")


def test_answers_and_code_can_be_copied(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    text = "Look:\n\n```python\nprint('a')\n  indented\n```\ndone"
    answer_with(page, text)
    answer = ask(page, "code please")
    settle(page)

    def copy(name: str) -> None:
        button = answer.get_by_role("button", name=name).element_handle()
        button.click()
        page.wait_for_function("button => button.textContent == 'Copied'", arg=button)

    copy("Copy code")
    page.locator("#prompt").press("Control+v")
    expect(page.locator("#prompt")).to_have_value("print('a')\n  indented")
    copy("Copy answer")
    page.fill("#prompt", "")
    page.locator("#prompt").press("Control+v")
    expect(page.locator("#prompt")).to_have_value(text)


def test_a_server_that_is_gone_is_told_and_found_again(page: Page) -> None:
    page.route("**/*", lambda route: route.abort("connectionrefused"))
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    expect(page.locator("#figure-running")).to_have_text("–")
    answer = ask(page, "anyone there?", max_tokens=5)
    expect(answer.locator(".error")).to_contain_text("The server does not answer")
    page.unroute("**/*")
    expect(page.locator("#banner")).to_be_hidden()
    answer.get_by_role("button", name="Try again").click()
    settle(page)
    expect(page.locator(".message.assistant .text")).not_to_be_empty()
    expect(page.locator(".message")).to_have_count(2)


def test_an_error_in_the_middle_keeps_what_has_come(page: Page) -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"content": "half an answ"}, "finish_reason": None}]},
        {
            "error": {
                "message": "The engine process has ended.",
                "type": "x",
                "param": None,
                "code": "engine_dead",
            }
        },
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )
    answer = ask(page, "hello")
    settle(page)
    expect(answer.locator(".text")).to_have_text("half an answ")
    expect(answer.locator(".error")).to_contain_text("The engine process has ended.")


def test_a_full_context_offers_a_way_on(page: Page) -> None:
    ask(page, "x" * (CONTEXT - 200), max_tokens=5)
    settle(page)
    answer = ask(page, "y" * 300, max_tokens=5)
    expect(answer.locator(".error")).to_contain_text("longer than the model’s context")
    expect(answer.locator(".error")).to_contain_text(str(CONTEXT))
    answer.get_by_role("button", name="Leave out the older half").click()
    settle(page)
    expect(page.locator(".error")).to_have_count(0)
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(".message.user")).to_have_text("y" * 300)

    page.keyboard.press("Alt+n")
    answer = ask(page, "z" * CONTEXT, max_tokens=5)
    expect(answer.get_by_role("button", name="Leave out the older half")).to_have_count(0)
    answer.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()


def test_the_keyboard_is_enough(page: Page) -> None:
    expect(page.locator("#prompt")).to_be_focused()
    page.fill("#max_tokens", "4")
    page.locator("#prompt").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#prompt") == "one\ntwo"
    page.keyboard.press("Enter")
    settle(page)
    expect(page.locator(".message.user .text")).to_have_text("one\ntwo")
    page.keyboard.press("Alt+s")
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#panel-toggle")).to_be_focused()
    page.keyboard.press("Alt+s")
    expect(page.locator("#panel")).to_be_focused()
    # Every control can be reached, in order, and has a name.
    page.locator("#new-chat").focus()
    seen: list[str] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    # After the last one the browser begins anew.
    assert [name for name in seen if name in ("prompt", "system", "temperature", "seed")][:4] == [
        "prompt",
        "system",
        "temperature",
        "seed",
    ]
    unnamed = page.locator("button, input, textarea").evaluate_all(
        "nodes => nodes.filter(node => !(node.labels?.length || node.textContent.trim())).map(node => node.outerHTML)"
    )
    assert unnamed == []


def test_answers_are_announced_once_and_not_word_by_word(page: Page) -> None:
    ask(page, "hello", max_tokens=5)
    settle(page)
    expect(page.locator("[role=status]")).to_have_text("The answer is complete.")
    assert page.locator("#messages[aria-live], #messages [aria-live]").count() == 0


def test_it_fits_a_phone(open_page: Callable[..., Page]) -> None:
    page = open_page(**PHONE)
    answer_with(page, "A wide line:\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    expect(page.locator("#panel")).to_be_hidden()
    ask(page, "z" * 300, max_tokens=None)
    settle(page)
    assert page.evaluate(overflow) == 0
    assert page.locator("#scroll").evaluate("node => node.scrollWidth - node.clientWidth") == 0
    for name in ("#send", "#panel-toggle", "#new-chat", "#theme"):
        box = page.locator(name).bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 40, f"{name} is too small for a finger"
    page.tap("#panel-toggle")
    expect(page.locator("#panel")).to_be_visible()
    assert page.locator(".chat").evaluate("node => node.inert")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    assert not page.locator(".chat").evaluate("node => node.inert")


# The contrast of a node's text with the nearest painted background behind it, by WCAG 2.
CONTRAST = """node => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (color) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return context.getImageData(0, 0, 1, 1).data;
    };
    const luminance = (color) => {
        const [r, g, b] = [...rgb(color)].map((part) => part / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let behind = node;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(viewport=DESKTOP, color_scheme=scheme)
    answer_with(page, "Text, `code`, [a link](https://example.org).\n\n> quote\n\n```js\nlet a;\n```")
    ask(page, "hello")
    settle(page)
    names = (".message.user .text", ".message.assistant p", ".text code", ".text a", "blockquote p", ".code-head",
             ".code code", ".facts-line", "#model", ".figure dt", ".figure dd", ".hint", ".help", ".field label",
             ".field output", "#send", "#reset", "#new-chat", "h1", ".panel h2", ".facts dt")  # fmt: skip
    for name in names:
        assert page.locator(name).first.evaluate(CONTRAST) >= 4.5, f"{name} is too faint"


def test_the_theme_can_be_chosen(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport=DESKTOP, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) == dark
