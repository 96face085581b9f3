"""A micro-batch's forward and backward pass as one CUDA graph: the host launches one thing in place of a thousand.

For models whose kernels are shorter than their launches. Micro-batches are filled up to one number of tokens by
documents whose targets are left out, and to a power of two of documents by empty ones, so that few graphs serve all;
a row's result does not depend on the filling but for the choice of a product's tiles. On a CPU the filled pass is run
anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.ops import IGNORE_INDEX, TokenBatch
from mainspring.train.packing import MicroBatch

_FEWEST_SLOTS = 8
"""Documents of the smallest graph."""


@dataclass
class _Size:
    """The graph for up to `slots` documents, its inputs and what it leaves behind. graph: None on a CPU."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    share: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None
    gradients: list[Tensor | None] = field(default_factory=list)


class CapturedPass:
    """capacity: the most tokens of a micro-batch; longest: the most of a document.

    All graphs share one pool of memory: gradients of a pass are there until the next one begins.
    """

    def __init__(self, model: Decoder, capacity: int, longest: int) -> None:
        """Raises ConfigError for a model whose passes the host steers."""
        scaling = model.config.rope_scaling
        on_gpu = model.device.type == "cuda"
        if scaling is not None and scaling.kind == "dynamic":
            raise ConfigError(
                "training.cuda_graph: RoPE of kind 'dynamic' counts on the host; turn one of them off"
            )
        if on_gpu and (model.numerics != "fast" or model.dtype != torch.bfloat16):
            raise ConfigError(
                f"training.cuda_graph asks for numerics 'fast' and bfloat16, not for {model.numerics!r} and "
                f"{model.dtype}: only those kernels take lengths from the device"
            )
        self._model, self._capacity, self._longest = model, capacity, longest
        self._sizes: dict[int, _Size] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def run(self, micro: MicroBatch, share: float) -> Tensor:
        """share times the mean loss, whose gradients are then the parameters'; both until the next call.

        Raises ConfigError for a micro-batch that is larger than was said.
        """
        lengths = self._filled(micro)
        slots = max(_FEWEST_SLOTS, 1 << (len(lengths) - 1).bit_length())
        size = self._sizes.get(slots)
        if size is None:
            size = self._sizes[slots] = self._make(slots)
        self._fill(size, micro, lengths, slots, share)
        if self._model.device.type != "cuda":
            return self._compute(size, TokenBatch.packed(lengths, self._model.device))
        if size.graph is None:
            self._capture(size)
        assert size.graph is not None and size.loss is not None  # `_capture` has set them
        size.graph.replay()
        for parameter, gradient in zip(self._model.parameters(), size.gradients, strict=True):
            parameter.grad = gradient
        return size.loss

    def forget(self) -> None:
        """Gives the graphs' memory back."""
        self._sizes.clear()

    def _filled(self, micro: MicroBatch) -> tuple[int, ...]:
        rest = self._capacity - len(micro.tokens)
        if rest < 0 or max(micro.lengths) > self._longest:
            raise ConfigError(
                f"a micro-batch of {len(micro.tokens)} tokens with a document of {max(micro.lengths)} does not fit "
                f"graphs for {self._capacity} and {self._longest}"
            )
        filling = [self._longest] * (rest // self._longest) + [rest % self._longest] * (
            rest % self._longest > 0
        )
        return (*micro.lengths, *filling)

    def _make(self, slots: int) -> _Size:
        device, count = self._model.device, self._capacity
        tokens, targets, positions = torch.zeros(3, count, dtype=torch.int64, device=device).unbind(0)
        return _Size(
            tokens,
            targets,
            positions,
            torch.zeros(slots + 1, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.zeros((), device=device),
        )

    def _fill(
        self, size: _Size, micro: MicroBatch, lengths: tuple[int, ...], slots: int, share: float
    ) -> None:
        used = len(micro.tokens)
        _send(size.tokens[:used], torch.from_numpy(micro.tokens))
        size.tokens[used:].zero_()
        _send(size.targets[:used], torch.from_numpy(micro.targets))
        size.targets[used:].fill_(IGNORE_INDEX)
        filled = torch.tensor((*lengths, *(0,) * (slots - len(lengths))))
        ends = torch.tensor(list(accumulate(filled.tolist(), initial=0)))
        _send(size.positions, torch.arange(self._capacity) - ends[:-1].repeat_interleave(filled))
        _send(size.cu_seqlens, ends.to(torch.int32))
        _send(size.context_lens, filled.to(torch.int32))
        size.share.fill_(share)

    def _compute(self, size: _Size, batch: TokenBatch) -> Tensor:
        loss = self._model.loss(size.tokens, batch, size.targets) * size.share
        loss.backward()
        return loss.detach()

    def _capture(self, size: _Size) -> None:
        longest = (self._longest,)  # what the kernels are told of lengths on the host
        batch = TokenBatch(size.positions, size.cu_seqlens, size.context_lens, longest, longest, longest)
        parameters = list(self._model.parameters())
        # Once before: kernels are compiled and libraries started, which a capture does not allow.
        side = torch.cuda.Stream(self._model.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute(size, batch)
        torch.cuda.current_stream().wait_stream(side)
        for parameter in parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            size.loss = self._compute(size, batch)
        size.graph, size.gradients = graph, [parameter.grad for parameter in parameters]


def _send(target: Tensor, source: Tensor) -> None:
    """Into a device's tensor without waiting for what the device is doing."""
    if target.is_cuda:
        target.copy_(source.pin_memory(), non_blocking=True)
    else:
        target.copy_(source)
