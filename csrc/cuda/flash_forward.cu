// FlashAttention forward for Hopper: softmax(scale Q Kᵀ) V over packed sequences, 16-bit inputs, fp32 sums
// (Dao et al. 2022; Shah et al. 2024 for the overlap on Hopper).
//
// A block is persistent: its producer warp fetches tiles of queries and the blocks of keys and values they see by bulk
// tensor copies, each warpgroup of consumers owns 64 queries of a tile. A warpgroup queues the scores of the next block
// together with the output of the last one; warpgroups take turns (named barriers) in queueing products, so that the
// softmax of one falls into the products of the others. Blocks of keys go from the last to the first: those that a mask
// cuts come first (and, with a window, last), and the loop between knows no mask.
//
// In canonical order (docs/design.md) they go from the first to the last, the softmax in units of kUnit keys, each chunk
// of kChunk keys on its own, chunks merged left to right: the bits of a row depend on nothing beside it. The formulas are
// those of ops/triton/attention.py; the bits are not yet (some tens of 16-bit results in a million differ).
//
// Defines: MAINSPRING_TYPE, MAINSPRING_HEAD_DIM, MAINSPRING_CAUSAL, MAINSPRING_WINDOWED, MAINSPRING_SOFTCAP,
// MAINSPRING_CANONICAL (0 or 1), and of tuning MAINSPRING_GROUPS (consumer warpgroups), MAINSPRING_KEYS (of a block),
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
constexpr int kChunk = 512;
constexpr int kUnit = !kCanonical ? kKeys : kHeadDim <= 64 ? 128 : 64;  // keys of one step of the online softmax
constexpr int kUnits = kKeys / kUnit;
static_assert(kKeys % kUnit == 0 && kUnits <= 2 && (!kCanonical || kChunk % kKeys == 0), "keys make up units and chunks");
constexpr bool kTurns = MAINSPRING_TURNS;
// A block starts with 168 (3 warpgroups) or 128 (4) registers a thread; the roles then share the same sum.
constexpr int kConsumerRegisters = MAINSPRING_REGISTERS;
constexpr int kProducerRegisters = (kGroups == 2 ? 3 * 168 : 4 * 128) - kGroups * kConsumerRegisters;
static_assert((kGroups == 2 || kGroups == 3) && kProducerRegisters >= 24, "two or three warpgroups of consumers");
constexpr int kThreads = 128 * (kGroups + 1);

using P = Panels<kHeadDim>;
using Schedule = FlashSchedule<kRows, kKeys, kCausal, kWindowed>;

struct alignas(1024) Shared {
  T q[kGroups][64 * kHeadDim];
  T k[kStages][kKeys * kHeadDim];
  T v[kStages][kKeys * kHeadDim];
  float4 whole[kCanonical ? kGroups : 1][kCanonical ? kHeadDim / 8 * 128 : 1];  // see merge_chunk
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
  float* lse;   // [heads, tokens]
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

__device__ __forceinline__ void produce(Shared& shared, const Arguments& p, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
  constexpr uint32_t kQueryBytes = sizeof(shared.q[0]), kKeyBytes = sizeof(shared.k[0]);
  const bool leader = elect_one();
  Schedule schedule(p.lengths);
  Ring<kStages> key, value;
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
      const int head = tile.head, kv_head = head / p.lengths.group, first = tile.first, first_key = tile.first_key;
      const int high = tile.high, low = tile.low;
      const auto load = [&](T* to, const CUtensorMap* map, uint64_t* full, uint64_t* free, uint32_t parity, int block) {
        barrier_wait(free, parity ^ 1);
        if (leader) {
          barrier_expect(full, kKeyBytes);
          tma_load(to, map, full, 0, first_key + block * kKeys, 0, kv_head);
        }
        __syncwarp();
      };
      const auto load_value = [&](int block) {
        load(shared.v[value.stage], v_map, &shared.v_full[value.stage], &shared.v_free[value.stage], value.parity, block);
        value.advance();
      };
      const auto load_key = [&](int block) {
        load(shared.k[key.stage], k_map, &shared.k_full[key.stage], &shared.k_free[key.stage], key.parity, block);
        key.advance();
      };
      int block = kCanonical ? low : high - 1;
      const int last = kCanonical ? high - 1 : low;
      load_key(block);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        barrier_wait(&shared.q_free[g], q_parity ^ 1);
        if (leader) {
          barrier_expect(&shared.q_full[g], kQueryBytes);
          tma_load(shared.q[g], q_map, &shared.q_full[g], 0, first + 64 * g, 0, head);
        }
        __syncwarp();
      }
      // Values follow one block behind the keys, as the consumers want them.
      for (; block != last; block += kCanonical ? 1 : -1) {
        load_key(kCanonical ? block + 1 : block - 1);
        load_value(block);
      }
      load_value(last);
      q_parity ^= 1;
    }
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

  float s[kKeys / 2], o[kHeadDim / 2], rescale[kUnits][2];
  uint32_t weights[kKeys / 16][4];
  RowState state;
  float4* const whole = &shared.whole[kCanonical ? group : 0][kCanonical ? thread : 0];
  float2* const states = &shared.states[kCanonical ? my_row : 0];
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
    bool first_chunk = true;

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
        online_softmax<kMasked, kCanonical, 0, kUnit>(s, state, rescale[0], p.factor, p.slack);
        if constexpr (kUnits == 2) {
          online_softmax<kMasked, kCanonical, kUnit, kUnit>(s, state, rescale[1], p.factor, p.slack);
        }
      };
      const auto rescale_output = [&](const float (&by)[2]) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = __fmul_rn(o[i], by[i / 2 % 2]);
      };
      const auto moved = [&](const float (&by)[2]) { return __any_sync(~0u, by[0] != 1.0f || by[1] != 1.0f); };
      const auto start_output = [&] {
        wgmma_touch(o);
        wgmma_fence();
        const uint64_t v_tile = v_tiles + value.stage * kStageStep;
        multiply_values<T, kHeadDim, 0, kUnit>(o, weights, v_tile);
        if constexpr (kUnits == 2) {
          if (moved(rescale[1])) {
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_touch(o);
            rescale_output(rescale[1]);
            wgmma_touch(o);
            wgmma_fence();
          }
          multiply_values<T, kHeadDim, kUnit, kUnit>(o, weights, v_tile);
        }
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
        const bool new_chunk = kCanonical && block % (kChunk / kKeys) == 0;
        RowState chunk;
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
          merge_chunk(whole, states, first_chunk, false, o, chunk, p.factor);
          first_chunk = false;
        } else if (moved(rescale[0])) {
          rescale_output(rescale[0]);
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

    float total[2], factor[2];
    T* rows[2];
    bool there[2];
    if (kCanonical) merge_chunk(whole, states, first_chunk, true, o, state, p.factor);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = my_row + 8 * j;
      total[j] = kCanonical ? state.total[j] : sum_of_quad(state.total[j]);
      const float peak = state.peak[j];
      const bool empty = total[j] == 0.0f;
      there[j] = row < tile.rows;
      const int64_t token = tile.first + row;
      rows[j] = p.out + (token * p.lengths.heads + head) * kHeadDim;
      if (there[j] && lane % 4 == 0) {
        p.lse[static_cast<int64_t>(head) * p.tokens + token] =
            empty ? -INFINITY : __fmul_rn(__fmaf_rn(peak, p.factor, log2_approx(total[j])), kLn2);
      }
      if (empty) total[j] = 1.0f;  // of no keys: the sums are zero
      factor[j] = 1.0f / total[j];
    }
    __syncwarp();
    release(&shared.tile_free[slot.stage]);
    slot.advance();
    store_rows<T>(o, rows, there, [&](float x, int j) { return kCanonical ? divide(x, total[j]) : x * factor[j]; });
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
      barrier_init(&shared.tile_free[i], kWarps);
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
  } else {
    registers_increase<kConsumerRegisters>();
    consume(shared, p, group);
  }
}

// A map of x [tokens, heads, kHeadDim] whose boxes are `rows` tokens of one head, panel after panel.
bool map_heads(CUtensorMap* map, const void* x, int tokens, int heads, int64_t token_stride, int64_t head_stride,
               int rows) {
  const uint64_t sizes[4] = {P::kColumns, static_cast<uint64_t>(tokens), P::kCount, static_cast<uint64_t>(heads)};
  const uint64_t strides[3] = {static_cast<uint64_t>(token_stride) * 2, P::kRowBytes,
                               static_cast<uint64_t>(head_stride) * 2};
  const uint32_t box[4] = {P::kColumns, static_cast<uint32_t>(rows), P::kCount, 1};
  const auto type = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map(map, type, 4, x, sizes, strides, box,
                         P::kColumns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace mainspring

// Strides in elements. counter: 4 bytes of device memory for the schedule. factor: of q kᵀ (or of what
// `capped` makes of it) in the exponents of two; cap_in, cap_out: see capped. cache_bytes: what keys and values may take of
// the L2 cache. Returns a cudaError_t.
extern "C" int mainspring_flash_forward(const void* q, const void* k, const void* v, void* out, float* lse,
                                        const int* cu_q, const int* cu_k, int* counter, int tokens_q, int tokens_k,
                                        int heads_q, int heads_k, int sequences, int64_t q_token, int64_t q_head,
                                        int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, float factor,
                                        float cap_in, float cap_out, int window, float slack, int cache_bytes,
                                        void* stream_handle) {
  using namespace mainspring;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  CUtensorMap q_map, k_map, v_map;
  if (!map_heads(&q_map, q, tokens_q, heads_q, q_token, q_head, 64) ||
      !map_heads(&k_map, k, tokens_k, heads_k, k_token, k_head, kKeys) ||
      !map_heads(&v_map, v, tokens_k, heads_k, v_token, v_head, kKeys)) {
    return cudaErrorInvalidValue;
  }
  Arguments p;
  p.lengths = {cu_q, cu_k, counter, sequences, heads_q, heads_q / heads_k, cache_bytes / (4 * kHeadDim), window};
  p.out = static_cast<T*>(out);
  p.lse = lse;
  p.tokens = tokens_q;
  p.factor = factor;
  p.cap_in = cap_in;
  p.cap_out = cap_out;
  p.slack = slack;

  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(flash_forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  }
  if (error == cudaSuccess) error = cudaMemsetAsync(counter, 0, 4, stream);
  if (error != cudaSuccess) return error;
  // As many tiles as there can be, whatever the lengths are.
  const int64_t tiles = (static_cast<int64_t>(tokens_q) / kRows + sequences) * heads_q;
  const int64_t blocks = tiles < multiprocessors ? tiles : multiprocessors;
  flash_forward_kernel<<<static_cast<unsigned>(blocks), kThreads, sizeof(Shared), stream>>>(q_map, k_map, v_map, p);
  return cudaGetLastError();
}
