"""Triton's sampler is the reference: the same floors, the same tokens, the same logits; each row's bits its own."""

from __future__ import annotations

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.ops import Policy, adjust_logits, sample
from mainspring.ops.sample import floors
from mainspring.ops.sampling_tensors import SamplingTensors
from support.memory import in_poisoned_memory
from support.sampling import random_logits, random_seats, to_device
from support.triton_kernels import (
    DEVICE,
    EXAMPLES,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
)

pytestmark = [*needs_triton, in_poisoned_memory]

TRITON = Policy("lockstep", "triton")
REFERENCE = Policy("lockstep", "reference")
SEATS = 4
VOCABULARIES = [1, 17, 1000, 4097] if INTERPRETED else [1, 17, 1000, 49152, 151936]


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.sampled_from(VOCABULARIES), truncate=st.booleans())
def test_tokens_are_the_references_and_the_same_alone(seed: int, vocab: int, truncate: bool) -> None:
    params = to_device(random_seats(seed, SEATS, vocab, truncate), DEVICE)
    logits = random_logits(seed, SEATS, vocab).to(DEVICE)
    seats = torch.randperm(SEATS, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    positions = seats + seed
    tokens = sample(logits, params, seats, positions, truncate=truncate, policy=TRITON)
    expected = sample(logits, params, seats, positions, truncate=truncate, policy=REFERENCE)
    different = (tokens != expected).nonzero()[:, 0]
    # Logarithms differ in their last bits from torch's on a GPU; where two scores are that close, either may win.
    assert len(different) <= (0 if INTERPRETED else 1)
    for row in (0, SEATS - 1):
        one = slice(row, row + 1)
        alone = sample(logits[one], params, seats[one], positions[one], truncate=truncate, policy=TRITON)
        assert torch.equal(alone, tokens[one])


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from(VOCABULARIES),
    candidates=st.sampled_from([16, 256, 8192]),
)
def test_floors_keep_what_the_references_keep(seed: int, vocab: int, candidates: int) -> None:
    from mainspring.ops.triton import sample_floors

    params = to_device(random_seats(seed, SEATS, vocab), DEVICE)
    logits = random_logits(seed, SEATS, vocab).to(DEVICE)
    seats = torch.arange(SEATS, device=DEVICE)
    # With few candidates the search goes by levels, and through the whole row where they are not enough.
    with mock.patch.object(sample_floors, "CANDIDATES", candidates):
        ours = logits >= sample_floors.floors(logits, params, seats)[:, None]
    theirs = logits >= floors(logits, params, seats)[:, None]
    # A mass of 2^-40 more or less decides about a token or two where thousands are nearly equal.
    assert (ours != theirs).sum() <= (0 if INTERPRETED else 2)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from(VOCABULARIES),
    parts=st.sets(st.sampled_from(["history", "bias", "bitmask"])),
)
def test_adjusted_logits_are_the_references(seed: int, vocab: int, parts: set[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingTensors.allocate(SEATS)
    params.repetition.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    params.frequency.copy_(torch.tensor([0.0, 0.5, 0.25, 0.0]))
    params.presence.copy_(torch.tensor([0.0, 0.0, 1.0, -1.5]))
    params.biased.copy_(torch.tensor([0, 1, 0, 1]))
    params = to_device(params, DEVICE)
    logits = random_logits(seed, SEATS, vocab).to(DEVICE)
    tensors = {
        "history": torch.randint(0, 5, (SEATS, vocab), generator=generator, dtype=torch.int32),
        "bias": torch.randn(SEATS, vocab, generator=generator),
        "bitmask": torch.randint(-(2**31), 2**31, (SEATS, -(-vocab // 32)), generator=generator).to(
            torch.int32
        ),
    }
    given = {name: tensors[name].to(DEVICE) if name in parts else None for name in tensors}
    seats = torch.randperm(SEATS, generator=generator).to(DEVICE)
    result = adjust_logits(logits, params, seats, policy=TRITON, **given)
    expected = adjust_logits(logits, params, seats, policy=REFERENCE, **given)
    # A device's fused multiply-add rounds once where the formula rounds twice.
    torch.testing.assert_close(
        result, expected, rtol=0 if INTERPRETED else 1e-6, atol=0 if INTERPRETED else 1e-6
    )
    last = slice(SEATS - 1, SEATS)
    if given["bitmask"] is not None:
        given["bitmask"] = given["bitmask"][last]
    assert_same_bits(adjust_logits(logits[last], params, seats[last], policy=TRITON, **given), result[last])
