// Depthwise convolutions of planes of one channel; compiled once for each instruction set.
//
// Elements are float64 for float64, else float32. Sums of the weights' gradients are gathered over kChain vectors, and
// then go to float64.
#include <algorithm>
#include <utility>

#include "lattice.h"
#include "planes.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

constexpr i64 kChain = 128;
constexpr int kAtOnce = 9;  // taps whose sums are held in registers at once

template <class T>
struct OfPlanes : PlaneRows<T> {
  using Base = PlaneRows<T>;
  using L = typename Base::L;
  using V = typename Base::V;
  using S = typename Base::S;
  using Base::narrow_row, Base::splat, Base::widen_every_second, Base::widen_row, Base::zipped;
  static constexpr i64 width = Base::width;
  static_assert(4 * width <= Lattice::kSlack);

  // f(row of x, place of its run in the phases, the phase's columns [first, last), the first one's column of x) for
  // each row of each phase that has values of x.
  template <class F>
  static INLINE void for_rows(const Lattice& l, const F& f) {
    const Depthwise& d = l.d;
    const i64 across = d.stride[1], down = d.stride[0];
    for (i64 b = 0; b < across; ++b) {
      const i64 left = d.padding[1] - b, first = left > 0 ? (left + across - 1) / across : 0;
      const i64 last = std::min(l.pitch, (d.size[1] + left + across - 1) / across);
      if (first >= last) continue;
      for (i64 a = 0; a < down; ++a) {
        i64 row = a - d.padding[0], place = (a * across + b) * l.phase;
        for (i64 r = 0; r < l.rows; ++r, row += down, place += l.pitch)
          if (row >= 0 && row < d.size[0]) f(row, place, first, last, first * across - left);
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
  static void clear_behind(const Lattice& l, S* behind) { std::fill_n(behind, l.reach + Lattice::kSlack, S(0)); }

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

  // One plane: the kernel is K x K without steps. Rows of the output that are computed together share what they read.
  template <int K>
  static void convolve_unrolled(const Lattice& l, const S* from, const S* weights, S bias, T* out) {
    constexpr int together = Lattice::kRows;
    const i64 rows = l.d.out[0], columns = l.d.out[1], pitch = l.pitch;
    V kernel[K * K];
    times<K * K>([&](auto t) INLINED { kernel[t] = splat(weights[t]); });
    for (i64 c = 0; c < columns; c += width)
      for (i64 first = 0; first < rows; first += together) {
        const i64 r = std::min(first, rows - together);  // the last ones reach back
        V sum[together];
        times<together>([&](auto k) INLINED { sum[k] = splat(bias); });
        const S* const at = from + r * pitch + c;
        times<together + K - 1>([&](auto i) INLINED {
          times<K>([&](auto j) INLINED {
            const V v = load_bytes<V>(at + i * pitch + j);
            times<together>([&](auto k) INLINED {
              constexpr int row = i - k;
              if constexpr (row >= 0 && row < K) sum[k] += kernel[row * K + j] * v;
            });
          });
        });
        T* const to = out + r * columns + c;
        const i64 left = columns - c;
        if (left >= width)
          times<together>([&](auto k) INLINED { L::store(to + k * columns, sum[k]); });
        else
          times<together>([&](auto k) INLINED { store_some<T>(to + k * columns, sum[k], left); });
      }
  }
  static void convolve_all_unrolled(const Lattice& l, i64 samples, const S* from, const S* weights, S bias,
                                    const Planes& out) {
    for (i64 n = 0; n < samples; ++n) {
      T* const to = static_cast<T*>(out.data) + n * out.stride;
      if (l.d.kernel[0] == 3)
        convolve_unrolled<3>(l, from + n * l.plane, weights, bias, to);
      else
        convolve_unrolled<5>(l, from + n * l.plane, weights, bias, to);
    }
  }

  static void convolve(const Lattice& l, i64 samples, Planes x, const void* weights, const void* bias, Planes out,
                       void* scratch) {
    S* const input = static_cast<S*>(scratch);
    S* const run = input + l.input_size();
    read(l, samples, x, input);
    if (l.is_unrolled())
      return convolve_all_unrolled(l, samples, input, static_cast<const S*>(weights),
                                   bias ? *static_cast<const S*>(bias) : S(0), out);
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
        times<N>([&](auto t) INLINED { sum[t] += v * load_bytes<V>(run + shift[t]); });
      }
      times<N>([&](auto t) INLINED {
        const D wide = D::of(sum[t]);
        times<D::parts>([&](auto k) INLINED { total[t * D::parts + k] += wide.part[k]; });
      });
    }
    for (int t = 0; t < N; ++t)
      for (int k = 0; k < D::parts; ++k)
        for (int j = 0; j < D::lanes; ++j) sums[t] += total[t * D::parts + k][j];
  }
  static void add_all_products(i64 taps, const S* g, const S* from, const i64* shift, i64 count, double* sums) {
    for (i64 t = 0; t < taps;) {
      const i64 left = taps - t,
                together = (left + (left + kAtOnce - 1) / kAtOnce - 1) / ((left + kAtOnce - 1) / kAtOnce);
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

  // The same of one plane for an unrolled kernel: K rows of weights, of which N at a time.
  template <int K, int N>
  static void add_products_unrolled(const Lattice& l, const T* g, const S* from, i64 row, double* sums) {
    using D = InDoubles<S>;
    const i64 rows = l.d.out[0], columns = l.d.out[1], pitch = l.pitch;
    typename D::C total[N * K * D::parts] = {};
    V sum[N * K] = {};
    i64 held = 0;
    const auto flush = [&]() INLINED {
      times<N * K>([&](auto t) INLINED {
        const D wide = D::of(sum[t]);
        times<D::parts>([&](auto p) INLINED { total[t * D::parts + p] += wide.part[p]; });
        sum[t] = V{};
      });
      held = 0;
    };
    // Two rows of g share what they read of x.
    const auto add = [&](auto together, const V* v, const S* at) INLINED {
      constexpr int both = together;
      times<N + both - 1>([&](auto i) INLINED {
        times<K>([&](auto j) INLINED {
          const V value = load_bytes<V>(at + (row + i) * pitch + j);
          times<both>([&](auto k) INLINED {
            constexpr int of = i - k;
            if constexpr (of >= 0 && of < N) sum[of * K + j] += v[k] * value;
          });
        });
      });
    };
    const auto walk = [&](auto together, i64 r) INLINED {
      constexpr int both = together;
      const T* const first = g + r * columns;
      V v[both];
      i64 c = 0;
      for (; c + width <= columns; c += width) {
        times<both>([&](auto k) INLINED { v[k] = L::load(first + k * columns + c); });
        add(together, v, from + r * pitch + c);
      }
      if (c < columns) {
        times<both>([&](auto k) INLINED { v[k] = load_some<T>(first + k * columns + c, columns - c); });
        add(together, v, from + r * pitch + c);
      }
      if ((held += both * ((columns + width - 1) / width)) >= kChain) flush();
    };
    i64 r = 0;
    for (; r + 2 <= rows; r += 2) walk(std::integral_constant<int, 2>{}, r);
    if (r < rows) walk(std::integral_constant<int, 1>{}, r);
    flush();
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < K; ++j)
        for (int p = 0; p < D::parts; ++p)
          for (int lane = 0; lane < D::lanes; ++lane)
            sums[(row + i) * K + j] += total[(i * K + j) * D::parts + p][lane];
  }

  static void gradients_unrolled(const Lattice& l, const Lattice& back, i64 samples, const Planes& x, const S* weights,
                                 const Planes& d_out, const Planes& dx, double* d_weights, double* d_bias, S* input) {
    if (d_weights) read(l, samples, x, input);
    for (i64 n = 0; n < samples; ++n) {
      const T* const g = static_cast<const T*>(d_out.data) + n * d_out.stride;
      const S* const from = input + n * l.plane;
      if (d_weights && l.d.kernel[0] == 3) add_products_unrolled<3, 3>(l, g, from, 0, d_weights);
      if (d_weights && l.d.kernel[0] == 5) {
        add_products_unrolled<5, 2>(l, g, from, 0, d_weights);
        add_products_unrolled<5, 2>(l, g, from, 2, d_weights);
        add_products_unrolled<5, 1>(l, g, from, 4, d_weights);
      }
      if (!d_bias) continue;
      double sum = 0;
      for (i64 i = 0; i < l.d.out[0] * l.d.out[1]; ++i) sum += double(L::scalar(g[i]));
      *d_bias += sum;
    }
    if (!dx.data) return;
    S* const padded = input + l.input_size();
    S turned[25];
    for (i64 t = 0; t < l.taps; ++t) turned[t] = weights[l.taps - 1 - t];
    read(back, samples, d_out, padded);
    convolve_all_unrolled(back, samples, padded, turned, S(0), dx);
  }

  static void gradients(const Lattice& l, const Lattice& back, i64 samples, Planes x, const void* weights, Planes d_out,
                        Planes dx, double* d_weights, double* d_bias, void* scratch) {
    S* const input = static_cast<S*>(scratch);
    if (l.is_unrolled())
      return gradients_unrolled(l, back, samples, x, static_cast<const S*>(weights), d_out, dx, d_weights, d_bias,
                                input);
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
};

template <class T>
constexpr DepthwisePlanes kernels_of{OfPlanes<T>::convolve, OfPlanes<T>::gradients};

}  // namespace

extern const DepthwisePlanes depthwise_planes[4] = {kernels_of<float>, kernels_of<double>, kernels_of<bf16>,
                                                    kernels_of<f16>};

}  // namespace batchnorm::BATCHNORM_ISA
