// Values of the four element types as float64, one by one. For statistics and coefficients; the kernels have vectors.
// Like every header that kernels.cpp does not include, for sources that are compiled for every machine alone.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "batchnorm.h"

namespace batchnorm {

inline int64_t element_size(Dtype d) { return d == Dtype::float64 ? 8 : d == Dtype::float32 ? 4 : 2; }

// A 16-bit value: the bits of it as they lie in memory.
template <Dtype dtype>
struct Half {
  uint16_t bits;
};
using Bfloat16 = Half<Dtype::bfloat16>;
using Float16 = Half<Dtype::float16>;

inline double value_of(double v) { return v; }
inline double value_of(float v) { return v; }
inline double value_of(Bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline double value_of(Float16 v) {
  const uint32_t exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
  float magnitude;
  if (exponent == 0) {
    magnitude = float(fraction) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
    std::memcpy(&magnitude, &bits, 4);
  }
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest value, ties to even. 16-bit types are reached by way of float32, as torch's conversions reach them.
inline void store(double v, double* to) { *to = v; }
inline void store(double v, float* to) { *to = float(v); }
inline void store(double v, Bfloat16* to) {
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  to->bits = f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(double v, Float16* to) {
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    to->bits = sign | 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    to->bits = sign | 0x7c00;  // from the middle between 65504 and 65536 on
  } else if (bits < 0x38800000) {
    // Below 2^-14 a unit is 2^-24: in the sum with 1/2 it is the last place of a float32.
    const float sum = std::fabs(f) + 0.5f;
    uint32_t low;
    std::memcpy(&low, &sum, 4);
    to->bits = uint16_t(sign | (low - 0x3f000000));
  } else {
    const uint32_t rounded = bits - 0x38000000 + 0xfff + ((bits >> 13) & 1);
    to->bits = uint16_t(sign | (rounded >> 13));
  }
}

// f(pointer of the type that `dtype` says).
template <class Pointer, class F>
void with_type(Dtype dtype, Pointer* data, const F& f) {
  constexpr bool is_const = std::is_const_v<Pointer>;
  const auto as = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    f(static_cast<std::conditional_t<is_const, const T, T>*>(data));
  };
  switch (dtype) {
    case Dtype::float32: return as(static_cast<float*>(nullptr));
    case Dtype::float64: return as(static_cast<double*>(nullptr));
    case Dtype::bfloat16: return as(static_cast<Bfloat16*>(nullptr));
    case Dtype::float16: return as(static_cast<Float16*>(nullptr));
  }
}

// `count` elements as float64.
inline void convert(Dtype dtype, const void* from, int64_t count, double* to) {
  with_type(dtype, from, [&](const auto* values) {
    for (int64_t i = 0; i < count; ++i) to[i] = value_of(values[i]);
  });
}

// The reverse: each is rounded to the nearest.
inline void convert(const double* from, int64_t count, Dtype dtype, void* to) {
  with_type(dtype, to, [&](auto* values) {
    for (int64_t i = 0; i < count; ++i) store(from[i], &values[i]);
  });
}

}  // namespace batchnorm
