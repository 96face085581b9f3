"""A layout: how one model and one batch are spread over ranks, as a value that is checked before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.parallel.mesh import Axes, even_bounds

ScheduleName = Literal["afab", "1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"]
ContextMethod = Literal["ring", "ulysses"]
Recompute = Literal["none", "selective", "full"]
GradientSums = Literal["wide", "narrow"]


@dataclass(frozen=True)
class Layout:
    """Degrees of the dimensions of parallelism, and how each works.

    `dp` ranks hold different micro-batches; of them `replicate` groups hold a whole copy each, inside which ZeRO
    shards (hybrid sharding, as in PyTorch's HSDP). ZeRO (Rajbhandari et al., arXiv 1910.02054): 0 shards nothing,
    1 the optimizer's state, 2 gradients as well, 3 parameters as well; it shards over dp / replicate · cp ranks.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 0
    replicate: int = 1
    sequence_parallel: bool = True
    """Under tp, norms and residuals work on a slice of the tokens (Korthikanti et al., arXiv 2205.05198)."""
    schedule: ScheduleName = "1f1b"
    virtual: int = 1
    """Model chunks of a pipeline rank; more than one needs the interleaved schedule."""
    split: tuple[int, ...] = ()
    """Layers of each of the pp · virtual stages in the model's order; empty splits them evenly."""
    context: ContextMethod = "ring"
    recompute: Recompute = "none"
    """What is computed again in the backward pass: nothing; norms, attention itself and gated products
    (`parallel.recompute`); or whole layers, of which only the inputs are kept."""
    gradient_sums: GradientSums = "wide"
    """Over ranks: in float32, or in the model's dtype (as PyTorch's DDP), half the bytes of a bfloat16 model's. Narrow
    sums are for steps of one micro-batch a rank: several are added on it in float32, and so are those sums."""
    tp_invariant: bool = False
    """Row-parallel sums by a tree that is the same at every degree: the bits do not depend on tp."""

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "cp", "tp", "ep", "replicate", "virtual"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"layout: {name} is {value}; it must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"layout: zero is {self.zero}; it must be 0, 1, 2 or 3")
        if self.dp % self.replicate:
            raise ConfigError(
                f"layout: replicate {self.replicate} does not divide dp {self.dp}; "
                "each replica must have equally many ranks to shard over"
            )
        for name, kind in (
            ("schedule", ScheduleName),
            ("context", ContextMethod),
            ("recompute", Recompute),
            ("gradient_sums", GradientSums),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"layout: {name} is {getattr(self, name)!r}; choose among {', '.join(get_args(kind))}"
                )
        if (self.virtual > 1) != (self.schedule == "interleaved"):
            raise ConfigError(
                f"layout: virtual {self.virtual} with schedule {self.schedule!r}: "
                "the interleaved schedule takes 2 or more chunks a rank, the others exactly 1"
            )
        if self.defers_weights and self.pp > 1 and self.zero >= 2:
            raise ConfigError(
                f"layout: zero {self.zero} with the zero-bubble schedule, whose weight gradients come late; "
                "use zero 0 or 1"
            )
        _ = self.axes  # checks ep

    @property
    def axes(self) -> Axes:
        """The mesh's degrees."""
        return Axes(self.pp, self.replicate, self.dp // self.replicate, self.cp, self.tp, self.ep)

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def stages(self) -> int:
        return self.pp * self.virtual

    @property
    def defers_weights(self) -> bool:
        """Whether gradients of weights are computed later than those of the layers' inputs."""
        return self.schedule in ("zero_bubble", "zero_bubble_h2")

    @property
    def sequence_sliced(self) -> bool:
        """Whether the residual stream is cut over the tensor-parallel ranks."""
        return self.sequence_parallel and self.tp > 1

    def key_copies(self, config: ModelConfig) -> int:
        """How many tensor-parallel ranks hold a copy of the same key head."""
        return max(1, self.tp // config.num_kv_heads)

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of each stage, first to last."""
        bounds = [0]
        if self.split:
            for size in self.split:
                bounds.append(bounds[-1] + size)
        else:
            bounds = even_bounds(num_layers, self.stages)
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """The stages of a pipeline rank: with v chunks a rank r holds stages r, r + pp, r + 2 pp, ..."""
        return list(range(pipeline_rank, self.stages, self.pp))

    def check(self, config: ModelConfig, micro_batches: int | None = None) -> None:
        """Raises ConfigError, naming the numbers, where the layout does not fit a model and the batch of a step."""
        tp, heads, kv_heads = self.tp, config.num_heads, config.num_kv_heads
        if heads % tp:
            self._refuse(f"tp {tp} does not divide the model's {heads} attention heads")
        if kv_heads % tp and tp % kv_heads:
            self._refuse(
                f"tp {tp} neither divides the model's {kv_heads} key heads nor is a multiple of them"
            )
        if config.vocab_size < tp:
            self._refuse(f"tp {tp} exceeds the vocabulary of {config.vocab_size}")
        widths = {
            config.moe_intermediate_size if moe else config.intermediate_size for moe in config.moe_layers
        }
        for width in sorted(widths):
            if width % tp:
                self._refuse(f"tp {tp} does not divide the MLP's width of {width}")
        if self.tp_invariant and (
            tp not in (1, 2, 4, 8) or heads * config.head_dim % 8 or any(w % 8 for w in widths)
        ):
            self._refuse(
                f"tp_invariant needs tp 1, 2, 4 or 8 (it is {tp}) and inner widths that 8 divides "
                f"(attention {heads * config.head_dim}, MLP {', '.join(map(str, sorted(widths)))})"
            )
        if self.tp_invariant and any(config.moe_layers):
            self._refuse(
                "tp_invariant is not promised of experts, whose slices each rank rounds; leave it out"
            )
        self._check_context(config)
        self._check_experts(config)
        self._check_pipeline(config)
        if micro_batches is not None:
            self._check_batch(micro_batches)

    def _check_context(self, config: ModelConfig) -> None:
        if self.cp == 1 or self.context != "ulysses":
            return
        heads = config.num_heads // self.tp
        kv_heads = max(1, config.num_kv_heads // self.tp)
        if heads % self.cp:
            self._refuse(
                f"Ulysses with cp {self.cp} does not divide the {heads} heads that tp {self.tp} leaves; use ring"
            )
        if kv_heads % self.cp and self.cp % kv_heads:
            self._refuse(
                f"Ulysses with cp {self.cp} neither divides the {kv_heads} key heads that tp {self.tp} leaves nor is a "
                "multiple of them; use ring"
            )

    def _check_experts(self, config: ModelConfig) -> None:
        if self.ep == 1:
            return
        if not any(config.moe_layers):
            self._refuse(f"ep {self.ep}, but the model has no experts")
        if config.num_experts % self.ep:
            self._refuse(f"ep {self.ep} does not divide the model's {config.num_experts} experts")

    def _check_pipeline(self, config: ModelConfig) -> None:
        layers = config.num_layers
        if self.stages > layers:
            self._refuse(f"{self.stages} stages (pp {self.pp} · virtual {self.virtual}) for {layers} layers")
        if self.split:
            if len(self.split) != self.stages:
                self._refuse(
                    f"split names {len(self.split)} stages; pp {self.pp} · virtual {self.virtual} = {self.stages}"
                )
            if sum(self.split) != layers or min(self.split) < 1:
                self._refuse(
                    f"split {'+'.join(map(str, self.split))} = {sum(self.split)} must have at least 1 layer a stage "
                    f"and the model's {layers} in all"
                )

    def _check_batch(self, micro_batches: int) -> None:
        if micro_batches % self.dp:
            self._refuse(f"dp {self.dp} does not divide the step's {micro_batches} micro-batches")
        mine = micro_batches // self.dp
        if self.schedule == "interleaved" and mine % self.pp:
            self._refuse(
                f"the interleaved schedule takes a multiple of pp {self.pp} micro-batches a replica; "
                f"{micro_batches} over dp {self.dp} leave {mine}"
            )

    def _refuse(self, problem: str) -> NoReturn:
        raise ConfigError(f"layout {self}: {problem}")

    def __str__(self) -> str:
        """As on the command line, for example `tp=2,pp=2,schedule=zero_bubble`; `one` if nothing is set."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
                parts.append(f"{field.name}={text}")
        return ",".join(parts) or "one"

    @staticmethod
    def parse(text: str) -> Layout:
        """Inverse of `str`. Raises ConfigError for an unknown key or a value that is not of its type."""
        fields = {field.name: field for field in dataclasses.fields(Layout)}
        values: dict[str, Any] = {}
        for part in text.split(",") if text not in ("", "one") else []:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in fields or not equals:
                raise ConfigError(f"layout: {part!r} is not key=value with a key among {', '.join(fields)}")
            values[key] = _parsed(key, value, fields[key].default)
        return Layout(**values)


def _parsed(key: str, value: str, default: object) -> object:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ConfigError(f"layout: {key} is {value!r}; it must be true or false")
        return value == "true"
    try:
        if isinstance(default, tuple):
            return tuple(int(piece) for piece in value.split("+"))
        return int(value) if isinstance(default, int) else value
    except ValueError as error:
        raise ConfigError(f"layout: {key} is {value!r}; it must be a whole number") from error
