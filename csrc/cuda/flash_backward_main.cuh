// The main kernel: a block holds 128 keys and values, walks over the queries that see them, keeps dK and dV in
// registers, and adds each step's dQ to an fp32 sum in device memory.
//
// Of a warpgroup that copies, warp 0 loads Q, dO, lse and delta; warps 1 and 2 add dQ. Two warpgroups of 64 keys each
// compute. Scores are transposed (keys x queries), so that P and dS, as accumulators lie, are the left operands of
// dV += P dO and dK += dS Q; dS also goes through shared memory, since dQ needs the keys of both warpgroups.
#pragma once

#include "flash_backward_compute.cuh"

namespace mainspring::flash_backward {

__device__ __forceinline__ void keep(uint32_t (&registers)[kQueries / 4]) {
#pragma unroll
  for (int i = 0; i < kQueries / 4; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Counts steps over the heads of a group.
struct Walk {
  int step, head, count = 0;
  __device__ __forceinline__ Walk(const Span& span, int head) : step(span.begin), head(head) {}
  __device__ __forceinline__ void advance(const Span& span) {
    ++count;
    if (++step == span.end) step = span.begin, ++head;
  }
};

__device__ __forceinline__ void compute(const Compute& c, int key_head, int sequence, float (&dk)[kOut / 2],
                                        float (&dv)[kOut / 2]) {
  const Barriers& b = c.barriers;
  const int group = c.problem.query_heads / c.problem.key_heads;
  const int total = (c.span.end - c.span.begin) * group;
  const int tile0 = first_tile(c.span.q_begin, sequence);
  const auto sum_of = [&](const Walk& walk) {
    return c.problem.dq_sum +
           ((static_cast<int64_t>(walk.head) * c.problem.tiles + tile0 + walk.step) * kParts + c.part) * kSumTile;
  };
  float s[kQueries / 2], dp[kQueries / 2];
  uint32_t p[kQueries / 4], ds[kQueries / 4];
  Walk walk(c.span, key_head * group);
  Stage stage;
  c.await_keys(b.k_full, kAtK);

  for (; walk.count < total; walk.advance(c.span), stage.advance()) {
    c.await_tile(b.q_full, kAtQ, stage, walk.step);
    c.start_s(s, stage.index);
    if (walk.count == 0) c.await_keys(b.v_full, kAtV);
    c.await_tile(b.do_full, kAtDo, stage, walk.step);
    c.start_dp(dp, stage.index);
    wgmma_wait<1>();
    wgmma_touch(s);
    c.softmax(s, p, stage.index, walk.step);
    wgmma_wait<0>();
    wgmma_touch(dp);
    c.differentiate(s, dp, ds, stage.index);
    c.start_sum(dv, p, kAtDo + stage.index * kQueryBytes);
    const int buffer = kScoreBuffers == 2 ? walk.count & 1 : 0;
    if (kScoreBuffers == 1) named_sync(2, kComputing);  // both have read the last one
    c.share_ds(ds, buffer);
    wait(b.ds_full + buffer, (walk.count / kScoreBuffers) & 1);
    float dq[kSumRegisters];
    c.start_dq(dq, buffer);
    wgmma_wait<1>();
    keep(p);
    c.release(b.do_empty + stage.index);
    c.start_sum(dk, ds, kAtQ + stage.index * kQueryBytes);
    wgmma_wait<1>();
    wgmma_touch(dq);
    c.hand_dq(dq, sum_of(walk), walk.count);
    wgmma_wait<0>();
    keep(ds);
    c.release(b.q_empty + stage.index);
  }
  wgmma_touch(dk);
  wgmma_touch(dv);
}

// grid: (blocks of keys · parts, key heads, sequences)
__global__ void __launch_bounds__(kThreads, 1)
    backward(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
             const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap do_map,
             const __grid_constant__ Problem problem) {
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  // Blocks start in the order of their index: those that others wait for come first.
  const int index = kDeterministic && kCausal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int block = index / kParts, part = index % kParts, key_head = blockIdx.y, sequence = blockIdx.z;
  const Span span(problem, sequence, block);
  if (span.key >= span.k_count) return;
  const Barriers barriers(shared);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&q_map), prefetch_tensor_map(&k_map), prefetch_tensor_map(&v_map);
    prefetch_tensor_map(&do_map);
    barriers.init();
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) load(shared, barriers, q_map, k_map, v_map, do_map, problem, span, key_head, sequence);
      else if (warp <= 2 && !kDirectAdd)
        add_dq(shared, barriers, problem, span, key_head, sequence, block, part, warp - 1);
    }
  } else {
    registers_increase<240>();
    const Compute c(shared, barriers, problem, span, part);
    float dk[kOut / 2], dv[kOut / 2];
#pragma unroll
    for (int i = 0; i < kOut / 2; ++i) dk[i] = dv[i] = 0.0f;
    if (span.begin < span.end) compute(c, key_head, sequence, dk, dv);
    named_sync(1, kComputing);
    const int64_t stride = static_cast<int64_t>(problem.key_heads) * kHeadSize;
    const int row = span.key + 64 * c.half;
    const int64_t at = (span.k_begin + row) * stride + key_head * kHeadSize + part * kOut;
    const int columns = kHeadSize - part * kOut;
    store_rows(shared + kAtV + c.half * 64 * kRowBytes, dv, 1.0f, problem.dv + at, stride, span.k_count - row, columns,
               c.thread);
    store_rows(shared + kAtK + c.half * 64 * kRowBytes, dk, problem.scale, problem.dk + at, stride, span.k_count - row,
               columns, c.thread);
  }
}

}  // namespace mainspring::flash_backward
