"""Bad words are not generated, and what needs a tokenizer is refused without one."""

from __future__ import annotations

import pytest
import torch

from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.token_rules import BadWords, TokenRules, bad_word_tokens
from mainspring.errors import InvalidRequestError
from support.byte_tokenizer import END, byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCAB = 300


def allowed(rules: BadWords) -> set[int]:
    mask = torch.zeros((2, -(-VOCAB // 32)), dtype=torch.int32)
    rules.fill_bitmask(mask, 1)
    assert not mask[0].any()
    return {t for t in range(VOCAB) if mask[1, t // 32].item() >> (t % 32) & 1}


def test_the_last_token_of_a_bad_word_is_forbidden_after_its_others_only() -> None:
    rules = BadWords([[5], [1, 2, 3], [2, 31], [2, 3, 4]])
    everything = set(range(VOCAB))
    assert allowed(rules) == everything - {5}
    assert rules.accept(1)
    assert allowed(rules) == everything - {5}
    assert rules.accept(2)
    assert allowed(rules) == everything - {5, 3, 31}
    assert not rules.accept(3)
    assert rules.accept(1)
    assert rules.accept(2)
    assert rules.accept(7)
    assert allowed(rules) == everything - {5}
    assert not rules.terminated


def test_a_word_is_spelled_with_and_without_a_space_before_it() -> None:
    assert bad_word_tokens(["ab", " c"], TOKENIZER) == [(97, 98), (32, 97, 98), (32, 99)]


def test_bad_words_and_a_grammar_hold_together() -> None:
    rules = TokenRules(TOKENIZER, VOCAB, (END,)).of(
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="[ab]{3}"), bad_words=["aa"])
    )
    assert isinstance(rules, BadWords)
    assert allowed(rules) == {97, 98}
    assert rules.accept(97)
    assert allowed(rules) == {98}
    assert not rules.accept(97)
    assert rules.accept(98)
    assert not rules.terminated
    assert rules.accept(98)
    assert rules.terminated


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(bad_words=["x"]),
        SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)),
    ],
)
def test_without_a_tokenizer_token_rules_are_refused(params: SamplingParams) -> None:
    rules = TokenRules(None, VOCAB, (END,))
    assert rules.of(SamplingParams()) is None
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        rules.of(params)
