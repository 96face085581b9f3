// FlashAttention forward for Hopper: softmax(scale Q Kᵀ) V over packed sequences, 16-bit inputs, fp32 sums
// (Dao et al. 2022; Shah et al. 2024 for the overlap on Hopper).
//
// A block is persistent: its producer warp fetches tiles of queries and the blocks of keys and values they see by bulk
// tensor copies, each warpgroup of consumers owns 64 queries of a tile. A warpgroup queues the scores of the next block
// together with the output of the last one; warpgroups take turns (named barriers) in queueing products, so that the
// softmax of one falls into the products of the others. Blocks of keys go from the last to the first: those that a mask
// cuts come first (and, with a window, last), and the loop between knows no mask.
//
// In canonical order (canonical.cuh) they go from the first to the last, and each chunk's sums, once complete, join those of
// the chunks before it in shared memory: the bits of a row depend on nothing beside it.
//
// Keys and values are packed as the queries are, or (MAINSPRING_PAGED) lie in the blocks of a cache.
//
// Defines: MAINSPRING_TYPE, MAINSPRING_HEAD_DIM, MAINSPRING_CAUSAL, MAINSPRING_WINDOWED, MAINSPRING_SOFTCAP,
// MAINSPRING_CANONICAL, MAINSPRING_PAGED (0 or 1), and of tuning MAINSPRING_GROUPS (consumer warpgroups), MAINSPRING_KEYS (of a block),
// MAINSPRING_STAGES, MAINSPRING_REGISTERS (of a consumer), MAINSPRING_TURNS (0 or 1).
#include "flash_schedule.cuh"
#include "flash_softmax.cuh"
#include "flash_tiles.cuh"
#include "tensor_map.h"

#include <type_traits>

namespace mainspring {

using T = MAINSPRING_TYPE;
constexpr int kHeadDim = MAINSPRING_HEAD_DIM;
constexpr int kGroups = MAINSPRING_GROUPS;
constexpr int kRows = 64 * kGroups;
constexpr int kKeys = MAINSPRING_KEYS;
constexpr int kStages = MAINSPRING_STAGES;
constexpr bool kCausal = MAINSPRING_CAUSAL;
constexpr bool kWindowed = MAINSPRING_WINDOWED;
constexpr bool kSoftcap = MAINSPRING_SOFTCAP;
constexpr bool kCanonical = MAINSPRING_CANONICAL;
constexpr bool kPaged = MAINSPRING_PAGED;
static_assert(!kCanonical || kKeys == canonical_unit(kHeadDim), "a block of keys is a unit of the canonical order");
constexpr bool kTurns = MAINSPRING_TURNS;
// A block starts with 168 (3 warpgroups) or 128 (4) registers a thread; the roles then share the same sum.
constexpr int kConsumerRegisters = MAINSPRING_REGISTERS;
constexpr int kProducerRegisters = (kGroups == 2 ? 3 * 168 : 4 * 128) - kGroups * kConsumerRegisters;
static_assert((kGroups == 2 || kGroups == 3) && kProducerRegisters >= 24, "two or three warpgroups of consumers");
constexpr int kThreads = 128 * (kGroups + 1);

using P = Panels<kHeadDim>;
using Schedule = FlashSchedule<kRows, kKeys, kCausal, kWindowed, kPaged>;
constexpr int kPiece = 16;  // keys of one copy from a paged cache, every block of which holds a multiple
constexpr int kPieces = kKeys / kPiece;
static_assert(!kPaged || (kCanonical && kPieces * P::kCount <= 32), "a lane of the producer copies one panel of a piece");

struct alignas(1024) Shared {
  T q[kGroups][64 * kHeadDim];
  T k[kStages][kKeys * kHeadDim];
  T v[kStages][kKeys * kHeadDim];
  float4 merged[kCanonical ? kGroups : 1][kCanonical ? kHeadDim / 8 * 128 : 1];  // see MergedChunks
  float2 states[kCanonical ? kRows : 1];
  FlashTile tile[2];
  uint64_t q_full[kGroups], q_free[kGroups];
  uint64_t k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  uint64_t tile_full[2], tile_free[2];
};
static_assert(sizeof(Shared) <= 227 * 1024, "a block has 227 KB of shared memory");

struct Arguments {
  FlashLengths lengths;
  T* out;       // [tokens, heads, kHeadDim]
  float* lse;   // [heads, tokens] or null
  const int* tables;  // paged: [sequences, *], blocks of the cache, rows table_stride apart
  int table_stride, block_size;
  Divisor by_block_size;
  int tokens;
  float factor;    // of the scores, before a power of two is taken
  float cap_in, cap_out;  // see capped
  float slack;     // see online_softmax
};

// Place and parity in a ring of `Size`.
template <int Size>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Size) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where the keys of a block of the tile are: packed, its first token; paged, the row of the cache of the piece that this
// lane copies a panel of, or -1.
__device__ __forceinline__ int find_keys(const Arguments& p, const FlashTile& tile, int block, int lane) {
  if (!kPaged) return tile.first_key + block * kKeys;
  const int position = block * kKeys + lane % kPieces * kPiece;
  if (lane >= kPieces * P::kCount || position >= tile.keys) return -1;
  const int entry = p.by_block_size.divide(position);
  return (p.tables[static_cast<int64_t>(tile.first_key) * p.table_stride + entry] - entry) * p.block_size + position;
}

// Copies blocks of keys, or of values, into their ring of stages; called by all threads of one warp.
struct BlockCopies {
  T* stages;
  uint64_t *full, *free;
  const CUtensorMap* map;
  Ring<kStages> ring;

  __device__ __forceinline__ void load(int row, int kv_head, bool leader, int lane) {
    constexpr int kElements = kKeys * kHeadDim;
    T* const to = stages + ring.stage * kElements;
    uint64_t* const barrier = &full[ring.stage];
    barrier_wait(&free[ring.stage], ring.parity ^ 1);
    if (kPaged) {
      const int copies = __popc(__ballot_sync(~0u, row >= 0));
      if (leader) barrier_expect(barrier, copies * (kPiece * P::kRowBytes));
      __syncwarp();
      const int panel = lane / kPieces;
      if (row >= 0) {
        tma_load(to + (panel * kKeys + lane % kPieces * kPiece) * P::kColumns, map, barrier, 0, row, panel, kv_head);
      }
    } else if (leader) {
      barrier_expect(barrier, kElements * sizeof(T));
      tma_load(to, map, barrier, 0, row, 0, kv_head);
    }
    __syncwarp();
    ring.advance();
  }
};

// Hands out tiles and copies queries, keys and (packed) values.
__device__ __forceinline__ void produce(Shared& shared, const Arguments& p, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
  const bool leader = elect_one();
  const int lane = threadIdx.x % 32;
  Schedule schedule(p.lengths);
  BlockCopies keys{shared.k[0], shared.k_full, shared.k_free, k_map};
  BlockCopies values{shared.v[0], shared.v_full, shared.v_free, v_map};
  Ring<2> slot;
  uint32_t q_parity = 0;
  while (true) {
    FlashTile& tile = shared.tile[slot.stage];  // read again where needed: registers are few
    {
      const FlashTile found = schedule.next();
      barrier_wait(&shared.tile_free[slot.stage], slot.parity ^ 1);
      if (leader) {
        tile = found;
        barrier_arrive(&shared.tile_full[slot.stage]);
      }
      __syncwarp();
      if (found.head < 0) return;
    }
    slot.advance();
    if (tile.high > tile.low) {
      const int head = tile.head, kv_head = head / p.lengths.group;
      int block = kCanonical ? tile.low : tile.high - 1;
      const int last = kCanonical ? tile.high - 1 : tile.low;
      int row = find_keys(p, tile, block, lane);
      keys.load(row, kv_head, leader, lane);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        barrier_wait(&shared.q_free[g], q_parity ^ 1);
        if (leader) {
          barrier_expect(&shared.q_full[g], sizeof(shared.q[0]));
          tma_load(shared.q[g], q_map, &shared.q_full[g], 0, tile.first + 64 * g, 0, head);
        }
        __syncwarp();
      }
      // Values follow one block behind the keys, as the consumers want them.
      while (block != last) {
        block += kCanonical ? 1 : -1;
        const int next = find_keys(p, tile, block, lane);
        keys.load(next, kv_head, leader, lane);
        if (!kPaged) values.load(row, kv_head, leader, lane);
        row = next;
      }
      if (!kPaged) values.load(row, kv_head, leader, lane);
      q_parity ^= 1;
    }
  }
}

// The values of a paged cache, by a warp of their own: the pieces of a block are many copies.
__device__ __forceinline__ void produce_values(Shared& shared, const Arguments& p, const CUtensorMap* v_map) {
  const bool leader = elect_one();
  const int lane = threadIdx.x % 32;
  BlockCopies values{shared.v[0], shared.v_full, shared.v_free, v_map};
  Ring<2> slot;
  while (true) {
    barrier_wait(&shared.tile_full[slot.stage], slot.parity);
    const FlashTile& tile = shared.tile[slot.stage];
    if (tile.head < 0) return;
    const int kv_head = tile.head / p.lengths.group;
    for (int block = tile.low; block < tile.high; ++block) {
      values.load(find_keys(p, tile, block, lane), kv_head, leader, lane);
    }
    if (leader) barrier_arrive(&shared.tile_free[slot.stage]);
    slot.advance();
  }
}

__device__ __forceinline__ void consume(Shared& shared, const Arguments& p, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int my_row = 64 * group + thread / 32 * 16 + lane / 4;  // of the tile; the other one is 8 further
  const int my_column = 2 * (lane % 4);
  constexpr int kTurn = 1, kOwn = 1 + kGroups;  // named barriers: whose turn it is; a warpgroup's own
  const auto my_turn = [&] {
    if (kTurns) named_sync(kTurn + group, 256);
  };
  const auto next_turn = [&] {
    if (kTurns) named_arrive(kTurn + (group + 1 == kGroups ? 0 : group + 1), 256);
  };
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };

  const uint64_t q_tile = P::descriptor(shared.q[group], 0);
  const uint64_t k_tiles = P::descriptor(shared.k[0], 0);
  const uint64_t v_tiles = P::descriptor(shared.v[0], kKeys * P::kRowBytes);
  constexpr uint64_t kStageStep = sizeof(shared.k[0]) >> 4;

  float s[kKeys / 2], o[kHeadDim / 2], rescale[2], peak[2], total[2];
  uint32_t weights[kKeys / 16][4];
  RowState<kCanonical> state;
  MergedChunks merged{&shared.merged[kCanonical ? group : 0][kCanonical ? thread : 0],
                      &shared.states[kCanonical ? my_row : 0], true};
  Ring<kStages> key, value;
  Ring<2> slot;
  uint32_t q_parity = 0;
  if (kTurns && group == 0) named_arrive(kTurn, 256);

  const auto start_scores = [&] {
    wgmma_touch(s);
    wgmma_fence();
    multiply_keys<T, kHeadDim, kKeys>(s, q_tile, k_tiles + key.stage * kStageStep);
    wgmma_commit();
  };
  while (true) {
    barrier_wait(&shared.tile_full[slot.stage], slot.parity);
    const FlashTile& tile = shared.tile[slot.stage];
    // By a reduction, whose result lies in a uniform register: then conditions and addresses that follow from it do, too,
    // and products' descriptors need no moves from vector registers. For the same reason the first scores stand under no
    // condition: where the tile sees no key, they are of whatever lies in shared memory and nobody looks at them.
    const auto uniform = [](int x) { return __reduce_max_sync(~0u, x); };
    const int head = uniform(tile.head), low = uniform(tile.low), high = uniform(tile.high);
    const bool some = head >= 0 && high > low;
    if (some) {
      barrier_wait(&shared.q_full[group], q_parity);
      q_parity ^= 1;
      barrier_wait(&shared.k_full[key.stage], key.parity);
    }
    start_scores();
    wgmma_wait<0>();
    wgmma_touch(s);
    if (head < 0) break;

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    state.reset();
    merged.none = true;

    if (some) {
      const int lead = uniform(tile.position), keys_end = uniform(tile.keys);
      const int position = lead + my_row;  // in keys, of this thread's first row

      // Scores in `s` to weights. Masked: whether a mask may cut this block.
      const auto softmax = [&](int block, auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        if (kSoftcap) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) s[i] = capped(s[i], p.cap_in, p.cap_out);
        }
        if (kMasked) {
          SeenColumns seen;
          const int first = block * kKeys + my_column;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int end = kCausal ? min(keys_end, position + 8 * j + 1) : keys_end;
            seen.high[j] = end - first;
            seen.low[j] = kWindowed ? position + 8 * j + 1 - p.lengths.window - first : 0;
          }
          mask_scores<kWindowed>(s, seen);
        }
        online_softmax<kMasked>(s, state, rescale, p.factor, p.slack);
      };
      const auto start_output = [&] {
        wgmma_touch(o);
        wgmma_fence();
        multiply_values<T, kHeadDim>(o, weights, v_tiles + value.stage * kStageStep);
        wgmma_commit();
      };

      // Keys past a sequence's end belong to the next one: their weights are zero, but zero times NaN is none.
      const auto clear_tail = [&](int block) {
        const int keys = keys_end - block * kKeys;
        if (keys < kKeys) {
          barrier_wait(&shared.v_full[value.stage], value.parity);
          clear_rows<kHeadDim, kKeys>(shared.v[value.stage], keys, kOwn + group);
        }
      };

      int block = kCanonical ? low : high - 1;
      release(&shared.k_free[key.stage]);
      key.advance();
      softmax(block, std::true_type());
      to_operand<T>(weights, s);
      if (!kCanonical) clear_tail(block);

      // The scores and weights of `block`, and the output of the block before it.
      const auto step = [&](int block, auto masked) {
        barrier_wait(&shared.k_full[key.stage], key.parity);
        my_turn();
        start_scores();
        barrier_wait(&shared.v_full[value.stage], value.parity);
        start_output();
        next_turn();
        wgmma_wait<1>();
        wgmma_touch(s);
        release(&shared.k_free[key.stage]);
        key.advance();
        const bool new_chunk = kCanonical && block % (kCanonicalChunk / kKeys) == 0;
        RowState<kCanonical> chunk;
        if (new_chunk) {
          chunk = state;
          state.reset();
        }
        softmax(block, masked);
        wgmma_wait<0>();
        wgmma_touch(o);
        release(&shared.v_free[value.stage]);
        value.advance();
        to_operand<T>(weights, s);
        if (new_chunk) {
          merged.add<false>(o, chunk, p.factor, peak, total);
        } else if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) o[i] = __fmul_rn(o[i], rescale[i / 2 % 2]);
        }
      };

      // Blocks from `cut` on the tile's first query does not see whole; those before `open` a window may cut.
      const int cut = max(low, (lead + 1) / kKeys);
      const int open =
          kWindowed ? max(low, (lead + kRows - p.lengths.window + kKeys - 1) / kKeys) : low;
      if (kCanonical) {
        const int uncut = kCausal ? min(cut, high) : keys_end / kKeys;
        ++block;
        if (kWindowed) {
#pragma unroll 1
          for (; block < min(open, high); ++block) step(block, std::true_type());
        }
#pragma unroll 1
        for (; block < uncut; ++block) step(block, std::false_type());
#pragma unroll 1
        for (; block < high; ++block) step(block, std::true_type());
      } else {
        --block;
        if (kCausal) {
#pragma unroll 1
          for (; block >= cut; --block) step(block, std::true_type());
        }
#pragma unroll 1
        for (; block >= open; --block) step(block, std::false_type());
        if (kWindowed) {
#pragma unroll 1
          for (; block >= low; --block) step(block, std::true_type());
        }
      }
      release(&shared.q_free[group]);

      if (kCanonical) clear_tail(high - 1);
      barrier_wait(&shared.v_full[value.stage], value.parity);
      start_output();
      wgmma_wait<0>();
      wgmma_touch(o);
      release(&shared.v_free[value.stage]);
      value.advance();
    }

    float inverse[2];
    T* rows[2];
    bool there[2];
    if (kCanonical && !merged.none) merged.add<true>(o, state, p.factor, peak, total);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = my_row + 8 * j;
      if (!kCanonical || merged.none) peak[j] = state.peak[j], total[j] = state.whole_total(j);
      const bool empty = total[j] == 0.0f;
      there[j] = row < tile.rows;
      const int64_t token = tile.first + row;
      rows[j] = p.out + (token * p.lengths.heads + head) * kHeadDim;
      if (there[j] && lane % 4 == 0 && p.lse) {
        p.lse[static_cast<int64_t>(head) * p.tokens + token] = empty ? -INFINITY : log_sum(peak[j], total[j], p.factor);
      }
      if (empty) total[j] = 1.0f;  // of no keys: the sums are zero
      inverse[j] = divide(1.0f, total[j]);
    }
    __syncwarp();
    release(&shared.tile_free[slot.stage]);
    slot.advance();
    store_rows<T>(o, rows, there, [&](float x, int j) { return __fmaf_rn(x, inverse[j], 0.0f); });
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    flash_forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Arguments p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024 != 0) __trap();
    constexpr int kWarps = 4 * kGroups;  // that release what all consumers read
    for (int i = 0; i < kGroups; ++i) {
      barrier_init(&shared.q_full[i], 1);
      barrier_init(&shared.q_free[i], 4);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.k_full[i], 1);
      barrier_init(&shared.k_free[i], kWarps);
      barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.v_free[i], kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.tile_full[i], 1);
      barrier_init(&shared.tile_free[i], kWarps + (kPaged ? 1 : 0));
    }
    fence_barrier_init();
    prefetch_tensor_map(&q_map);
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
  }
  __syncthreads();
  // Through lane 0, so that the compiler knows it to be the same in a warp.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == kGroups) {
    registers_decrease<kProducerRegisters>();
    if (threadIdx.x / 32 == 4 * kGroups) produce(shared, p, &q_map, &k_map, &v_map);
    if (kPaged && threadIdx.x / 32 == 4 * kGroups + 1) produce_values(shared, p, &v_map);
  } else {
    registers_increase<kConsumerRegisters>();
    consume(shared, p, group);
  }
}

// A map of x [tokens, heads, kHeadDim] whose boxes are `rows` tokens of one head, `panels` of them, one after another.
bool map_heads(CUtensorMap* map, const void* x, int tokens, int heads, int64_t token_stride, int64_t head_stride,
               int rows, int panels) {
  const uint64_t sizes[4] = {P::kColumns, static_cast<uint64_t>(tokens), P::kCount, static_cast<uint64_t>(heads)};
  const uint64_t strides[3] = {static_cast<uint64_t>(token_stride) * 2, P::kRowBytes,
                               static_cast<uint64_t>(head_stride) * 2};
  const uint32_t box[4] = {P::kColumns, static_cast<uint32_t>(rows), static_cast<uint32_t>(panels), 1};
  const auto type = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map(map, type, 4, x, sizes, strides, box,
                         P::kColumns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace mainspring

// Arguments of the launcher, as ops/cuda/flash_forward.py lays them out. Strides in elements.
struct FlashForwardCall {
  const void *q, *k, *v;  // k, v: packed tokens, or (MAINSPRING_PAGED) the rows of a cache, blocks end to end
  void* out;
  float* lse;             // or null
  const int* cu_q;
  const int* cu_k;        // paged: [sequences], keys of each
  const int* tables;      // paged: blocks of the cache
  int* counter;           // 4 bytes of device memory for the schedule
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  int tokens_q, tokens_k, heads_q, heads_k, sequences, table_stride, block_size;
  int longer_than;        // sequences of at most so many queries are left out
  int window;
  int cache_bytes;        // what keys and values may take of the L2 cache
  float factor;           // of q kᵀ (or of what `capped` makes of it) in the exponents of two
  float cap_in, cap_out;  // see capped
  float slack;
};

// Returns a cudaError_t.
extern "C" int mainspring_flash_forward(const FlashForwardCall* call, cudaStream_t stream) {
  using namespace mainspring;
  const FlashForwardCall& c = *call;
  CUtensorMap q_map, k_map, v_map;
  const int rows = kPaged ? kPiece : kKeys, panels = kPaged ? 1 : P::kCount;
  if (!map_heads(&q_map, c.q, c.tokens_q, c.heads_q, c.q_token, c.q_head, 64, P::kCount) ||
      !map_heads(&k_map, c.k, c.tokens_k, c.heads_k, c.k_token, c.k_head, rows, panels) ||
      !map_heads(&v_map, c.v, c.tokens_k, c.heads_k, c.v_token, c.v_head, rows, panels)) {
    return cudaErrorInvalidValue;
  }
  Arguments p;
  p.lengths = {c.cu_q, c.cu_k, c.counter, c.sequences, c.heads_q, c.heads_q / c.heads_k, c.cache_bytes / (4 * kHeadDim),
               c.window, c.longer_than};
  p.out = static_cast<T*>(c.out);
  p.lse = c.lse;
  p.tables = c.tables;
  p.table_stride = c.table_stride;
  p.block_size = c.block_size;
  p.by_block_size = Divisor(c.block_size);
  p.tokens = c.tokens_q;
  p.factor = c.factor;
  p.cap_in = c.cap_in;
  p.cap_out = c.cap_out;
  p.slack = kCanonical ? kCanonicalSlack : c.slack;

  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(flash_forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  }
  if (error == cudaSuccess) error = cudaMemsetAsync(c.counter, 0, 4, stream);
  if (error != cudaSuccess) return error;
  // As many tiles as there can be, whatever the lengths are.
  const int64_t tiles = (static_cast<int64_t>(c.tokens_q) / kRows + c.sequences) * c.heads_q;
  const int64_t blocks = tiles < multiprocessors ? tiles : multiprocessors;
  flash_forward_kernel<<<static_cast<unsigned>(blocks), kThreads, sizeof(Shared), stream>>>(q_map, k_map, v_map, p);
  return cudaGetLastError();
}
