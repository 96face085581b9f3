// Causal attention over packed or paged keys, for prefill, chunked prefill and decode alike.
//
// Canonical order of a query's output: keys in chunks of kChunk, aligned at position 0. Within a chunk the
// scores are dot products over d from first to last, in segments; then the maximum, the exponentials relative
// to it, their sum (key j in lane j % kLanes, then one tree), and the weighted values added from the first key
// to the last. A chunk thus gives (max, sum, values) on its own, and chunks are merged from left to right.
// Keys that a query does not see count as probability 0, which changes nothing, and chunks without visible
// keys are left out. So the bits depend on nothing but the query and the keys it sees.
//
// The work is cut into tiles: neighbouring queries of one sequence with all the query heads that share a
// key head. When there are few tiles (decode of few sequences), their chunks are computed in parallel too.
#include <math.h>
#include <stdlib.h>

#include "attention_pack.h"
#include "exp.h"
#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

constexpr int kRows = 4;  // query rows computed together
#ifdef MAINSPRING_AVX512
constexpr int kVectors = 4;  // vectors of keys, or of dims, in a register tile
#else
constexpr int kVectors = 2;
#endif
constexpr int kKeyBlock = kVectors * kLanes;
constexpr int64_t kSegment = 32;  // units of d summed in one go: one long sum in float32 would lose digits
constexpr int64_t kTileQueries = 192;  // about how many query rows share one packing of a chunk

struct Range {
  int64_t begin, end;
};

// Queries first..first + count of a sequence, for the query heads of one key head.
struct Tile {
  int64_t seq, kv_head, first, count;
};

// (max, sum, values) of one row over some keys. No visible key: max = -inf, sum = 0; values then mean nothing.
struct Partial {
  float* max;
  float* sum;
  float* values;  // rows of Shape::stride floats
};

struct Shape {
  int64_t group;   // query heads of a key head
  int64_t units;   // of d
  int64_t stride;  // d rounded up to whole vectors
  int64_t tile_tokens;

  explicit Shape(const ms_attention_args& a, int values_per_unit)
      : group(a.q_heads / a.kv_heads),
        units(a.d / values_per_unit),
        stride((a.d + kLanes - 1) / kLanes * kLanes),
        tile_tokens(max_of(1, kTileQueries / group)) {}

  int64_t padded_rows(int64_t tokens) const { return (tokens * group + kRows - 1) / kRows * kRows; }
  int64_t partial_size() const { return stride + 2; }
};

// Absolute positions of the keys that the query at `position` sees.
Range visible(const ms_attention_args& a, int64_t position) {
  return {a.window > 0 ? max_of(0, position - a.window + 1) : 0, position + 1};
}

int64_t query_position(const ms_attention_args& a, int64_t seq, int64_t query) {
  return a.context_lens[seq] - (a.cu_seqlens[seq + 1] - a.cu_seqlens[seq]) + query;
}

// Chunks that any query of the tile sees.
Range tile_chunks(const ms_attention_args& a, const Tile& tile) {
  const int64_t first = query_position(a, tile.seq, tile.first);
  const Range keys = {visible(a, first).begin, visible(a, first + tile.count - 1).end};
  return {keys.begin / kChunk, (keys.end + kChunk - 1) / kChunk};
}

// (max, sum, values) of `from` joined to that of `to`; the values of `to` are `stride` floats.
MS_INLINE void merge(float* to_max, float* to_sum, float* to_values, float max, float sum, const float* values,
                     int64_t stride) {
  if (max == -INFINITY) return;
  if (*to_max == -INFINITY) {
    *to_max = max;
    *to_sum = sum;
    memcpy(to_values, values, sizeof(float) * static_cast<size_t>(stride));
    return;
  }
  const float most = *to_max > max ? *to_max : max;
  const float old_scale = exp_one(*to_max - most), new_scale = exp_one(max - most);
  *to_max = most;
  *to_sum = *to_sum * old_scale + sum * new_scale;
  for (int64_t i = 0; i < stride; i += kLanes)
    store(to_values + i, fma(load(values + i), all(new_scale), mul(load(to_values + i), all(old_scale))));
}

// A tile with one chunk of its keys packed, in the calling thread's scratch memory.
template <class T>
class TileWork {
  using P = Packed<T>;

 public:
  TileWork(const ms_attention_args& args, const Shape& s, const Tile& t) : a(args), shape(s), tile(t) {
    const int64_t rows = shape.padded_rows(tile.count);
    const int64_t sizes[] = {rows * shape.units,  shape.units * kChunk,     kChunk / P::kValues * shape.stride,
                             kRows * kChunk,      kRows * shape.stride,     rows,
                             rows,                rows * shape.stride};
    float** const parts[] = {&queries, &keys, &values, &scores, &weighted, &max, &sum, &result};
    int64_t total = 0;
    for (int64_t size : sizes) total += (size + 15) / 16 * 16;
    float* next = static_cast<float*>(thread_scratch(sizeof(float) * static_cast<size_t>(total)));
    for (int i = 0; i < 8; ++i) {
      *parts[i] = next;
      next += (sizes[i] + 15) / 16 * 16;
    }
    pack_queries();
  }

  // Packs the chunk's keys that some query of the tile sees.
  void load_chunk(int64_t chunk) {
    chunk_begin = chunk * kChunk;
    const Range all_keys = {visible(a, position(0)).begin, visible(a, position(tile.count - 1)).end};
    const int begin = static_cast<int>(max_of(0, all_keys.begin - chunk_begin));
    const int end = static_cast<int>(min_of(kChunk, all_keys.end - chunk_begin));
    const T* key_rows[kChunk] = {};
    const T* value_rows[kChunk] = {};
    find_rows(begin, end, key_rows, value_rows);
    pack_keys<T>(key_rows, begin / kKeyBlock * kKeyBlock, (end + kKeyBlock - 1) / kKeyBlock * kKeyBlock, a.d, keys);
    pack_values<T>(value_rows, begin, end, a.d, shape.stride, values);
  }

  // (max, sum, values) of rows row..row + kRows over the loaded chunk; values go to `weighted`.
  void attend(int64_t row, float (&row_max)[kRows], float (&row_sum)[kRows]) {
    Range seen[kRows];
    Range any = {kChunk, 0};
    for (int r = 0; r < kRows; ++r) {
      seen[r] = seen_keys(row + r);
      if (seen[r].begin >= seen[r].end) continue;
      any = {min_of(any.begin, seen[r].begin), max_of(any.end, seen[r].end)};
    }
    for (int r = 0; r < kRows; ++r) row_max[r] = -INFINITY, row_sum[r] = 0;
    if (any.begin >= any.end) return;
    for (int64_t key = any.begin / kKeyBlock * kKeyBlock; key < any.end; key += kKeyBlock) score_block(row, key);
    for (int r = 0; r < kRows; ++r) soften(scores + r * kChunk, seen[r], any, row_max[r], row_sum[r]);
    int64_t dim = 0;
    for (; dim + kVectors * kLanes <= shape.stride; dim += kVectors * kLanes) weigh_values<kVectors>(any, dim);
    for (; dim < shape.stride; dim += kLanes) weigh_values<1>(any, dim);
  }

  // Merges the loaded chunk into the tile's result.
  void add_chunk() {
    for (int64_t row = 0; row < num_rows(); row += kRows) {
      float row_max[kRows], row_sum[kRows];
      attend(row, row_max, row_sum);
      for (int r = 0; r < kRows; ++r)
        merge(max + row + r, sum + row + r, result + (row + r) * shape.stride, row_max[r], row_sum[r],
              weighted + r * shape.stride, shape.stride);
    }
  }

  void clear() {
    for (int64_t r = 0; r < num_rows(); ++r) max[r] = -INFINITY, sum[r] = 0;
  }

  int64_t num_rows() const { return shape.padded_rows(tile.count); }

  // Partials of the loaded chunk as rows of (max, sum, values) for merge_partials.
  void write_partials(float* out) {
    for (int64_t row = 0; row < num_rows(); row += kRows) {
      float row_max[kRows], row_sum[kRows];
      attend(row, row_max, row_sum);
      for (int r = 0; r < kRows; ++r) {
        float* to = out + (row + r) * shape.partial_size();
        to[0] = row_max[r];
        to[1] = row_sum[r];
        memcpy(to + 2, weighted + r * shape.stride, sizeof(float) * static_cast<size_t>(shape.stride));
      }
    }
  }

  void merge_partials(const float* partials) {
    for (int64_t row = 0; row < num_rows(); ++row) {
      const float* from = partials + row * shape.partial_size();
      merge(max + row, sum + row, result + row * shape.stride, from[0], from[1], from + 2, shape.stride);
    }
  }

  // Divides by the sums and stores the rows.
  void finish() {
    for (int64_t row = 0; row < tile.count * shape.group; ++row) {
      const int64_t token = a.cu_seqlens[tile.seq] + tile.first + row / shape.group;
      const int64_t at = token * a.q_heads + tile.kv_head * shape.group + row % shape.group;
      const bool none = max[row] == -INFINITY;
      const vf scale = all(none ? 0.0f : 1.0f / sum[row]);
      T* out = static_cast<T*>(a.out) + at * a.d;
      for_lanes(a.d, [&](int64_t i, int n) {
        store_lanes(out + i, none ? zero() : mul(load(result + row * shape.stride + i), scale), n);
      });
      if (a.lse != nullptr)
        a.lse[at] = none ? -INFINITY : static_cast<float>(static_cast<double>(max[row]) + ::log(static_cast<double>(sum[row])));
    }
  }

 private:
  int64_t position(int64_t query) const { return query_position(a, tile.seq, tile.first + query); }

  void pack_queries() {
    const T* q = static_cast<const T*>(a.q);
    const int64_t rows = tile.count * shape.group;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = a.cu_seqlens[tile.seq] + tile.first + row / shape.group;
      const int64_t head = tile.kv_head * shape.group + row % shape.group;
      pack_query(q + token * a.q_stride + head * a.d, a.d, queries + row * shape.units);
    }
    memset(queries + rows * shape.units, 0, sizeof(float) * static_cast<size_t>((num_rows() - rows) * shape.units));
  }

  // Where keys begin..end of the chunk lie; the others stay null.
  void find_rows(int begin, int end, const T** key_rows, const T** value_rows) const {
    const T* k = static_cast<const T*>(a.k) + tile.kv_head * a.d;
    const T* v = static_cast<const T*>(a.v) + tile.kv_head * a.d;
    const int32_t* table = a.block_tables == nullptr ? nullptr : a.block_tables + tile.seq * a.table_stride;
    for (int j = begin; j < end; ++j) {
      const int64_t at = chunk_begin + j;
      const int64_t slot = table == nullptr ? a.cu_seqlens[tile.seq] + at
                                            : table[at / a.block_size] * a.block_size + at % a.block_size;
      key_rows[j] = k + slot * a.k_stride;
      value_rows[j] = v + slot * a.v_stride;
    }
  }

  // Keys of the loaded chunk that a row sees, counted from the chunk's begin. Padding rows see none.
  Range seen_keys(int64_t row) const {
    const int64_t query = row / shape.group;
    if (query >= tile.count) return {0, 0};
    const Range keys_seen = visible(a, position(query));
    return {max_of(0, keys_seen.begin - chunk_begin), min_of(kChunk, keys_seen.end - chunk_begin)};
  }

  // Scores of kRows rows with kKeyBlock keys, before scaling: sums over kSegment units of d, joined in order.
  void score_block(int64_t row, int64_t key) {
    for (int64_t begin = 0; begin < shape.units; begin += kSegment) {
      vf acc[kRows][kVectors];
      for (auto& line : acc)
        for (auto& v : line) v = zero();
      const float* q = queries + row * shape.units;
      const int64_t end = min_of(begin + kSegment, shape.units);
      for (int64_t u = begin; u < end; ++u) {
        vf k[kVectors];
        for (int c = 0; c < kVectors; ++c) k[c] = load(keys + u * kChunk + key + c * kLanes);
        for (int r = 0; r < kRows; ++r)
          for (int c = 0; c < kVectors; ++c) acc[r][c] = P::step(acc[r][c], q + r * shape.units + u, k[c]);
      }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kVectors; ++c) {
          float* score = scores + r * kChunk + key + c * kLanes;
          store(score, begin == 0 ? acc[r][c] : add(load(score), acc[r][c]));
        }
    }
  }

  vf final_score(vf dot) const {
    const vf score = mul(dot, all(a.scale));
    if (a.softcap == 0) return score;
    return mul(all(a.softcap), tanh(div(score, all(a.softcap))));
  }

  // Turns one row's scores into packed probabilities relative to the row's maximum, in place; keys of `any`
  // that the row does not see become 0.
  void soften(float* row, Range seen, Range any, float& row_max, float& row_sum) {
    const int64_t begin = any.begin / kLanes * kLanes;
    const bool none = seen.begin >= seen.end;
    vf most = all(-INFINITY);
    for (int64_t i = begin; i < any.end && !none; i += kLanes) {
      const vf score = select_range(final_score(load(row + i)), i, seen.begin, seen.end, all(-INFINITY));
      store(row + i, score);
      most = vmax(most, score);
    }
    if (!none) row_max = max_lanes(most);
    vf total = zero();
    // Packed probabilities are never longer than the scores, so they follow behind the reads.
    for (int64_t i = begin; i < any.end; i += kLanes) {
      const vf p = none ? zero() : exp(sub(load(row + i), all(row_max)));
      total = add(total, p);
      P::store_probs(row + i / P::kValues, p);
    }
    row_sum = sum_lanes(total);
  }

  // weighted[r][dim..] = sum over the keys of `any` of probability * value.
  template <int Vectors>
  void weigh_values(Range any, int64_t dim) {
    vf acc[kRows][Vectors];
    for (auto& line : acc)
      for (auto& v : line) v = zero();
    const int64_t end = (any.end + P::kValues - 1) / P::kValues;
    for (int64_t u = any.begin / P::kValues; u < end; ++u) {
      vf v[Vectors];
      for (int c = 0; c < Vectors; ++c) v[c] = load(values + u * shape.stride + dim + c * kLanes);
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < Vectors; ++c) acc[r][c] = P::step(acc[r][c], scores + r * kChunk + u, v[c]);
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < Vectors; ++c) store(weighted + r * shape.stride + dim + c * kLanes, acc[r][c]);
  }

  const ms_attention_args& a;
  const Shape& shape;
  const Tile& tile;
  int64_t chunk_begin = 0;
  float* queries;   // [rows, units]
  float* keys;      // [units, kChunk]
  float* values;    // [kChunk / kValues, stride]
  float* scores;    // [kRows, kChunk], then packed probabilities
  float* weighted;  // [kRows, stride]
  float* max;       // [rows]
  float* sum;       // [rows]
  float* result;    // [rows, stride]
};

template <class Item>
struct Array {
  Item* items;
  explicit Array(int64_t count) : items(static_cast<Item*>(malloc(sizeof(Item) * static_cast<size_t>(count + 1)))) {
    if (items == nullptr) abort();  // the size is a few bytes a query; nothing sensible is left to do
  }
  ~Array() { free(items); }
  Array(const Array&) = delete;
  Item& operator[](int64_t i) { return items[i]; }
};

int64_t count_tiles(const ms_attention_args& a, const Shape& shape) {
  int64_t count = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s)
    count += (a.cu_seqlens[s + 1] - a.cu_seqlens[s] + shape.tile_tokens - 1) / shape.tile_tokens * a.kv_heads;
  return count;
}

// Late queries first: they see the most keys, and long tasks should not come last.
void list_tiles(const ms_attention_args& a, const Shape& shape, Array<Tile>& tiles) {
  int64_t count = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t queries = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
    for (int64_t i = (queries + shape.tile_tokens - 1) / shape.tile_tokens; i-- > 0;)
      for (int64_t h = 0; h < a.kv_heads; ++h)
        tiles[count++] = {s, h, i * shape.tile_tokens, min_of(shape.tile_tokens, queries - i * shape.tile_tokens)};
  }
}

template <class T>
void whole_tiles(const ms_attention_args& a, const Shape& shape, Array<Tile>& tiles, int64_t num_tiles) {
  parallel_for(num_tiles, [&](int64_t i) {
    TileWork<T> work(a, shape, tiles[i]);
    work.clear();
    const Range chunks = tile_chunks(a, tiles[i]);
    for (int64_t c = chunks.begin; c < chunks.end; ++c) {
      work.load_chunk(c);
      work.add_chunk();
    }
    work.finish();
  });
}

// Chunks in parallel, then merged in their order by the same function.
template <class T>
void split_tiles(const ms_attention_args& a, const Shape& shape, Array<Tile>& tiles, int64_t num_tiles) {
  struct Piece {
    int64_t tile, chunk, partial;
  };
  int64_t num_pieces = 0, partial_floats = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const Range chunks = tile_chunks(a, tiles[i]);
    num_pieces += chunks.end - chunks.begin;
    partial_floats += (chunks.end - chunks.begin) * shape.padded_rows(tiles[i].count) * shape.partial_size();
  }
  Array<Piece> pieces(num_pieces);
  Array<int64_t> first_piece(num_tiles);
  Array<float> partials(partial_floats);
  int64_t piece = 0, partial = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    first_piece[i] = piece;
    const Range chunks = tile_chunks(a, tiles[i]);
    for (int64_t c = chunks.begin; c < chunks.end; ++c) {
      pieces[piece++] = {i, c, partial};
      partial += shape.padded_rows(tiles[i].count) * shape.partial_size();
    }
  }
  first_piece[num_tiles] = piece;
  parallel_for(num_pieces, [&](int64_t p) {
    TileWork<T> work(a, shape, tiles[pieces[p].tile]);
    work.load_chunk(pieces[p].chunk);
    work.write_partials(partials.items + pieces[p].partial);
  });
  parallel_for(num_tiles, [&](int64_t i) {
    TileWork<T> work(a, shape, tiles[i]);
    work.clear();
    for (int64_t p = first_piece[i]; p < first_piece[i + 1]; ++p) work.merge_partials(partials.items + pieces[p].partial);
    work.finish();
  });
}

template <class T>
void attend_all(const ms_attention_args& a) {
  const Shape shape(a, Packed<T>::kValues);
  const int64_t num_tiles = count_tiles(a, shape);
  if (num_tiles == 0) return;
  Array<Tile> tiles(num_tiles);
  list_tiles(a, shape, tiles);
  int64_t most_chunks = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const Range chunks = tile_chunks(a, tiles[i]);
    most_chunks = max_of(most_chunks, chunks.end - chunks.begin);
  }
  const bool few = num_threads() > 1 && num_tiles < 4 * num_threads() && most_chunks > 1;
  few ? split_tiles<T>(a, shape, tiles, num_tiles) : whole_tiles<T>(a, shape, tiles, num_tiles);
}

}  // namespace

void attention(const ms_attention_args& a) {
  if (a.dtype == MS_FLOAT32) return attend_all<float>(a);
  attend_all<bf16>(a);
}

}  // namespace mainspring::MAINSPRING_ISA
