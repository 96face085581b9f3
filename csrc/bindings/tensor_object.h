// The Python object of a tensor, and how C++ values become Python's and back.
//
// The type is written against CPython's own interface, not as a nanobind class: an operation on one-element
// tensors has a budget of a few hundred nanoseconds, and a number slot, a free list of objects and a pointer
// to the impl cost tens. Everything that is not on that path goes through nanobind, with the casters below.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "autograd/engine.h"
#include "ops/ops.h"

namespace mainspring::tensor::python {

namespace nb = nanobind;

struct PyTensor {
  PyObject_HEAD
  Tensor tensor;
  PyObject* weakrefs;
};

extern PyTypeObject TensorType;
extern PyTypeObject ParameterType;

inline bool is_tensor(PyObject* o) {
  return Py_TYPE(o) == &TensorType || Py_TYPE(o) == &ParameterType || PyType_IsSubtype(Py_TYPE(o), &TensorType);
}
inline const Tensor& tensor_of(PyObject* o) { return reinterpret_cast<PyTensor*>(o)->tensor; }

PyObject* wrap(Tensor t) noexcept;                               // None for an empty tensor; null on MemoryError
PyObject* wrap_parameter(Tensor t) noexcept;
const Tensor* operand(PyObject* o, Tensor& storage);             // a tensor or a number, else null
void set_error() noexcept;                                       // the exception that is being handled, as Python's
PyObject* dtype_object(DType t);                                 // borrowed
bool dtype_from(PyObject* o, DType& t);
bool dims_from(PyObject* o, Dims& dims);                         // an int or a sequence of ints; sets no error
Tensor index_get(const Tensor& t, PyObject* key);                // tensor_index.cpp
void index_set(const Tensor& t, PyObject* key, PyObject* value);
Tensor tensor_from(PyObject* data, std::optional<DType> dtype);  // nested lists, numbers, buffers, tensors
PyObject* to_list(const Tensor& t);
std::string repr(const Tensor& t);
int get_buffer(PyObject* self, Py_buffer* view, int flags);
void release_buffer(PyObject* self, Py_buffer* view);

extern PyMethodDef op_methods[];     // tensor_ops.cpp, from the table of ops
extern PyMethodDef op_functions[];
extern PyNumberMethods number_methods;
extern PyGetSetDef autograd_properties[];  // tensor_autograd.cpp
extern PyObject* error_classes[6];         // by ErrorKind

void bind_object(nb::module_& m);    // tensor_object.cpp
void bind_core(nb::module_& m);      // tensor_core.cpp: dtypes, creation, random numbers, memory
void bind_exchange(nb::module_& m);  // tensor_exchange.cpp: NumPy, DLPack
void bind_autograd(nb::module_& m);  // tensor_autograd.cpp
void bind_ops(nb::module_& m);       // tensor_ops.cpp
void bind_optim(nb::module_& m);     // tensor_optim.cpp
void bind_parallel(nb::module_& m);  // tensor_parallel.cpp

template <class Body>
PyObject* guarded(Body body) noexcept {
  try {
    return body();
  } catch (...) {
    set_error();
    return nullptr;
  }
}

}  // namespace mainspring::tensor::python

namespace nanobind::detail {

template <>
struct type_caster<mainspring::tensor::Tensor> {
  NB_TYPE_CASTER(mainspring::tensor::Tensor, const_name("Tensor"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept {
    if (!mainspring::tensor::python::is_tensor(src.ptr())) return false;
    value = mainspring::tensor::python::tensor_of(src.ptr());
    return true;
  }
  static handle from_cpp(const mainspring::tensor::Tensor& t, rv_policy, cleanup_list*) noexcept {
    return mainspring::tensor::python::wrap(t);
  }
};

template <>
struct type_caster<mainspring::tensor::DType> {
  NB_TYPE_CASTER(mainspring::tensor::DType, const_name("dtype"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept {
    return mainspring::tensor::python::dtype_from(src.ptr(), value);
  }
  static handle from_cpp(mainspring::tensor::DType t, rv_policy, cleanup_list*) noexcept {
    return handle(mainspring::tensor::python::dtype_object(t)).inc_ref();
  }
};

template <>
struct type_caster<mainspring::tensor::Dims> {
  NB_TYPE_CASTER(mainspring::tensor::Dims, const_name("int | Sequence[int]"))
  bool from_python(handle src, uint32_t, cleanup_list*) noexcept {
    return mainspring::tensor::python::dims_from(src.ptr(), value);
  }
  static handle from_cpp(const mainspring::tensor::Dims& dims, rv_policy, cleanup_list*) noexcept {
    PyObject* out = PyTuple_New(dims.size());
    for (int i = 0; out != nullptr && i < dims.size(); ++i) PyTuple_SET_ITEM(out, i, PyLong_FromLongLong(dims[i]));
    return out;
  }
};

}  // namespace nanobind::detail
