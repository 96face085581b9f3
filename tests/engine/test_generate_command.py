"""`mainspring generate` streams the same text that the offline engine gives, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from mainspring.cli.generate import generate
from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, InvalidRequestError, ModelNotFoundError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import save_model
from mainspring.model.initialise import create_model
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
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"

app = typer.Typer()
app.command()(generate)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = create_model(ModelConfig.from_dict(CONFIG), seed=2)
    save_model(model, path, tokenizer=byte_tokenizer(TEMPLATE))
    return path


def call(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def expected(directory: Path, prompt: str) -> str:
    params = SamplingParams(temperature=0, max_tokens=12)
    return LLM(directory).generate(prompt, params)[0].outputs[0].text


def test_a_prompt_goes_through_the_chat_template_unless_raw(directory: Path) -> None:
    options = ("--temperature", "0", "--max-tokens", "12")
    answer = call(str(directory), "hi", *options)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == expected(directory, "user: hi;") + "\n"
    told = call(str(directory), "hi", "--system", "be brief", *options)
    assert told.stdout == expected(directory, "system: be brief;user: hi;") + "\n"
    assert call(str(directory), "hi", "--raw", *options).stdout == expected(directory, "hi") + "\n"
    assert call(str(directory), "-", "--raw", *options, stdin="hi").stdout == expected(directory, "hi") + "\n"


@pytest.mark.parametrize(
    "options", [("--tp-invariant",), pytest.param(("--pp", "2"), marks=pytest.mark.slow)], ids=" ".join
)
def test_a_layout_gives_the_text_of_one_process(directory: Path, options: tuple[str, ...]) -> None:
    answer = call(str(directory), "hi", "--temperature", "0", "--max-tokens", "12", *options)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == expected(directory, "user: hi;") + "\n"


def test_the_same_seed_gives_the_same_text(directory: Path) -> None:
    first, second, other = (
        call(str(directory), "hi", "--seed", seed, "--max-tokens", "12").stdout for seed in ("4", "4", "5")
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("hi", "--temperature", "-1"), InvalidRequestError),
        (("", "--raw"), InvalidRequestError),
        (("hi", "--numerics", "sloppy"), ConfigError),
        (("hi", "--raw", "--system", "x"), ConfigError),
        (("hi", "--tp", "3"), ConfigError),
        (("hi", "--pp", "0"), ConfigError),
    ],
)
def test_what_cannot_be_done_is_a_typed_error(
    directory: Path, arguments: tuple[str, ...], error: type[Exception]
) -> None:
    assert isinstance(call(str(directory), *arguments).exception, error)


def test_an_unknown_model_is_named() -> None:
    result = call("no-such-model", "hi")
    assert isinstance(result.exception, ModelNotFoundError)
    assert "no-such-model" in str(result.exception)
