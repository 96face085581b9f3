"""Samples continue their prompts, each as if it were alone."""

from __future__ import annotations

import torch

from mainspring.model.decoder import Decoder
from mainspring.ops import TokenBatch
from mainspring.train.recipe import OptimizerSection
from mainspring.train.runner import SingleDevice
from mainspring.train.sampling import sample
from train.models import tiny_model


def _runner(model: Decoder) -> SingleDevice:
    return SingleDevice(model, OptimizerSection())


def test_greedy_samples_are_the_likeliest_continuations() -> None:
    model = tiny_model().eval()
    prompts = [[1, 2, 3], [7], [9, 9, 9, 9, 9, 9]]
    together = sample(
        _runner(model).next_logits,
        prompts,
        max_tokens=5,
        temperature=0.0,
        top_k=0,
        stop_token_ids=[],
        context_length=8,
        seed=0,
    )
    for prompt, continuation in zip(prompts, together, strict=True):
        text = list(prompt)
        for token in continuation:
            window = torch.tensor(text[-8:])
            with torch.no_grad():
                logits = model.logits(model(window, TokenBatch.packed([len(window)]))[-1:])
            assert token == int(logits.argmax())
            text.append(token)
        assert len(continuation) == 5


def test_a_stop_token_ends_one_sample_and_is_left_out() -> None:
    model = tiny_model().eval()
    options = {"temperature": 0.0, "top_k": 0, "context_length": 8, "seed": 0}
    prompts = [[1, 2, 3], [7]]
    free = sample(_runner(model).next_logits, prompts, max_tokens=4, stop_token_ids=[], **options)
    stopped = sample(
        _runner(model).next_logits, prompts, max_tokens=4, stop_token_ids=[free[0][1]], **options
    )
    assert stopped[0] == free[0][: free[0].index(free[0][1])]


def test_seeds_repeat_and_top_1_is_greedy() -> None:
    model = tiny_model().eval()

    def draw(seed: int, top_k: int, temperature: float) -> list[list[int]]:
        return sample(
            _runner(model).next_logits,
            [[1, 2]],
            max_tokens=12,
            temperature=temperature,
            top_k=top_k,
            stop_token_ids=[],
            context_length=8,
            seed=seed,
        )

    assert draw(1, 0, 2.0) == draw(1, 0, 2.0)
    assert draw(1, 0, 2.0) != draw(2, 0, 2.0)
    assert draw(1, 1, 2.0) == draw(2, 1, 0.0)
