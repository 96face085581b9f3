"""Training the small dual encoder on captioned pictures: contrastive (arXiv 2103.00020), the text side locked.

What is against learning by heart, because the pairs are few: pictures are moved, turned, cut, coloured and partly
covered anew each time; targets are softened by how alike the captions are, so that two drawings of a dog do not push
each other away; the weights that are kept are a running mean.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.rag.multimodal.dual_encoder import DualEncoder, DualEncoderConfig, image_vectors, text_vectors

Images = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Pictures [N, S, S, 3] and their captions' vectors [N, T], row by row."""

    images: Images
    texts: Vectors

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class TrainingSettings:
    """`soft`: the share of a target that goes to like captions, by a softmax of their cosine / soft_temperature."""

    epochs: int = 100
    seconds: float = math.inf
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    soft: float = 0.3
    soft_temperature: float = 0.1
    text_noise: float = 0.2
    mean_decay: float = 0.99
    seed: int = 0


def train(
    pairs: Pairs,
    config: DualEncoderConfig,
    settings: TrainingSettings,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> DualEncoder:
    """The trained model, ready for inference; `progress` hears (epoch, mean loss).

    The schedule follows epochs or time, whichever comes first: the learning rate reaches 0 at either.
    """
    torch.manual_seed(settings.seed)
    images = torch.from_numpy(pairs.images).to(device)
    texts = torch.from_numpy(pairs.texts).to(device)
    model = DualEncoder(config).to(device)
    mean = copy.deepcopy(model).requires_grad_(False)
    scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))
    parameters = [*model.parameters(), scale]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    batch = min(settings.batch_size, len(pairs))
    steps = len(pairs) // batch
    began = time.monotonic()
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(pairs), generator=generator, device=device)
        total = 0.0
        for step in range(steps):
            done = max(
                (epoch + step / steps) / settings.epochs, (time.monotonic() - began) / settings.seconds
            )
            if done >= 1:
                return mean.eval()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, 20 * done + 0.05) * _cosine(done)
            rows = order[step * batch : (step + 1) * batch]
            captions = texts[rows]
            pixels = augmented(images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
            noise = torch.randn(captions.shape, generator=generator, device=device)
            noisy = F.normalize(captions + settings.text_noise * noise / captions.shape[1] ** 0.5, dim=-1)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
                pictured, written = model.encode_images(pixels), model.encode_texts(noisy)
            loss = contrastive_loss(
                pictured, written, scale.exp().clamp(max=100), soft_targets(captions, settings)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            _update_mean(mean, model, settings.mean_decay)
            total += loss.item()
        if progress is not None:
            progress(epoch, total / steps)
    return mean.eval()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of both directions; images, texts: [B, D] unit vectors, targets: [B, B] rows of sum 1."""
    logits = scale * images @ texts.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def soft_targets(captions: Tensor, settings: TrainingSettings) -> Tensor:
    """(1 - soft) on the pair itself and `soft` spread over captions by their likeness: [B, B]."""
    like = torch.softmax(captions @ captions.T / settings.soft_temperature, dim=-1)
    own = torch.eye(len(captions), device=captions.device)
    return (1 - settings.soft) * own + settings.soft * like


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved, scaled, turned, mirrored, recoloured, each with one grey patch; [B, 3, S, S] in and out."""
    count, _, size, _ = pixels.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=pixels.device)

    angle = uniform(-0.26, 0.26, count)
    zoom, aspect = uniform(0.65, 1.15, count), uniform(0.85, 1.18, count)
    mirror = torch.where(uniform(0, 1, count) < 0.5, -1.0, 1.0)
    room = (1 - zoom).clamp(min=0) + 0.05
    matrix = torch.zeros(count, 2, 3, device=pixels.device)
    matrix[:, 0, 0] = zoom * aspect * angle.cos() * mirror
    matrix[:, 0, 1] = -zoom * angle.sin()
    matrix[:, 1, 0] = zoom * angle.sin() * mirror
    matrix[:, 1, 1] = zoom / aspect * angle.cos()
    matrix[:, :, 2] = uniform(-1, 1, count, 2) * room[:, None]
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1  # what comes in from outside is white
    grey = moved.mean(1, keepdim=True)
    saturation = uniform(0, 1.4, count, 1, 1, 1)
    colour = grey + saturation * (moved - grey)
    contrast, brightness = uniform(0.7, 1.3, count, 1, 1, 1), uniform(-0.2, 0.2, count, 1, 1, 1)
    coloured = (colour * contrast + brightness + uniform(-0.1, 0.1, count, 3, 1, 1)).clamp(-1, 1)
    side = uniform(0.1, 0.4, count) * size
    corner = uniform(0, 0.8, count, 2) * size
    line = torch.arange(size, device=pixels.device)
    inside = [(line >= corner[:, i, None]) & (line < (corner[:, i] + side)[:, None]) for i in (0, 1)]
    return coloured.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def ranks(model: DualEncoder, pairs: Pairs) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rank (from 1) of each caption's picture among all, and of each picture's caption."""
    scores = text_vectors(model, pairs.texts) @ image_vectors(model, pairs.images).T
    own = np.diag(scores)
    return (scores > own[:, None]).sum(1) + 1, (scores > own[None]).sum(0) + 1


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _update_mean(mean: DualEncoder, model: DualEncoder, decay: float) -> None:
    for kept, new in zip(mean.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)
