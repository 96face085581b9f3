// Scaled dot-product attention for heads in the layout of the model: q [B, T, H, D], k and v [B, S, G, D].
//
// H is a multiple of G: query head h reads key head h / (H / G) (Ainslie et al., "GQA", 2023). Causal: query t sees
// the keys up to t + S - T, so that queries behind a cache of keys need nothing else.
#pragma once

#include <limits>

#include "nn/normalize.h"
#include "ops/matmul.h"

namespace mainspring::tensor {

struct AttentionShape {
  int64_t batch, queries, keys, heads, groups, dim, value_dim;
  bool causal;
  double scale;
};
// Contiguous tensors of one dtype. The probabilities are never kept: the backward pass makes them again.
void attention_forward(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out);
void attention_backward(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad,
                        const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v);

namespace ops {

struct Attention {
  static constexpr auto name = "attention";
  struct Saved { SavedTensor q, k, v; AttentionShape shape; };
  static Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, std::optional<double> scale) {
    product_type(name, q, k);
    product_type(name, q, v);
    const bool fits = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && q.size(0) == k.size(0) && q.size(0) == v.size(0) &&
                      k.size(1) == v.size(1) && k.size(2) == v.size(2) && q.size(3) == k.size(3) && k.size(2) > 0 &&
                      q.size(2) % k.size(2) == 0;
    if (!fits)
      fail(ErrorKind::Shape, "attention: needs q [B, T, H, D] and k, v [B, S, G, D] with H a multiple of G, not ", q, ", ", k,
           ", ", v);
    if (causal && q.size(1) > k.size(1))
      fail(ErrorKind::Shape, "attention: ", q.size(1), " causal queries, but only ", k.size(1), " keys");
    const AttentionShape s = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), causal,
                              scale.value_or(1.0 / __builtin_sqrt(static_cast<double>(q.size(3) > 0 ? q.size(3) : 1)))};
    Tensor out = empty({s.batch, s.queries, s.heads, s.value_dim}, q.dtype());
    attention_forward(s, contiguous(q), contiguous(k), contiguous(v), out);
    if (recording(q, k, v)) record<Attention>(out, {q, k, v, s}, q, k, v);
    return out;
  }
  static void backward(const Saved& saved, const Tensor& g, Grads& grads) {
    const Tensor &q = saved.q.get(), &k = saved.k.get(), &v = saved.v.get();
    if (grad_enabled()) return backward_with_ops(saved.shape, q, k, v, g, grads);
    const Tensor gq = empty_like(q), gk = zeros(k.shape(), k.dtype()), gv = zeros(v.shape(), v.dtype());
    attention_backward(saved.shape, contiguous(q), contiguous(k), contiguous(v), contiguous(g), gq, gk, gv);
    grads[0] = gq;
    grads[1] = gk;
    grads[2] = gv;
  }

 private:
  // P = softmax(scale Q Kᵀ); dV = Pᵀ dO; dS = P (dO Vᵀ - rows' sums of P dO Vᵀ); dQ = scale dS K; dK = scale dSᵀ Q.
  static void backward_with_ops(const AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                Grads& grads) {
    const int64_t repeats = s.heads / s.groups;
    auto heads = [&](const Tensor& x) { return reshape(permute(x, {0, 2, 1, 3}), {s.batch, s.groups, repeats, x.size(1), x.size(3)}); };
    auto shared = [&](const Tensor& x) { return reshape(permute(x, {0, 2, 1, 3}), {s.batch, s.groups, 1, x.size(1), x.size(3)}); };
    const Tensor qh = heads(q), kh = shared(k), vh = shared(v), gh = heads(g);
    Tensor scores = mul(matmul(qh, transpose(kh, -2, -1)), number(s.scale));
    if (s.causal) {
      const Tensor hidden = empty({s.queries, s.keys}, DType::Bool);
      for (int64_t i = 0; i < s.queries; ++i)
        for (int64_t j = 0; j < s.keys; ++j) hidden.data<uint8_t>()[i * s.keys + j] = j > i + s.keys - s.queries;
      scores = where(hidden, number(-std::numeric_limits<double>::infinity()), scores);
    }
    const Tensor p = softmax(scores, -1), gp = matmul(gh, transpose(vh, -2, -1));
    const Tensor gs = mul(mul(p, sub(gp, sum(mul(p, gp), {-1}, true))), number(s.scale));
    auto back = [&](const Tensor& x, int64_t count) {  // [B, G, R, L, D] to [B, L, H, D]; R is summed where count is G
      const Tensor merged = count == s.groups ? sum(x, {2}, false) : reshape(x, {s.batch, s.heads, x.size(3), x.size(4)});
      return permute(merged, {0, 2, 1, 3});
    };
    grads[0] = back(matmul(gs, kh), s.heads);
    grads[1] = back(matmul(transpose(gs, -2, -1), qh), s.groups);
    grads[2] = back(matmul(transpose(p, -2, -1), gh), s.groups);
  }
};

// Rotary embedding (Su et al., "RoFormer", 2021) in the layout of Llama: the pairs are (i, i + R / 2) of the first R
// elements. x: [B, T, H, D]; cos, sin: [T, R / 2] or [B, T, R / 2]. The other elements stay as they are.
struct Rope {
  static constexpr auto name = "rope";
  struct Saved { SavedTensor cos, sin; };
  static Tensor forward(const Tensor& x, const Tensor& cos, const Tensor& sin) {
    if (x.ndim() != 4 || !is_float(x.dtype())) fail(ErrorKind::Shape, "rope: needs a floating-point x [B, T, H, D], not ", x);
    const int n = cos.ndim();
    const bool fits = (n == 2 || n == 3) && cos.same_shape(sin) && cos.dtype() == sin.dtype() && is_float(cos.dtype()) &&
                      cos.size(n - 2) == x.size(1) && 2 * cos.size(n - 1) <= x.size(3) && (n == 2 || cos.size(0) == x.size(0));
    if (!fits) fail(ErrorKind::Shape, "rope: cos ", cos, " and sin ", sin, " do not fit ", x);
    Tensor out = rotate(x, cos, sin);
    if (recording(x)) record<Rope>(out, {cos, sin}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    grads[0] = forward(g, s.cos.get(), neg(s.sin.get()));  // the inverse rotation
  }

 private:
  static Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin);
};

}  // namespace ops
}  // namespace mainspring::tensor
