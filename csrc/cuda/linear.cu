// y = x Wᵀ + b in canonical order, one tile a block: every output element is one chain of wgmma instructions of 16 k
// each, from the first k of its chunk to the last, so a row's bits are the same in every tile and whatever M is. The
// chunks of K (where the table has more than one) are a cluster's blocks, whose sums are added in order.
//
// A producer warp keeps a ring of stages of shared memory full by bulk tensor copies; one to three warpgroups of 64
// rows each multiply. Tiles are so narrow (8 to 256 columns) that a product of few rows still fills the chip in one wave:
// then the time is that of reading W once. A tile at the edge of x or W copies what there is of it and no more: rows
// that the copy engine has to fill with zeros take longer than rows that exist.
//
// Defines: MAINSPRING_TYPE, MAINSPRING_GROUPS, MAINSPRING_COLUMNS, MAINSPRING_PANELS; MAINSPRING_SEGMENTED: a block
// sums all chunks itself and joins them by a binary tree; MAINSPRING_GATED: W is gate above up, a tile takes half its
// columns from each, and what is written is silu(gate) · up with the bits of ops/triton/swiglu.py.
#include "linear_tile.cuh"
#include "wgmma.cuh"

namespace mainspring {

constexpr int kMaxStages = 32;
constexpr int kMaxChunks = 8;  // a portable cluster

struct LinearArguments {
  Target target;
  int segments;    // chunks of K that a block sums itself
  int steps;       // steps of a chunk of K
  int all_steps;   // steps of K
  int stages;
  int x_rows;      // rows of x in a stage: fewer than a warpgroup has when m is small
  int x_edge_rows, w_edge_rows;  // rows that the last tiles copy, of x and of W
  int chunks;      // of K: the blocks of a cluster
  int prefetch;    // steps of W to bring into the L2 cache before the kernels ahead of this one have ended
  bool tree;       // the chunks are added by a binary tree instead of one after the other
  bool late;       // successors start when this block's last copies are on their way, not at once
};

__device__ __forceinline__ float4 load_in(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int c0, int c1) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(c0), "r"(c1)
               : "memory");
}

// The blocks of a cluster add their sums, in the order of their chunks or by a tree; each writes every chunks-th row.
template <typename T, int Groups, int Columns>
__device__ __forceinline__ void combine_chunks(const LinearArguments& p, float (&acc)[Columns / 2], float* sums,
                                               int row, int column) {
  constexpr int kStride = Columns + 4;
  const int thread = threadIdx.x, group = thread / 128, t = thread % 4;
  const int mine = 64 * group + thread % 128 / 32 * 16 + thread % 32 / 4;
  if (group < Groups) {
#pragma unroll
    for (int i = 0; i < Columns / 2; ++i) {
      sums[(mine + 8 * (i / 2 % 2)) * kStride + i / 4 * 8 + 2 * t + i % 2] = acc[i];
    }
  }
  cluster_sync();
  const int rank = cluster_rank(), mine_rows = (min(64 * Groups, p.target.m - row) - rank + p.chunks - 1) / p.chunks;
  for (int item = thread; item < mine_rows * (Columns / 4); item += blockDim.x) {
    const int r = rank + item / (Columns / 4) * p.chunks, first = item % (Columns / 4) * 4;
    const uint32_t place = shared_address(sums + r * kStride + first);
    float4 part[kMaxChunks];
#pragma unroll
    for (int i = 0; i < kMaxChunks; ++i) {
      part[i] = i < p.chunks ? load_in(address_in(place, i)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    float4 sum = part[0];
    if (p.tree) {
#pragma unroll
      for (int width = 1; width < kMaxChunks; width *= 2) {
#pragma unroll
        for (int i = 0; i < kMaxChunks; i += 2 * width) part[i] = part[i] + part[i + width];
      }
      sum = part[0];
    } else {
#pragma unroll
      for (int i = 1; i < kMaxChunks; ++i) {
        if (i < p.chunks) sum = sum + part[i];
      }
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = column + first + j;
      if (c >= p.target.n) break;
      const float total = p.target.bias != nullptr ? values[j] + bias_at<T>(p.target.bias, c, p.target.n) : values[j];
      const int64_t to = static_cast<int64_t>(row + r) * p.target.n + c;
      if (p.target.wide) {
        static_cast<float*>(p.target.out)[to] = total;
      } else {
        static_cast<T*>(p.target.out)[to] = static_cast<T>(total);
      }
    }
  }
  cluster_sync();
}

template <int N>
__device__ __forceinline__ void copy(float (&to)[N], const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from[i];
}
// sum = left + sum, in each element
template <int N>
__device__ __forceinline__ void add(float (&sum)[N], const float (&left)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = left[i] + sum[i];
}

// gate = silu(gate) · up of the projections rounded to T. column: of the tile in either half; p.n: columns of a half.
template <typename T, int N>
__device__ __forceinline__ void apply_gate(const Target& p, float (&gate)[N], const float* up, int column) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int c = column + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    float g = gate[i], u = up[i];
    if (p.bias != nullptr) {
      g += bias_at<T>(p.bias, c, p.n);
      u += bias_at<T>(static_cast<const T*>(p.bias) + p.n, c, p.n);
    }
    g = static_cast<float>(static_cast<T>(g)), u = static_cast<float>(static_cast<T>(u));
    float e;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(g, -1.4426950408889634f)));
    asm("div.full.f32 %0, %1, %2;" : "=f"(e) : "f"(g), "f"(__fadd_rn(e, 1.0f)));
    gate[i] = __fmul_rn(e, u);
  }
}

// A warpgroup's sums to out, of which row is this thread's first.
template <typename T, int Parts, int Columns, bool Gated>
__device__ __forceinline__ void finish(const Target& p, float (&sums)[Parts][Columns / Parts / 2], int row, int column) {
  if constexpr (Gated) {
    float inner[Columns / 4];
#pragma unroll
    for (int i = 0; i < Columns / 4; ++i) inner[i] = sums[0][i];
    if constexpr (Parts == 1) {
      apply_gate<T>(p, inner, sums[0] + Columns / 4, column);
    } else {
      apply_gate<T>(p, inner, sums[1], column);
    }
    store_tile<T, Columns / 2>({nullptr, p.out, p.m, p.n, false}, inner, row, column);
  } else {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      store_tile<T, Columns / Parts>(p, sums[part], row, column + part * (Columns / Parts));
    }
  }
}

// Sums of several levels, and those of three warpgroups, take more registers than an equal share: then the producer is a
// warpgroup that gives its own away.
template <int Groups, bool Segmented>
constexpr bool kGives = Segmented || Groups > 2;
template <int Groups, bool Segmented>
constexpr int kThreads = Groups * 128 + (kGives<Groups, Segmented> ? 128 : 32);

template <typename T, int Groups, int Columns, int Panels, bool Segmented, bool Gated>
__global__ void __launch_bounds__(kThreads<Groups, Segmented>, 1)
    linear_kernel(const __grid_constant__ CUtensorMap x_whole, const __grid_constant__ CUtensorMap x_edge,
                  const __grid_constant__ CUtensorMap w_whole, const __grid_constant__ CUtensorMap w_edge,
                  const __grid_constant__ LinearArguments p) {
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  uint8_t* const ring = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const int x_panel = p.x_rows * kRowBytes, stage_bytes = Panels * (x_panel + Columns * kRowBytes);
  const int warp = threadIdx.x / 32;
  // Through lane 0, so that the compiler knows it to be the same in a warp: then descriptors lie in uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  // Columns of the result, as many rows of W (of its gate and of its up): whole groups of 8, as the swizzle repeats.
  constexpr int kHalves = Gated ? 2 : 1, kOut = Columns / kHalves;
  static_assert(kOut % 8 == 0);
  const int row = blockIdx.x * (kGroupRows * Groups), column = blockIdx.y * kOut;
  const int first_step = blockIdx.z * p.steps;
  const int steps = Segmented ? p.all_steps : min(p.steps, p.all_steps - first_step);
  const bool is_last_row = row + p.x_rows > p.target.m, is_last_column = column + kOut > p.target.n;
  const int groups = min(Groups, (p.target.m - row + kGroupRows - 1) / kGroupRows);  // that have rows

  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], groups);
    }
    fence_barrier_init();
  }
  __syncthreads();

  // Of three warpgroups a product is of half the columns: no instruction may name more registers than an equal share.
  constexpr int kParts = Groups > 2 ? 2 : 1, kPart = Columns / kParts;
  float sums[kParts][kPart / 2] = {};
  float (&acc)[kPart / 2] = sums[0];
  if (group == Groups) {
    if constexpr (kGives<Groups, Segmented>) registers_decrease<24>();
    if (warp == Groups * 4 && threadIdx.x % 32 == 0) {
      const CUtensorMap* const x_map = is_last_row ? &x_edge : &x_whole;
      const CUtensorMap* const w_map = is_last_column ? &w_edge : &w_whole;
      const int bytes = Panels * kRowBytes * ((is_last_row ? p.x_edge_rows : p.x_rows) +
                                              kHalves * (is_last_column ? p.w_edge_rows : kOut));
      prefetch_tensor_map(x_map);
      prefetch_tensor_map(w_map);
      // Weights may come into the L2 cache before the kernels ahead of this one end; values are read after that.
      for (int i = 0; i < min(p.prefetch, steps) * Panels; ++i) {
        for (int half = 0; half < kHalves; ++half) {
          tma_prefetch(w_map, (first_step * Panels + i) * kPanel, column + half * p.target.n);
        }
      }
      wait_for_predecessors();
      if (!p.late) let_successors_start();
      int stage = 0, parity = 1;
      for (int step = first_step; step < first_step + steps; ++step) {
        barrier_wait(&empty[stage], parity);
        barrier_expect(&full[stage], bytes);
        uint8_t* const x_to = ring + stage * stage_bytes;
        uint8_t* const w_to = x_to + Panels * x_panel;
#pragma unroll
        for (int panel = 0; panel < Panels; ++panel) {
          const int k = (step * Panels + panel) * kPanel;
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            tma_load(w_to + (panel * Columns + half * kOut) * kRowBytes, w_map, &full[stage], k,
                     column + half * p.target.n);
          }
        }
#pragma unroll
        for (int panel = 0; panel < Panels; ++panel) {
          const int k = (step * Panels + panel) * kPanel;
          tma_load(x_to + panel * x_panel, x_map, &full[stage], k, row);
        }
        if (++stage == p.stages) stage = 0, parity ^= 1;
      }
      if (p.late) let_successors_start();
    }
    __syncwarp();
  } else if (group < groups) {
    if constexpr (kGives<Groups, Segmented>) registers_increase<(Groups > 2 ? 160 : 240)>();
    wait_for_predecessors();
    const uint64_t x_start = matrix_descriptor(shared_address(ring) + group * kGroupRows * kRowBytes, 0, 1024);
    const uint64_t w_start = matrix_descriptor(shared_address(ring) + Panels * x_panel, 0, 1024);
    int stage = 0, parity = 0, previous = 0;
    auto multiply = [&](int step) {
      barrier_wait(&full[stage], parity);
      wgmma_fence();
      const uint64_t x_stage = x_start + (stage * stage_bytes >> 4), w_stage = w_start + (stage * stage_bytes >> 4);
#pragma unroll
      for (int panel = 0; panel < Panels; ++panel) {
#pragma unroll
        for (int k = 0; k < kPanel / 16; ++k) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            wgmma_ss<T, kPart>(sums[part], x_stage + (panel * x_panel >> 4) + 2 * k,
                               w_stage + ((panel * Columns + part * kPart) * kRowBytes >> 4) + 2 * k, 1);
          }
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0 && threadIdx.x % 128 == 0) barrier_arrive(&empty[previous]);
      previous = stage;
      if (++stage == p.stages) stage = 0, parity ^= 1;
    };
    if constexpr (Segmented) {
      // Sums of one, two and four segments that wait for their right neighbours.
      float one[Columns / 2], two[Columns / 2], four[Columns / 2];
      for (int segment = 0; segment < p.segments; ++segment) {
#pragma unroll
        for (int i = 0; i < Columns / 2; ++i) acc[i] = 0.0f;
        for (int step = 0; step < p.steps; ++step) multiply(step);
        wgmma_wait<0>();
        wgmma_touch(acc);
        if (threadIdx.x % 128 == 0) barrier_arrive(&empty[previous]);
        if (segment % 2 == 0) {
          if (segment + 1 < p.segments) copy<Columns / 2>(one, acc);
          continue;
        }
        add<Columns / 2>(acc, one);
        if (segment % 4 == 1) {
          if (segment + 1 < p.segments) copy<Columns / 2>(two, acc);
          continue;
        }
        add<Columns / 2>(acc, two);
        if (segment % 8 == 3) {
          if (segment + 1 < p.segments) copy<Columns / 2>(four, acc);
          continue;
        }
        add<Columns / 2>(acc, four);
      }
    } else {
      for (int step = 0; step < steps; ++step) multiply(step);
      wgmma_wait<0>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) wgmma_touch(sums[part]);
    }
    // Registers are given away in branches that stay apart.
    if constexpr (kGives<Groups, Segmented>) {
      finish<T, kParts, Columns, Gated>(p.target, sums, row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column);
    }
  }
  if constexpr (kGives<Groups, Segmented>) return;

  if (p.chunks > 1) {
    __syncthreads();  // nobody reads the ring any more: it takes the sums
    if constexpr (kParts == 1) combine_chunks<T, Groups, Columns>(p, acc, reinterpret_cast<float*>(ring), row, column);
  } else if (group < Groups) {
    finish<T, kParts, Columns, Gated>(p.target, sums, row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column);
  }
}

}  // namespace mainspring

// x: [m, k], weight: [n, k], rows `stride` elements apart; bias: [n] or null; out: [m, n], contiguous. chunk: k's of a
// chunk, a multiple of 64 · panels; tree: 2, 4 or 8 chunks are added by a binary tree. stages: at most; blocks: of a
// multiprocessor. programmatic: 0, or 1 + steps of W to prefetch. Gated: weight and bias have 2 n rows, out is of T, and
// K is one chunk.
extern "C" int mainspring_linear(const void* x, int64_t x_stride, const void* weight, int64_t weight_stride,
                                 const void* bias, void* out, int m, int n, int k, int chunk, int tree, int wide,
                                 int stages, int blocks, int programmatic, int late, cudaStream_t stream) {
  using namespace mainspring;
  using T = MAINSPRING_TYPE;
  constexpr int Groups = MAINSPRING_GROUPS, Columns = MAINSPRING_COLUMNS, Panels = MAINSPRING_PANELS;
  constexpr int kDepth = Panels * kPanel;
#ifdef MAINSPRING_SEGMENTED
  constexpr bool kSegmented = true;
#else
  constexpr bool kSegmented = false;
#endif
#ifdef MAINSPRING_GATED
  constexpr bool kGated = true;
#else
  constexpr bool kGated = false;
#endif
  constexpr int kHalves = kGated ? 2 : 1, kOut = Columns / kHalves;
  auto* kernel = linear_kernel<T, Groups, Columns, Panels, kSegmented, kGated>;
  int chunks = (k + chunk - 1) / chunk;
  if (chunks > 1 && (chunk % kDepth || chunks > kMaxChunks || (Groups > 2 && !kSegmented))) return cudaErrorInvalidValue;
  if (tree && (chunks & (chunks - 1) || k % chunk)) return cudaErrorInvalidValue;
  if (kGated && (chunks > 1 || wide)) return cudaErrorInvalidValue;
  const int x_rows = m < kGroupRows && Groups == 1 ? (m + 7) / 8 * 8 : kGroupRows * Groups;
  // Whole groups of 8 rows, after which the swizzle repeats.
  const auto edge = [](int size, int tile) { return size % tile ? (size % tile + 7) / 8 * 8 : tile; };
  const int x_edge_rows = edge(m, x_rows), w_edge_rows = edge(n, kOut);
  CUtensorMap x_whole, x_edge, w_whole, w_edge;
  if (!map_rows<T>(&x_whole, x, m, k, x_stride, x_rows) ||
      !map_rows<T>(&w_whole, weight, kHalves * n, k, weight_stride, kOut)) {
    return cudaErrorInvalidValue;
  }
  x_edge = x_whole, w_edge = w_whole;
  if ((x_edge_rows != x_rows && !map_rows<T>(&x_edge, x, m, k, x_stride, x_edge_rows)) ||
      (w_edge_rows != kOut && !map_rows<T>(&w_edge, weight, kHalves * n, k, weight_stride, w_edge_rows))) {
    return cudaErrorInvalidValue;
  }
  LinearArguments p{};
  p.target = {bias, out, m, n, wide != 0}, p.tree = tree, p.late = late;
  p.all_steps = (k + kDepth - 1) / kDepth;
  p.segments = kSegmented ? chunks : 1;
  p.steps = chunks > 1 ? chunk / kDepth : p.all_steps;
  if (kSegmented) chunks = 1;
  p.x_rows = x_rows, p.chunks = chunks;
  p.x_edge_rows = x_edge_rows, p.w_edge_rows = w_edge_rows;
  p.prefetch = programmatic > 1 ? programmatic - 1 : 0;
  // A warpgroup multiplies 64 rows even where the ring has fewer: what it reads past them must be shared memory too.
  const int spare = 1024 + (kGroupRows * Groups - x_rows) * kRowBytes;
  const int stage_bytes = Panels * (x_rows + Columns) * kRowBytes;
  const int available = kSharedLimit / blocks - 2048;  // the runtime takes 1 KB of a block, the barriers a part of one
  p.stages = (available - spare) / stage_bytes;
  for (const int limit : {kMaxStages, stages, kSegmented ? p.all_steps : p.steps}) {
    if (p.stages > limit) p.stages = limit;
  }
  // A step's stage is free only when the next step's has come.
  if (p.stages < (p.steps > 1 ? 2 : 1)) return cudaErrorInvalidValue;
  int bytes = p.stages * stage_bytes + spare;
  const int sums = 64 * Groups * (Columns + 4) * 4 + 1024;
  if (chunks > 1 && bytes < sums) bytes = sums;
  // Not more blocks on a multiprocessor than asked for: they would leave another one idle.
  const int share = kSharedLimit / (blocks + 1);
  if (bytes < share) bytes = share;
  static const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit - 1024);
  if (prepared != cudaSuccess) return prepared;

  cudaLaunchConfig_t config{};
  config.gridDim = dim3((m + kGroupRows * Groups - 1) / (kGroupRows * Groups), (n + kOut - 1) / kOut, chunks);
  config.blockDim = dim3(kThreads<Groups, kSegmented>);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (chunks > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = 1;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = chunks;
  }
  if (programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, x_whole, x_edge, w_whole, w_edge, p);
}
