"""A whole training step, dense or with experts, compiles without a break in its graph and stays the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import KVCache, Numerics, TokenBatch
from support.families import FAMILIES, model_config

LENGTHS = [9, 4, 30]
DENSE, MIXTURE = "qwen3", "qwen3-moe"


def step_of(family: str, numerics: Numerics = "fast") -> tuple[Decoder, Tensor, Tensor, TokenBatch]:
    config = model_config(next(f for f in FAMILIES if f.name == family))
    model = create_model(config, numerics=numerics, seed=3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (sum(LENGTHS),), generator=generator)
    targets = tokens.roll(-1)
    targets[torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    return model, tokens, targets, TokenBatch.packed(LENGTHS)


def train(
    model: Decoder, tokens: Tensor, targets: Tensor, batch: TokenBatch, compiler: str | None
) -> list[Tensor]:
    """Three steps of plain gradient descent: the losses and the weights after them."""

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return model.loss(tokens, batch, targets)

    run = loss_of if compiler is None else torch.compile(loss_of, fullgraph=True, backend=compiler)
    losses = []
    for _ in range(3):
        loss = run(tokens, targets)
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("numerics", ["fast", "lockstep"])
@pytest.mark.parametrize("family", [DENSE, MIXTURE])
def test_a_traced_training_step_is_the_eager_one(family: str, numerics: Numerics) -> None:
    model, *inputs = step_of(family, numerics)
    torch.compiler.reset()
    eager = train(copy.deepcopy(model), *inputs, compiler=None)
    traced = train(model, *inputs, compiler="aot_eager")
    assert eager[0] > eager[2]
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("family", [DENSE, MIXTURE])
def test_the_default_compiler_takes_a_training_step(family: str) -> None:
    model, *inputs = step_of(family)
    torch.compiler.reset()
    eager = train(copy.deepcopy(model), *inputs, compiler=None)
    for a, b in zip(train(model, *inputs, compiler="inductor"), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [DENSE, MIXTURE])
def test_another_number_of_tokens_is_traced_again_only_once(family: str) -> None:
    """The number of tokens becomes a symbol, also where experts share them."""
    model, *_ = step_of(family)
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    block = model.layers[-1].mlp
    run = torch.compile(block, fullgraph=True, backend=counting)
    x = torch.randn(43, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for count in (43, 17, 29, 5):
        torch.testing.assert_close(run(x[:count]), block(x[:count]))
    assert len(graphs) == 2


@pytest.mark.parametrize("family", [DENSE, MIXTURE])
def test_a_traced_step_through_a_cache_has_the_bits_of_the_eager_one(family: str) -> None:
    config = model_config(next(f for f in FAMILIES if f.name == family))
    model = create_model(config, seed=3)
    tokens = torch.tensor([5, 17, 3, 88])
    torch.compiler.reset()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        cache = KVCache.allocate(
            config.num_layers, 6, 4, config.num_kv_heads, config.head_dim, torch.float32, "cpu"
        )
        for keys_or_values in (*cache.k, *cache.v):
            keys_or_values.fill_(0.1)
        with torch.no_grad():
            hidden = run(tokens, TokenBatch.paged([3, 1], [7, 4], [[3, 1], [5]], cache))
        found.append([hidden, *cache.k, *cache.v])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
