// Plain eager calls on the CPU at once: checks, kernel, running statistics and the node of the graph in one call from
// Python, and a backward without any. It uses LibTorch's ordinary C++ API, which is stable within a minor version of
// torch: there is one library for each of these. It leaves to src/batchnorm/ops/autograd.py every call that it does not
// take.
#include "python.h"  // first, as Python asks

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/jit/frontend/tracer.h>
#if __has_include(<torch/csrc/autograd/node.h>)
#include <torch/csrc/autograd/node.h>
#else
#include <torch/csrc/autograd/function.h>
#define BATCHNORM_SHARED_NODES  // before torch 2.13
#endif

#include <cmath>

#include "../torch/operators.h"

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::PackedArgs;
using Stable = torch::stable::Tensor;
using OptionalStable = std::optional<Stable>;

const batchnorm::Operators* operators = nullptr;

// ---------------------------------------------------------------------------------------------- tensors
Stable lend(const at::Tensor& t) { return Stable(torch::aot_inductor::new_tensor_handle(at::Tensor(t))); }
OptionalStable lend_if(const at::Tensor& t) { return t.defined() ? OptionalStable(lend(t)) : std::nullopt; }
at::Tensor take(const Stable& t) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get()); }
std::optional<at::Tensor> maybe(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

// Of no subclass, wrapper or transform, with its memory on this machine and no tangent.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet known({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return !t.defined() || (known.has_all(t.key_set()) && !torch::autograd::isFwGradDefined(t));
}

// Whether anything looks on that must see each operator.
bool is_watched() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
         torch::jit::tracer::isTracing();
}

// ---------------------------------------------------------------------------------------------- backward
struct Settings {
  double eps, slope;
  int64_t activation, pool_size;  // 0: all samples are one pool
  bool population;
};

constexpr bool is_piecewise_linear(int64_t activation) { return activation >= 1 && activation <= 3; }

// What the backward reads; statistics and signs are made in the forward, so nobody else can change them.
struct Saved {
  at::Tensor x, weight, bias, residual, mean, var, signs;
};

using Wanted = std::vector<bool>;  // of x, weight, bias and residual

variable_list gradients(const at::Tensor& dy, const Saved& s, const Settings& settings, const Wanted& wanted) {
  variable_list results(4);
  const bool passes_through = settings.activation == 0;  // then the residual's gradient is dy itself
  const bool want_residual = wanted[3] && !passes_through;
  if (wanted[3] && passes_through) results[3] = dy;
  if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy) || !is_plain(s.x) || !is_plain(s.weight) ||
      !is_plain(s.bias) || !is_plain(s.residual)) {
    static const auto differentiable = c10::Dispatcher::singleton().findSchemaOrThrow("batchnorm::gradients", "");
    torch::jit::Stack stack{dy,
                            s.x,
                            maybe(s.weight),
                            maybe(s.bias),
                            maybe(s.residual),
                            maybe(s.signs),
                            s.mean,
                            s.var,
                            settings.pool_size,
                            settings.eps,
                            settings.activation,
                            settings.slope,
                            settings.population,
                            c10::List<bool>({wanted[0], wanted[1], wanted[2], want_residual})};
    differentiable.callBoxed(stack);
    for (size_t i = 0; i < 3; ++i)
      if (wanted[i]) results[i] = stack[i].toTensor();
    if (want_residual) results[3] = stack[3].toTensor();
    return results;
  }
  const auto [dx, d_residual, d_weight, d_bias] = operators->backward({.dy = lend(dy),
                                                                       .x = lend(s.x),
                                                                       .weight = lend_if(s.weight),
                                                                       .bias = lend_if(s.bias),
                                                                       .residual = lend_if(s.residual),
                                                                       .signs = lend_if(s.signs),
                                                                       .mean = lend(s.mean),
                                                                       .var = lend(s.var),
                                                                       .pool_size = settings.pool_size,
                                                                       .eps = settings.eps,
                                                                       .activation = settings.activation,
                                                                       .slope = settings.slope,
                                                                       .population = settings.population,
                                                                       .want_x = wanted[0],
                                                                       .want_residual = want_residual,
                                                                       .mask = std::nullopt});
  if (wanted[0]) results[0] = take(dx);
  if (wanted[1]) results[1] = take(d_weight);
  if (wanted[2]) results[2] = take(d_bias);
  if (want_residual) results[3] = take(d_residual);
  return results;
}

struct BatchNormBackward : Node {
  Settings settings{};
  SavedVariable x, weight, bias, residual;
  at::Tensor mean, var, signs;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of x, in whose order the signs lie

  std::string name() const override { return "BatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* each : {&x, &weight, &bias, &residual}) each->reset_data();
  }

  variable_list apply(variable_list&& dy) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return dy[0].defined() ? gradients(dy[0], saved(), settings, wanted()) : variable_list(4);
  }

  Saved saved() const {
    Saved s{x.unpack(), weight.unpack(), bias.unpack(), residual.unpack(), mean, var, signs};
    // Hooks on saved tensors may have changed its order.
    if (signs.defined() && s.x.suggest_memory_format() != format) s.x = s.x.contiguous(format);
    return s;
  }

  Wanted wanted() const {
    Wanted wanted(4);
    for (size_t i = 0; i < 4; ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  // For compiled autograd, which calls `packed_gradients` with saved tensors of its own, outside the compiled graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* each : {&x, &weight, &bias, &residual}) args.collect(*each, false);
    for (const at::Tensor* each : {&mean, &var, &signs}) args.collect(*each);
    for (double each : {settings.eps, settings.slope}) args.collect(each);
    for (int64_t each : {settings.activation, settings.pool_size}) args.collect(each);
    args.collect(settings.population);
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable* each : {&x, &weight, &bias, &residual}) swap.before(*each);
    for (at::Tensor* each : {&mean, &var, &signs}) swap.before(*each);
    PackedArgs packed;
    packed.pack(variable_list{x.unpack(), weight.unpack(), bias.unpack(), residual.unpack(), mean, var, signs});
    packed.pack(settings.eps);
    packed.pack(settings.slope);
    packed.pack(settings.activation);
    packed.pack(settings.pool_size);
    packed.pack(settings.population);
    packed.pack(wanted());
    auto args = std::move(packed).vec();
    std::vector<at::TypePtr> schema;
    for (const c10::IValue& each : args)
      schema.push_back(each.isTensor() ? at::TypePtr(at::TensorType::get()) : each.type<>());
    auto metadata =
        torch::dynamo::autograd::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges()));
    const auto& python = torch::dynamo::autograd::getPyCompilerInterface();
    const auto function =
        python->bind_function(swap.get_py_compiler(), name(), packed_gradients, schema, /*is_custom_function=*/true,
                              /*is_traceable=*/false);
    auto results = python->call_function(swap.get_py_compiler(), "apply_functional", function, dy, args, metadata);
    for (SavedVariable* each : {&x, &weight, &bias, &residual}) swap.after(*each);
    for (at::Tensor* each : {&mean, &var, &signs}) swap.after(*each);
    return results;
  }

  static variable_list packed_gradients(const variable_list& dy, const std::vector<c10::IValue>& args) {
    PackedArgs packed(args);
    const auto t = packed.unpack<variable_list>();
    Settings settings{};
    settings.eps = packed.unpack<double>();
    settings.slope = packed.unpack<double>();
    settings.activation = packed.unpack<int64_t>();
    settings.pool_size = packed.unpack<int64_t>();
    settings.population = packed.unpack<bool>();
    if (!dy[0].defined()) return variable_list(4);
    return gradients(dy[0], {t[0], t[1], t[2], t[3], t[4], t[5], t[6]}, settings, packed.unpack<Wanted>());
  }
};

auto make_node() {
#ifdef BATCHNORM_SHARED_NODES
  return std::shared_ptr<BatchNormBackward>(new BatchNormBackward, torch::autograd::deleteNode);
#else
  return c10::make_intrusive<BatchNormBackward>();
#endif
}

// ---------------------------------------------------------------------------------------------- forward
struct Arguments {
  at::Tensor x, residual, weight, bias, running_mean, running_var, batches, carry;
  std::optional<double> momentum;
  Settings settings{};
  bool use_batch = false, update = false;

  int64_t values() const { return x.numel() / x.size(1); }

  // Whether all is as the kernels take it; what is not gets its error, or its detour, in Python.
  bool fit() const {
    if (!x.defined() || x.dim() < 2 || x.dim() > 16 || x.numel() == 0) return false;
    const auto dtype = x.scalar_type();
    if (dtype != at::kFloat && dtype != at::kDouble && !at::isReducedFloatingType(dtype)) return false;
    for (const at::Tensor* each : {&weight, &bias, &running_mean, &running_var})
      if (each->defined() && !fits(*each)) return false;
    if (residual.defined() && (residual.sizes() != x.sizes() || residual.scalar_type() != dtype)) return false;
    if (batches.defined() && (batches.scalar_type() != at::kLong || batches.numel() != 1)) return false;
    if (running_mean.defined() != running_var.defined() || !std::isfinite(settings.eps)) return false;
    if (update && carry.defined() && !fits_carry()) return false;
    if (!use_batch) return !update && settings.eps >= 0 && running_mean.defined();
    const bool has_share = momentum ? std::isfinite(*momentum) : batches.defined();
    return settings.eps > 0 && values() > 1 && (!update || has_share);
  }

  // One that does not fit is made anew, in Python.
  bool fits_carry() const {
    const auto beside = running_mean.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return carry.scalar_type() == beside && carry.dim() == 2 && carry.size(0) == 2 && carry.numel() == 2 * x.size(1) &&
           carry.is_contiguous();
  }

  bool fits(const at::Tensor& vector) const {
    const auto dtype = x.scalar_type();
    return vector.dim() == 1 && vector.numel() == x.size(1) && vector.is_contiguous() &&
           (vector.scalar_type() == dtype || (vector.scalar_type() == at::kFloat && at::isReducedFloatingType(dtype)));
  }
};

at::Tensor forward(const Arguments& a) {
  RECORD_FUNCTION("batchnorm::batch_norm", c10::ArrayRef<const c10::IValue>());
  const Settings& settings = a.settings;
  const bool needs_graph = torch::autograd::compute_requires_grad(a.x, a.weight, a.bias, a.residual);
  const bool saves_signs = needs_graph && a.residual.defined() && is_piecewise_linear(settings.activation);
  at::Tensor y, mean, var, signs;
  {
    at::NoGradGuard no_grad;
    if (a.use_batch) {
      const auto result = operators->forward({.x = lend(a.x),
                                              .weight = lend_if(a.weight),
                                              .bias = lend_if(a.bias),
                                              .residual = lend_if(a.residual),
                                              .pool_size = settings.pool_size,
                                              .eps = settings.eps,
                                              .activation = settings.activation,
                                              .slope = settings.slope,
                                              .save_signs = saves_signs,
                                              .mask = std::nullopt});
      y = take(std::get<0>(result));
      mean = take(std::get<1>(result));
      var = take(std::get<2>(result));
      if (saves_signs) signs = take(std::get<3>(result));
    } else {
      const auto result = operators->normalize({.x = lend(a.x),
                                                .mean = lend(a.running_mean),
                                                .var = lend(a.running_var),
                                                .weight = lend_if(a.weight),
                                                .bias = lend_if(a.bias),
                                                .residual = lend_if(a.residual),
                                                .pool_size = 0,
                                                .eps = settings.eps,
                                                .activation = settings.activation,
                                                .slope = settings.slope,
                                                .save_signs = saves_signs,
                                                .mask = std::nullopt});
      y = take(std::get<0>(result));
      if (saves_signs) signs = take(std::get<1>(result));
      if (needs_graph) {  // running statistics may move on before the backward
        mean = a.running_mean.clone();
        var = a.running_var.clone();
      }
    }
  }
  if (needs_graph) {
    auto node = make_node();
    node->set_next_edges(torch::autograd::collect_next_edges(a.x, a.weight, a.bias, a.residual));
    node->settings = settings;
    node->x = SavedVariable(a.x, false);
    node->weight = SavedVariable(a.weight, false);
    node->bias = SavedVariable(a.bias, false);
    // One bit an element is enough for it where the activation is piecewise linear.
    if (!saves_signs && settings.activation != 0) node->residual = SavedVariable(a.residual, false);
    node->mean = mean;
    node->var = var;
    node->signs = signs;
    if (saves_signs) node->format = a.x.suggest_memory_format();
    torch::autograd::set_history(y, node);
  }
  if (a.update) {
    const int64_t pool = settings.pool_size * (a.values() / a.x.size(0));
    operators->update_statistics({.running_mean = lend_if(a.running_mean),
                                  .running_var = lend_if(a.running_var),
                                  .num_batches_tracked = lend_if(a.batches),
                                  .mean = lend(mean),
                                  .var = lend(var),
                                  .count = a.values(),
                                  .pool_count = pool ? pool : a.values(),
                                  .momentum = a.momentum,
                                  .unbiased = true,
                                  .carry = lend_if(a.carry)});
  }
  return y;
}

// ---------------------------------------------------------------------------------------------- Python
// Reads a plain tensor, or None; false for anything else.
bool read(PyObject* given, at::Tensor& t) {
  if (given == Py_None) return true;
  if (!python::is_exact_tensor(given)) return false;
  t = python::tensor(given);
  return is_plain(t);
}

bool read(PyObject* given, double& value) {
  value = PyFloat_AsDouble(given);
  if (value != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool read(PyObject* given, int64_t& value) {
  value = PyLong_AsLongLong(given);
  if (value != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// The arguments of `call`, in the order in which ops/autograd.py gives them.
enum Given {
  kX,
  kResidual,
  kWeight,
  kBias,
  kRunningMean,
  kRunningVar,
  kNumBatchesTracked,
  kCarry,
  kMomentum,
  kEps,
  kActivation,
  kSlope,
  kUseBatch,
  kUpdate,
  kPoolSize,
  kCount
};

PyObject* call_plain(PyObject* const* given, Py_ssize_t count) {
  Arguments a;
  double momentum = 0;
  TORCH_CHECK(count == kCount, "batchnorm: expected ", int(kCount), " arguments, got ", count);
  if (is_watched()) Py_RETURN_NONE;
  if (!read(given[kX], a.x) || !read(given[kResidual], a.residual) || !read(given[kWeight], a.weight) ||
      !read(given[kBias], a.bias) || !read(given[kRunningMean], a.running_mean) ||
      !read(given[kRunningVar], a.running_var) || !read(given[kNumBatchesTracked], a.batches) ||
      !read(given[kCarry], a.carry))
    Py_RETURN_NONE;
  if (given[kMomentum] != Py_None) {
    if (!read(given[kMomentum], momentum)) Py_RETURN_NONE;
    a.momentum = momentum;
  }
  if (!read(given[kEps], a.settings.eps) || !read(given[kActivation], a.settings.activation) ||
      !read(given[kSlope], a.settings.slope))
    Py_RETURN_NONE;
  a.use_batch = given[kUseBatch] == Py_True;
  a.update = given[kUpdate] == Py_True;
  a.settings.population = !a.use_batch;
  if (a.use_batch && !read(given[kPoolSize], a.settings.pool_size)) Py_RETURN_NONE;
  if (!a.fit()) Py_RETURN_NONE;
  at::Tensor y;
  {
    python::OthersMayRun released;
    y = forward(a);
  }
  return THPVariable_Wrap(std::move(y));
}

// y, or None, having done nothing, where this is no plain eager call.
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  try {
    return call_plain(given, count);
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// attach(address of the operators of the other library, a tensor, its _cdata): whether tensors of this torch and Python
// lie as this library reads them; if not, `call` must not be used.
PyObject* attach(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3 || !python::is_exact_tensor(given[1])) Py_RETURN_FALSE;
  const void* const expected = PyLong_AsVoidPtr(given[2]);
  operators = static_cast<const batchnorm::Operators*>(PyLong_AsVoidPtr(given[0]));
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(python::address(given[1]) == expected);
}

template <typename Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {{"attach", method(attach), METH_FASTCALL, nullptr},
                         {"call", method(call), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__autograd() {
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "torch_version", BATCHNORM_TORCH_VERSION) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
