// One linear layer per expert over rows sorted by expert, offsets on the device: out[r] = x[r] W[e]ᵀ, its gradient
// dx[r] = dy[r] W[e] (MAINSPRING_KIND 0 and 1), and dW[e] = dyᵀ x over the expert's rows (2).
//
// Persistent: a producer warp walks over tiles and keeps a ring of stages full, running ahead into the next tile while
// two warpgroups of 64 rows store theirs. Every block counts the experts' tiles from the offsets at its start. Every
// output element is one chain of wgmma instructions over k (dW: over the expert's rows), as in linear.cu. Defines:
// MAINSPRING_TYPE, MAINSPRING_KIND, MAINSPRING_COLUMNS.
#include "linear_tile.cuh"
#include "wgmma.cuh"

namespace mainspring {

constexpr int kTileRows = 2 * kGroupRows;
constexpr int kBand = 8;  // tiles of rows that share columns of W while these are in the L2 cache
constexpr int kThreads = 2 * 128 + 32;
constexpr int kMaxStages = 16;
constexpr int kMaxExperts = 1024;
enum Kind { kForward, kInputGradient, kWeightGradient };

struct GroupedArguments {
  const int* offsets;  // [experts + 1]
  void* out;           // [total, columns], or dW [experts, rows, columns]
  int total;           // rows of x
  int experts;
  int rows;     // dW: of a weight
  int columns;  // of out
  int k;        // of the reduction (dW: found from the offsets)
  int stages;
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

// Called by whole warps. Bands of tiles of rows share columns of W; dW: an expert's tiles are a matter of its own.
template <int Kind, int Columns>
__device__ __forceinline__ Place place_of(const GroupedArguments& p, const Experts& experts, int tile) {
  const int column_tiles = (p.columns + Columns - 1) / Columns;
  int row_tiles = experts.tiles[p.experts];
  Place out;
  if (Kind == kWeightGradient) {
    row_tiles /= p.experts;
    out.expert = tile / (row_tiles * column_tiles), tile %= row_tiles * column_tiles;
  }
  const int band = tile / (kBand * column_tiles), inside = tile % (kBand * column_tiles);
  const int band_rows = min(row_tiles - band * kBand, kBand);
  const int slot = band * kBand + inside % band_rows;
  out.column = inside / band_rows * Columns;
  if (Kind == kWeightGradient) {
    out.row = slot * kTileRows, out.end = p.rows;
    out.first = experts.offsets[out.expert];
    out.length = experts.offsets[out.expert + 1] - out.first;
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
  return out;
}

// Rows of a panel (of 128 bytes each, whatever their swizzle) from `valid` on to zeros, by one warpgroup.
__device__ __forceinline__ void clear_rows(uint8_t* panel, int valid) {
  for (int i = valid * 8 + threadIdx.x % 128; i < kPanel * 8; i += 128) {
    reinterpret_cast<uint4*>(panel)[i] = make_uint4(0, 0, 0, 0);
  }
}

// a: rows of x (dW: of dy, whose columns are the rows of out); b: W (dW: x).
template <typename T, int Kind, int Columns>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                   const __grid_constant__ GroupedArguments p) {
  constexpr int kBytesA = kTileRows * kRowBytes, kStageBytes = kBytesA + Columns * kRowBytes;
  constexpr int kPanelBytes = kPanel * kRowBytes;  // of an operand whose rows are k: 64 columns
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ Experts experts;
  uint8_t* const ring = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], 2);
    }
    fence_barrier_init();
  }
  if (threadIdx.x < 32) count_tiles<Kind>(p, experts);
  __syncthreads();
  const int tiles = experts.tiles[p.experts] * ((p.columns + Columns - 1) / Columns);

  const int group = threadIdx.x / 128;
  int stage = 0, parity = 0;
  if (group == 2) {
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Place at = place_of<Kind, Columns>(p, experts, tile);
      const int steps = (at.length + kPanel - 1) / kPanel;
      for (int step = 0; step < steps; ++step) {
        if (threadIdx.x % 32 == 0) {
          barrier_wait(&empty[stage], parity ^ 1);
          barrier_expect(&full[stage], kStageBytes);
          uint8_t* const a = ring + stage * kStageBytes;
          uint8_t* const b = a + kBytesA;
          const int k = at.first + step * kPanel;
          if (Kind == kWeightGradient) {
            for (int i = 0; i < 2; ++i) tma_load(a + i * kPanelBytes, &a_map, &full[stage], at.row + i * kPanel, k);
            for (int i = 0; i < Columns / kPanel; ++i) {
              tma_load(b + i * kPanelBytes, &b_map, &full[stage], at.column + i * kPanel, k);
            }
          } else {
            tma_load(a, &a_map, &full[stage], k, at.row);
            if (Kind == kForward) {
              tma_load(b, &b_map, &full[stage], k, at.column, at.expert);
            } else {
              for (int i = 0; i < Columns / kPanel; ++i) {
                tma_load(b + i * kPanelBytes, &b_map, &full[stage], at.column + i * kPanel, k, at.expert);
              }
            }
          }
        }
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  constexpr bool kTransA = Kind == kWeightGradient, kTransB = Kind != kForward;
  const uint32_t start = shared_address(ring);
  const uint64_t a_start = kTransA ? matrix_descriptor(start + group * kPanelBytes, kPanelBytes, 1024)
                                   : matrix_descriptor(start + group * kGroupRows * kRowBytes, 0, 1024);
  const uint64_t b_start = matrix_descriptor(start + kBytesA, kTransB ? kPanelBytes : 0, 1024);
  // 16 further k: 32 bytes along a row, or 16 rows
  constexpr int kStepA = (kTransA ? 16 * kRowBytes : 32) >> 4, kStepB = (kTransB ? 16 * kRowBytes : 32) >> 4;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place at = place_of<Kind, Columns>(p, experts, tile);
    const int steps = (at.length + kPanel - 1) / kPanel;
    const bool idle = at.row + group * kGroupRows >= at.end;  // the other group has all the rows there are
    float acc[Columns / 2] = {};
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(&full[stage], parity);
      if (Kind == kWeightGradient && at.length - step * kPanel < kPanel) {
        // The next expert's rows came too. Each group clears a half of the panels, then both wait for both.
        for (int i = group; i < 2 + Columns / kPanel; i += 2) {
          clear_rows(ring + stage * kStageBytes + i * kPanelBytes, at.length - step * kPanel);
        }
        fence_async_proxy();
        named_sync(1, 256);
      }
      if (!idle) {
        wgmma_fence();
        const uint64_t shift = stage * kStageBytes >> 4;
#pragma unroll
        for (int k = 0; k < kPanel / 16; ++k) {
          wgmma_ss<T, Columns, kTransA, kTransB>(acc, a_start + shift + k * kStepA, b_start + shift + k * kStepB, 1);
        }
        wgmma_commit();
        wgmma_wait<1>();
      }
      if (step > 0 && threadIdx.x % 128 == 0) barrier_arrive(&empty[previous]);
      previous = stage;
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_touch(acc);
    if (steps > 0 && threadIdx.x % 128 == 0) barrier_arrive(&empty[previous]);
    if (idle) continue;
    Target target{nullptr, p.out, at.end, p.columns, false};
    if (Kind == kWeightGradient) {
      target.out = static_cast<T*>(p.out) + static_cast<int64_t>(at.expert) * p.rows * p.columns;
    }
    store_tile<T, Columns>(target, acc, at.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, at.column);
  }
}

}  // namespace mainspring

// Kinds 0 and 1: a: x [total, k] (dy [total, k]), rows a_stride elements apart; b: W [experts, n, k] ([experts, k, n]);
// out: [total, n]. Kind 2: a: dy [total, rows], b: x [total, n], rows b_stride apart; out: [experts, rows, n].
extern "C" int mainspring_grouped(const void* a, int64_t a_stride, const void* b, int64_t b_stride, const int* offsets,
                                  void* out, int total, int experts, int rows, int n, int k, int processors,
                                  cudaStream_t stream) {
  using namespace mainspring;
  using T = MAINSPRING_TYPE;
  constexpr int Columns = MAINSPRING_COLUMNS, kKind = MAINSPRING_KIND;
  constexpr int kStageBytes = (kTileRows + Columns) * kRowBytes;
  auto* kernel = grouped_kernel<T, kKind, Columns>;
  CUtensorMap a_map, b_map;
  bool mapped;
  if constexpr (kKind == kWeightGradient) {
    mapped = map_rows<T>(&a_map, a, total, rows, a_stride, kPanel) && map_rows<T>(&b_map, b, total, n, b_stride, kPanel);
  } else {
    mapped = map_rows<T>(&a_map, a, total, k, a_stride, kTileRows);
    const int inner = kKind == kForward ? k : n, outer = kKind == kForward ? n : k;
    const uint64_t sizes[3] = {static_cast<uint64_t>(inner), static_cast<uint64_t>(outer),
                               static_cast<uint64_t>(experts)};
    const uint64_t strides[2] = {sizes[0] * sizeof(T), sizes[0] * sizes[1] * sizeof(T)};
    const uint32_t box[3] = {kPanel, static_cast<uint32_t>(kKind == kForward ? Columns : kPanel), 1};
    mapped = mapped && make_tensor_map(&b_map, kMapType<T>, 3, b, sizes, strides, box);
  }
  if (!mapped) return cudaErrorInvalidValue;
  GroupedArguments p{};
  p.offsets = offsets, p.out = out, p.total = total, p.experts = experts, p.rows = rows, p.columns = n;
  p.k = k;
  const int column_tiles = (n + Columns - 1) / Columns;
  const int row_tiles =  // at most
      kKind == kWeightGradient ? experts * ((rows + kTileRows - 1) / kTileRows) : total / kTileRows + experts;
  const int tiles = row_tiles * column_tiles;
  if (experts > kMaxExperts) return cudaErrorInvalidValue;
  p.stages = (kSharedLimit - 3072 - static_cast<int>(sizeof(Experts))) / kStageBytes;
  if (p.stages > kMaxStages) p.stages = kMaxStages;
  static const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           kSharedLimit - 1024 - static_cast<int>(sizeof(Experts)));
  if (prepared != cudaSuccess) return prepared;
  kernel<<<tiles < processors ? tiles : processors, kThreads, p.stages * kStageBytes + 1024, stream>>>(a_map, b_map, p);
  return cudaGetLastError();
}
