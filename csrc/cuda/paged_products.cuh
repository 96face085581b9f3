// Decode's products on the tensor cores: keys and values are the left operands (S^T = K Q^T, O^T = V^T P^T), so that a
// product is 8 query rows wide. They lie in shared memory in pieces of 16 keys, a piece panel by panel, swizzled as the copy
// engine leaves them.
//
// FP8 holds e4m3, which becomes half precision on its way to the products (half has all its values).
#pragma once

#include "paged_units.cuh"

namespace mainspring {

constexpr int ROW_BYTES = D * sizeof(Cached);
constexpr int PANEL_BYTES = ROW_BYTES % 128 == 0 ? 128 : ROW_BYTES % 64 == 0 ? 64 : 32;  // of a row: what is swizzled
constexpr int PANELS = ROW_BYTES / PANEL_BYTES;
constexpr int PIECE_BYTES = PIECE * ROW_BYTES;
constexpr int STEPS = PANEL_BYTES / 32;  // matrix loads (of 32 bytes a row) of a panel

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// An 8x8 matrix of 16-bit values, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two e4m3 values as halves, the one in the low byte first.
__device__ __forceinline__ uint32_t widen(uint32_t pair) {
  uint32_t out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(static_cast<uint16_t>(pair)));
  return out;
}

// Over the lanes that hold a column of a product.
__device__ __forceinline__ float column_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}
__device__ __forceinline__ float column_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 4));
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 8));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 16));
}
template <int N>
__device__ __forceinline__ float tree_sum(const float (&x)[N]) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) half[i] = __fadd_rn(x[2 * i], x[2 * i + 1]);
    return tree_sum(half);
  }
}

// Values of keys from..to of a stage, which may be anything, NaN too, become zeros.
__device__ __forceinline__ void clear_keys(uint8_t* stage, int from, int to, int lane) {
  constexpr int PANEL_VECTORS = PANEL_BYTES / 16, ROW_VECTORS = ROW_BYTES / 16;
#pragma unroll 1
  for (int i = from * ROW_VECTORS + lane; i < to * ROW_VECTORS; i += 32) {
    const int key = i / ROW_VECTORS, panel = i % ROW_VECTORS / PANEL_VECTORS, vector = i % PANEL_VECTORS;
    uint8_t* const piece = stage + key / PIECE * PIECE_BYTES;
    *reinterpret_cast<uint4*>(piece + (panel * PIECE + key % PIECE) * PANEL_BYTES + vector * 16) = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  __syncwarp();
}

// How the copy engine permutes the 16-byte vectors of a panel's row.
__device__ __forceinline__ int swizzle(int row) {
  return PANEL_BYTES == 128 ? row % 8 : PANEL_BYTES == 64 ? row / 2 % 4 : row / 4 % 2;
}

// Which columns of 16 the thread's pairs of queries are, and those of its sums: with FP8, as the bytes of a word lie.
__device__ __forceinline__ int query_column(int lane, int half) {
  return FP8 ? 4 * (lane % 4) + 2 * half : 2 * (lane % 4) + 8 * half;
}
__device__ __forceinline__ int sum_column(int lane, int half) { return FP8 ? 2 * (lane / 4) + half : lane / 4 + 8 * half; }

__device__ __forceinline__ uint32_t load_pair(const Element* from) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
  if constexpr (std::is_same_v<Element, Product>) {
    return pair;
  } else {  // bfloat16, to halves
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000u);
    return pack(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f), Product{});
  }
}

// A tile's queries as the right operands of the products over D; rows that are not there are zero.
template <int Tiles>
__device__ __forceinline__ void load_queries(uint32_t (&queries)[Tiles][D / 16][2], const Unit& u, const TileRows& rows,
                                             const Arguments& a, int lane) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    const int row = lane / 4 + 8 * n, index = u.tile * 8 * Tiles + row;
    const int token = a.by_group.divide(index);
    const Element* from = a.q + static_cast<int64_t>(rows.start + token) * a.q_stride +
                          (u.key_head * a.group + index - token * a.group) * D;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      queries[n][i][0] = row < rows.count ? load_pair(from + 16 * i + query_column(lane, 0)) : 0;
      queries[n][i][1] = row < rows.count ? load_pair(from + 16 * i + query_column(lane, 1)) : 0;
    }
  }
}

// The scores of 16 keys by chains of products over D. address: where this lane reads the first vectors of a panel; the next
// two are an exclusive or with 32 away, for a panel's rows are aligned at their size.
template <int Tiles>
__device__ __forceinline__ void multiply_keys(float (&scores)[Tiles][4], const uint32_t (&queries)[Tiles][D / 16][2],
                                              uint32_t address, int offset) {
#pragma unroll
  for (int i = 0; i < ROW_BYTES / 32; ++i) {
    uint32_t m[4];
    load_matrix_x4(m, (address ^ i % STEPS * 32) + offset + i / STEPS * PIECE * PANEL_BYTES);
    if constexpr (FP8) {
      const uint32_t even[4] = {widen(m[0]), widen(m[1]), widen(m[0] >> 16), widen(m[1] >> 16)};
      const uint32_t odd[4] = {widen(m[2]), widen(m[3]), widen(m[2] >> 16), widen(m[3] >> 16)};
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        mma(scores[n], even, queries[n][2 * i][0], queries[n][2 * i][1], Product{});
        mma(scores[n], odd, queries[n][2 * i + 1][0], queries[n][2 * i + 1][1], Product{});
      }
    } else {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) mma(scores[n], m, queries[n][i][0], queries[n][i][1], Product{});
    }
  }
}

// Adds the values of 16 keys, weighted.
template <int Tiles>
__device__ __forceinline__ void multiply_values(float (&sums)[Tiles][D / 16][4], const uint32_t (&weights)[Tiles][2],
                                                uint32_t address, int offset) {
#pragma unroll
  for (int i = 0; i < ROW_BYTES / 32; ++i) {
    uint32_t m[4];
    load_matrix_x4_transposed(m, (address ^ i % STEPS * 32) + offset + i / STEPS * PIECE * PANEL_BYTES);
    if constexpr (FP8) {
      // A word is two columns of two keys: the even columns are rows 0 to 7 of the left operand, the odd ones rows 8 to 15.
#pragma unroll
      for (int j = 0; j < 4; ++j) m[j] = __byte_perm(m[j], 0, 0x3120);
      const uint32_t low[4] = {widen(m[0]), widen(m[0] >> 16), widen(m[2]), widen(m[2] >> 16)};
      const uint32_t high[4] = {widen(m[1]), widen(m[1] >> 16), widen(m[3]), widen(m[3] >> 16)};
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        mma(sums[n][2 * i], low, weights[n][0], weights[n][1], Product{});
        mma(sums[n][2 * i + 1], high, weights[n][0], weights[n][1], Product{});
      }
    } else {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) mma(sums[n][i], m, weights[n][0], weights[n][1], Product{});
    }
  }
}

}  // namespace mainspring
