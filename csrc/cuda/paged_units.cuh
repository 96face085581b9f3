// Decode over a paged cache: what the kernel is given, and its units of work.
//
// A unit is a chunk of one sequence's keys, for one key head and a tile of query rows (the query heads of a group, token by
// token). Sequences' lengths lie on the device, so units are counted there.
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
  int max_keys;             // no sequence has more
};
struct Arguments : DecodeCall {
  Divisor by_group, by_block_size, by_heads;
  explicit Arguments(const DecodeCall& call)
      : DecodeCall(call), by_group(call.group), by_block_size(call.block_size), by_heads(call.kv_heads * call.tiles) {}
};

// First key (in whole chunks or blocks) that a window leaves to the query at this position.
__device__ __forceinline__ int first_seen(int position, int window, int unit) {
  return window ? max(position - window + 1, 0) / unit * unit : 0;
}

// A unit of work: the keys first .. high of one sequence and key head, for `rows` query rows.
struct Unit {
  int index;     // also of its partial result; past the last one: no more work
  int sequence, key_head, tile;
  int lead;      // position of the sequence's first query
  int start;     // its token
  int rows;
  int first, high;
  int chunks;    // of the whole row
  int chunk;     // among them
  int cache_row, later_row;  // lane i: rows of the cache of keys chunk · CHUNK + 16 i and of 512 further
};

// Factor of the scores (of what a soft-cap makes of them), log2 e included.
__device__ __forceinline__ float score_scale(const Arguments& a, const Unit& u) {
  return FP8 && a.cap_out == 0.0f ? __fmul_rn(a.scale, a.k_scale[u.key_head]) : a.scale;
}

// ends[s]: chunks of the sequences up to and with s.
__device__ void count_chunks(const Arguments& a, int* ends) {
#pragma unroll 1
  for (int s = threadIdx.x; s < a.num_seqs; s += blockDim.x) {
    const int length = a.cu_seqlens[s + 1] - a.cu_seqlens[s], context = a.context_lens[s];
    const int low = first_seen(context - length, a.window, CHUNK);
    ends[s] = length > a.max_length || length <= 0 ? 0 : (context - low + CHUNK - 1) / CHUNK;
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

// The first unit from `index` on, in steps of `stride`, that has anything to do.
__device__ __forceinline__ void find_unit(Unit& u, const Arguments& a, const int* ends, int index, int stride, int lane) {
  const int heads = a.kv_heads * a.tiles;
  const int count = ends[a.num_seqs - 1] * heads;
#pragma unroll 1
  for (; index < count; index += stride) {
    const int item = a.by_heads.divide(index), rest = index - item * heads;
    // The first sequence that ends behind the item: the lanes cut what is left into 32 parts.
    int s = 0, step;
#pragma unroll 1
    for (int left = a.num_seqs;; left = min(step, a.num_seqs - s)) {
      step = (left + 31) / 32;
      const int last = (lane + 1) * step - 1;
      s += step * __popc(__ballot_sync(~0u, last < left && ends[s + last] <= item));
      if (step == 1) break;
    }
    u.sequence = s;
    u.tile = a.tiles == 1 ? 0 : rest / a.kv_heads;
    u.key_head = rest - u.tile * a.kv_heads;
    u.start = a.cu_seqlens[s];
    const int length = a.cu_seqlens[s + 1] - u.start, context = a.context_lens[s];
    u.lead = context - length;
    u.rows = min(a.tile_rows, length * a.group - u.tile * a.tile_rows);
    if (u.rows <= 0) continue;
    const int first_position = u.lead + a.by_group.divide(u.tile * a.tile_rows);
    const int last_position = u.lead + a.by_group.divide(u.tile * a.tile_rows + u.rows - 1);
    const int chunk = first_seen(u.lead, a.window, CHUNK) / CHUNK + item - (s ? ends[s - 1] : 0);
    const int first_chunk = first_seen(first_position, a.window, CHUNK) / CHUNK;
    if (chunk < first_chunk || chunk * CHUNK > last_position) continue;
    u.chunks = last_position / CHUNK + 1 - first_chunk;
    u.chunk = chunk - first_chunk;
    u.first = max(chunk * CHUNK, first_seen(first_position, a.window, KEYS));
    u.high = min(chunk * CHUNK + CHUNK, last_position + 1);
    const int* table = a.tables + static_cast<int64_t>(s) * a.table_stride;
    const auto row_of = [&](int position) {
      const int block = a.by_block_size.divide(position);
      return position < u.high ? table[block] * a.block_size + position - block * a.block_size : 0;
    };
    u.cache_row = row_of(chunk * CHUNK + PIECE * lane);
    u.later_row = row_of(chunk * CHUNK + PIECE * (lane + 32));
    u.index = index;
    return;
  }
  u.index = INT_MAX;
}

}  // namespace mainspring
