// The four verbs on one slab, for one instruction set and memory order: this file is compiled once for each.
//
// Float64 elements are normalized in float64, and 16-bit elements in float32: a result is rounded once, when it is
// stored. So are float32 elements of few values a channel; of many they are in float32, with coefficients in two parts
// each. Gradients are computed in the same, but those of float32 in float32 where a pool has many values; there torch's
// own roundings show. Sums are float64; in pools of many values those of 16-bit elements are gathered in float32 over
// kChain vectors at a time, where differences from one of the values are exact or nearly so.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "activations.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {

namespace {

template <class T>
INLINE T* at(const Operand& o, i64 sample, i64 channel) {
  return static_cast<T*>(o.data) + sample * o.sample_stride + channel * o.channel_stride;
}

// Whether a result takes the place of what it is made of.
INLINE bool is_over(const Operand& result, const Operand& operand) { return result && result.data == operand.data; }

// An operand whose address and strides the compiler can keep in registers, whatever is written through it.
template <class T>
struct RowAccess {
  T* data;
  i64 stride;
  explicit INLINE RowAccess(const Operand& o) : data(static_cast<T*>(o.data)), stride(o.sample_stride) {}
  INLINE T* operator()(i64 n, i64 c) const { return data + n * stride + c; }
};

// The order in which the second phase walks the samples: from the last, which the cache still holds, to the first,
// unless a sample is so small that a backward walk would only confuse the prefetcher.
struct Backward {
  i64 samples;
  bool backward;
  Backward(const Slab& slab, i64 element) : samples(slab.samples) {
    backward = slab.channels * slab.inner * element >= 16 << 10;
  }
  INLINE i64 operator()(i64 k) const { return backward ? samples - 1 - k : k; }
};

// Brings what will be read a few planes after (k, c) into the cache: no prefetcher follows short spans.
template <class T>
INLINE void prefetch(const Slab& slab, const Operand& o, i64 k, i64 c) {
  constexpr i64 ahead = 4, line = 64, most = 8 * line;
  if (!slab.spans || !o || slab.channels <= ahead) return;
  c += ahead;
  if (c >= slab.channels) {
    c -= slab.channels;
    if (++k == slab.samples) return;
  }
  const Span span = slab.span(k);
  const char* p = reinterpret_cast<const char*>(at<const T>(o, span.sample, c) + span.first);
  const i64 bytes = span.inner * i64(sizeof(T));
  for (i64 i = 0; i < bytes && i < most; i += line) __builtin_prefetch(p + i);
}

// All but the first `skip` lanes.
template <class T>
INLINE void store_from(T* p, typename Lane<T>::V v, int skip) {
  if (!skip) return Lane<T>::store(p, v);
  T values[Lane<T>::width];
  Lane<T>::store(values, v);
  for (int i = skip; i < Lane<T>::width; ++i) p[i] = values[i];
}

// Elements that are walked two vectors at a time, where nothing hangs on their order.
template <class T>
constexpr bool kPaired = sizeof(T) == 2;

// Two vectors of 16-bit elements, in the order of Lane; of others nobody asks.
template <class T>
INLINE auto load_pair(const T* p) {
  if constexpr (kPaired<T>)
    return Lane<T>::load_pair(p);
  else
    return Pair<typename Lane<T>::V>{};
}
template <class T>
INLINE void store_pair(T* p, const Pair<typename Lane<T>::V>& v) {
  if constexpr (kPaired<T>) Lane<T>::store_pair(p, v.a, v.b);
}
template <class T>
INLINE void stream_pair(T* p, const Pair<f32>& v) {
  T values[2 * Lane<T>::width];
  store_pair(values, v);
  stream_bytes(p, load_bytes<f32>(values));
}

// A vector of elements in the type that is computed in; of float32 each half from memory, which needs no shuffle.
template <class P, class T>
INLINE P load(const T* p) {
  if constexpr (std::is_same_v<P, Wide> && std::is_same_v<T, float>) return Wide::load(p);
  return P::of(Lane<T>::load(p));
}

// A coefficient of one channel for all lanes, or of one channel a lane.
template <class P>
struct Coefficient {
  using S = typename P::S;
  static INLINE P broadcast(const void* base, i64 channel) {
    P p;
    for (int k = 0; k < P::parts; ++k) p.part[k] = typename P::C{} + static_cast<const S*>(base)[channel];
    return p;
  }
  static INLINE P of_columns(const void* base, i64 channel) {
    P p;
    for (int k = 0; k < P::parts; ++k)
      p.part[k] = load_bytes<typename P::C>(static_cast<const S*>(base) + channel + k * P::lanes);
    return p;
  }
  static INLINE P of_some(const void* base, i64 channel, i64 count) {
    P p{};
    for (i64 i = 0; i < count; ++i) p.part[i / P::lanes][i % P::lanes] = static_cast<const S*>(base)[channel + i];
    return p;
  }
};

// Whether sums have digits to spare. Those of float64 elements have none, and are taken in chains of chains.
template <class P>
constexpr bool kSpare = !std::is_same_v<typename P::V, f64>;

// Vectors that one chain of additions takes in before it is settled in float64, or of float64 with other chains.
template <class P>
constexpr i64 kChain = sizeof(typename P::S) == 4 || !kSpare<P> ? 16 : INT64_MAX / 64;

// What gradients (E) and sums (S) are computed in; E of few is what elements are normalized in.
template <class T, bool few>
struct In {
  using E = std::conditional_t<sizeof(T) == 4 && few, Wide, Pack<T>>;
  using S = std::conditional_t<sizeof(T) == 8 || (sizeof(T) == 2 && !few), Pack<T>, Wide>;
};

// Two sums of every lane.
template <class P>
struct Sums {
  using C = typename P::C;
  C first[P::parts] = {}, second[P::parts] = {};
  INLINE void add(const P& a, const P& b) {
    for (int k = 0; k < P::parts; ++k) {
      first[k] += a.part[k];
      second[k] += a.part[k] * b.part[k];
    }
  }
  INLINE void add(const Sums& other) {
    for (int k = 0; k < P::parts; ++k) {
      first[k] += other.first[k];
      second[k] += other.second[k];
    }
  }
  static constexpr int wide_parts = P::width / kLanes64;
  static INLINE void widened(const C* in, f64* out) {
    if constexpr (sizeof(typename P::S) == 8) {
      for (int k = 0; k < P::parts; ++k) out[k] = in[k];
    } else {
      const Wide wide = Wide::of(in[0]);
      out[0] = wide.part[0];
      out[1] = wide.part[1];
    }
  }
  // Adds all lanes together, to the lanes of a and b.
  INLINE void settle(f64* a, f64* b) const {
    f64 u[wide_parts], v[wide_parts];
    widened(first, u);
    widened(second, v);
    for (int k = 0; k < wide_parts; ++k) {
      *a += u[k];
      *b += v[k];
    }
  }
  // One column a lane: adds the lanes [skip, end) to totals[0...] and totals[stride...].
  INLINE void add_columns(double* totals, i64 stride, int skip, int end) const {
    f64 u[wide_parts], v[wide_parts];
    widened(first, u);
    widened(second, v);
    if (skip == 0 && end == P::width) {
      for (int k = 0; k < wide_parts; ++k) {
        double* t = totals + k * kLanes64;
        store_bytes(t, load_bytes<f64>(t) + u[k]);
        store_bytes(t + stride, load_bytes<f64>(t + stride) + v[k]);
      }
      return;
    }
    for (int i = skip; i < end; ++i) {
      totals[i - skip] += u[i / kLanes64][i % kLanes64];
      totals[stride + i - skip] += v[i / kLanes64][i % kLanes64];
    }
  }
};

INLINE double sum_lanes(f64 v) {
  double total = 0;
  for (int i = 0; i < kLanes64; ++i) total += v[i];
  return total;
}

// Zero but for the lanes [begin, end).
template <class P>
INLINE P only(P p, i64 begin, i64 end) {
  using C = typename P::C;
  for (int k = 0; k < P::parts; ++k) {
    const auto lane = lane_numbers<C>() + k * P::lanes;
    p.part[k] = select(lane >= int(begin) && lane < int(end), p.part[k], C{});
  }
  return p;
}

template <class P>
INLINE P minus(const P& a, const P& b) {
  P d;
  for (int k = 0; k < P::parts; ++k) d.part[k] = a.part[k] - b.part[k];
  return d;
}

// x as it is multiplied by dz in sums: float64 has digits to spare for values of fewer, so the sum of dz times the mean
// can be taken off in the end; from others the mean, or what stands for it, is taken off here.
template <class P>
INLINE P factor_of(const P& x, const P& mean) {
  if constexpr (std::is_same_v<P, Wide>) return x;
  return minus(x, mean);
}

// A float64 value for all lanes, or one a lane.
template <class P>
INLINE P everywhere(double v) {
  P p;
  for (int k = 0; k < P::parts; ++k) p.part[k] = typename P::C{} + typename P::S(v);
  return p;
}
template <class P>
INLINE P columns_of(const double* v, i64 count) {
  P p{};
  if (count < P::width)
    for (i64 i = 0; i < count; ++i) p.part[i / P::lanes][i % P::lanes] = typename P::S(v[i]);
  else if constexpr (sizeof(typename P::S) == 8)
    for (int k = 0; k < P::parts; ++k) p.part[k] = load_bytes<typename P::C>(v + k * P::lanes);
  else
    p.part[0] = Wide{{load_bytes<f64>(v), load_bytes<f64>(v + kLanes64)}}.rounded();
  return p;
}

// The two sums of a slab's channels while its planes are walked: lanes are added together at the end alone.
struct LaneSums {
  i64 channels;
  f64 first[kMaxPlanarChannels], second[kMaxPlanarChannels];
  explicit LaneSums(i64 count) : channels(count) {
    for (i64 c = 0; c < count; ++c) first[c] = second[c] = f64{};
  }
  void add_to(double* sums) const {
    for (i64 c = 0; c < channels; ++c) {
      sums[c] += sum_lanes(first[c]);
      sums[channels + c] += sum_lanes(second[c]);
    }
  }
};

// Walks a plane in whole vectors: `add(i, sums)` for each, into two sets of sums in turn, or where `paired`
// `add_pair(i, sums, sums)` for two; then `rest(i, count, sums)` once for the elements that are left.
template <bool paired, class P, class Add, class AddPair, class Rest>
INLINE void sum_plane(i64 inner, f64* first, f64* second, Add add, AddPair add_pair, Rest rest) {
  constexpr i64 W = P::width, chunk = 2 * W * kChain<P>;
  f64 a = kSpare<P> ? *first : f64{}, b = kSpare<P> ? *second : f64{};
  for (i64 i = 0; i < inner;) {
    const i64 end = inner - i > chunk ? i + chunk : inner;
    Sums<P> even, odd;
    for (; i + 2 * W <= end; i += 2 * W) {
      if constexpr (paired) {
        add_pair(i, even, odd);
      } else {
        add(i, even);
        add(i + W, odd);
      }
    }
    if (i + W <= end) {
      add(i, even);
      i += W;
    }
    if (i < end) {
      rest(i, end - i, odd);
      i = end;
    }
    even.add(odd);
    even.settle(&a, &b);
  }
  *first = kSpare<P> ? a : *first + a;
  *second = kSpare<P> ? b : *second + b;
}

// How many vectors are walked side by side along a row: enough neighbouring cache lines for the prefetcher, as few as
// leave their sums in registers.
constexpr int kAbreast = VB == 64 ? 4 : 2;

// Walks rows in tiles, one row in each of `streams` far places: prefetchers follow about eight rows upward, but not
// several in one page. For each vector of columns `prepare(c)` once and `add(n, c, skip, prepared, sums)` down the
// tile's rows; the last vector overlaps the one before it, and its first `skip` lanes do not count. Fewer columns:
// `rest(n, sums)`.
template <class P, i64 streams, int abreast, class Prepare, class Add, class Rest>
INLINE void sum_section(i64 begin, i64 end, i64 columns, double* totals, Prepare prepare, Add add, Rest rest) {
  constexpr i64 W = P::width, G = abreast;
  const i64 apart = (end - begin + streams - 1) / streams | 1;  // odd: no two streams in one set of a cache
  for (i64 first = begin; first < begin + apart && first < end; ++first) {
    if (columns < W) {
      Sums<P> sums;
      for (i64 n = first; n < end; n += apart) rest(n, sums);
      sums.add_columns(totals, columns, 0, int(columns));
      continue;
    }
    i64 c = 0;
    for (; c + G * W <= columns; c += G * W) {
      std::decay_t<decltype(prepare(c))> prepared[G];
      for (int g = 0; g < G; ++g) prepared[g] = prepare(c + g * W);
      Sums<P> sums[G];
      for (i64 n = first; n < end; n += apart)
        for (int g = 0; g < G; ++g) add(n, c + g * W, 0, prepared[g], sums[g]);
      for (int g = 0; g < G; ++g) sums[g].add_columns(totals + c + g * W, columns, 0, int(W));
    }
    while (c < columns) {
      const i64 from = c + W <= columns ? c : columns - W;
      const auto prepared = prepare(from);
      Sums<P> sums;
      const int skip = int(c - from);
      for (i64 n = first; n < end; n += apart) add(n, from, skip, prepared, sums);
      sums.add_columns(totals + c, columns, skip, int(W));
      c = from + W;
    }
  }
}

// Where sums have no digits to spare and would be long chains: in sections, whose sums are added together.
template <class P, i64 streams, int abreast, class Prepare, class Add, class Rest>
INLINE void sum_rows(i64 rows, i64 columns, double* totals, Prepare prepare, Add add, Rest rest) {
  constexpr i64 most = 64;
  const i64 section = kSpare<P> || columns > most ? rows : 256;
  double sums[2 * most];
  for (i64 begin = 0; begin < rows; begin += section) {
    const bool apart = section < rows;
    if (apart) std::fill_n(sums, 2 * columns, 0.0);
    sum_section<P, streams, abreast>(begin, std::min(begin + section, rows), columns, apart ? sums : totals, prepare,
                                     add, rest);
    for (i64 c = 0; apart && c < 2 * columns; ++c) totals[c] += sums[c];
  }
}

// Writes a plane: `value(i)` is the vector at i, `pair(i)` two of 16-bit elements, `some(i, count)` that of the
// elements left where they are fewer than a vector, or where vectors must not overlap: where signs are read, and where
// what is written is read (`in_place`), which is then in the cache.
template <bool overlap, class T, class Value, class Two, class Some>
INLINE void write_plane(T* out, i64 inner, bool around_cache, bool in_place, Value value, Two pair, Some some) {
  using L = Lane<T>;
  constexpr i64 W = L::width;
  i64 i = 0;
  // A line of the cache of which a part alone goes around it costs more than all others of a short plane win.
  constexpr i64 line = 64, long_plane = 256 * line;
  const i64 bytes = inner * i64(sizeof(T));
  const bool streamed =
      overlap && around_cache && !in_place && inner >= 4 * W && (bytes % line == 0 || bytes >= long_plane);
  const auto head = [&](i64 width) INLINED {
    return i64(-reinterpret_cast<uintptr_t>(out) % (sizeof(T) * size_t(width)) / sizeof(T));
  };
  if constexpr (overlap && kPaired<T>) {
    if (streamed) {
      i = head(2 * W);
      if (i) store_pair(out, pair(0));
      for (; i + 2 * W <= inner; i += 2 * W) stream_pair(out + i, pair(i));
    }
    for (; i + 2 * W <= inner; i += 2 * W) store_pair(out + i, pair(i));
  } else if (overlap && !in_place && inner >= 8 * W) {
    i = head(W);
    if (i) L::store(out, value(0));
    if (streamed)
      for (; i + W <= inner; i += W) stream(out + i, value(i));
  }
  for (; i + W <= inner; i += W) L::store(out + i, value(i));
  if (i == inner) return;
  if (overlap && !in_place && inner >= W)
    L::store(out + inner - W, value(inner - W));
  else
    store_some(out + i, some(i, inner - i), inner - i);
}

// The same number, but the compiler cannot see where it comes from. Otherwise it keeps a pointer for each operand of
// each row of a tile, and these pointers do not fit into the registers.
INLINE i64 opaque(i64 n) {
  asm("" : "+r"(n));
  return n;
}

// Writes rows: `prepare(c)` prepares the coefficients of a vector of columns, `value(n, c, prepared)` is the vector
// there. `tile` rows share the coefficients if they are short, in pages of their own or `near` (fewer beside an
// exponential, whose code is long). All other rows go one by one, because prefetchers follow one row in a page. A tile
// is read before it is written: rows whose addresses agree in their last 12 bits would wait for one another.
template <bool overlap, int tile, class T, class Columns, class Value, class Some>
INLINE void write_rows(const Operand& to, i64 rows, i64 columns, bool around_cache, bool near, bool in_place,
                       Columns prepare, Value value, Some some) {
  using L = Lane<T>;
  constexpr i64 W = L::width;
  const RowAccess<T> out(to);
  const bool aligned =
      around_cache && !in_place && out.stride % W == 0 && reinterpret_cast<uintptr_t>(out.data) % (sizeof(T) * W) == 0;
  const auto write = [&](auto height, auto width, auto streamed, i64 n, i64 c) INLINED {
    typename L::V v[decltype(width)::value][decltype(height)::value];
    for (int g = 0; g < width; ++g) {
      const auto k = prepare(c + g * W);
      for (int i = 0; i < height; ++i) v[g][i] = value(n + i, c + g * W, k);
    }
    for (int i = 0; i < height; ++i) {
      if constexpr (kPaired<T> && width == 2 && !streamed) {
        L::store_two(out(n + i, c), v[0][i], v[1][i]);
        continue;
      }
      for (int g = 0; g < width; ++g)
        if constexpr (streamed)
          stream(out(n + i, c + g * W), v[g][i]);
        else
          L::store(out(n + i, c + g * W), v[g][i]);
    }
  };
  const auto walk = [&](auto height, auto streamed, i64 n) INLINED {
    using std::integral_constant;
    n = opaque(n);
    constexpr integral_constant<i64, 1> one{};
    constexpr integral_constant<i64, height == 1 || sizeof(T) == 2 ? 2 : 1> several{};  // whole lines of the cache
    i64 c = 0;
    for (; c + several * W <= columns; c += several * W) write(height, several, streamed, n, c);
    for (; several > 1 && c + W <= columns; c += W) write(height, one, streamed, n, c);
    if (c == columns) return;
    if (overlap && !in_place && columns >= W)
      write(height, one, std::false_type{}, n, columns - W);
    else
      some(n, n + height, c, columns - c);
  };
  const i64 row = out.stride * i64(sizeof(T));
  const bool tiled = columns * i64(sizeof(T)) < 512 || row >= 4096 || near;
  const auto all = [&](auto streamed) INLINED {
    i64 n = 0;
    for (; tiled && n + tile <= rows; n += tile) walk(std::integral_constant<i64, tile>{}, streamed, n);
    for (; n < rows; ++n) walk(std::integral_constant<i64, 1>{}, streamed, n);
  };
  if (aligned)
    all(std::true_type{});
  else
    all(std::false_type{});
}

// ------------------------------------------------------------------------------------------------ moments
template <class T, class P>
void planar_moments_in(const Slab& slab, const Operand& x, const double* shift, double* sums) {
  using L = Lane<T>;
  constexpr i64 W = L::width;
  LaneSums lanes(slab.channels);
  for (i64 k = 0; k < slab.samples; ++k) {
    const Span span = slab.span(k);
    for (i64 c = 0; c < slab.channels; ++c) {
      prefetch<T>(slab, x, k, c);
      const T* p = at<const T>(x, span.sample, c) + span.first;
      const auto s = everywhere<P>(shift[c]);
      sum_plane<kPaired<T>, P>(
          span.inner, lanes.first + c, lanes.second + c,
          [&](i64 i, Sums<P>& a) {
            const auto d = minus(load<P>(p + i), s);
            a.add(d, d);
          },
          [&](i64 i, Sums<P>& a, Sums<P>& b) {
            const auto v = load_pair(p + i);
            const auto d = minus(P::of(v.a), s), e = minus(P::of(v.b), s);
            a.add(d, d);
            b.add(e, e);
          },
          [&](i64 i, i64 count, Sums<P>& a) {
            const auto d = span.inner >= W ? only(minus(P::of(Lane<T>::load(p + i + count - W)), s), W - count, W)
                                           : only(minus(P::of(load_some(p + i, count)), s), 0, count);
            a.add(d, d);
          });
    }
  }
  lanes.add_to(sums);
}

template <class T, class P>
void interleaved_moments_in(const Slab& slab, const Operand& x, const double* shift, double* sums) {
  const RowAccess<const T> xs(x);
  const i64 C = slab.channels;
  const P few = columns_of<P>(shift, C < P::width ? C : P::width);
  sum_rows<P, 8, kAbreast>(
      slab.samples, C, sums, [=](i64 c) INLINED { return columns_of<P>(shift + c, P::width); },
      [=](i64 n, i64 c, int, const P& s, Sums<P>& a) INLINED {
        const P d = minus(load<P>(xs(n, c)), s);
        a.add(d, d);
      },
      [=](i64 n, Sums<P>& a) INLINED {
        const P d = minus(P::of(load_some(xs(n, 0), C)), few);
        a.add(d, d);
      });
}

template <class T>
void planar_moments(const Slab& slab, const Operand& x, const double* shift, double* sums) {
  slab.few ? planar_moments_in<T, typename In<T, true>::S>(slab, x, shift, sums)
           : planar_moments_in<T, typename In<T, false>::S>(slab, x, shift, sums);
}

template <class T>
void interleaved_moments(const Slab& slab, const Operand& x, const double* shift, double* sums) {
  slab.few ? interleaved_moments_in<T, typename In<T, true>::S>(slab, x, shift, sums)
           : interleaved_moments_in<T, typename In<T, false>::S>(slab, x, shift, sums);
}

// ------------------------------------------------------------------------------------------------ normalize
// Which activations are compiled into the loops; all others are chosen inside, vector by vector.
enum class Form { identity, relu, relu6, leaky_relu, silu, gelu, hardswish, sigmoid, tanh, elu, any };

// Of `any`, which is chosen inside: identity.
constexpr Activation activation_of(Form form) {
  switch (form) {
    case Form::relu: return Activation::relu;
    case Form::relu6: return Activation::relu6;
    case Form::leaky_relu: return Activation::leaky_relu;
    case Form::silu: return Activation::silu;
    case Form::gelu: return Activation::gelu;
    case Form::hardswish: return Activation::hardswish;
    case Form::sigmoid: return Activation::sigmoid;
    case Form::tanh: return Activation::tanh;
    case Form::elu: return Activation::elu;
    case Form::identity:
    case Form::any: break;
  }
  return Activation::identity;
}

// Rows that are walked at once.
template <Form form>
constexpr int kTile = takes_exponential(activation_of(form)) ? 2 : 4;

// How many activations have loops of their own, which take room in the library and time to compile: relu alone; those
// of straight lines; all.
enum class Forms : int { relu, piecewise, all };
#if defined(__SSE2__) && !defined(__AVX2__)
template <class T>
constexpr Forms forms_of = Forms::relu;  // few such processors are left
#elif defined(__SANITIZE_ADDRESS__)
template <class T>  // of two types, since all would take half as long again to compile
constexpr Forms forms_of = std::is_same_v<T, float> || std::is_same_v<T, bf16> ? Forms::all : Forms::relu;
#else
template <class T>
constexpr Forms forms_of = Forms::all;
#endif

// Calls kernel(form) for an activation other than identity.
template <Forms forms, class Kernel>
void choose_form(Activation a, Kernel kernel) {
  const auto call = [&](auto form) { kernel(form); };
#define FORM(name) \
  if (a == Activation::name) return call(std::integral_constant<Form, Form::name>{})
  FORM(relu);
  if constexpr (forms >= Forms::piecewise) {
    FORM(relu6);
    FORM(leaky_relu);
  }
  if constexpr (forms == Forms::all) {
    FORM(silu);
    FORM(gelu);
    FORM(hardswish);
    FORM(sigmoid);
    FORM(tanh);
    FORM(elu);
  }
#undef FORM
  call(std::integral_constant<Form, Form::any>{});
}

template <class T, class P>
struct Normal {
  using V = typename Lane<T>::V;
  using G = typename Lane<T>::S;
  using K = Coefficient<P>;
  P mean, scale, shift;
  V threshold, flip;
  static INLINE Normal broadcast(const NormalizeCoefficients& k, i64 c) {
    return {K::broadcast(k.mean, c), K::broadcast(k.scale, c), K::broadcast(k.shift, c),
            V{} + static_cast<const G*>(k.threshold)[c], spread(static_cast<const G*>(k.flip)[c])};
  }
  static INLINE Normal of_columns(const NormalizeCoefficients& k, i64 c) {
    return {K::of_columns(k.mean, c), K::of_columns(k.scale, c), K::of_columns(k.shift, c),
            load_bytes<V>(static_cast<const G*>(k.threshold) + c), load_bytes<V>(static_cast<const G*>(k.flip) + c)};
  }
  static INLINE Normal of_some(const NormalizeCoefficients& k, i64 c, i64 count) {
    return {K::of_some(k.mean, c, count), K::of_some(k.scale, c, count), K::of_some(k.shift, c, count),
            load_some(static_cast<const G*>(k.threshold) + c, count),
            load_some(static_cast<const G*>(k.flip) + c, count)};
  }
  static INLINE V spread(G value) {  // keeps the sign of zero, which a sum with zero loses
    V v{};
    for (int i = 0; i < Lane<T>::width; ++i) v[i] = value;
    return v;
  }
  // z > 0
  INLINE auto positive(V x) const {
    using M = typename Masks<V>::type;
    return (V)((M)x ^ (M)flip) > threshold;
  }
  INLINE P operator()(const P& x) const {
    P z;
    for (int i = 0; i < P::parts; ++i) z.part[i] = (x.part[i] - mean.part[i]) * scale.part[i] + shift.part[i];
    return z;
  }
};

// z in a forward where the product of mean and scale is in the shift already: of float32 elements in float64, and of
// bfloat16 ones in float32, in both of which its rounding lies far below the digits of a result.
template <class P>
struct Line {
  using K = Coefficient<P>;
  P scale, shift;
  static INLINE Line broadcast(const NormalizeCoefficients& k, i64 c) {
    return {K::broadcast(k.scale, c), K::broadcast(k.shift, c)};
  }
  static INLINE Line of_columns(const NormalizeCoefficients& k, i64 c) {
    return {K::of_columns(k.scale, c), K::of_columns(k.shift, c)};
  }
  static INLINE Line of_some(const NormalizeCoefficients& k, i64 c, i64 count) {
    return {K::of_some(k.scale, c, count), K::of_some(k.shift, c, count)};
  }
  INLINE P operator()(const P& x) const {
    P z;
    for (int i = 0; i < P::parts; ++i) z.part[i] = x.part[i] * scale.part[i] + shift.part[i];
    return z;
  }
};
template <class T>
constexpr bool kLine = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

// The same of float32 in float32, by x's own statistics. What is added up before the last operation lies within the
// size of the largest z, and what is taken off is exact or nearly so, so that the last operation alone rounds z in
// digits that show (see `two_parts`). In the caches it takes half to nine tenths of the time.
struct TwoParts {
  using P = Pack<float>;
  using K = Coefficient<P>;
  P center, scale, scale_rest, shift, shift_rest;
  static INLINE TwoParts broadcast(const NormalizeCoefficients& k, i64 c) {
    return {K::broadcast(k.mean, c), K::broadcast(k.scale, c), K::broadcast(k.scale_rest, c), K::broadcast(k.shift, c),
            K::broadcast(k.shift_rest, c)};
  }
  static INLINE TwoParts of_columns(const NormalizeCoefficients& k, i64 c) {
    return {K::of_columns(k.mean, c), K::of_columns(k.scale, c), K::of_columns(k.scale_rest, c),
            K::of_columns(k.shift, c), K::of_columns(k.shift_rest, c)};
  }
  static INLINE TwoParts of_some(const NormalizeCoefficients& k, i64 c, i64 count) {
    return {K::of_some(k.mean, c, count), K::of_some(k.scale, c, count), K::of_some(k.scale_rest, c, count),
            K::of_some(k.shift, c, count), K::of_some(k.shift_rest, c, count)};
  }
  INLINE P operator()(const P& x) const {
    const f32 d = x.part[0] - center.part[0];
    return {{fused(d, scale.part[0], shift.part[0] + fused(d, scale_rest.part[0], shift_rest.part[0]))}};
  }
};
template <class T, class P>
using Forward =
    std::conditional_t<std::is_same_v<P, Pack<float>>, TwoParts, std::conditional_t<kLine<T>, Line<P>, Normal<T, P>>>;

// One bit a lane: whether the derivative there is that of the activation's linear part.
template <class P>
INLINE unsigned sign_bits(const P& z, const KernelFusion& f) {
  using C = typename P::C;
  unsigned bits = 0;
  for (int k = 0; k < P::parts; ++k) {
    auto inside = z.part[k] > C{};
    if (f.activation == Activation::relu6) inside &= z.part[k] < C{} + typename P::S(6);
    bits |= bits_of((typename Masks<C>::type)inside) << (k * P::lanes);
  }
  return bits;
}

// `count` bits at bit i, behind all that have been put before: what follows them in their last byte is lost.
INLINE void put_bits(uint8_t* signs, i64 i, i64 count, unsigned bits) {
  uint8_t* to = signs + (i >> 3);
  const i64 used = i & 7;
  if (used == 0 && count == 16) return void(std::memcpy(to, &bits, 2));
  if (used == 0 && count == 8) return void(*to = uint8_t(bits));
  bits = (bits & ((1u << count) - 1)) << used;
  if (used) bits |= *to & ((1u << used) - 1);
  if (count == 16) {
    std::memcpy(to, &bits, 2);
    to[2] = uint8_t(bits >> 16);
    return;
  }
  for (count += used; count > 0; count -= 8, bits >>= 8) *to++ = uint8_t(bits);
}

// `count` bits at bit i, and behind them others.
INLINE unsigned get_bits(const uint8_t* signs, i64 i, i64 count) {
  const uint8_t* const from = signs + (i >> 3);
  const i64 used = i & 7;
  unsigned bits = 0;
  if (count == 16) {
    std::memcpy(&bits, from, 2);
    if (used) bits |= unsigned(from[2]) << 16;
    return bits >> used;
  }
  for (i64 b = 0; 8 * b < used + count; ++b) bits |= unsigned(from[b]) << (8 * b);
  return bits >> used;
}

// The signs of a plane: bit i, as put_bits and get_bits take it.
template <bool signs>
struct PlaneBits {
  uint8_t* from;
  i64 first;
  PlaneBits(const KernelFusion& f, i64 n, i64 c)
      : from(signs ? f.signs + n * f.signs_sample + (c * f.signs_channel >> 3) : nullptr),
        first(signs ? c * f.signs_channel & 7 : 0) {}
  i64 operator()(i64 i) const { return first + i; }
};

template <class T, Form form, bool residual, bool signs, class P>
INLINE typename Lane<T>::V finish(P z, typename Lane<T>::V r, uint8_t* bits, i64 i, i64 count, const KernelFusion& f) {
  if constexpr (residual) {
    const P added = P::of(r);
    for (int k = 0; k < P::parts; ++k) z.part[k] += added.part[k];
  }
  if constexpr (signs) put_bits(bits, i, count, sign_bits(z, f));
  const auto v = z.rounded();
  if constexpr (form == Form::identity) return v;
  if constexpr (form == Form::relu) return vmax(v, typename Lane<T>::V{});
  if constexpr (form == Form::any) return activate_called(f.activation, v, f.slope);
  return activate(activation_of(form), v, f.slope);
}

template <class T, class P, Form form, bool residual, bool signs>
void planar_normalize(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients k,
                      const KernelFusion& f) {
  using L = Lane<T>;
  using V = typename L::V;
  const bool in_place = is_over(y, x) || is_over(y, f.residual);
  const Backward order(slab, sizeof(T));
  for (i64 step = 0; step < slab.samples; ++step) {
    const Span span = slab.span(order(step));
    const i64 n = span.sample;
    for (i64 c = 0; c < slab.channels; ++c) {
      prefetch<T>(slab, x, step, c);
      const auto normal = Forward<T, P>::broadcast(k, c);
      const T* p = at<const T>(x, n, c) + span.first;
      const T* r = residual ? at<const T>(f.residual, n, c) + span.first : nullptr;
      const PlaneBits<signs> bits(f, n, c);
      write_plane<!signs>(
          at<T>(y, n, c) + span.first, span.inner, f.stream, in_place,
          [&](i64 i) {
            const V rv = residual ? L::load(r + i) : V{};
            return finish<T, form, residual, signs>(normal(P::load(p + i)), rv, bits.from, bits(i), L::width, f);
          },
          [&](i64 i) {
            const auto v = load_pair(p + i), rv = residual ? load_pair(r + i) : Pair<V>{};
            return Pair<V>{finish<T, form, residual, false>(normal(P::of(v.a)), rv.a, nullptr, 0, 0, f),
                           finish<T, form, residual, false>(normal(P::of(v.b)), rv.b, nullptr, 0, 0, f)};
          },
          [&](i64 i, i64 count) {
            const V rv = residual ? load_some(r + i, count) : V{};
            return finish<T, form, residual, signs>(normal(P::of(load_some(p + i, count))), rv, bits.from, bits(i),
                                                    count, f);
          });
    }
  }
}

template <class T, class P, Form form, bool residual, bool signs>
void interleaved_normalize(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients k,
                           const KernelFusion& f) {
  const RowAccess<const T> xs(x);
  const RowAccess<const T> rs(f.residual);
  const RowAccess<T> ys(y);
  uint8_t* const all_signs = f.signs;
  const i64 signs_row = f.signs_sample;
  using L = Lane<T>;
  using V = typename L::V;
  write_rows<!signs, kTile<form>, T>(
      y, slab.samples, slab.channels, f.stream, f.near, is_over(y, x) || is_over(y, f.residual),
      [=](i64 c) INLINED { return Forward<T, P>::of_columns(k, c); },
      [=](i64 n, i64 c, const Forward<T, P>& normal) INLINED {
        const V rv = residual ? L::load(rs(n, c)) : V{};
        uint8_t* bits = signs ? all_signs + n * signs_row : nullptr;
        return finish<T, form, residual, signs>(normal(P::load(xs(n, c))), rv, bits, c, L::width, f);
      },
      [=](i64 n0, i64 n1, i64 c, i64 count) {
        const auto normal = Forward<T, P>::of_some(k, c, count);
        for (i64 n = n0; n < n1; ++n) {
          const V rv = residual ? load_some(rs(n, c), count) : V{};
          uint8_t* bits = signs ? all_signs + n * signs_row : nullptr;
          const auto px = P::of(load_some(xs(n, c), count));
          store_some(ys(n, c), finish<T, form, residual, signs>(normal(px), rv, bits, c, count, f), count);
        }
      });
}

// ------------------------------------------------------------------------------------------------ backward
// dz = dy * activation'(z), with z rebuilt from x (and the residual), or its derivative from the bits.
template <class T, class P, Form form, Gate gate>
INLINE P gated(typename Lane<T>::V dy, typename Lane<T>::V x, const Normal<T, P>& normal, typename Lane<T>::V r,
               const uint8_t* bits, i64 i, i64 count, const KernelFusion& f) {
  using C = typename P::C;
  if constexpr (form == Form::relu) return P::of(select(normal.positive(x), dy, typename Lane<T>::V{}));
  if constexpr (gate == Gate::none) return P::of(dy);
  if constexpr (gate == Gate::signs) {
    P dz = P::of(dy);
    const unsigned word = get_bits(bits, i, count);
    const C off = C{} + typename P::S(f.activation == Activation::leaky_relu ? f.slope : 0);
    for (int k = 0; k < P::parts; ++k) {
      using M = typename Masks<C>::type;
      const M lane = (M{} + 1) << (lane_numbers<C>() + k * P::lanes);
      // A select, not a product: what the gate closes must not turn infinity into NaN.
      const C closed = f.activation == Activation::leaky_relu ? dz.part[k] * off : C{};
      dz.part[k] = select(((M{} + word) & lane) != M{}, dz.part[k], closed);
    }
    return dz;
  }
  P z = normal(P::of(x));
  if constexpr (gate == Gate::residual) {
    const P added = P::of(r);
    for (int k = 0; k < P::parts; ++k) z.part[k] += added.part[k];
  }
  if constexpr (form == Form::any) return P::of(dy * derivative_called(f.activation, z.rounded(), f.slope));
  return P::of(dy * derivative(activation_of(form), z.rounded(), f.slope));
}

template <class T, class P, class S, Form form, Gate gate>
void planar_reduce(const Slab& slab, const Operand& dy, const Operand& x, const Operand& kept, const double* mean,
                   const NormalizeCoefficients k, const KernelFusion& f, double* sums) {
  using L = Lane<T>;
  using V = typename L::V;
  LaneSums lanes(slab.channels);
  for (i64 step = 0; step < slab.samples; ++step) {
    const Span span = slab.span(step);
    const i64 n = span.sample;
    for (i64 c = 0; c < slab.channels; ++c) {
      prefetch<T>(slab, x, step, c);
      prefetch<T>(slab, dy, step, c);
      const auto normal = Normal<T, P>::broadcast(k, c);
      const auto m = everywhere<S>(mean[c]);
      const T *p = at<const T>(x, n, c) + span.first, *g = at<const T>(dy, n, c) + span.first;
      const T* r = gate == Gate::residual ? at<const T>(f.residual, n, c) + span.first : nullptr;
      const PlaneBits<gate == Gate::signs> bits(f, n, c);
      T* const keep = kept ? at<T>(kept, n, c) + span.first : nullptr;
      sum_plane<kPaired<T> && gate != Gate::signs, S>(
          span.inner, lanes.first + c, lanes.second + c,
          [&](i64 i, Sums<S>& a) {
            const V v = L::load(p + i), rv = gate == Gate::residual ? L::load(r + i) : V{};
            const auto d = factor_of(load<S>(p + i), m);
            if constexpr (gate == Gate::none) {
              a.add(load<S>(g + i), d);
            } else {
              const V dz =
                  gated<T, P, form, gate>(L::load(g + i), v, normal, rv, bits.from, bits(i), L::width, f).rounded();
              if (keep) L::store(keep + i, dz);
              a.add(S::of(dz), d);
            }
          },
          [&](i64 i, Sums<S>& even, Sums<S>& odd) {
            const auto v = load_pair(p + i), gv = load_pair(g + i);
            const auto rv = gate == Gate::residual ? load_pair(r + i) : Pair<V>{};
            Pair<V> dz = gv;
            if constexpr (gate != Gate::none) {
              dz.a = gated<T, P, form, gate>(gv.a, v.a, normal, rv.a, nullptr, 0, 0, f).rounded();
              dz.b = gated<T, P, form, gate>(gv.b, v.b, normal, rv.b, nullptr, 0, 0, f).rounded();
              if (keep) store_pair(keep + i, dz);
            }
            even.add(S::of(dz.a), factor_of(S::of(v.a), m));
            odd.add(S::of(dz.b), factor_of(S::of(v.b), m));
          },
          [&](i64 i, i64 count, Sums<S>& a) {
            const V v = load_some(p + i, count), rv = gate == Gate::residual ? load_some(r + i, count) : V{};
            const V dz =
                gated<T, P, form, gate>(load_some(g + i, count), v, normal, rv, bits.from, bits(i), count, f).rounded();
            if (keep) store_some(keep + i, dz, count);
            a.add(only(S::of(dz), 0, count), only(factor_of(S::of(v), m), 0, count));
          });
    }
  }
  lanes.add_to(sums);
}

template <class T, class P, class S, Form form, Gate gate>
void interleaved_reduce(const Slab& slab, const Operand& dy, const Operand& x, const Operand& kept, const double* mean,
                        const NormalizeCoefficients k, const KernelFusion& f, double* sums) {
  const RowAccess<T> keeps(kept);
  const RowAccess<const T> xs(x);
  const RowAccess<const T> dys(dy);
  const RowAccess<const T> rs(f.residual);
  uint8_t* const all_signs = f.signs;
  const i64 signs_row = f.signs_sample;
  using L = Lane<T>;
  using V = typename L::V;
  const i64 C = slab.channels;
  struct Prepared {
    Normal<T, P> normal;
    S mean;
  };
  const i64 some = C < L::width ? C : L::width;
  const Prepared few{Normal<T, P>::of_some(k, 0, some), columns_of<S>(mean, some)};
  // An exponential takes so many registers that several vectors' sums would leave them.
  sum_rows<S, sizeof(T) == 2 ? 6 : 4, takes_exponential(activation_of(form)) ? 1 : kAbreast>(
      slab.samples, C, sums,
      [=](i64 c) INLINED { return Prepared{Normal<T, P>::of_columns(k, c), columns_of<S>(mean + c, L::width)}; },
      [=](i64 n, i64 c, int skip, const Prepared& q, Sums<S>& a) INLINED {
        const V v = L::load(xs(n, c));
        const V rv = gate == Gate::residual ? L::load(rs(n, c)) : V{};
        const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
        const auto d = factor_of(load<S>(xs(n, c)), q.mean);
        if constexpr (gate == Gate::none) {
          a.add(load<S>(dys(n, c)), d);
        } else {
          const V dz = gated<T, P, form, gate>(L::load(dys(n, c)), v, q.normal, rv, bits, c, L::width, f).rounded();
          if (keeps.data) store_from(keeps(n, c), dz, skip);
          a.add(S::of(dz), d);
        }
      },
      [=](i64 n, Sums<S>& a) INLINED {
        const V v = load_some(xs(n, 0), C);
        const V rv = gate == Gate::residual ? load_some(rs(n, 0), C) : V{};
        const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
        const V g = load_some(dys(n, 0), C);
        const V dz = gated<T, P, form, gate>(g, v, few.normal, rv, bits, 0, C, f).rounded();
        if (keeps.data) store_some(keeps(n, 0), dz, C);
        a.add(S::of(dz), factor_of(S::of(v), few.mean));
      });
}

template <class T, class P>
struct Apply {
  Normal<T, P> normal;
  P k1, k2, k3;
  static INLINE Apply broadcast(const NormalizeCoefficients& k, const ApplyCoefficients& a, i64 c) {
    using K = Coefficient<P>;
    return {Normal<T, P>::broadcast(k, c), K::broadcast(a.k1, c), K::broadcast(a.k2, c), K::broadcast(a.k3, c)};
  }
  static INLINE Apply of_columns(const NormalizeCoefficients& k, const ApplyCoefficients& a, i64 c) {
    using K = Coefficient<P>;
    return {Normal<T, P>::of_columns(k, c), K::of_columns(a.k1, c), K::of_columns(a.k2, c), K::of_columns(a.k3, c)};
  }
  static INLINE Apply of_some(const NormalizeCoefficients& k, const ApplyCoefficients& a, i64 c, i64 count) {
    using K = Coefficient<P>;
    return {Normal<T, P>::of_some(k, c, count), K::of_some(a.k1, c, count), K::of_some(a.k2, c, count),
            K::of_some(a.k3, c, count)};
  }
  INLINE typename Lane<T>::V operator()(const P& dz, const P& x) const {
    P dx;
    constexpr bool line = std::is_same_v<T, bf16>;  // is_line_of_gradient
    for (int i = 0; i < P::parts; ++i) {
      const auto v = line ? x.part[i] : x.part[i] - normal.mean.part[i];
      dx.part[i] = k1.part[i] * dz.part[i] + (k2.part[i] * v + k3.part[i]);
    }
    return dx.rounded();
  }
};

template <class T, class P, Form form, Gate gate>
void planar_apply(const Slab& slab, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                  const NormalizeCoefficients k, const ApplyCoefficients a, const KernelFusion& f) {
  using L = Lane<T>;
  using V = typename L::V;
  const bool in_place = is_over(dx, dy) || is_over(d_residual, dy);
  const Backward order(slab, sizeof(T));
  for (i64 step = 0; step < slab.samples; ++step) {
    const Span span = slab.span(order(step));
    const i64 n = span.sample;
    for (i64 c = 0; c < slab.channels; ++c) {
      prefetch<T>(slab, x, step, c);
      prefetch<T>(slab, dy, step, c);
      const auto apply = Apply<T, P>::broadcast(k, a, c);
      const T *p = at<const T>(x, n, c) + span.first, *g = at<const T>(dy, n, c) + span.first;
      const T* r = gate == Gate::residual ? at<const T>(f.residual, n, c) + span.first : nullptr;
      const PlaneBits<gate == Gate::signs> bits(f, n, c);
      T* out = d_residual ? at<T>(d_residual, n, c) + span.first : nullptr;
      write_plane<gate != Gate::signs>(
          at<T>(dx, n, c) + span.first, span.inner, f.stream, in_place,
          [&](i64 i) {
            const V v = L::load(p + i);
            const V rv = gate == Gate::residual ? L::load(r + i) : V{};
            const P dz = gated<T, P, form, gate>(L::load(g + i), v, apply.normal, rv, bits.from, bits(i), L::width, f);
            if (out) L::store(out + i, dz.rounded());
            return apply(dz, P::of(v));
          },
          [&](i64 i) {
            const auto v = load_pair(p + i), gv = load_pair(g + i);
            const auto rv = gate == Gate::residual ? load_pair(r + i) : Pair<V>{};
            const P dz = gated<T, P, form, gate>(gv.a, v.a, apply.normal, rv.a, nullptr, 0, 0, f);
            const P ez = gated<T, P, form, gate>(gv.b, v.b, apply.normal, rv.b, nullptr, 0, 0, f);
            if (out) store_pair(out + i, Pair<V>{dz.rounded(), ez.rounded()});
            return Pair<V>{apply(dz, P::of(v.a)), apply(ez, P::of(v.b))};
          },
          [&](i64 i, i64 count) {
            const V v = load_some(p + i, count);
            const V rv = gate == Gate::residual ? load_some(r + i, count) : V{};
            const P dz =
                gated<T, P, form, gate>(load_some(g + i, count), v, apply.normal, rv, bits.from, bits(i), count, f);
            if (out) store_some(out + i, dz.rounded(), count);
            return apply(dz, P::of(v));
          });
    }
  }
}

template <class T, class P, Form form, Gate gate>
void interleaved_apply(const Slab& slab, const Operand& dy, const Operand& x, const Operand& dx,
                       const Operand& d_residual, const NormalizeCoefficients k, const ApplyCoefficients a,
                       const KernelFusion& f) {
  const RowAccess<const T> xs(x);
  const RowAccess<const T> dys(dy);
  const RowAccess<const T> rs(f.residual);
  const RowAccess<T> drs(d_residual);
  const RowAccess<T> dxs(dx);
  uint8_t* const all_signs = f.signs;
  const i64 signs_row = f.signs_sample;
  using L = Lane<T>;
  using V = typename L::V;
  write_rows<gate != Gate::signs, sizeof(T) == 2 ? 2 : kTile<form>, T>(
      dx, slab.samples, slab.channels, f.stream, f.near, is_over(dx, dy) || is_over(d_residual, dy),
      [=](i64 c) INLINED { return Apply<T, P>::of_columns(k, a, c); },
      [=](i64 n, i64 c, const Apply<T, P>& apply) INLINED {
        const V v = L::load(xs(n, c));
        const V rv = gate == Gate::residual ? L::load(rs(n, c)) : V{};
        const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
        const P dz = gated<T, P, form, gate>(L::load(dys(n, c)), v, apply.normal, rv, bits, c, L::width, f);
        if (drs.data) L::store(drs(n, c), dz.rounded());
        return apply(dz, P::of(v));
      },
      [=](i64 n0, i64 n1, i64 c, i64 count) {
        const auto apply = Apply<T, P>::of_some(k, a, c, count);
        for (i64 n = n0; n < n1; ++n) {
          const V v = load_some(xs(n, c), count);
          const V rv = gate == Gate::residual ? load_some(rs(n, c), count) : V{};
          const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
          const P dz = gated<T, P, form, gate>(load_some(dys(n, c), count), v, apply.normal, rv, bits, c, count, f);
          if (drs.data) store_some(drs(n, c), dz.rounded(), count);
          store_some(dxs(n, c), apply(dz, P::of(v)), count);
        }
      });
}

// ------------------------------------------------------------------------------------------------ the table
// Calls kernel(few) with the slab's `few` as a constant.
template <class Kernel>
void choose_few(const Slab& slab, Kernel kernel) {
  if (slab.few)
    kernel(std::true_type{});
  else
    kernel(std::false_type{});
}

template <class T, class P, Order order, Form form, bool residual, bool signs>
void normalize_case(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                    const KernelFusion& f) {
  if constexpr (order == Order::planar)
    planar_normalize<T, P, form, residual, signs>(slab, x, y, k, f);
  else
    interleaved_normalize<T, P, form, residual, signs>(slab, x, y, k, f);
}

// With a residual.
template <class T, class P, Order order, Form form>
void normalize_sum(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                   const KernelFusion& f) {
  if (!f.signs) return normalize_case<T, P, order, form, true, false>(slab, x, y, k, f);
  return normalize_case<T, P, order, form, true, true>(slab, x, y, k, f);
}

template <class T, class P, Order order>
void normalize_in(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                  const KernelFusion& f) {
  const bool is_identity = f.activation == Activation::identity;
  if (f.residual && is_identity) return normalize_sum<T, P, order, Form::identity>(slab, x, y, k, f);
  if (f.residual && f.activation == Activation::relu) return normalize_sum<T, P, order, Form::relu>(slab, x, y, k, f);
  if (f.residual) return normalize_sum<T, P, order, Form::any>(slab, x, y, k, f);
  if (is_identity) return normalize_case<T, P, order, Form::identity, false, false>(slab, x, y, k, f);
  choose_form<forms_of<T>>(f.activation,
                           [&](auto form) { normalize_case<T, P, order, form.value, false, false>(slab, x, y, k, f); });
}

template <class T, Order order>
void normalize_slab(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                    const KernelFusion& f) {
  if constexpr (std::is_same_v<T, float> && kFused)
    if (k.scale_rest) return normalize_in<T, Pack<T>, order>(slab, x, y, k, f);
  normalize_in<T, typename In<T, true>::E, order>(slab, x, y, k, f);
}

// Calls kernel(form, gate) for the case at hand.
template <Forms forms, class Kernel>
void choose_gate(const KernelFusion& f, Gate gate, Kernel kernel) {
  using std::integral_constant;
  constexpr integral_constant<Form, Form::any> any{};
  switch (gate) {
    case Gate::none: return kernel(any, integral_constant<Gate, Gate::none>{});
    case Gate::signs: return kernel(any, integral_constant<Gate, Gate::signs>{});
    case Gate::residual: return kernel(any, integral_constant<Gate, Gate::residual>{});
    case Gate::recompute:
      return choose_form<forms>(f.activation,
                                [&](auto form) { kernel(form, integral_constant<Gate, Gate::recompute>{}); });
  }
}

template <class T, Order order>
void reduce_slab(const Slab& slab, const Operand& dy, const Operand& x, const Operand& kept, const double* mean,
                 const NormalizeCoefficients& k, const KernelFusion& f, Gate gate, double* sums) {
  choose_few(slab, [&](auto few) {
    choose_gate<forms_of<T>>(f, gate, [&](auto form, auto how) {
      using P = typename In<T, few.value>::E;
      using S = typename In<T, few.value>::S;
      if constexpr (order == Order::planar)
        planar_reduce<T, P, S, form.value, how.value>(slab, dy, x, kept, mean, k, f, sums);
      else
        interleaved_reduce<T, P, S, form.value, how.value>(slab, dy, x, kept, mean, k, f, sums);
    });
  });
}

template <class T, Order order>
void apply_slab(const Slab& slab, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                const NormalizeCoefficients& k, const ApplyCoefficients& a, const KernelFusion& f, Gate gate) {
  choose_few(slab, [&](auto few) {
    // `backward` keeps dz of the others. `backward_apply` and planes with padding choose vector by vector.
    choose_gate<std::min(Forms::piecewise, forms_of<T>)>(f, gate, [&](auto form, auto how) {
      using P = typename In<T, few.value>::E;
      if constexpr (order == Order::planar)
        planar_apply<T, P, form.value, how.value>(slab, dy, x, dx, d_residual, k, a, f);
      else
        interleaved_apply<T, P, form.value, how.value>(slab, dy, x, dx, d_residual, k, a, f);
    });
  });
}

template <class T, Order order>
constexpr Kernels kernels_of() {
  return {order == Order::planar ? planar_moments<T> : interleaved_moments<T>,
          normalize_slab<T, order>,
          reduce_slab<T, order>,
          apply_slab<T, order>,
          kLine<T>,
          std::is_same_v<T, float> && kFused};
}

constexpr Order kOrder = Order::BATCHNORM_ORDER;

}  // namespace

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern const Kernels JOIN(BATCHNORM_ORDER, _kernels)[4];
const Kernels JOIN(BATCHNORM_ORDER, _kernels)[4] = {kernels_of<float, kOrder>(), kernels_of<double, kOrder>(),
                                                    kernels_of<bf16, kOrder>(), kernels_of<f16, kOrder>()};

}  // namespace batchnorm::BATCHNORM_ISA
