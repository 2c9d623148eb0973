// The plan of a verb: how a tensor is cut into pieces. The cut depends on the shape and the cache sizes alone, never on
// the number of threads, and partial sums are merged in a fixed order: the same bits for any thread count.
//
// The words of plan, ranges, columns and verbs:
//   position   one place of one sample, sample * inner + place; it has a value in every channel
//   range      positions [begin, end) that are valid, that is, in the pools
//   pool       the samples whose values of one channel share a mean and a variance
//   statistic  what belongs to one channel of one pool: (pools, channels) of each kind
//   piece      the values that are walked at once: samples of one pool x a group of channels x a part of their planes
//   phase      one walk over all pieces: the first makes sums, the second makes elements. A piece that holds all values
//              of its statistics is whole, and has both phases while it is in the cache; else the phases are apart
//   task       the whole pieces that one thread takes in turn: those of one segment
//   segment    adjacent pools whose gradients of gamma and beta are summed in one row
//   slot       the place of one channel's coefficients: one for each statistic, or for each channel of a whole piece
//   slab       what one call of a kernel takes: a piece, its valid values (as spans), or rows seen as longer ones
#pragma once

#include <algorithm>
#include <numeric>

#include "dtypes.h"
#include "kernels.h"

namespace batchnorm {

constexpr int64_t kSerialElements = 16384;  // fewer stay on one thread; of two bytes five times as many
constexpr int64_t kCostly = 2;              // elements, that an exponential is worth
constexpr int64_t kFewValues = 8192, kFewFloat32 = 128, kFewForward = 1024;
// Planes of at most kFlatInner elements and rows of fewer than kFlatChannels are walked kFlatColumns elements at a
// time.
constexpr int64_t kFlatInner = kTogether, kFlatSamples = 8, kFlatChannels = 64, kFlatColumns = 4096;

// From how many samples on short planes are walked as rows: from fewer if a plane hardly fills a vector.
inline int64_t flat_samples(int64_t inner) { return inner <= 16 ? 2 : inner <= 64 ? 4 : kFlatSamples; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// So many values of four or eight bytes that what lies behind them begins a line of the cache if they do.
inline int64_t lined(int64_t count) { return ceil_div(count, 16) * 16; }

// Whether a tensor is not worth a second thread: so many elements, each worth `times` plain ones.
inline int64_t serial_elements(Dtype d) { return element_size(d) == 2 ? 5 * kSerialElements : kSerialElements; }
inline bool is_small(const Shape& s, int64_t times = 1) {
  return times * s.samples * s.channels * s.inner < serial_elements(s.dtype);
}

// Bits from one channel's signs to the next: of one element, or of a plane, which is filled up to bytes if it is long.
inline int64_t signs_of_channel(const Shape& s) {
  if (s.order == Order::interleaved) return 1;
  return s.inner <= kTogether ? s.inner : ceil_div(s.inner, 8) * 8;
}
// Channels of planes whose signs fill whole bytes.
inline int64_t channels_of_bytes(const Shape& s) { return 8 / std::gcd<int64_t>(signs_of_channel(s), 8); }

// Channels whose short planes are walked as one row: of whole lines of the cache, where that can be.
int64_t flat_channels(int64_t inner);

struct Piece {
  int64_t pool, channel, channels, sample, samples, first, inner;
};

struct Plan {
  Shape shape;
  bool one_phase;
  bool whole = false;             // each piece is
  bool serial;                    // not worth a second thread
  bool near;                      // in the caches, or not far from them
  bool flat = false;              // planes are so short that rows of several are walked, where they are dense
  int64_t group = 1, groups = 1;  // planar: channels of a piece
  int64_t block = 1, blocks = 1;  // samples of a piece, within a pool
  int64_t inner_block = 1, inner_blocks = 1;  // planar: part of a plane
  int64_t segment = 1;                        // whole: pools of a segment
  const double* counts = nullptr;             // of the pools, where not every position is valid
  int64_t fewest = 0;                         // values of the smallest pool

  // Where there is but one phase, nothing is walked twice: pieces are runs of memory. A costly activation is worth
  // threads sooner. With signs each piece begins at a whole byte of theirs.
  explicit Plan(const Shape&, bool one_phase = false, bool costly = false, bool signs = false);

  int64_t pieces_a_pool() const { return groups * blocks * inner_blocks; }
  int64_t pieces() const { return shape.pools() * pieces_a_pool(); }
  // Pieces of a group of channels in one pool.
  int64_t parts() const { return blocks * inner_blocks; }
  int64_t statistics() const { return shape.pools() * shape.channels; }
  int64_t statistic(const Piece& p) const { return p.pool * shape.channels + p.channel; }  // its first
  int64_t pieces_a_task() const { return segment > 1 ? segment * groups : 1; }
  int64_t tasks() const { return ceil_div(pieces(), pieces_a_task()); }
  // Arrays of coefficients begin at distances that no power of two divides: a processor takes addresses that agree in
  // their last 12 bits for one another. They begin whole lines of the cache, in any type.
  int64_t slots() const { return lined(whole ? group : statistics()) + 48; }
  // Doubles that hold the two sums of every channel of every piece, those of whole pieces being the slots'.
  int64_t sums() const { return whole ? 2 * slots() : one_phase ? 0 : 2 * statistics() * parts(); }
  // Rows of gradients of gamma and beta, one a segment.
  int64_t gradient_rows() const { return one_phase ? 0 : ceil_div(shape.pools(), segment); }

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
  // Where p, which is piece i, keeps its sums: [2][channels].
  int64_t sums_offset(int64_t i, const Piece& p) const {
    const int64_t in_pool = i % pieces_a_pool() % parts();
    return 2 * (p.pool * shape.channels * parts() + p.channel * parts() + in_pool * p.channels);
  }
  // The k-th task or piece in the order in which they are given out. Padding gathers at one end: first and last in turn
  // give every thread its share of both.
  int64_t in_turn(int64_t k) const {
    return !shape.valid ? k : k % 2 ? (whole ? tasks() : pieces()) - 1 - k / 2 : k / 2;
  }

  // Values, a channel, of a pool.
  int64_t count(int64_t pool) const {
    if (counts) return int64_t(counts[pool]);
    return std::min(shape.pool_size, shape.samples - pool * shape.pool_size) * shape.inner;
  }
  // The first position of a pool.
  int64_t pool_begin(int64_t pool) const { return std::min(pool * shape.pool_size, shape.samples) * shape.inner; }
  // Whether a pool counts as one of few values; where the coefficients' type hangs on it, as the smallest of all pools.
  bool few(int64_t pool) const {
    return shape.dtype == Dtype::float32 ? fewest < kFewFloat32 : count(pool) < kFewValues;
  }
  // Whether gradients are computed in float64.
  // Whether a forward of float32 has so many values in each channel that it may be computed in float32.
  bool many_forward() const { return shape.dtype == Dtype::float32 && fewest >= kFewForward; }
  bool wide() const { return shape.dtype == Dtype::float64 || (shape.dtype == Dtype::float32 && few(0)); }

  // What kernels take: an operand from a piece's first element on, and the piece itself.
  Operand operand(const Operand& o, const Piece& p) const {
    if (!o) return o;
    Operand part = o;
    part.data = static_cast<char*>(o.data) +
                (p.sample * o.sample_stride + p.channel * o.channel_stride + p.first) * element_size(shape.dtype);
    return part;
  }
  Slab slab(const Piece& p) const { return {p.samples, p.channels, p.inner, few(p.pool)}; }

 private:
  void cut_planar(int64_t pool, bool signs);
  void cut_interleaved(int64_t pool);
};

// f(begin, end) on a partition of [0, count).
template <class F>
void for_each(int64_t count, Parallel parallel, const F& f) {
  auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  parallel.run(parallel.self, count, body, const_cast<void*>(static_cast<const void*>(&f)));
}
// The same, by all threads where the tensor is worth them.
template <class F>
void for_each(const Plan& plan, int64_t count, Parallel parallel, const F& f) {
  if (count <= 1 || plan.serial)
    f(0, count);
  else
    for_each(count, parallel, f);
}

}  // namespace batchnorm
