"""How the console renders the model's Markdown."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from support.serving import Server

RENDER = """async (texts) => {
    const { renderInto } = await import("/console/markdown.js");
    const parent = document.createElement("div");
    for (const text of texts) renderInto(parent, text);
    for (const head of parent.querySelectorAll(".code-head")) head.remove();
    return parent.innerHTML;
}"""


@pytest.fixture(scope="module")
def blank(browser: Browser, server: Server) -> Iterator[Page]:
    """One page for all, since rendering leaves nothing behind."""
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    page.goto("/")
    yield page
    context.close()


CASES = {
    "a": "<p>a</p>",
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "**bold** *it* _it_ ~~gone~~ `x*y*`": (
        "<p><strong>bold</strong> <em>it</em> <em>it</em> <del>gone</del> <code>x*y*</code></p>"
    ),
    "**bold *both***": "<p><strong>bold <em>both</em></strong></p>",
    "2 * 3 * 4, snake_case_name, 5*": "<p>2 * 3 * 4, snake_case_name, 5*</p>",
    "**open, `open": "<p>**open, `open</p>",
    r"\*kept\* 1\. \\": r"<p>*kept* 1. \</p>",
    "# One\n## Two\ntext": "<h3>One</h3><h4>Two</h4><p>text</p>",
    "#hash": "<p>#hash</p>",
    "- a\n- b\n  - c\n  - d\n- e": "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n\n2. b\n\n3. c": "<ol><li>a</li><li>b</li><li>c</li></ol>",
    "1. a\n   more\n2. b": "<ol><li>a more</li><li>b</li></ol>",
    "> a\n> b\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "```py\na = 1\n\nb < 2\n```\nend": (
        '<div class="code"><pre tabindex="0" aria-label="Code"><code>a = 1\n\nb &lt; 2</code></pre></div><p>end</p>'
    ),
    "```\nopen": '<div class="code"><pre tabindex="0" aria-label="Code"><code>open</code></pre></div>',
    "1. a\n   ```\n   x\n     y\n   ```\n2. b": (
        "<ol><li>a</li></ol>"
        '<div class="code"><pre tabindex="0" aria-label="Code"><code>x\n  y</code></pre></div>'
        '<ol start="2"><li>b</li></ol>'
    ),
    "| a | b |\n|---|---|\n| 1 | **2** |": (
        '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr>'
        '<th scope="col">a</th><th scope="col">b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table></div>"
    ),
    "see https://example.org/a_b_c.": (
        '<p>see <a href="https://example.org/a_b_c" target="_blank" rel="noopener noreferrer">'
        "https://example.org/a_b_c</a>.</p>"
    ),
    "[x](javascript:alert) [y](data:text/html,z)": "<p>[x](javascript:alert) [y](data:text/html,z)</p>",
    "<b>&amp;</b>": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
}


@pytest.mark.parametrize("text", CASES)
def test_markdown_becomes_nodes(blank: Page, text: str) -> None:
    assert blank.evaluate(RENDER, [text]) == CASES[text]


def test_a_text_that_grows_ends_as_if_it_had_come_whole(blank: Page) -> None:
    text = "\n\n".join(CASES)
    whole = blank.evaluate(RENDER, [text])
    grown = blank.evaluate(RENDER, [text[:end] for end in range(1, len(text) + 1)])
    assert grown == whole


@pytest.mark.parametrize(
    "text", ["*" * 20_000, "[" * 20_000, "`" * 20_001, "- " * 10_000, "> " * 500 + "a", "_a" * 9_000]
)
def test_hostile_text_is_rendered_as_text(blank: Page, text: str) -> None:
    shown = blank.evaluate(RENDER, [text])
    assert shown
