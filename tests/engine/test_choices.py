"""Several completions of a prompt: each is what its seed gives alone, and together they are one output."""

from __future__ import annotations

import pytest

from mainspring.engine.choices import fan_out, params_of_choice
from mainspring.engine.llm import LLM
from mainspring.engine.messages import EngineRequest
from mainspring.engine.sampling_params import SamplingParams
from mainspring.formats.model_config import ModelConfig
from mainspring.model.initialise import create_model
from support.byte_tokenizer import byte_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.3, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT = [7] * 21  # more than one block, and not a whole number of them


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = create_model(ModelConfig.from_dict(CONFIG), seed=1)
    return LLM(model, tokenizer=byte_tokenizer(), num_blocks=40, max_num_seqs=6)


def test_choice_i_is_what_the_seed_plus_i_gives_alone(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=2**63 - 2, max_tokens=15, logprobs=1, prompt_logprobs=0)
    other = SamplingParams(seed=3, max_tokens=9)
    [output, beside] = llm.generate([PROMPT, [1, 2]], [params, other])
    alone = [llm.generate([PROMPT], params_of_choice(params, i))[0] for i in range(4)]
    assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
    assert [c.token_ids for c in output.outputs] == [a.outputs[0].token_ids for a in alone]
    assert [c.logprobs for c in output.outputs] == [a.outputs[0].logprobs for a in alone]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert output.prompt_logprobs == alone[0].prompt_logprobs
    assert output.finished
    assert len(beside.outputs) == 1
    llm.engine.check_integrity()
    assert not llm.engine.has_work()


def test_without_a_seed_the_choices_differ(llm: LLM) -> None:
    [output] = llm.generate([PROMPT], SamplingParams(n=5, max_tokens=10))
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 5


def test_streamed_choices_are_the_whole_ones_and_end_once(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=12)
    [whole] = llm.generate([PROMPT], params)
    texts = ["", "", ""]
    finished = []
    for piece in llm.stream(PROMPT, params):
        [choice] = piece.outputs
        texts[choice.index] += choice.text
        finished.append(piece.finished)
    assert texts == [choice.text for choice in whole.outputs]
    assert finished == [False] * (len(finished) - 1) + [True]


def test_a_stop_string_ends_its_own_choice_only(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=1, max_tokens=40)
    [free] = llm.generate([PROMPT], params)
    stop = next(c for c in free.outputs[2].text if c not in free.outputs[0].text + "\ufffd")
    [output] = llm.generate([PROMPT], SamplingParams(n=4, seed=1, max_tokens=40, stop=stop))
    assert output.outputs[0] == free.outputs[0]
    assert output.outputs[2].text == free.outputs[2].text.partition(stop)[0]
    assert output.outputs[2].finish_reason == "stop"


def test_closing_a_stream_of_choices_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(PROMPT, SamplingParams(n=3, max_tokens=50))
    next(stream)
    stream.close()
    assert not llm.engine.has_work()
    assert llm.engine.stats().kv_blocks_used == 0
    llm.engine.check_integrity()


def test_requests_of_choices_are_forks_of_the_first() -> None:
    request = EngineRequest("r", [1], SamplingParams(n=3, seed=5, prompt_logprobs=2), (), 4)
    children = fan_out(request)
    assert [child.fork_of for child in children] == [None, "r", "r"]
    assert [child.params.seed for child in children] == [5, 6, 7]
    assert [child.params.prompt_logprobs for child in children] == [2, None, None]
    assert len({child.request_id for child in children}) == 3
    assert fan_out(children[0]) == [children[0]]
