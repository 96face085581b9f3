// Ops that see a whole line of elements: sorting, running sums and products, searching.
//
// Each works along the last dimension of a contiguous tensor; the others bring their dimension there.
#pragma once

#include "core/blocking.h"
#include "ops/index.h"
#include "ops/math.h"

namespace mainspring::tensor {

// Loops over the rows [.., n] of contiguous tensors (order.cpp). NaN counts as the greatest value.
void sort_rows(const Tensor& x, bool descending, bool stable, int64_t keep, const Tensor& values, const Tensor& indices);
enum class Running : uint8_t { Sum, Prod, Max, Min, LogSumExp };
void running_rows(Running kind, const Tensor& x, const Tensor& out, const Tensor* indices);
void search_rows(const Tensor& sorted, const Tensor& values, bool right, const Tensor& out);
Tensor nonzero_positions(const Tensor& x);  // int64 [n, ndim]

namespace ops {

// op(x with dim last), put back.
template <class F>
auto along_last(const char* op, const Tensor& x, int64_t dim, F f) {
  const int d = wrap_dim(op, dim, x.ndim());
  const bool moved = x.ndim() > 1 && d != x.ndim() - 1;
  auto out = f(moved ? transpose(x, d, -1) : x);
  if (!moved) return out;
  if constexpr (std::is_same_v<decltype(out), Tensor>) return transpose(out, d, -1);
  else {
    for (Tensor& t : out) t = transpose(t, d, -1);
    return out;
  }
}

// ---- sort ----

struct SortLast {
  static constexpr auto name = "sort";
  struct Saved { Dims shape; SavedTensor index; };
  static std::vector<Tensor> forward(const Tensor& x, bool descending, bool stable, int64_t keep) {
    Dims shape = x.shape();
    if (shape.size() > 0) shape[shape.size() - 1] = keep;
    Tensor values = empty(shape, x.dtype()), indices = empty(shape, DType::Int64);
    {
      const Tensor from = contiguous(x);
      BlockingRegion region(8 * x.numel());
      sort_rows(from, descending, stable, keep, values, indices);
    }
    if (recording(x)) record<SortLast>(values, {x.shape(), indices}, x);
    return {values, indices};
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (s.shape.size() == 0) grads[0] = g;
    else grads[0] = ScatterAdd::forward(g, s.shape, s.shape.size() - 1, s.index.get());
  }
};
inline int64_t line_length(const Tensor& x) { return x.ndim() == 0 ? 1 : x.size(x.ndim() - 1); }

struct Sort {
  static constexpr auto name = "sort";
  static std::vector<Tensor> forward(const Tensor& x, int64_t dim, bool descending, bool stable) {
    return along_last(name, x, dim, [&](const Tensor& t) { return SortLast::forward(t, descending, stable, line_length(t)); });
  }
};
struct Argsort {
  static constexpr auto name = "argsort";
  static Tensor forward(const Tensor& x, int64_t dim, bool descending, bool stable) {
    return Sort::forward(detach(x), dim, descending, stable)[1];
  }
};
struct Msort {
  static constexpr auto name = "msort";
  static Tensor forward(const Tensor& x) { return Sort::forward(x, 0, false, false)[0]; }
};
struct Topk {
  static constexpr auto name = "topk";
  static std::vector<Tensor> forward(const Tensor& x, int64_t k, int64_t dim, bool largest, bool sorted) {
    (void)sorted;  // the result always is
    const int d = wrap_dim(name, dim, x.ndim());
    const int64_t n = x.ndim() == 0 ? 1 : x.size(d);
    if (k < 0 || k > n) fail(ErrorKind::Index, "topk: k is ", k, ", but dimension ", d, " of ", x, " has ", n, " elements");
    return along_last(name, x, dim, [&](const Tensor& t) { return SortLast::forward(t, largest, false, k); });
  }
};
inline std::vector<Tensor> picked(const char* op, const Tensor& x, int64_t k, int64_t dim, bool keepdim) {
  const int d = wrap_dim(op, dim, x.ndim());
  const int64_t n = x.ndim() == 0 ? 1 : x.size(d);
  if (k < 1 || k > n) fail(ErrorKind::Index, op, ": k is ", k, ", but dimension ", d, " of ", x, " has ", n, " elements");
  std::vector<Tensor> out = Sort::forward(x, dim, false, true);
  if (x.ndim() == 0) return out;
  for (Tensor& t : out) {
    t = Narrow::forward(t, d, k - 1, 1);
    if (!keepdim) t = Squeeze::forward(t, d);
  }
  return out;
}
struct Kthvalue {
  static constexpr auto name = "kthvalue";
  static std::vector<Tensor> forward(const Tensor& x, int64_t k, int64_t dim, bool keepdim) {
    return picked(name, x, k, dim, keepdim);
  }
};

// ---- running sums and the like ----

template <class Op, Running kind>
Tensor run_last(const Tensor& x, const Tensor* indices = nullptr) {
  const bool widen = (kind == Running::Sum || kind == Running::Prod) && !is_float(x.dtype());
  const Tensor from = contiguous(widen ? cast(x, DType::Int64) : x);
  const Tensor out = empty_like(from);
  BlockingRegion region(2 * x.numel());
  running_rows(kind, from, out, indices);
  return out;
}
inline Tensor flip_last(const Tensor& x) {
  if (x.ndim() == 0) return x;
  Dims starts = x.shape(), steps = x.shape();
  for (int d = 0; d < x.ndim(); ++d) starts[d] = 0, steps[d] = 1;
  starts[x.ndim() - 1] = x.size(x.ndim() - 1) - 1;
  steps[x.ndim() - 1] = -1;
  return strided(x, starts, steps, x.shape());
}

struct CumsumLast {
  static constexpr auto name = "cumsum";
  using Saved = Nothing;
  static Tensor forward(const Tensor& x) {
    Tensor out = run_last<CumsumLast, Running::Sum>(x);
    if (recording(x)) record<CumsumLast>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) { grads[0] = flip_last(forward(flip_last(g))); }
};
struct Cumsum {
  static constexpr auto name = "cumsum";
  static Tensor forward(const Tensor& x, int64_t dim) { return along_last(name, x, dim, CumsumLast::forward); }
};

struct CumprodLast {
  static constexpr auto name = "cumprod";
  struct Saved { SavedTensor x; SavedOutput out; };
  static Tensor forward(const Tensor& x) {
    Tensor out = run_last<CumprodLast, Running::Prod>(x);
    if (recording(x)) record<CumprodLast>(out, {x, out}, x);
    return out;
  }
  // sum over j >= i of g[j] prod(x[k], k <= j, k != i): y[j] / x[i] unless an x is 0.
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor& x = s.x.get();
    if (x.ndim() == 0) {
      grads[0] = g;
      return;
    }
    const Tensor zero = eq(detach(x), number(0));
    const Tensor any = reduce_loop(ReduceKernel::Max, zero, wrap_dims(name, {}, x.ndim()), false);
    if (x.numel() == 0 || read_int(any.data(), any.dtype()) == 0) {
      grads[0] = div(flip_last(CumsumLast::forward(flip_last(mul(g, s.out.get())))), x);
      return;
    }
    const int64_t n = x.size(x.ndim() - 1);
    const Tensor own = zeros({n, n}, DType::Bool), later = zeros({n, n}, DType::Bool);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j) {
        own.data<uint8_t>()[i * n + i] = 1;
        later.data<uint8_t>()[i * n + j] = 1;
      }
    const Tensor line = Unsqueeze::forward(x, -2);  // [.., 1, n] against [i, j]
    const Tensor without = forward(where(own, number(1), line));
    grads[0] = sum(where(later, mul(without, Unsqueeze::forward(g, -2)), number(0)), {-1}, false);
  }
};
struct Cumprod {
  static constexpr auto name = "cumprod";
  static Tensor forward(const Tensor& x, int64_t dim) { return along_last(name, x, dim, CumprodLast::forward); }
};

template <class Op, Running kind>
struct CumExtremum {
  struct Saved { Dims shape; SavedTensor index; };
  static std::vector<Tensor> last(const Tensor& x) {
    const Tensor indices = empty(x.shape(), DType::Int64);
    Tensor out = run_last<Op, kind>(x, &indices);
    if (recording(x)) record<Op>(out, {x.shape(), indices}, x);
    return {out, indices};
  }
  static std::vector<Tensor> forward(const Tensor& x, int64_t dim) { return along_last(Op::name, x, dim, last); }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = s.shape.size() == 0 ? g : ScatterAdd::forward(g, s.shape, s.shape.size() - 1, s.index.get());
  }
};
struct Cummax : CumExtremum<Cummax, Running::Max> { static constexpr auto name = "cummax"; };
struct Cummin : CumExtremum<Cummin, Running::Min> { static constexpr auto name = "cummin"; };

struct LogcumsumexpLast {
  static constexpr auto name = "logcumsumexp";
  struct Saved { SavedTensor x; SavedOutput out; };
  static Tensor forward(const Tensor& x) {
    if (!is_float(x.dtype())) fail(ErrorKind::DType, "logcumsumexp: needs a floating-point tensor, not ", x);
    Tensor out = run_last<LogcumsumexpLast, Running::LogSumExp>(x);
    if (recording(x)) record<LogcumsumexpLast>(out, {x, out}, x);
    return out;
  }
  // exp(x[i]) sum over j >= i of g[j] exp(-y[j]), in logarithms and apart for both signs of g.
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor &x = s.x.get(), y = s.out.get();
    auto part = [&](const Tensor& positive) {
      const Tensor safe = where(lt(number(0), positive), positive, number(1));
      const Tensor logs = where(lt(number(0), positive), sub(log(safe), y), number(-std::numeric_limits<double>::infinity()));
      return exp(add(flip_last(forward(flip_last(logs))), x));
    };
    grads[0] = sub(part(g), part(neg(g)));
  }
};
struct Logcumsumexp {
  static constexpr auto name = "logcumsumexp";
  static Tensor forward(const Tensor& x, int64_t dim) { return along_last(name, x, dim, LogcumsumexpLast::forward); }
};

// ---- products ----

struct ProdLast {  // over the last dimension, which disappears
  static constexpr auto name = "prod";
  struct Saved { SavedTensor x; SavedOutput out; };
  static Tensor forward(const Tensor& x) {
    Tensor out = reduce(ReduceKernel::Prod, x, {x.ndim() - 1}, false, true);
    if (recording(x)) record<ProdLast>(out, {x, out}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor& x = s.x.get();
    const Tensor zero = eq(detach(x), number(0));
    const Tensor any = reduce_loop(ReduceKernel::Max, zero, wrap_dims(name, {}, x.ndim()), false);
    const Tensor up = Unsqueeze::forward(g, -1);
    if (x.numel() == 0 || read_int(any.data(), any.dtype()) == 0) {
      grads[0] = div(mul(up, Unsqueeze::forward(s.out.get(), -1)), x);
      return;
    }
    // The product of all before times the product of all behind.
    const int64_t n = x.size(x.ndim() - 1);
    Dims one = x.shape();
    one[x.ndim() - 1] = 1;
    const Tensor edge = full_int(one, 1, x.dtype());
    const Tensor before = Cat::forward({edge, CumprodLast::forward(Narrow::forward(x, -1, 0, n - 1))}, -1);
    const Tensor tail = flip_last(CumprodLast::forward(flip_last(Narrow::forward(x, -1, 1, n - 1))));
    grads[0] = mul(up, mul(before, Cat::forward({tail, edge}, -1)));
  }
};
struct Prod {
  static constexpr auto name = "prod";
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    if (!recording(x) || x.ndim() == 0) {
      if (x.ndim() == 0) return Clone::forward(is_float(x.dtype()) ? x : cast(x, DType::Int64));
      return reduce(ReduceKernel::Prod, x, wrap_dims(name, dim, x.ndim()), keepdim, true);
    }
    const Dims dims = wrap_dims(name, dim, x.ndim()), kept = drop_dims(x.shape(), dims);
    Dims order;
    for (int pass = 0; pass < 2; ++pass)
      for (int d = 0; d < x.ndim(); ++d) {
        bool reduced = false;
        for (const int64_t r : dims) reduced |= r == d;
        if (reduced == (pass == 1)) order.push_back(d);
      }
    Dims flat = kept;
    flat.push_back(count_of(x, dims));
    const Tensor out = ProdLast::forward(reshape(permute(x, order), flat));
    return with_kept_dims(out, x.shape(), dims, !keepdim);
  }
};

// ---- searching ----

struct Nonzero {
  static constexpr auto name = "nonzero";
  static Tensor forward(const Tensor& x) { return nonzero_positions(contiguous(x)); }
};
struct Searchsorted {
  static constexpr auto name = "searchsorted";
  static Tensor forward(const Tensor& sorted, const Tensor& values, bool right) {
    if (sorted.ndim() == 0) fail(ErrorKind::Shape, "searchsorted: the sorted sequence needs a dimension, not ", sorted);
    bool fits = sorted.ndim() == 1 || values.ndim() == sorted.ndim();
    for (int d = 0; fits && sorted.ndim() > 1 && d + 1 < sorted.ndim(); ++d) fits = sorted.size(d) == values.size(d);
    if (!fits) fail(ErrorKind::Shape, "searchsorted: ", sorted, " and ", values, " differ before the last dimension");
    const DType t = result_type(sorted, values);
    Tensor out = empty(values.shape(), DType::Int64);
    search_rows(contiguous(cast(sorted, t)), contiguous(cast(values, t)), right, out);
    return out;
  }
};
struct Bucketize {
  static constexpr auto name = "bucketize";
  static Tensor forward(const Tensor& x, const Tensor& boundaries, bool right) {
    if (boundaries.ndim() != 1) fail(ErrorKind::Shape, "bucketize: the boundaries must have one dimension, not ", boundaries);
    return Searchsorted::forward(boundaries, x, right);
  }
};

// (values, index of the first of each, where each element went, counts) of the flattened tensor, sorted.
struct UniqueAll {
  static constexpr auto name = "unique_all";
  static std::vector<Tensor> forward(const Tensor& x) {
    GradMode off(false);
    const Tensor flat = reshape(detach(x), {x.numel()});
    const std::vector<Tensor> sorted = SortLast::forward(flat, false, true, x.numel());
    const int64_t n = x.numel(), item = itemsize(x.dtype());
    const char* v = sorted[0].data<char>();
    const int64_t* at = sorted[1].data<int64_t>();
    std::vector<int64_t> starts;
    Tensor inverse = empty(x.shape(), DType::Int64);
    for (int64_t i = 0; i < n; ++i) {
      const bool same = i > 0 && (is_float(x.dtype()) ? read_double(v + i * item, x.dtype()) == read_double(v + (i - 1) * item, x.dtype())
                                                      : read_int(v + i * item, x.dtype()) == read_int(v + (i - 1) * item, x.dtype()));
      if (!same) starts.push_back(i);
      inverse.data<int64_t>()[at[i]] = static_cast<int64_t>(starts.size()) - 1;
    }
    const int64_t count = static_cast<int64_t>(starts.size());
    Tensor where_ = empty({count}, DType::Int64), counts = empty({count}, DType::Int64);
    for (int64_t i = 0; i < count; ++i) {
      where_.data<int64_t>()[i] = at[starts[static_cast<size_t>(i)]];
      counts.data<int64_t>()[i] = (i + 1 < count ? starts[static_cast<size_t>(i) + 1] : n) - starts[static_cast<size_t>(i)];
    }
    return {IndexSelect::forward(flat, 0, where_), where_, inverse, counts};
  }
};

}  // namespace ops
}  // namespace mainspring::tensor
