// One linear layer per expert over rows sorted by expert, offsets on the device: out[r] = x[r] W[e]ᵀ, its gradient
// dx[r] = dy[r] W[e] (MAINSPRING_KIND 0 and 1), and dW[e] = dyᵀ x over the expert's rows (2).
//
// Persistent: a producer warp keeps a ring of stages full, running ahead into the next tile while two warpgroups, each of
// every second 64 of a tile's rows, store theirs. Blocks work in pairs on tiles of the same rows, side by side, so that
// each copies a half of those rows to both: what bounds such a product is what is read from the L2 cache, and the power
// that takes. Pairs take their tiles from a counter, since an expert's last tile is cheaper than the others; the forward
// pass, whose tiles are the largest that sums fit in registers, cuts the last ones in halves. Every block counts the
// experts' tiles from the offsets at its start. Every output element is one chain of wgmma instructions over k (dW: over
// the expert's rows), as in linear.cu, whatever its tile. Defines: MAINSPRING_TYPE, MAINSPRING_KIND, MAINSPRING_COLUMNS.
#include "linear_tile.cuh"
#include "wgmma.cuh"

namespace mainspring {

enum Kind { kForward, kInputGradient, kWeightGradient };
constexpr int kHalves = MAINSPRING_KIND == kForward ? 2 : 1;  // of a tile: a warpgroup's products of 64 rows
constexpr int kHalfRows = 2 * kGroupRows;                     // of which each block of a pair copies 64
constexpr int kTileRows = kHalves * kHalfRows;
constexpr int kBand = 1024 / kTileRows;  // tiles of rows that share columns of W while these are in the L2 cache
constexpr int kPair = 2;                 // blocks of a cluster
constexpr uint16_t kBothBlocks = 3;
constexpr int kThreads = 3 * 128;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
constexpr int kMaxStages = 16;
constexpr int kMaxExperts = 1024;

struct GroupedArguments {
  const int* offsets;  // [experts + 1]
  int* counter;        // of tiles handed out beyond the first of each pair, zero
  void* out;           // [total, columns], or dW [experts, rows, columns]
  int total;           // rows of x
  int experts;
  int rows;     // dW: of a weight
  int columns;  // of out
  int k;        // of the reduction (dW: found from the offsets)
};

struct Place {
  int expert, row, end, column;  // dW: end is that of the rows of out
  int first, length;             // of the reduction
};

// Where experts' rows and tiles begin, in shared memory.
struct Experts {
  int offsets[kMaxExperts + 1];
  int tiles[kMaxExperts + 1];  // of rows; dW: of every expert as many
};

// By one warp.
template <int Kind>
__device__ __forceinline__ void count_tiles(const GroupedArguments& p, Experts& experts) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first <= p.experts; first += 32) {
    const int e = first + lane;
    const int start = min(__ldg(p.offsets + min(e, p.experts)), p.total);
    const int rows = max(0, min(__ldg(p.offsets + min(e + 1, p.experts)), p.total) - start);
    const int tiles = Kind == kWeightGradient ? (p.rows + kTileRows - 1) / kTileRows * (e < p.experts)
                                              : (rows + kTileRows - 1) / kTileRows;
    int sum = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (e <= p.experts) experts.offsets[e] = start, experts.tiles[e] = before + sum - tiles;
    before += __shfl_sync(~0u, sum, 31);
  }
}

// Which work there is: tiles of a pair, of which (with halves) the last ones, as many as there are pairs, count as two.
struct Schedule {
  int whole, items;
  __device__ __forceinline__ explicit Schedule(int tiles) {
    whole = max(tiles - (kHalves - 1) * static_cast<int>(gridDim.x / kPair), 0);
    items = whole + 2 * (tiles - whole);
  }
};

// half: 0 or 1, or -1 for the whole tile. A half without rows has nothing to multiply.
__device__ __forceinline__ void cut(Place& place, int half) {
  if (half < 0) return;
  place.row += half * kHalfRows;
  place.end = min(place.end, place.row + kHalfRows);
  if (place.row >= place.end) place.length = 0;
}

// A block's part of an item: the pair's columns lie side by side. Called by whole warps. Bands of tiles of rows share
// columns of W; dW: an expert's tiles are a matter of its own.
template <int Kind, int Columns>
__device__ __forceinline__ Place place_of(const GroupedArguments& p, const Experts& experts, const Schedule& work,
                                          int item, int rank) {
  const int half = item < work.whole ? -1 : (item - work.whole) % 2;
  int tile = half < 0 ? item : work.whole + (item - work.whole) / 2;
  const int column_tiles = (p.columns + kPair * Columns - 1) / (kPair * Columns);
  int row_tiles = experts.tiles[p.experts];
  Place out;
  if (Kind == kWeightGradient) {
    row_tiles /= p.experts;
    out.expert = tile / (row_tiles * column_tiles), tile %= row_tiles * column_tiles;
  }
  const int band = tile / (kBand * column_tiles), inside = tile % (kBand * column_tiles);
  const int band_rows = min(row_tiles - band * kBand, kBand);
  const int slot = band * kBand + inside % band_rows;
  out.column = (inside / band_rows * kPair + rank) * Columns;
  if (Kind == kWeightGradient) {
    out.row = slot * kTileRows, out.end = p.rows;
    out.first = experts.offsets[out.expert];
    out.length = experts.offsets[out.expert + 1] - out.first;
    cut(out, half);
    return out;
  }
  int before = 0;
  for (int first = 0; first < p.experts; first += 32) {
    const int e = first + threadIdx.x % 32;
    before += __popc(__ballot_sync(~0u, e < p.experts && experts.tiles[e] <= slot));
  }
  out.expert = before - 1;  // of those that begin at the same tile, the last one has it
  out.row = experts.offsets[out.expert] + (slot - experts.tiles[out.expert]) * kTileRows;
  out.end = experts.offsets[out.expert + 1];
  out.first = 0, out.length = p.k;
  cut(out, half);
  return out;
}

// Rows of a panel (of 128 bytes each, whatever their swizzle) from `valid` to the next multiple of 16, where the products
// end, to zeros, by one warpgroup.
__device__ __forceinline__ void clear_rows(uint8_t* panel, int valid) {
  const int i = valid * 8 + threadIdx.x % 128;  // at most 15 rows of 8 times 16 bytes
  if (i < (valid + 15) / 16 * 128) reinterpret_cast<uint4*>(panel)[i] = make_uint4(0, 0, 0, 0);
}

// Beside the ring: its alignment, its barriers, the experts.
constexpr int kRing = kSharedLimit - 1024 - 2 * kMaxStages * 8 - 64 - static_cast<int>(sizeof(Experts));
template <int Columns>
constexpr int kStageBytes = (kTileRows + Columns) * kRowBytes;
template <int Columns>
constexpr int kStages = kRing / kStageBytes<Columns> < kMaxStages ? kRing / kStageBytes<Columns> : kMaxStages;

// The same number in all lanes of a warp, by a reduction, whose result lies in a uniform register: then conditions and the
// products' descriptors that follow from it do, too, and need no moves from vector registers.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(~0u, x); }

// a: rows of x (dW: of dy, whose columns are the rows of out); b: W (dW: x).
template <typename T, int Kind, int Columns>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                   const __grid_constant__ GroupedArguments p) {
  constexpr int kBytesA = kTileRows * kRowBytes, kStep = kStageBytes<Columns>, kCount = kStages<Columns>;
  constexpr int kPanelBytes = kPanel * kRowBytes;  // of an operand whose rows are k: 64 columns
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ uint64_t item_full[2], item_free[2];
  __shared__ int items[2];
  __shared__ Experts experts;
  uint8_t* const ring = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kCount; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kPair * 2);  // its readers and, since they share copies, the other block's
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(&item_full[s], 1);
      barrier_init(&item_free[s], kPair * 8 + 1);  // readers: warps that multiply, the other producer
    }
    fence_barrier_init();
  }
  if (threadIdx.x < 32) count_tiles<Kind>(p, experts);
  cluster_sync();
  const Schedule work(experts.tiles[p.experts] * ((p.columns + kPair * Columns - 1) / (kPair * Columns)));

  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  int stage = 0, parity = 0;
  if (group == 2) {
    registers_decrease<kProducerRegisters>();
    if (threadIdx.x >= 2 * 128 + 32) return;
    const int lane = threadIdx.x % 32;
    // The first block's producer takes the pair's items and hands them to both.
    int item = blockIdx.x / kPair;
    for (int slot = 0, slot_parity = 0; true;) {
      if (rank == 0) barrier_wait(&item_free[slot], slot_parity ^ 1);
      if (lane == 0) barrier_expect(&item_full[slot], sizeof(int));
      __syncwarp();
      if (rank == 0) {
        if (lane < kPair) {
          const uint32_t to = address_in(shared_address(&items[slot]), lane);
          store_at(to, item, address_in(shared_address(&item_full[slot]), lane));
        }
      } else {
        barrier_wait(&item_full[slot], slot_parity);
        item = items[slot];
        __syncwarp();
        if (lane == 0) barrier_arrive_at(address_in(shared_address(&item_free[slot]), 0));
      }
      if (item >= work.items) break;
      if (++slot == 2) slot = 0, slot_parity ^= 1;
      int next = 0;
      if (rank == 0 && lane == 0) next = gridDim.x / kPair + atomicAdd(p.counter, 1);
      const Place at = place_of<Kind, Columns>(p, experts, work, item, rank);
      const int steps = (at.length + kPanel - 1) / kPanel;
      const bool lower = kHalves > 1 && at.row + kHalfRows < at.end;  // whether the tile's second half has any rows
      for (int step = 0; step < steps; ++step) {
        if (lane == 0) {
          barrier_wait(&empty[stage], parity ^ 1);
          barrier_expect(&full[stage], kStep - (kHalves == 1 || lower ? 0 : kBytesA / 2));
          uint8_t* const a = ring + stage * kStep;
          uint8_t* const b = a + kBytesA;
          const int k = at.first + step * kPanel;
          for (int half = 0; half < (lower ? 2 : 1); ++half) {
            const int mine = half * kHalfRows + rank * kGroupRows, row = at.row + mine;
            if (Kind == kWeightGradient) {
              tma_load_shared(a + mine * kRowBytes, &a_map, &full[stage], row, k, kBothBlocks);
            } else {
              tma_load_shared(a + mine * kRowBytes, &a_map, &full[stage], k, row, kBothBlocks);
            }
          }
          if (Kind == kWeightGradient) {
            for (int i = 0; i < Columns / kPanel; ++i) {
              tma_load(b + i * kPanelBytes, &b_map, &full[stage], at.column + i * kPanel, k);
            }
          } else if (Kind == kForward) {
            tma_load(b, &b_map, &full[stage], k, at.column, at.expert);
          } else {
            for (int i = 0; i < Columns / kPanel; ++i) {
              tma_load(b + i * kPanelBytes, &b_map, &full[stage], at.column + i * kPanel, k, at.expert);
            }
          }
        }
        if (++stage == kCount) stage = 0, parity ^= 1;
      }
      item = __shfl_sync(~0u, next, 0);
    }
    __syncwarp();
    cluster_sync();  // a block's barriers stay as long as the other one arrives at them
    return;
  }
  registers_increase<kConsumerRegisters>();

  constexpr bool kTransA = Kind == kWeightGradient, kTransB = Kind != kForward;
  const uint32_t start = shared_address(ring);
  const uint64_t a_start = kTransA ? matrix_descriptor(start + group * kPanelBytes, kPanelBytes, 1024)
                                   : matrix_descriptor(start + group * kGroupRows * kRowBytes, 0, 1024);
  const uint64_t b_start = matrix_descriptor(start + kBytesA, kTransB ? kPanelBytes : 0, 1024);
  // 16 further k: 32 bytes along a row, or 16 rows. 128 further rows: half of the operand.
  constexpr int kStepA = (kTransA ? 16 * kRowBytes : 32) >> 4, kStepB = (kTransB ? 16 * kRowBytes : 32) >> 4;
  constexpr int kLower = kHalfRows * kRowBytes >> 4;
  const uint32_t items_free = address_in(shared_address(item_free), 0);
  // Threads 0 and 1 of a warpgroup tell the producers of blocks 0 and 1.
  const uint32_t empty_there = address_in(shared_address(empty), threadIdx.x % kPair);
  const auto release = [&](int done) {
    if (threadIdx.x % 128 < kPair) barrier_arrive_at(empty_there + done * sizeof(uint64_t));
  };
  for (int slot = 0, slot_parity = 0; true;) {
    barrier_wait(&item_full[slot], slot_parity);
    const int item = uniform(items[slot]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive_at(items_free + slot * sizeof(uint64_t));
    if (item >= work.items) break;
    if (++slot == 2) slot = 0, slot_parity ^= 1;
    const Place at = place_of<Kind, Columns>(p, experts, work, item, rank);
    const int steps = uniform((at.length + kPanel - 1) / kPanel);
    const int row = at.row + group * kGroupRows;  // of this warpgroup's first one
    float upper[Columns / 2] = {}, lower[Columns / 2] = {};
    // Products: of 64 rows, 0 to 2.
    const auto multiply = [&](auto products) {
      constexpr int kProducts = decltype(products)::value;
      int previous = 0;
      // Of the stage that has come, its first so many times 16 k.
      const auto multiply_chunks = [&](auto chunks) {
        if constexpr (kProducts > 0) {
          wgmma_fence();
          const uint64_t a = a_start + (stage * kStep >> 4), b = b_start + (stage * kStep >> 4);
#pragma unroll
          for (int k = 0; k < decltype(chunks)::value; ++k) {
            wgmma_ss<T, Columns, kTransA, kTransB>(upper, a + k * kStepA, b + k * kStepB, 1);
            if constexpr (kProducts > 1) {
              wgmma_ss<T, Columns, kTransA, kTransB>(lower, a + kLower + k * kStepA, b + k * kStepB, 1);
            }
          }
          wgmma_commit();
          wgmma_wait<1>();
        }
      };
      const int whole = Kind == kWeightGradient ? uniform(at.length / kPanel) : steps;
      // What follows an expert's last rows would else be thought to differ in a warp.
      if constexpr (Kind == kWeightGradient) stage = uniform(stage), parity = uniform(parity);
      for (int step = 0; step < whole; ++step) {
        barrier_wait(&full[stage], parity);
        multiply_chunks(std::integral_constant<int, kPanel / 16>());
        if (step > 0) release(previous);
        previous = stage;
        if (++stage == kCount) stage = 0, parity ^= 1;
      }
      if constexpr (Kind == kWeightGradient) {
        if (const int rest = uniform(at.length % kPanel); rest > 0) {
          barrier_wait(&full[stage], parity);
          // The next expert's rows came too. Each group clears a half of the panels, then both wait for both.
          for (int i = group; i < 2 * kHalves + Columns / kPanel; i += 2) {
            clear_rows(ring + stage * kStep + i * kPanelBytes, rest);
          }
          fence_async_proxy();
          named_sync(1, 256);
          if (rest > 48) {
            multiply_chunks(std::integral_constant<int, 4>());
          } else if (rest > 32) {
            multiply_chunks(std::integral_constant<int, 3>());
          } else if (rest > 16) {
            multiply_chunks(std::integral_constant<int, 2>());
          } else {
            multiply_chunks(std::integral_constant<int, 1>());
          }
          if (whole > 0) release(previous);
          previous = stage;
          if (++stage == kCount) stage = 0, parity ^= 1;
        }
      }
      wgmma_wait<0>();
      wgmma_touch(upper);
      if constexpr (kHalves > 1) wgmma_touch(lower);
      if (steps > 0) release(previous);
    };
    const int products = uniform(row + kHalfRows < at.end ? 2 : row < at.end);
    if (kHalves > 1 && products == 2) {
      multiply(std::integral_constant<int, 2>());
    } else if (products) {
      multiply(std::integral_constant<int, 1>());
    } else {
      multiply(std::integral_constant<int, 0>());
      continue;
    }
    Target target{nullptr, p.out, at.end, p.columns, false};
    if (Kind == kWeightGradient) {
      target.out = static_cast<T*>(p.out) + static_cast<int64_t>(at.expert) * p.rows * p.columns;
    }
    const int first = row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    store_tile<T, Columns>(target, upper, first, at.column);
    if constexpr (kHalves > 1) {
      if (products == 2) store_tile<T, Columns>(target, lower, first + kHalfRows, at.column);
    }
  }
  cluster_sync();
}

}  // namespace mainspring

// Kinds 0 and 1: a: x [total, k] (dy [total, k]), rows a_stride elements apart; b: W [experts, n, k] ([experts, k, n]);
// out: [total, n]. Kind 2: a: dy [total, rows], b: x [total, n], rows b_stride apart; out: [experts, rows, n].
extern "C" int mainspring_grouped(const void* a, int64_t a_stride, const void* b, int64_t b_stride, const int* offsets,
                                  int* counter, void* out, int total, int experts, int rows, int n, int k, int processors,
                                  cudaStream_t stream) {
  using namespace mainspring;
  using T = MAINSPRING_TYPE;
  constexpr int Columns = MAINSPRING_COLUMNS, kKind = MAINSPRING_KIND;
  auto* kernel = grouped_kernel<T, kKind, Columns>;
  CUtensorMap a_map, b_map;
  bool mapped;
  if constexpr (kKind == kWeightGradient) {
    mapped = map_rows<T>(&a_map, a, total, rows, a_stride, kPanel) && map_rows<T>(&b_map, b, total, n, b_stride, kPanel);
  } else {
    mapped = map_rows<T>(&a_map, a, total, k, a_stride, kGroupRows);
    const int inner = kKind == kForward ? k : n, outer = kKind == kForward ? n : k;
    const uint64_t sizes[3] = {static_cast<uint64_t>(inner), static_cast<uint64_t>(outer),
                               static_cast<uint64_t>(experts)};
    const uint64_t strides[2] = {sizes[0] * sizeof(T), sizes[0] * sizes[1] * sizeof(T)};
    const uint32_t box[3] = {kPanel, static_cast<uint32_t>(kKind == kForward ? Columns : kPanel), 1};
    mapped = mapped && make_tensor_map(&b_map, kMapType<T>, 3, b, sizes, strides, box);
  }
  if (!mapped) return cudaErrorInvalidValue;
  GroupedArguments p{};
  p.offsets = offsets, p.counter = counter, p.out = out, p.total = total, p.experts = experts, p.rows = rows, p.columns = n;
  p.k = k;
  const int column_tiles = (n + kPair * Columns - 1) / (kPair * Columns);
  const int row_tiles =  // at most
      kKind == kWeightGradient ? experts * ((rows + kTileRows - 1) / kTileRows) : total / kTileRows + experts;
  const int tiles = row_tiles * column_tiles;
  if (experts > kMaxExperts) return cudaErrorInvalidValue;
  constexpr int kDynamic = kStages<Columns> * kStageBytes<Columns> + 1024;
  static const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamic);
  if (prepared != cudaSuccess) return prepared;
  const cudaError_t cleared = cudaMemsetAsync(counter, 0, sizeof(int), stream);
  if (cleared != cudaSuccess) return cleared;
  const int pairs = processors / kPair;
  const int items = tiles <= pairs ? kHalves * tiles : tiles;  // at most; in halves where they are few
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kPair * (items < pairs ? items : pairs));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kDynamic;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kPair;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, a_map, b_map, p);
  if (launched != cudaSuccess) return launched;
  return cudaGetLastError();
}
