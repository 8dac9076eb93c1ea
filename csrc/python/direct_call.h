#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace driftar::python {

// The operator driftar::<name> as a Python function of its positional arguments. It returns what
// the operator returns, as `result`, a type of named tuples, if that is not None: of its first
// results as many as there are names. It returns None, having done nothing, where the call is not
// for it:
//
//   - a tensor is of a subclass, is not on the CPU or carries a forward derivative,
//   - another argument is not plainly of its type, or a number is not finite,
//   - modes, function transforms or autocast want to see the call,
//   - the operator refuses its arguments, which Python explains better.
//
// torch.ops takes such calls, and costs more than the smallest of them computes: its Python code
// and data are out of the caches by the time the next call comes, where an operator reads much.
pybind11::object direct_call(const std::string& name, const pybind11::object& result);

}  // namespace driftar::python
