// Tiles of queries, keys and values in shared memory: panels of 64 columns (32 where the head size is no multiple of 64),
// rows end to end inside a panel, swizzled as the copy engine leaves them and wgmma reads them.
#pragma once

#include "hopper.cuh"
#include "wgmma.cuh"

namespace mainspring {

template <int HeadDim>
struct Panels {
  static constexpr int kColumns = HeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kCount = HeadDim / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static_assert(HeadDim % 32 == 0 && HeadDim <= 256, "head sizes are multiples of 32 up to 256");

  // leading: bytes from panel to panel, which only operands with their columns along M or N need.
  static __device__ __forceinline__ uint64_t descriptor(const void* tile, uint32_t leading) {
    constexpr uint64_t kSwizzle64 = kColumns == 32 ? static_cast<uint64_t>(3) << 62 : 0;  // turns 1 (128 B) into 2 (64 B)
    return matrix_descriptor(shared_address(tile), leading, 8 * kRowBytes) ^ kSwizzle64;
  }
  // What to add to a descriptor for columns (a multiple of 16) further along a row; rows: of the tile.
  static constexpr __host__ __device__ uint64_t columns_step(int columns, int rows) {
    return (columns / kColumns * rows * kRowBytes + columns % kColumns * 2) >> 4;
  }
  static constexpr __host__ __device__ uint64_t rows_step(int rows) { return rows * kRowBytes >> 4; }
};

// S[64, Keys] = Q[64, HeadDim] Kᵀ.
template <typename T, int HeadDim, int Keys>
__device__ __forceinline__ void multiply_keys(float (&s)[Keys / 2], uint64_t q, uint64_t k) {
  using P = Panels<HeadDim>;
#pragma unroll
  for (int d = 0; d < HeadDim; d += 16) {
    wgmma_ss<T, Keys>(s, q + P::columns_step(d, 64), k + P::columns_step(d, Keys), d > 0);
  }
}

// O[64, HeadDim] = P V, or (accumulate) O += P V, P in registers.
template <typename T, int HeadDim, int Steps>
__device__ __forceinline__ void multiply_values(float (&o)[HeadDim / 2], const uint32_t (&p)[Steps][4], uint64_t v,
                                                int accumulate) {
#pragma unroll
  for (int i = 0; i < Steps; ++i) {
    wgmma_rs<T, HeadDim, 1>(o, p[i], v + Panels<HeadDim>::rows_step(16 * i), i > 0 ? 1 : accumulate);
  }
}

// A product's fp32 result becomes the next one's 16-bit left operand, in the same thread.
template <typename T, int N>
__device__ __forceinline__ void to_operand(uint32_t (&p)[N / 8][4], const float (&s)[N]) {
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) p[i][r] = pack(s[8 * i + 2 * r], s[8 * i + 2 * r + 1], T());
  }
}

// Swaps words among the four lanes of a quad: word w of lane t becomes word t of lane w.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&w)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t sent = t & 1 ? w[i] : w[i + 1];
    const uint32_t got = __shfl_xor_sync(~0u, sent, 1);
    if (t & 1) w[i] = got; else w[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t sent = t & 2 ? w[i] : w[i + 2];
    const uint32_t got = __shfl_xor_sync(~0u, sent, 2);
    if (t & 2) w[i] = got; else w[i + 2] = got;
  }
}

// A thread's two rows (8 apart) of a product, through finish(value, j), to device memory in 16-byte stores; row j is there
// or not.
template <typename T, int N, typename Finish>
__device__ __forceinline__ void store_rows(const float (&o)[N], T* const (&to)[2], const bool (&there)[2],
                                           const Finish& finish) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int g = 0; g < N / 16; ++g) {  // 32 columns
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 16 * g + 4 * i + 2 * j;
        w[i] = pack(finish(o[at], j), finish(o[at + 1], j), T());
      }
      transpose_in_quad(w);
      if (there[j]) {
        *reinterpret_cast<uint4*>(to[j] + 32 * g + 8 * (threadIdx.x % 4)) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

// Rows from `first` on become zero, by one warpgroup, for the products that follow.
template <int HeadDim, int Rows>
__device__ __forceinline__ void clear_rows(void* tile, int first, int barrier) {
  using P = Panels<HeadDim>;
  const int bytes = (Rows - first) * P::kRowBytes;
#pragma unroll
  for (int i = 0; i < P::kCount; ++i) {
    uint8_t* panel = static_cast<uint8_t*>(tile) + (i * Rows + first) * P::kRowBytes;
    for (int at = threadIdx.x % 128 * 16; at < bytes; at += 128 * 16) {
      *reinterpret_cast<uint4*>(panel + at) = make_uint4(0, 0, 0, 0);
    }
  }
  fence_async_proxy();
  named_sync(barrier, 128);
}

}  // namespace mainspring
