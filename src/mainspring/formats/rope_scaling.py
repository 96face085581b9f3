"""How rotary embeddings are stretched beyond the trained context, as Hugging Face configs say it.

Sources: linear, Chen et al. 2023 (arXiv:2306.15595); dynamic NTK, bloc97 and emozilla 2023; YaRN, Peng
et al. 2023 (arXiv:2309.00071); llama3, the Llama 3.1 release. The formulas stand in `mainspring.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from mainspring.errors import ConfigError, UnsupportedModelError
from mainspring.formats._fields import (
    read_bool,
    read_float,
    read_optional_float,
    read_optional_int,
)

RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]
ROPE_KINDS: tuple[RopeKind, ...] = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """One RoPE scaling. Fields that a kind does not use are None (or at their defaults).

    `factor` is how much longer the context becomes. `original_max_position_embeddings` is the trained
    context of `yarn` and `llama3`; `linear` needs none, and `dynamic` takes
    `ModelConfig.max_position_embeddings` for it, as transformers 5 does. `attention_factor` multiplies cos
    and sin (yarn); None means that it follows from `factor`, and from `mscale` and `mscale_all_dim` where
    both are given and not 0. `truncate` rounds the bounds of yarn's ramp to whole dimensions.
    """

    kind: RopeKind
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UnsupportedModelError(_unknown_kind(self.kind))
        if not self.factor >= 1.0:
            raise ConfigError(f"RoPE scaling {self.kind!r} has factor {self.factor!r}: it must be at least 1")
        if self.kind in ("yarn", "llama3") and not self.original_max_position_embeddings:
            raise ConfigError(
                f"RoPE scaling {self.kind!r} needs original_max_position_embeddings (the trained context), "
                f"got {self.original_max_position_embeddings!r}"
            )
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or not high > low > 0:
                raise ConfigError(
                    "RoPE scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor, "
                    f"got {low!r} and {high!r}"
                )
        if self.kind == "yarn" and not self.beta_fast >= self.beta_slow > 0:
            raise ConfigError(
                "RoPE scaling 'yarn' needs beta_fast >= beta_slow > 0, "
                f"got {self.beta_fast!r} and {self.beta_slow!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The keys that transformers expects for this kind in `rope_parameters` (without `rope_theta`)."""
        out: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind in ("yarn", "llama3"):
            out["original_max_position_embeddings"] = self.original_max_position_embeddings
        if self.kind == "llama3":
            out["low_freq_factor"] = self.low_freq_factor
            out["high_freq_factor"] = self.high_freq_factor
        if self.kind == "yarn":
            out["beta_fast"] = self.beta_fast
            out["beta_slow"] = self.beta_slow
            out["truncate"] = self.truncate
            optional = {"attention_factor", "mscale", "mscale_all_dim"}
            out.update(
                {key: getattr(self, key) for key in sorted(optional) if getattr(self, key) is not None}
            )
        return out


def _unknown_kind(kind: object) -> str:
    known = ", ".join(["default", *ROPE_KINDS])
    return f"RoPE type {kind!r} is not supported; the known ones are: {known}"


def rope_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE settings of a Hugging Face config, whichever of its two spellings is used.

    `rope_scaling` (transformers 4) wins over `rope_parameters` (transformers 5) where both are set, as there.
    Raises ConfigError for anything but an object, UnsupportedModelError for settings by layer type.
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"the RoPE settings are {settings!r}: they must be an object")
    if any(isinstance(value, dict) for value in settings.values()):
        kinds = ", ".join(sorted(settings))
        raise UnsupportedModelError(f"RoPE settings that differ by layer type ({kinds}) are not supported")
    return settings


def read_rope(
    config: Mapping[str, Any], default_theta: float, max_position_embeddings: int
) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling or None) of a Hugging Face config; raises as `RopeScaling` and `rope_dict` do."""
    settings = rope_dict(config)
    for source in (config, settings):
        partial = read_optional_float(source, "partial_rotary_factor")
        if partial not in (None, 1.0):
            raise UnsupportedModelError(
                f"partial_rotary_factor is {partial:g}: only 1 (all dimensions) is supported"
            )
    holder = settings if settings.get("rope_theta") is not None else config
    theta = read_float(holder, "rope_theta", default_theta, above=0.0)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind in ("default", None):
        return theta, None
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(_unknown_kind(kind))
    return theta, _read_scaling(cast(RopeKind, kind), settings, config, max_position_embeddings)


def _read_scaling(
    kind: RopeKind, settings: Mapping[str, Any], config: Mapping[str, Any], max_position_embeddings: int
) -> RopeScaling:
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, read_float(settings, "factor"))
    # A trained context at the top level goes before the one among the RoPE settings, as in transformers.
    original = (
        read_optional_int(config, "original_max_position_embeddings", 1)
        or read_optional_int(settings, "original_max_position_embeddings", 1)
        or max_position_embeddings
    )
    if kind == "llama3":
        return RopeScaling(
            kind,
            read_float(settings, "factor"),
            original,
            low_freq_factor=read_float(settings, "low_freq_factor"),
            high_freq_factor=read_float(settings, "high_freq_factor"),
        )
    return RopeScaling(
        kind,
        read_float(settings, "factor", max_position_embeddings / original),
        original,
        beta_fast=read_float(settings, "beta_fast", 32.0) or 32.0,
        beta_slow=read_float(settings, "beta_slow", 1.0) or 1.0,
        attention_factor=read_optional_float(settings, "attention_factor", above=0.0),
        mscale=read_optional_float(settings, "mscale"),
        mscale_all_dim=read_optional_float(settings, "mscale_all_dim"),
        truncate=read_bool(settings, "truncate", True),
    )


def write_rope(config: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """Puts the RoPE settings into `config` in transformers 5's spelling, in place; unknown settings stay."""
    settings = dict(rope_dict(config))
    for key in ("rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        config.pop(key, None)
    modelled = {*RopeScaling.__dataclass_fields__, "type", "rope_type", "partial_rotary_factor"}
    settings = {key: value for key, value in settings.items() if key not in modelled}
    settings.update({"rope_type": "default"} if scaling is None else scaling.to_dict())
    settings["rope_theta"] = theta
    config["rope_parameters"] = settings
