// Attention of few queries over a paged cache (decode) in canonical order: a warp walks a chunk of keys alone.
//
// A row of the output is reduced as in every other lockstep kernel (docs/design.md, "Canonical reduction order"): blocks
// of KEYS keys within chunks of CHUNK, the scores and weighted values by chains of k16 products, row sums by the trees
// below, chunks merged left to right. On Hopper mma.sync and wgmma add alike, whichever operand is the left one, so a
// prefill by wgmma gives the same bits. Here keys and values are the left operands (Sᵀ = K Qᵀ, Oᵀ = Vᵀ Pᵀ): a product is
// 8 query rows wide, which four to eight heads of a group fill.
//
// Work: unit = (chunk of a sequence, key head, tile of query rows). The rows of a tile are the query heads of a group,
// token by token. Warps take units in turn; each has shared memory for a stage of keys and one of values, which the copy
// engine fills with the next stage (perhaps of the next unit) as soon as it has been multiplied: no warp waits for another.
// The warp that finishes a row's last chunk merges them, or leaves that, where it is long, to all warps of its thread block.
//
// With FP8 the cache holds e4m3, which becomes half precision on its way from shared memory to the products (half has all
// its values); the scale of a head's keys joins that of the scores, that of its values the result.
#include <climits>
#include <type_traits>

#include "hopper.cuh"
#include "tensor_map.h"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif
#ifndef FP8
#define FP8 0
#endif
#ifndef STAGES
#define STAGES 2
#endif

namespace mainspring {

using Element = ELEMENT;                                   // of queries and results
using Cached = std::conditional_t<FP8, uint8_t, Element>;  // of keys and values
using Product = std::conditional_t<FP8, __half, Element>;  // of what the tensor cores multiply
constexpr int D = HEAD_DIM;
constexpr int CHUNK = 512;
constexpr int KEYS = D <= 64 ? 128 : 64;
constexpr int PIECE = 16;  // keys of one copy; every block of the cache holds a multiple
constexpr int PIECES = KEYS / PIECE;
constexpr int ROW_BYTES = D * sizeof(Cached);
constexpr int PANEL_BYTES = ROW_BYTES % 128 == 0 ? 128 : ROW_BYTES % 64 == 0 ? 64 : 32;  // of a row: what is swizzled
constexpr int PANELS = ROW_BYTES / PANEL_BYTES;
constexpr int PIECE_BYTES = PIECE * ROW_BYTES;     // panel by panel
constexpr int STAGE_PIECES = PIECES / STAGES;      // pieces of keys, or of values, that are there at a time
constexpr int STAGE_BYTES = STAGE_PIECES * PIECE_BYTES;
constexpr int STEPS = PANEL_BYTES / 32;            // matrix loads (of 32 bytes a row) of a panel
constexpr int FITTING_WARPS = 225 * 1024 / (2 * STAGE_BYTES);
constexpr int MAX_WARPS = FITTING_WARPS < 8 ? FITTING_WARPS : 8;
constexpr int MAX_LATER = 16;                      // merges that a block leaves to its end
constexpr int LONG = 16;                           // chunks from which on a merge is left
constexpr float MAX_GROWTH = 8.0f;                 // log2: how far a block's peak may exceed the reference
static_assert(D % (FP8 ? 32 : 16) == 0 && D <= 256 && STAGE_BYTES % 1024 == 0);

struct Arguments {
  const Element* q;         // [T, q_heads, D], tokens q_stride apart
  const Cached* k_cache;    // [cache_rows, kv_heads, D]
  const Cached* v_cache;
  const float* k_scale;     // [kv_heads], FP8: values of the cache are to be multiplied by them
  const float* v_scale;
  Element* out;             // [T, q_heads, D]
  float* lse;               // [q_heads, T] or null
  float* partial;           // [units, rows, D + 2]: a chunk's sums, reference, total
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
};

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

// The division that Triton's `/` compiles to.
__device__ __forceinline__ float divide(float a, float b) {
  float c;
  asm("div.full.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

__device__ __forceinline__ float finite(float reference) { return reference == -INFINITY ? 0.0f : reference; }

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
  int cache_row; // lane i: row of the cache of key chunk · CHUNK + 16 i
};

// Factor of the scores (of what a soft-cap makes of them), log2 e included.
__device__ __forceinline__ float score_scale(const Arguments& a, const Unit& u) {
  return FP8 && a.cap_out == 0.0f ? __fmul_rn(a.scale, a.k_scale[u.key_head]) : a.scale;
}

// ends[s]: chunks of the sequences up to and with s.
__device__ void count_chunks(const Arguments& a, int* ends) {
  for (int s = threadIdx.x; s < a.num_seqs; s += blockDim.x) {
    const int length = a.cu_seqlens[s + 1] - a.cu_seqlens[s], context = a.context_lens[s];
    const int low = first_seen(context - length, a.window, CHUNK);
    ends[s] = length > a.max_length || length <= 0 ? 0 : (context - low + CHUNK - 1) / CHUNK;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int carry = 0;
    for (int base = 0; base < a.num_seqs; base += 32) {
      const int s = base + threadIdx.x;
      int sum = s < a.num_seqs ? ends[s] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (threadIdx.x >= step) sum += other;
      }
      if (s < a.num_seqs) ends[s] = sum + carry;
      carry += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
}

// The first unit from `index` on, in steps of `stride`, that has anything to do.
__device__ __forceinline__ void find_unit(Unit& u, const Arguments& a, const int* ends, int index, int stride, int lane) {
  const int heads = a.kv_heads * a.tiles;
  const int count = ends[a.num_seqs - 1] * heads;
  for (; index < count; index += stride) {
    const int item = index / heads, rest = index - item * heads;
    int low = 0, high = a.num_seqs - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] > item) high = middle; else low = middle + 1;
    }
    const int s = low;
    u.sequence = s;
    u.tile = rest / a.kv_heads;
    u.key_head = rest - u.tile * a.kv_heads;
    u.start = a.cu_seqlens[s];
    const int length = a.cu_seqlens[s + 1] - u.start, context = a.context_lens[s];
    u.lead = context - length;
    u.rows = min(a.tile_rows, length * a.group - u.tile * a.tile_rows);
    if (u.rows <= 0) continue;
    const int first_position = u.lead + u.tile * a.tile_rows / a.group;
    const int last_position = u.lead + (u.tile * a.tile_rows + u.rows - 1) / a.group;
    const int chunk = first_seen(u.lead, a.window, CHUNK) / CHUNK + item - (s ? ends[s - 1] : 0);
    const int first_chunk = first_seen(first_position, a.window, CHUNK) / CHUNK;
    if (chunk < first_chunk || chunk * CHUNK > last_position) continue;
    u.chunks = last_position / CHUNK + 1 - first_chunk;
    u.chunk = chunk - first_chunk;
    u.first = max(chunk * CHUNK, first_seen(first_position, a.window, KEYS));
    u.high = min(chunk * CHUNK + CHUNK, last_position + 1);
    const int position = chunk * CHUNK + PIECE * lane;
    u.cache_row = 0;
    if (position < u.high) {
      const int block = position / a.block_size;
      const int* table = a.tables + static_cast<int64_t>(s) * a.table_stride;
      u.cache_row = table[block] * a.block_size + position - block * a.block_size;
    }
    u.index = index;
    return;
  }
  u.index = INT_MAX;
}

// Asks for a stage of keys (or values) from `first` on, as far as the unit has any. Lane i knows where piece i of the chunk is.
__device__ __forceinline__ void fetch(uint8_t* to, uint64_t* barrier, const CUtensorMap* map, const Unit& u, int first,
                                      int lane) {
  const int pieces = max(min((u.high - first + PIECE - 1) / PIECE, STAGE_PIECES), 0), piece = lane - first % CHUNK / PIECE;
  if (lane == 0) barrier_expect(barrier, pieces * PIECE_BYTES);
  if (piece >= 0 && piece < pieces) tma_load(to + piece * PIECE_BYTES, map, barrier, 0, u.cache_row, u.key_head * PANELS);
}

// Values beyond the last key may be anything, NaN too: zeros.
__device__ __forceinline__ void clear_rows(uint8_t* piece, int from, int lane) {
  constexpr int VECTORS = PANEL_BYTES / 16;
  for (int i = lane; i < PANELS * (PIECE - from) * VECTORS; i += 32) {
    const int panel = i / ((PIECE - from) * VECTORS), rest = i % ((PIECE - from) * VECTORS);
    *reinterpret_cast<uint4*>(piece + panel * PIECE * PANEL_BYTES + from * PANEL_BYTES + rest * 16) = make_uint4(0, 0, 0, 0);
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
__device__ __forceinline__ void load_queries(uint32_t (&queries)[Tiles][D / 16][2], const Unit& u, const Arguments& a, int lane) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    const int row = lane / 4 + 8 * n, index = u.tile * 8 * Tiles + row;
    const Element* from = a.q + static_cast<int64_t>(u.start + index / a.group) * a.q_stride +
                          (u.key_head * a.group + index % a.group) * D;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      queries[n][i][0] = row < u.rows ? load_pair(from + 16 * i + query_column(lane, 0)) : 0;
      queries[n][i][1] = row < u.rows ? load_pair(from + 16 * i + query_column(lane, 1)) : 0;
    }
  }
}

// The scores of 16 keys by chains of products over D. address[j]: where this lane reads vectors 2 j and 2 j + 1 of a panel.
template <int Tiles>
__device__ __forceinline__ void multiply_keys(float (&scores)[Tiles][4], const uint32_t (&queries)[Tiles][D / 16][2],
                                              const uint32_t (&address)[STEPS], int offset) {
#pragma unroll
  for (int i = 0; i < ROW_BYTES / 32; ++i) {
    uint32_t m[4];
    load_matrix_x4(m, address[i % STEPS] + offset + i / STEPS * PIECE * PANEL_BYTES);
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
                                                const uint32_t (&address)[STEPS], int offset) {
#pragma unroll
  for (int i = 0; i < ROW_BYTES / 32; ++i) {
    uint32_t m[4];
    load_matrix_x4_transposed(m, address[i % STEPS] + offset + i / STEPS * PIECE * PANEL_BYTES);
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

__device__ __forceinline__ void store_element(const Arguments& a, const Unit& u, int row, int column, float x) {
  const int index = u.tile * a.tile_rows + row;
  if constexpr (FP8) x = __fmul_rn(x, a.v_scale[u.key_head]);
  a.out[(static_cast<int64_t>(u.start + index / a.group) * a.kv_heads * a.group + u.key_head * a.group + index % a.group) * D +
        column] = static_cast<Element>(x);
}
__device__ __forceinline__ void store_lse(const Arguments& a, const Unit& u, int row, float peak, float total) {
  const int index = u.tile * a.tile_rows + row;
  const int64_t head = u.key_head * a.group + index % a.group;
  a.lse[head * a.tokens + u.start + index / a.group] =
      __fmul_rn(__fmaf_rn(peak, score_scale(a, u), log2_approx(total)), 0.6931471805599453f);
}

// Merges the chunks of one row, left to right: a warp's work.
__device__ __forceinline__ void merge_row(const Arguments& a, const Unit& u, int row, int lane) {
  constexpr int AHEAD = D <= 128 ? 16 : 8, WIDTH = (D + 31) / 32;
  const int heads = a.kv_heads * a.tiles;
  const int64_t stride = static_cast<int64_t>(heads) * a.rows * (D + 2);
  const float* from = a.partial + ((u.index - static_cast<int64_t>(u.chunk) * heads) * a.rows + row) * (D + 2);
  const float scale = score_scale(a, u);
  float peak = -INFINITY, total = 0.0f, sums[WIDTH] = {};
  for (int c0 = 0; c0 < u.chunks; c0 += AHEAD) {
    float2 state[AHEAD];
    float parts[AHEAD][WIDTH];
#pragma unroll
    for (int c = 0; c < AHEAD; ++c) {
      const float* chunk = from + min(c0 + c, u.chunks - 1) * stride;
      state[c] = __ldcg(reinterpret_cast<const float2*>(chunk + D));
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) parts[c][i] = lane + 32 * i < D ? __ldcg(chunk + lane + 32 * i) : 0.0f;
    }
#pragma unroll
    for (int c = 0; c < AHEAD; ++c) {
      if (c0 + c < u.chunks) {
        const float next = fmaxf(peak, state[c].x), safe = finite(next);
        const float before = exp2_approx(__fmul_rn(__fsub_rn(peak, safe), scale));
        const float now = exp2_approx(__fmul_rn(__fsub_rn(state[c].x, safe), scale));
        total = __fmaf_rn(total, before, __fmul_rn(state[c].y, now));
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sums[i] = __fmaf_rn(sums[i], before, __fmul_rn(parts[c][i], now));
        peak = next;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    if (lane + 32 * i < D) store_element(a, u, row, lane + 32 * i, divide(sums[i], total));
  }
  if (a.lse && lane == 0) store_lse(a, u, row, peak, total);
}

// What a block keeps beside the warps' keys and values.
struct Shared {
  uint64_t filled[MAX_WARPS][2];  // a warp's keys, its values
  Unit later[MAX_LATER];          // units whose chunks are to be merged at the end
  int later_count;
};

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
                                       const float (&reference)[Tiles][2], const float (&lanes)[Tiles][2], Shared& shared,
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
      if (lane == 0) place = atomicAdd(&shared.later_count, 1);
      place = __shfl_sync(~0u, place, 0);
    }
    if (place < MAX_LATER) {
      if (lane == 0) shared.later[place] = u;
    } else {
      for (int row = 0; row < u.rows; ++row) merge_row(a, u, row, lane);
    }
  }
}

// Tiles: of 8 query rows.
template <int Tiles, bool Capped>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
    decode_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  uint8_t* const key_block = memory + warp * 2 * STAGE_BYTES;
  uint8_t* const value_block = key_block + STAGE_BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(memory + warps * 2 * STAGE_BYTES);
  int* ends = reinterpret_cast<int*>(&shared + 1);
  uint64_t* filled = shared.filled[warp];
  if (lane == 0) {
    barrier_init(&filled[0], 1);
    barrier_init(&filled[1], 1);
    fence_barrier_init();
  }
  if (threadIdx.x == 0) shared.later_count = 0;
  // Where this lane reads matrices: keys as they are (16 keys, 2 vectors), values transposed (2 vectors, 16 keys).
  uint32_t key_address[STEPS], value_address[STEPS];
  const int key_row = lane % 16, value_row = lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int j = 0; j < STEPS; ++j) {
    key_address[j] = shared_address(key_block) + key_row * PANEL_BYTES + ((2 * j + lane / 16) ^ swizzle(key_row)) * 16;
    value_address[j] = shared_address(value_block) + value_row * PANEL_BYTES + ((2 * j + lane / 8 % 2) ^ swizzle(value_row)) * 16;
  }
  const int stride = gridDim.x * warps;
  count_chunks(a, ends);

  Unit unit;
  find_unit(unit, a, ends, warp * gridDim.x + blockIdx.x, stride, lane);
  if (unit.index != INT_MAX) {
    fetch(key_block, &filled[0], &k_map, unit, unit.first, lane);
    fetch(value_block, &filled[1], &v_map, unit, unit.first, lane);
  }
  uint32_t queries[Tiles][D / 16][2];
  float sums[Tiles][D / 16][4];
  float reference[Tiles][2], lanes[Tiles][2];
  bool fresh = true;
  int key_parity = 0, value_parity = 0;
  while (unit.index != INT_MAX) {
    if (fresh) {
      load_queries<Tiles>(queries, unit, a, lane);
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
#pragma unroll
        for (int i = 0; i < D / 16; ++i) sums[n][i][0] = sums[n][i][1] = sums[n][i][2] = sums[n][i][3] = 0.0f;
        reference[n][0] = reference[n][1] = -INFINITY;
        lanes[n][0] = lanes[n][1] = 0.0f;
      }
    }
    // The block after this one, perhaps of another unit.
    const int first = unit.first;
    const bool last = first + KEYS >= unit.high;
    Unit next = unit;
    if (last) find_unit(next, a, ends, unit.index + stride, stride, lane);
    else next.first = first + KEYS;
    const bool more = next.index != INT_MAX;

    float scores[PIECES][Tiles][4];
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_wait(&filled[0], key_parity);
      key_parity ^= 1;
#pragma unroll
      for (int piece = 0; piece < STAGE_PIECES; ++piece) {
        const int t = stage * STAGE_PIECES + piece;
#pragma unroll
        for (int n = 0; n < Tiles; ++n) scores[t][n][0] = scores[t][n][1] = scores[t][n][2] = scores[t][n][3] = 0.0f;
        if (first + t * PIECE < unit.high) multiply_keys<Tiles>(scores[t], queries, key_address, piece * PIECE_BYTES);
      }
      __syncwarp();
      if (stage + 1 < STAGES) {
        fetch(key_block, &filled[0], &k_map, unit, first + (stage + 1) * STAGE_PIECES * PIECE, lane);
      } else if (more) {
        fetch(key_block, &filled[0], &k_map, next, next.first, lane);
      }
    }

    const float scale = score_scale(a, unit);
    const int first_position = unit.lead + unit.tile * 8 * Tiles / a.group;
    const bool masked = a.window || first + KEYS > first_position + 1;
    bool grew = false;
    float shrink[Tiles][2];
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        if constexpr (Capped) {
          const float cap_in = FP8 ? __fmul_rn(a.cap_in, a.k_scale[unit.key_head]) : a.cap_in;
#pragma unroll
          for (int i = 0; i < KEYS / 8; ++i) {
            float& score = scores[i / 2][n][i % 2 * 2 + l];
            const float e = exp2_approx(__fmul_rn(score, cap_in));
            score = __fmaf_rn(__fmul_rn(-2.0f, a.cap_out), divide(1.0f, __fadd_rn(1.0f, e)), a.cap_out);
          }
        }
        if (masked) {
          const int position = unit.lead + (unit.tile * 8 * Tiles + 8 * n + 2 * (lane % 4) + l) / a.group;
#pragma unroll
          for (int i = 0; i < KEYS / 8; ++i) {
            const int key = first + 8 * i + lane / 4;
            if (key > position || (a.window && key <= position - a.window)) scores[i / 2][n][i % 2 * 2 + l] = -INFINITY;
          }
        }
        float peak = scores[0][n][l];
#pragma unroll
        for (int i = 1; i < KEYS / 8; ++i) peak = fmaxf(peak, scores[i / 2][n][i % 2 * 2 + l]);
        peak = column_max(peak);
        const bool grows = __fmul_rn(__fsub_rn(peak, reference[n][l]), scale) > MAX_GROWTH;
        const float renewed = grows ? peak : reference[n][l], safe = finite(renewed);
        shrink[n][l] = exp2_approx(__fmul_rn(__fsub_rn(reference[n][l], safe), scale));
        grew |= grows;
        const float shift = -__fmul_rn(safe, scale);
        float weights[KEYS / 8];
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
          float& score = scores[i / 2][n][i % 2 * 2 + l];
          score = exp2_approx(__fmaf_rn(score, scale, shift));
          weights[i] = score;
        }
        lanes[n][l] = __fmaf_rn(lanes[n][l], shrink[n][l], tree_sum(weights));
        reference[n][l] = renewed;
      }
    }
    if (__any_sync(~0u, grew)) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[n][i][j] = __fmul_rn(sums[n][i][j], shrink[n][j % 2]);
        }
      }
    }

#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const int start = first + stage * STAGE_PIECES * PIECE, left = unit.high - start;
      barrier_wait(&filled[1], value_parity);
      value_parity ^= 1;
      if (left > 0 && left < STAGE_PIECES * PIECE && left % PIECE) {
        clear_rows(value_block + left / PIECE * PIECE_BYTES, left % PIECE, lane);
      }
#pragma unroll
      for (int piece = 0; piece < STAGE_PIECES; ++piece) {
        const int t = stage * STAGE_PIECES + piece;
        uint32_t weights[Tiles][2];
#pragma unroll
        for (int n = 0; n < Tiles; ++n) {
          weights[n][0] = transpose(pack(scores[t][n][0], scores[t][n][1], Product{}));
          weights[n][1] = transpose(pack(scores[t][n][2], scores[t][n][3], Product{}));
        }
        if (first + t * PIECE < unit.high) multiply_values<Tiles>(sums, weights, value_address, piece * PIECE_BYTES);
      }
      __syncwarp();
      if (stage + 1 < STAGES) {
        fetch(value_block, &filled[1], &v_map, unit, start + STAGE_PIECES * PIECE, lane);
      } else if (more) {
        fetch(value_block, &filled[1], &v_map, next, next.first, lane);
      }
    }
    if (last) finish<Tiles>(a, unit, sums, reference, lanes, shared, lane);
    fresh = last;
    unit = next;
  }

  __syncthreads();
  const int later = min(shared.later_count, MAX_LATER);
  for (int i = warp; i < later * a.rows; i += warps) {
    const Unit& u = shared.later[i / a.rows];
    if (i % a.rows < u.rows) merge_row(a, u, i % a.rows, lane);
  }
}

bool make_map(CUtensorMap* map, const Cached* cache, const Arguments& a) {
  const uint64_t sizes[3] = {PANEL_BYTES / sizeof(Cached), static_cast<uint64_t>(a.cache_rows),
                             static_cast<uint64_t>(a.kv_heads) * PANELS};
  const uint64_t strides[2] = {static_cast<uint64_t>(a.kv_heads) * ROW_BYTES, PANEL_BYTES};
  const uint32_t box[3] = {PANEL_BYTES / sizeof(Cached), PIECE, PANELS};
  const CUtensorMapDataType type = FP8                                   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map(map, type, 3, cache, sizes, strides, box,
                         PANEL_BYTES == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : PANEL_BYTES == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                             : CU_TENSOR_MAP_SWIZZLE_32B);
}

template <int Tiles, bool Capped>
cudaError_t launch(const Arguments& a, int multiprocessors, int shared_bytes, int max_warps, cudaStream_t stream) {
  CUtensorMap k_map, v_map;
  if (!make_map(&k_map, a.k_cache, a) || !make_map(&v_map, a.v_cache, a)) return cudaErrorInvalidValue;
  const int extra = sizeof(Shared) + sizeof(int) * a.num_seqs;
  const int warps = min(min(max_warps, MAX_WARPS), (shared_bytes - extra) / (2 * STAGE_BYTES));
  if (warps < 1) return cudaErrorInvalidConfiguration;
  const int bytes = warps * 2 * STAGE_BYTES + extra;
  const auto kernel = decode_kernel<Tiles, Capped>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<multiprocessors, 32 * warps, bytes, stream>>>(a, k_map, v_map);
  return cudaGetLastError();
}

}  // namespace mainspring

extern "C" int mainspring_paged_decode(const mainspring::Arguments* a, int multiprocessors, int shared_bytes, int max_warps,
                                       cudaStream_t stream) {
  using namespace mainspring;
  const bool capped = a->cap_out != 0.0f;
  if (a->tile_rows == 8) {
    return capped ? launch<1, true>(*a, multiprocessors, shared_bytes, max_warps, stream)
                  : launch<1, false>(*a, multiprocessors, shared_bytes, max_warps, stream);
  }
  return capped ? launch<2, true>(*a, multiprocessors, shared_bytes, max_warps, stream)
                : launch<2, false>(*a, multiprocessors, shared_bytes, max_warps, stream);
}
