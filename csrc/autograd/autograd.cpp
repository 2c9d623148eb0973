// Plain eager calls on the CPU at once: checks, kernel, running statistics and the node of the graph in one call from
// Python, and a backward without any. It uses LibTorch's ordinary C++ API, which is stable within a minor version of
// torch: there is one library for each of these. It leaves to src/batchnorm/ops/autograd.py every call that it does not
// take.
#include "python.h"  // first, as Python asks

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/generated/Functions.h>
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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <typeinfo>

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
std::vector<Stable> lend_all(const std::vector<at::Tensor>& tensors) {
  std::vector<Stable> lent;
  for (const at::Tensor& each : tensors) lent.push_back(lend(each));
  return lent;
}
at::Tensor take(const Stable& t) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get()); }
// Without the dispatcher, which takes longer than to fill a small vector.
at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::Tensor(at::detail::empty_cpu(sizes, dtype));
}
std::optional<at::Tensor> maybe(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

// Of no subclass, wrapper or transform, with its memory on this machine and no tangent.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet known({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return !t.defined() || (known.has_all(t.key_set()) && !torch::autograd::isFwGradDefined(t));
}

// Whether a call on this thread has made an output that is to be made again without a context.
thread_local bool remakes = false;

// Of `recompute_outputs`: how many contexts this thread is in; whether some outputs there are known to Python alone.
thread_local int64_t recomputing = 0;
thread_local bool is_known_to_python = false;
thread_local size_t largest = 0;  // bytes of an input of a batch normalization so far, in the outermost context

// Whether operators are recorded, transformed or run by others.
bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing();
}

// Whether anything looks on that must see each operator.
bool is_watched() { return is_transformed() || at::impl::torch_function_mode_enabled(); }

// ---------------------------------------------------------------------------------------------- backward
struct Settings {
  double eps, slope;
  int64_t activation, pool_size;  // 0: all samples are one pool
  int64_t groups;                 // of adjacent channels that share statistics; 0: each channel is alone
  bool population;
};

// For compiled autograd: into what it compares, into packed arguments, and out of these.
void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const Settings& s) {
  for (double each : {s.eps, s.slope}) args.collect(each);
  for (int64_t each : {s.activation, s.pool_size, s.groups}) args.collect(each);
  args.collect(s.population);
}
void pack(PackedArgs& packed, const Settings& s) {
  for (double each : {s.eps, s.slope}) packed.pack(each);
  for (int64_t each : {s.activation, s.pool_size, s.groups}) packed.pack(each);
  packed.pack(s.population);
}
Settings unpack_settings(PackedArgs& packed) {
  Settings s{};
  for (double* each : {&s.eps, &s.slope}) *each = packed.unpack<double>();
  for (int64_t* each : {&s.activation, &s.pool_size, &s.groups}) *each = packed.unpack<int64_t>();
  s.population = packed.unpack<bool>();
  return s;
}

constexpr bool is_piecewise_linear(int64_t activation) { return activation >= 1 && activation <= 3; }

// gamma and beta.
struct Affine {
  at::Tensor weight, bias;
};

// What the backward reads; statistics, signs and factors are made in the forward, so nobody else can change them.
// Factors are r and d of renormalization, (2, C).
struct Saved {
  at::Tensor x, weight, bias, residual, mask, mean, var, signs, factors;
  Affine made{};  // of gamma and beta by the factors
};

using Wanted = std::vector<bool>;  // of x, weight, bias and residual

// Whether nobody else can see a tensor's memory, so that a result may take its place: no other tensor, no Python
// object, no view, and nobody outside torch, who might have lent it (NumPy, a file, another process). This is the rule
// by which torch itself writes into gradients, and the last part is stricter.
// A tensor that Python has seen is never alone, because its Python object counts.
bool is_alone(const at::Tensor& t) {
  return t.use_count() == 1 && t.has_storage() && t.storage().use_count() == 1 && !t.requires_grad() &&
         t.storage().data_ptr().get_deleter() == c10::GetAllocator(c10::kCPU)->raw_deleter();
}

std::atomic<int64_t> in_place{0};  // gradients that took the place of another

// A vector (C) of any floating-point dtype in float64; of nothing, nothing.
std::vector<double> doubles_of(const at::Tensor& t) {
  if (!t.defined()) return {};
  const at::Tensor dense = t.contiguous();
  const auto read = [&](const auto* values) { return std::vector<double>(values, values + dense.numel()); };
  switch (dense.scalar_type()) {
    case at::kFloat: return read(dense.const_data_ptr<float>());
    case at::kDouble: return read(dense.const_data_ptr<double>());
    case at::kBFloat16: return read(dense.const_data_ptr<c10::BFloat16>());
    default: return read(dense.const_data_ptr<c10::Half>());
  }
}

at::Tensor vector_of(const std::vector<double>& values, at::ScalarType dtype) {
  at::Tensor t = fresh({int64_t(values.size())}, dtype);
  const auto write = [&](auto* to) {
    std::transform(values.begin(), values.end(), to,
                   [](double value) { return static_cast<std::remove_pointer_t<decltype(to)>>(value); });
  };
  switch (dtype) {
    case at::kFloat: write(t.mutable_data_ptr<float>()); break;
    case at::kDouble: write(t.mutable_data_ptr<double>()); break;
    case at::kBFloat16: write(t.mutable_data_ptr<c10::BFloat16>()); break;
    default: write(t.mutable_data_ptr<c10::Half>());
  }
  return t;
}

// What renormalization makes of gamma and beta: gamma r and gamma d + beta, with which plain batch normalization is
// renormalization. In float32 at least, since 16 bits have too few digits for a product.
Affine renormalized(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& factors, at::ScalarType of_x) {
  const int64_t channels = factors.size(1);
  const double *const r = factors.const_data_ptr<double>(), *const d = r + channels;
  const std::vector<double> gamma = doubles_of(weight), beta = doubles_of(bias);
  std::vector<double> scale(r, r + channels), shift(d, d + channels);
  for (size_t c = 0; c < gamma.size(); ++c) {
    scale[c] = gamma[c] * r[c];
    shift[c] = gamma[c] * d[c];
  }
  for (size_t c = 0; c < beta.size(); ++c) shift[c] += beta[c];
  auto dtype = weight.defined() ? weight.scalar_type() : of_x;
  if (at::isReducedFloatingType(dtype)) dtype = at::kFloat;
  return {vector_of(scale, dtype), vector_of(shift, dtype)};
}

// The gradient of gamma from those of gamma r and gamma d + beta.
at::Tensor through_factors(const at::Tensor& of_scale, const at::Tensor& of_shift, const at::Tensor& factors,
                           at::ScalarType dtype) {
  const double *const r = factors.const_data_ptr<double>(), *const d = r + factors.size(1);
  std::vector<double> sum = doubles_of(of_scale);
  const std::vector<double> shift = doubles_of(of_shift);
  for (size_t c = 0; c < sum.size(); ++c) sum[c] = sum[c] * r[c] + shift[c] * d[c];
  return vector_of(sum, dtype);
}

// By differentiable operations, in Python.
variable_list differentiable_gradients(const at::Tensor& dy, const Saved& s, const Settings& settings,
                                       const Wanted& wanted) {
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
                          c10::List<bool>({wanted[0], wanted[1], wanted[2], wanted[3]}),
                          maybe(s.mask),
                          settings.groups,
                          maybe(s.factors)};
  differentiable.callBoxed(stack);
  variable_list results(4);
  for (size_t i = 0; i < 4; ++i)
    if (wanted[i]) results[i] = stack[i].toTensor();
  return results;
}

// Sums over the channels of each group; the bits are those of torch's sum.
at::Tensor over_groups(const at::Tensor& values, int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  return values.view({-1, groups, values.size(-1) / groups}).sum(2);
}

// Where channels share statistics their sums are merged between the two passes.
variable_list gradients_of_groups(const at::Tensor& dy, const Saved& s, const Settings& settings,
                                  const Wanted& wanted) {
  variable_list results(4);
  const auto [sum, centered] = operators->backward_reduce({.dy = lend(dy),
                                                           .x = lend(s.x),
                                                           .weight = lend_if(s.weight),
                                                           .bias = lend_if(s.bias),
                                                           .residual = lend_if(s.residual),
                                                           .signs = lend_if(s.signs),
                                                           .mean = lend(s.mean),
                                                           .var = lend(s.var),
                                                           .pool_size = 0,
                                                           .eps = settings.eps,
                                                           .activation = settings.activation,
                                                           .slope = settings.slope,
                                                           .mask = std::nullopt});
  const at::Tensor sum_dz = take(sum), sum_dz_centered = take(centered);
  const int64_t channels = s.mean.numel();
  const double count = double(s.x.numel() / settings.groups);
  const std::vector<double> gamma = doubles_of(s.weight);
  const double *const dz = sum_dz.const_data_ptr<double>(), *const dz_centered =
                                                                sum_dz_centered.const_data_ptr<double>();
  const double* const var = s.var.const_data_ptr<double>();
  at::Tensor scaled = fresh({2, channels});
  const at::Tensor k1 = fresh({1, channels}), k2 = fresh({1, channels}), k3 = fresh({1, channels});
  std::vector<double> d_gamma(size_t(channels), 0.0), inv_std(size_t(channels), 0.0);
  double* const to = scaled.mutable_data_ptr<double>();
  for (int64_t c = 0; c < channels; ++c) {
    const size_t i = size_t(c);
    const double factor = gamma.empty() ? 1.0 : gamma[i];
    inv_std[i] = 1 / std::sqrt(var[c] + settings.eps);
    d_gamma[i] = dz_centered[c] * inv_std[i];
    to[c] = factor * dz[c];
    to[channels + c] = factor * dz_centered[c];
    k1.mutable_data_ptr<double>()[c] = factor * inv_std[i];
  }
  const at::Tensor merged = over_groups(scaled, settings.groups);
  const double *const all = merged.const_data_ptr<double>(), *const all_centered = all + settings.groups;
  for (int64_t c = 0, size = channels / settings.groups; c < channels; ++c) {
    const double inverse = inv_std[size_t(c)];
    k2.mutable_data_ptr<double>()[c] = -(inverse * inverse * inverse) * all_centered[c / size] / count;
    k3.mutable_data_ptr<double>()[c] = -inverse * all[c / size] / count;
  }
  if (wanted[0] || wanted[3]) {
    const auto [dx, d_residual] = operators->backward_apply({.dy = lend(dy),
                                                             .x = lend(s.x),
                                                             .weight = lend_if(s.weight),
                                                             .bias = lend_if(s.bias),
                                                             .residual = lend_if(s.residual),
                                                             .signs = lend_if(s.signs),
                                                             .mean = lend(s.mean),
                                                             .var = lend(s.var),
                                                             .k1 = lend(k1),
                                                             .k2 = lend(k2),
                                                             .k3 = lend(k3),
                                                             .pool_size = 0,
                                                             .eps = settings.eps,
                                                             .activation = settings.activation,
                                                             .slope = settings.slope,
                                                             .want_residual = wanted[3],
                                                             .mask = std::nullopt});
    if (wanted[0]) results[0] = take(dx);
    if (wanted[3]) results[3] = take(d_residual);
  }
  if (wanted[1]) results[1] = vector_of(d_gamma, s.weight.scalar_type());
  if (wanted[2]) results[2] = vector_of(doubles_of(sum_dz), s.bias.scalar_type());
  return results;
}

// By the kernels.
variable_list kernel_gradients(const at::Tensor& dy, const Saved& s, const Settings& settings, const Wanted& wanted,
                               bool over_dy) {
  variable_list results(4);
  Affine affine{s.weight, s.bias};
  if (s.factors.defined())
    affine = s.made.weight.defined() ? s.made : renormalized(s.weight, s.bias, s.factors, s.x.scalar_type());
  const auto [dx, d_residual, d_weight, d_bias] = operators->backward({.dy = lend(dy),
                                                                       .x = lend(s.x),
                                                                       .weight = lend_if(affine.weight),
                                                                       .bias = lend_if(affine.bias),
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
                                                                       .want_residual = wanted[3],
                                                                       .mask = lend_if(s.mask)},
                                                                      over_dy, wanted[1] || wanted[2]);
  if (wanted[0]) results[0] = take(dx);
  if (wanted[1]) results[1] = take(d_weight);
  if (wanted[2]) results[2] = take(d_bias);
  if (wanted[3]) results[3] = take(d_residual);
  if (!s.factors.defined()) return results;
  if (wanted[1]) results[1] = through_factors(take(d_weight), take(d_bias), s.factors, s.weight.scalar_type());
  if (wanted[2]) results[2] = results[2].to(s.bias.scalar_type());
  return results;
}

variable_list gradients(at::Tensor&& dy, const Saved& s, const Settings& settings, Wanted wanted) {
  // Then the residual's gradient is dy itself.
  const bool passes_through = wanted[3] && settings.activation == 0 && !s.mask.defined();
  if (passes_through) wanted[3] = false;
  variable_list results;
  if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy) || !is_plain(s.x) || !is_plain(s.weight) ||
      !is_plain(s.bias) || !is_plain(s.residual)) {
    results = differentiable_gradients(dy, s, settings, wanted);
    if (passes_through) results[3] = dy;
    return results;
  }
  const at::Tensor held = passes_through ? dy : at::Tensor();
  results = settings.groups ? gradients_of_groups(dy, s, settings, wanted)
                            : kernel_gradients(dy, s, settings, wanted, is_alone(dy));
  if (passes_through) results[3] = held;
  if (results[0].is_same(dy) || (results[3].is_same(dy) && !passes_through)) ++in_place;
  return results;
}

#include "outputs.h"  // of this namespace

// ---------------------------------------------------------------------------------------------- outputs made again
// An operand of the forward that the backward will read once more, if nobody has changed it.
class Operand {
 public:
  Operand() = default;
  explicit Operand(const at::Tensor& t) : tensor_(t.defined() ? t.detach() : t), version_(version_of(t)) {}
  const at::Tensor& tensor() const { return tensor_; }
  bool is_unchanged() const { return version_of(tensor_) == version_; }

 private:
  static int64_t version_of(const at::Tensor& t) { return t.defined() && !t.is_inference() ? t._version() : 0; }
  at::Tensor tensor_;
  int64_t version_ = 0;
};

// A copy of a parameter, for what is made again: others may change it, or give its memory back (sharded parameters),
// before the backward, which torch does not mind where the output is kept.
Operand copy_of(const at::Tensor& t) {
  const at::NoGradGuard no_grad;
  return Operand(t.defined() ? t.clone() : t);
}

struct ConvolutionSource;

// What an output was made of: `normalize` gives its bits once more. The input and the residual are tensors, or are made
// again themselves.
struct Source {
  Operand x, weight, bias, residual;
  std::shared_ptr<const ConvolutionSource> of_x;
  std::shared_ptr<const Source> of_residual;
  at::Tensor mask, mean, var;
  Settings settings{};
  int64_t depth = 0;  // normalizations that are needed before this one

  virtual ~Source() = default;
  virtual bool is_unchanged() const;
  virtual at::Tensor make() const;
  bool needs_convolution() const { return of_x || (of_residual && of_residual->needs_convolution()); }
};

// What the output of a convolution was made of, which a batch normalization alone reads: torch's convolution gives its
// bits once more. The input is a tensor that the convolution keeps for itself, or the output of a batch normalization.
struct ConvolutionSource {
  Operand input, weight, bias;
  std::shared_ptr<const Source> of_input;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;
  bool is_small = false;  // beside the largest output of the forward, so that holding it moves no peak

  bool is_unchanged() const {
    return input.is_unchanged() && weight.is_unchanged() && bias.is_unchanged() &&
           (!of_input || of_input->is_unchanged());
  }

  at::Tensor make() const {
    if (at::Tensor held = scratch.take(this); held.defined()) return held;
    const c10::impl::ExcludeDispatchKeyGuard no_casts(c10::autocast_dispatch_keyset);
    return at::convolution(of_input ? of_input->make() : input.tensor(), weight.tensor(), maybe(bias.tensor()), stride,
                           padding, dilation, /*transposed=*/false, std::vector<int64_t>(stride.size(), 0), groups);
  }
};

bool Source::is_unchanged() const {
  return x.is_unchanged() && weight.is_unchanged() && bias.is_unchanged() && residual.is_unchanged() &&
         (!of_x || of_x->is_unchanged()) && (!of_residual || of_residual->is_unchanged());
}

at::Tensor Source::make() const {
  if (at::Tensor held = scratch.take(this); held.defined()) return held;
  const at::Tensor from = of_x ? of_x->make() : x.tensor();
  const at::Tensor added = of_residual ? of_residual->make() : residual.tensor();
  // Over what was made for it, unless that is held.
  const bool holds = of_x && of_x->is_small;
  const at::Tensor y = of_residual ? added : of_x && !holds ? from : scratch.like(from);
  if (holds) scratch.hold(of_x, from);
  operators->normalize_into({.x = lend(from),
                             .mean = lend(mean),
                             .var = lend(var),
                             .weight = lend_if(weight.tensor()),
                             .bias = lend_if(bias.tensor()),
                             .residual = lend_if(added),
                             .pool_size = settings.pool_size,
                             .eps = settings.eps,
                             .activation = settings.activation,
                             .slope = settings.slope,
                             .save_signs = false,
                             .mask = lend_if(mask),
                             .own = !settings.population},
                            lend(y));
  return y;
}

struct OfBatchNorm : Node {
  Settings settings{};
  std::shared_ptr<const Source> source;           // of the output, where it is made again
  int64_t version = 0;                            // of the output, as it was made
  bool forgets = false;                           // whether readers forget the output without a context
  bool keeps_output = false;                      // since it would take too many normalizations to make it again
  std::shared_ptr<const ConvolutionSource> of_x;  // of the input, where that is made again

  // Of the gradients of the first inputs.
  Wanted wanted(size_t count) const {
    Wanted wanted(count);
    for (size_t i = 0; i < count; ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }
};

// Leaves a node to a function of packed arguments, outside the graph of compiled autograd.
template <class Function>
variable_list call_packed(const Node& node, const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap,
                          std::vector<c10::IValue> args, Function* packed_gradients) {
  std::vector<at::TypePtr> schema;
  for (const c10::IValue& each : args)
    schema.push_back(each.isTensor() ? at::TypePtr(at::TensorType::get()) : each.type<>());
  auto metadata =
      torch::dynamo::autograd::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
          torch::dynamo::autograd::get_input_metadata(node.next_edges()));
  const auto& python = torch::dynamo::autograd::getPyCompilerInterface();
  const auto function =
      python->bind_function(swap.get_py_compiler(), node.name(), packed_gradients, schema, /*is_custom_function=*/true,
                            /*is_traceable=*/false);
  return python->call_function(swap.get_py_compiler(), "apply_functional", function, dy, args, metadata);
}

struct BatchNormBackward : OfBatchNorm {
  SavedVariable x, weight, bias, residual, mask;
  at::Tensor mean, var, signs, factors;
  Affine made;                                             // of gamma and beta by the factors
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of x, in whose order the signs lie

  std::string name() const override { return "BatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* each : {&x, &weight, &bias, &residual, &mask}) each->reset_data();
    for (at::Tensor* each : {&mean, &var, &signs, &factors}) each->reset();
    made = {};
    source.reset();
    of_x.reset();
  }

  variable_list apply(variable_list&& dy) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return dy[0].defined() ? gradients(std::move(dy[0]), saved(), settings, wanted(4)) : variable_list(4);
  }

  Saved saved() const {
    Saved s{x.unpack(), weight.unpack(), bias.unpack(), residual.unpack(), mask.unpack(), mean, var, signs, factors};
    s.made = made;
    // Hooks on saved tensors may have changed its order.
    if (signs.defined() && s.x.suggest_memory_format() != format) s.x = s.x.contiguous(format);
    return s;
  }

  // For compiled autograd, which calls `packed_gradients` with saved tensors of its own, outside the compiled graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* each : {&x, &weight, &bias, &residual, &mask}) args.collect(*each, false);
    for (const at::Tensor* each : {&mean, &var, &signs, &factors}) args.collect(*each);
    collect(args, settings);
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable* each : {&x, &weight, &bias, &residual, &mask}) swap.before(*each);
    for (at::Tensor* each : {&mean, &var, &signs, &factors}) swap.before(*each);
    PackedArgs packed;
    packed.pack(variable_list{x.unpack(), weight.unpack(), bias.unpack(), residual.unpack(), mask.unpack(), mean, var,
                              signs, factors});
    pack(packed, settings);
    packed.pack(wanted(4));
    auto results = call_packed(*this, dy, swap, std::move(packed).vec(), packed_gradients);
    for (SavedVariable* each : {&x, &weight, &bias, &residual, &mask}) swap.after(*each);
    for (at::Tensor* each : {&mean, &var, &signs, &factors}) swap.after(*each);
    return results;
  }

  static variable_list packed_gradients(const variable_list& dy, const std::vector<c10::IValue>& args) {
    PackedArgs packed(args);
    const auto t = packed.unpack<variable_list>();
    const Settings settings = unpack_settings(packed);
    if (!dy[0].defined()) return variable_list(4);
    return gradients(at::Tensor(dy[0]), {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]}, settings,
                     packed.unpack<Wanted>());
  }
};

// The node that made an output, if it is one of these and the output is as it was; a view stands for what it is a view
// of.
const OfBatchNorm* node_of(const at::Tensor& t) {
  if (!t.defined() || !t.requires_grad() || t.is_leaf()) return nullptr;
  const at::TensorBase& whole = t.is_view() ? t._base() : t;
  const auto* const node = dynamic_cast<const OfBatchNorm*>(whole.grad_fn().get());
  return node && node->version == int64_t(whole._version()) ? node : nullptr;
}

// In place of a tensor that a node has saved: makes it again when the node's backward asks for it.
template <class Of>
struct MadeAgain : torch::autograd::SavedVariableHooks {
  MadeAgain(std::shared_ptr<const Of> of, const Node& reader) : source(std::move(of)), note(reader.sequence_nr()) {}
  std::shared_ptr<const Of> source;
  const Notes::Note note;

  void call_pack_hook(const at::Tensor&) override {}
  at::Tensor call_unpack_hook() override {
    at::NoGradGuard no_grad;
    if (source->is_unchanged()) {
      const Scratch::OfLast last(note.is_last());
      return source->make();
    }
    static const auto refuse = c10::Dispatcher::singleton().findSchemaOrThrow("batchnorm::refuse", "");
    torch::jit::Stack stack{source->weight.tensor().defined() ? source->weight.tensor() : fresh({0})};
    refuse.callBoxed(stack);  // raises
    return stack[0].toTensor();
  }
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> retrieve_unpack_hook_data() const override {
    return std::nullopt;
  }
};

// Whether readers forget every output that can be made again, or those that are to be forgotten without a context.
enum class Forgets { every, marked };

// Puts a note in place of an output that a node has saved; false if it is a view of one, which stays saved.
bool forget(SavedVariable& saved, const Node& reader, Forgets which) {
  if (saved.has_hooks()) return true;
  const std::optional<at::Tensor> t = saved.get_raw_data();
  if (!t || !t->defined()) return true;
  const OfBatchNorm* const node = node_of(*t);
  if (!node || !node->source || !(node->forgets || which == Forgets::every)) return true;
  if (t->is_view()) return false;
  saved.register_hooks(std::make_unique<MadeAgain<Source>>(node->source, reader));
  return true;
}

// Lets a node forget what it reads; false if it is of no kind that is known here, or reads a view of an output.
bool forget_in(Node* node, Forgets which) {
  namespace nodes = torch::autograd::generated;
  const auto forgets = [&](auto*... saved) { return (forget(*saved, *node, which) & ...); };
  if (auto* const each = dynamic_cast<nodes::ConvolutionBackward0*>(node)) return forgets(&each->input_);
  if (auto* const each = dynamic_cast<nodes::MulBackward0*>(node)) return forgets(&each->self_, &each->other_);
  if (auto* const each = dynamic_cast<nodes::MaxPool2DWithIndicesBackward0*>(node)) return forgets(&each->self_);
  if (auto* const each = dynamic_cast<nodes::AvgPool2DBackward0*>(node)) return forgets(&each->self_);
  if (auto* const each = dynamic_cast<nodes::AddmmBackward0*>(node)) return forgets(&each->mat1_);
  return dynamic_cast<nodes::MeanBackward1*>(node) || dynamic_cast<nodes::AddBackward0*>(node) ||
         dynamic_cast<nodes::CatBackward0*>(node);  // which read shapes alone
}

// Looks for readers of outputs between an input and the batch normalizations before it. Readers of other kinds, and
// those behind the last batch normalization, keep what they read.
void forget_outputs(const at::Tensor& from) {
  constexpr size_t most = 64;
  if (!from.defined() || !from.grad_fn()) return;
  std::vector<Node*> open{from.grad_fn().get()};
  for (size_t seen = 0; !open.empty() && seen < most; ++seen) {
    Node* const node = open.back();
    open.pop_back();
    if (dynamic_cast<OfBatchNorm*>(node)) continue;
    forget_in(node, Forgets::marked);
    for (const auto& edge : node->next_edges())
      if (edge.function && open.size() < most) open.push_back(edge.function.get());
  }
}

template <class Made>
auto make_node() {
#ifdef BATCHNORM_SHARED_NODES
  return std::shared_ptr<Made>(new Made, torch::autograd::deleteNode);
#else
  return c10::make_intrusive<Made>();
#endif
}

// ---------------------------------------------------------------------------------------------- forward
// Of renormalization: the buffers of r and d, and their limits; without limits the buffers are read.
struct Renormalization {
  at::Tensor r, d;
  double r_max = 0, d_max = 0;
  bool has_limits = false;
};

struct Arguments {
  at::Tensor x, residual, weight, bias, running_mean, running_var, batches, carry;
  at::Tensor skipped;        // counts the batches that are refused because they are not finite; undefined: none are
  at::Tensor mask, lengths;  // which positions are valid, (N, *space) or what expands to it; or how many are, (N)
  int64_t frames = 0;        // of each sample, if x is frames of sequences; negative if time comes first
  Renormalization renorm;
  std::optional<double> momentum;
  Settings settings{};
  bool use_batch = false, update = false, unbiased = true;
  enum { kAsContext, kKept, kMadeAgain } output = kAsContext;

  int64_t values() const { return x.numel() / x.size(1); }
  // Of a pool, where all are valid.
  int64_t count() const { return settings.groups ? x.numel() / settings.groups : values(); }

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
    if (update && skipped.defined() && !can_refuse()) return false;
    if (!fits_together()) return false;
    if (!use_batch) return !update && settings.eps >= 0 && running_mean.defined();
    const bool has_share = momentum ? std::isfinite(*momentum) : batches.defined();
    return settings.eps > 0 && values() > 1 && (!update || has_share);
  }

  // One that does not fit is made anew, in Python.
  bool fits_carry() const {
    const auto beside = running_mean.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return carry.scalar_type() == beside && carry.dim() == 2 && carry.size(0) == 2 && carry.numel() == 2 * x.size(1);
  }

  // Of what parts the values of a channel, or adds to its statistics, one at a time.
  bool fits_together() const {
    const bool is_masked = mask.defined() || lengths.defined(), is_renormalized = renorm.r.defined();
    if (int(settings.pool_size != 0) + int(settings.groups != 0) + int(is_masked) + int(is_renormalized) > 1)
      return false;
    if (mask.defined() && (lengths.defined() || mask.scalar_type() != at::kBool)) return false;
    if (settings.groups && (settings.groups < 0 || x.size(1) % settings.groups)) return false;
    if (!is_renormalized) return true;
    for (const at::Tensor* each : {&renorm.r, &renorm.d})
      if (!each->defined() || each->dim() != 1 || each->numel() != x.size(1) || !each->is_contiguous() ||
          each->requires_grad() || (each->scalar_type() != at::kFloat && each->scalar_type() != at::kDouble))
        return false;
    return running_mean.defined();
  }

  // Whether a channel is one pool, with nothing beside it.
  bool is_alone() const {
    return !residual.defined() && !settings.pool_size && !settings.groups && !mask.defined() && !lengths.defined() &&
           !renorm.r.defined();
  }

  // Makes the mask dense, or makes it of the lengths; false where it does not fit.
  bool make_mask() {
    if (!mask.defined() && !lengths.defined()) return true;
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.erase(sizes.begin() + 1);
    if (lengths.defined()) return frames ? make_mask_of_frames() : make_mask_of_lengths(sizes);
    if (mask.dim() == x.dim() && mask.size(1) == 1) mask = mask.squeeze(1);
    if (mask.dim() > int64_t(sizes.size())) return false;
    const size_t lead = sizes.size() - size_t(mask.dim());
    for (int64_t i = 0; i < mask.dim(); ++i)
      if (mask.size(i) != 1 && mask.size(i) != sizes[lead + size_t(i)]) return false;
    mask = mask.expand(sizes).contiguous();
    return true;
  }

  // Makes the lengths int64; false unless there is one for each sample, from 0 to the most.
  bool read_lengths(int64_t samples, int64_t most) {
    if (lengths.dim() != 1 || lengths.numel() != samples) return false;
    if (!at::isIntegralType(lengths.scalar_type(), /*includeBool=*/false)) return false;
    lengths = lengths.to(at::kLong).contiguous();
    const auto* const count = lengths.const_data_ptr<int64_t>();
    return std::all_of(count, count + samples, [&](int64_t each) { return 0 <= each && each <= most; });
  }

  // lengths[n] values of the last axis are valid.
  bool make_mask_of_lengths(const std::vector<int64_t>& sizes) {
    if (sizes.size() < 2 || !read_lengths(sizes[0], sizes.back())) return false;
    const auto* const count = lengths.const_data_ptr<int64_t>();
    const int64_t length = sizes.back(), rows = c10::multiply_integers(sizes.begin() + 1, sizes.end() - 1);
    mask = fresh(sizes, at::kBool);
    bool* to = mask.mutable_data_ptr<bool>();
    for (int64_t n = 0; n < sizes[0]; ++n)
      for (int64_t row = 0; row < rows; ++row, to += length) {
        std::fill_n(to, count[n], true);
        std::fill_n(to + count[n], length - count[n], false);
      }
    return true;
  }

  // lengths[n] frames of each sample are valid, of (samples * time, C) or, where the number of frames is negative,
  // (time * samples, C).
  bool make_mask_of_frames() {
    const int64_t length = std::abs(frames), samples = x.size(0) / length;
    if (x.dim() != 2 || x.size(0) % length || !read_lengths(samples, length)) return false;
    const auto* const count = lengths.const_data_ptr<int64_t>();
    mask = fresh({x.size(0)}, at::kBool);
    bool* const to = mask.mutable_data_ptr<bool>();
    const int64_t of_sample = frames > 0 ? length : 1, of_time = frames > 0 ? 1 : samples;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t t = 0; t < length; ++t) to[n * of_sample + t * of_time] = t < count[n];
    return true;
  }

  // Values of a pool that are valid.
  int64_t valid() const {
    if (!mask.defined()) return count();
    const auto* const on = mask.const_data_ptr<bool>();
    return std::count(on, on + mask.numel(), true);
  }

  bool makes_again() const { return output == kMadeAgain || is_in_context(); }

  // Inside of `recompute_outputs` alone: what costs a convolution is made again, and outputs lie in `blocks`, which
  // would outlast a forward without a context.
  bool is_in_context() const { return recomputing && output != kKept; }

  bool can_refuse() const {
    const bool is_wide = running_mean.defined() && running_mean.scalar_type() == running_var.scalar_type() &&
                         (running_mean.scalar_type() == at::kFloat || running_mean.scalar_type() == at::kDouble);
    return is_wide && !settings.pool_size && skipped.scalar_type() == at::kLong && skipped.numel() == 1;
  }

  bool fits(const at::Tensor& vector) const {
    const auto dtype = x.scalar_type();
    return vector.dim() == 1 && vector.numel() == x.size(1) && vector.is_contiguous() &&
           (vector.scalar_type() == dtype || (vector.scalar_type() == at::kFloat && at::isReducedFloatingType(dtype)));
  }
};

std::optional<std::vector<int64_t>> numbers(const std::vector<c10::SymInt>& of) {
  std::vector<int64_t> found;
  for (const c10::SymInt& each : of)
    if (const auto number = each.maybe_as_int()) found.push_back(*number);
  return found.size() == of.size() ? std::optional(found) : std::nullopt;
}

// Of the output of a convolution with so few products an element that it takes about as long as to normalize it once
// more; or nothing, also if its own input would need another convolution, of which only one is made for a backward. So
// narrow outputs are kept, and the wide ones that are made of them are not. With the channels last, or of 16 bits, the
// convolution would take longer than all that the layers gain there.
std::shared_ptr<const ConvolutionSource> convolution_before(const at::Tensor& x) {
  constexpr int64_t most_products = 16, least_gain = 8;  // x has at least so many elements for each of the weights
  constexpr size_t least_bytes = 1 << 18;                // less take as long as the call of a convolution
  largest = std::max(largest, size_t(x.nbytes()));
  if (!x.is_contiguous() || at::isReducedFloatingType(x.scalar_type()) || x.nbytes() < least_bytes) return nullptr;
  if (!x.requires_grad() || x.is_leaf() || x.is_view() || x._version() != 0) return nullptr;
  const auto fn = x.grad_fn();
  auto* const node = dynamic_cast<torch::autograd::generated::ConvolutionBackward0*>(fn.get());
  if (!node || node->transposed || node->weight_.has_hooks()) return nullptr;
  const std::optional<at::Tensor> weight = node->weight_.get_raw_data();
  if (!weight || !is_plain(*weight) || weight->numel() > most_products * weight->size(0) ||
      least_gain * weight->numel() > x.numel())
    return nullptr;
  const auto stride = numbers(node->stride), padding = numbers(node->padding), dilation = numbers(node->dilation);
  const auto groups = node->groups.maybe_as_int();
  if (!stride || !padding || !dilation || !groups) return nullptr;
  auto source = std::make_shared<ConvolutionSource>();
  const auto& of_bias = node->bias_sym_sizes_opt.list;  // (0) without one
  if (of_bias && !of_bias->empty() && of_bias->front() != 0) {
    const auto* const sum = dynamic_cast<torch::autograd::AccumulateGrad*>(node->next_edge(2).function.get());
    if (!sum || !is_plain(sum->variable)) return nullptr;
    source->bias = copy_of(sum->variable);
  }
  int64_t read = 0;
  if (const auto input = node->input_.get_raw_data()) {
    if (!input->defined() || !is_plain(*input)) return nullptr;
    read = input->numel();
    source->input = Operand(*input);
  } else {
    const auto* const before = dynamic_cast<OfBatchNorm*>(node->next_edge(0).function.get());
    if (!before || !before->source || before->source->needs_convolution()) return nullptr;
    read = c10::multiply_integers(before->input_metadata(0).shape_as_dim_vector()).maybe_as_int().value_or(INT64_MAX);
    source->of_input = before->source;
  }
  if (x.numel() < read) return nullptr;
  source->weight = copy_of(*weight);
  source->stride = *stride;
  source->padding = *padding;
  source->dilation = *dilation;
  source->groups = *groups;
  source->is_small = 2 * size_t(x.nbytes()) <= largest;
  return source;
}

// Of the output of a call; or nothing, where it has a residual that its own readers might not keep, or that it would
// take too many normalizations to make again (`too_deep`).
std::shared_ptr<const Source> source_of(const Arguments& a, const at::Tensor& mean, const at::Tensor& var,
                                        const std::shared_ptr<const ConvolutionSource>& of_x, bool& too_deep) {
  constexpr int64_t deepest = 1;
  if (a.settings.groups || a.renorm.r.defined()) return nullptr;
  auto source = std::make_shared<Source>();
  if (a.residual.defined()) {
    const OfBatchNorm* const before = a.residual.is_view() ? nullptr : node_of(a.residual);
    if (!before || a.mask.defined() || !(before->source || before->keeps_output)) return nullptr;
    source->of_residual = before->source;
    source->depth = before->source ? before->source->depth + 1 : 0;
    too_deep = source->depth > deepest;
    if (too_deep) return nullptr;
    if (!before->source) source->residual = Operand(a.residual);
  }
  source->of_x = of_x;
  if (!of_x) source->x = Operand(a.x);
  source->weight = copy_of(a.weight);
  source->bias = copy_of(a.bias);
  source->mean = mean;
  source->var = var;
  source->mask = a.mask;
  source->settings = a.settings;
  return source;
}

// Whether statistics are finite in the dtype of the running ones.
bool are_finite(const at::Tensor& statistics, double factor, at::ScalarType kept) {
  const auto* const values = statistics.const_data_ptr<double>();
  return std::all_of(values, values + statistics.numel(), [&](double value) {
    return kept == at::kFloat ? std::isfinite(float(value * factor)) : std::isfinite(value * factor);
  });
}

// The running statistics take in the batch's, of `number` values; of one value they would have no variance.
void update(const Arguments& a, const at::Tensor& mean, const at::Tensor& var, int64_t number) {
  if (number <= 1) return;
  if (a.skipped.defined()) {
    const double count = double(number);
    const auto kept = a.running_mean.scalar_type();
    if (!are_finite(mean, 1, kept) || !are_finite(var, a.unbiased ? count / (count - 1) : 1, kept))
      return void(++*a.skipped.data_ptr<int64_t>());
  }
  const int64_t pool = a.settings.pool_size * (a.values() / a.x.size(0));
  operators->update_statistics({.running_mean = lend_if(a.running_mean),
                                .running_var = lend_if(a.running_var),
                                .num_batches_tracked = lend_if(a.batches),
                                .mean = lend(mean),
                                .var = lend(var),
                                .count = number,
                                .pool_count = pool ? pool : number,
                                .momentum = a.momentum,
                                .unbiased = a.unbiased,
                                .carry = lend_if(a.carry)});
}

// An output, and what its backward needs.
struct Made {
  at::Tensor y, mean, var, signs, factors;
  Affine affine{};  // if it is made of gamma and beta by the factors
};

Made normalized(const Arguments& a, const Affine& affine, at::Tensor mean, at::Tensor var, bool saves_signs) {
  const Settings& settings = a.settings;
  const auto [y, signs] = operators->normalize({.x = lend(a.x),
                                                .mean = lend(mean),
                                                .var = lend(var),
                                                .weight = lend_if(affine.weight),
                                                .bias = lend_if(affine.bias),
                                                .residual = lend_if(a.residual),
                                                .pool_size = 0,
                                                .eps = settings.eps,
                                                .activation = settings.activation,
                                                .slope = settings.slope,
                                                .save_signs = saves_signs,
                                                .mask = lend_if(a.mask),
                                                .own = false});
  return {take(y), std::move(mean), std::move(var), saves_signs ? take(signs) : at::Tensor(), {}};
}

Made by_batch(const Arguments& a, bool saves_signs, bool needs_graph) {
  const Settings& settings = a.settings;
  const bool is_forgotten = needs_graph && a.is_in_context() && !a.residual.defined();
  const at::Tensor place = is_forgotten ? blocks.output(a.x, a.x.sizes()) : at::Tensor();
  const auto [y, mean, var, signs] = operators->forward({.x = lend(a.x),
                                                         .weight = lend_if(a.weight),
                                                         .bias = lend_if(a.bias),
                                                         .residual = lend_if(a.residual),
                                                         .pool_size = settings.pool_size,
                                                         .eps = settings.eps,
                                                         .activation = settings.activation,
                                                         .slope = settings.slope,
                                                         .save_signs = saves_signs,
                                                         .mask = lend_if(a.mask)},
                                                        lend_if(place));
  return {take(y), take(mean), take(var), saves_signs ? take(signs) : at::Tensor(), {}};
}

// Mean and variance of all values that each group of channels has, for each of its channels; over the mean and the sum
// of squares of each channel (1, C).
void merge_groups(const at::Tensor& mean, const at::Tensor& m2, int64_t groups, int64_t values) {
  const int64_t channels = mean.numel(), size = channels / groups;
  const double count = double(values), total = count * double(size), share = count / total;
  double *const means = mean.mutable_data_ptr<double>(), *const sums = m2.mutable_data_ptr<double>();
  at::Tensor parts = fresh({1, channels});
  double* const part = parts.mutable_data_ptr<double>();
  for (int64_t c = 0; c < channels; ++c) part[c] = share * means[c];
  const at::Tensor merged = over_groups(parts, groups);
  const double* const of_group = merged.const_data_ptr<double>();
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = means[c] - of_group[c / size];
    part[c] = sums[c] + count * (delta * delta);
  }
  const at::Tensor squares = over_groups(parts, groups);
  const double* const square = squares.const_data_ptr<double>();
  for (int64_t c = 0; c < channels; ++c) {
    means[c] = of_group[c / size];
    sums[c] = square[c / size] / total;
  }
}

// Puts values into a buffer, and takes them as it has rounded them; or takes those that it holds.
void keep(const at::Tensor& buffer, double* values, bool are_new) {
  const auto in = [&](auto* kept) {
    for (int64_t c = 0; c < buffer.numel(); ++c) {
      if (are_new) kept[c] = std::remove_pointer_t<decltype(kept)>(values[c]);
      values[c] = kept[c];
    }
  };
  buffer.scalar_type() == at::kFloat ? in(buffer.mutable_data_ptr<float>()) : in(buffer.mutable_data_ptr<double>());
  if (are_new) buffer.unsafeGetTensorImpl()->bump_version();
}

// r and d of this batch (Ioffe 2017), which the buffers hold from then on; or those that they hold.
at::Tensor corrections(const Arguments& a, const at::Tensor& mean, const at::Tensor& var) {
  const Renormalization& renorm = a.renorm;
  const int64_t channels = mean.numel();
  const at::Tensor factors = fresh({2, channels});
  double *const r = factors.mutable_data_ptr<double>(), *const d = r + channels;
  if (renorm.has_limits) {
    const std::vector<double> running_mean = doubles_of(a.running_mean), running_var = doubles_of(a.running_var);
    const double *const means = mean.const_data_ptr<double>(), *const vars = var.const_data_ptr<double>();
    const auto clamp = [](double value, double low, double high) {
      return value != value ? value : std::min(std::max(value, low), high);
    };
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = 1 / std::sqrt(running_var[size_t(c)] + a.settings.eps);
      r[c] = clamp(scale / (1 / std::sqrt(vars[c] + a.settings.eps)), 1 / renorm.r_max, renorm.r_max);
      d[c] = clamp((means[c] - running_mean[size_t(c)]) * scale, -renorm.d_max, renorm.d_max);
    }
  }
  keep(renorm.r, r, renorm.has_limits);
  keep(renorm.d, d, renorm.has_limits);
  return factors;
}

Made by_moments(const Arguments& a, bool saves_signs) {
  const auto [first, second] = operators->moments({.x = lend(a.x), .pool_size = 0, .mask = std::nullopt});
  const at::Tensor mean = take(first), var = take(second);
  if (a.settings.groups) {
    merge_groups(mean, var, a.settings.groups, a.values());
    return normalized(a, {a.weight, a.bias}, mean, var, saves_signs);
  }
  double* const vars = var.mutable_data_ptr<double>();
  for (int64_t c = 0; c < var.numel(); ++c) vars[c] /= double(a.values());
  const at::Tensor factors = corrections(a, mean, var);
  const Affine affine = renormalized(a.weight, a.bias, factors, a.x.scalar_type());
  Made made = normalized(a, affine, mean, var, saves_signs);
  made.factors = factors;
  made.affine = affine;
  return made;
}

Made by_population(const Arguments& a, bool saves_signs, bool needs_graph) {
  Made made = normalized(a, {a.weight, a.bias}, a.running_mean, a.running_var, saves_signs);
  if (needs_graph) {  // running statistics may move on before the backward
    made.mean = a.running_mean.clone();
    made.var = a.running_var.clone();
  }
  return made;
}

at::Tensor forward(const Arguments& a) {
  RECORD_FUNCTION("batchnorm::batch_norm", c10::ArrayRef<const c10::IValue>());
  const Settings& settings = a.settings;
  const bool needs_graph = torch::autograd::compute_requires_grad(a.x, a.weight, a.bias, a.residual);
  const bool saves_signs =
      needs_graph && a.residual.defined() && is_piecewise_linear(settings.activation) && !a.mask.defined();
  Made made;
  {
    at::NoGradGuard no_grad;
    made = !a.use_batch                              ? by_population(a, saves_signs, needs_graph)
           : settings.groups || a.renorm.r.defined() ? by_moments(a, saves_signs)
                                                     : by_batch(a, saves_signs, needs_graph);
  }
  const at::Tensor& y = made.y;
  if (needs_graph) {
    auto node = make_node<BatchNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(a.x, a.weight, a.bias, a.residual));
    node->settings = settings;
    node->version = int64_t(y._version());
    node->x = SavedVariable(a.x, false);
    node->weight = SavedVariable(a.weight, false);
    node->bias = SavedVariable(a.bias, false);
    // One bit an element is enough for it where the activation is piecewise linear.
    if (!saves_signs && settings.activation != 0) node->residual = SavedVariable(a.residual, false);
    if (a.mask.defined()) node->mask = SavedVariable(a.mask, false);
    node->mean = made.mean;
    node->var = made.var;
    node->signs = made.signs;
    node->factors = made.factors;
    node->made = made.affine;
    if (saves_signs) node->format = a.x.suggest_memory_format();
    if (a.is_in_context() && !node->x.has_hooks()) node->of_x = convolution_before(a.x);
    if (node->of_x) node->x.register_hooks(std::make_unique<MadeAgain<ConvolutionSource>>(node->of_x, *node));
    if (a.makes_again()) node->source = source_of(a, made.mean, made.var, node->of_x, node->keeps_output);
    node->forgets = a.output == Arguments::kMadeAgain;
    remakes = remakes || node->forgets;
    torch::autograd::set_history(y, node);
  }
  if (a.update) update(a, made.mean, made.var, a.valid());
  return y;
}

// ---------------------------------------------------------------------------------------------- inputs in parts
// Moments that this thread has measured of parts. In a dense block each layer reads the same features again.
class Measured {
 public:
  // Puts the moments of a part where they belong; false where they are not known.
  bool copy_to(const at::Tensor& part, int64_t channel, const at::Tensor& mean, const at::Tensor& var) {
    for (const Entry& each : entries_) {
      if (each.part._unsafe_get_target() != part.unsafeGetTensorImpl() || each.part.expired()) continue;
      if (each.version != part._version()) return false;
      const int64_t count = part.size(1);
      std::copy_n(each.mean.const_data_ptr<double>() + each.channel, count, mean.data_ptr<double>() + channel);
      std::copy_n(each.var.const_data_ptr<double>() + each.channel, count, var.data_ptr<double>() + channel);
      return true;
    }
    return false;
  }

  void remember(const at::Tensor& part, int64_t channel, const at::Tensor& mean, const at::Tensor& var) {
    Entry entry{Weak(part.getIntrusivePtr()), part._version(), channel, mean, var};
    const auto old = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& each) {
      return each.part.expired() || each.part._unsafe_get_target() == part.unsafeGetTensorImpl();
    });
    if (old != entries_.end())
      *old = std::move(entry);
    else if (entries_.size() < kMost)
      entries_.push_back(std::move(entry));
    else
      entries_[next_++ % kMost] = std::move(entry);
  }

 private:
  static constexpr size_t kMost = 128;
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    Weak part;
    int64_t version, channel;
    at::Tensor mean, var;  // of all channels of the call that measured it
  };
  std::vector<Entry> entries_;
  size_t next_ = 0;
};
thread_local Measured measured;

std::vector<int64_t> sizes_together(const std::vector<at::Tensor>& parts, int64_t channels) {
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  sizes[1] = channels;
  return sizes;
}

// activation(BN) of parts along the channels, which are not put together for it, into y.
at::Tensor normalize_parts(const std::vector<at::Tensor>& parts, const at::Tensor& weight, const at::Tensor& bias,
                           const at::Tensor& mean, const at::Tensor& var, const Settings& settings, bool are_measured,
                           at::Tensor y) {
  std::vector<bool> known;
  int64_t channel = 0;
  for (const at::Tensor& part : parts) {
    known.push_back(are_measured || (!part.is_inference() && measured.copy_to(part, channel, mean, var)));
    channel += part.size(1);
  }
  operators->forward_parts({.parts = lend_all(parts),
                            .are_measured = known,
                            .y = lend(y),
                            .mean = lend(mean),
                            .var = lend(var),
                            .weight = lend_if(weight),
                            .bias = lend_if(bias),
                            .eps = settings.eps,
                            .activation = settings.activation,
                            .slope = settings.slope,
                            .population = settings.population});
  channel = 0;
  for (size_t i = 0; i < parts.size(); channel += parts[i++].size(1))
    if (!known[i] && !parts[i].is_inference()) measured.remember(parts[i], channel, mean, var);
  return y;
}

// What an output of parts was made of.
struct PartsSource : Source {
  std::vector<Operand> parts;

  bool is_unchanged() const override {
    return Source::is_unchanged() &&
           std::all_of(parts.begin(), parts.end(), [](const Operand& each) { return each.is_unchanged(); });
  }
  at::Tensor make() const override {
    std::vector<at::Tensor> tensors;
    for (const Operand& each : parts) tensors.push_back(each.tensor());
    return normalize_parts(tensors, weight.tensor(), bias.tensor(), mean, var, settings, true,
                           fresh_like(tensors[0], sizes_together(tensors, mean.numel())));
  }
};

// The gradients of the parts, of gamma and of beta.
struct BatchNormPartsBackward : OfBatchNorm {
  std::vector<SavedVariable> parts;
  SavedVariable weight, bias;
  at::Tensor mean, var;

  std::string name() const override { return "BatchNormPartsBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& each : parts) each.reset_data();
    for (SavedVariable* each : {&weight, &bias}) each->reset_data();
    mean.reset();
    var.reset();
    source.reset();
  }

  std::vector<at::Tensor> saved_parts() const {
    std::vector<at::Tensor> tensors;
    for (const SavedVariable& each : parts) tensors.push_back(each.unpack());
    return tensors;
  }

  variable_list apply(variable_list&& dy) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list results(parts.size() + 2);
    if (!dy[0].defined()) return results;
    const std::vector<at::Tensor> tensors = saved_parts();
    const at::Tensor gamma = weight.unpack(), beta = bias.unpack();
    const bool are_plain = std::all_of(tensors.begin(), tensors.end(), is_plain) && is_plain(gamma) && is_plain(beta);
    if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy[0]) || !are_plain)
      return together(dy[0], tensors, gamma, beta, mean, var, settings, wanted(parts.size() + 2));
    const at::Tensor upstream = dy[0].contiguous();
    at::Tensor sums = at::empty({2, mean.numel()}, mean.options());
    std::vector<bool> wanted(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) wanted[i] = task_should_compute_output(i);
    const auto gradients = operators->backward_parts({.dy = lend(upstream),
                                                      .parts = lend_all(tensors),
                                                      .mean = lend(mean),
                                                      .var = lend(var),
                                                      .weight = lend_if(gamma),
                                                      .bias = lend_if(beta),
                                                      .eps = settings.eps,
                                                      .activation = settings.activation,
                                                      .slope = settings.slope,
                                                      .population = settings.population,
                                                      .wanted = wanted,
                                                      .d_weight = sums.data_ptr<double>(),
                                                      .d_bias = sums.data_ptr<double>() + mean.numel()});
    for (size_t i = 0; i < tensors.size(); ++i)
      if (gradients[i]) results[i] = take(*gradients[i]);
    for (size_t i : {0, 1}) {
      const at::Tensor& parameter = i ? beta : gamma;
      if (parameter.defined() && task_should_compute_output(parts.size() + i))
        results[parts.size() + i] = sums.select(0, int64_t(i)).to(parameter.scalar_type());
    }
    return results;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& each : parts) args.collect(each, false);
    for (const SavedVariable* each : {&weight, &bias}) args.collect(*each, false);
    for (const at::Tensor* each : {&mean, &var}) args.collect(*each);
    collect(args, settings);
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& each : parts) swap.before(each);
    for (SavedVariable* each : {&weight, &bias}) swap.before(*each);
    for (at::Tensor* each : {&mean, &var}) swap.before(*each);
    PackedArgs packed;
    packed.pack(saved_parts());
    packed.pack(variable_list{weight.unpack(), bias.unpack(), mean, var});
    pack(packed, settings);
    packed.pack(wanted(parts.size() + 2));
    auto results = call_packed(*this, dy, swap, std::move(packed).vec(), packed_gradients);
    for (SavedVariable& each : parts) swap.after(each);
    for (SavedVariable* each : {&weight, &bias}) swap.after(*each);
    for (at::Tensor* each : {&mean, &var}) swap.after(*each);
    return results;
  }

  static variable_list packed_gradients(const variable_list& dy, const std::vector<c10::IValue>& args) {
    PackedArgs packed(args);
    const auto tensors = packed.unpack<variable_list>();
    const auto t = packed.unpack<variable_list>();
    const Settings settings = unpack_settings(packed);
    const auto wanted = packed.unpack<Wanted>();
    if (!dy[0].defined()) return variable_list(tensors.size() + 2);
    return together(dy[0], tensors, t[0], t[1], t[2], t[3], settings, wanted);
  }

  // By the gradients of one layer on the concatenation, which are differentiable.
  static variable_list together(const at::Tensor& dy, const variable_list& tensors, const at::Tensor& gamma,
                                const at::Tensor& beta, const at::Tensor& mean, const at::Tensor& var,
                                const Settings& settings, const Wanted& wanted) {
    const size_t count = tensors.size();
    variable_list results(count + 2);
    const bool want_x =
        std::find(wanted.begin(), wanted.begin() + int64_t(count), true) - wanted.begin() < int64_t(count);
    const Saved all{at::cat(tensors, 1), gamma, beta, {}, {}, mean, var, {}, {}};
    auto found = gradients(at::Tensor(dy), all, settings, {want_x, wanted[count], wanted[count + 1], false});
    int64_t channel = 0;
    for (size_t i = 0; i < count; channel += tensors[i++].size(1))
      if (wanted[i]) results[i] = found[0].narrow(1, channel, tensors[i].size(1));
    results[count] = found[1];
    results[count + 1] = found[2];
    return results;
  }
};

// Those that lie alike, in the order of planes.
bool fit_together(const std::vector<at::Tensor>& parts) {
  if (parts.size() < 2) return false;
  for (const at::Tensor& each : parts) {
    if (!each.defined() || each.dim() != parts[0].dim() || each.dim() < 2 || each.numel() == 0) return false;
    if (each.scalar_type() != parts[0].scalar_type() || !each.is_contiguous()) return false;
    if (each.suggest_memory_format() != at::MemoryFormat::Contiguous) return false;
    for (int64_t i = 0; i < each.dim(); ++i)
      if (i != 1 && each.size(i) != parts[0].size(i)) return false;
  }
  return true;
}

// Like x but for its sizes, without memory: for checks alone.
at::Tensor without_memory(const at::Tensor& x, at::IntArrayRef sizes) {
  return at::empty({1}, x.options().requires_grad(false)).expand(sizes);
}

// The same of the parts together.
at::Tensor as_together(const std::vector<at::Tensor>& parts) {
  int64_t channels = 0;
  for (const at::Tensor& each : parts) channels += each.size(1);
  return without_memory(parts[0], sizes_together(parts, channels));
}

at::Tensor forward_parts(const Arguments& a, const std::vector<at::Tensor>& parts) {
  RECORD_FUNCTION("batchnorm::batch_norm", c10::ArrayRef<const c10::IValue>());
  const Settings& settings = a.settings;
  const bool needs_graph = torch::autograd::compute_requires_grad(at::TensorList(parts), a.weight, a.bias);
  at::Tensor y, mean, var;
  {
    at::NoGradGuard no_grad;
    at::Tensor place = needs_graph && a.is_in_context() ? blocks.output(parts[0], a.x.sizes()) : at::Tensor();
    if (!place.defined()) place = fresh_like(parts[0], a.x.sizes());
    const auto doubles = at::TensorOptions().dtype(at::kDouble);
    mean =
        a.use_batch ? at::empty({1, a.x.size(1)}, doubles) : a.running_mean.to(at::kDouble, false, true).view({1, -1});
    var = a.use_batch ? at::empty({1, a.x.size(1)}, doubles) : a.running_var.to(at::kDouble, false, true).view({1, -1});
    y = normalize_parts(parts, a.weight, a.bias, mean, var, settings, !a.use_batch, std::move(place));
  }
  if (needs_graph) {
    auto node = make_node<BatchNormPartsBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(at::TensorList(parts), a.weight, a.bias));
    node->settings = settings;
    node->version = int64_t(y._version());
    for (const at::Tensor& each : parts) node->parts.emplace_back(each, false);
    node->weight = SavedVariable(a.weight, false);
    node->bias = SavedVariable(a.bias, false);
    node->mean = mean;
    node->var = var;
    node->forgets = a.output == Arguments::kMadeAgain;
    remakes = remakes || node->forgets;
    if (a.makes_again()) {
      auto source = std::make_shared<PartsSource>();
      for (const at::Tensor& each : parts) source->parts.emplace_back(each);
      source->weight = copy_of(a.weight);
      source->bias = copy_of(a.bias);
      source->mean = mean;
      source->var = var;
      source->settings = settings;
      node->source = std::move(source);
    }
    torch::autograd::set_history(y, node);
  }
  if (a.update) update(a, mean, var, a.values());
  return y;
}

#include "depthwise.h"  // of this namespace
#include "pooling.h"

// ---------------------------------------------------------------------------------------------- Python
// Reads a plain tensor, or None; false for anything else.
bool read(PyObject* given, at::Tensor& t) {
  if (given == Py_None) return true;
  if (!python::is_exact_tensor(given)) return false;
  t = python::tensor(given);
  return is_plain(t);
}

// Parts of an input, that lie alike.
bool read_parts(PyObject* given, std::vector<at::Tensor>& parts) {
  const Py_ssize_t count = PyList_Size(given);
  parts.resize(size_t(std::max<Py_ssize_t>(count, 0)));
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyObject* const each = PyList_GetItem(given, i); each == Py_None || !read(each, parts[size_t(i)])) return false;
  return fit_together(parts);
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
  kKeep,
  kUnbiased,
  kSkipped,
  kBeside,
  kCount
};

// What few layers have: mask, lengths, frames, groups, r, d, r_max, d_max; without limits r_max is None.
bool read_beside(PyObject* given, Arguments& a) {
  enum { kMask, kLengths, kFrames, kGroups, kR, kD, kLargestR, kLargestD, kBesideCount };
  if (given == Py_None) return true;
  if (PyTuple_Size(given) != kBesideCount) return false;
  const auto each = [&](Py_ssize_t i) { return PyTuple_GetItem(given, i); };
  if (!read(each(kMask), a.mask) || !read(each(kLengths), a.lengths) || !read(each(kFrames), a.frames) ||
      !read(each(kGroups), a.settings.groups) || !read(each(kR), a.renorm.r) || !read(each(kD), a.renorm.d))
    return false;
  a.renorm.has_limits = each(kLargestR) != Py_None;
  return !a.renorm.has_limits || (read(each(kLargestR), a.renorm.r_max) && read(each(kLargestD), a.renorm.d_max));
}

// A tuple of as many numbers as there are axes of space.
bool read(PyObject* given, std::vector<int64_t>& numbers) {
  if (!PyTuple_Check(given)) return false;
  numbers.resize(size_t(PyTuple_Size(given)));
  for (size_t i = 0; i < numbers.size(); ++i)
    if (!read(PyTuple_GetItem(given, Py_ssize_t(i)), numbers[i])) return false;
  return true;
}

// What every call has of a layer, but for its input and what it adds.
bool read_layer(PyObject* const* given, Arguments& a) {
  double momentum = 0;
  if (!read(given[kWeight], a.weight) || !read(given[kBias], a.bias) || !read(given[kRunningMean], a.running_mean) ||
      !read(given[kRunningVar], a.running_var) || !read(given[kNumBatchesTracked], a.batches) ||
      !read(given[kCarry], a.carry))
    return false;
  if (given[kMomentum] != Py_None) {
    if (!read(given[kMomentum], momentum)) return false;
    a.momentum = momentum;
  }
  if (!read(given[kEps], a.settings.eps) || !read(given[kActivation], a.settings.activation) ||
      !read(given[kSlope], a.settings.slope))
    return false;
  a.use_batch = given[kUseBatch] == Py_True;
  a.update = given[kUpdate] == Py_True;
  if (given[kKeep] != Py_None) a.output = given[kKeep] == Py_True ? Arguments::kKept : Arguments::kMadeAgain;
  a.unbiased = given[kUnbiased] == Py_True;
  a.settings.population = !a.use_batch;
  return read(given[kSkipped], a.skipped);
}

// The layer before a depthwise convolution: the arguments of a call whose input is that of the convolution.
bool read_before(PyObject* given, Arguments& a, const at::Tensor& x) {
  if (!PyTuple_Check(given) || PyTuple_Size(given) != kCount) return false;
  PyObject* values[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) values[i] = PyTuple_GetItem(given, i);
  if (!read_layer(values, a)) return false;
  a.x = x;
  return a.fit() && a.is_alone();
}

// What goes through a depthwise convolution first: x, kernels, bias, stride, padding, dilation; and the layer before
// it, or None.
bool read_convolution(PyObject* given, Convolution& c, std::optional<Arguments>& before) {
  enum { kInput, kKernels, kKernelBias, kStride, kPadding, kDilation, kBefore, kConvolutionCount };
  if (PyTuple_Size(given) != kConvolutionCount) return false;
  const auto each = [&](Py_ssize_t i) { return PyTuple_GetItem(given, i); };
  return read(each(kInput), c.x) && read(each(kKernels), c.kernels) && read(each(kKernelBias), c.bias) &&
         read(each(kStride), c.stride) && read(each(kPadding), c.padding) && read(each(kDilation), c.dilation) &&
         c.fit() && (each(kBefore) == Py_None || read_before(each(kBefore), before.emplace(), c.x));
}

// What windows of the output are reduced: x, kernel, stride, padding, whether sizes are rounded up, and whether to
// means.
bool read_windows(PyObject* given, Windows& w) {
  enum { kInput, kKernel, kStride, kPadding, kCeil, kMean };
  const auto each = [&](Py_ssize_t i) { return PyTuple_GetItem(given, i); };
  w.ceil = each(kCeil) == Py_True;
  w.mean = each(kMean) == Py_True;
  return read(each(kInput), w.x) && read(each(kKernel), w.kernel) && read(each(kStride), w.stride) &&
         read(each(kPadding), w.padding) && w.fit();
}

PyObject* call_plain(PyObject* const* given, Py_ssize_t count) {
  Arguments a;
  TORCH_CHECK(count == kCount, "batchnorm: expected ", int(kCount), " arguments, got ", count);
  if (is_watched()) Py_RETURN_NONE;
  std::vector<at::Tensor> parts;
  std::optional<Convolution> convolution;
  std::optional<Windows> windows;
  constexpr Py_ssize_t of_windows = 6;
  if (PyTuple_Check(given[kX]) && PyTuple_Size(given[kX]) == of_windows)
    windows.emplace();
  else if (PyTuple_Check(given[kX]))
    convolution.emplace();
  std::optional<Arguments> before;
  if (windows                   ? !read_windows(given[kX], *windows)
      : convolution             ? !read_convolution(given[kX], *convolution, before)
      : PyList_Check(given[kX]) ? !read_parts(given[kX], parts)
                                : !read(given[kX], a.x))
    Py_RETURN_NONE;
  if (!read(given[kResidual], a.residual) || !read_layer(given, a) || !read_beside(given[kBeside], a)) Py_RETURN_NONE;
  if (a.use_batch && !read(given[kPoolSize], a.settings.pool_size)) Py_RETURN_NONE;
  if (!parts.empty()) a.x = as_together(parts);
  if (convolution) a.x = without_memory(convolution->x, convolution->sizes());
  if (windows) a.x = windows->x;
  if (!a.fit() || ((windows || convolution || !parts.empty()) && !a.is_alone()) || !a.make_mask()) Py_RETURN_NONE;
  at::Tensor y;
  {
    python::OthersMayRun released;
    if (remakes && at::GradMode::is_enabled()) {
      for (const at::Tensor& each : parts) forget_outputs(each);
      if (convolution)
        forget_outputs(convolution->x);
      else if (parts.empty())
        forget_outputs(a.x);
      forget_outputs(a.residual);
    }
    y = windows         ? forward_pooled(a, *windows)
        : convolution   ? forward_convolved(a, *convolution, before ? &*before : nullptr)
        : parts.empty() ? forward(a)
                        : forward_parts(a, parts);
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

// ---------------------------------------------------------------------------------------------- readers in a context
PyObject* look = nullptr;  // at what the node of a result has saved; False if nodes of its kind save no tensor
thread_local at::CallbackHandle callback = 0;
thread_local uint64_t seen = 0;                                // the number of the node that was looked at last
thread_local std::vector<const std::type_info*> save_nothing;  // few kinds

bool saves_nothing(const Node& node) {
  return std::any_of(save_nothing.begin(), save_nothing.end(),
                     [&](const std::type_info* each) { return *each == typeid(node); });
}

// Whether an output that is made again is among the inputs of a node, or a few nodes of one input before them, such as
// views.
bool may_read_output(const Node& node) {
  constexpr int most_views = 4;
  return std::any_of(node.next_edges().begin(), node.next_edges().end(), [](const torch::autograd::Edge& edge) {
    const Node* before = edge.function.get();
    for (int i = 0; before && i < most_views; ++i) {
      if (const auto* const norm = dynamic_cast<const OfBatchNorm*>(before)) return bool(norm->source);
      if (before->num_outputs() != 1) break;
      before = before->next_edge(0).function.get();
    }
    return false;
  });
}

void let_python_look(const at::Tensor& result, const Node& node) {
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* const wrapped = THPVariable_Wrap(at::Tensor(result));
  PyObject* const found = wrapped ? PyObject_CallFunctionObjArgs(look, wrapped, nullptr) : nullptr;
  if (!found) PyErr_WriteUnraisable(look);
  if (found == Py_False) save_nothing.push_back(&typeid(node));
  Py_XDECREF(found);
  Py_XDECREF(wrapped);
  PyGILState_Release(state);
}

// The node that made a result forgets what can be made again.
void forget_inputs_of(const at::Tensor& result) {
  const auto* const meta = result.defined() ? torch::autograd::impl::get_autograd_meta(result) : nullptr;
  Node* const node = meta ? meta->grad_fn_.get() : nullptr;
  if (!node || node->sequence_nr() == seen || dynamic_cast<OfBatchNorm*>(node)) return;
  seen = node->sequence_nr();
  const bool is_done = forget_in(node, Forgets::every) || !may_read_output(*node);
  if ((!is_done || is_known_to_python) && !saves_nothing(*node)) let_python_look(result, *node);
}

// Called behind each operator of torch's while this thread is in a context.
void forget_read(const at::RecordFunction& of, at::ObserverContext*) {
  if (recomputing <= 0 || !at::GradMode::is_enabled() || is_transformed()) return;
  for (const c10::IValue& each : of.outputs())
    if (each.isTensor())
      forget_inputs_of(each.toTensor());
    else if (each.isTensorList())
      for (const at::Tensor& t : each.toTensorVector()) forget_inputs_of(t);
}

// recompute(contexts, function): by how many more contexts of `recompute_outputs` this thread is in; what looks at
// nodes of kinds that are not known here, and at all of them from when `known_to_python` was called.
PyObject* recompute(PyObject*, PyObject* const* given, Py_ssize_t count) {
  int64_t contexts = 0;
  if (count != 2 || !read(given[0], contexts)) Py_RETURN_NONE;
  if (look != given[1]) {
    Py_INCREF(given[1]);  // for good: another thread may be about to call the one before
    look = given[1];
  }
  if (!recomputing) {
    largest = 0;
    blocks.begin();
  }
  recomputing += contexts;
  if (recomputing > 0 && !callback) {
    callback = at::addThreadLocalCallback(
        at::RecordFunctionCallback(nullptr, forget_read).needsOutputs(true).scopes({at::RecordScope::FUNCTION}));
  } else if (recomputing <= 0) {
    if (callback) at::removeCallback(callback);
    callback = 0;
    blocks.free();
    is_known_to_python = false;
  }
  Py_RETURN_NONE;
}

// known_to_python(): a context of this thread has an output of which this library knows nothing.
PyObject* known_to_python(PyObject*, PyObject*) {
  is_known_to_python = true;
  Py_RETURN_NONE;
}

// How many gradients took the place of another so far.
PyObject* gradients_in_place(PyObject*, PyObject*) { return PyLong_FromLongLong(in_place); }

constexpr const char* kSource = "batchnorm.source";
using HeldSource = std::shared_ptr<const Source>;

// source(a tensor): what it was made of, if it is an output to be made again, or a view of one; else None.
PyObject* source(PyObject*, PyObject* t) {
  if (!python::is_exact_tensor(t)) Py_RETURN_NONE;
  const OfBatchNorm* const node = node_of(python::tensor(t));
  if (!node || !node->source) Py_RETURN_NONE;
  return PyCapsule_New(new HeldSource(node->source), kSource, [](PyObject* capsule) {
    delete static_cast<HeldSource*>(PyCapsule_GetPointer(capsule, kSource));
  });
}

// needs_convolution(a tensor): 1 if the batch normalization that has made it makes its own input again, too, by the
// convolution before it; 2 if it has taken in that convolution; else 0.
PyObject* needs_convolution(PyObject*, PyObject* t) {
  const OfBatchNorm* const node = python::is_exact_tensor(t) ? node_of(python::tensor(t)) : nullptr;
  return PyLong_FromLong(!node ? 0 : node->of_x ? 1 : dynamic_cast<const DepthwiseBatchNormBackward*>(node) ? 2 : 0);
}

// rebuild(what `source` returned): the output once more, or None where an operand has changed since.
PyObject* rebuild(PyObject*, PyObject* capsule) {
  const auto* const held = static_cast<const HeldSource*>(PyCapsule_GetPointer(capsule, kSource));
  if (!held) return nullptr;
  try {
    if (!(*held)->is_unchanged()) Py_RETURN_NONE;
    at::Tensor y;
    {
      python::OthersMayRun released;
      at::NoGradGuard no_grad;
      y = (*held)->make();
    }
    return THPVariable_Wrap(std::move(y));
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
                         {"recompute", method(recompute), METH_FASTCALL, nullptr},
                         {"gradients_in_place", gradients_in_place, METH_NOARGS, nullptr},
                         {"source", source, METH_O, nullptr},
                         {"needs_convolution", needs_convolution, METH_O, nullptr},
                         {"known_to_python", known_to_python, METH_NOARGS, nullptr},
                         {"rebuild", rebuild, METH_O, nullptr},
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
