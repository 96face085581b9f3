"""The sharded twin of `Decoder`: a rank's stages of it, each a run of layers between the embedding and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import check_sequences
from mainspring.model.layers import DecoderLayer, RmsNorm
from mainspring.model.rope import RotaryEmbedding
from mainspring.ops import Policy, RopeAngles, TokenBatch
from mainspring.parallel import recompute
from mainspring.parallel.context import ContextBatch, cut_stream, own_pieces, whole_values
from mainspring.parallel.experts import Balance
from mainspring.parallel.layout import Layout
from mainspring.parallel.log_probs import token_log_probs, token_log_probs_and_entropy
from mainspring.parallel.mesh import Mesh, even_bounds
from mainspring.parallel.placement import Placement
from mainspring.parallel.tensor import TensorParallel, whole_stream
from mainspring.parallel.vocabulary import embed, token_loss, whole_logits

Stream = tuple[Tensor | None, Tensor]
"""(update, residual): the residual stream's value is their sum."""


class Observer(Protocol):
    """Told when a layer begins and ends; may replace the stream's tensors by equal ones with hooks in their graph."""

    def before(self, number: int, stream: Stream) -> Stream: ...
    def after(self, number: int, stream: Stream) -> Stream: ...


class ParallelDecoder(nn.Module):
    """Made by `parallelize`. Parameters and modules bear the unsharded decoder's names (`layers.3.attention.qkv`).

    `forward` and `logits` are the decoder's own, for layouts without a pipeline; a pipeline runs `run_stage`.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        layout: Layout,
        mesh: Mesh,
        placement: Placement,
        tp: TensorParallel,
        balance: Balance,
        embedding: nn.Parameter | None,
        layers: dict[int, nn.Module],
        norm: RmsNorm | None,
        output_embedding: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.config, self.policy, self.layout, self.mesh = config, policy, layout, mesh
        self.placement, self.tp, self.balance = placement, tp, balance
        self.embedding = embedding
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.norm = norm
        self.output_embedding = output_embedding
        self.rotary = RotaryEmbedding(config)
        self.observer: Observer | None = None
        self.stages = layout.stages_of(mesh.index["pp"])
        self.stage_layers = layout.stage_layers(config.num_layers)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def output_weight(self) -> Tensor:
        """The rank's rows of the output embedding, which may be the input one."""
        weight = self.embedding if self.config.tie_word_embeddings else self.output_embedding
        assert weight is not None  # asked of the last stage only
        return weight

    def batch(self, lengths: Sequence[int], rope_lengths: Sequence[int] | None = None) -> TokenBatch:
        """The rank's part of a stream of whole documents of these lengths."""
        if self.layout.cp > 1:
            return cut_stream(lengths, self.mesh.group("cp"), self.device, rope_lengths)
        return TokenBatch.packed(lengths, self.device, rope_lengths)

    def own(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """Of a tensor over the whole stream [T, ...], what belongs to the rank's context [T / cp, ...]."""
        if isinstance(batch, ContextBatch):
            assert batch.index is not None  # `cut_stream` sets it
            return tokens[batch.index]
        return tokens

    def stage_rows(self, batch: TokenBatch) -> int:
        """Rows of the residual stream that pass between stages on this rank."""
        if not self.tp.sliced:
            return batch.num_tokens
        bounds = even_bounds(batch.num_tokens, self.tp.group.size)
        return bounds[self.tp.group.rank + 1] - bounds[self.tp.group.rank]

    def run_stage(self, stage: int, x: Tensor, batch: TokenBatch) -> Tensor:
        """x: tokens [T] int64 at the first stage, else the residual stream [rows, H] -> the residual stream; after
        the last stage the hidden states under the final norm. Under tp the rows may be the rank's slice."""
        self.tp.tokens = batch.num_tokens
        self.balance.pieces = own_pieces(batch, self.mesh.group("cp"))
        if stage == 0:
            assert self.embedding is not None  # the first stage holds it
            residual = embed(x, self.embedding, self.config.vocab_size, self.tp)
        else:
            residual = x
        angles = self.rotary.angles(batch)
        stream: Stream = (None, residual)
        for number in self.stage_layers[stage]:
            stream = self._run_layer(number, stream, batch, angles)
        update, residual = stream
        assert update is not None  # a stage has at least one layer
        if stage < self.layout.stages - 1:
            return update + residual
        assert self.norm is not None  # the last stage holds it
        hidden, _ = self.norm.add(update, residual)
        return hidden

    def _run_layer(self, number: int, stream: Stream, batch: TokenBatch, angles: RopeAngles) -> Stream:
        if self.observer is not None:
            stream = self.observer.before(number, stream)
        layer = self.layers[str(number)]
        if self.layout.recompute == "full" and torch.is_grad_enabled():
            stream = self._run_twice(layer, stream, batch, angles)
        elif self.layout.recompute == "selective":
            stream = recompute.run_layer(cast(DecoderLayer, layer), *stream, batch, angles)
        else:
            stream = layer(*stream, batch, angles)
        return stream if self.observer is None else self.observer.after(number, stream)

    def _run_twice(self, layer: nn.Module, stream: Stream, batch: TokenBatch, angles: RopeAngles) -> Stream:
        """Keeps the layer's inputs alone; its backward pass computes the layer again."""
        times = 0

        def run(update: Tensor | None, residual: Tensor) -> Stream:
            nonlocal times
            times += 1
            # Another micro-batch may have gone through in between.
            self.tp.tokens, self.balance.pieces = batch.num_tokens, own_pieces(batch, self.mesh.group("cp"))
            self.balance.recording = times == 1
            try:
                again: Stream = layer(update, residual, batch, angles)
                return again
            finally:
                self.balance.recording = True

        # To its end, so that all ranks walk through the same collectives.
        with set_checkpoint_early_stop(False):
            result: Stream = checkpoint(run, *stream, use_reentrant=False, preserve_rng_state=False)
        return result

    def loss_sum(self, hidden: Tensor, batch: TokenBatch, targets: Tensor) -> Tensor:
        """The sum of -log p of the rank's targets [T]; under tp the same on every rank of the group."""
        self.tp.tokens = batch.num_tokens
        return token_loss(hidden, self.output_weight, targets, self.config.vocab_size, self.tp)

    def forward(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """tokens: [T] int64 -> hidden states after the final norm, [T, hidden], as `Decoder.forward`."""
        return whole_stream(self.run_stage(0, tokens, batch), self.tp)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, hidden] -> [N, vocab] float32 on every rank. Without a gradient."""
        return whole_logits(hidden, self.output_weight, self.config.vocab_size, self.tp)

    def token_log_probs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """hidden: [M, H], rows of what `forward` gave; targets: [M] -> log p(target) [M] float32, differentiable."""
        return token_log_probs(
            hidden, self.output_weight, targets, self.config.vocab_size, temperature, self.tp
        )

    def token_log_probs_and_entropy(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(`token_log_probs` to the same bits, entropies in nats [M] float32), both differentiable."""
        return token_log_probs_and_entropy(
            hidden, self.output_weight, targets, self.config.vocab_size, temperature, self.tp
        )

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        temperature: float = 1.0,
        rope_length: int | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """As `Decoder.log_probs`, with gradients; the ranks of a tensor- or context-parallel group are given the same
        sequences and get the same numbers. Data-parallel ranks may have sequences of their own, of which each must
        call this equally often: parameters that are sharded, and experts, are fetched by all together.

        Gradients are summed over all ranks (`Units.finish_step`), so a loss is this rank's share of the step's.
        Raises InvalidRequestError, and ConfigError under a pipeline or where experts drop tokens.
        """
        check_sequences(sequences, temperature, self.config.vocab_size)
        self._check_scores()
        lengths = [len(sequence) for sequence in sequences]
        if not lengths:
            return []
        batch = self.batch(
            lengths, [rope_length] * len(lengths) if isinstance(rope_length, int) else rope_length
        )
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=self.device)
        predicts = torch.ones_like(tokens, dtype=torch.bool)
        predicts[torch.tensor(lengths, device=self.device).cumsum(0) - 1] = (
            False  # a last token predicts nothing
        )
        own = self.own(predicts, batch)
        hidden = self(self.own(tokens, batch), batch)
        log_p = self.token_log_probs(hidden[own], self.own(tokens.roll(-1), batch)[own], temperature)
        if isinstance(batch, ContextBatch):
            assert batch.index is not None  # `cut_stream` sets it
            log_p = whole_values(log_p, batch.index[own], len(tokens), self.mesh.group("cp"))[predicts]
        return list(log_p.split([n - 1 for n in lengths]))

    def _check_scores(self) -> None:
        if self.layout.pp > 1:
            raise ConfigError(
                f"layout {self.layout}: log-probabilities of given sequences need all layers on every rank; use pp 1"
            )
        if self.balance.capacity and self.training:
            raise ConfigError(
                f"experts with a capacity of {self.balance.capacity} drop tokens by what else is in their batch: "
                "their log-probabilities are not those that an engine reports; set the capacity to 0"
            )
