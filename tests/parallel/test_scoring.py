"""What post-training asks of a sharded model: log-probabilities with gradients, and its weights for an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mainspring.engine.weights import weights_checksum
from mainspring.errors import ConfigError, InvalidRequestError
from mainspring.model.checkpoint import load_model, save_model
from mainspring.model.decoder import Decoder
from mainspring.ops import FAST
from mainspring.parallel.experts import Balance
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.rl.sft import SftSettings, sft
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection
from mainspring.train.verify import VerifySettings, write_gradients
from parallel.conftest import Reference
from parallel.models import tiny
from parallel.pool import Pool
from parallel.scoring import TEMPERATURE, loss_of, samples_of, sequences

SETTINGS = VerifySettings(steps=2)


@pytest.mark.parametrize(
    "case",
    [
        "tied:tp=2",
        "dense:dp=2,zero=1",
        "dense:dp=2,zero=3",
        "biased:cp=2",
        "moe:dp=2,ep=2,zero=2",
        "tied:tp=2,dp=2,zero=3,recompute=selective",
        "windowed:tp=2,cp=2,sequence_parallel=false",
    ],
)
def test_log_probs_and_their_gradients_are_one_devices(
    pool: Pool, reference: Callable[..., Reference], tmp_path: Path, case: str
) -> None:
    kind, _, layout = case.partition(":")
    directory = str(reference(kind, SETTINGS).directory)
    model = load_model(directory, dtype=torch.float64, numerics="fast").train()
    given = sequences(model.config)
    expected = model.log_probs(given, temperature=TEMPERATURE)
    loss_of(expected, list(range(len(given))), sum(len(s) - 1 for s in given)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    write_gradients(model, gradients, tmp_path / "gradients.safetensors")
    seen = set()
    for found, error in pool.run(
        "scoring:scored",
        Layout.parse(layout).world,
        directory,
        layout,
        str(tmp_path / "gradients.safetensors"),
    ):
        assert error < 1e-10
        seen |= set(found)
        for number, log_probs in found.items():
            np.testing.assert_allclose(log_probs, expected[number].detach().numpy(), rtol=1e-11, atol=1e-13)
    assert seen == set(range(len(given)))


@pytest.mark.parametrize(
    "case", ["tied:tp=2", "dense:dp=2,zero=3", "tied:dp=2,zero=1", "moe:dp=2,tp=2,ep=2,zero=2"]
)
def test_a_loop_of_its_own_losses_moves_the_weights_as_on_one_device(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    kind, _, layout = case.partition(":")
    directory = str(reference(kind, SETTINGS).directory)
    model = load_model(directory, dtype="float32", numerics="fast").train()
    before = {name: tensor.detach().clone().numpy() for name, tensor in model.hf_tensors().items()}
    optimizer, given, norms = Optimizer(model, OptimizerSection(lr=0.01)), sequences(model.config), []
    for _ in range(3):
        loss_of(model.log_probs(given), list(range(len(given))), 80).backward()
        optimizer.accumulate()
        norms.append(optimizer.step(1.0, 1.0))
    expected = model.hf_tensors()
    for got, weights in pool.run("scoring:fine_tuned", Layout.parse(layout).world, directory, layout, 3):
        assert got == pytest.approx(norms, rel=1e-4)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            wanted = expected[name].detach().numpy()
            # AdamW's first steps are signs, which roundings turn where a gradient is nearly 0: so in norm.
            assert np.linalg.norm(tensor - wanted) < 0.01 * np.linalg.norm(wanted - before[name]), name


def test_a_loop_of_post_training_runs_as_it_is_under_tensor_parallelism(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    directory = str(reference("tied", SETTINGS).directory)
    model = load_model(directory, dtype="float32").train()
    settings = SftSettings(prompts_per_step=6, tokens_per_microbatch=40, max_steps=2)
    optimizer = Optimizer(model, OptimizerSection(lr=0.01))
    expected = list(sft(model, optimizer, samples_of(model.config), settings))
    for losses, norms in pool.run("scoring:tuned_by_sft", 2, directory, "tp=2"):
        assert losses == pytest.approx([m.loss for m in expected], rel=1e-5)
        assert norms == pytest.approx([m.grad_norm for m in expected], rel=1e-4)


@pytest.mark.parametrize("case", ["tied:tp=2", "biased:tp=4", "dense:tp=2,sequence_parallel=false"])
def test_in_lockstep_they_are_what_an_engine_of_that_degree_reports_to_the_bit(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    kind, _, layout = case.partition(":")
    directory = str(reference(kind, SETTINGS).directory)
    results = pool.run("scoring:bits", Layout.parse(layout).world, directory, layout)
    assert all(same for same, _ in results)
    for _, log_probs in results:
        assert np.array_equal(log_probs, results[0][1])


def test_entropies_and_their_gradients_are_those_over_the_whole_vocabulary(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    directory = str(reference("dense", SETTINGS).directory)
    one = pool.run("scoring:entropies", 1, directory, "one")[0]
    assert (one["entropy"] > 0).all()
    for found in pool.run("scoring:entropies", 4, directory, "tp=4"):
        assert found["same"]
        for name in ("log_p", "entropy", "gradient"):
            np.testing.assert_allclose(found[name], one[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "case",
    ["moe-tied:pp=2,dp=2,ep=2,zero=3", "biased:tp=4", "tied:dp=2,replicate=2,zero=1", "moe:tp=2,cp=2,ep=2"],
)
def test_whole_weights_come_one_by_one_to_the_bit_and_the_checksum_is_the_engines(
    pool: Pool, tmp_path: Path, case: str
) -> None:
    kind, _, layout = case.partition(":")
    model = Decoder(tiny(kind), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.view(-1)[::7] = -0.0  # which a sum of floats would lose
    save_model(model, tmp_path / "model")
    tensors = load_model(tmp_path / "model", dtype="bfloat16").hf_tensors()
    expected = {}
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        expected[name] = f"{tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
    for checksum, found, most in pool.run(
        "scoring:streamed", Layout.parse(layout).world, str(tmp_path / "model"), layout
    ):
        assert list(found) == list(expected)
        assert found == expected
        assert checksum == weights_checksum(load_model(tmp_path / "model", dtype="bfloat16"))
        assert most == max(t.numel() * 2 for t in tensors.values())


def test_what_has_no_log_probs_is_refused() -> None:
    model = Decoder(tiny("moe"), policy=FAST).train()
    share = parallelize(model, Layout(), Mesh.single(), balance=Balance(capacity=1.0))
    with pytest.raises(ConfigError, match=r"capacity of 1\.0 drop tokens"):
        share.log_probs([[1, 2]])
    plain = parallelize(Decoder(tiny("dense"), policy=FAST), Layout(), Mesh.single())
    for bad, said in (([[]], "empty"), ([[61]], "vocabulary is 0 to 60")):
        with pytest.raises(InvalidRequestError, match=said):
            plain.log_probs(bad)
    with pytest.raises(InvalidRequestError, match="temperature"):
        plain.log_probs([[1, 2]], temperature=0.0)
    assert plain.log_probs([]) == []
