// Decode's results: a chunk's sums, and the merge of the chunks of a row by the warp that finishes the last one.
#pragma once

#include "paged_products.cuh"

namespace mainspring {

constexpr int MAX_LATER = 16;  // merges that a block leaves to its end
constexpr int LONG = 16;       // chunks from which on a merge is left

// Merges left to the end of a block, where all its warps share in them.
struct LaterMerges {
  Unit units[MAX_LATER];
  int count;
};

__device__ __forceinline__ void store_element(const Arguments& a, const Unit& u, int row, int column, float x) {
  const int index = u.tile * a.tile_rows + row;
  if constexpr (FP8) x = __fmul_rn(x, a.v_scale[u.key_head]);
  a.out[(static_cast<int64_t>(u.start + index / a.group) * a.kv_heads * a.group + u.key_head * a.group + index % a.group) * D +
        column] = static_cast<Element>(x);
}
__device__ __forceinline__ void store_lse(const Arguments& a, const Unit& u, int row, float peak, float total) {
  const int index = u.tile * a.tile_rows + row;
  const int64_t head = u.key_head * a.group + index % a.group;
  a.lse[head * a.tokens + u.start + index / a.group] = log_sum(peak, total, score_scale(a, u));
}

// Merges the chunks of Rows rows from `row` on (as far as the unit has them), left to right: a warp's work. Ahead: chunks
// that are read at a time.
template <int Rows, int Ahead>
__device__ __forceinline__ void merge_rows(const Arguments& a, const Unit& u, int row, int lane) {
  constexpr int WIDTH = (D + 31) / 32;
  const int heads = a.kv_heads * a.tiles;
  const int64_t stride = static_cast<int64_t>(heads) * a.rows * (D + 2);
  const float* from = a.partial + ((u.index - static_cast<int64_t>(u.chunk) * heads) * a.rows + row) * (D + 2);
  const float scale = score_scale(a, u);
  float peak[Rows], total[Rows], sums[Rows][WIDTH];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    peak[r] = -INFINITY, total[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sums[r][i] = 0.0f;
  }
  for (int c0 = 0; c0 < u.chunks; c0 += Ahead) {
    float2 state[Ahead][Rows];
    float parts[Ahead][Rows][WIDTH];
#pragma unroll
    for (int c = 0; c < Ahead; ++c) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const float* chunk = from + min(c0 + c, u.chunks - 1) * stride + min(r, u.rows - 1 - row) * (D + 2);
        state[c][r] = __ldcg(reinterpret_cast<const float2*>(chunk + D));
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) parts[c][r][i] = lane + 32 * i < D ? __ldcg(chunk + lane + 32 * i) : 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < Ahead; ++c) {
      if (c0 + c < u.chunks) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const Merge merge(peak[r], state[c][r].x, scale);
          peak[r] = merge.peak;
          total[r] = merge(total[r], state[c][r].y);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sums[r][i] = merge(sums[r][i], parts[c][r][i]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    if (row + r < u.rows) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (lane + 32 * i < D) store_element(a, u, row + r, lane + 32 * i, divide(sums[r][i], total[r]));
      }
      if (a.lse && lane == 0) store_lse(a, u, row + r, peak[r], total[r]);
    }
  }
}

// Whether this warp finished the last chunk of a unit's rows; then all the others' partial results can be seen.
__device__ __forceinline__ bool is_last(const Arguments& a, const Unit& u, int lane) {
  int* ticket = a.tickets + u.sequence * a.kv_heads * a.tiles + u.tile * a.kv_heads + u.key_head;
  __threadfence();
  __syncwarp();
  int before = 0;
  if (lane == 0) before = atomicAdd(ticket, 1);
  before = __shfl_sync(~0u, before, 0);
  if (before != u.chunks - 1) return false;
  if (lane == 0) *ticket = 0;
  __threadfence();
  return true;
}

// A finished chunk: its rows' results if it is their only one, else a partial result and, by the last, the merge.
template <int Tiles>
__device__ __forceinline__ void finish(const Arguments& a, const Unit& u, const float (&sums)[Tiles][D / 16][4],
                                       const float (&reference)[Tiles][2], const float (&lanes)[Tiles][2], LaterMerges& later,
                                       int lane) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const int row = 8 * n + 2 * (lane % 4) + l;
      const float total = column_sum(lanes[n][l]);
      if (row < u.rows) {
        float* to = a.partial + (static_cast<int64_t>(u.index) * a.rows + row) * (D + 2);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int column = 16 * i + sum_column(lane, half);
            const float sum = sums[n][i][2 * half + l];
            if (u.chunks > 1) __stcg(to + column, sum);
            else store_element(a, u, row, column, divide(__fadd_rn(sum, 0.0f), total));  // + 0: as merging does to -0
          }
        }
        if (lane < 4) {
          if (u.chunks > 1) __stcg(reinterpret_cast<float2*>(to + D), make_float2(reference[n][l], total));
          else if (a.lse) store_lse(a, u, row, reference[n][l], total);
        }
      }
    }
  }
  if (u.chunks > 1 && is_last(a, u, lane)) {
    int place = MAX_LATER;
    if (u.chunks > LONG) {
      if (lane == 0) place = atomicAdd(&later.count, 1);
      place = __shfl_sync(~0u, place, 0);
    }
    if (place < MAX_LATER) {
      if (lane == 0) later.units[place] = u;
    } else {
      constexpr int ROWS = D <= 128 ? 4 : 2;
      for (int row = 0; row < u.rows; row += ROWS) merge_rows<ROWS, 4>(a, u, row, lane);
    }
  }
}

// What the warps of a block left; called by all of them, after a barrier.
__device__ __forceinline__ void merge_later(const Arguments& a, const LaterMerges& later, int warp, int warps, int lane) {
  const int count = min(later.count, MAX_LATER) * a.rows;
  for (int i = warp; i < count; i += warps) {
    const Unit& u = later.units[i / a.rows];
    if (i % a.rows < u.rows) merge_rows<1, D <= 128 ? 16 : 8>(a, u, i % a.rows, lane);
  }
}

}  // namespace mainspring
