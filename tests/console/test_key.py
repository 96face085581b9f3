"""A server that wants a key: the page asks for it, keeps it for its tab, and takes a refusal for an answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Dialog, Page, expect

from support.serving import Server, running_server, write_tiny_model

KEY = "correct-horse"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("keyed-console")
    model = write_tiny_model(directory / "tiny")
    with running_server(model, directory / "output.txt", "--api-key", KEY, api_key=KEY) as running:
        yield running


class Answers:
    """Answers the page's questions for a key in this order, and dismisses those that come later."""

    def __init__(self, page: Page, *keys: str) -> None:
        self.left = list(keys)
        self.asked: list[str] = []
        page.on("dialog", self._answer)

    def _answer(self, dialog: Dialog) -> None:
        self.asked.append(dialog.message)
        if self.left:
            dialog.accept(self.left.pop(0))
        else:
            dialog.dismiss()


def new_page(browser: Browser, server: Server) -> Page:
    page = browser.new_context(base_url=server.url).new_page()
    page.set_default_timeout(20_000)
    return page


def test_a_key_is_asked_for_until_it_is_right_and_kept_for_the_tab(browser: Browser, keyed: Server) -> None:
    page = new_page(browser, keyed)
    answers = Answers(page, "wrong", KEY)
    page.goto("/")
    expect(page.locator("#model")).not_to_be_empty()
    assert len(answers.asked) == 2
    assert "API key" in answers.asked[0]
    page.fill("#max_tokens", "5")
    page.fill("#prompt", "hello")
    page.press("#prompt", "Enter")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".message.assistant").last).to_contain_text("tokens")
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()
    assert len(answers.asked) == 2
    # Another tab is another visitor: the key is not in what all tabs share.
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    page.context.close()


def test_who_has_no_key_is_asked_once_and_told_why_nothing_comes(browser: Browser, keyed: Server) -> None:
    page = new_page(browser, keyed)
    answers = Answers(page)
    page.goto("/")
    page.fill("#prompt", "hello")
    page.press("#prompt", "Enter")
    expect(page.locator(".message.assistant").last).to_contain_text("API key")
    expect(page.locator("#stop")).to_be_hidden()
    assert len(answers.asked) == 1
    assert page.evaluate("sessionStorage.length") == 0
    page.context.close()
