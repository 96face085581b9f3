"""The offline engine: prompts in any form, all or nothing on a bad one, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ChatTemplateError, ConfigError, InvalidRequestError, RequestTooLongError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import save_model
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import TokenBatch
from support.byte_tokenizer import byte_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TOKENIZER = byte_tokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return create_model(ModelConfig.from_dict(CONFIG), seed=1)


@pytest.fixture
def llm(model: Decoder) -> LLM:
    return LLM(model, tokenizer=TOKENIZER)


def test_prompts_as_text_as_ids_one_or_many_give_the_same(llm: LLM) -> None:
    [text] = llm.generate("abc", GREEDY)
    [ids] = llm.generate([97, 98, 99], GREEDY)
    many = llm.generate(["abc", "xyz"], GREEDY)
    mixed = llm.generate([[97, 98, 99], "xyz"], [GREEDY, GREEDY])
    assert text.prompt == "abc"
    assert ids.prompt is None
    assert text.prompt_token_ids == ids.prompt_token_ids == [97, 98, 99]
    assert text.outputs == ids.outputs == many[0].outputs == mixed[0].outputs
    assert many[1].outputs == mixed[1].outputs
    assert many[1].prompt == "xyz"
    assert all(output.finished for output in many)
    assert text.outputs[0].text == TOKENIZER.decode(text.outputs[0].token_ids)
    assert llm.generate([]) == []


def test_a_seed_gives_the_same_text_alone_and_among_others(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.2, seed=9, max_tokens=20)
    [alone] = llm.generate("abc", seeded)
    others = [SamplingParams(max_tokens=n) for n in (3, 30, 7)]
    together = llm.generate(["q", "rs", "tuv", "abc"], [*others, seeded])
    assert together[3].outputs == alone.outputs


def test_streamed_pieces_are_the_whole_text(llm: LLM) -> None:
    [whole] = llm.generate("abc", GREEDY)
    pieces = list(llm.stream("abc", GREEDY))
    assert "".join(piece.outputs[0].text for piece in pieces) == whole.outputs[0].text
    assert len(pieces) == 8


def test_a_stop_string_cuts_the_text_and_frees_the_request(llm: LLM) -> None:
    [whole] = llm.generate("abc", SamplingParams(temperature=0, max_tokens=60))
    text = whole.outputs[0].text
    stop = text[3:5]
    [cut] = llm.generate("abc", SamplingParams(temperature=0, max_tokens=60, stop=[stop]))
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].stop_reason == stop
    assert llm.engine.stats().kv_blocks_used == 0
    llm.engine.check_integrity()


def test_one_bad_prompt_refuses_all_and_starts_none(llm: LLM) -> None:
    with pytest.raises(RequestTooLongError, match="context is 128"):
        llm.generate(["fine", "x" * 128], GREEDY)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(InvalidRequestError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])
    assert not llm.engine.has_work()
    assert len(llm.generate("fine", GREEDY)) == 1


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=50))
    next(stream)
    assert llm.engine.stats().kv_blocks_used == 1
    stream.close()
    assert llm.engine.stats().kv_blocks_used == 0
    assert not llm.engine.has_work()


def test_an_error_in_a_step_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY)
    assert not llm.engine.has_work()
    assert len(llm.generate(["a", "b"], GREEDY)) == 2


def test_without_a_tokenizer_it_takes_and_gives_token_ids(model: Decoder, llm: LLM) -> None:
    bare = LLM(model)
    [output] = bare.generate([97, 98, 99], GREEDY)
    assert output.outputs[0].token_ids == llm.generate("abc", GREEDY)[0].outputs[0].token_ids
    assert output.outputs[0].text == ""
    for prompt, params in (("text", GREEDY), ([1], SamplingParams(stop="x"))):
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            bare.generate(prompt, params)
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        bare.chat([{"role": "user", "content": "hi"}])


def test_chat_goes_through_the_template(model: Decoder, llm: LLM) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    chatty = LLM(model, tokenizer=byte_tokenizer(template))
    first = [{"role": "user", "content": "hi"}]
    [one] = chatty.chat(first, GREEDY)
    assert TOKENIZER.decode(one.prompt_token_ids) == "user: hi;"
    two = chatty.chat([first, [{"role": "user", "content": "yo"}]], GREEDY)
    assert two[0].outputs == one.outputs
    assert TOKENIZER.decode(two[1].prompt_token_ids) == "user: yo;"
    streamed = "".join(piece.outputs[0].text for piece in chatty.stream_chat(first, GREEDY))
    assert streamed == one.outputs[0].text
    with pytest.raises(ChatTemplateError):
        llm.chat(first)


def test_a_directory_gives_what_its_decoder_gives(model: Decoder, llm: LLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", tokenizer=TOKENIZER)
    loaded = LLM(tmp_path / "model")
    assert loaded.generate("abc", GREEDY)[0].outputs == llm.generate("abc", GREEDY)[0].outputs


def test_a_dtype_beside_a_decoder_is_refused(model: Decoder) -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        LLM(model, dtype="bfloat16")


def test_embeddings_are_the_pooled_hidden_states_whatever_runs_beside(llm: LLM, model: Decoder) -> None:
    texts = ["abc", "a longer text than the other", "x"]
    with torch.no_grad():
        states = [
            model(torch.tensor(TOKENIZER.encode(text)), TokenBatch.packed([len(TOKENIZER.encode(text))]))
            for text in texts
        ]
    means = llm.embed(texts, normalize=False)
    assert all(torch.equal(got, hidden.mean(0)) for got, hidden in zip(means, states, strict=True))
    lasts = llm.embed(texts, pooling="last")
    for got, hidden in zip(lasts, states, strict=True):
        torch.testing.assert_close(got, hidden[-1] / hidden[-1].norm())
    assert torch.equal(llm.embed("abc", normalize=False)[0], means[0])
    assert llm.embed([]) == []
    with pytest.raises(RequestTooLongError):
        llm.embed(["abc", [1] * 129])
    assert len(llm.embed([[1] * 128])) == 1
    assert not llm.engine.has_work()
