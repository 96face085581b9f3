"""Selective recomputation: the same gradients to the bit, less kept, and memory that comes and goes with the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mainspring.model.decoder import Decoder
from mainspring.ops import Policy
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.layout import Layout, Recompute
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.recompute import forget, forgettable
from mainspring.train.memory import activation_bytes
from parallel.models import tiny

TOKENS = 256
LENGTHS = [100, 3, 153]


def _share(kind: str, recompute: Recompute, numerics: str = "fast") -> ParallelDecoder:
    config = tiny(kind, hidden_size=64, intermediate_size=160, head_dim=16, moe_intermediate_size=96)
    model = Decoder(config, policy=Policy(numerics)).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    return parallelize(model, Layout(recompute=recompute), Mesh.single())


def _loss(share: ParallelDecoder) -> Tensor:
    tokens = torch.randint(0, share.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(4))
    batch = share.batch(LENGTHS)
    return share.loss_sum(share.run_stage(0, tokens, batch), batch, tokens.roll(-1)) / TOKENS


@pytest.mark.parametrize("numerics", ["fast", "lockstep"])
@pytest.mark.parametrize("kind", ["dense", "biased", "windowed", "moe-tied"])
def test_gradients_are_those_without_it_to_the_bit(kind: str, numerics: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    for recompute in ("none", "selective"):
        share = _share(kind, recompute, numerics)
        loss = _loss(share)
        loss.backward()
        gradients.append({name: p.grad for name, p in share.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(share.named_parameters()).keys()
    for name, expected in gradients[0].items():
        assert torch.equal(expected, gradients[1][name]), name


@pytest.mark.parametrize("kind", ["dense", "biased", "moe"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_a_layer_keeps_is_what_the_formula_says(kind: str, recompute: Recompute) -> None:
    """Of one layer in the middle, in float32: the storages that are full after its forward pass, no parameters."""
    share = _share(kind, recompute)
    known = {parameter.untyped_storage()._cdata for parameter in share.parameters()}
    update, residual = (torch.randn(TOKENS, 64, requires_grad=True) for _ in range(2))
    batch = share.batch([TOKENS])
    out = share._run_layer(2, (update, residual), batch, share.rotary.angles(batch))
    sizes = {
        storage._cdata: storage.nbytes()
        for tensor in _kept(out)
        if tensor.is_floating_point() and (storage := tensor.untyped_storage())._cdata not in known
    }
    measured = sum(size for size in sizes.values() if size >= TOKENS * 8 * 4)  # not statistics
    sharded = replace(
        share.layout, dp=2
    )  # whose modules these are; one device without recomputation has the plain ones
    expected = activation_bytes(share.config, sharded, 2, 4) * TOKENS
    assert measured == pytest.approx(expected, rel=0.1)


def _kept(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """All tensors that the graph behind the outputs keeps for its backward pass."""
    waiting = [tensor.grad_fn for tensor in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        yield from (value for value in saved if isinstance(value, Tensor))
        yield from (value for value in getattr(node, "saved_tensors", ()) if value is not None)


def test_selective_keeps_much_less_than_nothing_and_more_than_full() -> None:
    config = _share("dense", "none").config
    none, selective, full = (
        activation_bytes(config, Layout(recompute=r), 0, 2) for r in ("none", "selective", "full")
    )
    assert full < selective < 0.7 * none


def test_memory_is_empty_until_the_gradient_comes_and_a_later_backward_needs_no_order() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(3, 4, requires_grad=True)
    calls = []

    def double(tensor: Tensor) -> Tensor:
        calls.append(1)
        return tensor * 2

    y = forgettable(double, x)
    z = y @ weight.t()
    forget(y, z)
    assert y.untyped_storage().nbytes() == 0
    z.square().sum().backward()
    assert len(calls) == 2
    expected_z = (2 * x @ weight.t()).detach()
    torch.testing.assert_close(weight.grad, 2 * expected_z.t() @ (2 * x).detach())
    torch.testing.assert_close(x.grad, 2 * 2 * expected_z @ weight.detach())
    again = forgettable(double, x.detach().requires_grad_())
    again.sum().backward()  # never forgotten, never restored
    assert len(calls) == 4


def test_nothing_is_forgotten_without_a_gradient_or_where_memory_is_shared() -> None:
    with torch.no_grad():
        y = forgettable(torch.exp, torch.ones(3))
        forget(y, y + 1)
    assert y.tolist() == [pytest.approx(2.718281828)] * 3
    x = torch.ones(4, requires_grad=True)
    part: Callable[[Tensor], Tensor] = partial(torch.narrow, dim=0, start=0, length=2)
    half = forgettable(lambda tensor: part(torch.exp(tensor)), x)
    after = half * 3
    forget(half, after)
    assert half.detach().tolist() == [pytest.approx(2.718281828)] * 2
