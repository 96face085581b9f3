// Flash attention's backward pass on Hopper: its tiles, its shared memory, and which queries a block of keys meets.
// Everything static comes from defines (see flash_backward.py), so that a library holds one specialisation.
//
// Algorithm: Dao, "FlashAttention-2" (2023), algorithm 2; warp roles and the transposed scores after Shah et al.,
// "FlashAttention-3" (2024), section 3 and appendix B.
#pragma once

#include <climits>

#include "hopper.cuh"
#include "wgmma.cuh"

#ifndef FLASH_TYPE
#define FLASH_TYPE __nv_bfloat16
#endif
#ifndef FLASH_HEAD_SIZE
#define FLASH_HEAD_SIZE 128
#endif
#ifndef FLASH_QUERIES
#define FLASH_QUERIES 64
#endif
#ifndef FLASH_STAGES
#define FLASH_STAGES 2
#endif
#ifndef FLASH_CAUSAL
#define FLASH_CAUSAL 1
#endif
#ifndef FLASH_WINDOW
#define FLASH_WINDOW 0
#endif
#ifndef FLASH_SOFTCAP
#define FLASH_SOFTCAP 0
#endif
#ifndef FLASH_DETERMINISTIC
#define FLASH_DETERMINISTIC 0
#endif
#ifndef FLASH_DIRECT_ADD
#define FLASH_DIRECT_ADD 0
#endif
#ifndef FLASH_BOUNDED_WAIT
#define FLASH_BOUNDED_WAIT 0
#endif

namespace mainspring::flash_backward {

using Value = FLASH_TYPE;

constexpr int kHeadSize = FLASH_HEAD_SIZE;
constexpr int kPanels = kHeadSize <= 64 ? 1 : kHeadSize <= 128 ? 2 : 4;  // of 64 columns; the rest is filled with zeros
constexpr int kOutPanels = kPanels < 2 ? kPanels : 2;  // a block's accumulators hold 128 columns of dK and dV at most
constexpr int kParts = kPanels / kOutPanels;           // so many blocks share the columns of wider heads
constexpr int kOut = 64 * kOutPanels;
constexpr int kQueries = FLASH_QUERIES;  // of a step of the loop
constexpr int kKeys = 128;               // of a block: 64 for each of two warpgroups
constexpr int kStages = FLASH_STAGES;    // of Q and of dO in flight
constexpr bool kCausal = FLASH_CAUSAL, kWindow = FLASH_WINDOW, kSoftcap = FLASH_SOFTCAP;
constexpr bool kDeterministic = FLASH_DETERMINISTIC;
constexpr bool kDirectAdd = FLASH_DIRECT_ADD;  // add dQ from registers, not through shared memory

constexpr int kThreads = 384;  // a warpgroup that copies, two that compute
constexpr int kComputing = 256;
constexpr int kSumRegisters = kQueries * kOut / kComputing;  // of a thread, of a step's dQ
constexpr int kSumTile = kQueries * kOut;                    // floats of a step's dQ

// Offsets in shared memory, in bytes. Matrices are panels of 64 columns: rows of 128 bytes, swizzled.
constexpr int kRowBytes = 128;
constexpr int kKeyPanel = kKeys * kRowBytes;
constexpr int kQueryPanel = kQueries * kRowBytes;
constexpr int kKeyBytes = kPanels * kKeyPanel;
constexpr int kQueryBytes = kPanels * kQueryPanel;
constexpr int kScoreBytes = kKeys / 64 * kQueryPanel;  // dS: queries x keys
constexpr int kScoreBuffers = kPanels == 4 ? 1 : 2;
constexpr int kAtK = 0;
constexpr int kAtV = kAtK + kKeyBytes;
constexpr int kAtQ = kAtV + kKeyBytes;
constexpr int kAtDo = kAtQ + kStages * kQueryBytes;
constexpr int kAtDs = kAtDo + kStages * kQueryBytes;
constexpr int kAtDq = kAtDs + kScoreBuffers * kScoreBytes;
constexpr int kAtLse = kAtDq + (kDirectAdd ? 0 : kSumTile * 4);
constexpr int kAtDelta = kAtLse + kStages * kQueries * 4;
constexpr int kAtBarriers = kAtDelta + kStages * kQueries * 4;
constexpr int kBarriers = 2 + 4 * kStages + 2 + 4;
constexpr int kSharedBytes = kAtBarriers + kBarriers * 8 + 1024;  // and what alignment to 1024 bytes may take
static_assert(kSharedBytes <= 227 * 1024, "these tiles do not fit into shared memory");
static_assert(kQueries % 16 == 0 && kAtBarriers % 8 == 0 && kAtDq % 128 == 0);
static_assert(kOutPanels == 2 || kQueries % 32 == 0);

struct Problem {
  const float* lse;        // [Hq, rows] lse · log2(e); +inf for rows that see nothing or do not exist
  const float* delta;      // [Hq, rows] rowsum(dO ∘ O)
  float* dq_sum;           // [Hq, tiles, parts, kSumTile] fp32, in the order of the accumulators
  unsigned* turns;         // [Hq, tiles, parts, 2] how many blocks of keys have added to dq_sum (deterministic)
  Value* dk;               // [Tk, Hkv, D]
  Value* dv;               // [Tk, Hkv, D]
  const int* cu_q;         // [sequences + 1]
  const int* cu_k;         // [sequences + 1]
  int tiles;               // of all sequences: rows = tiles · kQueries
  int query_heads, key_heads;
  int window;
  float scale, softcap;
};

// A sequence's rows in lse, delta and dq_sum begin with a tile of their own.
__device__ __forceinline__ int first_tile(int q_begin, int sequence) { return q_begin / kQueries + sequence; }

// Which steps of queries a block of keys meets.
struct Span {
  int q_begin, q_count, k_begin, k_count;
  int shift;           // query i stands at key position i + shift
  int key;             // the block's first key
  int begin, end;      // steps of queries
  __device__ __forceinline__ Span(const Problem& problem, int sequence, int block) {
    q_begin = problem.cu_q[sequence], q_count = problem.cu_q[sequence + 1] - q_begin;
    k_begin = problem.cu_k[sequence], k_count = problem.cu_k[sequence + 1] - k_begin;
    shift = k_count - q_count;
    key = block * kKeys;
    begin = kCausal ? max(0, key - shift) / kQueries : 0;
    int stop = q_count;
    if (kWindow) stop = min(stop, min(key + kKeys, k_count) - 1 - shift + problem.window);
    end = max(begin, (max(stop, 0) + kQueries - 1) / kQueries);
  }
};

#if FLASH_BOUNDED_WAIT
__device__ unsigned long long stuck;  // who gave up last: block (20 bits each of x, y), thread, barrier, parity
#endif

// barrier_wait, or in builds for tests one that gives up, so that a wrong phase is a wrong result and not a hang.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
#if FLASH_BOUNDED_WAIT
  for (int polls = 0; !barrier_test(barrier, parity); ++polls) {
    if (polls > (1 << 19)) {
      const unsigned index = (shared_address(barrier) - kAtBarriers) % 1024 / 8;
      stuck = static_cast<unsigned long long>(blockIdx.x) << 40 | static_cast<unsigned long long>(blockIdx.y) << 20 |
              threadIdx.x << 8 | index << 1 | parity;
      return;
    }
  }
#else
  barrier_wait(barrier, parity);
#endif
}

}  // namespace mainspring::flash_backward
