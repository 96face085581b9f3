// Ops that are formulas over other ops, and take their gradients from them: of elements, reductions and products.
#pragma once

#include "ops/einsum.h"
#include "ops/scatter.h"

namespace mainspring::tensor::ops {

#define MAINSPRING_COMPOSITE(Op, python, arguments, ...) \
  struct Op { \
    static constexpr auto name = python; \
    static Tensor forward arguments { __VA_ARGS__ } \
  };
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<int64_t>;

// ---- elements ----

// x times a number that keeps x an integer if it is one.
inline Tensor scaled(const Tensor& x, double factor) {
  if (factor == 1) return x;
  if (is_float(x.dtype())) return mul(x, number(factor));
  const Tensor whole = full_int({}, static_cast<int64_t>(factor), DType::Int64);
  whole->weak = true;
  return mul(x, whole);
}

MAINSPRING_COMPOSITE(Positive, "positive", (const Tensor& x), return reshape(x, x.shape());)
MAINSPRING_COMPOSITE(Deg2Rad, "deg2rad", (const Tensor& x), return mul(to(x, is_float(x.dtype()) ? x.dtype() : DType::Float32), number(0.017453292519943295));)
MAINSPRING_COMPOSITE(Rad2Deg, "rad2deg", (const Tensor& x), return mul(to(x, is_float(x.dtype()) ? x.dtype() : DType::Float32), number(57.29577951308232));)
MAINSPRING_COMPOSITE(Sinc, "sinc", (const Tensor& x),
  if (is_half(x.dtype())) return to(forward(to(x, DType::Float32)), x.dtype());
  const Tensor angle = mul(x, number(3.14159265358979323846));
  const Tensor zero = eq(detach(x), number(0));
  const Tensor safe = where(zero, number(1), angle);
  // Near 0 the quotient's slope is 0 as well as its value 1: the safe operand keeps both finite.
  return where(zero, number(1), div(sin(safe), safe));)
MAINSPRING_COMPOSITE(Logit, "logit", (const Tensor& x, std::optional<double> eps),
  const Tensor p = eps ? Clamp::forward(x, *eps, 1 - *eps) : x;
  return log(div(p, sub(number(1), p)));)
MAINSPRING_COMPOSITE(NanToNum, "nan_to_num", (const Tensor& x, double nan, std::optional<double> posinf, std::optional<double> neginf),
  if (!is_float(x.dtype())) return Clone::forward(x);
  const double most = x.dtype() == DType::Float64 ? std::numeric_limits<double>::max()
                      : x.dtype() == DType::Float16 ? 65504.0
                      : x.dtype() == DType::BFloat16 ? 0x1.fep127 : std::numeric_limits<float>::max();
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor fixed = detach(x);
  Tensor out = where(IsNan::forward(fixed), full({}, nan, x.dtype()), x);
  out = where(eq(fixed, number(infinity)), full({}, posinf.value_or(most), x.dtype()), out);
  return where(eq(fixed, number(-infinity)), full({}, neginf.value_or(-most), x.dtype()), out);)
MAINSPRING_COMPOSITE(Lerp, "lerp", (const Tensor& start, const Tensor& end, const Tensor& weight),
  return add(start, mul(weight, sub(end, start)));)
MAINSPRING_COMPOSITE(Addcmul, "addcmul", (const Tensor& x, const Tensor& a, const Tensor& b, double value),
  return add(x, scaled(mul(a, b), value));)
MAINSPRING_COMPOSITE(Addcdiv, "addcdiv", (const Tensor& x, const Tensor& a, const Tensor& b, double value),
  return add(x, mul(div(a, b), number(value)));)
inline Tensor logaddexp_of(const Tensor& a, const Tensor& b) {
  const Tensor most = detach(Maximum::forward(a, b));
  const Tensor shift = where(IsFinite::forward(most), most, number(0));
  return add(log(add(exp(sub(a, shift)), exp(sub(b, shift)))), shift);
}
MAINSPRING_COMPOSITE(Logaddexp, "logaddexp", (const Tensor& a, const Tensor& b), return logaddexp_of(a, b);)
MAINSPRING_COMPOSITE(Logaddexp2, "logaddexp2", (const Tensor& a, const Tensor& b),
  constexpr double kLn2 = 0.69314718055994530942;
  return div(logaddexp_of(mul(a, number(kLn2)), mul(b, number(kLn2))), number(kLn2));)
MAINSPRING_COMPOSITE(Xlogy, "xlogy", (const Tensor& a, const Tensor& b),
  const Tensor zero = BitwiseAnd::forward(eq(detach(a), number(0)), LogicalNot::forward(IsNan::forward(detach(b))));
  return where(zero, mul(a, number(0)), mul(a, log(where(zero, number(1), b))));)
MAINSPRING_COMPOSITE(Heaviside, "heaviside", (const Tensor& x, const Tensor& values),
  if (x.dtype() != values.dtype()) fail(ErrorKind::DType, "heaviside: ", x, " and ", values, " differ in dtype");
  const Tensor step = cast(lt(full_int({}, 0, x.dtype()), x), x.dtype());
  return where(IsNan::forward(x), full({}, __builtin_nan(""), x.dtype()), where(eq(x, full_int({}, 0, x.dtype())), values, step));)
inline Tensor float_extremum(const Tensor& a, const Tensor& b, bool max) {  // a NaN gives way to a number
  const Tensor x = where(IsNan::forward(detach(a)), b, a), y = where(IsNan::forward(detach(b)), a, b);
  return max ? Maximum::forward(x, y) : Minimum::forward(x, y);
}
MAINSPRING_COMPOSITE(Fmax, "fmax", (const Tensor& a, const Tensor& b), return float_extremum(a, b, true);)
MAINSPRING_COMPOSITE(Fmin, "fmin", (const Tensor& a, const Tensor& b), return float_extremum(a, b, false);)
MAINSPRING_COMPOSITE(IsClose, "isclose", (const Tensor& a, const Tensor& b, double rtol, double atol, bool equal_nan),
  GradMode off(false);
  if (!is_float(result_type(a, b))) return forward(cast(a, DType::Float64), cast(b, DType::Float64), rtol, atol, equal_nan);
  Tensor near = le(unary_loop(UnaryKernel::Abs, name, sub(a, b), false), add(number(atol), mul(unary_loop(UnaryKernel::Abs, name, b, false), number(rtol))));
  near = LogicalAnd::forward(near, IsFinite::forward(b));
  near = LogicalOr::forward(near, eq(a, b));
  return equal_nan ? LogicalOr::forward(near, LogicalAnd::forward(IsNan::forward(a), IsNan::forward(b))) : near;)
MAINSPRING_COMPOSITE(ClampTensor, "clip", (const Tensor& x, const std::optional<Tensor>& min, const std::optional<Tensor>& max),
  Tensor out = x;
  if (!min && !max) return Clone::forward(x);
  if (min) out = Maximum::forward(out, *min);
  if (max) out = Minimum::forward(out, *max);
  return out;)

// ---- reductions ----

inline Tensor root(const Tensor& x) {  // with slope 0 at 0
  const Tensor zero = eq(detach(x), number(0));
  return where(zero, mul(x, number(0)), sqrt(where(zero, number(1), x)));
}
MAINSPRING_COMPOSITE(Std, "std", (const Tensor& x, const Dims& dim, bool keepdim, double correction),
  return sqrt(Var::forward(x, dim, keepdim, correction));)
struct VarMean {
  static constexpr auto name = "var_mean";
  static Tensors forward(const Tensor& x, const Dims& dim, bool keepdim, double correction) {
    return {Var::forward(x, dim, keepdim, correction), mean(x, dim, keepdim)};
  }
};
struct StdMean {
  static constexpr auto name = "std_mean";
  static Tensors forward(const Tensor& x, const Dims& dim, bool keepdim, double correction) {
    return {Std::forward(x, dim, keepdim, correction), mean(x, dim, keepdim)};
  }
};
MAINSPRING_COMPOSITE(Nansum, "nansum", (const Tensor& x, const Dims& dim, bool keepdim),
  return sum(where(IsNan::forward(detach(x)), full_int({}, 0, x.dtype()), x), dim, keepdim);)
MAINSPRING_COMPOSITE(Nanmean, "nanmean", (const Tensor& x, const Dims& dim, bool keepdim),
  const Tensor known = to(LogicalNot::forward(IsNan::forward(detach(x))), x.dtype());
  return div(Nansum::forward(x, dim, keepdim), sum(known, dim, keepdim));)
MAINSPRING_COMPOSITE(CountNonzero, "count_nonzero", (const Tensor& x, const Dims& dim),
  return sum(cast(detach(x), DType::Bool), dim, false);)
struct Aminmax {
  static constexpr auto name = "aminmax";
  static Tensors forward(const Tensor& x, Maybe dim, bool keepdim) {
    const Dims dims = dim ? Dims{*dim} : Dims();
    return {Amin::forward(x, dims, keepdim), Amax::forward(x, dims, keepdim)};
  }
};
MAINSPRING_COMPOSITE(VectorNorm, "vector_norm", (const Tensor& x, double order, const Dims& dim, bool keepdim),
  if (!is_float(x.dtype())) fail(ErrorKind::DType, "vector_norm: needs a floating-point tensor, not ", x);
  if (is_half(x.dtype())) return to(forward(to(x, DType::Float32), order, dim, keepdim), x.dtype());
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor size = Abs::forward(x);
  if (order == infinity) return amax(size, dim, keepdim);
  if (order == -infinity) return Amin::forward(size, dim, keepdim);
  if (order == 0) return sum(to(Ne::forward(detach(x), number(0)), x.dtype()), dim, keepdim);
  if (order == 1) return sum(size, dim, keepdim);
  if (order == 2) return root(sum(square(x), dim, keepdim));
  const Tensor total = sum(pow(size, number(order)), dim, keepdim);
  const Tensor zero = eq(detach(total), number(0));
  return where(zero, mul(total, number(0)), pow(where(zero, number(1), total), number(1 / order)));)
MAINSPRING_COMPOSITE(Dist, "dist", (const Tensor& a, const Tensor& b, double p), return VectorNorm::forward(sub(a, b), p, {}, false);)
MAINSPRING_COMPOSITE(Trace, "trace", (const Tensor& x),
  if (x.ndim() != 2) fail(ErrorKind::Shape, "trace: needs a matrix, not ", x);
  return sum(Diagonal::forward(x, 0, 0, 1), {}, false);)
struct Median {  // the lower one of two in the middle
  static constexpr auto name = "median";
  static Tensors forward(const Tensor& x, int64_t dim, bool keepdim) {
    const int d = wrap_dim(name, dim, x.ndim());
    const int64_t n = x.ndim() == 0 ? 1 : x.size(d);
    if (n == 0) fail(ErrorKind::Index, "median: ", x, " is empty along dimension ", d);
    return picked(name, x, (n - 1) / 2 + 1, dim, keepdim);
  }
};
MAINSPRING_COMPOSITE(Diff, "diff", (const Tensor& given, int64_t n, int64_t dim, const std::optional<Tensor>& prepend, const std::optional<Tensor>& append),
  Tensors parts;
  if (prepend) parts.push_back(*prepend);
  parts.push_back(given);
  if (append) parts.push_back(*append);
  Tensor x = parts.size() == 1 ? given : Cat::forward(parts, dim);
  const int d = wrap_dim(name, dim, x.ndim());
  for (int64_t i = 0; i < n && x.size(d) > 0; ++i) {
    const int64_t length = x.size(d) - 1;
    const Tensor a = Narrow::forward(x, d, 1, length), b = Narrow::forward(x, d, 0, length);
    x = x.dtype() == DType::Bool ? LogicalXor::forward(a, b) : sub(a, b);
  }
  return x;)

// ---- products ----

inline void need_dims(const char* op, const Tensor& x, int ndim) {
  if (x.ndim() != ndim) fail(ErrorKind::Shape, op, ": needs ", ndim, " dimensions, not ", x);
}
MAINSPRING_COMPOSITE(Mm, "mm", (const Tensor& a, const Tensor& b), need_dims(name, a, 2); need_dims(name, b, 2); return matmul(a, b);)
MAINSPRING_COMPOSITE(Bmm, "bmm", (const Tensor& a, const Tensor& b), need_dims(name, a, 3); need_dims(name, b, 3);
  if (a.size(0) != b.size(0)) fail(ErrorKind::Shape, "bmm: ", a, " and ", b, " differ in the batch");
  return matmul(a, b);)
MAINSPRING_COMPOSITE(Mv, "mv", (const Tensor& a, const Tensor& b), need_dims(name, a, 2); need_dims(name, b, 1); return matmul(a, b);)
MAINSPRING_COMPOSITE(Dot, "dot", (const Tensor& a, const Tensor& b), need_dims(name, a, 1); need_dims(name, b, 1);
  if (a.size(0) != b.size(0)) fail(ErrorKind::Shape, "dot: ", a, " and ", b, " differ in length");
  return is_float(a.dtype()) ? matmul(a, b) : cast(sum(mul(a, b), {}, false), result_type(a, b));)
MAINSPRING_COMPOSITE(Outer, "outer", (const Tensor& a, const Tensor& b), need_dims(name, a, 1); need_dims(name, b, 1);
  return mul(Unsqueeze::forward(a, 1), b);)
MAINSPRING_COMPOSITE(Inner, "inner", (const Tensor& a, const Tensor& b),
  if (a.ndim() == 0 || b.ndim() == 0) return mul(a, b);
  if (a.size(a.ndim() - 1) != b.size(b.ndim() - 1)) fail(ErrorKind::Shape, "inner: ", a, " and ", b, " differ in the last dimension");
  const int64_t k = a.size(a.ndim() - 1);
  const Dims before(a->sizes, a.ndim() - 1), behind(b->sizes, b.ndim() - 1);
  Dims shape = before;
  for (const int64_t n : behind) shape.push_back(n);
  return reshape(matmul(reshape(a, {before.product(), k}), transpose(reshape(b, {behind.product(), k}), 0, 1)), shape);)
inline Tensor scaled_sum(const Tensor& x, const Tensor& product, double beta, double alpha) {
  const Tensor right = scaled(product, alpha);
  if (beta == 0) return add(right, zeros(x.shape(), right.dtype()));  // what x holds then does not matter
  return add(scaled(x, beta), right);
}
MAINSPRING_COMPOSITE(Addmm, "addmm", (const Tensor& x, const Tensor& a, const Tensor& b, double beta, double alpha),
  return scaled_sum(x, Mm::forward(a, b), beta, alpha);)
MAINSPRING_COMPOSITE(Addmv, "addmv", (const Tensor& x, const Tensor& a, const Tensor& b, double beta, double alpha),
  return scaled_sum(x, Mv::forward(a, b), beta, alpha);)
MAINSPRING_COMPOSITE(Addr, "addr", (const Tensor& x, const Tensor& a, const Tensor& b, double beta, double alpha),
  return scaled_sum(x, Outer::forward(a, b), beta, alpha);)
MAINSPRING_COMPOSITE(Baddbmm, "baddbmm", (const Tensor& x, const Tensor& a, const Tensor& b, double beta, double alpha),
  return scaled_sum(x, Bmm::forward(a, b), beta, alpha);)
MAINSPRING_COMPOSITE(Addbmm, "addbmm", (const Tensor& x, const Tensor& a, const Tensor& b, double beta, double alpha),
  const Tensor product = Bmm::forward(a, b);
  const Tensor total = sum(product, {0}, false);
  return scaled_sum(x, is_float(product.dtype()) ? total : cast(total, product.dtype()), beta, alpha);)
MAINSPRING_COMPOSITE(Kron, "kron", (const Tensor& a, const Tensor& b),
  const int n = std::max(a.ndim(), b.ndim());
  Dims left, right, shape;
  for (int d = 0; d < n; ++d) {
    const int64_t p = d < n - a.ndim() ? 1 : a.size(d - (n - a.ndim())), q = d < n - b.ndim() ? 1 : b.size(d - (n - b.ndim()));
    left.push_back(p);
    left.push_back(1);
    right.push_back(1);
    right.push_back(q);
    shape.push_back(p * q);
  }
  return reshape(mul(reshape(a, left), reshape(b, right)), shape);)
// Over the last `dims` dimensions of a and the first of b.
MAINSPRING_COMPOSITE(Tensordot, "tensordot", (const Tensor& a, const Tensor& b, int64_t dims),
  if (dims < 0 || dims > a.ndim() || dims > b.ndim()) fail(ErrorKind::Index, "tensordot: ", dims, " dimensions of ", a, " and ", b);
  const Dims before(a->sizes, a.ndim() - static_cast<int>(dims)), behind(b->sizes + dims, b.ndim() - static_cast<int>(dims));
  const Dims left(a->sizes + before.size(), static_cast<int>(dims)), right(b->sizes, static_cast<int>(dims));
  if (!(left == right)) fail(ErrorKind::Shape, "tensordot: the last ", dims, " dimensions of ", a, " are not the first of ", b);
  Dims shape = before;
  for (const int64_t n : behind) shape.push_back(n);
  return reshape(matmul(reshape(a, {before.product(), left.product()}), reshape(b, {left.product(), behind.product()})), shape);)

}  // namespace mainspring::tensor::ops
