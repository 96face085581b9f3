"""Worlds from the environment that torchrun sets, and processes on this machine for tests and small jobs."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from mainspring.tensor._tensor import CommunicationError, World


def world_from_environment(timeout: float = 60.0) -> World:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Raises:
        CommunicationError: a variable is missing or no number.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT'])}"
    except (KeyError, ValueError) as error:
        raise CommunicationError(
            f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set: {error}"
        ) from error
    return World(rank, size, address, timeout)


def launch(function: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Runs function(world, *args) in `size` new processes of this machine; returns their results by rank.

    The function and its results must be picklable: they cross between parent and child, nothing else does.

    Raises:
        CommunicationError: a process failed, with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(
            target=_child, args=(function, rank, size, f"127.0.0.1:{port}", timeout, pipes[rank][1], args)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    results: list[Any] = []
    failures: list[str] = []
    for rank, (receiver, _) in enumerate(pipes):
        try:
            kind, value = receiver.recv()
        except EOFError:
            kind, value = "error", "the process ended without a word"
        (results if kind == "result" else failures).append(
            value if kind == "result" else f"rank {rank}: {value}"
        )
    for process in processes:
        process.join()
    if failures:
        raise CommunicationError("\n".join(failures))
    return results


def _child(
    function: Callable[..., Any],
    rank: int,
    size: int,
    address: str,
    timeout: float,
    sender: Any,
    args: tuple[Any, ...],
) -> None:
    import traceback

    try:
        sender.send(("result", function(World(rank, size, address, timeout), *args)))
    except BaseException:  # whatever it is, the parent hears of it
        sender.send(("error", traceback.format_exc()))
