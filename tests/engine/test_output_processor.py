"""Texts are exact whether streamed or not; stop strings end a request; log-probabilities carry their tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.messages import EngineRequest, TokenLogprobs, TokenOutput
from mainspring.engine.output_processor import OutputKind, OutputProcessor
from mainspring.engine.outputs import Logprob, RequestOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import InvalidRequestError
from support.byte_tokenizer import END, byte_tokenizer

TOKENIZER = byte_tokenizer()


def feed(
    tokens: list[int],
    params: SamplingParams,
    output_kind: OutputKind,
    finish_reason: str = "length",
    stop_reason: int | None = None,
) -> tuple[list[RequestOutput], list[str]]:
    """Send the tokens one step at a time, as the engine would, until the processor asks for an abort."""
    processor = OutputProcessor(TOKENIZER)
    processor.add(EngineRequest("r", [1, 2], params, (END,), len(tokens)), "prompt", output_kind)
    outputs: list[RequestOutput] = []
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        message = TokenOutput(
            "r",
            [token],
            finish_reason=finish_reason if last else None,
            stop_reason=stop_reason if last else None,
        )
        more, aborts = processor.process([message])
        outputs += more
        if aborts:
            assert aborts == ["r"]
            assert "r" not in processor
            assert processor.process([message]) == ([], [])
            return outputs, aborts
    assert len(processor) == 0
    return outputs, []


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("aé€😀 .", max_size=20),
    stops=st.lists(st.text("a€.", min_size=1, max_size=3), max_size=2),
    include=st.booleans(),
)
def test_deltas_put_together_are_the_final_text(text: str, stops: list[str], include: bool) -> None:
    tokens = [*text.encode(), ord("!")]
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, max_tokens=None)
    deltas, _ = feed(tokens, params, "delta")
    cumulative, _ = feed(tokens, params, "cumulative")
    finals, aborts = feed(tokens, params, "final")
    [final] = finals
    assert "".join(output.outputs[0].text for output in deltas) == final.outputs[0].text
    assert [t for output in deltas for t in output.outputs[0].token_ids] == final.outputs[0].token_ids
    assert cumulative[-1] == final
    assert all(final.outputs[0].text.startswith(output.outputs[0].text) for output in cumulative)
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]
    assert "\ufffd" not in final.outputs[0].text
    whole = text + "!"
    hit = [whole.find(stop) for stop in stops if stop in whole]
    assert bool(hit) == (final.outputs[0].finish_reason == "stop")
    if not hit:
        assert final.outputs[0].text == whole
        assert not aborts
    elif not include:
        assert not any(stop in final.outputs[0].text for stop in stops)
        assert whole.startswith(final.outputs[0].text + str(final.outputs[0].stop_reason))


def test_a_stop_string_in_the_very_last_token_wins_over_length_and_needs_no_abort() -> None:
    [output], aborts = feed([*b"ab."], SamplingParams(stop="."), "final")
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ab", "stop", ".")
    assert aborts == []


def test_the_token_that_ends_a_request_is_counted_but_not_shown() -> None:
    [output], _ = feed([*b"hi", END], SamplingParams(), "final", "stop")
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("hi", [*b"hi", END])
    dot = SamplingParams(stop_token_ids=[ord(".")])
    [output], _ = feed([*b"hi."], dot, "final", "stop", ord("."))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("hi", ord("."))
    shown = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    [output], _ = feed([*b"hi", END], shown, "final", "stop")
    assert output.outputs[0].text == "hi<end>"


def test_a_character_cut_off_at_the_end_becomes_a_replacement_character() -> None:
    [output], _ = feed(list("né€".encode())[:-1], SamplingParams(), "final")
    assert output.outputs[0].text == "né\ufffd"


def test_no_stop_string_ends_the_text_within_min_tokens() -> None:
    [output], _ = feed([*b"a.b.c"], SamplingParams(stop=".", min_tokens=3), "final")
    assert output.outputs[0].text == "a.b"


def test_what_was_held_back_is_shown_when_the_text_ends_otherwise() -> None:
    outputs, _ = feed([*b"ab<"], SamplingParams(stop="</s>"), "delta")
    assert [output.outputs[0].text for output in outputs] == ["a", "b", "<"]
    outputs, _ = feed([*b"ab<x"], SamplingParams(stop="</s>"), "delta")
    assert [output.outputs[0].text for output in outputs] == ["a", "b", "", "<x"]


def test_log_probabilities_are_given_by_token_with_rank_and_text() -> None:
    processor = OutputProcessor(TOKENIZER)
    params = SamplingParams(logprobs=2, prompt_logprobs=0)
    processor.add(EngineRequest("r", [97, 98], params, (), 2), None, "delta")
    entry = TokenLogprobs([99, 97, 99], [-1.5, -0.5, -1.5], 2)
    first = TokenOutput(
        "r", [99], logprobs=[entry], prompt_logprobs=[None, TokenLogprobs([98], [-3.0], 7)], rope_length=4
    )
    [one], _ = processor.process([first])
    assert one.outputs[0].logprobs == [{99: Logprob(-1.5, 2, "c"), 97: Logprob(-0.5, 1, "a")}]
    assert one.prompt_logprobs == [None, {98: Logprob(-3.0, 7, "b")}]
    assert one.rope_length == 4
    second = TokenOutput("r", [97], logprobs=[TokenLogprobs([97], [-0.25], 1)], finish_reason="length")
    [two], _ = processor.process([second])
    assert two.prompt_logprobs is None
    assert two.outputs[0].logprobs == [{97: Logprob(-0.25, 1, "a")}]
    assert two.outputs[0].cumulative_logprob == -1.75


def test_abort_gives_what_there_is_once() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(EngineRequest("r", [1], SamplingParams(stop="bc"), (), 9), None)
    processor.process([TokenOutput("r", [*b"ab"])])
    output = processor.abort("r")
    assert output is not None
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", "abort")
    assert processor.abort("r") is None


def test_a_used_id_and_a_stop_string_without_tokenizer_are_refused() -> None:
    processor = OutputProcessor(TOKENIZER)
    request = EngineRequest("r", [1], SamplingParams(), (), 9)
    processor.add(request, None)
    with pytest.raises(InvalidRequestError, match="'r' is in use"):
        processor.add(request, None)
    with pytest.raises(InvalidRequestError, match="need a tokenizer"):
        OutputProcessor(None).add(EngineRequest("s", [1], SamplingParams(stop="x"), (), 9), None)
