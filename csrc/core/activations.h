// The activations and their derivatives on vectors. float32 by polynomials fitted here (relative error a few 1e-7 at
// most, least squares on Chebyshev nodes), float64 by the C library, lane by lane.
#pragma once

#include <cmath>
#include <type_traits>

#include "batchnorm.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {

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

INLINE Normal32 normal_of(f32 z) {
  f32 c = vmin(abs_of(z), f32{} + 13.15f), a = c * 0x1.6a09e6p-1f;
  f32 bell = exp_of(-0.5f * c * c);
  f32 u = vmin(a * a, f32{} + 1.f);
  f32 e = -0.0005625396152026951f * u + 0.004916023463010788f;
  e = e * u - 0.02670994959771633f;
  e = e * u + 0.11280130594968796f;
  e = e * u - 0.37612318992614746f;
  e = e * u + 1.1283791065216064f;
  f32 near = 0.5f + 0.5f * (f32)((u32)(a * e) | ((u32)z & 0x80000000u));
  f32 t = 1.f / (a + 2.f);
  f32 p = 24.438236236572266f * t - 29.699134826660156f;
  p = p * t + 5.7264227867126465f;
  p = p * t + 1.8049530982971191f;
  p = p * t + 2.8884613513946533f;
  p = p * t + 1.972633719444275f;
  p = p * t + 1.128339171409607f;
  p = p * t + 0.5641924142837524f;
  f32 tail = 0.5f * t * p * bell;
  f32 far = select(z < 0.f, tail, 1.f - tail);
  return {keep_nan(z, select(a < 1.f, near, far)), 0.3989422804014327f * bell};
}

template <class F>
INLINE f64 each_lane(f64 z, F f) {
  f64 out;
  for (int i = 0; i < kLanes64; ++i) out[i] = f(z[i]);
  return out;
}
INLINE f64 sigmoid_of(f64 z) {
  return each_lane(z, [](double v) { return 1 / (1 + ::exp(-v)); });
}
INLINE f64 tanh_of(f64 z) {
  return each_lane(z, [](double v) { return ::tanh(v); });
}
struct Normal64 {
  f64 cdf, pdf;
};
INLINE Normal64 normal_of(f64 z) {
  return {each_lane(z, [](double v) { return 0.5 * ::erfc(-v * 0.70710678118654752440); }),
          each_lane(z, [](double v) { return 0.39894228040143267794 * ::exp(-0.5 * v * v); })};
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

}  // namespace batchnorm::BATCHNORM_ISA
