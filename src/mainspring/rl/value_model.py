"""A decoder that judges instead of writing: its trunk with a head of one number a token.

As a critic it estimates the return of every prefix, as a reward model it scores whole answers. Its parameters are its
own, begun as a copy of a policy's or of a reward model's. On disk it is what transformers knows as
`*ForTokenClassification` (a critic) or `*ForSequenceClassification` (a reward model) with one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.errors import UnsupportedModelError
from mainspring.formats.model_config import ModelConfig, read_config
from mainspring.formats.named_models import resolve
from mainspring.model.checkpoint import load_weights, saved_config, write_checkpoint
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import torch_device, torch_dtype
from mainspring.model.layers import Linear
from mainspring.model.naming import Part
from mainspring.ops import LOCKSTEP, Numerics, Policy, TokenBatch
from mainspring.rl.samples import Sample

if TYPE_CHECKING:
    from mainspring.formats.tokenizer import Tokenizer

Task = Literal["token", "sequence"]
"""A critic, whose head has a bias, or a reward model, whose scores are only compared and have none."""

_SUFFIXES: dict[Task, str] = {"token": "ForTokenClassification", "sequence": "ForSequenceClassification"}


class ValueModel(Decoder):
    """The trunk of a decoder and a linear head, hidden -> 1. Parameters are uninitialised: see `of` and `load`.

    There is no output embedding of its own: the trunk's configuration counts as tied, whatever the policy's says.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        task: Task = "token",
        policy: Policy = LOCKSTEP,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(replace(config, tie_word_embeddings=True), policy=policy, device=device, dtype=dtype)
        self.task = task
        self.score = Linear(config.hidden_size, 1, task == "token", policy, device, dtype)

    @classmethod
    def of(cls, model: Decoder, task: Task = "token") -> Self:
        """A new one that begins as a copy: of a policy with a head of zeros, of another value model with its head.

        Raises UnsupportedModelError for a quantised model.
        """
        if model.is_quantised:
            raise UnsupportedModelError(
                "a value model cannot begin as a quantised model; load it dequantised"
            )
        copy = cls(model.config, task=task, policy=model.policy, device=model.device, dtype=model.dtype)
        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in copy.named_parameters():
                parameter.copy_(theirs.get(name, torch.zeros_like(parameter)))
        return copy

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: str | torch.dtype | None = None,
        numerics: Numerics = "lockstep",
    ) -> Self:
        """From a Hugging Face directory of one label. Raises what `load_model` raises."""
        directory = resolve(path).path
        table = read_config(directory)
        architecture = str((table.get("architectures") or [""])[0])
        task = next((task for task, suffix in _SUFFIXES.items() if architecture.endswith(suffix)), None)
        if task is None:
            raise UnsupportedModelError(
                f"{directory} holds a model of architecture {architecture!r}; a value model's ends in "
                f"{' or '.join(_SUFFIXES.values())} (begin one from a policy by ValueModel.of)"
            )
        family = architecture.removesuffix(_SUFFIXES[task])
        config = ModelConfig.from_dict(table | {"architectures": [f"{family}ForCausalLM"]})
        model = cls(
            config,
            task=task,
            policy=Policy(numerics),
            device=torch_device(device),
            dtype=torch_dtype(dtype if dtype is not None else config.dtype),
        )
        load_weights(model, directory)
        return model

    def save(self, path: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
        """Writes a Hugging Face directory, as `save_model` does. Raises CheckpointError."""
        family = self.config.architecture.removesuffix("ForCausalLM")
        table = saved_config(self.config, self.dtype) | {
            "architectures": [family + _SUFFIXES[self.task]],
            "id2label": {"0": "LABEL_0"},  # how transformers counts labels
            "label2id": {"LABEL_0": 0},
            "classifier_dropout": 0.0,
        }
        write_checkpoint(path, self.hf_tensors(), table, tokenizer=tokenizer)

    def parts(self) -> list[Part]:
        """Those of the trunk, and the head's."""
        head = [Part(f"score.{name}", f"score.{name}") for name, _ in self.score.named_parameters()]
        return [*super().parts(), *head]

    def values(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """V(token[: i + 1]) of each sequence, float32 [len - 1] each: of the state in which token i + 1 was chosen.

        So they lie as `Decoder.log_probs` does. Differentiable. Raises InvalidRequestError.
        """
        lengths = [len(sequence) for sequence in sequences]
        return [per_token[:-1] for per_token in self._per_token(sequences).split(lengths)]

    def written_values(self, samples: Sequence[Sample]) -> Tensor:
        """[W] float32: the values at which written tokens were chosen, end to end as `written_log_probs` lie."""
        per_token = self._per_token([sample.tokens for sample in samples])
        written = torch.tensor([w for sample in samples for w in sample.written], device=self.device)
        # No sample begins with a written token: the place before one is the same sample's.
        return per_token.index_select(0, written.nonzero()[:, 0] - 1)

    def scores(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The head at the last token of each sequence, float32 [N]: a reward model's score. Otherwise as `values`."""
        ends = torch.tensor([len(sequence) for sequence in sequences], device=self.device).cumsum(0) - 1
        return self._per_token(sequences).index_select(0, ends.to(torch.int64))

    def _per_token(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[T] float32: the head at every token of all sequences, end to end."""
        self._check_sequences(sequences, 1.0)
        if not sequences:
            return torch.zeros(0, device=self.device)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=self.device)
        hidden = self(tokens, TokenBatch.packed([len(s) for s in sequences], self.device)).float()
        bias = None if self.score.bias is None else self.score.bias.float()
        return F.linear(hidden, self.score.weight.float(), bias)[:, 0]
