#include "direct_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace driftar::python {

namespace {

using at::Tensor;
using c10::IValue;
using std::optional;
namespace py = pybind11;

// A value of one argument, or nothing where Python's is not plainly of the argument's type.
using Convert = optional<IValue> (*)(PyObject*);

optional<IValue> tensor(PyObject* x) {
  if (!THPVariable_CheckExact(x)) return {};
  const Tensor& value = THPVariable_Unpack(x);
  if (!value.is_cpu() || value._fw_grad(/*level=*/0).defined()) return {};
  return value;
}

optional<IValue> number(PyObject* x) {
  double value = 0;
  if (PyFloat_Check(x)) {
    value = PyFloat_AS_DOUBLE(x);
  } else if (PyLong_CheckExact(x)) {
    value = PyLong_AsDouble(x);
    if (PyErr_Occurred()) return PyErr_Clear(), optional<IValue>();
  } else {
    return {};
  }
  return std::isfinite(value) ? optional<IValue>(value) : std::nullopt;
}

optional<IValue> numbers(PyObject* x) {
  if (!PyTuple_Check(x) && !PyList_Check(x)) return {};
  c10::List<double> values;
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(x)) {
    const optional<IValue> value = number(item.ptr());
    if (!value) return {};
    values.push_back(value->toDouble());
  }
  return values;
}

optional<IValue> integer(PyObject* x) {
  if (!PyLong_CheckExact(x)) return {};
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(x, &overflow);
  return overflow == 0 ? optional<IValue>(value) : std::nullopt;
}

optional<IValue> boolean(PyObject* x) {
  return PyBool_Check(x) ? optional<IValue>(x == Py_True) : std::nullopt;
}

optional<IValue> text(PyObject* x) {
  if (!PyUnicode_Check(x)) return {};
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(x, &size);
  if (data == nullptr) return PyErr_Clear(), optional<IValue>();
  return std::string(data, size);
}

template <Convert convert>
optional<IValue> or_none(PyObject* x) {
  return x == Py_None ? optional<IValue>(IValue()) : convert(x);
}

Convert conversion(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::TensorType:
      return tensor;
    case c10::TypeKind::FloatType:
      return number;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      return integer;
    case c10::TypeKind::BoolType:
      return boolean;
    case c10::TypeKind::StringType:
      return text;
    default:
      break;
  }
  if (type.isSubtypeOf(*c10::OptionalType::ofTensor())) return or_none<tensor>;
  TORCH_CHECK(type.isSubtypeOf(*c10::ListType::ofFloats()), "direct_call: no conversion to ",
              type.str());
  return numbers;
}

// Whether somebody else wants to see calls of operators.
bool is_watched() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet watchers(
      {DispatchKey::Python, DispatchKey::FuncTorchDynamicLayerFrontMode});
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers) ||
         at::impl::torch_function_mode_enabled() || at::autocast::is_autocast_enabled(at::kCPU);
}

class Operator {
 public:
  Operator(const std::string& name, py::object result)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")),
        writes_(handle_.schema().is_mutable()),
        result_(std::move(result)),
        results_(result_.is_none() ? handle_.schema().returns().size()
                                   : py::len(result_.attr("_fields"))) {
    for (const c10::Argument& argument : handle_.schema().arguments()) {
      conversions_.push_back(conversion(*argument.type()));
    }
    TORCH_CHECK(0 < results_ && results_ <= handle_.schema().returns().size(),
                "direct_call: ", name, " does not return ", results_, " results");
  }

  PyObject* call(PyObject* const* arguments, size_t count) const {
    if (count != conversions_.size() || is_watched()) Py_RETURN_NONE;
    torch::jit::Stack stack;
    stack.reserve(count);
    bool differentiates = false;
    for (size_t i = 0; i < count; ++i) {
      optional<IValue> value = conversions_[i](arguments[i]);
      if (!value) Py_RETURN_NONE;
      differentiates |= value->isTensor() && value->toTensor().requires_grad();
      stack.push_back(*std::move(value));
    }
    try {
      run(stack, differentiates);
    } catch (const c10::ValueError&) {
      Py_RETURN_NONE;
    } catch (const c10::TypeError&) {
      Py_RETURN_NONE;
    }
    const auto wrapped = [&](size_t i) {
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(stack[i].toTensor()));
    };
    if (stack.size() == 1) return wrapped(0).release().ptr();
    py::tuple results(results_);
    for (size_t i = 0; i < results_; ++i) results[i] = wrapped(i);
    if (result_.is_none()) return results.release().ptr();
    // tuple.__new__(result, results): that of named tuples is a Python function
    const py::tuple arguments_of_new = py::make_tuple(std::move(results));
    auto* type = reinterpret_cast<PyTypeObject*>(result_.ptr());
    return PyTuple_Type.tp_new(type, arguments_of_new.ptr(), nullptr);
  }

 private:
  void run(torch::jit::Stack& stack, bool differentiates) const {
    const py::gil_scoped_release others_run;
    if (writes_ || (differentiates && at::GradMode::is_enabled())) {
      handle_.callBoxed(&stack);
    } else {
      const at::AutoDispatchBelowAutograd guard;
      handle_.callBoxed(&stack);
    }
  }

  c10::OperatorHandle handle_;
  bool writes_;
  py::object result_;  // type
  size_t results_;
  std::vector<Convert> conversions_;
};

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto* op = static_cast<const Operator*>(PyCapsule_GetPointer(self, nullptr));
  return op->call(arguments, count);
  END_HANDLE_TH_ERRORS
}

PyMethodDef method = {"direct_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)),
                      METH_FASTCALL, nullptr};

}  // namespace

py::object direct_call(const std::string& name, const py::object& result) {
  auto op = std::make_unique<Operator>("driftar::" + name, result);
  const py::capsule self(op.get(), [](void* p) { delete static_cast<Operator*>(p); });
  op.release();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace driftar::python
