// Matrix products in the manner of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication",
// 2008): blocks of A and B are copied into panels that a register tile reads in order, so that any strides of
// A and B (transposes, views) cost the same.
//
// A panel unit is one element, or a pair of bfloat16 neighbours in k where the processor multiplies pairs.
#include "core/allocator.h"
#include "kernels/kernel_set.h"
#include "kernels/vec.h"
#include "thread_pool.h"

namespace mainspring::MAINSPRING_ISA {
namespace {

using tensor::GemmArgs;

#if defined(MAINSPRING_AVX512)
constexpr int kTileRows = 12;  // 24 accumulators of 32 registers
#elif defined(MAINSPRING_AVX2)
constexpr int kTileRows = 6;  // 12 of 16
#else
constexpr int kTileRows = 4;
#endif

MS_INLINE float as_float(float x) { return x; }
MS_INLINE double as_float(double x) { return x; }
MS_INLINE float as_float(bf16 x) { return to_float(x); }
MS_INLINE float as_float(f16 x) { return to_float(x); }

// One register of doubles: half as many lanes as floats (vd, with as many, would be two).
typedef double register_d __attribute__((vector_size(4 * kLanes)));

MS_INLINE register_d load_register(const double* p) {
  register_d v;
  memcpy(&v, p, sizeof v);
  return v;
}
MS_INLINE vf load_register(const float* p) { return load(p); }
MS_INLINE void store_register(double* p, register_d v) { memcpy(p, &v, sizeof v); }
MS_INLINE void store_register(float* p, vf v) { store(p, v); }
MS_INLINE vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
MS_INLINE register_d multiply_add(register_d a, register_d b, register_d c) {
#if defined(MAINSPRING_AVX512)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(MAINSPRING_AVX2)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}
template <class A> struct RegisterOf { using V = vf; };
template <> struct RegisterOf<double> { using V = register_d; };

// Where a step finds the kTileRows elements of A.
template <class Unit>
struct Panel {
  const Unit* p;
  MS_INLINE Unit operator[](int r) const { return p[r]; }
};
template <class Unit>
struct Lines {
  const Unit* at[(kTileRows + 2) / 3];
  int64_t row;
  MS_INLINE Unit operator[](int r) const { return at[r / 3][r % 3 * row]; }
};

// float and double: units are elements of the accumulator's type; bfloat16 and float16 are widened while they are packed.
template <class Element, class A>
struct Plain {
  using T = Element;
  using Unit = A;
  using Acc = A;
  using V = typename RegisterOf<A>::V;
  static constexpr int kWidth = sizeof(V) / sizeof(A);
  static constexpr int kVectors = 2;
  static constexpr int kPair = 1;
  static MS_INLINE Unit unit(const T* p, int64_t, int) { return as_float(*p); }
  template <class Rows>
  static MS_INLINE void step(V (&acc)[kTileRows][kVectors], const Rows& a, const Unit* b) {
    V bv[kVectors];
    for (int v = 0; v < kVectors; ++v) bv[v] = load_register(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const V av = a[r] - V{};  // in every lane
      for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(av, bv[v], acc[r][v]);
    }
  }
};

#ifdef MAINSPRING_BF16
struct Pairs {
  using T = bf16;
  using Unit = float;  // the bits of two bfloat16; moved, never computed with
  using Acc = float;
  using V = vf;
  static constexpr int kWidth = kLanes;
  static constexpr int kVectors = 2;
  static constexpr int kPair = 2;
  static MS_INLINE Unit unit(const T* p, int64_t stride, int count) {
    const uint32_t bits = p[0].bits | static_cast<uint32_t>(count > 1 ? p[stride].bits : 0) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
  }
  template <class Rows>
  static MS_INLINE void step(V (&acc)[kTileRows][kVectors], const Rows& a, const Unit* b) {
    __m512bh bv[kVectors];
    for (int v = 0; v < kVectors; ++v) bv[v] = (__m512bh)_mm512_loadu_ps(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const __m512bh av = (__m512bh)_mm512_set1_ps(a[r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], av, bv[v]);
    }
  }
};
using BFloat16Gemm = Pairs;
#else
using BFloat16Gemm = Plain<bf16, float>;
#endif

// Copies `width` lines of `depth` elements into panel[unit][width_full]; `line` and `step` are the strides
// between lines and along them. Missing lines are zero. Where kFull is no multiple of kLanes, up to kLanes - 1 units
// behind the panel are written too: panels of A are packed in order, and the last has room behind it.
template <class G, int kFull>
void pack_panel(const typename G::T* x, int64_t line, int64_t step, int width, int64_t depth, typename G::Unit* panel) {
  using T = typename G::T;
  using Unit = typename G::Unit;
  const int64_t units = (depth + G::kPair - 1) / G::kPair;
  int64_t u = 0;
  if constexpr (sizeof(Unit) == 4) {
    auto along = [&](const T* p) {  // kLanes units of one line
      if constexpr (G::kPair == 1) return load(p);
      else return load(reinterpret_cast<const float*>(p));
    };
    if (step == 1) {  // lines are contiguous along k: square transposes; a store's surplus lanes are overwritten next
      for (; u + kLanes <= depth / G::kPair; u += kLanes) {
        for (int first = 0; first < kFull; first += kLanes) {
          vf square[kLanes];
          for (int i = 0; i < kLanes; ++i)
            square[i] = first + i < width ? along(x + (first + i) * line + u * G::kPair) : zero();
          transpose(square);
          for (int i = 0; i < kLanes; ++i) store(panel + (u + i) * kFull + first, square[i]);
        }
      }
    } else if (G::kPair == 1 && line == 1 && width == kFull) {  // contiguous across lines
      for (; u < units; ++u) {
        for (int i = 0; i < kFull; i += 16) __builtin_prefetch(x + (u + 12) * step + i);  // lines lie far apart
        for (int i = 0; i < kFull; i += kLanes) {
          const int lanes = kFull - i < kLanes ? kFull - i : kLanes;
          store_lanes(panel + u * kFull + i, load_lanes(x + u * step + i, lanes), kLanes);
        }
      }
    }
  } else if (line == 1 && width == kFull) {
    for (; u < units; ++u)
      for (int i = 0; i < kFull; ++i) panel[u * kFull + i] = G::unit(x + u * step + i, step, 1);
  }
  for (; u < units; ++u) {
    const int64_t k = u * G::kPair;
    const int count = depth - k < G::kPair ? static_cast<int>(depth - k) : G::kPair;
    if (count == G::kPair && width == kFull && line == 1) {
      for (int i = 0; i < kFull; ++i) panel[u * kFull + i] = G::unit(x + k * step + i, step, G::kPair);
      continue;
    }
    for (int i = 0; i < kFull; ++i)
      panel[u * kFull + i] = i < width ? G::unit(x + k * step + i * line, step, count) : Unit{};
  }
}

// A tile of C: rows x cols of kTileRows x (kVectors * kLanes). A is a panel, or (Direct) a matrix as it lies, a_row
// between its rows and a_col along them.
template <class G, bool Direct>
void multiply_tile(int64_t units, const typename G::Unit* a, int64_t a_row, int64_t a_col, const typename G::Unit* b,
                   typename G::Acc* c, int64_t c_row, int rows, int cols, bool add) {
  constexpr int kCols = G::kVectors * G::kWidth;
  typename G::V acc[kTileRows][G::kVectors];
  for (auto& row : acc)
    for (auto& v : row) v = typename G::V{};
  for (int r = 0; r < rows; ++r)  // needed when the products are done
    for (int v = 0; v < G::kVectors; ++v) __builtin_prefetch(c + r * c_row + v * G::kWidth, 1);
  if constexpr (Direct) {
    if (a_row == 1) {
      for (int64_t u = 0; u < units; ++u) G::step(acc, Panel<typename G::Unit>{a + u * a_col}, b + u * kCols);
    } else {
      // Four pointers, three rows from each: as many as a processor's addresses can express without more registers.
      Lines<typename G::Unit> lines;
      for (int i = 0; i < (kTileRows + 2) / 3; ++i) lines.at[i] = a + 3 * i * a_row;
      lines.row = a_row;
      for (int64_t u = 0; u < units; ++u) {
        G::step(acc, lines, b + u * kCols);
        for (auto& p : lines.at) ++p;
      }
    }
  } else {
    for (int64_t u = 0; u < units; ++u) G::step(acc, Panel<typename G::Unit>{a + u * kTileRows}, b + u * kCols);
  }
  if (rows == kTileRows && cols == kCols) {
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < G::kVectors; ++v) {
        typename G::Acc* to = c + r * c_row + v * G::kWidth;
        store_register(to, add ? load_register(to) + acc[r][v] : acc[r][v]);
      }
    return;
  }
  typename G::Acc line[kCols];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < G::kVectors; ++v) store_register(line + v * G::kWidth, acc[r][v]);
    for (int j = 0; j < cols; ++j) c[r * c_row + j] = add ? c[r * c_row + j] + line[j] : line[j];
  }
}

// Few rows: the copies would cost more than the product.
template <class T, class A>
bool few_rows(const GemmArgs& g, A* c, int64_t c_row) {
  const T* a = static_cast<const T*>(g.a);
  const T* b = static_cast<const T*>(g.b);
  if (g.m > 2 || (g.b_col != 1 && (g.b_row != 1 || g.a_col != 1))) return false;
  constexpr int64_t kGrain = 64 * 1024;
  parallel_ranges(g.n, kGrain / max_of(1, g.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < g.m; ++i) {
      A* row = c + i * c_row;
      if (g.b_row == 1) {
        int64_t j = begin;
        for (; j + 4 <= end; j += 4) {  // four streams of memory at a time
          typename Traits<T>::V acc[4] = {};
          const T* lines = b + j * g.b_col;
          for_lanes(g.k, [&](int64_t p, int l) {
            const auto x = load_lanes(a + i * g.a_row + p, l);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) acc[r] = fma(x, load_lanes(lines + r * g.b_col + p, l), acc[r]);
          });
          for (int r = 0; r < 4; ++r) row[j + r] = sum_lanes(acc[r]);
        }
        for (; j < end; ++j) {
          typename Traits<T>::V acc[2] = {};
          int which = 0;
          for_lanes(g.k, [&](int64_t p, int l) {
            acc[which] = fma(load_lanes(a + i * g.a_row + p, l), load_lanes(b + j * g.b_col + p, l), acc[which]);
            which ^= 1;
          });
          row[j] = sum_lanes(acc[0] + acc[1]);
        }
      } else {
        // Stretches of the row that stay in the nearest cache, four rows of B at a time.
        using V = typename Traits<T>::V;
        constexpr int64_t kStretch = 1024;
        for (int64_t j0 = begin; j0 < end; j0 += kStretch) {
          const int64_t count = min_of(kStretch, end - j0);
          A* to = row + j0;
          for (int64_t j = 0; j < count; ++j) to[j] = 0;
          for (int64_t p = 0; p < g.k; p += 4) {
            V x[4];
            const T* w[4];
            for (int r = 0; r < 4; ++r) {
              const int64_t at = min_of(p + r, g.k - 1);
              x[r] = splat<V>(p + r < g.k ? as_float(a[i * g.a_row + at * g.a_col]) : 0);
              w[r] = b + at * g.b_row + j0;
            }
            if (p + 4 > g.k) {  // the rest one by one: 0 times what is not finite would count
              for (int r = 0; p + r < g.k; ++r)
                for_lanes(count, [&](int64_t j, int l) {
                  store_lanes(to + j, fma(x[r], load_lanes(w[r] + j, l), load_lanes(to + j, l)), l);
                });
              break;
            }
            for_lanes(count, [&](int64_t j, int l) {
              V v = load_lanes(to + j, l);
#pragma GCC unroll 4
              for (int r = 0; r < 4; ++r) v = fma(x[r], load_lanes(w[r] + j, l), v);
              store_lanes(to + j, v, l);
            });
          }
        }
      }
    }
  });
  return true;
}

// One or two products for each element, such as the gradient of a weight from a single row: nothing to copy for.
template <class T, class A>
bool shallow(const GemmArgs& g, A* c, int64_t c_row) {
  if (g.k > 2 || g.b_col != 1) return false;
  const T* a = static_cast<const T*>(g.a);
  const T* b = static_cast<const T*>(g.b);
  const T* b1 = g.k == 2 ? b + g.b_row : b;
  constexpr int64_t kGrain = 64 * 1024;
  parallel_ranges(g.m, kGrain / max_of(1, g.n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto x = splat<typename Traits<T>::V>(as_float(a[i * g.a_row]));
      const auto y = splat<typename Traits<T>::V>(g.k == 2 ? as_float(a[i * g.a_row + g.a_col]) : 0);
      A* row = c + i * c_row;
      for_lanes(g.n, [&](int64_t j, int l) {
        auto v = x * load_lanes(b + j, l);
        if (g.k == 2) v = fma(y, load_lanes(b1 + j, l), v);
        if (g.add) v = v + load_lanes(row + j, l);
        store_lanes(row + j, v, l);
      });
    }
  });
  return true;
}

template <class G>
void multiply(const GemmArgs& g, typename G::Acc* c, int64_t c_row) {
  using T = typename G::T;
  using A = typename G::Acc;
  using Unit = typename G::Unit;
  // A panel of A pays when many panels of B meet it.
  constexpr bool kCanBeDirect = std::is_same_v<T, Unit>;
  constexpr int kCols = G::kVectors * G::kWidth;
  constexpr int64_t kDepth = 512 * G::kPair;    // of k: an A block of 192 rows then takes 384 KB
  constexpr int64_t kRows = 16 * kTileRows;     // of A, in the second-level cache
  constexpr int64_t kWide = 4096;               // of B, in the last-level cache
  const T* a = static_cast<const T*>(g.a);
  const T* b = static_cast<const T*>(g.b);
  const int64_t wide = min_of(g.n, kWide), panels = (wide + kCols - 1) / kCols;
  const int64_t max_units = (min_of(g.k, kDepth) + G::kPair - 1) / G::kPair;
  const bool direct = kCanBeDirect && g.n <= 2 * kCols && (g.a_row == 1 || g.a_col == 1);
  const size_t b_bytes = static_cast<size_t>(panels * kCols * max_units + kLanes) * sizeof(Unit);
  Unit* packed_b = static_cast<Unit*>(tensor::allocate(b_bytes));
  for (int64_t n0 = 0; n0 < g.n; n0 += kWide) {
    const int64_t n1 = min_of(g.n, n0 + kWide), n_panels = (n1 - n0 + kCols - 1) / kCols;
    for (int64_t k0 = 0; k0 < g.k; k0 += kDepth) {
      const int64_t depth = min_of(kDepth, g.k - k0), units = (depth + G::kPair - 1) / G::kPair;
      parallel_ranges(n_panels, 64 * 1024 / (kCols * depth) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t j = n0 + p * kCols;
          pack_panel<G, kCols>(b + k0 * g.b_row + j * g.b_col, g.b_col, g.b_row, static_cast<int>(min_of(kCols, n1 - j)),
                               depth, packed_b + p * kCols * units);
        }
      });
      const int64_t row_blocks = (g.m + kRows - 1) / kRows;
      const int64_t splits = num_threads() == 1 || g.m * (n1 - n0) * depth < 500'000
                                 ? 1
                                 : min_of(n_panels, (2 * num_threads() + row_blocks - 1) / row_blocks);
      auto block = [&](int64_t task) {
        const int64_t i0 = task / splits * kRows, i1 = min_of(g.m, i0 + kRows), split = task % splits;
        const int64_t tiles = (i1 - i0 + kTileRows - 1) / kTileRows;
        const int64_t whole = direct ? (i1 - i0) / kTileRows : 0;  // tiles that read A where it is
        Unit* packed_a = static_cast<Unit*>(
            thread_scratch(static_cast<size_t>((tiles - whole) * kTileRows * units + kLanes) * sizeof(Unit)));
        for (int64_t t = whole; t < tiles; ++t) {
          const int64_t i = i0 + t * kTileRows;
          pack_panel<G, kTileRows>(a + i * g.a_row + k0 * g.a_col, g.a_row, g.a_col,
                                   static_cast<int>(min_of(kTileRows, i1 - i)), depth, packed_a + (t - whole) * kTileRows * units);
        }
        for (int64_t p = n_panels * split / splits; p < n_panels * (split + 1) / splits; ++p) {
          const int64_t j = n0 + p * kCols;
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = i0 + t * kTileRows;
            const int rows = static_cast<int>(min_of(kTileRows, i1 - i)), cols = static_cast<int>(min_of(kCols, n1 - j));
            const bool add = k0 > 0 || g.add;
            const Unit* panel = packed_b + p * kCols * units;
            A* to = c + i * c_row + j;
            if constexpr (kCanBeDirect) {
              if (t < whole) {
                multiply_tile<G, true>(units, a + i * g.a_row + k0 * g.a_col, g.a_row, g.a_col, panel, to, c_row, rows, cols, add);
                continue;
              }
            }
            multiply_tile<G, false>(units, packed_a + (t - whole) * kTileRows * units, 0, 0, panel, to, c_row, rows, cols, add);
          }
        }
      };
      if (row_blocks * splits > 1 && g.m * (n1 - n0) * depth >= 200'000) parallel_for(row_blocks * splits, block);
      else for (int64_t t = 0; t < row_blocks * splits; ++t) block(t);
    }
  }
  tensor::deallocate(packed_b, b_bytes);
}

template <class G>
void gemm(const GemmArgs& g) {
  using T = typename G::T;
  using A = typename G::Acc;
  if (g.m == 0 || g.n == 0) return;
  const bool direct = sizeof(T) == sizeof(A);
  const size_t bytes = direct ? 0 : static_cast<size_t>(g.m * g.n) * sizeof(A);
  A* c = direct ? static_cast<A*>(g.c) : static_cast<A*>(tensor::allocate(bytes));
  const int64_t c_row = direct ? g.c_row : g.n;
  if (g.k == 0) {
    if (g.add) return;
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j) c[i * c_row + j] = 0;
  } else if (!shallow<T, A>(g, c, c_row) && (g.add || !few_rows<T, A>(g, c, c_row))) {
    multiply<G>(g, c, c_row);
  }
  if (!direct || g.bias != nullptr) {
    const T* bias = static_cast<const T*>(g.bias);
    for (int64_t i = 0; i < g.m; ++i)
      for_lanes(g.n, [&](int64_t j, int l) {
        auto v = load_lanes(c + i * c_row + j, l);
        if (bias != nullptr) v = v + load_lanes(bias + j, l);
        store_lanes(static_cast<T*>(g.c) + i * g.c_row + j, v, l);
      });
  }
  if (!direct) tensor::deallocate(c, bytes);
}

}  // namespace

void fill_gemm(tensor::KernelSet& set) {
  set.gemm[1] = gemm<BFloat16Gemm>;
#ifndef MAINSPRING_BF16  // else those of AVX-512 serve
  set.gemm[0] = gemm<Plain<f16, float>>;
  set.gemm[2] = gemm<Plain<float, float>>;
  set.gemm[3] = gemm<Plain<double, double>>;
#endif
}

}  // namespace mainspring::MAINSPRING_ISA
