"""The packed BERT encoder against transformers, on random weights and odd shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from mainspring.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from mainspring.model.encoder import Encoder, EncoderConfig, bidirectional_attention, load_encoder
from mainspring.ops import TokenBatch


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertModel]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=40,
    )  # fmt: skip
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    path = tmp_path_factory.mktemp("bert")
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("lengths", [(7, 3, 7, 1, 40), (2, 2, 5), (9, 4, 4, 1)])
def test_hidden_states_are_those_of_transformers_however_sequences_are_packed(
    bert: tuple[Path, BertModel], lengths: tuple[int, ...]
) -> None:
    path, reference = bert
    encoder = load_encoder(path)
    sequences = [torch.randint(97, (n,)).tolist() for n in lengths]
    with torch.no_grad():
        states = encoder.hidden_states(sequences).split(list(lengths))
        for sequence, found in zip(sequences, states, strict=True):
            expected = reference(torch.tensor([sequence])).last_hidden_state[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_token_types_count(bert: tuple[Path, BertModel]) -> None:
    path, reference = bert
    tokens, types = torch.randint(97, (11,)), torch.tensor([0] * 5 + [1] * 6)
    with torch.no_grad():
        found = load_encoder(path)(tokens, TokenBatch.packed([11]), types)
        expected = reference(tokens[None], token_type_ids=types[None]).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mean_embeddings_have_length_one_and_are_the_mean(bert: tuple[Path, BertModel]) -> None:
    encoder = load_encoder(bert[0])
    sequences = [[1, 2, 3], [4] * 9]
    with torch.no_grad():
        found = encoder.mean_embeddings(sequences)
        states = encoder.hidden_states(sequences).split([3, 9])
    for row, state in zip(found, states, strict=True):
        torch.testing.assert_close(row, state.mean(0) / state.mean(0).norm())


def test_attention_is_the_formula_in_float64() -> None:
    lengths = [3, 8, 3, 1]
    q, k, v = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64)
    found = bidirectional_attention(q, k, v, TokenBatch.packed(lengths)).split(lengths)
    for i, out in enumerate(found):
        qs, ks, vs = (x.split(lengths)[i].transpose(0, 1) for x in (q, k, v))
        expected = torch.softmax(qs @ ks.mT / 8**0.5, -1) @ vs
        torch.testing.assert_close(out, expected.transpose(0, 1))


def test_a_sequence_beyond_the_table_of_positions_is_refused_with_both_numbers(
    bert: tuple[Path, BertModel],
) -> None:
    with pytest.raises(InvalidRequestError, match=r"41 tokens.* 40 positions"):
        load_encoder(bert[0]).hidden_states([[1] * 41])


def test_a_variant_that_would_compute_something_else_is_refused(
    bert: tuple[Path, BertModel], tmp_path: Path
) -> None:
    fields = json.loads((bert[0] / "config.json").read_text())
    for change, expected in (
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"model_type": "roberta"}, "'roberta'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(UnsupportedModelError, match=expected):
            EncoderConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        EncoderConfig.from_file(tmp_path / "config.json")


def test_a_tensor_of_another_shape_is_refused_by_name(bert: tuple[Path, BertModel], tmp_path: Path) -> None:
    fields = json.loads((bert[0] / "config.json").read_text()) | {"intermediate_size": 81}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((bert[0] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"intermediate.dense.weight.*\[81, 48\]"):
        load_encoder(tmp_path)


def test_an_encoder_of_heads_that_do_not_divide_its_width_is_refused() -> None:
    config = EncoderConfig(10, 10, 1, 3, 8, 8, 2, 1e-12)
    with pytest.raises(UnsupportedModelError, match="3 heads"):
        Encoder(config)
