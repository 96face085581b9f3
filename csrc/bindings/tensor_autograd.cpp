// backward, grad, hooks, grad modes.
#include "autograd/engine.h"

#include "tensor_object.h"

using nanobind::literals::operator""_a;

namespace mainspring::tensor::python {
namespace {

PyObject* get_grad(PyObject* o, void*) { return wrap(Tensor::borrow(tensor_of(o)->grad)); }
int set_grad(PyObject* o, PyObject* value, void*) {
  try {
    const Tensor& t = tensor_of(o);
    Tensor grad;
    if (value != nullptr && value != Py_None) {
      if (!is_tensor(value)) fail(ErrorKind::DType, "grad: must be a tensor or None");
      grad = tensor_of(value);
      if (!grad.same_shape(t)) fail(ErrorKind::Shape, "grad: ", grad, " does not fit ", t);
    }
    TensorImpl* old = std::exchange(t->grad, grad.release());
    if (old != nullptr) old->drop();
    return 0;
  } catch (...) {
    set_error();
    return -1;
  }
}
PyObject* get_requires_grad(PyObject* o, void*) { return PyBool_FromLong(tensor_of(o).requires_grad()); }
int put_requires_grad(PyObject* o, PyObject* value, void*) {
  try {
    if (value == nullptr || !PyBool_Check(value)) fail(ErrorKind::DType, "requires_grad: must be a bool");
    set_requires_grad(tensor_of(o), value == Py_True);
    return 0;
  } catch (...) {
    set_error();
    return -1;
  }
}
PyObject* get_is_leaf(PyObject* o, void*) { return PyBool_FromLong(tensor_of(o).is_leaf()); }
PyObject* get_grad_fn(PyObject* o, void*) {
  const Tensor& t = tensor_of(o);
  if (t.is_leaf()) Py_RETURN_NONE;
  return PyUnicode_FromString(t->grad_fn->name);
}

// A Python callable that may be let go on a thread without the interpreter lock.
std::shared_ptr<PyObject> shared_callable(nb::object f) {
  return {f.release().ptr(), [](PyObject* p) {
            const nb::gil_scoped_acquire gil;
            Py_DECREF(p);
          }};
}

// An op whose backward is a Python function: grad -> one gradient (or None) for each input.
struct PythonOp {
  static constexpr auto name = "custom";
  struct Saved {
    std::shared_ptr<PyObject> backward;
    size_t inputs = 0;
  };
  static void backward(const Saved& saved, const Tensor& g, Grads& grads) {
    const nb::object result = nb::handle(saved.backward.get())(g);
    const nb::object sequence = nb::steal(PySequence_Tuple(result.ptr()));
    if (!sequence.is_valid()) throw nb::python_error();
    if (nb::len(sequence) != saved.inputs)
      fail(ErrorKind::Autograd, "record: the backward function gave ", nb::len(sequence), " gradients for ", saved.inputs, " inputs");
    for (size_t i = 0; i < saved.inputs; ++i) {
      PyObject* item = PyTuple_GET_ITEM(sequence.ptr(), static_cast<Py_ssize_t>(i));
      if (item == Py_None) continue;
      if (!is_tensor(item)) fail(ErrorKind::DType, "record: a gradient must be a tensor or None");
      grads[static_cast<int>(i)] = tensor_of(item);
    }
  }
};

struct HookHandle {
  Tensor tensor;
  int64_t id;
  void remove() {
    if (tensor) remove_hook(tensor, id);
    tensor = Tensor();
  }
};

void method(const char* name, nb::object function) {
  nb::object bound = nb::steal(PyInstanceMethod_New(function.ptr()));
  if (PyDict_SetItemString(TensorType.tp_dict, name, bound.ptr()) < 0) throw nb::python_error();
  PyType_Modified(&TensorType);
}

}  // namespace

PyGetSetDef autograd_properties[] = {
    {"grad", get_grad, set_grad, "The gradient of a leaf, or None.", nullptr},
    {"requires_grad", get_requires_grad, put_requires_grad, "Whether the tape follows this tensor.", nullptr},
    {"is_leaf", get_is_leaf, nullptr, "Whether no recorded op made this tensor.", nullptr},
    {"grad_fn", get_grad_fn, nullptr, "The name of the recorded op that made this tensor, or None.", nullptr},
    {},
};

void bind_autograd(nb::module_& m) {
  m.def("is_grad_enabled", &grad_enabled);
  m.def("_set_grad_enabled", &set_grad_enabled, "enabled"_a);

  m.def("record", [](const Tensor& output, const std::vector<Tensor>& inputs, nb::object function) {
    bool wanted = false;
    for (const Tensor& t : inputs) wanted |= t.requires_grad();
    Tensor out = alias(output);
    if (wanted && grad_enabled()) record_list<PythonOp>(out, {shared_callable(std::move(function)), inputs.size()}, inputs);
    return out;
  }, "output"_a, "inputs"_a, "backward"_a,
     "output as the result of an op on inputs: backward(grad) gives the gradient, or None, of each. output itself must "
     "not be on the tape, and backward must not hold it (a cycle); hold output.detach() if its values are needed.");

  nb::class_<HookHandle>(m, "RemovableHandle").def("remove", &HookHandle::remove, "Takes the hook off its tensor.");

  method("backward", nb::cpp_function([](const Tensor& self, std::optional<Tensor> gradient, bool retain_graph, bool create_graph) {
    backward(self, gradient.value_or(Tensor()), {retain_graph, create_graph});
  }, "self"_a, "gradient"_a = nb::none(), "retain_graph"_a = false, "create_graph"_a = false,
     "Adds the gradients of this tensor to .grad of the leaves it was computed from."));
  method("requires_grad_", nb::cpp_function([](nb::handle self, bool requires_grad) {
    set_requires_grad(tensor_of(self.ptr()), requires_grad);
    return nb::borrow(self);
  }, "self"_a, "requires_grad"_a = true));
  method("retain_grad", nb::cpp_function([](const Tensor& self) { retain_grad(self); }));
  method("register_hook", nb::cpp_function([](const Tensor& self, nb::object hook) {
    const auto callable = shared_callable(std::move(hook));
    const int64_t id = add_hook(self, [callable](const Tensor& grad) -> Tensor {
      const nb::object result = nb::handle(callable.get())(grad);
      if (result.is_none()) return Tensor();
      if (!is_tensor(result.ptr())) fail(ErrorKind::DType, "a gradient hook must return a tensor or None");
      return tensor_of(result.ptr());
    });
    return HookHandle{self, id};
  }, "self"_a, "hook"_a, "hook(grad) sees the gradient of this tensor in every backward pass and may return another."));

  m.def("grad", [](const Tensor& output, const std::vector<Tensor>& inputs, std::optional<Tensor> grad_output, bool retain_graph,
                   bool create_graph, bool allow_unused) {
    std::vector<Tensor> out = gradients(output, grad_output.value_or(Tensor()), inputs, {retain_graph, create_graph});
    nb::list list;
    for (size_t i = 0; i < out.size(); ++i) {
      if (!out[i] && !allow_unused)
        fail(ErrorKind::Autograd, "grad: the output does not depend on input ", i, " (", inputs[i], "); pass allow_unused=True for None");
      list.append(nb::steal(wrap(std::move(out[i]))));
    }
    return nb::tuple(list);
  }, "output"_a, "inputs"_a, "grad_output"_a = nb::none(), nb::kw_only(), "retain_graph"_a = false, "create_graph"_a = false,
     "allow_unused"_a = false, "The gradients of sum(output * grad_output) by the inputs; .grad is left alone.");
}

}  // namespace mainspring::tensor::python
