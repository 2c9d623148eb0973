// One case: a shape, its values in memory, and what the verbs are given beside them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "memory.h"
#include "oracle.h"

namespace test {

using batchnorm::Fusion;
using batchnorm::Vector;

// How each channel of x is distributed; the mean and the standard deviation differ from channel to channel.
enum class Values { ordinary, far, narrow, constant, outlier, outlier_first, denormal, huge, wide };

inline const char* name_of(Values values) {
  static const char* names[] = {"ordinary",      "far",      "narrow", "constant", "outlier",
                                "outlier first", "denormal", "huge",   "wide"};
  return names[int(values)];
}

inline const char* name_of(Activation a) {
  static const char* names[] = {"identity",  "relu",    "relu6", "leaky_relu", "silu", "gelu",
                                "hardswish", "sigmoid", "tanh",  "elu",        "mish", "gelu_tanh"};
  return names[int(a)];
}

// What is fused with the transform. Signs are written for the piecewise linear activations, where there is a residual.
struct Fused {
  Activation activation = Activation::identity;
  bool residual = false, signs = false;
};

struct Case {
  Shape shape;
  Layout layout = Layout::dense;
  Fused fused = {};
  uint64_t seed = 0;
  Values values = Values::ordinary;
  double eps = 1e-5, slope = 0.01;
  int percent = 100;  // of the positions that are valid, in runs

  std::string text() const {
    const Shape& s = shape;
    std::string t = s.order == Order::planar ? "planar " : "interleaved ";
    t += format_of(s.dtype).name;
    t += " samples " + std::to_string(s.samples) + " channels " + std::to_string(s.channels) + " inner " +
         std::to_string(s.inner) + " pool " + std::to_string(s.pool_size) + ", " + name_of(layout) + ", " +
         name_of(values) + " values, " + name_of(fused.activation);
    if (fused.residual) t += " + residual";
    if (fused.signs) t += " + signs";
    if (percent < 100) t += ", " + std::to_string(percent) + " % valid";
    return t + ", seed " + std::to_string(seed);
  }
};

// gamma or beta; its dtype and whether it is there follow from the seed.
class Parameter {
 public:
  Parameter(const Case& c, int which) : dtype_(Dtype((c.seed / 3 + which) % 4)) {
    if (c.seed % 7 != uint64_t(which) && c.seed % 7 != 2) block_.emplace(dtype_, c.shape.channels, c.seed % 4);
  }
  void set(int64_t channel, double value) const {
    if (block_) block_->set(channel, value);
  }
  double get(int64_t channel, double absent) const { return block_ ? block_->get(channel) : absent; }
  Vector vector() const { return block_ ? Vector{block_->at(0), dtype_} : Vector{}; }

 private:
  Dtype dtype_;
  std::optional<Block> block_;
};

// Runs of valid positions of random lengths, never across samples in planar order; in interleaved order also long ones.
inline std::vector<batchnorm::Range> random_ranges(const Case& c) {
  std::vector<batchnorm::Range> ranges;
  if (c.percent >= 100) return ranges;
  Random random(c.seed + 77);
  const int64_t positions = c.shape.samples * c.shape.inner;
  const int64_t line = c.shape.order == Order::planar ? c.shape.inner : std::max<int64_t>(positions, 1);
  for (int64_t at = 0; at < positions;) {
    const int64_t end = std::min({at + 1 + int64_t(random.below(23)), (at / line + 1) * line, positions});
    if (int(random.below(100)) < c.percent) {
      if (!ranges.empty() && ranges.back().end == at && at % line)
        ranges.back().end = end;
      else
        ranges.push_back({at, end});
    }
    at = end;
  }
  return ranges;
}

struct Problem {
  const std::vector<batchnorm::Range> ranges;
  const Case c;
  Tensor x, dy, residual;
  Parameter gamma, beta;
  Doubles mean, var;                        // of the batch, in long double, rounded once
  Doubles population_mean, population_var;  // near them
  Doubles k1, k2, k3;
  std::vector<uint8_t> signs;  // random, so that only these bits can tell the gradient its way

  explicit Problem(const Case& given)
      : ranges(random_ranges(given)),
        c(with_ranges(given)),
        x(c.shape, unshared(c.layout), c.seed),
        dy(c.shape, c.layout, c.seed + 1),
        residual(c.shape, c.layout, c.seed + 2),
        gamma(c, 0),
        beta(c, 1),
        mean(statistics()),
        var(statistics()),
        population_mean(statistics()),
        population_var(statistics()),
        k1(statistics()),
        k2(statistics()),
        k3(statistics()),
        signs(size_t(sign_bytes())) {
    valid_.assign(size_t(c.shape.samples * c.shape.inner), !is_masked());
    for (const batchnorm::Range& r : ranges)
      for (int64_t at = r.begin; at < r.end; ++at) valid_[size_t(at)] = true;
    for (int64_t p = 0; p < c.shape.pools(); ++p) {
      const auto begin = valid_.begin() + p * c.shape.pool_size * c.shape.inner;
      values_.push_back(std::count(begin, valid_.begin() + pool_end(p) * c.shape.inner, true));
    }
    Random random(c.seed * 1000003 + 1);
    fill(random);
    take_moments();
    fill_statistics(random);
    for_each_element([&](int64_t n, int64_t channel, int64_t i) {
      dz_by_batch.push_back(dz(coefficients(mean, var, n, channel), n, channel, i));
      dz_by_population.push_back(dz(coefficients(population_mean, population_var, n, channel), n, channel, i));
    });
  }

  int64_t statistics() const { return c.shape.pools() * c.shape.channels; }
  int64_t pool(int64_t n) const { return n / c.shape.pool_size; }
  int64_t statistic(int64_t n, int64_t channel) const { return pool(n) * c.shape.channels + channel; }
  int64_t pool_end(int64_t pool) const { return std::min((pool + 1) * c.shape.pool_size, c.shape.samples); }
  int64_t pool_values(int64_t pool) const { return values_[size_t(pool)]; }
  bool is_masked() const { return c.percent < 100; }
  bool is_valid(int64_t n, int64_t i) const { return valid_[size_t(n * c.shape.inner + i)]; }

  template <class F>
  void for_each_element(F f) const {
    for (int64_t n = 0; n < c.shape.samples; ++n)
      for (int64_t channel = 0; channel < c.shape.channels; ++channel)
        for (int64_t i = 0; i < c.shape.inner; ++i)
          if (is_valid(n, i)) f(n, channel, i);
  }

  // Each run starts at a whole byte: a row, a long plane, or a sample's short planes together.
  bool is_together() const { return c.shape.order == Order::planar && c.shape.inner <= batchnorm::kTogether; }
  int64_t runs() const {
    return c.shape.samples * (c.shape.order == Order::planar && !is_together() ? c.shape.channels : 1);
  }
  int64_t run_bytes() const { return (c.shape.samples * c.shape.channels * c.shape.inner / runs() + 7) / 8; }
  int64_t sign_bytes() const { return runs() ? runs() * run_bytes() : 0; }
  bool sign(const std::vector<uint8_t>& bits, int64_t n, int64_t channel, int64_t i) const {
    int64_t run = n, at = channel;
    if (is_together())
      at = channel * c.shape.inner + i;
    else if (c.shape.order == Order::planar)
      run = n * c.shape.channels + channel, at = i;
    return bits[size_t(run * run_bytes() + at / 8)] >> (at % 8) & 1;
  }

  std::vector<char> input_bytes() const {
    std::vector<char> all(signs.begin(), signs.end());
    for (const Tensor* t : {&x, &dy, &residual}) t->append_to(all);
    return all;
  }

  Coefficients coefficients(const Doubles& means, const Doubles& vars, int64_t n, int64_t channel) const {
    const int64_t s = statistic(n, channel);
    return {means[s], vars[s], gamma.get(channel, 1), beta.get(channel, 0), c.eps};
  }
  // Of the gradients, and of what is normalized.
  Precision precision() const { return {c.shape.dtype, *std::min_element(values_.begin(), values_.end())}; }
  Precision normalized(bool own) const {
    return Precision::of_forward(c.shape.dtype, *std::min_element(values_.begin(), values_.end()), own);
  }
  Curve curve() const { return {c.fused.activation, c.slope, precision()}; }

  Bounded z(const Coefficients& k, const Precision& precision, int64_t n, int64_t channel, int64_t i,
            bool line = false) const {
    const Real added = c.fused.residual ? residual.get(n, channel, i) : 0;
    return pre_activation(k, precision, x.get(n, channel, i), added, line);
  }

 private:
  std::vector<bool> valid_;      // of every position
  std::vector<int64_t> values_;  // of every pool, a channel

  Case with_ranges(Case given) const {
    static const batchnorm::Range none{};
    if (given.percent < 100) {
      given.shape.valid = ranges.empty() ? &none : ranges.data();
      given.shape.valid_count = int64_t(ranges.size());
    }
    return given;
  }

  Bounded dz(const Coefficients& k, int64_t n, int64_t channel, int64_t i) const {
    const Real upstream = dy.get(n, channel, i);
    if (!c.fused.signs) return curve().gated(curve().derivative(z(k, precision(), n, channel, i)), upstream);
    if (sign(signs, n, channel, i)) return {upstream, 0};
    const Real off = c.fused.activation == Activation::leaky_relu ? c.slope : 0;
    return curve().gated({off, curve().precision.activation * std::fabs(off)}, upstream);
  }

  struct Channel {
    double mean, std;
  };
  Channel channel(Random& random) const {
    const bool half = c.shape.dtype == Dtype::float16, wide = c.shape.dtype == Dtype::float64;
    const double std = random.uniform(0.5, 2), sign = random.below(2) ? 1 : -1;
    switch (c.values) {
      case Values::far: return {sign * std * (half ? 1e4 : 1e6), std};
      case Values::narrow: return {0, 1e-6 * std};
      case Values::constant: return {sign * std, 0};
      case Values::denormal: return {0, 40 * double(format_of(c.shape.dtype).smallest)};
      case Values::huge: return {0, std * (half ? 1e3 : wide ? 1e100 : 1e12)};
      case Values::wide: return {0, 30 * std};
      default: return {3 * random.normal(), std};
    }
  }

  void fill(Random& random) {
    const Shape& s = c.shape;
    for (int64_t k = 0; k < s.channels; ++k) {
      const Channel distribution = channel(random);
      gamma.set(k, random.below(5) == 0 ? 0 : random.below(7) == 0 ? 2e-7 : random.uniform(-2, 2));
      beta.set(k, random.uniform(-2, 2));
      for (int64_t n = 0; n < s.samples; ++n)
        for (int64_t i = 0; i < s.inner; ++i) {
          x.set(n, k, i, distribution.mean + distribution.std * random.normal());
          dy.set(n, k, i, 0.3 + random.normal());
          residual.set(n, k, i, 3 * random.normal());
          if (is_valid(n, i)) continue;
          x.set(n, k, i, NAN);
          dy.set(n, k, i, random.below(2) ? NAN : INFINITY);
          residual.set(n, k, i, NAN);
        }
      if (s.samples * s.inner == 0 || is_masked()) continue;
      if (c.values == Values::outlier) x.set(random.below(s.samples), k, random.below(s.inner), 3e4);
      if (c.values == Values::outlier_first) x.set(0, k, 0, -3e4);
    }
    for (uint8_t& byte : signs) byte = uint8_t(random.bits());
  }

  // Two passes in long double.
  void take_moments() {
    for (int64_t p = 0; p < c.shape.pools(); ++p)
      for (int64_t k = 0; k < c.shape.channels; ++k) {
        const int64_t begin = p * c.shape.pool_size, end = std::min(begin + c.shape.pool_size, c.shape.samples);
        const Real count = Real(std::max<int64_t>(pool_values(p), 1));
        Real sum = 0, square = 0;
        for (int64_t n = begin; n < end; ++n)
          for (int64_t i = 0; i < c.shape.inner; ++i)
            if (is_valid(n, i)) sum += x.get(n, k, i);
        for (int64_t n = begin; n < end; ++n)
          for (int64_t i = 0; i < c.shape.inner; ++i) {
            if (!is_valid(n, i)) continue;
            const Real d = x.get(n, k, i) - sum / count;
            square += d * d;
          }
        exact_mean.push_back(sum / count);
        exact_m2.push_back(square);
        mean[p * c.shape.channels + k] = double(sum / count);
        var[p * c.shape.channels + k] = double(square / count);
      }
  }

  void fill_statistics(Random& random) {
    for (int64_t s = 0; s < statistics(); ++s) {
      const double std = std::sqrt(var[s] + c.eps);
      population_mean[s] = mean[s] + 0.3 * random.normal() * std;
      population_var[s] = var[s] * random.uniform(0.5, 2);
      k1[s] = random.normal() / std;
      k2[s] = random.normal() / std;
      k3[s] = random.normal();
    }
  }

 public:
  std::vector<Real> exact_mean, exact_m2;
  std::vector<Bounded> dz_by_batch, dz_by_population;  // of every element, in the order of for_each_element
};

}  // namespace test
