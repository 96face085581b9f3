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
#include "flash_forward_consume.cuh"
#include "flash_forward_produce.cuh"
#include "tensor_map.h"

#include <type_traits>

namespace mainspring {

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
