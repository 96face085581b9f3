"""The text of wgmma.cuh: one overload of Hopper's warpgroup product for each width, whose operand lists no one should
write by hand. The compiler writes it beside what it builds; `python -m mainspring.ops.cuda.wgmma_header` shows it.
"""

from __future__ import annotations

WIDTHS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 176, 192, 224, 256)
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}

HEAD = """// Warpgroup matrix products of sm_90a: D[64, N] (+)= A[64, 16] B[16, N], fp32 sums of 16-bit products.
// Written by mainspring.ops.cuda.wgmma_header. A comes from shared memory (wgmma_ss) or registers (wgmma_rs), B from
// shared memory. Thread t of the warpgroup holds in d[4 i + 2 j + l] the element of row 16 (t / 32) + t % 32 / 4 + 8 j
// and column 8 i + 2 (t % 4) + l.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mainspring {

// Registers that a product is going to read or write were last touched before it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N committed groups are unfinished.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler may not move a use of these accumulators across this point.
template <int N>
__device__ __forceinline__ void wgmma_touch(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Where an operand lies, with a swizzle of 128 bytes. leading, stride: byte offsets between groups of the layout (PTX
// ISA, "Matrix descriptor"): for a K-major operand (rows of 64 values) leading is ignored and stride is 1024, the
// distance of eight rows; 16 values further along K are 32 bytes. For an MN-major operand leading is the distance
// between panels of 64 along M or N, stride that of eight rows along K.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>((leading & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3FFFF) >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// TransA, TransB: 0 for a K-major operand, 1 for an MN-major one. accumulate: 0 to start from zero.
template <typename T, int N, int TransA = 0, int TransB = 0>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
template <typename T, int N, int TransB = 0>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);
"""


def _overloads(n: int) -> str:
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    lines = [f"#define MAINSPRING_WGMMA_D{n} \\", f"  {outputs}", ""]
    for ctype, name in TYPES.items():
        shape = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name}"
        for trans_a in (0, 1):
            for trans_b in (0, 1):
                lines += [
                    "template <>",
                    f"__device__ __forceinline__ void wgmma_ss<{ctype}, {n}, {trans_a}, {trans_b}>("
                    f"float (&d)[{count}], uint64_t a, uint64_t b, int accumulate) {{",
                    f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n{shape} {{"',
                    f'               "{accumulators}}}, "',
                    f'               "%{count}, %{count + 1}, p, 1, 1, {trans_a}, {trans_b};\\n}}"',
                    f"               : MAINSPRING_WGMMA_D{n}",
                    '               : "l"(a), "l"(b), "r"(accumulate));',
                    "}",
                ]
        for trans_b in (0, 1):
            registers = ", ".join(f"%{count + i}" for i in range(4))
            lines += [
                "template <>",
                f"__device__ __forceinline__ void wgmma_rs<{ctype}, {n}, {trans_b}>(float (&d)[{count}], "
                "const uint32_t (&a)[4], uint64_t b, int accumulate) {",
                f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n{shape} {{"',
                f'               "{accumulators}}}, "',
                f'               "{{{registers}}}, %{count + 4}, p, 1, 1, {trans_b};\\n}}"',
                f"               : MAINSPRING_WGMMA_D{n}",
                '               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));',
                "}",
            ]
    return "\n".join(lines)


def text() -> str:
    """The whole header."""
    return "\n".join([HEAD, *(_overloads(n) + "\n" for n in WIDTHS), "}  // namespace mainspring", ""])


if __name__ == "__main__":
    print(text())
