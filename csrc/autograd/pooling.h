// A batch normalization and the largest values or the means of windows of its output as one node: the output itself is
// in no memory but the caches, and one byte a window tells where its largest value lies. A part of autograd.cpp.

// ---------------------------------------------------------------------------------------------- windows
// What a call is given of a pooling of images.
struct Windows {
  at::Tensor x;
  std::vector<int64_t> kernel, stride, padding;  // two of each
  bool ceil = false;                             // whether the last window may reach beyond the border
  bool mean = false;                             // of the windows, or else their largest values

  bool fit() const {
    if (!x.defined() || x.dim() != 4 || x.numel() == 0 || !x.is_contiguous() ||
        x.suggest_memory_format() != at::MemoryFormat::Contiguous)
      return false;
    for (const auto* each : {&kernel, &stride, &padding})
      if (each->size() != 2) return false;
    for (size_t i = 0; i < 2; ++i)
      if (kernel[i] < 1 || stride[i] < 1 || padding[i] < 0 || 2 * padding[i] > kernel[i] || out(i) < 1) return false;
    return kernel[0] * kernel[1] <= batchnorm::kMostPlaces;
  }

  int64_t out(size_t axis) const {
    const int64_t size = x.size(int64_t(axis) + 2), moves = size + 2 * padding[axis] - kernel[axis];
    if (moves < 0) return 0;
    const int64_t count = (moves + (ceil ? stride[axis] - 1 : 0)) / stride[axis] + 1;
    return ceil && (count - 1) * stride[axis] >= size + padding[axis] ? count - 1 : count;
  }

  std::vector<int64_t> sizes() const { return {x.size(0), x.size(1), out(0), out(1)}; }

  batchnorm::Pooling geometry() const {
    return {{x.size(2), x.size(3)}, {out(0), out(1)},         {kernel[0], kernel[1]},
            {stride[0], stride[1]}, {padding[0], padding[1]}, mean};
  }
};

// A call of the kernels.
class PooledCall {
 public:
  PooledCall(const Windows& w, const Norm& norm) : w_(w), geometry_(w.geometry()), norm_(call_of(norm)) {
    shape_ = {batchnorm::Order::planar,  dtype_of(w.x), w.x.size(0), w.x.size(1),
              w.x.size(2) * w.x.size(3), w.x.size(0)};
    threads_ = at::in_parallel_region() ? 1 : at::get_num_threads();
    workspace_ = workspace.take(operators->pooled_workspace_size(shape_, geometry_, threads_));
  }
  ~PooledCall() { workspace.give_back(std::move(workspace_)); }
  PooledCall(const PooledCall&) = delete;

  void forward(const at::Tensor& y, const at::Tensor& places) const {
    operators->pooled_forward(shape_, geometry_, planes(w_.x), norm_, planes(y), bytes_of(places), workspace_.get(),
                              threads_, operators->parallel());
  }
  void backward(const at::Tensor& dy, const at::Tensor& places, const at::Tensor& dx, double* gamma,
                double* beta) const {
    const batchnorm::Operand to = dx.defined() ? planes(dx) : batchnorm::Operand{};
    operators->pooled_backward(shape_, geometry_, planes(dy), bytes_of(places), planes(w_.x), norm_, to, gamma, beta,
                               workspace_.get(), threads_, operators->parallel());
  }

 private:
  static uint8_t* bytes_of(const at::Tensor& t) { return t.defined() ? t.data_ptr<uint8_t>() : nullptr; }
  static batchnorm::Operand planes(const at::Tensor& t) {
    const int64_t inner = t.size(2) * t.size(3);
    return {t.data_ptr(), t.size(1) * inner, inner};
  }

  const Windows& w_;
  batchnorm::Pooling geometry_;
  batchnorm::NormCall norm_;
  batchnorm::Shape shape_{};
  int64_t threads_;
  Workspace::Held workspace_;
};

// The gradients of x, of gamma and of beta.
struct PooledBatchNormBackward : OfBatchNorm {
  enum { kX, kWeight, kBias, kCount };
  SavedVariable saved[kCount];
  at::Tensor mean, var, places;
  std::vector<int64_t> kernel, stride, padding;
  bool ceil = false, of_means = false;

  std::string name() const override { return "PooledBatchNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& each : saved) each.reset_data();
    for (at::Tensor* each : {&mean, &var, &places}) each->reset();
  }

  variable_list unpacked() const {
    variable_list tensors;
    for (const SavedVariable& each : saved) tensors.push_back(each.unpack());
    return tensors;
  }

  variable_list apply(variable_list&& dy) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!dy[0].defined()) return variable_list(kCount);
    const variable_list t = unpacked();
    const Windows w{t[kX], kernel, stride, padding, ceil, of_means};
    const Norm norm{t[kWeight], t[kBias], mean, var, settings};
    const bool are_plain = std::all_of(t.begin(), t.end(), is_plain);
    if (at::GradMode::is_enabled() || is_watched() || !is_plain(dy[0]) || !are_plain)
      return composed(dy[0], w, norm, wanted(kCount));
    return by_kernels(dy[0], w, norm, wanted(kCount));
  }

  variable_list by_kernels(const at::Tensor& dy, Windows w, const Norm& norm, const Wanted& wanted) const {
    w.x = w.x.contiguous();  // hooks on saved tensors may have changed its order
    variable_list results(kCount);
    const at::Tensor sums = at::empty({2, mean.numel()}, mean.options());
    double* const sum = sums.data_ptr<double>();
    if (wanted[kX]) results[kX] = fresh_like(w.x, w.x.sizes());
    PooledCall(w, norm).backward(dy.contiguous(), places, results[kX], sum, sum + mean.numel());
    if (wanted[kWeight]) results[kWeight] = sums.select(0, 0).to(norm.weight.scalar_type());
    if (wanted[kBias]) results[kBias] = sums.select(0, 1).to(norm.bias.scalar_type());
    return results;
  }

  // Through torch's pooling and the gradients of a layer, which are differentiable.
  static variable_list composed(const at::Tensor& dy, const Windows& w, const Norm& norm, const Wanted& wanted) {
    const at::Tensor y = DepthwiseBatchNormBackward::normalized_again(w.x, norm).detach();
    const auto whole = w.mean ? at::avg_pool2d_backward(dy, y, w.kernel, w.stride, w.padding, w.ceil,
                                                        /*count_include_pad=*/true, /*divisor_override=*/std::nullopt)
                              : of_largest(dy, y, w);
    auto found = gradients(at::Tensor(whole), {w.x, norm.weight, norm.bias, {}, {}, norm.mean, norm.var, {}, {}},
                           norm.settings, {wanted[kX], wanted[kWeight], wanted[kBias], false});
    found.resize(kCount);
    return found;
  }

  static at::Tensor of_largest(const at::Tensor& dy, const at::Tensor& y, const Windows& w) {
    const std::vector<int64_t> dense{1, 1};
    const auto chosen = std::get<1>(at::max_pool2d_with_indices(y, w.kernel, w.stride, w.padding, dense, w.ceil));
    return at::max_pool2d_with_indices_backward(dy, y, w.kernel, w.stride, w.padding, dense, w.ceil, chosen);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& each : saved) args.collect(each, false);
    for (const at::Tensor* each : {&mean, &var}) args.collect(*each);
    collect(args, settings);
    for (const auto* each : {&kernel, &stride, &padding})
      for (int64_t number : *each) args.collect(number);
    args.collect(ceil);
    args.collect(of_means);
  }

  variable_list apply_with_saved(const variable_list& dy, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& each : saved) swap.before(each);
    for (at::Tensor* each : {&mean, &var}) swap.before(*each);
    PackedArgs packed;
    packed.pack(unpacked());
    packed.pack(variable_list{mean, var});
    pack(packed, settings);
    for (const auto* each : {&kernel, &stride, &padding})
      for (int64_t number : *each) packed.pack(number);
    packed.pack(ceil);
    packed.pack(of_means);
    packed.pack(wanted(kCount));
    auto results = call_packed(*this, dy, swap, std::move(packed).vec(), packed_gradients);
    for (SavedVariable& each : saved) swap.after(each);
    for (at::Tensor* each : {&mean, &var}) swap.after(*each);
    return results;
  }

  static variable_list packed_gradients(const variable_list& dy, const std::vector<c10::IValue>& args) {
    PackedArgs packed(args);
    const auto t = packed.unpack<variable_list>();
    const auto statistics = packed.unpack<variable_list>();
    const Settings settings = unpack_settings(packed);
    Windows w{t[kX], {}, {}, {}};
    for (auto* each : {&w.kernel, &w.stride, &w.padding})
      for (int i = 0; i < 2; ++i) each->push_back(packed.unpack<int64_t>());
    w.ceil = packed.unpack<bool>();
    w.mean = packed.unpack<bool>();
    const auto wanted = packed.unpack<Wanted>();
    if (!dy[0].defined()) return variable_list(kCount);
    return composed(dy[0], w, {t[kWeight], t[kBias], statistics[0], statistics[1], settings}, wanted);
  }
};

at::Tensor forward_pooled(const Arguments& a, const Windows& w) {
  RECORD_FUNCTION("batchnorm::pooled_batch_norm", c10::ArrayRef<const c10::IValue>());
  const bool needs_graph = torch::autograd::compute_requires_grad(w.x, a.weight, a.bias);
  at::Tensor y, places;
  Norm norm;
  {
    at::NoGradGuard no_grad;
    norm = norm_of(a);
    y = fresh_like(w.x, w.sizes());
    if (!w.mean) places = at::Tensor(at::detail::empty_cpu(w.sizes(), at::kByte));
    PooledCall(w, norm).forward(y, places);
  }
  if (needs_graph) {
    auto node = make_node<PooledBatchNormBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(w.x, a.weight, a.bias));
    node->settings = a.settings;
    node->version = int64_t(y._version());
    node->keeps_output = true;  // of which there is less than of the input
    const at::Tensor* const tensors[] = {&w.x, &a.weight, &a.bias};
    for (size_t i = 0; i < PooledBatchNormBackward::kCount; ++i) node->saved[i] = SavedVariable(*tensors[i], false);
    node->mean = norm.mean;
    node->var = norm.var;
    node->places = places;
    node->kernel = w.kernel;
    node->stride = w.stride;
    node->padding = w.padding;
    node->ceil = w.ceil;
    node->of_means = w.mean;
    forget(node->saved[PooledBatchNormBackward::kX], *node, recomputing > 0 ? Forgets::every : Forgets::marked);
    torch::autograd::set_history(y, node);
  }
  if (a.update) update(a, norm.mean, norm.var, a.values());
  return y;
}
