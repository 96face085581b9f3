"""Embedding throughput on a GPU: passages of 128 tokens through an encoder of all-MiniLM-L6-v2's shape.

    python benchmarks/rag_embeddings_gpu.py

The weights are drawn at random, because speed does not depend on their values and the machine may not have the model.
Token ids in, unit vectors on the host out: packing, the copy to the device and the copy back are included, tokenising
is not (it is timed beside it if `--tokenizer FILE` is given). The mark is 20,000 passages a second.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from mainspring.model.encoder import Encoder, EncoderConfig

MINILM = EncoderConfig(30522, 384, 6, 12, 1536, 512, 2, 1e-12)
PASSAGES, LENGTH = 16_384, 128


def encoder(dtype: torch.dtype) -> Encoder:
    """MiniLM's shape with small random weights, on the GPU."""
    torch.manual_seed(0)
    model = Encoder(MINILM, device="cuda", dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(
            torch.ones_like(parameter) if "norm.weight" in name else torch.randn_like(parameter) * 0.02
        )
    return model


def embed(model: Encoder, ids: list[list[int]], batch: int) -> np.ndarray:
    """[N, 384]: what an embedder does with tokenised passages."""
    parts = []
    with torch.inference_mode():
        for first in range(0, len(ids), batch):
            parts.append(model.mean_embeddings(ids[first : first + batch]))
        return torch.cat(parts).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    ids = np.random.default_rng(0).integers(1000, 30_000, (PASSAGES, LENGTH)).tolist()
    print(torch.cuda.get_device_name(), torch.__version__)
    print("| dtype | passages a batch | passages/s (median of rounds) | best |\n|---|---|---|---|")
    exact = embed(encoder(torch.float32), ids[:512], 512)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = encoder(dtype)
        least = (embed(model, ids[:512], 512) * exact).sum(1).min()
        for batch in (512, 2048, 4096):
            embed(model, ids, batch)
            seconds = []
            for _ in range(options.rounds):
                torch.cuda.synchronize()
                began = time.perf_counter()
                embed(model, ids, batch)
                seconds.append(time.perf_counter() - began)
            median, best = PASSAGES / float(np.median(seconds)), PASSAGES / min(seconds)
            print(f"| {dtype} | {batch} | {median:,.0f} | {best:,.0f} |", flush=True)
        print(f"least cosine of {dtype} to float32: {least:.5f}")
    if options.tokenizer is not None:
        from mainspring.rag.embedding.embedder import BertTokens

        tokens = BertTokens(str(options.tokenizer))
        words = ["retrieval", "augmented", "generation", "of", "answers", "from", "documents"]
        texts = [" ".join(words[(i + j) % 7] for j in range(100)) for i in range(PASSAGES)]
        began = time.perf_counter()
        tokens.encode(texts)
        rate = PASSAGES / (time.perf_counter() - began)
        print(f"tokenising on {os.cpu_count()} cores: {rate:,.0f} passages/s")


if __name__ == "__main__":
    main()
