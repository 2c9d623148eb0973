// What of a piece is valid, as the slabs that kernels take, and zeros at the other positions.
#pragma once

#include "plan.h"

namespace batchnorm {

// The share of all positions that is valid: 1 where no ranges are given.
double valid_share(const Shape&);

// Valid values, a channel, of the pool that has the fewest.
int64_t fewest_values(const Shape&);

// Valid values, a channel, of every pool.
void count_values(const Plan&, double* counts);

// Sample and place of a valid value of a pool that has one: the first (0), one about the middle (1), or the last (2).
struct Place {
  int64_t sample, place;
};
Place find_valid(const Plan&, int64_t pool, int half);

// Copies bytes, or writes zeros where there is nothing to copy.
void write(void* to, const void* from, int64_t bytes, bool around_cache);

// Zeros in the rows of a piece.
void clear(const Plan&, const Piece& rows, const Operand&, bool around_cache);

// The first range that ends behind a position.
inline const Range* first_range(const Shape& s, int64_t position) {
  return std::upper_bound(s.valid, s.valid + s.valid_count, position,
                          [](int64_t at, const Range& r) { return at < r.end; });
}

// valid(begin, end) on the valid positions in [begin, end), gap(begin, end) on what lies between them, in order.
template <class Valid, class Gap>
void for_ranges(const Shape& s, int64_t begin, int64_t end, const Valid& valid, const Gap& gap) {
  const Range* const last = s.valid + s.valid_count;
  const Range* range = first_range(s, begin);
  for (int64_t at = begin; at < end; ++range) {
    const int64_t first = range == last ? end : std::clamp(range->begin, at, end);
    if (at < first) gap(at, first);
    at = range == last ? end : std::min(range->end, end);
    if (first < at) valid(first, at);
  }
}

inline void no_gap(int64_t, int64_t) {}

// valid(piece, slab) on what is valid of piece p; gap(piece) on the rows that are not (interleaved: in planar order
// gaps are left out).
template <class Valid, class Gap>
void for_slabs(const Plan& plan, const Piece& p, const Valid& valid, const Gap& gap) {
  if (p.samples <= 0 || p.inner <= 0) return;
  if (!plan.shape.valid) return valid(p, plan.slab(p));
  if (plan.shape.order == Order::interleaved) {
    const auto rows = [&](int64_t begin, int64_t end) {
      Piece part = p;
      part.sample = begin;
      part.samples = end - begin;
      return part;
    };
    return for_ranges(
        plan.shape, p.sample, p.sample + p.samples,
        [&](int64_t b, int64_t e) { valid(rows(b, e), plan.slab(rows(b, e))); },
        [&](int64_t b, int64_t e) { gap(rows(b, e)); });
  }
  constexpr int64_t most = 256;
  Span spans[most];
  Slab slab = plan.slab(p);
  slab.spans = spans;
  slab.samples = 0;
  for (int64_t n = 0; n < p.samples; ++n) {
    const int64_t begin = (p.sample + n) * plan.shape.inner + p.first;
    const auto add = [&](int64_t b, int64_t e) {
      spans[slab.samples++] = {n, b - begin, e - b};
      if (slab.samples < most) return;
      valid(p, slab);
      slab.samples = 0;
    };
    for_ranges(plan.shape, begin, begin + p.inner, add, no_gap);
  }
  if (slab.samples) valid(p, slab);
}

template <class Valid>
void for_valid_slabs(const Plan& plan, const Piece& p, const Valid& valid) {
  for_slabs(plan, p, valid, [](const Piece&) {});
}

// The results of planar piece p where some positions are not valid: f(piece, slab, channel, a, b) fills those of the
// valid ones, the others are zeros. Both are put together in the cache, a few planes at a time, and written as runs of
// memory. `channel` is the first, counted from the piece's.
template <class F>
void for_padded_planes(const Plan& plan, const Piece& p, const Operand& a, const Operand& b, bool around_cache,
                       const F& f) {
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
        for_valid_slabs(plan, part, [&](const Piece& v, const Slab& slab) { f(v, slab, c, cached[0], cached[1]); });
        write(plan.operand(a, part).data, values[0], bytes, around_cache);
        if (b) write(plan.operand(b, part).data, values[1], bytes, around_cache);
      }
}

}  // namespace batchnorm
