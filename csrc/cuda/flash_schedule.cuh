// Which tile of queries a block computes next. Sequences are packed and their lengths lie on the device, so the tiles are
// counted there: one warp walks along the lengths as the indices of its tiles grow.
//
// Order: sequences as they stand; within one, sections of heads whose keys and values fit into the L2 cache together;
// within a section the tiles of the last queries first, which are the longest ones under a causal mask; heads innermost.
#pragma once

#include <cstdint>

namespace mainspring {

// A tile of queries of one head, and the blocks of keys it sees.
struct alignas(16) FlashTile {
  int head;       // of queries; negative: there are no more tiles
  int first;      // token of its first query
  int rows;       // queries
  int position;   // key position of its first query
  int first_key;  // token of key 0 of its sequence; paged: the sequence
  int keys;       // keys of its sequence
  int low, high;  // blocks of keys, [low, high)
};

struct FlashLengths {
  const int* cu_q;     // [sequences + 1]
  const int* cu_k;     // [sequences + 1]; paged: [sequences], keys of each
  int* counter;        // 0 at the launch: tiles handed out beyond each block's first
  int sequences;
  int heads;           // of queries
  int group;           // heads of queries a head of keys
  int section_keys;    // keys of one head that fill the cache
  int window;          // sliding window in keys
  int longer_than;     // sequences of at most so many queries are another kernel's
};

// Tiles are handed out as blocks come free, by a counter in device memory.
template <int Rows, int Keys, bool Causal, bool Windowed, bool Paged>
class FlashSchedule {
 public:
  __device__ __forceinline__ explicit FlashSchedule(const FlashLengths& lengths) : p_(lengths) {}

  // The block's next tile; called by all threads of one warp.
  __device__ __forceinline__ FlashTile next() {
    const int index = index_;
    if (threadIdx.x % 32 == 0) index_ = gridDim.x + atomicAdd(p_.counter, 1);  // looked at when the next tile is due
    return find(__shfl_sync(~0u, index, 0));
  }

 private:
  __device__ __forceinline__ FlashTile find(int index) {
    const int lane = threadIdx.x % 32;
    FlashTile tile;
    tile.head = -1;
    while (true) {
      const int s = sequence_ + lane;
      const int first = s < p_.sequences ? p_.cu_q[s] : 0;
      const int queries = s < p_.sequences ? p_.cu_q[s + 1] - first : 0;
      const int blocks = queries > p_.longer_than ? (queries + Rows - 1) / Rows : 0;
      int ends = blocks * p_.heads;  // tiles up to and with this sequence
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(~0u, ends, step);
        if (lane >= step) ends += lower;
      }
      const int wanted = index - before_;
      const uint32_t over = __ballot_sync(~0u, ends <= wanted);
      if (over != ~0u) {
        const int owner = __popc(over);
        const int rest = wanted - __shfl_sync(~0u, ends - blocks * p_.heads, owner);
        const int q_first = __shfl_sync(~0u, first, owner);
        const int q_length = __shfl_sync(~0u, queries, owner);
        const int s = sequence_ + owner;
        if (Paged) {
          place(tile, rest, q_first, q_length, s, p_.cu_k[s]);
        } else {
          place(tile, rest, q_first, q_length, p_.cu_k[s], p_.cu_k[s + 1] - p_.cu_k[s]);
        }
        return tile;
      }
      if (sequence_ + 32 >= p_.sequences) return tile;
      before_ += __shfl_sync(~0u, ends, 31);
      sequence_ += 32;
    }
  }

  __device__ __forceinline__ void place(FlashTile& tile, int rest, int q_first, int q_length, int k_first, int keys) {
    const int blocks = (q_length + Rows - 1) / Rows;
    const int section = max(1, p_.section_keys / max(keys, 1)) * p_.group;  // heads of queries
    const int number = rest / (blocks * section);
    rest -= number * blocks * section;
    const int heads = min(section, p_.heads - number * section);
    const int block = blocks - 1 - rest / heads;
    tile.head = number * section + rest % heads;
    tile.first = q_first + block * Rows;
    tile.rows = min(Rows, q_length - block * Rows);
    tile.position = keys - q_length + block * Rows;
    tile.first_key = k_first;
    tile.keys = keys;
    const int end = Causal ? min(keys, tile.position + tile.rows) : keys;
    const int begin = Windowed ? max(0, tile.position - p_.window + 1) : 0;
    tile.low = begin / Keys;
    tile.high = end > begin ? (end + Keys - 1) / Keys : tile.low;
  }

  const FlashLengths& p_;
  int index_ = blockIdx.x;  // of the next tile; in lane 0
  int sequence_ = 0;        // where the search goes on
  int before_ = 0;          // tiles before that sequence
};

}  // namespace mainspring
