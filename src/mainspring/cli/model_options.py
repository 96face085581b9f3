"""The model that a command loads, and how: arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face directory, a GGUF file, or the name smollm2.")]
Prompt = Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; the checkpoint's own by default.")]
Numerics = Annotated[str, typer.Option(help="lockstep (the same bits in any batch) or fast.")]
