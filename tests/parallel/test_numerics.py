"""Bits under tensor parallelism, and attention, losses and experts against their plain forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.checkpoint import load_model
from mainspring.ops import TokenBatch
from mainspring.parallel.layout import Layout
from mainspring.train.recipe import OptimizerSection
from mainspring.train.runner import SingleDevice
from mainspring.train.verify import VerifySettings, judge, micro_batches
from parallel.conftest import Reference
from parallel.pool import Pool

SETTINGS = VerifySettings(steps=2)


def _outputs(
    pool: Pool, directory: str, layout: str, numerics: str
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...]:
    results = pool.run("jobs:hidden_and_logits", Layout.parse(layout).world, directory, layout, numerics)
    for rank in results:  # every rank has the same bits
        assert all(np.array_equal(a, b) for a, b in zip(rank, results[0], strict=True))
    return results[0]


def test_tp_invariant_gives_the_same_bits_at_every_degree(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    directory = str(reference("tied", SETTINGS).directory)
    one = _outputs(pool, directory, "tp_invariant=true", "lockstep")
    for degree in (2, 4):
        for sliced in ("true", "false"):
            layout = f"tp={degree},tp_invariant=true,sequence_parallel={sliced}"
            many = _outputs(pool, directory, layout, "lockstep")
            assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_in_lockstep_slices_of_the_sequence_change_no_bit(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    """Trainer (sliced) and engine (whole) agree at equal degree: sums go in the order of ranks either way."""
    directory = str(reference("biased", SETTINGS).directory)
    sliced = _outputs(pool, directory, "tp=4", "lockstep")
    whole = _outputs(pool, directory, "tp=4,sequence_parallel=false", "lockstep")
    assert all(np.array_equal(a, b) for a, b in zip(sliced, whole, strict=True))
    model = load_model(directory)
    tokens = torch.randint(0, model.config.vocab_size, (37,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model.logits(model(tokens, TokenBatch.packed([20, 1, 16])))
    np.testing.assert_allclose(sliced[1], expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("tied", "tp=2,sequence_parallel=false"),
        ("biased", "tp=4,sequence_parallel=false"),
        ("tied", "tp=2,sequence_parallel=false,tp_invariant=true"),
        ("moe", "tp=2,sequence_parallel=false"),
    ],
)
def test_serving_through_a_cache_gives_the_trainers_bits_at_equal_degree(
    pool: Pool, reference: Callable[..., Reference], kind: str, layout: str
) -> None:
    directory = str(reference(kind, SETTINGS).directory)
    sliced = layout.replace("sequence_parallel=false", "sequence_parallel=true")
    ranks = Layout.parse(layout).world
    results = pool.run("jobs:whole", ranks, directory, sliced)
    trained = results[0][0]
    model = load_model(directory)
    tokens = torch.randint(0, model.config.vocab_size, (21,), generator=torch.Generator().manual_seed(4))
    model(tokens, TokenBatch.packed([21])).square().sum().backward()
    expected = model.layers[0].attention.output.weight.grad
    columns = np.concatenate([gradient for _, gradient in results], axis=1)
    np.testing.assert_allclose(columns, expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for cached, whole in pool.run("jobs:cached_and_whole", ranks, directory, layout):
        assert np.array_equal(cached, whole)
        assert np.array_equal(whole, trained)


@pytest.mark.parametrize("layout", ["dp=2,cp=2,ep=4", "dp=4,ep=4,zero=3", "tp=2,dp=2,ep=2,zero=2"])
def test_ranks_whose_experts_get_no_token_take_part_all_the_same(
    pool: Pool, reference: Callable[..., Reference], layout: str
) -> None:
    settings = VerifySettings(steps=2, tokens=2, dtype="float64")
    known = reference("moe-sparse", settings)
    assert all(0 in load for load in known.run.loads.values())  # 8 tokens in all, one of 8 experts each
    results = pool.run(
        "jobs:verify_and_count_empty", Layout.parse(layout).world,
        str(known.directory), layout, settings, str(known.gradients),
    )  # fmt: skip
    assert sum(empty for _, _, empty in results) > 0
    run, errors, _ = results[0]
    assert not judge(known.run, run, errors, settings).problems


def test_the_auxiliary_loss_is_switch_transformers_and_the_same_under_every_layout(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    directory = str(reference("moe", SETTINGS).directory)
    settings = VerifySettings(micro_batches=4)
    expected = _router_gradients_with_auxiliary_loss(directory, 0.5, settings)
    for layout in ("one", "tp=2", "cp=2", "dp=2,ep=2", "dp=2,zero=3", "pp=2", "tp=2,cp=2,recompute=full"):
        results = pool.run("jobs:balanced", Layout.parse(layout).world, directory, layout, 0.5, settings)
        for result in results:
            assert result["gradients"] or layout == "pp=2" or "zero" in layout
            for (name, offset), gradient in result["gradients"].items():
                part = expected[name].flatten()[offset : offset + gradient.shape[0]]
                np.testing.assert_allclose(gradient, part, rtol=2e-4, atol=2e-6, err_msg=f"{layout} {name}")
            assert result["loads"] == results[0]["loads"]
            slots = 2 * sum(len(b.tokens) for b in micro_batches(load_model(directory).config, settings, 0))
            assert {sum(load) for load in result["loads"].values()} == {slots}  # none dropped


def _router_gradients_with_auxiliary_loss(
    directory: str, coefficient: float, settings: VerifySettings
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """On one device, by the formula: E · sum_e f_e P_e of each micro-batch, weighted by its tokens."""
    model = load_model(directory, dtype="float32", numerics="fast").train()
    batches = micro_batches(model.config, settings, 0)
    count = sum(int((b.targets != -100).sum()) for b in batches)
    tokens = sum(len(b.tokens) for b in batches)
    config = model.config
    logits: list[torch.Tensor] = []
    for layer in model.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(lambda module, args, out: logits.append(out))
    for batch in batches:
        logits.clear()
        hidden = model(torch.from_numpy(batch.tokens), TokenBatch.packed(batch.lengths))
        targets = torch.from_numpy(batch.targets)
        loss = (
            torch.nn.functional.cross_entropy(hidden @ model.output_weight.t(), targets, reduction="sum")
            / count
        )
        for out in logits:
            p = torch.softmax(out, -1)
            chosen = p.topk(config.num_experts_per_token, -1).indices.flatten()
            share = torch.bincount(chosen, minlength=config.num_experts) / chosen.shape[0]
            balance = config.num_experts * (share * p.mean(0)).sum()
            loss = loss + coefficient * balance * len(batch.tokens) / tokens
        loss.backward()
    return {
        f"model.layers.{i}.mlp.gate.weight": layer.mlp.router.weight.grad.numpy()
        for i, layer in enumerate(model.layers)
        if hasattr(layer.mlp, "router")
    }


def test_the_bias_on_the_choice_balances_experts_the_same_under_every_layout(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    directory = str(reference("moe", SETTINGS).directory)
    one = pool.run("jobs:biased_training", 1, directory, "one", 0.05, 8)[0]
    assert one["imbalance"][-1] < 0.75 * (one["imbalance"][0] - 1) + 1
    for layout in ("dp=2,ep=2", "tp=2", "cp=2,zero=2"):
        for rank in pool.run("jobs:biased_training", 2, directory, layout, 0.05, 8):
            assert rank == one


@pytest.mark.parametrize(
    "layout", ["dp=2,zero=3", "pp=2,virtual=2,schedule=interleaved", "tp=2,cp=2", "moe dp=2,ep=2"]
)
def test_held_out_losses_are_those_of_one_device_for_any_number_of_batches(
    pool: Pool, reference: Callable[..., Reference], layout: str
) -> None:
    kind, _, layout = layout.rpartition(" ")
    directory = str(reference(kind or "dense", SETTINGS).directory)
    model = load_model(directory, dtype="float32", numerics="fast")
    expected = SingleDevice(model, OptimizerSection()).negative_log_likelihoods(
        micro_batches(model.config, VerifySettings(micro_batches=5), 0)
    )
    for scores in pool.run("jobs:scores", Layout.parse(layout).world, directory, layout, 5):
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "dense:dp=2,zero=3",
        "tied:pp=2,virtual=2,schedule=interleaved",
        "biased:tp=2,cp=2",
        "moe:dp=2,ep=2",
        "tied:tp=2,pp=2",
    ],
)
def test_the_logits_that_samples_are_drawn_from_are_one_devices_on_every_rank(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    kind, _, layout = case.partition(":")
    directory = str(reference(kind, SETTINGS).directory)
    sequences = [[1, 2, 3], [7], [9] * 11]
    expected = SingleDevice(load_model(directory, dtype="float32", numerics="fast"), OptimizerSection())
    results = pool.run("jobs:next_logits", Layout.parse(layout).world, directory, layout, sequences)
    np.testing.assert_allclose(results[0], expected.next_logits(sequences).numpy(), rtol=1e-4, atol=1e-4)
    for logits in results:
        assert np.array_equal(logits, results[0])


def test_a_run_under_a_layout_draws_samples_on_the_way_and_in_the_end(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of {i * i % 89}\n" for i in range(100)))
    text = f"""
data.sources = ["{tmp_path / "a.txt"}"]
tokenizer.vocab_size = 270
model = {{ hidden_size = 32, intermediate_size = 24, num_heads = 4 }}
training = {{ sequence_length = 24, tokens_per_micro_batch = 48, accumulation_steps = 2, max_steps = 4 }}
samples = {{ prompts = ["line ", "of"], every = 2, max_tokens = 5 }}
"""
    drawn = {}
    for name, ranks, overrides in (("one", 1, []), ("cut", 2, ["parallel.tp=2"])):
        done = pool.run("jobs:train", ranks, text, [f"output='{tmp_path / name}'", *overrides])
        assert done[0].get("step") == 4, done
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        drawn[name] = [event for event in map(json.loads, lines) if event["event"] == "samples"]
    assert [event["step"] for event in drawn["cut"]] == [2, 4]
    assert drawn["cut"] == drawn["one"]
    assert all(len(event["texts"]) == 2 for event in drawn["cut"])


def test_the_gradient_file_has_hugging_faces_names(reference: Callable[..., Reference]) -> None:
    known = reference("moe", SETTINGS)
    assert set(CheckpointReader(known.gradients).names()) == set(CheckpointReader(known.directory).names())
