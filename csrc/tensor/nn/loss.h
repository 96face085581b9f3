// Cross-entropy over the rows of logits [N, C], and dropout.
#pragma once

#include "core/random.h"
#include "nn/normalize.h"

namespace mainspring::tensor::ops {

Generator& default_generator();

struct CrossEntropy {
  static constexpr auto name = "cross_entropy";
  struct Saved { SavedTensor logits, targets; Tensor lse; int64_t ignore_index; double smoothing, scale; bool reduced; };
  static Tensor forward(const Tensor& given, const Tensor& target, int64_t ignore_index, const std::string& reduction,
                        double label_smoothing) {
    if (!is_float(given.dtype())) fail(ErrorKind::DType, "cross_entropy: the logits must be floating-point, not ", given);
    if (given.ndim() != 2 || target.ndim() != 1 || target.size(0) != given.size(0))
      fail(ErrorKind::Shape, "cross_entropy: needs logits [N, C] and targets [N], not ", given, " and ", target);
    if (target.dtype() != DType::Int64) fail(ErrorKind::DType, "cross_entropy: the targets must be int64, not ", target);
    if (reduction != "mean" && reduction != "sum" && reduction != "none")
      fail(ErrorKind::Value, "cross_entropy: reduction is '", reduction, "'; it must be 'mean', 'sum' or 'none'");
    const Tensor logits = contiguous(given), targets = contiguous(target);
    const int64_t rows = logits.size(0), classes = logits.size(1);
    int64_t counted = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = targets.data<int64_t>()[i];
      if (t == ignore_index) continue;
      ++counted;
      if (t < 0 || t >= classes)
        fail(ErrorKind::Index, "cross_entropy: target ", t, " at row ", i, " is not a class in [0, ", classes, ")");
    }
    const DType acc = accumulation(logits.dtype());
    Tensor losses = empty({rows}, acc);
    const Tensor lse = empty({rows}, acc);
    {
      BlockingRegion region(8 * logits.numel());
      kernels().cross_entropy[float_index(logits.dtype())]({logits.data(), targets.data<int64_t>(), ignore_index,
                                                            label_smoothing, losses.data(), lse.data(), rows, classes});
    }
    const bool reduced = reduction != "none";
    const double scale = reduction == "mean" ? 1.0 / static_cast<double>(counted) : 1.0;
    Tensor out = losses;
    if (reduced) {
      out = reduce(ReduceKernel::Sum, losses, {0}, false, true);
      write_double(out.data(), acc, read_double(out.data(), acc) * (counted == 0 && scale != 1 ? __builtin_nan("") : scale));
    }
    out = cast(out, logits.dtype());
    if (recording(given))
      record<CrossEntropy>(out, {given, targets, lse, ignore_index, label_smoothing, scale, reduced}, given);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) {
    if (grad_enabled()) return backward_with_ops(s, g, grads);
    const Tensor logits = contiguous(s.logits.get());
    const int64_t rows = logits.size(0);
    const Tensor scale = empty({rows}, accumulation(logits.dtype()));
    copy_into(scale, binary_loop(BinaryKernel::Mul, name, g, number(s.scale)));
    Tensor out = empty_like(logits);
    BlockingRegion region(4 * logits.numel());
    kernels().cross_entropy_grad[float_index(logits.dtype())](
        {logits.data(), s.targets.get().data<int64_t>(), s.ignore_index, s.smoothing, s.lse.data(), scale.data(), out.data(),
         rows, logits.size(1)});
    grads[0] = out;
  }

 private:
  static void backward_with_ops(const Saved& s, const Tensor& g, Grads& grads) {
    const Tensor& logits = s.logits.get();
    const int64_t rows = logits.size(0), classes = logits.size(1);
    const Tensor wanted = full({rows, classes}, s.smoothing / static_cast<double>(classes), logits.dtype());
    const Tensor counts = zeros({rows, 1}, logits.dtype());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = s.targets.get().data<int64_t>()[i];
      if (t == s.ignore_index) continue;
      write_double(counts.data<char>() + i * itemsize(logits.dtype()), logits.dtype(), s.scale);
      char* at = wanted.data<char>() + (i * classes + t) * itemsize(logits.dtype());
      write_double(at, logits.dtype(), read_double(at, logits.dtype()) + 1 - s.smoothing);
    }
    const Tensor per_row = s.reduced ? g : reshape(g, {rows, 1});
    grads[0] = mul(mul(sub(softmax(logits, -1), wanted), counts), per_row);
  }
};

// Zeroes each element with probability p and scales the others by 1 / (1 - p).
struct Dropout {
  static constexpr auto name = "dropout";
  static Tensor forward(const Tensor& x, double p, bool training) {
    if (!(p >= 0 && p <= 1)) fail(ErrorKind::Value, "dropout: p is ", p, "; a probability lies in [0, 1]");
    if (!training || p == 0) return x;
    const Tensor keep = empty(x.shape(), DType::Bool);
    default_generator().bernoulli(keep, 1 - p);
    const Tensor scale = p == 1 ? zeros({}, x.dtype()) : full({}, 1 / (1 - p), x.dtype());
    return mul(x, mul(to(keep, x.dtype()), scale));
  }
};

}  // namespace mainspring::tensor::ops
