// Every op of the table as a function and a method, and Python's operators.
#include "ops/table.h"
#include "tensor_arguments.h"

namespace mainspring::tensor::python {
namespace {

enum class Kind { Function, Method, MethodOnly };

template <class Op>
struct Binding {
  using F = Forward<decltype(&Op::forward)>;
  static inline Signature signature;
  static PyObject* function(PyObject*, PyObject* const* args, Py_ssize_t n, PyObject* keywords) {
    return F::call(signature, &Op::forward, nullptr, args, n, keywords);
  }
  static PyObject* method(PyObject* self, PyObject* const* args, Py_ssize_t n, PyObject* keywords) {
    return F::call(signature, &Op::forward, self, args, n, keywords);
  }
};

// A row of the table as data.
struct Row {
  const char* name;
  const char* arguments;
  const char* kind;
  Signature* signature;
  int count;
  bool to_list;
  void (*describe)(std::vector<std::string>& types, int& dims);
};

// (name, kind, ((argument, type, default or None), ...), gives a tuple)
nb::object describe_op(const Row& row) {
  Signature& s = *row.signature;
  s.open_dims = -1;
  parse_signature(s, row.name, row.arguments);
  if (s.count != row.count)
    throw std::logic_error(std::string(row.name) + ": the table names other arguments than forward() has");
  std::vector<std::string> types;
  int dims = -1;
  row.describe(types, dims);
  if (dims >= 0 && s.defaults[dims] == nullptr) s.open_dims = dims;
  nb::list described;
  for (int i = 0; i < s.count; ++i) {
    const bool required = s.defaults[i] == nullptr;
    const std::string type = required && i == s.open_dims ? "int | Sequence[int]" : types[static_cast<size_t>(i)];
    described.append(nb::make_tuple(nb::borrow(s.names[i]), type,
                                    required ? nb::none() : nb::object(nb::repr(nb::handle(s.defaults[i])))));
  }
  return nb::make_tuple(row.name, row.kind, nb::tuple(described), row.to_list);
}

template <class Op>
PyObject* binary(PyObject* a, PyObject* b) {
  return guarded([&]() -> PyObject* {
    Tensor sa, sb;
    const Tensor* x = operand(a, sa);
    const Tensor* y = x == nullptr ? nullptr : operand(b, sb);
    if (y == nullptr) return Py_NewRef(Py_NotImplemented);
    return wrap(Op::forward(*x, *y));
  });
}
template <class Op>
PyObject* unary(PyObject* a) {
  return guarded([&] { return wrap(Op::forward(tensor_of(a))); });
}
PyObject* power(PyObject* a, PyObject* b, PyObject* modulus) {
  if (modulus != Py_None) return Py_NewRef(Py_NotImplemented);
  return binary<ops::Pow>(a, b);
}
PyObject* identity(PyObject* a) { return Py_NewRef(a); }
PyObject* invert(PyObject* a) {
  return guarded([&] {
    const Tensor& x = tensor_of(a);
    if (is_float(x.dtype())) fail(ErrorKind::DType, "~: needs a bool or integer tensor, not ", x);
    return wrap(ops::BitwiseNot::forward(x));
  });
}

PyNumberMethods make_number_methods() {
  PyNumberMethods n = {};
  n.nb_add = binary<ops::Add>;
  n.nb_subtract = binary<ops::Sub>;
  n.nb_multiply = binary<ops::Mul>;
  n.nb_true_divide = binary<ops::Div>;
  n.nb_floor_divide = binary<ops::FloorDivide>;
  n.nb_remainder = binary<ops::Remainder>;
  n.nb_lshift = binary<ops::ShiftLeft>;
  n.nb_rshift = binary<ops::ShiftRight>;
  n.nb_power = power;
  n.nb_matrix_multiply = binary<ops::Matmul>;
  n.nb_and = binary<ops::BitwiseAnd>;
  n.nb_or = binary<ops::BitwiseOr>;
  n.nb_xor = binary<ops::BitwiseXor>;
  n.nb_negative = unary<ops::Neg>;
  n.nb_positive = identity;
  n.nb_absolute = unary<ops::Abs>;
  n.nb_invert = invert;
  n.nb_inplace_add = binary<ops::AddInPlace>;
  n.nb_inplace_subtract = binary<ops::SubInPlace>;
  n.nb_inplace_multiply = binary<ops::MulInPlace>;
  n.nb_inplace_true_divide = binary<ops::DivInPlace>;
  return n;
}

PyCFunction fast(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

}  // namespace

PyNumberMethods number_methods = make_number_methods();

PyObject* rich_compare(PyObject* a, PyObject* b, int op) {
  switch (op) {
    case Py_EQ: return binary<ops::Eq>(a, b);
    case Py_NE: return binary<ops::Ne>(a, b);
    case Py_LT: return binary<ops::Lt>(a, b);
    case Py_LE: return binary<ops::Le>(a, b);
    case Py_GT: return binary<ops::Gt>(a, b);
    default: return binary<ops::Ge>(a, b);
  }
}

namespace {

constexpr int kFast = METH_FASTCALL | METH_KEYWORDS;
#define DEFINE_METHOD(name, op, arguments, kind) \
  Kind::kind == Kind::Function ? PyMethodDef{} : PyMethodDef{#name, fast(Binding<ops::op>::method), kFast, "(" arguments ")"},
#define DEFINE_FUNCTION(name, op, arguments, kind) \
  Kind::kind == Kind::MethodOnly ? PyMethodDef{} : PyMethodDef{#name, fast(Binding<ops::op>::function), kFast, "(" arguments ")"},
PyMethodDef methods_with_gaps[] = {MAINSPRING_TENSOR_OPS(DEFINE_METHOD)};
PyMethodDef functions_with_gaps[] = {MAINSPRING_TENSOR_OPS(DEFINE_FUNCTION)};

}  // namespace

PyMethodDef op_methods[sizeof methods_with_gaps / sizeof methods_with_gaps[0] + 1];
PyMethodDef op_functions[sizeof functions_with_gaps / sizeof functions_with_gaps[0] + 1];

void prepare_op_tables() {
  int count = 0;
  for (const PyMethodDef& m : methods_with_gaps)
    if (m.ml_name != nullptr) op_methods[count++] = m;
  op_methods[count] = {};
  count = 0;
  for (const PyMethodDef& m : functions_with_gaps)
    if (m.ml_name != nullptr) op_functions[count++] = m;
  op_functions[count] = {};
}

void bind_ops(nb::module_& m) {
#define ROW(name, op, arguments, kind) \
  {#name, arguments, #kind, &Binding<ops::op>::signature, Binding<ops::op>::F::count, Binding<ops::op>::F::to_list, \
   &Binding<ops::op>::F::describe},
  static constexpr Row rows[] = {MAINSPRING_TENSOR_OPS(ROW)};
  nb::list table;
  for (const Row& row : rows) table.append(describe_op(row));
  m.attr("OPS") = nb::tuple(table);
  if (PyModule_AddFunctions(m.ptr(), op_functions) < 0) throw nb::python_error();
}

void parse_signature(Signature& s, const char* op, const char* text) {
  s.op = op;
  s.count = 0;
  const std::string all(text);
  for (size_t at = 0; at < all.size();) {
    size_t end = all.find(", ", at);
    if (end == std::string::npos) end = all.size();
    const std::string one = all.substr(at, end - at);
    at = end + 2;
    const size_t equals = one.find('=');
    s.names[s.count] = PyUnicode_InternFromString(one.substr(0, equals).c_str());
    s.defaults[s.count] = nullptr;
    if (equals != std::string::npos) {
      // A literal of our own table; importing `ast` for it would double the time of `import mainspring.tensor`.
      const nb::dict empty;
      const nb::object literal = nb::steal(PyRun_String(one.substr(equals + 1).c_str(), Py_eval_input, empty.ptr(), empty.ptr()));
      if (!literal.is_valid()) throw nb::python_error();
      s.defaults[s.count] = literal.inc_ref().ptr();
    }
    ++s.count;
  }
}

void bind_arguments(const Signature& s, PyObject* self, PyObject* const* args, Py_ssize_t n, PyObject* keywords,
                    PyObject** slots, nb::object& keep) {
  const Py_ssize_t given = n + (self != nullptr);
  auto positional = [&](Py_ssize_t i) { return self == nullptr ? args[i] : i == 0 ? self : args[i - 1]; };
  Py_ssize_t used = given;
  if (s.open_dims >= 0 && given > s.open_dims && PyLong_Check(positional(s.open_dims))) {
    keep = nb::steal(PyTuple_New(given - s.open_dims));
    for (Py_ssize_t i = s.open_dims; i < given; ++i)
      PyTuple_SET_ITEM(keep.ptr(), i - s.open_dims, Py_NewRef(positional(i)));
    used = s.open_dims + 1;
  } else if (s.open_dims >= 0 && given == s.open_dims && keywords == nullptr) {
    keep = nb::steal(PyTuple_New(0));  // x.permute(), x.reshape()
    used = given + 1;
  }
  if (used > s.count) {
    PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments, %zd were given", s.op, s.count, used);
    throw nb::python_error();
  }
  for (int i = 0; i < s.count; ++i)
    slots[i] = i >= used ? nullptr : i == s.open_dims && keep.is_valid() ? keep.ptr() : positional(i);
  const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* keyword = PyTuple_GET_ITEM(keywords, k);
    int i = 0;
    while (i < s.count && s.names[i] != keyword && PyUnicode_Compare(s.names[i], keyword) != 0) ++i;
    if (i == s.count || slots[i] != nullptr) {
      PyErr_Format(PyExc_TypeError, i == s.count ? "%s() has no argument '%U'" : "%s() got '%U' twice", s.op, keyword);
      throw nb::python_error();
    }
    slots[i] = args[n + k];
  }
  for (int i = 0; i < s.count; ++i) {
    if (slots[i] == nullptr) slots[i] = s.defaults[i];
    if (slots[i] == nullptr) {
      PyErr_Format(PyExc_TypeError, "%s() needs the argument '%U'", s.op, s.names[i]);
      throw nb::python_error();
    }
  }
}

void wrong_type(const Signature& s, int i, const char* wanted, PyObject* got) {
  PyErr_Clear();
  PyErr_Format(error_classes[static_cast<int>(ErrorKind::DType)], "%s: `%U` must be %s, not %s", s.op, s.names[i], wanted,
               Py_TYPE(got)->tp_name);
  throw nb::python_error();
}

}  // namespace mainspring::tensor::python
