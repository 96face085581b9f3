"""What `mainspring bench throughput` measures: an offline engine on random weights, from a config alone.

The mix is that of nano-vllm's benchmark: requests of 100 to 1,024 tokens in and 100 to 1,024 out at temperature 0.6,
ends of text ignored. All prompt lengths are drawn first, then all output lengths, from `random.Random(0)`.
"""

from __future__ import annotations

import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mainspring.engine.llm import LLM
from mainspring.engine.random_weights import draw
from mainspring.engine.ranks.layout import serving_layout
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.served_model import ServedModel
from mainspring.errors import ConfigError
from mainspring.formats.files import write_json
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import torch_device
from mainspring.ops import Numerics, Policy

TEMPERATURE = 0.6
_FIRST_TOKEN = "first token"

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "qk_norm": True,
        "dtype": "bfloat16",
    },
    "llama-3.1-8b": {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "dtype": "bfloat16",
    },
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of these lengths, all there at the start. counts_prompts: the figure is of tokens in, not out."""

    name: str
    prompt_lengths: Sequence[int]
    output_lengths: Sequence[int]
    counts_prompts: bool = False

    @property
    def counted(self) -> int:
        """The tokens of the figure."""
        return sum(self.prompt_lengths if self.counts_prompts else self.output_lengths)


@dataclass(frozen=True, slots=True)
class Measurement:
    """tokens_per_second: of all repetitions, in order; what a workload counts is `tokens`."""

    name: str
    tokens: int
    unit: str
    tokens_per_second: Sequence[float]
    seconds: Sequence[float]
    num_requests: int
    prompt_lengths: Sequence[int]
    output_lengths: Sequence[int]
    preemptions: int
    steps: Sequence[int]


def mix(num_requests: int) -> Workload:
    """The mix of nano-vllm's benchmark."""
    lengths = random.Random(0)
    prompts = [lengths.randint(100, 1024) for _ in range(num_requests)]
    outputs = [lengths.randint(100, 1024) for _ in range(num_requests)]
    return Workload(f"mix-{num_requests}", prompts, outputs)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mix": lambda: mix(256),
    "mix-1024": lambda: mix(1024),
    "one-stream": lambda: Workload("one-stream", [128], [256]),
    "8-streams": lambda: Workload("8-streams", [128] * 8, [256] * 8),
    "prefill": lambda: Workload("prefill", [2048] * 64, [1] * 64, counts_prompts=True),
}
FIRST_TOKEN = "first-token"


def shape_config(name: str) -> ModelConfig:
    """A shape by name, or the path of a config.json. Raises ConfigError for what is neither."""
    if name in SHAPES:
        return ModelConfig(**SHAPES[name])
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"shape {name!r} is neither a file nor one of the built-in shapes {', '.join(SHAPES)}"
        )
    return ModelConfig.from_file(path)


def random_model(
    config: ModelConfig, device: str, dtype: torch.dtype, numerics: Numerics, layout: str | None = None
) -> ServedModel:
    """A model of random weights, drawn on the device itself; under a layout, by each rank its part.

    Raises ConfigError: the layout does not fit the model or the machine.
    """
    spread = serving_layout(layout)
    if spread is not None:
        with tempfile.TemporaryDirectory(prefix="mainspring-shape-") as directory:
            write_json(Path(directory) / "config.json", config.to_dict())
            name = str(dtype).removeprefix("torch.")
            return LeadModel(
                directory, spread, device=device, dtype=name, numerics=numerics, random_weights=True
            )
    model = Decoder(config, policy=Policy(numerics), device=torch_device(device), dtype=dtype)
    generator = torch.Generator(model.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        draw(parameter, name, generator)
    return model.eval()


def run_workload(llm: LLM, workload: Workload, repetitions: int, seed: int = 0) -> Measurement:
    """Generate the workload several times, each time with other tokens, so that no prefix is found in the cache."""
    tokens = random.Random(seed)
    vocabulary = min(10_000, llm.engine.limits.vocab_size)
    before = llm.engine.stats()
    seconds, steps = [], []
    for _ in range(repetitions):
        prompts = [[tokens.randrange(vocabulary) for _ in range(n)] for n in workload.prompt_lengths]
        params = [
            SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=n)
            for n in workload.output_lengths
        ]
        first_step = llm.engine.stats().steps_total
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
        steps.append(llm.engine.stats().steps_total - first_step)
        got = [len(output.outputs[0].token_ids) for output in outputs]
        if got != list(workload.output_lengths):
            raise ConfigError(
                f"{workload.name} does not fit the engine: {sum(got)} tokens came instead of "
                f"{sum(workload.output_lengths)}; raise max_model_len or the cache"
            )
    return Measurement(
        name=workload.name,
        tokens=workload.counted,
        unit="prompt tokens/s" if workload.counts_prompts else "output tokens/s",
        tokens_per_second=[workload.counted / s for s in seconds],
        seconds=seconds,
        num_requests=len(workload.prompt_lengths),
        prompt_lengths=list(workload.prompt_lengths),
        output_lengths=list(workload.output_lengths),
        preemptions=llm.engine.stats().preemptions_total - before.preemptions_total,
        steps=steps,
    )


def seconds_to_first_token(shape: str, device: str, numerics: Numerics, layout: str | None = None) -> float:
    """From the start of a new process, its imports included, to its first token."""
    code = (
        "from mainspring.engine.throughput import *\n"
        f"config = shape_config({shape!r})\n"
        f"model = random_model(config, {device!r}, torch.bfloat16, {numerics!r}, {layout!r})\n"
        "with LLM(model) as llm:\n"
        "    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))\n"
        f"    print({_FIRST_TOKEN!r}, flush=True)\n"
    )
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # it was asked for
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
    if line.strip() != _FIRST_TOKEN:
        raise ConfigError(
            f"the process that was to make a first token ended with status {process.returncode}"
        )
    return seconds


def warm_up(llm: LLM) -> None:
    """Compile and load what the workloads need: prompts of a full step, alone and beside decodes."""
    longest = llm.engine.limits.max_model_len - 8
    lengths = [min(longest, 2048)] * 4 + [min(longest, n) for n in (900, 17, 1)]
    run_workload(llm, Workload("warm-up", lengths, [4] * len(lengths)), 1, seed=-1)


def report(
    llm: LLM, shape: str, measurements: Sequence[Measurement], first_token: float | None
) -> dict[str, Any]:
    """All that is needed to read the figures again, as values of JSON."""
    device = llm.model.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "shape": shape,
        "numerics": llm.model.numerics,
        "layout": str(llm.model.layout) if isinstance(llm.model, LeadModel) else None,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "device": gpu or platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "temperature": TEMPERATURE,
        "engine": {**asdict(llm.engine.config), "cache": llm.engine.describe()},
        "first_token_seconds": first_token,
        "measurements": [asdict(measurement) for measurement in measurements],
    }
