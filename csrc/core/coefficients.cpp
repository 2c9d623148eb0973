// What the sums of a run of channels become: statistics, and the coefficients of the kernels. Compiled once for each
// instruction set; the loops are the compiler's to vectorize.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

// The kernels rely on NaNs of this one kind, when they store bfloat16.
template <class S>
S stored(double v) {
  return v != v ? std::numeric_limits<S>::quiet_NaN() : S(v);
}

void statistics(int64_t channels, double count, double divisor, const double* shift, const double* sum,
                const double* square, double* __restrict mean, double* __restrict spread) {
  const double share = 1 / count, part = 1 / divisor;
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = sum[c] * share, rest = square[c] - sum[c] * offset;
    mean[c] = shift[c] + offset;
    spread[c] = (rest < 0 ? 0 : rest) * part;  // NaN stays
  }
}

void finite(int64_t channels, double* values) {
  for (int64_t c = 0; c < channels; ++c) values[c] = values[c] - values[c] == 0 ? values[c] : 0;
}

template <class S>
void means(int64_t channels, const double* mean, void* to) {
  for (int64_t c = 0; c < channels; ++c) static_cast<S*>(to)[c] = stored<S>(mean[c]);
}

// What is written is `__restrict` as a parameter: of a local pointer GCC does not believe it, and then leaves loops
// with so many arrays as they are.
template <class S>
void normalize_in(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta,
                  double eps, S* __restrict means, S* __restrict scales, S* __restrict shifts) {
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = gamma[c] / std::sqrt(var[c] + eps), high = stored<S>(mean[c]);
    means[c] = S(high);
    scales[c] = stored<S>(scale);
    shifts[c] = stored<S>(beta[c] + (high - mean[c]) * scale);
  }
}

template <class S>
void normalize(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta,
               double eps, void* means, void* scales, void* shifts) {
  normalize_in(channels, mean, var, gamma, beta, eps, static_cast<S*>(means), static_cast<S*>(scales),
               static_cast<S*>(shifts));
}

template <class S>
void lines_in(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta,
              double eps, bool own, S* __restrict scales, S* __restrict shifts) {
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = own && var[c] == 0 ? 0 : gamma[c] / std::sqrt(var[c] + eps);
    scales[c] = stored<S>(scale);
    shifts[c] = stored<S>(beta[c] - mean[c] * scale);
  }
}

template <class S>
void lines(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta, double eps,
           bool own, void* scales, void* shifts) {
  lines_in(channels, mean, var, gamma, beta, eps, own, static_cast<S*>(scales), static_cast<S*>(shifts));
}

double without_digits(double v) {  // the power of two that it begins with
  uint64_t bits;
  std::memcpy(&bits, &v, 8);
  bits &= uint64_t(0x7ff) << 52;
  std::memcpy(&v, &bits, 8);
  return v;
}

// A mean within two standard deviations of 0 stays in the shift, which then is no larger than the largest z, or hardly.
// Another is taken off in so few digits that the difference is exact where x lies far from the mean. Deviations are
// those of x, without eps. x itself is finite, or its statistics are not.
void two_parts_in(int64_t channels, const double* scales, const double* mean, const double* var, const double* beta,
                  float* __restrict center, float* __restrict scale, float* __restrict scale_rest,
                  float* __restrict shift, float* __restrict shift_rest) {
  constexpr double whole = 0x1.8p52;  // a sum with it has no digits behind the point
  for (int64_t c = 0; c < channels; ++c) {
    const double s = scales[c], m = mean[c], std = std::sqrt(var[c]);
    const double step = std::max(without_digits(std) * 0x1p-12, without_digits(m) * 0x1p-23);
    const bool stays = (s - s != 0) | (m - m != 0) | (std::fabs(m) <= 2 * std) | (std::fabs(m) > 0x1p100);
    const float off = stays ? 0 : float(step * (m / step + whole - whole)), first = stored<float>(s);
    const double o = beta[c] + (double(off) - m) * s;
    const float second = stored<float>(o);
    center[c] = off;
    scale[c] = first;
    scale_rest[c] = s - s == 0 ? float(s - double(first)) : 0;
    shift[c] = second;
    shift_rest[c] = o - o == 0 ? float(o - double(second)) : 0;
  }
}

void two_parts(int64_t channels, const double* scales, const double* mean, const double* var, const double* beta,
               float* const parts[5]) {
  two_parts_in(channels, scales, mean, var, beta, parts[0], parts[1], parts[2], parts[3], parts[4]);
}

// What the mean adds to k3, in units of k2: where it is not taken off, all of it, else what it loses as a value of S.
template <class S>
double offset(double mean, bool line) {
  return (line ? 0 : double(S(mean))) - mean;
}

template <class S>
void apply_in(int64_t channels, const double* mean, const double* k1, const double* k2, const double* k3, bool line,
              S* __restrict to_k1, S* __restrict to_k2, S* __restrict to_k3) {
  for (int64_t c = 0; c < channels; ++c) {
    to_k1[c] = stored<S>(k1[c]);
    to_k2[c] = stored<S>(k2[c]);
    to_k3[c] = stored<S>(k3[c] + k2[c] * offset<S>(mean[c], line));
  }
}

template <class S>
void apply(int64_t channels, const double* mean, const double* k1, const double* k2, const double* k3, bool line,
           void* to_k1, void* to_k2, void* to_k3) {
  apply_in(channels, mean, k1, k2, k3, line, static_cast<S*>(to_k1), static_cast<S*>(to_k2), static_cast<S*>(to_k3));
}

template <class S>
void gradient_in(int64_t channels, double count, const double* mean, const double* var, const double* gamma, double eps,
                 const double* sum_dz, const double* sum_dz_centered, bool line, S* __restrict k1, S* __restrict k2,
                 S* __restrict k3, double* __restrict d_gamma, double* __restrict d_beta) {
  const double share = 1 / count;
  for (int64_t c = 0; c < channels; ++c) {
    const double inv_std = 1 / std::sqrt(var[c] + eps), first = gamma[c] * inv_std;
    const double second = -first * inv_std * inv_std * (sum_dz_centered[c] * share);
    k1[c] = stored<S>(first);
    k2[c] = stored<S>(second);
    k3[c] = stored<S>(second * offset<S>(mean[c], line) - first * (sum_dz[c] * share));
    d_gamma[c] += sum_dz_centered[c] * inv_std;
    d_beta[c] += sum_dz[c];
  }
}

template <class S>
void gradient(int64_t channels, double count, const double* mean, const double* var, const double* gamma, double eps,
              const double* sum_dz, const double* sum_dz_centered, bool line, void* k1, void* k2, void* k3,
              double* d_gamma, double* d_beta) {
  gradient_in(channels, count, mean, var, gamma, eps, sum_dz, sum_dz_centered, line, static_cast<S*>(k1),
              static_cast<S*>(k2), static_cast<S*>(k3), d_gamma, d_beta);
}

void parameters(int64_t channels, const double* var, double eps, const double* sum_dz, const double* sum_dz_centered,
                double* __restrict d_gamma, double* __restrict d_beta) {
  for (int64_t c = 0; c < channels; ++c) {
    d_gamma[c] += sum_dz_centered[c] * (1 / std::sqrt(var[c] + eps));
    d_beta[c] += sum_dz[c];
  }
}

// Floats counted from zero, in their order.
template <class S>
struct Places {
  using I = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  static I mirrored(I bits) { return bits < 0 ? std::numeric_limits<I>::min() - bits : bits; }
  static I of(S v) {
    I bits;
    std::memcpy(&bits, &v, sizeof(S));
    return mirrored(bits);
  }
  static S at(I place) {
    const I bits = mirrored(place);
    S v;
    std::memcpy(&v, &bits, sizeof(S));
    return v;
  }
};

// Where z passes 0. z rises with s * x, s being the sign of the scale, and so does what rounding makes of it: so the
// largest s * x of type S that is not above the kink tells the side of it by one comparison.
struct Kink {
  double sign, mean, scale, shift;
  Kink(double mean, double scale, double shift) : sign(scale < 0 ? -1 : 1), mean(mean), scale(scale), shift(shift) {}
  bool below(double v) const { return (sign * v - mean) * scale + shift > 0; }
};

template <class S>
S searched_threshold(const Kink& kink) {
  using P = Places<S>;
  constexpr S infinity = std::numeric_limits<S>::infinity(), largest = std::numeric_limits<S>::max();
  if (!(kink.scale != 0)) return kink.shift > 0 ? -infinity : infinity;
  if (kink.below(-largest)) return -infinity;
  if (!kink.below(largest)) return infinity;  // NaN too
  auto low = P::of(-largest), high = P::of(largest);
  while (low + 1 < high) {
    const auto middle = low / 2 + high / 2 + (low % 2 + high % 2) / 2;
    (kink.below(P::at(middle)) ? high : low) = middle;
  }
  return P::at(low);
}

template <class S>
void relu_gate(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta,
               double eps, S* __restrict threshold, S* __restrict flip) {
  using P = Places<S>;
  const auto kink = [&](int64_t c) { return Kink(mean[c], gamma[c] / std::sqrt(var[c] + eps), beta[c]); };
  for (int64_t c = 0; c < channels; ++c) {
    const Kink k = kink(c);
    const S near = S(k.sign * (k.mean - k.shift / k.scale)), down = P::at(P::of(near) - 1), up = P::at(P::of(near) + 1);
    const bool over = k.below(near), right = over ? !k.below(down) : k.below(up);
    threshold[c] = right ? (over ? down : near) : std::numeric_limits<S>::quiet_NaN();
    flip[c] = k.scale < 0 ? S(-0.0) : S(0.0);
  }
  for (int64_t c = 0; c < channels; ++c)  // a flat stretch around the kink, or none
    if (threshold[c] != threshold[c]) threshold[c] = searched_threshold<S>(kink(c));
}

void relu_gates(int64_t channels, int64_t size, const double* mean, const double* var, const double* gamma,
                const double* beta, double eps, void* thresholds, void* flips) {
  const auto in = [&](auto* to) {
    relu_gate(channels, mean, var, gamma, beta, eps, to, static_cast<decltype(to)>(flips));
  };
  size == 8 ? in(static_cast<double*>(thresholds)) : in(static_cast<float*>(thresholds));
}

template <class S>
void spread_values(int64_t channels, int64_t each, int64_t times, const void* from, void* to) {
  S* out = static_cast<S*>(to);
  for (int64_t c = 0; c < channels; ++c, out += each) std::fill_n(out, each, static_cast<const S*>(from)[c]);
  for (int64_t k = 1; k < times; ++k, out += channels * each)
    std::copy_n(static_cast<const S*>(to), channels * each, out);
}

void spread(int64_t channels, int64_t each, int64_t times, int64_t size, const void* from, void* to) {
  (size == 8 ? spread_values<double> : spread_values<float>)(channels, each, times, from, to);
}

void fold(int64_t channels, int64_t each, int64_t times, const double* from, double* to) {
  if (each == 1) {
    for (; times > 0; --times, from += channels)
      for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
    return;
  }
  constexpr int64_t lanes = 8;
  for (int64_t i = 0; i < channels * times; ++i, from += each) {
    double part[lanes] = {};
    int64_t k = 0;
    for (; k + lanes <= each; k += lanes)
      for (int64_t lane = 0; lane < lanes; ++lane) part[lane] += from[k + lane];
    for (; k < each; ++k) part[k % lanes] += from[k];
    to[i % channels] += ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  }
}

// `mix` of running.cpp for many values: the same steps, with selections in place of branches.
template <bool is_small>
void blend_in(int64_t channels, double momentum, const double* batch, double factor, float* __restrict values,
              float* __restrict carries) {
  constexpr float shorter = 1 - 2 * std::numeric_limits<float>::epsilon();
  for (int64_t c = 0; c < channels; ++c) {
    const float value = values[c], carry = carries[c];
    const double old = value, taken = batch[c] * factor, rest = float(old + carry) == value ? carry : 0.0f;
    const double base = is_small ? old : taken;
    const double change = is_small ? rest + momentum * ((taken - old) - rest) : (1 - momentum) * ((old - taken) + rest);
    const double mixed = base + change, added = mixed - base;
    const double lost = (base - (mixed - added)) + (change - added);
    const double sum = mixed - mixed == 0 ? mixed : (1 - momentum) * old + momentum * taken;
    const float kept = stored<float>(sum);
    const double left = (sum - double(kept)) + lost;
    const float next = left - left == 0 ? float(left) : 0.0f;
    values[c] = kept;
    carries[c] = float(double(kept) + next) == kept ? next : next * shorter;
  }
}

void blend(int64_t channels, double momentum, const double* batch, double factor, float* values, float* carries) {
  (momentum <= 0.5 ? blend_in<true> : blend_in<false>)(channels, momentum, batch, factor, values, carries);
}

template <class S>
constexpr CoefficientKernels coefficient_kernels() {
  return {statistics,  finite,     means<S>,   normalize<S>, lines<S>, two_parts, apply<S>,
          gradient<S>, parameters, relu_gates, spread,       fold,     blend};
}

}  // namespace

extern const CoefficientKernels coefficients[2];
const CoefficientKernels coefficients[2] = {coefficient_kernels<float>(), coefficient_kernels<double>()};

}  // namespace batchnorm::BATCHNORM_ISA
