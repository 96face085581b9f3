"""Module: parameters, buffers and modules by name, and their state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mainspring.tensor._tensor import DTypeError, Parameter, ShapeError, Tensor, _zero_grad, dtype
from mainspring.tensor.grad_mode import no_grad

T = TypeVar("T")


class Module:
    """Base of all layers: attributes that are Parameters or Modules are found by name.

    A subclass calls `super().__init__()` before it sets one.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, Parameter] = {}
        self._buffers: dict[str, Tensor] = {}
        self._modules: dict[str, Module] = {}
        self.training = True

    def __setattr__(self, name: str, value: Any) -> None:
        # The name stands in one of the tables, and as a plain attribute for quick reading.
        for table in ("_parameters", "_modules", "_buffers"):
            self.__dict__.get(table, {}).pop(name, None)
        if isinstance(value, (Parameter, Module)):
            if "_modules" not in self.__dict__:
                raise AttributeError(
                    f"{type(self).__name__}: call super().__init__() before setting {name!r}"
                )
            if isinstance(value, Parameter):
                self._parameters[name] = value
            else:
                self._modules[name] = value
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        for table in (self._parameters, self._modules, self._buffers):
            table.pop(name, None)
        object.__delattr__(self, name)

    def register_buffer(self, name: str, value: Tensor) -> None:
        """A tensor that belongs to the state but is not trained."""
        object.__setattr__(self, name, value)
        self._buffers[name] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[Module]:
        yield from self._modules.values()

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each with its dotted name (this one's is the prefix)."""
        yield prefix, self
        for name, module in self._modules.items():
            yield from module.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        for _, module in self.named_modules():
            yield module

    def _named(self, table: Callable[[Module], dict[str, T]]) -> Iterator[tuple[str, T]]:
        for prefix, module in self.named_modules():
            for name, value in table(module).items():
                yield (f"{prefix}.{name}" if prefix else name), value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, under the first of its names."""
        seen: set[int] = set()
        for name, value in self._named(lambda module: module._parameters):
            if id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def parameters(self) -> Iterator[Parameter]:
        for _, value in self.named_parameters():
            yield value

    def train(self, mode: bool = True) -> Module:
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        return self.train(False)

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        _zero_grad(list(self.parameters()))

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        for value in self.parameters():
            value.requires_grad = requires_grad
        return self

    def to(self, kind: dtype) -> Module:
        """Converts parameters and buffers to another floating-point dtype; parameters become new objects.

        A parameter that several modules share stays shared.
        """
        converted: dict[int, Parameter] = {}
        for module in self.modules():
            for name, value in list(module._parameters.items()):
                if id(value) not in converted:
                    converted[id(value)] = Parameter(
                        value.detach().to(kind), requires_grad=value.requires_grad
                    )
                setattr(module, name, converted[id(value)])
            for name, buffer in list(module._buffers.items()):
                if buffer.dtype.is_floating_point:
                    module.register_buffer(name, buffer.to(kind))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Name to tensor, for parameters and buffers; the tensors share the module's memory."""
        tensors = [
            *self._named(lambda module: module._parameters),
            *self._named(lambda module: module._buffers),
        ]
        return {name: value.detach() for name, value in tensors}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copies the tensors in.

        Raises:
            ShapeError: a shape differs; or, if strict, names are missing or unknown. Nothing is changed then.
            DTypeError: a value is not a tensor.
        """
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if strict and (missing or unknown):
            raise ShapeError(
                f"load_state_dict: missing {missing}, unknown {unknown}; pass strict=False to skip them"
            )
        for name in own.keys() & state.keys():
            if not isinstance(state[name], Tensor):
                raise DTypeError(f"load_state_dict: {name} is a {type(state[name]).__name__}, not a Tensor")
            if own[name].shape != state[name].shape:
                raise ShapeError(
                    f"load_state_dict: {name} has shape {state[name].shape}, the module's is {own[name].shape}"
                )
        with no_grad():
            for name in own.keys() & state.keys():
                own[name].copy_(state[name].detach())

    def extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        lines = [f"  ({name}): {module!r}".replace("\n", "\n  ") for name, module in self._modules.items()]
        inner = "\n".join([self.extra_repr(), *lines] if self.extra_repr() else lines)
        return f"{type(self).__name__}(\n{inner}\n)" if lines else f"{type(self).__name__}({inner})"


class Sequential(Module):
    """Modules one after the other."""

    def __init__(self, *modules: Module) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> Module:
        return list(self._modules.values())[index]

    def forward(self, x: Any) -> Any:
        for module in self._modules.values():
            x = module(x)
        return x


class ModuleList(Module):
    """Modules in a list, found by their index."""

    def __init__(self, modules: list[Module] | None = None) -> None:
        super().__init__()
        for module in modules or []:
            self.append(module)

    def append(self, module: Module) -> None:
        setattr(self, str(len(self._modules)), module)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int) -> Module:
        return list(self._modules.values())[index]
