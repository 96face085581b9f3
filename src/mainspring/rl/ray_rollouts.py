"""Rollouts by engines elsewhere: Ray actors on other GPUs or machines write, the trainer hands out weights and rewards.

    with RayRollouts(model, prompts, texts, scorer, RolloutSettings(), workers=4, address="auto") as rollouts:
        for metrics in grpo(model, optimizer, rollouts, settings): ...

A worker that is lost is replaced, and writes its share again: what is written depends on seeds, places and weights
alone, so the run goes on as if nothing had happened. A worker takes new weights when it is next asked to write, and
answers with their checksum. Ray's own wire pickles: a loopback (without an address) or a trusted network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.weights import copy_weights, weights_checksum
from mainspring.errors import ConfigError, EngineDeadError, LockstepError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.ops import Policy
from mainspring.rl.closes import Closes
from mainspring.rl.conversation import Conversation, Written
from mainspring.rl.environment import Environment
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rewards import Completion, Scorer
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class _Task:
    """A conversation to go on with."""

    prompt: Prompt
    written: Written


@dataclass(frozen=True)
class _Site:
    """What a worker is made of."""

    config: ModelConfig
    policy: Policy
    dtype: torch.dtype
    device: str
    prompts: tuple[Prompt, ...]
    texts: Texts
    settings: RolloutSettings
    sampling: SamplingParams
    engine: EngineConfig
    environment: Callable[[], Environment] | None


class _Unasked:
    """Rewards are the driver's affair."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [None] * len(completions)


class Worker:
    """An engine with the whole model, in a process of its own; the actor's class."""

    def __init__(self, site: _Site) -> None:
        self._site = site
        model = Decoder(site.config, policy=site.policy, device=site.device, dtype=site.dtype)
        self._rollouts = Rollouts(
            model.requires_grad_(False),
            site.prompts,
            site.texts,
            _Unasked(),
            site.settings,
            sampling=site.sampling,
            engine=site.engine,
            environment=site.environment,
        )
        self._model = model
        self._version: int | None = None
        self._checksum = ""

    def write(
        self,
        tasks: list[_Task],
        version: int,
        weights: dict[str, np.ndarray[Any, Any]],
        sampling: SamplingParams,
        sliced: bool,
    ) -> tuple[list[Written], str]:
        """(the conversations after their turns or slices, the checksum of the weights that wrote them)."""
        if version != self._version:
            copy_weights(self._model, {name: _tensor(a, self._site.dtype) for name, a in weights.items()})
            self._rollouts.take_weights(version)
            self._version, self._checksum = version, weights_checksum(self._model)
        written = self._rollouts.go_on(
            [(task.prompt, task.written) for task in tasks], sampling, sliced=sliced
        )
        return written, self._checksum


class RayRollouts(Rollouts, Closes):
    """Everything of `Rollouts`, but that workers write the conversations. Close it, or use it as a context manager.

    restarts: workers that were lost so far. Raises ConfigError without Ray and as `Rollouts` does, EngineDeadError once
    more than max_restarts were lost, LockstepError where a worker's weights are not the trainer's.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        texts: Texts,
        scorer: Scorer,
        settings: RolloutSettings | None = None,
        *,
        workers: int,
        address: str | None = None,
        max_restarts: int = 10,
        sampling: SamplingParams | None = None,
        engine: EngineConfig | None = None,
        environment: Callable[[], Environment] | None = None,
    ) -> None:
        """workers: spread over the cluster's nodes, a GPU each if the model is on one. address: of a running Ray
        cluster; None starts Ray on this machine."""
        if workers < 1:
            raise ConfigError(f"workers = {workers} must be at least 1")
        sampling = sampling if sampling is not None else SamplingParams()
        engine = engine if engine is not None else EngineConfig()
        super().__init__(
            model, prompts, texts, scorer, settings, sampling=sampling, engine=engine, environment=environment
        )
        self._core.sleep()  # this process writes nothing
        self._ray = _ray(address)
        site = _Site(
            config=model.config,
            policy=model.policy,
            dtype=model.dtype,
            device=model.device.type,
            prompts=tuple(prompts),
            texts=texts,
            settings=self.settings,
            sampling=sampling,
            engine=replace(engine, max_model_len=self._core.limits.max_model_len),
            environment=environment,
        )
        self._site = self._ray.put(site)
        options = {"num_gpus": 1} if model.device.type == "cuda" else {"num_cpus": 1}
        self._actor = self._ray.remote(**options, scheduling_strategy="SPREAD")(Worker)
        self._workers = [self._actor.remote(self._site) for _ in range(workers)]
        self._max_restarts = max_restarts
        self.restarts = 0
        self._weights: Any = None
        self._expected = ""

    def take_weights(self, version: int) -> None:
        """The trainer's weights have moved: workers take them with their next task."""
        super().take_weights(version)
        self._weights = None

    def close(self) -> None:
        """Ends the workers, and Ray if this has started it."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        self._ray.shutdown()

    def _write(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingParams | None = None,
        *,
        sliced: bool = True,
    ) -> int:
        if self._weights is None:
            arrays = {name: _array(tensor) for name, tensor in self._model.hf_tensors().items()}
            self._weights = self._ray.put(arrays)
            self._expected = weights_checksum(self._model)
        sampling = self._sampling if sampling is None else sampling
        count = len(self._workers)
        shares = [list(conversations[first::count]) for first in range(count)]
        before = sum(c.num_written for c in conversations)
        open_ = {
            self._ask(number, share, sampling, sliced): (number, share)
            for number, share in enumerate(shares)
            if share
        }
        while open_:
            [ready], _ = self._ray.wait(list(open_), num_returns=1)
            number, share = open_.pop(ready)
            try:
                written, checksum = self._ray.get(ready)
            except self._ray.exceptions.RayActorError as error:
                self._replace(number, error)
                open_[self._ask(number, share, sampling, sliced)] = (number, share)
                continue
            if checksum != self._expected:
                raise LockstepError(
                    f"worker {number} wrote with weights of checksum {checksum}, the trainer's is {self._expected}"
                )
            for conversation, kept in zip(share, written, strict=True):
                conversation.replay(kept)
        return sum(c.num_written for c in conversations) - before

    def _ask(self, number: int, share: list[Conversation], sampling: SamplingParams, sliced: bool) -> Any:
        tasks = [_Task(c.prompt, c.written) for c in share]
        return self._workers[number].write.remote(tasks, self.version, self._weights, sampling, sliced)

    def _replace(self, number: int, error: Exception) -> None:
        self.restarts += 1
        if self.restarts > self._max_restarts:
            raise EngineDeadError(
                f"{self.restarts} rollout workers were lost, more than max_restarts = {self._max_restarts}; the last: "
                f"{error}"
            ) from error
        self._workers[number] = self._actor.remote(self._site)


def _ray(address: str | None) -> Any:
    """The module, connected."""
    if address is None:
        # As in `engine.server.ray_replicas`: read at its import, it makes Ray listen on 127.0.0.1 only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"Ray is not installed ({error}): pip install 'mainspring[ray]'") from error
    if address is not None:
        ray.init(address=address, log_to_driver=False)
        return ray
    ray.init(
        include_dashboard=False,
        _node_ip_address=_LOOPBACK,
        log_to_driver=False,
        configure_logging=False,
        # Workers import what this process can: environments and the like.
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    listens = {str(node["NodeManagerAddress"]) for node in ray.nodes()}
    if listens != {_LOOPBACK}:
        ray.shutdown()
        raise ConfigError(
            f"Ray would listen on {', '.join(sorted(listens))}, because it was imported before; import it later, or "
            "set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 first"
        )
    return ray


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's bits: NumPy knows no bfloat16."""
    host = tensor.detach().cpu().contiguous()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()


def _tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())  # Ray's memory is read-only
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
