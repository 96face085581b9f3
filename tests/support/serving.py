"""A tiny model on disk and a real server process on it, for tests that speak HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import tokenizers
import torch
from safetensors.torch import save_file

from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import create_model, load_model, save_model

CONTEXT = 4096
MODEL_NAME = "tiny"
START_SECONDS = 120
_SPECIAL = ("<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(_SPECIAL)
_LETTERS = "abcdefghijklmnopqrstuvwxyz "
_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}\nAnswer with <tool_call>{}</tool_call>.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(directory: Path) -> Path:
    """A random model of one byte a token that writes letters and spaces, and practically never ends by itself."""
    directory.mkdir(parents=True)
    byte_tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(byte_tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    config = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "initializer_range": 0.3,
            "eos_token_id": backend.token_to_id("<|im_end|>"),
            "torch_dtype": "float32",
        }
    )
    model = create_model(config, seed=7)
    letters = [index for letter in _LETTERS for index in backend.encode(letter).ids]
    with torch.no_grad():
        head = model.hf_tensors()["lm_head.weight"]
        wanted = head[letters] * 5
        head.zero_()
        head[letters] = wanted
    save_model(model, directory)
    backend.save(str(directory / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "chat_template": _TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


def write_adapter(directory: Path, model: Path) -> Path:
    """A LoRA adapter of that model, as PEFT writes one, which changes what it says."""
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "target_modules": ["v_proj"]}
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, weight in load_model(model).hf_tensors().items():
        if name.endswith("v_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@dataclass
class Server:
    """A server process. `output`: where its terminal output goes."""

    process: subprocess.Popen[bytes]
    url: str
    output: Path
    api_key: str | None = None

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        return next(
            child
            for child in psutil.Process(self.process.pid).children()
            if "mainspring.engine.server.engine_process" in child.cmdline()
        )

    def metric(self, name: str) -> float:
        """One figure of /metrics."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers).text
        found = re.search(rf"^mainspring_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not among the metrics"
        return float(found[1])

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Returns once the engine holds no request and no block."""
        wait_until(
            lambda: self.metric("num_requests_running") == 0 and self.metric("kv_cache_usage_perc") == 0,
            seconds,
        )

    def terminate(self, seconds: float = 60.0) -> int:
        """SIGTERM, then the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def wait_until(condition, seconds: float = 30.0) -> None:
    """Returns when the condition holds; fails after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.02)


def start_process(output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`mainspring serve` with these arguments, as a user starts it."""
    source = Path(__file__).parents[2] / "src"
    paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Wide, so that no line of the output is wrapped.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "400"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", "from mainspring.cli.main import main; main()", "serve", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


@contextmanager
def running_server(
    model: Path, output: Path, *arguments: str, api_key: str | None = None
) -> Iterator[Server]:
    """A server that takes requests on a free port; ended, with its engine, when the context is left.

    `api_key`: the one that it was given among the arguments, if any.
    """
    options = ["--port", "0", "--served-model-name", MODEL_NAME, "--kv-cache-mb", "16", "--threads", "1"]
    process = start_process(output, str(model), *options, *arguments)
    try:
        wait_until(lambda: b"Ctrl-C" in output.read_bytes() or process.poll() is not None, START_SECONDS)
        text = output.read_text()
        found = re.search(r"API +(http://\S+)/v1", text)
        assert found, f"the server did not start:\n{text}"
        yield Server(process, found[1], output, api_key)
    finally:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
        # The engine ends by itself when its parent has gone; a test of its own holds it to that.
        psutil.wait_procs(children, timeout=10)
