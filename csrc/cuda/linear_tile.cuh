// What the linear kernels share: how a warpgroup's sums leave it, and how their operands are described.
#pragma once

#include "hopper.cuh"
#include "tensor_map.h"

#include <type_traits>

namespace mainspring {

constexpr int kPanel = 64;      // values of k in a panel: a row of 128 bytes, which is what the swizzle spans
constexpr int kRowBytes = 128;
constexpr int kGroupRows = 64;  // rows of a warpgroup's product
constexpr int kSharedLimit = 227 * 1024;

template <typename T>
__device__ __forceinline__ float bias_at(const void* bias, int column, int n) {
  return bias != nullptr && column < n ? static_cast<float>(static_cast<const T*>(bias)[column]) : 0.0f;
}

// Swaps words of the four lanes of a quad: lane t's words become word t of lanes 0 to 3.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int t) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, t & 1 ? w[i] : w[i + 1], 1);
    (t & 1 ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, t & 2 ? w[i] : w[i + 2], 2);
    (t & 2 ? w[i] : w[i + 2]) = got;
  }
}

// Where a tile goes. bias: [n], or null; out: [rows, n] of T or (wide) of float, of which rows from m on are left alone.
struct Target {
  const void* bias;
  void* out;
  int m, n;
  bool wide;
};

// A warpgroup's sums, biases included, to out. Whole: all columns are there, and rows begin at multiples of 16 bytes.
template <typename T, int Columns, bool Whole>
__device__ __forceinline__ void store_sums(const Target& p, const float (&acc)[Columns / 2], int row, int column) {
  const int t = threadIdx.x % 4;
  const bool vectors = Whole || p.n % 8 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    const bool there = r < p.m;
    if (p.wide) {
      float* to = static_cast<float*>(p.out) + static_cast<int64_t>(r) * p.n;
#pragma unroll
      for (int i = 0; i < Columns / 8; ++i) {
        const int c = column + 8 * i + 2 * t;
        const float first = acc[4 * i + 2 * half], second = acc[4 * i + 2 * half + 1];
        if (there && (Whole || (vectors && c < p.n))) {
          *reinterpret_cast<float2*>(to + c) = make_float2(first, second);
        } else if (!Whole && there) {
          if (c < p.n) to[c] = first;
          if (c + 1 < p.n) to[c + 1] = second;
        }
      }
      continue;
    }
    T* to = static_cast<T*>(p.out) + static_cast<int64_t>(r) * p.n;
    constexpr int kQuads = Columns / 32;
    if (vectors) {
#pragma unroll
      for (int b = 0; b < kQuads; ++b) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * (4 * b + j) + 2 * half;
          words[j] = pack(acc[i], acc[i + 1], T{});
        }
        transpose_quad(words, t);
        const int c = column + 32 * b + 8 * t;
        if (there && (Whole || c < p.n)) *reinterpret_cast<uint4*>(to + c) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < Columns / 8; ++i) {
      if (vectors && i < 4 * kQuads) continue;
      const int c = column + 8 * i + 2 * t;
      const uint32_t word = pack(acc[4 * i + 2 * half], acc[4 * i + 2 * half + 1], T{});
      if (there && (Whole || (vectors && c < p.n))) {
        *reinterpret_cast<uint32_t*>(to + c) = word;
      } else if (!Whole && there) {
        if (c < p.n) reinterpret_cast<uint16_t*>(to)[c] = static_cast<uint16_t>(word);
        if (c + 1 < p.n) reinterpret_cast<uint16_t*>(to)[c + 1] = static_cast<uint16_t>(word >> 16);
      }
    }
  }
}

// A warpgroup's sums to out, as wgmma leaves them. row: of this thread's first element.
template <typename T, int Columns>
__device__ __forceinline__ void store_tile(const Target& p, float (&acc)[Columns / 2], int row, int column) {
  const int t = threadIdx.x % 4;
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < Columns / 8; ++i) {
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        const float b = bias_at<T>(p.bias, column + 8 * i + 2 * t + l, p.n);
        acc[4 * i + l] += b;
        acc[4 * i + 2 + l] += b;
      }
    }
  }
  if (p.n % 8 == 0 && column + Columns <= p.n) {
    store_sums<T, Columns, true>(p, acc, row, column);
  } else {
    store_sums<T, Columns, false>(p, acc, row, column);
  }
}

template <typename T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// A matrix of `rows` rows of k values, `stride` elements apart; a copy is a panel of box_rows of them.
template <typename T>
bool map_rows(CUtensorMap* map, const void* address, int64_t rows, int64_t k, int64_t stride, int box_rows) {
  const uint64_t sizes[2] = {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)};
  const uint64_t strides[1] = {static_cast<uint64_t>(stride) * sizeof(T)};
  const uint32_t box[2] = {kPanel, static_cast<uint32_t>(box_rows)};
  return make_tensor_map(map, kMapType<T>, 2, address, sizes, strides, box);
}

}  // namespace mainspring
