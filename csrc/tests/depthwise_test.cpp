// Depthwise convolutions with their normalization against a plain oracle: instruction set x dtype x way (planes one by
// one; rows of channels, all samples at once or some) x kernels, steps and borders x layouts of the operands; and what
// must hold exactly: the same bits for every number of threads and whatever the scratch memory holds, channels that do
// not reach one another, memory beside the elements left alone.
//
// The tolerances are derived. A sum of n products in a type of unit roundoff u is off by at most (n + 1) u times the
// sum of their magnitudes, the bias being one of them. The convolution's output is stored as an element: an error is
// left of it only where both ends of its range do not round to the same element. From there oracle.h carries the error
// through the normalization and the activation; at a kink within the error both sides count. The gradient of the
// convolution's output is stored as an element, too, and its error goes into the gradients of x, kernels and bias times
// the magnitude of what it is multiplied with. Gradients of kernels are added up in chains of at most kChain products,
// then in float64.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "depthwise.h"
#include "kernels.h"
#include "memory.h"
#include "oracle.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace test {
namespace {

batchnorm::Caches test_caches{32 << 10, 512 << 10, 32 << 20};

}  // namespace
}  // namespace test

namespace batchnorm {

// The size of the second cache tells which way a case goes.
const Caches& caches() { return test::test_caches; }

}  // namespace batchnorm

namespace test {
namespace {

using batchnorm::Depthwise;
using batchnorm::Vector;
using Bytes = std::vector<char>;

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
constexpr double kEps = 1e-5, kSlope = 0.01;
constexpr double kDouble = 0x1p-53;
constexpr int64_t kChain = 256;  // 128 vectors or places, and what the last row adds to them

// ---------------------------------------------------------------------------------------------- the tally
int64_t passed = 0, failed = 0;
std::string now;  // what is being checked, for the report of a sanitizer too

void tally(const std::string& fault) {
  if (fault.empty())
    ++passed;
  else if (++failed <= 20)
    std::printf("FAILED %s\n       %s\n", now.c_str(), fault.c_str());
}
void check(bool condition, const char* what) { tally(condition ? "" : what); }

// ---------------------------------------------------------------------------------------------- partitions
// Runs each of the range's values alone, on a thread of its own or last to first on this one.
struct Partition {
  bool threads = false;
  int64_t calls = 0;
  batchnorm::Parallel parallel() { return {&run, this}; }
  static void run(void* self, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    Partition& p = *static_cast<Partition*>(self);
    ++p.calls;
    if (!p.threads) {
      for (int64_t k = count - 1; k >= 0; --k) body(context, k, k + 1);
      return;
    }
    std::vector<std::thread> workers;
    for (int64_t k = 0; k < count; ++k) workers.emplace_back(body, context, k, k + 1);
    for (std::thread& each : workers) each.join();
  }
};

// ---------------------------------------------------------------------------------------------- cases
enum Affine { kNone, kSingle, kOwn };  // gamma and beta: absent, of float32, of the dtype of x

struct Case {
  Depthwise d;
  Dtype dtype;
  int64_t samples, channels;
  Activation activation;
  bool population, has_bias, wants_x, wants_kernels, wants_bias;
  Affine affine;
  Layout layout;
  uint64_t seed;

  int64_t inputs() const { return d.size[0] * d.size[1]; }
  int64_t outputs() const { return d.out[0] * d.out[1]; }
  Shape shape(int64_t inner) const { return {Order::planar, dtype, samples, channels, inner, samples}; }

  std::string text() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "%s x (%lld, %lld, %lld, %lld) kernel %lldx%lld stride %lldx%lld padding %lldx%lld dilation "
                  "%lldx%lld activation %d%s%s%s%s%s affine %d %s seed %llu",
                  format_of(dtype).name, (long long)samples, (long long)channels, (long long)d.size[0],
                  (long long)d.size[1], (long long)d.kernel[0], (long long)d.kernel[1], (long long)d.stride[0],
                  (long long)d.stride[1], (long long)d.padding[0], (long long)d.padding[1], (long long)d.dilation[0],
                  (long long)d.dilation[1], int(activation), population ? " population" : "", has_bias ? " bias" : "",
                  wants_x ? " dx" : "", wants_kernels ? " dkernels" : "", wants_bias ? " dbias" : "", int(affine),
                  name_of(layout), (unsigned long long)seed);
    return text;
  }
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

double rounded(Dtype dtype, double value) {
  char bytes[8];
  encode(dtype, value, bytes);
  return decode(dtype, bytes);
}

// ---------------------------------------------------------------------------------------------- the oracle
// The operands of a case, and what must come of them.
struct Problem {
  Case c;
  Tensor x, dy;
  Block kernels, bias, gamma, beta;
  Doubles mean, var;  // of the batch, or of the population
  std::vector<Bounded> z, mean_right, var_right, dx, d_kernels, d_bias, d_gamma, d_beta;

  explicit Problem(const Case& given)
      : c(given),
        x(c.shape(c.inputs()), c.layout, c.seed),
        dy(c.shape(c.outputs()), c.layout, c.seed + 1),
        kernels(c.dtype, c.channels * c.d.taps(), 0),
        bias(c.dtype, c.channels, 0),
        gamma(affine_dtype(), c.channels, 0),
        beta(affine_dtype(), c.channels, 0),
        mean(c.channels),
        var(c.channels) {
    fill();
    convolve();
    take_moments();
    differentiate();
  }

  Dtype affine_dtype() const { return c.affine == kOwn ? c.dtype : Dtype::float32; }
  Vector vector(const Block& of) const { return c.affine == kNone ? Vector{} : Vector{of.at(0), affine_dtype()}; }
  Coefficients coefficients(int64_t channel, double mean, double var) const {
    if (c.affine == kNone) return {mean, var, 1, 0, kEps};
    return {mean, var, gamma.get(channel), beta.get(channel), kEps};
  }
  size_t at(int64_t n, int64_t channel) const { return size_t((n * c.channels + channel) * c.outputs()); }
  int64_t count() const { return c.samples * c.outputs(); }

  // The value before the activation.
  Bounded normalized(const Coefficients& k, const Precision& precision, const Bounded& v, bool line) const {
    Bounded result = pre_activation(k, precision, v.value, 0, line);
    result.error += std::fabs(k.scale()) * v.error;
    return result;
  }

 private:
  double unit() const { return c.dtype == Dtype::float64 ? kDouble : 0x1p-24; }  // of what is computed in
  // Of a sum of so many products; the oracle's own are those of float64.
  double products_error(int64_t count) const { return double(count + 1) * (unit() + kDouble); }

  void fill() {
    Random random(c.seed * 1000003 + 1);
    for (int64_t k = 0; k < c.channels; ++k) {
      const double offset = random.normal();
      const bool is_constant = random.below(12) == 0;  // a kernel of zeros
      for (int64_t n = 0; n < c.samples; ++n) {
        for (int64_t i = 0; i < c.inputs(); ++i) x.set(n, k, i, offset + random.normal());
        for (int64_t i = 0; i < c.outputs(); ++i) dy.set(n, k, i, 0.3 + random.normal());
      }
      for (int64_t t = 0; t < c.d.taps(); ++t) kernels.set(k * c.d.taps() + t, is_constant ? 0 : random.uniform(-1, 1));
      bias.set(k, random.uniform(-1, 1));
      gamma.set(k, random.uniform(0.5, 2) * (random.below(3) ? 1 : -1));
      beta.set(k, random.uniform(-1, 2));
      mean[k] = 0.3 * random.normal();
      var[k] = random.uniform(0.5, 4);
    }
  }

  std::vector<double> plane_of(const Tensor& t, int64_t n, int64_t k, int64_t places) const {
    std::vector<double> values(size_t(places), 0.0);
    for (int64_t i = 0; i < places; ++i) values[size_t(i)] = t.get(n, k, i);
    return values;
  }
  std::vector<double> kernel_of(int64_t k) const {
    std::vector<double> values;
    for (int64_t t = 0; t < c.d.taps(); ++t) values.push_back(kernels.get(k * c.d.taps() + t));
    return values;
  }

  void convolve() {
    z.resize(size_t(c.samples * c.channels * c.outputs()));
    for (int64_t n = 0; n < c.samples; ++n)
      for (int64_t k = 0; k < c.channels; ++k) {
        const std::vector<double> from = plane_of(x, n, k, c.inputs()), w = kernel_of(k);
        const double start = c.has_bias ? bias.get(k) : 0;
        std::vector<double> sum(size_t(c.outputs()), start), magnitude(sum.size(), std::fabs(start));
        for_each_product(c.d, [&](int64_t o, int64_t t, int64_t i) {
          sum[o] += w[t] * from[i];
          magnitude[o] += std::fabs(w[t] * from[i]);
        });
        for (size_t o = 0; o < sum.size(); ++o) {
          const double error = products_error(c.d.taps()) * magnitude[o], value = rounded(c.dtype, sum[o]);
          const double low = rounded(c.dtype, sum[o] - error), high = rounded(c.dtype, sum[o] + error);
          z[at(n, k) + o] = {value, std::max(high - value, value - low)};
        }
      }
  }

  // f(value of z) for all of a channel.
  template <class F>
  void for_channel(int64_t k, F f) const {
    for (int64_t n = 0; n < c.samples; ++n)
      for (int64_t i = 0; i < c.outputs(); ++i) f(z[at(n, k) + size_t(i)]);
  }

  void take_moments() {
    if (c.population) return;
    const Real relative = sum_error(c.dtype, count());
    for (int64_t k = 0; k < c.channels; ++k) {
      Real sum = 0, errors = 0, square = 0, square_errors = 0, reach = 0;
      for_channel(k, [&](const Bounded& v) { sum += v.value, errors += v.error; });
      const Real m = sum / count(), mean_error = errors / count();
      for_channel(k, [&](const Bounded& v) {
        const Real away = std::fabs(v.value - m), error = v.error + mean_error;
        square += away * away;
        square_errors += (2 * away + error) * error;
        reach = std::max(reach, away);
      });
      const Real v = square / count(), rounding = 0x1p-52L * std::fabs(m);
      mean_right.push_back({m, mean_error + relative * (std::sqrt(v) + reach) + rounding});
      var_right.push_back({v, square_errors / count() + relative * (v + reach * reach) + rounding * rounding});
      mean[k] = double(m);
      var[k] = double(v);
    }
  }

  // By the statistics above.
  void differentiate() {
    const Precision precision(c.dtype, count());
    const Curve curve{c.activation, kSlope, precision};
    const bool is_rounded =
        unit_of_elements() > 0x1p-20L && c.activation > Activation::leaky_relu;  // between two phases
    const Real relative = sum_error(c.dtype, count()), tiny = 2 * smallest_term(c.dtype, count());
    dx.resize(size_t(c.samples * c.channels * c.inputs()));
    std::vector<Bounded> dzs(z.size() / size_t(c.channels));
    for (int64_t k = 0; k < c.channels; ++k) {
      const Coefficients coefficients = this->coefficients(k, mean[k], var[k]);
      const Real m = Real(count()), inv_std = 1 / std::sqrt(coefficients.var + kEps), scale = coefficients.scale();
      Bounded sum, centered;
      const auto add = [&](Bounded& to, const Bounded& dz, Real factor, Real factor_error) {
        to.value += dz.value * factor;
        to.error += (std::fabs(factor) + factor_error) * (dz.error + relative * std::fabs(dz.value)) +
                    factor_error * std::fabs(dz.value) + tiny * (1 + std::fabs(factor));
      };
      const Real mean_step = in_float32(c.dtype, count()) ? 0x1p-24L * std::fabs(coefficients.mean) : 0;
      for (int64_t n = 0; n < c.samples; ++n)
        for (int64_t i = 0; i < c.outputs(); ++i) {
          const Bounded& v = z[at(n, k) + size_t(i)];
          const Bounded dz =
              curve.gated(curve.derivative(normalized(coefficients, precision, v, false)), dy.get(n, k, i));
          dzs[size_t(n * c.outputs() + i)] = dz;
          add(sum, dz, 1, 0);
          add(centered, dz, v.value - coefficients.mean, v.error + mean_step);
        }
      const Real roundings = 8 * Real(kDouble);
      d_beta.push_back({sum.value, sum.error + roundings * std::fabs(sum.value)});
      d_gamma.push_back({centered.value * inv_std, inv_std * (centered.error + roundings * std::fabs(centered.value))});
      const Real second = c.population ? 0 : -scale * inv_std * inv_std / m, third = c.population ? 0 : -scale / m;
      const Real k2 = second * centered.value, k3 = third * sum.value;
      const Real k2_error = std::fabs(second) * centered.error, k3_error = std::fabs(third) * sum.error;
      std::vector<double> of_kernel(size_t(c.d.taps()), 0.0), magnitude = of_kernel, error = of_kernel;
      const std::vector<double> w = kernel_of(k);
      double bias_value = 0, bias_magnitude = 0, bias_error = 0;
      for (int64_t n = 0; n < c.samples; ++n) {
        std::vector<double> g, g_error;
        for (int64_t i = 0; i < c.outputs(); ++i) {
          const Bounded &v = z[at(n, k) + size_t(i)], dz = dzs[size_t(n * c.outputs() + i)];
          const Bounded between = is_rounded ? stored(dz, c.dtype) : dz;
          Bounded right = input_gradient({between.value, between.error}, scale, k2, k3, v.value, mean[k], precision);
          const Real away = std::fabs(v.value - Real(mean[k]));
          right.error += (away + v.error) * k2_error + k3_error + std::fabs(k2) * v.error;
          const Bounded element = stored(right, c.dtype);
          g.push_back(double(element.value));
          g_error.push_back(double(element.error));
          bias_value += g.back();
          bias_magnitude += std::fabs(g.back());
          bias_error += g_error.back();
        }
        const std::vector<double> from = plane_of(x, n, k, c.inputs());
        std::vector<double> to(size_t(c.inputs()), 0.0), to_magnitude = to, to_error = to;
        for_each_product(c.d, [&](int64_t o, int64_t t, int64_t i) {
          to[i] += w[t] * g[o];
          to_magnitude[i] += std::fabs(w[t] * g[o]);
          to_error[i] += std::fabs(w[t]) * g_error[o];
          of_kernel[t] += from[i] * g[o];
          magnitude[t] += std::fabs(from[i] * g[o]);
          error[t] += std::fabs(from[i]) * g_error[o];
        });
        for (size_t i = 0; i < to.size(); ++i) {
          const Real own = products_error(c.d.taps()) * (to_magnitude[i] + to_error[i]);
          dx[size_t((n * c.channels + k) * c.inputs()) + i] = stored({to[i], to_error[i] + own}, c.dtype);
        }
      }
      const double of_doubles = 2 * kDouble * double(count() + 1);
      const double of_chain = products_error(std::min(kChain, count())) + of_doubles;
      for (size_t t = 0; t < w.size(); ++t)
        d_kernels.push_back({of_kernel[t], error[t] + of_chain * (magnitude[t] + error[t])});
      d_bias.push_back({bias_value, bias_error + of_doubles * (bias_magnitude + bias_error)});
    }
  }
  Real unit_of_elements() const { return format_of(c.dtype).unit_roundoff; }
};

// ---------------------------------------------------------------------------------------------- the kernels
// Results of a case, of exactly their size, and NaN until they are written.
struct Result {
  Tensor y, dx;
  Doubles mean, var, d_kernels, d_bias, d_gamma, d_beta;

  explicit Result(const Case& c)
      : y(c.shape(c.outputs()), c.layout, c.seed + 2),
        dx(c.shape(c.inputs()), c.layout, c.seed + 3),
        mean(c.channels),
        var(c.channels),
        d_kernels(c.channels * c.d.taps()),
        d_bias(c.channels),
        d_gamma(c.channels),
        d_beta(c.channels) {}

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
    for (const Doubles* each : {&mean, &var, &d_bias, &d_gamma, &d_beta}) append(*each, k, 1);
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

struct Manner {
  int64_t threads;
  char fill;  // of the scratch memory
  Partition* partition;
};

std::unique_ptr<char[]> scratch(const Case& c, const Manner& how) {
  const size_t bytes = batchnorm::depthwise_workspace_size(c.shape(c.outputs()), c.d, false, how.threads);
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::fill_n(memory.get(), bytes, how.fill);
  return memory;
}

batchnorm::DepthwiseInput input_of(const Problem& p) {
  return {p.x.operand(), p.kernels.at(0), p.c.has_bias ? p.bias.at(0) : nullptr};
}

batchnorm::NormCall norm_of(const Problem& p, const Doubles& mean, const Doubles& var) {
  return {mean.data(),   var.data(), p.vector(p.gamma), p.vector(p.beta), kEps, {p.c.activation, kSlope, {}, nullptr},
          p.c.population};
}

void backward(const Problem& p, const Manner& how, const Tensor& dy, const Tensor& dx, Result& r) {
  const Case& c = p.c;
  const std::unique_ptr<char[]> memory = scratch(c, how);
  const batchnorm::DepthwiseGradients to{c.wants_x ? dx.operand() : Operand{},
                                         c.wants_kernels ? r.d_kernels.data() : nullptr,
                                         c.wants_bias ? r.d_bias.data() : nullptr,
                                         r.d_gamma.data(),
                                         r.d_beta.data(),
                                         nullptr,
                                         nullptr};
  batchnorm::depthwise_backward(c.shape(c.outputs()), c.d, input_of(p), nullptr, norm_of(p, p.mean, p.var),
                                dy.operand(), to, memory.get(), how.threads, how.partition->parallel());
}

std::unique_ptr<Result> run(const Problem& p, const Manner& how) {
  const Case& c = p.c;
  auto r = std::make_unique<Result>(c);
  if (c.population)
    for (int64_t k = 0; k < c.channels; ++k) r->mean[k] = p.mean[k], r->var[k] = p.var[k];
  {
    const std::unique_ptr<char[]> memory = scratch(c, how);
    batchnorm::depthwise_forward(c.shape(c.outputs()), c.d, input_of(p), nullptr, norm_of(p, r->mean, r->var),
                                 r->y.operand(), memory.get(), how.threads, how.partition->parallel());
  }
  backward(p, how, p.dy, r->dx, *r);
  return r;
}

// ---------------------------------------------------------------------------------------------- the checks
struct Judge {
  std::string fault;
  void expect(const char* what, int64_t n, int64_t k, int64_t i, double given, const Bounded& right) {
    if (right.allows(given) || !fault.empty()) return;
    char text[240];
    std::snprintf(text, sizeof(text), "%s[%lld, %lld, %lld] is %.17g, expected %.17g +- %.3g", what, (long long)n,
                  (long long)k, (long long)i, given, double(right.value), double(right.error));
    fault = text;
  }
};

std::string fault_of(const Problem& p, const Result& r) {
  const Case& c = p.c;
  Judge judge;
  const Precision precision(c.dtype, 0);
  const Curve curve{c.activation, kSlope, Precision(c.dtype, p.count())};
  for (int64_t k = 0; k < c.channels; ++k) {
    if (c.population) {
      if (r.mean[k] != p.mean[k] || r.var[k] != p.var[k]) return "statistics of the population were written";
    } else {
      judge.expect("mean", 0, k, 0, r.mean[k], p.mean_right[size_t(k)]);
      judge.expect("var", 0, k, 0, r.var[k], p.var_right[size_t(k)]);
    }
    const Coefficients coefficients = p.coefficients(k, r.mean[k], r.var[k]);  // by the statistics that were returned
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t i = 0; i < c.outputs(); ++i) {
        const Bounded z = p.normalized(coefficients, precision, p.z[p.at(n, k) + size_t(i)], is_line(c.dtype));
        judge.expect("y", n, k, i, r.y.get(n, k, i), stored(curve.value(z), c.dtype));
      }
      for (int64_t i = 0; c.wants_x && i < c.inputs(); ++i)
        judge.expect("dx", n, k, i, r.dx.get(n, k, i), p.dx[size_t((n * c.channels + k) * c.inputs() + i)]);
    }
    for (int64_t t = 0; c.wants_kernels && t < c.d.taps(); ++t)
      judge.expect("d_kernels", 0, k, t, r.d_kernels[k * c.d.taps() + t], p.d_kernels[size_t(k * c.d.taps() + t)]);
    if (c.wants_bias) judge.expect("d_bias", 0, k, 0, r.d_bias[k], p.d_bias[size_t(k)]);
    judge.expect("d_gamma", 0, k, 0, r.d_gamma[k], p.d_gamma[size_t(k)]);
    judge.expect("d_beta", 0, k, 0, r.d_beta[k], p.d_beta[size_t(k)]);
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
  if (!c.population) return "";
  for (const auto& [n, place] : of_x)
    for_each_product(c.d, [&, n = n, place = place](int64_t o, int64_t, int64_t i) {
      if (i == place) reached_y[size_t(n * c.outputs() + o)] = true;
    });
  std::vector<bool> reached_z = reached_y;
  reached_z[size_t(of_dy[0].first * c.outputs() + of_dy[0].second)] = true;
  for (int64_t n = 0; n < c.samples; ++n)
    for_each_product(c.d, [&](int64_t o, int64_t, int64_t i) {
      if (reached_z[size_t(n * c.outputs() + o)]) reached_x[size_t(n * c.inputs() + i)] = true;
    });
  const auto differs = [&](const Tensor& a, const Tensor& b, int64_t n, int64_t i) {
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
  const Tensor over(c.shape(c.outputs()), c.layout, c.seed + 3);  // strides of right.dx
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

int64_t in_rows[4], in_planes[4], cuts = 0;  // cases of each dtype; calls of Parallel

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
  p.x.append_to(before);
  for (const char* isa : {"avx512", "avx2", "neon", "baseline"}) {
    if (!batchnorm::select_instruction_set(isa)) continue;
    const std::string name = isa;
    test_caches.l2 = 1;
    examine_way(p, name + " planes");
    ++in_planes[int(c.dtype)];
    const int64_t lanes = lanes_of(c.dtype), bytes = 2 * lanes * p.count() * format_of(c.dtype).size;
    if (c.channels < 2 * lanes) continue;
    test_caches.l2 = int64_t(1) << 40;
    examine_way(p, name + " rows");
    ++in_rows[int(c.dtype)];
    if (c.samples > 1) {  // the least that takes this way: then not all samples' inputs fit
      test_caches.l2 = c.d.stride[0] > 1 || c.d.stride[1] > 1 ? (bytes + 3) / 4 : bytes;
      examine_way(p, name + " rows, some samples at a time");
    }
  }
  p.x.append_to(after);
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
  const Activation activations[] = {Activation::identity, Activation::relu, Activation::relu6, Activation::silu};
  c.activation = activations[random.below(4)];
  c.population = random.below(3) == 0;
  c.has_bias = random.below(2);
  c.wants_x = random.below(5) != 0;
  c.wants_kernels = random.below(5) != 0;
  c.wants_bias = c.has_bias && random.below(4) != 0;
  c.affine = Affine(random.below(3));
  const Layout layouts[] = {Layout::dense, Layout::misaligned, Layout::padded, Layout::aligned, Layout::transposed};
  c.layout = layouts[random.below(5)];
  c.seed = seed;
  return c;
}

// An emulated processor takes a hundred times as long: there one case of so many is examined, which mixed bits of its
// number tell.
bool is_left_out(uint64_t number) {
  static const char* const given = std::getenv("BATCHNORM_TEST_CASES_FOR_ONE");
  static const uint64_t cases = given ? uint64_t(std::max(1, std::atoi(given))) : 1;
  return (number * 0x9e3779b97f4a7c15 >> 33) % cases != 0;
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
      const Problem rows(drawn(d, dtype, 1, 261, ++seed)), planes(drawn(d, dtype, 3, 101, ++seed));
      for (const char* isa : {"avx512", "avx2", "neon", "baseline"}) {
        if (!batchnorm::select_instruction_set(isa)) continue;
        test_caches.l2 = int64_t(1) << 40;
        examine_way(rows, std::string(isa) + " rows, chunks of vectors");
        // Two or three planes a chunk; too little for rows where vectors are long.
        const int64_t outputs = 2 * planes.count() * format_of(dtype).size;
        test_caches.l2 = 2 * 3 * (outputs + 3 * 42 * format_of(dtype).size);
        examine_way(planes, std::string(isa) + " chunks of planes");
      }
    }
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
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "while checking %s\n", now.c_str()); });
#endif
  geometries();
  dense();
  rare();
  many_samples();
  large();
  now = "coverage";
  for (Dtype dtype : kDtypes) check(in_planes[int(dtype)] > 0 && in_rows[int(dtype)] > 0, "a way was not taken");
  check(cuts > 0, "no call was cut for threads");
  std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
  return failed ? 1 : 0;
}
