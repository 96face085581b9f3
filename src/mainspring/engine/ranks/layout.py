"""Which layouts the engine serves under."""

from __future__ import annotations

import dataclasses

import torch

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.parallel.layout import Layout


def serving_layout(
    layout: Layout | str | None = None, *, tp: int = 1, pp: int = 1, ep: int = 1, tp_invariant: bool = False
) -> Layout | None:
    """The layout that these ask for, as the engine runs it; None for one process and the plain order of sums.

    Experts are spread over `ep` ranks, each of which holds everything else of its stage whole; so a layout's `dp` is
    its `ep`. Every rank sees all tokens of a step (`sequence_parallel` is off: a decode step has fewer than ranks).

    Raises:
        ConfigError: a key that only training knows, or degrees given in both ways.
    """
    degrees = Layout(pp=pp, tp=tp, ep=ep, dp=ep, tp_invariant=tp_invariant)
    if layout is None:
        chosen = degrees
    else:
        if degrees != Layout():
            raise ConfigError(
                f"layout {layout} was given beside tp {tp}, pp {pp}, ep {ep}, tp_invariant {tp_invariant}; "
                "give one or the other"
            )
        chosen = Layout.parse(layout) if isinstance(layout, str) else layout
    plain = Layout(
        pp=chosen.pp, tp=chosen.tp, ep=chosen.ep, dp=chosen.ep, split=chosen.split,
        tp_invariant=chosen.tp_invariant,
    )  # fmt: skip
    for field in dataclasses.fields(Layout):
        given, served = getattr(chosen, field.name), getattr(plain, field.name)
        if given != served and field.name not in ("sequence_parallel", "schedule"):
            raise ConfigError(
                f"layout {chosen}: {field.name} is {given}, which the engine does not serve under; it takes tp, pp, "
                "split, ep (with dp as large) and tp_invariant. More replicas are --ray --replicas"
            )
    return None if plain == Layout() else dataclasses.replace(plain, sequence_parallel=False)


def check_serving_layout(layout: Layout, config: ModelConfig, device: torch.device) -> None:
    """Before any rank is started. Raises ConfigError, naming the numbers."""
    layout.check(config)
    if device.type == "cuda":
        present = torch.cuda.device_count()
        if present < layout.world:
            raise ConfigError(
                f"layout {layout} needs {layout.world} CUDA devices on this machine, which has {present}; "
                "lower a degree, or start the ranks on several machines with torchrun"
            )
        if device.index not in (None, 0):
            raise ConfigError(
                f"device is {device}, but rank r of a layout takes CUDA device r; give 'cuda' and choose devices by "
                "CUDA_VISIBLE_DEVICES"
            )
        if layout.tp_invariant:
            check_chunks(layout, config)


def check_chunks(layout: Layout, config: ModelConfig) -> None:
    """The kernels cut K by the shape of the weight: a rank's rows must be summed as those of the whole are.

    Raises ConfigError where they are not, so that tp_invariant cannot be promised on CUDA.
    """
    from mainspring.ops.triton.linear import k_chunk

    hidden = config.hidden_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    for name, rows in (("qkv", heads), ("gate and up", 2 * config.intermediate_size)):
        if k_chunk(rows // layout.tp, hidden) != k_chunk(rows, hidden):
            raise ConfigError(
                f"layout {layout}: tp_invariant is not promised where {name}'s {rows} rows leave {rows // layout.tp} a "
                f"rank, over {hidden} columns: so few are summed in another order; lower tp"
            )
