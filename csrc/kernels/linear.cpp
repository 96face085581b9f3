// Matrix products with the weights as the trainer holds them: out = x wᵀ + bias, both operands [rows, k].
//
// Each output is one dot product: kLanes (bfloat16 hardware: 2 kLanes) elements of k at a time go into one
// vector accumulator, from the first to the last, the tail masked; then the lanes are summed by one tree.
// Register tiles hold several such accumulators side by side. Whatever the tile, an output's own sequence
// of instructions stays the same: that is the canonical order.
#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

#ifdef MAINSPRING_AVX512
constexpr int kTileRows = 4, kTileCols = 4;
#else
constexpr int kTileRows = 4, kTileCols = 2;  // 8 accumulators, for 16 registers
#endif
constexpr int kPanel = 16;           // columns that one visit of a row tile computes; a multiple of kTileCols
constexpr int kSumsStride = kPanel + 4;  // between rows of sums: a narrow tile's store may run 3 floats over

// How a stretch of k is loaded and multiplied into an accumulator.
template <class T>
struct Dot {
  using Operand = vf;
  static constexpr int kStep = kLanes;
  static MS_INLINE vf load_step(const T* p) { return load(p); }
  static MS_INLINE vf load_tail(const T* p, int n) { return load_n(p, n); }
  static MS_INLINE vf step(vf acc, vf x, vf w) { return fma(x, w, acc); }
};

#ifdef MAINSPRING_BF16
template <>
struct Dot<bf16> {
  using Operand = __m512bh;
  static constexpr int kStep = 2 * kLanes;
  static MS_INLINE Operand load_step(const bf16* p) { return (Operand)_mm512_loadu_si512(p); }
  static MS_INLINE Operand load_tail(const bf16* p, int n) {
    return (Operand)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
  }
  static MS_INLINE vf step(vf acc, Operand x, Operand w) { return _mm512_dpbf16_ps(acc, x, w); }
};
#endif

// Lane sums of a tile into sums[r * kSumsStride + c].
template <int Rows, int Cols>
MS_INLINE void sum_tile(const vf (&acc)[Rows][Cols], float* sums) {
#ifdef MAINSPRING_AVX512
  vf square[4][4];
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) square[r][c] = r < Rows && c < Cols ? acc[r][c] : zero();
  const vf total = sum_lanes_4x4(square);
  _mm_storeu_ps(sums, _mm512_castps512_ps128(total));
  if constexpr (Rows > 1) _mm_storeu_ps(sums + kSumsStride, _mm512_extractf32x4_ps(total, 1));
  if constexpr (Rows > 2) _mm_storeu_ps(sums + 2 * kSumsStride, _mm512_extractf32x4_ps(total, 2));
  if constexpr (Rows > 3) _mm_storeu_ps(sums + 3 * kSumsStride, _mm512_extractf32x4_ps(total, 3));
#else
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) sums[r * kSumsStride + c] = sum_lanes(acc[r][c]);
#endif
}

// With few rows the weights come from memory: each step of a tile asks for `lines` cache lines of the next
// panel, so that reading goes on while a row tile computes on a panel that is already there. They go to the
// second level: the first holds the present panel.
struct Ahead {
  const char* next;
  int lines;

  MS_INLINE void prefetch() {
    for (int i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

template <class T, int Rows, int Cols>
void dot_tile(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t k, Ahead& ahead, float* sums) {
  using D = Dot<T>;
  vf acc[Rows][Cols];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) acc[r][c] = zero();

  auto step = [&](auto load_operand) {
    ahead.prefetch();
    typename D::Operand w_part[Cols];
    for (int c = 0; c < Cols; ++c) w_part[c] = load_operand(w + c * w_stride);
    for (int r = 0; r < Rows; ++r) {
      const auto x_part = load_operand(x + r * x_stride);
      for (int c = 0; c < Cols; ++c) acc[r][c] = D::step(acc[r][c], x_part, w_part[c]);
    }
  };
  int64_t i = 0;
  for (; i + D::kStep <= k; i += D::kStep) step([&](const T* row) { return D::load_step(row + i); });
  if (i < k) step([&](const T* row) { return D::load_tail(row + i, static_cast<int>(k - i)); });
  sum_tile<Rows, Cols>(acc, sums);
}

// One row of x: the weights are read once, so one row of w after the other, as the memory likes it best.
template <class T, int Cols>
void dot_row(const T* x, const T* w, int64_t w_stride, int64_t k, float* sums) {
  using D = Dot<T>;
  vf acc[1][Cols];
  for (int c = 0; c < Cols; ++c) {
    const T* row = w + c * w_stride;
    vf sum = zero();
    int64_t i = 0;
    for (; i + D::kStep <= k; i += D::kStep) sum = D::step(sum, D::load_step(x + i), D::load_step(row + i));
    if (i < k) {
      const int n = static_cast<int>(k - i);
      sum = D::step(sum, D::load_tail(x + i, n), D::load_tail(row + i, n));
    }
    acc[0][c] = sum;
  }
  sum_tile<1, Cols>(acc, sums);
}

// `rows` rows of x against `cols` rows of w.
template <class T, int Rows>
void dot_panel(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t k, int cols, Ahead& ahead,
               float* sums) {
  int c = 0;
  if constexpr (Rows == 1) {
    for (; c + kTileCols <= cols; c += kTileCols)
      dot_row<T, kTileCols>(x, w + c * w_stride, w_stride, k, sums + c);
  }
  for (; c + kTileCols <= cols; c += kTileCols)
    dot_tile<T, Rows, kTileCols>(x, x_stride, w + c * w_stride, w_stride, k, ahead, sums + c);
  for (; c < cols; ++c) dot_tile<T, Rows, 1>(x, x_stride, w + c * w_stride, w_stride, k, ahead, sums + c);
}

template <class T>
void dot_panel(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t k, int rows, int cols,
               Ahead& ahead, float* sums) {
  switch (rows) {
    case 1: return dot_panel<T, 1>(x, x_stride, w, w_stride, k, cols, ahead, sums);
    case 2: return dot_panel<T, 2>(x, x_stride, w, w_stride, k, cols, ahead, sums);
    case 3: return dot_panel<T, 3>(x, x_stride, w, w_stride, k, cols, ahead, sums);
    default: return dot_panel<T, 4>(x, x_stride, w, w_stride, k, cols, ahead, sums);
  }
}

template <class T, class Out>
MS_INLINE void finish_row(const float* sums, const T* bias, Out* out, int cols) {
  for_lanes(cols, [&](int64_t i, int lanes) {
    vf v = load_lanes(sums + i, lanes);
    if (bias != nullptr) v = add(v, load_lanes(bias + i, lanes));
    store_lanes(out + i, v, lanes);
  });
}

struct Block {
  int64_t row_begin, row_end, col_begin, col_end;
};

// One rectangle of the output. A row tile stays in the first-level cache while a panel of w passes it;
// the block's rows of x stay in the second-level cache while all its panels pass.
template <class T, class Out>
void linear_block(const ms_linear_args& a, const Block& block) {
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w);
  const T* bias = static_cast<const T*>(a.bias);
  Out* out = static_cast<Out*>(a.out);
  alignas(64) float sums[kTileRows * kSumsStride];
  const int64_t row_tiles = (block.row_end - block.row_begin + kTileRows - 1) / kTileRows;
  const bool few_rows = row_tiles <= kTileCols;
  const int64_t panel = few_rows ? kTileCols : kPanel;
  for (int64_t c = block.col_begin; c < block.col_end; c += panel) {
    Ahead ahead = {reinterpret_cast<const char*>(w + (c + panel) * a.w_stride),
                   few_rows ? static_cast<int>(kTileCols / max_of(1, row_tiles)) : 0};
    const int cols = static_cast<int>(min_of(panel, block.col_end - c));
    for (int64_t r = block.row_begin; r < block.row_end; r += kTileRows) {
      const int rows = static_cast<int>(min_of(kTileRows, block.row_end - r));
      dot_panel<T>(x + r * a.x_stride, a.x_stride, w + c * a.w_stride, a.w_stride, a.k, rows, cols, ahead,
                   sums);
      for (int i = 0; i < rows; ++i)
        finish_row(sums + i * kSumsStride, bias == nullptr ? nullptr : bias + c, out + (r + i) * a.out_stride + c, cols);
    }
  }
}

template <class T, class Out>
void linear_blocks(const ms_linear_args& a) {
  constexpr int64_t kRowBytes = 384 * 1024;  // of x, to stay in the second-level cache
  constexpr int64_t kTaskBytes = 96 * 1024;  // of w, at least, for a task to be worth its hand-over
  const int64_t row_bytes = max_of(1, a.k * static_cast<int64_t>(sizeof(T)));
  const int64_t block_rows = max_of(kTileRows, kRowBytes / row_bytes / kTileRows * kTileRows);
  const int64_t row_blocks = (a.m + block_rows - 1) / block_rows;
  // Small m: a task reads enough of w. Large m: a few tasks for each thread.
  const int64_t panels = (a.n + kPanel - 1) / kPanel;
  const int64_t least = max_of(1, kTaskBytes / (row_bytes * kPanel * max_of(1, min_of(a.m, 8) / 2)));
  const int64_t even = max_of(1, panels / (8 * num_threads()));
  const int64_t block_panels = max_of(least, even);
  const int64_t col_blocks = (panels + block_panels - 1) / block_panels;
  parallel_for(row_blocks * col_blocks, [&](int64_t i) {
    const int64_t row = i / col_blocks * block_rows;
    const int64_t col = i % col_blocks * block_panels * kPanel;
    linear_block<T, Out>(a, {row, min_of(row + block_rows, a.m), col, min_of(col + block_panels * kPanel, a.n)});
  });
}

template <class T>
void grouped_blocks(const ms_grouped_linear_args& a) {
  const int64_t block_cols = max_of(kPanel, min_of(256, a.n / (2 * num_threads()) / kPanel * kPanel));
  const int64_t col_blocks = (a.n + block_cols - 1) / block_cols;
  parallel_for(a.num_experts * col_blocks, [&](int64_t i) {
    const int64_t expert = i / col_blocks, col = i % col_blocks * block_cols;
    const ms_linear_args one = {a.x, a.x_stride, static_cast<const T*>(a.w) + expert * a.n * a.k, a.k, nullptr,
                                a.out, a.n, a.offsets[a.num_experts], a.n, a.k, a.dtype, a.dtype};
    linear_block<T, T>(one, {a.offsets[expert], a.offsets[expert + 1], col, min_of(col + block_cols, a.n)});
  });
}

}  // namespace

void linear(const ms_linear_args& a) {
  if (a.m == 0 || a.n == 0) return;
  if (a.dtype == MS_FLOAT32) return linear_blocks<float, float>(a);
  if (a.out_dtype == MS_FLOAT32) return linear_blocks<bf16, float>(a);
  linear_blocks<bf16, bf16>(a);
}

void grouped_linear(const ms_grouped_linear_args& a) {
  if (a.num_experts == 0 || a.n == 0) return;
  if (a.dtype == MS_FLOAT32) return grouped_blocks<float>(a);
  grouped_blocks<bf16>(a);
}

}  // namespace mainspring::MAINSPRING_ISA
