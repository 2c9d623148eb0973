// The four verbs on one slab, for one instruction set: this file is compiled once for each.
//
// Arithmetic is in the compute type, which is wider than the elements by far (float64 for float32, float32 for 16
// bits): a result is rounded once, when it is stored. Sums are float64; the moments of many 16-bit elements are
// gathered in float32 over kChain vectors at a time, where differences from one of the values are exact or nearly so.
#include "kernels.h"

#include <type_traits>

#include "activations.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <class T>
INLINE T* at(const Operand& o, i64 sample, i64 channel) {
  return static_cast<T*>(o.data) + sample * o.sample_stride + channel * o.channel_stride;
}

// An operand whose address and strides the compiler can keep in registers, whatever is written through it.
template <class T>
struct Rows {
  T* data;
  i64 stride;
  explicit INLINE Rows(const Operand& o) : data(static_cast<T*>(o.data)), stride(o.sample_stride) {}
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

template <class T>
INLINE Pack<T> load(const T* p) {
  return Pack<T>::load(p);
}

// The first `count` elements at p; the other lanes repeat the first.
template <class T>
INLINE typename Lane<T>::V load_some(const T* p, i64 count) {
  T values[Lane<T>::width];
  for (int i = 0; i < Lane<T>::width; ++i) values[i] = p[i < count ? i : 0];
  return Lane<T>::load(values);
}
template <class T>
INLINE void store_some(T* p, typename Lane<T>::V v, i64 count) {
  T values[Lane<T>::width];
  Lane<T>::store(values, v);
  for (i64 i = 0; i < count; ++i) p[i] = values[i];
}

// A coefficient of one channel for all lanes, or of one channel a lane.
template <class T>
struct Coefficient {
  using P = Pack<T>;
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

// Vectors that one chain of additions takes in before it is settled in float64.
template <class P>
constexpr i64 kChain = sizeof(typename P::S) == 4 ? 16 : INT64_MAX / 64;

// What sums of products are taken in: float64.
template <class T>
using Exact = std::conditional_t<sizeof(T) == 2, Pack<float>, Pack<T>>;

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
      const Pack<float> wide = Pack<float>::of(in[0]);
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
  if (count == P::width && sizeof(typename P::S) == 8)
    for (int k = 0; k < P::parts; ++k) p.part[k] = load_bytes<typename P::C>(v + k * P::lanes);
  else
    for (i64 i = 0; i < count; ++i) p.part[i / P::lanes][i % P::lanes] = typename P::S(v[i]);
  return p;
}

// Walks a plane in whole vectors: `add(i, sums)` for each, into two sets of sums in turn; then `rest(i, count, sums)`
// once for the elements that are left.
template <class P, class Add, class Rest>
INLINE void sum_plane(i64 inner, double* first, double* second, Add add, Rest rest) {
  constexpr i64 W = P::width, chunk = 2 * W * kChain<P>;
  f64 a{}, b{};
  for (i64 i = 0; i < inner;) {
    const i64 end = inner - i > chunk ? i + chunk : inner;
    Sums<P> even, odd;
    for (; i + 2 * W <= end; i += 2 * W) {
      add(i, even);
      add(i + W, odd);
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
  *first += sum_lanes(a);
  *second += sum_lanes(b);
}

// How many vectors are walked side by side along a row: a cache line of float32.
constexpr int kAbreast = VB == 32 ? 2 : 1;

// Walks rows in tiles, and has `fetch(n, c)` ask for the next tile. For each vector of columns `prepare(c)` once and
// `add(n, c, prepared, sums)` down its rows; the last vector overlaps the one before it, and its first lanes do not
// count. Fewer columns than a vector: `rest(n, sums)`.
template <class P, class Fetch, class Prepare, class Add, class Rest>
INLINE void sum_rows(i64 rows, i64 columns, double* totals, Fetch fetch, Prepare prepare, Add add, Rest rest) {
  constexpr i64 W = P::width, kTile = sizeof(typename P::S) == 4 ? kChain<P> : 8, G = kAbreast;
  for (i64 n0 = 0; n0 < rows; n0 += kTile) {
    const i64 n1 = n0 + kTile < rows ? n0 + kTile : rows;
    if (columns < W) {
      Sums<P> sums;
      for (i64 n = n0; n < n1; ++n) rest(n, sums);
      sums.add_columns(totals, columns, 0, int(columns));
      continue;
    }
    i64 c = 0;
    for (; c + G * W <= columns; c += G * W) {
      const decltype(prepare(c)) prepared[2] = {prepare(c), prepare(c + (G - 1) * W)};
      Sums<P> sums[G];
      for (i64 n = n0; n < n1; ++n) {
        fetch(n + kTile, c);
        for (int g = 0; g < G; ++g) add(n, c + g * W, prepared[g], sums[g]);
      }
      for (int g = 0; g < G; ++g) sums[g].add_columns(totals + c + g * W, columns, 0, int(W));
    }
    while (c < columns) {
      const i64 from = c + W <= columns ? c : columns - W;
      const auto prepared = prepare(from);
      Sums<P> sums;
      for (i64 n = n0; n < n1; ++n) add(n, from, prepared, sums);
      sums.add_columns(totals + c, columns, int(c - from), int(W));
      c = from + W;
    }
  }
}

// Writes a plane: `value(i)` is the vector at i, `some(i, count)` that of the elements left where they are fewer than
// a vector, or where vectors must not overlap.
template <bool overlap, class T, class Value, class Some>
INLINE void write_plane(T* out, i64 inner, bool around_cache, Value value, Some some) {
  using L = Lane<T>;
  constexpr i64 W = L::width;
  i64 i = 0;
  if (overlap && around_cache && inner >= 4 * W && sizeof(T) * W == VB) {
    const i64 head = i64((VB - (reinterpret_cast<uintptr_t>(out) & (VB - 1))) & (VB - 1)) / i64(sizeof(T));
    if (head) L::store(out, value(0));
    for (i = head; i + W <= inner; i += W) stream(out + i, value(i));
  }
  for (; i + W <= inner; i += W) L::store(out + i, value(i));
  if (i == inner) return;
  if (overlap && inner >= W)
    L::store(out + inner - W, value(inner - W));
  else
    store_some(out + i, some(i, inner - i), inner - i);
}

// Writes rows in tiles: `prepare(c)` prepares the coefficients of a vector of columns,
// `value(n, c, prepared)` is the vector there.
template <bool overlap, class T, class Columns, class Value, class Some>
INLINE void write_rows(const Operand& to, i64 rows, i64 columns, bool around_cache, Columns prepare, Value value,
                       Some some) {
  using L = Lane<T>;
  constexpr i64 W = L::width, G = kAbreast;
  // Long rows one by one: rows whose addresses agree in their last 12 bits disturb each other.
  const i64 tile = columns * i64(sizeof(T)) >= 512 ? 1 : 4;
  const Rows<T> out(to);
  const bool aligned = around_cache && sizeof(T) * W == VB && out.stride % W == 0 &&
                       (reinterpret_cast<uintptr_t>(out.data) & (VB - 1)) == 0;
  for (i64 n0 = 0; n0 < rows; n0 += tile) {
    const i64 n1 = n0 + tile < rows ? n0 + tile : rows;
    i64 c = 0;
    for (; c + G * W <= columns; c += G * W) {
      const decltype(prepare(c)) k[2] = {prepare(c), prepare(c + (G - 1) * W)};
      for (i64 n = n0; n < n1; ++n)
        for (int g = 0; g < G; ++g) {
          const auto v = value(n, c + g * W, k[g]);
          if (aligned)
            stream(out(n, c + g * W), v);
          else
            L::store(out(n, c + g * W), v);
        }
    }
    for (; c + W <= columns; c += W) {
      const auto k = prepare(c);
      for (i64 n = n0; n < n1; ++n) L::store(out(n, c), value(n, c, k));
    }
    if (c == columns) continue;
    if (overlap && columns >= W) {
      c = columns - W;
      const auto k = prepare(c);
      for (i64 n = n0; n < n1; ++n) L::store(out(n, c), value(n, c, k));
    } else {
      some(n0, n1, c, columns - c);
    }
  }
}

// ------------------------------------------------------------------------------------------------ moments
template <class T, class P>
void planar_moments_in(const Slab& slab, const Operand& x, const double* shift, double* sums) {
  using L = Lane<T>;
  constexpr i64 W = L::width;
  for (i64 n = 0; n < slab.samples; ++n) {
    for (i64 c = 0; c < slab.channels; ++c) {
      const T* p = at<const T>(x, n, c);
      const auto s = everywhere<P>(shift[c]);
      sum_plane<P>(
          slab.inner, sums + c, sums + slab.channels + c,
          [&](i64 i, Sums<P>& a) {
            const auto d = minus(P::of(Lane<T>::load(p + i)), s);
            a.add(d, d);
          },
          [&](i64 i, i64 count, Sums<P>& a) {
            const auto d = slab.inner >= W ? only(minus(P::of(Lane<T>::load(p + i + count - W)), s), W - count, W)
                                           : only(minus(P::of(load_some(p + i, count)), s), 0, count);
            a.add(d, d);
          });
    }
  }
}

template <class T, class P>
void interleaved_moments_in(const Slab& slab, const Operand& x, const double* shift, double* sums) {
  const Rows<const T> xs(x);
  const i64 C = slab.channels;
  const P few = columns_of<P>(shift, C < P::width ? C : P::width);
  sum_rows<P>(
      slab.samples, C, sums, [&](i64 n, i64 c) { __builtin_prefetch(xs(n, c), 0, 2); },
      [&](i64 c) { return columns_of<P>(shift + c, P::width); },
      [&](i64 n, i64 c, const P& s, Sums<P>& a) {
        const P d = minus(P::of(Lane<T>::load(xs(n, c))), s);
        a.add(d, d);
      },
      [&](i64 n, Sums<P>& a) {
        const P d = minus(P::of(load_some(xs(n, 0), C)), few);
        a.add(d, d);
      });
}

template <class T>
void planar_moments(const Slab& slab, const Operand& x, const double* shift, bool few, double* sums) {
  few ? planar_moments_in<T, Exact<T>>(slab, x, shift, sums) : planar_moments_in<T, Pack<T>>(slab, x, shift, sums);
}

template <class T>
void interleaved_moments(const Slab& slab, const Operand& x, const double* shift, bool few, double* sums) {
  few ? interleaved_moments_in<T, Exact<T>>(slab, x, shift, sums)
      : interleaved_moments_in<T, Pack<T>>(slab, x, shift, sums);
}

// ------------------------------------------------------------------------------------------------ normalize
// Which activations are compiled into the loops; all others are chosen inside, vector by vector.
enum class Form { identity, relu, any };

template <class T>
struct Normal {
  using P = Pack<T>;
  using V = typename Lane<T>::V;
  using G = typename Lane<T>::S;
  P mean, scale, shift;
  V threshold, flip;
  static INLINE Normal broadcast(const NormalizeCoefficients& k, i64 c) {
    using K = Coefficient<T>;
    return {K::broadcast(k.mean, c), K::broadcast(k.scale, c), K::broadcast(k.shift, c),
            V{} + static_cast<const G*>(k.threshold)[c], spread(static_cast<const G*>(k.flip)[c])};
  }
  static INLINE Normal of_columns(const NormalizeCoefficients& k, i64 c) {
    using K = Coefficient<T>;
    return {K::of_columns(k.mean, c), K::of_columns(k.scale, c), K::of_columns(k.shift, c),
            load_bytes<V>(static_cast<const G*>(k.threshold) + c), load_bytes<V>(static_cast<const G*>(k.flip) + c)};
  }
  static INLINE Normal of_some(const NormalizeCoefficients& k, i64 c, i64 count) {
    using K = Coefficient<T>;
    Normal n{K::of_some(k.mean, c, count), K::of_some(k.scale, c, count), K::of_some(k.shift, c, count), {}, {}};
    for (i64 i = 0; i < count; ++i) {
      n.threshold[i] = static_cast<const G*>(k.threshold)[c + i];
      n.flip[i] = static_cast<const G*>(k.flip)[c + i];
    }
    return n;
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

// One bit a lane: whether the derivative there is that of the activation's linear part.
template <class T>
INLINE unsigned sign_bits(const Pack<T>& z, const KernelFusion& f) {
  using C = typename Pack<T>::C;
  unsigned bits = 0;
  for (int k = 0; k < Pack<T>::parts; ++k) {
    auto inside = z.part[k] > C{};
    if (f.activation == Activation::relu6) inside &= z.part[k] < C{} + typename Pack<T>::S(6);
    bits |= bits_of((typename Masks<C>::type)inside) << (k * Pack<T>::lanes);
  }
  return bits;
}

// `count` bits at bit i.
INLINE void put_bits(uint8_t* signs, i64 i, i64 count, unsigned bits) {
  if ((i & 7) == 0 && (count & 7) == 0) {
    for (i64 b = 0; b < count / 8; ++b) signs[i / 8 + b] = uint8_t(bits >> (8 * b));
    return;
  }
  for (i64 k = 0; k < count; ++k) {
    const i64 bit = i + k;
    const unsigned one = 1u << (bit & 7);
    signs[bit >> 3] = uint8_t((bits >> k) & 1 ? signs[bit >> 3] | one : signs[bit >> 3] & ~one);
  }
}

INLINE unsigned get_bits(const uint8_t* signs, i64 i, i64 count) {
  unsigned bits = 0;
  if ((i & 7) == 0 && (count & 7) == 0) {
    for (i64 b = 0; b < count / 8; ++b) bits |= unsigned(signs[i / 8 + b]) << (8 * b);
    return bits;
  }
  for (i64 k = 0; k < count; ++k) bits |= unsigned((signs[(i + k) >> 3] >> ((i + k) & 7)) & 1) << k;
  return bits;
}

template <class T, Form form, bool residual, bool signs>
INLINE typename Lane<T>::V finish(Pack<T> z, typename Lane<T>::V r, uint8_t* bits, i64 i, i64 count,
                                  const KernelFusion& f) {
  if constexpr (residual) {
    const Pack<T> wide = Pack<T>::of(r);
    for (int k = 0; k < Pack<T>::parts; ++k) z.part[k] += wide.part[k];
  }
  if constexpr (signs) put_bits(bits, i, count, sign_bits<T>(z, f));
  const auto v = z.rounded();
  if constexpr (form == Form::identity) return v;
  if constexpr (form == Form::relu) return vmax(v, typename Lane<T>::V{});
  return activate(f.activation, v, f.slope);
}

template <class T, Form form, bool residual, bool signs>
void planar_normalize(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                      const KernelFusion& f) {
  using L = Lane<T>;
  using V = typename L::V;
  const Backward order(slab, sizeof(T));
  for (i64 step = 0; step < slab.samples; ++step) {
    const i64 n = order(step);
    for (i64 c = 0; c < slab.channels; ++c) {
      const auto normal = Normal<T>::broadcast(k, c);
      const T* p = at<const T>(x, n, c);
      const T* r = residual ? at<const T>(f.residual, n, c) : nullptr;
      uint8_t* bits = signs ? f.signs + n * f.signs_sample + c * f.signs_channel : nullptr;
      write_plane<!signs>(
          at<T>(y, n, c), slab.inner, f.stream,
          [&](i64 i) {
            const V rv = residual ? L::load(r + i) : V{};
            return finish<T, form, residual, signs>(normal(load(p + i)), rv, bits, i, L::width, f);
          },
          [&](i64 i, i64 count) {
            const V rv = residual ? load_some(r + i, count) : V{};
            return finish<T, form, residual, signs>(normal(Pack<T>::of(load_some(p + i, count))), rv, bits, i, count,
                                                    f);
          });
    }
  }
}

template <class T, Form form, bool residual, bool signs>
void interleaved_normalize(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                           const KernelFusion& f) {
  const Rows<const T> xs(x);
  const Rows<const T> rs(f.residual);
  const Rows<T> ys(y);
  uint8_t* const all_signs = f.signs;
  const i64 signs_row = f.signs_sample;
  using L = Lane<T>;
  using V = typename L::V;
  write_rows<!signs, T>(
      y, slab.samples, slab.channels, f.stream, [&](i64 c) { return Normal<T>::of_columns(k, c); },
      [&](i64 n, i64 c, const Normal<T>& normal) {
        const V rv = residual ? L::load(rs(n, c)) : V{};
        uint8_t* bits = signs ? all_signs + n * signs_row : nullptr;
        return finish<T, form, residual, signs>(normal(load(xs(n, c))), rv, bits, c, L::width, f);
      },
      [&](i64 n0, i64 n1, i64 c, i64 count) {
        const auto normal = Normal<T>::of_some(k, c, count);
        for (i64 n = n0; n < n1; ++n) {
          const V rv = residual ? load_some(rs(n, c), count) : V{};
          uint8_t* bits = signs ? all_signs + n * signs_row : nullptr;
          const auto px = Pack<T>::of(load_some(xs(n, c), count));
          store_some(ys(n, c), finish<T, form, residual, signs>(normal(px), rv, bits, c, count, f), count);
        }
      });
}

// ------------------------------------------------------------------------------------------------ backward
// dz = dy * activation'(z), with z rebuilt from x (and the residual), or its derivative from the bits.
template <class T, Form form, Gate gate>
INLINE Pack<T> gated(typename Lane<T>::V dy, typename Lane<T>::V x, const Normal<T>& normal, typename Lane<T>::V r,
                     const uint8_t* bits, i64 i, i64 count, const KernelFusion& f) {
  using P = Pack<T>;
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
    const P wide = P::of(r);
    for (int k = 0; k < P::parts; ++k) z.part[k] += wide.part[k];
  }
  return P::of(dy * derivative(f.activation, z.rounded(), f.slope));
}

// The same as float64, for sums.
template <class T, Form form, Gate gate>
INLINE Exact<T> exact_gated(typename Lane<T>::V dy, typename Lane<T>::V x, const Normal<T>& normal,
                            typename Lane<T>::V r, const uint8_t* bits, i64 i, i64 count, const KernelFusion& f) {
  const Pack<T> dz = gated<T, form, gate>(dy, x, normal, r, bits, i, count, f);
  if constexpr (std::is_same_v<Exact<T>, Pack<T>>)
    return dz;
  else
    return Exact<T>::of(dz.rounded());
}

template <class T, Form form, Gate gate>
void planar_reduce(const Slab& slab, const Operand& dy, const Operand& x, const double* mean,
                   const NormalizeCoefficients& k, const KernelFusion& f, double* sums) {
  using L = Lane<T>;
  using V = typename L::V;
  for (i64 n = 0; n < slab.samples; ++n) {
    for (i64 c = 0; c < slab.channels; ++c) {
      const auto normal = Normal<T>::broadcast(k, c);
      const auto m = everywhere<Exact<T>>(mean[c]);
      const T *p = at<const T>(x, n, c), *g = at<const T>(dy, n, c);
      const T* r = gate == Gate::residual ? at<const T>(f.residual, n, c) : nullptr;
      const uint8_t* bits = gate == Gate::signs ? f.signs + n * f.signs_sample + c * f.signs_channel : nullptr;
      sum_plane<Exact<T>>(
          slab.inner, sums + c, sums + slab.channels + c,
          [&](i64 i, Sums<Exact<T>>& a) {
            const V v = L::load(p + i), rv = gate == Gate::residual ? L::load(r + i) : V{};
            a.add(exact_gated<T, form, gate>(L::load(g + i), v, normal, rv, bits, i, L::width, f),
                  minus(Exact<T>::of(v), m));
          },
          [&](i64 i, i64 count, Sums<Exact<T>>& a) {
            const V v = load_some(p + i, count), rv = gate == Gate::residual ? load_some(r + i, count) : V{};
            const auto dz = exact_gated<T, form, gate>(load_some(g + i, count), v, normal, rv, bits, i, count, f);
            a.add(only(dz, 0, count), only(minus(Exact<T>::of(v), m), 0, count));
          });
    }
  }
}

template <class T, Form form, Gate gate>
void interleaved_reduce(const Slab& slab, const Operand& dy, const Operand& x, const double* mean,
                        const NormalizeCoefficients& k, const KernelFusion& f, double* sums) {
  const Rows<const T> xs(x);
  const Rows<const T> dys(dy);
  const Rows<const T> rs(f.residual);
  uint8_t* const all_signs = f.signs;
  const i64 signs_row = f.signs_sample;
  using L = Lane<T>;
  using V = typename L::V;
  const i64 C = slab.channels;
  struct Prepared {
    Normal<T> normal;
    Exact<T> mean;
  };
  const i64 some = C < L::width ? C : L::width;
  const Prepared few{Normal<T>::of_some(k, 0, some), columns_of<Exact<T>>(mean, some)};
  sum_rows<Exact<T>>(
      slab.samples, C, sums,
      [&](i64 n, i64 c) {
        __builtin_prefetch(xs(n, c), 0, 2);
        __builtin_prefetch(dys(n, c), 0, 2);
      },
      [&](i64 c) { return Prepared{Normal<T>::of_columns(k, c), columns_of<Exact<T>>(mean + c, L::width)}; },
      [&](i64 n, i64 c, const Prepared& q, Sums<Exact<T>>& a) {
        const V v = L::load(xs(n, c));
        const V rv = gate == Gate::residual ? L::load(rs(n, c)) : V{};
        const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
        a.add(exact_gated<T, form, gate>(L::load(dys(n, c)), v, q.normal, rv, bits, c, L::width, f),
              minus(Exact<T>::of(v), q.mean));
      },
      [&](i64 n, Sums<Exact<T>>& a) {
        const V v = load_some(xs(n, 0), C);
        const V rv = gate == Gate::residual ? load_some(rs(n, 0), C) : V{};
        const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
        const V g = load_some(dys(n, 0), C);
        a.add(exact_gated<T, form, gate>(g, v, few.normal, rv, bits, 0, C, f), minus(Exact<T>::of(v), few.mean));
      });
}

template <class T>
struct Apply {
  using P = Pack<T>;
  Normal<T> normal;
  P k1, k2, k3;
  static INLINE Apply broadcast(const NormalizeCoefficients& k, const ApplyCoefficients& a, i64 c) {
    using K = Coefficient<T>;
    return {Normal<T>::broadcast(k, c), K::broadcast(a.k1, c), K::broadcast(a.k2, c), K::broadcast(a.k3, c)};
  }
  static INLINE Apply of_columns(const NormalizeCoefficients& k, const ApplyCoefficients& a, i64 c) {
    using K = Coefficient<T>;
    return {Normal<T>::of_columns(k, c), K::of_columns(a.k1, c), K::of_columns(a.k2, c), K::of_columns(a.k3, c)};
  }
  static INLINE Apply of_some(const NormalizeCoefficients& k, const ApplyCoefficients& a, i64 c, i64 count) {
    using K = Coefficient<T>;
    return {Normal<T>::of_some(k, c, count), K::of_some(a.k1, c, count), K::of_some(a.k2, c, count),
            K::of_some(a.k3, c, count)};
  }
  INLINE typename Lane<T>::V operator()(const P& dz, const P& x) const {
    P dx;
    for (int i = 0; i < P::parts; ++i)
      dx.part[i] = k1.part[i] * dz.part[i] + (k2.part[i] * (x.part[i] - normal.mean.part[i]) + k3.part[i]);
    return dx.rounded();
  }
};

template <class T, Form form, Gate gate>
void planar_apply(const Slab& slab, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                  const NormalizeCoefficients& k, const ApplyCoefficients& a, const KernelFusion& f) {
  using L = Lane<T>;
  using V = typename L::V;
  using P = Pack<T>;
  const Backward order(slab, sizeof(T));
  for (i64 step = 0; step < slab.samples; ++step) {
    const i64 n = order(step);
    for (i64 c = 0; c < slab.channels; ++c) {
      const auto apply = Apply<T>::broadcast(k, a, c);
      const T *p = at<const T>(x, n, c), *g = at<const T>(dy, n, c);
      const T* r = gate == Gate::residual ? at<const T>(f.residual, n, c) : nullptr;
      const uint8_t* bits = gate == Gate::signs ? f.signs + n * f.signs_sample + c * f.signs_channel : nullptr;
      T* out = d_residual ? at<T>(d_residual, n, c) : nullptr;
      write_plane<gate != Gate::signs>(
          at<T>(dx, n, c), slab.inner, f.stream,
          [&](i64 i) {
            const V v = L::load(p + i);
            const V rv = gate == Gate::residual ? L::load(r + i) : V{};
            const P dz = gated<T, form, gate>(L::load(g + i), v, apply.normal, rv, bits, i, L::width, f);
            if (out) L::store(out + i, dz.rounded());
            return apply(dz, P::of(v));
          },
          [&](i64 i, i64 count) {
            const V v = load_some(p + i, count);
            const V rv = gate == Gate::residual ? load_some(r + i, count) : V{};
            const P dz = gated<T, form, gate>(load_some(g + i, count), v, apply.normal, rv, bits, i, count, f);
            if (out) store_some(out + i, dz.rounded(), count);
            return apply(dz, P::of(v));
          });
    }
  }
}

template <class T, Form form, Gate gate>
void interleaved_apply(const Slab& slab, const Operand& dy, const Operand& x, const Operand& dx,
                       const Operand& d_residual, const NormalizeCoefficients& k, const ApplyCoefficients& a,
                       const KernelFusion& f) {
  const Rows<const T> xs(x);
  const Rows<const T> dys(dy);
  const Rows<const T> rs(f.residual);
  const Rows<T> drs(d_residual);
  const Rows<T> dxs(dx);
  uint8_t* const all_signs = f.signs;
  const i64 signs_row = f.signs_sample;
  using L = Lane<T>;
  using V = typename L::V;
  using P = Pack<T>;
  write_rows<gate != Gate::signs, T>(
      dx, slab.samples, slab.channels, f.stream, [&](i64 c) { return Apply<T>::of_columns(k, a, c); },
      [&](i64 n, i64 c, const Apply<T>& apply) {
        const V v = L::load(xs(n, c));
        const V rv = gate == Gate::residual ? L::load(rs(n, c)) : V{};
        const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
        const P dz = gated<T, form, gate>(L::load(dys(n, c)), v, apply.normal, rv, bits, c, L::width, f);
        if (drs.data) L::store(drs(n, c), dz.rounded());
        return apply(dz, P::of(v));
      },
      [&](i64 n0, i64 n1, i64 c, i64 count) {
        const auto apply = Apply<T>::of_some(k, a, c, count);
        for (i64 n = n0; n < n1; ++n) {
          const V v = load_some(xs(n, c), count);
          const V rv = gate == Gate::residual ? load_some(rs(n, c), count) : V{};
          const uint8_t* bits = gate == Gate::signs ? all_signs + n * signs_row : nullptr;
          const P dz = gated<T, form, gate>(load_some(dys(n, c), count), v, apply.normal, rv, bits, c, count, f);
          if (drs.data) store_some(drs(n, c), dz.rounded(), count);
          store_some(dxs(n, c), apply(dz, P::of(v)), count);
        }
      });
}

// ------------------------------------------------------------------------------------------------ the table
template <class T, Order order, Form form, bool residual, bool signs>
void normalize_case(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                    const KernelFusion& f) {
  if constexpr (order == Order::planar)
    planar_normalize<T, form, residual, signs>(slab, x, y, k, f);
  else
    interleaved_normalize<T, form, residual, signs>(slab, x, y, k, f);
}

template <class T, Order order, Form form>
void normalize_form(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                    const KernelFusion& f) {
  if (!f.residual) return normalize_case<T, order, form, false, false>(slab, x, y, k, f);
  if (!f.signs) return normalize_case<T, order, form, true, false>(slab, x, y, k, f);
  return normalize_case<T, order, form, true, true>(slab, x, y, k, f);
}

template <class T, Order order>
void normalize_slab(const Slab& slab, const Operand& x, const Operand& y, const NormalizeCoefficients& k,
                    const KernelFusion& f) {
  if (f.activation == Activation::identity) return normalize_form<T, order, Form::identity>(slab, x, y, k, f);
  if (f.activation == Activation::relu) return normalize_form<T, order, Form::relu>(slab, x, y, k, f);
  return normalize_form<T, order, Form::any>(slab, x, y, k, f);
}

// Calls run<form, gate>() for the case at hand.
template <class Run>
void choose_gate(const KernelFusion& f, Gate gate, Run run) {
  using std::integral_constant;
  constexpr integral_constant<Form, Form::relu> relu{};
  constexpr integral_constant<Form, Form::any> any{};
  switch (gate) {
    case Gate::none: return run(any, integral_constant<Gate, Gate::none>{});
    case Gate::signs: return run(any, integral_constant<Gate, Gate::signs>{});
    case Gate::residual: return run(any, integral_constant<Gate, Gate::residual>{});
    case Gate::recompute:
      return f.activation == Activation::relu ? run(relu, integral_constant<Gate, Gate::recompute>{})
                                              : run(any, integral_constant<Gate, Gate::recompute>{});
  }
}

template <class T, Order order>
void reduce_slab(const Slab& slab, const Operand& dy, const Operand& x, const double* mean,
                 const NormalizeCoefficients& k, const KernelFusion& f, Gate gate, double* sums) {
  choose_gate(f, gate, [&](auto form, auto how) {
    if constexpr (order == Order::planar)
      planar_reduce<T, form.value, how.value>(slab, dy, x, mean, k, f, sums);
    else
      interleaved_reduce<T, form.value, how.value>(slab, dy, x, mean, k, f, sums);
  });
}

template <class T, Order order>
void apply_slab(const Slab& slab, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                const NormalizeCoefficients& k, const ApplyCoefficients& a, const KernelFusion& f, Gate gate) {
  choose_gate(f, gate, [&](auto form, auto how) {
    if constexpr (order == Order::planar)
      planar_apply<T, form.value, how.value>(slab, dy, x, dx, d_residual, k, a, f);
    else
      interleaved_apply<T, form.value, how.value>(slab, dy, x, dx, d_residual, k, a, f);
  });
}

template <class T>
constexpr Kernels planar_kernels() {
  return {planar_moments<T>, normalize_slab<T, Order::planar>, reduce_slab<T, Order::planar>,
          apply_slab<T, Order::planar>};
}
template <class T>
constexpr Kernels interleaved_kernels() {
  return {interleaved_moments<T>, normalize_slab<T, Order::interleaved>, reduce_slab<T, Order::interleaved>,
          apply_slab<T, Order::interleaved>};
}

const KernelTable table = {
    {{planar_kernels<float>(), planar_kernels<double>(), planar_kernels<bf16>(), planar_kernels<f16>()},
     {interleaved_kernels<float>(), interleaved_kernels<double>(), interleaved_kernels<bf16>(),
      interleaved_kernels<f16>()}},
    kLanes32};

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
const batchnorm::KernelTable* batchnorm::JOIN(kernels_, BATCHNORM_ISA)() { return &BATCHNORM_ISA::table; }
