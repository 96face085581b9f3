// x[key] and x[key] = value: ints, slices, None, ..., masks, integer tensors and lists, in any mixture.
#include "ops/advanced_index.h"
#include "ops/in_place.h"
#include "tensor_object.h"

namespace mainspring::tensor::python {
namespace {

bool is_integer(PyObject* o) { return PyIndex_Check(o) && !PyBool_Check(o) && !is_tensor(o); }
bool is_basic(PyObject* o) { return o == Py_None || o == Py_Ellipsis || PySlice_Check(o) || is_integer(o); }

// A key with every mask replaced by the positions of its true elements, one for each of its dimensions.
struct Key {
  struct Item {
    PyObject* basic = nullptr;  // borrowed from the key
    Tensor picks;
  };
  std::vector<Item> items;
  int consumed = 0;  // dimensions of the tensor
  bool advanced = false;
};

Key parse(const Tensor& t, PyObject* key) {
  PyObject* const one[1] = {key};
  PyObject* const* parts = PyTuple_Check(key) ? &PyTuple_GET_ITEM(key, 0) : one;
  const Py_ssize_t count = PyTuple_Check(key) ? PyTuple_GET_SIZE(key) : 1;
  Key out;
  bool ellipsis = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* o = parts[i];
    if (is_basic(o)) {
      if (o == Py_Ellipsis && std::exchange(ellipsis, true)) fail(ErrorKind::Index, "an index holds '...' twice");
      out.consumed += o != Py_None && o != Py_Ellipsis;
      out.items.push_back({o, Tensor()});
      continue;
    }
    Tensor picks = is_tensor(o) ? tensor_of(o) : tensor_from(o, std::nullopt);
    if (picks.numel() == 0 && picks.dtype() == DType::Float32 && !is_tensor(o)) picks = cast(picks, DType::Int64);  // []
    out.advanced = true;
    if (picks.dtype() == DType::Bool) {
      const int first = out.consumed;
      const Tensor at = nonzero_positions(contiguous(picks));
      if (picks.ndim() == 0) fail(ErrorKind::Index, "a mask without dimensions must be the whole index");
      for (int d = 0; d < picks.ndim(); ++d) {
        // Behind an ellipsis the mask's dimension is counted from the end; it is checked there by its positions' range.
        if (!ellipsis && (first + d >= t.ndim() || picks.size(d) != t.size(first + d)))
          fail(ErrorKind::Index, "the mask ", picks, " does not fit ", t);
        out.items.push_back({nullptr, contiguous(make_view(at, {at.size(0)}, {at.stride(0)}, d))});
        ++out.consumed;
      }
      continue;
    }
    if (is_float(picks.dtype()))
      fail(ErrorKind::DType, "an index must be ints, slices, None, ..., or an integer or bool tensor, not ", picks);
    out.items.push_back({nullptr, cast(picks, DType::Int64)});
    ++out.consumed;
  }
  if (out.consumed > t.ndim()) fail(ErrorKind::Index, "too many indices for ", t, ": ", out.consumed);
  return out;
}

struct Resolved {
  Tensor view;                // after the ints, slices, None and ...
  std::vector<Tensor> picks;  // by dimension of the view, empty where it is kept
};

Resolved resolve(const Tensor& t, const Key& key) {
  Dims starts = t.shape(), steps = t.shape(), sizes = t.shape(), shape;
  for (int d = 0; d < t.ndim(); ++d) starts[d] = 0, steps[d] = 1;
  Resolved out;
  auto keep = [&](int64_t size) {
    shape.push_back(size);
    out.picks.emplace_back();
  };
  int d = 0;
  for (const Key::Item& item : key.items) {
    PyObject* o = item.basic;
    if (o == nullptr) {
      shape.push_back(t.size(d++));
      out.picks.push_back(item.picks);
    } else if (o == Py_None) {
      keep(1);
    } else if (o == Py_Ellipsis) {
      for (const int end = d + t.ndim() - key.consumed; d < end; ++d) keep(t.size(d));
    } else if (PySlice_Check(o)) {
      Py_ssize_t start, stop, step;
      if (PySlice_Unpack(o, &start, &stop, &step) < 0) throw nb::python_error();
      sizes[d] = PySlice_AdjustIndices(t.size(d), &start, &stop, step);
      starts[d] = start;
      steps[d] = step;
      keep(sizes[d++]);
    } else {
      const Py_ssize_t at = PyNumber_AsSsize_t(o, PyExc_IndexError);
      if (at == -1 && PyErr_Occurred()) throw nb::python_error();
      if (at < -t.size(d) || at >= t.size(d))
        fail(ErrorKind::Index, "index ", static_cast<long>(at), " is out of range for dimension ", d, " of ", t);
      if (key.advanced) {  // NumPy counts it among the index arrays
        shape.push_back(t.size(d++));
        out.picks.push_back(full_int({}, at, DType::Int64));
        continue;
      }
      starts[d] = at < 0 ? at + t.size(d) : at;
      sizes[d++] = 1;
    }
  }
  for (; d < t.ndim(); ++d) keep(t.size(d));
  out.view = ops::strided(t, starts, steps, sizes);
  if (!(shape == out.view.shape())) out.view = ops::reshape(out.view, shape);
  return out;
}

bool is_scalar_mask(PyObject* key) {
  return PyBool_Check(key) || (is_tensor(key) && tensor_of(key).dtype() == DType::Bool && tensor_of(key).ndim() == 0);
}
bool truth_of(PyObject* key) { return PyBool_Check(key) ? key == Py_True : *tensor_of(key).data<uint8_t>() != 0; }

}  // namespace

Tensor index_get(const Tensor& t, PyObject* key) {
  if (is_scalar_mask(key)) {
    const Tensor line = ops::Unsqueeze::forward(t, 0);
    return truth_of(key) ? line : ops::Clone::forward(ops::Narrow::forward(line, 0, 0, 0));
  }
  const Key parsed = parse(t, key);
  const Resolved r = resolve(t, parsed);
  return parsed.advanced ? ops::AdvancedIndex::forward(r.view, r.picks) : r.view;
}

void index_set(const Tensor& t, PyObject* key, PyObject* value) {
  Tensor storage;
  const Tensor* source = operand(value, storage);
  const Tensor from = source != nullptr ? *source : tensor_from(value, std::nullopt);
  check_in_place("setitem", t);
  check_in_place("setitem", from);
  if (is_scalar_mask(key)) {
    if (truth_of(key)) ops::CopyInPlace::forward(t, from);
    return;
  }
  const Key parsed = parse(t, key);
  GradMode off(false);
  const Resolved r = resolve(t, parsed);
  if (parsed.advanced) return ops::index_put_in_place("setitem", r.view, r.picks, from);
  Tensor fitting = from;
  while (fitting.ndim() > r.view.ndim() && fitting.size(0) == 1) fitting = ops::Squeeze::forward(fitting, 0);
  ops::CopyInPlace::forward(r.view, fitting);
}

}  // namespace mainspring::tensor::python
