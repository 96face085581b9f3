// The flash attention forward's consumers: the scores, the softmax and the output of 64 queries a warpgroup.
#pragma once

#include <type_traits>

#include "flash_forward.cuh"

namespace mainspring {

__device__ __forceinline__ void consume(Shared& shared, const Arguments& p, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int my_row = 64 * group + thread / 32 * 16 + lane / 4;  // of the tile; the other one is 8 further
  const int my_column = 2 * (lane % 4);
  constexpr int kTurn = 1, kOwn = 1 + kGroups;  // named barriers: whose turn it is; a warpgroup's own
  const auto my_turn = [&] {
    if (kTurns) named_sync(kTurn + group, 256);
  };
  const auto next_turn = [&] {
    if (kTurns) named_arrive(kTurn + (group + 1 == kGroups ? 0 : group + 1), 256);
  };
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };

  const uint64_t q_tile = P::descriptor(shared.q[group], 0);
  const uint64_t k_tiles = P::descriptor(shared.k[0], 0);
  const uint64_t v_tiles = P::descriptor(shared.v[0], kKeys * P::kRowBytes);
  constexpr uint64_t kStageStep = sizeof(shared.k[0]) >> 4;

  float s[kKeys / 2], o[kHeadDim / 2], rescale[2], peak[2], total[2];
  uint32_t weights[kKeys / 16][4];
  RowState<kCanonical> state;
  MergedChunks merged{&shared.merged[kCanonical ? group : 0][kCanonical ? thread : 0],
                      &shared.states[kCanonical ? my_row : 0], true};
  Ring<kStages> key, value;
  Ring<2> slot;
  uint32_t q_parity = 0;
  if (kTurns && group == 0) named_arrive(kTurn, 256);

  const auto start_scores = [&] {
    wgmma_touch(s);
    wgmma_fence();
    multiply_keys<T, kHeadDim, kKeys>(s, q_tile, k_tiles + key.stage * kStageStep);
    wgmma_commit();
  };
  while (true) {
    barrier_wait(&shared.tile_full[slot.stage], slot.parity);
    const FlashTile& tile = shared.tile[slot.stage];
    // By a reduction, whose result lies in a uniform register: then conditions and addresses that follow from it do, too,
    // and products' descriptors need no moves from vector registers. For the same reason the first scores stand under no
    // condition: where the tile sees no key, they are of whatever lies in shared memory and nobody looks at them.
    const auto uniform = [](int x) { return __reduce_max_sync(~0u, x); };
    const int head = uniform(tile.head), low = uniform(tile.low), high = uniform(tile.high);
    const bool some = head >= 0 && high > low;
    if (some) {
      barrier_wait(&shared.q_full[group], q_parity);
      q_parity ^= 1;
      barrier_wait(&shared.k_full[key.stage], key.parity);
    }
    start_scores();
    wgmma_wait<0>();
    wgmma_touch(s);
    if (head < 0) break;

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    state.reset();
    merged.none = true;

    if (some) {
      const int lead = uniform(tile.position), keys_end = uniform(tile.keys);
      const int position = lead + my_row;  // in keys, of this thread's first row

      // Scores in `s` to weights. Masked: whether a mask may cut this block.
      const auto softmax = [&](int block, auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        if (kSoftcap) {
#pragma unroll
          for (int i = 0; i < kKeys / 2; ++i) s[i] = capped(s[i], p.cap_in, p.cap_out);
        }
        if (kMasked) {
          SeenColumns seen;
          const int first = block * kKeys + my_column;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int end = kCausal ? min(keys_end, position + 8 * j + 1) : keys_end;
            seen.high[j] = end - first;
            seen.low[j] = kWindowed ? position + 8 * j + 1 - p.lengths.window - first : 0;
          }
          mask_scores<kWindowed>(s, seen);
        }
        return online_softmax<kMasked>(s, state, rescale, p.factor, p.slack);
      };
      // Of the weights of `block`. In canonical order a chunk's sums begin with its first block.
      const auto start_output = [&](int block) {
        wgmma_touch(o);
        wgmma_fence();
        const bool begins = kCanonical && (block % (kCanonicalChunk / kKeys) == 0 || block == low);
        multiply_values<T, kHeadDim>(o, weights, v_tiles + value.stage * kStageStep, !begins);
        wgmma_commit();
      };

      // Keys past a sequence's end belong to the next one: their weights are zero, but zero times NaN is none.
      const auto clear_tail = [&](int block) {
        const int keys = keys_end - block * kKeys;
        if (keys < kKeys) {
          barrier_wait(&shared.v_full[value.stage], value.parity);
          clear_rows<kHeadDim, kKeys>(shared.v[value.stage], keys, kOwn + group);
        }
      };

      int block = kCanonical ? low : high - 1;
      release(&shared.k_free[key.stage]);
      key.advance();
      softmax(block, std::true_type());
      to_operand<T>(weights, s);
      if (!kCanonical) clear_tail(block);

      // The scores and weights of `block`, and the output of the block before it.
      const auto step = [&](int block, auto masked) {
        barrier_wait(&shared.k_full[key.stage], key.parity);
        my_turn();
        start_scores();
        barrier_wait(&shared.v_full[value.stage], value.parity);
        start_output(kCanonical ? block - 1 : block + 1);
        next_turn();
        wgmma_wait<1>();
        wgmma_touch(s);
        release(&shared.k_free[key.stage]);
        key.advance();
        const bool new_chunk = kCanonical && block % (kCanonicalChunk / kKeys) == 0;
        RowState<kCanonical> chunk;
        if (new_chunk) {
          chunk = state;
          state.reset();
        }
        const bool grew = softmax(block, masked);
        wgmma_wait<0>();
        wgmma_touch(o);
        release(&shared.v_free[value.stage]);
        value.advance();
        to_operand<T>(weights, s);
        if (new_chunk) {
          merged.add<false>(o, chunk, p.factor, peak, total);
        } else if (grew) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) o[i] = __fmul_rn(o[i], rescale[i / 2 % 2]);
        }
      };

      // Blocks from `cut` on the tile's first query does not see whole; those before `open` a window may cut.
      const int cut = max(low, (lead + 1) / kKeys);
      const int open =
          kWindowed ? max(low, (lead + kRows - p.lengths.window + kKeys - 1) / kKeys) : low;
      if (kCanonical) {
        const int uncut = kCausal ? min(cut, high) : keys_end / kKeys;
        ++block;
        if (kWindowed) {
#pragma unroll 1
          for (; block < min(open, high); ++block) step(block, std::true_type());
        }
#pragma unroll 1
        for (; block < uncut; ++block) step(block, std::false_type());
#pragma unroll 1
        for (; block < high; ++block) step(block, std::true_type());
      } else {
        --block;
        if (kCausal) {
#pragma unroll 1
          for (; block >= cut; --block) step(block, std::true_type());
        }
#pragma unroll 1
        for (; block >= open; --block) step(block, std::false_type());
        if (kWindowed) {
#pragma unroll 1
          for (; block >= low; --block) step(block, std::true_type());
        }
      }
      release(&shared.q_free[group]);

      if (kCanonical) clear_tail(high - 1);
      barrier_wait(&shared.v_full[value.stage], value.parity);
      start_output(kCanonical ? high - 1 : low);
      wgmma_wait<0>();
      wgmma_touch(o);
      release(&shared.v_free[value.stage]);
      value.advance();
    }

    float inverse[2];
    T* rows[2];
    bool there[2];
    if (kCanonical && !merged.none) merged.add<true>(o, state, p.factor, peak, total);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = my_row + 8 * j;
      if (!kCanonical || merged.none) peak[j] = state.peak[j], total[j] = state.whole_total(j);
      const bool empty = total[j] == 0.0f;
      there[j] = row < tile.rows;
      const int64_t token = tile.first + row;
      rows[j] = p.out + (token * p.lengths.heads + head) * kHeadDim;
      if (there[j] && lane % 4 == 0 && p.lse) {
        p.lse[static_cast<int64_t>(head) * p.tokens + token] = empty ? -INFINITY : log_sum(peak[j], total[j], p.factor);
      }
      if (empty) total[j] = 1.0f;  // of no keys: the sums are zero
      inverse[j] = divide(1.0f, total[j]);
    }
    __syncwarp();
    release(&shared.tile_free[slot.stage]);
    slot.advance();
    store_rows<T>(o, rows, there, [&](float x, int j) { return __fmaf_rn(x, inverse[j], 0.0f); });
  }
}

}  // namespace mainspring
