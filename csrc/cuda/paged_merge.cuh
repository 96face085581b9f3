// Decode's results: a chunk's sums, and the merge of the chunks of a row. The warp that finishes a row's last chunk merges
// them, or, where it has nothing else to do or they are many, leaves that to all warps of its block.
#pragma once

#include "paged_products.cuh"

namespace mainspring {

constexpr int MAX_LATER = 16;     // merges that a block leaves to its end
constexpr int LONG = 16;          // more chunks than so many are left to be merged at the end of a block,
constexpr int IDLE_LONG = 2;      // or than so many, by a warp without further units
constexpr int PARTIAL = D + 4;    // floats of a chunk's row: sums, reference, total, nothing
constexpr int VECTORS = (D + 127) / 128;  // of four columns, that a lane has of a row where a warp merges it

// Merges left to the end of a block, where all its warps share in them.
struct LaterMerges {
  Unit units[MAX_LATER];
  int count;
};

// Where a row's results go.
struct RowResult {
  Element* out;  // [D]
  float* lse;    // or null
  float factor;  // of the results
  __device__ __forceinline__ RowResult(const Arguments& a, const Unit& u, const TileRows& rows, int row) {
    const int index = u.tile * a.tile_rows + row, token = a.by_group.divide(index);
    const int64_t at = rows.start + token;
    const int head = u.key_head * a.group + index - token * a.group, heads = a.kv_heads * a.group;
    out = a.out + (at * heads + head) * D;
    lse = a.lse ? a.lse + static_cast<int64_t>(head) * a.tokens + at : nullptr;
    factor = FP8 ? a.v_scale[u.key_head] : 1.0f;
  }
  __device__ __forceinline__ float finish(float sum, float inverse) const {
    return __fmul_rn(FP8 ? __fmul_rn(sum, factor) : sum, inverse);
  }
};

// Merges the chunks of Rows rows from `row` on (as far as the unit has them), left to right: a warp's work. Ahead: chunks
// that are read at a time.
template <int Rows, int Ahead>
__device__ __forceinline__ void merge_rows(const Arguments& a, const Unit& u, const TileRows& rows, int row, int lane) {
  const int stride = a.rows * PARTIAL;
  const float* from = a.partial + (static_cast<int64_t>(u.index - rows.chunk(u)) * a.rows + row) * PARTIAL;
  const int last_row = rows.count - 1 - row, chunks = rows.chunks();
  const float scale = score_scale(a, u);
  float peak[Rows], total[Rows];
  float4 sums[Rows][VECTORS];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    peak[r] = -INFINITY, total[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) sums[r][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
#pragma unroll 1
  for (int c0 = 0; c0 < chunks; c0 += Ahead) {
    float2 state[Ahead][Rows];
    float4 parts[Ahead][Rows][VECTORS];
#pragma unroll
    for (int c = 0; c < Ahead; ++c) {
      const float* chunk = from + static_cast<int64_t>(min(c0 + c, chunks - 1)) * stride;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const float* sums_of_row = chunk + min(r, last_row) * PARTIAL;
        state[c][r] = __ldcg(reinterpret_cast<const float2*>(sums_of_row + D));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
          const int column = min(4 * lane + 128 * i, D - 4);
          parts[c][r][i] = __ldcg(reinterpret_cast<const float4*>(sums_of_row + column));
        }
      }
    }
#pragma unroll
    for (int c = 0; c < Ahead; ++c) {
      if (c0 + c < chunks) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const Merge merge(peak[r], state[c][r].x, scale);
          peak[r] = merge.peak;
          total[r] = merge(total[r], state[c][r].y);
#pragma unroll
          for (int i = 0; i < VECTORS; ++i) {
            float4 &sum = sums[r][i], &part = parts[c][r][i];
            sum = make_float4(merge(sum.x, part.x), merge(sum.y, part.y), merge(sum.z, part.z), merge(sum.w, part.w));
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    if (r <= last_row) {
      const RowResult result(a, u, rows, row + r);
      const float inverse = divide(1.0f, total[r]);
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        const int column = 4 * lane + 128 * i;
        const float4 sum = sums[r][i];
        if (column < D) {
          *reinterpret_cast<uint2*>(result.out + column) =
              make_uint2(pack(result.finish(sum.x, inverse), result.finish(sum.y, inverse), Element{}),
                         pack(result.finish(sum.z, inverse), result.finish(sum.w, inverse), Element{}));
        }
      }
      if (result.lse && lane == 0) *result.lse = log_sum(peak[r], total[r], scale);
    }
  }
}

// What the warps of a block count for each other.
template <int Warps>
struct Progress {
  int arrived[Warps];  // chunks of the row whose first chunk is this warp's
  LaterMerges later;
};

// Whether this warp finished the last chunk of a unit's rows; then all the others' partial results can be seen. A block's last
// units are counted by itself where all chunks of the row are among them, others in device memory.
template <int Warps>
__device__ __forceinline__ bool is_last(const Arguments& a, const Batch& batch, const Unit& u, const TileRows& rows,
                                        Progress<Warps>& progress, int lane) {
  const int chunks = rows.chunks(), warp = threadIdx.x / 32, leader = warp - rows.chunk(u);
  const bool within = leader >= 0 && leader + chunks <= a.workers &&
                      u.index - warp + static_cast<int>(gridDim.x) * a.workers >= batch.units(a);
  int* ticket = a.tickets + u.sequence * a.kv_heads * a.tiles + u.tile * a.kv_heads + u.key_head;
  int before = 0;
  if (within) __threadfence_block();
  __syncwarp();
  if (lane == 0) before = within ? atomicAdd(&progress.arrived[leader], 1) : count_up(ticket);
  before = __shfl_sync(~0u, before, 0);
  if (before != chunks - 1) return false;
  if (within) __threadfence_block();
  else if (lane == 0) *ticket = 0;
  __syncwarp();
  return true;
}

// A finished chunk: its rows' results if it is their only one, else a partial result and, by the last, the merge. idle: this
// warp has no further units.
template <int Tiles, int Warps>
__device__ __forceinline__ void finish(const Arguments& a, const Batch& batch, const Unit& u,
                                       const float (&sums)[Tiles][D / 16][4], const float (&reference)[Tiles][2],
                                       const float (&lanes)[Tiles][2], Progress<Warps>& progress, bool idle, int lane) {
  const TileRows rows(a, batch, u.sequence, u.tile);
  const int chunks = rows.chunks();
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const int row = 8 * n + 2 * (lane % 4) + l;
      const float total = column_sum(lanes[n][l]);
      if (row < rows.count) {
        if (chunks > 1) {
          float* to = a.partial + (static_cast<int64_t>(u.index) * a.rows + row) * PARTIAL;
#pragma unroll
          for (int i = 0; i < D / 8; ++i) __stcg(to + 16 * (i / 2) + sum_column(lane, i % 2), sums[n][i / 2][i % 2 * 2 + l]);
          if (lane < 4) __stcg(reinterpret_cast<float2*>(to + D), make_float2(reference[n][l], total));
        } else {
          const RowResult result(a, u, rows, row);
          const float inverse = divide(1.0f, total);
#pragma unroll
          for (int i = 0; i < D / 8; ++i) {
            // + 0: as merging does to -0
            result.out[16 * (i / 2) + sum_column(lane, i % 2)] =
                static_cast<Element>(result.finish(__fadd_rn(sums[n][i / 2][i % 2 * 2 + l], 0.0f), inverse));
          }
          if (result.lse && lane < 4) *result.lse = log_sum(reference[n][l], total, score_scale(a, u));
        }
      }
    }
  }
  if (chunks == 1 || !is_last(a, batch, u, rows, progress, lane)) return;
  LaterMerges& later = progress.later;
  int place = MAX_LATER;
  if (chunks > (idle ? IDLE_LONG : LONG)) {
    if (lane == 0) place = atomicAdd(&later.count, 1);
    place = __shfl_sync(~0u, place, 0);
  }
  if (place < MAX_LATER) {
    if (lane == 0) later.units[place] = u;
  } else {
    constexpr int ROWS = D <= 128 ? 4 : 2;
#pragma unroll 1
    for (int row = 0; row < rows.count; row += ROWS) merge_rows<ROWS, 2>(a, u, rows, row, lane);
  }
}

// What the warps of a block left; called by all of them, after a barrier.
__device__ __forceinline__ void merge_later(const Arguments& a, const Batch& batch, const LaterMerges& later, int warp,
                                            int warps, int lane) {
  const int count = min(later.count, MAX_LATER) * a.rows;
#pragma unroll 1
  for (int i = warp; i < count; i += warps) {
    const Unit& u = later.units[i / a.rows];
    const TileRows rows(a, batch, u.sequence, u.tile);
    if (i % a.rows < rows.count) merge_rows<1, 8>(a, u, rows, i % a.rows, lane);
  }
}

}  // namespace mainspring
