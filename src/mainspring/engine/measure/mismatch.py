"""How far a server's log-probabilities are from ours: the train-inference mismatch of whatever serves the model.

A server samples tokens and reports their log-probabilities; we compute those of the same tokens in the same context.
In reinforcement learning their difference is the noise on every importance ratio. Under tokens that the server
sampled, the mean of log p_server - log p_ours estimates KL(server || ours); the estimator that is never negative is
`k3` of Schulman 2020, "Approximating KL Divergence".
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mainspring.engine.measure.api_client import ApiClient, ServerError
from mainspring.engine.measure.load import percentile
from mainspring.errors import ConfigError, TokenizerError
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.decoder import Decoder

PERCENTILES = (50, 90, 99, 99.9)
# |gap| below each; the last holds the rest.
BINS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class ServedText:
    """What a server wrote to a prompt. `logprobs`: its own log-probability of each token."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Divergence:
    """One token on which server and model differ. `position`: among the generated tokens of its prompt."""

    prompt: int
    position: int
    token_id: int
    token: str
    server: float
    ours: float
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """All gaps, log p_server - log p_ours, in nats.

    Attributes:
        skipped: texts whose token ids the server did not tell and that our tokenizer reads in another way.
        exact: tokens whose two log-probabilities are equal to the last bit of float32.
        mean: of the gaps; estimates KL(server || ours).
        k3: the estimate that is never negative.
        mean_abs, max_abs, percentiles: of the gaps' sizes.
        histogram: how many sizes lie at or below each bound, and not below the one before.
        first: the first token, in the order of prompts, whose gap is above the tolerance.
        largest: the token with the largest gap.
    """

    model: str
    prompts: int
    skipped: int
    tokens: int
    exact: int
    mean: float
    k3: float
    mean_abs: float
    max_abs: float
    percentiles: dict[str, float]
    histogram: dict[str, int]
    tolerance: float
    diverging: int
    first: Divergence | None
    largest: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to a file."""
        return asdict(self)


async def ask_server(
    client: ApiClient,
    model: str,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    concurrency: int = 8,
) -> list[ServedText | None]:
    """Lets the server continue each prompt. None stands for a text whose token ids could not be told.

    Raises: ServerError, also if the server reports no log-probabilities.
    """
    gate = asyncio.Semaphore(concurrency)

    async def ask(index: int, prompt: Sequence[int]) -> ServedText | None:
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed + index,
            "logprobs": 1,
        }
        async with gate:
            choice = await _completion(client, body)
        return _served(list(prompt), choice, tokenizer)

    return list(await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts))))


async def _completion(client: ApiClient, body: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a completion, with token ids where the server can give them."""
    try:
        answer = await client.post("/v1/completions", {**body, "return_token_ids": True})
    except ServerError as error:
        if error.status not in (400, 422):
            raise
        # A strict server does not know the field.
        answer = await client.post("/v1/completions", body)
    try:
        choice: dict[str, Any] = answer["choices"][0]
        if not isinstance(choice["logprobs"]["token_logprobs"], list):
            raise TypeError
    except (KeyError, IndexError, TypeError):
        raise ServerError("the server reports no log-probabilities of its tokens") from None
    return choice


def _served(prompt: list[int], choice: dict[str, Any], tokenizer: Tokenizer) -> ServedText | None:
    logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    token_ids = choice.get("token_ids")
    if token_ids is None:
        token_ids = _ids_of(choice["logprobs"]["tokens"], str(choice["text"]), tokenizer)
    if token_ids is None or len(token_ids) != len(logprobs):
        return None
    return ServedText(prompt, [int(token_id) for token_id in token_ids], logprobs)


def _ids_of(tokens: Sequence[str], text: str, tokenizer: Tokenizer) -> list[int] | None:
    """The ids behind tokens that are given as texts; None if our tokenizer cuts the whole text differently."""
    if all(token.startswith("token_id:") for token in tokens):
        return [int(token.removeprefix("token_id:")) for token in tokens]
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except TokenizerError:
        return None
    same = len(ids) == len(tokens) and all(
        tokenizer.decode([token_id], skip_special_tokens=False) == token
        for token_id, token in zip(ids, tokens, strict=True)
    )
    return ids if same else None


def compare(
    model: Decoder,
    name: str,
    tokenizer: Tokenizer,
    texts: Sequence[ServedText | None],
    *,
    tolerance: float,
) -> Mismatch:
    """Scores the server's tokens with our model, and holds the two against each other.

    Raises: ConfigError, if there is no token to compare.
    """
    found: list[Divergence] = []
    for index, text in enumerate(texts):
        if text is None or not text.token_ids:
            continue
        scored = model.log_probs([text.prompt + text.token_ids])[0][len(text.prompt) - 1 :].tolist()
        for position, (token_id, server, ours) in enumerate(
            zip(text.token_ids, text.logprobs, scored, strict=True)
        ):
            token = tokenizer.decode([token_id], skip_special_tokens=False)
            found.append(Divergence(index, position, token_id, token, server, ours, server - ours))
    if not found:
        raise ConfigError(
            "there is no token to compare: the server wrote nothing, or its tokens are not ours"
        )
    sizes = sorted(abs(item.gap) for item in found)
    diverging = [item for item in found if abs(item.gap) > tolerance]
    largest = max(found, key=lambda item: abs(item.gap))
    return Mismatch(
        model=name,
        prompts=len(texts),
        skipped=sum(text is None for text in texts),
        tokens=len(found),
        exact=sum(item.gap == 0.0 for item in found),
        mean=math.fsum(item.gap for item in found) / len(found),
        k3=math.fsum(math.expm1(min(-item.gap, 700.0)) + item.gap for item in found) / len(found),
        mean_abs=math.fsum(sizes) / len(sizes),
        max_abs=sizes[-1],
        percentiles={f"p{percent:g}": percentile(sizes, percent) for percent in PERCENTILES},
        histogram=_histogram(sizes),
        tolerance=tolerance,
        diverging=len(diverging),
        first=diverging[0] if diverging else None,
        largest=largest if largest.gap != 0.0 else None,
    )


def _histogram(sizes: Sequence[float]) -> dict[str, int]:
    counts: dict[str, int] = {}
    below = 0
    for bound in BINS:
        until = sum(size <= bound for size in sizes)
        counts["0" if bound == 0.0 else f"<= {bound:g}"] = until - below
        below = until
    counts[f"> {BINS[-1]:g}"] = len(sizes) - below
    return counts
