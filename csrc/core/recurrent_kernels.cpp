// The kernels of recurrences, compiled once for each instruction set.
//
// A block is as many units as a vector has lanes. The product W_hh h of a block's gates, their normalization and
// activation, and the new state follow one another while they are in the nearest cache. Without normalization the rows
// of a step do not know of one another: threads then take rows, through all steps. With it they take blocks of units,
// whose statistics are theirs alone, and meet after each step. Each sum is taken in one order, whoever takes it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "activations.h"
#include "recurrent.h"
#include "simd.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

constexpr bool kManyRegisters = VB == 64;

// ---------------------------------------------------------------------------------------------- parts of vectors
template <class T>
using Vec = typename Lane<T>::V;

template <class T>
INLINE Vec<T> load_some(const T* p, int count) {
  if (count == Lane<T>::width) return Lane<T>::load(p);
  Vec<T> v{};
  std::memcpy(&v, p, size_t(count) * sizeof(T));
  return v;
}
template <class T>
INLINE void store_some(T* p, Vec<T> v, int count) {
  if (count == Lane<T>::width) return Lane<T>::store(p, v);
  std::memcpy(p, &v, size_t(count) * sizeof(T));
}
template <class T>
INLINE Vec<T> load_or(const T* p, int count, T absent) {
  return p ? load_some(p, count) : Vec<T>{} + absent;
}
// Doubles, as many as a vector of T has elements.
template <class T>
INLINE InDoubles<T> load_doubles(const double* p, int count) {
  InDoubles<T> v;
  for (int i = 0; i < InDoubles<T>::parts; ++i)
    v.part[i] = load_some<double>(p + i * kLanes64, std::clamp(count - i * kLanes64, 0, kLanes64));
  return v;
}
template <class T>
INLINE void store_doubles(double* p, const InDoubles<T>& v, int count) {
  for (int i = 0; i < InDoubles<T>::parts; ++i)
    store_some<double>(p + i * kLanes64, v.part[i], std::clamp(count - i * kLanes64, 0, kLanes64));
}
template <class T>
INLINE void add_doubles(double* p, const InDoubles<T>& v, int count) {
  InDoubles<T> sum = load_doubles<T>(p, count);
  for (int i = 0; i < InDoubles<T>::parts; ++i) sum.part[i] += v.part[i];
  store_doubles<T>(p, sum, count);
}

// ---------------------------------------------------------------------------------------------- the product
// c (R, V vectors) = a (R, depth) b (depth, V vectors)
template <class T, int R, int V>
INLINE void small_product(const T* a, int64_t a_stride, int64_t depth, const T* b, T* c) {
  constexpr int L = Lane<T>::width;
  Vec<T> sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[V];
    for (int v = 0; v < V; ++v) row[v] = Lane<T>::load(b + (k * V + v) * L);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r * a_stride + k];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Lane<T>::store(c + (r * V + v) * L, sum[r][v]);
}

template <class T, int R, int V>
void last_rows(const T* a, int64_t a_stride, int64_t rows, int64_t depth, const T* b, T* c) {
  if constexpr (R > 0) {
    if (rows == R)
      small_product<T, R, V>(a, a_stride, depth, b, c);
    else
      last_rows<T, R - 1, V>(a, a_stride, rows, depth, b, c);
  }
}

template <class T, int V>
void product(const T* a, int64_t a_stride, int64_t rows, int64_t depth, const T* b, T* c) {
  constexpr int R = kManyRegisters ? (V == 4 ? 6 : V == 3 ? 8 : 12) : V > 2 ? 3 : 4;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    small_product<T, R, V>(a + r * a_stride, a_stride, depth, b, c + r * V * Lane<T>::width);
  last_rows<T, R - 1, V>(a + r * a_stride, a_stride, rows - r, depth, b, c + r * V * Lane<T>::width);
}

// ---------------------------------------------------------------------------------------------- one call
template <class T, Cell kCell>
struct Call {
  static constexpr int L = Lane<T>::width, G = gates_of(kCell), K = kept_of(kCell);
  static constexpr int kTile = 5 * L;  // of each row and block
  using V = Vec<T>;
  using P = InDoubles<T>;

  const Recurrence& call;
  const RecurrentInput& in;
  const RecurrentStates& states;
  const int64_t H, N, blocks, panels;
  int64_t* starts;  // the first frame of each step
  T *packed, *tiles;

  Call(const Recurrence& call, const RecurrentInput& in, const RecurrentStates& states, void* workspace)
      : call(call),
        in(in),
        states(states),
        H(call.hidden),
        N(call.sizes[0]),
        blocks((H + L - 1) / L),
        panels((blocks + 3) / 4),
        starts(static_cast<int64_t*>(workspace)),
        packed(reinterpret_cast<T*>(starts + call.steps)),
        tiles(packed + blocks * L * G * H) {
    for (int64_t t = 0, at = 0; t < call.steps; at += call.sizes[t++]) starts[t] = at;
  }

  template <class X = const T>
  static X* as(const void* p) {
    return static_cast<X*>(const_cast<void*>(p));
  }
  static const T* part(const void* vector, int64_t at) { return vector ? as(vector) + at : nullptr; }
  int count(int64_t block) const { return int(std::min<int64_t>(L, H - block * L)); }
  bool normalized() const { return call.normalize_hh || call.normalize_c; }

  // By rows through all steps where those are enough work, and each on its own.
  template <class Step, class RowBlock>
  void for_steps(Parallel parallel, bool backward, const Step& step, const RowBlock& rows) const {
    constexpr int64_t kRows = 8;
    const bool large = N * G * H * H >= 1 << 16;
    if (!normalized() && (N >= 2 * kRows || !large)) {
      auto body = [&](int64_t begin, int64_t end) { rows(begin * kRows, std::min(end * kRows, N)); };
      each(parallel, N * G * H * H * call.steps >= 1 << 16, (N + kRows - 1) / kRows, body);
    } else {
      for (int64_t i = 0; i < call.steps; ++i) step(backward ? call.steps - 1 - i : i, large);
    }
  }

  template <class Body>
  static void each(Parallel parallel, bool threads, int64_t count, const Body& body) {
    if (!threads) return body(0, count);
    parallel.run(
        parallel.self, count,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

  // ---- statistics of a block's column over the rows of a tile or of a state
  struct Column {
    P mean, scale;  // scale: 1 / sqrt(var + eps)
  };

  Column column(const T* x, int64_t stride, int64_t rows, int units, double eps, double* mean, double* var) const {
    Column c;
    if (call.population) {
      c.mean = load_doubles<T>(mean, units);
      c.scale = load_doubles<T>(var, units);
    } else {
      P sum{}, square{};
      for (int64_t r = 0; r < rows; ++r) {
        const P v = P::of(load_some(x + r * stride, units));
        for (int i = 0; i < P::parts; ++i) sum.part[i] += v.part[i];
      }
      for (int i = 0; i < P::parts; ++i) c.mean.part[i] = sum.part[i] / double(rows);
      for (int64_t r = 0; r < rows; ++r) {
        const P v = P::of(load_some(x + r * stride, units));
        for (int i = 0; i < P::parts; ++i) {
          const auto centered = v.part[i] - c.mean.part[i];
          square.part[i] += centered * centered;
        }
      }
      for (int i = 0; i < P::parts; ++i) c.scale.part[i] = square.part[i] / double(rows);
      store_doubles<T>(mean, c.mean, units);
      store_doubles<T>(var, c.scale, units);
    }
    inverse_root(c.scale, eps);
    return c;
  }
  static void inverse_root(P& v, double eps) {
    for (int i = 0; i < P::parts; ++i)
      for (int k = 0; k < int(P::lanes); ++k) v.part[i][k] = 1 / std::sqrt(v.part[i][k] + eps);
  }
  Column saved_column(int units, double eps, const double* mean, const double* var) const {
    Column c{load_doubles<T>(mean, units), load_doubles<T>(var, units)};
    inverse_root(c.scale, eps);
    return c;
  }
  static INLINE P standardized(const Column& c, V x) {
    P v = P::of(x);
    for (int i = 0; i < P::parts; ++i) v.part[i] = (v.part[i] - c.mean.part[i]) * c.scale.part[i];
    return v;
  }
  static INLINE V normalized(const Column& c, V x, V gamma, V beta) {
    P v = standardized(c, x);
    const P scale = P::of(gamma), shift = P::of(beta);
    for (int i = 0; i < P::parts; ++i) v.part[i] = v.part[i] * scale.part[i] + shift.part[i];
    return v.rounded();
  }

  // ---- forward
  void pack_gates() const {
    const T* w = as(in.weight_hh);
    for (int64_t b = 0; b < blocks; ++b)
      for (int g = 0; g < G; ++g)
        for (int j = 0; j < L; ++j) {
          T* to = packed + (b * H * G + g) * L + j;
          const T* from = w + (g * H + b * L + j) * H;
          for (int64_t k = 0; k < H; ++k) to[k * G * L] = j < count(b) ? from[k] : T(0);
        }
  }

  void forward(Parallel parallel) const {
    pack_gates();
    for_steps(
        parallel, false,
        [&](int64_t t, bool threads) {
          each(parallel, threads, blocks, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) step(t, b, 0, call.sizes[t], tiles + b * N * kTile);
          });
        },
        [&](int64_t begin, int64_t end) {
          for (int64_t t = 0; t < call.steps; ++t)
            for (int64_t b = 0; b < blocks; ++b)
              if (begin < call.sizes[t]) step(t, b, begin, std::min(end, call.sizes[t]), tiles + begin * kTile);
        });
  }

  // The new state of a block's units, in the rows [begin, end) of step t.
  void step(int64_t t, int64_t b, int64_t begin, int64_t end, T* tile) const {
    const int units = count(b);
    const int64_t at = b * L, rows = end - begin, first = starts[t] + begin;
    T* output = as<T>(states.output);
    const T* h = t == 0 ? as(in.h0) + begin * H : output + (starts[t - 1] + begin) * H;
    product<T, G>(h, H, rows, H, packed + b * H * G * L, tile);
    if (call.normalize_hh)
      for (int g = 0; g < G; ++g) {
        const int64_t of = g * H + at;
        const Column c = column(tile + g * L, G * L, rows, units, call.eps_hh, states.mean_hh + t * G * H + of,
                                states.var_hh + t * G * H + of);
        const V gamma = load_or(part(in.gamma_hh, of), units, T(1));
        for (int64_t r = 0; r < rows; ++r) {
          T* z = tile + (r * G + g) * L;
          const V raw = Lane<T>::load(z);
          store_some(as<T>(states.hh) + (first + r) * G * H + of, raw, units);
          Lane<T>::store(z, normalized(c, raw, gamma, V{}));
        }
      }
    const V bias_hn = load_or(part(in.bias_hn, at), units, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t frame = first + r;
      const T *x = as(in.gates) + frame * G * H + at, *a = tile + r * G * L;
      T* kept = as<T>(states.kept) + frame * K * H + at;
      T* y = output + frame * H + at;
      V z[G], of_state[G];
      for (int g = 0; g < G; ++g) {
        of_state[g] = Lane<T>::load(a + g * L);
        z[g] = load_some(x + g * H, units) + of_state[g];
      }
      if constexpr (kCell == Cell::lstm) {
        const T* before = t == 0 ? as(in.c0) + (begin + r) * H : as(states.cells) + (starts[t - 1] + begin + r) * H;
        const V i = sigmoid_of(z[0]), f = sigmoid_of(z[1]), g = tanh_of(z[2]), o = sigmoid_of(z[3]);
        const V c = f * load_some(before + at, units) + i * g;
        store_some(as<T>(states.cells) + frame * H + at, c, units);
        const V gates[] = {i, f, g, o};
        for (int k = 0; k < G; ++k) store_some(kept + k * H, gates[k], units);
        if (!call.normalize_c) {
          const V shown = tanh_of(c);
          store_some(kept + 4 * H, shown, units);
          store_some(y, o * shown, units);
        }
      } else if constexpr (kCell == Cell::gru) {
        const V reset = sigmoid_of(z[0]), update = sigmoid_of(z[1]), inner = of_state[2] + bias_hn;
        const V candidate = tanh_of(load_some(x + 2 * H, units) + reset * inner);
        const V before = load_some(h + r * H + at, units);
        const V gates[] = {reset, update, candidate, inner};
        for (int k = 0; k < K; ++k) store_some(kept + k * H, gates[k], units);
        store_some(y, candidate + update * (before - candidate), units);
      } else {
        store_some(y, kCell == Cell::rnn_tanh ? tanh_of(z[0]) : vmax(z[0], V{}), units);
      }
    }
    if (kCell == Cell::lstm && call.normalize_c) show_cells(t, b, rows);
  }

  // h = o tanh(BN(c)) of a block's units in step t.
  void show_cells(int64_t t, int64_t b, int64_t rows) const {
    const int units = count(b);
    const int64_t at = b * L, first = starts[t];
    const T* cells = as(states.cells) + first * H + at;
    const Column c = column(cells, H, rows, units, call.eps_c, states.mean_c + t * H + at, states.var_c + t * H + at);
    const V gamma = load_or(part(in.gamma_c, at), units, T(1)), beta = load_or(part(in.beta_c, at), units, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      T* kept = as<T>(states.kept) + (first + r) * K * H + at;
      const V shown = tanh_of(normalized(c, load_some(cells + r * H, units), gamma, beta));
      store_some(kept + 4 * H, shown, units);
      store_some(as<T>(states.output) + (first + r) * H + at, load_some(as(kept) + 3 * H, units) * shown, units);
    }
  }

  // ---- backward
  // The columns of W_hh by panels of up to four vectors.
  int width_of(int64_t panel) const { return int(std::min<int64_t>(4, blocks - panel * 4)); }
  void pack_states() const {
    const T* w = as(in.weight_hh);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t width = width_of(p) * L, first = p * 4 * L, some = std::min(width, H - first);
      for (int64_t k = 0; k < G * H; ++k) {
        T* to = packed + first * G * H + k * width;
        std::copy_n(w + k * H + first, some, to);
        std::fill(to + some, to + width, T(0));
      }
    }
  }

  void backward(const RecurrentGradients& d, Parallel parallel) const {
    pack_states();
    for_steps(
        parallel, true,
        [&](int64_t t, bool threads) {
          each(parallel, threads, blocks, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) gates_back(d, t, b, 0, call.sizes[t], tiles + b * N * kTile);
          });
          each(parallel, threads, panels, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) state_back(d, t, p, 0, call.sizes[t], tiles + p * N * kTile);
          });
        },
        [&](int64_t begin, int64_t end) {
          for (int64_t t = call.steps; t-- > 0;) {
            const int64_t stop = std::min(end, call.sizes[t]);
            if (begin >= stop) continue;
            for (int64_t b = 0; b < blocks; ++b) gates_back(d, t, b, begin, stop, tiles + begin * kTile);
            for (int64_t p = 0; p < panels; ++p) state_back(d, t, p, begin, stop, tiles + begin * kTile);
          }
        });
  }

  // The gradient of the state before step t: what passes by the gates is there already, and this comes through them.
  void state_back(const RecurrentGradients& d, int64_t t, int64_t p, int64_t begin, int64_t end, T* tile) const {
    const T* dz = as(d.hh) + (starts[t] + begin) * G * H;
    const T* w = packed + p * 4 * L * G * H;
    const int64_t rows = end - begin;
    const int width = width_of(p);
    switch (width) {
      case 1: product<T, 1>(dz, G * H, rows, G * H, w, tile); break;
      case 2: product<T, 2>(dz, G * H, rows, G * H, w, tile); break;
      case 3: product<T, 3>(dz, G * H, rows, G * H, w, tile); break;
      default: product<T, 4>(dz, G * H, rows, G * H, w, tile);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < width; ++v) {
        T* dh = as<T>(d.h0) + (begin + r) * H + (p * 4 + v) * L;
        const int units = count(p * 4 + v);
        store_some(dh, load_some(as(dh), units) + Lane<T>::load(tile + (r * width + v) * L), units);
      }
  }

  // Sums over the rows of a step of a gradient and of its product with the standardized values.
  struct Sums {
    P dz{}, dz_x{};
    INLINE void add(V gradient, const P& x) {
      const P g = P::of(gradient);
      for (int i = 0; i < P::parts; ++i) {
        dz.part[i] += g.part[i];
        dz_x.part[i] += g.part[i] * x.part[i];
      }
    }
  };
  // gamma / s (dz - mean dz - x mean(dz x)); without the means where the statistics are the population's.
  INLINE V through(const Column& c, const P& scale, const Sums& sums, double rows, V gradient, const P& x) const {
    P g = P::of(gradient);
    for (int i = 0; i < P::parts; ++i) {
      if (!call.population) g.part[i] -= (sums.dz.part[i] + x.part[i] * sums.dz_x.part[i]) / rows;
      g.part[i] *= scale.part[i] * c.scale.part[i];
    }
    return g.rounded();
  }

  // The gradients of a block's gates in the rows [begin, end) of step t, and of the states past the gates.
  void gates_back(const RecurrentGradients& d, int64_t t, int64_t b, int64_t begin, int64_t end, T* tile) const {
    const int units = count(b);
    const int64_t at = b * L, rows = end - begin, first = starts[t] + begin;
    const V one = V{} + T(1);
    T* d_cell = tile + rows * G * L;
    if constexpr (kCell == Cell::lstm) cells_back(d, t, b, begin, end, d_cell);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t frame = first + r;
      const T* kept = as(states.kept) + frame * K * H + at;
      T* dh_past = as<T>(d.h0) + (begin + r) * H + at;
      const V dh = load_some(as(d.output) + frame * H + at, units) + load_some(as(dh_past), units);
      V dz[G], past{}, inner{};
      if constexpr (kCell == Cell::lstm) {
        const T* before = t == 0 ? as(in.c0) + (begin + r) * H : as(states.cells) + (starts[t - 1] + begin + r) * H;
        T* dc_past = as<T>(d.c0) + (begin + r) * H + at;
        const V i = load_some(kept, units), f = load_some(kept + H, units), g = load_some(kept + 2 * H, units),
                o = load_some(kept + 3 * H, units), shown = load_some(kept + 4 * H, units);
        const V dc = load_some(as(dc_past), units) + Lane<T>::load(d_cell + r * L);
        dz[0] = dc * g * i * (one - i);
        dz[1] = dc * load_some(before + at, units) * f * (one - f);
        dz[2] = dc * i * (one - g * g);
        dz[3] = dh * shown * o * (one - o);
        store_some(dc_past, dc * f, units);
      } else if constexpr (kCell == Cell::gru) {
        const T* before = t == 0 ? as(in.h0) + (begin + r) * H : as(states.output) + (starts[t - 1] + begin + r) * H;
        const V reset = load_some(kept, units), update = load_some(kept + H, units),
                candidate = load_some(kept + 2 * H, units);
        dz[2] = dh * (one - update) * (one - candidate * candidate);
        dz[1] = dh * (load_some(before + at, units) - candidate) * update * (one - update);
        dz[0] = dz[2] * load_some(kept + 3 * H, units) * reset * (one - reset);
        inner = dz[2] * reset;
        past = dh * update;
      } else {
        const V y = load_some(as(states.output) + frame * H + at, units);
        dz[0] = kCell == Cell::rnn_tanh ? dh * (one - y * y) : select(y > V{}, dh, V{});
      }
      store_some(dh_past, past, units);
      for (int g = 0; g < G; ++g) {
        store_some(as<T>(d.gates) + frame * G * H + g * H + at, dz[g], units);
        const V of_state = kCell == Cell::gru && g == 2 ? inner : dz[g];
        if (call.normalize_hh)
          Lane<T>::store(tile + (r * G + g) * L, of_state);
        else if (kCell == Cell::gru)
          store_some(as<T>(d.hh) + frame * G * H + g * H + at, of_state, units);
      }
    }
    if (call.normalize_hh) product_back(d, t, b, rows, tile);
  }

  // The gradient of W_hh h, from that of its normalization in the tile.
  void product_back(const RecurrentGradients& d, int64_t t, int64_t b, int64_t rows, const T* tile) const {
    const int units = count(b);
    for (int g = 0; g < G; ++g) {
      const int64_t of = g * H + b * L;
      const Column c =
          saved_column(units, call.eps_hh, states.mean_hh + t * G * H + of, states.var_hh + t * G * H + of);
      const P scale = P::of(load_or(part(in.gamma_hh, of), units, T(1)));
      const T* x = as(states.hh) + starts[t] * G * H + of;
      Sums sums;
      for (int64_t r = 0; r < rows; ++r)
        sums.add(Lane<T>::load(tile + (r * G + g) * L), standardized(c, load_some(x + r * G * H, units)));
      add_doubles<T>(d.gamma_hh + of, sums.dz_x, units);
      add_doubles<T>(d.beta_hh + of, sums.dz, units);
      for (int64_t r = 0; r < rows; ++r) {
        const P standard = standardized(c, load_some(x + r * G * H, units));
        store_some(as<T>(d.hh) + (starts[t] + r) * G * H + of,
                   through(c, scale, sums, double(rows), Lane<T>::load(tile + (r * G + g) * L), standard), units);
      }
    }
  }

  // What reaches the cells of step t through their output.
  void cells_back(const RecurrentGradients& d, int64_t t, int64_t b, int64_t begin, int64_t end, T* d_cell) const {
    const int units = count(b);
    const int64_t at = b * L, rows = end - begin, first = starts[t] + begin;
    for (int64_t r = 0; r < rows; ++r) {
      const T* kept = as(states.kept) + (first + r) * K * H + at;
      const V dh =
          load_some(as(d.output) + (first + r) * H + at, units) + load_some(as(d.h0) + (begin + r) * H + at, units);
      const V shown = load_some(kept + 4 * H, units);
      Lane<T>::store(d_cell + r * L, dh * load_some(kept + 3 * H, units) * (V{} + T(1) - shown * shown));
    }
    if (!call.normalize_c) return;
    const Column c = saved_column(units, call.eps_c, states.mean_c + t * H + at, states.var_c + t * H + at);
    const P scale = P::of(load_or(part(in.gamma_c, at), units, T(1)));
    const T* x = as(states.cells) + first * H + at;
    Sums sums;
    for (int64_t r = 0; r < rows; ++r)
      sums.add(Lane<T>::load(d_cell + r * L), standardized(c, load_some(x + r * H, units)));
    add_doubles<T>(d.gamma_c + at, sums.dz_x, units);
    add_doubles<T>(d.beta_c + at, sums.dz, units);
    for (int64_t r = 0; r < rows; ++r) {
      const P standard = standardized(c, load_some(x + r * H, units));
      Lane<T>::store(d_cell + r * L, through(c, scale, sums, double(rows), Lane<T>::load(d_cell + r * L), standard));
    }
  }
};

template <class Kernel>
void choose(const Recurrence& r, Kernel kernel) {
  const auto cell = [&](auto type) {
    using std::integral_constant;
    switch (r.cell) {
      case Cell::rnn_tanh: return kernel(type, integral_constant<Cell, Cell::rnn_tanh>{});
      case Cell::rnn_relu: return kernel(type, integral_constant<Cell, Cell::rnn_relu>{});
      case Cell::lstm: return kernel(type, integral_constant<Cell, Cell::lstm>{});
      case Cell::gru: return kernel(type, integral_constant<Cell, Cell::gru>{});
    }
  };
  if (r.dtype == Dtype::float64)
    cell(double{});
  else
    cell(float{});
}

void forward(const Recurrence& r, const RecurrentInput& in, const RecurrentStates& states, void* workspace,
             Parallel parallel) {
  choose(r,
         [&](auto type, auto cell) { Call<decltype(type), cell.value>(r, in, states, workspace).forward(parallel); });
}

void backward(const Recurrence& r, const RecurrentInput& in, const RecurrentStates& states, const RecurrentGradients& d,
              void* workspace, Parallel parallel) {
  choose(r, [&](auto type, auto cell) {
    Call<decltype(type), cell.value>(r, in, states, workspace).backward(d, parallel);
  });
}

const RecurrentKernels table = {VB, forward, backward};

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
const batchnorm::RecurrentKernels* batchnorm::JOIN(recurrent_, BATCHNORM_ISA)() { return &BATCHNORM_ISA::table; }
