// Ops that move, view or join elements without computing with them.
#pragma once

#include <algorithm>

#include "ops/reduce.h"

namespace mainspring::tensor::ops {

// One size may be -1: it follows from the others.
inline Dims infer_shape(const char* op, const Tensor& x, const Dims& shape) {
  Dims out = shape;
  int unknown = -1;
  int64_t known = 1;
  for (int i = 0; i < shape.size(); ++i) {
    if (shape[i] == -1 && unknown < 0) unknown = i;
    else if (shape[i] < 0) fail(ErrorKind::Shape, op, ": ", shape, " is not a shape (one size may be -1)");
    else known *= shape[i];
  }
  if (unknown >= 0 && known != 0) out[unknown] = x.numel() / known;
  if (out.product() != x.numel() || (unknown >= 0 && known == 0))
    fail(ErrorKind::Shape, op, ": ", x, " has ", x.numel(), " elements and cannot become ", shape);
  return out;
}

// Strides with which `x` reads as `shape` in place, if there are any.
inline bool view_strides(const Tensor& x, const Dims& shape, Dims& strides) {
  strides = shape;
  if (x.contiguous()) {
    strides = contiguous_strides(shape);
    return true;
  }
  // Groups of old dimensions that are contiguous among themselves are cut anew.
  int at = shape.size() - 1;
  int64_t group = 1, cut = 1;
  int64_t base = x.ndim() > 0 ? x.stride(x.ndim() - 1) : 1;
  for (int d = x.ndim() - 1; d >= 0; --d) {
    group *= x.size(d);
    if (d > 0 && (x.size(d - 1) == 1 || x.stride(d - 1) == group * base)) continue;
    while (at >= 0 && (cut < group || shape[at] == 1)) {
      strides[at] = cut * base;
      cut *= shape[at--];
    }
    if (cut != group) return false;
    if (d > 0) {
      base = x.stride(d - 1);
      group = cut = 1;
    }
  }
  return at < 0;
}

struct Reshape {
  static constexpr auto name = "reshape";
  struct Saved { Dims shape; };
  static Tensor forward(const Tensor& x, const Dims& shape) {
    const Dims to = infer_shape(name, x, shape);
    Dims strides;
    Tensor out = view_strides(x, to, strides) ? make_view(x, to, strides)
                                              : make_view(copy_of(x), to, contiguous_strides(to));
    if (recording(x)) record<Reshape>(out, {x.shape()}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = reshape(g, s.shape); }
};

struct View {
  static constexpr auto name = "view";
  static Tensor forward(const Tensor& x, const Dims& shape) {
    Dims strides;
    if (!view_strides(x, infer_shape(name, x, shape), strides))
      fail(ErrorKind::Shape, "view: ", x, " with strides ", x.strides(), " cannot be seen as ", shape,
           " without a copy; use reshape()");
    return reshape(x, shape);
  }
};

struct Permute {
  static constexpr auto name = "permute";
  struct Saved { Dims inverse; };
  static Tensor forward(const Tensor& x, const Dims& dims) {
    if (dims.size() != x.ndim())
      fail(ErrorKind::Shape, "permute: ", x, " has ", x.ndim(), " dimensions, the order ", dims, " has ", dims.size());
    const Dims order = dims.size() == 0 ? dims : wrap_dims(name, dims, x.ndim());
    Dims shape = order, strides = order, inverse = order;
    for (int i = 0; i < order.size(); ++i) {
      shape[i] = x.size(order[i]);
      strides[i] = x.stride(order[i]);
      inverse[order[i]] = i;
    }
    Tensor out = make_view(x, shape, strides);
    if (recording(x)) record<Permute>(out, {inverse}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = permute(g, s.inverse); }
};

struct Transpose {
  static constexpr auto name = "transpose";
  static Tensor forward(const Tensor& x, int64_t dim0, int64_t dim1) {
    const int a = wrap_dim(name, dim0, x.ndim()), b = wrap_dim(name, dim1, x.ndim());
    Dims order;
    for (int d = 0; d < x.ndim(); ++d) order.push_back(d == a ? b : d == b ? a : d);
    return permute(x, order);
  }
};

struct Expand {
  static constexpr auto name = "expand";
  using Saved = Nothing;
  static Tensor forward(const Tensor& x, const Dims& shape) {
    Dims to = shape;
    const int extra = shape.size() - x.ndim();
    for (int i = 0; i < shape.size(); ++i)
      if (shape[i] == -1 && i >= extra) to[i] = x.size(i - extra);
    if (extra < 0 || !(broadcast_shapes(name, x.shape(), to) == to))
      fail(ErrorKind::Shape, "expand: ", x, " cannot become ", shape, " (only sizes of 1 grow)");
    Tensor out = expand_to(x, to);
    if (recording(x)) record<Expand>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) { grads[0] = g; }
};

struct Squeeze {
  static constexpr auto name = "squeeze";
  static Tensor forward(const Tensor& x, std::optional<int64_t> dim) {
    const int only = dim ? wrap_dim(name, *dim, x.ndim()) : -1;
    Dims shape;
    for (int d = 0; d < x.ndim(); ++d)
      if (x.size(d) != 1 || (dim && d != only)) shape.push_back(x.size(d));
    return reshape(x, shape);
  }
};

struct Unsqueeze {
  static constexpr auto name = "unsqueeze";
  static Tensor forward(const Tensor& x, int64_t dim) {
    Dims shape = x.shape();
    shape.insert(wrap_dim(name, dim, x.ndim() + 1), 1);
    return reshape(x, shape);
  }
};

struct Flatten {
  static constexpr auto name = "flatten";
  static Tensor forward(const Tensor& x, int64_t start_dim, int64_t end_dim) {
    const int first = wrap_dim(name, start_dim, x.ndim()), last = wrap_dim(name, end_dim, x.ndim());
    if (first > last) fail(ErrorKind::Index, "flatten: start_dim ", start_dim, " lies behind end_dim ", end_dim);
    if (x.ndim() == 0) return reshape(x, {1});
    Dims shape;
    int64_t merged = 1;
    for (int d = 0; d < x.ndim(); ++d) {
      if (d < first || d > last) shape.push_back(x.size(d));
      else if (merged *= x.size(d); d == last) shape.push_back(merged);
    }
    return reshape(x, shape);
  }
};

// Of every dimension: `sizes` elements from `starts`, `steps` apart (a negative step walks backwards).
struct Strided {
  static constexpr auto name = "slice";
  struct Saved { Dims shape, starts, steps; };
  static Tensor view(const Tensor& x, const Dims& starts, const Dims& steps, const Dims& sizes) {
    Dims strides = steps;
    int64_t offset = 0;
    for (int d = 0; d < x.ndim(); ++d) {
      strides[d] = x.stride(d) * steps[d];
      if (sizes[d] > 0) offset += starts[d] * x.stride(d);
    }
    return make_view(x, sizes, strides, offset);
  }
  static Tensor forward(const Tensor& x, const Dims& starts, const Dims& steps, const Dims& sizes) {
    Tensor out = view(x, starts, steps, sizes);
    if (recording(x)) record<Strided>(out, {x.shape(), starts, steps}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};

// The gradient of Strided: g placed into zeros.
struct StridedScatter {
  static constexpr auto name = "slice_scatter";
  struct Saved { Dims starts, steps, sizes; };
  static Tensor forward(const Tensor& g, const Dims& shape, const Dims& starts, const Dims& steps) {
    Tensor out = zeros(shape, g.dtype());
    copy_into(Strided::view(out, starts, steps, g.shape()), g);
    if (recording(g)) record<StridedScatter>(out, {starts, steps, g.shape()}, g);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = strided(g, s.starts, s.steps, s.sizes);
  }
};
inline void Strided::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = StridedScatter::forward(g, s.shape, s.starts, s.steps);
}

// The diagonal of two dimensions, as a last one.
struct Diagonal {
  static constexpr auto name = "diagonal";
  struct Saved { Dims shape; int64_t offset; int dim1, dim2; };
  static Tensor view(const Tensor& x, int64_t offset, int a, int b) {
    const int64_t row = offset < 0 ? -offset : 0, col = offset > 0 ? offset : 0;
    const int64_t n = std::max<int64_t>(0, std::min(x.size(a) - row, x.size(b) - col));
    Dims shape, strides;
    for (int d = 0; d < x.ndim(); ++d)
      if (d != a && d != b) {
        shape.push_back(x.size(d));
        strides.push_back(x.stride(d));
      }
    shape.push_back(n);
    strides.push_back(x.stride(a) + x.stride(b));
    return make_view(x, shape, strides, n == 0 ? 0 : row * x.stride(a) + col * x.stride(b));
  }
  static Tensor forward(const Tensor& x, int64_t offset, int64_t dim1, int64_t dim2) {
    const int a = wrap_dim(name, dim1, x.ndim()), b = wrap_dim(name, dim2, x.ndim());
    if (a == b || x.ndim() < 2) fail(ErrorKind::Index, "diagonal: needs two different dimensions of ", x);
    Tensor out = view(x, offset, a, b);
    if (recording(x)) record<Diagonal>(out, {x.shape(), offset, a, b}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};
// The gradient of Diagonal: g on the diagonal of zeros.
struct DiagonalScatter {
  static constexpr auto name = "diagonal_scatter";
  struct Saved { int64_t offset; int dim1, dim2; };
  static Tensor forward(const Tensor& g, const Dims& shape, int64_t offset, int dim1, int dim2) {
    Tensor out = zeros(shape, g.dtype());
    copy_into(Diagonal::view(out, offset, dim1, dim2), g);
    if (recording(g)) record<DiagonalScatter>(out, {offset, dim1, dim2}, g);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = Diagonal::forward(g, s.offset, s.dim1, s.dim2);
  }
};
inline void Diagonal::backward(const Saved& s, const Tensor& g, Grads& grads) {
  grads[0] = DiagonalScatter::forward(g, s.shape, s.offset, s.dim1, s.dim2);
}

struct Narrow {
  static constexpr auto name = "narrow";
  static Tensor forward(const Tensor& x, int64_t dim, int64_t start, int64_t length) {
    if (x.ndim() == 0) fail(ErrorKind::Shape, "narrow: ", x, " has no dimension to take a part of");
    const int d = wrap_dim(name, dim, x.ndim());
    if (start < 0 || length < 0 || start > x.size(d) - length)
      fail(ErrorKind::Index, "narrow: ", length, " elements from ", start, " do not lie in dimension ", d, " of ", x);
    Dims starts = x.shape(), steps = x.shape(), sizes = x.shape();
    for (int i = 0; i < x.ndim(); ++i) starts[i] = 0, steps[i] = 1;
    starts[d] = start;
    sizes[d] = length;
    return strided(x, starts, steps, sizes);
  }
};

struct Split {
  static constexpr auto name = "split";
  static std::vector<Tensor> forward(const Tensor& x, int64_t size, int64_t dim) {
    if (size <= 0) fail(ErrorKind::Value, "split: the size of the parts is ", size, "; it must be at least 1");
    const int d = wrap_dim(name, dim, x.ndim());
    std::vector<Tensor> parts;
    const int64_t total = x.ndim() == 0 ? 1 : x.size(d);
    for (int64_t at = 0; at < total || parts.empty(); at += size)
      parts.push_back(Narrow::forward(x, d, at, at + size < total ? size : total - at));
    return parts;
  }
};

struct Chunk {
  static constexpr auto name = "chunk";
  static std::vector<Tensor> forward(const Tensor& x, int64_t chunks, int64_t dim) {
    if (chunks <= 0) fail(ErrorKind::Value, "chunk: the number of parts is ", chunks, "; it must be at least 1");
    const int64_t total = x.ndim() == 0 ? 1 : x.size(wrap_dim(name, dim, x.ndim()));
    return Split::forward(x, total == 0 ? 1 : (total + chunks - 1) / chunks, dim);
  }
};

struct Cat {
  static constexpr auto name = "cat";
  struct Saved { int dim = 0; };
  static Tensor forward(const std::vector<Tensor>& tensors, int64_t dim) {
    if (tensors.empty()) fail(ErrorKind::Value, "cat: needs at least one tensor");
    const int d = wrap_dim(name, dim, tensors[0].ndim());
    Dims shape = tensors[0].shape();
    if (shape.size() == 0) fail(ErrorKind::Shape, "cat: ", tensors[0], " has no dimension to join along; use stack()");
    DType t = tensors[0].dtype();
    int64_t total = 0;
    bool records = false;
    for (const Tensor& x : tensors) {
      bool fits = x.ndim() == shape.size();
      for (int i = 0; fits && i < shape.size(); ++i) fits = i == d || x.size(i) == shape[i];
      if (!fits) fail(ErrorKind::Shape, "cat: ", tensors[0], " and ", x, " differ outside dimension ", d);
      total += x.size(d);
      t = promote(t, x.dtype());
      records |= x.requires_grad();
    }
    shape[d] = total;
    Tensor out = empty(shape, t);
    int64_t at = 0;
    for (const Tensor& x : tensors) {
      copy_into(make_view(out, x.shape(), out.strides(), at * out.stride(d)), x);
      at += x.size(d);
    }
    if (records && grad_enabled()) record_list<Cat>(out, {d}, tensors);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    int64_t at = 0;
    for (int i = 0; at < g.size(s.dim) || grads.shape(i)[s.dim] == 0; ++i) {
      const int64_t size = grads.shape(i)[s.dim];
      if (grads.wanted(i)) grads[i] = Narrow::forward(g, s.dim, at, size);
      at += size;
      if (at == g.size(s.dim)) break;
    }
  }
};

struct Stack {
  static constexpr auto name = "stack";
  static Tensor forward(const std::vector<Tensor>& tensors, int64_t dim) {
    if (tensors.empty()) fail(ErrorKind::Value, "stack: needs at least one tensor");
    const int d = wrap_dim(name, dim, tensors[0].ndim() + 1);
    std::vector<Tensor> rows;
    for (const Tensor& x : tensors) {
      if (!x.same_shape(tensors[0])) fail(ErrorKind::Shape, "stack: ", tensors[0], " and ", x, " differ in shape");
      rows.push_back(Unsqueeze::forward(x, d));
    }
    return Cat::forward(rows, d);
  }
};

struct Clone {
  static constexpr auto name = "clone";
  using Saved = Nothing;
  static Tensor forward(const Tensor& x) {
    Tensor out = copy_of(x);
    if (recording(x)) record<Clone>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) { grads[0] = g; }
};

struct Contiguous {
  static constexpr auto name = "contiguous";
  static Tensor forward(const Tensor& x) { return x.contiguous() ? x : Clone::forward(x); }
};

struct To {
  static constexpr auto name = "to";
  using Saved = Nothing;
  static Tensor forward(const Tensor& x, DType dtype) {
    if (x.dtype() == dtype) return x;
    Tensor out = cast(x, dtype);
    if (is_float(dtype) && recording(x)) record<To>(out, {}, x);
    return out;
  }
  static void backward(const Saved&, const Tensor& g, Grads& grads) { grads[0] = g; }  // the engine casts
};

struct Detach {
  static constexpr auto name = "detach";
  static Tensor forward(const Tensor& x) { return alias(x); }
};

}  // namespace mainspring::tensor::ops
