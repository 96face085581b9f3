"""CLIP (arXiv 2103.00020) from a Hugging Face directory: both towers, the tokenizer, the preparation of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mainspring.errors import CheckpointError, UnsupportedModelError
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.multimodal.dual_encoder import Thresholds

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BATCH = 16  # pictures or texts at once


@dataclass(frozen=True)
class TowerConfig:
    """One transformer of CLIP, named as in `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    hidden_act: str

    @staticmethod
    def of(fields: Mapping[str, Any], **defaults: int) -> TowerConfig:
        """Of a part of `config.json`; what it leaves out has CLIP's default. Raises UnsupportedModelError."""
        sizes = {name: int(fields.get(name, value)) for name, value in defaults.items()}
        act = str(fields.get("hidden_act", "quick_gelu"))
        if act not in ("quick_gelu", "gelu"):
            raise UnsupportedModelError(f"CLIP with hidden_act {act!r}; quick_gelu and gelu are known")
        return TowerConfig(**sizes, layer_norm_eps=float(fields.get("layer_norm_eps", 1e-5)), hidden_act=act)


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.act = config.num_attention_heads, config.hidden_act
        self.layer_norm1 = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(hidden, config.layer_norm_eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in names})
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(hidden, config.intermediate_size),
                "fc2": nn.Linear(config.intermediate_size, hidden),
            }
        )

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x: [B, L, hidden] -> [B, L, hidden]."""
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](attended)
        inner = self.mlp["fc1"](self.layer_norm2(x))
        inner = inner * torch.sigmoid(1.702 * inner) if self.act == "quick_gelu" else F.gelu(inner)
        out: Tensor = x + self.mlp["fc2"](inner)
        return out


class _VisionTower(nn.Module):
    """A picture's patches and a class token through the layers; the class token's state, normalised."""

    def __init__(self, config: TowerConfig, image_size: int, patch_size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(hidden))
        self.patch_embedding = nn.Conv2d(3, hidden, patch_size, patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, hidden))
        self.pre_layrnorm = nn.LayerNorm(hidden, config.layer_norm_eps)  # spelt as the checkpoints spell it
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(hidden, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, S, S] -> [B, hidden]."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.pre_layrnorm(torch.cat([first, patches], 1) + self.position_embedding)
        for layer in self.layers:
            x = layer(x, False)
        pooled: Tensor = self.post_layernorm(x[:, 0])
        return pooled


class _TextTower(nn.Module):
    """Tokens through causal layers; the state at the end-of-text token, normalised."""

    def __init__(self, config: TowerConfig, vocab_size: int, positions: int) -> None:
        super().__init__()
        self.token_embedding = nn.Parameter(torch.empty(vocab_size, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(positions, config.hidden_size))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """tokens: [B, L], ends: [B] places of the end-of-text tokens -> [B, hidden]. Padding stands after them."""
        x = F.embedding(tokens, self.token_embedding) + self.position_embedding[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, True)
        pooled: Tensor = self.final_layer_norm(x)[torch.arange(len(x)), ends]
        return pooled


class ClipEncoder:
    """Implements `PictureEncoder`. Thread-safe: nothing changes after construction."""

    def __init__(self, name: str, directory: Path, thresholds: Thresholds) -> None:
        """Raises CheckpointError for damaged or missing files, UnsupportedModelError for another kind of model."""
        self.name, self.thresholds = name, thresholds
        try:
            fields = json.loads((directory / "config.json").read_bytes())
            if fields.get("model_type") != "clip":
                raise UnsupportedModelError(
                    f"{directory} holds a model of type {fields.get('model_type')!r}; picture encoders are 'clip'"
                )
            self._build(fields)
            self._prepare(json.loads((directory / "preprocessor_config.json").read_bytes()))
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except UnsupportedModelError:
            raise
        except Exception as error:  # tokenizers raises bare exceptions
            raise CheckpointError(
                f"{directory} is not a CLIP model (config.json, preprocessor_config.json, tokenizer.json): {error}"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        reader = CheckpointReader(directory)
        with torch.no_grad():
            for stored, parameter in self._parameters():
                entry = reader.entry(stored)
                if tuple(entry.shape) != tuple(parameter.shape) or entry.dtype not in _DTYPES:
                    raise CheckpointError(
                        f"tensor {stored!r} is {entry.dtype} {list(entry.shape)}, needed is {list(parameter.shape)}"
                    )
                values = torch.frombuffer(bytearray(entry.data), dtype=_DTYPES[entry.dtype])
                parameter.copy_(values.reshape(parameter.shape))

    @property
    def dimension(self) -> int:
        return self._text_map.out_features

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        found = [np.empty((0, self.dimension), np.float32)]
        for first in range(0, len(pictures), _BATCH):
            pixels = torch.stack([self._pixels(picture) for picture in pictures[first : first + _BATCH]])
            found.append(F.normalize(self._picture_map(self._vision(pixels)), dim=-1).numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        found = [np.empty((0, self.dimension), np.float32)]
        for first in range(0, len(texts), _BATCH):
            ids = [self._ids(text) for text in texts[first : first + _BATCH]]
            width = max(map(len, ids))
            tokens = torch.tensor([row + [row[-1]] * (width - len(row)) for row in ids])
            ends = torch.tensor([len(row) - 1 for row in ids])
            found.append(F.normalize(self._text_map(self._text(tokens, ends)), dim=-1).numpy())
        return np.concatenate(found)

    def _build(self, fields: Mapping[str, Any]) -> None:
        vision, text = fields["vision_config"], fields["text_config"]
        heads = {"num_hidden_layers": 12, "num_attention_heads": 12}
        vision_tower = TowerConfig.of(vision, hidden_size=768, intermediate_size=3072, **heads)
        heads["num_attention_heads"] = 8
        text_tower = TowerConfig.of(text, hidden_size=512, intermediate_size=2048, **heads)
        self._positions = int(text.get("max_position_embeddings", 77))
        self._vision = _VisionTower(
            vision_tower, int(vision.get("image_size", 224)), int(vision.get("patch_size", 32))
        ).eval()
        self._text = _TextTower(text_tower, int(text.get("vocab_size", 49408)), self._positions).eval()
        dimension = int(fields.get("projection_dim", 512))
        self._picture_map = nn.Linear(vision_tower.hidden_size, dimension, bias=False)
        self._text_map = nn.Linear(text_tower.hidden_size, dimension, bias=False)

    def _prepare(self, fields: Mapping[str, Any]) -> None:
        size, crop = fields.get("size", 224), fields.get("crop_size", 224)
        self._shortest = int(size.get("shortest_edge", 224) if isinstance(size, dict) else size)
        self._crop = int(crop.get("height", 224) if isinstance(crop, dict) else crop)
        self._mean = torch.tensor(fields["image_mean"]).reshape(3, 1, 1)
        self._deviation = torch.tensor(fields["image_std"]).reshape(3, 1, 1)

    def _pixels(self, picture: Image.Image) -> Tensor:
        """[3, crop, crop]: the shortest side scaled (bicubic), the middle cut out, normalised."""
        width, height = picture.size
        short, long = min(width, height), max(width, height)
        other = int(self._shortest * long / short)
        sides = (self._shortest, other) if width <= height else (other, self._shortest)
        scaled = picture.resize(sides, Image.Resampling.BICUBIC)
        left, top = (sides[0] - self._crop) // 2, (sides[1] - self._crop) // 2
        cut = np.asarray(scaled.crop((left, top, left + self._crop, top + self._crop)), dtype=np.float32)
        return (torch.from_numpy(cut).permute(2, 0, 1) / 255 - self._mean) / self._deviation

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids if len(ids) <= self._positions else [*ids[: self._positions - 1], ids[-1]]

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(the checkpoint's name, our parameter)."""
        special = {
            "class_embedding": "embeddings.class_embedding",
            "patch_embedding.weight": "embeddings.patch_embedding.weight",
            "position_embedding": "embeddings.position_embedding.weight",
            "token_embedding": "embeddings.token_embedding.weight",
        }
        for prefix, tower in (("vision_model", self._vision), ("text_model", self._text)):
            for name, parameter in tower.named_parameters():
                stored = f"encoder.{name}" if name.startswith("layers.") else special.get(name, name)
                yield f"{prefix}.{stored}", parameter
        yield "visual_projection.weight", self._picture_map.weight
        yield "text_projection.weight", self._text_map.weight
