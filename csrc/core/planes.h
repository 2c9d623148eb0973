// Rows of planes in the type that is computed in, and back; for the kernels of one instruction set.
#pragma once

#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <class T>
struct PlaneRows {
  using L = Lane<T>;
  using V = typename L::V;
  using S = typename L::S;
  static constexpr i64 width = L::width;

  static INLINE V splat(S s) { return V{} + s; }

  static INLINE void widen_row(const T* from, S* to, i64 n) {
    i64 i = 0;
    for (; i + width <= n; i += width) store_bytes<V>(to + i, L::load(from + i));
    if (i < n) store_some<S>(to + i, load_some<T>(from + i, n - i), n - i);
  }
  static INLINE void narrow_row(const S* from, T* to, i64 n) {
    i64 i = 0;
    for (; i + width <= n; i += width) L::store(to + i, load_bytes<V>(from + i));
    if (i < n) store_some<T>(to + i, load_bytes<V>(from + i), n - i);
  }

  // The lanes at even places of two vectors, one behind the other.
  static INLINE V evens(V a, V b) {
    if constexpr (width == 16)
      return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    else if constexpr (width == 8)
      return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    else if constexpr (width == 4)
      return __builtin_shufflevector(a, b, 0, 2, 4, 6);
    else
      return __builtin_shufflevector(a, b, 0, 2);
  }
  static INLINE void widen_every_second(const T* from, S* to, i64 n) {
    i64 i = 0;
    for (; i + width < n; i += width)  // behind the last value there may be nothing to read
      store_bytes(to + i, evens(L::load(from + 2 * i), L::load(from + 2 * i + width)));
    const i64 left = 2 * (n - i) - 1;
    if (left <= 0) return;
    const V low = left < width ? load_some<T>(from + 2 * i, left) : L::load(from + 2 * i);
    const V high = left > width ? load_some<T>(from + 2 * i + width, left - width) : V{};
    if (n - i == width)
      store_bytes(to + i, evens(low, high));
    else
      store_some<S>(to + i, evens(low, high), n - i);
  }

  // Lanes of both in turn.
  static INLINE Pair<V> zipped(V a, V b) {
    if constexpr (width == 16)
      return {__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
              __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
    else if constexpr (width == 8)
      return {__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
              __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
    else if constexpr (width == 4)
      return {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)};
    else
      return {__builtin_shufflevector(a, b, 0, 2), __builtin_shufflevector(a, b, 1, 3)};
  }
};

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
