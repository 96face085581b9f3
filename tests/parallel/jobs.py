"""What the pool's workers run: module-level functions of plain values."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from mainspring.errors import CheckpointError, MainspringError
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter, TensorSpec
from mainspring.formats.safetensors_writer import _SliceWriter
from mainspring.model.checkpoint import load_model
from mainspring.ops import KVCache, Numerics, Policy, TokenBatch
from mainspring.parallel import experts, tensor
from mainspring.parallel.balance import take_loads
from mainspring.parallel.checkpoint import NAMES, load_weights, stored_weights, write_together
from mainspring.parallel.experts import Balance
from mainspring.parallel.launch import joined
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.pipeline import Pipeline
from mainspring.parallel.units import Units
from mainspring.train.make_runner import Ranks
from mainspring.train.metrics import Progress
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import OptimizerSection
from mainspring.train.recipe_file import parse_recipe
from mainspring.train.sharded import Sharded
from mainspring.train.trainer import Trainer
from mainspring.train.verify import DTYPES as VERIFY_DTYPES
from mainspring.train.verify import Run, VerifySettings, gradient_errors, micro_batches, run_layout
from parallel import faults


def mesh_for(layout: Layout, config: ModelConfig) -> Mesh:
    return Mesh.build(layout.axes, key_copies=layout.key_copies(config))


def verify(
    directory: str, layout: str, settings: VerifySettings, gradients: str
) -> tuple[Run, dict[str, float]]:
    parsed = Layout.parse(layout)
    mesh = mesh_for(parsed, ModelConfig.from_file(directory))
    return run_layout(Path(directory), parsed, settings, Path(gradients), mesh)


def verify_with_fault(
    fault: str, directory: str, layout: str, settings: VerifySettings, gradients: str
) -> tuple[Run, dict[str, float]]:
    with getattr(faults, fault)():
        return verify(directory, layout, settings, gradients)


def verify_and_count_overlaps(
    directory: str, layout: str, settings: VerifySettings, gradients: str
) -> tuple[Run, dict[str, float], dict[str, int]]:
    """However short the products are; also how many ran beside their gather, and beside their sum."""
    counts = {"gathered_product": 0, "summed_product": 0}

    def counting(name: str) -> Any:
        whole = getattr(tensor, name)

        def run(*arguments: Any) -> Any:
            counts[name] += 1
            return whole(*arguments)

        return patch.object(tensor, name, run)

    with patch.object(tensor, "OVERLAP_ROWS", 0), counting("gathered_product"), counting("summed_product"):
        run, errors = verify(directory, layout, settings, gradients)
    return run, errors, counts


def verify_and_count_empty(
    directory: str, layout: str, settings: VerifySettings, gradients: str
) -> tuple[Run, dict[str, float], int]:
    """Also how often this rank's experts were given no row at all."""
    counts: list[int] = []
    whole = experts.dispatch

    def counting(*arguments: Any) -> Any:
        dispatched = whole(*arguments)
        counts.append(dispatched.sorted.shape[0])
        return dispatched

    with patch.object(experts, "dispatch", counting):
        run, errors = verify(directory, layout, settings, gradients)
    return run, errors, counts.count(0)


def hidden_and_logits(directory: str, layout: str, numerics: Numerics) -> tuple[Any, Any]:
    """Of one stream of three documents, as numpy arrays."""
    parsed = Layout.parse(layout)
    config = ModelConfig.from_file(directory)
    model = parallelize(load_model(directory, numerics=numerics), parsed, mesh_for(parsed, config))
    tokens = torch.randint(0, config.vocab_size, (37,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        hidden = model(tokens, TokenBatch.packed([20, 1, 16]))
        return hidden.numpy(), model.logits(hidden).numpy()


def cached_and_whole(directory: str, layout: str) -> tuple[Any, Any]:
    """Hidden states of one sequence, by chunks through a paged cache and all at once, as numpy arrays."""
    parsed = Layout.parse(layout)
    config = ModelConfig.from_file(directory)
    model = parallelize(load_model(directory), parsed, mesh_for(parsed, config)).eval()
    tokens = torch.randint(0, config.vocab_size, (21,), generator=torch.Generator().manual_seed(4))
    local_heads = max(1, config.num_kv_heads // parsed.tp)
    cache = KVCache.allocate(config.num_layers, 4, 16, local_heads, config.head_dim, torch.float32, "cpu")
    with torch.no_grad():
        whole = model(tokens, TokenBatch.packed([21]))
        chunks = [(0, 9), (9, 20), (20, 21)]  # two pieces of the prompt, one decoded token
        pieces = [model(tokens[a:b], TokenBatch.paged([b - a], [b], [[2, 1]], cache)) for a, b in chunks]
    return torch.cat(pieces).numpy(), whole.numpy()


def whole(directory: str, layout: str) -> tuple[Any, Any]:
    """Hidden states of the same sequence as the trainer computes them, and a gradient of the sum of their squares."""
    parsed = Layout.parse(layout)
    config = ModelConfig.from_file(directory)
    model = parallelize(load_model(directory), parsed, mesh_for(parsed, config))
    tokens = torch.randint(0, config.vocab_size, (21,), generator=torch.Generator().manual_seed(4))
    hidden = model(tokens, TokenBatch.packed([21]))
    hidden.square().sum().backward()  # the same on every rank: gradients flow to the rank's rows alone
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing in ([], ["output_embedding"])
    gradient = model.layers["0"].attention.output.weight.grad
    assert gradient is not None
    return hidden.detach().numpy(), gradient.numpy()


def units_of(directory: str, layout: Layout, balance: Balance | None = None) -> Units:
    config = ModelConfig.from_file(directory)
    model = load_model(directory, dtype="float32", numerics="fast").train()
    return Units(parallelize(model, layout, mesh_for(layout, config), balance=balance))


def sizes(directory: str, layout: str) -> dict[str, int]:
    """Elements that the rank holds between steps, and while the gradient of a step is there."""
    units = units_of(directory, Layout.parse(layout))
    model = units.model
    settings = VerifySettings(micro_batches=4)
    Pipeline(model, units).run(micro_batches(model.config, settings, 0))
    gradients = sum(
        tensor.numel()
        for unit in units.units
        for tensor in {id(t): t for t in (unit._gradient, unit.gradient_shard) if t is not None}.values()
    )
    return {
        "parameters": sum(unit.full.untyped_storage().nbytes() // 4 for unit in units.units)
        + sum(unit.shard.numel() for unit in units.units if unit.zero == 3),
        "gradients": gradients,
        "shards": sum(unit.shard.numel() for unit in units.units),
        "traffic": sum(model.mesh.monitor.traffic.values()),
    }


def alive_after_a_step(directory: str, layout: str) -> list[str]:
    """Parameters whose memory somebody still holds once the model of a step has been dropped."""
    units = units_of(directory, Layout.parse(layout))
    Pipeline(units.model, units).run(micro_batches(units.model.config, VerifySettings(), 0))
    watched = {unit.name: weakref.ref(unit.full.untyped_storage()) for unit in units.units}
    watched |= {name: weakref.ref(parameter) for name, parameter in units.model.named_parameters()}
    del units
    gc.collect()
    return [name for name, reference in watched.items() if reference() is not None]


def gradient_dtypes(directory: str, layout: str, count: int) -> set[str]:
    """Of the sums over ranks in a step of a bfloat16 model with `count` micro-batches."""
    parsed = Layout.parse(layout)
    model = load_model(directory, dtype="bfloat16", numerics="fast").train()
    share = parallelize(model, parsed, mesh_for(parsed, model.config))
    units = Units(share)
    Pipeline(share, units).run(micro_batches(share.config, VerifySettings(micro_batches=count), 0))
    return {str(units.gradient(piece).dtype) for piece in units.pieces}


def traffic(directory: str, layout: str, settings: VerifySettings) -> dict[str, int]:
    """Bytes that this rank puts into each (collective/group) during a step."""
    units = units_of(directory, Layout.parse(layout))
    monitor = units.mesh.monitor
    pipeline = Pipeline(units.model, units)
    monitor.traffic.clear()
    pipeline.run(micro_batches(units.model.config, settings, 0))
    units.clear()
    units.refresh()
    return {f"{collective}/{group}": count for (collective, group), count in monitor.traffic.items()}


def balanced(directory: str, layout: str, auxiliary: float, settings: VerifySettings) -> dict[str, Any]:
    """Router gradients under the auxiliary loss, and the experts' loads."""
    units = units_of(directory, Layout.parse(layout), Balance(auxiliary))
    Pipeline(units.model, units).run(micro_batches(units.model.config, settings, 0))
    loads = {number: load.slots.tolist() for number, load in take_loads(units.model).items()}
    gradients = {
        (piece.block.name, piece.offset): units.gradient(piece).numpy().copy()
        for piece in units.pieces
        if piece.block.name.endswith("mlp.gate.weight")
    }
    return {"loads": loads, "gradients": gradients}


def capped(
    directory: str, layout: str, capacity: float, settings: VerifySettings, file: str
) -> dict[str, Any]:
    """Loss, loads and dropped slots of one step. One device writes its gradients to `file`, others are held to them."""
    parsed = Layout.parse(layout)
    config = ModelConfig.from_file(directory)
    model = load_model(directory, dtype=VERIFY_DTYPES[settings.dtype], numerics="fast").train()
    share = parallelize(model, parsed, mesh_for(parsed, config), balance=Balance(capacity=capacity))
    units = Units(share)
    loss = Pipeline(share, units).run(micro_batches(config, settings, 0))
    if parsed.world == 1:
        tensors = {p.block.name: units.gradient(p).view(p.block.shape) for p in units.pieces}
        specs = {name: TensorSpec(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        with SafetensorsWriter(Path(file).parent, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.numpy())
            writer.finish()
    errors = gradient_errors(units, CheckpointReader(file))
    loads = take_loads(share)
    return {
        "loss": loss,
        "error": max(errors.values()),
        "loads": {number: load.slots.tolist() for number, load in loads.items()},
        "dropped": {number: load.dropped for number, load in loads.items()},
    }


def rewrite(directory: str, layout: str, target: str) -> None:
    """Loads a model under the layout and writes it again."""
    units = units_of(directory, Layout.parse(layout))
    for unit in units.units:
        unit.gather()
        unit.full.zero_()
        unit.shard.zero_()
    load_weights(units, directory)
    Path(target).mkdir(exist_ok=True)
    write_together(Path(target), stored_weights(units), units)


def train(text: str, overrides: list[str], resume: bool = False, fail_at: int = -1) -> dict[str, Any]:
    """A run of the recipe, by all ranks. fail_at: the rank on which the disk is full from the second save on."""
    ranks = Ranks.present()
    trainer = Trainer(
        parse_recipe(text, overrides=overrides), resume=resume, show=Progress(silent=True), ranks=ranks
    )
    saves = 0
    whole_write = _SliceWriter._pwrite
    whole_writer = trainer._runner.checkpoint_writer

    def writer(*arguments: Any, background: bool) -> Callable[[], Path]:
        nonlocal saves
        saves += 1
        return whole_writer(*arguments, background=background)

    def full(self: _SliceWriter, *arguments: Any) -> None:
        if saves > 1 and ranks.rank == fail_at:
            raise CheckpointError(f"cannot write: {errno.errorcode[errno.ENOSPC]}")
        whole_write(self, *arguments)

    trainer._runner.checkpoint_writer = writer
    try:
        with patch.object(_SliceWriter, "_pwrite", full):
            result = trainer.run()
    except MainspringError as error:
        return {"error": str(error)}
    return {"checkpoint": str(result.checkpoint), "step": result.step}


def resume_refused(text: str, overrides: list[str]) -> tuple[str, int]:
    """The error with which a run cannot go on, and how many watchdogs it leaves that would end this process."""
    try:
        Trainer(parse_recipe(text, overrides=overrides), resume=True, ranks=Ranks.present())
    except MainspringError as error:
        watchdogs = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        for thread in watchdogs:
            thread.join(5.0)
        return str(error), sum(thread.is_alive() for thread in watchdogs)
    raise AssertionError("the run went on")


def train_into_infinity(text: str, overrides: list[str], after: int, parameter: str) -> str:
    """The error of a run whose weight `parameter` is spoiled once `after` steps are done, their checkpoint begun."""
    trainer = Trainer(
        parse_recipe(text, overrides=overrides), show=Progress(silent=True), ranks=Ranks.present()
    )
    whole = trainer._train_step

    def step(*arguments: Any) -> float:
        if trainer._step == after:
            runner = trainer._runner
            assert isinstance(runner, Sharded)
            for piece in runner._units.pieces:
                if piece.block.parameter == parameter:
                    piece.of(piece.unit.shard).fill_(1e38)  # finite, but its products are not
            runner._units.refresh()
        return whole(*arguments)

    trainer._train_step = step
    try:
        trainer.run()
    except MainspringError as error:
        return str(error)
    raise AssertionError("the run did not stop")


def die_in_a_write(rank: int, ranks: int, store: str, text: str, overrides: list[str], step: int) -> None:
    """What a process of its own runs: training in a fresh group; the last rank is killed while it writes `step`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    whole = _SliceWriter._pwrite

    def deadly(self: _SliceWriter, *arguments: Any) -> None:
        if rank == ranks - 1 and f"step-{step:08d}" in str(self.directory):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, *arguments)

    with patch.object(_SliceWriter, "_pwrite", deadly):
        train(text, overrides)


def join_late(rank: int, port: int, attempt: int, delay: float) -> None:
    """What a process that torchrun starts does, of two; it ends as one that is killed."""
    time.sleep(delay)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "GROUP_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    with joined("cpu"):
        ranks = torch.tensor([float(rank)])
        dist.all_reduce(ranks)
        os._exit(0 if float(ranks) == 1.0 else 1)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sharded_of(directory: str, layout: str) -> tuple[Sharded, ModelConfig]:
    parsed = Layout.parse(layout)
    config = ModelConfig.from_file(directory)
    mesh, cpu = mesh_for(parsed, config), torch.device("cpu")
    sharded = Sharded(config, parsed, mesh, cpu, torch.float32, Policy("fast"), OptimizerSection())
    sharded.load_weights(Path(directory))
    return sharded, config


def spoil(directory: str, layout: str, parameter: str) -> str | None:
    """Puts a NaN into a weight, and asks which module was the first to be not finite."""
    sharded, config = sharded_of(directory, layout)
    for piece in sharded._units.pieces:
        if piece.block.parameter == parameter:
            piece.of(piece.unit.shard).fill_(1e38)  # finite, but its products are not
    sharded._units.refresh()
    batches = micro_batches(config, VerifySettings(), 0)
    loss, norm = sharded.train_step(batches, 1.0, 1.0)
    assert not (np.isfinite(loss) and np.isfinite(norm))
    return sharded.first_non_finite(batches)


def scores(directory: str, layout: str, count: int) -> list[float]:
    """Negative log-likelihoods of `count` batches, which need not divide by the ranks."""
    sharded, config = sharded_of(directory, layout)
    batches: list[MicroBatch] = micro_batches(config, VerifySettings(micro_batches=count), 0)
    return sharded.negative_log_likelihoods(batches)


def next_logits(directory: str, layout: str, sequences: list[list[int]]) -> Any:
    """What follows each, as a numpy array; once more after a step of training."""
    sharded, config = sharded_of(directory, layout)
    before = sharded.next_logits(sequences).numpy()
    sharded.train_step(micro_batches(config, VerifySettings(), 0), 1.0, 1.0)
    after = sharded.next_logits(sequences).numpy()
    assert np.abs(after - before).max() > 1e-4
    return before


def biased_training(directory: str, layout: str, rate: float, steps: int) -> dict[str, Any]:
    """The imbalance of each step, and the biases at the end, when the same batch is computed again and again."""
    from mainspring.parallel.balance import blocks_by_layer, move_biases, statistics

    units = units_of(directory, Layout.parse(layout), Balance(0.0, rate))
    pipeline = Pipeline(units.model, units)
    seen = []
    for _ in range(steps):
        pipeline.run(micro_batches(units.model.config, VerifySettings(), 0))
        units.clear()
        loads = take_loads(units.model)
        move_biases(units.model, loads)
        found = statistics(loads)
        assert found is not None
        seen.append(found.imbalance)
    biases = {number: block.choice_bias.tolist() for number, block in blocks_by_layer(units.model).items()}
    return {"imbalance": seen, "biases": biases}


def muon_error(
    directory: str, layout: str, gradients: str, expected: str, offload: bool
) -> tuple[float, float]:
    """(largest difference to the expected weights after two steps of given gradients, largest move of a weight)."""
    from mainspring.parallel.checkpoint import read_piece
    from mainspring.train.sharded_optimizer import ShardedOptimizer

    units = units_of(directory, Layout.parse(layout))
    optimizer = ShardedOptimizer(units, OptimizerSection("muon", muon_weight_decay=0.1), offload=offload)
    given, wanted, before = (CheckpointReader(path) for path in (gradients, expected, directory))
    for _ in range(2):
        units.begin_step()
        for unit in units.units:
            unit.gradient_shard = torch.zeros_like(unit.shard)
        for piece in units.pieces:
            units.gradient(piece).copy_(read_piece(given.entry(piece.block.name), piece))
        optimizer.step(1.0, 0.0)
    error = moved = 0.0
    for piece in units.pieces:
        now = piece.of(piece.unit.shard)
        error = max(error, float((now - read_piece(wanted.entry(piece.block.name), piece)).abs().max()))
        moved = max(moved, float((now - read_piece(before.entry(piece.block.name), piece)).abs().max()))
    return error, moved
