// Cuts a tensor into slabs, and runs the kernels over them. The cut depends on the shape and the cache sizes alone,
// never on the number of threads, and partial sums are merged in a fixed order: the same bits for any thread count.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "batchnorm.h"
#include "kernels.h"

namespace batchnorm {

const KernelTable& kernel_table();  // dispatch.cpp

namespace {

constexpr int64_t kSerialElements = 32768;
constexpr int64_t kFewValues = 8192, kFewFloat32 = 1024;
constexpr int64_t kPieceBytes = 128 << 10;
constexpr int64_t kRunBytes = 16 << 10;  // planar: of neighbouring channels, so that prefetchers have a way to go
constexpr int64_t kMaxBlocks = 64;       // row blocks of one pool, interleaved

int64_t element_size(Dtype d) { return d == Dtype::float64 ? 8 : d == Dtype::float32 ? 4 : 2; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double element(const Vector& v, int64_t i, double absent) {
  if (!v.data) return absent;
  switch (v.dtype) {
    case Dtype::float32: return static_cast<const float*>(v.data)[i];
    case Dtype::float64: return static_cast<const double*>(v.data)[i];
    case Dtype::bfloat16: {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(v.data)[i]) << 16;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    }
    case Dtype::float16: {
      const uint16_t h = static_cast<const uint16_t*>(v.data)[i];
      const int exponent = (h >> 10) & 31, fraction = h & 1023;
      const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                               : exponent == 0 ? std::ldexp(fraction, -24)
                                               : std::ldexp(1024 + fraction, exponent - 25);
      return h & 0x8000 ? -magnitude : magnitude;
    }
  }
  return absent;
}

double finite_value(const Shape& s, const Operand& x, int64_t sample, int64_t channel, int64_t place) {
  const Vector v{x.data, s.dtype};
  const double value = element(v, sample * x.sample_stride + channel * x.channel_stride + place, 0);
  return std::isfinite(value) ? value : 0;
}

// ---------------------------------------------------------------------------------------------- the cut
struct Piece {
  int64_t pool, channel, channels, sample, samples, first, inner;
};

struct Plan {
  Shape shape;
  bool one_phase;
  bool whole;  // each piece holds all values of its channels' pools: both phases run while it is in cache
  int64_t group = 1, groups = 1;              // planar: channels of a piece
  int64_t block = 1, blocks = 1;              // samples of a piece, within a pool
  int64_t inner_block = 1, inner_blocks = 1;  // planar: part of a plane
  const double* counts = nullptr;             // of the pools, where not every position is valid

  // Where there is but one phase, nothing is walked twice: pieces are runs of memory.
  explicit Plan(const Shape& s, bool one_phase = false) : shape(s), one_phase(one_phase) {
    const int64_t bytes = element_size(s.dtype), pools = s.pools(), pool = std::min(s.pool_size, s.samples);
    const Caches& cache = caches();
    block = pool;
    inner_block = s.inner;
    if (s.order == Order::planar) {
      const int64_t budget = std::max(cache.l2 * 6 / 10, cache.l3 / 8);
      const int64_t plane = std::max<int64_t>(1, s.inner * bytes);
      group =
          std::clamp<int64_t>(ceil_div(kRunBytes, plane), 1, std::clamp<int64_t>(s.channels, 1, kMaxPlanarChannels));
      while (group > 1 && group * plane * pool > cache.l2 / 2) --group;
      groups = ceil_div(s.channels, group);
      whole = plane * pool <= budget && (pools * groups >= 8 || s.samples * s.channels * s.inner <= kSerialElements);
      if (!whole || one_phase) {
        group = one_phase ? std::clamp<int64_t>(kPieceBytes / plane, 1, std::max<int64_t>(s.channels, 1)) : 1;
        groups = ceil_div(s.channels, group);
        block = std::clamp<int64_t>(kPieceBytes / (plane * group), 1, std::max<int64_t>(pool, 1));
        blocks = ceil_div(pool, block);
        inner_block = std::clamp<int64_t>(s.inner, 1, kPieceBytes / bytes);
        inner_blocks = ceil_div(s.inner, inner_block);
      }
    } else {
      const int64_t row = std::max<int64_t>(1, s.channels * bytes);
      group = s.channels;
      groups = std::min<int64_t>(s.channels, 1);  // no channels, no pieces
      whole = pool * s.channels <= kSerialElements || (pools >= 8 && pool * row <= cache.l3 / 8);
      if (!whole) {
        // Long enough for a block's sums to be little beside its rows.
        const int64_t least = std::clamp<int64_t>(pool / 16, 32, 128);
        block = std::min(pool, std::max({kPieceBytes / row, ceil_div(pool, kMaxBlocks), least}));
        block = ceil_div(block, 32) * 32;
        blocks = ceil_div(pool, block);
      }
    }
  }

  int64_t pieces_a_pool() const { return groups * blocks * inner_blocks; }
  int64_t pieces() const { return shape.pools() * pieces_a_pool(); }
  // Doubles that hold the two sums of every channel of every piece.
  int64_t sums() const { return one_phase ? 0 : 2 * shape.pools() * shape.channels * blocks * inner_blocks; }
  int64_t statistics() const { return shape.pools() * shape.channels; }

  Piece piece(int64_t i) const {
    Piece p;
    p.pool = i / pieces_a_pool();
    int64_t rest = i % pieces_a_pool();
    p.channel = rest / (blocks * inner_blocks) * group;
    p.channels = std::min(group, shape.channels - p.channel);
    rest %= blocks * inner_blocks;
    const int64_t begin = p.pool * shape.pool_size, end = std::min(begin + shape.pool_size, shape.samples);
    p.sample = std::min(begin + rest / inner_blocks * block, end);
    p.samples = std::min(block, end - p.sample);
    p.first = rest % inner_blocks * inner_block;
    p.inner = std::min(inner_block, shape.inner - p.first);
    return p;
  }
  // Where piece i keeps its sums: [2][channels].
  int64_t sums_offset(int64_t i) const {
    const Piece p = piece(i);
    const int64_t in_pool = i % pieces_a_pool() % (blocks * inner_blocks);
    return 2 *
           (p.pool * shape.channels * blocks * inner_blocks + p.channel * blocks * inner_blocks + in_pool * p.channels);
  }
  int64_t count(int64_t pool) const {
    if (counts) return int64_t(counts[pool]);
    return std::min(shape.pool_size, shape.samples - pool * shape.pool_size) * shape.inner;
  }
  Operand at(const Operand& o, const Piece& p) const {
    if (!o) return o;
    Operand part = o;
    part.data = static_cast<char*>(o.data) +
                (p.sample * o.sample_stride + p.channel * o.channel_stride + p.first) * element_size(shape.dtype);
    return part;
  }
  // Padding gathers at one end: first and last in turn give every thread its share of both.
  int64_t turn(int64_t i) const { return !shape.valid ? i : i % 2 ? pieces() - 1 - i / 2 : i / 2; }
  Slab slab(const Piece& p) const { return {p.samples, p.channels, p.inner, few(p.pool)}; }
  // Whether a pool counts as one of few values; where the coefficients' type hangs on it, as the smallest of all pools.
  bool few(int64_t pool) const {
    if (shape.dtype == Dtype::float32) return shape.valid || count(shape.pools() - 1) < kFewFloat32;
    return count(pool) < kFewValues;
  }
  // Whether gradients are computed in float64.
  bool wide() const { return shape.dtype == Dtype::float64 || (shape.dtype == Dtype::float32 && few(0)); }
};

// The valid positions in [begin, end) as runs, and what lies between them as gaps, in order.
template <class Run, class Gap>
void walk(const Shape& s, int64_t begin, int64_t end, const Run& run, const Gap& gap) {
  const Range* const last = s.valid + s.valid_count;
  const Range* range =
      std::upper_bound(s.valid, last, begin, [](int64_t position, const Range& r) { return position < r.end; });
  for (int64_t at = begin; at < end; ++range) {
    const int64_t first = range == last ? end : std::clamp(range->begin, at, end);
    if (at < first) gap(at, first);
    at = range == last ? end : std::min(range->end, end);
    if (first < at) run(first, at);
  }
}

void nothing(int64_t, int64_t) {}

template <class F>
void for_each(const Plan& plan, int64_t count, Parallel parallel, const F& f) {
  auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  void* context = const_cast<void*>(static_cast<const void*>(&f));
  const Shape& s = plan.shape;
  if (count <= 1 || s.samples * s.channels * s.inner <= kSerialElements)
    body(context, 0, count);
  else
    parallel.run(parallel.self, count, body, context);
}

// ---------------------------------------------------------------------------------------------- coefficients
// Arrays of `count` values in the compute type, one after the other.
struct Coefficients {
  bool wide;  // float64
  int64_t gate_size;
  char* base;
  int64_t count;
  int64_t size() const { return wide ? 8 : 4; }
  void set(int array, int64_t i, double v) const {
    if (v != v) v = std::numeric_limits<double>::quiet_NaN();  // bfloat16 stores rely on NaNs of this one kind
    if (wide)
      reinterpret_cast<double*>(base)[array * count + i] = v;
    else
      reinterpret_cast<float*>(base)[array * count + i] = float(v);
  }
  const void* at(int array, int64_t i) const { return base + (array * count + i) * size(); }
  NormalizeCoefficients normalize(int64_t i) const { return {at(0, i), at(1, i), at(2, i), gate(0, i), gate(1, i)}; }
  // Two arrays more, behind six of eight bytes: float64 for float64, else float32.
  const void* gate(int array, int64_t i) const { return base + 48 * count + (array * count + i) * gate_size; }
  void set_gate(int64_t i, double threshold, bool flip) const {
    char* t = base + 48 * count + i * gate_size;
    if (gate_size == 8) {
      *reinterpret_cast<double*>(t) = threshold;
      *reinterpret_cast<double*>(t + count * gate_size) = flip ? -0.0 : 0.0;
    } else {
      *reinterpret_cast<float*>(t) = float(threshold);
      *reinterpret_cast<float*>(t + count * gate_size) = flip ? -0.0f : 0.0f;
    }
  }
  ApplyCoefficients apply(int64_t i) const { return {at(3, i), at(4, i), at(5, i)}; }
  double rounded(double v) const { return wide ? v : double(float(v)); }
};

struct Affine {
  Vector gamma, beta;
  double eps;
};

// Where the mean is rounded, what is left of it joins the shift.
void set_normalize(const Coefficients& k, int64_t i, int64_t channel, double mean, double var, const Affine& a) {
  const double scale = element(a.gamma, channel, 1) / std::sqrt(var + a.eps);
  k.set(0, i, mean);
  k.set(1, i, scale);
  k.set(2, i, element(a.beta, channel, 0) + (k.rounded(mean) - mean) * scale);
}

// The largest value of type S at which s * (x - mean) * scale + shift is not above 0, s being the sign of the scale:
// z rises with s * x, and so does what rounding makes of it, so one comparison tells the side of the kink.
template <class S>
S relu_threshold(double mean, double scale, double shift) {
  const S infinity = std::numeric_limits<S>::infinity();
  const double sign = scale < 0 ? -1 : 1;
  auto above = [&](S v) { return (sign * double(v) - mean) * scale + shift > 0; };
  if (!(scale != 0)) return shift > 0 ? -infinity : infinity;  // NaN too: nothing is above infinity
  S t = S(sign * (mean - shift / scale));
  if (!(t == t)) return infinity;
  for (int step = 0; step < 4; ++step) {
    if (above(t))
      t = std::nextafter(t, -infinity);
    else if (above(std::nextafter(t, infinity)))
      return t;
    else
      t = std::nextafter(t, infinity);
  }
  S low = -infinity, high = infinity;  // a flat stretch around the kink: halve the interval
  if (std::isfinite(t)) (above(t) ? high : low) = t;
  const S largest = std::numeric_limits<S>::max();
  if (low == -infinity && !above(-largest)) low = -largest;
  if (high == infinity && above(largest)) high = largest;
  for (int step = 0; step < 2100 && std::isfinite(low) && std::isfinite(high); ++step) {
    const S middle = low / 2 + high / 2;
    if (middle == low || middle == high) break;
    (above(middle) ? high : low) = middle;
  }
  return low;
}

// What the gradient of relu is gated by.
void set_relu_gate(const Coefficients& k, int64_t i, int64_t channel, double mean, double var, const Affine& a) {
  const double scale = element(a.gamma, channel, 1) / std::sqrt(var + a.eps), shift = element(a.beta, channel, 0);
  const double t =
      k.gate_size == 8 ? relu_threshold<double>(mean, scale, shift) : double(relu_threshold<float>(mean, scale, shift));
  k.set_gate(i, t, scale < 0);
}

void set_apply(const Coefficients& k, int64_t i, double mean, double k1, double k2, double k3) {
  k.set(3, i, k1);
  k.set(4, i, k2);
  k.set(5, i, k3 + k2 * (k.rounded(mean) - mean));
}

// ---------------------------------------------------------------------------------------------- scratch memory
struct Scratch {
  double *shift, *sums;
  Coefficients k;
  double* counts;  // of the pools
  Scratch(const Plan& plan, double* workspace, bool wide)
      : shift(workspace),
        sums(workspace + plan.statistics()),
        k{wide, element_size(plan.shape.dtype) == 8 ? 8 : 4, reinterpret_cast<char*>(sums + plan.sums()),
          plan.statistics()},
        counts(sums + plan.sums() + 8 * plan.statistics()) {}
};

Gate gate_of(const Fusion& f) {
  if (f.activation == Activation::identity) return Gate::none;
  if (f.signs) return Gate::signs;
  return f.residual ? Gate::residual : Gate::recompute;
}

enum class Verb { moments, normalize, forward, backward_reduce, backward_apply, backward };

struct Runner {
  Plan plan;
  Scratch scratch;
  const Kernels& kernels;
  Fusion fusion;
  Parallel parallel;
  bool stream;

  Runner(Verb verb, const Shape& shape, const Fusion& f, double* workspace, Parallel par)
      : plan(shape, verb == Verb::normalize || verb == Verb::backward_apply),
        scratch(plan, workspace, element_size(shape.dtype) > 2 && (verb < Verb::backward_reduce || plan.wide())),
        kernels(kernel_table().of[int(shape.order)][int(shape.dtype)]),
        fusion(f),
        parallel(par),
        stream(shape.samples * shape.channels * shape.inner * element_size(shape.dtype) > caches().l3 / 2) {
    if (!shape.valid) return;
    for (int64_t pool = 0; pool < shape.pools(); ++pool) {
      int64_t count = 0;
      walk(shape, pool_begin(pool), pool_begin(pool + 1), [&](int64_t b, int64_t e) { count += e - b; }, nothing);
      scratch.counts[pool] = double(count);
    }
    plan.counts = scratch.counts;
  }

  // The first position of a pool.
  int64_t pool_begin(int64_t pool) const {
    return std::min(pool * plan.shape.pool_size, plan.shape.samples) * plan.shape.inner;
  }

  // The part of piece p at positions [begin, end), which lie in one sample where there are samples.
  Piece part(const Piece& p, int64_t begin, int64_t end) const {
    Piece part = p;
    part.sample = begin / plan.shape.inner;
    part.first = begin % plan.shape.inner;
    const bool planar = plan.shape.order == Order::planar;
    part.samples = planar ? 1 : end - begin;
    part.inner = planar ? end - begin : 1;
    return part;
  }

  // run on what is valid of piece p, gap on what is not.
  template <class Run, class Gap>
  void parts(const Piece& p, const Run& run, const Gap& gap) const {
    if (p.samples <= 0 || p.inner <= 0) return;
    if (!plan.shape.valid) return run(p);
    const int64_t inner = plan.shape.inner;
    const auto walked = [&](int64_t begin, int64_t end) {
      walk(
          plan.shape, begin, end, [&](int64_t b, int64_t e) { run(part(p, b, e)); },
          [&](int64_t b, int64_t e) { gap(part(p, b, e)); });
    };
    if (plan.shape.order == Order::interleaved) return walked(p.sample, p.sample + p.samples);
    for (int64_t n = p.sample; n < p.sample + p.samples; ++n)
      walked(n * inner + p.first, n * inner + p.first + p.inner);
  }

  template <class Run>
  void valid_parts(const Piece& p, const Run& run) const {
    parts(p, run, [](const Piece&) {});
  }

  void clear(const Piece& p, const Operand& o) const {
    if (!o) return;
    char* const data = static_cast<char*>(plan.at(o, p).data);
    const int64_t size = element_size(plan.shape.dtype);
    if (plan.shape.order == Order::planar) {
      for (int64_t c = 0; c < p.channels; ++c)
        std::memset(data + c * o.channel_stride * size, 0, size_t(p.inner * size));
    } else if (o.sample_stride == p.channels) {
      std::memset(data, 0, size_t(p.samples * p.channels * size));
    } else {
      for (int64_t n = 0; n < p.samples; ++n)
        std::memset(data + n * o.sample_stride * size, 0, size_t(p.channels * size));
    }
  }

  // The first valid sample and place of a pool; whether there is one.
  bool first_valid(int64_t pool, int64_t* sample, int64_t* place) const {
    *sample = pool * plan.shape.pool_size;
    *place = 0;
    if (!plan.count(pool)) return false;
    if (!plan.shape.valid) return true;
    int64_t first = -1;
    walk(
        plan.shape, pool_begin(pool), pool_begin(pool + 1),
        [&](int64_t b, int64_t) {
          if (first < 0) first = b;
        },
        nothing);
    *sample = first / plan.shape.inner;
    *place = first % plan.shape.inner;
    return true;
  }

  KernelFusion fused(const Piece& p) const {
    KernelFusion f{fusion.activation, fusion.slope, plan.at(fusion.residual, p), nullptr, 0, 0, stream};
    if (fusion.signs) {
      const bool planar = plan.shape.order == Order::planar;
      const int64_t run = ceil_div(planar ? plan.shape.inner : plan.shape.channels, 8);
      f.signs_sample = planar ? run * plan.shape.channels : run;
      f.signs_channel = planar ? run : 0;
      f.signs = fusion.signs + p.sample * f.signs_sample + p.channel * f.signs_channel + p.first / 8;
    }
    return f;
  }

  // Where piece p's channels start among the statistics.
  int64_t statistic(const Piece& p) const { return p.pool * plan.shape.channels + p.channel; }

  void set_shifts(const Operand& x) const {
    const Shape& s = plan.shape;
    for (int64_t pool = 0; pool < s.pools(); ++pool) {
      int64_t sample, place;
      const bool any = first_valid(pool, &sample, &place);
      for (int64_t c = 0; c < s.channels; ++c)
        scratch.shift[pool * s.channels + c] = any ? finite_value(s, x, sample, c, place) : 0;
    }
  }

  void add_moments(int64_t i, const Operand& x) const {
    const Piece p = plan.piece(i);
    double* sums = scratch.sums + plan.sums_offset(i);
    std::fill_n(sums, 2 * p.channels, 0.0);
    valid_parts(
        p, [&](const Piece& v) { kernels.moments(plan.slab(v), plan.at(x, v), scratch.shift + statistic(p), sums); });
  }

  void add_reductions(int64_t i, const Operand& dy, const Operand& x, const double* mean) const {
    const Piece p = plan.piece(i);
    double* sums = scratch.sums + plan.sums_offset(i);
    std::fill_n(sums, 2 * p.channels, 0.0);
    mean += statistic(p);
    valid_parts(p, [&](const Piece& v) {
      kernels.reduce(plan.slab(v), plan.at(dy, v), plan.at(x, v), mean, scratch.k.normalize(statistic(p)), fused(v),
                     gate_of(fusion), sums);
    });
    if (!plan.few(p.pool) && element_size(plan.shape.dtype) == 2)
      for (int64_t c = 0; c < p.channels; ++c) sums[p.channels + c] += (double(float(mean[c])) - mean[c]) * sums[c];
  }

  // The two sums of statistic s, over the pieces that hold its values, in their order.
  void merged(int64_t pool, int64_t channel, double* first, double* second) const {
    const int64_t parts = plan.blocks * plan.inner_blocks, group = channel / plan.group;
    const int64_t begin = pool * plan.pieces_a_pool() + group * parts;
    const Piece p = plan.piece(begin);
    const double* sums = scratch.sums + plan.sums_offset(begin) + (channel - p.channel);
    double a = 0, b = 0;
    for (int64_t k = 0; k < parts; ++k) {
      a += sums[2 * p.channels * k];
      b += sums[2 * p.channels * k + p.channels];
    }
    *first = a;
    *second = b;
  }

  void finish_moments(int64_t pool, int64_t channel, double* mean, double* m2) const {
    double sum, square;
    merged(pool, channel, &sum, &square);
    const int64_t i = pool * plan.shape.channels + channel;
    const double count = double(std::max<int64_t>(plan.count(pool), 1)), offset = sum / count;
    mean[i] = scratch.shift[i] + offset;
    const double rest = square - sum * offset;
    m2[i] = rest < 0 ? 0 : rest;  // NaN stays
  }

  void normalize_piece(int64_t i, const Operand& x, const Operand& y) const {
    const Piece p = plan.piece(i);
    parts(
        p,
        [&](const Piece& v) {
          kernels.normalize(plan.slab(v), plan.at(x, v), plan.at(y, v), scratch.k.normalize(statistic(p)), fused(v));
        },
        [&](const Piece& gap) { clear(gap, y); });
  }

  void apply_piece(int64_t i, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual) const {
    const Piece p = plan.piece(i);
    const int64_t s = statistic(p);
    parts(
        p,
        [&](const Piece& v) {
          kernels.apply(plan.slab(v), plan.at(dy, v), plan.at(x, v), plan.at(dx, v), plan.at(d_residual, v),
                        scratch.k.normalize(s), scratch.k.apply(s), fused(v), gate_of(fusion));
        },
        [&](const Piece& gap) {
          clear(gap, dx);
          clear(gap, d_residual);
        });
  }

  // reduce(i) on every piece, finish(pool, channel) on every statistic, apply(i) on every piece, in reverse order
  // within each thread; piece by piece where a piece is whole.
  template <class Reduce, class Finish, class Apply>
  void two_phases(Reduce reduce, Finish finish, Apply apply) const {
    if (plan.whole) {
      for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t i = plan.turn(k);
          reduce(i);
          const Piece p = plan.piece(i);
          for (int64_t c = 0; c < p.channels; ++c) finish(p.pool, p.channel + c);
          apply(i);
        }
      });
      return;
    }
    one_phase(reduce);
    const int64_t channels = plan.shape.channels;
    for_each(plan, plan.statistics(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(i / channels, i % channels);
    });
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) apply(plan.turn(i));
    });
  }

  template <class F>
  void one_phase(F f) const {
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(plan.turn(i));
    });
  }

  void set_all_normalize(const double* mean, const double* var, const Affine& a) const {
    for (int64_t i = 0; i < plan.statistics(); ++i)
      set_normalize(scratch.k, i, i % plan.shape.channels, mean[i], var[i], a);
    if (gate_of(fusion) == Gate::recompute && fusion.activation == Activation::relu)
      for (int64_t i = 0; i < plan.statistics(); ++i)
        set_relu_gate(scratch.k, i, i % plan.shape.channels, mean[i], var[i], a);
  }
};

}  // namespace

size_t workspace_size(const Shape& shape) {
  const Plan plan(shape);
  return size_t(9 * plan.statistics() + plan.sums() + (shape.valid ? shape.pools() : 0));
}

void moments(const Shape& shape, const Operand& x, double* mean, double* m2, double* workspace, Parallel parallel) {
  const Runner run(Verb::moments, shape, {}, workspace, parallel);
  run.set_shifts(x);
  run.two_phases([&](int64_t i) { run.add_moments(i, x); },
                 [&](int64_t pool, int64_t c) { run.finish_moments(pool, c, mean, m2); }, [](int64_t) {});
}

void normalize(const Shape& shape, const Operand& x, const Operand& y, const double* mean, const double* var,
               Vector gamma, Vector beta, double eps, const Fusion& fusion, double* workspace, Parallel parallel) {
  const Runner run(Verb::normalize, shape, fusion, workspace, parallel);
  run.set_all_normalize(mean, var, {gamma, beta, eps});
  run.one_phase([&](int64_t i) { run.normalize_piece(i, x, y); });
}

void forward(const Shape& shape, const Operand& x, const Operand& y, double* mean, double* var, Vector gamma,
             Vector beta, double eps, const Fusion& fusion, double* workspace, Parallel parallel) {
  const Runner run(Verb::forward, shape, fusion, workspace, parallel);
  const Affine affine{gamma, beta, eps};
  run.set_shifts(x);
  run.two_phases([&](int64_t i) { run.add_moments(i, x); },
                 [&](int64_t pool, int64_t c) {
                   const int64_t i = pool * shape.channels + c;
                   run.finish_moments(pool, c, mean, var);
                   var[i] /= double(std::max<int64_t>(run.plan.count(pool), 1));
                   set_normalize(run.scratch.k, i, c, mean[i], var[i], affine);
                 },
                 [&](int64_t i) { run.normalize_piece(i, x, y); });
}

void backward_reduce(const Shape& shape, const Operand& dy, const Operand& x, const double* mean, const double* var,
                     Vector gamma, Vector beta, double eps, const Fusion& fusion, double* sum_dz,
                     double* sum_dz_centered, double* workspace, Parallel parallel) {
  const Runner run(Verb::backward_reduce, shape, fusion, workspace, parallel);
  run.set_all_normalize(mean, var, {gamma, beta, eps});
  run.two_phases([&](int64_t i) { run.add_reductions(i, dy, x, mean); },
                 [&](int64_t pool, int64_t c) {
                   const int64_t i = pool * shape.channels + c;
                   run.merged(pool, c, sum_dz + i, sum_dz_centered + i);
                 },
                 [](int64_t) {});
}

void backward_apply(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx,
                    const Operand& d_residual, const double* mean, const double* var, Vector gamma, Vector beta,
                    double eps, const Fusion& fusion, const double* k1, const double* k2, const double* k3,
                    double* workspace, Parallel parallel) {
  const Runner run(Verb::backward_apply, shape, fusion, workspace, parallel);
  run.set_all_normalize(mean, var, {gamma, beta, eps});
  for (int64_t i = 0; i < run.plan.statistics(); ++i) set_apply(run.scratch.k, i, mean[i], k1[i], k2[i], k3[i]);
  run.one_phase([&](int64_t i) { run.apply_piece(i, dy, x, dx, d_residual); });
}

void backward(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
              const double* mean, const double* var, Vector gamma, Vector beta, double eps, const Fusion& fusion,
              bool population, double* sum_dz, double* sum_dz_centered, double* workspace, Parallel parallel) {
  if (!dx) {
    backward_reduce(shape, dy, x, mean, var, gamma, beta, eps, fusion, sum_dz, sum_dz_centered, workspace, parallel);
    return;
  }
  const Runner run(Verb::backward, shape, fusion, workspace, parallel);
  run.set_all_normalize(mean, var, {gamma, beta, eps});
  run.two_phases([&](int64_t i) { run.add_reductions(i, dy, x, mean); },
                 [&](int64_t pool, int64_t c) {
                   const int64_t i = pool * shape.channels + c;
                   run.merged(pool, c, sum_dz + i, sum_dz_centered + i);
                   const double inv_std = 1 / std::sqrt(var[i] + eps), k1 = element(gamma, c, 1) * inv_std;
                   const double m = double(std::max<int64_t>(run.plan.count(pool), 1));
                   const double k2 = population ? 0 : -k1 * inv_std * inv_std * (sum_dz_centered[i] / m);
                   set_apply(run.scratch.k, i, mean[i], k1, k2, population ? 0 : -k1 * (sum_dz[i] / m));
                 },
                 [&](int64_t i) { run.apply_piece(i, dy, x, dx, d_residual); });
}

}  // namespace batchnorm
