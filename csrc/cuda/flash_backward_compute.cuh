// What the computing warpgroups of flash attention's backward pass are made of: products, softmax and its derivative,
// and the ways out of registers.
#pragma once

#include "flash_backward_copy.cuh"

namespace mainspring::flash_backward {

__device__ __forceinline__ void add_from_registers(float* to, const float (&sums)[kSumRegisters], int thread) {
#pragma unroll
  for (int i = 0; i < kSumRegisters / 4; ++i)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + (i * 128 + thread) * 4),
                 "f"(sums[4 * i]), "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3])
                 : "memory");
}

// Rows from `valid` on become zeros: what lies there belongs to no one, and 0 times NaN would not be 0.
__device__ __forceinline__ void clear_rows(unsigned char* tile, int panel_bytes, int valid, int rows, int thread) {
  const int chunks = (rows - valid) * (kRowBytes / 16);
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll 1
    for (int i = thread; i < chunks; i += kComputing)
      *reinterpret_cast<uint4*>(tile + panel * panel_bytes + valid * kRowBytes + i * 16) = make_uint4(0, 0, 0, 0);
}

// A warpgroup's 64 rows of dK or dV: to its place in shared memory, and from there to device memory.
__device__ __forceinline__ void store_rows(unsigned char* staging, const float (&sums)[kOut / 2], float factor,
                                           Value* to, int64_t row_stride, int rows, int columns, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const int row = 16 * warp + 8 * (lane / 8 % 2) + lane % 8;
  const uint32_t base = shared_address(staging) + row * kRowBytes;
#pragma unroll
  for (int i = 0; i < kOut / 8; i += 2) {
    uint32_t packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      packed[k] = pack(sums[4 * i + 2 * k] * factor, sums[4 * i + 2 * k + 1] * factor, Value());
    const int chunk = i + lane / 16;
    store_matrix_x4(base + chunk / 8 * kKeyPanel + ((chunk % 8) ^ (lane % 8)) * 16, packed[0], packed[1], packed[2],
                    packed[3]);
  }
  __syncwarp();
  constexpr int kChunks = kOut / 8;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = 16 * warp + i / kChunks, chunk = i % kChunks;
    const uint4 value = *reinterpret_cast<const uint4*>(staging + r * kRowBytes + chunk / 8 * kKeyPanel +
                                                        ((chunk % 8) ^ (r % 8)) * 16);
    if (r < rows && chunk * 8 < columns) *reinterpret_cast<uint4*>(to + r * row_stride + chunk * 8) = value;
  }
}

// What a computing warpgroup does. All sums and scores live in registers; every array is indexed by constants.
struct Compute {
  unsigned char* shared;
  const Barriers& barriers;
  const Problem& problem;
  const Span& span;
  int part;
  int half;           // which warpgroup
  int thread;         // of the warpgroup
  int warp, lane;
  int lowest[2], highest[2];  // which queries see this thread's two keys, less what the thread adds to a column
  float scale_log2;

  __device__ __forceinline__ Compute(unsigned char* shared, const Barriers& barriers, const Problem& problem,
                                     const Span& span, int part)
      : shared(shared), barriers(barriers), problem(problem), span(span), part(part) {
    half = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0);  // the compiler may know that it is one for a warp
    thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    scale_log2 = problem.scale * 1.4426950408889634f;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = span.key + 64 * half + 16 * warp + lane / 4 + 8 * j;
      lowest[j] = key >= span.k_count ? INT_MAX / 2 : kCausal ? key - span.shift - 2 * (lane % 4) : INT_MIN / 2;
      highest[j] = kWindow ? key - span.shift + problem.window - 1 - 2 * (lane % 4) : INT_MAX / 2;
    }
  }

  __device__ __forceinline__ uint32_t at(int offset) const { return shared_address(shared) + offset; }

  // Scores of this warpgroup's keys and a step's queries: left rows times right rows, over the head's columns.
  __device__ __forceinline__ void scores(float (&d)[kQueries / 2], uint32_t left, uint32_t right) const {
    const uint64_t a = matrix_descriptor(left + half * 64 * kRowBytes, 0, 1024), b = matrix_descriptor(right, 0, 1024);
#pragma unroll
    for (int s = 0; s < kHeadSize / 16; ++s)
      wgmma_ss<Value, kQueries>(d, a + (s / 4 * kKeyPanel + s % 4 * 32) / 16,
                                b + (s / 4 * kQueryPanel + s % 4 * 32) / 16, s > 0);
  }
  __device__ __forceinline__ void start_s(float (&d)[kQueries / 2], int stage) const {
    wgmma_fence();
    scores(d, at(kAtK), at(kAtQ + stage * kQueryBytes));
    wgmma_commit();
  }
  __device__ __forceinline__ void start_dp(float (&d)[kQueries / 2], int stage) const {
    wgmma_fence();
    scores(d, at(kAtV), at(kAtDo + stage * kQueryBytes));
    wgmma_commit();
  }
  // d[keys, columns] += p[keys, queries] right[queries, columns of this part]
  __device__ __forceinline__ void start_sum(float (&d)[kOut / 2], uint32_t (&p)[kQueries / 4], int right) const {
    const uint64_t b = matrix_descriptor(at(right) + part * kOutPanels * kQueryPanel, kQueryPanel, 1024);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kQueries / 16; ++s) {
      const uint32_t a[4] = {p[4 * s], p[4 * s + 1], p[4 * s + 2], p[4 * s + 3]};
      wgmma_rs<Value, kOut, 1>(d, a, b + s * 16 * kRowBytes / 16, 1);
    }
    wgmma_commit();
  }
  // Transposed dQ: columns of K times dS. Each warpgroup takes 64 columns, or (of 64 columns) half of the queries.
  static constexpr int kDqQueries = kOutPanels == 2 ? kQueries : kQueries / 2;
  __device__ __forceinline__ void start_dq(float (&d)[kSumRegisters], int buffer) const {
    const uint32_t left = at(kAtK) + (kOutPanels == 2 ? (part * kOutPanels + half) * kKeyPanel : 0);
    const uint32_t right =
        at(kAtDs) + buffer * kScoreBytes + (kOutPanels == 2 ? 0 : half * kDqQueries * kRowBytes);
    const uint64_t a = matrix_descriptor(left, kKeyPanel, 1024), b = matrix_descriptor(right, 0, 1024);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kKeys / 16; ++s)
      wgmma_ss<Value, kDqQueries, 1, 0>(d, a + s * 16 * kRowBytes / 16,
                                        b + (s / 4 * kQueryPanel + s % 4 * 32) / 16, s > 0);
    wgmma_commit();
  }

  // Scores become probabilities, rounded ones too. With a soft-cap `d` becomes P times the cap's derivative.
  __device__ __forceinline__ void softmax(float (&d)[kQueries / 2], uint32_t (&p)[kQueries / 4], int stage,
                                          int step) const {
    const float* lse = reinterpret_cast<const float*>(shared + kAtLse) + stage * kQueries + 2 * (lane % 4);
    const int first = step * kQueries;
    const bool mask = span.key + kKeys > span.k_count || (kCausal && first + span.shift < span.key + kKeys - 1) ||
                      (kWindow && span.key <= first + kQueries - 1 + span.shift - problem.window);
    if (kSoftcap) {
      const float factor = 2.0f * scale_log2 / problem.softcap, cap = problem.softcap * 1.4426950408889634f;
#pragma unroll
      for (int i = 0; i < kQueries / 8; ++i) {
        const float2 row = *reinterpret_cast<const float2*>(lse + 8 * i);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          // tanh(x) = 1 - 2 / (1 + exp(2 x)): its error is absolute, which is what the exponential asks for
          const float tanh = 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(fminf(d[4 * i + r] * factor, 64.0f)));
          const int query = first + 8 * i + r % 2;
          const bool seen = !mask || (query >= lowest[r / 2] && query <= highest[r / 2]);
          const float weight = seen ? exp2_approx(tanh * cap - (r % 2 ? row.y : row.x)) : 0.0f;
          d[4 * i + r] = weight * (1.0f - tanh * tanh);
          if (r % 2) p[2 * i + r / 2] = pack(__uint_as_float(p[2 * i + r / 2]), weight, Value());
          else p[2 * i + r / 2] = __float_as_uint(weight);
        }
      }
      return;
    }
    if (mask) {
#pragma unroll
      for (int i = 0; i < kQueries / 8; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int query = first + 8 * i + r % 2;
          if (query < lowest[r / 2] || (kWindow && query > highest[r / 2])) d[4 * i + r] = -INFINITY;
        }
    }
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i) {
      const float2 row = *reinterpret_cast<const float2*>(lse + 8 * i);
#pragma unroll
      for (int r = 0; r < 4; ++r) d[4 * i + r] = exp2_approx(d[4 * i + r] * scale_log2 - (r % 2 ? row.y : row.x));
#pragma unroll
      for (int j = 0; j < 2; ++j) p[2 * i + j] = pack(d[4 * i + 2 * j], d[4 * i + 2 * j + 1], Value());
    }
  }

  // dS = P (dP - delta), rounded. `weights`: P, or with a soft-cap P times its derivative.
  __device__ __forceinline__ void differentiate(const float (&weights)[kQueries / 2], const float (&dp)[kQueries / 2],
                                                uint32_t (&ds)[kQueries / 4], int stage) const {
    const float* delta = reinterpret_cast<const float*>(shared + kAtDelta) + stage * kQueries + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i) {
      const float2 row = *reinterpret_cast<const float2*>(delta + 8 * i);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        ds[2 * i + j] = pack(weights[4 * i + 2 * j] * (dp[4 * i + 2 * j] - row.x),
                             weights[4 * i + 2 * j + 1] * (dp[4 * i + 2 * j + 1] - row.y), Value());
    }
  }

  // dS [queries, 64 keys] to this warpgroup's panel, and word that it is there.
  __device__ __forceinline__ void share_ds(const uint32_t (&ds)[kQueries / 4], int buffer) const {
    const uint32_t panel = at(kAtDs) + buffer * kScoreBytes + half * kQueryPanel;
    const int row = 8 * (lane / 16) + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    const uint32_t place = panel + row * kRowBytes + (chunk ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      store_matrix_x4_transposed(place + i * 16 * kRowBytes, ds[4 * i], ds[4 * i + 1], ds[4 * i + 2], ds[4 * i + 3]);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.ds_full + buffer);
  }

  __device__ __forceinline__ void hand_dq(const float (&dq)[kSumRegisters], float* to, int count) const {
    if (kDirectAdd) {
      add_from_registers(to + half * (kSumTile / 2), dq, thread);
      return;
    }
    float4* place = reinterpret_cast<float4*>(shared + kAtDq) + half * (kSumTile / 8) + thread;
    wait(barriers.dq_empty + half, (count & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < kSumRegisters / 4; ++i)
      place[i * 128] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.dq_full + half);
  }

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    if (lane == 0) barrier_arrive(barrier);
  }

  // Waits for a step's tile; queries after the sequence's last become zeros.
  __device__ __forceinline__ void await_tile(uint64_t* full, int at_tile, const Stage& stage, int step) const {
    wait(full + stage.index, stage.parity);
    const int valid = span.q_count - step * kQueries;
    if (valid < kQueries) {
      clear_rows(shared + at_tile + stage.index * kQueryBytes, kQueryPanel, valid, kQueries, threadIdx.x - 128);
      fence_async_proxy();
      named_sync(1, kComputing);
    }
  }
  __device__ __forceinline__ void await_keys(uint64_t* full, int at_tile) const {
    wait(full, 0);
    const int valid = span.k_count - span.key;
    if (valid < kKeys) {
      clear_rows(shared + at_tile, kKeyPanel, valid, kKeys, threadIdx.x - 128);
      fence_async_proxy();
      named_sync(1, kComputing);
    }
  }
};

}  // namespace mainspring::flash_backward
