"""The one decoder: every model family, training and serving, over the packed token stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainspring import ops
from mainspring.errors import InvalidRequestError, UnsupportedModelError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.layers import DecoderLayer, Linear, RmsNorm
from mainspring.model.naming import Part, parts
from mainspring.model.rope import RotaryEmbedding
from mainspring.ops import LOCKSTEP, Policy, TokenBatch
from mainspring.ops.quantised_linear import QuantisedWeight


class Decoder(nn.Module):
    """A causal language model. Parameters are uninitialised: see `load_model` and `create_model`.

    `state_dict` and `load_state_dict` speak Hugging Face names; `hf_tensors` gives them as views.
    Weights may be quantised (`load_model(..., quantized=True)`): such a model is neither saved nor trained.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        policy: Policy = LOCKSTEP,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.policy = policy
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, policy, device, dtype) for layer in range(config.num_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, policy, device, dtype)
        self.output_embedding = (
            None
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        )
        # There instead of the parameters in a quantised model (model/quantised.py).
        self.is_quantised = False
        self.quantised_embedding: QuantisedWeight | None = None
        self.quantised_output_embedding: QuantisedWeight | None = None
        self.rotary = RotaryEmbedding(config)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.name = name
        self.register_state_dict_post_hook(_to_hugging_face_names)
        self.register_load_state_dict_pre_hook(_from_hugging_face_names)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def numerics(self) -> str:
        return self.policy.numerics

    @property
    def output_weight(self) -> Tensor:
        """[vocab, hidden]: the output embedding, which may be the input one.

        Raises UnsupportedModelError in a quantised model.
        """
        _refuse_quantised(self)
        return self.embedding if self.output_embedding is None else self.output_embedding

    @property
    def output_matrix(self) -> Tensor | QuantisedWeight:
        """As `output_weight`, quantised or not."""
        if self.config.tie_word_embeddings:
            return self.embedding if self.quantised_embedding is None else self.quantised_embedding
        if self.quantised_output_embedding is not None:
            return self.quantised_output_embedding
        assert self.output_embedding is not None  # an untied model has one or the other
        return self.output_embedding

    def forward(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """tokens: [T] int64 -> hidden states after the final norm, [T, hidden]."""
        table = self.quantised_embedding
        residual = F.embedding(tokens, self.embedding) if table is None else table.embed(tokens)
        angles = self.rotary.angles(batch)
        update: Tensor | None = None
        for layer in self.layers:
            update, residual = layer(update, residual, batch, angles)
        assert update is not None  # ModelConfig has at least one layer
        hidden, _ = self.norm.add(update, residual)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, hidden] -> [N, vocab] float32."""
        return ops.linear(hidden, self.output_matrix, out_dtype=torch.float32, policy=self.policy)

    def loss(self, tokens: Tensor, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood of targets [T] (-100 is left out), a float32 scalar."""
        return ops.cross_entropy(self(tokens, batch), self.output_weight, targets, policy=self.policy)

    def log_probs(
        self,
        sequences: Sequence[Sequence[int]],
        temperature: float = 1.0,
        rope_length: int | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """log p(token[i + 1] | token[: i + 1]) of each sequence: a float32 tensor [len - 1] each.

        In lockstep these are bitwise what the engine reports, however it batched and chunked them.
        `rope_length` (one for all, or one a sequence) is the length that fixes the base of `dynamic`
        RoPE; by default each sequence's own. Raises InvalidRequestError.
        """
        self._check_sequences(sequences, temperature)
        lengths = [len(sequence) for sequence in sequences]
        if not lengths:
            return []
        rope_lengths = [rope_length] * len(lengths) if isinstance(rope_length, int) else rope_length
        batch = TokenBatch.packed(lengths, self.device, rope_lengths)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=self.device)
        hidden = self(tokens, batch)
        ends = torch.cumsum(torch.tensor(lengths, device=self.device), 0) - 1
        predicts = torch.ones_like(tokens, dtype=torch.bool)
        predicts[ends] = False  # a sequence's last token predicts nothing
        log_p = self.token_log_probs(hidden[predicts], tokens.roll(-1)[predicts], temperature)
        return list(log_p.split([n - 1 for n in lengths]))

    def token_log_probs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """hidden: [M, H], rows of what `forward` gave; targets: [M] -> log p(target) [M] float32, differentiable."""
        return ops.linear_log_probs(hidden, self.output_matrix, targets, temperature, policy=self.policy)

    def token_log_probs_and_entropy(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(`token_log_probs` to the same bits, entropies in nats [M] float32), both differentiable.

        Raises UnsupportedModelError for quantised weights.
        """
        return ops.linear_log_probs_and_entropy(
            hidden, self.output_weight, targets, temperature, policy=self.policy
        )

    def hf_tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> view of our parameter; tied output embeddings appear once."""
        _refuse_quantised(self)
        parameters = dict(self.named_parameters())
        return {part.name: part.view(parameters[part.parameter]) for part in self.parts()}

    def quantised_weights(self) -> dict[str, QuantisedWeight]:
        """The weights that are no parameters, by the names that their parameters would have."""
        found = {f"{name}.weight": m.quantised for name, m in self.named_modules() if isinstance(m, Linear)}
        found["embedding"] = self.quantised_embedding
        found["output_embedding"] = self.quantised_output_embedding
        return {name: weight for name, weight in found.items() if weight is not None}

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are, quantised ones included."""
        parameters = sum(p.numel() for p in self.parameters())
        return parameters + sum(w.numel() for w in self.quantised_weights().values())

    def parts(self) -> list[Part]:
        """Which rows of which parameter carry which Hugging Face name."""
        return list(parts(self.config))

    def _check_sequences(self, sequences: Sequence[Sequence[int]], temperature: float) -> None:
        check_sequences(sequences, temperature, self.config.vocab_size)


def check_sequences(sequences: Sequence[Sequence[int]], temperature: float, vocab_size: int) -> None:
    """Raises InvalidRequestError unless every sequence has a token, all of them in the vocabulary."""
    if not temperature > 0:
        raise InvalidRequestError(f"temperature must be above 0, got {temperature}", "temperature")
    for i, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise InvalidRequestError(f"sequence {i} is empty; give it at least one token", "sequences")
        if min(sequence) < 0 or max(sequence) >= vocab_size:
            raise InvalidRequestError(
                f"sequence {i} has token ids from {min(sequence)} to {max(sequence)}; "
                f"the vocabulary is 0 to {vocab_size - 1}",
                "sequences",
            )


def _refuse_quantised(model: Decoder) -> None:
    if model.is_quantised:
        raise UnsupportedModelError(
            "the weights of this model are quantised blocks, which are neither saved, trained nor updated; "
            "load it without quantized=True for that"
        )


def _to_hugging_face_names(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    assert isinstance(module, Decoder)
    _refuse_quantised(module)
    fused = {name: state.pop(prefix + name) for name in {part.parameter for part in module.parts()}}
    for part in module.parts():
        state[prefix + part.name] = part.view(fused[part.parameter])
    if module.config.tie_word_embeddings:
        state[prefix + "lm_head.weight"] = fused["embedding"]


def _from_hugging_face_names(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_messages: list[str],
) -> None:
    """Fuses named parts into the parameters' own storage layout; absent names are reported as theirs."""
    assert isinstance(module, Decoder)
    _refuse_quantised(module)
    parameters = dict(module.named_parameters())
    fused = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}
    with torch.no_grad():
        for part in module.parts():
            value = state.pop(prefix + part.name, None)
            if value is None:
                missing_keys.append(prefix + part.name)
                value = part.view(parameters[part.parameter])
            view = part.view(fused[part.parameter])
            if view.shape != value.shape:
                error_messages.append(
                    f"{part.name} has shape {tuple(value.shape)}, the model needs {tuple(view.shape)}"
                )
                continue
            view.copy_(value)
    if module.config.tie_word_embeddings:
        state.pop(prefix + "lm_head.weight", None)
    state.update({prefix + name: tensor for name, tensor in fused.items()})
