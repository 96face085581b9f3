"""Every op against PyTorch's OpInfo database: values, dtypes, first and second gradients, errors, bfloat16."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.testing._internal import common_utils
from torch.testing._internal.opinfo import core

import mainspring.tensor as mt
from mainspring.errors import MainspringError
from tensor.cases import as_torch
from tensor.op_db import ADAPTERS, ENTRIES, Unsupported, leaves, to_ours

NAMES = sorted(ENTRIES)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool]
SAMPLES = 12  # of one entry and dtype

# Where PyTorch differs from NumPy and Python on purpose, or leaves the order open.
VALUES_DIFFER = {
    "argsort": "the order of equal elements is open",
    "nn.functional.rms_norm": "its default eps depends on the dtype",
}
NO_GRADIENT = {
    "digamma": "its derivative is trigamma, which we do not have",
    "nn.functional.hardsigmoid": "PyTorch multiplies by a 1/6 of float32",
}
NO_SECOND = {"lgamma": "its second derivative is trigamma"}
COARSE = {("addbmm", torch.float16)}  # rounded between product and sum; the float64 case holds the formula
TIES = {"sort", "topk", "kthvalue", "median"}


@contextmanager
def _untracked() -> Iterator[None]:
    """PyTorch looks for a unittest in the source of every frame of the stack, for each entry, to tell it of samples."""
    name = "extract_test_fn"
    with patch.object(common_utils, name, lambda: None), patch.object(core, name, lambda: None):
        yield


def samples(name: str, dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
    with warnings.catch_warnings(), _untracked():
        warnings.simplefilter("ignore")
        made = ENTRIES[name].sample_inputs("cpu", dtype, requires_grad=requires_grad)
        return list(itertools.islice(made, SAMPLES))


def call_ours(name: str, sample: Any) -> Any:
    return ADAPTERS[name](to_ours(sample.input), *to_ours(sample.args), **to_ours(sample.kwargs))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 0)


def check(got: Any, want: Any, loose: float = 1) -> None:
    mine, theirs = list(leaves(got)), list(leaves(want))
    if not theirs:
        assert got == want
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        a, b = as_torch(a), b.detach().resolve_conj().resolve_neg()
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        assert a.shape == b.shape, (a.shape, b.shape)
        bound = tolerance(b.dtype) * loose
        torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)


def test_at_least_150_entries_are_driven() -> None:
    assert len(NAMES) >= 150


def test_values_of_float32_in_brief() -> None:
    """The quick part: three samples of every entry."""
    for name in NAMES:
        if torch.float32 not in ENTRIES[name].dtypes or name in VALUES_DIFFER or name in TIES:
            continue
        for sample in samples(name, torch.float32)[:3]:
            try:
                want = ENTRIES[name](sample.input, *sample.args, **sample.kwargs)
                check(call_ours(name, sample), want)
            except Unsupported:
                continue


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_values_of_every_dtype(name: str) -> None:
    if name in VALUES_DIFFER:
        pytest.skip(VALUES_DIFFER[name])
    ran = 0
    for dtype in DTYPES:
        if dtype not in ENTRIES[name].dtypes:
            continue
        if (name, dtype) in COARSE:
            continue
        for sample in samples(name, dtype):
            try:
                want = ENTRIES[name](sample.input, *sample.args, **sample.kwargs)
                got = call_ours(name, sample)
            except Unsupported:
                continue
            if name in TIES and isinstance(got, tuple):  # which of equal elements comes first is open
                values, index = got
                check(values, want[0])
                dim = (
                    (sample.args[1:] or (-1,))[0]
                    if name in ("topk", "kthvalue")
                    else (sample.args or (-1,))[0]
                )
                dim = sample.kwargs.get("dim", dim)
                if values.ndim and values.ndim == sample.input.ndim:
                    check(mt.gather(to_ours(sample.input), dim, index), want[0])
            else:
                check(got, want)
            ran += 1
    assert ran > 0


def _gradients(outputs: list[Any], inputs: list[Any], weights: list[torch.Tensor], torchs: bool) -> list[Any]:
    total: Any = None
    for out, weight in zip(outputs, weights, strict=True):
        term = (out * (weight if torchs else mt.from_dlpack(weight))).sum()
        total = term if total is None else total + term
    if torchs:
        return list(torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True))
    if not total.requires_grad:
        return [None] * len(inputs)
    return list(mt.grad(total, inputs, create_graph=True, allow_unused=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in NAMES
        if ENTRIES[n].supports_autograd and torch.float64 in ENTRIES[n].dtypes and n not in NO_GRADIENT
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_first_and_second_gradients(name: str, layout: str) -> None:
    ran = 0
    for sample in samples(name, torch.float64, requires_grad=True):
        if ran == 5:
            break
        sample = sample.noncontiguous() if layout == "strided" else sample
        parts = (sample.input, sample.args, sample.kwargs)
        inputs = [t for t in leaves(parts) if t.requires_grad]
        ours = to_ours(parts)
        mine = [t for t in leaves(ours) if t.requires_grad]
        try:
            result = ADAPTERS[name](ours[0], *ours[1], **ours[2])
        except Unsupported:
            continue
        want = ENTRIES[name](sample.input, *sample.args, **sample.kwargs)
        if sample.output_process_fn_grad is not None and not isinstance(want, (tuple, list)):
            want = sample.output_process_fn_grad(want)
        wanted = [t for t in leaves(want) if t.is_floating_point()]
        given = [t for t in leaves(result) if t.dtype.is_floating_point]
        if not any(t.requires_grad for t in wanted):
            continue
        pairs = [(a, b) for a, b in zip(given, wanted, strict=True) if b.requires_grad]
        given, wanted = [a for a, _ in pairs], [b for _, b in pairs]
        weights = [torch.randn(t.shape, dtype=torch.float64) for t in wanted]
        first = _gradients(wanted, inputs, weights, torchs=True)
        got = _gradients(given, mine, weights, torchs=False)
        for a, b, leaf in zip(got, first, inputs, strict=True):
            zero = torch.zeros_like(leaf)
            check(mt.from_dlpack(zero.detach()) if a is None else a, zero if b is None else b)
        ran += 1
        if not ENTRIES[name].supports_gradgrad or name in NO_SECOND:
            continue
        wanted = [b for b in first if b is not None and b.requires_grad]
        if not wanted:
            continue
        given = [a for a, b in zip(got, first, strict=True) if b is not None and b.requires_grad]
        weights = [torch.randn(t.shape, dtype=torch.float64) for t in wanted]
        zeros = [torch.zeros_like(leaf) for leaf in inputs]
        second = _gradients(wanted, inputs, weights, torchs=True)
        if any(a is None for a in given):
            given = []
        got = _gradients(given, mine, weights, torchs=False) if given else [None] * len(inputs)
        for a, b, zero in zip(got, second, zeros, strict=True):
            check(mt.from_dlpack(zero.detach()) if a is None else a, zero if b is None else b, loose=10)
    assert ran > 0


# What PyTorch refuses here are devices and dtypes that we do not have, or calls that mean something with us.
NOTHING_TO_REFUSE = {
    "T",
    "t",
    "t_copy",
    "cat",
    "clamp_max",
    "clamp_min",
    "diff",
    "index_select",
    "masked_select",
    "median",
    "nn.functional.hardtanh",
    "isclose",
    "nn.functional.rms_norm",
    "nn.functional.softshrink",
    "take",
    "where",
    "rsub",
    "max|binary",
    "min|binary",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in NAMES
        if ENTRIES[n].error_inputs_func is not None
        and type(ENTRIES[n]).__name__ != "BinaryUfuncInfo"
        and n not in NOTHING_TO_REFUSE
    ],
)
def test_what_torch_refuses_is_refused(name: str) -> None:
    refused = 0
    for error in ENTRIES[name].error_inputs("cpu"):
        sample = error.sample_input
        try:
            parts = to_ours((sample.input, sample.args, sample.kwargs))
        except MainspringError:  # a dtype that we do not have
            continue
        try:
            ADAPTERS[name](parts[0], *parts[1], **parts[2])
        except Unsupported:
            continue
        except (MainspringError, TypeError, ValueError, IndexError):
            refused += 1
    assert refused > 0


ELEMENTWISE = [
    n
    for n in NAMES
    if torch.bfloat16 in ENTRIES[n].dtypes
    and torch.float64 in ENTRIES[n].dtypes
    and type(ENTRIES[n]).__name__ in ("UnaryUfuncInfo", "BinaryUfuncInfo", "ReductionOpInfo")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_err_no_more_than_torch(name: str, dtype: torch.dtype) -> None:
    """Against the same inputs in float64: twice torch's own error and one rounding are the limit."""
    if dtype not in ENTRIES[name].dtypes:
        pytest.skip("PyTorch has no such kernel")

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, (list, tuple)):
            return type(value)(wide(v) for v in value)
        return value

    for sample in samples(name, dtype):
        try:
            got = call_ours(name, sample)
        except Unsupported:
            continue
        if sample.kwargs.get("dtype") is not None:
            continue
        theirs = ENTRIES[name](sample.input, *sample.args, **sample.kwargs)
        kwargs = {k: wide(v) for k, v in sample.kwargs.items()}
        exact = ENTRIES[name](wide(sample.input), *wide(sample.args), **kwargs)
        for a, b, truth in zip(leaves(got), leaves(theirs), leaves(exact), strict=True):
            if not b.is_floating_point() or b.numel() == 0:
                continue
            mine = as_torch(a).double()
            known = truth.isfinite() & b.isfinite() & mine.isfinite()
            unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
            error, limit = (mine - truth).abs()[known], (b.double() - truth).abs()[known]
            rounding = (truth.abs() * unit)[known]
            if error.numel():
                assert (error.max() <= 2 * limit.max() + rounding.max() + 1e-7).item()
