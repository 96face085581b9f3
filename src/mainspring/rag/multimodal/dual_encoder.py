"""A small dual encoder: pictures by a residual network of our own, texts by a sentence embedder with a linear map.

The text side stays as it is and only the map and the picture side are trained (locked-text tuning, the mirror of
arXiv 2111.07991), because a few thousand pairs teach a picture network, and no language. It is small: it knows
drawings and screenshots of the kinds that it was trained on. A real CLIP is loaded by `clip.py`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mainspring.errors import CheckpointError
from mainspring.formats.files import new_directory, write_file, write_json

KIND = "mainspring-dual-encoder"
_BATCH = 64  # pictures at once


@dataclass(frozen=True)
class DualEncoderConfig:
    """The shape: pictures of image_size², four stages of `widths` channels with `blocks` residual blocks each."""

    image_size: int = 80
    widths: tuple[int, ...] = (32, 64, 128, 256)
    blocks: int = 2
    dimension: int = 256
    text_model: str = "all-minilm-l6-v2"
    text_dimension: int = 384


class _Block(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); the first of a stage halves the picture (arXiv 1512.03385)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, inside, H, W] -> [B, outside, H / stride, W / stride]."""
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.skip(x) + self.second_norm(self.second(inner)))


class DualEncoder(nn.Module):
    """Pictures and the text model's vectors, both to unit vectors [B, dimension] whose products are cosines."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        first = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 5, 2, 2, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True)
        )
        layers: list[nn.Module] = []
        inside = first
        for stage, width in enumerate(config.widths):
            for number in range(config.blocks):
                layers.append(_Block(inside, width, 2 if stage and number == 0 else 1))
                inside = width
        self.layers = nn.Sequential(*layers)
        self.image_map = nn.Linear(inside, config.dimension)
        self.text_map = nn.Linear(config.text_dimension, config.dimension)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, S, S] in [-1, 1] -> unit vectors [B, dimension]."""
        features: Tensor = self.layers(self.stem(pixels))
        return F.normalize(self.image_map(features.mean((2, 3))).float(), dim=-1)

    def encode_texts(self, vectors: Tensor) -> Tensor:
        """vectors: [B, text_dimension], the text model's unit vectors -> unit vectors [B, dimension]."""
        return F.normalize(self.text_map(vectors).float(), dim=-1)


def to_pixels(images: npt.NDArray[np.uint8]) -> Tensor:
    """[B, S, S, 3] bytes -> [B, 3, S, S] float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def image_vectors(model: DualEncoder, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[N, S, S, 3] bytes -> [N, dimension] unit vectors, on the model's device."""
    device = model.image_map.weight.device
    parts = [
        model.encode_images(to_pixels(images[start : start + _BATCH]).to(device)).cpu().numpy()
        for start in range(0, len(images), _BATCH)
    ]
    return np.concatenate(parts) if parts else np.empty((0, model.config.dimension), np.float32)


@torch.inference_mode()
def text_vectors(model: DualEncoder, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[N, text_dimension] of the text model -> [N, dimension] unit vectors."""
    mapped = model.encode_texts(torch.from_numpy(vectors).to(model.image_map.weight.device))
    found: npt.NDArray[np.float32] = mapped.cpu().numpy()
    return found


@dataclass(frozen=True)
class Thresholds:
    """Cosines from which two belong together: a picture and a text, and two pictures. Calibrated on held-out pairs."""

    caption: float
    picture: float


def save_dual_encoder(
    model: DualEncoder, directory: Path, *, thresholds: Thresholds, notes: dict[str, object]
) -> None:
    """Writes `config.json` and `model.safetensors` (float16), whole or not at all. Raises OSError if it exists.

    `notes`: what it was trained on, for people.
    """
    tensors = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    with new_directory(directory) as target:
        fields = {"model_type": KIND, **dataclasses.asdict(model.config)}
        limits = dataclasses.asdict(thresholds)
        write_json(target / "config.json", {**fields, "thresholds": limits, "notes": notes})
        write_file(target / "model.safetensors", save(tensors))


def load_dual_encoder(directory: Path) -> tuple[DualEncoder, Thresholds]:
    """(the model on the CPU for inference, its thresholds) of a directory that `save_dual_encoder` wrote.

    Raises CheckpointError.
    """
    try:
        fields = json.loads((directory / "config.json").read_bytes())
        if fields.get("model_type") != KIND:
            raise ValueError(f"model_type is {fields.get('model_type')!r}")
        names = {field.name for field in dataclasses.fields(DualEncoderConfig)}
        values = {name: fields[name] for name in names}
        config = DualEncoderConfig(**{**values, "widths": tuple(values["widths"])})
        model = DualEncoder(config)
        stored = {n: t.float() for n, t in load_file(directory / "model.safetensors").items()}
        expected = {n for n in model.state_dict() if not n.endswith("num_batches_tracked")}
        if set(stored) != expected:
            raise ValueError(f"its tensors differ in {sorted(set(stored) ^ expected)[:3]}")
        model.load_state_dict(stored, strict=False)
        limits = {name: float(value) for name, value in fields["thresholds"].items()}
        return model.eval().requires_grad_(False), Thresholds(**limits)
    except Exception as error:  # safetensors raises its own kind
        raise CheckpointError(f"{directory} is not a {KIND}: {error}") from error
