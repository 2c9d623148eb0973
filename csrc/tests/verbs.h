// Each verb of batchnorm.h run on a problem, and its outputs judged by the oracle.
#pragma once

#include <cstdio>
#include <deque>

#include "problem.h"

namespace test {

// Outputs of a verb, prefilled with NaN, and the first fault found in them.
struct Run {
  const Problem& p;
  batchnorm::Parallel parallel;
  bool judge;  // against the oracle
  std::deque<Tensor> tensors = {};
  std::deque<Doubles> statistics = {};
  std::deque<std::vector<uint8_t>> signs = {};
  std::string fault = {};

  const Shape& shape() const { return p.c.shape; }
  const Tensor& tensor() { return tensors.emplace_back(shape(), unshared(p.c.layout), p.c.seed + 3 + tensors.size()); }
  // Whether the residual's gradient is wanted.
  const Tensor* residual_gradient() { return p.c.fused.residual && p.c.seed % 5 ? &tensor() : nullptr; }
  double* doubles() { return statistics.emplace_back(p.statistics()).data(); }
  double* of_channels() { return statistics.emplace_back(shape().channels).data(); }
  Doubles workspace() const { return Doubles(int64_t(batchnorm::workspace_size(shape()))); }

  Fusion forward_fusion() {
    Fusion f{p.c.fused.activation, p.c.slope, p.c.fused.residual ? p.residual.operand() : Operand{}, nullptr};
    if (p.c.fused.signs) f.signs = signs.emplace_back(size_t(p.sign_bytes()), uint8_t(0xa5)).data();
    return f;
  }
  // With signs, nothing else of the forward is needed.
  Fusion backward_fusion() const {
    Fusion f{p.c.fused.activation, p.c.slope, {}, nullptr};
    if (p.c.fused.signs)
      f.signs = const_cast<uint8_t*>(p.signs.data());
    else if (p.c.fused.residual)
      f.residual = p.residual.operand();
    return f;
  }

  void expect(bool condition, const std::string& what) {
    if (!condition && fault.empty()) fault = what;
  }
  void expect(const char* what, int64_t n, int64_t channel, int64_t i, double given, const Bounded& right) {
    if (right.allows(given) || !fault.empty()) return;
    char text[240];
    std::snprintf(text, sizeof(text), "%s[%lld, %lld, %lld] is %.17g, expected %.17g +- %.3g", what, (long long)n,
                  (long long)channel, (long long)i, given, double(right.value), double(right.error));
    fault = text;
  }
  std::vector<char> bytes() const {
    std::vector<char> all;
    for (const Tensor& t : tensors) t.append_to(all);
    for (const Doubles& d : statistics) all.insert(all.end(), (char*)d.data(), (char*)(d.data() + d.size()));
    for (int64_t n = 0; !signs.empty() && n < shape().samples; ++n)  // without the padding of the runs
      for (int64_t c = 0; c < shape().channels; ++c)
        for (int64_t i = 0; i < shape().inner; ++i) all.push_back(p.sign(signs[0], n, c, i));
    return all;
  }
};

// Sums are taken about the pool's first value: how far that is from the mean.
inline Real shift_of(const Problem& p, int64_t statistic) {
  const int64_t pool = statistic / p.c.shape.channels, channel = statistic % p.c.shape.channels;
  if (p.pool_values(pool) == 0) return 0;
  int64_t n = pool * p.c.shape.pool_size, i = 0;
  while (!p.is_valid(n, i))
    if (++i == p.c.shape.inner) ++n, i = 0;
  return std::fabs(p.x.get(n, channel, i) - p.exact_mean[size_t(statistic)]);
}

inline void judge_moments(Run& r, const Doubles& mean, const Doubles& square, bool is_variance) {
  const Problem& p = r.p;
  for (int64_t s = 0; s < p.statistics(); ++s) {
    const int64_t pool = s / r.shape().channels, channel = s % r.shape().channels;
    const Real relative = sum_error(r.shape().dtype, p.pool_values(pool)),
               tiny = 2 * smallest_term(r.shape().dtype, p.pool_values(pool));
    const Real count = Real(std::max<int64_t>(p.pool_values(pool), 1)), divisor = is_variance ? count : 1;
    const Real exact = p.exact_mean[s], m2 = p.exact_m2[s], std = std::sqrt(m2 / count), shift = shift_of(p, s);
    const Real rounding = 0x1p-52L * std::fabs(exact) + tiny;
    const Real error = relative * (m2 + count * shift * shift) + count * (rounding * rounding + tiny);
    r.expect("mean", pool, channel, 0, mean[s], {exact, relative * (std + shift) + rounding});
    r.expect(is_variance ? "var" : "m2", pool, channel, 0, square[s], {m2 / divisor, error / divisor});
  }
}

inline void judge_normalized(Run& r, const Tensor& y, const Doubles& mean, const Doubles& var, bool own) {
  const Problem& p = r.p;
  const Curve curve = p.curve();
  p.for_each_element([&](int64_t n, int64_t c, int64_t i) {
    const Bounded z = p.z(p.coefficients(mean, var, n, c), p.normalized(own), n, c, i, is_line(r.shape().dtype));
    r.expect("y", n, c, i, y.get(n, c, i), stored(curve.value(z), r.shape().dtype));
    if (!p.c.fused.signs) return;
    const int sign = curve.sign(z);
    if (sign >= 0 && p.sign(r.signs[0], n, c, i) != bool(sign)) r.expect("sign", n, c, i, 1 - sign, {Real(sign), 0});
  });
}

inline void judge_sums(Run& r, const Doubles& mean, const std::vector<Bounded>& dzs, const Doubles& sum,
                       const Doubles& centered) {
  const Problem& p = r.p;
  std::vector<Bounded> first(size_t(p.statistics())), second(size_t(p.statistics()));
  const Dtype dtype = r.shape().dtype;
  size_t at = 0;
  p.for_each_element([&](int64_t n, int64_t c, int64_t i) {
    const Bounded& dz = dzs[at++];
    const int64_t s = p.statistic(n, c);
    const Real d = p.x.get(n, c, i) - Real(mean[s]);
    const int64_t count = p.pool_values(p.pool(n));
    const Real reach = std::fabs(d) + (in_float32(dtype, count) ? 0x1p-24L * std::fabs(Real(mean[s])) : 0);
    const Real tiny = 2 * smallest_term(dtype, count);
    first[s].value += dz.value;
    second[s].value += dz.value * d;
    const Real error = dz.error + sum_error(dtype, count) * std::fabs(dz.value);
    first[s].error += error + tiny;
    second[s].error += error * reach + tiny;
    second[s].error +=
        product_error(dtype, count) * std::fabs(dz.value) * (std::fabs(d) + 2 * std::fabs(Real(mean[s])));
  });
  for (int64_t s = 0; s < p.statistics(); ++s) {
    const int64_t pool = s / r.shape().channels, channel = s % r.shape().channels;
    r.expect("sum_dz", pool, channel, 0, sum[s], first[s]);
    r.expect("sum_dz_centered", pool, channel, 0, centered[s], second[s]);
  }
}

// Those of gamma and beta, by the sums that were returned.
inline void judge_parameters(Run& r, const Doubles& var, const Doubles& sum, const Doubles& centered,
                             const Doubles& d_gamma, const Doubles& d_beta) {
  const int64_t channels = r.shape().channels;
  for (int64_t c = 0; c < channels; ++c) {
    Bounded gamma{}, beta{};
    for (int64_t s = c; s < r.p.statistics(); s += channels) {
      const Real inv_std = 1 / std::sqrt(Real(var[s]) + Real(r.p.c.eps)), share = centered[s] * inv_std;
      gamma.value += share;
      beta.value += sum[s];
      gamma.error += std::fabs(share);
      beta.error += std::fabs(Real(sum[s]));
    }
    const Real roundings = Real(r.p.statistics() / channels + 8) * 0x1p-53L;
    gamma.error = gamma.error * roundings + Real(r.p.statistics() / channels + 1) * 0x1p-1074L;  // of denormals
    beta.error *= roundings;
    r.expect("d_gamma", 0, c, 0, d_gamma[c], gamma);
    r.expect("d_beta", 0, c, 0, d_beta[c], beta);
  }
}

struct Gradient {
  Real k1, k2, k3;
};

// Whether dz, which both phases of `backward` need, is rounded between them: in 16 bits, where it is not exact.
inline bool rounds_between_phases(const Problem& p) {
  const Activation a = p.c.fused.activation;
  const bool is_costly = a > Activation::leaky_relu;
  const bool is_product = a == Activation::leaky_relu && p.c.fused.residual;
  return format_of(p.c.shape.dtype).unit_roundoff > 0x1p-20L && (is_costly || is_product) && !p.c.fused.signs;
}

template <class F>
inline void judge_gradient(Run& r, const Tensor& dx, const Tensor* d_residual, const Doubles& mean,
                           const std::vector<Bounded>& dzs, bool rounded, F gradient) {
  const Problem& p = r.p;
  const auto between = [&](const Bounded& dz) {
    if (!rounded) return dz;
    const Bounded kept = stored(dz, p.c.shape.dtype);
    return Bounded{kept.value, kept.error};
  };
  size_t at = 0;
  p.for_each_element([&](int64_t n, int64_t c, int64_t i) {
    const int64_t s = p.statistic(n, c);
    const Bounded& dz = dzs[at++];
    const Gradient g = gradient(s, n, c);
    const Bounded right = input_gradient(between(dz), g.k1, g.k2, g.k3, p.x.get(n, c, i), mean[s], p.precision(),
                                         batchnorm::is_line_of_gradient(r.shape().dtype));
    r.expect("dx", n, c, i, dx.get(n, c, i), stored(right, r.shape().dtype));
    if (d_residual) r.expect("d_residual", n, c, i, d_residual->get(n, c, i), stored(dz, r.shape().dtype));
  });
}

// ---------------------------------------------------------------------------------------------- the verbs
inline void moments(Run& r) {
  const Doubles work = r.workspace();
  double *mean = r.doubles(), *m2 = r.doubles();
  batchnorm::moments(r.shape(), r.p.x.operand(), mean, m2, work.data(), r.parallel);
  if (r.judge) judge_moments(r, r.statistics[0], r.statistics[1], false);
}

inline void forward(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& y = r.tensor();
  double *mean = r.doubles(), *var = r.doubles();
  batchnorm::forward(r.shape(), p.x.operand(), y.operand(), mean, var, p.gamma.vector(), p.beta.vector(), p.c.eps,
                     r.forward_fusion(), work.data(), r.parallel);
  if (!r.judge) return;
  judge_moments(r, r.statistics[0], r.statistics[1], true);
  judge_normalized(r, y, r.statistics[0], r.statistics[1], true);
}

inline void normalize(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& y = r.tensor();
  batchnorm::normalize(r.shape(), p.x.operand(), y.operand(), p.population_mean.data(), p.population_var.data(),
                       p.gamma.vector(), p.beta.vector(), p.c.eps, r.forward_fusion(), work.data(), r.parallel);
  if (r.judge) judge_normalized(r, y, p.population_mean, p.population_var, false);
}

inline void backward_reduce(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  double *sum = r.doubles(), *centered = r.doubles();
  batchnorm::backward_reduce(r.shape(), p.dy.operand(), p.x.operand(), p.mean.data(), p.var.data(), p.gamma.vector(),
                             p.beta.vector(), p.c.eps, r.backward_fusion(), sum, centered, work.data(), r.parallel);
  if (r.judge) judge_sums(r, p.mean, p.dz_by_batch, r.statistics[0], r.statistics[1]);
}

inline void backward_apply(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& dx = r.tensor();
  const Tensor* d_residual = r.residual_gradient();
  batchnorm::backward_apply(r.shape(), p.dy.operand(), p.x.operand(), dx.operand(),
                            d_residual ? d_residual->operand() : Operand{}, p.mean.data(), p.var.data(),
                            p.gamma.vector(), p.beta.vector(), p.c.eps, r.backward_fusion(), p.k1.data(), p.k2.data(),
                            p.k3.data(), work.data(), r.parallel);
  if (r.judge)
    judge_gradient(r, dx, d_residual, p.mean, p.dz_by_batch, false,
                   [&](int64_t s, int64_t, int64_t) { return Gradient{p.k1[s], p.k2[s], p.k3[s]}; });
}

// The sums are judged for themselves, and dx and the gradients of gamma and beta by the sums that were returned.
inline void backward_by(Run& r, const Doubles& mean, const Doubles& var, bool population) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& dx = r.tensor();
  const Tensor* d_residual = r.residual_gradient();
  double *sum = r.doubles(), *centered = r.doubles(), *d_gamma = r.of_channels(), *d_beta = r.of_channels();
  batchnorm::backward(r.shape(), p.dy.operand(), p.x.operand(), dx.operand(),
                      d_residual ? d_residual->operand() : Operand{}, mean.data(), var.data(), p.gamma.vector(),
                      p.beta.vector(), p.c.eps, r.backward_fusion(), population, sum, centered, d_gamma, d_beta,
                      work.data(), r.parallel);
  if (!r.judge) return;
  const std::vector<Bounded>& dzs = population ? p.dz_by_population : p.dz_by_batch;
  judge_sums(r, mean, dzs, r.statistics[0], r.statistics[1]);
  judge_parameters(r, var, r.statistics[0], r.statistics[1], r.statistics[2], r.statistics[3]);
  judge_gradient(r, dx, d_residual, mean, dzs, rounds_between_phases(p), [&](int64_t s, int64_t n, int64_t c) {
    const Coefficients k = p.coefficients(mean, var, n, c);
    const Real m = Real(p.pool_values(p.pool(n)));
    if (population) return Gradient{k.scale(), 0, 0};
    return Gradient{k.scale(), -k.scale() / (k.var + k.eps) * centered[s] / m, -k.scale() * sum[s] / m};
  });
}

// Where nobody wants the gradients of gamma and beta; over dy, dx takes its place.
inline void backward_of_constants_into(Run& r, const Tensor& dy, const Tensor& dx) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor* d_residual = r.residual_gradient();
  batchnorm::backward(r.shape(), dy.operand(), p.x.operand(), dx.operand(),
                      d_residual ? d_residual->operand() : Operand{}, p.population_mean.data(), p.population_var.data(),
                      p.gamma.vector(), p.beta.vector(), p.c.eps, r.backward_fusion(), true, nullptr, nullptr, nullptr,
                      nullptr, work.data(), r.parallel);
  if (r.judge)
    judge_gradient(r, dx, d_residual, p.population_mean, p.dz_by_population, false, [&](int64_t, int64_t n, int64_t c) {
      return Gradient{p.coefficients(p.population_mean, p.population_var, n, c).scale(), 0, 0};
    });
}
inline void backward_of_constants(Run& r) { backward_of_constants_into(r, r.p.dy, r.tensor()); }

inline void backward(Run& r) { backward_by(r, r.p.mean, r.p.var, false); }
inline void backward_frozen(Run& r) { backward_by(r, r.p.population_mean, r.p.population_var, true); }

// The same with a result in the place of an operand: in the tensor that the verb above fills, a copy of the operand.
inline const Tensor& in_place_of(Run& r, const Tensor& operand) {
  const Tensor& t = r.tensor();
  r.p.for_each_element([&](int64_t n, int64_t c, int64_t i) { t.set(n, c, i, operand.get(n, c, i)); });
  return t;
}

inline void forward_over(Run& r, bool over_residual) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& y = in_place_of(r, over_residual ? p.residual : p.x);
  double *mean = r.doubles(), *var = r.doubles();
  Fusion fusion = r.forward_fusion();
  if (over_residual) fusion.residual = y.operand();
  batchnorm::forward(r.shape(), over_residual ? p.x.operand() : y.operand(), y.operand(), mean, var, p.gamma.vector(),
                     p.beta.vector(), p.c.eps, fusion, work.data(), r.parallel);
}

inline void normalize_over_x(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& y = in_place_of(r, p.x);
  batchnorm::normalize(r.shape(), y.operand(), y.operand(), p.population_mean.data(), p.population_var.data(),
                       p.gamma.vector(), p.beta.vector(), p.c.eps, r.forward_fusion(), work.data(), r.parallel);
}

// In the order of the results of `backward_by`: dx, then d_residual.
inline void backward_over(Run& r, bool over_residual) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor& dx = over_residual ? r.tensor() : in_place_of(r, p.dy);
  const Tensor& d_residual = over_residual ? in_place_of(r, p.dy) : r.tensor();
  double *sum = r.doubles(), *centered = r.doubles(), *d_gamma = r.of_channels(), *d_beta = r.of_channels();
  batchnorm::backward(r.shape(), (over_residual ? d_residual : dx).operand(), p.x.operand(), dx.operand(),
                      d_residual.operand(), p.mean.data(), p.var.data(), p.gamma.vector(), p.beta.vector(), p.c.eps,
                      r.backward_fusion(), false, sum, centered, d_gamma, d_beta, work.data(), r.parallel);
}

inline void backward_of_constants_over_dy(Run& r) {
  const Tensor& dx = in_place_of(r, r.p.dy);
  backward_of_constants_into(r, dx, dx);
}

inline void forward_over_x(Run& r) { forward_over(r, false); }
inline void forward_over_residual(Run& r) { forward_over(r, true); }
inline void backward_over_dy(Run& r) { backward_over(r, false); }
inline void backward_residual_over_dy(Run& r) { backward_over(r, true); }

// With both results, whatever the seed says.
inline void backward_with_residual(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  const Tensor &dx = r.tensor(), &d_residual = r.tensor();
  double *sum = r.doubles(), *centered = r.doubles(), *d_gamma = r.of_channels(), *d_beta = r.of_channels();
  batchnorm::backward(r.shape(), p.dy.operand(), p.x.operand(), dx.operand(), d_residual.operand(), p.mean.data(),
                      p.var.data(), p.gamma.vector(), p.beta.vector(), p.c.eps, r.backward_fusion(), false, sum,
                      centered, d_gamma, d_beta, work.data(), r.parallel);
}

inline void backward_sums_only(Run& r) {
  const Problem& p = r.p;
  const Doubles work = r.workspace();
  double *sum = r.doubles(), *centered = r.doubles(), *d_gamma = r.of_channels(), *d_beta = r.of_channels();
  batchnorm::backward(r.shape(), p.dy.operand(), p.x.operand(), {}, {}, p.mean.data(), p.var.data(), p.gamma.vector(),
                      p.beta.vector(), p.c.eps, r.backward_fusion(), false, sum, centered, d_gamma, d_beta, work.data(),
                      r.parallel);
  if (!r.judge) return;
  judge_sums(r, p.mean, p.dz_by_batch, r.statistics[0], r.statistics[1]);
  judge_parameters(r, p.var, r.statistics[0], r.statistics[1], r.statistics[2], r.statistics[3]);
}

struct Verb {
  const char* name;
  void (*run)(Run&);
};
constexpr Verb kVerbs[] = {{"moments", moments},
                           {"forward", forward},
                           {"normalize", normalize},
                           {"backward_reduce", backward_reduce},
                           {"backward_apply", backward_apply},
                           {"backward", backward},
                           {"backward of population statistics", backward_frozen},
                           {"backward of constants", backward_of_constants},
                           {"backward, sums only", backward_sums_only}};

// A verb, and one that gives the same bits where a result takes the place of an operand.
struct InPlace {
  Verb apart, over;
  bool needs_residual = false;
};
constexpr InPlace kInPlace[] = {
    {{"forward", forward}, {"forward over x", forward_over_x}},
    {{"forward", forward}, {"forward over the residual", forward_over_residual}, true},
    {{"normalize", normalize}, {"normalize over x", normalize_over_x}},
    {{"backward", backward_with_residual}, {"backward over dy", backward_over_dy}},
    {{"backward", backward_with_residual}, {"backward, d_residual over dy", backward_residual_over_dy}},
    {{"backward of constants", backward_of_constants},
     {"backward of constants over dy", backward_of_constants_over_dy}}};

}  // namespace test
