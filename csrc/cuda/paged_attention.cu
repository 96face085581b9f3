// Attention of few queries over a paged cache (decode) in canonical order (canonical.cuh): a warp walks a chunk of keys alone.
//
// Warps take units of work (paged_units.cuh) in turn. Each has a ring of stages in shared memory, through which a unit's keys
// and values pass in the order of their use, block by block: as soon as a stage has been multiplied, the copy engine fills it
// with what comes a ring of stages later, perhaps of the next unit. No warp waits for another. paged_merge.cuh writes results.
//
// A warp looks its first unit up while the kernels ahead may still run, and asks for its keys as soon as they have ended.
//
// With FP8 the scale of a head's keys joins that of the scores, that of its values the result.
#include "paged_merge.cuh"
#include "tensor_map.h"

namespace mainspring {

// Of tuning: 64 to 128 KB on their way to a multiprocessor are enough, more make the memory slower.
constexpr int WARPS = 8, FEWEST_WARPS = 4;  // of a block
constexpr int RING = 2;                     // stages of a warp
constexpr int STAGE_LIMIT = 8192;           // bytes

constexpr int PIECES = KEYS / PIECE;
constexpr int stage_pieces() {
  int pieces = 1;
  while (pieces < PIECES && 2 * pieces * PIECE_BYTES <= STAGE_LIMIT) pieces *= 2;
  return pieces;
}
constexpr int STAGE_PIECES = stage_pieces();
constexpr int STAGE_BYTES = STAGE_PIECES * PIECE_BYTES;
constexpr int SIDE_STAGES = PIECES / STAGE_PIECES;  // of a block's keys; as many of its values
constexpr int BLOCK_STAGES = 2 * SIDE_STAGES;
constexpr int USES = BLOCK_STAGES / RING;  // of a stage of the ring in a block, so that its place is known in advance
static_assert(BLOCK_STAGES % RING == 0 && RING * STAGE_BYTES % 1024 == 0);

// What a block keeps beside the warps' rings; the arrays of its batch follow.
struct Shared {
  uint64_t filled[WARPS][RING];
  Progress<WARPS> progress;
};

// Asks for stage `stage` of the block of keys at `first` (its keys, then its values), as far as the unit has any.
__device__ __forceinline__ void fetch(uint8_t* ring, uint64_t* filled, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                      const Unit& u, int first, int stage, int lane) {
  const int start = first + stage % SIDE_STAGES * STAGE_PIECES * PIECE, index = start % CHUNK / PIECE;
  const int pieces = max(min((u.high - start + PIECE - 1) / PIECE, STAGE_PIECES), 0), piece = lane - index % 32;
  uint64_t* barrier = &filled[stage % RING];
  if (lane == 0) barrier_expect(barrier, pieces * PIECE_BYTES);
  if (piece >= 0 && piece < pieces) {
    tma_load_once(ring + stage % RING * STAGE_BYTES + piece * PIECE_BYTES, stage < SIDE_STAGES ? k_map : v_map, barrier, 0,
                  index < 32 ? u.cache_row : u.later_row, u.key_head * PANELS);
  }
}

// A block's scores, as two lanes of the product hold them, to weights. shrink: of what was summed before.
template <int Tiles, bool Capped>
__device__ __forceinline__ bool online_softmax(float (&scores)[PIECES][Tiles][4], float (&reference)[Tiles][2],
                                               float (&lanes)[Tiles][2], float (&shrink)[Tiles][2], const Arguments& a,
                                               const Unit& u, int lead, int first, int lane) {
  const float scale = score_scale(a, u);
  const int first_position = lead + a.by_group.divide(u.tile * 8 * Tiles);
  const bool masked = a.window || first + KEYS > first_position + 1;
  bool grew = false;
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      if constexpr (Capped) {
        const float cap_in = FP8 ? __fmul_rn(a.cap_in, a.k_scale[u.key_head]) : a.cap_in;
#pragma unroll
        for (int i = 0; i < KEYS / 8; ++i) {
          float& score = scores[i / 2][n][i % 2 * 2 + l];
          score = capped(score, cap_in, a.cap_out);
        }
      }
      if (masked) {
        const int position = lead + a.by_group.divide(u.tile * 8 * Tiles + 8 * n + 2 * (lane % 4) + l);
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
      const bool grows = __fmul_rn(__fsub_rn(peak, reference[n][l]), scale) > kCanonicalSlack;
      const float renewed = grows ? peak : reference[n][l], safe = finite_peak(renewed);
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
  return __any_sync(~0u, grew);
}

// Tiles: of 8 query rows.
template <int Tiles, bool Capped>
__global__ void __launch_bounds__(32 * WARPS, 1)
    decode_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  uint8_t* const ring = memory + warp * RING * STAGE_BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(memory + warps * RING * STAGE_BYTES);
  const Batch batch{reinterpret_cast<int*>(&shared + 1), a.num_seqs};
  uint64_t* filled = shared.filled[warp];
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < RING; ++i) barrier_init(&filled[i], 1);
    fence_barrier_init();
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
    shared.progress.arrived[warp] = 0;
  }
  if (threadIdx.x == 0) shared.progress.later.count = 0;
  // Where this lane reads matrices: keys as they are (16 keys, 2 vectors), values transposed (2 vectors, 16 keys).
  const int key_row = lane % 16, value_row = lane % 8 + lane / 16 * 8;
  const uint32_t key_address = shared_address(ring) + key_row * PANEL_BYTES + (lane / 16 ^ swizzle(key_row)) * 16;
  const uint32_t value_address = shared_address(ring) + value_row * PANEL_BYTES + (lane / 8 % 2 ^ swizzle(value_row)) * 16;

  // The kernels ahead may still run, and lengths and tables be out of date: they are read once more when those have ended,
  // ahead of the first keys, behind which they would stand in line, and compared while the keys are on their way. Where
  // anything has changed, all starts again.
  const int stride = gridDim.x * a.workers;
  Unit unit{INT_MAX};
#pragma unroll 1
  for (bool current = false;; current = true) {
    read_batch(batch, a);
    if (warp < a.workers) find_unit(unit, a, batch, blockIdx.x * a.workers + warp, stride, lane);
    if (!current) {
      wait_for_predecessors();
      let_successors_start();
    }
    const Recheck recheck(a, unit, lane);
    if (unit.index != INT_MAX) {
#pragma unroll
      for (int i = 0; i < RING; ++i) fetch(ring, filled, &k_map, &v_map, unit, unit.first, i, lane);
    }
    if (current || !recheck.differs(a, batch, unit, lane)) break;
    if (unit.index != INT_MAX) {
#pragma unroll
      for (int i = 0; i < RING; ++i) {
        barrier_wait(&filled[i], 0);
        __syncwarp();
        if (lane == 0) barrier_arrive(&filled[i]);  // a phase without keys: the next one has this one's parity
      }
    }
  }

  uint32_t queries[Tiles][D / 16][2];
  float sums[Tiles][D / 16][4];
  float reference[Tiles][2], lanes[Tiles][2];
  uint32_t round = 0;  // of the ring
  int lead = 0;        // position of the sequence's first query
  bool fresh = true;
#pragma unroll 1
  while (unit.index != INT_MAX) {
    // The block after this one, perhaps of another unit.
    const bool last = unit.first + KEYS >= unit.high;
    Unit next = unit;
    if (last) find_unit(next, a, batch, unit.index + stride, stride, lane);
    else next.first = unit.first + KEYS;
    const int first = unit.first;
    if (fresh) {
      const TileRows rows(a, batch, unit.sequence, unit.tile);
      lead = rows.lead;
      load_queries<Tiles>(queries, unit, rows, a, lane);
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
#pragma unroll
        for (int i = 0; i < D / 16; ++i) sums[n][i][0] = sums[n][i][1] = sums[n][i][2] = sums[n][i][3] = 0.0f;
        reference[n][0] = reference[n][1] = -INFINITY;
        lanes[n][0] = lanes[n][1] = 0.0f;
      }
    }
    const auto take = [&](int stage) { barrier_wait(&filled[stage % RING], (round + stage / RING) & 1); };
    const auto refill = [&](int stage) {
      __syncwarp();
      if (stage + RING < BLOCK_STAGES) {
        fetch(ring, filled, &k_map, &v_map, unit, first, stage + RING, lane);
      } else if (next.index != INT_MAX) {
        fetch(ring, filled, &k_map, &v_map, next, next.first, stage + RING - BLOCK_STAGES, lane);
      }
    };

    // Scores of keys that are not there are of whatever the ring holds: the mask takes them.
    float scores[PIECES][Tiles][4];
#pragma unroll
    for (int stage = 0; stage < SIDE_STAGES; ++stage) {
      take(stage);
#pragma unroll
      for (int piece = 0; piece < STAGE_PIECES; ++piece) {
        const int t = stage * STAGE_PIECES + piece;
#pragma unroll
        for (int n = 0; n < Tiles; ++n) scores[t][n][0] = scores[t][n][1] = scores[t][n][2] = scores[t][n][3] = 0.0f;
        multiply_keys<Tiles>(scores[t], queries, key_address, stage % RING * STAGE_BYTES + piece * PIECE_BYTES);
      }
      refill(stage);
    }

    float shrink[Tiles][2];
    if (online_softmax<Tiles, Capped>(scores, reference, lanes, shrink, a, unit, lead, first, lane)) {
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
    for (int stage = SIDE_STAGES; stage < BLOCK_STAGES; ++stage) {
      const int place = stage % RING * STAGE_BYTES;
      const int left = unit.high - first - (stage - SIDE_STAGES) * STAGE_PIECES * PIECE;
      take(stage);
      if (left > 0) {
        if (left < STAGE_PIECES * PIECE) clear_keys(ring + place, left, STAGE_PIECES * PIECE, lane);
#pragma unroll
        for (int piece = 0; piece < STAGE_PIECES; ++piece) {
          const int t = (stage - SIDE_STAGES) * STAGE_PIECES + piece;
          uint32_t weights[Tiles][2];
#pragma unroll
          for (int n = 0; n < Tiles; ++n) {
            weights[n][0] = transpose(pack(scores[t][n][0], scores[t][n][1], Product{}));
            weights[n][1] = transpose(pack(scores[t][n][2], scores[t][n][3], Product{}));
          }
          multiply_values<Tiles>(sums, weights, value_address, place + piece * PIECE_BYTES);
        }
      }
      refill(stage);
    }
    round += USES;
    if (last) finish<Tiles>(a, batch, unit, sums, reference, lanes, shared.progress, next.index == INT_MAX, lane);
    fresh = last;
    unit = next;
  }

  __syncthreads();
  merge_later(a, batch, shared.progress.later, warp, warps, lane);
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
cudaError_t launch(const DecodeCall& call, int multiprocessors, int shared_bytes, int max_warps, cudaStream_t stream) {
  const int extra = sizeof(Shared) + sizeof(int) * Batch::ARRAYS * call.num_seqs;
  const int most = min(min(max_warps, WARPS), (shared_bytes - extra) / (RING * STAGE_BYTES));
  if (most < 1) return cudaErrorInvalidConfiguration;
  // Few units are spread over all blocks. These have warps enough for the merges, and room for the next kernel's beside them.
  const int64_t chunks = (static_cast<int64_t>(call.max_keys) + CHUNK - 1) / CHUNK;
  const int64_t units = chunks * call.num_seqs * call.kv_heads * call.tiles;  // at most
  const int workers = static_cast<int>(max(min((units + multiprocessors - 1) / multiprocessors, int64_t{most}), int64_t{1}));
  const int warps = min(max(workers, FEWEST_WARPS), most);
  const Arguments a(call, workers);
  CUtensorMap k_map, v_map;
  if (!make_map(&k_map, a.k_cache, a) || !make_map(&v_map, a.v_cache, a)) return cudaErrorInvalidValue;
  const auto kernel = decode_kernel<Tiles, Capped>;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(multiprocessors);
  config.blockDim = dim3(32 * warps);
  config.dynamicSmemBytes = warps * RING * STAGE_BYTES + extra;
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = 1;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, a, k_map, v_map);
}

}  // namespace mainspring

extern "C" int mainspring_paged_decode(const mainspring::DecodeCall* a, int multiprocessors, int shared_bytes, int max_warps,
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
