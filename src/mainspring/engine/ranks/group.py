"""The processes of a layout: started by rank 0 on this machine, or by torchrun; watched, and ended together.

On one machine they meet through a file in a private directory and talk over the loopback interface (gloo on the CPU,
NCCL on GPUs). A worker ends when rank 0 has gone, and rank 0 learns of a worker's end at once, wherever it waits. One
that lives but does not answer is ended when the time for a call is over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mainspring.engine.ranks.channel import Channel
from mainspring.engine.ranks.watchdog import Watchdog
from mainspring.errors import ConfigError, EngineDeadError
from mainspring.parallel.launch import local_rank, ranks_started
from mainspring.parallel.mesh import TIMEOUT

ANSWER_SECONDS = TIMEOUT.total_seconds()  # for one call of the model, kernels that it compiles included
_IDLE = timedelta(days=365)  # how long a worker waits for the next order
_START_SECONDS = 300.0
_STOP_SECONDS = 3.0
# Ranks of one machine meet on its loopback interface. NCCL's own watch would end rank 0 with the process when another
# rank dies or hangs: here that is told to those who wait, and `Watchdog` says when.
_LOCAL = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


class RankGroup:
    """Rank 0's hold on the others. `check` and `alive` raise EngineDeadError once one has ended, or was late."""

    def __init__(self, world: int, device: torch.device, answer_seconds: float = ANSWER_SECONDS) -> None:
        """Starts and joins world - 1 workers, or those of torchrun. answer_seconds: how long `alive` lasts at most.

        Raises:
            ConfigError: torchrun has started another number, or this process already belongs to a group.
            EngineDeadError: a worker ended before it had joined.
        """
        self.world, self.device = world, device
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory: Path | None = None
        self._dead: str | None = None
        self._closing = False
        self._answer_seconds = answer_seconds
        self._watchdog: Watchdog | None = None
        _refuse_other_groups(world)
        if world == 1:
            self.channel = Channel(None)
            self._stop = weakref.finalize(self, _end, self._processes, None)
            return
        if ranks_started() > 1:
            self._stop = weakref.finalize(self, _end, self._processes, None)
            join(world, 0, device.type, None)
        else:
            self._directory = Path(tempfile.mkdtemp(prefix="mainspring-ranks-"))  # mode 0700
            self._stop = weakref.finalize(self, _end, self._processes, self._directory)
            self._start(self._directory)
        self._watchdog = Watchdog(self._give_up)
        with self.alive():
            self.channel = control_channel()
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(
                target=self._watch, args=(rank, process), name=f"rank-{rank}-watch", daemon=True
            ).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that this process has started."""
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Raises EngineDeadError if a worker has ended."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    @contextlib.contextmanager
    def alive(self, seconds: float | None = None) -> Iterator[None]:
        """What a collective raises inside because a worker has ended becomes EngineDeadError.

        seconds: the workers are ended if what is inside takes longer; None: `answer_seconds`.
        """
        limit = self._answer_seconds if seconds is None else seconds
        try:
            with contextlib.nullcontext() if self._watchdog is None else self._watchdog.within(limit):
                yield
        except RuntimeError as error:
            deadline = time.monotonic() + 2.0
            while self._dead is None and time.monotonic() < deadline:
                for rank, process in enumerate(self._processes, start=1):
                    if process.poll() is not None:
                        self._dead = self._dead or _obituary(rank, process.poll())
                time.sleep(0.02)
            if self._dead is not None or isinstance(error, dist.DistError):
                raise EngineDeadError(self._dead or f"a rank of the layout is gone ({error})") from error
            raise

    def close(self) -> None:
        """Ends the workers (by force after three seconds) and leaves the process group. May be called twice."""
        self._closing = True
        if self._watchdog is not None:
            self._watchdog.close()
        for process in self._processes:
            if self._dead is None:  # they have been told to stop
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
        self._stop()
        if self.world > 1 and dist.is_initialized():
            if self._dead is not None and self.device.type == "cuda":
                _abort_collectives()
            dist.destroy_process_group()

    def _start(self, directory: Path) -> None:
        store = directory / "store"
        command = [sys.executable, "-m", "mainspring.engine.ranks.worker"]
        environment = {**os.environ, **_LOCAL}
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.world))
        for rank in range(1, self.world):
            arguments = [str(rank), str(self.world), self.device.type, str(store)]
            self._processes.append(
                subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches rank 0, which then ends the others
                )
            )
        try:
            self._await_workers(store)
            join(self.world, 0, self.device.type, store)
        except BaseException:
            self._stop()
            raise

    def _await_workers(self, store: Path) -> None:
        """Until each has said that it is up, or ended."""
        deadline = time.monotonic() + _START_SECONDS
        waiting = set(range(1, self.world))
        while waiting:
            waiting = {rank for rank in waiting if not _mark(store, rank).exists()}
            for rank in waiting:
                status = self._processes[rank - 1].poll()
                if status is not None:
                    raise EngineDeadError(_obituary(rank, status))
            if waiting and time.monotonic() > deadline:
                raise EngineDeadError(
                    f"rank {min(waiting)} has not started within {_START_SECONDS:g} s; its log says where it waits"
                )
            time.sleep(0.01)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if self._closing:
            return
        self._dead = self._dead or _obituary(rank, status)
        if self.device.type == "cuda":
            # Rank 0 may wait for a device that waits for the dead rank.
            _abort_collectives()

    def _give_up(self, seconds: float) -> None:
        """Ends the workers, and with them whatever rank 0 waits for."""
        self._dead = self._dead or (
            f"the ranks of the layout have not answered within {seconds:g} s and were ended. Start the engine again"
        )
        for process in self._processes:
            process.kill()  # `_watch` lets go of the devices
        if not self._processes and self.device.type == "cuda":
            _abort_collectives()  # torchrun's ranks end when they find rank 0 gone


def join(world: int, rank: int, kind: str, store: Path | None) -> None:
    """This process becomes a rank of the default group: through the file `store`, or torchrun's environment."""
    if kind == "cuda":
        torch.cuda.set_device(rank if store is not None else local_rank())
    backend = "nccl" if kind == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    if rank:
        _mark(store, rank).touch()
    with on_this_machine():
        dist.init_process_group(
            backend, store=_file_store(store, world), rank=rank, world_size=world, timeout=TIMEOUT
        )


def control_channel() -> Channel:
    """Between the hosts' processes, whatever the backend of the tensors; a collective call."""
    with on_this_machine():
        return Channel(dist.new_group(backend="gloo", timeout=_IDLE))


@contextlib.contextmanager
def on_this_machine() -> Iterator[None]:
    """Groups that are made inside stay on this machine, unless torchrun's may span several or the user says else."""
    added = {} if ranks_started() > 1 else {k: v for k, v in _LOCAL.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _refuse_other_groups(world: int) -> None:
    if dist.is_initialized():
        raise ConfigError(
            f"this process already belongs to a group of {dist.get_world_size()} ranks; an engine under a layout "
            "starts its own: build it in another process"
        )
    started = ranks_started()
    if started not in (1, world):
        raise ConfigError(
            f"the layout needs {world} ranks, but torchrun has started {started}; say --nproc-per-node {world}"
        )
    if started > 1 and int(os.environ["RANK"]) > 0:
        raise ConfigError(
            f"this is torchrun's rank {os.environ['RANK']}, but rank 0 builds the engine; here call "
            'mainspring.engine.ranks.worker.work("cuda" or "cpu")'
        )


def _file_store(path: Path, world: int) -> Any:
    return dist.FileStore(str(path), world)  # type: ignore[attr-defined]  # exported, but not in its list of names


def _mark(store: Path, rank: int) -> Path:
    return store.with_name(f"rank-{rank}-is-up")


def _obituary(rank: int, status: int | None) -> str:
    return f"rank {rank} of the layout has ended (status {status}); its log says why. Start the engine again"


def _abort_collectives() -> None:
    """Lets go of the devices that wait in a collective. All at once: one's kernels may stand before another's."""
    backends: list[Any] = []
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # the control group is not one of devices
            backends.append(group._get_backend(torch.device("cuda")))
    nccl = [backend for backend in backends if hasattr(backend, "_group_start")]
    if not nccl:
        return
    nccl[0]._group_start()
    for backend in nccl:
        backend.abort()
    nccl[0]._group_end()


def _end(processes: list[subprocess.Popen[bytes]], directory: Path | None) -> None:
    """Ends the workers and removes the directory in which they met."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
