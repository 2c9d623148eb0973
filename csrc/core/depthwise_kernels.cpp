// The kernels of a depthwise convolution on planes of one channel; compiled once for each instruction set.
//
// Elements are float64 for float64, else float32. Sums of the weights' gradients are gathered over kChain vectors, and
// then go to float64.
#include <algorithm>

#include "lattice.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

constexpr i64 kChain = 128;
constexpr int kAtOnce = 9;  // taps whose sums are held in registers at once

template <class T>
struct OfPlanes {
  using L = Lane<T>;
  using V = typename L::V;
  using S = typename L::S;
  static constexpr i64 width = L::width;
  static_assert(4 * width <= Lattice::kSlack);

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

  // f(row of x, place of its run in the phases, the phase's columns [first, last), the first one's column of x) for each
  // row of each phase that has values of x.
  template <class F>
  static INLINE void for_rows(const Lattice& l, const F& f) {
    const Depthwise& d = l.d;
    for (i64 a = 0; a < d.stride[0]; ++a)
      for (i64 r = 0; r < l.rows; ++r) {
        const i64 row = r * d.stride[0] + a - d.padding[0];
        if (row < 0 || row >= d.size[0]) continue;
        for (i64 b = 0; b < d.stride[1]; ++b) {
          const i64 left = d.padding[1] - b, stride = d.stride[1];
          const i64 first = left > 0 ? (left + stride - 1) / stride : 0;
          const i64 last = std::min(l.pitch, (d.size[1] + left + stride - 1) / stride);
          if (first < last)
            f(row, (a * stride + b) * l.phase + r * l.pitch, first, last, first * stride + b - d.padding[1]);
        }
      }
  }

  static void read(const Lattice& l, i64 samples, const Planes& x, S* to) {
    const i64 stride = l.d.stride[1];
    for (i64 n = 0; n < samples; ++n) {
      const T* const plane = static_cast<const T*>(x.data) + n * x.stride;
      S* const runs = to + n * l.plane;
      for_rows(l, [&](i64 row, i64 place, i64 first, i64 last, i64 column) INLINED {
        const T* const from = plane + row * l.d.size[1] + column;
        S* const run = runs + place + first;
        const i64 count = last - first;
        if (stride == 1)
          widen_row(from, run, count);
        else if (stride == 2)
          widen_every_second(from, run, count);
        else
          for (i64 i = 0; i < count; ++i) run[i] = L::scalar(from[stride * i]);
      });
    }
    if (samples < l.group)
      for (i64 p = 0; p < l.phases; ++p) clear_behind(l, to + p * l.phase + samples * l.plane);
  }

  // What a walk may read behind the last sample: values of others, which may be no numbers.
  static void clear_behind(const Lattice& l, S* behind) {
    std::fill_n(behind, std::min(l.reach + Lattice::kSlack, l.plane), S(0));
  }

  static INLINE T narrowed(S s) {
    if constexpr (sizeof(T) == sizeof(S)) return s;
    T values[width];
    L::store(values, splat(s));
    return values[0];
  }

  static void read_run(const Lattice& l, i64 samples, const Planes& z, S* to) {
    for (i64 n = 0; n < samples; ++n)
      for (i64 r = 0; r < l.d.out[0]; ++r)
        widen_row(static_cast<const T*>(z.data) + n * z.stride + r * l.d.out[1], to + n * l.plane + r * l.pitch,
                  l.d.out[1]);
    if (samples < l.group) clear_behind(l, to + samples * l.plane);
  }
  static void write_run(const Lattice& l, i64 samples, const S* from, const Planes& z) {
    for (i64 n = 0; n < samples; ++n)
      for (i64 r = 0; r < l.d.out[0]; ++r)
        narrow_row(from + n * l.plane + r * l.pitch, static_cast<T*>(z.data) + n * z.stride + r * l.d.out[1],
                   l.d.out[1]);
  }

  // out[i] = bias + sum of weights[t] * from[shift[t] + i]
  static void sum_shifted(i64 taps, const S* from, const i64* shift, const S* weights, S bias, S* out, i64 count) {
    const V start = splat(bias);
    for (i64 i = 0; i < count; i += 4 * width) {
      V a = start, b = start, c = start, d = start;
      const S* const run = from + i;
      for (i64 t = 0; t < taps; ++t) {
        const V w = splat(weights[t]);
        const S* const p = run + shift[t];
        a += w * load_bytes<V>(p);
        b += w * load_bytes<V>(p + width);
        c += w * load_bytes<V>(p + 2 * width);
        d += w * load_bytes<V>(p + 3 * width);
      }
      store_bytes(out + i, a);
      store_bytes(out + i + width, b);
      store_bytes(out + i + 2 * width, c);
      store_bytes(out + i + 3 * width, d);
    }
  }

  // The values of a walk: up to the last of the output's rows.
  static i64 run_of(const Lattice& l, i64 samples) { return (samples - 1) * l.plane + l.d.out[0] * l.pitch; }

  static void convolve(const Lattice& l, i64 samples, Planes x, const void* weights, const void* bias, Planes out,
                       void* scratch) {
    S* const input = static_cast<S*>(scratch);
    S* const run = input + l.input_size();
    read(l, samples, x, input);
    sum_shifted(l.taps, input, l.at, static_cast<const S*>(weights), bias ? *static_cast<const S*>(bias) : S(0), run,
                run_of(l, samples));
    write_run(l, samples, run, out);
  }

  // sums[t] += sum of g[i] * from[shift[t] + i]
  template <int N>
  static void add_products(const S* g, const S* from, const i64* shift, i64 count, double* sums) {
    using D = InDoubles<S>;
    typename D::C total[N * D::parts] = {};
    for (i64 begin = 0; begin < count; begin += kChain * width) {
      V sum[N] = {};
      const i64 end = std::min(begin + kChain * width, count);
      for (i64 i = begin; i < end; i += width) {
        const V v = load_bytes<V>(g + i);
        const S* const run = from + i;
        for (int t = 0; t < N; ++t) sum[t] += v * load_bytes<V>(run + shift[t]);
      }
      for (int t = 0; t < N; ++t) {
        const D wide = D::of(sum[t]);
        for (int k = 0; k < D::parts; ++k) total[t * D::parts + k] += wide.part[k];
      }
    }
    for (int t = 0; t < N; ++t)
      for (int k = 0; k < D::parts; ++k)
        for (int j = 0; j < D::lanes; ++j) sums[t] += total[t * D::parts + k][j];
  }
  static void add_all_products(i64 taps, const S* g, const S* from, const i64* shift, i64 count, double* sums) {
    for (i64 t = 0; t < taps;) {
      const i64 left = taps - t, together = (left + (left + kAtOnce - 1) / kAtOnce - 1) / ((left + kAtOnce - 1) / kAtOnce);
      const auto with = [&](auto f) { f(g, from, shift + t, count, sums + t); };
      switch (together) {
        case 1: with(add_products<1>); break;
        case 2: with(add_products<2>); break;
        case 3: with(add_products<3>); break;
        case 4: with(add_products<4>); break;
        case 5: with(add_products<5>); break;
        case 6: with(add_products<6>); break;
        case 7: with(add_products<7>); break;
        case 8: with(add_products<8>); break;
        default: with(add_products<9>);
      }
      t += together;
    }
  }

  static void gradients(const Lattice& l, i64 samples, Planes x, const void* weights, Planes d_out, Planes dx,
                        double* d_weights, double* d_bias, void* scratch) {
    S* const input = static_cast<S*>(scratch);
    S* const result = input + l.input_size();
    S* const g = result + l.results_size() + l.reach_before();
    read_run(l, samples, d_out, g);
    const i64 count = run_of(l, samples);
    if (d_weights) {
      read(l, samples, x, input);
      add_all_products(l.taps, g, input, l.at, count, d_weights);
    }
    if (d_bias) {
      double sum = 0;
      for (i64 i = 0; i < count; ++i) sum += double(g[i]);
      *d_bias += sum;
    }
    if (!dx.data) return;
    const S* const all = static_cast<const S*>(weights);
    const i64 across = l.d.stride[1];
    for (i64 a = 0; a < l.d.stride[0]; ++a) {
      for (i64 b = 0; b < across; ++b) {
        i64 shift[kMostTaps], taps = 0;
        S own[kMostTaps];
        for (i64 t = 0; t < l.taps; ++t)
          if (l.phase_of[t] == a * across + b) {
            shift[taps] = -l.shift[t];
            own[taps++] = all[t];
          }
        sum_shifted(taps, g, shift, own, S(0), result + b * l.run_size(), samples * l.plane);
      }
      write(l, samples, a, result, dx);
    }
  }

  // The rows of x that the phases (a, b) have, out of one run for each b.
  static void write(const Lattice& l, i64 samples, i64 a, const S* from, const Planes& x) {
    const Depthwise& d = l.d;
    const i64 stride = d.stride[1], padding = d.padding[1], run = l.run_size();
    for (i64 n = 0; n < samples; ++n)
      for (i64 r = 0; r < l.rows; ++r) {
        const i64 row = r * d.stride[0] + a - d.padding[0];
        if (row < 0 || row >= d.size[0]) continue;
        T* const to = static_cast<T*>(x.data) + n * x.stride + row * d.size[1];
        const S* const values = from + n * l.plane + r * l.pitch;
        i64 c = 0;
        const auto one = [&]() INLINED {
          to[c] = narrowed(values[(c + padding) % stride * run + (c + padding) / stride]);
          ++c;
        };
        if (stride == 1) {
          narrow_row(values + padding, to, d.size[1]);
          continue;
        }
        if (stride == 2) {
          if (padding % 2) one();
          for (; c + 2 * width <= d.size[1]; c += 2 * width) {
            const S* const even = values + (c + padding) / 2;
            const Pair<V> pair = zipped(load_bytes<V>(even), load_bytes<V>(even + run));
            L::store(to + c, pair.a);
            L::store(to + c + width, pair.b);
          }
          if (const i64 left = d.size[1] - c; left > 0) {
            const S* const even = values + (c + padding) / 2;
            const Pair<V> pair = zipped(load_bytes<V>(even), load_bytes<V>(even + run));
            if (left < width) {
              store_some<T>(to + c, pair.a, left);
            } else {
              L::store(to + c, pair.a);
              if (left > width) store_some<T>(to + c + width, pair.b, left - width);
            }
          }
          continue;
        }
        while (c < d.size[1]) one();
      }
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
          L::store(to + c * out.place, output(from + c * stride, row_step, step, rows, columns, weights, kernel, start));
        };
        for (; c < inside.first; ++c) one(Taps(d, 1, c));
        for (; c + 4 <= inside.last; c += 4) {
          V sum[4] = {start, start, start, start};
          for (i64 i = rows.first; i < rows.last; ++i) {
            const T* const row = from + c * stride + i * row_step;
            const S* const w = weights + i * kernel * width;
            for (i64 j = 0; j < kernel; ++j) {
              const V weight = load_bytes<V>(w + j * width);
              for (int k = 0; k < 4; ++k) sum[k] += weight * L::load(row + j * step + k * stride);
            }
          }
          for (int k = 0; k < 4; ++k) L::store(to + (c + k) * out.place, sum[k]);
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
      for (int k = 0; k < N; ++k) {
        const D wide = D::of(sum[k]);
        for (int p = 0; p < D::parts; ++p) total[k * D::parts + p] += wide.part[p];
        sum[k] = V{};
      }
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
          for (int k = 0; k < N; ++k)
            if (j + k >= columns.first && j + k < columns.last) sum[k] += v * L::load(from + c * stride + k * step);
        };
        i64 c = 0;
        for (; c < inside.first; ++c) edge(c);
        for (; c < inside.last; ++c) {
          const V v = L::load(of + c * g.place);
          for (int k = 0; k < N; ++k) sum[k] += v * L::load(from + c * stride + k * step);
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
                for (int k = 0; k < many; ++k) sum[k] += weight * L::load(from + (out + k) * g.place);
              }
            }
            for (int k = 0; k < many; ++k) L::store(to + (m + k) * step, sum[k]);
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
constexpr DepthwiseKernels kernels_of{OfPlanes<T>::convolve, OfPlanes<T>::gradients, OfRows<T>::convolve,
                                      OfRows<T>::gradients, Lane<T>::width};

}  // namespace

extern const DepthwiseKernels depthwise[4] = {kernels_of<float>, kernels_of<double>, kernels_of<bf16>,
                                             kernels_of<f16>};

}  // namespace batchnorm::BATCHNORM_ISA
