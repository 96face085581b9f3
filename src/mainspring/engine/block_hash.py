"""Names of cache blocks by their content: a hash of a block's tokens and of all that stands before them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

_BYTES = 16  # 128 bits of BLAKE2b: no two different prefixes of any use will ever meet


def root_hash(cache_salt: str | None, lora_id: int, rope_length: int | None) -> bytes:
    """Where a sequence's chain begins: what besides its tokens decides its keys and values.

    rope_length: the length that fixes the sequence's RoPE base, where that depends on it.
    """
    return _digest(repr((cache_salt, lora_id, rope_length)).encode())


def extend_hashes(
    hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int
) -> None:
    """Append the hashes of the further full blocks of token_ids, up to num_blocks, each chained to the one before.

    BLAKE2b, RFC 7693.
    """
    done = len(hashes)
    if done >= num_blocks:
        return
    parent = hashes[-1] if hashes else root
    data = array("q", token_ids[done * block_size : num_blocks * block_size]).tobytes()
    width = 8 * block_size
    for start in range(0, len(data), width):
        parent = _digest(parent + data[start : start + width])
        hashes.append(parent)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_BYTES).digest()
