"""Processes of a gloo group that stay alive between layouts: starting them costs more than a tiny model's step."""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_S = 280.0


class JobError(AssertionError):
    """A rank's job raised; the text is its traceback."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool:
    """`run(job, ranks, arguments)` calls a module-level function on ranks 0 to ranks - 1 of one process group.

    job: "module:function" in this folder. Returns what each rank's call returned.
    """

    def __init__(self) -> None:
        self._context = get_context("forkserver")  # one process has imported torch, the workers are its forks
        self._context.set_forkserver_preload(["torch", "torch.distributed", "parallel.jobs"])
        self._folder = tempfile.TemporaryDirectory()
        self._groups = 0
        self._ranks = 0
        self._workers: list[_Worker] = []

    def _grow(self, workers: int) -> None:
        for number in range(len(self._workers), workers):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(number, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def run(self, job: str, ranks: int, *arguments: Any, timeout: float = TIMEOUT_S) -> list[Any]:
        self._grow(ranks)
        if ranks != self._ranks:
            self._groups += 1
            self._ranks = ranks
        store = str(Path(self._folder.name) / f"group-{self._groups}")
        chosen = self._workers[:ranks]
        for worker in chosen:
            worker.pipe.send((job, store, ranks, arguments))
        results, failures = [], []
        for rank, worker in enumerate(chosen):
            if not worker.pipe.poll(timeout):
                failures.append(f"rank {rank} did not answer within {timeout} s")
                continue
            good, value = worker.pipe.recv()
            results.append(value)
            if not good:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self._ranks = 0  # the next job gets a fresh group
            raise JobError("\n".join(failures))
        return results

    def process(self, target: Callable[..., object], *arguments: object) -> BaseProcess:
        """A process of its own, for what would take a worker along."""
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._folder.cleanup()


def _serve(number: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    current = ""
    while True:
        try:
            job, store, ranks, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if store != current:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo", store=dist.FileStore(store, ranks), rank=number, world_size=ranks
                )
                current = store
            module, _, function = job.partition(":")
            run: Callable[..., Any] = getattr(importlib.import_module(f"parallel.{module}"), function)
            answer = (True, run(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
            # The other ranks may wait for this one in a collective; without a group they fail at once.
            if dist.is_initialized():
                dist.destroy_process_group()
            current = ""
        pipe.send(answer)
