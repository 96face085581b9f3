"""Llama checkpoints in the C++ framework: the logits of `mainspring.model`, and no PyTorch in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mainspring
import mainspring.tensor as mt
from mainspring.errors import UnsupportedModelError
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.rope_scaling import RopeScaling
from mainspring.tensor.llama import LlamaModel
from tensor.cases import as_torch

CONFIG = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "extra": {"initializer_range": 0.2},
}
LLAMA3 = RopeScaling("llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)


def saved(tmp_path: Path, **changes: object) -> tuple[Path, torch.nn.Module]:
    from mainspring.model.initialise import create_model

    model = create_model(ModelConfig(**{**CONFIG, **changes}))
    mainspring.save_model(model, tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": RopeScaling("linear", 2.0)},
    ],
    ids=str,
)
def test_logits_are_those_of_the_model_room(tmp_path: Path, changes: dict[str, object]) -> None:
    path, _ = saved(tmp_path, **changes)
    reference = mainspring.load_model(str(path), device="cpu", dtype="float32")
    ids = [int(i) for i in torch.randint(0, 67, (40,), generator=torch.Generator().manual_seed(1))]
    want = reference.log_probs([ids])[0].detach()
    with mt.no_grad():
        model = LlamaModel.from_directory(path)
        logits = mt.log_softmax(model(mt.tensor([ids])), -1)[0]
        got = as_torch(mt.gather(logits[:-1], 1, mt.tensor(ids[1:]).unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_cached_generation_is_that_of_the_whole_text(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    model = LlamaModel.from_directory(path)
    prompt = [3, 1, 4, 1, 5]
    tokens = list(model.generate(prompt, 12))
    text = list(prompt)
    for token in tokens:
        with mt.no_grad():
            assert int(mt.argmax(model(mt.tensor([text]))[0, -1]).item()) == token
        text.append(token)
    drawn = [list(model.generate(prompt, 8, 1.5, mt.Generator(s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(mt.ValueOutOfRangeError, match="give at least one"):
        next(model.generate([], 3))


def test_what_is_not_a_plain_llama_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        LlamaModel(
            ModelConfig(**{**CONFIG, "architecture": "MistralForCausalLM", "sliding_windows": (4, 4, 4)})
        )


def test_generation_needs_no_torch(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mainspring.tensor.llama import LlamaModel\n"
        f"print(list(LlamaModel.from_directory({str(path)!r}).generate([1, 2, 3], 5)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip("[]\n").split(",")) == 5
