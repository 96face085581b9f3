"""The tape: accumulation, hooks, modes, versions, what is kept and what is let go."""

from __future__ import annotations

import pytest

import mainspring.tensor as mt


def test_gradients_accumulate_until_they_are_forgotten() -> None:
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    for times in (1, 2):
        (x * x).sum().backward()
        assert x.grad.tolist() == [2.0 * times, 4.0 * times]
    x.grad = None
    (x + x * 3).sum().backward()
    assert x.grad.tolist() == [4.0, 4.0]


def test_a_gradient_is_no_alias_of_anything_else() -> None:
    x, y = mt.ones(2, requires_grad=True), mt.ones(2, requires_grad=True)
    seed = mt.ones(2)
    (x + y).backward(seed)
    x.grad.mul_(5)
    assert (y.grad.tolist(), seed.tolist()) == ([1, 1], [1, 1])


def test_broadcast_inputs_get_sums_in_their_shape_and_dtype() -> None:
    x = mt.ones(3, 1, requires_grad=True)
    s = mt.tensor(2.0, dtype=mt.float64, requires_grad=True)
    (x * s * mt.ones(2, 3, 4)).sum().backward()
    assert (x.grad.shape, x.grad.dtype, x.grad[0, 0].item()) == ((3, 1), mt.float32, 16.0)
    assert (s.grad.shape, s.grad.dtype, s.grad.item()) == ((), mt.float64, 24.0)


def test_a_used_tape_is_gone_unless_retained() -> None:
    x = mt.ones(2, requires_grad=True)
    y = mt.exp(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(mt.AutogradError, match="retain_graph"):
        y.backward()


def test_no_grad_and_enable_grad_nest_and_decorate() -> None:
    x = mt.ones(2, requires_grad=True)

    @mt.no_grad()
    def double(t: mt.Tensor) -> mt.Tensor:
        return t * 2

    with mt.no_grad():
        assert not (x * 2).requires_grad
        with mt.enable_grad():
            assert (x * 2).requires_grad
        assert not mt.is_grad_enabled()
    assert not double(x).requires_grad
    assert (x * 2).requires_grad
    with pytest.raises(ZeroDivisionError), mt.no_grad():
        raise ZeroDivisionError
    assert mt.is_grad_enabled()


def test_a_saved_tensor_that_was_written_is_noticed() -> None:
    x = mt.ones(2, requires_grad=True)
    w = mt.ones(2)
    y = (x * w).sum()
    w.add_(1)
    with pytest.raises(mt.AutogradError, match=r"mul: a float32\[2\].*in place.*version 1, saved at 0"):
        y.backward()
    y = mt.exp(x)
    with mt.no_grad():
        y.zero_()
    with pytest.raises(mt.AutogradError, match="exp"):
        y.sum().backward()


def test_writes_that_the_tape_cannot_follow_are_refused() -> None:
    x = mt.ones(2, requires_grad=True)
    for write in (
        lambda: x.add_(1),
        lambda: (x * 2).mul_(3),
        lambda: mt.zeros(2).copy_(x),
        lambda: x.__setitem__(0, 1.0),
    ):
        with pytest.raises(mt.AutogradError, match="in place"):
            write()
    with mt.no_grad():
        x.add_(1)
    assert x.tolist() == [2, 2]


def test_hooks_see_whole_gradients_and_may_change_them() -> None:
    x = mt.ones(2, requires_grad=True)
    seen: list[list[float]] = []
    handle = x.register_hook(lambda g: seen.append(g.tolist()))
    middle = x * 3
    inner = middle.register_hook(lambda g: g * 10)
    (middle + middle * middle + x).sum().backward()
    assert seen == [[211.0, 211.0]]
    assert x.grad.tolist() == [211.0, 211.0]
    handle.remove()
    inner.remove()
    x.grad = None
    (x * 2).sum().backward()
    assert (len(seen), x.grad.tolist()) == (1, [2.0, 2.0])
    x.register_hook(lambda g: mt.ones(5))
    with pytest.raises(mt.AutogradError, match=r"float32\[5\]"):
        x.sum().backward()


def test_an_error_in_a_hook_reaches_the_caller() -> None:
    x = mt.ones(2, requires_grad=True)
    x.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        x.sum().backward()


def test_gradients_of_the_middle_are_kept_on_wish() -> None:
    x = mt.ones(2, requires_grad=True)
    y, z = x * 2, x * 3
    y.retain_grad()
    (y * z).sum().backward()
    assert y.grad.tolist() == [3, 3]
    assert z.grad is None


def test_grad_leaves_the_leaves_alone() -> None:
    x, y = mt.ones(2, requires_grad=True), mt.ones(2, requires_grad=True)
    middle = x * 2
    by_x, by_middle = mt.grad((middle * middle).sum(), [x, middle])
    assert (by_x.tolist(), by_middle.tolist()) == ([8, 8], [4, 4])
    assert x.grad is None
    with pytest.raises(mt.AutogradError, match="allow_unused"):
        mt.grad(x.sum(), [y])
    assert mt.grad(x.sum(), [x, y], allow_unused=True)[1] is None


def test_third_derivatives_of_a_power() -> None:
    x = mt.tensor(2.0, dtype=mt.float64, requires_grad=True)
    y = x**4
    for expected in (32.0, 48.0, 48.0):
        (y,) = mt.grad(y, [x], create_graph=True)
        assert y.item() == pytest.approx(expected)


def test_backward_with_create_graph_gives_a_differentiable_grad() -> None:
    x = mt.tensor(3.0, requires_grad=True)
    (x * x * x).backward(create_graph=True)
    grad = x.grad
    x.grad = None  # x.grad's tape holds x: without this the two would keep each other alive
    grad.backward()
    assert x.grad.item() == 18.0


def test_detach_shares_memory_and_leaves_the_tape() -> None:
    x = mt.ones(2, requires_grad=True)
    y = x.detach()
    assert (y.requires_grad, y.data_ptr() == x.data_ptr(), x.is_leaf, (x * 1).grad_fn) == (
        False,
        True,
        True,
        "mul",
    )
    with pytest.raises(mt.AutogradError, match="detach"):
        (x * 1).requires_grad = False
    with pytest.raises(mt.AutogradError, match="requires_grad=True"):
        y.sum().backward()
    with pytest.raises(mt.AutogradError, match="single element"):
        x.backward()


def test_a_tape_of_a_hundred_thousand_ops_is_walked_and_freed() -> None:
    x = mt.ones(1, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y + 0.5
    y.backward()
    assert x.grad.item() == 1
    y = x
    for _ in range(100_000):
        y = y + 0.5


def test_shared_branches_are_visited_once() -> None:
    x = y = mt.ones(1, requires_grad=True)
    for _ in range(40):
        y = y + y
    y.backward()
    assert x.grad.item() == 2.0**40


def test_a_leafs_hook_runs_as_soon_as_its_gradient_is_whole() -> None:
    """Of two layers, the later one's weight hears of its gradient before the earlier one's is computed."""
    first, second = mt.ones(3, 3, requires_grad=True), mt.ones(3, 3, requires_grad=True)
    heard: list[str] = []
    middle = mt.ones(1, 3) @ first
    middle.register_hook(lambda g: heard.append("middle"))
    first.register_hook(lambda g: heard.append("first"))
    second.register_hook(lambda g: heard.append("second"))
    (middle @ second + (middle * second).sum()).sum().backward()  # second is used twice
    assert heard == ["second", "middle", "first"]
