"""Chat templates render as in transformers, and none of them can harm or stall the process that asks."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mainspring.errors import ChatTemplateError
from mainspring.formats.chat_template import ChatTemplate

MESSAGES = [
    {"role": "user", "content": "What <is> & 'it'?"},
    {
        "role": "assistant",
        "content": "Ünïcode 🎉",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }};{% endfor %}{% endif %}{% endfor %}"
)

TEMPLATES = {
    "plain": PLAIN,
    "trimmed": "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "prompt": "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}{{ custom }}",
    "controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index0 }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro f(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}",
    "methods": "{{ messages[0].content.split(' ')[0].strip().upper() }}{{ messages[1].items() | list | length }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{% if tools is defined %}{{ tools | length }}{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(name: str, prompt: bool) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "custom": "x"}
    ((expected,), _) = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **variables
    )
    template = ChatTemplate(TEMPLATES[name])
    assert (
        template.render(MESSAGES, tools=TOOLS, add_generation_prompt=prompt, variables=variables) == expected
    )


def test_today_can_be_asked_for() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) in {
        time.strftime("%Y"),
        str(int(time.strftime("%Y")) + 1),
    }


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "fails"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ 'x' * 10000000000 }}", "memory"),
        ("{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}", "limit of 4000000 characters"),
    ],
)
def test_a_failing_template_says_why(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = messages | length + 7 %}{{ n ** (n ** n) }}",
    ],
)
def test_an_endless_template_is_stopped_from_any_thread_and_can_be_used_again(source: str) -> None:
    template = ChatTemplate("{% if messages %}" + source + "{% endif %}done", max_seconds=0.5)
    caught: list[BaseException] = []

    def render() -> None:
        try:
            template.render(MESSAGES)
        except ChatTemplateError as error:
            caught.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "longer than 0.5 s" in str(caught[0])
    assert template.render([]) == "done"


def test_a_template_that_is_endless_to_compile_is_stopped() -> None:
    with pytest.raises(ChatTemplateError, match=r"longer than 0\.5 s"):
        ChatTemplate("{{ 9 ** (9 ** 9) }}", max_seconds=0.5).render([])


def test_a_list_of_text_parts_reaches_templates_that_read_it_and_is_joined_for_others() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert ChatTemplate(PARTS).render(parts) == "one;two;"
    assert ChatTemplate(PARTS).render([{"role": "user", "content": "one"}]) == "one"
    assert ChatTemplate(PLAIN).render(parts) == "<user>one\ntwo"
    assert ChatTemplate("{{ messages[0].content + '!' }}").render(parts) == "one\ntwo!"
    assert ChatTemplate("{{ messages | tojson }}").render(parts).count('"content": "one\\ntwo"') == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"content": "x"}], "message 0 must be an object with a role"),
        (["x"], "message 0"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "message 1 must be a string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "'image_url'"),
        ([{"role": "user", "content": ["x"]}], "'str'"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "not plain JSON"),
    ],
)
def test_malformed_messages_are_refused(messages: list[Any], words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(PLAIN).render(messages)


def test_threads_take_turns_and_get_their_own_answers() -> None:
    template = ChatTemplate(PLAIN)

    def render(i: int) -> str:
        return template.render([{"role": "user", "content": f"{i}" * 50_000}])

    with ThreadPoolExecutor(8) as pool:
        assert all(text == "<user>" + f"{i}" * 50_000 for i, text in enumerate(pool.map(render, range(40))))


def test_a_process_that_was_killed_is_replaced() -> None:
    template = ChatTemplate(PLAIN)
    template.render([])
    assert template._worker is not None
    template._worker._process.kill()
    template._worker._process.wait()
    assert template.render([{"role": "user", "content": "x"}]) == "<user>x"


def test_the_process_ends_with_the_template_and_with_its_owner() -> None:
    template = ChatTemplate(PLAIN)
    template.render([])
    assert template._worker is not None
    process = template._worker._process
    template.close()
    assert process.returncode is not None
    owner = "; ".join(
        [
            "import os",
            "from mainspring.formats.chat_template import ChatTemplate",
            "t = ChatTemplate('x')",
            "t.render([])",
            "print(t._worker._process.pid, flush=True)",
            "os._exit(0)",
        ]
    )
    pid = subprocess.run(
        [sys.executable, "-c", owner], capture_output=True, text=True, check=True
    ).stdout.strip()
    for _ in range(100):
        if not _is_running(int(pid)):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlives its owner")


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
