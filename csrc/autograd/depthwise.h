// A depthwise convolution and the batch normalization of its output as one node: the output of the convolution is in no
// memory but the caches, and the backward makes it again. A part of autograd.cpp.

// ---------------------------------------------------------------------------------------------- depthwise convolutions
// What a call is given of it.
struct Convolution {
  at::Tensor x, kernels, bias;
  std::vector<int64_t> stride, padding, dilation;

  // Whether the kernels take it. What does not fit goes through torch's convolution, which raises its errors.
  bool fit() const {
    if (!x.defined() || !kernels.defined() || (x.dim() != 3 && x.dim() != 4) || kernels.dim() != x.dim()) return false;
    const size_t axes = size_t(x.dim()) - 2;
    for (const auto* each : {&stride, &padding, &dilation})
      if (each->size() != axes) return false;
    if (at::autocast::is_autocast_enabled(at::kCPU) || !lies_in_planes(x)) return false;
    if (kernels.size(0) != x.size(1) || kernels.size(1) != 1 || !kernels.is_contiguous()) return false;
    if (kernels.scalar_type() != x.scalar_type()) return false;
    if (bias.defined() && (bias.scalar_type() != x.scalar_type() || bias.dim() != 1 || bias.numel() != x.size(1) ||
                           !bias.is_contiguous()))
      return false;
    if (kernels.numel() / x.size(1) > batchnorm::kMostTaps || kernels.numel() == 0) return false;
    constexpr int64_t most = 1 << 12;  // far beyond any use
    for (size_t i = 0; i < axes; ++i)
      if (stride[i] < 1 || stride[i] > most || dilation[i] < 1 || dilation[i] > most || padding[i] < 0 ||
          padding[i] > most || out(i) < 1)
        return false;
    return true;
  }

  static bool lies_in_planes(const at::Tensor& t) {
    return t.numel() > 0 && t.is_contiguous() && t.suggest_memory_format() == at::MemoryFormat::Contiguous;
  }

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

  // By torch.
  at::Tensor convolved() const {
    return at::convolution(x, kernels, maybe(bias), stride, padding, dilation, /*transposed=*/false,
                           std::vector<int64_t>(stride.size(), 0), x.size(1));
  }
};

// Scratch memory that a thread keeps for its next call: pages that are there.
class Workspace {
 public:
  struct Held {
    std::unique_ptr<char[]> memory;
    size_t bytes = 0;
  };
  Held take(size_t bytes) {
    Held held = std::exchange(kept_, Held());
    if (held.bytes < bytes) held = {std::unique_ptr<char[]>(new char[bytes]), bytes};
    return held;
  }
  void give_back(Held&& held) {
    constexpr size_t most = 16 << 20;
    if (held.bytes <= most && held.bytes > kept_.bytes) kept_ = std::move(held);
  }

 private:
  Held kept_;
};
thread_local Workspace workspace;

// A call of the kernels: what they take besides the tensors that they write.
class DepthwiseCall {
 public:
  DepthwiseCall(const Convolution& c, const at::Tensor& mean, const at::Tensor& var, const Affine& affine,
                const Settings& settings)
      : c_(c), mean_(mean), var_(var), affine_(affine), settings_(settings), geometry_(c.geometry()) {
    const int64_t inner = geometry_.out[0] * geometry_.out[1];
    shape_ = {batchnorm::Order::planar, dtype_of(c.x), c.x.size(0), c.x.size(1), inner, c.x.size(0)};
    fusion_.activation = static_cast<batchnorm::Activation>(settings.activation);
    fusion_.slope = settings.slope;
    threads_ = at::in_parallel_region() ? 1 : at::get_num_threads();
    workspace_ = workspace.take(operators->depthwise_workspace_size(shape_, geometry_, threads_));
  }
  ~DepthwiseCall() { workspace.give_back(std::move(workspace_)); }
  DepthwiseCall(const DepthwiseCall&) = delete;

  void forward(const at::Tensor& y) const {
    operators->depthwise_forward(shape_, geometry_, input(), planes(y), mean_.data_ptr<double>(),
                                 var_.data_ptr<double>(), vector(affine_.weight), vector(affine_.bias), settings_.eps,
                                 fusion_, settings_.population, workspace_.memory.get(), threads_,
                                 operators->parallel());
  }
  void backward(const at::Tensor& dy, const batchnorm::DepthwiseGradients& to) const {
    operators->depthwise_backward(shape_, geometry_, input(), planes(dy), mean_.data_ptr<double>(),
                                  var_.data_ptr<double>(), vector(affine_.weight), vector(affine_.bias), settings_.eps,
                                  fusion_, settings_.population, to, workspace_.memory.get(), threads_,
                                 operators->parallel());
  }

  static batchnorm::Operand planes(const at::Tensor& t) {
    const int64_t inner = t.numel() / (t.size(0) * t.size(1));
    return {t.data_ptr(), t.size(1) * inner, inner};
  }

 private:
  static batchnorm::Dtype dtype_of(const at::Tensor& t) {
    switch (t.scalar_type()) {
      case at::kFloat: return batchnorm::Dtype::float32;
      case at::kDouble: return batchnorm::Dtype::float64;
      case at::kBFloat16: return batchnorm::Dtype::bfloat16;
      default: return batchnorm::Dtype::float16;
    }
  }
  static batchnorm::Vector vector(const at::Tensor& t) {
    return t.defined() ? batchnorm::Vector{t.const_data_ptr(), dtype_of(t)} : batchnorm::Vector{};
  }
  batchnorm::DepthwiseInput input() const {
    return {planes(c_.x), c_.kernels.const_data_ptr(), c_.bias.defined() ? c_.bias.const_data_ptr() : nullptr};
  }
  const Convolution& c_;
  const at::Tensor &mean_, &var_;
  const Affine affine_;
  const Settings settings_;
  batchnorm::Depthwise geometry_;
  batchnorm::Shape shape_{};
  batchnorm::Fusion fusion_;
  int64_t threads_;
  Workspace::Held workspace_;
};

// What an output was made of. The input is a tensor that the node keeps for itself, or is made again, too.
struct ConvolvedSource : Source {
  std::shared_ptr<const Source> of_input;
  Convolution convolution;  // x is undefined
  Operand kernels, kernel_bias;
  bool holds_input = false;  // for the node, which reads it next: it is so small that this moves no peak

  bool is_unchanged() const override {
    return Source::is_unchanged() && kernels.is_unchanged() && kernel_bias.is_unchanged() &&
           (!of_input || of_input->is_unchanged());
  }
  at::Tensor make() const override {
    Convolution c = convolution;
    c.x = of_input ? of_input->make() : x.tensor();
    if (of_input && holds_input) scratch.hold(of_input, c.x);
    c.kernels = kernels.tensor();
    c.bias = kernel_bias.tensor();
    Settings given = settings;
    given.population = true;  // by the statistics that the forward has found
    const at::Tensor y = fresh_like(c.x, c.sizes());
    DepthwiseCall(c, mean, var, {weight.tensor(), bias.tensor()}, given).forward(y);
    return y;
  }
};

// The gradients of x, of the kernels and their bias, of gamma and beta.
struct DepthwiseBatchNormBackward : OfBatchNorm {
  enum { kX, kKernels, kKernelBias, kWeight, kBias, kCount };
  SavedVariable saved[kCount];
  at::Tensor mean, var;
  std::vector<int64_t> stride, padding, dilation;

  std::string name() const override { return "DepthwiseBatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& each : saved) each.reset_data();
    source.reset();
  }

  variable_list apply(variable_list&& dy) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!dy[0].defined()) return variable_list(kCount);
    const variable_list tensors = unpacked();
    if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy[0]) ||
        !std::all_of(tensors.begin(), tensors.end(), is_plain))
      return composed(dy[0], convolution_of(tensors), {tensors[kWeight], tensors[kBias]}, mean, var, settings,
                      wanted());
    return by_kernels(std::move(dy[0]), tensors, wanted());
  }

  variable_list unpacked() const {
    variable_list tensors;
    for (const SavedVariable& each : saved) tensors.push_back(each.unpack());
    return tensors;
  }
  Convolution convolution_of(const variable_list& t) const {
    return {t[kX], t[kKernels], t[kKernelBias], stride, padding, dilation};
  }
  Wanted wanted() const {
    Wanted wanted(kCount);
    for (size_t i = 0; i < kCount; ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  variable_list by_kernels(at::Tensor&& dy, const variable_list& t, const Wanted& wanted) const {
    Convolution c = convolution_of(t);
    c.x = c.x.contiguous();  // hooks on saved tensors may have changed its order
    c.kernels = c.kernels.contiguous();
    const int64_t channels = mean.numel();
    at::Tensor sums = at::empty({3, channels}, mean.options()), kernels = at::empty(c.kernels.sizes(), mean.options());
    double* const sum = sums.data_ptr<double>();
    batchnorm::DepthwiseGradients to{{}, nullptr, nullptr, sum, sum + channels};
    variable_list results(kCount);
    if (wanted[kX]) {
      // Each channel of dy is read before that of dx is written.
      const bool is_over = dy.is_contiguous() && dy.sizes() == c.x.sizes() && is_alone(dy);
      results[kX] = is_over ? dy : fresh_like(c.x, c.x.sizes());
      if (is_over) ++in_place;
      to.x = DepthwiseCall::planes(results[kX]);
    }
    if (wanted[kKernels]) to.kernels = kernels.data_ptr<double>();
    if (wanted[kKernelBias]) to.bias = sum + 2 * channels;
    DepthwiseCall(c, mean, var, {t[kWeight], t[kBias]}, settings).backward(dy.contiguous(), to);
    if (wanted[kKernels]) results[kKernels] = kernels.to(c.kernels.scalar_type());
    const size_t rows[] = {kWeight, kBias, kKernelBias};
    for (size_t i = 0; i < 3; ++i)
      if (wanted[rows[i]]) results[rows[i]] = sums.select(0, int64_t(i)).to(t[rows[i]].scalar_type());
    return results;
  }

  // Through torch's convolution and the gradients of one layer, which are differentiable.
  static variable_list composed(const at::Tensor& dy, const Convolution& c, const Affine& affine,
                                const at::Tensor& mean, const at::Tensor& var, const Settings& settings,
                                const Wanted& wanted) {
    const bool want_input = wanted[kX] || wanted[kKernels] || wanted[kKernelBias];
    const Saved all{c.convolved(), affine.weight, affine.bias, {}, {}, mean, var, {}, {}};
    auto found = gradients(at::Tensor(dy), all, settings, {want_input, wanted[kWeight], wanted[kBias], false});
    variable_list results(kCount);
    results[kWeight] = found[1];
    results[kBias] = found[2];
    if (!want_input) return results;
    const auto bias_sizes = c.bias.defined() ? at::OptionalIntArrayRef(c.bias.sizes()) : at::OptionalIntArrayRef();
    std::tie(results[kX], results[kKernels], results[kKernelBias]) =
        at::convolution_backward(found[0], c.x, c.kernels, bias_sizes, c.stride, c.padding, c.dilation,
                                 /*transposed=*/false, std::vector<int64_t>(c.stride.size(), 0), c.x.size(1),
                                 {wanted[kX], wanted[kKernels], wanted[kKernelBias]});
    return results;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& each : saved) args.collect(each, false);
    for (const at::Tensor* each : {&mean, &var}) args.collect(*each);
    for (double each : {settings.eps, settings.slope}) args.collect(each);
    args.collect(settings.activation);
    args.collect(settings.population);
    for (const auto* each : {&stride, &padding, &dilation})
      for (int64_t number : *each) args.collect(number);
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& each : saved) swap.before(each);
    for (at::Tensor* each : {&mean, &var}) swap.before(*each);
    PackedArgs packed;
    packed.pack(unpacked());
    packed.pack(variable_list{mean, var});
    packed.pack(settings.eps);
    packed.pack(settings.slope);
    packed.pack(settings.activation);
    packed.pack(settings.population);
    packed.pack(wanted());
    packed.pack(int64_t(stride.size()));
    for (const auto* each : {&stride, &padding, &dilation})
      for (int64_t number : *each) packed.pack(number);
    auto results = call_packed(*this, dy, swap, std::move(packed).vec(), packed_gradients);
    for (SavedVariable& each : saved) swap.after(each);
    for (at::Tensor* each : {&mean, &var}) swap.after(*each);
    return results;
  }

  static variable_list packed_gradients(const variable_list& dy, const std::vector<c10::IValue>& args) {
    PackedArgs packed(args);
    const auto t = packed.unpack<variable_list>();
    const auto statistics = packed.unpack<variable_list>();
    Settings settings{};
    settings.eps = packed.unpack<double>();
    settings.slope = packed.unpack<double>();
    settings.activation = packed.unpack<int64_t>();
    settings.population = packed.unpack<bool>();
    const auto wanted = packed.unpack<Wanted>();
    Convolution c{t[kX], t[kKernels], t[kKernelBias], {}, {}, {}};
    const auto axes = packed.unpack<int64_t>();
    for (auto* each : {&c.stride, &c.padding, &c.dilation})
      for (int64_t i = 0; i < axes; ++i) each->push_back(packed.unpack<int64_t>());
    if (!dy[0].defined()) return variable_list(kCount);
    return composed(dy[0], c, {t[kWeight], t[kBias]}, statistics[0], statistics[1], settings, wanted);
  }
};

std::shared_ptr<const Source> source_of(const Arguments& a, const Convolution& c, const at::Tensor& mean,
                                        const at::Tensor& var) {
  auto source = std::make_shared<ConvolvedSource>();
  const OfBatchNorm* const before = c.x.is_view() ? nullptr : node_of(c.x);
  const bool forgets_input = before && before->source && (before->forgets || recomputing > 0);
  if (forgets_input) {
    source->of_input = before->source;
    source->depth = before->source->depth + 1;
    source->holds_input = 2 * c.x.nbytes() <= largest;
  } else {
    source->x = Operand(c.x);
  }
  source->convolution = {{}, {}, {}, c.stride, c.padding, c.dilation};
  source->kernels = copy_of(c.kernels);
  source->kernel_bias = copy_of(c.bias);
  source->weight = copy_of(a.weight);
  source->bias = copy_of(a.bias);
  source->mean = mean;
  source->var = var;
  source->settings = a.settings;
  return source;
}

at::Tensor forward_convolved(const Arguments& a, const Convolution& c) {
  RECORD_FUNCTION("batchnorm::depthwise_batch_norm", c10::ArrayRef<const c10::IValue>());
  const bool needs_graph = torch::autograd::compute_requires_grad(c.x, c.kernels, c.bias, a.weight, a.bias);
  at::Tensor y, mean, var;
  {
    at::NoGradGuard no_grad;
    const auto doubles = at::TensorOptions().dtype(at::kDouble);
    const auto statistic = [&](const at::Tensor& running) {
      return a.use_batch ? at::empty({1, c.x.size(1)}, doubles) : running.to(at::kDouble, false, true).view({1, -1});
    };
    mean = statistic(a.running_mean);
    var = statistic(a.running_var);
    y = needs_graph && a.is_in_context() ? blocks.output(c.x, c.sizes()) : at::Tensor();
    if (!y.defined()) y = fresh_like(c.x, c.sizes());
    DepthwiseCall(c, mean, var, {a.weight, a.bias}, a.settings).forward(y);
  }
  if (needs_graph) {
    auto node = make_node<DepthwiseBatchNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(c.x, c.kernels, c.bias, a.weight, a.bias));
    node->settings = a.settings;
    node->version = int64_t(y._version());
    const at::Tensor* const tensors[] = {&c.x, &c.kernels, &c.bias, &a.weight, &a.bias};
    for (size_t i = 0; i < DepthwiseBatchNormBackward::kCount; ++i) node->saved[i] = SavedVariable(*tensors[i], false);
    node->mean = mean;
    node->var = var;
    node->stride = c.stride;
    node->padding = c.padding;
    node->dilation = c.dilation;
    node->forgets = a.output == Arguments::kMadeAgain;
    remakes = remakes || node->forgets;
    if (a.makes_again()) node->source = source_of(a, c, mean, var);
    forget(node->saved[DepthwiseBatchNormBackward::kX], recomputing > 0 ? Forgets::every : Forgets::marked);
    torch::autograd::set_history(y, node);
  }
  if (a.update) update(a, mean, var, a.values());
  return y;
}
