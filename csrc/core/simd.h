// Vectors of the width that BATCHNORM_VECTOR_BYTES says, on the compiler's vector extension. Everything here lives in
// a namespace of the instruction set, so that no function compiled for one set is linked in place of another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define VB BATCHNORM_VECTOR_BYTES
#define INLINE inline __attribute__((always_inline))
// Of a lambda. One that is called instead reads what it holds from memory again behind each store of 16-bit values,
// which may be of anything.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__) || defined(__aarch64__)
#define INLINED __attribute__((always_inline))
#else
#define INLINED  // few such processors are left, and sanitized code would take twice as long to compile
#endif

namespace batchnorm::BATCHNORM_ISA {

using i64 = int64_t;
typedef float f32 __attribute__((vector_size(VB)));
typedef double f64 __attribute__((vector_size(VB)));
typedef uint32_t u32 __attribute__((vector_size(VB)));
typedef int32_t i32 __attribute__((vector_size(VB)));
typedef int64_t s64 __attribute__((vector_size(VB)));
typedef uint16_t u16 __attribute__((vector_size(VB / 2)));
typedef float half_f32 __attribute__((vector_size(VB / 2)));
constexpr int kLanes32 = VB / 4, kLanes64 = VB / 8;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class V>
INLINE V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
INLINE void store_bytes(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// ---- the lanes of a float32 vector's two halves
#if VB == 16
#define LOW_LANES 0, 1
#define HIGH_LANES 2, 3
#elif VB == 32
#define LOW_LANES 0, 1, 2, 3
#define HIGH_LANES 4, 5, 6, 7
#else
#define LOW_LANES 0, 1, 2, 3, 4, 5, 6, 7
#define HIGH_LANES 8, 9, 10, 11, 12, 13, 14, 15
#endif

// Half a vector of float32 as float64, and back. By name, because GCC splits a generic conversion in two.
INLINE f64 widen(half_f32 v) {
#if VB == 64
  return (f64)_mm512_cvtps_pd((__m256)v);
#elif VB == 32
  return (f64)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, f64);
#endif
}
INLINE half_f32 narrow(f64 v) {
#if VB == 64
  return (half_f32)_mm512_cvtpd_ps((__m512d)v);
#elif VB == 32
  return (half_f32)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, half_f32);
#endif
}

// 16-bit integers as 32-bit ones, and back; by name for the same reason.
INLINE u32 zero_extended(const void* p) {
#if VB == 64
  return (u32)_mm512_cvtepu16_epi32(load_bytes<__m256i>(p));
#elif VB == 32
  return (u32)_mm256_cvtepu16_epi32(load_bytes<__m128i>(p));
#else
  return __builtin_convertvector(load_bytes<u16>(p), u32);
#endif
}
INLINE u16 low_halves(u32 v) {  // of values below 2^16
#if VB == 64
  return (u16)_mm512_cvtepi32_epi16((__m512i)v);
#elif VB == 32
  return (u16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, u16);
#endif
}

// f(0), ..., f(N - 1), each a constant: the compiler keeps arrays in registers whose places are constants.
template <class F, int... k>
INLINE void times(std::integer_sequence<int, k...>, const F& f) {
  (f(std::integral_constant<int, k>{}), ...);
}
template <int N, class F>
INLINE void times(const F& f) {
  times(std::make_integer_sequence<int, N>{}, f);
}

// ---- elements in memory as vectors: V of float32, or of float64 for float64
template <class T>
struct Lane;

// Two vectors that are read, worked on and written together.
template <class V>
struct Pair {
  V a, b;
};

template <>
struct Lane<float> {
  using V = f32;
  using S = float;
  static constexpr int width = kLanes32;
  static INLINE V load(const float* p) { return load_bytes<V>(p); }
  static INLINE void store(float* p, V v) { store_bytes(p, v); }
  static INLINE S scalar(float v) { return v; }
};

template <>
struct Lane<double> {
  using V = f64;
  using S = double;
  static constexpr int width = kLanes64;
  static INLINE V load(const double* p) { return load_bytes<V>(p); }
  static INLINE void store(double* p, V v) { store_bytes(p, v); }
  static INLINE S scalar(double v) { return v; }
};

template <>
struct Lane<bf16> {
  using V = f32;
  using S = float;
  static constexpr int width = kLanes32;
  // Stores to nearest, ties to even. A NaN stays one, as long as the lower half of its bits is empty: so it is in all
  // that come of bfloat16 values and of the coefficients.
#if VB == 64
  static INLINE V widened(__m256i words) {
    const __m512i halves = _mm512_castsi256_si512(words);
    return (V)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(lane_numbers() << 16), halves);
  }
  static INLINE __m256i narrowed(V v) {
    const __m512i bits = (__m512i)v, below = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_mask_add_epi32(below, odd, below, _mm512_set1_epi32(1));
    const u32 high = lane_numbers() * 0x40004u + 0x30001u;  // words 1, 3, 5, ...
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)high, rounded));
  }
  static INLINE V load(const bf16* p) { return widened(load_bytes<__m256i>(p)); }
  static INLINE void store(bf16* p, V v) { store_bytes(p, narrowed(v)); }
  static INLINE u32 lane_numbers() {
    u32 v;
    for (unsigned i = 0; i < width; ++i) v[i] = i;
    return v;
  }
#else
  static INLINE V load(const bf16* p) { return (V)(zero_extended(p) << 16); }
  static INLINE void store(bf16* p, V v) { store_bytes(p, low_halves(rounded(v) >> 16)); }
#endif
  static INLINE u32 rounded(V v) {  // the upper half is the result
    const u32 bits = (u32)v;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  // Two vectors from 2 * width elements, those at even places and those at odd ones: widening and narrowing take an
  // instruction less than in the order of memory, and cross no lanes.
  static INLINE Pair<V> load_pair(const bf16* p) {
    const u32 words = load_bytes<u32>(p);
    return {(V)(words << 16), (V)(words & 0xffff0000u)};
  }
  static INLINE void store_pair(bf16* p, V even, V odd) {
    store_bytes(p, (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u));
  }
  // The same in the order of memory.
  static INLINE void store_two(bf16* p, V a, V b) {
#if VB == 32
    const __m256i words = _mm256_packus_epi32((__m256i)(rounded(a) >> 16), (__m256i)(rounded(b) >> 16));
    store_bytes(p, _mm256_permute4x64_epi64(words, 0xd8));
#else
    store(p, a);
    store(p + width, b);
#endif
  }
  static INLINE S scalar(bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    S s;
    std::memcpy(&s, &bits, 4);
    return s;
  }
};

INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &rest, 4);
  magnitude *= 0x1p112f;  // rebias; makes denormals right as well
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  if ((h & 0x7c00u) == 0x7c00u) bits = 0x7f800000u | (rest & 0x7fffffu);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}

template <>
struct Lane<f16> {
  using V = f32;
  using S = float;
  static constexpr int width = kLanes32;
#if VB == 64
  static INLINE V widened(__m256i words) { return (V)_mm512_cvtph_ps(words); }
  static INLINE __m256i narrowed(V v) { return _mm512_cvtps_ph((__m512)v, 0); }
  static INLINE V load(const f16* p) { return widened(load_bytes<__m256i>(p)); }
  static INLINE void store(f16* p, V v) { store_bytes(p, narrowed(v)); }
#elif defined(__F16C__)
  static INLINE V load(const f16* p) { return (V)_mm256_cvtph_ps(load_bytes<__m128i>(p)); }
  static INLINE void store(f16* p, V v) { store_bytes(p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
  static INLINE V load(const f16* p) {
    u32 h = __builtin_convertvector(load_bytes<u16>(p), u32);
    u32 rest = (h & 0x7fffu) << 13;
    u32 bits = (u32)((f32)rest * 0x1p112f);
    u32 special = (u32)((i32)(h & 0x7c00u) == (i32)(u32{} + 0x7c00u));
    bits = (special & (0x7f800000u | (rest & 0x7fffffu))) | (~special & bits);
    return (V)(bits | ((h & 0x8000u) << 16));
  }
  static INLINE void store(f16* p, V v) {  // to nearest, ties to even
    u32 bits = (u32)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    u32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    u32 denormal = (u32)((f32)magnitude + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
    u32 small = (u32)((i32)magnitude < (i32)(u32{} + 0x38800000u));
    u32 large = (u32)((i32)magnitude >= (i32)(u32{} + 0x477ff000u));
    u32 nan = (u32)(v != v);
    u32 half = (small & denormal) | (~small & normal);
    half = (large & 0x7c00u) | (~large & half);
    half = (nan & 0x7e00u) | (~nan & half);
    store_bytes(p, __builtin_convertvector(half | sign, u16));
  }
#endif
  static INLINE Pair<V> load_pair(const f16* p) { return {load(p), load(p + width)}; }
  static INLINE void store_pair(f16* p, V a, V b) { store_two(p, a, b); }
  static INLINE void store_two(f16* p, V a, V b) {
#if VB == 32 && defined(__F16C__)
    const __m128i low = _mm256_cvtps_ph((__m256)a, 0), high = _mm256_cvtps_ph((__m256)b, 0);
    store_bytes(p, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
#else
    store(p, a);
    store(p + width, b);
#endif
  }
  static INLINE S scalar(f16 v) { return half_to_float(v.bits); }
};

// ---- a part of a vector
#if VB == 32
// The mask of the first `count` of eight 32-bit lanes.
INLINE __m256i first_lanes(i64 count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` elements at p; the other lanes are zeros.
template <class T>
INLINE typename Lane<T>::V load_some(const T* p, i64 count) {
#if VB == 64
  if constexpr (sizeof(T) == 2) return Lane<T>::widened(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
  if constexpr (sizeof(T) == 4) return (f32)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  if constexpr (sizeof(T) == 8) return (f64)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#elif VB == 32
  if constexpr (sizeof(T) == 4) return (f32)_mm256_maskload_ps(reinterpret_cast<const float*>(p), first_lanes(count));
  if constexpr (sizeof(T) == 8)
    return (f64)_mm256_maskload_pd(reinterpret_cast<const double*>(p), first_lanes(2 * count));
  if constexpr (sizeof(T) == 2) {
    // Out of words, because a vector that is read behind single elements waits until all are in memory.
    const T* const q = p + (count & 4);
    uint64_t rest = count & 2 ? load_bytes<uint32_t>(q) : 0;
    if (count & 1) rest |= uint64_t(load_bytes<uint16_t>(q + (count & 2))) << (count & 2) * 16;
    const uint64_t four = count & 4 ? load_bytes<uint64_t>(p) : rest;
    const __m128i all = _mm_set_epi64x(int64_t(count & 4 ? rest : 0), int64_t(four));
    T values[Lane<T>::width];
    store_bytes(values, all);
    return Lane<T>::load(values);
  }
#else
  T values[Lane<T>::width] = {};
  for (i64 i = 0; i < count; ++i) values[i] = p[i];
  return Lane<T>::load(values);
#endif
}
template <class T>
INLINE void store_some(T* p, typename Lane<T>::V v, i64 count) {
#if VB == 64
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), Lane<T>::narrowed(v));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
#else
  T values[Lane<T>::width];
  Lane<T>::store(values, v);
  const T* from = values;
  const auto copy = [&](auto bytes) {
    std::memcpy(p, from, bytes);
    p += i64(bytes / sizeof(T));
    from += i64(bytes / sizeof(T));
  };
  if (count & 4) copy(std::integral_constant<size_t, 4 * sizeof(T)>{});
  if (count & 2) copy(std::integral_constant<size_t, 2 * sizeof(T)>{});
  if (count & 1) copy(std::integral_constant<size_t, sizeof(T)>{});
#endif
}

// Writes around the cache; the address is a multiple of the width.
INLINE void stream_bytes(void* p, f32 v) {
#if VB == 64
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif VB == 32
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
  store_bytes(p, v);
#endif
}
INLINE void stream_bytes(void* p, u16 v) {
#if VB == 64
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif VB == 32
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store_bytes(p, v);
#endif
}
template <class T, class V>
INLINE void stream(T* p, V v) {
  if constexpr (sizeof(T) == 2) {
    T values[Lane<T>::width];
    Lane<T>::store(values, v);
    stream_bytes(p, load_bytes<u16>(values));
  } else {
    stream_bytes(p, (f32)v);
  }
}

// a * b + c, rounded once, where the instruction set has that.
#if VB > 16 || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
INLINE f32 fused(f32 a, f32 b, f32 c) {
#if VB == 64
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VB == 32
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

template <class M, class V>
INLINE V select(M condition, V yes, V no) {
  return condition ? yes : no;
}

// NaN in a stays, and so does its zero beside one of the other sign. By name, because GCC makes two instructions of it.
template <class V>
INLINE V vmax(V a, V b) {
#if VB == 64
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)b, (__m512)a);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm512_max_pd((__m512d)b, (__m512d)a);
#elif VB == 32
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_max_ps((__m256)b, (__m256)a);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm256_max_pd((__m256d)b, (__m256d)a);
#else
  return select(a < b, b, a);
#endif
}
template <class V>
INLINE V vmin(V a, V b) {
#if VB == 64
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_min_ps((__m512)b, (__m512)a);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm512_min_pd((__m512d)b, (__m512d)a);
#elif VB == 32
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_min_ps((__m256)b, (__m256)a);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm256_min_pd((__m256d)b, (__m256d)a);
#else
  return select(a > b, b, a);
#endif
}

// ---- a vector of elements in the type that is computed in
template <class T>
struct Pack {
  using L = Lane<T>;
  using V = typename L::V;
  using C = V;
  using S = typename L::S;
  static constexpr int parts = 1, width = L::width, lanes = L::width;
  C part[1];
  static INLINE Pack of(V v) { return {{v}}; }
  static INLINE Pack load(const T* p) { return {{L::load(p)}}; }
  INLINE V rounded() const { return part[0]; }
};

// A vector of float32 values as float64.
struct Wide {
  using V = f32;
  using C = f64;
  using S = double;
  static constexpr int parts = 2, width = kLanes32, lanes = kLanes64;
  C part[2];
  static INLINE Wide of(V v) {
    return {{widen(__builtin_shufflevector(v, v, LOW_LANES)), widen(__builtin_shufflevector(v, v, HIGH_LANES))}};
  }
  static INLINE Wide load(const float* p) {
    return {{widen(load_bytes<half_f32>(p)), widen(load_bytes<half_f32>(p + kLanes64))}};
  }
  INLINE V rounded() const { return __builtin_shufflevector(narrow(part[0]), narrow(part[1]), LOW_LANES, HIGH_LANES); }
};

// float64 for float32 and float64 elements.
template <class T>
using InDoubles = std::conditional_t<sizeof(T) == 4, Wide, Pack<T>>;

template <class V>
struct Masks;  // the integer vector of a comparison
template <>
struct Masks<f32> {
  typedef i32 type;
};
template <>
struct Masks<f64> {
  typedef s64 type;
};

// 0, 1, 2, ...
template <class V>
INLINE typename Masks<V>::type lane_numbers() {
  typename Masks<V>::type v{};
  for (int i = 0; i < int(sizeof(V) / sizeof(v[0])); ++i) v[i] = i;
  return v;
}

// Bit i of the result: whether lane i of the mask is set.
INLINE unsigned bits_of(i32 mask) {
#if VB == 64
  return _mm512_movepi32_mask((__m512i)mask);
#elif VB == 32
  return unsigned(_mm256_movemask_ps((__m256)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes32; ++i) bits |= unsigned(mask[i] & 1) << i;
  return bits;
#endif
}
INLINE unsigned bits_of(s64 mask) {
#if VB == 64
  return _mm512_movepi64_mask((__m512i)mask);
#elif VB == 32
  return unsigned(_mm256_movemask_pd((__m256d)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes64; ++i) bits |= unsigned(mask[i] & 1) << i;
  return bits;
#endif
}

}  // namespace batchnorm::BATCHNORM_ISA
