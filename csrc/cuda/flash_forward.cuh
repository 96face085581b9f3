// What a build of the flash attention forward is made of: its tiles, its shared memory, its arguments. Everything static
// comes from defines (ops/cuda/flash_forward.py), so that a library holds one specialisation.
//
// Defines: MAINSPRING_TYPE, MAINSPRING_HEAD_DIM, MAINSPRING_CAUSAL, MAINSPRING_WINDOWED, MAINSPRING_SOFTCAP,
// MAINSPRING_CANONICAL, MAINSPRING_PAGED (0 or 1), and of tuning MAINSPRING_GROUPS (consumer warpgroups), MAINSPRING_KEYS
// (of a block), MAINSPRING_STAGES, MAINSPRING_REGISTERS (of a consumer), MAINSPRING_TURNS (0 or 1).
#pragma once

#include "flash_schedule.cuh"
#include "flash_softmax.cuh"
#include "flash_tiles.cuh"

namespace mainspring {

using T = MAINSPRING_TYPE;
constexpr int kHeadDim = MAINSPRING_HEAD_DIM;
constexpr int kGroups = MAINSPRING_GROUPS;
constexpr int kRows = 64 * kGroups;
constexpr int kKeys = MAINSPRING_KEYS;
constexpr int kStages = MAINSPRING_STAGES;
constexpr bool kCausal = MAINSPRING_CAUSAL;
constexpr bool kWindowed = MAINSPRING_WINDOWED;
constexpr bool kSoftcap = MAINSPRING_SOFTCAP;
constexpr bool kCanonical = MAINSPRING_CANONICAL;
constexpr bool kPaged = MAINSPRING_PAGED;
static_assert(!kCanonical || kKeys == canonical_unit(kHeadDim), "a block of keys is a unit of the canonical order");
constexpr bool kTurns = MAINSPRING_TURNS;
// A block starts with 168 (3 warpgroups) or 128 (4) registers a thread; the roles then share the same sum.
constexpr int kConsumerRegisters = MAINSPRING_REGISTERS;
constexpr int kProducerRegisters = (kGroups == 2 ? 3 * 168 : 4 * 128) - kGroups * kConsumerRegisters;
static_assert((kGroups == 2 || kGroups == 3) && kProducerRegisters >= 24, "two or three warpgroups of consumers");
constexpr int kThreads = 128 * (kGroups + 1);

using P = Panels<kHeadDim>;
using Schedule = FlashSchedule<kRows, kKeys, kCausal, kWindowed, kPaged>;
constexpr int kPiece = 16;  // keys of one copy from a paged cache, every block of which holds a multiple
constexpr int kPieces = kKeys / kPiece;
static_assert(!kPaged || (kCanonical && kPieces * P::kCount <= 32), "a lane of the producer copies one panel of a piece");

struct alignas(1024) Shared {
  T q[kGroups][64 * kHeadDim];
  T k[kStages][kKeys * kHeadDim];
  T v[kStages][kKeys * kHeadDim];
  float4 merged[kCanonical ? kGroups : 1][kCanonical ? kHeadDim / 8 * 128 : 1];  // see MergedChunks
  float2 states[kCanonical ? kRows : 1];
  FlashTile tile[2];
  uint64_t q_full[kGroups], q_free[kGroups];
  uint64_t k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  uint64_t tile_full[2], tile_free[2];
};
static_assert(sizeof(Shared) <= 227 * 1024, "a block has 227 KB of shared memory");

struct Arguments {
  FlashLengths lengths;
  T* out;       // [tokens, heads, kHeadDim]
  float* lse;   // [heads, tokens] or null
  const int* tables;  // paged: [sequences, *], blocks of the cache, rows table_stride apart
  int table_stride, block_size;
  Divisor by_block_size;
  int tokens;
  float factor;    // of the scores, before a power of two is taken
  float cap_in, cap_out;  // see capped
  float slack;     // see online_softmax
};

// Place and parity in a ring of `Size`.
template <int Size>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Size) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace mainspring
