// The largest values and the means of windows; compiled once for each instruction set.
#include <algorithm>
#include <limits>

#include "planes.h"
#include "pooling.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <class T>
struct Windows : PlaneRows<T> {
  using Base = PlaneRows<T>;
  using L = typename Base::L;
  using V = typename Base::V;
  using S = typename Base::S;
  using M = typename Masks<V>::type;
  static constexpr i64 width = Base::width;
  static constexpr S kLeast = -std::numeric_limits<S>::infinity();

  // Columns of a phase of a row, as many as the windows reach, and what a vector reads beyond.
  static i64 pitch_of(const Pooling& p) {
    return p.out[1] + (p.kernel[1] - 1) / p.stride[1] + 1 + (p.size[1] + p.padding[1]) / p.stride[1] + width;
  }

  // A row with its border, parted by the stride, as in lattice.h.
  static void read_row(const Pooling& p, const T* row, S* phases, i64 pitch) {
    const i64 stride = p.stride[1];
    for (i64 b = 0; b < stride; ++b) {
      const i64 left = p.padding[1] - b, first = left > 0 ? (left + stride - 1) / stride : 0;
      const i64 last = std::max(first, (p.size[1] + left + stride - 1) / stride);
      S* const run = phases + b * pitch;
      std::fill_n(run, first, kLeast);
      std::fill_n(run + last, pitch - last, kLeast);
      const T* const from = row + first * stride - left;
      if (stride == 1)
        Base::widen_row(from, run + first, last - first);
      else if (stride == 2)
        Base::widen_every_second(from, run + first, last - first);
      else
        for (i64 i = 0; i < last - first; ++i) run[first + i] = L::scalar(from[stride * i]);
    }
  }

  // f(row of y, the window's rows [first, last) inside the plane, the values of such a row) for each row of y.
  template <class F>
  static INLINE void for_rows(const Pooling& p, const void* plane, void* scratch, const F& f) {
    const i64 pitch = pitch_of(p), row_size = p.stride[1] * pitch;
    S* const rows = static_cast<S*>(scratch);  // as many as a window has, in turn
    i64 read = 0;                              // rows of the plane that have been
    for (i64 r = 0; r < p.out[0]; ++r) {
      const i64 begin = r * p.stride[0] - p.padding[0];
      const i64 first = std::max<i64>(-begin, 0), last = std::min(p.kernel[0], p.size[0] - begin);
      for (read = std::max(read, begin + first); read < begin + last; ++read)
        read_row(p, static_cast<const T*>(plane) + read * p.size[1], rows + read % p.kernel[0] * row_size, pitch);
      f(r, first, last, [&](i64 i) INLINED { return rows + (begin + i) % p.kernel[0] * row_size; });
    }
  }

  static INLINE void store(const Pooling& p, void* y, i64 row, i64 column, V v) {
    const i64 left = std::min(width, p.out[1] - column);
    T* const to = static_cast<T*>(y) + row * p.out[1] + column;
    left == width ? L::store(to, v) : store_some<T>(to, v, left);
  }

  static void reduce(const Pooling& p, const void* plane, void* y, uint8_t* places, void* scratch) {
    const i64 pitch = pitch_of(p), stride = p.stride[1];
    if (p.mean)
      return for_rows(p, plane, scratch, [&](i64 r, i64 first, i64 last, auto row_of) INLINED {
        const V count = V{} + S(p.kernel[0] * p.kernel[1]);
        for (i64 c = 0; c < p.out[1]; c += width) {
          V sum{};
          for (i64 i = first; i < last; ++i)
            for (i64 j = 0; j < p.kernel[1]; ++j) sum += load_bytes<V>(row_of(i) + c + j % stride * pitch + j / stride);
          store(p, y, r, c, sum / count);
        }
      });
    for_rows(p, plane, scratch, [&](i64 r, i64 first, i64 last, auto row_of) INLINED {
      for (i64 c = 0; c < p.out[1]; c += width) {
        V best = V{} + kLeast;
        M place = first_places(p, first, c);
        for (i64 i = first; i < last; ++i)
          for (i64 j = 0; j < p.kernel[1]; ++j) {
            const V v = load_bytes<V>(row_of(i) + c + j % stride * pitch + j / stride);
            const M taken = (v > best) | (v != v);
            best = taken ? v : best;
            place = taken ? M{} + int(i * p.kernel[1] + j) : place;
          }
        store(p, y, r, c, best);
        for (i64 k = 0; k < std::min(width, p.out[1] - c); ++k) places[r * p.out[1] + c + k] = uint8_t(place[k]);
      }
    });
  }

  // Where nothing is larger than what is around the planes: the first place inside.
  static INLINE M first_places(const Pooling& p, i64 row, i64 column) {
    M place = M{} + int(row * p.kernel[1]);
    for (i64 k = 0; k < width && (column + k) * p.stride[1] < p.padding[1]; ++k)
      place[k] += int(p.padding[1] - (column + k) * p.stride[1]);
    return place;
  }

  static void scatter(const Pooling& p, const void* dy, const uint8_t* places, void* plane, void* scratch) {
    const i64 columns = p.size[1], all = p.size[0] * columns;
    S* const sums = sizeof(T) == sizeof(S) ? static_cast<S*>(plane) : static_cast<S*>(scratch);
    std::fill_n(sums, all, S(0));
    i64 offset[kMostPlaces];
    for (i64 t = 0; t < p.kernel[0] * p.kernel[1]; ++t) offset[t] = t / p.kernel[1] * columns + t % p.kernel[1];
    const T* g = static_cast<const T*>(dy);
    const i64 count = p.kernel[0] * p.kernel[1];
    for (i64 r = 0; r < p.out[0]; ++r) {
      const i64 begin = (r * p.stride[0] - p.padding[0]) * columns - p.padding[1];
      for (i64 c = 0; c < p.out[1]; ++c, ++g) {
        S* const window = sums + begin + c * p.stride[1];
        if (!p.mean) {
          window[offset[*places++]] += L::scalar(*g);
          continue;
        }
        const S share = L::scalar(*g) / S(count);
        for (i64 t = 0; t < count; ++t) window[offset[t]] += share;
      }
    }
    if constexpr (sizeof(T) != sizeof(S)) Base::narrow_row(sums, static_cast<T*>(plane), all);
  }
};

template <class T>
constexpr PoolingKernels kernels_of{Windows<T>::reduce, Windows<T>::scatter};

}  // namespace

extern const PoolingKernels pooling[4] = {kernels_of<float>, kernels_of<double>, kernels_of<bf16>, kernels_of<f16>};

}  // namespace batchnorm::BATCHNORM_ISA
