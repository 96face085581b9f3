// Reductions. An empty list of dimensions stands for all of them.
#pragma once

#include <algorithm>

#include "ops/elementwise.h"

namespace mainspring::tensor::ops {

inline Dims wrap_dims(const char* op, const Dims& dims, int ndim) {
  Dims out;
  if (dims.size() == 0)
    for (int d = 0; d < ndim; ++d) out.push_back(d);
  bool seen[kMaxDims] = {};
  for (const int64_t d : dims) {
    const int wrapped = wrap_dim(op, d, ndim);
    if (seen[wrapped]) fail(ErrorKind::Index, op, ": dimension ", d, " is given twice");
    seen[wrapped] = true;
    if (ndim > 0) out.push_back(wrapped);
  }
  return out;
}

inline Dims drop_dims(const Dims& shape, const Dims& dims) {
  Dims out;
  for (int d = 0; d < shape.size(); ++d) {
    bool dropped = false;
    for (const int64_t r : dims) dropped |= r == d;
    if (!dropped) out.push_back(shape[d]);
  }
  return out;
}

inline Tensor reduce(ReduceKernel kernel, const Tensor& x, const Dims& dims, bool keepdim, bool widen) {
  const Tensor out = reduce_loop(kernel, x, dims, widen);
  if (keepdim) return out;
  const Dims shape = drop_dims(x.shape(), dims);
  return make_view(out, shape, contiguous_strides(shape));
}

// `t`, reduced over `dims`, in the shape that broadcasts against the input.
inline Tensor with_kept_dims(const Tensor& t, const Dims& input_shape, const Dims& dims, bool keepdim) {
  if (keepdim) return t;
  Dims shape = input_shape;
  for (const int64_t d : dims) shape[d] = 1;
  return reshape(t, shape);
}

inline int64_t count_of(const Tensor& x, const Dims& dims) {
  int64_t n = 1;
  for (const int64_t d : dims) n *= x.size(d);
  return n;
}

struct Sum {
  static constexpr auto name = "sum";
  struct Saved { Dims shape, dims; bool keepdim; };
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    const Dims dims = wrap_dims(name, dim, x.ndim());
    Tensor out = reduce(ReduceKernel::Sum, x, dims, keepdim, true);
    if (recording(x)) record<Sum>(out, {x.shape(), dims, keepdim}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = expand(with_kept_dims(g, s.shape, s.dims, s.keepdim), s.shape);
  }
};

struct Mean {
  static constexpr auto name = "mean";
  struct Saved { Dims shape, dims; bool keepdim; double scale; };
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    if (!is_float(x.dtype())) fail(ErrorKind::DType, "mean: needs a floating-point tensor, not ", x, "; convert it first");
    const Dims dims = wrap_dims(name, dim, x.ndim());
    const double scale = 1.0 / static_cast<double>(count_of(x, dims));
    const Tensor total = reduce(ReduceKernel::Sum, is_half(x.dtype()) ? cast(x, DType::Float32) : x, dims,
                                keepdim, true);
    Tensor out = cast(binary_loop(BinaryKernel::Mul, name, total, number(scale)), x.dtype());
    if (recording(x)) record<Mean>(out, {x.shape(), dims, keepdim, scale}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = expand(mul(with_kept_dims(g, s.shape, s.dims, s.keepdim), number(s.scale)), s.shape);
  }
};

// Where several elements are the extremum, they share the gradient, as in PyTorch's amax.
template <class Op, ReduceKernel kernel>
struct Extremum {
  struct Saved { SavedTensor x; SavedOutput out; Dims dims; bool keepdim; };
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    const Dims dims = wrap_dims(Op::name, dim, x.ndim());
    if (count_of(x, dims) == 0 && x.ndim() > 0)
      fail(ErrorKind::Shape, Op::name, ": ", x, " has no elements to choose from along the reduced dimensions");
    Tensor out = reduce(kernel, x, dims, keepdim, false);
    if (recording(x)) record<Op>(out, {x, out, dims, keepdim}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor& x = s.x.get();
    const Tensor best = with_kept_dims(s.out.get(), x.shape(), s.dims, s.keepdim);
    const Tensor hit = to(eq(x, best), g.dtype());
    const Tensor share = div(with_kept_dims(g, x.shape(), s.dims, s.keepdim), sum(hit, s.dims, true));
    grads[0] = mul(hit, share);
  }
};
struct Amax : Extremum<Amax, ReduceKernel::Max> { static constexpr auto name = "amax"; };
struct Amin : Extremum<Amin, ReduceKernel::Min> { static constexpr auto name = "amin"; };

template <bool max>
struct ArgExtremum {
  static Tensor run(const char* name, const Tensor& x, std::optional<int64_t> dim, bool keepdim) {
    const Tensor flat = dim ? x : reshape(detach(x), {x.numel()});
    const int d = wrap_dim(name, dim.value_or(0), flat.ndim());
    if (flat.ndim() > 0 && flat.size(d) == 0) fail(ErrorKind::Shape, name, ": ", x, " is empty along the dimension");
    const Tensor out = arg_reduce_loop(max, flat, d);
    if (!dim) return make_view(out, {}, {});
    if (keepdim || flat.ndim() == 0) return out;
    const Dims shape = drop_dims(out.shape(), {d});
    return make_view(out, shape, contiguous_strides(shape));
  }
};
struct Argmax {
  static constexpr auto name = "argmax";
  static Tensor forward(const Tensor& x, std::optional<int64_t> dim, bool keepdim) {
    return ArgExtremum<true>::run(name, x, dim, keepdim);
  }
};
struct Argmin {
  static constexpr auto name = "argmin";
  static Tensor forward(const Tensor& x, std::optional<int64_t> dim, bool keepdim) {
    return ArgExtremum<false>::run(name, x, dim, keepdim);
  }
};
struct Any {
  static constexpr auto name = "any";
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    return cast(reduce(ReduceKernel::Max, cast(x, DType::Bool), wrap_dims(name, dim, x.ndim()), keepdim, true),
                DType::Bool);
  }
};
struct All {
  static constexpr auto name = "all";
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    return cast(reduce(ReduceKernel::Min, cast(x, DType::Bool), wrap_dims(name, dim, x.ndim()), keepdim, true),
                DType::Bool);
  }
};

struct Logsumexp {
  static constexpr auto name = "logsumexp";
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim) {
    const Dims dims = wrap_dims(name, dim, x.ndim());
    Tensor shift;
    {
      GradMode off(false);
      shift = amax(x, dims, true);
      shift = where(eq(mul(shift, number(0)), number(0)), shift, number(0));  // an infinite maximum stays out
    }
    const Tensor out = add(log(sum(exp(sub(x, shift)), dims, true)), shift);
    return keepdim ? out : reshape(out, drop_dims(x.shape(), dims));
  }
};

struct Var {
  static constexpr auto name = "var";
  static Tensor forward(const Tensor& x, const Dims& dim, bool keepdim, double correction) {
    const Dims dims = wrap_dims(name, dim, x.ndim());
    const Tensor total = sum(square(sub(x, mean(x, dims, true))), dims, keepdim);
    return div(total, number(std::max(0.0, static_cast<double>(count_of(x, dims)) - correction)));
  }
};

}  // namespace mainspring::tensor::ops
