"""Two ranks of which one never comes to the sum: `python -m parallel.hang RANK STORE`."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.mesh import Axes, Mesh


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = Mesh.build(Axes(dp_replicate=2))
    mesh.monitor.begin_step(7)
    if rank == 1:
        time.sleep(600)
    mesh.monitor.watch(2.0)
    all_reduce(torch.zeros(3), mesh.group("data"))


if __name__ == "__main__":
    main()
