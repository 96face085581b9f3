"""Sample files are read whole or refused with the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mainspring.errors import ConfigError
from mainspring.rl.sample_files import TokenRules, read_pairs, read_samples
from mainspring.rl.samples import Pair, Sample

RULES = TokenRules(lambda text: list(text.encode()), end=256, begin=(257,))


def _file(path: Path, *lines: bytes) -> Path:
    path = path / "samples.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_samples_are_the_prompt_read_and_the_answer_written(tmp_path: Path) -> None:
    path = _file(
        tmp_path, b'{"prompt": "ab", "answer": "c", "source": 7}', b"", b'{"prompt": "", "answer": "d"}'
    )
    first, second = read_samples(path, RULES)
    assert first == Sample((257, 97, 98, 99, 256), (False, False, False, True, True))
    assert second == Sample((257, 100, 256), (False, True, True))


def test_pairs_share_their_prompt(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"prompt": "p", "chosen": "yes", "rejected": "no"}')
    assert read_pairs(path, RULES) == [Pair(RULES.sample("p", "yes"), RULES.sample("p", "no"))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "p"', "truncated"),
        (b'{"prompt": "p", "chosen": "a"}', "missing required field `rejected`"),
        (b'{"prompt": "p", "chosen": 3, "rejected": "b"}', "Expected `str`, got `int`"),
        (b'["p", "a", "b"]', "Expected `object`"),
        (b'{"prompt": "p", "chosen": "a", "rejected": ""}', "the answer is empty"),
        (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', "the same text"),
        (b'{"prompt": "p", "chosen": "\xff", "rejected": "a"}', "utf-8"),
    ],
)
def test_a_bad_line_refuses_the_file_and_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'
    with pytest.raises(ConfigError, match=rf"line 3: .*{reason}.*2 bad lines") as caught:
        read_pairs(_file(tmp_path, good, b"", line, good, b"{"), RULES)
    assert "samples.jsonl" in str(caught.value)


def test_a_file_without_samples_or_without_a_beginning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no samples"):
        read_samples(_file(tmp_path, b"", b" "), RULES)
    with pytest.raises(ConfigError, match=r"missing.jsonl cannot be read: No such file"):
        read_samples(tmp_path / "missing.jsonl", RULES)
    without = TokenRules(RULES.encode, end=256)
    with pytest.raises(ConfigError, match="line 1: a sample begins with a token to be written"):
        read_samples(_file(tmp_path, b'{"prompt": "", "answer": "d"}'), without)
