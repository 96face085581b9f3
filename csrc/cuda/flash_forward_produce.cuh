// The flash attention forward's producer: which tile comes next, and the copies of its queries, keys and values.
#pragma once

#include "flash_forward.cuh"

namespace mainspring {

// Where the keys of a block of the tile are: packed, its first token; paged, the row of the cache of the piece that this
// lane copies a panel of, or -1.
__device__ __forceinline__ int find_keys(const Arguments& p, const FlashTile& tile, int block, int lane) {
  if (!kPaged) return tile.first_key + block * kKeys;
  const int position = block * kKeys + lane % kPieces * kPiece;
  if (lane >= kPieces * P::kCount || position >= tile.keys) return -1;
  const int entry = p.by_block_size.divide(position);
  return (p.tables[static_cast<int64_t>(tile.first_key) * p.table_stride + entry] - entry) * p.block_size + position;
}

// Copies blocks of keys, or of values, into their ring of stages; called by all threads of one warp.
struct BlockCopies {
  T* stages;
  uint64_t *full, *free;
  const CUtensorMap* map;
  Ring<kStages> ring;

  __device__ __forceinline__ void load(int row, int kv_head, bool leader, int lane) {
    constexpr int kElements = kKeys * kHeadDim;
    T* const to = stages + ring.stage * kElements;
    uint64_t* const barrier = &full[ring.stage];
    barrier_wait(&free[ring.stage], ring.parity ^ 1);
    if (kPaged) {
      const int copies = __popc(__ballot_sync(~0u, row >= 0));
      if (leader) barrier_expect(barrier, copies * (kPiece * P::kRowBytes));
      __syncwarp();
      const int panel = lane / kPieces;
      if (row >= 0) {
        tma_load(to + (panel * kKeys + lane % kPieces * kPiece) * P::kColumns, map, barrier, 0, row, panel, kv_head);
      }
    } else if (leader) {
      barrier_expect(barrier, kElements * sizeof(T));
      tma_load(to, map, barrier, 0, row, 0, kv_head);
    }
    __syncwarp();
    ring.advance();
  }
};

// Hands out tiles and copies queries, keys and (packed) values.
__device__ __forceinline__ void produce(Shared& shared, const Arguments& p, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
  const bool leader = elect_one();
  const int lane = threadIdx.x % 32;
  Schedule schedule(p.lengths);
  BlockCopies keys{shared.k[0], shared.k_full, shared.k_free, k_map};
  BlockCopies values{shared.v[0], shared.v_full, shared.v_free, v_map};
  Ring<2> slot;
  uint32_t q_parity = 0;
  while (true) {
    FlashTile& tile = shared.tile[slot.stage];  // read again where needed: registers are few
    {
      const FlashTile found = schedule.next();
      barrier_wait(&shared.tile_free[slot.stage], slot.parity ^ 1);
      if (leader) {
        tile = found;
        barrier_arrive(&shared.tile_full[slot.stage]);
      }
      __syncwarp();
      if (found.head < 0) return;
    }
    slot.advance();
    if (tile.high > tile.low) {
      const int head = tile.head, kv_head = head / p.lengths.group;
      int block = kCanonical ? tile.low : tile.high - 1;
      const int last = kCanonical ? tile.high - 1 : tile.low;
      int row = find_keys(p, tile, block, lane);
      keys.load(row, kv_head, leader, lane);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        barrier_wait(&shared.q_free[g], q_parity ^ 1);
        if (leader) {
          barrier_expect(&shared.q_full[g], sizeof(shared.q[0]));
          tma_load(shared.q[g], q_map, &shared.q_full[g], 0, tile.first + 64 * g, 0, head);
        }
        __syncwarp();
      }
      // Values follow one block behind the keys, as the consumers want them.
      while (block != last) {
        block += kCanonical ? 1 : -1;
        const int next = find_keys(p, tile, block, lane);
        keys.load(next, kv_head, leader, lane);
        if (!kPaged) values.load(row, kv_head, leader, lane);
        row = next;
      }
      if (!kPaged) values.load(row, kv_head, leader, lane);
      q_parity ^= 1;
    }
  }
}

// The values of a paged cache, by a warp of their own: the pieces of a block are many copies.
__device__ __forceinline__ void produce_values(Shared& shared, const Arguments& p, const CUtensorMap* v_map) {
  const bool leader = elect_one();
  const int lane = threadIdx.x % 32;
  BlockCopies values{shared.v[0], shared.v_full, shared.v_free, v_map};
  Ring<2> slot;
  while (true) {
    barrier_wait(&shared.tile_full[slot.stage], slot.parity);
    const FlashTile& tile = shared.tile[slot.stage];
    if (tile.head < 0) return;
    const int kv_head = tile.head / p.lengths.group;
    for (int block = tile.low; block < tile.high; ++block) {
      values.load(find_keys(p, tile, block, lane), kv_head, leader, lane);
    }
    if (leader) barrier_arrive(&shared.tile_free[slot.stage]);
    slot.advance();
  }
}

}  // namespace mainspring
