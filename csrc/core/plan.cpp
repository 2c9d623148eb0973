#include "plan.h"

#include "ranges.h"

namespace batchnorm {
namespace {

constexpr int64_t kPieceBytes = 128 << 10;
constexpr int64_t kRunBytes = 16 << 10;  // planar: of neighbouring channels, so that prefetchers have a way to go
constexpr int64_t kMaxBlocks = 64;       // row blocks of one pool, interleaved
constexpr int64_t kMaxSegments = 128;
constexpr int64_t kNear = 8;                      // times the second cache: tensors that are not far away
constexpr int64_t kShares = 16;                   // at least, of a tensor for several threads
constexpr int64_t kColumns = 64;                  // whole lines of the cache in any type
constexpr int64_t kFlatNear = 128, kVector = 16;  // elements of a plane that is no part of a row; of the longest vector
constexpr int64_t kFewRows = 160, kNearRows = 2;  // of a pool whose columns are shared out; times the second cache

// Parts of nearly the same size, a multiple of `of`, for a thread waits for the largest share.
int64_t evened(int64_t whole, int64_t parts, int64_t of) {
  return std::max<int64_t>(1, ceil_div(ceil_div(whole, std::max<int64_t>(1, parts)), of) * of);
}

// Of a plane, what is read.
int64_t plane_bytes(const Shape& s) {
  return std::max<int64_t>(1, int64_t(double(s.inner * element_size(s.dtype)) * valid_share(s)));
}

}  // namespace

bool takes_threads(const Shape& shape) { return !is_small(shape); }

int64_t flat_channels(int64_t inner) {
  int64_t most = kFlatColumns / inner, whole = 32;
  while (whole > most) whole /= 2;
  return most / whole * whole;
}

Plan::Plan(const Shape& s, bool one_phase, bool costly, bool signs)
    : shape(s),
      one_phase(one_phase),
      serial(is_small(s, costly ? kCostly : 1)),
      near(s.samples * s.channels * plane_bytes(s) <= kNear * caches().l2),
      fewest(fewest_values(s)) {
  const int64_t pool = std::min(s.pool_size, s.samples);
  block = pool;
  inner_block = s.inner;
  s.order == Order::planar ? cut_planar(pool, signs) : cut_interleaved(pool);
  if (whole) segment = std::max<int64_t>(1, ceil_div(s.pools(), kMaxSegments));
}

void Plan::cut_planar(int64_t pool, bool signs) {
  const Shape& s = shape;
  const Caches& cache = caches();
  const int64_t bytes = element_size(s.dtype), pools = s.pools();
  const int64_t budget = std::max(cache.l2 * 6 / 10, cache.l3 / 8);
  const int64_t plane = plane_bytes(s);
  const int64_t byte = signs ? channels_of_bytes(s) : 1;
  const auto fill_bytes = [&] { group = std::min(ceil_div(group, byte) * byte, std::max<int64_t>(s.channels, 1)); };
  // In the caches planes of some vectors are better walked one by one: their coefficients stay in registers. If there
  // is one phase, rows are as good for 16 bits, unless planes are of whole vectors.
  const bool whole_vectors = s.inner % kVector == 0 || bytes > 2;
  const bool apart = near && s.inner >= kFlatNear && (!one_phase || whole_vectors);
  flat = !s.valid && s.inner > 0 && s.inner <= kFlatInner && pool >= flat_samples(s.inner) && !apart;
  group = std::clamp<int64_t>(ceil_div(kRunBytes, plane), 1, std::clamp<int64_t>(s.channels, 1, kMaxPlanarChannels));
  while (group > 1 && group * plane * pool > cache.l2 / 2) --group;
  // Whole pieces for all threads, whose two phases in one walk are worth more than long strips; not of short planes,
  // unless they lie in the caches.
  if (!is_small(s) && (!flat || near) && pools == 1) group = std::min(group, ceil_div(s.channels, 8));
  fill_bytes();
  groups = ceil_div(s.channels, group);
  whole = group * plane * pool <= budget && (pools * groups >= 8 || is_small(s));
  // Not in strips too short for prefetchers.
  if (flat && !near && group < s.channels && group * plane < kRunBytes / 4) whole = whole && is_small(s);
  // Zeros are written in the order of memory, where what is valid stays in the last cache from phase to phase.
  const bool sparse = s.valid && !is_small(s) && s.samples * s.channels * plane <= cache.l3 / 2;
  if (whole && !one_phase && !sparse) return;
  whole = false;
  int64_t together = flat || sparse ? kMaxPlanarChannels : 1;
  if (one_phase) together = flat ? flat_channels(s.inner) : kPieceBytes / plane;
  // Enough pieces for all threads.
  if (one_phase && !flat && !is_small(s)) together = std::min(together, ceil_div(s.channels * pool, kShares));
  group = std::clamp<int64_t>(together, 1, std::max<int64_t>(s.channels, 1));
  if (one_phase && !flat) group = evened(s.channels, ceil_div(s.channels, group), 1);
  fill_bytes();
  groups = ceil_div(s.channels, group);
  const int64_t least = !flat ? 1 : one_phase ? 2 * kFlatSamples : 4 * kFlatSamples;
  block = std::clamp<int64_t>(std::max(least, kPieceBytes / (plane * group)), 1, std::max<int64_t>(pool, 1));
  block = evened(pool, ceil_div(pool, block), flat ? kFlatSamples : 1);
  blocks = ceil_div(pool, block);
  inner_block = std::clamp<int64_t>(s.inner, 1, kPieceBytes / bytes);
  if (inner_block < s.inner) inner_block = evened(s.inner, ceil_div(s.inner, inner_block), kColumns);
  inner_blocks = ceil_div(s.inner, inner_block);
}

void Plan::cut_interleaved(int64_t pool) {
  const Shape& s = shape;
  const Caches& cache = caches();
  const int64_t bytes = element_size(s.dtype), row = std::max<int64_t>(1, s.channels * bytes);
  group = s.channels;
  groups = std::min<int64_t>(s.channels, 1);  // no channels, no pieces
  whole = pool * s.channels < serial_elements(s.dtype) || (s.pools() >= 8 && pool * row <= cache.l3 / 8);
  if (whole) return;
  // In the caches a few long rows are cut by columns: one walk on all threads, where blocks of rows take two.
  const auto share_columns = [&] {
    whole = true;
    block = pool;
    const int64_t share = std::min(ceil_div(s.channels, 8), cache.l2 / 2 / (pool * bytes));
    group = std::max<int64_t>(1, ceil_div(share, kColumns)) * kColumns;
    groups = ceil_div(s.channels, group);
  };
  if (!one_phase && s.pools() == 1 && pool <= kFewRows && s.channels >= 4 * kColumns &&
      pool * row <= kNearRows * cache.l2)
    return share_columns();
  // Long enough for a block's sums to be little beside its rows.
  const int64_t least = std::clamp<int64_t>(pool / 16, 32, 128);
  block = std::min(pool, std::max({kPieceBytes / row, ceil_div(pool, kMaxBlocks), least}));
  block = std::max(least, std::min(block, ceil_div(pool, 8)));
  block = evened(pool, ceil_div(pool, block), 4);
  blocks = ceil_div(pool, block);
  if (blocks > 1 || s.channels <= kColumns) return;
  share_columns();  // so few and long are the rows
}

}  // namespace batchnorm
