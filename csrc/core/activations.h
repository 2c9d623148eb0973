// The activations and their derivatives on vectors. float32 by polynomials fitted here (relative error a few 1e-7 at
// most, least squares on Chebyshev nodes), float64 by series and a polynomial (a few 1e-16).
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

INLINE f32 round_to_int(f32 v) {
  const f32 magic = f32{} + 0x1.8p23f;
  return (v + magic) - magic;
}

INLINE f32 exp_of(f32 v) {
  v = vmin(vmax(v, f32{} - 87.3f), f32{} + 88.3f);
  f32 n = round_to_int(v * 0x1.715476p0f);
  f32 r = v - n * 0x1.62e4p-1f;  // log 2, high part: n * high is exact
  r = r - n * 1.4286068203094172e-6f;
  f32 p = 0.001382941147312522f * r + 0.008374777622520924f;
  p = p * r + 0.0416683591902256f;
  p = p * r + 0.1666642129421234f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  i32 exponent = __builtin_convertvector(n, i32);
  return (f32)((u32)p + ((u32)exponent << 23));
}

INLINE f32 abs_of(f32 v) { return (f32)((u32)v & 0x7fffffffu); }

INLINE f32 keep_nan(f32 z, f32 v) { return select(z != z, z, v); }

INLINE f32 sigmoid_of(f32 z) {
  f32 e = exp_of(-abs_of(z));
  f32 upper = 1.f / (1.f + e);
  return keep_nan(z, select(z < 0.f, e * upper, upper));
}

INLINE f32 tanh_of(f32 z) {
  f32 a = abs_of(z), u = z * z;
  f32 small = -0.005652355495840311f * u + 0.020583489909768105f;
  small = small * u - 0.053718484938144684f;
  small = small * u + 0.13331091403961182f;
  small = small * u - 0.3333325982093811f;
  small = z + z * (small * u);
  f32 e = exp_of(-2.f * a);
  f32 large = (1.f - e) / (1.f + e);
  large = (f32)((u32)large | ((u32)z & 0x80000000u));
  return keep_nan(z, select(a < 0.625f, small, large));
}

// The normal distribution: its function, 0.5 * erfc(-z / sqrt 2), and its density. They share an exponential.
struct Normal32 {
  f32 cdf, pdf;
};

// erfc(a) is exp(-a^2) / (1 + 2 a) times a polynomial in 1 / (a + 2) here, in 1 / (a + 3) below (relative errors of the
// polynomials 1.4e-8 and 2e-16).
INLINE Normal32 normal_of(f32 z) {
  const f32 c = vmin(abs_of(z), f32{} + 13.15f), a = c * 0x1.6a09e6p-1f;
  const f32 bell = exp_of(-0.5f * c * c), s = 1.4301075268817205f - 4.860215053763441f / (a + 2.f);
  const f32 p =
      polynomial<float>(s, {-7.20780416380551e-05f, -0.00012449668438802472f, 0.0006715525422085063f,
                            0.0018991875345390839f, -0.006056786724951702f, -0.01988690521596533f, 0.11093784511418414f,
                            -0.1779790229249642f, -0.014337177266269659f, 1.2872345970481738f});
  const f32 tail = 0.5f * p / (1.f + 2.f * a) * bell;
  return {keep_nan(z, select(z < 0.f, tail, 1.f - tail)), 0.3989422804014327f * bell};
}

// ---- float64
constexpr double kLog2High = 0x1.62e42fefa3800p-1, kLog2Low = 0x1.ef35793c76730p-45;  // n * high is exact

struct Powers {
  f64 two, rest;  // 2^n, and exp(r) - 1, where v is n log 2 + r and |r| at most log 2 / 2
};

INLINE Powers powers_of(f64 v) {
  const f64 magic = f64{} + 0x1.8p52, bits = v * 0x1.71547652b82fep0 + magic, n = bits - magic;
  f64 r = v - n * kLog2High;
  r = r - n * kLog2Low;
  const f64 p =
      polynomial<double>(r, {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320.,
                             1 / 5040., 1 / 720., 1 / 120., 1 / 24., 1 / 6., 1 / 2.});  // the next term is 4e-18
  return {(f64)(((s64)bits << 52) + (s64)(f64{} + 1.)), r + r * r * p};
}

INLINE f64 exp_of(f64 v) {
  const Powers p = powers_of(vmin(vmax(v, f64{} - 708.), f64{} + 709.));
  return p.two + p.two * p.rest;
}

INLINE f64 abs_of(f64 v) { return (f64)((s64)v & INT64_MAX); }

INLINE f64 keep_nan(f64 z, f64 v) { return select(z != z, z, v); }

INLINE f64 sigmoid_of(f64 z) {
  const f64 e = exp_of(-abs_of(z)), upper = 1. / (1. + e);
  return keep_nan(z, select(z < 0., e * upper, upper));
}

INLINE f64 tanh_of(f64 z) {
  const Powers p = powers_of(vmax(-2. * abs_of(z), f64{} - 40.));
  const f64 below = (p.two - 1.) + p.two * p.rest;  // exp(-2 |z|) - 1
  const f64 t = -below / (2. + below);
  return keep_nan(z, (f64)((s64)t | ((s64)z & INT64_MIN)));
}

struct Normal64 {
  f64 cdf, pdf;
};

INLINE Normal64 normal_of(f64 z) {
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
  return {keep_nan(z, select(z < 0., tail, 1. - tail)), 0.39894228040143267794 * bell};
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
    case Activation::gelu: return z * normal_of(z).cdf;
    case Activation::hardswish: return z * (vmin(vmax(z + S(3), zero), six) / S(6));
    case Activation::sigmoid: return sigmoid_of(z);
    case Activation::tanh: return tanh_of(z);
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
    case Activation::gelu: {
      const auto normal = normal_of(z);
      return normal.cdf + z * normal.pdf;
    }
    case Activation::hardswish: return select(z <= zero - S(3), zero, select(z < zero + S(3), z / S(3) + S(0.5), one));
    case Activation::sigmoid: {
      V s = sigmoid_of(z);
      return s * (one - s);
    }
    case Activation::tanh: {
      V t = tanh_of(z);
      return one - t * t;
    }
  }
  return one;
}

// Of an activation that has no loop of its own. Called, not inlined: nine of each in every loop would take room, and
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
