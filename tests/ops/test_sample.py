"""Tokens are drawn from exactly the right distribution, and a row's token is the same in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import Policy, adjust_logits, sample
from mainspring.ops.sample import floors, token_noise
from mainspring.ops.sampling_tensors import SamplingTensors
from support.sampling import random_logits, random_seats

REFERENCE = Policy("lockstep", "reference")
CPU = Policy("lockstep", "cpu")
SEATS = 6

# The 0.9999 quantile of chi-squared for 1 to 12 degrees of freedom (Abramowitz and Stegun, table 26.8, extended).
CHI_SQUARED = [15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56, 37.37, 39.13]


def draws(logits: Tensor, count: int, *, by_position: bool = True, **fields: float) -> Tensor:
    """[count] tokens from one row of logits, at as many positions of one key or at one position of as many keys."""
    params = SamplingTensors.allocate(1 if by_position else count)
    params.temperature.fill_(1.0)
    for name, value in fields.items():
        getattr(params, name).fill_(value)
    index = torch.arange(count)
    params.key.copy_(torch.tensor([12345]) if by_position else index * 7)
    seats = torch.zeros_like(index) if by_position else index
    return sample(logits.expand(count, -1), params, seats, index, policy=REFERENCE if by_position else CPU)


def assert_follows(tokens: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-squared at a level of 1e-4; what has no probability never comes. Seeds are fixed: no flicker."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * len(tokens)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert statistic < CHI_SQUARED[int(possible.sum()) - 2]


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 1.5, -3.0, 0.5])


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature: float, by_position: bool) -> None:
    tokens = draws(LOGITS, 10_000, by_position=by_position, temperature=temperature)
    assert_follows(tokens, torch.softmax(LOGITS / temperature, -1))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 3}, [0, 1, 5]),
        ({"top_p": 0.7}, [0, 1, 5]),
        ({"min_p": 0.2}, [0, 1, 5, 7]),
        ({"top_k": 3, "top_p": 0.75}, [0, 5]),
        ({"min_p": 0.1, "top_k": 5, "top_p": 0.9}, [0, 1, 5, 7]),
    ],
)
def test_draws_follow_the_truncated_softmax(fields: dict[str, float], kept: list[int]) -> None:
    probabilities = torch.zeros(len(LOGITS))
    probabilities[kept] = torch.softmax(LOGITS[kept], -1)
    assert_follows(draws(LOGITS, 10_000, **fields), probabilities)


def test_unlikely_tokens_come_as_rarely_as_they_should_among_many() -> None:
    # 20,000 tokens that share a hundredth of the mass: each is far beyond the reach of 16 random bits.
    vocab = 20_000
    logits = torch.full((vocab,), math.log(1e-2 / (vocab - 1)))
    logits[777] = math.log1p(-1e-2)
    rare = (draws(logits, 5000, by_position=False) != 777).sum().item()
    assert abs(rare - 50) <= 4 * math.sqrt(50)


def test_noise_is_uniform_before_its_logarithms_and_of_each_token_its_own() -> None:
    noise = token_noise(torch.tensor([3, 3, 4]), torch.tensor([0, 1, 0]), 4001)
    uniform = torch.exp(-torch.exp(-noise.double()))
    for row in uniform:
        buckets = torch.histc(row, 10, 0.0, 1.0)
        assert ((buckets - 400.1) ** 2 / 400.1).sum() < CHI_SQUARED[8]
    assert noise.unique().numel() > 0.999 * noise.numel()
    correlations = torch.corrcoef(torch.cat([uniform[:, :-1], uniform[:1, 1:]]))
    assert (correlations - torch.eye(4)).abs().max() < 5 / math.sqrt(4000)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.sampled_from([1, 2, 17, 1000, 20001]))
def test_a_row_gets_the_same_token_alone_in_any_batch_and_from_any_implementation(
    seed: int, vocab: int
) -> None:
    params = random_seats(seed, SEATS, vocab)
    logits = random_logits(seed, SEATS, vocab)
    seats = torch.randperm(SEATS, generator=torch.Generator().manual_seed(seed))
    positions = seats * 3 + seed
    before = logits.clone()
    together = sample(logits, params, seats, positions, policy=CPU)
    assert torch.equal(logits, before)
    assert torch.equal(sample(logits, params, seats, positions, policy=REFERENCE), together)
    alone = [sample(logits[i : i + 1], params, seats[i : i + 1], positions[i : i + 1]) for i in range(SEATS)]
    assert torch.equal(torch.cat(alone), together)


def test_temperature_zero_and_its_neighbours_take_the_likeliest() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    params = SamplingTensors.allocate(4)
    params.temperature.copy_(torch.tensor([0.0, 1.0, 1e-40, 1.0]))
    params.top_k.copy_(torch.tensor([0, 1, 0, 0]))
    params.top_p[3] = 1e-9
    index = torch.arange(4)
    assert torch.equal(sample(logits, params, index, index), logits.argmax(-1))


PROBS = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ("fields", "lowest"),
    [
        ({"top_k": 2}, 0.25),
        ({"top_p": 0.39}, 0.4),
        ({"top_p": 0.41}, 0.25),
        ({"top_p": 0.66}, 0.2),
        ({"min_p": 0.49}, 0.2),
        ({"min_p": 0.51}, 0.25),
        ({"min_p": 1.0}, 0.4),
        # Of what top_k leaves (0.4, 0.25, 0.2 of 0.85), 0.76 needs the first two only (0.65 / 0.85 = 0.765).
        ({"top_k": 3, "top_p": 0.76}, 0.25),
        ({"top_k": 3, "top_p": 0.77}, 0.2),
        # min_p drops 0.05 and 0.1 first: 0.65 of the remaining 0.85.
        ({"min_p": 0.3, "top_p": 0.76}, 0.25),
        ({"min_p": 0.3, "top_p": 0.77}, 0.2),
    ],
)
def test_truncation_keeps_exactly_the_right_tokens(fields: dict[str, float], lowest: float) -> None:
    params = SamplingTensors.allocate(1)
    params.temperature.fill_(1.0)
    for name, value in fields.items():
        getattr(params, name).fill_(value)
    logits = PROBS.log()[None]
    floor = floors(logits, params, torch.tensor([0]))
    kept = logits >= floor[:, None]
    assert torch.equal(kept, PROBS[None] >= lowest - 1e-6)


def test_equal_logits_share_their_fate() -> None:
    params = SamplingTensors.allocate(1)
    params.temperature.fill_(1.0)
    params.top_k.fill_(2)
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, -1.0]])
    assert (logits >= floors(logits, params, torch.tensor([0]))[:, None]).tolist() == [
        [True, True, True, True, False]
    ]


def test_top_p_finds_its_mass_beyond_the_first_candidates() -> None:
    # A flat distribution: half of the mass is in the 25,000 of 50,000 tokens that are a little likelier.
    logits = torch.zeros(50_000)
    logits[:25_000] += 0.01
    tokens = draws(logits, 100, by_position=False, top_p=0.5)
    assert tokens.max() < 25_000
    assert tokens.max() > 12_500


def test_a_row_without_possible_tokens_gives_the_first() -> None:
    params = SamplingTensors.allocate(1)
    params.temperature.fill_(1.0)
    params.top_p.fill_(0.5)
    zero = torch.zeros(1, dtype=torch.int64)
    for policy in (CPU, REFERENCE):
        assert sample(torch.full((1, 9), -torch.inf), params, zero, zero, policy=policy).item() == 0


def test_sample_refuses_what_does_not_fit() -> None:
    params = SamplingTensors.allocate(2)
    index = torch.arange(2)
    with pytest.raises(BackendError, match="float32"):
        sample(torch.zeros(2, 5).half(), params, index, index)
    with pytest.raises(BackendError, match=r"seats must be \[2\] int64"):
        sample(torch.zeros(2, 5), params, index[:1], index)


def test_adjusted_logits_are_masked_then_biased_then_penalised() -> None:
    v = 40
    params = SamplingTensors.allocate(3)
    params.repetition.copy_(torch.tensor([1.0, 2.0, 1.0]))
    params.frequency.copy_(torch.tensor([0.0, 0.5, 0.25]))
    params.presence.copy_(torch.tensor([0.0, 0.0, 1.0]))
    params.biased[1] = 1
    bias = torch.zeros(3, v)
    bias[1, 3], bias[1, 7] = 5.0, -torch.inf
    bias[2, 3] = 99.0  # seat 2 is not biased
    history = torch.zeros(3, v, dtype=torch.int32)
    history[1, 3] = 2 * 4  # four times in the completion
    history[1, 5] = 1  # in the prompt
    history[2, 3] = 2 * 2 + 1
    logits = torch.ones(3, v)
    logits[:, 5] = -1.0
    bitmask = torch.full((3, 2), -1, dtype=torch.int32)
    bitmask[2, 1] = ~(1 << 3)  # token 35
    seats = torch.tensor([2, 1, 0])
    before = logits.clone()
    result = adjust_logits(logits, params, seats, history=history, bias=bias, bitmask=bitmask[seats])
    assert torch.equal(logits, before)
    plain = logits[0].tolist()
    expected_2 = list(plain)
    expected_2[3] = 1 - 0.25 * 2 - 1.0
    expected_2[35] = -math.inf
    expected_1 = list(plain)
    expected_1[3] = (1 + 5) / 2 - 0.5 * 4
    expected_1[5] = -1 * 2
    expected_1[7] = -math.inf
    assert result.tolist() == [expected_2, expected_1, plain]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([1, 31, 33, 1000]),
    parts=st.sets(st.sampled_from(["history", "bias", "bitmask"])),
)
def test_the_cpu_adjusts_logits_as_the_formula_does(seed: int, vocab: int, parts: set[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingTensors.allocate(4)
    params.repetition.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    params.frequency.copy_(torch.tensor([0.0, 0.5, 0.25, 0.0]))
    params.presence.copy_(torch.tensor([0.0, 0.0, 1.0, -1.5]))
    params.biased.copy_(torch.tensor([0, 1, 0, 1]))
    seats = torch.randperm(4, generator=generator)
    words = torch.randint(-(2**31), 2**31, (4, -(-vocab // 32)), generator=generator).to(torch.int32)
    tensors = {
        "history": torch.randint(-9, 5, (4, vocab), generator=generator, dtype=torch.int32).clamp(min=0),
        "bias": torch.randn(4, vocab, generator=generator),
        "bitmask": words,
    }
    given_tensors = {name: tensor if name in parts else None for name, tensor in tensors.items()}
    logits = random_logits(seed, 4, vocab)
    ours = adjust_logits(logits, params, seats, policy=CPU, **given_tensors)
    theirs = adjust_logits(logits, params, seats, policy=REFERENCE, **given_tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours.data_ptr() != logits.data_ptr()


def test_adjust_logits_refuses_what_does_not_fit() -> None:
    params = SamplingTensors.allocate(2)
    logits, seats = torch.zeros(1, 40), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BackendError, match=r"bitmask must be \[1, 2\]"):
        adjust_logits(logits, params, seats, bitmask=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(BackendError, match=r"history must be \[2, 40\]"):
        adjust_logits(logits, params, seats, history=torch.zeros(2, 40))
