#include "ops/loops.h"

#include <limits>

#include "core/blocking.h"
#include "thread_pool.h"

namespace mainspring::tensor {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // elements that make a task worth its hand-over

int64_t broadcast_stride(const Tensor& t, int dim_from_end, int64_t size) {
  const int d = t.ndim() - 1 - dim_from_end;
  return d < 0 || (t.size(d) == 1 && size != 1) ? 0 : t.stride(d);
}

// Operand 0 is the contiguous output of that shape.
template <class... Ts>
auto walk_output(const Dims& shape, const Ts&... inputs) {
  constexpr int N = 1 + sizeof...(inputs);
  Walk<N> walk;
  const Dims out = contiguous_strides(shape);
  for (int d = 0; d < shape.size(); ++d) {
    const int64_t size = shape[d];
    const int64_t steps[N] = {out[d], broadcast_stride(inputs, shape.size() - 1 - d, size)...};
    walk.add(size, steps);
  }
  return walk;
}

void check_kernel(const void* fn, const char* op, DType t) {
  if (fn == nullptr) fail(ErrorKind::DType, op, ": not defined for ", name(t));
}

void run_binary(BinaryFn fn, const Tensor& a, const Tensor& b, const Tensor& out) {
  const int64_t n = out.numel();
  if (n == 0) return;
  const int item = itemsize(a.dtype()), out_item = itemsize(out.dtype());
  const char* pa = a.data<char>();
  const char* pb = b.data<char>();
  char* po = out.data<char>();
  if (a.contiguous() && b.contiguous() && (a.numel() == n || a.numel() == 1) && (b.numel() == n || b.numel() == 1)) {
    const int64_t sa = a.numel() == n, sb = b.numel() == n;
    if (n < 2 * kGrain) return fn(n, pa, sa, pb, sb, po);
    BlockingRegion region(n);
    return parallel_ranges(n, kGrain, [&](int64_t begin, int64_t end) {
      fn(end - begin, pa + begin * sa * item, sa, pb + begin * sb * item, sb, po + begin * out_item);
    });
  }
  const Walk<3> walk = walk_output(out.shape(), a, b);
  const int64_t inner = walk.inner(), sa = walk.inner_stride(1), sb = walk.inner_stride(2);
  auto rows = [&](int64_t begin, int64_t end) {
    walk.for_rows(begin, end, [&](int64_t, const int64_t* at) {
      fn(inner, pa + at[1] * item, sa, pb + at[2] * item, sb, po + at[0] * out_item);
    });
  };
  if (n < 2 * kGrain) return rows(0, walk.rows());
  BlockingRegion region(n);
  parallel_ranges(walk.rows(), kGrain / inner, rows);
}

// ---- copies ----

using CopyFn = void (*)(int64_t n, const void* from, int64_t sf, void* to, int64_t st);

template <class From, class To, bool to_bool>
void copy_row(int64_t n, const void* from_, int64_t sf, void* to_, int64_t st) {
  const From* from = static_cast<const From*>(from_);
  To* to = static_cast<To*>(to_);
  for (int64_t i = 0; i < n; ++i) {
    const auto value = value_of(from[i * sf]);
    if constexpr (to_bool) to[i * st] = value != 0;
    else to[i * st] = from_value<To>(value);
  }
}

template <class T>
void move_row(int64_t n, const void* from_, int64_t sf, void* to_, int64_t st) {
  const T* from = static_cast<const T*>(from_);
  T* to = static_cast<T*>(to_);
  if (sf == 1 && st == 1) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i * st] = from[i * sf];
}

template <class Half>
void widen_row(int64_t n, const void* from, int64_t sf, void* to, int64_t st) {
  constexpr auto kernel = std::is_same_v<Half, Float16> ? &KernelSet::widen_half : &KernelSet::widen;
  if (sf == 1 && st == 1) return (kernels().*kernel)(n, from, to);
  copy_row<Half, float, false>(n, from, sf, to, st);
}
template <class Half>
void narrow_row(int64_t n, const void* from, int64_t sf, void* to, int64_t st) {
  constexpr auto kernel = std::is_same_v<Half, Float16> ? &KernelSet::narrow_half : &KernelSet::narrow;
  if (sf == 1 && st == 1) return (kernels().*kernel)(n, from, to);
  copy_row<float, Half, false>(n, from, sf, to, st);
}

CopyFn copy_fn(DType from, DType to) {
  if (from == to) {
    switch (itemsize(from)) {
      case 1: return move_row<uint8_t>;
      case 2: return move_row<uint16_t>;
      case 4: return move_row<uint32_t>;
      default: return move_row<uint64_t>;
    }
  }
  if (to == DType::Float32 && from == DType::BFloat16) return widen_row<BFloat16>;
  if (to == DType::Float32 && from == DType::Float16) return widen_row<Float16>;
  if (from == DType::Float32 && to == DType::BFloat16) return narrow_row<BFloat16>;
  if (from == DType::Float32 && to == DType::Float16) return narrow_row<Float16>;
  return with_type(from, [&]<class From>() -> CopyFn {
    if (to == DType::Bool) return copy_row<From, uint8_t, true>;
    return with_type(to, [&]<class To>() -> CopyFn { return copy_row<From, To, false>; });
  });
}

}  // namespace

DType result_type(const Tensor& a, const Tensor& b) {
  const DType ta = a.dtype(), tb = b.dtype();
  if (ta == tb) return ta;
  auto priority = [](const Tensor& t) { return t->weak ? 0 : t.ndim() == 0 ? 1 : 2; };
  const int pa = priority(a), pb = priority(b);
  if (pa == pb) return promote(ta, tb);
  const DType high = pa > pb ? ta : tb, low = pa > pb ? tb : ta;
  if (info(low).category <= info(high).category) return high;
  const bool weak = (pa > pb ? b : a)->weak;
  return weak && low == DType::Float64 ? DType::Float32 : promote(high, low);
}

void copy_into(const Tensor& to, const Tensor& from) {
  if (to.numel() == 0) return;
  const CopyFn fn = copy_fn(from.dtype(), to.dtype());
  const int item_from = itemsize(from.dtype()), item_to = itemsize(to.dtype());
  Walk<2> walk;
  for (int d = 0; d < to.ndim(); ++d) {
    const int64_t steps[2] = {to.stride(d), broadcast_stride(from, to.ndim() - 1 - d, to.size(d))};
    walk.add(to.size(d), steps);
  }
  const char* pf = from.data<char>();
  char* pt = to.data<char>();
  const int64_t inner = walk.inner(), st = walk.inner_stride(0), sf = walk.inner_stride(1);
  auto rows = [&](int64_t begin, int64_t end) {
    walk.for_rows(begin, end, [&](int64_t, const int64_t* at) {
      fn(inner, pf + at[1] * item_from, sf, pt + at[0] * item_to, st);
    });
  };
  BlockingRegion region(to.numel());
  if (to.numel() < 2 * kGrain) return rows(0, walk.rows());
  if (walk.rows() > 1) return parallel_ranges(walk.rows(), kGrain / inner, rows);
  parallel_ranges(inner, kGrain, [&](int64_t begin, int64_t end) {
    fn(end - begin, pf + begin * sf * item_from, sf, pt + begin * st * item_to, st);
  });
}

Tensor copy_of(const Tensor& t) {
  Tensor out = empty_like(t);
  copy_into(out, t);
  return out;
}
Tensor contiguous(const Tensor& t) { return t.contiguous() ? t : copy_of(t); }

Tensor cast(const Tensor& t, DType dtype) {
  if (t.dtype() == dtype) return t;
  Tensor out = empty_like(t, dtype);
  copy_into(out, t);
  return out;
}
Tensor as_float(const Tensor& t) { return is_float(t.dtype()) ? t : cast(t, DType::Float32); }

Tensor expand_to(const Tensor& t, const Dims& shape) {
  Dims strides = shape;
  for (int d = 0; d < shape.size(); ++d) strides[d] = broadcast_stride(t, shape.size() - 1 - d, shape[d]);
  return make_view(t, shape, strides);
}

Tensor binary_loop(BinaryKernel kernel, const char* op, const Tensor& a, const Tensor& b) {
  DType t = result_type(a, b);
  if (kernel == BinaryKernel::Div && !is_float(t)) t = DType::Float32;
  const BinaryFn fn = kernels().binary[static_cast<int>(kernel)][static_cast<int>(t)];
  check_kernel(reinterpret_cast<const void*>(fn), op, t);
  const bool same = a.same_shape(b);
  Tensor out = empty(same ? a.shape() : broadcast_shapes(op, a.shape(), b.shape()), t);
  if (a.dtype() == t && b.dtype() == t) run_binary(fn, a, b, out);
  else run_binary(fn, cast(a, t), cast(b, t), out);
  return out;
}

Tensor compare_loop(CompareKernel kernel, const char* op, const Tensor& a, const Tensor& b) {
  const DType t = result_type(a, b);
  Tensor out = empty(broadcast_shapes(op, a.shape(), b.shape()), DType::Bool);
  run_binary(kernels().compare[static_cast<int>(kernel)][static_cast<int>(t)], cast(a, t), cast(b, t), out);
  return out;
}

void binary_in_place(BinaryKernel kernel, const char* op, const Tensor& a, const Tensor& b) {
  DType t = result_type(a, b);
  if (kernel == BinaryKernel::Div && !is_float(t)) t = DType::Float32;
  if (info(t).category > info(a.dtype()).category)
    fail(ErrorKind::DType, op, ": the result is ", name(t), " and cannot be written into ", a);
  if (!(broadcast_shapes(op, a.shape(), b.shape()) == a.shape()))
    fail(ErrorKind::Shape, op, ": the result of ", a, " and ", b, " does not fit into ", a.shape());
  if (t == a.dtype() && b.dtype() == t && a.contiguous() && b.contiguous() && (b.same_shape(a) || b.numel() == 1)) {
    const BinaryFn fn = kernels().binary[static_cast<int>(kernel)][static_cast<int>(t)];
    check_kernel(reinterpret_cast<const void*>(fn), op, t);
    run_binary(fn, a, b, a);  // an element is read before it is written
  } else {
    copy_into(a, binary_loop(kernel, op, a, b));
  }
  a.bump_version();
}

Tensor unary_loop(UnaryKernel kernel, const char* op, const Tensor& given, bool to_float) {
  const Tensor converted = to_float ? as_float(given) : Tensor();
  const Tensor& a = to_float ? converted : given;
  const UnaryFn fn = kernels().unary[static_cast<int>(kernel)][static_cast<int>(a.dtype())];
  check_kernel(reinterpret_cast<const void*>(fn), op, a.dtype());
  Tensor out = empty_like(a);
  const int64_t n = a.numel();
  if (n == 0) return out;
  const int item = itemsize(a.dtype());
  const char* pa = a.data<char>();
  char* po = out.data<char>();
  if (a.contiguous()) {
    if (n < kGrain) {
      fn(n, pa, 1, po);
      return out;
    }
    BlockingRegion region(4 * n);
    parallel_ranges(n, kGrain / 4, [&](int64_t begin, int64_t end) { fn(end - begin, pa + begin * item, 1, po + begin * item); });
    return out;
  }
  const Walk<2> walk = walk_output(a.shape(), a);
  BlockingRegion region(4 * n);
  walk.for_rows(0, walk.rows(), [&](int64_t, const int64_t* at) {
    fn(walk.inner(), pa + at[1] * item, walk.inner_stride(1), po + at[0] * item);
  });
  return out;
}

Tensor where_loop(const Tensor& condition, const Tensor& a, const Tensor& b) {
  if (condition.dtype() != DType::Bool) fail(ErrorKind::DType, "where: the condition must be bool, not ", condition);
  const DType t = result_type(a, b);
  const Tensor x = cast(a, t), y = cast(b, t);
  Tensor out = empty(broadcast_shapes("where", condition.shape(), broadcast_shapes("where", a.shape(), b.shape())), t);
  if (out.numel() == 0) return out;
  const Walk<4> walk = walk_output(out.shape(), condition, x, y);
  BlockingRegion region(out.numel());
  const int64_t inner = walk.inner(), sc = walk.inner_stride(1), sx = walk.inner_stride(2), sy = walk.inner_stride(3);
  with_type(t, [&]<class T>() {
    walk.for_rows(0, walk.rows(), [&](int64_t, const int64_t* at) {
      const uint8_t* c = condition.data<uint8_t>() + at[1];
      const T* px = x.data<T>() + at[2];
      const T* py = y.data<T>() + at[3];
      T* po = out.data<T>() + at[0];
      for (int64_t i = 0; i < inner; ++i) po[i] = c[i * sc] ? px[i * sx] : py[i * sy];
    });
  });
  return out;
}

// ---- reductions ----

namespace {

DType accumulator(DType t) {
  if (!is_float(t)) return DType::Int64;
  return t == DType::Float64 ? DType::Float64 : DType::Float32;
}

void set_identity(const Tensor& acc, ReduceKernel kernel) {
  const bool real = is_float(acc.dtype());
  const double infinity = std::numeric_limits<double>::infinity();
  double x = 0;
  int64_t i = 0;
  switch (kernel) {
    case ReduceKernel::Prod: x = 1, i = 1; break;
    case ReduceKernel::Max: x = -infinity, i = std::numeric_limits<int64_t>::min(); break;
    case ReduceKernel::Min: x = infinity, i = std::numeric_limits<int64_t>::max(); break;
    default: break;
  }
  copy_into(acc, real ? full({}, x, acc.dtype()) : full_int({}, i, acc.dtype()));
}

struct Split {
  Walk<2> kept;     // operand 0: the accumulators, 1: the input
  Walk<2> reduced;  // operand 1: the input
};

Split split_dims(const Tensor& t, const Tensor& out, const bool* reduced) {
  Split s;
  for (int d = 0; d < t.ndim(); ++d) {
    const int64_t steps[2] = {reduced[d] ? 0 : out.stride(d), t.stride(d)};
    (reduced[d] ? s.reduced : s.kept).add(t.size(d), steps);
  }
  return s;
}

// The kept dimension is innermost in memory: whole rows are added to a row of accumulators, in blocks of 64 rows
// so that a long sum in float32 stays accurate.
void reduce_columns(ReduceKernel kernel, const Tensor& t, const Tensor& acc, const Split& s) {
  const ColumnReduceFn fn = kernels().column_reduce[static_cast<int>(kernel)][static_cast<int>(t.dtype())];
  const ColumnReduceFn join = kernels().column_reduce[static_cast<int>(kernel)][static_cast<int>(acc.dtype())];
  const int item = itemsize(t.dtype()), acc_item = itemsize(acc.dtype());
  const int64_t width = s.kept.inner();
  constexpr int64_t kBlock = 64;
  constexpr int64_t kPiece = 4096;  // accumulators at a time, so that they stay in the first-level cache
  const Tensor part = empty({width < kPiece ? width : kPiece}, acc.dtype());
  const int64_t rows = s.reduced.rows() * s.reduced.inner();
  Walk<2> all = s.reduced;  // walked to the last dimension: an inner one of size 1 is appended
  if (all.ndim > 0) {
    all.sizes[all.ndim] = 1;
    all.strides[0][all.ndim] = all.strides[1][all.ndim] = 0;
    ++all.ndim;
  }
  s.kept.for_rows(0, s.kept.rows(), [&](int64_t, const int64_t* at) {
    for (int64_t c = 0; c < width; c += kPiece) {
      const int64_t n = width - c < kPiece ? width - c : kPiece;
      char* to = acc.data<char>() + (at[0] + c) * acc_item;
      const char* from = t.data<char>() + (at[1] + c) * item;
      for (int64_t r = 0; r < rows; r += kBlock) {
        const int64_t end = r + kBlock < rows ? r + kBlock : rows;
        const Tensor block = make_view(part, {n}, {1});
        set_identity(block, kernel);
        all.for_rows(r, end, [&](int64_t, const int64_t* row) { fn(n, from + row[1] * item, block.data()); });
        join(n, block.data(), to);
      }
    }
  });
}

}  // namespace

Tensor reduce_loop(ReduceKernel kernel, const Tensor& t, const Dims& dims, bool widen) {
  bool reduced[kMaxDims] = {};
  for (const int64_t d : dims) reduced[d] = true;
  Dims shape = t.shape();
  for (int d = 0; d < shape.size(); ++d)
    if (reduced[d]) shape[d] = 1;
  const DType acc_type = accumulator(t.dtype());
  Tensor acc = empty(shape, acc_type);
  set_identity(acc, kernel);
  if (t.numel() != 0) {
    const Split s = split_dims(t, acc, reduced);
    const bool columns = s.kept.ndim > 0 && s.kept.inner_stride(1) == 1 && s.kept.inner_stride(0) == 1 &&
                         s.kept.inner() >= 8 && s.reduced.ndim > 0 && s.reduced.inner_stride(1) != 1;
    if (columns) {
      reduce_columns(kernel, t, acc, s);
    } else {
      const RowReduceFn fn = kernels().row_reduce[static_cast<int>(kernel)][static_cast<int>(t.dtype())];
      const int item = itemsize(t.dtype()), acc_item = itemsize(acc_type);
      Walk<2> kept = s.kept;  // one accumulator at a time: an inner dimension of size 1 is appended
      if (kept.ndim > 0) {
        kept.sizes[kept.ndim] = 1;
        kept.strides[0][kept.ndim] = kept.strides[1][kept.ndim] = 0;
        ++kept.ndim;
      }
      BlockingRegion region(t.numel());
      const int64_t work = s.reduced.rows() * s.reduced.inner();
      parallel_ranges(kept.rows(), kGrain / (work > 0 ? work : 1), [&](int64_t begin, int64_t end) {
        kept.for_rows(begin, end, [&](int64_t, const int64_t* at) {
          s.reduced.for_rows(0, s.reduced.rows(), [&](int64_t, const int64_t* row) {
            fn(s.reduced.inner(), t.data<char>() + (at[1] + row[1]) * item, s.reduced.inner_stride(1),
               acc.data<char>() + at[0] * acc_item);
          });
        });
      });
    }
  }
  return is_float(t.dtype()) || !widen ? cast(acc, t.dtype()) : acc;
}

Tensor arg_reduce_loop(bool max, const Tensor& t, int dim) {
  Dims shape = t.shape();
  if (shape.size() > 0) shape[dim] = 1;
  Tensor out = empty(shape, DType::Int64);
  const int64_t n = t.ndim() == 0 ? 1 : t.size(dim), stride = t.ndim() == 0 ? 1 : t.stride(dim);
  Walk<2> walk;
  for (int d = 0; d < t.ndim(); ++d) {
    const int64_t steps[2] = {out.stride(d), t.stride(d)};
    if (d != dim) walk.add(t.size(d), steps);
  }
  walk.sizes[walk.ndim] = 1;
  walk.strides[0][walk.ndim] = walk.strides[1][walk.ndim] = 0;
  ++walk.ndim;
  if (out.numel() == 0) return out;
  BlockingRegion region(t.numel());
  with_type(t.dtype(), [&]<class T>() {
    walk.for_rows(0, walk.rows(), [&](int64_t, const int64_t* at) {
      const T* x = t.data<T>() + at[1];
      int64_t best = 0;
      auto most = value_of(x[0]);
      for (int64_t i = 1; i < n && most == most; ++i) {
        const auto v = value_of(x[i * stride]);
        if (v != v || (max ? v > most : v < most)) most = v, best = i;
      }
      out.data<int64_t>()[at[0]] = best;
    });
  });
  return out;
}

}  // namespace mainspring::tensor
