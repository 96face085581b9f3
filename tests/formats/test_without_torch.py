"""The whole room works on a machine that has no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mainspring.formats

BLOCKED = """
import importlib, pathlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "pickle5"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(f"mainspring.formats.{name}")
assert "torch" not in sys.modules
"""


def modules() -> list[str]:
    return sorted(
        path.stem for path in Path(mainspring.formats.__file__).parent.glob("*.py") if path.stem != "__init__"
    )


def test_every_module_imports_without_torch() -> None:
    assert {"model_config", "gguf_file", "tokenizer", "named_models", "safetensors_file"} <= set(modules())
    subprocess.run([sys.executable, "-c", BLOCKED, *modules()], check=True)


def test_no_module_uses_pickle() -> None:
    for path in Path(mainspring.formats.__file__).parent.glob("*.py"):
        assert "import pickle" not in path.read_text()
