// A depthwise convolution and the batch normalization of its output as one node, and perhaps that of its input, too:
// what lies between them is in no memory but the caches, and the backward makes it again. A part of autograd.cpp.

// ---------------------------------------------------------------------------------------------- depthwise convolutions
// A batch normalization with its statistics, or without one.
struct Norm {
  at::Tensor weight, bias, mean, var;
  Settings settings{};
  bool is_there() const { return mean.defined(); }
};

// What a call is given of it.
struct Convolution {
  at::Tensor x, kernels, bias;
  std::vector<int64_t> stride, padding, dilation;
  Norm before{};  // of x, perhaps

  // Whether the kernels take it. What does not fit goes through torch's convolution, which raises its errors.
  bool fit() const {
    if (!x.defined() || !kernels.defined() || (x.dim() != 3 && x.dim() != 4) || kernels.dim() != x.dim()) return false;
    const size_t axes = size_t(x.dim()) - 2;
    for (const auto* each : {&stride, &padding, &dilation})
      if (each->size() != axes) return false;
    if (at::autocast::is_autocast_enabled(at::kCPU) || x.numel() == 0 || !x.is_contiguous(format())) return false;
    if (kernels.size(0) != x.size(1) || kernels.size(1) != 1 || !kernels.is_contiguous()) return false;
    if (kernels.scalar_type() != x.scalar_type()) return false;
    if (bias.defined() && (bias.scalar_type() != x.scalar_type() || bias.dim() != 1 || bias.numel() != x.size(1) ||
                           !bias.is_contiguous()))
      return false;
    if (kernels.numel() / x.size(1) > batchnorm::kMostTaps || kernels.numel() == 0) return false;
    // With the channels last torch's convolution by a small kernel takes less time than to copy rows of some channels.
    // These are held of all samples at once: not of so many places that the memory would be felt.
    constexpr int64_t few_taps = 20, most_places = 1 << 16;
    if (lies_in_rows() && (kernels.numel() / x.size(1) < few_taps || x.size(0) * out(0) * out(1) > most_places))
      return false;
    constexpr int64_t most_stride = 16;  // planes are parted into the square of so many phases
    constexpr int64_t most = 1 << 12;    // far beyond any use
    for (size_t i = 0; i < axes; ++i)
      if (stride[i] < 1 || stride[i] > most_stride || dilation[i] < 1 || dilation[i] > most || padding[i] < 0 ||
          padding[i] > most || out(i) < 1)
        return false;
    return true;
  }

  at::MemoryFormat format() const { return x.suggest_memory_format(); }
  bool lies_in_rows() const { return format() != at::MemoryFormat::Contiguous; }

  int64_t out(size_t axis) const {
    const int64_t size = x.size(int64_t(axis) + 2), reach = dilation[axis] * (kernels.size(int64_t(axis) + 2) - 1);
    const int64_t moves = size + 2 * padding[axis] - reach - 1;
    return moves < 0 ? 0 : moves / stride[axis] + 1;
  }

  std::vector<int64_t> sizes() const {
    std::vector<int64_t> sizes{x.size(0), x.size(1)};
    for (size_t i = 0; i < stride.size(); ++i) sizes.push_back(out(i));
    return sizes;
  }

  batchnorm::Depthwise geometry() const {
    batchnorm::Depthwise d{{1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    const size_t axes = stride.size();
    for (size_t i = 0; i < axes; ++i) {
      const size_t to = i + 2 - axes;
      d.size[to] = x.size(int64_t(i) + 2);
      d.out[to] = out(i);
      d.kernel[to] = kernels.size(int64_t(i) + 2);
      d.stride[to] = stride[i];
      d.padding[to] = padding[i];
      d.dilation[to] = dilation[i];
    }
    return d;
  }

  // A tensor that lies as x does.
  batchnorm::Operand operand(const at::Tensor& t) const {
    const int64_t inner = t.numel() / (t.size(0) * t.size(1));
    return {t.data_ptr(), t.size(1) * inner, lies_in_rows() ? 1 : inner};
  }

  // By torch.
  at::Tensor convolved(const at::Tensor& input) const {
    return at::convolution(input, kernels, maybe(bias), stride, padding, dilation, /*transposed=*/false,
                           std::vector<int64_t>(stride.size(), 0), x.size(1));
  }
};

// As the kernels take it.
batchnorm::Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return batchnorm::Dtype::float32;
    case at::kDouble: return batchnorm::Dtype::float64;
    case at::kBFloat16: return batchnorm::Dtype::bfloat16;
    default: return batchnorm::Dtype::float16;
  }
}
batchnorm::Vector vector_of(const at::Tensor& t) {
  return t.defined() ? batchnorm::Vector{t.const_data_ptr(), dtype_of(t)} : batchnorm::Vector{};
}
batchnorm::NormCall call_of(const Norm& n) {
  batchnorm::Fusion fusion;
  fusion.activation = static_cast<batchnorm::Activation>(n.settings.activation);
  fusion.slope = n.settings.slope;
  return {n.mean.data_ptr<double>(), n.var.data_ptr<double>(), vector_of(n.weight),
          vector_of(n.bias),         n.settings.eps,           fusion,
          n.settings.population};
}

// Scratch memory that a thread keeps for its next call: pages that are there. It begins at a line of the cache, which
// no vector then crosses.
class Workspace {
 public:
  class Held {
   public:
    Held() = default;
    explicit Held(size_t bytes) : memory_(new char[bytes + kLine]), bytes_(bytes) {}
    char* get() const {
      const auto at = reinterpret_cast<uintptr_t>(memory_.get());
      return memory_.get() + (kLine - at % kLine) % kLine;
    }
    size_t bytes() const { return bytes_; }

   private:
    static constexpr size_t kLine = 64;
    std::unique_ptr<char[]> memory_;
    size_t bytes_ = 0;
  };
  Held take(size_t bytes) {
    Held held = std::exchange(kept_, Held());
    return held.bytes() < bytes ? Held(bytes) : std::move(held);
  }
  void give_back(Held&& held) {
    constexpr size_t most = 16 << 20;
    if (held.bytes() <= most && held.bytes() > kept_.bytes()) kept_ = std::move(held);
  }

 private:
  Held kept_;
};
thread_local Workspace workspace;

// A call of the kernels: what they take besides the tensors that they write.
class DepthwiseCall {
 public:
  DepthwiseCall(const Convolution& c, const Norm& norm) : c_(c), geometry_(c.geometry()), norm_(call_of(norm)) {
    const int64_t inner = geometry_.out[0] * geometry_.out[1];
    const auto order = c.lies_in_rows() ? batchnorm::Order::interleaved : batchnorm::Order::planar;
    shape_ = {order, dtype_of(c.x), c.x.size(0), c.x.size(1), inner, c.x.size(0)};
    if (c.before.is_there()) before_ = call_of(c.before);
    threads_ = at::in_parallel_region() ? 1 : at::get_num_threads();
    workspace_ = workspace.take(operators->depthwise_workspace_size(shape_, geometry_, before_.has_value(), threads_));
  }
  ~DepthwiseCall() { workspace.give_back(std::move(workspace_)); }
  DepthwiseCall(const DepthwiseCall&) = delete;

  void forward(const at::Tensor& y) const {
    operators->depthwise_forward(shape_, geometry_, input(), before(), norm_, c_.operand(y), workspace_.get(), threads_,
                                 operators->parallel());
  }
  void backward(const at::Tensor& dy, const batchnorm::DepthwiseGradients& to) const {
    operators->depthwise_backward(shape_, geometry_, input(), before(), norm_, c_.operand(dy), to, workspace_.get(),
                                  threads_, operators->parallel());
  }

 private:
  const batchnorm::NormCall* before() const { return before_ ? &*before_ : nullptr; }
  batchnorm::DepthwiseInput input() const {
    return {c_.operand(c_.x), c_.kernels.const_data_ptr(), c_.bias.defined() ? c_.bias.const_data_ptr() : nullptr};
  }
  const Convolution& c_;
  batchnorm::Depthwise geometry_;
  batchnorm::NormCall norm_;
  std::optional<batchnorm::NormCall> before_;
  batchnorm::Shape shape_{};
  int64_t threads_;
  Workspace::Held workspace_;
};

// What an output was made of. The input is a tensor that the node keeps for itself, or is made again, too.
struct ConvolvedSource : Source {
  std::shared_ptr<const Source> of_input;
  Convolution convolution;  // but for the tensors below
  Operand kernels, kernel_bias, before_weight, before_bias;
  bool holds_input = false;  // for the node, which reads it next: it is so small that this moves no peak

  bool is_unchanged() const override {
    return Source::is_unchanged() && kernels.is_unchanged() && kernel_bias.is_unchanged() &&
           before_weight.is_unchanged() && before_bias.is_unchanged() && (!of_input || of_input->is_unchanged());
  }
  at::Tensor make() const override {
    if (at::Tensor held = scratch.take(this); held.defined()) return held;
    Convolution c = convolution;
    c.x = of_x ? of_x->make() : of_input ? of_input->make() : x.tensor();
    if (holds_input && of_x) scratch.hold(of_x, c.x);
    if (holds_input && of_input) scratch.hold(of_input, c.x);
    c.kernels = kernels.tensor();
    c.bias = kernel_bias.tensor();
    c.before.weight = before_weight.tensor();
    c.before.bias = before_bias.tensor();
    Norm norm{weight.tensor(), bias.tensor(), mean, var, settings};
    norm.settings.population = c.before.settings.population = true;  // by the statistics that the forward has found
    const at::Tensor y = fresh_like(c.x, c.sizes());
    DepthwiseCall(c, norm).forward(y);
    return y;
  }
};

// The gradients of x, of the kernels and their bias, of gamma and beta; and of those of the normalization before.
struct DepthwiseBatchNormBackward : OfBatchNorm {
  enum { kX, kKernels, kKernelBias, kWeight, kBias, kBeforeWeight, kBeforeBias, kCount };
  SavedVariable saved[kCount];
  at::Tensor mean, var, before_mean, before_var;
  Settings before{};
  std::vector<int64_t> stride, padding, dilation;

  std::string name() const override { return "DepthwiseBatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& each : saved) each.reset_data();
    for (at::Tensor* each : {&mean, &var, &before_mean, &before_var}) each->reset();
    source.reset();
    of_x.reset();
  }

  variable_list apply(variable_list&& dy) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!dy[0].defined()) return variable_list(kCount);
    const variable_list t = unpacked();
    const Convolution c = convolution_of(t);
    const Norm norm{t[kWeight], t[kBias], mean, var, settings};
    const bool are_plain = std::all_of(t.begin(), t.end(), is_plain);
    if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy[0]) || !are_plain)
      return composed(dy[0], c, norm, wanted(kCount));
    return by_kernels(std::move(dy[0]), c, norm, wanted(kCount));
  }

  variable_list unpacked() const {
    variable_list tensors;
    for (const SavedVariable& each : saved) tensors.push_back(each.unpack());
    return tensors;
  }
  Convolution convolution_of(const variable_list& t) const {
    return {t[kX],
            t[kKernels],
            t[kKernelBias],
            stride,
            padding,
            dilation,
            {t[kBeforeWeight], t[kBeforeBias], before_mean, before_var, before}};
  }

  static variable_list by_kernels(at::Tensor&& dy, Convolution c, const Norm& norm, const Wanted& wanted) {
    c.x = c.x.contiguous(c.format());  // hooks on saved tensors may have changed its order
    c.kernels = c.kernels.contiguous();
    const int64_t channels = norm.mean.numel();
    const auto doubles = norm.mean.options();
    enum { kGamma, kBeta, kConvolutionBias, kBeforeGamma, kBeforeBeta, kRows };
    const at::Tensor sums = at::empty({kRows, channels}, doubles), kernels = at::empty(c.kernels.sizes(), doubles);
    const auto row = [&](int64_t i) { return sums.data_ptr<double>() + i * channels; };
    batchnorm::DepthwiseGradients to{{},         nullptr,           nullptr,         row(kGamma),
                                     row(kBeta), row(kBeforeGamma), row(kBeforeBeta)};
    variable_list results(kCount);
    if (wanted[kX] || wanted[kBeforeWeight] || wanted[kBeforeBias]) {
      // Each channel of dy is read before that of dx is written.
      const bool is_over = dy.is_contiguous(c.format()) && dy.sizes() == c.x.sizes() && is_alone(dy);
      results[kX] = is_over ? dy : fresh_like(c.x, c.x.sizes());
      if (is_over) ++in_place;
      to.x = c.operand(results[kX]);
    }
    if (wanted[kKernels]) to.kernels = kernels.data_ptr<double>();
    if (wanted[kKernelBias]) to.bias = row(kConvolutionBias);
    DepthwiseCall(c, norm).backward(dy.contiguous(c.format()), to);
    if (!wanted[kX]) results[kX] = at::Tensor();
    if (wanted[kKernels]) results[kKernels] = kernels.to(c.kernels.scalar_type());
    const std::tuple<size_t, int64_t, const at::Tensor&> parameters[] = {{kWeight, kGamma, norm.weight},
                                                                         {kBias, kBeta, norm.bias},
                                                                         {kKernelBias, kConvolutionBias, c.bias},
                                                                         {kBeforeWeight, kBeforeGamma, c.before.weight},
                                                                         {kBeforeBias, kBeforeBeta, c.before.bias}};
    for (const auto& [which, of, parameter] : parameters)
      if (wanted[which]) results[which] = sums.select(0, of).to(parameter.scalar_type());
    return results;
  }

  // Through torch's convolution and the gradients of one layer at a time, which are differentiable.
  static variable_list composed(const at::Tensor& dy, const Convolution& c, const Norm& norm, const Wanted& wanted) {
    const bool want_before = c.before.is_there() && (wanted[kX] || wanted[kBeforeWeight] || wanted[kBeforeBias]);
    const bool want_input = wanted[kX] || want_before, want_z = want_input || wanted[kKernels] || wanted[kKernelBias];
    const at::Tensor input = c.before.is_there() ? normalized_again(c.x, c.before) : c.x;
    const auto of_norm = [](const at::Tensor& dy, const at::Tensor& x, const Norm& n, const Wanted& wanted) {
      return gradients(at::Tensor(dy), {x, n.weight, n.bias, {}, {}, n.mean, n.var, {}, {}}, n.settings, wanted);
    };
    variable_list results(kCount);
    const auto found = of_norm(dy, c.convolved(input), norm, {want_z, wanted[kWeight], wanted[kBias], false});
    results[kWeight] = found[1];
    results[kBias] = found[2];
    if (!want_z) return results;
    const auto bias_sizes = c.bias.defined() ? at::OptionalIntArrayRef(c.bias.sizes()) : at::OptionalIntArrayRef();
    std::tie(results[kX], results[kKernels], results[kKernelBias]) =
        at::convolution_backward(found[0], input, c.kernels, bias_sizes, c.stride, c.padding, c.dilation,
                                 /*transposed=*/false, std::vector<int64_t>(c.stride.size(), 0), c.x.size(1),
                                 {want_input, wanted[kKernels], wanted[kKernelBias]});
    if (!want_before) return results;
    const auto before =
        of_norm(results[kX], c.x, c.before, {wanted[kX], wanted[kBeforeWeight], wanted[kBeforeBias], false});
    results[kX] = before[0];
    results[kBeforeWeight] = before[1];
    results[kBeforeBias] = before[2];
    return results;
  }

  // The output of a normalization as a function of its input, by differentiable operations.
  static at::Tensor normalized_again(const at::Tensor& x, const Norm& n) {
    static const auto normalize = c10::Dispatcher::singleton().findSchemaOrThrow("batchnorm::normalize_again", "");
    torch::jit::Stack stack{x,
                            maybe(n.weight),
                            maybe(n.bias),
                            n.mean,
                            n.var,
                            n.settings.eps,
                            n.settings.activation,
                            n.settings.slope,
                            n.settings.population};
    normalize.callBoxed(stack);
    return stack[0].toTensor();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& each : saved) args.collect(each, false);
    for (const at::Tensor* each : {&mean, &var, &before_mean, &before_var}) args.collect(*each);
    for (const Settings* each : {&settings, &before}) collect(args, *each);
    for (const auto* each : {&stride, &padding, &dilation})
      for (int64_t number : *each) args.collect(number);
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& each : saved) swap.before(each);
    for (at::Tensor* each : {&mean, &var, &before_mean, &before_var}) swap.before(*each);
    PackedArgs packed;
    packed.pack(unpacked());
    packed.pack(variable_list{mean, var, before_mean, before_var});
    for (const Settings* each : {&settings, &before}) pack(packed, *each);
    packed.pack(wanted(kCount));
    packed.pack(int64_t(stride.size()));
    for (const auto* each : {&stride, &padding, &dilation})
      for (int64_t number : *each) packed.pack(number);
    auto results = call_packed(*this, dy, swap, std::move(packed).vec(), packed_gradients);
    for (SavedVariable& each : saved) swap.after(each);
    for (at::Tensor* each : {&mean, &var, &before_mean, &before_var}) swap.after(*each);
    return results;
  }

  static variable_list packed_gradients(const variable_list& dy, const std::vector<c10::IValue>& args) {
    PackedArgs packed(args);
    const auto t = packed.unpack<variable_list>();
    const auto statistics = packed.unpack<variable_list>();
    const Settings settings = unpack_settings(packed), before = unpack_settings(packed);
    const auto wanted = packed.unpack<Wanted>();
    Convolution c{t[kX], t[kKernels], t[kKernelBias], {}, {}, {}, {}};
    c.before = {t[kBeforeWeight], t[kBeforeBias], statistics[2], statistics[3], before};
    const auto axes = packed.unpack<int64_t>();
    for (auto* each : {&c.stride, &c.padding, &c.dilation})
      for (int64_t i = 0; i < axes; ++i) each->push_back(packed.unpack<int64_t>());
    if (!dy[0].defined()) return variable_list(kCount);
    return composed(dy[0], c, {t[kWeight], t[kBias], statistics[0], statistics[1], settings}, wanted);
  }
};

std::shared_ptr<const Source> source_of(const Convolution& c, const Norm& norm,
                                        const std::shared_ptr<const ConvolutionSource>& of_x) {
  auto source = std::make_shared<ConvolvedSource>();
  const OfBatchNorm* const made = c.x.is_view() ? nullptr : node_of(c.x);
  if (of_x) {
    source->of_x = of_x;
    source->holds_input = of_x->is_small;
  } else if (made && made->source && (made->forgets || recomputing > 0)) {
    source->of_input = made->source;
    source->depth = made->source->depth + 1;
    source->holds_input = 2 * c.x.nbytes() <= largest;
  } else {
    source->x = Operand(c.x);
  }
  source->convolution = {
      {}, {}, {}, c.stride, c.padding, c.dilation, {{}, {}, c.before.mean, c.before.var, c.before.settings}};
  source->kernels = copy_of(c.kernels);
  source->kernel_bias = copy_of(c.bias);
  source->before_weight = copy_of(c.before.weight);
  source->before_bias = copy_of(c.before.bias);
  source->weight = copy_of(norm.weight);
  source->bias = copy_of(norm.bias);
  source->mean = norm.mean;
  source->var = norm.var;
  source->settings = norm.settings;
  return source;
}

// A normalization of so many channels as a call asks for it: its statistics are the population's, or memory for those
// of the batch.
Norm norm_of(const Arguments& a) {
  const auto statistic = [&](const at::Tensor& running) {
    return a.use_batch ? fresh({1, a.x.size(1)}) : running.to(at::kDouble, false, true).view({1, -1});
  };
  return {a.weight, a.bias, statistic(a.running_mean), statistic(a.running_var), a.settings};
}

at::Tensor forward_convolved(const Arguments& a, Convolution c, const Arguments* before) {
  RECORD_FUNCTION("batchnorm::depthwise_batch_norm", c10::ArrayRef<const c10::IValue>());
  at::Tensor y;
  Norm norm;
  {
    at::NoGradGuard no_grad;
    norm = norm_of(a);
    if (before) c.before = norm_of(*before);
  }
  const bool needs_graph =
      torch::autograd::compute_requires_grad(c.x, c.kernels, c.bias, a.weight, a.bias, c.before.weight, c.before.bias);
  {
    at::NoGradGuard no_grad;
    if (needs_graph && a.is_in_context()) y = blocks.output(c.x, c.sizes());
    if (!y.defined()) y = fresh_like(c.x, c.sizes());
    DepthwiseCall(c, norm).forward(y);
  }
  if (needs_graph) {
    auto node = make_node<DepthwiseBatchNormBackward>();
    node->set_next_edges(
        torch::autograd::collect_next_edges(c.x, c.kernels, c.bias, a.weight, a.bias, c.before.weight, c.before.bias));
    node->settings = a.settings;
    node->version = int64_t(y._version());
    const at::Tensor* const tensors[] = {&c.x,    &c.kernels,       &c.bias,       &a.weight,
                                         &a.bias, &c.before.weight, &c.before.bias};
    for (size_t i = 0; i < DepthwiseBatchNormBackward::kCount; ++i) node->saved[i] = SavedVariable(*tensors[i], false);
    node->mean = norm.mean;
    node->var = norm.var;
    node->before_mean = c.before.mean;
    node->before_var = c.before.var;
    node->before = c.before.settings;
    node->stride = c.stride;
    node->padding = c.padding;
    node->dilation = c.dilation;
    node->forgets = a.output == Arguments::kMadeAgain;
    remakes = remakes || node->forgets;
    SavedVariable& x = node->saved[DepthwiseBatchNormBackward::kX];
    if (before && a.is_in_context() && !x.has_hooks()) node->of_x = convolution_before(c.x);
    if (node->of_x) x.register_hooks(std::make_unique<MadeAgain<ConvolutionSource>>(node->of_x, *node));
    if (a.makes_again()) node->source = source_of(c, norm, node->of_x);
    forget(x, *node, recomputing > 0 ? Forgets::every : Forgets::marked);
    torch::autograd::set_history(y, node);
  }
  if (before && before->update) update(*before, c.before.mean, c.before.var, before->values());
  if (a.update) update(a, norm.mean, norm.var, a.values());
  return y;
}
