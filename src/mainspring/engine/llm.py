"""The offline engine: prompts in, finished texts out. Names as in vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mainspring.engine import collector
from mainspring.engine.admission import make_request
from mainspring.engine.choices import ChoiceMerger, fan_out
from mainspring.engine.config import EngineConfig, KVCacheDtype, SchedulingPolicy
from mainspring.engine.core import EngineCore
from mainspring.engine.messages import EngineRequest, Pooling
from mainspring.engine.output_processor import OutputKind, OutputProcessor
from mainspring.engine.outputs import RequestOutput
from mainspring.engine.ranks.layout import serving_layout
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.served_model import ServedModel
from mainspring.engine.speculative import SpeculativeConfig
from mainspring.errors import ConfigError, InvalidRequestError
from mainspring.formats.named_models import resolve
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder
from mainspring.ops import Numerics
from mainspring.parallel.layout import Layout

_OFFLINE_BATCHED_TOKENS = 16_384

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model, its tokenizer and an engine in this process.

    Not thread-safe: one call at a time.
    """

    def __init__(
        self,
        model: str | Path | ServedModel,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
        device: torch.device | str = "cpu",
        numerics: Numerics = "lockstep",
        quantized: bool = False,
        layout: Layout | str | None = None,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        tp_invariant: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        kv_cache_bytes: int | None = None,
        num_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        kv_cache_dtype: KVCacheDtype = "auto",
        scheduling_policy: SchedulingPolicy = "fcfs",
        cuda_graphs: bool | None = None,
        async_scheduling: bool | None = None,
        seed: int | None = None,
        speculative_config: SpeculativeConfig | None = None,
        draft_model: Decoder | None = None,
        lora: Mapping[str, str | Path] | None = None,
    ) -> None:
        """Load the model, or take a loaded one as it is (its parameters are shared, not copied).

        Args:
            model: a Hugging Face directory, a GGUF file, a known name ("smollm2"), a `Decoder`, or a `LeadModel`, which
                `close` then ends.
            tokenizer: None: the model's own. A loaded model has none: without one, prompts are token ids,
                texts stay empty and stop strings are refused.
            dtype, device, numerics, quantized: as `load_model` takes them; a loaded model has its own.
            layout, or tp, pp, ep, tp_invariant: spread the model over processes, as `serving_layout` says: this
                one is rank 0 and starts the others. Leave by `close` or as a context manager.
            max_model_len ... seed: as in `EngineConfig`.
            speculative_config: guess tokens and verify several in one step; the text stays the same.
            draft_model: a loaded model that guesses, instead of `speculative_config.model`.
            lora: name -> directory of a LoRA adapter as PEFT writes it, for requests to choose from.

        Raises:
            ModelNotFoundError, CheckpointError, UnsupportedModelError, TokenizerError, ConfigError.
        """
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_bytes=kv_cache_bytes,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            kv_cache_dtype=kv_cache_dtype,
            scheduling_policy=scheduling_policy,
            cuda_graphs=cuda_graphs,
            async_scheduling=async_scheduling,
            seed=seed,
            speculative=speculative_config,
            lora_adapters=None if lora is None else {name: str(path) for name, path in lora.items()},
        )
        spread = serving_layout(layout, tp=tp, pp=pp, ep=ep, tp_invariant=tp_invariant)
        self.model: ServedModel
        if spread is not None and (not isinstance(model, (str, Path)) or quantized):
            raise ConfigError(
                f"layout {spread} needs a checkpoint that each rank reads its part of; a loaded or quantised model "
                "cannot be cut"
            )
        if not isinstance(model, (str, Path)):
            if dtype is not None or quantized:
                raise ConfigError(
                    f"dtype {dtype!r} and quantized={quantized} were given beside a loaded model of {model.dtype}; "
                    "leave them out"
                )
            self.model = model
        else:
            # A quantised file is converted to what is asked for: float32 keeps its exact values.
            directory = resolve(model, dtype if dtype is not None else "bfloat16").path
            if spread is not None:
                self.model = LeadModel(directory, spread, device=device, dtype=dtype, numerics=numerics)
            else:
                self.model = load_model(
                    model if quantized else directory,
                    device=device,
                    dtype=dtype,
                    numerics=numerics,
                    quantized=quantized,
                )
            tokenizer = tokenizer if tokenizer is not None else Tokenizer.from_directory(directory)
        self.tokenizer = tokenizer
        if max_num_batched_tokens is None and self.model.device.type == "cuda":
            # Nobody waits for a stream's next token here: long steps keep the GPU busy while the host prepares more.
            config = replace(config, max_num_batched_tokens=_OFFLINE_BATCHED_TOKENS)
        self.engine = EngineCore(self.model, config, tokenizer=tokenizer, draft_model=draft_model)
        self._processor = OutputProcessor(tokenizer)
        self._request_ids = count()
        ends = self.model.config.eos_token_ids + (() if tokenizer is None else tokenizer.eos_token_ids)
        self._eos_token_ids = tuple(dict.fromkeys(ends))

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the other processes of a model under a layout; elsewhere nothing. May be called twice."""
        self.engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete one prompt or several.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one for each; the defaults if None.
            lora: the name of an adapter for all prompts, or one (or None) for each.
            use_tqdm: show a progress bar on the terminal.

        Returns:
            One finished output a prompt, in order.

        Raises:
            InvalidRequestError, RequestTooLongError: a request is refused; then none is started.
        """
        requests = self._requests(_as_list(prompts), sampling_params, lora)
        finished: dict[str, RequestOutput] = {}
        columns = (TextColumn("Prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not use_tqdm) as progress:
            task = progress.add_task("", total=len(requests))
            for output in self._run(requests, "final"):
                finished[output.request_id] = output
                progress.advance(task)
        return [finished[request.request_id] for request, _ in requests]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several through the model's chat template.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.

        Raises:
            ChatTemplateError: the model has no template, or it fails; and what `generate` raises.
        """
        is_one = not messages or isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Messages]", [messages] if is_one else messages)
        prompts = [self._chat_prompt(chat) for chat in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> list[Tensor]:
        """A vector [hidden] float32 for each prompt: its hidden states after the final norm, pooled.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            pooling: "mean" of all tokens, or the "last" one's.
            normalize: divide each vector by its length.

        Raises:
            InvalidRequestError, RequestTooLongError: a prompt is refused; then none is started.
        """
        requests = [
            make_request(
                str(next(self._request_ids)),
                self._encode(prompt) if isinstance(prompt, str) else prompt,
                SamplingParams(),
                self.engine.limits,
                (),
                pooling=pooling,
            )
            for prompt in _as_list(prompts)
        ]
        vectors: dict[str, Tensor] = {}
        try:
            for request in requests:
                self.engine.add_request(request)
            while len(vectors) < len(requests):
                for output in self.engine.step():
                    if output.embedding is not None:
                        vectors[output.request_id] = torch.tensor(output.embedding)
        finally:
            for request in requests:
                self.engine.abort(request.request_id)
        ordered = [vectors[request.request_id] for request in requests]
        return [F.normalize(vector, dim=0) for vector in ordered] if normalize else ordered

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, lora: str | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt; each output carries what is new since the one before. Closing it aborts.

        Raises:
            InvalidRequestError, RequestTooLongError: the request is refused.
        """
        return self._run(self._requests([prompt], sampling_params, lora), "delta")

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Like `stream`, for a conversation through the model's chat template."""
        return self.stream(self._chat_prompt(messages), params)

    def _chat_prompt(self, messages: Messages) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer, and this engine has none", "messages")
        # The template writes the special tokens itself.
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[tuple[EngineRequest, str | None]]:
        """Checked requests, each with its text if it had one. Nothing is started yet."""
        if params is None:
            params = SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequestError(
                f"there are {len(prompts)} prompts, but {len(each)} sampling_params", "sampling_params"
            )
        adapters = [lora] * len(prompts) if lora is None or isinstance(lora, str) else list(lora)
        if len(adapters) != len(prompts):
            raise InvalidRequestError(
                f"there are {len(prompts)} prompts, but {len(adapters)} lora names", "lora"
            )
        requests: list[tuple[EngineRequest, str | None]] = []
        for prompt, one, adapter in zip(prompts, each, adapters, strict=True):
            token_ids = self._encode(prompt) if isinstance(prompt, str) else prompt
            request_id = str(next(self._request_ids))
            request = make_request(
                request_id,
                token_ids,
                one,
                self.engine.limits,
                self._eos_token_ids,
                lora_id=0 if adapter is None else self._lora_id(adapter),
            )
            if one.stop_strings and self.tokenizer is None:
                raise InvalidRequestError("stop strings need a tokenizer, and this engine has none", "stop")
            requests.append((request, prompt if isinstance(prompt, str) else None))
        return requests

    def _lora_id(self, name: str) -> int:
        names = list(self.engine.config.lora_adapters or {})
        if name not in names:
            known = ", ".join(names) or "none"
            raise InvalidRequestError(f"there is no adapter {name!r}; this engine has: {known}", "lora")
        return names.index(name) + 1

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError(
                "a text needs a tokenizer, and this engine has none; give token ids", "prompt"
            )
        return self.tokenizer.encode(text)

    def _run(
        self, requests: Sequence[tuple[EngineRequest, str | None]], output_kind: OutputKind
    ) -> Iterator[RequestOutput]:
        """Step until all requests are done. However this ends, none of them stays in the engine."""
        children = {child.request_id: request for request, _ in requests for child in fan_out(request)}
        mergers = {request.request_id: ChoiceMerger(request, output_kind) for request, _ in requests}
        unfinished = set(mergers)
        try:
            for request, text in requests:
                for child in fan_out(request):
                    self._processor.add(child, text, output_kind)
                    self.engine.add_request(child)
            with collector.spared():
                while unfinished:
                    outputs, to_abort = self._processor.process(self.engine.step())
                    for request_id in to_abort:
                        self.engine.abort(request_id)
                    for output in outputs:
                        merged = mergers[children[output.request_id].request_id].merge(output)
                        if merged is not None:
                            if merged.finished:
                                unfinished.discard(merged.request_id)
                            yield merged
        finally:
            for request_id in unfinished:
                for child_id in mergers[request_id].unfinished:
                    self._processor.abort(child_id)
                    self.engine.abort(child_id)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, text or token ids, as a list of one."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [cast("Prompt", prompts)] if is_one else list(cast("Sequence[Prompt]", prompts))
