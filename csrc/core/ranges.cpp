#include "ranges.h"

#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace batchnorm {

double valid_share(const Shape& s) {
  if (!s.valid || s.samples * s.inner == 0) return 1;
  int64_t count = 0;
  for (int64_t i = 0; i < s.valid_count; ++i) count += s.valid[i].end - s.valid[i].begin;
  return double(count) / double(s.samples * s.inner);
}

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

void count_values(const Plan& plan, double* counts) {
  for (int64_t pool = 0; pool < plan.shape.pools(); ++pool) {
    int64_t count = 0;
    const auto add = [&](int64_t begin, int64_t end) { count += end - begin; };
    for_ranges(plan.shape, plan.pool_begin(pool), plan.pool_begin(pool + 1), add, no_gap);
    counts[pool] = double(count);
  }
}

Place find_valid(const Plan& plan, int64_t pool, int half) {
  const Shape& s = plan.shape;
  const int64_t begin = plan.pool_begin(pool), end = std::max(plan.pool_begin(pool + 1), begin + 1);
  int64_t at = half == 0 ? begin : half == 1 ? begin + (end - begin) / 2 : end - 1;
  if (s.valid) {
    const Range* range = first_range(s, at);
    if (range == s.valid + s.valid_count || range->begin >= end) --range;
    at = std::clamp(at, std::max(begin, range->begin), std::min(end, range->end) - 1);
  }
  return {at / s.inner, at % s.inner};
}

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
#else
  (void)around_cache;
#endif
  plain(bytes);
}

void clear(const Plan& plan, const Piece& rows, const Operand& o, bool around_cache) {
  if (!o) return;
  char* const data = static_cast<char*>(plan.operand(o, rows).data);
  const int64_t size = element_size(plan.shape.dtype);
  if (o.sample_stride == rows.channels) return write(data, nullptr, rows.samples * rows.channels * size, around_cache);
  for (int64_t n = 0; n < rows.samples; ++n)
    write(data + n * o.sample_stride * size, nullptr, rows.channels * size, around_cache);
}

}  // namespace batchnorm
