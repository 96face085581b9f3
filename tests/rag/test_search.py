"""The strategy search on made-up outcomes: budgets, what may be called better, fronts, spaces, questions."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import ConfigError, DocumentError, RecipeError
from mainspring.rag.evaluation.bootstrap import paired_difference
from mainspring.rag.search.beam import beam_search
from mainspring.rag.search.greedy import greedy_search
from mainspring.rag.search.halving import successive_halving
from mainspring.rag.search.ledger import Evaluate, Figures, Ledger, Outcome
from mainspring.rag.search.pareto import dominates, pareto_front
from mainspring.rag.search.questions import TuneQuestion, load_questions, split
from mainspring.rag.search.report import report
from mainspring.rag.search.screening import screen
from mainspring.rag.search.space import Choice, Space, canonical, changes, default_space, load_space
from mainspring.rag.search.tune import TuneResult, TuneSettings, search, tune
from mainspring.rag.search.verdict import CONFIDENCE
from mainspring.rag.strategy import IndexStep, RetrieveStep, Strategy, parse_strategy, to_toml

QUESTIONS = tuple(TuneQuestion(f"question {n}", (f"answer {n}",)) for n in range(80))
SMALL = Space(
    (
        Choice("retrieve.method", ("hybrid", "bm25", "dense")),
        Choice("retrieve.alpha", (0.3, 1.0, 2.0)),
        Choice("rerank.method", ("none", "cross-encoder")),
        Choice("rerank.depth", (5, 20)),
        Choice("context.passages", (3, 5)),
    )
)
WIDE = Space((*SMALL.choices, Choice("retrieve.candidates", (10, 20, 30, 50, 100))))


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return zlib.crc32(repr(parts).encode()) / 2**32


def made_up(seed: int, spread: float, calls: list[Strategy] | None = None) -> Evaluate:
    """Outcomes of a strategy's own mean with noise a question; reranking is better and slower where it is deep."""

    def evaluate(strategy: Strategy, question: TuneQuestion) -> Outcome:
        if calls is not None:
            calls.append(strategy)
        quality = 0.5 + spread * (unit(seed, strategy) - 0.5) + 0.4 * (unit(seed, strategy, question) - 0.5)
        depth = strategy.rerank.depth if strategy.rerank.method != "none" else 0
        return Outcome(quality, 0.01 * (1 + depth) * (1 + 0.1 * unit(question)), 100.0 * depth)

    return evaluate


def run(seed: int = 0, budget: int = 300, spread: float = 0.4, limit: float = 1.0) -> TuneResult:
    return tune(made_up(seed, spread), QUESTIONS, SMALL, Strategy(), TuneSettings(limit, budget, seed=seed))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3000), st.integers(1, 20))
def test_both_searches_spend_the_same_and_exactly_the_budget_while_something_is_left(
    seed: int, budget: int, finalists: int
) -> None:
    calls: list[Strategy] = []
    settings_ = TuneSettings(1.0, budget, finalists, seed=seed)
    result = tune(made_up(seed, 0.4, calls), QUESTIONS, SMALL, Strategy(), settings_)
    everything = len({SMALL.at(i, Strategy()) for i in range(SMALL.size)} | {canonical(Strategy())})
    assert result.beam.spent == result.greedy.spent == min(budget, everything * result.searched_questions)
    held = len(result.held["beam"].outcomes)
    assert len(calls) == result.beam.spent + result.greedy.spent + 3 * held


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.2, 0.6]), st.floats(0.06, 0.5))
def test_nothing_is_called_better_without_an_interval_above_zero(
    seed: int, spread: float, limit: float
) -> None:
    result = run(seed, 400, spread, limit)
    for c in result.comparisons:
        one, other = ([o.quality for o in result.held[n].outcomes] for n in (c.one, c.other))
        assert c.difference == paired_difference(one, other, confidence=CONFIDENCE)
        assert c.better == (c.difference.low > 0)
    chosen = result.held[result.recommendation.name]
    if "better on held-out" in result.recommendation.reason:
        assert chosen.minus(result.held["present"]).low > 0
        assert chosen.figures.p95 <= limit
    elif result.held["present"].figures.p95 <= limit:
        assert result.recommended == result.present


def test_where_all_strategies_are_equal_the_present_one_is_hardly_ever_left() -> None:
    left = sum(run(seed, 300, 0.0).recommendation.name != "present" for seed in range(16))
    assert left <= 2  # 0.8% of each of two comparisons


def test_a_large_difference_is_found_and_recommended() -> None:
    def evaluate(strategy: Strategy, question: TuneQuestion) -> Outcome:
        good = strategy.retrieve.method == "dense" and strategy.context.passages == 3
        return Outcome(0.9 if good else 0.2 * unit(question), 0.1, 1.0)

    result = tune(evaluate, QUESTIONS, SMALL, Strategy(), TuneSettings(1.0, 600))
    assert result.recommended.retrieve.method == "dense"
    assert result.comparisons[0].better


def test_beam_finds_settings_that_help_only_together_and_greedy_passes_them_by() -> None:
    """Dense is worse alone and best when reranked: module by module it is dropped before the reranker is looked at."""

    def evaluate(strategy: Strategy, question: TuneQuestion) -> Outcome:
        dense, reranked = strategy.retrieve.method == "dense", strategy.rerank.method == "cross-encoder"
        quality = {(True, True): 0.9, (True, False): 0.3, (False, True): 0.5, (False, False): 0.4}[
            dense, reranked
        ]
        return Outcome(quality, 0.1, 1.0)

    space = Space((SMALL.choices[0], SMALL.choices[2]))
    start = SMALL.choices[2].applied(Strategy(), "none")
    ledger, second = search(evaluate, QUESTIONS, space, start, TuneSettings(1.0, 300))
    assert ledger.figures(ledger.leader()).quality == pytest.approx(0.9)
    greedy = Ledger(evaluate, QUESTIONS, 1000, 1.0)
    assert greedy.figures(greedy_search(greedy, space, start)[0]).quality == pytest.approx(0.5)
    assert (second.spent, second.budget) == (ledger.spent, ledger.spent)


def valued(generator: random.Random, noise: float) -> tuple[Evaluate, Callable[[Strategy], float]]:
    """A world where settings are worth something each, the question more, and what a strategy is worth in it."""
    worth = {(c.key, v): generator.uniform(-0.05, 0.05) for c in WIDE.choices for v in c.values}

    def quality(strategy: Strategy) -> float:
        return 0.5 + sum(worth[c.key, c.value(strategy)] for c in WIDE.choices)

    def evaluate(strategy: Strategy, question: TuneQuestion) -> Outcome:
        own = 0.4 * (unit(question) - 0.5) + noise * (unit(strategy, question) - 0.5)
        seconds = 0.01 * (1 + strategy.rerank.depth if strategy.rerank.method != "none" else 1)
        return Outcome(quality(strategy) + own, seconds, 1.0)

    return evaluate, quality


@pytest.mark.parametrize("seed", range(4))
def test_screening_ranks_strategies_that_it_has_not_seen(seed: int) -> None:
    evaluate, quality = valued(random.Random(seed), noise=0.1)
    ledger = Ledger(evaluate, QUESTIONS, 400, 1.0)
    known = screen(ledger, WIDE, Strategy(), random.Random(seed))
    assert ledger.spent <= 160
    everything = list({WIDE.at(i, Strategy()): None for i in range(WIDE.size)})
    assert len(ledger.strategies) < len(everything)
    orders = known.orders(everything)
    ranked = sorted(everything, key=orders.__getitem__)
    best = max(map(quality, everything))
    middle = sorted(map(quality, everything))[len(everything) // 2]
    found = sum(map(quality, ranked[:5])) / 5
    assert found - middle > 0.6 * (best - middle)


def test_screening_puts_what_is_too_slow_behind_what_is_not() -> None:
    evaluate, _ = valued(random.Random(1), noise=0.1)
    ledger = Ledger(evaluate, QUESTIONS, 400, 0.1)  # a depth of 5 fits, one of 20 does not
    known = screen(ledger, WIDE, Strategy(), random.Random(1))
    orders = known.orders(list({WIDE.at(i, Strategy()): None for i in range(WIDE.size)}))
    ranked = sorted(orders, key=orders.__getitem__)
    slow = [s.rerank.method != "none" and s.rerank.depth == 20 for s in ranked]
    assert slow == sorted(slow)
    assert any(slow)
    best = beam_search(known, WIDE, Strategy(), 4)
    assert [orders[s] for s in best[:3]] == [orders[s] for s in ranked[:3]]  # 150 strategies: it met all
    assert canonical(Strategy()) in best


def test_screening_makes_few_indexes() -> None:
    made: set[IndexStep] = set()

    def evaluate(strategy: Strategy, question: TuneQuestion) -> Outcome:
        made.add(strategy.index)
        return Outcome(unit(strategy, question), 0.1, 1.0)

    sizes = Choice("index.size", tuple(range(50, 250, 4)))
    screen(
        Ledger(evaluate, QUESTIONS, 2000, 1.0), Space((sizes, *SMALL.choices)), Strategy(), random.Random(0)
    )
    assert Strategy().index in made
    assert 4 < len(made) <= 8


def test_a_limit_that_nothing_keeps_is_said_with_the_fastest() -> None:
    with pytest.raises(ConfigError, match=r"keeps a p95 of 5 ms; the fastest takes 1\d ms"):
        run(limit=0.005)


def test_halving_asks_ever_more_questions_of_ever_fewer() -> None:
    ledger = Ledger(made_up(1, 0.5), QUESTIONS, 600, 1.0)
    pool = list({SMALL.at(i, Strategy()): None for i in range(SMALL.size)})[:8]
    before = ledger.spent
    winners = successive_halving(ledger, pool)
    assert len(winners) < len(pool)
    assert max(map(ledger.seen, pool)) == ledger.seen(winners[0])
    assert min(map(ledger.seen, pool)) < ledger.seen(winners[0])
    assert before < ledger.spent <= 600


def test_a_ledger_evaluates_a_pair_once_and_compares_on_common_questions() -> None:
    calls: list[Strategy] = []
    ledger = Ledger(made_up(2, 0.3, calls), QUESTIONS, 25, 1.0)
    one, other = Strategy(), SMALL.choices[4].applied(Strategy(), 3)
    assert ledger.extend(one, 10)
    assert ledger.extend(one, 10)
    assert ledger.extend(other, 5)
    assert (len(calls), ledger.left) == (15, 10)
    assert ledger.figures(one, 5).questions == ledger.figures(other).questions == 5
    assert ledger.leader() == one
    assert not ledger.extend(other, 80)
    assert (ledger.spent, ledger.seen(other), ledger.leader()) == (25, 15, other)
    assert not ledger.look(one, 40)  # nothing is left


def test_a_look_ahead_counts_when_the_gap_before_it_is_closed() -> None:
    calls: list[Strategy] = []
    ledger = Ledger(made_up(2, 0.3, calls), QUESTIONS, 25, 1.0)
    strategy = Strategy()
    assert ledger.look(strategy, 2)
    assert ledger.look(strategy, 2)
    assert (ledger.seen(strategy), ledger.spent, [n for n, _ in ledger.outcomes(strategy)]) == (0, 1, [2])
    ledger.extend(strategy, 2)
    assert (ledger.seen(strategy), ledger.spent, len(calls)) == (3, 3, 3)
    assert ledger.figures(strategy).questions == 3


figures = st.builds(
    Figures,
    st.sampled_from([0.1, 0.2, 0.3]),
    st.sampled_from([1.0, 2.0, 3.0]),
    st.sampled_from([1.0, 2.0]),
    st.just(9),
)


@given(st.lists(figures, min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates_and_dominates_the_rest(found: list[Figures]) -> None:
    points = {Strategy(retrieve=RetrieveStep(candidates=n + 1)): f for n, f in enumerate(found)}
    front = pareto_front(points)
    for strategy, f in points.items():
        assert (strategy in front) == (not any(dominates(g, f) for g in front.values()))


def test_the_same_seed_gives_the_same_result() -> None:
    assert run(5) == run(5)
    assert run(5).held["beam"].outcomes != run(6).held["beam"].outcomes


@given(st.integers(0, default_space(True).size - 1))
def test_every_strategy_of_the_default_space_is_canonical_and_survives_toml(index: int) -> None:
    strategy = default_space(True).at(index, Strategy())
    assert canonical(strategy) == strategy
    assert parse_strategy(to_toml(strategy)) == strategy


def test_settings_without_effect_make_no_difference() -> None:
    alpha = SMALL.choices[1]
    bm25 = SMALL.choices[0].applied(Strategy(), "bm25")
    assert alpha.applied(bm25, 2.0) == bm25
    assert alpha.applied(Strategy(), 2.0) != Strategy()
    sentences = Choice("retrieve.sentences", (False, True))
    assert sentences.applied(bm25, True) == bm25  # a recipe would make vectors that nobody asks for
    assert sentences.applied(Strategy(), True) != Strategy()
    assert changes(bm25, Strategy()) == 'retrieve.method = "bm25"'
    assert changes(Strategy(), Strategy()) == "no change"


def test_a_space_survives_toml_and_a_wrong_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(default_space().toml())
    assert load_space(path) == default_space()
    for text, message in {
        "[retrieve]\nmethod = ['sparse']": "retrieve.method = 'sparse' must be one of",
        "[retrieve]\nmethod = 'bm25'": "retrieve.method must be a list of values",
        "[retrieve]\nalfa = [1.0]": "did you mean 'retrieve.alpha'",
        "[index]\nsize = [100]": "give --folder",
        "": "has no setting",
        "[": "cannot be read",
    }.items():
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_space(path)


def test_the_sides_of_a_split_share_no_question_whatever_its_case() -> None:
    twice = [*QUESTIONS, *(TuneQuestion(q.text.upper(), ("other",)) for q in QUESTIONS)]
    random.Random(0).shuffle(twice)
    searching, held = split(twice, 0.4, 3)
    assert not {q.text.lower() for q in searching} & {q.text.lower() for q in held}
    assert len(searching) + len(held) == 160
    assert abs(len(held) - 64) <= 1
    with pytest.raises(
        DocumentError, match="30 questions give 15 to search on and 15 held out; each side needs 20"
    ):
        split(QUESTIONS[:30], 0.5, 0)


def test_questions_are_read_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"question": "a?", "evidence": "x"}, {"question": "b?", "evidence": ["y", "z"], "file": "f.md"}]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    assert load_questions(path) == (TuneQuestion("a?", ("x",)), TuneQuestion("b?", ("y", "z"), "f.md"))
    assert load_questions(path)[1].found_in("has  Y\nin it", "f.md")
    assert not load_questions(path)[1].found_in("has y", "g.md")
    for line, message in {
        "{": "line 1 is not JSON",
        '{"evidence": "x"}': 'no "question"',
        '{"question": "a"}': 'no "evidence"',
        '{"question": "a", "evidence": [1]}': 'no "evidence"',
        '{"question": "a", "evidence": "x", "file": 3}': '"file" = 3',
    }.items():
        path.write_text(line)
        with pytest.raises(DocumentError, match=message):
            load_questions(path)
    with pytest.raises(DocumentError, match="cannot be read"):
        load_questions(tmp_path / "absent")


def test_the_report_is_one_page_that_asks_for_nothing_and_says_what_was_found() -> None:
    result = run(3, 500)
    page = report(result, left_out=2)
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "http://www.w3.org/2000/svg" in page
    assert not [part for part in ("<script", "<link", "src=", "href=", "url(") if part in page]
    assert "nan" not in page.lower().replace("dominant", "")
    assert "2 more were left out" in page
    assert result.recommendation.name in page
    assert "interval lies above zero" in page
    for held in result.held.values():
        assert str(held.quality) in page
