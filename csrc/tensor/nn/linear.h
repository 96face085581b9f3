// x weightᵀ + bias.
#pragma once

#include "ops/matmul.h"

namespace mainspring::tensor::ops {

struct Linear {
  static constexpr auto name = "linear";
  struct Saved { SavedTensor x, weight; };  // x: [..., in], weight: [out, in]
  static Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_) {
    const Tensor bias = bias_.value_or(Tensor());
    product_type(name, x, weight);
    const int last = x.ndim() - 1;
    if (x.ndim() == 0 || weight.ndim() != 2 || x.size(last) != weight.size(1))
      fail(ErrorKind::Shape, "linear: the input ", x, " does not fit the weight ", weight, " ([out, in])");
    if (bias && (bias.ndim() != 1 || bias.size(0) != weight.size(0) || bias.dtype() != weight.dtype()))
      fail(ErrorKind::Shape, "linear: the bias ", bias, " does not fit the weight ", weight);
    const Tensor rows = last == 1 ? x : make_rows(x);
    Dims shape = x.shape();
    shape[last] = weight.size(0);
    Tensor out = empty(shape, x.dtype());
    const GemmArgs args = {rows.data(), rows.stride(0), rows.stride(1), weight.data(), weight.stride(1), weight.stride(0),
                           out.data(), weight.size(0), bias ? bias.data() : nullptr, rows.size(0), weight.size(0),
                           weight.size(1)};
    {
      BlockingRegion region(args.m * args.n * args.k / 16);
      kernels().gemm[float_index(x.dtype())](args);
    }
    if (recording(x, weight, bias))
      record<Linear>(out, {SavedTensor::when(weight.requires_grad(), x), SavedTensor::when(x.requires_grad(), weight)}, x,
                     weight, bias);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grads.wanted(0)) grads[0] = matmul(g, s.weight.get());
    const int64_t out = g.size(g.ndim() - 1);
    const Tensor rows = reshape(g, {out == 0 ? Dims(g->sizes, g.ndim() - 1).product() : g.numel() / out, out});
    if (grads.wanted(1)) {
      const Tensor& x = s.x.get();
      grads[1] = matmul(transpose(rows, 0, 1), reshape(x, {rows.size(0), x.size(x.ndim() - 1)}));
    }
    if (grads.wanted(2)) grads[2] = sum(rows, {0}, false);
  }

 private:
  static Tensor make_rows(const Tensor& x) {
    const int64_t in = x.size(x.ndim() - 1);
    const Tensor flat = contiguous(x);
    return make_view(flat, {in == 0 ? Dims(x->sizes, x.ndim() - 1).product() : x.numel() / in, in}, {in, 1});
  }
};

}  // namespace mainspring::tensor::ops
