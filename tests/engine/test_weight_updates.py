"""New weights, sleep and pause: what an RL loop does to a running engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.test_core import (
    Job,
    Result,
    assert_bitwise_the_trainers,
    collect,
    run,
    tiny_model,
)
from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.weights import weights_checksum
from mainspring.errors import CheckpointError, ConfigError
from mainspring.model.initialise import create_model

# As on a GPU: one step of lag, decode steps of fixed sizes.
AHEAD: dict[str, Any] = {"async_scheduling": True, "cuda_graphs": True}


def test_new_weights_are_used_at_once_and_old_prefixes_are_forgotten() -> None:
    model, other = tiny_model("llama"), create_model(tiny_model("llama").config, seed=5)
    served = create_model(model.config, seed=3)
    core = EngineCore(served, EngineConfig(block_size=4))
    job: Job = (list(range(20)), SamplingParams(temperature=0, max_tokens=8, logprobs=0))
    assert run(core, [job]) == run(EngineCore(model), [job])
    address = served.embedding.data_ptr()
    checksum = core.update_weights(other.state_dict())
    assert served.embedding.data_ptr() == address
    assert checksum == weights_checksum(other) != weights_checksum(model)
    assert run(core, [job]) == run(EngineCore(other), [job])
    assert core.stats().prefix_cache_hits_total == 0


def test_a_request_that_outlives_new_weights_shares_nothing_afterwards() -> None:
    served, other = (
        create_model(tiny_model("llama").config, seed=3),
        create_model(tiny_model("llama").config, seed=5),
    )
    core = EngineCore(served, EngineConfig(block_size=4))
    core.add_request(
        make_request("old", list(range(9)), SamplingParams(temperature=0, max_tokens=20), core.limits, ())
    )
    for _ in range(5):
        core.step()
    core.update_weights(other.state_dict())
    tokens = []
    while core.has_work():
        tokens += core.step()
    prompt = list(range(9))
    [result] = run(core, [(prompt, SamplingParams(temperature=0, max_tokens=8, logprobs=0))])
    assert core.stats().prefix_cache_hits_total == 0
    assert_bitwise_the_trainers(other, result)


def test_weights_that_do_not_fit_change_nothing() -> None:
    served = create_model(tiny_model("llama").config, seed=3)
    core = EngineCore(served)
    before = weights_checksum(served)
    state = dict(create_model(served.config, seed=5).state_dict())
    state["model.norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[3\]"):
        core.update_weights(state)
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        core.update_weights({"other": torch.ones(3)})
    assert weights_checksum(served) == before


def test_the_checksum_sees_every_element_and_its_place() -> None:
    model = create_model(tiny_model("llama").config, seed=3)
    seen = {weights_checksum(model)}
    with torch.no_grad():
        row = model.embedding[3].clone()
        model.embedding[3] = model.embedding[4]
        model.embedding[4] = row
        seen.add(weights_checksum(model))
        model.embedding[4, 1] = torch.nextafter(model.embedding[4, 1], torch.tensor(1.0))
        seen.add(weights_checksum(model))
    assert len(seen) == 3


@pytest.mark.parametrize("ahead", [False, True])
def test_sleeping_gives_the_cache_back_and_waking_goes_on_with_the_same_tokens(ahead: bool) -> None:
    model = tiny_model("llama")
    jobs: list[Job] = [([i, 2], SamplingParams(seed=i, max_tokens=12, logprobs=0)) for i in range(3)]
    expected = run(EngineCore(model), jobs)
    core = EngineCore(model, EngineConfig(num_blocks=64, **(AHEAD if ahead else {})))
    results = [Result(prompt, [], [], None, None, None, 0) for prompt, _ in jobs]
    for number, (prompt, params) in enumerate(jobs):
        core.add_request(make_request(str(number), prompt, params, core.limits, ()))
    outputs = [output for _ in range(4) for output in core.step()]
    outputs += core.sleep()
    assert core.is_sleeping
    assert core.stats().kv_blocks_used == 0
    assert not core.has_work()
    assert core.step() == []
    with pytest.raises(ConfigError, match="sleeps"):
        core.resume()
    core.wake()
    while core.has_work():
        outputs += core.step()
    for output in outputs:
        collect(results[int(output.request_id)], output)
    assert results == expected


def test_a_paused_engine_hands_out_what_is_under_way_and_nothing_else() -> None:
    core = EngineCore(tiny_model("llama"), EngineConfig(**AHEAD))
    core.add_request(make_request("r", [1, 2], SamplingParams(max_tokens=5), core.limits, ()))
    assert core.step() == []
    core.pause()
    assert [len(output.token_ids) for output in core.step()] == [1]
    assert not core.has_work()
    assert core.step() == []
    core.resume()
    tokens = 1
    while core.has_work():
        tokens += sum(len(output.token_ids) for output in core.step())
    assert tokens == 5


_TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a group of two ranks over NCCL needs two GPUs"),
]


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=_TWO_GPUS)])
def test_a_broadcast_gives_both_processes_the_same_checksum_and_refuses_another_model(
    tmp_path: Path, backend: str
) -> None:
    path = os.pathsep.join(["src", "tests", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.broadcast_rank", str(rank), str(tmp_path / "store"), backend],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while None in (codes := [process.poll() for process in processes]):
            assert not any(codes)  # the other one would wait for ever
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    outputs = [process.communicate()[0].split() for process in processes]
    assert codes == [0, 0]
    checksums, verdicts = zip(*(output[-2:] for output in outputs), strict=True)
    assert checksums[0] == checksums[1]
    assert verdicts == ("refused", "refused")
