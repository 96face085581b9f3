// Ops that place elements by index, and those that pick them in other ways than gather().
#pragma once

#include "ops/order.h"

namespace mainspring::tensor::ops {

inline void check_scatter(const char* op, const Tensor& x, int d, const Tensor& index, const Tensor& source) {
  bool fits = x.ndim() == index.ndim() && source.ndim() == index.ndim();
  for (int i = 0; fits && i < x.ndim(); ++i)
    fits = index.size(i) <= source.size(i) && (i == d || index.size(i) <= x.size(i));
  if (!fits) fail(ErrorKind::Shape, op, ": the index ", index, " does not fit the input ", x, " and the source ", source);
  if (source.dtype() != x.dtype()) fail(ErrorKind::DType, op, ": the source ", source, " and the input ", x, " differ in dtype");
}
inline Tensor corner(const Tensor& x, const Dims& sizes) {  // the first elements of every dimension
  if (x.shape() == sizes) return x;
  Dims starts = sizes, steps = sizes;
  for (int d = 0; d < sizes.size(); ++d) starts[d] = 0, steps[d] = 1;
  return strided(x, starts, steps, sizes);
}

// input, but source at the places that the index names along `dim`. Of several for one place the last counts.
struct Scatter {
  static constexpr auto name = "scatter";
  struct Saved { SavedTensor index; int dim; Dims source; };
  static Tensor place(const Tensor& x, int d, const Tensor& at, const Tensor& source) {
    const Tensor out = copy_of(x), from = contiguous(corner(source, at.shape()));
    const size_t item = static_cast<size_t>(itemsize(x.dtype()));
    for_gathered(at, out, d, at.data<int64_t>(), [&](int64_t i, int64_t offset) {
      std::memcpy(out.data<char>() + static_cast<size_t>(offset) * item, from.data<char>() + static_cast<size_t>(i) * item, item);
    });
    return out;
  }
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& given) {
    const int d = wrap_dim(name, dim, x.ndim());
    const Tensor source = given->weak ? expand_to(cast(given, x.dtype()), index.shape()) : given;
    check_scatter(name, x, d, index, source);
    const Tensor at = checked_index(name, index, x.ndim() == 0 ? 1 : x.size(d));
    Tensor out = place(x, d, at, source);
    if (recording(x, source)) record<Scatter>(out, {at, d, source.shape()}, x, source);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor& at = s.index.get();
    if (grads.wanted(0)) grads[0] = forward(g, s.dim, at, zeros(at.shape(), g.dtype()));
    if (grads.wanted(1)) {
      const Tensor part = gather(g, s.dim, at);
      Dims starts = s.source, steps = s.source;
      for (int d = 0; d < s.source.size(); ++d) starts[d] = 0, steps[d] = 1;
      grads[1] = at.shape() == s.source ? part : StridedScatter::forward(part, s.source, starts, steps);
    }
  }
};

struct ScatterAddOp {
  static constexpr auto name = "scatter_add";
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& source) {
    const int d = wrap_dim(name, dim, x.ndim());
    check_scatter(name, x, d, index, source);
    const Tensor at = checked_index(name, index, x.ndim() == 0 ? 1 : x.size(d));
    return add(x, ScatterAdd::forward(corner(source, at.shape()), x.shape(), d, at));
  }
};

inline Tensor along(const char* op, const Tensor& x, int64_t dim, const Tensor& index, const Tensor& source) {
  if (index.ndim() > 1) fail(ErrorKind::Shape, op, ": the index must have one dimension, not ", index);
  const int d = wrap_dim(op, dim, x.ndim());
  if (x.ndim() == 0) return reshape(index, {});
  if (source.ndim() != x.ndim() || index.numel() != source.size(d))
    fail(ErrorKind::Shape, op, ": the index ", index, " does not fit the source ", source);
  Dims line = x.shape();
  for (int i = 0; i < x.ndim(); ++i) line[i] = i == d ? index.numel() : 1;
  return expand_to(reshape(index, line), source.shape());
}
inline Tensor cast_back(const Tensor& x, DType t) { return is_float(t) ? x : cast(x, t); }
struct IndexAddOp {
  static constexpr auto name = "index_add";
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& source, double alpha) {
    const Tensor scaled = alpha == 1 ? source : cast_back(mul(source, number(alpha)), source.dtype());
    return ScatterAddOp::forward(x, dim, along(name, x, dim, index, source), scaled);
  }
};
struct IndexCopy {
  static constexpr auto name = "index_copy";
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& source) {
    return Scatter::forward(x, dim, along(name, x, dim, index, source), source);
  }
};
struct IndexFill {
  static constexpr auto name = "index_fill";
  static Tensor forward(const Tensor& x, int64_t dim, const Tensor& index, double value) {
    Dims shape = x.shape();
    if (x.ndim() > 0) shape[wrap_dim(name, dim, x.ndim())] = index.numel();
    const Tensor filler = full(shape, value, x.dtype());
    return Scatter::forward(x, dim, along(name, x, dim, index, filler), filler);
  }
};
struct Take {
  static constexpr auto name = "take";
  static Tensor forward(const Tensor& x, const Tensor& index) {
    const Tensor out = IndexSelect::forward(reshape(x, {x.numel()}), 0, reshape(index, {index.numel()}));
    return reshape(out, index.shape());
  }
};
struct TakeAlongDim {
  static constexpr auto name = "take_along_dim";
  static Tensor forward(const Tensor& x, const Tensor& index, std::optional<int64_t> dim) {
    if (!dim) return Gather::forward(reshape(x, {x.numel()}), 0, reshape(index, {index.numel()}));
    const int d = wrap_dim(name, *dim, x.ndim());
    if (x.ndim() != index.ndim()) fail(ErrorKind::Shape, "take_along_dim: ", x, " and the index ", index, " differ in dimensions");
    Dims a = x.shape(), b = index.shape();
    if (a.size() > 0) a[d] = b[d] = 1;
    Dims own = broadcast_shapes(name, a, b), other = own;
    if (a.size() > 0) own[d] = x.size(d), other[d] = index.size(d);
    return Gather::forward(expand(x, own), d, contiguous(expand_to(index, other)));
  }
};
struct MaskedSelect {
  static constexpr auto name = "masked_select";
  static Tensor forward(const Tensor& x, const Tensor& mask) {
    if (mask.dtype() != DType::Bool) fail(ErrorKind::DType, "masked_select: the mask must be bool, not ", mask);
    const Dims shape = broadcast_shapes(name, x.shape(), mask.shape());
    const Tensor at = nonzero_positions(contiguous(reshape(contiguous(expand_to(mask, shape)), {shape.product()})));
    return IndexSelect::forward(reshape(expand(x, shape), {shape.product()}), 0, reshape(at, {at.numel()}));
  }
};
struct MaskedScatter {  // the elements of source, in order, where the mask is true
  static constexpr auto name = "masked_scatter";
  static Tensor forward(const Tensor& x, const Tensor& mask, const Tensor& source) {
    if (mask.dtype() != DType::Bool) fail(ErrorKind::DType, "masked_scatter: the mask must be bool, not ", mask);
    if (source.dtype() != x.dtype()) fail(ErrorKind::DType, "masked_scatter: ", source, " and ", x, " differ in dtype");
    const Dims shape = broadcast_shapes(name, x.shape(), mask.shape());
    const Tensor at = nonzero_positions(contiguous(reshape(contiguous(expand_to(mask, shape)), {shape.product()})));
    const int64_t count = at.numel();
    if (source.numel() < count) fail(ErrorKind::Shape, "masked_scatter: ", source, " has fewer than ", count, " elements");
    const Tensor part = Narrow::forward(reshape(source, {source.numel()}), 0, 0, count);
    return reshape(Scatter::forward(reshape(expand(x, shape), {shape.product()}), 0, reshape(at, {count}), part), shape);
  }
};

}  // namespace mainspring::tensor::ops
