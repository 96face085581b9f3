// Launcher of flash attention's backward pass: three kernels, no word from the device to the host.
#include <type_traits>

#include "flash_backward_main.cuh"
#include "flash_backward_rows.cuh"
#include "tensor_map.h"

namespace mainspring::flash_backward {

// The same fields as `_Arguments` of flash_backward.py. Strides are in elements, between tokens.
struct Arguments {
  const void *q, *k, *v, *out, *dout;
  const float* lse;
  const int *cu_q, *cu_k;
  void *dq, *dk, *dv;
  float *lse_rows, *delta_rows, *dq_sum;
  unsigned* turns;
  int64_t q_tokens, k_tokens, q_stride, k_stride, v_stride, out_stride, dout_stride;
  int query_heads, key_heads, sequences, max_q, max_k, tiles, window;
  float scale, softcap;
};

// [tokens, heads, D] in boxes of `rows` tokens of one head and 64 columns.
inline bool map_tokens(CUtensorMap* map, const void* from, int64_t tokens, int heads, int64_t stride, int rows) {
  const uint64_t sizes[3] = {kHeadSize, static_cast<uint64_t>(heads), static_cast<uint64_t>(tokens)};
  const uint64_t strides[2] = {kHeadSize * sizeof(Value), stride * sizeof(Value)};
  const uint32_t box[3] = {64, 1, static_cast<uint32_t>(rows)};
  constexpr bool half = std::is_same_v<Value, __half>;
  constexpr auto type = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map(map, type, 3, from, sizes, strides, box);
}

}  // namespace mainspring::flash_backward

extern "C" int mainspring_flash_backward(const mainspring::flash_backward::Arguments* arguments, cudaStream_t stream) {
  using namespace mainspring::flash_backward;
  const Arguments& a = *arguments;
  CUtensorMap q_map, k_map, v_map, do_map;
  if (!map_tokens(&q_map, a.q, a.q_tokens, a.query_heads, a.q_stride, kQueries) ||
      !map_tokens(&do_map, a.dout, a.q_tokens, a.query_heads, a.dout_stride, kQueries) ||
      !map_tokens(&k_map, a.k, a.k_tokens, a.key_heads, a.k_stride, kKeys) ||
      !map_tokens(&v_map, a.v, a.k_tokens, a.key_heads, a.v_stride, kKeys))
    return cudaErrorInvalidValue;
  const Problem problem = {a.lse_rows, a.delta_rows, a.dq_sum,      a.turns,     static_cast<Value*>(a.dk),
                           static_cast<Value*>(a.dv), a.cu_q,       a.cu_k,      a.tiles,
                           a.query_heads, a.key_heads, a.window,     a.scale,     a.softcap};
  const dim3 query_grid(a.max_q > kQueries ? (a.max_q + kQueries - 1) / kQueries : 1, a.query_heads, a.sequences);
  const dim3 key_grid((a.max_k + kKeys - 1) / kKeys * kParts, a.key_heads, a.sequences);
  const dim3 sum_grid(query_grid.x, query_grid.y, query_grid.z * kParts);
  const int q_tokens = static_cast<int>(a.q_tokens), k_tokens = static_cast<int>(a.k_tokens);
  prepare<<<query_grid, kRowThreads, 0, stream>>>(problem, static_cast<const Value*>(a.out),
                                                 static_cast<const Value*>(a.dout), a.lse, a.lse_rows, a.delta_rows,
                                                 a.out_stride, a.dout_stride, q_tokens);
  if (key_grid.x) {
    const cudaError_t error =
        cudaFuncSetAttribute(backward, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    backward<<<key_grid, kThreads, kSharedBytes, stream>>>(q_map, k_map, v_map, do_map, problem);
  }
  finish<<<sum_grid, kRowThreads, 0, stream>>>(problem, static_cast<Value*>(a.dq), q_tokens, k_tokens);
  return cudaGetLastError();
}

#if FLASH_BOUNDED_WAIT
extern "C" unsigned long long mainspring_flash_backward_stuck() {
  unsigned long long value = 0;
  cudaMemcpyFromSymbol(&value, mainspring::flash_backward::stuck, sizeof(value));
  return value;
}
#endif
