"""One of two processes of a broadcast of weights: a trainer (rank 0) or an engine (rank 1), run as a module.

    python -m engine.broadcast_rank RANK STORE BACKEND

The last line is what the process has to say: the checksum of its weights, and how a model of another structure fared.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.messages import TokenLogprobs
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.weights import broadcast_weights, weights_checksum
from mainspring.errors import CheckpointError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.initialise import create_model

CONFIG = EngineConfig(num_blocks=12, max_num_seqs=4, max_num_batched_tokens=40)


def config(architecture: str, qk_norm: bool) -> ModelConfig:
    return ModelConfig(
        architecture=architecture, vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=2, num_kv_heads=1, head_dim=16, max_position_embeddings=64, qk_norm=qk_norm,
    )  # fmt: skip


def written(core: EngineCore) -> list[TokenLogprobs]:
    """Tokens and their log-probabilities, after some prompt; from CUDA graphs on a GPU."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    core.add_request(make_request("r", list(range(20)), params, core.limits, ()))
    entries: list[TokenLogprobs] = []
    while core.has_work():
        for output in core.step():
            entries += output.logprobs or []
    return entries


def main(rank: int, store: str, backend: str) -> None:
    device, dtype = torch.device("cpu"), torch.float32
    if backend == "nccl":
        device, dtype = torch.device("cuda", rank), torch.bfloat16
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.FileStore(store, 2), rank=rank, world_size=2)
    llama, qwen = config("LlamaForCausalLM", False), config("Qwen3ForCausalLM", True)
    trainer = create_model(llama, seed=7, device=device, dtype=dtype)
    if rank == 0:
        broadcast_weights(trainer, 0)
        checksum = weights_checksum(trainer)
    else:
        served = create_model(llama, seed=8, device=device, dtype=dtype)
        core = EngineCore(served, CONFIG)
        before = written(core)
        assert weights_checksum(served) != weights_checksum(trainer)
        checksum = core.receive_weights(0)
        after = written(core)
        assert len(after) == 12
        assert after == written(EngineCore(trainer, CONFIG)) != before
    other = create_model(llama if rank == 0 else qwen, seed=9, device=device, dtype=dtype)
    unchanged = weights_checksum(other)
    try:
        broadcast_weights(other, 0)
        verdict = "sent"
    except CheckpointError as error:
        verdict = "refused" if "differ" in str(error) and weights_checksum(other) == unchanged else str(error)
    dist.destroy_process_group()
    print(checksum, verdict)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
