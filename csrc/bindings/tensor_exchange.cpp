// Zero copy to and from NumPy, PyTorch and others: the buffer protocol and DLPack.
#include <nanobind/stl/pair.h>

#include "ops/loops.h"
#include "tensor_object.h"

using nanobind::literals::operator""_a;

namespace mainspring::tensor::python {
namespace {

// The structures of dlpack.h 1.0 (https://github.com/dmlc/dlpack), whose layout is the protocol.
struct DLDevice { int32_t type, id; };
struct DLDataType { uint8_t code, bits; uint16_t lanes; };
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;  // 1: read-only, 2: a copy
  DLTensor tensor;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6;

DLDataType dl_type(DType t) {
  const auto bits = static_cast<uint8_t>(8 * itemsize(t));
  if (t == DType::Bool) return {kBool, 8, 1};
  if (t == DType::BFloat16) return {kBFloat, 16, 1};
  if (t == DType::UInt8) return {kUInt, 8, 1};
  return {is_float(t) ? kFloat : kInt, bits, 1};
}

DType from_dl_type(DLDataType t) {
  for (int i = 0; i < kNumDTypes; ++i) {
    const DLDataType known = dl_type(static_cast<DType>(i));
    if (known.code == t.code && known.bits == t.bits && t.lanes == 1) return static_cast<DType>(i);
  }
  fail(ErrorKind::DType, "from_dlpack: no dtype of ours for DLPack's code ", static_cast<int>(t.code), " with ",
       static_cast<int>(t.bits), " bits");
}

template <class Managed>
void release_managed(void* owner) {
  const nb::gil_scoped_acquire gil;  // the producer may be Python
  auto* managed = static_cast<Managed*>(owner);
  if (managed->deleter != nullptr) managed->deleter(managed);
}

Tensor adopt(const DLTensor& t, void* owner, void (*release)(void*)) {
  if (t.device.type != kCpu) fail(ErrorKind::Value, "from_dlpack: the array lies on device type ", t.device.type, ", not on the CPU");
  if (t.ndim > kMaxDims) fail(ErrorKind::Shape, "from_dlpack: ", t.ndim, " dimensions; at most ", kMaxDims, " are supported");
  const Dims shape(t.shape, t.ndim);
  const Dims strides = t.strides != nullptr ? Dims(t.strides, t.ndim) : contiguous_strides(shape);
  return from_foreign(static_cast<char*>(t.data) + t.byte_offset, shape, strides, from_dl_type(t.dtype), owner, release);
}

Tensor from_dlpack(nb::object source) {
  nb::object capsule = source;
  if (!PyCapsule_CheckExact(source.ptr())) {
    try {
      capsule = source.attr("__dlpack__")("max_version"_a = nb::make_tuple(1, 0));
    } catch (nb::python_error& e) {
      if (!e.matches(PyExc_TypeError)) throw;
      capsule = source.attr("__dlpack__")();  // a producer older than DLPack 1.0
    }
  }
  if (auto* managed = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") ? PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned") : nullptr)) {
    if (managed->flags & 1) fail(ErrorKind::Value, "from_dlpack: the array is read-only; copy it with tensor()");
    const Tensor out = adopt(managed->tensor, managed, release_managed<DLManagedTensorVersioned>);
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    return out;
  }
  auto* managed = static_cast<DLManagedTensor*>(
      PyCapsule_IsValid(capsule.ptr(), "dltensor") ? PyCapsule_GetPointer(capsule.ptr(), "dltensor") : nullptr);
  if (managed == nullptr) fail(ErrorKind::Value, "from_dlpack: not an unused DLPack capsule");
  const Tensor out = adopt(managed->tensor, managed, release_managed<DLManagedTensor>);
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  return out;
}

// What a consumer of our memory holds: the structure, a tensor that keeps the memory, and its sizes.
template <class Managed>
struct Export {
  Managed managed = {};
  Tensor tensor;
  int64_t shape[kMaxDims], strides[kMaxDims];
};

template <class Managed>
PyObject* make_capsule(const Tensor& t, const char* name, PyCapsule_Destructor destructor, bool copied) {
  auto* e = new Export<Managed>;
  e->tensor = alias(t);
  for (int i = 0; i < t.ndim(); ++i) e->shape[i] = t.size(i), e->strides[i] = t.stride(i);
  e->managed.tensor = {t.data(), {kCpu, 0}, t.ndim(), dl_type(t.dtype()), e->shape, e->strides, 0};
  e->managed.context = e;
  e->managed.deleter = [](Managed* m) { delete static_cast<Export<Managed>*>(m->context); };
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
    e->managed.major = 1;
    e->managed.flags = copied ? 2 : 0;
  }
  return PyCapsule_New(&e->managed, name, destructor);
}

template <class Managed>
void destroy_capsule(PyObject* capsule) {
  const char* name = PyCapsule_GetName(capsule);
  if (std::string(name).starts_with("used_")) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  managed->deleter(managed);
}

nb::object to_dlpack(const Tensor& given, nb::object, std::optional<std::pair<int, int>> max_version,
                     std::optional<std::pair<int, int>> device, std::optional<bool> copy) {
  if (given.requires_grad())
    fail(ErrorKind::Autograd, "__dlpack__: ", given, " requires a gradient, which another library cannot follow; use detach()");
  if (device && (device->first != kCpu || device->second != 0))
    fail(ErrorKind::Value, "__dlpack__: the only device is (1, 0), the CPU");
  bool backwards = false;  // strides that some consumers refuse
  for (const int64_t stride : given.strides()) backwards |= stride < 0;
  if (backwards && copy && !*copy) {
    PyErr_SetString(PyExc_BufferError, "__dlpack__: a tensor with negative strides is exchanged as a copy only");
    throw nb::python_error();
  }
  const bool copied = copy.value_or(backwards);
  const Tensor t = copied ? copy_of(given) : given;
  PyObject* capsule = max_version && max_version->first >= 1
                          ? make_capsule<DLManagedTensorVersioned>(t, "dltensor_versioned", destroy_capsule<DLManagedTensorVersioned>, copied)
                          : make_capsule<DLManagedTensor>(t, "dltensor", destroy_capsule<DLManagedTensor>, copied);
  return nb::steal(capsule);
}

const char* buffer_format(DType t) {
  switch (t) {
    case DType::Bool: return "?";
    case DType::UInt8: return "B";
    case DType::Int8: return "b";
    case DType::Int16: return "h";
    case DType::Int32: return "i";
    case DType::Int64: return sizeof(long) == 8 ? "l" : "q";
    case DType::Float16: return "e";
    case DType::Float32: return "f";
    case DType::Float64: return "d";
    default: return nullptr;
  }
}

struct View {
  Tensor tensor;
  Py_ssize_t shape[kMaxDims], strides[kMaxDims];
};

void release_view(void* owner) {
  const nb::gil_scoped_acquire gil;
  auto* view = static_cast<Py_buffer*>(owner);
  PyBuffer_Release(view);
  delete view;
}

// A tensor on the memory of an object with the buffer protocol, for reading: tensor() copies it.
Tensor view_buffer(nb::handle source) {
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(source.ptr(), view.get(), PyBUF_STRIDES | PyBUF_FORMAT) < 0) throw nb::python_error();
  struct Guard {
    Py_buffer* view;
    ~Guard() {
      if (view != nullptr) PyBuffer_Release(view);
    }
  } guard{view.get()};
  const std::string format = view->format == nullptr ? "B" : view->format;
  std::optional<DType> dtype;
  for (int i = 0; i < kNumDTypes; ++i) {
    const char* known = buffer_format(static_cast<DType>(i));
    if (known != nullptr && (format == known || format == std::string("<") + known || format == std::string("=") + known))
      dtype = static_cast<DType>(i);
  }
  if (format == "q" || format == "<q" || format == "=q") dtype = DType::Int64;
  if (!dtype) fail(ErrorKind::DType, "tensor: an array of format '", format, "' has no dtype of ours; convert it first");
  if (view->ndim > kMaxDims) fail(ErrorKind::Shape, "tensor: ", view->ndim, " dimensions; at most ", kMaxDims, " are supported");
  Dims shape, strides;
  for (int i = 0; i < view->ndim; ++i) {
    if (view->strides[i] % view->itemsize != 0)
      fail(ErrorKind::Shape, "tensor: the strides of the array are no multiples of its item size; copy it first");
    shape.push_back(view->shape[i]);
    strides.push_back(view->strides[i] / view->itemsize);
  }
  guard.view = nullptr;
  Py_buffer* owner = view.release();
  return from_foreign(owner->buf, shape, strides, *dtype, owner, release_view);
}

// A tensor on the bytes of a writable buffer, such as a mapped file; nothing is copied.
Tensor from_buffer(nb::handle source, DType dtype, const Dims& shape) {
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(source.ptr(), view.get(), PyBUF_SIMPLE | PyBUF_WRITABLE) < 0) throw nb::python_error();
  int64_t numel = 1;
  bool fits = true;
  for (const int64_t size : shape) fits = fits && size >= 0 && !__builtin_mul_overflow(numel, size, &numel);
  if (!fits || numel > view->len / itemsize(dtype) || numel * itemsize(dtype) != view->len) {
    const Py_ssize_t length = view->len;
    PyBuffer_Release(view.get());
    fail(ErrorKind::Shape, "frombuffer: ", static_cast<long>(length), " bytes are not ", name(dtype), shape);
  }
  if (reinterpret_cast<uintptr_t>(view->buf) % static_cast<size_t>(itemsize(dtype)) != 0) {
    const Tensor out = empty(shape, dtype);  // the loops need aligned elements
    std::memcpy(out.data(), view->buf, static_cast<size_t>(view->len));
    PyBuffer_Release(view.get());
    return out;
  }
  Py_buffer* owner = view.release();
  return from_foreign(owner->buf, shape, contiguous_strides(shape), dtype, owner, release_view);
}

void check_numpy(const Tensor& t) {
  if (t.requires_grad()) fail(ErrorKind::Autograd, "numpy: ", t, " requires a gradient; use detach().numpy()");
  if (t.dtype() == DType::BFloat16) fail(ErrorKind::DType, "numpy: NumPy has no bfloat16; use float().numpy()");
}

}  // namespace

int get_buffer(PyObject* self, Py_buffer* out, int flags) {
  const Tensor& t = tensor_of(self);
  const char* format = buffer_format(t.dtype());
  out->obj = nullptr;
  const bool strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
  if (format == nullptr || t.requires_grad() || (!strides && !t.contiguous()) ||
      ((flags & PyBUF_C_CONTIGUOUS) == PyBUF_C_CONTIGUOUS && !t.contiguous())) {
    PyErr_SetString(PyExc_BufferError, t.requires_grad() ? "the tensor requires a gradient; use detach()"
                                       : format == nullptr ? "the buffer protocol has no bfloat16; use float()"
                                                           : "the tensor is not contiguous; use contiguous()");
    return -1;
  }
  auto* view = new View;
  view->tensor = alias(t);
  for (int i = 0; i < t.ndim(); ++i) {
    view->shape[i] = t.size(i);
    view->strides[i] = t.stride(i) * itemsize(t.dtype());
  }
  *out = {};
  out->buf = t.data();
  out->obj = Py_NewRef(self);
  out->len = t.numel() * itemsize(t.dtype());
  out->itemsize = itemsize(t.dtype());
  out->ndim = t.ndim();
  out->format = (flags & PyBUF_FORMAT) ? const_cast<char*>(format) : nullptr;
  out->shape = (flags & PyBUF_ND) ? view->shape : nullptr;
  out->strides = strides ? view->strides : nullptr;
  out->internal = view;
  return 0;
}

void release_buffer(PyObject*, Py_buffer* view) { delete static_cast<View*>(view->internal); }

void bind_exchange(nb::module_& m) {
  m.def("from_dlpack", &from_dlpack, "x"_a, "A tensor on the memory of an array of another library; nothing is copied.");
  m.def("from_numpy", &from_dlpack, "array"_a, "A tensor on the memory of a NumPy array; nothing is copied.");
  m.def("frombuffer", &from_buffer, "buffer"_a, "dtype"_a, "shape"_a,
        "A tensor on the memory of a writable buffer of exactly that many bytes; copied only where it is misaligned.");
  m.def("bit_view", [](const Tensor& x, DType dtype) {
    if (itemsize(dtype) != itemsize(x.dtype())) fail(ErrorKind::DType, "bit_view: ", x, " and ", name(dtype), " differ in size");
    Tensor out = alias(x);
    out->dtype = dtype;
    return out;
  }, "input"_a, "dtype"_a, "The same memory read as another dtype of the same size; off the tape.");
  m.def("_view_buffer", &view_buffer, "source"_a);

  auto method = [&](const char* name, nb::object function) {  // into a static type: through its own dictionary
    nb::object bound = nb::steal(PyInstanceMethod_New(function.ptr()));
    if (PyDict_SetItemString(TensorType.tp_dict, name, bound.ptr()) < 0) throw nb::python_error();
    PyType_Modified(&TensorType);
  };
  method("__dlpack__", nb::cpp_function(&to_dlpack, "self"_a, nb::kw_only(), "stream"_a = nb::none(),
                                        "max_version"_a = nb::none(), "dl_device"_a = nb::none(), "copy"_a = nb::none()));
  method("__dlpack_device__", nb::cpp_function([](const Tensor&) { return nb::make_tuple(kCpu, 0); }));
  method("__array_namespace__", nb::cpp_function([](const Tensor&, nb::object) {
    return nb::module_::import_("mainspring.tensor.array_api");
  }, "self"_a, nb::kw_only(), "api_version"_a = nb::none()));
  method("to_device", nb::cpp_function([](nb::handle self, const std::string& device, nb::object) {
    if (device != "cpu") fail(ErrorKind::Value, "to_device: '", device, "' is not cpu, the only device");
    return nb::borrow(self);
  }, "self"_a, "device"_a, nb::kw_only(), "stream"_a = nb::none()));
  method("numpy", nb::cpp_function([](nb::handle self) {
    check_numpy(tensor_of(self.ptr()));
    return nb::module_::import_("numpy").attr("asarray")(self);
  }));
  method("__array__", nb::cpp_function([](nb::handle self, nb::object dtype, nb::object copy) {
    check_numpy(tensor_of(self.ptr()));
    const nb::object view = nb::steal(PyMemoryView_FromObject(self.ptr()));
    return nb::module_::import_("numpy").attr("array")(view, "dtype"_a = dtype, "copy"_a = copy);
  }, "self"_a, "dtype"_a = nb::none(), "copy"_a = nb::none()));
}

}  // namespace mainspring::tensor::python
