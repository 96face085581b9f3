// The Tensor and Parameter types: life of the object, protocols, printing.
#include "tensor_object.h"

#include <cmath>
#include <cstdio>

#include "autograd/engine.h"
#include "core/blocking.h"
#include "ops/loops.h"

namespace mainspring::tensor::python {

PyObject* error_classes[6] = {};

namespace {

constexpr int kKept = 256;
PyTensor* kept[kKept];  // dead Tensor objects for the next ones; guarded by the interpreter lock
int num_kept = 0;

PyObject* new_object(PyTypeObject* type, Tensor&& t) {
  PyTensor* self;
  if (type == &TensorType && num_kept > 0) {
    self = kept[--num_kept];
    _Py_NewReference(reinterpret_cast<PyObject*>(self));
  } else {
    self = reinterpret_cast<PyTensor*>(type->tp_alloc(type, 0));
    if (self == nullptr) return nullptr;
  }
  self->weakrefs = nullptr;
  new (&self->tensor) Tensor(std::move(t));
  self->tensor->wrapper = self;
  return reinterpret_cast<PyObject*>(self);
}

void dealloc(PyObject* o) {
  auto* self = reinterpret_cast<PyTensor*>(o);
  if (self->weakrefs != nullptr) PyObject_ClearWeakRefs(o);
  if (self->tensor) self->tensor->wrapper = nullptr;
  self->tensor.~Tensor();
  if (Py_TYPE(o) == &TensorType && num_kept < kKept) kept[num_kept++] = self;
  else Py_TYPE(o)->tp_free(o);
}

PyObject* no_new(PyTypeObject*, PyObject*, PyObject*) {
  PyErr_SetString(PyExc_TypeError, "a Tensor is made by a function: tensor(data), zeros(2, 3), from_dlpack(x), ...");
  return nullptr;
}

// Parameter(data, requires_grad=True) shares the memory of data.
PyObject* new_parameter(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"data", "requires_grad", nullptr};
  PyObject* data;
  int wanted = 1;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|p:Parameter", const_cast<char**>(names), &TensorType, &data, &wanted))
    return nullptr;
  return guarded([&] {
    Tensor t = alias(tensor_of(data));
    set_requires_grad(t, wanted);
    return new_object(type, std::move(t));
  });
}

Py_ssize_t length(PyObject* o) {
  const Tensor& t = tensor_of(o);
  if (t.ndim() == 0) {
    PyErr_SetString(PyExc_TypeError, "len() of a tensor without dimensions");
    return -1;
  }
  return t.size(0);
}

PyObject* get_item(PyObject* o, PyObject* key) {
  return guarded([&] { return wrap(index_get(tensor_of(o), key)); });
}

PyObject* get_row(PyObject* o, Py_ssize_t i) {  // iteration ends where this raises IndexError
  return guarded([&] {
    const nb::object key = nb::steal(PyLong_FromSsize_t(i));
    return wrap(index_get(tensor_of(o), key.ptr()));
  });
}

int set_item(PyObject* o, PyObject* key, PyObject* value) {
  if (value == nullptr) {
    PyErr_SetString(PyExc_TypeError, "elements of a tensor cannot be deleted");
    return -1;
  }
  try {
    index_set(tensor_of(o), key, value);
    return 0;
  } catch (...) {
    set_error();
    return -1;
  }
}

Py_hash_t hash(PyObject* o) { return static_cast<Py_hash_t>(reinterpret_cast<uintptr_t>(o) >> 4); }

PyObject* to_repr(PyObject* o) {
  return guarded([&] {
    const std::string s = repr(tensor_of(o));
    return PyUnicode_FromStringAndSize(s.data(), static_cast<Py_ssize_t>(s.size()));
  });
}

PyObject* element(const char* p, DType t) {
  if (t == DType::Bool) return PyBool_FromLong(*p);
  return is_float(t) ? PyFloat_FromDouble(read_double(p, t)) : PyLong_FromLongLong(read_int(p, t));
}

PyObject* list_of(const Tensor& t, int dim, const char* p) {
  if (dim == t.ndim()) return element(p, t.dtype());
  PyObject* out = PyList_New(t.size(dim));
  for (int64_t i = 0; out != nullptr && i < t.size(dim); ++i) {
    PyObject* item = list_of(t, dim + 1, p + i * t.stride(dim) * itemsize(t.dtype()));
    if (item == nullptr) Py_CLEAR(out);
    else PyList_SET_ITEM(out, i, item);
  }
  return out;
}

PyObject* method_item(PyObject* o, PyObject*) {
  const Tensor& t = tensor_of(o);
  if (t.numel() != 1)
    return guarded([&]() -> PyObject* { fail(ErrorKind::Value, "item: ", t, " has ", t.numel(), " elements, not one"); });
  return element(t.data<char>(), t.dtype());
}
PyObject* method_tolist(PyObject* o, PyObject*) { return to_list(tensor_of(o)); }
PyObject* method_numel(PyObject* o, PyObject*) { return PyLong_FromLongLong(tensor_of(o).numel()); }
PyObject* method_dim(PyObject* o, PyObject*) { return PyLong_FromLong(tensor_of(o).ndim()); }
PyObject* method_is_contiguous(PyObject* o, PyObject*) { return PyBool_FromLong(tensor_of(o).contiguous()); }
PyObject* method_data_ptr(PyObject* o, PyObject*) { return PyLong_FromVoidPtr(tensor_of(o).data()); }
PyObject* method_stride(PyObject* o, PyObject*) { return nb::cast(tensor_of(o).strides()).release().ptr(); }
PyObject* method_size(PyObject* o, PyObject* args) {
  const Tensor& t = tensor_of(o);
  if (PyTuple_GET_SIZE(args) == 0) return nb::cast(t.shape()).release().ptr();
  const long long dim = PyLong_AsLongLong(PyTuple_GET_ITEM(args, 0));
  if (dim == -1 && PyErr_Occurred()) return nullptr;
  return guarded([&]() -> PyObject* {
    if (t.ndim() == 0) fail(ErrorKind::Index, "size: ", t, " has no dimensions");
    return PyLong_FromLongLong(t.size(wrap_dim("size", dim, t.ndim())));
  });
}

template <DType type>
PyObject* method_convert(PyObject* o, PyObject*) {
  return guarded([&] { return wrap(ops::to(tensor_of(o), type)); });
}

PyMethodDef own_methods[] = {
    {"item", method_item, METH_NOARGS, "The only element as a Python number."},
    {"tolist", method_tolist, METH_NOARGS, "The elements as nested lists."},
    {"numel", method_numel, METH_NOARGS, "How many elements the tensor has."},
    {"dim", method_dim, METH_NOARGS, "How many dimensions the tensor has."},
    {"size", method_size, METH_VARARGS, "The shape, or the size of one dimension."},
    {"stride", method_stride, METH_NOARGS, "Elements between neighbours, for each dimension."},
    {"is_contiguous", method_is_contiguous, METH_NOARGS, "Whether the elements lie row after row without gaps."},
    {"data_ptr", method_data_ptr, METH_NOARGS, "The address of the first element."},
    {"float", method_convert<DType::Float32>, METH_NOARGS, "to(float32)"},
    {"double", method_convert<DType::Float64>, METH_NOARGS, "to(float64)"},
    {"half", method_convert<DType::Float16>, METH_NOARGS, "to(float16)"},
    {"bfloat16", method_convert<DType::BFloat16>, METH_NOARGS, "to(bfloat16)"},
    {"long", method_convert<DType::Int64>, METH_NOARGS, "to(int64)"},
    {"int", method_convert<DType::Int32>, METH_NOARGS, "to(int32)"},
    {"short", method_convert<DType::Int16>, METH_NOARGS, "to(int16)"},
    {"char", method_convert<DType::Int8>, METH_NOARGS, "to(int8)"},
    {"byte", method_convert<DType::UInt8>, METH_NOARGS, "to(uint8)"},
    {"bool", method_convert<DType::Bool>, METH_NOARGS, "to(bool)"},
};

PyObject* get_shape(PyObject* o, void*) { return nb::cast(tensor_of(o).shape()).release().ptr(); }
PyObject* get_dtype(PyObject* o, void*) { return Py_NewRef(dtype_object(tensor_of(o).dtype())); }
PyObject* get_ndim(PyObject* o, void*) { return PyLong_FromLong(tensor_of(o).ndim()); }
PyObject* get_device(PyObject*, void*) { return PyUnicode_InternFromString("cpu"); }
PyObject* get_itemsize(PyObject* o, void*) { return PyLong_FromLong(itemsize(tensor_of(o).dtype())); }
PyObject* get_transposed(PyObject* o, void*) {
  return guarded([&] {
    const Tensor& t = tensor_of(o);
    if (t.ndim() != 2) fail(ErrorKind::Shape, "T: ", t, " does not have two dimensions; use transpose() or permute()");
    return wrap(ops::transpose(t, 0, 1));
  });
}
PyObject* get_matrix_transposed(PyObject* o, void*) {
  return guarded([&] {
    if (tensor_of(o).ndim() < 2) fail(ErrorKind::Shape, "mT: ", tensor_of(o), " has fewer than two dimensions");
    return wrap(ops::transpose(tensor_of(o), -2, -1));
  });
}
PyObject* get_version(PyObject* o, void*) { return PyLong_FromUnsignedLong(tensor_of(o).version()); }

PyGetSetDef own_properties[] = {
    {"shape", get_shape, nullptr, "The sizes of the dimensions.", nullptr},
    {"dtype", get_dtype, nullptr, "The element type.", nullptr},
    {"ndim", get_ndim, nullptr, "How many dimensions the tensor has.", nullptr},
    {"device", get_device, nullptr, "The processor: \"cpu\".", nullptr},
    {"itemsize", get_itemsize, nullptr, "Bytes of one element.", nullptr},
    {"T", get_transposed, nullptr, "A matrix with rows and columns exchanged (a view).", nullptr},
    {"mT", get_matrix_transposed, nullptr, "The last two dimensions exchanged (a view).", nullptr},
    {"_version", get_version, nullptr, "How often the memory was written in place.", nullptr},
};

PyMappingMethods mapping = {length, get_item, set_item};
PySequenceMethods sequence = {};
PyBufferProcs buffer = {get_buffer, release_buffer};

int truth(PyObject* o) {
  const Tensor& t = tensor_of(o);
  if (t.numel() != 1) {
    PyErr_Format(PyExc_ValueError, "the truth of a tensor with %lld elements is ambiguous; use any() or all()",
                 static_cast<long long>(t.numel()));
    return -1;
  }
  return is_float(t.dtype()) ? read_double(t.data(), t.dtype()) != 0 : read_int(t.data(), t.dtype()) != 0;
}
PyObject* to_float(PyObject* o) {
  const nb::object value = nb::steal(method_item(o, nullptr));
  return value.is_valid() ? PyNumber_Float(value.ptr()) : nullptr;
}
PyObject* to_int(PyObject* o) {
  const nb::object value = nb::steal(method_item(o, nullptr));
  return value.is_valid() ? PyNumber_Long(value.ptr()) : nullptr;
}
PyObject* to_index(PyObject* o) {
  if (is_float(tensor_of(o).dtype())) {
    PyErr_SetString(PyExc_TypeError, "only integer tensors with one element can be an index");
    return nullptr;
  }
  return to_int(o);
}

// The tables of the op files and of this one, joined; they live as long as the process.
PyMethodDef* all_methods() {
  static std::vector<PyMethodDef> methods;
  for (const PyMethodDef& m : own_methods) methods.push_back(m);
  for (PyMethodDef* m = op_methods; m->ml_name != nullptr; ++m) methods.push_back(*m);
  methods.push_back({});
  return methods.data();
}
PyGetSetDef* all_properties() {
  static std::vector<PyGetSetDef> properties;
  for (const PyGetSetDef& p : own_properties) properties.push_back(p);
  for (PyGetSetDef* p = autograd_properties; p->name != nullptr; ++p) properties.push_back(*p);
  properties.push_back({});
  return properties.data();
}

}  // namespace

PyObject* rich_compare(PyObject* a, PyObject* b, int op);  // tensor_ops.cpp

PyTypeObject TensorType = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyTypeObject ParameterType = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyObject* wrap(Tensor t) noexcept {
  if (!t) Py_RETURN_NONE;
  if (t->wrapper != nullptr) return Py_NewRef(static_cast<PyObject*>(t->wrapper));
  return new_object(&TensorType, std::move(t));
}
PyObject* wrap_parameter(Tensor t) noexcept { return new_object(&ParameterType, std::move(t)); }

const Tensor* operand(PyObject* o, Tensor& storage) {
  if (is_tensor(o)) return &tensor_of(o);
  if (PyFloat_Check(o)) {
    storage = ops::number(PyFloat_AS_DOUBLE(o));
  } else if (PyBool_Check(o)) {
    storage = full_int({}, o == Py_True, DType::Bool);
  } else if (PyLong_Check(o)) {
    const long long value = PyLong_AsLongLong(o);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      fail(ErrorKind::Value, "an integer does not fit into 64 bits");
    }
    storage = full_int({}, value, DType::Int64);
  } else {
    return nullptr;
  }
  storage->weak = true;
  return &storage;
}

void set_error() noexcept {
  try {
    throw;
  } catch (const Error& e) {
    PyErr_SetString(error_classes[static_cast<int>(e.kind)], e.what());
  } catch (nb::python_error& e) {
    e.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
}

bool dims_from(PyObject* o, Dims& dims) {
  dims.resize(0);
  auto put = [&](PyObject* item) {
    const long long value = PyLong_Check(item) ? PyLong_AsLongLong(item) : PyNumber_AsSsize_t(item, PyExc_OverflowError);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    dims.push_back(value);
    return true;
  };
  if (PyLong_Check(o)) return put(o);
  if (PyTuple_Check(o) || PyList_Check(o)) {
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
    if (n > kMaxDims) return false;
    for (Py_ssize_t i = 0; i < n; ++i)
      if (!put(PySequence_Fast_GET_ITEM(o, i))) return false;
    return true;
  }
  return PyIndex_Check(o) && !is_tensor(o) && put(o);
}

PyObject* to_list(const Tensor& t) { return list_of(t, 0, t.data<char>()); }

std::string repr(const Tensor& t) {
  constexpr int64_t kPrinted = 1000;
  std::string out = "tensor(";
  if (t.numel() <= kPrinted) {
    GradMode off(false);
    const nb::object list = nb::steal(to_list(t));
    out += nb::repr(list).c_str();
  } else {
    out += "...";
  }
  if (t.numel() > kPrinted || t.numel() == 0) out += ", shape=" + to_string(t.shape());
  if (t.dtype() != DType::Float32 && t.dtype() != DType::Int64 && t.dtype() != DType::Bool)
    out += std::string(", dtype=") + name(t.dtype());
  if (t->grad_fn != nullptr) out += std::string(", grad_fn=<") + t->grad_fn->name + ">";
  else if (t.requires_grad()) out += ", requires_grad=True";
  return out + ")";
}

void bind_object(nb::module_& m) {
  number_methods.nb_bool = truth;
  number_methods.nb_float = to_float;
  number_methods.nb_int = to_int;
  number_methods.nb_index = to_index;
  sequence.sq_length = length;
  sequence.sq_item = get_row;

  TensorType.tp_name = "mainspring.tensor.Tensor";
  TensorType.tp_doc = "An array of numbers of one dtype, with its part in the tape of gradients.";
  TensorType.tp_basicsize = sizeof(PyTensor);
  TensorType.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE;
  TensorType.tp_dealloc = dealloc;
  TensorType.tp_new = no_new;
  TensorType.tp_repr = to_repr;
  TensorType.tp_hash = hash;
  TensorType.tp_richcompare = rich_compare;
  TensorType.tp_weaklistoffset = offsetof(PyTensor, weakrefs);
  TensorType.tp_as_number = &number_methods;
  TensorType.tp_as_mapping = &mapping;
  TensorType.tp_as_sequence = &sequence;
  TensorType.tp_as_buffer = &buffer;
  TensorType.tp_methods = all_methods();
  TensorType.tp_getset = all_properties();

  ParameterType.tp_name = "mainspring.tensor.Parameter";
  ParameterType.tp_doc = "Parameter(data, requires_grad=True): a tensor that a Module counts among its parameters.";
  ParameterType.tp_basicsize = sizeof(PyTensor);
  ParameterType.tp_flags = Py_TPFLAGS_DEFAULT;
  ParameterType.tp_base = &TensorType;
  ParameterType.tp_new = new_parameter;
  ParameterType.tp_hash = hash;
  ParameterType.tp_richcompare = rich_compare;
  ParameterType.tp_dealloc = dealloc;
  if (PyType_Ready(&TensorType) < 0 || PyType_Ready(&ParameterType) < 0) throw nb::python_error();
  m.attr("Tensor") = nb::handle(reinterpret_cast<PyObject*>(&TensorType));
  m.attr("Parameter") = nb::handle(reinterpret_cast<PyObject*>(&ParameterType));
}

}  // namespace mainspring::tensor::python
