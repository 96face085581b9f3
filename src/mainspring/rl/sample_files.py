"""Samples and pairs from JSON-lines files; a file with a bad line is refused whole, and the line named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from mainspring.errors import ConfigError
from mainspring.rl.prompts import Prompt
from mainspring.rl.samples import Pair, Sample

_Row = TypeVar("_Row")
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class TokenRules:
    """How texts become tokens. Prompt and answer are encoded apart, as a rollout has them."""

    encode: Callable[[str], Sequence[int]]
    """Without special tokens of its own."""
    end: int
    """The token that ends an answer."""
    begin: Sequence[int] = ()
    """Before every prompt."""
    prompt: Callable[[str], Sequence[int]] | None = None
    """How a prompt is encoded, by a chat template for instance; None: as an answer is."""

    def sample(self, prompt: str, answer: str) -> Sample:
        """Raises ConfigError for an empty answer, or an empty prompt without `begin`."""
        if not answer:
            raise ConfigError("the answer is empty")
        encode = self.encode if self.prompt is None else self.prompt
        return Sample.answer([*self.begin, *encode(prompt)], [*self.encode(answer), self.end])


class _SampleRow(msgspec.Struct):
    prompt: str
    answer: str


class _PromptRow(msgspec.Struct):
    prompt: str
    reference: str = ""


class _PairRow(msgspec.Struct):
    prompt: str
    chosen: str
    rejected: str


def read_samples(path: str | Path, rules: TokenRules) -> list[Sample]:
    """Of lines {"prompt": "...", "answer": "..."}; other keys and empty lines are passed over.

    Raises ConfigError naming the first bad line and how many there are, or if the file cannot be read or holds none.
    """
    return read_rows(path, _SampleRow, lambda row: rules.sample(row.prompt, row.answer))


def read_pairs(path: str | Path, rules: TokenRules) -> list[Pair]:
    """Of lines {"prompt": "...", "chosen": "...", "rejected": "..."}. Otherwise as `read_samples`."""

    def pair(row: _PairRow) -> Pair:
        if row.chosen == row.rejected:
            raise ConfigError("chosen and rejected are the same text")
        return Pair(rules.sample(row.prompt, row.chosen), rules.sample(row.prompt, row.rejected))

    return read_rows(path, _PairRow, pair)


def read_prompts(path: str | Path, encode: Callable[[str], Sequence[int]]) -> list[Prompt]:
    """Of lines {"prompt": "...", "reference": "..."}, the reference "" if there is none. Otherwise as `read_samples`.

    encode: a prompt's text -> all tokens that stand before the answer, a chat template's included.
    """

    def prompt(row: _PromptRow) -> Prompt:
        tokens = tuple(encode(row.prompt))
        if not tokens:
            raise ConfigError("the prompt is empty")
        return Prompt(tokens, row.prompt, row.reference)

    return read_rows(path, _PromptRow, prompt)


def read_rows(path: str | Path, kind: type[_Row], make: Callable[[_Row], _Read]) -> list[_Read]:
    """Each line decoded as a `kind` and made something of. Raises ConfigError as `read_samples` does."""
    decoder = msgspec.json.Decoder(kind)
    found: list[_Read] = []
    bad: list[str] = []
    for number, line in _lines(Path(path)):
        try:
            found.append(make(decoder.decode(line)))
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
            bad.append(f"line {number}: {error}")
    if bad:
        raise ConfigError(f"{path}, {bad[0]} ({len(bad)} bad lines in all); mend or delete them")
    if not found:
        raise ConfigError(f"{path} holds no samples; give one JSON object a line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
