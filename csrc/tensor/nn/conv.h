// Convolutions as matrix products over columns (im2col): input [N, C, *], weight [O, C / groups, *].
#pragma once

#include <array>

#include "ops/composite.h"

namespace mainspring::tensor {

struct ConvShape {  // one-dimensional convolutions have height 1
  int64_t batch, channels, in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
};
// columns [N, C kh kw, oh ow] of x [N, C, h, w], and the sum of columns back at their places.
Tensor to_columns(const ConvShape& s, const Tensor& x);
Tensor from_columns(const ConvShape& s, const Tensor& columns);

namespace ops {

struct FromColumns;
struct ToColumns {
  static constexpr auto name = "im2col";
  struct Saved { ConvShape shape; };
  static Tensor forward(const ConvShape& s, const Tensor& x) {
    Tensor out = to_columns(s, contiguous(x));
    if (recording(x)) record<ToColumns>(out, {s}, x);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads);
};
struct FromColumns {
  static constexpr auto name = "col2im";
  struct Saved { ConvShape shape; };
  static Tensor forward(const ConvShape& s, const Tensor& columns) {
    Tensor out = from_columns(s, contiguous(columns));
    if (recording(columns)) record<FromColumns>(out, {s}, columns);
    return out;
  }
  static void backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = ToColumns::forward(s.shape, g); }
};
inline void ToColumns::backward(const Saved& s, const Tensor& g, Grads& grads) { grads[0] = FromColumns::forward(s.shape, g); }

inline std::array<int64_t, 2> pair_of(const char* op, const char* what, const Dims& given, int spatial, int64_t least) {
  if (given.size() != 1 && given.size() != spatial) fail(ErrorKind::Value, op, ": ", what, " is ", given, "; it takes one or ", spatial, " numbers");
  for (const int64_t n : given)
    if (n < least) fail(ErrorKind::Value, op, ": ", what, " is ", given, "; it must be at least ", least);
  const int64_t last = given[given.size() - 1], first = given[0];
  return {spatial == 1 ? (least == 0 ? 0 : 1) : first, last};
}

// x: [N, C, H, W], weight: [O, C / groups, kh, kw].
inline Tensor convolve(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, ConvShape s, int64_t groups) {
  const int64_t outputs = weight.size(0), per_group = weight.size(1);
  if (groups < 1 || x.size(1) != per_group * groups || outputs % groups != 0)
    fail(ErrorKind::Shape, op, ": the weight ", weight, " does not fit the input ", x, " in ", groups, " groups");
  if (bias && (bias.ndim() != 1 || bias.size(0) != outputs)) fail(ErrorKind::Shape, op, ": the bias ", bias, " does not fit the weight ", weight);
  for (int i = 0; i < 2; ++i) {
    s.in[i] = x.size(2 + i);
    s.kernel[i] = weight.size(2 + i);
    const int64_t reach = s.in[i] + 2 * s.padding[i] - s.dilation[i] * (s.kernel[i] - 1) - 1;
    if (reach < 0 || s.kernel[i] < 1) fail(ErrorKind::Shape, op, ": the kernel of ", weight, " is larger than the padded input ", x);
    s.out[i] = reach / s.stride[i] + 1;
  }
  s.batch = x.size(0);
  s.channels = x.size(1);
  const int64_t area = s.kernel[0] * s.kernel[1], places = s.out[0] * s.out[1];
  // [N, G, C/G area, places], weight [G, O/G, C/G area]
  const Tensor columns = reshape(ToColumns::forward(s, x), {s.batch, groups, per_group * area, places});
  const Tensor filters = reshape(weight, {groups, outputs / groups, per_group * area});
  Tensor out = reshape(matmul(filters, columns), {s.batch, outputs, s.out[0], s.out[1]});
  return bias ? add(out, reshape(bias, {outputs, 1, 1})) : out;
}

struct Conv2d {
  static constexpr auto name = "conv2d";
  static Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Dims& stride,
                        const Dims& padding, const Dims& dilation, int64_t groups) {
    product_type(name, x, weight);
    const bool batched = x.ndim() == 4;
    if ((x.ndim() != 4 && x.ndim() != 3) || weight.ndim() != 4)
      fail(ErrorKind::Shape, "conv2d: needs x [N, C, H, W] and a weight [O, C / groups, kh, kw], not ", x, " and ", weight);
    const auto s = pair_of(name, "stride", stride, 2, 1), p = pair_of(name, "padding", padding, 2, 0), d = pair_of(name, "dilation", dilation, 2, 1);
    ConvShape shape = {};
    for (size_t i = 0; i < 2; ++i) shape.stride[i] = s[i], shape.padding[i] = p[i], shape.dilation[i] = d[i];
    const Tensor out = convolve(name, batched ? x : Unsqueeze::forward(x, 0), weight, bias.value_or(Tensor()), shape, groups);
    return batched ? out : Squeeze::forward(out, 0);
  }
};
struct Conv1d {
  static constexpr auto name = "conv1d";
  static Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Dims& stride,
                        const Dims& padding, const Dims& dilation, int64_t groups) {
    product_type(name, x, weight);
    const bool batched = x.ndim() == 3;
    if ((x.ndim() != 3 && x.ndim() != 2) || weight.ndim() != 3)
      fail(ErrorKind::Shape, "conv1d: needs x [N, C, L] and a weight [O, C / groups, k], not ", x, " and ", weight);
    const auto s = pair_of(name, "stride", stride, 1, 1), p = pair_of(name, "padding", padding, 1, 0), d = pair_of(name, "dilation", dilation, 1, 1);
    ConvShape shape = {};
    for (size_t i = 0; i < 2; ++i) shape.stride[i] = s[i], shape.padding[i] = p[i], shape.dilation[i] = d[i];
    const Tensor rows = Unsqueeze::forward(batched ? x : Unsqueeze::forward(x, 0), 2);
    const Tensor out = Squeeze::forward(convolve(name, rows, Unsqueeze::forward(weight, 2), bias.value_or(Tensor()), shape, groups), 2);
    return batched ? out : Squeeze::forward(out, 0);
  }
};

}  // namespace ops
}  // namespace mainspring::tensor
