"""The flash-attention operators: gradients of the formula, what a compiler is told of them, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.flash_attention import flash_attention, flash_attention_op
from mainspring.ops.policy import Policy
from mainspring.ops.registry import Call

REFERENCE = Policy("fast", "reference")
CASES = {
    "full": (False, None, None),
    "causal": (True, None, None),
    "window": (True, 3, None),
    "cap": (True, None, 2.0),
    "all": (True, 2, 1.5),
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three sequences of 4, 1 and 3 queries over 4, 3 and 2 keys: the last one's first query sees none causally."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(8, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(9, 2, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    cu_q, cu_k = torch.tensor([0, 4, 5, 8], dtype=torch.int32), torch.tensor([0, 4, 7, 9], dtype=torch.int32)
    return q, k, v, cu_q, cu_k


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    causal, window, softcap = CASES[case]
    q, k, v, cu_q, cu_k = inputs()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(
            q, k, v, cu_q, cu_k, max_q=4, max_k=4, scale=0.6, causal=causal, window=window, softcap=softcap,
            policy=REFERENCE,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (q, k, v)])
    if causal:
        assert (run(q, k, v)[5] == 0).all()


def test_one_query_against_a_loop() -> None:
    q, k, v, cu_q, cu_k = inputs()
    out = flash_attention(q, k, v, cu_q, cu_k, max_q=4, max_k=4, scale=0.6, softcap=2.0, policy=REFERENCE)
    for head in range(4):  # the query of the second sequence sees its three keys
        scores = 2.0 * torch.tanh(k[4:7, head // 2] @ q[4, head] * 0.6 / 2.0)
        expected = torch.softmax(scores, 0) @ v[4:7, head // 2]
        torch.testing.assert_close(out[4, head], expected)


@pytest.mark.parametrize("case", ["causal", "all"])
def test_the_operator_tells_a_compiler_the_truth(case: str) -> None:
    causal, window, softcap = CASES[case]
    q, k, v, cu_q, cu_k = inputs(torch.float32)
    arguments = (4, 4, 0.6, causal, window or 0, softcap or 0.0, False, "reference")
    tensors = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(flash_attention_op, (*tensors, cu_q, cu_k, *arguments))


def test_it_can_be_compiled_whole() -> None:
    q, k, v, cu_q, cu_k = inputs(torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attention(q, k, v, cu_q, cu_k, max_q=4, max_k=4, scale=0.6, policy=REFERENCE)
        return (out * out).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (9, 3, 5), "v": (9, 3, 5)}, "3 key heads must divide the 4 query heads"),
        ({"v": (9, 2, 6)}, "must be"),
        ({"scale": 0.0}, "scale must be above 0, not 0.0"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": -1.0}, "softcap must be above 0 or None, not -1.0"),
        ({"cu_q": torch.zeros(3, dtype=torch.int32)}, "cu_q and cu_k"),
        ({"cu_k": torch.zeros(4, dtype=torch.int64)}, "int32"),
    ],
)
def test_what_it_refuses(change: dict[str, object], message: str) -> None:
    names = ("q", "k", "v", "cu_q", "cu_k")
    arguments: dict[str, object] = dict(zip(names, inputs(), strict=True)) | {"scale": 1.0}
    for name, value in change.items():
        arguments[name] = torch.zeros(value, dtype=torch.float64) if isinstance(value, tuple) else value
    with pytest.raises(BackendError, match=message):
        flash_attention(max_q=4, max_k=4, **arguments)


def test_the_cuda_kernels_say_why_they_refuse() -> None:
    from mainspring.ops.cuda.support import refuses

    fast = Policy("fast")
    assert "not on cpu" in str(refuses(Call("cpu", torch.bfloat16, fast, True, 64)))
    assert "not in torch.float32" in str(refuses(Call("cuda", torch.float32, fast, True, 64)))
    assert "64, 96, 128, 192, 256, not 80" in str(refuses(Call("cuda", torch.bfloat16, fast, True, 80)))
