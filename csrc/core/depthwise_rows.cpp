// Depthwise convolutions of rows of channels, a vector of them at a time; compiled once for each instruction set.
//
// Elements are float64 for float64, else float32. Sums of the weights' gradients are gathered over kChain places, and
// then go to float64.
#include <algorithm>
#include <utility>

#include "lattice.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

constexpr i64 kChain = 128;

// Taps [first, last) of one axis that read a value of x for an output, the others lying in the border.
struct Taps {
  i64 first, last;
  Taps(const Depthwise& d, int axis, i64 out) {
    const i64 begin = out * d.stride[axis] - d.padding[axis], step = d.dilation[axis];
    first = begin < 0 ? (-begin + step - 1) / step : 0;
    last = std::min(d.kernel[axis], begin < d.size[axis] ? (d.size[axis] - 1 - begin) / step + 1 : 0);
  }
  bool are_all(i64 count) const { return first == 0 && last == count; }
};

// Outputs [first, last) of the columns whose taps all read values of x.
struct Inside {
  i64 first, last;
  explicit Inside(const Depthwise& d) {
    first = 0;
    while (first < d.out[1] && !Taps(d, 1, first).are_all(d.kernel[1])) ++first;
    last = first;
    while (last < d.out[1] && Taps(d, 1, last).are_all(d.kernel[1])) ++last;
  }
};

template <class T>
struct OfRows {
  using L = Lane<T>;
  using V = typename L::V;
  using S = typename L::S;
  static constexpr i64 width = L::width;

  static INLINE T* at(const ChannelRows& rows, i64 sample, i64 place) {
    return static_cast<T*>(rows.data) + sample * rows.sample + place * rows.place;
  }

  // Columns of a square of vectors for its rows: each round brings the rows of the second half between those of the
  // first.
  template <size_t first, size_t... i>
  static INLINE V zip(V a, V b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * width)...);
  }
  static INLINE void transpose(V* rows) {
    using All = std::make_index_sequence<width>;
    times<kRounds>([&](auto) INLINED {
      V next[width];
      times<width / 2>([&](auto i) INLINED {
        next[2 * i] = zip<0>(rows[i], rows[i + width / 2], All{});
        next[2 * i + 1] = zip<width / 2>(rows[i], rows[i + width / 2], All{});
      });
      times<width>([&](auto i) INLINED { rows[i] = next[i]; });
    });
  }
  static constexpr int kRounds = width == 16 ? 4 : width == 8 ? 3 : width == 4 ? 2 : 1;

  // Planes as rows, and back; lanes without a plane get zeros.
  static void turn(i64 samples, i64 channels, i64 places, const ChannelPlanes& planes, const ChannelRows& rows) {
    for (i64 n = 0; n < samples; ++n) {
      const T* const from = static_cast<const T*>(planes.data) + n * planes.sample;
      for (i64 p = 0; p < places; p += width) {
        const i64 count = std::min(width, places - p);
        V square[width] = {};
        if (count == width && channels == width)
          times<width>([&](auto c) INLINED { square[c] = L::load(from + c * planes.channel + p); });
        else
          for (i64 c = 0; c < channels; ++c)
            square[c] = count == width ? L::load(from + c * planes.channel + p)
                                       : load_some<T>(from + c * planes.channel + p, count);
        transpose(square);
        if (count == width)
          times<width>([&](auto k) INLINED { L::store(at(rows, n, p + k), square[k]); });
        else
          for (i64 k = 0; k < count; ++k) L::store(at(rows, n, p + k), square[k]);
      }
    }
  }
  static void turn_back(i64 samples, i64 channels, i64 places, const ChannelRows& rows, const ChannelPlanes& planes) {
    for (i64 n = 0; n < samples; ++n) {
      T* const to = static_cast<T*>(planes.data) + n * planes.sample;
      for (i64 p = 0; p < places; p += width) {
        const i64 count = std::min(width, places - p);
        V square[width] = {};
        if (count == width)
          times<width>([&](auto k) INLINED { square[k] = L::load(at(rows, n, p + k)); });
        else
          for (i64 k = 0; k < count; ++k) square[k] = L::load(at(rows, n, p + k));
        transpose(square);
        if (count == width && channels == width)
          times<width>([&](auto c) INLINED { L::store(to + c * planes.channel + p, square[c]); });
        else
          for (i64 c = 0; c < channels; ++c) {
            if (count == width)
              L::store(to + c * planes.channel + p, square[c]);
            else
              store_some<T>(to + c * planes.channel + p, square[c], count);
          }
      }
    }
  }

  // One output whose taps are given.
  static INLINE V output(const T* x, i64 row_step, i64 step, const Taps& rows, const Taps& columns, const S* weights,
                         i64 kernel, V sum) {
    for (i64 i = rows.first; i < rows.last; ++i)
      for (i64 j = columns.first; j < columns.last; ++j)
        sum += load_bytes<V>(weights + (i * kernel + j) * width) * L::load(x + i * row_step + j * step);
    return sum;
  }

  // N: columns of the kernel, or 0; is_dense: neither stride nor dilation along them.
  template <int N, bool is_dense>
  static void convolve_as(const Depthwise& d, i64 samples, const ChannelRows& x, const S* weights, V start,
                          const ChannelRows& out) {
    const i64 kernel = N ? N : d.kernel[1], place = x.place;
    const i64 stride = is_dense ? place : d.stride[1] * place, step = is_dense ? place : d.dilation[1] * place;
    const i64 row_step = d.dilation[0] * d.size[1] * place;
    const Inside inside(d);
    for (i64 n = 0; n < samples; ++n)
      for (i64 r = 0; r < d.out[0]; ++r) {
        const Taps rows(d, 0, r);
        const T* const from = at(x, n, (r * d.stride[0] - d.padding[0]) * d.size[1] - d.padding[1]);
        T* const to = at(out, n, r * d.out[1]);
        i64 c = 0;
        const auto one = [&](const Taps& columns) INLINED {
          L::store(to + c * out.place,
                   output(from + c * stride, row_step, step, rows, columns, weights, kernel, start));
        };
        for (; c < inside.first; ++c) one(Taps(d, 1, c));
        for (; c + 4 <= inside.last; c += 4) {
          V sum[4] = {start, start, start, start};
          for (i64 i = rows.first; i < rows.last; ++i) {
            const T* const row = from + c * stride + i * row_step;
            const S* const w = weights + i * kernel * width;
            if constexpr (is_dense && N > 0) {  // neighbours share what they read
              V values[N + 3];
              times<N + 3>([&](auto k) INLINED { values[k] = L::load(row + k * step); });
              times<N>([&](auto j) INLINED {
                const V weight = load_bytes<V>(w + j * width);
                times<4>([&](auto k) INLINED { sum[k] += weight * values[j + k]; });
              });
              continue;
            }
            for (i64 j = 0; j < kernel; ++j) {
              const V weight = load_bytes<V>(w + j * width);
              times<4>([&](auto k) INLINED { sum[k] += weight * L::load(row + j * step + k * stride); });
            }
          }
          times<4>([&](auto k) INLINED { L::store(to + (c + k) * out.place, sum[k]); });
        }
        for (; c < d.out[1]; ++c) one(Taps(d, 1, c));
      }
  }

  static void convolve(const Depthwise& d, i64 samples, ChannelRows x, const void* weights, const void* bias,
                       ChannelRows out) {
    const S* const w = static_cast<const S*>(weights);
    const V start = bias ? load_bytes<V>(bias) : V{};
    const auto as = [&](auto dense) {
      constexpr bool is_dense = decltype(dense)::value;
      if (d.kernel[1] == 3) return convolve_as<3, is_dense>(d, samples, x, w, start, out);
      if (d.kernel[1] == 5) return convolve_as<5, is_dense>(d, samples, x, w, start, out);
      if (d.kernel[1] == 7) return convolve_as<7, is_dense>(d, samples, x, w, start, out);
      convolve_as<0, is_dense>(d, samples, x, w, start, out);
    };
    d.stride[1] == 1 && d.dilation[1] == 1 ? as(std::true_type{}) : as(std::false_type{});
  }

  // Adds the gradients of the weights i, j .. j + N - 1 of one row of the kernel.
  template <int N>
  static void add_products(const Depthwise& d, i64 samples, const ChannelRows& x, const ChannelRows& g, i64 i, i64 j,
                           double* sums) {
    using D = InDoubles<S>;
    typename D::C total[N * D::parts] = {};
    V sum[N] = {};
    i64 held = 0;
    const auto flush = [&]() INLINED {
      times<N>([&](auto k) INLINED {
        const D wide = D::of(sum[k]);
        times<D::parts>([&](auto p) INLINED { total[k * D::parts + p] += wide.part[p]; });
        sum[k] = V{};
      });
      held = 0;
    };
    const Inside inside(d);
    const i64 stride = d.stride[1] * x.place, step = d.dilation[1] * x.place;
    for (i64 n = 0; n < samples; ++n)
      for (i64 r = 0; r < d.out[0]; ++r) {
        const i64 row = r * d.stride[0] - d.padding[0] + i * d.dilation[0];
        if (row < 0 || row >= d.size[0]) continue;
        const T* const from = at(x, n, row * d.size[1] - d.padding[1] + j * d.dilation[1]);
        const T* const of = at(g, n, r * d.out[1]);
        const auto edge = [&](i64 c) INLINED {
          const Taps columns(d, 1, c);
          const V v = L::load(of + c * g.place);
          times<N>([&](auto k) INLINED {
            if (j + k >= columns.first && j + k < columns.last) sum[k] += v * L::load(from + c * stride + k * step);
          });
        };
        i64 c = 0;
        for (; c < inside.first; ++c) edge(c);
        for (; c < inside.last; ++c) {
          const V v = L::load(of + c * g.place);
          times<N>([&](auto k) INLINED { sum[k] += v * L::load(from + c * stride + k * step); });
        }
        for (; c < d.out[1]; ++c) edge(c);
        if ((held += d.out[1]) >= kChain) flush();
      }
    flush();
    for (int k = 0; k < N; ++k)
      for (int p = 0; p < D::parts; ++p)
        for (int lane = 0; lane < D::lanes; ++lane)
          sums[k * width + p * D::lanes + lane] += total[k * D::parts + p][lane];
  }

  static void add_all_products(const Depthwise& d, i64 samples, const ChannelRows& x, const ChannelRows& g,
                               double* sums) {
    for (i64 i = 0; i < d.kernel[0]; ++i)
      for (i64 j = 0; j < d.kernel[1];) {
        const i64 left = d.kernel[1] - j;
        const auto with = [&](auto f) { f(d, samples, x, g, i, j, sums + (i * d.kernel[1] + j) * width); };
        if (left >= 5) {
          with(add_products<5>);
          j += 5;
        } else if (left >= 3) {
          with(add_products<3>);
          j += 3;
        } else {
          with(add_products<1>);
          j += 1;
        }
      }
  }

  // Taps that read a place, and the outputs that they read it for.
  struct Readers {
    i64 count = 0, tap[kMostTaps], out[kMostTaps];
    // Those of place `place`; of the later places of its phase with as much added as they are strides away. With
    // `bounded` only such whose output there is.
    Readers(const Depthwise& d, int axis, i64 place, bool bounded) {
      for (i64 t = 0; t < d.kernel[axis]; ++t) {
        const i64 moved = place + d.padding[axis] - t * d.dilation[axis], stride = d.stride[axis];
        if (moved % stride) continue;
        if (bounded && (moved < 0 || moved / stride >= d.out[axis])) continue;
        tap[count] = t;
        out[count++] = moved / stride;
      }
    }
  };

  // dx where there is a stride. Columns of one phase have the same taps.
  static void gradient_of_input(const Depthwise& d, i64 samples, const ChannelRows& g, const S* weights,
                                const ChannelRows& dx) {
    for (i64 b = 0; b < std::min(d.stride[1], d.size[1]); ++b) {
      const Readers columns(d, 1, b, false);
      const i64 count = (d.size[1] - b + d.stride[1] - 1) / d.stride[1];
      i64 first = 0, last = std::min(count, d.out[1]);
      for (i64 j = 0; j < columns.count; ++j) {
        first = std::max(first, -columns.out[j]);
        last = std::min(last, d.out[1] - columns.out[j]);
      }
      for (i64 r = 0; r < d.size[0]; ++r) {
        const Readers rows(d, 0, r, true);
        for (i64 n = 0; n < samples; ++n) {
          T* const to = at(dx, n, r * d.size[1] + b);
          const i64 step = d.stride[1] * dx.place;
          const auto add = [&](auto each, V* sum, i64 m, bool is_inside) INLINED {
            constexpr int many = decltype(each)::value;
            for (i64 i = 0; i < rows.count; ++i) {
              const S* const w = weights + rows.tap[i] * d.kernel[1] * width;
              const T* const from = at(g, n, rows.out[i] * d.out[1] + m);
              for (i64 j = 0; j < columns.count; ++j) {
                const i64 out = columns.out[j];
                if (!is_inside && (m + out < 0 || m + out >= d.out[1])) continue;
                const V weight = load_bytes<V>(w + columns.tap[j] * width);
                times<many>([&](auto k) INLINED { sum[k] += weight * L::load(from + (out + k) * g.place); });
              }
            }
            times<many>([&](auto k) INLINED { L::store(to + (m + k) * step, sum[k]); });
          };
          const auto one = [&](i64 m, bool is_inside) INLINED {
            V sum[1] = {};
            add(std::integral_constant<int, 1>{}, sum, m, is_inside);
          };
          i64 m = 0;
          for (; m < std::min(first, count); ++m) one(m, false);
          for (; m + 4 <= last; m += 4) {
            V sum[4] = {};
            add(std::integral_constant<int, 4>{}, sum, m, true);
          }
          for (; m < count; ++m) one(m, false);
        }
      }
    }
  }

  static void gradients(const Depthwise& d, i64 samples, ChannelRows x, const void* weights, ChannelRows d_out,
                        ChannelRows dx, double* d_weights, double* d_bias) {
    if (d_weights) add_all_products(d, samples, x, d_out, d_weights);
    if (d_bias)
      for (i64 n = 0; n < samples; ++n)
        for (i64 p = 0; p < d.out[0] * d.out[1]; ++p) {
          const V v = L::load(at(d_out, n, p));
          for (i64 lane = 0; lane < width; ++lane) d_bias[lane] += double(v[lane]);
        }
    if (!dx.data) return;
    const S* const w = static_cast<const S*>(weights);
    if (d.stride[0] != 1 || d.stride[1] != 1) return gradient_of_input(d, samples, d_out, w, dx);
    // The convolution of the gradient with the kernel from its end.
    alignas(64) S turned[kMostTaps * width];
    Depthwise back = d;
    for (int axis : {0, 1}) {
      back.size[axis] = d.out[axis];
      back.out[axis] = d.size[axis];
      back.padding[axis] = (d.kernel[axis] - 1) * d.dilation[axis] - d.padding[axis];
    }
    for (i64 t = 0; t < d.taps(); ++t) store_bytes(turned + t * width, load_bytes<V>(w + (d.taps() - 1 - t) * width));
    convolve(back, samples, d_out, turned, nullptr, dx);
  }
};

template <class T>
constexpr DepthwiseRows kernels_of{OfRows<T>::convolve, OfRows<T>::gradients, OfRows<T>::turn, OfRows<T>::turn_back,
                                   Lane<T>::width};

}  // namespace

extern const DepthwiseRows depthwise_rows[4] = {kernels_of<float>, kernels_of<double>, kernels_of<bf16>,
                                                kernels_of<f16>};

}  // namespace batchnorm::BATCHNORM_ISA
