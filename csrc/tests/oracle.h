// The formulas of batchnorm.h in long double, each value with the error that the core is allowed.
//
// The budget is derived, not tuned. The core computes in float32, and in float64 for float64 elements, for sums, and
// for float32 elements of pools of few values; u is the unit roundoff. mean, scale, shift, k1,
// k2 and k3 are computed in float64 and rounded to that type, so they carry an error of u (where it is float64: the
// roundings of their own formulas). From there on each operation adds u of its result. Activations and their
// derivatives are taken of z rounded to float32 (float64 for float64 elements), with a few units of that type, as
// stated at their place. An element that is stored adds half a unit in the last place of its own type. Where a
// derivative jumps, either side counts only within z's own error of the jump.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace test {

using batchnorm::Activation;

constexpr Real kCoefficientRoundings = 12;  // gamma / sqrt(var + eps)^3 * (sum / m), in float64

// Error of a sum of `count` terms, relative to the sum of their magnitudes. In float64 far above the 2^-53 sqrt(count)
// of its additions. The moments of many 16-bit elements are added up in float32, a few terms at a time.
constexpr int64_t kManyValues = 8192, kManyFloat32 = 128, kManyForward = 1024;
inline bool in_float32(Dtype element, int64_t count) { return format_of(element).size == 2 && count >= kManyValues; }
inline Real sum_error(Dtype element, int64_t count) { return in_float32(element, count) ? 20 * 0x1p-24L : 1e-12L; }
// What float64 loses of dz * x, the mean being taken off their sum alone, in units of |dz| * (|x| + |mean|).
inline Real product_error(Dtype element, int64_t count) {
  return format_of(element).size == 8 || in_float32(element, count) ? 0 : 0x1p-50L;
}
constexpr Real kSmallestDouble = 0x1p-1074L;
// What a sum may lose of each term that is too small for its type.
inline Real smallest_term(Dtype element, int64_t count) {
  return in_float32(element, count) ? 0x1p-149L : kSmallestDouble;
}

struct Bounded {
  Real value = 0, error = 0;
  Real limit = std::numeric_limits<Real>::infinity();  // from here on the element type has infinity alone
  bool allows(double given) const {
    if (std::isinf(given)) return std::signbit(given) == std::signbit(value) && std::fabs(value) + error >= limit;
    return std::fabs(given - value) <= error;  // false for NaN
  }
};

struct Precision {
  Real unit, coefficient, tiny;      // of the compute type, its coefficients, its smallest value
  Real activation, tiny_activation;  // of the type that activations are computed in, its smallest normal value
  bool wide;                         // computed in float64
  Real parts = 0;                    // u of float32, where a forward is computed in it, with a scale in two parts
  // `smallest`: values of the smallest pool; 0 of what is normalized
  Precision(Dtype element, int64_t smallest)
      : wide(element == Dtype::float64 || (element == Dtype::float32 && smallest < kManyFloat32)) {
    const Format& compute = format_of(wide ? Dtype::float64 : Dtype::float32);
    const Format& inner = format_of(element == Dtype::float64 ? Dtype::float64 : Dtype::float32);
    unit = compute.unit_roundoff;
    coefficient = compute.size == 8 ? kCoefficientRoundings * unit : unit;
    tiny = compute.smallest;
    activation = inner.unit_roundoff;
    tiny_activation = inner.smallest_normal;
  }
  // Of a forward by x's own statistics or by others.
  static Precision of_forward(Dtype element, int64_t smallest, bool own) {
    Precision p(element, 0);
    if (own && element == Dtype::float32 && smallest >= kManyForward) p.parts = format_of(element).unit_roundoff;
    return p;
  }
  // The mean as the compute type holds it; the rest of it is carried by the shift.
  Real high(Real mean) const { return wide ? mean : Real(float(mean)); }
};

// Whether a forward takes no mean off: z = x * scale + (beta - mean * scale).
inline bool is_line(Dtype element) { return element == Dtype::float32 || element == Dtype::bfloat16; }

// What one channel of one pool is normalized with.
struct Coefficients {
  Real mean, var, gamma, beta, eps;
  Real scale() const { return gamma / std::sqrt(var + eps); }
};

// What a forward of float32 in float32 loses of the difference, of the shift, and of scales below the normal numbers. A
// mean within two standard deviations is no difference, but in the shift. What is added last, or stored, rounds once
// more, which is counted there.
inline Real two_parts_error(const Precision& p, const Coefficients& k, Real x, Real linear, Real residual) {
  if (p.parts == 0) return 0;
  const Real scale = std::fabs(k.scale()), std = std::sqrt(k.var), mean = std::fabs(k.mean);
  const bool is_large = mean > 0x1p100L;
  const bool may_stay = mean <= 2.001L * std || is_large, may_go = mean >= 1.999L * std && !is_large;
  const Real left = 0x1p-12L * std + 0x1p-23L * mean;
  const Real shift = std::fabs(k.beta) + scale * std::max(may_stay ? mean : 0, may_go ? left : 0);
  const Real reach = std::max(may_stay ? std::fabs(x) : 0, may_go ? std::fabs(x - k.mean) + left : 0);
  const Real sum = (may_go ? reach * scale : 0) + shift + (residual != 0 ? std::fabs(linear) : 0);
  return p.parts * sum * 1.000001L + 8 * p.parts * p.parts * (reach * scale + shift) + 0x1p-149L * (reach + 8);
}

// z = (x - mean) * scale + beta + residual, or the same as a `line`
inline Bounded pre_activation(const Coefficients& k, const Precision& p, Real x, Real residual, bool line) {
  const Real scale = k.scale(), high = line ? 0 : p.high(k.mean), low = high - k.mean;
  const Real linear = (x - k.mean) * scale + k.beta, z = linear + residual;
  const Real product = std::fabs((x - high) * scale), shift = std::fabs(k.beta) + std::fabs(low * scale);
  const Real error = (p.coefficient + 2 * p.unit) * product + p.coefficient * shift +
                     p.unit * (std::fabs(linear) + std::fabs(z)) + p.tiny * (std::fabs(scale) + 4) +
                     two_parts_error(p, k, x, linear, residual);
  return {z, 1.01L * error};
}

// ---------------------------------------------------------------------------------------------- activations
inline Real sigmoid(Real z) { return 1 / (1 + std::exp(-z)); }
inline Real normal_cdf(Real z) { return 0.5L * std::erfc(-z * 0.70710678118654752440L); }
inline Real normal_pdf(Real z) { return 0.39894228040143267794L * std::exp(-0.5L * z * z); }

inline Real softplus(Real z) { return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)); }
// What gelu's approximation takes the tanh of, and its derivative.
inline Real gelu_inner(Real z) { return 0.79788456080286535588L * z * (1 + 0.044715L * z * z); }
inline Real gelu_inner_slope(Real z) { return 0.79788456080286535588L * (1 + 3 * 0.044715L * z * z); }

inline Real activation_at(Activation a, Real z, Real slope) {
  switch (a) {
    case Activation::identity: return z;
    case Activation::relu: return z < 0 ? 0 : z;
    case Activation::relu6: return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::leaky_relu: return z < 0 ? slope * z : z;
    case Activation::silu: return z * sigmoid(z);
    case Activation::gelu: return z * normal_cdf(z);
    case Activation::hardswish: return z < -3 ? 0 : z > 3 ? z : z * (z + 3) / 6;
    case Activation::sigmoid: return sigmoid(z);
    case Activation::tanh: return std::tanh(z);
    case Activation::elu: return z > 0 ? z : std::expm1(z);
    case Activation::mish: return z * std::tanh(softplus(z));
    case Activation::gelu_tanh: return z * sigmoid(2 * gelu_inner(z));
  }
  return z;
}

// At a corner: what torch takes.
inline Real derivative_at(Activation a, Real z, Real slope) {
  switch (a) {
    case Activation::identity: return 1;
    case Activation::relu: return z > 0 ? 1 : 0;
    case Activation::relu6: return z > 0 && z < 6 ? 1 : 0;
    case Activation::leaky_relu: return z > 0 ? 1 : slope;
    case Activation::silu: return sigmoid(z) * (1 + z * sigmoid(-z));
    case Activation::gelu: return normal_cdf(z) + z * normal_pdf(z);
    case Activation::hardswish: return z <= -3 ? 0 : z < 3 ? z / 3 + 0.5L : 1;
    case Activation::sigmoid: return sigmoid(z) * sigmoid(-z);
    case Activation::tanh: return 1 - std::tanh(z) * std::tanh(z);
    case Activation::elu: return z > 0 ? 1 : std::exp(z);
    case Activation::mish: {
      const Real t = std::tanh(softplus(z)), e = std::cosh(softplus(z));
      return t + z * sigmoid(z) / (e * e);
    }
    case Activation::gelu_tanh: {
      const Real u = 2 * gelu_inner(z);
      return sigmoid(u) + z * 2 * gelu_inner_slope(z) * sigmoid(u) * sigmoid(-u);
    }
  }
  return 1;
}

// Error of the core's own formula, in units u of the value. exp(-z^2 / 2) loses z^2 u by the rounding of z^2; gelu in
// float32 is one power, whose exponent of up to z^2 takes a second rounding.
inline Real activation_roundings(Activation a, Real z, bool is_float32) {
  switch (a) {
    case Activation::identity:
    case Activation::relu:
    case Activation::relu6: return 0;
    case Activation::leaky_relu: return 2;  // of slope, of the product
    case Activation::hardswish: return 4;
    case Activation::gelu: return 8 + (is_float32 ? 4 : 2) * z * z;
    case Activation::gelu_tanh: return 8 + 8 * std::fabs(gelu_inner(z));
    default: return 8;
  }
}

// The same for the derivative, in units u of 1. silu: z * (1 - s), where 1 - s is known to u; nothing is left of it
// beyond 20.
inline Real derivative_roundings(Activation a, Real z) {
  switch (a) {
    case Activation::identity:
    case Activation::relu:
    case Activation::relu6: return 0;
    case Activation::leaky_relu: return 1;
    case Activation::hardswish: return 4;
    case Activation::silu: return 8 * (1 + std::min<Real>(std::fabs(z), 20));
    case Activation::gelu:
    case Activation::sigmoid: return 12;
    case Activation::elu: return 4;
    case Activation::mish:
    case Activation::gelu_tanh:
    case Activation::tanh: return 16;
  }
  return 0;
}

// How far a function moves within the error of its argument.
template <class F>
Real spread(F f, const Bounded& z) {
  const Real at = f(z.value);
  return std::max(std::fabs(f(z.value - z.error) - at), std::fabs(f(z.value + z.error) - at));
}

struct Curve {
  Activation activation;
  double slope;
  Precision precision;

  bool is_exact() const { return activation <= Activation::relu6; }
  bool is_float32() const { return precision.activation == format_of(Dtype::float32).unit_roundoff; }
  Bounded rounded(const Bounded& z) const { return {z.value, z.error + precision.activation * std::fabs(z.value)}; }

  Bounded value(const Bounded& z) const {
    auto f = [&](Real v) { return activation_at(activation, v, slope); };
    const Real v = f(z.value);
    if (is_exact()) return {v, spread(f, z)};
    const Real own = activation_roundings(activation, z.value, is_float32()) * precision.activation * std::fabs(v);
    // gelu in float32 takes what lies below -8 for -8.
    const bool is_tail = activation == Activation::gelu && is_float32() && z.value < -7.99L;
    const Real tail = is_tail ? 1e-14L : 0;
    return {v, own + tail + spread(f, rounded(z)) + precision.tiny_activation * (1 + std::fabs(z.value))};
  }
  Bounded derivative(const Bounded& z) const {
    auto f = [&](Real v) { return derivative_at(activation, v, slope); };
    if (activation == Activation::identity) return {1, 0};
    const Real v = f(z.value), size = activation == Activation::elu ? std::fabs(v) : 1;
    return {v, derivative_roundings(activation, z.value) * precision.activation * size + spread(f, rounded(z)) +
                   precision.tiny_activation};
  }
  // dz = dy * derivative
  Bounded gated(const Bounded& derivative, Real dy) const {
    const Real dz = dy * derivative.value, rounding = precision.activation * std::fabs(dz) + precision.tiny_activation;
    return {dz, std::fabs(dy) * derivative.error + (is_exact() ? 0 : rounding)};
  }
  // The bit of an element: 1, 0, or -1 where its error leaves both.
  int sign(const Bounded& z) const {
    const auto inside = [&](Real v) { return v > 0 && (activation != Activation::relu6 || v < 6); };
    const bool low = inside(z.value - z.error), high = inside(z.value + z.error);
    return low == high ? int(inside(z.value)) : -1;
  }
};

// dx = k1 * dz + k2 * (x - mean) + k3; of a `line` the mean is not taken off x
inline Bounded input_gradient(const Bounded& dz, Real k1, Real k2, Real k3, Real x, Real mean, const Precision& p,
                              bool line) {
  const Real high = line ? 0 : p.high(mean), first = std::fabs(k1 * dz.value), second = std::fabs(k2 * (x - high)),
             third = std::fabs(k3) + std::fabs(k2 * (high - mean));
  const Real error = std::fabs(k1) * dz.error + (p.coefficient + 3 * p.unit) * first +
                     (p.coefficient + 4 * p.unit) * second + (p.coefficient + 2 * p.unit) * third +
                     p.tiny * (std::fabs(dz.value) + std::fabs(x - high) + 4);
  return {k1 * dz.value + k2 * (x - mean) + k3, 1.01L * error};
}

// The same value stored as an element.
inline Bounded stored(const Bounded& v, Dtype element) {
  const Format& f = format_of(element);
  const Real half_unit = f.unit_roundoff * (std::fabs(v.value) + v.error) + f.smallest / 2;
  return {v.value, v.error + half_unit, f.largest * (1 + f.unit_roundoff / 2)};
}

}  // namespace test
