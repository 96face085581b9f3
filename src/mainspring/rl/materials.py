"""From a recipe's names to what a run is made of: texts, prompts, reward functions, environments."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.tokenizer import Tokenizer
from mainspring.rl.environment import Environment
from mainspring.rl.gym import gym_prompts
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.recipe import DataSection, RewardSection
from mainspring.rl.rewards import RewardFunction
from mainspring.rl.sample_files import TokenRules, read_prompts

_SEEDS_APART = 1_000_003  # entry i of seed s is entry 0 of seed s + i


def texts_of(tokenizer: Tokenizer, config: ModelConfig, data: DataSection) -> Texts:
    """Raises ConfigError for a stop that is not exactly one token."""
    ends = [*config.eos_token_ids, *tokenizer.eos_token_ids]
    for stop in data.stop:
        tokens = tokenizer.encode(stop, add_special_tokens=False)
        if len(tokens) != 1:
            raise ConfigError(
                f"data.stop has {stop!r}, which is {len(tokens)} tokens of this model; a stop must be one"
            )
        ends += tokens
    return Texts(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokenizer.decode,
        tuple(dict.fromkeys(ends)),
    )


def token_rules(texts: Texts, tokenizer: Tokenizer, data: DataSection) -> TokenRules:
    """For files of samples and pairs. Raises ConfigError for a model without an end token."""
    if not texts.ends:
        raise ConfigError("the model names no end token, which an answer must end with; set data.stop")
    if not data.chat:
        return TokenRules(texts.encode, texts.ends[0])
    return TokenRules(texts.encode, texts.ends[0], prompt=prompt_encoder(texts, tokenizer, data))


def prompt_encoder(texts: Texts, tokenizer: Tokenizer, data: DataSection) -> Callable[[str], list[int]]:
    """A prompt's text -> all tokens that stand before the answer."""
    if not data.chat:
        return lambda text: list(texts.encode(text))

    def encode(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return list(texts.encode(tokenizer.apply_chat_template(messages)))

    return encode


def read_all_prompts(
    data: DataSection, encode: Callable[[str], list[int]]
) -> tuple[list[Prompt], list[Prompt]]:
    """(those to train on, those held out). Raises ConfigError."""
    if not data.gym_task:
        held_out = read_prompts(data.validation, encode) if data.validation else []
        return read_prompts(data.train, encode), held_out
    settings = _pairs(data.gym_settings)

    def made(count: int, seed: int) -> list[Prompt]:
        return gym_prompts(
            data.gym_task,
            count,
            encode,
            seed=seed,
            shots=data.gym_shots,
            shots_seed=data.gym_seed + 2 * _SEEDS_APART,
            settings=settings,
        )

    train = made(data.gym_prompts, data.gym_seed)
    seen = {prompt.text for prompt in train}
    held_out = made(data.gym_validation, data.gym_seed + _SEEDS_APART)
    return train, [prompt for prompt in held_out if prompt.text not in seen]


def longest(train: Sequence[Prompt], held_out: Sequence[Prompt], max_tokens: int, config: ModelConfig) -> int:
    """The engine's longest sequence: held-out prompts must fit too. Raises ConfigError."""
    longest = max(len(prompt.tokens) for prompt in (*train, *held_out)) + max_tokens
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"the longest prompt and rollouts.max_tokens = {max_tokens} make {longest} tokens, but the model's "
            f"context is {config.max_position_embeddings}; leave longer prompts out or lower max_tokens"
        )
    return longest


def reward_function(reward: RewardSection) -> RewardFunction:
    """Raises ConfigError."""
    found: RewardFunction = _imported(reward.function, "reward.function")
    return found


def environment_factory(reward: RewardSection) -> Callable[[], Environment] | None:
    """Raises ConfigError."""
    if not reward.environment:
        return None
    found: Callable[[], Environment] = _imported(reward.environment, "reward.environment")
    return found


def _imported(name: str, setting: str) -> Any:
    """What module:name names; modules of the working directory are found too."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{setting} = {name!r}: write it as module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting} = {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"{setting} = {name!r} is no function")
    return found


def _pairs(settings: tuple[str, ...]) -> dict[str, Any]:
    try:
        return tomllib.loads("\n".join(settings))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"data.gym_settings = {list(settings)}: write each as name=value ({error})"
        ) from error
