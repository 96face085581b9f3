"""A sequence's log-probabilities are bitwise the same however it is batched, chunked or cached."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import KVCache, TokenBatch, token_log_probs
from mainspring.ops.cpu.extension import unavailable_reason
from support.families import FAMILIES, Family, model_config

BLOCK_SIZE = 4
EXAMPLES = 3  # of each of some fifty kinds of model, place and dtype
# (device, backend)
PLACES = [
    pytest.param(("cpu", "reference"), id="cpu-reference"),
    pytest.param(
        ("cpu", "cpu"),
        id="cpu-kernels",
        marks=pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason())),
    ),
    pytest.param(("cuda", "reference"), id="cuda-reference", marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton"), id="cuda-triton", marks=pytest.mark.gpu),
]
Place = tuple[str, str]


@lru_cache(maxsize=64)
def _model(name: str, place: Place, dtype: torch.dtype) -> Decoder:
    family = next(f for f in FAMILIES if f.name == name)
    device, backend = place
    return create_model(model_config(family), dtype=dtype, device=device, backend=backend, seed=7)


@torch.no_grad()
def _paged_log_probs(
    model: Decoder, sequences: list[list[int]], chunk_sizes: list[int], order: torch.Generator
) -> list[torch.Tensor]:
    """Runs the sequences together through a paged cache: each step takes the next chunk of each of them."""
    config = model.config
    needed = [-(-len(s) // BLOCK_SIZE) for s in sequences]
    cache = KVCache.allocate(
        config.num_layers,
        1 + sum(needed),
        BLOCK_SIZE,
        config.num_kv_heads,
        config.head_dim,
        model.dtype,
        model.device,
    )
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(torch.nan)  # what was never written must never be read
    free = (1 + torch.randperm(sum(needed), generator=order)).tolist()
    tables = [[free.pop() for _ in range(n)] for n in needed]
    done = [0] * len(sequences)
    out: list[list[torch.Tensor]] = [[] for _ in sequences]
    step = 0
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        active = [i for i, s in enumerate(sequences) if done[i] < len(s)]
        lengths = [
            min(chunk_sizes[(step + i) % len(chunk_sizes)], len(sequences[i]) - done[i]) for i in active
        ]
        batch = TokenBatch.paged(
            lengths,
            [done[i] + n for i, n in zip(active, lengths, strict=True)],
            [tables[i] for i in active],
            cache,
            rope_lengths=[len(sequences[i]) for i in active],
        )
        tokens = torch.tensor(
            [t for i, n in zip(active, lengths, strict=True) for t in sequences[i][done[i] : done[i] + n]],
            device=model.device,
        )
        logits = model.logits(model(tokens, batch)).split(lengths)
        for i, n, rows in zip(active, lengths, logits, strict=True):
            targets = torch.tensor(
                sequences[i][done[i] + 1 : done[i] + n + 1], dtype=torch.int64, device=model.device
            )
            out[i].append(token_log_probs(rows[: len(targets)], targets, policy=model.policy))
            done[i] += n
        step += 1
    return [torch.cat(pieces) for pieces in out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=4),
    chunk_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_log_probs_do_not_depend_on_batch_chunks_or_cache(
    family: Family, place: Place, dtype: torch.dtype, lengths: list[int], chunk_sizes: list[int], seed: int
) -> None:
    model = _model(family.name, place, dtype)
    random = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, 97, (n,), generator=random).tolist() for n in lengths]
    with torch.no_grad():
        alone = [model.log_probs([s])[0] for s in sequences]
        together = model.log_probs(sequences)
    chunked = _paged_log_probs(model, sequences, chunk_sizes, random)
    token_by_token = _paged_log_probs(model, sequences[:1], [1], random)
    for i in range(len(sequences)):
        assert torch.equal(alone[i], together[i])
        assert torch.equal(alone[i], chunked[i])
    assert torch.equal(alone[0], token_by_token[0])
    assert torch.isfinite(alone[0]).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_recording_gradients_does_not_change_the_bits(family: Family, place: Place) -> None:
    model = _model(family.name, place, torch.float32)
    sequences = [list(range(1, 60)), [5, 4, 3], list(range(40, 80))]
    with torch.no_grad():
        expected = model.log_probs(sequences, temperature=0.7)
    recorded = model.log_probs(sequences, temperature=0.7)
    for a, b in zip(recorded, expected, strict=True):
        assert torch.equal(a, b)
    assert all(piece.requires_grad for piece in recorded)


@pytest.mark.parametrize("place", PLACES)
def test_log_probs_agree_with_the_definition_and_have_its_gradient(place: Place) -> None:
    model = _model("qwen3", place, torch.float32)
    sequences = [list(range(1, 50)), [5, 4, 3]]
    tokens = torch.tensor([t for s in sequences for t in s], device=model.device)
    logits = model.logits(model(tokens, TokenBatch.packed([49, 3], model.device)))
    weights = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(model.device)
    plain = torch.log_softmax(logits / 0.7, dim=-1)
    expected = torch.cat(
        [plain[:48].gather(1, tokens[1:49, None])[:, 0], plain[49:51].gather(1, tokens[50:, None])[:, 0]]
    )
    got = torch.cat(model.log_probs(sequences, temperature=0.7))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    ours = torch.autograd.grad((got * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
