"""The recipe of a post-training run: which algorithm, on what, with which settings.

A recipe is a TOML file. The tables `rollouts`, `sft`, `dpo`, `reward_model`, `grpo`, `ppo`, `vc_ppo` and `vapo` hold
the settings of the files of those names, key by key; of the algorithms' tables only the chosen one's counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mainspring.errors import RecipeError
from mainspring.rl.dpo import DpoSettings
from mainspring.rl.grpo import DAPO, DR_GRPO, GSPO, GrpoSettings
from mainspring.rl.lora import LoraSettings
from mainspring.rl.ppo import PpoSettings
from mainspring.rl.reward_model import RewardModelSettings
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.sft import SftSettings
from mainspring.rl.vapo import VapoSettings
from mainspring.rl.vc_ppo import VcPpoSettings
from mainspring.train.recipe import CheckpointSection, OptimizerSection
from mainspring.train.recipe_file import build_table, parse_toml

Algorithm = Literal["sft", "dpo", "reward_model", "grpo", "dr_grpo", "dapo", "gspo", "ppo", "vc_ppo", "vapo"]

WITH_CRITIC = ("ppo", "vc_ppo", "vapo")
GRPO_FAMILY = ("grpo", "dr_grpo", "dapo", "gspo")
_PRESETS = {"dr_grpo": DR_GRPO, "dapo": DAPO, "gspo": GSPO}


@dataclass(frozen=True)
class ModelSection:
    """The model to train: a Hugging Face directory, a GGUF file or a known name."""

    path: str = "smollm2"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16: forward and backward in bfloat16, master weights and optimizer state in float32."""
    device: Literal["cpu", "cuda"] = "cpu"
    numerics: Literal["lockstep", "fast"] = "lockstep"
    """fast: trainer and engine may differ in their last bits; how much is measured, and nothing stops."""
    threads: int | None = None
    """PyTorch's CPU threads; None leaves PyTorch's choice."""


@dataclass(frozen=True)
class DataSection:
    """What is learnt from: lines of JSON, or a task of reasoning-gym."""

    train: str = ""
    """{"prompt", "reference"} a line; for sft {"prompt", "answer"}, for pairs {"prompt", "chosen", "rejected"}."""
    validation: str = ""
    """Held-out lines of the same kind."""
    chat: bool = False
    """A prompt is a user's message in the model's chat template; else it is the text itself."""
    stop: tuple[str, ...] = ()
    """Further tokens, by their text, that end an answer; the model's own end tokens always do."""
    gym_task: str = ""
    """The name of a task of reasoning-gym, instead of files."""
    gym_settings: tuple[str, ...] = ()
    """The task's own: ["min_terms=2", "max_terms=2"]."""
    gym_shots: int = 0
    """Solved entries before each question."""
    gym_prompts: int = 5000
    gym_validation: int = 200
    gym_seed: int = 0
    """Of the entries; the held-out ones have another."""


@dataclass(frozen=True)
class RewardSection:
    """What an answer is worth."""

    function: str = "mainspring.rl.verifiers:same_number"
    """module:name of a function (prompt, answer, reference) -> float; it runs in a process of its own."""
    timeout: float = 10.0
    """Seconds for one answer; in an environment for each `reset` and `step`."""
    model: str = ""
    """Directory of a reward model of the same tokenizer, whose scores are then the rewards."""
    max_failures: int = 100
    environment: str = ""
    """module:name of what makes an `Environment`, which then gives the rewards, from a process of its own. Its failures
    are limited by `rollouts.max_failures`."""


@dataclass(frozen=True)
class EngineSection:
    """The engine that writes; what is not given it chooses itself."""

    temperature: float = 1.0
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    snapshot: bool = False
    """Let it compute with a copy of the weights."""
    ahead: bool = False
    """Let it write the next step's answers, with a copy of the weights, while a step is learnt from (`rl.ahead`)."""
    ray_workers: int = 0
    """So many engines in Ray's actors write instead, on a GPU each where there are some (`rl.ray_rollouts`)."""
    ray_address: str = ""
    """Of a running cluster; empty starts Ray on this machine."""


@dataclass(frozen=True)
class RanksSection:
    """Where torchrun has started several ranks, which are then data-parallel."""

    zero: Literal[0, 1, 2, 3] = 0
    """What they share instead of each having all: 1 the optimizer's state, 2 the gradients too, 3 the weights too."""
    tp: int = 1
    """So many ranks share each layer (2, 4 or 8, in the order of sums that no degree changes); the groups of them are
    data-parallel."""


@dataclass(frozen=True)
class ValidationSection:
    """Answers to held-out prompts."""

    every: int = 0
    """Steps between validations; 0 validates at the start and at the end only."""
    samples: int = 1
    temperature: float | None = None
    """None: as in training; 0 takes the likeliest token."""


@dataclass(frozen=True)
class RlRecipe:
    """A whole run."""

    algorithm: Algorithm
    name: str = "run"
    output: str = "runs/rl"
    """Directory of checkpoints, metrics.jsonl and rollouts.jsonl; relative to the working directory."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    lora: LoraSettings = field(default_factory=LoraSettings)
    """With a rank above 0 adapters are trained instead of the weights."""
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    engine: EngineSection = EngineSection()
    parallel: RanksSection = RanksSection()
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-6, weight_decay=0.0))
    critic: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-5, weight_decay=0.0))
    sft: SftSettings = field(default_factory=SftSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)
    reward_model: RewardModelSettings = field(default_factory=RewardModelSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    ppo: PpoSettings = field(default_factory=PpoSettings)
    vc_ppo: VcPpoSettings = field(default_factory=VcPpoSettings)
    vapo: VapoSettings = field(default_factory=VapoSettings)
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    @property
    def settings(self) -> SftSettings | DpoSettings | RewardModelSettings | GrpoSettings | PpoSettings:
        """Those of the chosen algorithm."""
        match self.algorithm:
            case "sft":
                return self.sft
            case "dpo":
                return self.dpo
            case "reward_model":
                return self.reward_model
            case "ppo":
                return self.ppo
            case "vc_ppo":
                return self.vc_ppo
            case "vapo":
                return self.vapo
            case _:
                return self.grpo


def load_rl_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RlRecipe:
    """The recipe in a TOML file, with `section.key=value` overrides put in.

    dr_grpo, dapo and gspo read the table `grpo` over the presets of those names. Raises RecipeError for an unreadable
    file, an unknown key, a wrong type, and data that does not suit the algorithm.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}. Give the path of a TOML file.") from error
    return parse_rl_recipe(text, str(path), overrides)


def parse_rl_recipe(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> RlRecipe:
    """Like load_rl_recipe, from the TOML text itself; `where` names it in messages."""
    table = parse_toml(text, where, overrides)
    if "algorithm" not in table:
        raise RecipeError(f"{where}: algorithm is missing; set it to one of {', '.join(_algorithms())}")
    preset = _PRESETS.get(str(table["algorithm"]))
    given = table.get("grpo", {})
    if preset is not None and isinstance(given, Mapping):
        table["grpo"] = _changes(preset) | dict(given)
    recipe: RlRecipe = build_table(RlRecipe, table, where)
    data = recipe.data
    if bool(data.train) == bool(data.gym_task):
        raise RecipeError(f"{where}: set either data.train, a file of JSON lines, or data.gym_task")
    if data.gym_task and recipe.algorithm in ("sft", "dpo", "reward_model"):
        raise RecipeError(f"{where}: data.gym_task gives prompts; {recipe.algorithm} learns from data.train")
    engine = recipe.engine
    elsewhere = [
        name for name in ("snapshot", "ahead", "ray_workers") if getattr(engine, name)
    ]  # of whom at most one
    if len(elsewhere) > 1:
        raise RecipeError(f"{where}: engine.{elsewhere[0]} and engine.{elsewhere[1]} exclude each other")
    if recipe.lora.rank and (elsewhere or recipe.algorithm == "reward_model"):
        raise RecipeError(
            f"{where}: lora.rank = {recipe.lora.rank} with engine.snapshot, engine.ahead, engine.ray_workers or "
            "algorithm = 'reward_model'; adapters are trained only where the engine shares the trainer's tensors"
        )
    return recipe


def rl_recipe_to_dict(recipe: RlRecipe) -> dict[str, Any]:
    """The recipe as plain JSON-able values."""
    return asdict(recipe)


def _changes(preset: GrpoSettings) -> dict[str, Any]:
    """Which fields a preset sets, and to what."""
    plain = GrpoSettings()
    changed = {f.name: getattr(preset, f.name) for f in fields(preset)}
    return {name: value for name, value in changed.items() if value != getattr(plain, name)}


def _algorithms() -> tuple[str, ...]:
    return ("sft", "dpo", "reward_model", "grpo", *_PRESETS, "ppo", "vc_ppo", "vapo")
