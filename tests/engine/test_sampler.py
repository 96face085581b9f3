"""Tokens are drawn from the right distribution, and a row's token is the same in any batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from mainspring.engine.messages import EngineRequest
from mainspring.engine.random_numbers import key_from_seed, uniform
from mainspring.engine.request import Request
from mainspring.engine.sampler import sample
from mainspring.engine.sampling_params import SamplingParams

VOCAB = 1000


def make_request(params: SamplingParams, generated: int = 0, eos: tuple[int, ...] = ()) -> Request:
    request = Request(EngineRequest("r", [0], params, eos, max_tokens=1000), key_from_seed(params.seed or 0))
    request.token_ids.extend([0] * generated)
    return request


def draw(logits: Tensor, params: SamplingParams, count: int) -> Counter[int]:
    """`count` draws from one row of logits [V], with as many seeds."""
    first = params.seed or 0
    requests = [make_request(replace(params, seed=first + i)) for i in range(count)]
    return Counter(sample(logits.expand(count, -1), requests))


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-40, 0.3, 0.7, 1.0, 1.5])),
        top_k=draw(st.sampled_from([0, -1, 1, 2, 5, 40, 500, 5000])),
        top_p=draw(st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**31)),
        min_tokens=draw(st.sampled_from([0, 2])),
    )


@settings(max_examples=40, deadline=None)
@given(
    params=st.lists(sampling_params(), min_size=1, max_size=6),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([17, 1000, 49152]),
)
def test_a_row_gets_the_same_token_alone_and_in_any_batch(
    params: list[SamplingParams], scale: float, seed: int, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), vocab, generator=generator) * scale
    logits = (logits * 4).round() / 4  # many equal logits: ties must not depend on the batch either
    requests = [make_request(p, generated=i, eos=(1, 2)) for i, p in enumerate(params)]
    before = logits.clone()
    together = sample(logits, requests)
    assert torch.equal(logits, before)
    alone = [sample(logits[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    assert together == alone
    backwards = sample(logits.flip(0), requests[::-1])
    assert backwards[::-1] == together


def test_temperature_zero_and_top_k_one_take_the_likeliest() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(temperature=1e-40, seed=3),
        SamplingParams(top_p=1e-9, seed=4),
    ]
    assert sample(logits, [make_request(p) for p in params]) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    count = 20_000
    drawn = draw(logits, SamplingParams(temperature=temperature, seed=5), count)
    expected = torch.softmax(logits / temperature, dim=-1)
    for token in range(5):
        p = expected[token].item()
        # Five standard deviations of a binomial; the seed is fixed, so this cannot flicker.
        assert abs(drawn[token] / count - p) <= 5 * math.sqrt(p * (1 - p) / count)


PROBS = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 2}),
        ({"top_p": 0.66}, {1, 2, 3}),
        ({"min_p": 0.49}, {1, 2, 3}),
        ({"min_p": 0.51}, {1, 2}),
        ({"min_p": 1.0}, {1}),
        # Of what top_k leaves (0.4, 0.25, 0.2 of 0.85), 0.76 needs the first two only (0.65 / 0.85 = 0.765).
        ({"top_k": 3, "top_p": 0.76}, {1, 2}),
        ({"top_k": 3, "top_p": 0.77}, {1, 2, 3}),
        # min_p drops 0.05 and 0.1 first: 0.65 of the remaining 0.85.
        ({"min_p": 0.3, "top_p": 0.76}, {1, 2}),
        ({"min_p": 0.3, "top_p": 0.77}, {1, 2, 3}),
    ],
)
def test_truncation_keeps_exactly_the_right_tokens(params: dict[str, float], kept: set[int]) -> None:
    drawn = draw(PROBS.log(), SamplingParams(seed=1, **params), 3000)  # type: ignore[arg-type]
    assert set(drawn) == kept
    mass = sum(PROBS[token].item() for token in kept)
    for token in kept:
        p = PROBS[token].item() / mass
        assert abs(drawn[token] / 3000 - p) <= 5 * math.sqrt(p * (1 - p) / 3000)


def test_top_p_finds_its_mass_beyond_the_first_candidates() -> None:
    # A flat distribution: 0.9 of the mass needs 45,000 of 50,000 tokens, far more than are looked at first.
    logits = torch.zeros(50_000)
    logits[:25_000] += 0.01
    drawn = draw(logits, SamplingParams(top_p=0.5, seed=2), 200)
    assert all(token < 25_000 for token in drawn)
    assert max(drawn) > 12_500


def test_no_stopping_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2])
    for generated, expected in ((0, 3), (1, 3), (2, 1)):
        request = make_request(params, generated, eos=(1,))
        assert sample(logits, [request]) == [expected]


def test_random_numbers_depend_on_key_and_counter_only_and_are_spread_evenly() -> None:
    numbers = [uniform(key_from_seed(seed), i) for seed in range(20) for i in range(500)]
    assert numbers == [uniform(key_from_seed(seed), i) for seed in range(20) for i in range(500)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    buckets = Counter(int(number * 10) for number in numbers)
    assert all(abs(count - 1000) < 5 * math.sqrt(1000 * 0.9) for count in buckets.values())
