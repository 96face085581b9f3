// From Python's arguments to those of an op, as fast as CPython's vector calls allow: names and defaults come
// from the table of ops, types from the signature of the op's forward().
#pragma once

#include <array>

#include "tensor_object.h"

namespace mainspring::tensor::python {

constexpr int kMaxArguments = 8;

struct Signature {
  const char* op = nullptr;
  int count = 0;
  int open_dims = -1;  // an argument of Dims that takes the remaining positions: reshape(x, 2, 3)
  PyObject* names[kMaxArguments] = {};
  PyObject* defaults[kMaxArguments] = {};  // null: required

  const char* name(int i) const { return PyUnicode_AsUTF8(names[i]); }
};

void parse_signature(Signature& s, const char* op, const char* text);

// Fills slots with borrowed references; `keep` holds a tuple made of open dimensions.
void bind_arguments(const Signature& s, PyObject* self, PyObject* const* args, Py_ssize_t n, PyObject* keywords,
                    PyObject** slots, nb::object& keep);

[[noreturn]] void wrong_type(const Signature& s, int i, const char* wanted, PyObject* got);

// What an argument of type T is read from; converts to what forward() takes.
template <class T> struct Argument;

template <> struct Argument<Tensor> {
  static constexpr const char* type = "Tensor | float";
  Tensor storage;
  const Tensor* value;
  Argument(const Signature& s, int i, PyObject* o) : value(operand(o, storage)) {
    if (value == nullptr) wrong_type(s, i, "a tensor or a number", o);
  }
  operator const Tensor&() const { return *value; }
};
template <> struct Argument<Dims> {
  static constexpr const char* type = "int | Sequence[int] | None";
  Dims value;
  Argument(const Signature& s, int i, PyObject* o) {
    if (o != Py_None && !dims_from(o, value)) wrong_type(s, i, "an int or a sequence of at most 8 ints", o);
  }
  operator const Dims&() const { return value; }
};
template <> struct Argument<int64_t> {
  static constexpr const char* type = "int";
  int64_t value;
  Argument(const Signature& s, int i, PyObject* o) : value(PyLong_Check(o) ? PyLong_AsLongLong(o) : -1) {
    if (!PyLong_Check(o) || (value == -1 && PyErr_Occurred())) wrong_type(s, i, "a 64-bit int", o);
  }
  operator int64_t() const { return value; }
};
template <> struct Argument<double> {
  static constexpr const char* type = "float";
  double value;
  Argument(const Signature& s, int i, PyObject* o) : value(PyFloat_Check(o) || PyLong_Check(o) ? PyFloat_AsDouble(o) : 0) {
    if (!(PyFloat_Check(o) || PyLong_Check(o)) || PyErr_Occurred()) wrong_type(s, i, "a number", o);
  }
  operator double() const { return value; }
};
template <> struct Argument<bool> {
  static constexpr const char* type = "bool";
  bool value;
  Argument(const Signature& s, int i, PyObject* o) : value(o == Py_True) {
    if (!PyBool_Check(o)) wrong_type(s, i, "a bool", o);
  }
  operator bool() const { return value; }
};
template <> struct Argument<DType> {
  static constexpr const char* type = "dtype";
  DType value;
  Argument(const Signature& s, int i, PyObject* o) {
    if (!dtype_from(o, value)) wrong_type(s, i, "a dtype such as mainspring.tensor.float32", o);
  }
  operator DType() const { return value; }
};
template <> struct Argument<std::string> {
  static constexpr const char* type = "str";
  std::string value;
  Argument(const Signature& s, int i, PyObject* o) {
    const char* text = PyUnicode_Check(o) ? PyUnicode_AsUTF8(o) : nullptr;
    if (text == nullptr) wrong_type(s, i, "a string", o);
    value = text;
  }
  operator const std::string&() const { return value; }
};
template <> struct Argument<std::vector<Tensor>> {
  static constexpr const char* type = "Sequence[Tensor]";
  std::vector<Tensor> value;
  Argument(const Signature& s, int i, PyObject* o) {
    if (!PyTuple_Check(o) && !PyList_Check(o)) wrong_type(s, i, "a list or tuple of tensors", o);
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(o); ++j) {
      PyObject* item = PySequence_Fast_GET_ITEM(o, j);
      if (!is_tensor(item)) wrong_type(s, i, "a list or tuple of tensors", item);
      value.push_back(tensor_of(item));
    }
  }
  operator const std::vector<Tensor>&() const { return value; }
};
template <class T> struct Argument<std::optional<T>> {
  std::optional<T> value;
  Argument(const Signature& s, int i, PyObject* o) {
    if (o != Py_None) value.emplace(static_cast<T>(Argument<T>(s, i, o)));
  }
  operator const std::optional<T>&() const { return value; }
};

inline PyObject* to_python(Tensor&& t) { return wrap(std::move(t)); }
inline PyObject* to_python(std::vector<Tensor>&& list) {
  PyObject* out = PyTuple_New(static_cast<Py_ssize_t>(list.size()));
  for (size_t i = 0; out != nullptr && i < list.size(); ++i) {
    PyObject* item = wrap(std::move(list[i]));
    if (item == nullptr) Py_CLEAR(out);
    else PyTuple_SET_ITEM(out, static_cast<Py_ssize_t>(i), item);
  }
  return out;
}

// Calls forward() with Python's arguments. One instance serves all ops of the same C++ type: with one for each op
// this file would take three times as long to compile.
template <class F> struct Forward;
template <class R, class... A> struct Forward<R (*)(A...)> {
  using Function = R (*)(A...);
  static constexpr int count = sizeof...(A);
  static constexpr bool to_list = std::is_same_v<R, std::vector<Tensor>>;

  __attribute__((noinline)) static PyObject* call(const Signature& s, Function forward, PyObject* self, PyObject* const* args,
                                                  Py_ssize_t n, PyObject* keywords) noexcept {
    return guarded([&] { return call_indexed(s, forward, self, args, n, keywords, std::make_index_sequence<sizeof...(A)>()); });
  }
  // The arguments' types as the stub has them, and which one may be given as open positions (-1: none).
  static void describe(std::vector<std::string>& types, int& dims) {
    types = {TypeName<std::decay_t<A>>::text()...};
    int i = 0;
    dims = -1;
    ((std::is_same_v<std::decay_t<A>, Dims> ? (void)(dims = i) : (void)0, ++i), ...);
  }

 private:
  template <size_t... I>
  static PyObject* call_indexed(const Signature& s, Function forward, PyObject* self, PyObject* const* args, Py_ssize_t n,
                                PyObject* keywords, std::index_sequence<I...>) {
    PyObject* slots[sizeof...(A)];
    nb::object keep;
    if (self == nullptr && keywords == nullptr && n == count && s.open_dims < 0) {
      ((slots[I] = args[I]), ...);
    } else {
      bind_arguments(s, self, args, n, keywords, slots, keep);
    }
    return to_python(forward(Argument<std::decay_t<A>>(s, static_cast<int>(I), slots[I])...));
  }

  template <class T> struct TypeName { static std::string text() { return Argument<T>::type; } };
  template <class T> struct TypeName<std::optional<T>> {
    static std::string text() { return std::is_same_v<T, Tensor> ? "Tensor | None" : std::string(Argument<T>::type) + " | None"; }
  };
};

}  // namespace mainspring::tensor::python
