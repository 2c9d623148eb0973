// Depthwise convolutions with their normalization, and with that of their input, against a plain oracle: instruction
// set x dtype x way (planes one by one; rows of channels, all samples at once or some) x kernels, steps and borders x
// layouts of the operands, planes and rows; and what must hold exactly: the same bits for every number of threads and
// whatever the scratch memory holds, channels that do not reach one another, memory beside the elements left alone.
//
// The tolerances are derived. A sum of n products in a type of unit roundoff u is off by at most (n + 1) u times the
// sum of their magnitudes, the bias being one of them. The convolution's output is stored as an element: an error is
// left of it only where both ends of its range do not round to the same element. From there oracle.h carries the error
// through the normalization and the activation; at a kink within the error both sides count. The gradient of the
// convolution's output is stored as an element, too, and its error goes into the gradients of x, kernels and bias times
// the magnitude of what it is multiplied with. Gradients of kernels are added up in chains of at most kChain products,
// then in float64. What a normalization makes of the input is an element, too: its error goes into each product; and
// the gradient of it is an element before it goes through that normalization.
#include "depthwise.h"
#include "calls.h"

namespace test {
namespace {

using batchnorm::Depthwise;

constexpr int64_t kChain = 256;  // 128 vectors or places, and what the last row adds to them

// ---------------------------------------------------------------------------------------------- cases
struct Case {
  Depthwise d;
  Dtype dtype;
  Order order;
  int64_t samples, channels;
  bool has_before, has_bias, wants_x, wants_kernels, wants_bias;
  NormKind before, norm;
  Layout layout;
  uint64_t seed;

  int64_t inputs() const { return d.size[0] * d.size[1]; }
  int64_t outputs() const { return d.out[0] * d.out[1]; }
  Shape shape() const { return {order, dtype, samples, channels, outputs(), samples}; }
  bool is_local() const { return norm.population && (!has_before || before.population); }

  std::string text() const {
    char text[400];
    std::snprintf(text, sizeof(text),
                  "%s %s (%lld, %lld, %lld, %lld) kernel %lldx%lld stride %lldx%lld padding %lldx%lld dilation "
                  "%lldx%lld %s%s%s%s%s %s seed %llu",
                  format_of(dtype).name, order == Order::planar ? "planes" : "rows", (long long)samples,
                  (long long)channels, (long long)d.size[0], (long long)d.size[1], (long long)d.kernel[0],
                  (long long)d.kernel[1], (long long)d.stride[0], (long long)d.stride[1], (long long)d.padding[0],
                  (long long)d.padding[1], (long long)d.dilation[0], (long long)d.dilation[1], norm.text().c_str(),
                  has_bias ? " bias" : "", wants_x ? " dx" : "", wants_kernels ? " dkernels" : "",
                  wants_bias ? " dbias" : "", name_of(layout), (unsigned long long)seed);
    return text + (has_before ? " before: " + before.text() : "");
  }
};

// A tensor of so many places a sample, in planes or in rows.
class Values {
 public:
  Values(const Case& c, int64_t places, uint64_t salt)
      : rows_(c.order == Order::planar ? 0 : places), tensor_(shape(c, places), c.layout, salt) {}

  Operand operand() const {
    Operand o = tensor_.operand();
    if (rows_) o.sample_stride *= rows_;
    return o;
  }
  double get(int64_t n, int64_t k, int64_t i) const {
    return rows_ ? tensor_.get(n * rows_ + i, k, 0) : tensor_.get(n, k, i);
  }
  void set(int64_t n, int64_t k, int64_t i, double value) const {
    rows_ ? tensor_.set(n * rows_ + i, k, 0, value) : tensor_.set(n, k, i, value);
  }
  void append_plane(int64_t n, int64_t k, Bytes& all) const {
    if (!rows_) return tensor_.append_plane(n, k, all);
    for (int64_t i = 0; i < rows_; ++i) tensor_.append_plane(n * rows_ + i, k, all);
  }
  void append_to(Bytes& all) const { tensor_.append_to(all); }
  bool guards_intact() const { return tensor_.guards_intact(); }

 private:
  static Shape shape(const Case& c, int64_t places) {
    if (c.order == Order::planar) return {c.order, c.dtype, c.samples, c.channels, places, c.samples};
    return {c.order, c.dtype, c.samples * places, c.channels, 1, c.samples * places};
  }

  int64_t rows_;  // of a sample
  Tensor tensor_;
};

// Gives the output's size; whether there is an output.
bool set_output(Depthwise& d) {
  for (int axis : {0, 1}) {
    const int64_t moves = d.size[axis] + 2 * d.padding[axis] - (d.kernel[axis] - 1) * d.dilation[axis] - 1;
    if (moves < 0) return false;
    d.out[axis] = moves / d.stride[axis] + 1;
  }
  return true;
}

// f(output, tap, input) for each place of an output plane and each tap that reads a value of x for it.
template <class F>
void for_each_product(const Depthwise& d, F f) {
  for (int64_t r = 0; r < d.out[0]; ++r)
    for (int64_t s = 0; s < d.out[1]; ++s)
      for (int64_t i = 0; i < d.kernel[0]; ++i)
        for (int64_t j = 0; j < d.kernel[1]; ++j) {
          const int64_t row = r * d.stride[0] - d.padding[0] + i * d.dilation[0];
          const int64_t column = s * d.stride[1] - d.padding[1] + j * d.dilation[1];
          if (row < 0 || row >= d.size[0] || column < 0 || column >= d.size[1]) continue;
          f(r * d.out[1] + s, i * d.kernel[1] + j, row * d.size[1] + column);
        }
}

// ---------------------------------------------------------------------------------------------- the oracle
// The operands of a case, and what must come of them.
struct Problem {
  Case c;
  Random random;
  Values x, dy;
  Block kernels, bias;
  Norm before, norm;
  Boundeds inputs, z, d_kernels, d_bias;
  std::vector<Norm::Gradients> of_before, of_norm;  // of each channel; of_before has the gradient of x in any case

  explicit Problem(const Case& given)
      : c(given),
        random(c.seed * 1000003 + 1),
        x(c, c.inputs(), c.seed),
        dy(c, c.outputs(), c.seed + 1),
        kernels(c.dtype, c.channels * c.d.taps(), 0),
        bias(c.dtype, c.channels, 0),
        before(c.before, c.dtype, c.channels, c.samples * c.inputs(), random),
        norm(c.norm, c.dtype, c.channels, c.samples * c.outputs(), random),
        inputs(size_t(c.channels * before.count)),
        z(size_t(c.channels * norm.count)) {
    fill();
    for (int64_t k = 0; k < c.channels; ++k) {
      const Boundeds from = values_of(x, k, c.inputs());
      if (c.has_before) before.take_moments(k, from);
      for (size_t i = 0; i < from.size(); ++i)
        inputs[size_t(k * before.count) + i] = c.has_before ? element(before.result(k, from[i]), c.dtype) : from[i];
      convolve(k);
      norm.take_moments(k, outputs_of(k));
      differentiate(k);
    }
  }

  // Of one channel, all samples.
  Boundeds outputs_of(int64_t k) const {
    return Boundeds(z.begin() + k * norm.count, z.begin() + (k + 1) * norm.count);
  }

 private:
  void fill() {
    for (int64_t k = 0; k < c.channels; ++k) {
      const double offset = random.normal();
      const bool is_constant = random.below(12) == 0;  // a kernel of zeros
      for (int64_t n = 0; n < c.samples; ++n) {
        for (int64_t i = 0; i < c.inputs(); ++i) x.set(n, k, i, offset + random.normal());
        for (int64_t i = 0; i < c.outputs(); ++i) dy.set(n, k, i, 0.3 + random.normal());
      }
      for (int64_t t = 0; t < c.d.taps(); ++t) kernels.set(k * c.d.taps() + t, is_constant ? 0 : random.uniform(-1, 1));
      bias.set(k, random.uniform(-1, 1));
    }
  }

  Boundeds values_of(const Values& of, int64_t k, int64_t places) const {
    Boundeds values;
    for (int64_t n = 0; n < c.samples; ++n)
      for (int64_t i = 0; i < places; ++i) values.push_back({of.get(n, k, i), 0});
    return values;
  }
  // What the convolution reads: values and errors of one plane.
  struct Plane {
    std::vector<double> value, error;
  };
  Plane input_of(int64_t n, int64_t k) const {
    Plane plane;
    for (int64_t i = 0; i < c.inputs(); ++i) {
      const Bounded& v = inputs[size_t((k * c.samples + n) * c.inputs() + i)];
      plane.value.push_back(double(v.value));
      plane.error.push_back(double(v.error));
    }
    return plane;
  }
  std::vector<double> kernel_of(int64_t k) const {
    std::vector<double> values;
    for (int64_t t = 0; t < c.d.taps(); ++t) values.push_back(kernels.get(k * c.d.taps() + t));
    return values;
  }

  void convolve(int64_t k) {
    const std::vector<double> w = kernel_of(k);
    const double start = c.has_bias ? bias.get(k) : 0, own = products_error(c.dtype, c.d.taps());
    for (int64_t n = 0; n < c.samples; ++n) {
      const Plane from = input_of(n, k);
      std::vector<double> sum(size_t(c.outputs()), start), magnitude(sum.size(), std::fabs(start)), error(sum.size());
      for_each_product(c.d, [&](int64_t o, int64_t t, int64_t i) {
        sum[o] += w[t] * from.value[i];
        magnitude[o] += std::fabs(w[t] * from.value[i]);
        error[o] += std::fabs(w[t]) * from.error[i];
      });
      for (size_t o = 0; o < sum.size(); ++o)
        z[size_t((k * c.samples + n) * c.outputs()) + o] =
            element({sum[o], error[o] + own * (magnitude[o] + error[o])}, c.dtype);
    }
  }

  void differentiate(int64_t k) {
    of_norm.push_back(norm.differentiate(k, outputs_of(k), values_of(dy, k, c.outputs())));
    const Boundeds& dz = of_norm.back().x;
    const std::vector<double> w = kernel_of(k);
    std::vector<double> of_kernel(w.size(), 0.0), magnitude = of_kernel, error = of_kernel;
    double bias_value = 0, bias_magnitude = 0, bias_error = 0;
    Boundeds of_input;
    for (int64_t n = 0; n < c.samples; ++n) {
      std::vector<double> g, g_error;
      for (int64_t i = 0; i < c.outputs(); ++i) {
        const Bounded& element = dz[size_t(n * c.outputs() + i)];
        g.push_back(double(element.value));
        g_error.push_back(double(element.error));
        bias_value += g.back();
        bias_magnitude += std::fabs(g.back());
        bias_error += g_error.back();
      }
      const Plane from = input_of(n, k);
      std::vector<double> to(size_t(c.inputs()), 0.0), to_magnitude = to, to_error = to;
      for_each_product(c.d, [&](int64_t o, int64_t t, int64_t i) {
        to[i] += w[t] * g[o];
        to_magnitude[i] += std::fabs(w[t] * g[o]);
        to_error[i] += std::fabs(w[t]) * g_error[o];
        of_kernel[t] += from.value[i] * g[o];
        magnitude[t] += std::fabs(from.value[i] * g[o]);
        error[t] += std::fabs(from.value[i]) * g_error[o] + from.error[i] * (std::fabs(g[o]) + g_error[o]);
      });
      for (size_t i = 0; i < to.size(); ++i) {
        const Real own = products_error(c.dtype, c.d.taps()) * (to_magnitude[i] + to_error[i]);
        of_input.push_back(stored({to[i], to_error[i] + own}, c.dtype));
      }
    }
    const double of_doubles = 2 * kDouble * double(norm.count + 1);
    const double of_chain = products_error(c.dtype, std::min(kChain, norm.count)) + of_doubles;
    for (size_t t = 0; t < w.size(); ++t)
      d_kernels.push_back({of_kernel[t], error[t] + of_chain * (magnitude[t] + error[t])});
    d_bias.push_back({bias_value, bias_error + of_doubles * (bias_magnitude + bias_error)});
    of_before.push_back(c.has_before ? before.differentiate(k, values_of(x, k, c.inputs()), of_input)
                                     : Norm::Gradients{of_input, {}, {}});
  }
};

// ---------------------------------------------------------------------------------------------- the kernels
// Results of a case, of exactly their size, and NaN until they are written.
struct Result {
  Values y, dx;
  Doubles d_kernels, d_bias;
  NormResult before, norm;

  explicit Result(const Case& c)
      : y(c, c.outputs(), c.seed + 2),
        dx(c, c.inputs(), c.seed + 3),
        d_kernels(c.channels * c.d.taps()),
        d_bias(c.channels),
        before(c.channels),
        norm(c.channels) {}

  // All that belongs to one channel.
  Bytes channel(const Case& c, int64_t k) const {
    Bytes all;
    for (int64_t n = 0; n < c.samples; ++n) {
      y.append_plane(n, k, all);
      dx.append_plane(n, k, all);
    }
    const int64_t taps = c.d.taps();
    const auto append = [&](const Doubles& of, int64_t begin, int64_t count) {
      const char* const first = reinterpret_cast<const char*>(of.data() + begin);
      all.insert(all.end(), first, first + 8 * count);
    };
    append(d_kernels, k * taps, taps);
    append(d_bias, k, 1);
    before.append_to(k, all);
    norm.append_to(k, all);
    return all;
  }
  Bytes bytes(const Case& c) const {
    Bytes all;
    for (int64_t k = 0; k < c.channels; ++k) {
      const Bytes one = channel(c, k);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
};

std::unique_ptr<char[]> scratch(const Case& c, const Manner& how) {
  return how.scratch(batchnorm::depthwise_workspace_size(c.shape(), c.d, c.has_before, how.threads));
}

batchnorm::DepthwiseInput input_of(const Problem& p) {
  return {p.x.operand(), p.kernels.at(0), p.c.has_bias ? p.bias.at(0) : nullptr};
}

void backward(const Problem& p, const Manner& how, const Values& dy, const Values& dx, Result& r) {
  const Case& c = p.c;
  const std::unique_ptr<char[]> memory = scratch(c, how);
  const bool through = c.has_before && c.wants_x;
  const batchnorm::DepthwiseGradients to{c.wants_x ? dx.operand() : Operand{},
                                         c.wants_kernels ? r.d_kernels.data() : nullptr,
                                         c.wants_bias ? r.d_bias.data() : nullptr,
                                         r.norm.d_gamma.data(),
                                         r.norm.d_beta.data(),
                                         through ? r.before.d_gamma.data() : nullptr,
                                         through ? r.before.d_beta.data() : nullptr};
  const batchnorm::NormCall before = p.before.call();
  batchnorm::depthwise_backward(c.shape(), c.d, input_of(p), c.has_before ? &before : nullptr, p.norm.call(),
                                dy.operand(), to, memory.get(), how.threads, how.partition->parallel());
}

std::unique_ptr<Result> run(const Problem& p, const Manner& how) {
  const Case& c = p.c;
  auto r = std::make_unique<Result>(c);
  {
    const std::unique_ptr<char[]> memory = scratch(c, how);
    const batchnorm::NormCall before = p.before.call(r->before);
    batchnorm::depthwise_forward(c.shape(), c.d, input_of(p), c.has_before ? &before : nullptr, p.norm.call(r->norm),
                                 r->y.operand(), memory.get(), how.threads, how.partition->parallel());
  }
  backward(p, how, p.dy, r->dx, *r);
  return r;
}

// ---------------------------------------------------------------------------------------------- the checks
std::string fault_of(const Problem& p, const Result& r) {
  const Case& c = p.c;
  Judge judge;
  for (int64_t k = 0; k < c.channels; ++k) {
    std::string fault = p.norm.judge_statistics(judge, k, r.norm);
    if (c.has_before && fault.empty()) fault = p.before.judge_statistics(judge, k, r.before);
    if (!fault.empty()) return fault;
    // By the statistics that were returned.
    const Coefficients coefficients = p.norm.coefficients(k, r.norm.mean[k], r.norm.var[k]);
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t i = 0; i < c.outputs(); ++i) {
        const Bounded& z = p.z[size_t((k * c.samples + n) * c.outputs() + i)];
        judge.expect("y", n, k, i, r.y.get(n, k, i), stored(p.norm.result(coefficients, z), c.dtype));
      }
      for (int64_t i = 0; c.wants_x && i < c.inputs(); ++i)
        judge.expect("dx", n, k, i, r.dx.get(n, k, i), p.of_before[size_t(k)].x[size_t(n * c.inputs() + i)]);
    }
    for (int64_t t = 0; c.wants_kernels && t < c.d.taps(); ++t)
      judge.expect("d_kernels", 0, k, t, r.d_kernels[k * c.d.taps() + t], p.d_kernels[size_t(k * c.d.taps() + t)]);
    if (c.wants_bias) judge.expect("d_bias", 0, k, 0, r.d_bias[k], p.d_bias[size_t(k)]);
    p.of_norm[size_t(k)].judge(judge, k, r.norm);
    if (c.has_before && c.wants_x) p.of_before[size_t(k)].judge(judge, k, r.before);
  }
  return judge.fault;
}

// Values of one channel that are no numbers: other channels have the same bits as before, and with the statistics of
// the population, so have all places that they do not reach.
std::string fault_of_nonfinite(const Problem& p, const Result& before, const Manner& how) {
  const Case& c = p.c;
  Random random(c.seed + 77);
  const int64_t k = random.below(c.channels);
  const double values[] = {NAN, INFINITY, -INFINITY};
  std::vector<std::pair<int64_t, int64_t>> of_x, of_dy;  // sample and place
  std::vector<double> old_x, old_dy;
  std::vector<bool> reached_y(size_t(c.samples * c.outputs())), reached_x(size_t(c.samples * c.inputs()));
  for (int i = 0; i < 3; ++i) {
    of_x.emplace_back(random.below(c.samples), random.below(c.inputs()));
    old_x.push_back(p.x.get(of_x.back().first, k, of_x.back().second));
    p.x.set(of_x.back().first, k, of_x.back().second, values[random.below(3)]);
  }
  of_dy.emplace_back(random.below(c.samples), random.below(c.outputs()));
  old_dy.push_back(p.dy.get(of_dy[0].first, k, of_dy[0].second));
  p.dy.set(of_dy[0].first, k, of_dy[0].second, values[random.below(3)]);
  const std::unique_ptr<Result> after = run(p, how);
  for (size_t i = of_x.size(); i-- > 0;) p.x.set(of_x[i].first, k, of_x[i].second, old_x[i]);
  p.dy.set(of_dy[0].first, k, of_dy[0].second, old_dy[0]);

  for (int64_t other = 0; other < c.channels; ++other)
    if (other != k && before.channel(c, other) != after->channel(c, other))
      return "values of channel " + std::to_string(k) + " that are no numbers reach channel " + std::to_string(other);
  if (!c.is_local()) return "";
  for (const auto& [n, place] : of_x) {
    if (c.has_before) reached_x[size_t(n * c.inputs() + place)] = true;
    for_each_product(c.d, [&, n = n, place = place](int64_t o, int64_t, int64_t i) {
      if (i == place) reached_y[size_t(n * c.outputs() + o)] = true;
    });
  }
  std::vector<bool> reached_z = reached_y;
  reached_z[size_t(of_dy[0].first * c.outputs() + of_dy[0].second)] = true;
  for (int64_t n = 0; n < c.samples; ++n)
    for_each_product(c.d, [&](int64_t o, int64_t, int64_t i) {
      if (reached_z[size_t(n * c.outputs() + o)]) reached_x[size_t(n * c.inputs() + i)] = true;
    });
  const auto differs = [&](const Values& a, const Values& b, int64_t n, int64_t i) {
    return !(a.get(n, k, i) == b.get(n, k, i));
  };
  for (int64_t n = 0; n < c.samples; ++n) {
    for (int64_t i = 0; i < c.outputs(); ++i)
      if (!reached_y[size_t(n * c.outputs() + i)] && differs(before.y, after->y, n, i))
        return "values that are no numbers reach y[" + std::to_string(n) + ", " + std::to_string(k) + ", " +
               std::to_string(i) + "]";
    for (int64_t i = 0; c.wants_x && i < c.inputs(); ++i)
      if (!reached_x[size_t(n * c.inputs() + i)] && differs(before.dx, after->dx, n, i))
        return "values that are no numbers reach dx[" + std::to_string(n) + ", " + std::to_string(k) + ", " +
               std::to_string(i) + "]";
  }
  return "";
}

// The gradient of x in the place of that of y.
std::string fault_of_place(const Problem& p, const Result& right, const Manner& how) {
  const Case& c = p.c;
  Result r(c);
  const Values over(c, c.outputs(), c.seed + 3);  // strides of right.dx
  for (int64_t n = 0; n < c.samples; ++n)
    for (int64_t k = 0; k < c.channels; ++k)
      for (int64_t i = 0; i < c.outputs(); ++i) over.set(n, k, i, p.dy.get(n, k, i));
  backward(p, how, over, over, r);
  Bytes expected, given;
  right.dx.append_to(expected);
  over.append_to(given);
  if (expected != given) return "another gradient of x in the place of dy";
  return over.guards_intact() ? "" : "memory beside the gradient in the place of dy was written";
}

int64_t in_rows[4], in_planes[4], as_they_lie[4], cuts = 0;  // cases of each dtype; calls of Parallel

// A case in the way that the second cache tells, with several numbers of threads.
void examine_way(const Problem& p, const std::string& name) {
  const Case& c = p.c;
  now = name + " " + c.text();
  Partition partition;
  const Manner plain{1, char(-1), &partition};  // bytes of NaN
  const std::unique_ptr<Result> first = run(p, plain);
  tally(fault_of(p, *first));
  const Bytes bits = first->bytes(c);
  for (int64_t threads : {2, 3}) {
    Partition parts{threads == 3 && c.seed % 8 == 0};
    const std::unique_ptr<Result> other = run(p, {threads, char(threads == 2 ? 0x3c : 0), &parts});
    check(other->bytes(c) == bits, threads == 2 ? "other bits with two threads" : "other bits with three threads");
    check(other->y.guards_intact() && other->dx.guards_intact(), "memory beside the results was written");
    cuts += parts.calls;
  }
  tally(fault_of_nonfinite(p, *first, plain));
  if (c.wants_x && c.inputs() == c.outputs()) tally(fault_of_place(p, *first, plain));
  check(first->y.guards_intact() && first->dx.guards_intact(), "memory beside the results was written");
}

int64_t lanes_of(Dtype dtype) { return batchnorm::kernel_table().lanes / (dtype == Dtype::float64 ? 2 : 1); }

void examine(const Case& c) {
  const Problem p(c);
  Bytes before, after;
  const auto append_operands = [&](Bytes& to) {
    p.x.append_to(to);
    p.dy.append_to(to);
    p.norm.append_statistics(to);
    p.before.append_statistics(to);
  };
  append_operands(before);
  for (const char* isa : {"avx512", "avx2", "neon", "baseline"}) {
    if (!batchnorm::select_instruction_set(isa)) continue;
    const std::string name = isa;
    const int64_t lanes = lanes_of(c.dtype), size = format_of(c.dtype).size, bytes = 2 * lanes * p.norm.count * size;
    test_caches.l2 = 1;
    if (c.order == Order::interleaved) {
      ++as_they_lie[int(c.dtype)];
      examine_way(p, name + " rows, one sample at a time");
      if (c.samples == 1 || c.has_before) continue;  // all samples at once in any case
      test_caches.l2 = c.samples > 2 ? 4 * 2 * c.inputs() * lanes * size : int64_t(1) << 40;
      examine_way(p, name + (c.samples > 2 ? " rows, two samples at a time" : " rows"));
      continue;
    }
    examine_way(p, name + " planes");
    ++in_planes[int(c.dtype)];
    if (c.channels < 2 * lanes) continue;
    test_caches.l2 = int64_t(1) << 40;
    examine_way(p, name + " rows");
    ++in_rows[int(c.dtype)];
    if (c.samples > 1 && !c.has_before) {  // the least that takes this way: then not all samples' inputs fit
      test_caches.l2 = c.d.stride[0] > 1 || c.d.stride[1] > 1 ? (bytes + 3) / 4 : bytes;
      examine_way(p, name + " rows, some samples at a time");
    }
  }
  append_operands(after);
  check(before == after && p.x.guards_intact() && p.dy.guards_intact(), "operands were written");
}

// ---------------------------------------------------------------------------------------------- the cases
// Whatever a case is not told: by its seed.
Case drawn(const Depthwise& d, Dtype dtype, int64_t samples, int64_t channels, uint64_t seed) {
  Random random(seed * 7919 + 13);
  Case c{};
  c.d = d;
  c.dtype = dtype;
  c.samples = samples;
  c.channels = channels;
  c.order = random.below(3) ? Order::planar : Order::interleaved;
  c.has_before = random.below(5) < 2;
  c.before = NormKind::drawn(random);
  c.norm = NormKind::drawn(random);
  c.has_bias = random.below(2);
  c.wants_x = random.below(5) != 0;
  c.wants_kernels = random.below(5) != 0;
  c.wants_bias = c.has_bias && random.below(4) != 0;
  const Layout layouts[] = {Layout::dense, Layout::misaligned, Layout::padded, Layout::aligned, Layout::transposed};
  c.layout = layouts[random.below(c.order == Order::planar ? 5 : 2)];  // rows have no gaps
  c.seed = seed;
  return c;
}

uint64_t seed = 0;
void examine_all(const Depthwise& d, int64_t samples, int64_t channels) {
  for (Dtype dtype : kDtypes)
    if (!is_left_out(++seed)) examine(drawn(d, dtype, samples, channels, seed));
}

constexpr int64_t kKernels[][2] = {{1, 1}, {3, 3}, {5, 5}, {7, 1}, {1, 9}, {2, 2}, {4, 3}};

// All kernels and strides; few channels of larger planes, then more channels of smaller ones.
void geometries() {
  Random random(1);
  for (bool many : {false, true})
    for (const auto& kernel : kKernels)
      for (int64_t down = 1; down <= 3; ++down)
        for (int64_t across = 1; across <= 3; ++across) {
          Depthwise d{{}, {}, {kernel[0], kernel[1]}, {down, across}, {}, {}};
          do {
            for (int axis : {0, 1}) {
              d.size[axis] = 1 + random.below(many ? 12 : random.below(4) ? 19 : axis ? 33 : 40);
              d.padding[axis] = random.below(d.kernel[axis] + 1);
              d.dilation[axis] = 1 + random.below(3);
            }
          } while (!set_output(d));
          const int64_t samples = 1 + random.below(many ? 4 : 9);
          examine_all(d, samples, many ? 8 + random.below(33) : 1 + random.below(3));
        }
}

// Kernels without steps, which have loops of their own, with each padding, and sizes around the vectors.
void dense() {
  Random random(2);
  for (bool many : {false, true})
    for (int64_t size : {1, 2, 3, 5, 7, 9})
      for (int64_t padding = 0; padding <= size; padding += size > 5 ? 2 : 1) {
        Depthwise d{{}, {}, {size, size}, {1, 1}, {padding, padding}, {1, 1}};
        do {
          d.size[0] = 1 + random.below(many ? 9 : 20);
          d.size[1] = 1 + random.below(many ? 18 : 33);
          if (random.below(4) == 0) d.padding[random.below(2)] = random.below(size + 1);
        } while (!set_output(d));
        examine_all(d, 1 + random.below(many ? 3 : 4), many ? 16 + random.below(25) : 1 + random.below(2));
      }
}

// What is rare: borders wider than the kernel, long steps, kernels larger than the plane, planes of one row, and as
// many taps as there may be.
void rare() {
  Random random(3);
  const int64_t most = batchnorm::kMostTaps;
  const int64_t kernels[][2] = {{1, 1}, {3, 3}, {5, 5}, {1, 9}, {2, 2}, {4, 3}, {7, 7}, {16, most / 16}, {1, most}};
  for (bool many : {false, true})
    for (const auto& kernel : kernels)
      for (int round = many ? 1 : 0; round < (many && kernel[0] * kernel[1] > 99 ? 2 : 3); ++round) {
        Depthwise d{{}, {}, {kernel[0], kernel[1]}, {}, {}, {}};
        do {
          for (int axis : {0, 1}) {
            d.size[axis] = 1 + random.below(axis ? many ? 9 : 15 : round ? 7 : 1);
            d.padding[axis] = random.below(kernel[axis] > 9 ? kernel[axis] : round ? kernel[axis] + 3 : 12);
            d.stride[axis] = 1 + random.below(round == 1 ? 7 : 2);
            d.dilation[axis] = 1 + random.below(round == 2 ? 7 : 1);
          }
        } while (!set_output(d));
        examine_all(d, 1 + random.below(3), many ? 32 + random.below(5) : 1 + random.below(2));
      }
}

// Planes of few values, of more samples than are walked as one run.
void many_samples() {
  const auto each = [&](int64_t rows, int64_t columns, int64_t kernel, int64_t padding, int64_t samples) {
    Depthwise d{{rows, columns}, {}, {kernel, kernel}, {1, 1}, {padding, padding}, {1, 1}};
    set_output(d);
    for (Dtype dtype : kDtypes) {
      Case c = drawn(d, dtype, samples, 2, ++seed);
      c.wants_kernels = true;
      if (!is_left_out(seed)) examine(c);
    }
  };
  each(1, 1, 1, 0, 4101);
  each(1, 1, 3, 1, 1031);
  each(1, 3, 1, 0, 1366);
  each(2, 1, 1, 0, 2049);
  each(1, 5, 1, 0, 1640);
  each(2, 2, 2, 0, 459);
  each(4, 4, 3, 1, 263);
}

// Chunks of several channels, and a last one of fewer; large planes; pools of so many values that 16-bit ones are added
// up in float32.
void large() {
  Depthwise d{{6, 7}, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}};
  for (int64_t stride : {1, 2}) {
    d.stride[0] = d.stride[1] = stride;
    set_output(d);
    // The verbs that `examine` sees have chunks of one channel or one vector: here they have more.
    for (Dtype dtype : kDtypes) {
      Case of_planes = drawn(d, dtype, 3, 101, ++seed);
      of_planes.order = Order::planar;
      const Problem planes(of_planes), rows(drawn(d, dtype, 1, 261, ++seed));
      for (const char* isa : {"avx512", "avx2", "neon", "baseline"}) {
        if (!batchnorm::select_instruction_set(isa)) continue;
        test_caches.l2 = int64_t(1) << 40;
        examine_way(rows, std::string(isa) + " rows, chunks of vectors");
        // Two or three planes a chunk; too little for rows where vectors are long.
        const int64_t outputs = 2 * planes.norm.count * format_of(dtype).size;
        test_caches.l2 = 2 * 3 * (outputs + 3 * 42 * format_of(dtype).size);
        examine_way(planes, std::string(isa) + " chunks of planes");
      }
    }
  }
  // An input of far more places than the output, normalized first.
  Depthwise sparse{{80, 90}, {}, {3, 3}, {40, 30}, {1, 1}, {1, 1}};
  set_output(sparse);
  for (Order order : {Order::planar, Order::interleaved})
    for (Dtype dtype : kDtypes) {
      Case c = drawn(sparse, dtype, 2, 3, ++seed);
      c.order = order;
      c.layout = Layout::misaligned;
      c.has_before = c.wants_x = true;
      if (!is_left_out(seed)) examine(c);
    }
  for (int64_t size : {3, 5}) {
    Depthwise e{{40, 33}, {}, {size, size}, {1, 1}, {size / 2, size / 2}, {1, 1}};
    set_output(e);
    examine_all(e, 9, 1);
    e.stride[0] = e.stride[1] = 2;
    set_output(e);
    examine_all(e, 9, 1);
  }
  Depthwise wide{{66, 70}, {}, {7, 1}, {1, 1}, {3, 0}, {1, 1}};
  set_output(wide);
  examine_all(wide, 2, 1);
  Depthwise across{{40, 33}, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}};
  set_output(across);
  examine(drawn(across, Dtype::bfloat16, 7, 33, ++seed));
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  begin_tally();
  geometries();
  dense();
  rare();
  many_samples();
  large();
  now = "coverage";
  for (Dtype dtype : kDtypes)
    check(in_planes[int(dtype)] > 0 && in_rows[int(dtype)] > 0 && as_they_lie[int(dtype)] > 0, "a way was not taken");
  check(cuts > 0, "no call was cut for threads");
  return end_tally();
}
