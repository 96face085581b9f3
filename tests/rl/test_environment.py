"""Environments: the calculator's arithmetic, and conversations of several turns that are learnt from."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.rl.conversation import Conversation
from mainspring.rl.environment import Calculator, Turn, calculate
from mainspring.rl.environment_worker import EnvironmentWorker
from mainspring.rl.grpo import GrpoSettings, grpo
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import Sample
from mainspring.rl.sft import SftSettings, sft
from mainspring.rl.worker import CallFailedError
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import sorting
from rl.reward_functions import MoodyWorld
from train.models import tiny_config

CHARACTERS = "0123456789+-*/=().?: \nabcdefghijklmnopqrstuvwxyz"
END = len(CHARACTERS)
TEXTS = Texts(
    lambda text: [CHARACTERS.index(c) for c in text],
    lambda tokens: "".join(CHARACTERS[t] for t in tokens if t != END),
    (END,),
)
SFT_STEPS = 60
STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from("+-*/"), st.integers(1, 10**6), st.integers(0, 99))
def test_the_calculator_is_exact(a: int, operation: str, b: int, c: int) -> None:
    inner = {"+": Fraction(a) + b, "-": Fraction(a) - b, "*": Fraction(a) * b, "/": Fraction(a, b)}
    assert calculate(f"({a} {operation} {b}) - {c}") == str(inner[operation] - c)


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("1/0", "error: division by zero"),
        ("2**9999", "error: not an expression of numbers and + - * /"),
        ("__import__('os')", "error: not an expression of numbers and + - * /"),
        ("True + 1", "error: not an expression of numbers and + - * /"),
        ("1 +", "error: not an expression of numbers and + - * /"),
        ("1" * 201, "error: longer than 200 characters"),
        ("0.1 + 0.2", "3/10"),
    ],
)
def test_what_is_no_arithmetic_is_answered_not_run(expression: str, answer: str) -> None:
    assert calculate(expression) == answer


def test_a_call_is_answered_and_anything_else_is_the_final_answer() -> None:
    world = Calculator(most_calls=2)
    world.reset(Prompt((1,), "6*7?", "42"))
    assert world.step("I ask calc(6*7)").text == "=42\n"
    final = world.step("so it is 42")
    assert (final.done, final.reward) == (True, 1.0)
    world.reset(Prompt((1,), "6*7?", "42"))
    world.step("calc(1)")
    world.step("calc(2)")
    assert world.step("calc(3)").done, "no more calls than allowed"


def test_a_conversation_that_is_replayed_has_the_rewards_it_had() -> None:
    class Paying(Calculator):
        def step(self, answer: str) -> Turn:
            return replace(super().step(answer), reward=1.0)

    def begun() -> Conversation:
        return Conversation(0, Prompt(tuple(TEXTS.encode("6*7?")), "6*7?", "42"), 1, Paying(), TEXTS)

    def written(conversation: Conversation, text: str, *, ends: bool) -> None:
        tokens = [*TEXTS.encode(text), *([END] if ends else [])]
        conversation.take(tokens, [-1.0] * len(tokens), 0)

    original = begun()
    original.begin()
    for text, ends in (("calc(6*7)", True), ("calc(2)", True), ("so it", False)):
        written(original, text, ends=ends)
        if ends:
            original.turn_over()
        copy = begun()
        copy.replay(original.written)
        copy.replay(original.written)  # also over what it was
        assert (copy.reward, copy.turns, copy.tokens) == (original.reward, original.turns, original.tokens)
    original.end(finished=False)  # its budget has cut it off: the environment was not told
    copy.replay(original.written)
    assert (copy.reward, copy.done, copy.finished) == (2.0, True, False)


def test_an_environment_that_hangs_or_dies_costs_its_turn_and_the_others_are_told_again() -> None:
    with EnvironmentWorker(MoodyWorld, timeout=0.4) as make:
        kept, bad = make(), make()
        kept.reset(Prompt((1,), "one", ""))
        assert kept.step("a").text == "one>a"
        for answer, reason in (
            ("raise", "ValueError: no such turn"),
            ("nothing", "TypeError: a step must give a Turn with a finite reward, not None"),
            ("hang", r"did not answer within 0\.4 s"),
            ("die", "process died"),
        ):
            bad.reset(Prompt((2,), "two", ""))
            assert bad.step("x").text == "two>x"
            with pytest.raises(CallFailedError, match=reason):
                bad.step(answer)
        with pytest.raises(CallFailedError, match="did not answer"):
            bad.reset(Prompt((3,), "hang", ""))
        assert kept.step("b").text == "one>a>b", "it knows what it was told in a process that is gone"
        del bad
        assert kept.step("c") == Turn("one>a>b>c", reward=0.5)


def test_what_hangs_is_dropped_and_counted_and_past_the_limit_the_run_stops() -> None:
    prompts = [Prompt((i, sorting.SEPARATOR), text, "") for i, text in enumerate(("hang", "1", "2"))]
    settings = RolloutSettings(3, 2, max_tokens=12, seed=0, max_failures=2)
    with EnvironmentWorker(MoodyWorld, timeout=0.4) as make:
        rollouts = Rollouts(
            sorting.model("lockstep"), prompts, sorting.TEXTS, sorting.Graded(), settings, environment=make
        )
        groups = rollouts.collect()
        assert (rollouts.report.dropped, rollouts.failures) == (2, 2)
        assert {t.prompt for g in groups for t in g} == {1, 2}
        assert all(t.num_written for g in groups for t in g)
        with pytest.raises(MainspringError, match=r"failed 3 times, more than max_failures = 2.*0\.4 s"):
            rollouts.collect()


def test_an_environment_that_cannot_be_imported_in_a_process_is_no_samples_failure() -> None:
    with EnvironmentWorker(lambda: Calculator(), timeout=1.0) as make:
        settings = RolloutSettings(1, 2, max_tokens=4)
        prompts = [Prompt((1,), "1", "")]
        rollouts = Rollouts(
            sorting.model("lockstep"), prompts, sorting.TEXTS, sorting.Graded(), settings, environment=make
        )
        with pytest.raises(ConfigError, match="at the top level of a module"):
            rollouts.collect()


def _model() -> Decoder:
    config = tiny_config(
        vocab_size=END + 1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
    )
    return create_model(config, numerics="lockstep")


def _taught() -> Decoder:
    """Knows, most of the time, how to ask the calculator for what it is given, and to repeat what that says."""
    model = _model()
    conversations = []
    for digit in "0123456789":
        parts = [(f"{digit}?", False), (f"calc({digit})", True), (f"={digit}\n", False), (digit, True)]
        tokens: list[int] = []
        written: list[bool] = []
        for text, mine in parts:
            piece = [*TEXTS.encode(text), *([END] if mine else [])]
            tokens += piece
            written += [mine] * len(piece)
        conversations.append(Sample(tuple(tokens), tuple(written)))
    optimizer = Optimizer(model, OptimizerSection(lr=1e-2))
    for _ in sft(model, optimizer, conversations, SftSettings(10, max_steps=SFT_STEPS, schedule=STEADY)):
        pass
    return model


@pytest.mark.slow
def test_a_tiny_model_holds_conversations_with_the_calculator_in_lockstep() -> None:
    model = _taught()
    prompts = [Prompt(tuple(TEXTS.encode(f"{d}?")), f"{d}?", d) for d in "0123456789"]
    rollouts = Rollouts(
        model,
        prompts,
        TEXTS,
        sorting.Graded(),  # never asked: the environment gives the rewards
        RolloutSettings(prompts_per_step=10, group_size=6, max_tokens=24, seed=0),
        environment=Calculator,
    )
    metrics = list(
        grpo(
            model,
            Optimizer(model, OptimizerSection(lr=5e-4, weight_decay=0.0)),
            rollouts,
            GrpoSettings(max_steps=3, schedule=STEADY, lockstep_check="all"),
        )
    )
    assert all(m.max_delta == 0 for m in metrics)
    answers = [t for m in metrics for g in m.groups for t in g]
    used = [t for t in answers if TEXTS.decode(t.tokens).count("=") == 1 and t.finished and t.reward]
    assert used, "the tool's result was read and the answer was right"
    told = used[0]
    unwritten = [token for token, mine in zip(told.tokens, told.written, strict=True) if not mine]
    text = TEXTS.decode(unwritten)
    assert "?=" in text, "the prompt and the tool's answer are not the policy's own"
    assert [m.lag for m in metrics] == [0.0] * 3
    assert any(m.grad_norm > 0 for m in metrics)
