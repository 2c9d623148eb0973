// The activations and their derivatives on vectors. float32 by polynomials fitted here (least squares on Chebyshev
// nodes; relative error a few 1e-7 at most, but for gelu below -1), float64 by series and a polynomial (a few 1e-16).
#pragma once

#include <cstdint>
#include <type_traits>

#include "batchnorm.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {

// Of an even number of coefficients, the highest first: those of even and odd powers side by side, because each step
// waits for the one before.
template <class S, class V, size_t count>
INLINE V polynomial(V v, const S (&k)[count]) {
  const V square = v * v;
  V odd = V{} + k[0], even = V{} + k[1];
  for (size_t i = 2; i < count; i += 2) {
    odd = odd * square + k[i];
    even = even * square + k[i + 1];
  }
  return odd * v + even;
}

// The same by Horner's rule, of any number of coefficients: one instruction fewer, and a longer wait.
template <class S, class V, size_t count>
INLINE V horner(V v, const S (&k)[count]) {
  V p = V{} + k[0];
  for (size_t i = 1; i < count; ++i) p = p * v + k[i];
  return p;
}

// A value plus this has the nearest integer in its low bits. Shifted, they are the exponent of that power of two.
constexpr float kMagic = 0x1.8p23f;

INLINE f32 times_power(f32 v, f32 bits) { return (f32)((u32)v + ((u32)bits << 23)); }

// v is n log 2 + r, |r| at most log 2 / 2, and n the low bits of the other. Of values from -87.3 to 88.3; NaN stays.
struct Reduced {
  f32 bits, r;
};
INLINE Reduced reduced_of(f32 v) {
  const f32 bits = v * 0x1.715476p0f + kMagic, n = bits - kMagic;
  const f32 r = v - n * 0x1.62e4p-1f;  // log 2, high part: n * high is exact
  return {bits, r - n * 1.4286068203094172e-6f};
}

// (exp(r) - 1 - r) / r^2
INLINE f32 exp_rest_of(f32 r) {
  return horner<float>(r, {0.001382941147312522f, 0.008374777622520924f, 0.0416683591902256f, 0.1666642129421234f,
                           0.49999991059303284f});
}

INLINE f32 exp_within(f32 v) {
  const Reduced e = reduced_of(v);
  return times_power((exp_rest_of(e.r) * e.r + 1.f) * e.r + 1.f, e.bits);
}

INLINE f32 exp_of_negative(f32 v) { return exp_within(vmax(v, f32{} - 87.3f)); }

// 2^r, of r from -0.5 to 0.5.
INLINE f32 power_of(f32 r) {
  return horner<float>(r, {0.00015370704780f, 0.0013399834830f, 0.0096183732500f, 0.0555032904000f, 0.2402264850000f,
                           0.6931472060000f, 1.f});
}

INLINE f32 abs_of(f32 v) { return (f32)((u32)v & 0x7fffffffu); }

// Neither the exponential nor its reciprocal is below the normal numbers.
INLINE f32 sigmoid_of(f32 z) { return 1.f / (1.f + exp_within(vmin(vmax(-z, f32{} - 87.3f), f32{} + 87.3f))); }

// 2^n, and exp(r) - 1, where v is n log 2 + r and |r| at most log 2 / 2.
template <class V>
struct Powers {
  V two, rest;
};

INLINE Powers<f32> powers_of(f32 v) {
  const Reduced e = reduced_of(v);
  return {times_power(f32{} + 1.f, e.bits), e.r + e.r * e.r * exp_rest_of(e.r)};
}

INLINE f32 tanh_of(f32 z) {
  f32 a = abs_of(z), u = z * z;
  f32 small = horner<float>(u, {-0.005652355495840311f, 0.020583489909768105f, -0.053718484938144684f,
                                0.13331091403961182f, -0.3333325982093811f});
  small = z + z * (small * u);
  f32 e = exp_of_negative(-2.f * a);
  f32 large = (1.f - e) / (1.f + e);
  large = (f32)((u32)large | ((u32)z & 0x80000000u));
  return select(a < 0.625f, small, large);
}

// The normal distribution at -c, where c is |z|: its function, 0.5 * erfc(c / sqrt 2), and exp(-c^2 / 2).
template <class V>
struct Tail {
  V c, cdf, bell;
};

// The function is exp(-c^2 / 2) / (1 + sqrt(2) c) times a polynomial in c / (c + sqrt(8)) here, in 1 / (a + 3) below
// (relative errors of the polynomials 1.4e-8 and 2e-16). Here both quotients come of one division, and lose little if c
// is small. The power of two is that of the exact square, whose rest one more product gives unrounded.
INLINE Tail<f32> tail_of(f32 z) {
  const f32 c = vmin(abs_of(z), f32{} + 13.15f), w = c * 0.8493218002880191f;
  const f32 bits = kMagic - w * w, r = -(w * w) - (bits - kMagic);
  const f32 bell = times_power(power_of(r), bits);
  const f32 b = c + 2.8284271247461903f, d = 1.f + 1.4142135623730951f * c, both = 1.f / (b * d);
  const f32 s = 2.4301075268817205f * (c * d * both) - 1.f;
  const f32 p =
      polynomial<float>(s, {-3.603901989720529e-05f, -6.224834219401236e-05f, 0.0003357762711042532f,
                            0.0009495937672695419f, -0.003028393362475851f, -0.009943452607982664f,
                            0.05546892255709207f, -0.0889895114624821f, -0.007168588633134829f, 0.6436172985240869f});
  return {c, p * (b * both) * bell, bell};
}

// ---- float64
constexpr double kLog2High = 0x1.62e42fefa3800p-1, kLog2Low = 0x1.ef35793c76730p-45;  // n * high is exact

INLINE Powers<f64> powers_of(f64 v) {
  const f64 magic = f64{} + 0x1.8p52, bits = v * 0x1.71547652b82fep0 + magic, n = bits - magic;
  f64 r = v - n * kLog2High;
  r = r - n * kLog2Low;
  const f64 p =
      polynomial<double>(r, {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320.,
                             1 / 5040., 1 / 720., 1 / 120., 1 / 24., 1 / 6., 1 / 2.});  // the next term is 4e-18
  return {(f64)(((s64)bits << 52) + (s64)(f64{} + 1.)), r + r * r * p};
}

INLINE f64 exp_of(f64 v) {
  const Powers<f64> p = powers_of(vmin(vmax(v, f64{} - 708.), f64{} + 708.));
  return p.two + p.two * p.rest;
}

INLINE f64 abs_of(f64 v) { return (f64)((s64)v & INT64_MAX); }

INLINE f64 sigmoid_of(f64 z) { return 1. / (1. + exp_of(-z)); }

INLINE f64 tanh_of(f64 z) {
  const Powers<f64> p = powers_of(vmax(-2. * abs_of(z), f64{} - 40.));
  const f64 below = (p.two - 1.) + p.two * p.rest;  // exp(-2 |z|) - 1
  const f64 t = -below / (2. + below);
  return (f64)((s64)t | ((s64)z & INT64_MIN));
}

INLINE Tail<f64> tail_of(f64 z) {
  const f64 c = vmin(abs_of(z), f64{} + 37.6), a = c * 0.70710678118654752440;
  const f64 bell = exp_of(-0.5 * c * c), s = 1.2255639097744362 - 6.676691729323308 / (a + 3.);
  const f64 p = polynomial<double>(
      s, {9.750819947234462e-11,   2.633691878325225e-09, 1.7616626860101974e-09, -2.913124007279513e-08,
          -4.02274619445808e-08,   1.939537497023119e-07, 4.420009573815869e-07,  -1.1561960992098138e-06,
          -3.9057809647962905e-06, 8.099148579707868e-06, 3.201762445760252e-05,  -8.087858090915085e-05,
          -0.000231313955657629,   0.0010762618705158864, 0.0003441108698033559,  -0.013143887768281234,
          0.04875433484776166,     -0.10280064564228518,  0.13463513285326478,    -0.07678519416450127,
          -0.10914145197791969,    1.2661165619901906});
  const f64 tail = 0.5 * p / (1. + 2. * a) * bell;
  return {c, tail, bell};
}

// NaN gives NaN without a test, here and above: minimum and maximum keep it, and both sides of each choice hold it.
INLINE f64 gelu_of(f64 z) {
  const auto tail = tail_of(z);
  return vmax(z, f64{}) - tail.c * tail.cdf;
}

// The normal distribution's function at -c as one power of two, whose exponent is a polynomial of c. It takes no
// division. The polynomial is fitted up to c = 8, where the function is 6e-16, and what lies beyond is taken for -8.
// Its error grows with c: the value loses at most 8 + 4 z^2 units in the last place.
INLINE f32 gelu_of(f32 z) {
  const f32 c = vmin(abs_of(z), f32{} + 8.f);
  const f32 p = horner<float>(
      c, {1.1266790972408458e-10f, -5.850630202530738e-09f, 1.3533448850466812e-07f, -1.8345510852668667e-06f,
          1.6031333871069364e-05f, -9.172331192530692e-05f, 0.0003048632643185556f, -1.6695625163265504e-05f,
          -0.0069555314257740974f, 0.05246053263545036f, 0.45921164751052856f, 1.1511054039001465f, 1.f});
  const f32 bits = kMagic - p, r = (kMagic - bits) - p;
  return vmax(z, f32{}) - c * times_power(power_of(r), bits);
}

template <class V>
INLINE V gelu_slope_of(V z) {
  using S = std::remove_reference_t<decltype(z[0])>;
  const auto tail = tail_of(z);
  return select(z < V{}, tail.cdf, S(1) - tail.cdf) + z * (S(0.39894228040143267794) * tail.bell);
}

// exp(z) - 1 of what is not above 0, and 0 of what is; NaN stays. And exp(z).
template <class V>
INLINE Powers<V> powers_below(V z) {
  using S = std::remove_reference_t<decltype(z[0])>;
  return powers_of(vmin(vmax(z, V{} - (sizeof(S) == 8 ? S(708) : S(87.3))), V{}));
}
template <class V>
INLINE V elu_tail_of(V z) {
  using S = std::remove_reference_t<decltype(z[0])>;
  const Powers<V> p = powers_below(z);
  return p.two * p.rest + (p.two - S(1));
}
template <class V>
INLINE V elu_slope_of(V z) {
  const Powers<V> p = powers_below(z);
  return p.two * p.rest + p.two;
}

// exp(z), and what mish's tanh(log(1 + exp(z))) is the quotient of: w / (w + 2). Beyond 20 (40) the quotient is 1.
template <class V>
struct Softplus {
  V e, w;
};
INLINE Softplus<f32> softplus_of(f32 z) {
  const f32 e = exp_within(vmin(vmax(z, f32{} - 87.3f), f32{} + 20.f));
  return {e, e * (e + 2.f)};
}
INLINE Softplus<f64> softplus_of(f64 z) {
  const f64 e = exp_of(vmin(z, f64{} + 40.));
  return {e, e * (e + 2.)};
}

// gelu's approximation 0.5 z (1 + tanh(u)) is z sigmoid(2 u): 2 u, and its slope.
template <class V>
INLINE V gelu_tanh_inner(V z) {
  using S = std::remove_reference_t<decltype(z[0])>;
  return z * (S(1.5957691216057308) + S(0.07135481627260025) * (z * z));
}

template <class V>
INLINE V gelu_tanh_slope_of(V given) {
  using S = std::remove_reference_t<decltype(given[0])>;
  const V z = vmin(vmax(given, V{} - S(30)), V{} + S(30));  // beyond, all but 0 or 1 is gone
  const V u = gelu_tanh_inner(z), s = sigmoid_of(u), rest = sigmoid_of(-u);
  return s + z * (S(1.5957691216057308) + S(0.21406444881780075) * (z * z)) * (s * rest);
}

template <class V>
INLINE V activate(Activation a, V z, double slope) {
  using S = std::remove_reference_t<decltype(z[0])>;
  const V zero{}, six = zero + S(6);
  switch (a) {
    case Activation::identity: return z;
    case Activation::relu: return vmax(z, zero);
    case Activation::relu6: return vmin(vmax(z, zero), six);
    case Activation::leaky_relu: return select(z < zero, z * S(slope), z);
    case Activation::silu: return z * sigmoid_of(z);
    case Activation::gelu: return gelu_of(z);
    case Activation::hardswish: return z * (vmin(vmax(z + S(3), zero), six) / S(6));
    case Activation::sigmoid: return sigmoid_of(z);
    case Activation::tanh: return tanh_of(z);
    case Activation::elu: return vmax(z, zero) + elu_tail_of(z);
    case Activation::mish: {
      const auto p = softplus_of(z);
      return z * (p.w / (p.w + S(2)));
    }
    case Activation::gelu_tanh: return z * sigmoid_of(gelu_tanh_inner(z));
  }
  return z;
}

// The derivative at z. At a kink: what torch takes (0 at the corners of relu and relu6, the slope at 0 of leaky_relu).
template <class V>
INLINE V derivative(Activation a, V z, double slope) {
  using S = std::remove_reference_t<decltype(z[0])>;
  const V zero{}, one = zero + S(1);
  switch (a) {
    case Activation::identity: return one;
    case Activation::relu: return select(z > zero, one, zero);
    case Activation::relu6: return select(z > zero, select(z < zero + S(6), one, zero), zero);
    case Activation::leaky_relu: return select(z > zero, one, zero + S(slope));
    case Activation::silu: {
      V s = sigmoid_of(z);
      return s * (one + z * (one - s));
    }
    case Activation::gelu: return gelu_slope_of(z);
    case Activation::hardswish: return select(z <= zero - S(3), zero, select(z < zero + S(3), z / S(3) + S(0.5), one));
    case Activation::sigmoid: {
      V s = sigmoid_of(z);
      return s * (one - s);
    }
    case Activation::tanh: {
      V t = tanh_of(z);
      return one - t * t;
    }
    case Activation::elu: return elu_slope_of(z);
    case Activation::mish: {
      const auto p = softplus_of(z);
      const V below = one / (p.w + S(2));
      const V inside = vmin(z, zero + (sizeof(S) == 8 ? S(40) : S(20)));
      return below * (p.w + inside * (S(4) * p.e * (one + p.e)) * below);
    }
    case Activation::gelu_tanh: return gelu_tanh_slope_of(z);
  }
  return one;
}

// Of an activation that has no loop of its own. Called, not inlined: twelve of each in every loop would take room, and
// the registers.
template <class V>
__attribute__((noinline)) V activate_called(Activation a, V z, double slope) {
  return activate(a, z, slope);
}
template <class V>
__attribute__((noinline)) V derivative_called(Activation a, V z, double slope) {
  return derivative(a, z, slope);
}

}  // namespace batchnorm::BATCHNORM_ISA
