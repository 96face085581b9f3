// Decode over a paged cache: what the kernel is given, and its units of work.
//
// A unit is a chunk of one sequence's keys, for one key head and a tile of query rows (the query heads of a group, token by
// token). Sequences' lengths lie on the device, so units are counted there: sequence by sequence, within one tile by tile,
// key head by key head, chunk by chunk. So the warps of a thread block, which take units that follow each other, read key
// heads that lie side by side in memory, and mostly all chunks of a row.
#pragma once

#include <climits>
#include <type_traits>

#include "canonical.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif
#ifndef FP8
#define FP8 0
#endif

namespace mainspring {

using Element = ELEMENT;                                   // of queries and results
using Cached = std::conditional_t<FP8, uint8_t, Element>;  // of keys and values
using Product = std::conditional_t<FP8, __half, Element>;  // of what the tensor cores multiply
constexpr int D = HEAD_DIM;
constexpr int CHUNK = kCanonicalChunk;
constexpr int KEYS = canonical_unit(D);  // of a step of the online softmax
constexpr int PIECE = 16;                // keys of one copy; every block of the cache holds a multiple
static_assert(D % (FP8 ? 32 : 16) == 0 && D <= 256 && CHUNK <= 64 * PIECE);

// As ops/cuda/paged_attention.py lays it out.
struct DecodeCall {
  const Element* q;         // [T, q_heads, D], tokens q_stride apart
  const Cached* k_cache;    // [cache_rows, kv_heads, D]
  const Cached* v_cache;
  const float* k_scale;     // [kv_heads], FP8: values of the cache are to be multiplied by them
  const float* v_scale;
  Element* out;             // [T, q_heads, D]
  float* lse;               // [q_heads, T] or null
  float* partial;           // [units, rows, PARTIAL]
  int* tickets;             // [num_seqs, kv_heads · tiles], zero before and after
  const int* cu_seqlens;    // [num_seqs + 1]
  const int* context_lens;  // [num_seqs]
  const int* tables;        // [num_seqs, *], rows table_stride apart
  float scale;              // of the scores, times log2 e; 1 with a soft-cap
  float cap_in, cap_out;    // 2 log2 e · scale / softcap, softcap · log2 e; cap_out 0: no cap
  int window;               // 0: none
  int num_seqs, tokens, q_stride, table_stride, kv_heads, group, block_size, cache_rows;
  int tile_rows, tiles;     // of query rows: 8 or 16, and how many for the longest sequence served here
  int rows;                 // of a unit's partial result: min(tile_rows, rows of the longest)
  int max_length;           // sequences with more queries are another kernel's
  int max_keys;             // no sequence has more, and tables have room for as many
};
struct Arguments : DecodeCall {
  int workers;  // warps of a block that take units; others help with merges
  Divisor by_group, by_block_size, by_heads;
  Arguments(const DecodeCall& call, int workers)
      : DecodeCall(call),
        workers(workers),
        by_group(call.group),
        by_block_size(call.block_size),
        by_heads(call.kv_heads * call.tiles) {}
};

// First key (in whole chunks or blocks) that a window leaves to the query at this position.
__device__ __forceinline__ int first_seen(int position, int window, int unit) {
  return window ? max(position - window + 1, 0) / unit * unit : 0;
}

// A unit of work: the keys first .. high of one sequence and key head, for a tile of query rows.
struct Unit {
  int index;  // also of its partial result; past the last one: no more work
  int sequence, key_head, tile;
  int first, high;
  int cache_row, later_row;  // lane i: rows of the cache of keys chunk · CHUNK + 16 i and of 512 further
};

// Factor of the scores (of what a soft-cap makes of them), log2 e included.
__device__ __forceinline__ float score_scale(const Arguments& a, const Unit& u) {
  return FP8 && a.cap_out == 0.0f ? __fmul_rn(a.scale, a.k_scale[u.key_head]) : a.scale;
}

// A sequence as device memory describes it, within the bounds that the host gave: it may not have been written yet.
struct Sequence {
  int start, length, context;
  __device__ __forceinline__ Sequence(const Arguments& a, int s)
      : Sequence(a, load_relaxed(a.cu_seqlens + s), load_relaxed(a.cu_seqlens + s + 1), load_relaxed(a.context_lens + s)) {}
  __device__ __forceinline__ Sequence(const Arguments& a, int start, int end, int context)
      : start(start), length(min(end - start, a.max_length + 1)), context(min(context, a.max_keys)) {}
};

// The batch as a thread block knows it: arrays over the sequences, in shared memory.
struct Batch {
  static constexpr int ARRAYS = 4;
  int* ends;  // chunks of the sequences up to and with s; the other arrays follow
  int num_seqs;
  __device__ __forceinline__ int& start(int s) const { return ends[num_seqs + s]; }
  __device__ __forceinline__ int& length(int s) const { return ends[2 * num_seqs + s]; }
  __device__ __forceinline__ int& context(int s) const { return ends[3 * num_seqs + s]; }
  __device__ __forceinline__ int units(const Arguments& a) const { return ends[num_seqs - 1] * a.kv_heads * a.tiles; }
  __device__ __forceinline__ bool differs(int s, const Sequence& sequence) const {
    return sequence.start != start(s) || sequence.length != length(s) || sequence.context != context(s);
  }
};

// All threads of a block fill in its batch.
__device__ void read_batch(const Batch& batch, const Arguments& a) {
  int* ends = batch.ends;
#pragma unroll 1
  for (int s = threadIdx.x; s < a.num_seqs; s += blockDim.x) {
    const Sequence q(a, s);
    batch.start(s) = q.start, batch.length(s) = q.length, batch.context(s) = q.context;
    const int low = first_seen(q.context - q.length, a.window, CHUNK);
    ends[s] = q.length > a.max_length || q.length <= 0 ? 0 : max(q.context - low + CHUNK - 1, 0) / CHUNK;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // a lane sums a run of them
    const int run = (a.num_seqs + 31) / 32, begin = threadIdx.x * run, end = min(begin + run, a.num_seqs);
    int sum = 0;
#pragma unroll 1
    for (int s = begin; s < end; ++s) sum += ends[s];
    int before = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, before, step);
      if (threadIdx.x >= step) before += other;
    }
    before -= sum;
#pragma unroll 1
    for (int s = begin; s < end; ++s) ends[s] = before += ends[s];
  }
  __syncthreads();
}

// A tile of a sequence's query rows.
struct TileRows {
  int start, lead;  // the sequence's first query: its token, its position
  int count;
  int first_position, end;  // of the tile's first row, and behind that of its last one
  int first_chunk;
  __device__ __forceinline__ TileRows(const Arguments& a, const Batch& batch, int sequence, int tile)
      : start(batch.start(sequence)) {
    const int length = batch.length(sequence);
    lead = batch.context(sequence) - length;
    count = min(a.tile_rows, length * a.group - tile * a.tile_rows);
    first_position = lead + a.by_group.divide(tile * a.tile_rows);
    end = lead + a.by_group.divide(tile * a.tile_rows + count - 1) + 1;
    first_chunk = first_seen(first_position, a.window, CHUNK) / CHUNK;
  }
  __device__ __forceinline__ int chunks() const { return (end - 1) / CHUNK + 1 - first_chunk; }
  __device__ __forceinline__ int chunk(const Unit& u) const { return (u.high - 1) / CHUNK - first_chunk; }
};

// Entries of the block table: where the cache has a lane's 16 keys of a unit's chunk, and those 512 further. Behind the unit's
// last key, and where there is no unit, they stand for nothing.
struct Blocks {
  int near, far;
  __device__ __forceinline__ Blocks(const Arguments& a, const Unit& u, int lane) {
    const bool none = u.index == INT_MAX;  // then any address that can be read
    const int* table = none ? a.cu_seqlens : a.tables + static_cast<int64_t>(u.sequence) * a.table_stride;
    near = load_relaxed(table + (none ? 0 : a.by_block_size.divide(position(u, lane))));
    far = load_relaxed(table + (none ? 0 : a.by_block_size.divide(position(u, lane + 32))));
  }
  __device__ __forceinline__ int near_row(const Arguments& a, const Unit& u, int lane) const {
    return row(a, near, position(u, lane));
  }
  __device__ __forceinline__ int far_row(const Arguments& a, const Unit& u, int lane) const {
    return row(a, far, position(u, lane + 32));
  }

 private:
  __device__ __forceinline__ static int position(const Unit& u, int piece) {
    return min(u.first / CHUNK * CHUNK + PIECE * piece, u.high - 1);
  }
  __device__ __forceinline__ static int row(const Arguments& a, int block, int position) {
    return (block - a.by_block_size.divide(position)) * a.block_size + position;
  }
};

// The first unit from `index` on, in steps of `stride`, that has anything to do.
__device__ __forceinline__ void find_unit(Unit& u, const Arguments& a, const Batch& batch, int index, int stride, int lane) {
  const int heads = a.kv_heads * a.tiles, count = batch.units(a);
#pragma unroll 1
  for (; index < count; index += stride) {
    const int item = a.by_heads.divide(index);
    // The first sequence that ends behind the item: the lanes cut what is left into 32 parts.
    int s = 0, step;
#pragma unroll 1
    for (int left = a.num_seqs;; left = min(step, a.num_seqs - s)) {
      step = (left + 31) / 32;
      const int last = (lane + 1) * step - 1;
      s += step * __popc(__ballot_sync(~0u, last < left && batch.ends[s + last] <= item));
      if (step == 1) break;
    }
    const int before = s ? batch.ends[s - 1] : 0, chunks = batch.ends[s] - before;
    const int rest = index - before * heads, head = rest / chunks;
    u.sequence = s;
    u.tile = a.tiles == 1 ? 0 : head / a.kv_heads;
    u.key_head = head - u.tile * a.kv_heads;
    const TileRows rows(a, batch, s, u.tile);
    const int chunk = first_seen(rows.lead, a.window, CHUNK) / CHUNK + rest - head * chunks;
    if (rows.count <= 0 || chunk < rows.first_chunk || chunk * CHUNK >= rows.end) continue;
    u.first = max(chunk * CHUNK, first_seen(rows.first_position, a.window, KEYS));
    u.high = min(chunk * CHUNK + CHUNK, rows.end);
    u.index = index;
    const Blocks blocks(a, u, lane);
    u.cache_row = blocks.near_row(a, u, lane);
    u.later_row = blocks.far_row(a, u, lane);
    return;
  }
  u.index = INT_MAX;
}

// What a block looked up, read once more. A thread reads the sequence of its number, and of its unit what its lane looked up.
struct Recheck {
  Blocks blocks;
  int start, end, context;
  __device__ __forceinline__ Recheck(const Arguments& a, const Unit& u, int lane) : blocks(a, u, lane) {
    const int s = min(static_cast<int>(threadIdx.x), a.num_seqs - 1);
    start = load_relaxed(a.cu_seqlens + s), end = load_relaxed(a.cu_seqlens + s + 1);
    context = load_relaxed(a.context_lens + s);
  }
  // Whether anything is other than it was, for any of the block's threads; asked by all of them.
  __device__ __forceinline__ bool differs(const Arguments& a, const Batch& batch, const Unit& u, int lane) const {
    bool other = u.index != INT_MAX &&
                 (blocks.near_row(a, u, lane) != u.cache_row || blocks.far_row(a, u, lane) != u.later_row);
    int s = min(static_cast<int>(threadIdx.x), a.num_seqs - 1);
    other |= batch.differs(s, Sequence(a, start, end, context));
#pragma unroll 1
    for (s = threadIdx.x + blockDim.x; s < a.num_seqs; s += blockDim.x) other |= batch.differs(s, Sequence(a, s));
    return __syncthreads_or(other);
  }
};

}  // namespace mainspring
