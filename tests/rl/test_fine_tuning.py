"""SFT and DPO: what they optimise, that it is learnt, and that neither cutting nor stopping changes a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.rl.dpo import DpoSettings, dpo, judge, reference_log_probs
from mainspring.rl.samples import Pair, Sample, cut, drawn, written_log_probs
from mainspring.rl.sft import SftSettings, sft, sft_loss
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import sorting

STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)
# A large eps makes AdamW's step a smooth function of the gradient, so that equal weights mean equal gradients.
SMOOTH = OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)
ALL = 10**6


def _exhaust(steps: Iterator[object]) -> None:
    deque(steps, maxlen=0)


def _weights_equal(one: Decoder, other: Decoder, atol: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= atol, name


def test_sft_is_the_mean_over_written_tokens_only() -> None:
    model = sorting.model()
    samples = [pair.chosen for pair in sorting.pairs(6, 0)]
    log_ps = [model.log_probs([s.tokens])[0].tolist() for s in samples]
    written = [
        p for s, ps in zip(samples, log_ps, strict=True) for p, w in zip(ps, s.written[1:], strict=True) if w
    ]
    expected = -sum(written) / len(written)
    settings = SftSettings(prompts_per_step=6, schedule=STEADY)
    metrics = next(sft(model, Optimizer(model, SMOOTH), samples, settings))
    assert (metrics.step, metrics.tokens) == (1, sum(len(s.tokens) // 2 for s in samples))
    assert metrics.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens_per_microbatch", [26, 60])
def test_sft_does_not_depend_on_tokens_per_microbatch(tokens_per_microbatch: int) -> None:
    samples = [pair.chosen for pair in sorting.pairs(12, 1)]
    models = [sorting.model(), sorting.model()]
    for model, tokens in zip(models, (ALL, tokens_per_microbatch), strict=True):
        settings = SftSettings(6, tokens_per_microbatch=tokens, max_steps=3, schedule=STEADY)
        _exhaust(sft(model, Optimizer(model, SMOOTH), samples, settings))
    _weights_equal(models[0], models[1], atol=1e-6)
    assert (models[0].embedding - sorting.model().embedding).abs().max() > 1e-3


@pytest.mark.parametrize("tokens_per_microbatch", [26, 60])
@pytest.mark.parametrize("mean", [False, True])
def test_dpo_does_not_depend_on_tokens_per_microbatch(tokens_per_microbatch: int, mean: bool) -> None:
    pairs = sorting.pairs(12, 2)
    models = [sorting.model(), sorting.model()]
    for model, tokens in zip(models, (ALL, tokens_per_microbatch), strict=True):
        reference = reference_log_probs(model, pairs, tokens, mean=mean)
        settings = DpoSettings(
            6, tokens_per_microbatch=tokens, max_steps=3, schedule=STEADY, mean_log_probs=mean
        )
        _exhaust(dpo(model, Optimizer(model, SMOOTH), pairs, reference, settings))
    _weights_equal(models[0], models[1], atol=1e-6)
    assert (models[0].embedding - sorting.model().embedding).abs().max() > 1e-3


def test_dpo_begins_at_log_two_and_its_margins_are_log_ratios() -> None:
    model, start = sorting.model(), sorting.model()
    pairs = sorting.pairs(8, 3)
    reference = reference_log_probs(model, pairs)
    steps = dpo(
        model, Optimizer(model, OptimizerSection(lr=1e-2)), pairs, reference, DpoSettings(8, schedule=STEADY)
    )
    first = next(steps).preference
    assert first.loss == pytest.approx(math.log(2))
    assert first.margin == pytest.approx(0.0, abs=1e-5)

    def log_ratio(sample: Sample) -> float:
        now, then = (m.log_probs([sample.tokens])[0][-sample.num_written :] for m in (model, start))
        return float((now - then).detach().sum())

    ratios = [(log_ratio(pair.chosen), log_ratio(pair.rejected)) for pair in pairs]
    judged = next(steps).preference  # before the second step: of the weights after the first
    weights_after_two = judge(model, pairs, reference)
    assert judged.chosen == pytest.approx(sum(c for c, _ in ratios) / 8, abs=1e-4)
    assert judged.rejected == pytest.approx(sum(r for _, r in ratios) / 8, abs=1e-4)
    assert judged.accuracy == sum(c > r for c, r in ratios) / 8
    losses = [math.log1p(math.exp(-0.1 * (c - r))) for c, r in ratios]
    assert judged.loss == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert weights_after_two.loss < judged.loss < first.loss


def test_dpo_lifts_margin_and_accuracy_on_held_out_pairs() -> None:
    model = sorting.model()
    training, held_out = sorting.pairs(2000, 4), sorting.pairs(200, 5)
    reference, anchors = (reference_log_probs(model, pairs) for pairs in (training, held_out))
    before = judge(model, held_out, None)
    settings = DpoSettings(32, max_steps=80, schedule=ScheduleSection(warmup_fraction=0.1))
    optimizer = Optimizer(model, OptimizerSection(lr=1e-2, weight_decay=0.0))
    _exhaust(dpo(model, optimizer, training, reference, settings))
    after = judge(model, held_out, anchors)
    assert before.accuracy < 0.65
    assert judge(model, held_out, None).accuracy > 0.95
    assert after.accuracy > 0.95
    assert after.margin > 20.0


@pytest.mark.parametrize(
    "chosen",
    [
        DpoSettings(loss="ipo"),
        DpoSettings(loss="conservative", flipped=0.2),
        DpoSettings(loss="robust"),
        DpoSettings(beta=0.5),
    ],
    ids=["ipo", "conservative", "robust", "dpo"],
)
@pytest.mark.parametrize("with_reference", [True, False])
def test_each_loss_falls_and_lifts_the_margin(chosen: DpoSettings, with_reference: bool) -> None:
    model, pairs = sorting.model(), sorting.pairs(32, 6)
    reference = reference_log_probs(model, pairs) if with_reference else None
    settings = replace(chosen, prompts_per_step=16, max_steps=12, schedule=STEADY)
    before = judge(model, pairs, reference, settings)
    optimizer = Optimizer(model, OptimizerSection(lr=1e-2))
    _exhaust(dpo(model, optimizer, pairs, reference, settings))
    after = judge(model, pairs, reference, settings)
    assert after.loss < before.loss
    assert after.margin > before.margin + 0.3


def test_a_bfloat16_model_learns_preferences() -> None:
    model = create_model(sorting.config(), dtype="bfloat16", numerics="fast")
    pairs = sorting.pairs(32, 11)
    reference = reference_log_probs(model, pairs)
    settings = DpoSettings(16, tokens_per_microbatch=200, max_steps=30, schedule=STEADY)
    _exhaust(dpo(model, Optimizer(model, OptimizerSection(lr=1e-3)), pairs, reference, settings))
    assert judge(model, pairs, reference).margin > 2.0


def test_sft_lowers_the_held_out_loss() -> None:
    model = sorting.model()
    samples, held_out = ([pair.chosen for pair in sorting.pairs(n, n)] for n in (1000, 100))
    before = sft_loss(model, held_out)
    settings = SftSettings(32, max_steps=60, schedule=ScheduleSection(warmup_fraction=0.1))
    _exhaust(sft(model, Optimizer(model, OptimizerSection(lr=1e-2)), samples, settings))
    assert before == pytest.approx(math.log(12), abs=0.1)
    assert sft_loss(model, held_out, 100) < 0.7 * before


def _resumed(model: Decoder, optimizer: Optimizer) -> tuple[Decoder, Optimizer]:
    fresh = sorting.model(seed=9)
    fresh.load_state_dict(model.state_dict())
    other = Optimizer(fresh, OptimizerSection(lr=1e-2))
    other.load_state_tensors({name: t.clone() for name, t in optimizer.state_tensors().items()})
    return fresh, other


def test_stopped_runs_continue_to_the_bit() -> None:
    pairs = sorting.pairs(20, 7)  # three steps an epoch: the stop lies inside the second one
    samples = [pair.chosen for pair in pairs]
    for algorithm in ("sft", "dpo"):
        ends: list[Decoder] = []
        for stop_at in (8, 4):
            model = sorting.model()
            optimizer = Optimizer(model, OptimizerSection(lr=1e-2))
            reference = reference_log_probs(model, pairs)

            # Called in this turn of the loop alone, hence the silenced B023.
            def steps(first: int) -> Iterator[object]:
                if algorithm == "sft":  # noqa: B023
                    return sft(model, optimizer, samples, SftSettings(6, max_steps=8), first_step=first)  # noqa: B023
                settings = DpoSettings(6, max_steps=8)
                return dpo(model, optimizer, pairs, reference, settings, first_step=first)  # noqa: B023

            _exhaust(islice(steps(0), stop_at))
            model, optimizer = _resumed(model, optimizer)
            _exhaust(steps(stop_at))
            ends.append(model)
        _weights_equal(ends[0], ends[1], atol=0.0)


def test_in_lockstep_the_written_tokens_have_the_same_bits_however_they_are_packed() -> None:
    model = sorting.model("lockstep")
    samples = [s for pair in sorting.pairs(4, 8) for s in (pair.chosen, pair.rejected)]
    together, counts = written_log_probs(model, samples)
    alone = torch.cat([written_log_probs(model, [sample])[0] for sample in samples])
    assert torch.equal(together, alone)
    assert counts.tolist() == [sample.num_written for sample in samples]


def test_each_epoch_draws_every_prompt_once_in_a_new_order() -> None:
    epochs = [[i for step in islice(drawn(12, 4, 0, 3 * e), 3) for i in step] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert list(islice(drawn(13, 4, 0, 2), 5)) == list(islice(drawn(13, 4, 0), 7))[2:]


def test_cut_keeps_order_and_limit() -> None:
    assert cut([3, 4, 5, 1, 9], 9) == [range(0, 2), range(2, 4), range(4, 5)]
    assert cut([], 9) == []
    with pytest.raises(ConfigError, match="item 1 has 10 tokens, more than tokens_per_microbatch = 9"):
        cut([3, 10], 9)


def test_bad_samples_and_settings_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="begins with a token to be written"):
        Sample.answer([], [1, 2])
    with pytest.raises(ConfigError, match="no token that the policy is to write"):
        Sample.answer([1, 2], [])
    with pytest.raises(ConfigError, match="2 tokens, but 1 marks"):
        Sample((1, 2), (False,))
    model, pairs = sorting.model(), sorting.pairs(4, 9)
    optimizer = Optimizer(model, SMOOTH)
    with pytest.raises(ConfigError, match="prompts_per_step = 8 must be between 1 and the 4"):
        next(dpo(model, optimizer, pairs, None, DpoSettings(8)))
    with pytest.raises(ConfigError, match=r"shape \(3, 2\), but there are 4 pairs"):
        next(dpo(model, optimizer, pairs, torch.zeros(3, 2), DpoSettings(4)))
    empty: list[Pair] = []
    with pytest.raises(ConfigError, match="no pairs"):
        judge(model, empty, None)
    with pytest.raises(ConfigError, match="no samples"):
        sft_loss(model, [])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    pairs = sorting.pairs(4, 10)
    for algorithm in ("sft", "dpo"):
        model = sorting.model()
        optimizer = Optimizer(model, SMOOTH)
        with torch.no_grad():
            model.embedding[sorting.END] = math.inf
        samples = [pair.chosen for pair in pairs]
        steps: Iterator[object] = (
            sft(model, optimizer, samples, SftSettings(4))
            if algorithm == "sft"
            else dpo(model, optimizer, pairs, None, DpoSettings(4))
        )
        with pytest.raises(MainspringError, match="step 1: the loss is nan"):
            next(steps)
