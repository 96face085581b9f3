"""The proof is proven: faults planted in the ranks are each seen, where the sound layout passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mainspring.parallel.layout import Layout
from mainspring.train.verify import VerifySettings, judge
from parallel.conftest import Reference
from parallel.pool import Pool
from parallel.test_layouts import hold

SETTINGS = VerifySettings(steps=2)  # float32, as the command's default

CASES = {
    "row_parallel_without_its_sum": "biased:tp=2,sequence_parallel=false",
    "column_parallel_without_its_sum": "biased:tp=2,sequence_parallel=false",
    "norms_without_their_sum_over_slices": "tied:tp=2",
    "shared_key_heads_without_their_sum": "biased:tp=2,sequence_parallel=false",
    "cross_entropy_of_the_first_ranks_vocabulary": "tied:tp=2",
    "tied_embeddings_without_their_sum": "tied:pp=2",
    "zero_bubble_that_loses_a_weight_gradient": "dense:pp=2,schedule=zero_bubble",
    "weight_gradients_of_the_last_micro_batch_only": "tied:pp=2",
    "ring_without_its_causal_mask": "dense:cp=2",
    "ring_that_drops_gradients_of_other_pieces_keys": "dense:cp=2",
    "causal_mask_off_by_one_in_the_ring": "windowed:cp=2",
    "ring_without_gradients_of_earlier_keys": "windowed:cp=2",
    "positions_that_begin_anew_on_each_context_rank": "dense:cp=2,context=ulysses",
    "tokens_cut_at_another_rank_for_the_loss": "dense:cp=2",
    "expert_gradients_doubled": "moe:dp=2,ep=2",
    "expert_rows_that_come_back_in_another_order": "moe:dp=2,ep=2",
    "data_parallel_mean_of_what_is_a_sum": "dense:dp=2",
    "zero_2_that_keeps_the_last_micro_batch_only": "dense:dp=2,zero=2",
    "zero_1_that_does_not_refresh_its_copies": "dense:dp=2,zero=1",
    "gradient_norm_that_counts_copies": "dense:dp=2",
    "recomputation_that_loses_the_gradient_of_the_residual_stream": "dense:dp=2,zero=1,recompute=selective",
    "recomputation_from_another_micro_batchs_positions": "dense:dp=2,zero=1,recompute=selective",
}


@pytest.mark.parametrize("fault", CASES)
def test_a_planted_fault_is_caught(pool: Pool, reference: Callable[..., Reference], fault: str) -> None:
    kind, _, layout = CASES[fault].partition(":")
    known = reference(kind, SETTINGS)
    run, errors = pool.run(
        "jobs:verify_with_fault", Layout.parse(layout).world,
        fault, str(known.directory), layout, SETTINGS, str(known.gradients),
    )[0]  # fmt: skip
    assert judge(known.run, run, errors, SETTINGS).problems


@pytest.mark.parametrize("case", sorted(set(CASES.values())))
def test_without_the_fault_the_same_layout_passes(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    hold(pool, reference, case, SETTINGS)
