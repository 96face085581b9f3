"""Starts the ranks of a verification on this host, and is what each of them runs, as a module of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore

from mainspring.errors import MainspringError
from mainspring.formats.files import write_json
from mainspring.formats.model_config import ModelConfig
from mainspring.parallel.launch import joined
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.train.verify import Run, VerifySettings, run_layout

_POLL_S = 0.05


def run_on_ranks(
    directory: Path, layout: Layout, settings: VerifySettings, gradients: Path, folder: Path, limit: float
) -> tuple[Run, dict[str, float]]:
    """`run_layout` in as many processes as the layout has ranks; files between them lie in `folder`.

    limit: seconds after which a rank that does nothing ends the verification. Raises MainspringError with the ranks'
    own words if one of them fails.
    """
    layout.check(ModelConfig.from_file(directory), settings.micro_batches)
    folder.mkdir(parents=True, exist_ok=True)
    order, answer = folder / "order.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    write_json(
        order,
        {
            "directory": str(directory), "layout": str(layout), "settings": asdict(settings),
            "gradients": str(gradients), "answer": str(answer), "limit": limit,
        },
    )  # fmt: skip
    command = [sys.executable, "-m", "mainspring.train.verify_ranks", str(order)]
    # The ranks meet at a store of this process, which asks the system for a port: one that was looked up to be free
    # may have been taken by the time that a rank opens it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    try:
        for rank in range(layout.world):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(layout.world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            if settings.device == "cpu":
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            with open(folder / f"rank{rank}.log", "wb") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        _wait(processes, folder)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return read_answer(answer)


def read_answer(path: Path) -> tuple[Run, dict[str, float]]:
    """What the first rank has written."""
    record = json.loads(path.read_text())
    return Run(**record["run"]), record["errors"]


def run_rank(order: Path) -> None:
    """One rank's part."""
    given = json.loads(order.read_text())
    settings = VerifySettings(**given["settings"])
    layout = Layout.parse(given["layout"])
    torch.set_num_threads(1)
    with joined(settings.device):
        config = ModelConfig.from_file(given["directory"])
        mesh = Mesh.build(layout.axes, key_copies=layout.key_copies(config))
        mesh.monitor.watch(given["limit"])
        run, errors = run_layout(Path(given["directory"]), layout, settings, Path(given["gradients"]), mesh)
        mesh.monitor.stop()
        if mesh.rank == 0:
            write_json(Path(given["answer"]), {"run": asdict(run), "errors": errors})


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            time.sleep(1.0)  # the others' last words, too
            text = "\n".join(f"rank {r}: {_tail(folder / f'rank{r}.log')}" for r in failed)
            raise MainspringError(f"{len(failed)} of {len(processes)} ranks failed:\n{text}")
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_S)


def _tail(path: Path, characters: int = 3000) -> str:
    return path.read_text(errors="replace")[-characters:].strip()


def _main() -> None:
    try:
        run_rank(Path(sys.argv[1]))
    except MainspringError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    _main()
