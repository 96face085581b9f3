"""From a recipe to what computes its steps: one device, or ranks under a layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mainspring.errors import CheckpointError, ConfigError, MainspringError, RecipeError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model, torch_dtype
from mainspring.ops import Policy
from mainspring.parallel.experts import Balance
from mainspring.parallel.launch import local_rank
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import DISK_TIMEOUT, Mesh
from mainspring.train.captured import CapturedPass
from mainspring.train.initialise import initialise
from mainspring.train.prepare import PreparedData
from mainspring.train.recipe import ParallelSection, Recipe
from mainspring.train.runner import Runner, SingleDevice, usable_device
from mainspring.train.sharded import Sharded

_MODEL_TYPES = {"Qwen3MoeForCausalLM": "qwen3_moe"}


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, of which this is one."""

    world: int = 1
    rank: int = 0

    @staticmethod
    def alone() -> Ranks:
        return Ranks()

    @staticmethod
    def present() -> Ranks:
        """Those of the process group, if there is one."""
        if not dist.is_initialized():
            return Ranks()
        return Ranks(dist.get_world_size(), dist.get_rank())

    @property
    def speaks(self) -> bool:
        return self.rank == 0

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first rank goes through the block before the others do. If one fails, so do all.

        The others wait as long as reading and tokenizing large texts may take.
        """
        if self.world == 1:
            yield
            return
        group = dist.new_group(timeout=DISK_TIMEOUT, backend="gloo")
        if not self.speaks:
            self._agree(None, group)
        failure: Exception | None = None
        try:
            yield
        except MainspringError as error:
            failure = error
        if self.speaks:
            self._agree(failure, group)
        if failure is None or not self.speaks:
            self._agree(failure, group)

    def _agree(self, failure: Exception | None, group: dist.ProcessGroup | None) -> None:
        failed = torch.tensor([float(failure is not None)])
        dist.all_reduce(failed, group=group)
        if failure is not None:
            raise failure
        if float(failed):
            raise ConfigError("another rank cannot start; its message says why")


def make_runner(recipe: Recipe, data: PreparedData, resume_from: Path | None, ranks: Ranks) -> Runner:
    """The model and optimizer of a run, new, from another model, or from a checkpoint of this run.

    Raises ConfigError for a layout that does not fit, CheckpointError, and what the model's configuration raises.
    """
    layout = layout_of(recipe.parallel, ranks.world)
    experts = recipe.experts
    balance = Balance(experts.auxiliary_loss, experts.bias_rate, experts.capacity_factor)
    plain = layout == Layout() and not (
        balance.auxiliary or balance.bias_rate or balance.capacity or recipe.parallel.offload
    )
    if plain:
        device = usable_device(recipe.training.device, setting="training.device")
        model = _make_model(recipe, data, resume_from, device)
        settings = recipe.training
        captured = None
        if settings.cuda_graph:
            captured = CapturedPass(model, settings.tokens_per_micro_batch, settings.sequence_length)
        single = SingleDevice(model, recipe.optimizer, captured)
        if resume_from is not None:
            single.load_optimizer(resume_from)
        return single
    return _make_sharded(recipe, data, resume_from, layout, balance)


def layout_of(section: ParallelSection, world: int) -> Layout:
    """The recipe's layout over the ranks that run. Raises ConfigError where they do not match."""
    others = section.pp * section.cp * section.tp
    if section.dp is None and world % others:
        raise ConfigError(
            f"pp {section.pp} · cp {section.cp} · tp {section.tp} = {others} does not divide the {world} ranks that run"
        )
    layout = Layout(
        pp=section.pp,
        dp=section.dp if section.dp is not None else world // others,
        cp=section.cp,
        tp=section.tp,
        ep=section.ep,
        zero=section.zero,
        replicate=section.replicate,
        sequence_parallel=section.sequence_parallel,
        schedule=section.schedule,
        virtual=section.virtual,
        split=_split(section.split),
        context=section.context,
        recompute=section.recompute,
        gradient_sums=section.gradient_sums,
    )
    if layout.world != world:
        raise ConfigError(
            f"layout {layout} needs {layout.world} ranks, but {world} run; start it with "
            f"torchrun --nproc-per-node {layout.world} -m mainspring train ..."
        )
    return layout


def _split(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in text.split("+")) if text else ()
    except ValueError as error:
        raise RecipeError(f"parallel.split = {text!r}: write the layers of each stage as 5+6+6+5") from error


def _make_sharded(
    recipe: Recipe, data: PreparedData, resume_from: Path | None, layout: Layout, balance: Balance
) -> Sharded:
    settings = recipe.training
    if settings.cuda_graph:
        raise ConfigError(
            "training.cuda_graph serves one device without a layout, balanced experts or offload; turn it off"
        )
    source = resume_from
    if source is None and recipe.model.init_from is not None:
        source = Path(recipe.model.init_from).expanduser()
    config = ModelConfig.from_file(source) if source is not None else model_config(recipe, data)
    _check_vocabulary(config, data)
    layout.check(config, settings.accumulation_steps)
    mesh = Mesh.build(layout.axes, key_copies=layout.key_copies(config))
    with ExitStack() as undo:
        if layout.world > 1:
            mesh.monitor.watch(recipe.parallel.watchdog_seconds)
            undo.callback(
                mesh.monitor.stop
            )  # an error is no hang: whoever handles it is not to be ended later
        device = usable_device(
            settings.device, local_rank() if settings.device == "cuda" else None, setting="training.device"
        )
        policy = Policy(settings.numerics)
        sharded = Sharded(
            config, layout, mesh, device, torch_dtype(settings.dtype), policy, recipe.optimizer, balance,
            offload=recipe.parallel.offload,
        )  # fmt: skip
        if source is not None:
            sharded.load_weights(source)
        else:
            sharded.initialise_weights(recipe.model, recipe.seed)
        if resume_from is not None:
            sharded.load_optimizer(resume_from)
        undo.pop_all()
    return sharded


def _make_model(
    recipe: Recipe, data: PreparedData, resume_from: Path | None, device: torch.device
) -> Decoder:
    settings = recipe.training
    if recipe.model.init_from is not None and resume_from is None:
        source = Path(recipe.model.init_from).expanduser()
        model = load_model(source, device=device, dtype=settings.dtype, numerics=settings.numerics)
    elif resume_from is not None:
        model = load_model(resume_from, device=device, dtype=settings.dtype, numerics=settings.numerics)
    else:
        config = model_config(recipe, data)
        model = create_model(config, dtype=settings.dtype, device=device, numerics=settings.numerics)
        initialise(model, recipe.model, recipe.seed)
    _check_vocabulary(model.config, data)
    return model


def _check_vocabulary(config: ModelConfig, data: PreparedData) -> None:
    if config.vocab_size < data.tokenizer.vocab_size:
        raise CheckpointError(
            f"the model's vocabulary of {config.vocab_size} is smaller than the tokenizer's "
            f"{data.tokenizer.vocab_size}; they do not belong together"
        )


def model_config(recipe: Recipe, data: PreparedData) -> ModelConfig:
    """The Hugging Face configuration of a recipe's new model."""
    model = recipe.model
    table: dict[str, Any] = {
        "architectures": [model.architecture],
        "model_type": _MODEL_TYPES.get(
            model.architecture, model.architecture.removesuffix("ForCausalLM").lower()
        ),
        "vocab_size": data.tokenizer.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.head_dim or model.hidden_size // model.num_heads,
        "max_position_embeddings": model.max_position_embeddings or recipe.training.sequence_length,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": data.tokenizer.end_of_text,
        "eos_token_id": data.tokenizer.end_of_text,
        "dtype": recipe.training.dtype,
    }
    if model.num_experts:
        width = model.moe_intermediate_size or model.intermediate_size
        table |= {
            "num_experts": model.num_experts,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_token,
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
        }
    return ModelConfig.from_dict(table)
