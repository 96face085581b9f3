// What flash attention's backward pass copies: tiles into shared memory, sums of dQ out of it, by single threads that
// wait for barriers.
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

__device__ __forceinline__ void load_panels(unsigned char* to, const CUtensorMap& map, uint64_t* barrier,
                                            int panel_bytes, int head, int row) {
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

// How many blocks of keys add to a step's dQ before this one does, where their order counts. Under a causal mask they add
// from the last to the first: a block begins at its diagonal, so the blocks of a row come by one after the other, two or
// so steps apart, and none waits for long.
__device__ __forceinline__ unsigned blocks_before(const Problem& problem, const Span& span, int block, int step) {
  if (kCausal) return min(span.k_count - 1, (step + 1) * kQueries + span.shift - 1) / kKeys - block;
  const int behind = step * kQueries + span.shift - problem.window + 1;  // first key of the window
  return block - (kWindow ? max(0, behind) / kKeys : 0);
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
        const unsigned before = blocks_before(problem, span, block, step);
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

}  // namespace mainspring::flash_backward
