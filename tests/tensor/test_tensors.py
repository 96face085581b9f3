"""Tensors as objects: views, indexing, exchange with other libraries, random numbers, memory, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

import mainspring.tensor as mt
from mainspring.errors import MainspringError
from tensor.cases import as_torch

KINDS = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


def test_nested_lists_decide_shape_and_dtype() -> None:
    assert mt.tensor([[1, 2], [3, 4]]).dtype == mt.int64
    assert mt.tensor([1, 2.5]).dtype == mt.float32
    assert mt.tensor([True, False]).dtype == mt.bool
    assert mt.tensor([[], []]).shape == (2, 0)
    assert mt.tensor(3).shape == ()
    assert mt.tensor([1, 2], dtype=mt.float64).tolist() == [1.0, 2.0]
    assert mt.tensor([2**62 + 1]).item() == 2**62 + 1
    for ragged in ([[1], [1, 2]], [1, [2]], [[1], 2], [[], [1]]):
        with pytest.raises(mt.ShapeError, match="ragged"):
            mt.tensor(ragged)


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        slice(1, None),
        slice(None, None, 2),
        slice(5, 2),
        None,
        ...,
        (0, 1),
        (slice(None), 0),
        (..., 0),
        (None, 1, ..., slice(0, 2)),
        (0, 1, 2),
        (slice(1, 3), None, 0),
    ],
)
def test_basic_indexing_is_numpys_and_shares_memory(key: object) -> None:
    array = np.arange(60.0).reshape(3, 4, 5)
    x = mt.from_numpy(array)
    part = x[key]
    np.testing.assert_array_equal(part.numpy(), array[key])
    x[key] = -1.0
    expected = np.arange(60.0).reshape(3, 4, 5)
    expected[key] = -1.0
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(part.numpy(), expected[key])


def test_masks_and_lists_pick_elements() -> None:
    array = np.arange(12.0).reshape(3, 4)
    x = mt.tensor(array)
    np.testing.assert_array_equal(x[x > 5].numpy(), array[array > 5])
    rows = mt.tensor([True, False, True])
    np.testing.assert_array_equal(x[rows].numpy(), array[[0, 2]])
    np.testing.assert_array_equal(x[[2, 0, -1]].numpy(), array[[2, 0, -1]])
    np.testing.assert_array_equal(x[:, mt.tensor([[1, 3]])].numpy(), array[:, [[1, 3]]])
    x[x > 5] = 0
    assert x.sum().item() == 15


@pytest.mark.parametrize("key", [3, (0, 0, 0), "a", 1.5, (..., ...)])
def test_a_wrong_index_says_so(key: object) -> None:
    with pytest.raises((mt.IndexOutOfRangeError, mt.DTypeError)):
        mt.zeros(3, 4)[key]


def test_iteration_and_unpacking_follow_the_first_dimension() -> None:
    a, b = mt.tensor([[1, 2], [3, 4]])
    assert (a.tolist(), b.tolist()) == ([1, 2], [3, 4])
    assert len(mt.zeros(4, 2)) == 4
    with pytest.raises(TypeError):
        len(mt.tensor(1.0))


def test_one_object_for_one_tensor() -> None:
    x = mt.ones(2, requires_grad=True)
    x.sum().backward()
    assert x.grad is x.grad
    assert x.contiguous() is x
    ref = weakref.ref(x)
    del x
    assert ref() is None


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_shared_with_torch_both_ways(kind: str) -> None:
    reference = torch.zeros(3, 4, dtype=getattr(torch, kind)).T
    x = mt.from_dlpack(reference)
    assert (x.shape, x.stride(), x.data_ptr()) == ((4, 3), (1, 4), reference.data_ptr())
    reference[1, 2] = 1
    assert x[1, 2].item() == 1
    back = torch.from_dlpack(x)
    assert back.data_ptr() == x.data_ptr()
    del reference, x
    assert back[1, 2].item() == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bfloat16"])
def test_memory_is_shared_with_numpy_both_ways(kind: str) -> None:
    array = np.zeros((3, 4), dtype=kind)[:, ::2]
    x = mt.from_numpy(array)
    assert (x.dtype, x.data_ptr()) == (getattr(mt, kind), array.ctypes.data)
    for view in (np.asarray(x), x.numpy(), np.from_dlpack(x)):
        assert view.ctypes.data == array.ctypes.data
        assert view.strides == array.strides
    copied = mt.tensor(array)
    array[0, 0] = 1
    assert (x[0, 0].item(), copied[0, 0].item()) == (1, 0)
    assert np.array(x).ctypes.data != array.ctypes.data


def test_dlpack_honours_copy_and_version() -> None:
    x = mt.ones(2)
    assert "dltensor_versioned" in repr(x.__dlpack__(max_version=(1, 0)))
    assert '"dltensor"' in repr(x.__dlpack__())
    copied = mt.from_dlpack(x.__dlpack__(copy=True))
    copied.zero_()
    assert x.tolist() == [1, 1]
    assert x.__dlpack_device__() == (1, 0)
    capsule = x.__dlpack__()
    mt.from_dlpack(capsule)
    with pytest.raises(mt.ValueOutOfRangeError, match="unused"):
        mt.from_dlpack(capsule)
    with pytest.raises(mt.ValueOutOfRangeError, match="CPU"):
        x.__dlpack__(dl_device=(2, 0))


def test_what_cannot_be_shared_is_refused() -> None:
    x = mt.ones(2, requires_grad=True)
    for share in (np.asarray, lambda t: t.numpy(), torch.from_dlpack):
        with pytest.raises((mt.AutogradError, BufferError), match="detach"):
            share(x)
    with pytest.raises(mt.DTypeError, match="bfloat16"):
        mt.ones(2, dtype=mt.bfloat16).numpy()
    frozen = np.ones(2)
    frozen.flags.writeable = False
    with pytest.raises((mt.ValueOutOfRangeError, BufferError)):
        mt.from_numpy(frozen)
    assert mt.tensor(frozen).tolist() == [1, 1]
    with pytest.raises(mt.DTypeError, match="format"):
        mt.tensor(np.ones(2, dtype=np.complex64))


def test_random_numbers_follow_seed_and_state() -> None:
    g = mt.Generator(7)
    first = mt.randn(5, generator=g)
    state = json.loads(json.dumps(g.get_state()))
    second = mt.rand(3, generator=g)
    g.set_state(tuple(state))
    assert mt.rand(3, generator=g).tolist() == second.tolist()
    assert mt.randn(5, generator=mt.Generator(7)).tolist() == first.tolist()
    assert mt.randn(5, generator=mt.Generator(8)).tolist() != first.tolist()


def test_random_numbers_have_their_distribution() -> None:
    n = 200_000
    normal, uniform = mt.randn(n, dtype=mt.float64).numpy(), mt.rand(n, dtype=mt.float64).numpy()
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    assert abs((normal**4).mean() - 3) < 0.1
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.005
    counts = np.bincount(mt.randint(-2, 3, (n,)).numpy() + 2, minlength=5)
    assert (abs(counts / n - 0.2) < 0.01).all()


def test_philox_gives_the_published_numbers() -> None:
    """Known answer of Random123 for counter and key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [(w >> 8) * 2.0**-24 for w in words]
    assert mt.rand(4, generator=mt.Generator(0)).tolist() == expected


def test_writes_in_place_reach_every_view_and_count() -> None:
    x = mt.zeros(2, 3)
    row, version = x[1], x._version
    row += 2
    x.mul_(3).sub_(1).div_(2)
    assert x.tolist() == [[-0.5] * 3, [2.5] * 3]
    assert row._version == x._version == version + 4
    x[0] = row
    x.copy_(mt.tensor([1, 2, 3]))
    assert x.tolist() == [[1, 2, 3]] * 2
    y = mt.arange(4)
    y[1:].copy_(y[:-1])  # overlapping
    assert y.tolist() == [0, 0, 1, 2]
    with pytest.raises(mt.DTypeError, match="cannot be written"):
        y.add_(0.5)
    with pytest.raises(mt.ShapeError, match="does not fit"):
        row.add_(x)


def test_memory_is_used_again() -> None:
    mt.empty_cache()
    x = mt.zeros(1000, 1000)
    used = mt.memory_stats()
    address = x.data_ptr()
    del x
    freed = mt.memory_stats()
    assert used["used_bytes"] - freed["used_bytes"] >= 4_000_000
    assert freed["cached_bytes"] >= 4_000_000
    x = mt.zeros(1000, 1000)
    assert x.data_ptr() == address
    del x
    mt.empty_cache()
    assert mt.memory_stats()["cached_bytes"] == 0


def test_threads_may_work_at_once() -> None:
    results: list[float] = []

    def work() -> None:
        x = mt.ones(300, 300, requires_grad=True)
        for _ in range(5):
            (x @ x).sum().backward()
        results.append(x.grad.sum().item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 4


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (lambda: mt.add(mt.zeros(2, 3), mt.zeros(4)), mt.ShapeError, ["add", "[2, 3]", "[4]", "broadcast"]),
        (
            lambda: mt.zeros(2, 3) @ mt.zeros(4, 5),
            mt.ShapeError,
            ["matmul", "float32[2, 3]", "float32[4, 5]"],
        ),
        (
            lambda: mt.ones(2, 2) @ mt.ones(2, 2, dtype=mt.float64),
            mt.DTypeError,
            ["matmul", "float32", "float64"],
        ),
        (lambda: mt.arange(3).mean(), mt.DTypeError, ["mean", "int64[3]"]),
        (lambda: mt.zeros(2, 3).reshape(4), mt.ShapeError, ["reshape", "float32[2, 3]", "[4]"]),
        (lambda: mt.zeros(2, 3).reshape(-1, -1), mt.ShapeError, ["reshape"]),
        (lambda: mt.zeros(2, 3).sum(2), mt.IndexOutOfRangeError, ["sum", "dimension 2", "-2 to 1"]),
        (lambda: mt.zeros(2, 3).sum((0, 0)), mt.IndexOutOfRangeError, ["sum", "twice"]),
        (lambda: mt.zeros(2).item(), mt.ValueOutOfRangeError, ["item", "2 elements"]),
        (lambda: mt.softmax(mt.arange(3), 0), mt.DTypeError, ["softmax", "int64[3]"]),
        (
            lambda: mt.embedding(mt.tensor([5]), mt.zeros(3, 2)),
            mt.IndexOutOfRangeError,
            ["index 5", "size 3"],
        ),
        (
            lambda: mt.cross_entropy(mt.zeros(2, 3), mt.tensor([0, 3])),
            mt.IndexOutOfRangeError,
            ["target 3", "row 1"],
        ),
        (lambda: mt.gelu(mt.zeros(2), "fast"), mt.ValueOutOfRangeError, ["gelu", "'fast'", "'tanh'"]),
        (lambda: mt.linear(mt.zeros(2, 3), mt.zeros(4, 5)), mt.ShapeError, ["linear", "[2, 3]", "[4, 5]"]),
        (lambda: mt.exp("x"), mt.DTypeError, ["exp", "`input`", "str"]),
        (lambda: mt.zeros(2).sum(dim="x"), mt.DTypeError, ["sum", "`dim`", "str"]),
        (lambda: mt.zeros(2).sum(axis=0), TypeError, ["axis"]),
        (lambda: mt.add(mt.zeros(2)), TypeError, ["add", "other"]),
        (lambda: mt.add(1, 2, 3), TypeError, ["add", "2 arguments"]),
        (lambda: mt.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1), mt.ShapeError, ["8"]),
        (lambda: mt.zeros(-1), mt.ShapeError, ["negative"]),
        (lambda: mt.zeros(2**40, 2**40), mt.ShapeError, ["too large"]),
        (lambda: mt.cat([mt.zeros(2, 3), mt.zeros(2, 4)]), mt.ShapeError, ["cat", "[2, 4]"]),
        (lambda: ~mt.zeros(2), mt.DTypeError, ["bool", "float32[2]"]),
        (lambda: bool(mt.zeros(2)), ValueError, ["ambiguous"]),
        (lambda: mt.Tensor([1.0]), TypeError, ["tensor(data)"]),
        (
            lambda: mt.tensor(0.5).requires_grad_() and mt.tensor(1).requires_grad_(),
            mt.DTypeError,
            ["int64[]"],
        ),
        (lambda: mt.set_num_threads(0), mt.ValueOutOfRangeError, ["0 threads"]),
        (lambda: mt.dropout(mt.zeros(2), 1.5), mt.ValueOutOfRangeError, ["dropout", "1.5"]),
    ],
)
def test_errors_name_the_op_the_shapes_and_the_dtypes(
    call: object, kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert kind in (TypeError, ValueError) or isinstance(caught.value, MainspringError)
    caught._excinfo = None  # its frames hold tensors


def test_printing_shows_values_dtype_and_tape() -> None:
    assert repr(mt.tensor([1, 2])) == "tensor([1, 2])"
    assert repr(mt.tensor([1.5], dtype=mt.float64)) == "tensor([1.5], dtype=float64)"
    assert repr(mt.zeros(2000)) == "tensor(..., shape=[2000])"
    x = mt.ones(1, requires_grad=True)
    assert repr(x) == "tensor([1.0], requires_grad=True)"
    assert repr(x * 2) == "tensor([2.0], grad_fn=<mul>)"


def test_shared_results_keep_their_dtype_in_torch() -> None:
    assert as_torch(mt.ones(2, dtype=mt.bfloat16)).dtype == torch.bfloat16


def test_import_needs_no_torch_and_a_missing_extension_names_the_fix() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mainspring.tensor as mt\n"
        "x = mt.ones(2, requires_grad=True); (x * x).sum().backward(); assert x.grad.tolist() == [2, 2]\n"
        "assert 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.modules['mainspring.tensor._tensor'] = None\nimport mainspring.tensor"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "BackendError" in done.stderr
    assert "pip install" in done.stderr


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    code = (
        "import mainspring.tensor as mt\n"
        "x = mt.randn(37, 53, generator=mt.Generator(3), requires_grad=True)\n"
        "w = mt.randn(29, 53, generator=mt.Generator(4))\n"
        "y = mt.gelu(mt.layer_norm(mt.linear(x, w)))\n"
        "loss = mt.cross_entropy(y * y + mt.log(mt.exp(y) + 1), mt.zeros(37, dtype=mt.int64))\n"
        "loss.backward(); print(loss.item(), x.grad.sum().item(), mt.square(x.grad).sum().item())"
    )
    outputs = []
    for env in ({"MAINSPRING_CPU_ISA": isa}, {}):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"PATH": "", **env}
        )
        assert done.returncode == 0, done.stderr
        outputs.append([float(word) for word in done.stdout.split()])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6)
