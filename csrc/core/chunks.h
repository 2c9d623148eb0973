// What calls share that walk some channels at a time, each chunk on one thread with memory of its own.
#pragma once

#include "dtypes.h"
#include "norm_call.h"
#include "plan.h"

namespace batchnorm {

// Bytes, filled up to lines of the cache.
inline int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// A verb's threads, where a chunk is one thread's.
inline Parallel alone() {
  return {[](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, count); },
          nullptr};
}

// f(worker, begin, end): chunks [begin, end) are those of one worker, of which there are at most so many.
template <class F>
void for_chunks(int64_t chunks, int64_t threads, Parallel parallel, const F& f) {
  const int64_t workers = std::min(threads, chunks);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) f(w, w * chunks / workers, (w + 1) * chunks / workers);
  };
  workers <= 1 ? work(0, workers) : for_each(workers, parallel, work);
}

// What belongs to the channels from `channel` on.
inline Operand from_channel(Operand o, int64_t channel, int64_t size) {
  if (o) o.data = static_cast<char*>(o.data) + channel * o.channel_stride * size;
  return o;
}
inline Vector from_channel(Vector v, int64_t channel) {
  if (v.data) v.data = static_cast<const char*>(v.data) + channel * element_size(v.dtype);
  return v;
}

// A normalization of some channels from `channel` on; by statistics that are known if it is a population's, or if a
// forward has found them (`are_known`).
inline void normalize_by(const NormCall& norm, bool are_known, const Shape& s, const Operand& x, const Operand& y,
                         int64_t channel, double* workspace) {
  double *const mean = norm.mean + channel, *const var = norm.var + channel;
  const Vector gamma = from_channel(norm.gamma, channel), beta = from_channel(norm.beta, channel);
  if (norm.population || are_known)
    normalize(s, x, y, mean, var, gamma, beta, norm.eps, norm.fusion, workspace, alone(), !norm.population);
  else
    forward(s, x, y, mean, var, gamma, beta, norm.eps, norm.fusion, workspace, alone());
}

inline void gradient_by(const NormCall& norm, const Shape& s, const Operand& dy, const Operand& x, const Operand& dx,
                        double* gamma, double* beta, int64_t channel, double* workspace) {
  backward(s, dy, x, dx, {}, norm.mean + channel, norm.var + channel, from_channel(norm.gamma, channel),
           from_channel(norm.beta, channel), norm.eps, norm.fusion, norm.population, nullptr, nullptr, gamma + channel,
           beta + channel, workspace, alone());
}

}  // namespace batchnorm
