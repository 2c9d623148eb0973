// What the short call needs of Python and of torch's Python library: Python's stable ABI, and three names of torch's,
// declared here because torch's own headers for them include pybind11, which is bound to one version of Python.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <ATen/core/Tensor.h>
#include <Python.h>

#include <exception>
#include <type_traits>

#if defined(_WIN32)
#define BATCHNORM_OF_TORCH __declspec(dllimport)
#else
#define BATCHNORM_OF_TORCH __attribute__((visibility("default")))
#endif

BATCHNORM_OF_TORCH extern PyObject* THPVariableClass;
BATCHNORM_OF_TORCH extern PyObject* ParameterClass;
BATCHNORM_OF_TORCH PyObject* THPVariable_Wrap(at::TensorBase&& tensor);

namespace torch {
BATCHNORM_OF_TORCH void translate_exception_to_python(const std::exception_ptr& exception);
}

namespace python {

// The start of torch's THPVariable. The library checks it on a tensor before its first use (`attach`).
struct Variable {
  PyObject_HEAD at::Tensor value;
};

// A tensor, or a parameter: a subclass may mean something else.
inline bool is_exact_tensor(PyObject* object) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

inline const at::Tensor& tensor(PyObject* object) { return reinterpret_cast<Variable*>(object)->value; }

// What lies where `tensor` reads its pointer, as it is: nothing there is taken for a tensor.
inline const void* address(PyObject* object) {
  static_assert(sizeof(at::Tensor) == sizeof(void*));
  return *reinterpret_cast<void**>(reinterpret_cast<char*>(object) + sizeof(PyObject));
}

// Lets other Python threads run while it lives.
class OthersMayRun {
 public:
  OthersMayRun() : state_(PyEval_SaveThread()) {}
  ~OthersMayRun() { PyEval_RestoreThread(state_); }
  OthersMayRun(const OthersMayRun&) = delete;
  OthersMayRun& operator=(const OthersMayRun&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace python
