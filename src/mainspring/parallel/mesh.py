"""Which ranks talk to which: an explicit mesh over (pp, dp_replicate, dp_shard, cp, tp) and its groups.

A rank's coordinates are its number written in the mixed radix of the axes, `tp` the fastest: neighbours of a
host are tensor parallel. Experts see the same ranks as (pp, dp_replicate, expert_shard, ep, tp), where
dp_shard · cp = expert_shard · ep. Nothing here is global: who holds a Mesh holds its groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist

from mainspring.errors import ConfigError
from mainspring.parallel.monitor import Monitor

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
TIMEOUT = timedelta(minutes=10)  # of a backend's own watch; `Monitor` is earlier and says more
EDGE_BLOCKS = 4
"""Thread blocks that carry a pipeline's message. Its first end waits on the device for the other and takes a
multiprocessor from the layers for each block meanwhile; a few are fast enough for what has a pass's time to arrive."""
DISK_TIMEOUT = timedelta(hours=2)  # of ranks that wait for each other's disks


@dataclass(frozen=True)
class Group:
    """Ranks that take part in one collective, in their order. `handle` is None where a rank is alone."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    """This rank's index in `ranks`."""
    handle: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    monitor: Monitor = field(default_factory=Monitor, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @staticmethod
    def alone(name: str) -> Group:
        """A group of one, for modules outside any mesh."""
        return Group(name, (0,), 0)


@dataclass(frozen=True)
class Axes:
    """Degrees of the five axes, and of the experts' own."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in (*AXES, "ep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the degree of {name} is {getattr(self, name)}: it must be at least 1")
        if self.dp_shard * self.cp % self.ep:
            raise ConfigError(
                f"ep {self.ep} does not divide dp_shard · cp = {self.dp_shard} · {self.cp}: experts are spread over "
                "ranks that hold different tokens of the same replica"
            )

    @property
    def world(self) -> int:
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's index on each axis."""
        found = {}
        for name, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, found[name] = divmod(rank, size)
        return found

    def rank(self, **index: int) -> int:
        """The rank at these coordinates (0 where an axis is left out)."""
        number = 0
        for name, size in zip(AXES, self.sizes, strict=True):
            number = number * size + index.get(name, 0)
        return number

    def along(self, *axes: str) -> list[tuple[int, ...]]:
        """The groups of ranks that differ in these axes alone, each in the order of ranks."""
        rest = [name for name in AXES if name not in axes]
        groups = []
        for outer in product(*(range(getattr(self, name)) for name in rest)):
            fixed = dict(zip(rest, outer, strict=True))
            inner = product(*(range(getattr(self, name)) for name in AXES if name in axes))
            names = [name for name in AXES if name in axes]
            groups.append(
                tuple(self.rank(**fixed, **dict(zip(names, index, strict=True))) for index in inner)
            )
        return groups

    def expert_groups(self) -> list[tuple[int, ...]]:
        """Ranks that hold the experts of one layer between them: neighbours in (dp_shard, cp)."""
        return [
            ranks[first : first + self.ep]
            for ranks in self.along("dp_shard", "cp")
            for first in range(0, len(ranks), self.ep)
        ]

    def expert_shard_groups(self) -> list[tuple[int, ...]]:
        """Ranks of one replica that hold the same experts."""
        return [ranks[i :: self.ep] for ranks in self.along("dp_shard", "cp") for i in range(self.ep)]

    def tied_groups(self) -> list[tuple[int, ...]]:
        """First and last stage, which both hold a tied embedding."""
        return [tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in self.along("pp")]

    def key_groups(self, copies: int) -> list[tuple[int, ...]]:
        """Tensor-parallel neighbours that hold a copy of the same key heads."""
        return [
            ranks[first : first + copies]
            for ranks in self.along("tp")
            for first in range(0, len(ranks), copies)
        ]


class Mesh:
    """This rank's groups. `Mesh.build` is a collective call of all ranks of the default process group."""

    def __init__(self, axes: Axes, rank: int, groups: dict[str, Group], monitor: Monitor) -> None:
        self.axes = axes
        self.rank = rank
        self.index = axes.coordinates(rank)
        self.monitor = monitor
        self._groups = groups

    @staticmethod
    def single() -> Mesh:
        """A mesh of this process alone, whether or not it belongs to a process group."""
        names = (
            "world", "pp", "tp", "cp", "dp", "data", "shard", "replicate", "ep", "expert_shard", "expert_data", "tied",
            "keys", "holders",
        )  # fmt: skip
        monitor = Monitor()
        return Mesh(Axes(), 0, {name: Group(name, (0,), 0, None, monitor) for name in names}, monitor)

    @staticmethod
    def build(axes: Axes, *, key_copies: int = 1, monitor: Monitor | None = None) -> Mesh:
        """Makes the groups. key_copies: ranks that share a key head (see `Layout.key_copies`).

        Raises ConfigError if the axes do not multiply to the number of ranks.
        """
        present = dist.get_world_size() if dist.is_initialized() else 1
        if axes.world != present:
            raise ConfigError(
                f"the layout needs {axes.world} ranks ({_spelled(axes)}), but {present} are running"
            )
        rank = dist.get_rank() if dist.is_initialized() else 0
        monitor = monitor or Monitor(rank)
        partitions = {
            "world": [tuple(range(axes.world))],
            "pp": axes.along("pp"),
            "tp": axes.along("tp"),
            "cp": axes.along("cp"),
            "dp": axes.along("dp_replicate", "dp_shard"),
            "data": axes.along("dp_replicate", "dp_shard", "cp"),
            "shard": axes.along("dp_shard", "cp"),
            "holders": axes.along("dp_shard", "cp", "tp"),
            "replicate": axes.along("dp_replicate"),
            "ep": axes.expert_groups(),
            "expert_shard": axes.expert_shard_groups(),
            "expert_data": _joined(axes),
            "tied": axes.tied_groups(),
            "keys": axes.key_groups(key_copies),
        }
        for a, b in _neighbours(axes.pp):
            # A directed edge has a group of its own, in the sender's name: its first rank sends.
            partitions[f"{a}->{b}"] = [(ranks[a], ranks[b]) for ranks in axes.along("pp")]
        made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        groups = {}
        for name, partition in partitions.items():
            for ranks in partition:
                directed = "->" in name
                if directed:
                    handle = _edge_group(ranks, rank)
                elif ranks in made:
                    handle = made[ranks]
                else:
                    handle = made[ranks] = _process_group(ranks, axes.world)
                if rank in ranks:
                    groups[name] = Group(name, ranks, ranks.index(rank), handle, monitor)
            # A rank between the ends of a pipeline holds no tied embedding.
            groups.setdefault(name, Group(name, (rank,), 0, None, monitor))
        return Mesh(axes, rank, groups, monitor)

    def group(self, name: str) -> Group:
        """One of: world, pp, tp, cp, dp (replicas of the data), data (dp and cp), shard (dp_shard and cp), replicate,
        ep, expert_shard, expert_data (holders of the same experts), holders (of one copy of a stage), tied, keys."""
        return self._groups[name]

    def beside(self, name: str) -> Group:
        """A further group of all ranks, on the CPU, whose collectives a thread may call while others are in flight.

        A collective call, as making the mesh is. Its waits are as long as a disk may take; the mesh's watchdog does
        not see them.
        """
        world = self.group("world")
        handle = (
            dist.new_group(list(world.ranks), timeout=DISK_TIMEOUT, backend="gloo")
            if world.size > 1
            else None
        )
        return Group(name, world.ranks, world.rank, handle, Monitor(self.rank))

    def edge(self, source: int, to: int) -> Group:
        """The group of two pipeline ranks over which `source` sends to `to`, its first and second rank."""
        return self._groups["pp"] if source == to else self._groups[f"{source}->{to}"]


def _neighbours(pp: int) -> list[tuple[int, int]]:
    """The directed edges of the pipeline's ring."""
    edges = [(i, (i + step) % pp) for i in range(pp) for step in (1, -1)] if pp > 1 else []
    return list(dict.fromkeys(edges))


def _joined(axes: Axes) -> list[tuple[int, ...]]:
    """All holders of the same experts: `expert_shard` over all replicas."""
    joined = []
    for ranks in axes.along("dp_replicate", "dp_shard", "cp"):
        width = axes.dp_shard * axes.cp
        for i in range(axes.ep):
            joined.append(tuple(rank for n, rank in enumerate(ranks) if n % width % axes.ep == i))
    return joined


def _process_group(ranks: Sequence[int], world: int) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == world:
        world_group: dist.ProcessGroup | None = dist.group.WORLD
        return world_group
    made: dist.ProcessGroup = dist.new_group(list(ranks), timeout=TIMEOUT)
    return made


def _edge_group(ranks: Sequence[int], rank: int) -> dist.ProcessGroup | None:
    """ranks: the sender and the receiver; rank: this process's."""
    if dist.get_backend() != "nccl":
        gloo: dist.ProcessGroup | None = dist.new_group(sorted(ranks), timeout=TIMEOUT)
        return gloo
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = EDGE_BLOCKS
    made: dist.ProcessGroup | None = dist.new_group(sorted(ranks), timeout=TIMEOUT, pg_options=options)
    # NCCL connects at the first message, for which each end waits: who receives early would wait for ever, if what it
    # is to send first is what the other end needs.
    token = torch.zeros(1, device="cuda")
    if rank == ranks[0]:
        dist.send(token, ranks[1], group=made)
    elif rank == ranks[1]:
        dist.recv(token, ranks[0], group=made)
    return made


def _spelled(axes: Axes) -> str:
    return " · ".join(f"{name} {getattr(axes, name)}" for name in AXES)


def even_bounds(total: int, parts: int) -> list[int]:
    """Where `parts` contiguous pieces of nearly equal size begin, and `total`: the first pieces are the larger ones."""
    small, larger = divmod(total, parts)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + small + (i < larger))
    return bounds
