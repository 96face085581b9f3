"""What lockstep costs a step of GRPO: the same run with `numerics="lockstep"` and with `"fast"`, turn by turn.

    python benchmarks/rl_lockstep.py --device cuda --out runs/rl_lockstep.json
    python benchmarks/rl_lockstep.py --device cpu --tiny

Random weights of Qwen3-0.6B's shape in bfloat16, the same in both; answers of a fixed length, rewards that depend on
the tokens alone. Each turn takes one step of either, in alternating order, so that what else happens on the machine
meets both. A step is rollouts, rewards, check, gradient, optimizer; times are wall-clock, with the device waited for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.weights import copy_weights
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import Policy
from mainspring.rl.grpo import GrpoSettings, grpo
from mainspring.rl.grpo_metrics import GrpoMetrics
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rewards import Completion
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TINY = QWEN3_06B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class ByTokens:
    """A reward between 0 and 1 that is no easier for one numerics than for the other."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [sum(c.tokens) % 97 / 97 for c in completions]


@dataclass
class Side:
    """One numerics' run, and what its steps took."""

    steps: Iterator[GrpoMetrics]
    seconds: list[float] = field(default_factory=list)
    rollout: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    max_delta: float = 0.0
    tokens: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1M parameters, to try the script")
    parser.add_argument("--turns", type=int, default=4, help="timed steps of either, after one that is not")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = ModelConfig.from_dict(TINY if options.tiny else QWEN3_06B)
    dtype = torch.bfloat16
    lockstep = create_model(config, dtype=dtype, device=options.device)
    fast = Decoder(config, policy=Policy("fast"), device=options.device, dtype=dtype)
    copy_weights(fast, lockstep.hf_tensors())
    sides = {"lockstep": _side(lockstep, options), "fast": _side(fast, options)}
    for turn in range(options.turns + 1):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            _step(sides[name], options.device, counts=turn > 0)
            print(f"turn {turn} {name}: {_last(sides[name])}", flush=True)
    _report(sides, options)


def _side(model: Decoder, options: argparse.Namespace) -> Side:
    generator = torch.Generator().manual_seed(0)
    shape = (8 * options.prompts, options.prompt_tokens)
    tokens = torch.randint(0, model.config.vocab_size - 1, shape, generator=generator).tolist()
    rollouts = Rollouts(
        model,
        [Prompt(tuple(row), "", "") for row in tokens],
        Texts(lambda text: [], lambda ids: "", (model.config.vocab_size - 1,)),
        ByTokens(),
        RolloutSettings(
            prompts_per_step=options.prompts,
            group_size=options.group,
            max_tokens=options.answer_tokens,
            free_cache=False,
        ),
        engine=EngineConfig(max_num_seqs=options.prompts * options.group),
    )
    optimizer = Optimizer(model, OptimizerSection(lr=1e-8, weight_decay=0.0))
    settings = GrpoSettings(tokens_per_microbatch=16_384)
    return Side(grpo(model, optimizer, rollouts, settings))


def _step(side: Side, device: str, *, counts: bool) -> None:
    began = time.perf_counter()
    metrics = next(side.steps)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    side.max_delta = max(side.max_delta, metrics.max_delta)
    side.tokens = metrics.tokens
    if counts:
        side.seconds.append(seconds)
        side.rollout.append(metrics.rollout_seconds)
        side.update.append(metrics.update_seconds)


def _last(side: Side) -> str:
    if not side.seconds:
        return "not timed"
    return f"{side.seconds[-1]:.3f} s (rollout {side.rollout[-1]:.3f}, update {side.update[-1]:.3f})"


def _report(sides: dict[str, Side], options: argparse.Namespace) -> None:
    record = {
        name: {
            "step": median(side.seconds),
            "rollout": median(side.rollout),
            "update": median(side.update),
            "steps": side.seconds,
            "tokens": side.tokens,
            "rollout_tokens_per_second": side.tokens / median(side.rollout),
            "max_delta": side.max_delta,
        }
        for name, side in sides.items()
    }
    ratio = record["lockstep"]["step"] / record["fast"]["step"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
    result = {
        "ratio": ratio,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "peak_gib_of_both": peak,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        **record,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
