// mainspring.tensor._tensor: the extension module. Its typed face is mainspring.tensor.
#include "core/blocking.h"
#include "tensor_object.h"

namespace mainspring::tensor::python {

void prepare_op_tables();

namespace {

// The errors of mainspring.tensor: each is a MainspringError and the built-in error that a caller would expect.
void bind_errors(nb::module_& m) {
  const nb::object root = nb::module_::import_("mainspring.errors").attr("MainspringError");
  auto make = [&](const char* name, const char* doc, const nb::object& bases) {
    const std::string full = std::string("mainspring.tensor.") + name;
    const nb::object type = nb::steal(PyErr_NewExceptionWithDoc(full.c_str(), doc, bases.ptr(), nullptr));
    if (!type.is_valid()) throw nb::python_error();
    m.attr(name) = type;
    return type;
  };
  const nb::object base = make("TensorError", "Base of the errors of mainspring.tensor.", nb::make_tuple(root));
  auto kind = [&](ErrorKind k, const char* name, const char* doc, PyObject* builtin) {
    error_classes[static_cast<int>(k)] = make(name, doc, nb::make_tuple(base, nb::handle(builtin))).release().ptr();
  };
  kind(ErrorKind::Shape, "ShapeError", "Shapes that do not fit together.", PyExc_ValueError);
  kind(ErrorKind::DType, "DTypeError", "An argument of the wrong type or dtype.", PyExc_TypeError);
  kind(ErrorKind::Index, "IndexOutOfRangeError", "A dimension or index that does not exist.", PyExc_IndexError);
  kind(ErrorKind::Value, "ValueOutOfRangeError", "A value outside its range.", PyExc_ValueError);
  kind(ErrorKind::Autograd, "AutogradError", "A gradient that cannot be computed.", PyExc_RuntimeError);
  kind(ErrorKind::Communication, "CommunicationError", "Ranks that do not reach or do not understand each other.", PyExc_RuntimeError);
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Error& e) {
      PyErr_SetString(error_classes[static_cast<int>(e.kind)], e.what());
    }
  });
}

}  // namespace
}  // namespace mainspring::tensor::python

NB_MODULE(_tensor, m) {
  using namespace mainspring::tensor;
  m.doc() = "The C++ tensor framework; use it through mainspring.tensor.";
  nanobind::set_leak_warnings(false);  // dtypes and defaults live as long as the process
  blocking_hooks.leave = [] {
    return PyGILState_Check() ? static_cast<void*>(PyEval_SaveThread()) : nullptr;
  };
  blocking_hooks.enter = [](void* state) { PyEval_RestoreThread(static_cast<PyThreadState*>(state)); };
  python::prepare_op_tables();
  python::bind_errors(m);
  python::bind_object(m);
  python::bind_core(m);
  python::bind_exchange(m);
  python::bind_autograd(m);
  python::bind_ops(m);
  python::bind_optim(m);
  python::bind_parallel(m);
}
