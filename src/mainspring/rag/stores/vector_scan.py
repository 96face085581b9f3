"""Exact search over vectors in memory that reads a byte for each number: 8-bit products choose, float32 ones decide.

A scan is bound by the memory that it reads. So every vector is kept a second time as the blocks of 32 codes that
`ops.linear` multiplies by its C++ kernel (Q8_0), the best by those are looked at again at full precision, and as many
are looked at as makes a miss unlikely (measured in docs/results/rag.md). Without the kernel all is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.retrieval.hits import Ranking, best

_BLOCK = 32
_AGAIN = 4  # for k passages, the best 4 k by 8-bit products are looked at again
_LEAST = 200
_SMALL = 4096  # vectors under which one float32 product is as fast


class VectorScan:
    """Unit vectors [N, D], not to be changed afterwards. Searches may come from several threads."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors
        self._coarse: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None = None
        if len(vectors) > _SMALL and vectors.shape[1] % _BLOCK == 0:
            self._coarse = _coarse_products(vectors)

    def search(
        self, vector: npt.NDArray[np.float32], k: int, allowed: npt.NDArray[np.bool_] | None = None
    ) -> Ranking:
        """The k nearest to a unit vector [D] by their cosine, of the `allowed` ones [N]."""
        again = max(_AGAIN * k, _LEAST)
        if self._coarse is None or again >= len(self._vectors):
            return best(self._vectors @ vector, k, allowed)
        rows = np.sort(best(self._coarse(vector), again, allowed).positions)
        ranking = best(self._vectors[rows] @ vector, k)
        return Ranking(rows[ranking.positions], ranking.scores)

    def cosines(
        self, vector: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """The cosine of a unit vector [D] and each of these rows [R]."""
        found: npt.NDArray[np.float32] = self._vectors[rows] @ vector
        return found


def _coarse_products(
    vectors: Vectors,
) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None:
    """What multiplies the 8-bit copies by a vector [D]: [N]; None without the kernel."""
    import torch  # takes a second to load: small stores do without

    from mainspring.ops import FAST
    from mainspring.ops.cpu.extension import kernels
    from mainspring.ops.linear import linear
    from mainspring.ops.quantised_linear import BlockRows, QuantisedWeight

    if kernels() is None:
        return None
    weight = QuantisedWeight([BlockRows("Q8_0", torch.from_numpy(_blocks(vectors)))], torch.float32)
    weight.prepare()

    def products(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = linear(torch.from_numpy(vector)[None], weight, policy=FAST)[
                0
            ].numpy()
        return found

    return products


def _blocks(vectors: Vectors) -> npt.NDArray[np.uint8]:
    """Q8_0 as in a GGUF file: [N, D / 32 * 34], a float16 scale before each 32 codes."""
    grouped = vectors.reshape(len(vectors), -1, _BLOCK)
    scale = (np.abs(grouped).max(2, keepdims=True) / 127).astype(np.float16)
    inverse = 1 / np.maximum(scale.astype(np.float32), 1e-12)
    codes = np.clip(np.rint(grouped * inverse), -127, 127).astype(np.int8)
    blocks = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=2)
    return np.ascontiguousarray(blocks.reshape(len(vectors), -1))
