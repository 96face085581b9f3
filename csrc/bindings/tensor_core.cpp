// dtypes, creation, random numbers, memory.
#include <nanobind/stl/pair.h>

#include <cmath>

#include "core/random.h"
#include "nn/loss.h"
#include "tensor_object.h"
#include "thread_pool.h"

using nanobind::literals::operator""_a;

namespace mainspring::tensor::python {
namespace {

struct DTypeObject {
  DType value;
};
PyObject* dtype_objects[kNumDTypes];

Tensor finish(Tensor t, bool requires_grad) {
  if (requires_grad) set_requires_grad(t, true);
  return t;
}

// zeros(2, 3) and zeros((2, 3)) are the same.
Dims shape_of(const nb::args& size) {
  Dims dims;
  if (size.size() == 1 && !PyLong_Check(nb::handle(size[0]).ptr())) {
    if (!dims_from(nb::handle(size[0]).ptr(), dims))
      fail(ErrorKind::Shape, "a shape is a sequence of at most ", kMaxDims, " ints, not ", nb::repr(size[0]).c_str());
    return dims;
  }
  if (!dims_from(size.ptr(), dims))
    fail(ErrorKind::Shape, "a shape is a sequence of at most ", kMaxDims, " ints, not ", nb::repr(size).c_str());
  return dims;
}

Generator& generator_or_default(Generator* g) { return g != nullptr ? *g : ops::default_generator(); }

// ---- nested lists ----

struct Nested {
  Dims shape;
  DType dtype = DType::Bool;
  bool any = false;

  void see(DType t) {
    if (!any || t > dtype) dtype = t;
    any = true;
  }
  void measure(PyObject* o, int depth) {
    if (PyList_Check(o) || PyTuple_Check(o)) {
      const Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
      if (depth == shape.size() && !any) shape.push_back(n);
      else if (depth >= shape.size() || shape[depth] != n)
        fail(ErrorKind::Shape, "tensor: the nested lists are ragged: a length of ", static_cast<long>(n), " at depth ", depth);
      for (Py_ssize_t i = 0; i < n; ++i) measure(PySequence_Fast_GET_ITEM(o, i), depth + 1);
      return;
    }
    if (depth != shape.size()) fail(ErrorKind::Shape, "tensor: the nested lists are ragged at depth ", depth);
    if (PyBool_Check(o)) return see(DType::Bool);
    if (PyLong_Check(o)) return see(DType::Int64);
    if (PyFloat_Check(o)) return see(DType::Float32);
    if (is_tensor(o) && tensor_of(o).numel() == 1) return see(tensor_of(o).dtype());
    fail(ErrorKind::DType, "tensor: cannot take an element of type ", Py_TYPE(o)->tp_name);
  }
};

void fill_nested(PyObject* o, char*& at, DType t) {
  if (PyList_Check(o) || PyTuple_Check(o)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(o); ++i) fill_nested(PySequence_Fast_GET_ITEM(o, i), at, t);
    return;
  }
  if (is_tensor(o)) {
    write_double(at, t, read_double(tensor_of(o).data(), tensor_of(o).dtype()));
  } else if (PyFloat_Check(o)) {
    write_double(at, t, PyFloat_AS_DOUBLE(o));
  } else {
    const long long value = PyLong_AsLongLong(o);
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    write_int(at, t, value);
  }
  at += itemsize(t);
}

}  // namespace

PyObject* dtype_object(DType t) { return dtype_objects[static_cast<int>(t)]; }
bool dtype_from(PyObject* o, DType& t) {
  for (int i = 0; i < kNumDTypes; ++i)
    if (dtype_objects[i] == o) {
      t = static_cast<DType>(i);
      return true;
    }
  return false;
}

Tensor tensor_from(PyObject* data, std::optional<DType> dtype) {
  Tensor out;
  if (is_tensor(data)) {
    out = copy_of(tensor_of(data));
  } else if (PyObject_CheckBuffer(data) && !PyBytes_Check(data)) {
    out = copy_of(nb::cast<Tensor>(nb::module_::import_("mainspring.tensor._tensor").attr("_view_buffer")(nb::handle(data))));
  } else if (PyObject_HasAttrString(data, "__dlpack__")) {
    out = copy_of(nb::cast<Tensor>(nb::module_::import_("mainspring.tensor._tensor").attr("from_dlpack")(nb::handle(data))));
  } else {
    Nested nested;
    nested.measure(data, 0);
    out = empty(nested.shape, dtype.value_or(nested.any ? nested.dtype : DType::Float32));
    char* at = out.data<char>();
    fill_nested(data, at, out.dtype());
  }
  return dtype ? cast(out, *dtype) : out;
}

void bind_core(nb::module_& m) {
  nb::class_<DTypeObject>(m, "dtype", "An element type; compare with ==, `is` or `in`.")
      .def_prop_ro("name", [](const DTypeObject& t) { return name(t.value); })
      .def_prop_ro("itemsize", [](const DTypeObject& t) { return itemsize(t.value); })
      .def_prop_ro("is_floating_point", [](const DTypeObject& t) { return is_float(t.value); })
      .def("__repr__", [](const DTypeObject& t) { return std::string("mainspring.tensor.") + name(t.value); })
      .def("__reduce__", [](const DTypeObject& t) { return name(t.value); });
  for (int i = 0; i < kNumDTypes; ++i) {
    nb::object o = nb::cast(DTypeObject{static_cast<DType>(i)});
    m.attr(name(static_cast<DType>(i))) = o;
    dtype_objects[i] = o.release().ptr();  // lives as long as the process
  }

  const auto f32 = nb::borrow(dtype_object(DType::Float32));
  m.def("tensor", [](nb::handle data, std::optional<DType> dtype, bool requires_grad) {
    return finish(tensor_from(data.ptr(), dtype), requires_grad);
  }, "data"_a, "dtype"_a = nb::none(), nb::kw_only(), "requires_grad"_a = false,
     "A new tensor with a copy of data: nested lists, a number, an array, a tensor.");
  m.def("empty", [](const nb::args& size, DType dtype, bool grad) { return finish(empty(shape_of(size), dtype), grad); },
        "size"_a, "dtype"_a = f32, "requires_grad"_a = false);
  m.def("zeros", [](const nb::args& size, DType dtype, bool grad) { return finish(zeros(shape_of(size), dtype), grad); },
        "size"_a, "dtype"_a = f32, "requires_grad"_a = false);
  m.def("ones", [](const nb::args& size, DType dtype, bool grad) { return finish(full_int(shape_of(size), 1, dtype), grad); },
        "size"_a, "dtype"_a = f32, "requires_grad"_a = false);
  m.def("full", [](const Dims& size, double value, DType dtype, bool grad) { return finish(full(size, value, dtype), grad); },
        "size"_a, "fill_value"_a, nb::kw_only(), "dtype"_a = f32, "requires_grad"_a = false);
  auto like = [](const Tensor& t, std::optional<DType> dtype) { return dtype.value_or(t.dtype()); };
  m.def("empty_like", [like](const Tensor& input, std::optional<DType> dtype) { return empty_like(input, like(input, dtype)); },
        "input"_a, nb::kw_only(), "dtype"_a = nb::none());
  m.def("zeros_like", [like](const Tensor& input, std::optional<DType> dtype) { return zeros(input.shape(), like(input, dtype)); },
        "input"_a, nb::kw_only(), "dtype"_a = nb::none());
  m.def("ones_like", [like](const Tensor& input, std::optional<DType> dtype) { return full_int(input.shape(), 1, like(input, dtype)); },
        "input"_a, nb::kw_only(), "dtype"_a = nb::none());
  m.def("full_like", [like](const Tensor& input, double value, std::optional<DType> dtype) {
    return full(input.shape(), value, like(input, dtype));
  }, "input"_a, "fill_value"_a, nb::kw_only(), "dtype"_a = nb::none());
  m.def("eye", [](int64_t n, DType dtype) {
    Tensor t = zeros({n, n}, dtype);
    for (int64_t i = 0; i < n; ++i) write_int(t.data<char>() + i * (n + 1) * itemsize(dtype), dtype, 1);
    return t;
  }, "n"_a, nb::kw_only(), "dtype"_a = f32);
  m.def("arange", [](nb::object start_, nb::object end_, nb::object step_, std::optional<DType> dtype) {
    if (end_.is_none()) {
      end_ = start_;
      start_ = nb::int_(0);
    }
    const bool integers = nb::isinstance<nb::int_>(start_) && nb::isinstance<nb::int_>(end_) && nb::isinstance<nb::int_>(step_);
    const double start = nb::cast<double>(start_), end = nb::cast<double>(end_), step = nb::cast<double>(step_);
    if (step == 0) fail(ErrorKind::Value, "arange: the step is 0");
    const double count = std::ceil((end - start) / step);
    const int64_t n = count > 0 ? static_cast<int64_t>(count) : 0;
    const DType t = dtype.value_or(integers ? DType::Int64 : DType::Float32);
    Tensor out = empty({n}, t);
    for (int64_t i = 0; i < n; ++i) {
      char* at = out.data<char>() + i * itemsize(t);
      if (integers) write_int(at, t, nb::cast<int64_t>(start_) + i * nb::cast<int64_t>(step_));
      else write_double(at, t, start + static_cast<double>(i) * step);
    }
    return out;
  }, "start"_a, "end"_a = nb::none(), "step"_a = 1, nb::kw_only(), "dtype"_a = nb::none());

  nb::class_<Generator>(m, "Generator", "A stream of random numbers (Philox4x32-10): a function of seed and position.")
      .def("__init__", [](Generator* g, uint64_t seed) { new (g) Generator{seed, 0}; }, "seed"_a = 0)
      .def("manual_seed", [](Generator& g, uint64_t seed) { g = {seed, 0}; }, "seed"_a)
      .def("get_state", [](const Generator& g) { return nb::make_tuple(g.seed, g.position); },
           "(seed, position): two ints that any format can store.")
      .def("set_state", [](Generator& g, std::pair<uint64_t, uint64_t> s) { g = {s.first, s.second}; }, "state"_a);
  m.attr("default_generator") = nb::cast(&ops::default_generator(), nb::rv_policy::reference);
  m.def("randn", [](const nb::args& size, DType dtype, Generator* generator, bool grad) {
    Tensor t = empty(shape_of(size), dtype);
    if (!is_float(dtype)) fail(ErrorKind::DType, "randn: needs a floating-point dtype, not ", name(dtype));
    generator_or_default(generator).normal(t, 0, 1);
    return finish(std::move(t), grad);
  }, "size"_a, "dtype"_a = f32, "generator"_a = nb::none(), "requires_grad"_a = false);
  m.def("rand", [](const nb::args& size, DType dtype, Generator* generator, bool grad) {
    Tensor t = empty(shape_of(size), dtype);
    if (!is_float(dtype)) fail(ErrorKind::DType, "rand: needs a floating-point dtype, not ", name(dtype));
    generator_or_default(generator).uniform(t, 0, 1);
    return finish(std::move(t), grad);
  }, "size"_a, "dtype"_a = f32, "generator"_a = nb::none(), "requires_grad"_a = false);
  m.def("randint", [](int64_t low, int64_t high, const Dims& size, Generator* generator) {
    if (low >= high) fail(ErrorKind::Value, "randint: low (", low, ") must be below high (", high, ")");
    Tensor t = empty(size, DType::Int64);
    generator_or_default(generator).integers(t, low, high);
    return t;
  }, "low"_a, "high"_a, "size"_a, nb::kw_only(), "generator"_a = nb::none());

  m.def("live_tensors", &live_tensors, "How many tensors exist, in Python or only on a tape.");
  m.def("memory_stats", [] {
    const MemoryStats s = memory_stats();
    nb::dict out;
    out["used_bytes"] = s.used_bytes;
    out["cached_bytes"] = s.cached_bytes;
    out["peak_bytes"] = s.peak_bytes;
    return out;
  }, "Bytes of large blocks: handed out, kept for reuse, and the most handed out so far.");
  m.def("empty_cache", &empty_cache, "Gives memory that is kept for reuse back to the system.");
  m.def("get_num_threads", &mainspring::num_threads);
  m.def("set_num_threads", [](int count) {
    if (count < 1) fail(ErrorKind::Value, "set_num_threads: ", count, " threads; at least 1 is needed");
    nb::gil_scoped_release release;
    mainspring::set_num_threads(count);
  }, "count"_a);
}

}  // namespace mainspring::tensor::python
