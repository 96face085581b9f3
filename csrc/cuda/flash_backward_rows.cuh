// What surrounds the main kernel: `prepare` makes lse and delta rows of whole tiles and clears dQ's sums, `finish`
// turns the sums into dQ.
#pragma once

#include "flash_backward.cuh"

namespace mainspring::flash_backward {

constexpr int kRowThreads = 256;

// Two values as floats.
__device__ __forceinline__ float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
__device__ __forceinline__ float2 unpack(uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// grid: (steps of queries, query heads, sequences). lse: [Hq, tokens]. out, dout: tokens such strides apart.
__global__ void __launch_bounds__(kRowThreads)
    prepare(const __grid_constant__ Problem problem, const Value* out, const Value* dout, const float* lse,
            float* lse_rows, float* delta_rows, int64_t out_stride, int64_t dout_stride, int tokens) {
  constexpr int kLanes = kHeadSize <= 64 ? 8 : kHeadSize <= 128 ? 16 : 32;  // of a row, 16 bytes each
  constexpr int kRowsAtOnce = kRowThreads / kLanes;
  const int step = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int q_begin = problem.cu_q[sequence], q_count = problem.cu_q[sequence + 1] - q_begin;
  if (step * kQueries >= q_count) return;
  const int64_t tile = static_cast<int64_t>(head) * problem.tiles + first_tile(q_begin, sequence) + step;
  const int lane = threadIdx.x % kLanes;
  for (int r = threadIdx.x / kLanes; r < kQueries; r += kRowsAtOnce) {
    const int row = step * kQueries + r;
    const int64_t token = q_begin + row;
    float sum = 0.0f;
    if (row < q_count && lane * 8 < kHeadSize) {
      const int64_t column = head * kHeadSize + lane * 8;
      const uint4 a = *reinterpret_cast<const uint4*>(out + token * out_stride + column);
      const uint4 b = *reinterpret_cast<const uint4*>(dout + token * dout_stride + column);
      const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack(left[i], Value()), y = unpack(right[i], Value());
        sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
      }
    }
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset, kLanes);
    if (lane == 0) {
      const float value = row < q_count ? lse[static_cast<int64_t>(head) * tokens + token] : -INFINITY;
      lse_rows[tile * kQueries + r] = value == -INFINITY ? INFINITY : value * 1.4426950408889634f;
      delta_rows[tile * kQueries + r] = value == -INFINITY ? 0.0f : sum;
    }
  }
  float4* sums = reinterpret_cast<float4*>(problem.dq_sum + tile * kParts * kSumTile);
  for (int i = threadIdx.x; i < kParts * kSumTile / 4; i += kRowThreads) sums[i] = make_float4(0, 0, 0, 0);
  if (kDeterministic && threadIdx.x < 2 * kParts) problem.turns[tile * kParts * 2 + threadIdx.x] = 0;
}

// A head's rows of tokens behind the last sequence.
__device__ __forceinline__ void clear_behind(Value* to, int64_t from, int tokens, int heads, int head) {
  constexpr int kChunks = kHeadSize / 8;
  for (int64_t i = from * kChunks + threadIdx.x; i < static_cast<int64_t>(tokens) * kChunks; i += kRowThreads)
    *reinterpret_cast<uint4*>(to + (i / kChunks * heads + head) * kHeadSize + i % kChunks * 8) = make_uint4(0, 0, 0, 0);
}

// grid: (steps of queries, query heads, sequences · parts). dq: [tokens, Hq, D] = scale times the sums.
__global__ void __launch_bounds__(kRowThreads)
    finish(const __grid_constant__ Problem problem, Value* dq, int q_tokens, int k_tokens) {
  constexpr int kStride = kOut + 8;  // padded: columns of a row lie in different banks
  __shared__ __align__(16) Value staging[kQueries * kStride];
  const int step = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z / kParts, part = blockIdx.z % kParts;
  const int q_begin = problem.cu_q[sequence], q_count = problem.cu_q[sequence + 1] - q_begin;
  if (step == 0 && blockIdx.z == 0) {
    clear_behind(dq, problem.cu_q[gridDim.z / kParts], q_tokens, problem.query_heads, head);
    if (head < problem.key_heads) {
      clear_behind(problem.dk, problem.cu_k[gridDim.z / kParts], k_tokens, problem.key_heads, head);
      clear_behind(problem.dv, problem.cu_k[gridDim.z / kParts], k_tokens, problem.key_heads, head);
    }
  }
  if (step * kQueries >= q_count) return;
  const int64_t tile = static_cast<int64_t>(head) * problem.tiles + first_tile(q_begin, sequence) + step;
  const int half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const float4* sums = reinterpret_cast<const float4*>(problem.dq_sum + (tile * kParts + part) * kSumTile) +
                       half * (kSumTile / 8) + thread;
  const int column = (kOutPanels == 2 ? 64 * half : 0) + 16 * (thread / 32) + thread % 32 / 4;
  const int row = (kOutPanels == 2 ? 0 : half * (kQueries / 2)) + 2 * (thread % 4);
#pragma unroll
  for (int i = 0; i < kSumRegisters / 4; ++i) {
    const float4 sum = sums[i * 128];
    Value* to = staging + (row + 8 * i) * kStride + column;
    to[0] = static_cast<Value>(sum.x * problem.scale), to[kStride] = static_cast<Value>(sum.y * problem.scale);
    to[8] = static_cast<Value>(sum.z * problem.scale), to[kStride + 8] = static_cast<Value>(sum.w * problem.scale);
  }
  __syncthreads();
  constexpr int kChunks = kOut / 8;
  for (int i = threadIdx.x; i < kQueries * kChunks; i += kRowThreads) {
    const int r = i / kChunks, chunk = i % kChunks, d = part * kOut + chunk * 8;
    const int64_t token = q_begin + step * kQueries + r;
    if (step * kQueries + r < q_count && d < kHeadSize)
      *reinterpret_cast<uint4*>(dq + (token * problem.query_heads + head) * kHeadSize + d) =
          *reinterpret_cast<const uint4*>(staging + r * kStride + chunk * 8);
  }
}

}  // namespace mainspring::flash_backward
