"""The engine over several processes (gloo): the same tokens and, bit for bit, the same log-probabilities as in one."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.test_core import Job, Result, assert_bitwise_the_trainers, collect, run
from engine.test_lora import ALL as ALL_TARGETS
from engine.test_lora import write_adapter
from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.drafters import blocks_beside
from mainspring.engine.llm import LLM
from mainspring.engine.ranks.cutting import cut_batch, piece_bounds
from mainspring.engine.ranks.layout import check_serving_layout, serving_layout
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.speculative import SpeculativeConfig
from mainspring.engine.weights import weights_checksum
from mainspring.errors import CheckpointError, ConfigError, EngineDeadError
from mainspring.model.checkpoint import load_model, read_tensors, save_model
from mainspring.model.initialise import create_model
from mainspring.ops import KVCache, TokenBatch
from parallel.models import tiny
from parallel.pool import Pool
from support.serving import write_tiny_model

VOCAB = 61


def checkpoint(directory: Path, kind: str, seed: int = 1) -> Path:
    config = tiny(kind, num_attention_heads=8, num_key_value_heads=4)
    save_model(create_model(config, dtype=torch.float32, seed=seed), directory)
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("dense") / "model", "dense")


# Small enough that prompts are cut and requests are preempted.
TIGHT = EngineConfig(num_blocks=15, block_size=4, max_num_batched_tokens=9, max_num_seqs=6)
DRAFT = SpeculativeConfig(method="draft_model", num_speculative_tokens=3)
EXPERT = EngineConfig(num_blocks=40, block_size=4, max_num_batched_tokens=7, speculative=SpeculativeConfig())


def jobs() -> list[Job]:
    """Prompts that begin alike, prompt and completion log-probabilities, every way of sampling."""
    generator = random.Random(3)
    shared = [generator.randrange(VOCAB) for _ in range(13)]
    found: list[Job] = []
    for number in range(7):
        own = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 14))]
        params = SamplingParams(
            temperature=(0.0, 1.0, 0.7)[number % 3],
            top_p=0.9 if number == 4 else 1.0,
            frequency_penalty=0.5 if number == 5 else 0.0,
            seed=number,
            max_tokens=generator.randint(4, 14),
            logprobs=2,
            prompt_logprobs=1 if number in (0, 3) else None,
        )
        found.append(((shared if number % 2 else []) + own, params))
    return found


ARRIVALS = [0, 0, 1, 2, 2, 5, 9]


@contextmanager
def led(directory: Path, piece_tokens: int | None = None, **degrees: int | bool) -> Iterator[LeadModel]:
    layout = serving_layout(None, **degrees)
    assert layout is not None
    model = LeadModel(directory, layout, piece_tokens=piece_tokens)
    pids = model.worker_pids
    try:
        yield model
    finally:
        model.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


def served(
    directory: Path, config: EngineConfig, piece_tokens: int | None = None, **degrees: int | bool
) -> list[Result]:
    """Of all jobs; where every rank has all layers, the bits of the model's own scores."""
    with led(directory, piece_tokens, **degrees) as model:
        results = run(EngineCore(model, config), jobs(), ARRIVALS)
        if model.layout.pp == 1:
            for result in results:
                assert_bitwise_the_trainers(model, result)
        return results


@pytest.fixture(scope="module")
def invariant(dense: Path) -> list[Result]:
    """What one process gives whose sums go by the tree that is the same at every degree."""
    with led(dense, tp_invariant=True) as model:
        core = EngineCore(model, TIGHT)
        results = run(core, jobs(), ARRIVALS)
        stats = core.stats()
        assert stats.preemptions_total > 0
        assert stats.prefix_cache_hits_total > 0
        return results


def test_log_probabilities_over_four_ranks_are_bitwise_those_of_one(
    dense: Path, invariant: list[Result]
) -> None:
    assert served(dense, TIGHT, tp=4, tp_invariant=True) == invariant


@pytest.mark.slow  # two stages serve in tests/engine/server/test_layouts.py
@pytest.mark.parametrize(("pp", "piece_tokens"), [(2, None), (2, 1), (3, 2)])
def test_stages_give_one_devices_bits(dense: Path, pp: int, piece_tokens: int | None) -> None:
    results = served(dense, TIGHT, piece_tokens, pp=pp)
    trainer = load_model(dense)
    assert results == run(EngineCore(trainer, TIGHT), jobs(), ARRIVALS)
    for result in results:
        assert_bitwise_the_trainers(trainer, result)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}, {"tp": 2, "tp_invariant": True}])
def test_adapters_are_cut_as_the_weights_are(
    dense: Path, tmp_path: Path, degrees: dict[str, int | bool]
) -> None:
    model = load_model(dense)
    names = {"a": ALL_TARGETS, "b": ["q_proj", "down_proj"]}
    for seed, (name, targets) in enumerate(names.items()):
        write_adapter(tmp_path / name, model, targets, 4, seed)
    config = EngineConfig(
        num_blocks=40,
        block_size=4,
        max_num_batched_tokens=9,
        lora_adapters={n: str(tmp_path / n) for n in names},
    )

    def results(core: EngineCore) -> list[Result]:
        found = [Result(prompt, [], [], None, None, None, 0) for prompt, _ in jobs()]
        for number, (prompt, params) in enumerate(jobs()):
            core.add_request(make_request(str(number), prompt, params, core.limits, (), lora_id=number % 3))
        while core.has_work():
            for output in core.step():
                collect(found[int(output.request_id)], output)
        return found

    expected = results(EngineCore(model, config))
    plain = run(EngineCore(model, TIGHT), jobs())
    assert [r.tokens for r in plain] != [r.tokens for r in expected]
    with led(dense, 2, **degrees) as spread:
        got = results(EngineCore(spread, config))
    if degrees == {"pp": 2}:
        assert got == expected
    for mine, theirs in zip(got, expected, strict=True):
        first, second = mine.logprobs[0], theirs.logprobs[0]
        assert first.token_ids[0] == second.token_ids[0]
        assert first.logprobs[0] == pytest.approx(second.logprobs[0], abs=1e-4)


def test_experts_over_two_ranks_give_one_devices_bits_with_drafts_too(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", "moe")
    results = served(directory, EXPERT, ep=2)
    assert results == run(EngineCore(load_model(directory), EXPERT), jobs(), ARRIVALS)


def test_two_ranks_give_the_same_bits_sleep_draft_take_new_weights_and_one_that_dies_is_noticed(
    dense: Path, invariant: list[Result], tmp_path: Path
) -> None:
    other = checkpoint(tmp_path / "other", "dense", seed=2)
    new = load_model(other)
    with led(dense, tp=2, tp_invariant=True) as model:
        core = EngineCore(model, TIGHT)
        assert run(core, jobs(), ARRIVALS) == invariant
        core.sleep()
        core.wake()
        before = run(core, jobs())
        assert before == invariant  # whenever they arrive
        core.sleep()

        # A draft model is whole on rank 0, beside a part of the model.
        itself = load_model(dense)
        assert blocks_beside(90, model, torch.float32, itself) == 30
        drafting = EngineCore(model, replace(TIGHT, speculative=DRAFT), draft_model=itself)
        assert run(drafting, jobs(), ARRIVALS) == invariant
        assert drafting.stats().accepted_tokens_total > 0
        drafting.sleep()

        # Of an fp8 cache, what needs no GPU: every rank has its part, and copies blocks of it.
        cache = model.allocate_cache(3, 4, torch.float8_e4m3fn)
        assert cache.k_scale is not None
        model.copy_blocks(cache, torch.tensor([[1, 2]]))
        model.free_cache()

        core.wake()
        whole = read_tensors(other)
        with pytest.raises(CheckpointError, match=r"norm\.weight"):
            core.update_weights({**whole, "model.norm.weight": torch.zeros(3)})
        assert core.update_weights({}) == weights_checksum(load_model(dense))
        assert core.update_weights(whole) == weights_checksum(new)
        after = run(core, jobs())
        # The sums round otherwise than a plain model's, but the model is the new one.
        expected = run(EngineCore(new, TIGHT), jobs())
        for got, want in zip(after, expected, strict=True):
            assert got.logprobs[0].logprobs[0] == pytest.approx(want.logprobs[0].logprobs[0], abs=1e-4)
        assert [r.tokens for r in after] != [r.tokens for r in before]

        [pid] = model.worker_pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="rank 1 of the layout has ended"):
            run(core, jobs())
        with pytest.raises(EngineDeadError):
            core.check_ranks()


def to_the_end(core: EngineCore) -> None:
    while core.has_work():
        core.step()


def test_a_rank_that_does_not_answer_is_given_up(dense: Path) -> None:
    layout = serving_layout(None, tp=2)
    assert layout is not None
    model = LeadModel(dense, layout, answer_seconds=5.0)
    [pid] = model.worker_pids
    try:
        core = EngineCore(model, TIGHT)
        core.add_request(make_request("r", [1, 2, 3], SamplingParams(max_tokens=30), core.limits, ()))
        assert core.step()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=r"not answered within 5 s"):
            to_the_end(core)
        with pytest.raises(EngineDeadError, match=r"not answered within 5 s"):
            core.check_ranks()
    finally:
        model.close()
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees", "trained"),
    [
        ("dense", {"tp": 2}, "tp=2"),  # the trainer's tokens are cut between its layers
        ("dense", {"tp": 4, "tp_invariant": True}, "tp=2,tp_invariant=true"),
        ("tied", {"tp": 2, "pp": 2}, "tp=2"),
        ("moe", {"tp": 2, "ep": 2}, "tp=2"),
    ],
)
def test_log_probabilities_are_bitwise_those_of_a_trainer_under_a_layout(
    tmp_path: Path, kind: str, degrees: dict[str, int | bool], trained: str
) -> None:
    directory = checkpoint(tmp_path / "model", kind)
    results = served(directory, TIGHT, **degrees)
    pool = Pool()
    try:
        sequences = [result.prompt + result.tokens for result in results]
        expected, _ = pool.run("given_sequences:log_probs", 2, str(directory), trained, sequences)
    finally:
        pool.close()
    for result, values in zip(results, expected, strict=True):
        got = [entry.logprobs[0] for entry in result.logprobs]
        assert got == values[len(result.prompt) - 1 :]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    known=st.lists(st.integers(0, 20), min_size=5, max_size=5),
    stages=st.integers(1, 4),
    least=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_a_step_are_the_step(
    lengths: list[int], known: list[int], stages: int, least: int
) -> None:
    cache = KVCache.allocate(1, 41, 4, 1, 8, torch.float32, "cpu")
    contexts = [have + new for have, new in zip(known, lengths, strict=False)]
    tables = [[1 + 8 * s + b for b in range(8)] for s in range(len(lengths))]
    whole = TokenBatch.paged(lengths, contexts, tables, cache)
    bounds = piece_bounds(sum(lengths), stages, least)
    seen: list[tuple[int, int]] = []  # position and slot of each token
    for begin, end in itertools.pairwise(bounds):
        piece = cut_batch(whole, begin, end)
        assert piece.num_tokens == end - begin >= min(least, sum(lengths))
        assert sum(piece.lengths) == piece.num_tokens
        assert piece.cu_seqlens.tolist() == list(itertools.accumulate(piece.lengths, initial=0))
        assert piece.context_lens.tolist() == list(piece.contexts)
        again = TokenBatch.paged(piece.lengths, piece.contexts, piece.block_tables.tolist(), cache)
        assert torch.equal(again.positions, piece.positions)
        assert torch.equal(again.slots, piece.slots)
        seen += zip(piece.positions.tolist(), piece.slots.tolist(), strict=True)
    assert seen == list(zip(whole.positions.tolist(), whole.slots.tolist(), strict=True))


def test_layouts_that_cannot_be_served_are_refused_before_anything_starts(dense: Path) -> None:
    def refused(match: str, **degrees: int | bool) -> None:
        layout = serving_layout(None, **degrees)
        assert layout is not None
        with pytest.raises(ConfigError, match=match):
            LeadModel(dense, layout)

    refused("tp 3 does not divide the model's 8 attention heads", tp=3)
    refused("5 stages .* for 4 layers", pp=5)
    refused("ep 2, but the model has no experts", ep=2)
    with pytest.raises(ConfigError, match="cp is 2, which the engine does not serve under"):
        serving_layout("cp=2")
    with pytest.raises(ConfigError, match="zero is 1"):
        serving_layout("tp=2,zero=1,dp=1")
    with pytest.raises(ConfigError, match="give one or the other"):
        serving_layout("tp=2", tp=2)
    assert serving_layout(None) is None
    assert serving_layout("dp=2,ep=2") == serving_layout(None, ep=2)
    layout = serving_layout("tp=2,tp_invariant=true")
    assert layout is not None
    with pytest.raises(ConfigError, match="tp_invariant is not promised of experts"):
        layout.check(tiny("moe"))


def test_what_the_gpus_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(
        "dense",
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
    )
    gpu = torch.device("cuda")

    def check(device: torch.device, **degrees: int | bool) -> None:
        layout = serving_layout(None, **degrees)
        assert layout is not None
        check_serving_layout(layout, config, device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check(gpu, tp=8)
    check(gpu, tp=4, tp_invariant=True)
    with pytest.raises(ConfigError, match="qkv's 3072 rows leave 384 a rank"):
        check(gpu, tp=8, tp_invariant=True)  # the kernels sum so few rows in two chunks
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        check(torch.device("cuda", 1), tp=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="needs 2 CUDA devices on this machine, which has 1"):
        check(gpu, tp=2)


def test_the_offline_engine_takes_a_layout(tmp_path: Path, dense: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    params = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=0)
    with LLM(directory, layout="tp_invariant=true", num_blocks=8) as llm:
        assert isinstance(llm.model, LeadModel)
        [output] = llm.generate("hello", params)
        assert len(output.outputs[0].token_ids) == 5
        assert output.prompt_logprobs is not None
        ids = output.prompt_token_ids
        given = [
            position[token].logprob
            for token, position in zip(ids, output.prompt_logprobs, strict=True)
            if position
        ]
        assert given == llm.model.log_probs([ids])[0].tolist()
    llm.close()  # again
    for model, degrees in ((load_model(dense), {"tp": 2}), (dense, {"pp": 2, "quantized": True})):
        with pytest.raises(ConfigError, match="needs a checkpoint that each rank reads its part of"):
            LLM(model, **degrees)


def test_what_is_not_served_under_a_layout_is_refused_with_the_way_out(dense: Path) -> None:
    with led(dense, tp_invariant=True) as model:
        core = EngineCore(model, TIGHT)
        with pytest.raises(ConfigError, match="update_weights"):
            core.receive_weights(0)


def test_a_rank_that_cannot_read_its_weights_fails_all_with_the_reason(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in dense.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match="cannot load"), led(broken, tp_invariant=True):
        pass
