"""The whole stack from texts to an answer with the commands of the README: what one writes, the next one takes."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mainspring as ms
from mainspring.cli.main import app
from support.serving import running_server

_TEXT = "".join(f"The {i}th mainspring drives {i % 11} wheels, and {i * i % 89} hands.\n" for i in range(200))
_TRAIN = """
output = "runs/base"
[data]
sources = ["texts"]
holdout_fraction = 0.1
[tokenizer]
vocab_size = 300
[model]
architecture = "LlamaForCausalLM"
hidden_size = 32
intermediate_size = 48
num_layers = 2
num_heads = 2
max_position_embeddings = 2048
[training]
sequence_length = 24
tokens_per_micro_batch = 96
max_steps = 3
[optimizer]
lr = 0.01
"""
_SFT = """
algorithm = "sft"
output = "runs/sft"
[model]
path = "runs/base/latest"
dtype = "float32"
[data]
train = "examples.jsonl"
[optimizer]
lr = 1e-3
[sft]
max_steps = 2
prompts_per_step = 2
"""
_GRPO = """
algorithm = "grpo"
output = "runs/grpo"
[model]
path = "runs/sft/latest"
dtype = "float32"
[data]
train = "examples.jsonl"
[reward]
function = "rl.reward_functions:share_of_digits"
[rollouts]
prompts_per_step = 2
group_size = 2
max_tokens = 6
[grpo]
max_steps = 2
"""
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def _train_and_reinforce() -> Path:
    """Texts -> a model -> fine-tuned -> reinforced, in the present directory; the last one's checkpoint."""
    Path("texts").mkdir()
    Path("texts/watch.txt").write_text(_TEXT)
    row = {"prompt": "The 3th mainspring", "answer": " drives 3 wheels.", "reference": ""}
    Path("examples.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    for command, recipe in (("train", _TRAIN), ("rl", _SFT), ("rl", _GRPO)):
        Path("recipe.toml").write_text(recipe)
        _run(command, "recipe.toml")
    return Path("runs/grpo/latest")


def test_a_model_is_trained_fine_tuned_reinforced_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _train_and_reinforce()
    params = ms.SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    (out,) = ms.LLM(str(model)).generate(["The 7th mainspring"], params)
    tokens = [*out.prompt_token_ids, *out.outputs[0].token_ids]
    again = ms.load_model(model).log_probs([tokens])[0][-8:].tolist()
    said = [p[t].logprob for p, t in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True)]
    assert said == again
    command = ("generate", str(model), "The 7th mainspring", "--temperature", "0", "--max-tokens", "8")
    assert _run(*command).startswith(out.outputs[0].text)


@pytest.mark.slow  # two servers and the models of retrieval
def test_that_model_is_served_compared_and_answers_from_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _train_and_reinforce()
    Path("template.jinja").write_text(_TEMPLATE)
    Path("documents").mkdir()
    Path("documents/watch.md").write_text("# Watches\n\nThe mainspring of a watch drives its wheels.\n")
    _run("rag", "index", "documents")
    with running_server(model, tmp_path / "output.txt") as server:
        (shown,) = [x for x in server.output.read_text().splitlines() if x.startswith("curl ")]
        done = subprocess.run(shlex.split(shown), capture_output=True, check=True, timeout=60)
        assert json.loads(done.stdout)["choices"][0]["text"]
        _run("diff", str(model), "--url", server.url, "--max-tokens", "4", "--fail-above", "0")
    with running_server(model, tmp_path / "chat.txt", "--chat-template", "template.jinja") as server:
        found = _run("rag", "search", "What drives the wheels?")
        answer = _run("rag", "ask", "What drives the wheels?", "--model", f"{server.url}/v1")
    assert "watch.md" in found
    assert answer.strip()
