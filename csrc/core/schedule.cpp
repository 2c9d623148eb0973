// Cuts a tensor into slabs, and runs the kernels over them. The cut depends on the shape and the cache sizes alone,
// never on the number of threads, and partial sums are merged in a fixed order: the same bits for any thread count.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "batchnorm.h"
#include "kernels.h"

namespace batchnorm {

const KernelTable& kernel_table();  // dispatch.cpp

namespace {

constexpr int64_t kSerialElements = 32768;  // of four bytes and more; twice as many of two
constexpr int64_t kFewValues = 8192, kFewFloat32 = 128;
constexpr int64_t kPieceBytes = 128 << 10;
constexpr int64_t kRunBytes = 16 << 10;  // planar: of neighbouring channels, so that prefetchers have a way to go
constexpr int64_t kMaxBlocks = 64;       // row blocks of one pool, interleaved
constexpr int64_t kMaxSegments = 128;  // runs of pools that one thread takes, each with its gradients of gamma and beta
constexpr int64_t kColumns = 64;       // whole lines of the cache in any type
// Planes of at most kFlatInner elements and rows of fewer than kFlatChannels are walked kFlatColumns elements at a
// time.
constexpr int64_t kFlatInner = 256, kFlatSamples = 8, kFlatChannels = 64, kFlatColumns = 4096;

int64_t element_size(Dtype d) { return d == Dtype::float64 ? 8 : d == Dtype::float32 ? 4 : 2; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Elements that are not worth a second thread.
int64_t serial_elements(Dtype d) { return element_size(d) == 2 ? 2 * kSerialElements : kSerialElements; }
bool is_small(const Shape& s) { return s.samples * s.channels * s.inner <= serial_elements(s.dtype); }

double value_of(double v) { return v; }
double value_of(float v) { return v; }

struct Bfloat16 {
  uint16_t bits;
};
double value_of(Bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Float16 {
  uint16_t bits;
};
double value_of(Float16 v) {
  const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

// `count` elements as float64.
void convert(Dtype dtype, const void* from, int64_t count, double* to) {
  const auto all = [&](const auto* values) {
    for (int64_t i = 0; i < count; ++i) to[i] = value_of(values[i]);
  };
  switch (dtype) {
    case Dtype::float32: return all(static_cast<const float*>(from));
    case Dtype::float64: return all(static_cast<const double*>(from));
    case Dtype::bfloat16: return all(static_cast<const Bfloat16*>(from));
    case Dtype::float16: return all(static_cast<const Float16*>(from));
  }
}

// ---------------------------------------------------------------------------------------------- the cut
// Channels whose short planes are walked as one row: of whole lines of the cache, where that can be.
int64_t flat_channels(int64_t inner) {
  int64_t most = kFlatColumns / inner, whole = 32;
  while (whole > most) whole /= 2;
  return most / whole * whole;
}

struct Piece {
  int64_t pool, channel, channels, sample, samples, first, inner;
};

double valid_share(const Shape& s) {
  if (!s.valid || s.samples * s.inner == 0) return 1;
  int64_t count = 0;
  for (int64_t i = 0; i < s.valid_count; ++i) count += s.valid[i].end - s.valid[i].begin;
  return double(count) / double(s.samples * s.inner);
}

// Valid values, a channel, of the pool that has the fewest.
int64_t fewest_values(const Shape& s) {
  const int64_t pools = s.pools(), size = s.pool_size * s.inner;
  if (!s.valid) return std::min(s.pool_size, s.samples - (pools - 1) * s.pool_size) * s.inner;
  int64_t fewest = std::numeric_limits<int64_t>::max(), pool = 0, count = 0;
  const auto close = [&] {
    fewest = std::min(fewest, count);
    count = 0;
    ++pool;
  };
  for (int64_t i = 0; i < s.valid_count; ++i)
    for (int64_t at = s.valid[i].begin; at < s.valid[i].end;) {
      while (at >= (pool + 1) * size) close();
      const int64_t end = std::min(s.valid[i].end, (pool + 1) * size);
      count += end - at;
      at = end;
    }
  while (pool < pools) close();
  return fewest;
}

struct Plan {
  Shape shape;
  bool one_phase;
  bool whole;         // each piece holds all values of its channels' pools: both phases run while it is in cache
  bool flat = false;  // planes are so short that rows of several are walked, where they are dense
  int64_t group = 1, groups = 1;              // planar: channels of a piece
  int64_t block = 1, blocks = 1;              // samples of a piece, within a pool
  int64_t inner_block = 1, inner_blocks = 1;  // planar: part of a plane
  int64_t segment = 1;                        // whole: pools that one thread takes in turn
  const double* counts = nullptr;             // of the pools, where not every position is valid
  int64_t fewest = 0;                         // values of the smallest pool

  // Where there is but one phase, nothing is walked twice: pieces are runs of memory.
  explicit Plan(const Shape& s, bool one_phase = false) : shape(s), one_phase(one_phase) {
    const int64_t bytes = element_size(s.dtype), pools = s.pools(), pool = std::min(s.pool_size, s.samples);
    const Caches& cache = caches();
    fewest = fewest_values(s);
    block = pool;
    inner_block = s.inner;
    if (s.order == Order::planar) {
      flat = !s.valid && s.inner > 0 && s.inner <= kFlatInner && pool >= kFlatSamples;
      const int64_t budget = std::max(cache.l2 * 6 / 10, cache.l3 / 8);
      // Of a plane, what is read.
      const int64_t plane = std::max<int64_t>(1, int64_t(double(s.inner * bytes) * valid_share(s)));
      group =
          std::clamp<int64_t>(ceil_div(kRunBytes, plane), 1, std::clamp<int64_t>(s.channels, 1, kMaxPlanarChannels));
      while (group > 1 && group * plane * pool > cache.l2 / 2) --group;
      groups = ceil_div(s.channels, group);
      whole = plane * pool <= budget && (pools * groups >= 8 || is_small(s));
      // Not in strips too short for prefetchers.
      if (flat && group < s.channels && group * plane < kRunBytes / 4) whole = whole && is_small(s);
      // Zeros are written in the order of memory, where what is valid stays in the last cache from phase to phase.
      const bool sparse = s.valid && !is_small(s) && s.samples * s.channels * plane <= cache.l3 / 2;
      if (!whole || one_phase || sparse) {
        whole = false;
        int64_t together = flat || sparse ? kMaxPlanarChannels : 1;
        if (one_phase) together = flat ? flat_channels(s.inner) : kPieceBytes / plane;
        group = std::clamp<int64_t>(together, 1, std::max<int64_t>(s.channels, 1));
        groups = ceil_div(s.channels, group);
        const int64_t least = !flat ? 1 : one_phase ? 2 * kFlatSamples : 4 * kFlatSamples;
        block = std::clamp<int64_t>(std::max(least, kPieceBytes / (plane * group)), 1, std::max<int64_t>(pool, 1));
        blocks = ceil_div(pool, block);
        inner_block = std::clamp<int64_t>(s.inner, 1, kPieceBytes / bytes);
        inner_blocks = ceil_div(s.inner, inner_block);
      }
    } else {
      const int64_t row = std::max<int64_t>(1, s.channels * bytes);
      group = s.channels;
      groups = std::min<int64_t>(s.channels, 1);  // no channels, no pieces
      whole = pool * s.channels <= serial_elements(s.dtype) || (pools >= 8 && pool * row <= cache.l3 / 8);
      if (!whole) {
        // Long enough for a block's sums to be little beside its rows.
        const int64_t least = std::clamp<int64_t>(pool / 16, 32, 128);
        block = std::min(pool, std::max({kPieceBytes / row, ceil_div(pool, kMaxBlocks), least}));
        block = ceil_div(block, 32) * 32;
        blocks = ceil_div(pool, block);
        if (blocks == 1 && s.channels > kColumns) {
          // So few and long rows that their columns are shared out instead.
          whole = true;
          block = pool;
          const int64_t share = std::min(ceil_div(s.channels, 8), cache.l2 / 2 / (pool * bytes));
          group = std::max<int64_t>(1, ceil_div(share, kColumns)) * kColumns;
          groups = ceil_div(s.channels, group);
        }
      }
    }
    if (whole) segment = std::max<int64_t>(1, ceil_div(pools, kMaxSegments));
  }

  int64_t pieces_a_pool() const { return groups * blocks * inner_blocks; }
  int64_t pieces() const { return shape.pools() * pieces_a_pool(); }
  int64_t statistics() const { return shape.pools() * shape.channels; }
  // Pieces that one thread takes in turn, and how many such runs there are.
  int64_t run() const { return segment > 1 ? segment * groups : 1; }
  int64_t runs() const { return ceil_div(pieces(), run()); }
  // Places for coefficients: one a statistic, or one a channel of a piece. Arrays of them begin at distances that no
  // power of two divides: a processor takes addresses that agree in their last 12 bits for one another.
  int64_t slots() const { return ceil_div(whole ? group : statistics(), 8) * 8 + 48; }
  // Doubles that hold the two sums of every channel of every piece, those of whole pieces being the slots'.
  int64_t sums() const { return whole ? 2 * slots() : one_phase ? 0 : 2 * statistics() * blocks * inner_blocks; }
  // Rows of partial gradients of gamma and beta.
  int64_t rows() const { return one_phase ? 0 : ceil_div(shape.pools(), segment); }

  // Whether the pieces of a pool lie one behind the other, as those do that are walked once: what runs next on the same
  // threads, element by element, finds its share in their caches. Else blocks of one group of channels follow another.
  bool in_memory_order() const { return one_phase && !whole; }
  int64_t first_piece(int64_t pool, int64_t group) const {
    return pool * pieces_a_pool() + group * inner_blocks * (in_memory_order() ? 1 : blocks);
  }
  Piece piece(int64_t i) const {
    Piece p;
    p.pool = i / pieces_a_pool();
    int64_t rest = i % pieces_a_pool();
    const int64_t apart = rest / inner_blocks;
    p.channel = (in_memory_order() ? apart % groups : apart / blocks) * group;
    p.channels = std::min(group, shape.channels - p.channel);
    const int64_t begin = p.pool * shape.pool_size, end = std::min(begin + shape.pool_size, shape.samples);
    p.sample = std::min(begin + (in_memory_order() ? apart / groups : apart % blocks) * block, end);
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
  int64_t turn(int64_t i) const { return !shape.valid ? i : i % 2 ? (whole ? runs() : pieces()) - 1 - i / 2 : i / 2; }
  Slab slab(const Piece& p) const { return {p.samples, p.channels, p.inner, few(p.pool)}; }
  // Whether a pool counts as one of few values; where the coefficients' type hangs on it, as the smallest of all pools.
  bool few(int64_t pool) const {
    if (shape.dtype == Dtype::float32) return fewest < kFewFloat32;
    return count(pool) < kFewValues;
  }
  // Whether gradients are computed in float64.
  bool wide() const { return shape.dtype == Dtype::float64 || (shape.dtype == Dtype::float32 && few(0)); }
};

// The first range that ends behind a position.
const Range* first_range(const Shape& s, int64_t position) {
  return std::upper_bound(s.valid, s.valid + s.valid_count, position,
                          [](int64_t at, const Range& r) { return at < r.end; });
}

// The valid positions in [begin, end) as runs, and what lies between them as gaps, in order.
template <class Run, class Gap>
void walk(const Shape& s, int64_t begin, int64_t end, const Run& run, const Gap& gap) {
  const Range* const last = s.valid + s.valid_count;
  const Range* range = first_range(s, begin);
  for (int64_t at = begin; at < end; ++range) {
    const int64_t first = range == last ? end : std::clamp(range->begin, at, end);
    if (at < first) gap(at, first);
    at = range == last ? end : std::min(range->end, end);
    if (first < at) run(first, at);
  }
}

void nothing(int64_t, int64_t) {}

// Copies bytes, or writes zeros where there is nothing to copy.
void write(void* to, const void* from, int64_t bytes, bool around_cache) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const auto plain = [&](int64_t count) {
    in ? std::memcpy(out, in, size_t(count)) : std::memset(out, 0, size_t(count));
    out += count;
    in += in ? count : 0;
    bytes -= count;
  };
#if defined(__SSE2__)
  constexpr int64_t line = 64, long_run = 8 * line;
  if (around_cache && bytes >= long_run) {
    plain(int64_t(-reinterpret_cast<uintptr_t>(out) % line));
    for (; bytes >= line; bytes -= line, out += line, in += in ? line : 0)
      for (int64_t i = 0; i < line; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                         in ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)) : _mm_setzero_si128());
  }
#endif
  plain(bytes);
}

template <class F>
void for_each(const Plan& plan, int64_t count, Parallel parallel, const F& f) {
  auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  void* context = const_cast<void*>(static_cast<const void*>(&f));
  if (count <= 1 || is_small(plan.shape))
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
  char* at(int array, int64_t i) const { return base + (array * count + i) * size(); }
  NormalizeCoefficients normalize(int64_t i) const { return {at(0, i), at(1, i), at(2, i), gate(0, i), gate(1, i)}; }
  // Two arrays more, behind six of eight bytes: float64 for float64, else float32.
  char* gate(int array, int64_t i) const { return base + 48 * count + (array * count + i) * gate_size; }
  ApplyCoefficients apply(int64_t i) const { return {at(3, i), at(4, i), at(5, i)}; }
};

// ---------------------------------------------------------------------------------------------- scratch memory
// Shifts, sums and coefficients: of all statistics, or of one whole piece, after which a thread's next takes the same.
struct Slots {
  double *shift, *sums;
  Coefficients k;
};

struct Scratch {
  double *gamma, *beta;
  double* counts;     // of the pools
  double* gradients;  // of gamma and beta, rows of (2, channels)
  double* slots;
  bool wide;
  Scratch(const Plan& plan, double* workspace, bool wide)
      : gamma(workspace),
        beta(gamma + plan.shape.channels + 48),
        counts(beta + plan.shape.channels + 48),
        gradients(counts + plan.shape.pools()),
        slots(gradients + 2 * plan.rows() * plan.shape.channels),
        wide(wide) {}
  static int64_t size(const Plan& plan) {
    return 2 * (plan.shape.channels + 48) + plan.shape.pools() + 2 * plan.rows() * plan.shape.channels +
           (plan.whole ? plan.runs() : 1) * slots_size(plan);
  }
  static int64_t slots_size(const Plan& plan) { return 9 * plan.slots() + plan.sums(); }
  // Those of a run of whole pieces, or all.
  Slots of(const Plan& plan, int64_t run) const {
    double* const shift = slots + run * slots_size(plan);
    double* const k = shift + plan.slots();
    return {shift,
            k + 8 * plan.slots(),
            {wide, element_size(plan.shape.dtype) == 8 ? 8 : 4, reinterpret_cast<char*>(k), plan.slots()}};
  }
};

// What is done at once: a piece, or the channels of one alone.
struct Work {
  Piece piece;
  int64_t at;    // of its channels among the statistics
  int64_t slot;  // of its first channel
  const Slots& slots;
  double *first, *second;  // the two sums of its channels
  const Coefficients& k() const { return slots.k; }
  double* shift() const { return slots.shift + slot; }
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
  const Kernels &kernels, &row_kernels;
  const CoefficientKernels& coefficients;
  const Slots all;  // where pieces are not whole
  Fusion fusion;
  double eps = 0;
  Parallel parallel;
  bool large, stream;

  Runner(Verb verb, const Shape& shape, const Fusion& f, double* workspace, Parallel par)
      : plan(shape, verb == Verb::normalize || verb == Verb::backward_apply),
        scratch(plan, workspace, element_size(shape.dtype) > 2 && (verb < Verb::backward_reduce || plan.wide())),
        kernels(kernel_table().of[int(shape.order)][int(shape.dtype)]),
        row_kernels(kernel_table().of[int(Order::interleaved)][int(shape.dtype)]),
        coefficients(kernel_table().coefficients[scratch.wide]),
        all(scratch.of(plan, 0)),
        fusion(f),
        parallel(par),
        large(shape.samples * shape.channels * shape.inner * element_size(shape.dtype) > caches().l3 / 2),
        // Not where runs of valid values share lines with zeros.
        stream(large && (!shape.valid || shape.order == Order::interleaved)) {
    if (!shape.valid) return;
    for (int64_t pool = 0; pool < shape.pools(); ++pool) {
      int64_t count = 0;
      walk(shape, pool_begin(pool), pool_begin(pool + 1), [&](int64_t b, int64_t e) { count += e - b; }, nothing);
      scratch.counts[pool] = double(count);
    }
    plan.counts = scratch.counts;
  }

  Runner(Verb verb, const Shape& shape, Vector gamma, Vector beta, double eps, const Fusion& f, double* workspace,
         Parallel par)
      : Runner(verb, shape, f, workspace, par) {
    this->eps = eps;
    const auto read = [&](const Vector& v, double absent, double* to) {
      v.data ? convert(v.dtype, v.data, shape.channels, to) : void(std::fill_n(to, shape.channels, absent));
    };
    read(gamma, 1, scratch.gamma);
    read(beta, 0, scratch.beta);
  }

  // The first position of a pool.
  int64_t pool_begin(int64_t pool) const {
    return std::min(pool * plan.shape.pool_size, plan.shape.samples) * plan.shape.inner;
  }

  // A slab seen as rows that are longer than its own: their columns belong to the piece's channels in turn, `each` to
  // one, and to all of them so `times` over.
  struct Rows {
    Piece piece;
    Slab slab;
    int64_t channel;  // the first, counted from that of the work
    int64_t each, times;
  };

  // A slab as such rows where its own are short and lie beside one another; what is left as it is. Signs begin a byte
  // with each run of their own, so that what reads or writes them takes no others.
  template <class Long, class Direct>
  void in_rows(const Piece& p, const Slab& slab, std::initializer_list<Operand> operands, const uint8_t* signs,
               const Long& rows, const Direct& direct) const {
    const int64_t inner = plan.shape.inner;
    const auto all = [&](int64_t Operand::* stride, int64_t size) {
      return std::all_of(operands.begin(), operands.end(), [&](const Operand& o) { return !o || o.*stride == size; });
    };
    if (signs || slab.runs) return direct(p, slab);
    if (plan.shape.order == Order::planar) {
      if (!plan.flat || p.samples < kFlatSamples || !all(&Operand::channel_stride, inner)) return direct(p, slab);
      const int64_t most = flat_channels(inner);
      for (int64_t channel = 0; channel < p.channels; channel += most) {
        Piece part = p;
        part.channel += channel;
        part.channels = std::min(most, p.channels - channel);
        rows(Rows{part, Slab{p.samples, part.channels * inner, 1, slab.few}, channel, inner, 1});
      }
      return;
    }
    const int64_t lanes = kernel_table().lanes, times = lanes * std::max<int64_t>(1, 256 / (lanes * p.channels));
    if (p.channels >= kFlatChannels || p.samples < kFlatSamples * times || !all(&Operand::sample_stride, p.channels))
      return direct(p, slab);
    Piece part = p, rest = p;
    part.samples = p.samples / times * times;
    rows(Rows{part, Slab{part.samples / times, p.channels * times, 1, slab.few}, 0, 1, times});
    rest.sample += part.samples;
    rest.samples -= part.samples;
    if (rest.samples) direct(rest, plan.slab(rest));
  }

  Operand at(const Operand& o, const Rows& r) const {
    Operand part = plan.at(o, r.piece);
    part.sample_stride *= r.times;
    return part;
  }
  KernelFusion fused(const Rows& r) const {
    KernelFusion f = fused(r.piece);
    f.residual.sample_stride *= r.times;
    return f;
  }

  // Coefficients of channels as those of columns.
  struct Columns {
    alignas(64) double values[6][kFlatColumns];
    const Runner& run;
    const Coefficients& k;
    const Rows& rows;
    int64_t used = 0;
    Columns(const Runner& run, const Work& w, const Rows& rows) : run(run), k(w.k()), rows(rows) {}
    const void* of(const void* from, int64_t size) {
      double* const to = values[used++];
      run.coefficients.spread(rows.piece.channels, rows.each, rows.times, size,
                              static_cast<const char*>(from) + rows.channel * size, to);
      return to;
    }
    const double* of(const double* from) { return static_cast<const double*>(of(from, 8)); }
    // The mean, and what else is asked for.
    NormalizeCoefficients normalize(const NormalizeCoefficients& from, bool line, bool gate) {
      const int64_t size = k.size(), gate_size = k.gate_size;
      const void* const mean = of(from.mean, size);
      return {mean, line ? of(from.scale, size) : mean, line ? of(from.shift, size) : mean,
              gate ? of(from.threshold, gate_size) : mean, gate ? of(from.flip, gate_size) : mean};
    }
    // What the gate needs of them.
    NormalizeCoefficients gated(const NormalizeCoefficients& from) {
      const Gate gate = gate_of(run.fusion);
      const bool relu = gate == Gate::recompute && run.fusion.activation == Activation::relu;
      return normalize(from, !relu && (gate == Gate::recompute || gate == Gate::residual), relu);
    }
  };

  // Sums of columns, of `run`, added to those of their channels.
  template <class Run>
  void fold(const Work& w, const Rows& r, const Run& run) const {
    const int64_t columns = r.slab.channels;
    double sums[2 * kFlatColumns];
    std::fill_n(sums, 2 * columns, 0.0);
    run(sums);
    coefficients.fold(r.piece.channels, r.each, r.times, sums, w.first + r.channel);
    coefficients.fold(r.piece.channels, r.each, r.times, sums + columns, w.second + r.channel);
  }

  // run on what is valid of piece p, as slabs; gap on the rows that are not.
  template <class Run, class Gap>
  void parts(const Piece& p, const Run& run, const Gap& gap) const {
    if (p.samples <= 0 || p.inner <= 0) return;
    if (!plan.shape.valid) return run(p, plan.slab(p));
    if (plan.shape.order == Order::interleaved) {
      const auto rows = [&](int64_t begin, int64_t end) {
        Piece part = p;
        part.sample = begin;
        part.samples = end - begin;
        return part;
      };
      return walk(
          plan.shape, p.sample, p.sample + p.samples,
          [&](int64_t b, int64_t e) { run(rows(b, e), plan.slab(rows(b, e))); },
          [&](int64_t b, int64_t e) { gap(rows(b, e)); });
    }
    constexpr int64_t most = 256;
    batchnorm::Run runs[most];
    Slab slab = plan.slab(p);
    slab.runs = runs;
    slab.samples = 0;
    for (int64_t n = 0; n < p.samples; ++n) {
      const int64_t begin = (p.sample + n) * plan.shape.inner + p.first;
      const auto add = [&](int64_t b, int64_t e) {
        runs[slab.samples++] = {n, b - begin, e - b};
        if (slab.samples < most) return;
        run(p, slab);
        slab.samples = 0;
      };
      walk(plan.shape, begin, begin + p.inner, add, nothing);
    }
    if (slab.samples) run(p, slab);
  }

  template <class Run>
  void valid_parts(const Piece& p, const Run& run) const {
    parts(p, run, [](const Piece&) {});
  }

  void clear(const Piece& rows, const Operand& o) const {
    if (!o) return;
    char* const data = static_cast<char*>(plan.at(o, rows).data);
    const int64_t size = element_size(plan.shape.dtype);
    if (o.sample_stride == rows.channels) return write(data, nullptr, rows.samples * rows.channels * size, large);
    for (int64_t n = 0; n < rows.samples; ++n)
      write(data + n * o.sample_stride * size, nullptr, rows.channels * size, large);
  }

  // run on what is valid of planar piece p, results as zeros elsewhere: both are put together in cache, a few planes at
  // a time, and written as runs of memory. `channel` is the first, counted from the piece's.
  template <class Run>
  void planes(const Piece& p, const Operand& a, const Operand& b, const Run& run) const {
    constexpr int64_t most = 16 << 10;
    alignas(64) char values[2][most];
    const int64_t size = element_size(plan.shape.dtype), inner = std::min(p.inner, most / size);
    const bool dense = a.channel_stride == inner && (!b || b.channel_stride == inner);
    const int64_t channels = dense ? most / (inner * size) : 1;
    Piece part = p;
    part.samples = 1;
    for (int64_t n = 0; n < p.samples; ++n)
      for (int64_t c = 0; c < p.channels; c += channels)
        for (int64_t i = 0; i < p.inner; i += inner) {
          part.sample = p.sample + n;
          part.channel = p.channel + c;
          part.channels = std::min(channels, p.channels - c);
          part.first = p.first + i;
          part.inner = std::min(inner, p.inner - i);
          const int64_t bytes = part.channels * part.inner * size;
          const Operand cached[2] = {{values[0], 0, part.inner}, {b ? values[1] : nullptr, 0, part.inner}};
          for (const Operand& o : cached)
            if (o) std::memset(o.data, 0, size_t(bytes));
          valid_parts(part, [&](const Piece& v, const Slab& slab) { run(v, slab, c, cached[0], cached[1]); });
          write(plan.at(a, part).data, values[0], bytes, large);
          if (b) write(plan.at(b, part).data, values[1], bytes, large);
        }
  }

  // Sample and place of a valid value of a pool that has one: the first, one about the middle, or the last.
  void find_valid(int64_t pool, int half, int64_t* sample, int64_t* place) const {
    const int64_t begin = pool_begin(pool), end = std::max(pool_begin(pool + 1), begin + 1);
    int64_t at = half == 0 ? begin : half == 1 ? begin + (end - begin) / 2 : end - 1;
    if (plan.shape.valid) {
      const Range* range = first_range(plan.shape, at);
      if (range == plan.shape.valid + plan.shape.valid_count || range->begin >= end) --range;
      at = std::clamp(at, std::max(begin, range->begin), std::min(end, range->end) - 1);
    }
    *sample = at / plan.shape.inner;
    *place = at % plan.shape.inner;
  }

  KernelFusion fused(const Piece& p) const {
    KernelFusion f{fusion.activation, fusion.slope, plan.at(fusion.residual, p), nullptr, 0, 0, stream};
    if (fusion.signs) {
      const bool planar = plan.shape.order == Order::planar;
      const int64_t run = ceil_div(planar ? plan.shape.inner : plan.shape.channels, 8);
      f.signs_sample = planar ? run * plan.shape.channels : run;
      f.signs_channel = planar ? run : 0;
      f.signs = fusion.signs + p.sample * f.signs_sample + (planar ? p.channel * run + p.first / 8 : p.channel / 8);
    }
    return f;
  }

  // ------------------------------------------------------------------------------------------ steps of one work
  // A value of each channel, from which all others are taken: the first, or where sums are of type float32 the median
  // of three, lest an outlier is taken from all.
  void set_shifts(const Work& w, const Operand& x) const {
    double* const shift = w.shift();
    if (!plan.count(w.piece.pool)) return void(std::fill_n(shift, w.piece.channels, 0.0));
    read_values(w, x, 0, shift);
    if (element_size(plan.shape.dtype) > 2 || plan.few(w.piece.pool)) return;
    double *const middle = w.first, *const last = w.second;  // which have no sums yet
    read_values(w, x, 1, middle);
    read_values(w, x, 2, last);
    for (int64_t c = 0; c < w.piece.channels; ++c) {
      const double low = std::min(shift[c], middle[c]), high = std::max(shift[c], middle[c]);
      shift[c] = std::clamp(last[c], low, high);
    }
  }

  void read_values(const Work& w, const Operand& x, int half, double* to) const {
    Piece p = w.piece;
    find_valid(p.pool, half, &p.sample, &p.first);
    const char* const first = static_cast<const char*>(plan.at(x, p).data);
    const Dtype dtype = plan.shape.dtype;
    if (plan.shape.order == Order::interleaved)
      convert(dtype, first, p.channels, to);
    else
      for (int64_t c = 0; c < p.channels; ++c)
        convert(dtype, first + c * x.channel_stride * element_size(dtype), 1, to + c);
    coefficients.finite(p.channels, to);
  }

  void set_normalize(const Work& w, const double* mean, const double* var) const {
    const Coefficients& k = w.k();
    coefficients.normalize(w.piece.channels, mean + w.at, var + w.at, scratch.gamma + w.piece.channel,
                           scratch.beta + w.piece.channel, eps, k.at(0, w.slot), k.at(1, w.slot), k.at(2, w.slot));
  }

  // What a backward needs of them; `population` where set_gradient takes the scale from there.
  void set_gated(const Work& w, const double* mean, const double* var, bool population = false) const {
    if (!population && gate_of(fusion) != Gate::recompute && gate_of(fusion) != Gate::residual)
      return coefficients.means(w.piece.channels, mean + w.at, w.k().at(0, w.slot));
    set_normalize(w, mean, var);
    if (gate_of(fusion) != Gate::recompute || fusion.activation != Activation::relu) return;
    const Coefficients& k = w.k();
    coefficients.relu_gates(w.piece.channels, k.gate_size, mean + w.at, var + w.at, scratch.gamma + w.piece.channel,
                            scratch.beta + w.piece.channel, eps, k.gate(0, w.slot), k.gate(1, w.slot));
  }

  void add_moments(const Work& w, const Operand& x) const {
    std::fill_n(w.first, 2 * w.piece.channels, 0.0);
    valid_parts(w.piece, [&](const Piece& v, const Slab& slab) {
      in_rows(
          v, slab, {x}, nullptr,
          [&](const Rows& r) {
            Columns of(*this, w, r);
            fold(w, r, [&](double* sums) { row_kernels.moments(r.slab, at(x, r), of.of(w.shift()), sums); });
          },
          [&](const Piece& p, const Slab& s) { kernels.moments(s, plan.at(x, p), w.shift(), w.first); });
    });
  }

  void add_reductions(const Work& w, const Operand& dy, const Operand& x, const double* mean) const {
    std::fill_n(w.first, 2 * w.piece.channels, 0.0);
    mean += w.at;
    const NormalizeCoefficients k = w.k().normalize(w.slot);
    valid_parts(w.piece, [&](const Piece& v, const Slab& slab) {
      in_rows(
          v, slab, {dy, x, fusion.residual}, fusion.signs,
          [&](const Rows& r) {
            Columns of(*this, w, r);
            fold(w, r, [&](double* sums) {
              row_kernels.reduce(r.slab, at(dy, r), at(x, r), of.of(mean), of.gated(k), fused(r), gate_of(fusion),
                                 sums);
            });
          },
          [&](const Piece& p, const Slab& s) {
            kernels.reduce(s, plan.at(dy, p), plan.at(x, p), mean, k, fused(p), gate_of(fusion), w.first);
          });
    });
    if (!plan.few(w.piece.pool) && element_size(plan.shape.dtype) == 2)
      for (int64_t c = 0; c < w.piece.channels; ++c) w.second[c] += (double(float(mean[c])) - mean[c]) * w.first[c];
  }

  double values(const Work& w) const { return double(std::max<int64_t>(plan.count(w.piece.pool), 1)); }

  void finish_moments(const Work& w, double divisor, double* mean, double* spread) const {
    coefficients.statistics(w.piece.channels, values(w), divisor, w.shift(), w.first, w.second, mean + w.at,
                            spread + w.at);
  }

  void finish_reductions(const Work& w, double* sum_dz, double* sum_dz_centered) const {
    if (!sum_dz) return;
    std::copy_n(w.first, w.piece.channels, sum_dz + w.at);
    std::copy_n(w.second, w.piece.channels, sum_dz_centered + w.at);
  }

  // A pool's row of gradients of gamma and beta, zeros before its segment's first.
  double* parameters(const Work& w) const {
    const int64_t channels = plan.shape.channels, pool = w.piece.pool;
    double* const row = scratch.gradients + 2 * (pool / plan.segment) * channels + w.piece.channel;
    if (pool % plan.segment == 0)
      for (double* to : {row, row + channels}) std::fill_n(to, w.piece.channels, 0.0);
    return row;
  }

  // The coefficients of dx where the statistics are the batch's, or constants; adds to the gradients of gamma and beta.
  void set_gradient(const Work& w, const double* mean, const double* var, bool population) const {
    const Coefficients& k = w.k();
    const int64_t n = w.piece.channels;
    if (!population) {
      double* const row = parameters(w);
      return coefficients.gradient(n, values(w), mean + w.at, var + w.at, scratch.gamma + w.piece.channel, eps, w.first,
                                   w.second, k.at(3, w.slot), k.at(4, w.slot), k.at(5, w.slot), row,
                                   row + plan.shape.channels);
    }
    add_parameters(w, var);
    std::copy_n(k.at(1, w.slot), n * k.size(), k.at(3, w.slot));
    for (int array = 4; array < 6; ++array) std::fill_n(k.at(array, w.slot), n * k.size(), char(0));
  }

  // That alone.
  void add_parameters(const Work& w, const double* var) const {
    double* const row = parameters(w);
    coefficients.parameters(w.piece.channels, var + w.at, eps, w.first, w.second, row, row + plan.shape.channels);
  }

  // The rows added up in their order.
  void finish_parameters(double* d_gamma, double* d_beta) const {
    const int64_t channels = plan.shape.channels;
    std::fill_n(d_gamma, channels, 0.0);
    std::fill_n(d_beta, channels, 0.0);
    for (int64_t row = 0; row < plan.rows(); ++row) {
      const double* const gradients = scratch.gradients + 2 * row * channels;
      for (int64_t c = 0; c < channels; ++c) {
        d_gamma[c] += gradients[c];
        d_beta[c] += gradients[channels + c];
      }
    }
  }

  void set_apply(const Work& w, const double* mean, const double* k1, const double* k2, const double* k3) const {
    const Coefficients& k = w.k();
    coefficients.apply(w.piece.channels, mean + w.at, k1 + w.at, k2 + w.at, k3 + w.at, k.at(3, w.slot), k.at(4, w.slot),
                       k.at(5, w.slot));
  }

  void normalize(const Work& w, const Operand& x, const Operand& y) const {
    if (plan.shape.valid && plan.shape.order == Order::planar)
      return planes(w.piece, y, {},
                    [&](const Piece& v, const Slab& slab, int64_t channel, const Operand& to, const Operand&) {
                      kernels.normalize(slab, plan.at(x, v), to, w.k().normalize(w.slot + channel), fused(v));
                    });
    const NormalizeCoefficients k = w.k().normalize(w.slot);
    parts(
        w.piece,
        [&](const Piece& v, const Slab& slab) {
          in_rows(
              v, slab, {x, y, fusion.residual}, fusion.signs,
              [&](const Rows& r) {
                Columns of(*this, w, r);
                row_kernels.normalize(r.slab, at(x, r), at(y, r), of.normalize(k, true, false), fused(r));
              },
              [&](const Piece& p, const Slab& s) { kernels.normalize(s, plan.at(x, p), plan.at(y, p), k, fused(p)); });
        },
        [&](const Piece& gap) { clear(gap, y); });
  }

  void apply(const Work& w, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual) const {
    const Gate gate = gate_of(fusion);
    if (plan.shape.valid && plan.shape.order == Order::planar)
      return planes(w.piece, dx, d_residual,
                    [&](const Piece& v, const Slab& slab, int64_t channel, const Operand& to, const Operand& also) {
                      const int64_t slot = w.slot + channel;
                      kernels.apply(slab, plan.at(dy, v), plan.at(x, v), to, also, w.k().normalize(slot),
                                    w.k().apply(slot), fused(v), gate);
                    });
    const NormalizeCoefficients k = w.k().normalize(w.slot);
    const ApplyCoefficients a = w.k().apply(w.slot);
    parts(
        w.piece,
        [&](const Piece& v, const Slab& slab) {
          in_rows(
              v, slab, {dy, x, dx, d_residual, fusion.residual}, fusion.signs,
              [&](const Rows& r) {
                Columns of(*this, w, r);
                const int64_t size = w.k().size();
                row_kernels.apply(r.slab, at(dy, r), at(x, r), at(dx, r), at(d_residual, r), of.gated(k),
                                  {of.of(a.k1, size), of.of(a.k2, size), of.of(a.k3, size)}, fused(r), gate);
              },
              [&](const Piece& p, const Slab& s) {
                kernels.apply(s, plan.at(dy, p), plan.at(x, p), plan.at(dx, p), plan.at(d_residual, p), k, a, fused(p),
                              gate);
              });
        },
        [&](const Piece& gap) {
          clear(gap, dx);
          clear(gap, d_residual);
        });
  }

  // ------------------------------------------------------------------------------------------ orders of work
  // f on all pieces of a plan of whole ones, each thread with slots of its own.
  template <class F>
  void for_whole_pieces(const F& f) const {
    for_each(plan, plan.runs(), parallel, [&](int64_t begin, int64_t end) {
      const Slots slots = scratch.of(plan, begin);
      double* const sums = slots.sums;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = plan.turn(k) * plan.run(), last = std::min(first + plan.run(), plan.pieces());
        for (int64_t i = first; i < last; ++i) {
          const Piece p = plan.piece(i);
          f(Work{p, p.pool * plan.shape.channels + p.channel, 0, slots, sums, sums + p.channels});
        }
      }
    });
  }

  // f on piece i of a plan of parts, whose coefficients stand ready.
  template <class F>
  void part_of(int64_t i, const F& f) const {
    const Piece p = plan.piece(plan.turn(i));
    const int64_t at = p.pool * plan.shape.channels + p.channel;
    double* const sums = all.sums + plan.sums_offset(plan.turn(i));
    f(Work{p, at, at, all, sums, sums + p.channels});
  }

  // f on all channels of all pools of a plan of parts, runs of channels at once; their sums are those of a group's
  // first part.
  template <class F>
  void for_channels(const F& f) const {
    const int64_t channels = plan.shape.channels, parts = plan.blocks * plan.inner_blocks;
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t pool = i / channels, channel = i % channels, group = channel / plan.group;
        const int64_t first = plan.first_piece(pool, group);
        Piece p = plan.piece(first);
        const int64_t stride = p.channels;
        double* const sums = all.sums + plan.sums_offset(first) + (channel - p.channel);
        p.channels = std::min(end - i, p.channel + p.channels - channel);
        p.channel = channel;
        f(Work{p, i, i, all, sums, sums + stride});
        i += p.channels;
      }
    };
    // Not worth the threads where there is little to add.
    plan.statistics() * (parts + 8) < kSerialElements ? run(0, plan.statistics())
                                                      : for_each(plan, plan.statistics(), parallel, run);
  }

  // Adds the sums of all parts to those of the first, in their order.
  void merge(const Work& w) const {
    const int64_t parts = plan.blocks * plan.inner_blocks, stride = w.second - w.first;
    for (int64_t k = 1; k < parts; ++k)
      for (double* sums : {w.first, w.second})
        for (int64_t c = 0; c < w.piece.channels; ++c) sums[c] += sums[2 * stride * k + c];
  }

  // prepare, reduce, finish, apply: on each piece where pieces are whole; else prepare and finish on all channels,
  // and apply on the pieces in reverse order within each thread.
  template <class Prepare, class Reduce, class Finish, class Apply>
  void two_phases(Prepare prepare, Reduce reduce, Finish finish, Apply apply) const {
    if (plan.whole)
      return for_whole_pieces([&](const Work& w) {
        prepare(w);
        reduce(w);
        finish(w);
        apply(w);
      });
    for_channels(prepare);
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) part_of(i, reduce);
    });
    for_channels([&](const Work& w) {
      merge(w);
      finish(w);
    });
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) part_of(i, apply);
    });
  }

  template <class Prepare, class Apply>
  void one_phase(Prepare prepare, Apply apply) const {
    if (!plan.pieces()) return;
    if (plan.whole)
      return for_whole_pieces([&](const Work& w) {
        prepare(w);
        apply(w);
      });
    for_channels(prepare);
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) part_of(i, apply);
    });
  }
};

void done(const Work&) {}

}  // namespace

size_t workspace_size(const Shape& shape) {
  return size_t(std::max(Scratch::size(Plan(shape)), Scratch::size(Plan(shape, true))));
}

void moments(const Shape& shape, const Operand& x, double* mean, double* m2, double* workspace, Parallel parallel) {
  const Runner run(Verb::moments, shape, {}, workspace, parallel);
  run.two_phases([&](const Work& w) { run.set_shifts(w, x); }, [&](const Work& w) { run.add_moments(w, x); },
                 [&](const Work& w) { run.finish_moments(w, 1, mean, m2); }, done);
}

void normalize(const Shape& shape, const Operand& x, const Operand& y, const double* mean, const double* var,
               Vector gamma, Vector beta, double eps, const Fusion& fusion, double* workspace, Parallel parallel) {
  const Runner run(Verb::normalize, shape, gamma, beta, eps, fusion, workspace, parallel);
  run.one_phase([&](const Work& w) { run.set_normalize(w, mean, var); },
                [&](const Work& w) { run.normalize(w, x, y); });
}

void forward(const Shape& shape, const Operand& x, const Operand& y, double* mean, double* var, Vector gamma,
             Vector beta, double eps, const Fusion& fusion, double* workspace, Parallel parallel) {
  const Runner run(Verb::forward, shape, gamma, beta, eps, fusion, workspace, parallel);
  run.two_phases([&](const Work& w) { run.set_shifts(w, x); }, [&](const Work& w) { run.add_moments(w, x); },
                 [&](const Work& w) {
                   run.finish_moments(w, run.values(w), mean, var);
                   run.set_normalize(w, mean, var);
                 },
                 [&](const Work& w) { run.normalize(w, x, y); });
}

void backward_reduce(const Shape& shape, const Operand& dy, const Operand& x, const double* mean, const double* var,
                     Vector gamma, Vector beta, double eps, const Fusion& fusion, double* sum_dz,
                     double* sum_dz_centered, double* workspace, Parallel parallel) {
  const Runner run(Verb::backward_reduce, shape, gamma, beta, eps, fusion, workspace, parallel);
  run.two_phases([&](const Work& w) { run.set_gated(w, mean, var); },
                 [&](const Work& w) { run.add_reductions(w, dy, x, mean); },
                 [&](const Work& w) { run.finish_reductions(w, sum_dz, sum_dz_centered); }, done);
}

void backward_apply(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx,
                    const Operand& d_residual, const double* mean, const double* var, Vector gamma, Vector beta,
                    double eps, const Fusion& fusion, const double* k1, const double* k2, const double* k3,
                    double* workspace, Parallel parallel) {
  const Runner run(Verb::backward_apply, shape, gamma, beta, eps, fusion, workspace, parallel);
  run.one_phase(
      [&](const Work& w) {
        run.set_gated(w, mean, var);
        run.set_apply(w, mean, k1, k2, k3);
      },
      [&](const Work& w) { run.apply(w, dy, x, dx, d_residual); });
}

void backward(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
              const double* mean, const double* var, Vector gamma, Vector beta, double eps, const Fusion& fusion,
              bool population, double* sum_dz, double* sum_dz_centered, double* d_gamma, double* d_beta,
              double* workspace, Parallel parallel) {
  const Runner run(Verb::backward, shape, gamma, beta, eps, fusion, workspace, parallel);
  run.two_phases([&](const Work& w) { run.set_gated(w, mean, var, population); },
                 [&](const Work& w) { run.add_reductions(w, dy, x, mean); },
                 [&](const Work& w) {
                   run.finish_reductions(w, sum_dz, sum_dz_centered);
                   dx ? run.set_gradient(w, mean, var, population) : run.add_parameters(w, var);
                 },
                 [&](const Work& w) {
                   if (dx) run.apply(w, dy, x, dx, d_residual);
                 });
  if (d_gamma) run.finish_parameters(d_gamma, d_beta);
}

}  // namespace batchnorm
