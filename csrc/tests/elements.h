// The four element types as exact doubles, written from their definitions and independent of the core's conversions,
// and random numbers that are the same on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "batchnorm.h"

namespace test {

using batchnorm::Dtype;

using Real = long double;

struct Format {
  const char* name;
  int size, fraction_bits, exponent_bits;
  uint64_t guard;  // a NaN that no arithmetic makes
  int lowest_exponent = 2 - (1 << (exponent_bits - 1));
  Real unit_roundoff = std::ldexp(1.0L, -fraction_bits - 1);
  Real smallest_normal = std::ldexp(1.0L, lowest_exponent);
  Real smallest = std::ldexp(1.0L, lowest_exponent - fraction_bits);
  Real largest = std::ldexp(2 - 2 * unit_roundoff, 1 - lowest_exponent);
};

inline const Format& format_of(Dtype dtype) {
  static const Format formats[] = {{"float32", 4, 23, 8, 0x7fcaffee},
                                   {"float64", 8, 52, 11, 0x7ff8cafecafecafe},
                                   {"bfloat16", 2, 7, 8, 0x7fda},
                                   {"float16", 2, 10, 5, 0x7e5a}};
  return formats[int(dtype)];
}

inline double decode16(const Format& f, uint16_t bits) {
  const int exponent = (bits & 0x7fff) >> f.fraction_bits, fraction = bits & ((1 << f.fraction_bits) - 1);
  const int lowest = f.lowest_exponent, hidden = 1 << f.fraction_bits;
  double magnitude;
  if (exponent == (1 << f.exponent_bits) - 1)
    magnitude = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    magnitude = std::ldexp(fraction, lowest - f.fraction_bits);
  else
    magnitude = std::ldexp(hidden + fraction, lowest + exponent - 1 - f.fraction_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even; beyond the largest value by half a unit or more, to infinity.
inline uint16_t encode16(const Format& f, double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = uint16_t(((1 << f.exponent_bits) - 1) << f.fraction_bits);
  if (value == 0) return sign;
  if (std::isnan(value)) return infinity | uint16_t(1 << (f.fraction_bits - 1));
  if (std::isinf(value)) return sign | infinity;
  int exponent;
  std::frexp(value, &exponent);  // |value| in [2^(exponent - 1), 2^exponent)
  exponent = std::max(exponent - 1, f.lowest_exponent);
  const auto count = uint32_t(std::nearbyint(std::ldexp(std::fabs(value), f.fraction_bits - exponent)));
  // `count` units of this binade; one binade up where it is rounded up to twice the hidden bit.
  const uint32_t bits = (uint32_t(exponent - f.lowest_exponent) << f.fraction_bits) + count;
  return sign | uint16_t(std::min<uint32_t>(bits, infinity));
}

inline double decode(Dtype dtype, const void* p) {
  if (dtype == Dtype::float64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  if (dtype == Dtype::float32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return decode16(format_of(dtype), bits);
}

inline void encode(Dtype dtype, double value, void* p) {
  const float single = static_cast<float>(value);
  if (dtype == Dtype::float64) {
    std::memcpy(p, &value, 8);
  } else if (dtype == Dtype::float32) {
    std::memcpy(p, &single, 4);
  } else {
    const uint16_t bits = encode16(format_of(dtype), value);
    std::memcpy(p, &bits, 2);
  }
}

// SplitMix64 (Steele, Lea & Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  double uniform(double low, double high) { return low + (high - low) * double(bits() >> 11) * 0x1p-53; }
  double normal() {  // Box & Muller
    const double radius = std::sqrt(-2 * std::log(uniform(0x1p-53, 1)));
    return radius * std::cos(uniform(0, 6.283185307179586));
  }

 private:
  uint64_t state_;
};

}  // namespace test
