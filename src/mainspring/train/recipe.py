"""The training recipe: every setting of a run, as frozen values with their ranges.

A recipe is a TOML file with the tables below; `recipe_file.py` reads and checks it. Lengths are in
tokens, times in seconds, fractions between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _limits(default: Any, *, low: float | None = None, high: float | None = None) -> Any:
    """A field whose value must lie in [low, high]; `recipe_file.py` enforces it."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class DataSection:
    """Where the texts are. Each file is one document."""

    sources: tuple[str, ...] = ()
    """Files, directories, or tar archives (.tar, .tar.gz, .tgz, .tar.xz, .tar.bz2), seen from the working directory."""
    weights: tuple[float, ...] = ()
    """Of the sources, one each: their shares of the tokens that are trained on (small sources come again, large ones
    are seen in part); empty: every text once an epoch."""
    members: str = "*.txt"
    """Glob on the path inside a directory or archive (`*` also crosses `/`); plain files are always taken."""
    encoding: str = "utf-8"
    holdout_fraction: float = _limits(0.0, low=0.0, high=0.5)
    """The last part of every text, by bytes, that is never trained on (nor seen by the tokenizer's training)."""
    shard_tokens: int = _limits(1 << 30, low=1)
    """Most tokens of one of the files that the texts are made into (a longer text has a file of its own)."""


@dataclass(frozen=True)
class TokenizerSection:
    """A byte-level BPE to train, or the directory of an existing tokenizer."""

    vocab_size: int = _limits(4096, low=258, high=1_000_000)
    path: str | None = None
    """A directory with tokenizer.json; `vocab_size` is then its own."""


@dataclass(frozen=True)
class ModelSection:
    """A new model of a standard Hugging Face family, or the directory of a model to continue from."""

    init_from: str | None = None
    """A model directory whose weights and tokenizer the run starts from; the other keys are then its own."""
    architecture: Literal[
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
    ] = "LlamaForCausalLM"
    hidden_size: int = _limits(256, low=8)
    intermediate_size: int = _limits(768, low=8)
    num_layers: int = _limits(4, low=1, high=1000)
    num_heads: int = _limits(4, low=1)
    num_kv_heads: int | None = _limits(None, low=1)
    """None: as many as num_heads."""
    head_dim: int | None = _limits(None, low=2)
    """None: hidden_size / num_heads."""
    max_position_embeddings: int | None = _limits(None, low=1)
    """None: training.sequence_length."""
    rope_theta: float = _limits(10_000.0, low=1.0)
    rms_norm_eps: float = _limits(1e-6, low=1e-12, high=1e-2)
    num_experts: int = _limits(0, low=0, high=4096)
    """Experts of each layer, for the architectures that have them."""
    num_experts_per_token: int = _limits(2, low=1)
    moe_intermediate_size: int | None = _limits(None, low=8)
    """Width of an expert; None: intermediate_size."""
    tie_word_embeddings: bool = True
    init_std: float = _limits(0.02, low=1e-6, high=1.0)
    """Standard deviation of the embedding (and of the output head, if it is not tied)."""
    init_scale: float = _limits(1.0, low=1e-3, high=10.0)
    """Linear weights are drawn with standard deviation init_scale / sqrt(inputs)."""
    zero_init_residual: bool = True
    """Start the projections that write into the residual stream (o_proj, down_proj) at zero."""


@dataclass(frozen=True)
class TrainingSection:
    """The loop: batch, length of the run, precision."""

    sequence_length: int = _limits(256, low=2)
    """Documents are cut into windows of at most so many tokens; each window's positions start at 0."""
    tokens_per_micro_batch: int = _limits(4096, low=2)
    """Most tokens in one forward pass: whole windows, packed end to end."""
    accumulation_steps: int = _limits(1, low=1)
    """Micro-batches whose gradients are summed before the weights move."""
    max_steps: int = _limits(1000, low=1)
    max_seconds: float | None = _limits(None, low=0.1)
    """Seconds after which training ends, its schedule complete; reading and tokenizing the texts count."""
    clip_norm: float = _limits(1.0, low=0.0)
    """Largest norm of the gradient over all weights; 0 turns clipping off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward and backward in bfloat16, master weights and optimizer state in float32."""
    device: Literal["cpu", "cuda"] = "cpu"
    numerics: Literal["lockstep", "fast"] = "fast"
    cuda_graph: bool = False
    """Replay forward and backward passes from CUDA graphs: for models whose kernels are shorter than their launches."""
    threads: int | None = _limits(None, low=1)
    """PyTorch's CPU threads; None leaves PyTorch's choice. Resuming is exact with an equal number."""
    log_every: int = _limits(10, low=1)


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW for all weights, or Muon for the matrices inside the layers and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = _limits(1e-3, low=0.0, high=10.0)
    """AdamW's peak learning rate."""
    beta1: float = _limits(0.9, low=0.0, high=0.9999)
    beta2: float = _limits(0.95, low=0.0, high=0.99999)
    eps: float = _limits(1e-8, low=1e-16, high=1e-2)
    weight_decay: float = _limits(0.1, low=0.0, high=10.0)
    """Decoupled decay of the matrices; embeddings, norms and biases are not decayed."""
    muon_lr: float = _limits(0.02, low=0.0, high=10.0)
    muon_momentum: float = _limits(0.95, low=0.0, high=0.9999)
    muon_weight_decay: float = _limits(0.0, low=0.0, high=10.0)
    muon_iterations: int = _limits(5, low=1, high=20)
    """Newton–Schulz steps of the orthogonalisation."""


@dataclass(frozen=True)
class ScheduleSection:
    """Factor on the learning rates as a function of progress (0 at the start, 1 at the end)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: warm-up, then half a cosine. wsd: warm-up, stable, linear decay. constant: warm-up, then 1."""
    warmup_fraction: float = _limits(0.02, low=0.0, high=1.0)
    decay_fraction: float = _limits(0.2, low=0.0, high=1.0)
    """Part of the run in which `wsd` decays."""
    final_factor: float = _limits(0.0, low=0.0, high=1.0)


@dataclass(frozen=True)
class EvaluationSection:
    """Bits per byte on the held-out tails."""

    every: int = _limits(0, low=0)
    """Steps between evaluations; 0 evaluates at the end only."""
    stride: int | None = _limits(None, low=1)
    """Held-out tokens that each window predicts; the rest of the window is context. None: half a window."""


@dataclass(frozen=True)
class CheckpointSection:
    """What is written while training, besides the checkpoint at the end."""

    every: int = _limits(0, low=0)
    """Steps between checkpoints; 0 writes at the end (and on Ctrl-C) only."""
    keep: int = _limits(2, low=1)
    """Newest checkpoints that are kept."""
    background: bool = True
    """Write from a copy in host memory while training goes on; false stops training for as long as the disk takes,
    and needs no copy."""


@dataclass(frozen=True)
class ParallelSection:
    """How the run is spread over ranks (`parallel.layout.Layout` has the meaning of each key); one rank by default."""

    pp: int = _limits(1, low=1)
    dp: int | None = _limits(None, low=1)
    """None: what the other degrees leave of the ranks that torchrun has started."""
    cp: int = _limits(1, low=1)
    tp: int = _limits(1, low=1)
    ep: int = _limits(1, low=1)
    zero: int = _limits(0, low=0, high=3)
    replicate: int = _limits(1, low=1)
    sequence_parallel: bool = True
    schedule: Literal["afab", "1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"] = "1f1b"
    virtual: int = _limits(1, low=1)
    split: str = ""
    """Layers of each stage, as 5+6+6+5; empty splits them evenly."""
    context: Literal["ring", "ulysses"] = "ring"
    recompute: Literal["none", "selective", "full"] = "none"
    gradient_sums: Literal["wide", "narrow"] = "wide"
    """Over ranks: in float32, or in the model's dtype (`Layout.gradient_sums`)."""
    offload: bool = False
    """Masters and moments in the host's memory, where the optimizer then runs."""
    watchdog_seconds: float = _limits(300.0, low=1.0)
    """A rank that has done nothing for so long names its step and collective and ends the run."""


@dataclass(frozen=True)
class ExpertsSection:
    """How a mixture of experts is kept balanced."""

    auxiliary_loss: float = _limits(0.0, low=0.0, high=10.0)
    """Coefficient of the load-balancing loss; the Hugging Face configuration calls it router_aux_loss_coef."""
    bias_rate: float = _limits(0.0, low=0.0, high=1.0)
    """Step of a bias on the choice of experts that follows the load."""
    capacity_factor: float = _limits(0.0, low=0.0, high=1000.0)
    """While training an expert takes so many times its even share of a micro-batch's slots and drops the rest; 0 drops
    nothing. Needs training.numerics = "fast"."""


@dataclass(frozen=True)
class SamplesSection:
    """Texts printed at the end, and on the way."""

    prompts: tuple[str, ...] = ()
    every: int = _limits(0, low=0)
    """Steps between samples; 0 draws them at the end only."""
    max_tokens: int = _limits(120, low=1)
    temperature: float = _limits(0.8, low=0.0, high=10.0)
    top_k: int = _limits(0, low=0)
    """Sample among the k likeliest tokens; 0 takes all."""


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    name: str = "run"
    output: str = "runs/run"
    """Directory of checkpoints, token shards and metrics; relative to the working directory."""
    seed: int = _limits(0, low=0, high=2**31 - 1)
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    experts: ExpertsSection = ExpertsSection()
    samples: SamplesSection = SamplesSection()
