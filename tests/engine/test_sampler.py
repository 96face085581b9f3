"""The sampler by seats: every parameter does what it says, whoever sits beside, and counts survive a preemption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from mainspring.engine.hooks import SampleRows
from mainspring.engine.messages import EngineRequest
from mainspring.engine.random_numbers import key_from_seed
from mainspring.engine.request import Request
from mainspring.engine.sampler import SeatSampler
from mainspring.engine.sampling_params import SamplingParams
from mainspring.ops import SamplingTensors, sample

VOCAB = 50
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)


def make_request(params: SamplingParams, prompt: Sequence[int] = (0,), eos: tuple[int, ...] = ()) -> Request:
    key = key_from_seed(params.seed or 0)
    return Request(EngineRequest("r", list(prompt), params, eos, max_tokens=1000), key)


def seated(*requests: Request) -> SeatSampler:
    """A sampler with the requests in seats 0, 1, ..."""
    sampler = SeatSampler(len(requests), VOCAB, CPU)
    for seat, request in enumerate(requests):
        sampler.take_seat(seat, request)
    return sampler


def step(sampler: SeatSampler, logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """One token of each request (request i in seat i), appended to it."""
    index = torch.arange(len(requests))
    positions = torch.tensor([request.num_tokens for request in requests])
    if all(sampler.is_plain(request) for request in requests):
        tokens = sampler.sample_plain(logits, index, positions)
    else:
        rows = SampleRows(requests, [0] * len(requests), index, positions, None)
        tokens = sampler.sample(logits, rows)
    for request, token in zip(requests, tokens.tolist(), strict=True):
        request.token_ids.append(token)
    return tokens.tolist()


def penalised(logits: Tensor, request: Request) -> Tensor:
    """The formula, token by token."""
    params, result = request.params, logits.tolist()
    counts = Counter(request.token_ids[request.num_prompt :])
    for token in set(request.token_ids):
        r = params.repetition_penalty
        result[token] = result[token] / r if result[token] > 0 else result[token] * r
        result[token] -= params.frequency_penalty * counts[token] + params.presence_penalty * (
            counts[token] > 0
        )
    return torch.tensor(result)


def test_penalties_count_what_has_been_generated_also_after_a_preemption() -> None:
    params = replace(GREEDY, presence_penalty=0.3, frequency_penalty=0.4, repetition_penalty=1.3)
    request = make_request(params, prompt=[1, 2, 2, 9])
    plain = make_request(GREEDY)
    generator = torch.Generator().manual_seed(0)
    sampler = seated(plain, request)
    logits = torch.randn(2, VOCAB, generator=generator)
    for i in range(12):
        expected = int(penalised(logits[1], request).argmax())
        assert step(sampler, logits, [plain, request]) == [int(logits[0].argmax()), expected]
        if i == 5:  # it loses its seat and sits down elsewhere, where another penalised request was
            sampler = seated(plain, make_request(replace(params, presence_penalty=2.0), prompt=range(VOCAB)))
            sampler.take_seat(1, request)
    assert len(set(request.token_ids[4:])) > 3


def test_biased_and_allowed_tokens() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 7] = 5.0
    requests = [
        make_request(replace(GREEDY, logit_bias={3: 6.0, 7: -1.0})),
        make_request(replace(GREEDY, allowed_token_ids=[11, 12], logit_bias={12: 0.5})),
        make_request(GREEDY),
        make_request(SamplingParams(allowed_token_ids=[20, 21], seed=4)),
    ]
    sampler = seated(*requests)
    drawn = [step(sampler, logits, requests) for _ in range(20)]
    assert [row[:3] for row in drawn] == [[3, 12, 7]] * 20
    assert {row[3] for row in drawn} == {20, 21}


def test_a_seat_keeps_nothing_of_its_last_owner() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[:, 7] = 5.0
    sampler = seated(make_request(replace(GREEDY, logit_bias={7: -100.0}, presence_penalty=2.0), prompt=[7]))
    second = make_request(replace(GREEDY, logit_bias={8: 1.0}))
    sampler.take_seat(0, second)
    assert step(sampler, logits, [second]) == [7]


def test_no_stopping_before_min_tokens_also_among_drafts() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0] + [-9.0] * (VOCAB - 4)])
    params = replace(GREEDY, min_tokens=2, stop_token_ids=[2])
    request = make_request(params, eos=(1, VOCAB + 5))
    sampler = seated(request)
    assert [step(sampler, logits, [request])[0] for _ in range(3)] == [3, 3, 1]
    request = make_request(params, eos=(1,))
    sampler = seated(request)
    rows = SampleRows(
        [request] * 4, [0, 1, 2, 3], torch.zeros(4, dtype=torch.int64), torch.arange(1, 5), None
    )
    assert sampler.sample(logits.expand(4, -1), rows).tolist() == [3, 3, 1, 1]


def test_a_plain_request_gets_the_same_token_beside_an_adjusted_one() -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [make_request(SamplingParams(seed=i, top_p=0.9, top_k=20)) for i in range(5)]
    biased = make_request(SamplingParams(logit_bias={1: 3.0}, seed=9))
    logits = torch.randn(6, VOCAB, generator=generator) * 2
    before = logits.clone()
    alone = [step(seated(r), logits[i : i + 1], [r])[0] for i, r in enumerate(drawn)]
    for request in drawn:
        request.token_ids.pop()
    together = step(seated(*drawn, biased), logits, [*drawn, biased])
    assert together[:5] == alone
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_a_seat_samples_by_its_requests_parameters(seed: int) -> None:
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, min_p=0.01, seed=seed)
    request = make_request(params)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed & 0xFFFF))
    tensors = SamplingTensors.allocate(1)
    key = request.random_key
    tensors.key[0] = key - (1 << 64) if key >= 1 << 63 else key
    tensors.temperature[0], tensors.top_k[0], tensors.top_p[0], tensors.min_p[0] = 0.7, 9, 0.8, 0.01
    zero = torch.zeros(1, dtype=torch.int64)
    for _ in range(10):
        expected = sample(logits, tensors, zero, torch.tensor([request.num_tokens])).tolist()
        assert step(seated(request), logits, [request]) == expected
