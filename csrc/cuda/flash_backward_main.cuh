// The main kernel: a block holds 128 keys and values, walks over the queries that see them, keeps dK and dV in
// registers, and adds each step's dQ to an fp32 sum in device memory.
//
// Of a warpgroup that copies, warp 0 loads Q, dO, lse and delta; warps 1 and 2 add dQ. Two warpgroups of 64 keys each
// compute. Scores are transposed (keys x queries), so that P and dS, as accumulators lie, are the left operands of
// dV += P dO and dK += dS Q; dS also goes through shared memory, since dQ needs the keys of both warpgroups.
#pragma once

#include "flash_backward.cuh"

namespace mainspring::flash_backward {

struct Barriers {
  uint64_t *k_full, *v_full, *q_full, *q_empty, *do_full, *do_empty, *ds_full, *dq_full, *dq_empty;
  __device__ __forceinline__ explicit Barriers(unsigned char* shared) {
    k_full = reinterpret_cast<uint64_t*>(shared + kAtBarriers);
    v_full = k_full + 1, q_full = v_full + 1, q_empty = q_full + kStages, do_full = q_empty + kStages;
    do_empty = do_full + kStages, ds_full = do_empty + kStages, dq_full = ds_full + 2, dq_empty = dq_full + 2;
  }
  __device__ __forceinline__ void init() const {
    constexpr int kWarps = kComputing / 32;
    barrier_init(k_full, 1), barrier_init(v_full, 1);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(q_full + s, 1), barrier_init(q_empty + s, kWarps);
      barrier_init(do_full + s, 1), barrier_init(do_empty + s, kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(ds_full + i, kWarps), barrier_init(dq_full + i, kWarps / 2), barrier_init(dq_empty + i, 1);
    }
  }
};

// Which stage a step's tiles lie in, and the parity of that stage's phase.
struct Stage {
  int index = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void load_panels(unsigned char* to, const CUtensorMap& map, uint64_t* barrier, int panel_bytes,
                                            int head, int row) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    tma_load(to + panel * panel_bytes, &map, barrier, 64 * panel, head, row);
}

// One thread: everything that a block reads.
__device__ __forceinline__ void load(unsigned char* shared, const Barriers& barriers, const CUtensorMap& q_map,
                                     const CUtensorMap& k_map, const CUtensorMap& v_map, const CUtensorMap& do_map,
                                     const Problem& problem, const Span& span, int key_head, int sequence) {
  const int group = problem.query_heads / problem.key_heads;
  const int64_t rows = static_cast<int64_t>(problem.tiles) * kQueries;
  const int tile0 = first_tile(span.q_begin, sequence);
  if (span.begin == span.end) return;
  barrier_expect(barriers.k_full, kKeyBytes);
  load_panels(shared + kAtK, k_map, barriers.k_full, kKeyPanel, key_head, span.k_begin + span.key);
  Stage stage;
  bool first = true;
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int step = span.begin; step < span.end; ++step) {
      const int64_t row = head * rows + static_cast<int64_t>(tile0 + step) * kQueries;
      const int token = span.q_begin + step * kQueries, s = stage.index;
      wait(barriers.q_empty + s, stage.parity ^ 1);
      barrier_expect(barriers.q_full + s, kQueryBytes + kQueries * 4);
      load_panels(shared + kAtQ + s * kQueryBytes, q_map, barriers.q_full + s, kQueryPanel, head, token);
      bulk_load(shared + kAtLse + s * kQueries * 4, problem.lse + row, kQueries * 4, barriers.q_full + s);
      if (first) {
        barrier_expect(barriers.v_full, kKeyBytes);
        load_panels(shared + kAtV, v_map, barriers.v_full, kKeyPanel, key_head, span.k_begin + span.key);
        first = false;
      }
      wait(barriers.do_empty + s, stage.parity ^ 1);
      barrier_expect(barriers.do_full + s, kQueryBytes + kQueries * 4);
      load_panels(shared + kAtDo + s * kQueryBytes, do_map, barriers.do_full + s, kQueryPanel, head, token);
      bulk_load(shared + kAtDelta + s * kQueries * 4, problem.delta + row, kQueries * 4, barriers.do_full + s);
      stage.advance();
    }
  }
}

// One thread for each computing warpgroup: adds that warpgroup's half of every step's dQ.
__device__ __forceinline__ void add_dq(unsigned char* shared, const Barriers& barriers, const Problem& problem,
                                       const Span& span, int key_head, int sequence, int block, int part, int half) {
  constexpr int kHalf = kSumTile / 2;
  const int group = problem.query_heads / problem.key_heads;
  const int tile0 = first_tile(span.q_begin, sequence);
  const float* from = reinterpret_cast<const float*>(shared + kAtDq) + half * kHalf;
  int parity = 0;
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int step = span.begin; step < span.end; ++step) {
      const int64_t tile = (static_cast<int64_t>(head) * problem.tiles + tile0 + step) * kParts + part;
      wait(barriers.dq_full + half, parity);
      unsigned* turn = problem.turns + tile * 2 + half;
      if (kDeterministic) {
        const int behind = step * kQueries + span.shift - problem.window + 1;  // first key of the window
        const unsigned before = block - (kWindow ? max(0, behind) / kKeys : 0);
        unsigned seen;
        do {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(turn) : "memory");
        } while (seen != before);
      }
      bulk_add(problem.dq_sum + tile * kSumTile + half * kHalf, from, kHalf * 4);
      bulk_commit();
      bulk_wait_read<0>();
      barrier_arrive(barriers.dq_empty + half);
      if (kDeterministic) {
        bulk_wait<0>();
        __threadfence();
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turn) : "memory");
      }
      parity ^= 1;
    }
  }
  bulk_wait<0>();
}

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
__device__ __forceinline__ void store_rows(unsigned char* staging, const float (&sums)[kOut / 2], float factor, Value* to,
                                           int64_t row_stride, int rows, int columns, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const int row = 16 * warp + 8 * (lane / 8 % 2) + lane % 8;
  const uint32_t base = shared_address(staging) + row * kRowBytes;
#pragma unroll
  for (int i = 0; i < kOut / 8; i += 2) {
    uint32_t packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) packed[k] = pack(sums[4 * i + 2 * k] * factor, sums[4 * i + 2 * k + 1] * factor, Value());
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
      wgmma_ss<Value, kQueries>(d, a + (s / 4 * kKeyPanel + s % 4 * 32) / 16, b + (s / 4 * kQueryPanel + s % 4 * 32) / 16,
                                s > 0);
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
      wgmma_ss<Value, kDqQueries, 1, 0>(d, a + s * 16 * kRowBytes / 16, b + (s / 4 * kQueryPanel + s % 4 * 32) / 16, s > 0);
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

  // dS = P (dP - delta), rounded. `weights`: P, or with a soft-cap P times its derivative; `p`: P, rounded, which serves
  // where registers are short.
  __device__ __forceinline__ void differentiate(const float (&weights)[kQueries / 2], const uint32_t (&p)[kQueries / 4],
                                                const float (&dp)[kQueries / 2], uint32_t (&ds)[kQueries / 4],
                                                int stage) const {
    const float* delta = reinterpret_cast<const float*>(shared + kAtDelta) + stage * kQueries + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i) {
      const float2 row = *reinterpret_cast<const float2*>(delta + 8 * i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 weight = kFromRounded ? unpack(p[2 * i + j], Value())
                                           : make_float2(weights[4 * i + 2 * j], weights[4 * i + 2 * j + 1]);
        ds[2 * i + j] = pack(weight.x * (dp[4 * i + 2 * j] - row.x), weight.y * (dp[4 * i + 2 * j + 1] - row.y), Value());
      }
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

__device__ __forceinline__ void keep(uint32_t (&registers)[kQueries / 4]) {
#pragma unroll
  for (int i = 0; i < kQueries / 4; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Counts steps over the heads of a group: which step, and where its dQ is summed.
struct Walk {
  int step, head, count = 0, steps;
  __device__ __forceinline__ Walk(const Span& span, int head) : step(span.begin), head(head), steps(0) {}
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

  if constexpr (kOrder == 0) {  // one step after the other
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
      c.differentiate(s, p, dp, ds, stage.index);
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
  }
  if constexpr (kOrder == 1) {  // dK needs no shared dS: it runs while dS is shared; the next S while dQ is handed over
    c.await_tile(b.q_full, kAtQ, stage, walk.step);
    c.start_s(s, 0);
    c.await_keys(b.v_full, kAtV);
    while (walk.count < total) {
      c.await_tile(b.do_full, kAtDo, stage, walk.step);
      c.start_dp(dp, stage.index);
      wgmma_wait<1>();
      wgmma_touch(s);
      c.softmax(s, p, stage.index, walk.step);
      c.start_sum(dv, p, kAtDo + stage.index * kQueryBytes);
      wgmma_wait<1>();
      wgmma_touch(dp);
      c.differentiate(s, p, dp, ds, stage.index);
      c.start_sum(dk, ds, kAtQ + stage.index * kQueryBytes);
      const int buffer = walk.count & 1;
      c.share_ds(ds, buffer);
      wait(b.ds_full + buffer, (walk.count / 2) & 1);
      float dq[kSumRegisters];
      c.start_dq(dq, buffer);
      wgmma_wait<1>();
      keep(p);
      keep(ds);
      c.release(b.do_empty + stage.index);
      c.release(b.q_empty + stage.index);
      const Walk now = walk;
      walk.advance(c.span), stage.advance();
      if (walk.count < total) c.await_tile(b.q_full, kAtQ, stage, walk.step);
      c.start_s(s, stage.index);  // after the last step: of an old tile, for nothing
      wgmma_wait<1>();
      wgmma_touch(dq);
      c.hand_dq(dq, sum_of(now), now.count);
      wgmma_wait<0>();
    }
    wgmma_touch(s);
  }
  if constexpr (kOrder == 2) {  // as 0, and the next step's S runs while dQ is handed over
    c.await_tile(b.q_full, kAtQ, stage, walk.step);
    c.start_s(s, 0);
    c.await_keys(b.v_full, kAtV);
    while (walk.count < total) {
      c.await_tile(b.do_full, kAtDo, stage, walk.step);
      c.start_dp(dp, stage.index);
      wgmma_wait<1>();
      wgmma_touch(s);
      c.softmax(s, p, stage.index, walk.step);
      c.start_sum(dv, p, kAtDo + stage.index * kQueryBytes);
      wgmma_wait<1>();
      wgmma_touch(dp);
      c.differentiate(s, p, dp, ds, stage.index);
      const int buffer = walk.count & 1;
      c.share_ds(ds, buffer);
      wait(b.ds_full + buffer, (walk.count / 2) & 1);
      float dq[kSumRegisters];
      c.start_dq(dq, buffer);
      wgmma_wait<1>();
      keep(p);
      c.release(b.do_empty + stage.index);
      c.start_sum(dk, ds, kAtQ + stage.index * kQueryBytes);
      const Walk now = walk;
      const Stage here = stage;
      walk.advance(c.span), stage.advance();
      if (walk.count < total) c.await_tile(b.q_full, kAtQ, stage, walk.step);
      c.start_s(s, stage.index);  // after the last step: of an old tile, for nothing
      wgmma_wait<2>();
      wgmma_touch(dq);
      c.hand_dq(dq, sum_of(now), now.count);
      wgmma_wait<0>();
      keep(ds);
      c.release(b.q_empty + here.index);
    }
    wgmma_touch(s);
  }
  if constexpr (kOrder == 3) {  // as 1, and a step's dQ runs beside the next step's softmax
    c.await_tile(b.q_full, kAtQ, stage, walk.step);
    c.start_s(s, 0);
    c.await_keys(b.v_full, kAtV);
    float dq[kSumRegisters];
    Walk before = walk;
    while (walk.count < total) {
      c.await_tile(b.do_full, kAtDo, stage, walk.step);
      c.start_dp(dp, stage.index);
      const int last = (walk.count - 1) & 1;
      if (walk.count) wait(b.ds_full + last, ((walk.count - 1) / 2) & 1);
      c.start_dq(dq, last);  // before the first step: of nothing, for nothing
      wgmma_wait<2>();
      wgmma_touch(s);
      c.softmax(s, p, stage.index, walk.step);
      c.start_sum(dv, p, kAtDo + stage.index * kQueryBytes);
      wgmma_wait<2>();
      wgmma_touch(dp);
      c.differentiate(s, p, dp, ds, stage.index);
      wgmma_wait<1>();
      wgmma_touch(dq);
      if (walk.count) c.hand_dq(dq, sum_of(before), before.count);
      before = walk;
      const Stage here = stage;
      walk.advance(c.span), stage.advance();
      if (walk.count < total) c.await_tile(b.q_full, kAtQ, stage, walk.step);
      c.start_s(s, stage.index);
      c.start_sum(dk, ds, kAtQ + here.index * kQueryBytes);
      c.share_ds(ds, before.count & 1);
      wgmma_wait<2>();
      keep(p);
      c.release(b.do_empty + here.index);
      wgmma_wait<0>();
      keep(ds);
      c.release(b.q_empty + here.index);
    }
    wgmma_touch(s);
    wait(b.ds_full + (before.count & 1), (before.count / 2) & 1);
    c.start_dq(dq, before.count & 1);
    wgmma_wait<0>();
    wgmma_touch(dq);
    c.hand_dq(dq, sum_of(before), before.count);
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
  const int block = blockIdx.x / kParts, part = blockIdx.x % kParts, key_head = blockIdx.y, sequence = blockIdx.z;
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
