"""Every family against transformers: logits, loss, every parameter's gradient, files in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from mainspring.model.checkpoint import load_model, save_model
from mainspring.ops import Numerics, TokenBatch
from support.families import FAMILIES, Family, transformers_model

TOLERANCE = 1e-5
LENGTHS = [3, 40, 1, 90]  # 90 is beyond max_position_embeddings: `dynamic` RoPE changes its base


def _random_sequences(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in LENGTHS]


def _their_gradient(
    model: PreTrainedModel, name: str, start: int, stop: int | None, expert: int | None
) -> torch.Tensor:
    """transformers keeps experts fused in memory, though its files name them one by one."""
    gradients = {n: p.grad for n, p in model.named_parameters()}
    name = name.replace("block_sparse_moe", "mlp")
    if name in gradients:
        return gradients[name]
    assert expert is not None
    block = name.split(".experts.")[0]
    down = ".w2." in name or "down_proj" in name
    fused = gradients[f"{block}.experts.{'down_proj' if down else 'gate_up_proj'}"][expert]
    return fused if stop is None else fused[start:stop]


@pytest.mark.parametrize("numerics", ["lockstep", "fast"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_logits_loss_and_gradients_equal_transformers(
    family: Family, numerics: Numerics, tmp_path: Path
) -> None:
    theirs = transformers_model(family)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype="float32", numerics=numerics)
    sequences = _random_sequences(1)
    tokens = torch.tensor([t for s in sequences for t in s])
    batch = TokenBatch.packed(LENGTHS)
    targets = torch.randint(0, 97, tokens.shape)
    targets[::7] = -100

    expected = torch.cat([theirs(torch.tensor([s])).logits[0] for s in sequences])
    logits = ours.logits(ours(tokens, batch))
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()

    loss = ours.loss(tokens, batch, targets)
    loss.backward()
    their_loss = F.cross_entropy(expected, targets)
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, rtol=TOLERANCE, atol=0)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for part in ours.parts():
        fused = gradients[part.parameter]
        assert fused is not None
        gradient = part.view(fused)
        their = _their_gradient(theirs, part.name, part.start, part.stop, part.expert)
        assert (gradient - their).norm() <= TOLERANCE * their.norm(), part.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_saved_model_loads_in_transformers_with_identical_logits(family: Family, tmp_path: Path) -> None:
    theirs = transformers_model(family, seed=3)
    theirs.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=40_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(theirs)
    tokens = torch.tensor([_random_sequences(5)[3]])
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_state_dicts_speak_hugging_face_names(tmp_path: Path) -> None:
    family = FAMILIES[1]
    theirs = transformers_model(family)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    changed = {name: tensor + 1 for name, tensor in state.items()}
    ours.load_state_dict(changed)
    assert torch.equal(
        ours.hf_tensors()["model.layers.1.self_attn.k_proj.bias"],
        changed["model.layers.1.self_attn.k_proj.bias"],
    )
    del changed["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        ours.load_state_dict(changed)


def test_fused_storage_is_shared_with_the_views(tmp_path: Path) -> None:
    transformers_model(FAMILIES[0]).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    before = ours.log_probs([[1, 2, 3]])[0]
    with torch.no_grad():
        ours.hf_tensors()["model.layers.0.self_attn.v_proj.weight"].mul_(2)
    assert not torch.equal(ours.log_probs([[1, 2, 3]])[0], before)
