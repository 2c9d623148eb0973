// What the tests of calls share that hold a normalization among other things: caches of a size that a case chooses, the
// tally of checks, threads, and the oracle of a normalization between values that are known within an error.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "kernels.h"
#include "memory.h"
#include "norm_call.h"
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

// The size of the second cache tells how a case is cut.
const Caches& caches() { return test::test_caches; }

}  // namespace batchnorm

namespace test {
namespace {

using batchnorm::Vector;
using Bytes = std::vector<char>;
using Boundeds = std::vector<Bounded>;

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
constexpr double kEps = 1e-5, kSlope = 0.01;
constexpr double kDouble = 0x1p-53;

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

void begin_tally() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "while checking %s\n", now.c_str()); });
#endif
}
int end_tally() {
  std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
  return failed ? 1 : 0;
}

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

// An emulated processor takes a hundred times as long: there one case of so many is examined, which mixed bits of its
// number tell.
bool is_left_out(uint64_t number) {
  static const char* const given = std::getenv("BATCHNORM_TEST_CASES_FOR_ONE");
  static const uint64_t cases = given ? uint64_t(std::max(1, std::atoi(given))) : 1;
  return (number * 0x9e3779b97f4a7c15 >> 33) % cases != 0;
}

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

struct Manner {
  int64_t threads;
  char fill;  // of the scratch memory
  Partition* partition;

  // Of exactly so many bytes.
  std::unique_ptr<char[]> scratch(size_t bytes) const {
    std::unique_ptr<char[]> memory(new char[bytes]);
    std::fill_n(memory.get(), bytes, fill);
    return memory;
  }
};

// ---------------------------------------------------------------------------------------------- a normalization
double rounded(Dtype dtype, double value) {
  char bytes[8];
  encode(dtype, value, bytes);
  return decode(dtype, bytes);
}

// The element that a value becomes: an error is left only where both ends of its range do not become the same one.
Bounded element(const Bounded& v, Dtype dtype) {
  const double value = rounded(dtype, double(v.value));
  const double low = rounded(dtype, double(v.value - v.error)), high = rounded(dtype, double(v.value + v.error));
  return {value, std::max(high - value, value - low)};
}

double compute_unit(Dtype dtype) { return dtype == Dtype::float64 ? kDouble : 0x1p-24; }

// Of a sum of so many products; the oracle's own are those of float64.
double products_error(Dtype dtype, int64_t count) { return double(count + 1) * (compute_unit(dtype) + kDouble); }

enum Affine { kNone, kSingle, kOwn };  // gamma and beta: absent, of float32, of the dtype of x

struct NormKind {
  Activation activation;
  bool population;
  Affine affine;

  static NormKind drawn(Random& random) {
    const Activation activations[] = {Activation::identity, Activation::relu, Activation::relu6, Activation::silu};
    const Activation activation = activations[random.below(4)];
    const bool population = random.below(3) == 0;
    return {activation, population, Affine(random.below(3))};
  }
  std::string text() const {
    return "activation " + std::to_string(int(activation)) + (population ? " population" : "") + " affine " +
           std::to_string(int(affine));
  }
};

// Statistics and gradients of gamma and beta, NaN until they are written.
struct NormResult {
  Doubles mean, var, d_gamma, d_beta;
  explicit NormResult(int64_t channels) : mean(channels), var(channels), d_gamma(channels), d_beta(channels) {}
  void append_to(int64_t k, Bytes& all) const {
    for (const Doubles* each : {&mean, &var, &d_gamma, &d_beta}) {
      const char* const first = reinterpret_cast<const char*>(each->data() + k);
      all.insert(all.end(), first, first + 8);
    }
  }
};

// A normalization of channels of `count` values, and what must come of it.
struct Norm {
  NormKind kind;
  Dtype dtype;
  int64_t count;
  Block gamma, beta;
  Doubles mean, var;  // of the batch, or of the population
  Boundeds mean_right, var_right;

  Norm(const NormKind& kind, Dtype dtype, int64_t channels, int64_t count, Random& random)
      : kind(kind),
        dtype(dtype),
        count(count),
        gamma(affine_dtype(), channels, 0),
        beta(affine_dtype(), channels, 0),
        mean(channels),
        var(channels),
        mean_right(size_t(channels), Bounded{}),
        var_right(mean_right) {
    for (int64_t k = 0; k < channels; ++k) {
      gamma.set(k, random.uniform(0.5, 2) * (random.below(3) ? 1 : -1));
      beta.set(k, random.uniform(-1, 2));
      mean[k] = 0.3 * random.normal();
      var[k] = random.uniform(0.5, 4);
    }
  }

  Dtype affine_dtype() const { return kind.affine == kOwn ? dtype : Dtype::float32; }
  Vector vector(const Block& of) const { return kind.affine == kNone ? Vector{} : Vector{of.at(0), affine_dtype()}; }
  batchnorm::Fusion fusion() const { return {kind.activation, kSlope, {}, nullptr}; }
  batchnorm::NormCall call(const Doubles& mean, const Doubles& var) const {
    return {mean.data(), var.data(), vector(gamma), vector(beta), kEps, fusion(), kind.population};
  }
  // By the statistics above; by those that a forward shall find, or is given.
  batchnorm::NormCall call() const { return call(mean, var); }
  batchnorm::NormCall call(const NormResult& r) const {
    for (int64_t k = 0; kind.population && k < mean.size(); ++k) r.mean[k] = mean[k], r.var[k] = var[k];
    return call(r.mean, r.var);
  }
  Coefficients coefficients(int64_t channel, double mean, double var) const {
    if (kind.affine == kNone) return {mean, var, 1, 0, kEps};
    return {mean, var, gamma.get(channel), beta.get(channel), kEps};
  }
  Curve curve() const { return {kind.activation, kSlope, Precision(dtype, count)}; }

  // The value before the activation.
  static Bounded normalized(const Coefficients& k, const Precision& precision, const Bounded& v, bool line) {
    Bounded result = pre_activation(k, precision, v.value, 0, line);
    result.error += std::fabs(k.scale()) * v.error;
    return result;
  }
  // The result, before it is an element, by statistics with these errors.
  Bounded result(const Coefficients& k, const Bounded& v, Real mean_error = 0, Real var_error = 0) const {
    Bounded z = normalized(k, Precision::of_forward(dtype, count, !kind.population), v, is_line(dtype));
    const Real away = std::fabs(v.value - k.mean) + v.error + mean_error;
    z.error += std::fabs(k.scale()) * (mean_error + away * var_error / (k.var + kEps));
    return curve().value(z);
  }
  // The same by the batch's statistics, however near the core comes to them.
  Bounded result(int64_t channel, const Bounded& v) const {
    return result(coefficients(channel, mean[channel], var[channel]), v, mean_right[size_t(channel)].error,
                  var_right[size_t(channel)].error);
  }

  // Of the values of one channel.
  void take_moments(int64_t k, const Boundeds& values) {
    if (kind.population) return;
    const Real relative = sum_error(dtype, count);
    Real sum = 0, errors = 0, square = 0, square_errors = 0, reach = 0;
    for (const Bounded& v : values) sum += v.value, errors += v.error;
    const Real m = sum / count, mean_error = errors / count;
    for (const Bounded& v : values) {
      const Real away = std::fabs(v.value - m), error = v.error + mean_error;
      square += away * away;
      square_errors += (2 * away + error) * error;
      reach = std::max(reach, away);
    }
    const Real v = square / count, rounding = 0x1p-52L * std::fabs(m);
    mean_right[size_t(k)] = {m, mean_error + relative * (std::sqrt(v) + reach) + rounding};
    var_right[size_t(k)] = {v, square_errors / count + relative * (v + reach * reach) + rounding * rounding};
    mean[k] = double(m);
    var[k] = double(v);
  }

  // The gradients of one channel's values, as elements, by the statistics above; of gamma and beta.
  struct Gradients {
    Boundeds x;
    Bounded gamma, beta;
    void judge(Judge& judge, int64_t k, const NormResult& r) const {
      judge.expect("d_gamma", 0, k, 0, r.d_gamma[k], gamma);
      judge.expect("d_beta", 0, k, 0, r.d_beta[k], beta);
    }
  };
  Gradients differentiate(int64_t k, const Boundeds& values, const Boundeds& dy) const {
    const Precision precision(dtype, count);
    const Curve curve = this->curve();
    const bool is_rounded =
        format_of(dtype).unit_roundoff > 0x1p-20L && kind.activation > Activation::leaky_relu;  // between two phases
    const Real relative = sum_error(dtype, count), tiny = 2 * smallest_term(dtype, count);
    const Coefficients coefficients = this->coefficients(k, mean[k], var[k]);
    const Real m = Real(count), inv_std = 1 / std::sqrt(coefficients.var + kEps), scale = coefficients.scale();
    Bounded sum, centered;
    const auto add = [&](Bounded& to, const Bounded& dz, Real factor, Real factor_error) {
      to.value += dz.value * factor;
      to.error += (std::fabs(factor) + factor_error) * (dz.error + relative * std::fabs(dz.value)) +
                  factor_error * std::fabs(dz.value) + tiny * (1 + std::fabs(factor));
    };
    const Real mean_step = in_float32(dtype, count) ? 0x1p-24L * std::fabs(coefficients.mean) : 0;
    Boundeds dzs;
    for (size_t i = 0; i < values.size(); ++i) {
      const Bounded& v = values[i];
      const Bounded derivative = curve.derivative(normalized(coefficients, precision, v, false));
      Bounded dz = curve.gated(derivative, dy[i].value);
      dz.error += dy[i].error * (std::fabs(derivative.value) + derivative.error) * 1.000001L;
      dzs.push_back(dz);
      add(sum, dz, 1, 0);
      add(centered, dz, v.value - coefficients.mean, v.error + mean_step);
      centered.error += product_error(dtype, count) * std::fabs(dz.value) * (std::fabs(v.value) + std::fabs(mean[k]));
    }
    const Real roundings = 8 * Real(kDouble);
    Gradients to;
    to.beta = {sum.value, sum.error + roundings * std::fabs(sum.value)};
    to.gamma = {centered.value * inv_std, inv_std * (centered.error + roundings * std::fabs(centered.value))};
    const Real second = kind.population ? 0 : -scale * inv_std * inv_std / m;
    const Real third = kind.population ? 0 : -scale / m;
    const Real k2 = second * centered.value, k3 = third * sum.value;
    const Real k2_error = std::fabs(second) * centered.error, k3_error = std::fabs(third) * sum.error;
    for (size_t i = 0; i < values.size(); ++i) {
      const Bounded &v = values[i], between = is_rounded ? stored(dzs[i], dtype) : dzs[i];
      Bounded right = input_gradient({between.value, between.error}, scale, k2, k3, v.value, mean[k], precision,
                                     batchnorm::is_line_of_gradient(dtype));
      const Real away = std::fabs(v.value - Real(mean[k]));
      right.error += (away + v.error) * k2_error + k3_error + std::fabs(k2) * v.error;
      to.x.push_back(stored(right, dtype));
    }
    return to;
  }

  void append_statistics(Bytes& all) const {
    for (const Doubles* each : {&mean, &var}) {
      const char* const first = reinterpret_cast<const char*>(each->data());
      all.insert(all.end(), first, first + 8 * each->size());
    }
  }
  // What a forward has left of the statistics.
  std::string judge_statistics(Judge& judge, int64_t k, const NormResult& r) const {
    if (kind.population)
      return r.mean[k] == mean[k] && r.var[k] == var[k] ? "" : "statistics of the population were written";
    judge.expect("mean", 0, k, 0, r.mean[k], mean_right[size_t(k)]);
    judge.expect("var", 0, k, 0, r.var[k], var_right[size_t(k)]);
    return "";
  }
};

}  // namespace
}  // namespace test
