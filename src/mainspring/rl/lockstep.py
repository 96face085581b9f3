"""The promise that the engine's log-probabilities are the trainer's, watched while a run trains.

`LockstepCheck` sees what the trainer computes anyway and compares it with what the engine reported. Where they differ
the run stops, and `first_difference` finds the operation: the sequence goes through both forward passes once more, the
trainer's over the packed tokens and the engine's over a paged cache, and their intermediate values are compared in the
order in which they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mainspring import ops
from mainspring.errors import LockstepError
from mainspring.model.decoder import Decoder
from mainspring.model.layers import DecoderLayer, Mlp
from mainspring.ops import KVCache, TokenBatch
from mainspring.ops.log_probs import token_log_probs
from mainspring.rl.policy_update import MicroBatch
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import PolicyModel, Sample, cut, written_log_probs
from mainspring.rl.trajectories import Trajectory, pack

_BLOCK = 16  # tokens of a block of the cache in which the engine's pass is repeated


class LockstepCheck:
    """An observer of `policy_gradient`, and a scorer of what has not come by there.

    Tokens are compared under the weights that wrote them: those of another version than the rollouts' are passed over.
    With numerics that promise nothing (`fast`) differences are measured and nothing stops. The weights must not have
    moved since `rollouts.take_weights`.
    """

    def __init__(self, model: PolicyModel, rollouts: Rollouts) -> None:
        self._model = model
        self._rollouts = rollouts
        self.whole = model if isinstance(model, Decoder) else rollouts.engine_model
        """What scores without the other ranks: the engine's whole copy, if the trainer is spread over ranks."""
        self._must_agree = rollouts.is_lockstep and model.policy.numerics == "lockstep"
        self.max_delta = 0.0
        """The largest |trainer's − engine's| log-probability since `begin`, in nats."""
        self.num_compared = 0

    def begin(self) -> None:
        """A step begins: forget the last one's figures."""
        self.max_delta, self.num_compared = 0.0, 0

    def __call__(self, micro: MicroBatch) -> None:
        """Raises LockstepError where a token's log-probabilities differ."""
        self._compare(micro.samples, micro.log_probs.detach(), micro.old_log_probs, micro.versions)

    @torch.no_grad()
    def score(self, trajectories: Sequence[Trajectory], tokens_per_microbatch: int) -> None:
        """Compares these too, by forward passes of their own. Raises LockstepError."""
        temperature = self._rollouts.temperature
        for run in cut([len(t.tokens) for t in trajectories], tokens_per_microbatch):
            packed = pack(trajectories[run.start : run.stop], self.whole.device)
            log_probs, _ = written_log_probs(self.whole, packed.samples, temperature)
            self._compare(packed.samples, log_probs, packed.old_log_probs, packed.versions)

    def _compare(
        self, samples: Sequence[Sample], log_probs: Tensor, engines: Tensor, versions: Tensor
    ) -> None:
        mine = versions == self._rollouts.version
        # Not `abs() > 0`: a nan must not pass for agreement.
        delta = torch.where(mine, (log_probs - engines).abs(), 0)
        self.num_compared += int(mine.sum())
        if not len(delta):
            return
        self.max_delta = max(self.max_delta, float(delta.nan_to_num(nan=torch.inf).max()))
        if not self._must_agree or self.max_delta == 0:
            return
        at = int((delta != 0).nonzero()[0, 0])
        number, place = _locate(samples, at)
        explained = "The trainer is spread over ranks, where the operation is not looked for."
        if isinstance(self._model, Decoder):
            tokens, temperature = samples[number].tokens, self._rollouts.temperature
            explained = first_difference(
                self._model, self._rollouts.engine_model, tokens, place, temperature
            ).explain()
        raise LockstepError(
            f"token {place} of sequence {number} (id {samples[number].tokens[place]}, version "
            f"{int(versions[at])}): the trainer's log-probability is {float(log_probs[at])!r}, the engine's "
            f"{float(engines[at])!r}; max |delta| = {self.max_delta:.3g}. {explained}"
        )


@dataclass(frozen=True)
class Difference:
    """Where two forward passes over the same tokens part."""

    operation: str | None
    """The first whose results differ although what it was given did not; None: all agree."""
    token: int
    """The first place in the sequence where they do."""
    max_delta: float
    weights: tuple[str, ...]
    """Parameters that are not the same in both models."""

    def explain(self) -> str:
        """One or two sentences for an error's message."""
        if self.weights:
            names = ", ".join(self.weights[:3]) + (" ..." if len(self.weights) > 3 else "")
            weights = f" The engine's weights are not the trainer's: {names}."
        else:
            weights = ""
        if self.operation is None:
            return (
                "Computed anew, both agree: the engine read keys of other weights or other tokens (call "
                f"take_weights after each step, and change no weight while it writes).{weights}"
            )
        return (
            f"The first operation to differ is {self.operation}, at token {self.token}, by up to "
            f"{self.max_delta:.3g}.{weights}"
        )


@torch.no_grad()
def first_difference(
    trainer: Decoder, engine: Decoder, tokens: Sequence[int], place: int, temperature: float = 1.0
) -> Difference:
    """Which operation first gives another result for tokens[: place], from which tokens[place] is predicted.

    trainer computes them packed; engine in one paged chunk, and if that agrees, token by token.
    """
    prefix, target = list(tokens[:place]), int(tokens[place])
    others = dict(engine.named_parameters())
    weights = tuple(
        name for name, weight in trainer.named_parameters() if not torch.equal(weight, others[name])
    )
    reference = _trace(trainer, prefix, target, temperature, TokenBatch.packed([place], trainer.device))
    for chunk in (place, 1):
        traced = _engine_trace(engine, prefix, target, temperature, chunk)
        for (name, expected), found in zip(reference, traced, strict=True):
            rows = expected[-found.shape[0] :]
            differs = (rows != found).flatten(1).any(1)
            if differs.any():
                first = int(differs.nonzero()[0, 0])
                token = place - found.shape[0] + first
                return Difference(name, token, float((rows - found).abs().max()), weights)
    return Difference(None, place, 0.0, weights)


def _engine_trace(
    engine: Decoder, prefix: list[int], target: int, temperature: float, chunk: int
) -> list[Tensor]:
    """Of the last chunk of the prefix, over a cache that the chunks before have filled; [rows of it, ...] each."""
    config = engine.config
    blocks = -(-len(prefix) // _BLOCK)
    cache = KVCache.allocate(
        config.num_layers,
        blocks + 1,
        _BLOCK,
        config.num_kv_heads,
        config.head_dim,
        engine.dtype,
        engine.device,
    )
    table = list(range(1, blocks + 1))
    traced: list[tuple[str, Tensor]] = []
    for start in range(0, len(prefix), chunk):
        piece = prefix[start : start + chunk]
        batch = TokenBatch.paged([len(piece)], [start + len(piece)], [table], cache)
        traced = _trace(engine, piece, target, temperature, batch)
    return [value for _, value in traced]


def _trace(
    model: Decoder, tokens: list[int], target: int, temperature: float, batch: TokenBatch
) -> list[tuple[str, Tensor]]:
    """(operation, its result [T, ...] as float64) in the order of computing; the logits' rows are the last token's.

    Read off the borders of the modules: what a linear layer is given is what the operation before it has made.
    """
    steps: list[tuple[str, Tensor]] = []

    def note(name: str, value: Tensor) -> None:
        steps.append((name, value.detach().double().flatten(1)))

    with ExitStack() as hooks:
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            _watch(layer, f"layers.{i}", note, hooks)
            after = layer.attention.qkv.register_forward_hook(partial(_note_rotated, model, i, batch, note))
            hooks.callback(after.remove)
        ids = torch.tensor(tokens, dtype=torch.int64, device=model.device)
        hidden = model(ids, batch)
    note("norm", hidden)
    logits = model.logits(hidden[-1:])
    note("logits (output embedding)", logits)
    targets = torch.tensor([target], device=model.device)
    note("token_log_probs", token_log_probs(logits, targets, temperature, policy=model.policy)[:, None])
    return steps


def _watch(layer: DecoderLayer, name: str, note: Callable[[str, Tensor], None], hooks: ExitStack) -> None:
    """Notes what each operation of a layer gives."""

    def given(module: nn.Module, operation: str) -> None:
        hook = module.register_forward_pre_hook(lambda _, inputs: note(operation, inputs[0]))
        hooks.callback(hook.remove)

    def gave(module: nn.Module, operation: str) -> None:
        hook = module.register_forward_hook(lambda _, inputs, output: note(operation, output))
        hooks.callback(hook.remove)

    def stream(_: nn.Module, inputs: tuple[Tensor | None, Tensor, TokenBatch, object]) -> None:
        update, residual = inputs[0], inputs[1]
        if update is None:
            note("embedding", residual)

    hooks.callback(layer.register_forward_pre_hook(stream).remove)
    attention, mlp = layer.attention, layer.mlp
    given(attention.qkv, f"{name}.input_norm")
    gave(attention.qkv, f"{name}.attention.qkv")
    given(attention.output, f"{name}.attention")
    gave(attention.output, f"{name}.attention.output")
    given(mlp, f"{name}.post_attention_norm")
    if isinstance(mlp, Mlp):
        gave(mlp.gate_up, f"{name}.mlp.gate_up")
        given(mlp.down, f"{name}.mlp.swiglu")
        gave(mlp.down, f"{name}.mlp.down")
    else:
        gave(mlp.router, f"{name}.mlp.router")
        gave(mlp, f"{name}.mlp.experts")


def _note_rotated(
    model: Decoder,
    index: int,
    batch: TokenBatch,
    note: Callable[[str, Tensor], None],
    qkv_layer: nn.Module,
    inputs: object,
    qkv: Tensor,
) -> None:
    """Queries and keys after their norms and the rotary embedding, as the layer itself will make them once more."""
    layer = model.layers[index]
    assert isinstance(layer, DecoderLayer)
    attention, policy = layer.attention, model.policy
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    rows = qkv.unflatten(-1, (heads + 2 * kv_heads, attention.head_dim))
    q, k, v = rows.split((heads, kv_heads, kv_heads), dim=1)
    angles = model.rotary.angles(batch)
    if batch.cache is None:
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = ops.rope(q, k, angles, policy=policy)
    else:
        norms = attention.head_norms()
        q = ops.norm_rope_write_cache(q, k, v, norms, angles, batch, layer=index, policy=policy)
        assert batch.slots is not None  # a paged batch has them
        k = batch.cache.k[index].flatten(0, 1)[batch.slots]
    norms_too = "q_norm or rope", "k_norm or rope"
    plain = "rope of q", "rope of k"
    for name, value in zip(plain if attention.q_norm is None else norms_too, (q, k), strict=True):
        note(f"layers.{index}.attention.{name}", value)


def _locate(samples: Sequence[Sample], written: int) -> tuple[int, int]:
    """(sample, place in it) of the written-th written token of all."""
    for number, sample in enumerate(samples):
        if written < sample.num_written:
            places = [i for i, mine in enumerate(sample.written) if mine]
            return number, places[written]
        written -= sample.num_written
    raise IndexError(written)
