// Ops that move, cut and join, as formulas over other ops from which they take their gradients.
#pragma once

#include "ops/composite.h"

namespace mainspring::tensor::ops {

MAINSPRING_COMPOSITE(Flip, "flip", (const Tensor& x, const Dims& dims),
  Dims starts = x.shape(), steps = x.shape();
  for (int d = 0; d < x.ndim(); ++d) starts[d] = 0, steps[d] = 1;
  if (x.ndim() > 0 && dims.size() > 0)
    for (const int64_t d : wrap_dims(name, dims, x.ndim())) starts[static_cast<int>(d)] = x.size(static_cast<int>(d)) - 1, steps[static_cast<int>(d)] = -1;
  return Clone::forward(strided(x, starts, steps, x.shape()));)
MAINSPRING_COMPOSITE(Fliplr, "fliplr", (const Tensor& x),
  if (x.ndim() < 2) fail(ErrorKind::Shape, "fliplr: ", x, " has fewer than two dimensions");
  return Flip::forward(x, {1});)
MAINSPRING_COMPOSITE(Flipud, "flipud", (const Tensor& x),
  if (x.ndim() < 1) fail(ErrorKind::Shape, "flipud: ", x, " has no dimension");
  return Flip::forward(x, {0});)
MAINSPRING_COMPOSITE(Roll, "roll", (const Tensor& x, const Dims& shifts, const Dims& dims),
  if (dims.size() == 0) {
    if (shifts.size() != 1) fail(ErrorKind::Value, "roll: without dims it takes one shift, not ", shifts);
    return reshape(forward(reshape(x, {x.numel()}), shifts, {0}), x.shape());
  }
  if (shifts.size() != dims.size()) fail(ErrorKind::Value, "roll: shifts ", shifts, " and dims ", dims, " differ in number");
  Tensor out = x;
  for (int i = 0; i < dims.size(); ++i) {
    const int d = wrap_dim(name, dims[i], x.ndim());
    const int64_t n = x.ndim() == 0 ? 1 : x.size(d);
    if (n == 0 || x.ndim() == 0) continue;
    const int64_t cut = ((-shifts[i] % n) + n) % n;
    if (cut != 0) out = Cat::forward({Narrow::forward(out, d, cut, n - cut), Narrow::forward(out, d, 0, cut)}, d);
  }
  return out.get() == x.get() ? Clone::forward(x) : out;)
MAINSPRING_COMPOSITE(Rot90, "rot90", (const Tensor& x, int64_t k, const Dims& dims),
  if (dims.size() != 2 || wrap_dim(name, dims[0], x.ndim()) == wrap_dim(name, dims[1], x.ndim()))
    fail(ErrorKind::Value, "rot90: needs two different dimensions, not ", dims);
  switch (((k % 4) + 4) % 4) {
    case 1: return transpose(Flip::forward(x, {dims[1]}), dims[0], dims[1]);
    case 2: return Flip::forward(x, dims);
    case 3: return Flip::forward(transpose(x, dims[0], dims[1]), {dims[1]});
    default: return Clone::forward(x);
  })
MAINSPRING_COMPOSITE(Movedim, "movedim", (const Tensor& x, const Dims& source, const Dims& destination),
  if (source.size() != destination.size()) fail(ErrorKind::Value, "movedim: ", source, " and ", destination, " differ in number");
  Dims order = x.shape();
  bool from[kMaxDims] = {}; bool filled[kMaxDims] = {};
  for (int i = 0; i < source.size(); ++i) {
    const int s = wrap_dim(name, source[i], x.ndim()), t = wrap_dim(name, destination[i], x.ndim());
    if (from[s] || filled[t]) fail(ErrorKind::Index, "movedim: a dimension is given twice in ", source, " or ", destination);
    if (x.ndim() > 0) order[t] = s;
    from[s] = filled[t] = true;
  }
  for (int s = 0, t = 0; s < x.ndim(); ++s) {
    if (from[s]) continue;
    while (filled[t]) ++t;
    order[t++] = s;
  }
  return permute(x, order);)
MAINSPRING_COMPOSITE(BroadcastTo, "broadcast_to", (const Tensor& x, const Dims& shape), return expand(x, shape);)
MAINSPRING_COMPOSITE(ExpandAs, "expand_as", (const Tensor& x, const Tensor& other), return expand(x, other.shape());)
MAINSPRING_COMPOSITE(Tile, "tile", (const Tensor& x, const Dims& given),
  Dims repeats = given, sizes = x.shape(), wide, all, shape;
  while (repeats.size() < sizes.size()) repeats.insert(0, 1);
  while (sizes.size() < repeats.size()) sizes.insert(0, 1);
  Tensor out = reshape(x, sizes);
  // One dimension after the other: each is doubled into (repeats, size) in turn.
  for (int d = 0; d < sizes.size(); ++d) {
    if (repeats[d] < 0) fail(ErrorKind::Value, "tile: negative repeats ", given);
    if (repeats[d] == 1) continue;
    if (repeats[d] == 0 || out.size(d) == 0) {
      Dims none = out.shape();
      none[d] = 0;
      out = corner(out, none);
      continue;
    }
    out = Cat::forward(Tensors(static_cast<size_t>(repeats[d]), out), d);
  }
  return out.get() == x.get() ? Clone::forward(x) : out;)
MAINSPRING_COMPOSITE(Repeat, "repeat", (const Tensor& x, const Dims& repeats),
  if (repeats.size() < x.ndim()) fail(ErrorKind::Shape, "repeat: ", repeats, " has fewer numbers than ", x, " has dimensions");
  return Tile::forward(x, repeats);)
MAINSPRING_COMPOSITE(RepeatInterleave, "repeat_interleave", (const Tensor& given, const Tensor& repeats, Maybe dim),
  if (is_float(repeats.dtype())) fail(ErrorKind::DType, "repeat_interleave: the repeats must be integers, not ", repeats);
  const Tensor x = dim ? given : reshape(given, {given.numel()});
  const int d = wrap_dim(name, dim.value_or(0), x.ndim());
  const int64_t n = x.size(d);
  if (repeats.numel() != 1 && repeats.numel() != n) fail(ErrorKind::Shape, "repeat_interleave: ", repeats, " does not fit dimension ", d, " of ", x);
  const Tensor counts = contiguous(cast(repeats, DType::Int64));
  std::vector<int64_t> index;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t count = counts.data<int64_t>()[counts.numel() == 1 ? 0 : i];
    if (count < 0) fail(ErrorKind::Value, "repeat_interleave: a negative count ", count);
    index.insert(index.end(), static_cast<size_t>(count), i);
  }
  const Tensor at = empty({static_cast<int64_t>(index.size())}, DType::Int64);
  std::copy(index.begin(), index.end(), at.data<int64_t>());
  return IndexSelect::forward(x, d, at);)
struct Unbind {
  static constexpr auto name = "unbind";
  static Tensors forward(const Tensor& x, int64_t dim) {
    const int d = wrap_dim(name, dim, x.ndim());
    if (x.ndim() == 0) fail(ErrorKind::Shape, "unbind: ", x, " has no dimension");
    Tensors out;
    for (int64_t i = 0; i < x.size(d); ++i) out.push_back(Squeeze::forward(Narrow::forward(x, d, i, 1), d));
    return out;
  }
};
MAINSPRING_COMPOSITE(Select, "select", (const Tensor& x, int64_t dim, int64_t index),
  if (x.ndim() == 0) fail(ErrorKind::Shape, "select: ", x, " has no dimension");
  const int d = wrap_dim(name, dim, x.ndim());
  if (index < -x.size(d) || index >= x.size(d)) fail(ErrorKind::Index, "select: index ", index, " is out of range for dimension ", d, " of ", x);
  return Squeeze::forward(Narrow::forward(x, d, index < 0 ? index + x.size(d) : index, 1), d);)
MAINSPRING_COMPOSITE(Unflatten, "unflatten", (const Tensor& x, int64_t dim, const Dims& sizes),
  const int d = wrap_dim(name, dim, x.ndim());
  Dims shape;
  for (int i = 0; i < x.ndim(); ++i) {
    if (i != d) { shape.push_back(x.size(i)); continue; }
    int64_t known = 1;
    for (const int64_t n : sizes) known *= n == -1 ? 1 : n;
    for (const int64_t n : sizes) shape.push_back(n == -1 ? (known == 0 ? 0 : x.size(d) / known) : n);
  }
  return reshape(x, shape);)
MAINSPRING_COMPOSITE(DiagEmbed, "diag_embed", (const Tensor& x, int64_t offset, int64_t dim1, int64_t dim2),
  if (x.ndim() == 0) fail(ErrorKind::Shape, "diag_embed: ", x, " has no dimension");
  const int64_t n = x.size(x.ndim() - 1) + (offset < 0 ? -offset : offset);
  Dims shape(x->sizes, x.ndim() - 1);
  shape.push_back(n);
  shape.push_back(n);
  const Tensor out = DiagonalScatter::forward(x, shape, offset, shape.size() - 2, shape.size() - 1);
  return Movedim::forward(out, {-2, -1}, {dim1, dim2});)
MAINSPRING_COMPOSITE(Diag, "diag", (const Tensor& x, int64_t diagonal),
  if (x.ndim() == 1) return DiagEmbed::forward(x, diagonal, -2, -1);
  if (x.ndim() != 2) fail(ErrorKind::Shape, "diag: needs one or two dimensions, not ", x);
  return Clone::forward(Diagonal::forward(x, diagonal, 0, 1));)
MAINSPRING_COMPOSITE(Unfold, "unfold", (const Tensor& x, int64_t dim, int64_t size, int64_t step),
  const int d = wrap_dim(name, dim, x.ndim());
  const int64_t n = x.ndim() == 0 ? 1 : x.size(d);
  if (size < 0 || size > n || step < 1) fail(ErrorKind::Value, "unfold: windows of ", size, " every ", step, " do not lie in dimension ", d, " of ", x);
  const int64_t count = (n - size) / step + 1;
  const Tensor at = empty({count * size}, DType::Int64);
  for (int64_t i = 0; i < count * size; ++i) at.data<int64_t>()[i] = i / (size > 0 ? size : 1) * step + i % (size > 0 ? size : 1);
  const Tensor flat = IndexSelect::forward(x.ndim() == 0 ? reshape(x, {1}) : x, d, at);
  const Tensor parts = Unflatten::forward(flat, d, {count, size});
  const Tensor out = Movedim::forward(parts, {d + 1}, {-1});
  return x.ndim() == 0 ? reshape(out, {size}) : out;)
MAINSPRING_COMPOSITE(Pad, "pad", (const Tensor& x, const Dims& pad, double value),
  if (pad.size() % 2 != 0 || pad.size() > 2 * x.ndim()) fail(ErrorKind::Value, "pad: ", pad, " does not fit ", x);
  Dims shape = x.shape(), starts = x.shape(), steps = x.shape(), from = x.shape(), sizes = x.shape();
  for (int d = 0; d < x.ndim(); ++d) starts[d] = from[d] = 0, steps[d] = 1;
  for (int i = 0; 2 * i < pad.size(); ++i) {  // negative: cut off
    const int d = x.ndim() - 1 - i;
    const int64_t before = pad[2 * i], behind = pad[2 * i + 1];
    shape[d] = x.size(d) + before + behind;
    from[d] = before < 0 ? -before : 0;
    starts[d] = before > 0 ? before : 0;
    sizes[d] = x.size(d) - from[d] - (behind < 0 ? -behind : 0);
    if (shape[d] < 0 || sizes[d] < 0) fail(ErrorKind::Value, "pad: ", pad, " leaves nothing of ", x);
  }
  const Tensor part = sizes == x.shape() ? x : strided(x, from, steps, sizes);
  const Tensor placed = StridedScatter::forward(part, shape, starts, steps);
  if (value == 0) return placed;
  const Tensor inside = StridedScatter::forward(full_int(sizes, 1, DType::Bool), shape, starts, steps);
  return where(inside, placed, full({}, value, x.dtype()));)
inline Tensor at_least(const Tensor& x, int ndim) {
  if (x.ndim() >= ndim) return x;
  if (ndim == 3 && x.ndim() == 2) return Unsqueeze::forward(x, 2);
  if (ndim == 3 && x.ndim() == 1) return reshape(x, {1, x.size(0), 1});
  Dims shape = x.shape();
  while (shape.size() < ndim) shape.insert(0, 1);
  return reshape(x, shape);
}
inline Tensor joined(const Tensors& tensors, int ndim, int64_t dim) {
  Tensors parts;
  for (const Tensor& x : tensors) parts.push_back(at_least(x, ndim));
  return Cat::forward(parts, dim);
}
MAINSPRING_COMPOSITE(Hstack, "hstack", (const Tensors& tensors), return joined(tensors, 1, !tensors.empty() && tensors[0].ndim() > 1 ? 1 : 0);)
MAINSPRING_COMPOSITE(Vstack, "vstack", (const Tensors& tensors), return joined(tensors, 2, 0);)
MAINSPRING_COMPOSITE(Dstack, "dstack", (const Tensors& tensors), return joined(tensors, 3, 2);)
MAINSPRING_COMPOSITE(ColumnStack, "column_stack", (const Tensors& tensors),
  Tensors parts;
  for (const Tensor& x : tensors) parts.push_back(x.ndim() <= 1 ? reshape(x, {x.numel(), 1}) : x);
  return Cat::forward(parts, 1);)
struct TensorSplit {
  static constexpr auto name = "tensor_split";
  static Tensors forward(const Tensor& x, int64_t sections, int64_t dim) {
    const int d = wrap_dim(name, dim, x.ndim());
    if (x.ndim() == 0 || sections < 1) fail(ErrorKind::Value, "tensor_split: ", sections, " sections of ", x);
    Tensors out;
    const int64_t n = x.size(d), least = n / sections, more = n % sections;
    for (int64_t i = 0, at = 0; i < sections; ++i) {
      const int64_t length = least + (i < more);
      out.push_back(Narrow::forward(x, d, at, length));
      at += length;
    }
    return out;
  }
};
struct Meshgrid {
  static constexpr auto name = "meshgrid";
  static Tensors forward(const Tensors& tensors, const std::string& indexing) {
    if (indexing != "ij" && indexing != "xy") fail(ErrorKind::Value, "meshgrid: indexing is '", indexing, "'; it must be 'ij' or 'xy'");
    const int n = static_cast<int>(tensors.size());
    const bool swap = indexing == "xy" && n >= 2;
    auto axis = [&](int i) { return swap && i < 2 ? 1 - i : i; };
    Dims shape;
    shape.resize(n);
    for (int i = 0; i < n; ++i) shape[axis(i)] = tensors[static_cast<size_t>(i)].numel();
    Tensors out;
    for (int i = 0; i < n; ++i) {
      Dims line;
      for (int d = 0; d < n; ++d) line.push_back(d == axis(i) ? shape[d] : 1);
      out.push_back(expand(reshape(tensors[static_cast<size_t>(i)], line), shape));
    }
    return out;
  }
};
struct BroadcastTensors {
  static constexpr auto name = "broadcast_tensors";
  static Tensors forward(const Tensors& tensors) {
    Dims shape;
    for (const Tensor& x : tensors) shape = broadcast_shapes(name, shape, x.shape());
    Tensors out;
    for (const Tensor& x : tensors) out.push_back(expand(x, shape));
    return out;
  }
};
MAINSPRING_COMPOSITE(OneHot, "one_hot", (const Tensor& x, int64_t num_classes),
  if (is_float(x.dtype()) || x.dtype() == DType::Bool) fail(ErrorKind::DType, "one_hot: the classes must be integers, not ", x);
  const Tensor flat = contiguous(cast(x, DType::Int64));
  int64_t classes = num_classes;
  if (classes < 0)
    for (int64_t i = 0; i < flat.numel(); ++i) classes = std::max(classes, flat.data<int64_t>()[i] + 1);
  Dims shape = x.shape();
  shape.push_back(classes);
  const Tensor out = zeros(shape, DType::Int64);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const int64_t c = flat.data<int64_t>()[i];
    if (c < 0 || c >= classes) fail(ErrorKind::Index, "one_hot: class ", c, " is not in [0, ", classes, ")");
    out.data<int64_t>()[i * classes + c] = 1;
  }
  return out;)

}  // namespace mainspring::tensor::ops
