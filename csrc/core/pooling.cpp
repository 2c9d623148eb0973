// Batch normalization with the largest values or the means of windows: chunks of channels, normalized into the cache
// and pooled there.
#include "pooling.h"

#include <algorithm>

#include "chunks.h"
#include "dtypes.h"
#include "kernels.h"
#include "plan.h"

namespace batchnorm {
namespace {

class Call {
 public:
  Call(const Shape& s, const Pooling& p)
      : shape_(s), pool_(p), kernels_(kernel_table().pooling[int(s.dtype)]), size_(element_size(s.dtype)) {
    const int64_t bytes = s.samples * s.inner * size_;
    chunk_ = std::clamp<int64_t>(
        std::min(caches().l2 / 2 / std::max<int64_t>(bytes, 1), std::max<int64_t>(s.channels / 32, 1)), 1, s.channels);
    const int64_t last = s.channels % chunk_;
    verbs_ = lines(8 * int64_t(std::max(workspace_size(of(chunk_)), last ? workspace_size(of(last)) : 0)));
    values_ = lines(chunk_ * bytes);
    const int64_t across = p.out[1] + p.kernel[1] + 1 + p.size[1] + p.padding[1] + 64;
    const int64_t rows = p.kernel[0] * p.stride[1] * across;
    scratch_ = lines(8 * std::max(rows, s.inner));
  }

  int64_t chunks() const { return ceil_div(shape_.channels, chunk_); }
  int64_t bytes() const { return verbs_ + values_ + scratch_; }

  // The memory of one thread: of the verbs, of the chunk's values, of the kernels.
  struct Memory {
    double* verbs;
    char *values, *scratch;
  };

  // f(first channel, channels, memory) for each chunk.
  template <class F>
  void each(void* workspace, int64_t threads, Parallel parallel, const F& f) const {
    for_chunks(chunks(), threads, parallel, [&](int64_t worker, int64_t begin, int64_t end) {
      char* const memory = static_cast<char*>(workspace) + worker * bytes();
      const Memory m{reinterpret_cast<double*>(memory), memory + verbs_, memory + verbs_ + values_};
      for (int64_t k = begin; k < end; ++k) f(k * chunk_, std::min(chunk_, shape_.channels - k * chunk_), m);
    });
  }

  Shape of(int64_t channels) const {
    Shape s = shape_;
    s.channels = channels;
    return s;
  }
  Operand dense(char* values, int64_t channels) const { return {values, channels * shape_.inner, shape_.inner}; }
  Operand from(const Operand& o, int64_t channel) const { return from_channel(o, channel, size_); }

  // f(plane of the chunk's values, plane of y, its places) for each.
  template <class F>
  void for_planes(const Operand& y, int64_t channel, int64_t channels, char* values, const F& f) const {
    const int64_t out = pool_.out[0] * pool_.out[1];
    for (int64_t n = 0; n < shape_.samples; ++n)
      for (int64_t c = 0; c < channels; ++c)
        f(values + (n * channels + c) * shape_.inner * size_,
          static_cast<char*>(y.data) + (n * y.sample_stride + (channel + c) * y.channel_stride) * size_,
          (n * shape_.channels + channel + c) * out);
  }

  const PoolingKernels& kernels() const { return kernels_; }

 private:
  Shape shape_;
  Pooling pool_;
  const PoolingKernels& kernels_;
  int64_t size_, chunk_;              // bytes of an element; channels
  int64_t verbs_, values_, scratch_;  // bytes
};

}  // namespace

size_t pooled_workspace_size(const Shape& shape, const Pooling& pool, int64_t threads) {
  const Call call(shape, pool);
  return size_t(std::min(threads, call.chunks()) * call.bytes());
}

void pooled_forward(const Shape& shape, const Pooling& pool, const Operand& x, const NormCall& norm, const Operand& y,
                    uint8_t* places, void* workspace, int64_t threads, Parallel parallel) {
  const Call call(shape, pool);
  call.each(workspace, threads, parallel, [&](int64_t channel, int64_t channels, const Call::Memory& m) {
    normalize_by(norm, false, call.of(channels), call.from(x, channel), call.dense(m.values, channels), channel,
                 m.verbs);
    call.for_planes(y, channel, channels, m.values, [&](char* plane, char* to, int64_t at) {
      call.kernels().reduce(pool, plane, to, pool.mean ? nullptr : places + at, m.scratch);
    });
  });
}

void pooled_backward(const Shape& shape, const Pooling& pool, const Operand& dy, const uint8_t* places,
                     const Operand& x, const NormCall& norm, const Operand& dx, double* gamma, double* beta,
                     void* workspace, int64_t threads, Parallel parallel) {
  const Call call(shape, pool);
  call.each(workspace, threads, parallel, [&](int64_t channel, int64_t channels, const Call::Memory& m) {
    call.for_planes(dy, channel, channels, m.values, [&](char* plane, char* from, int64_t at) {
      call.kernels().scatter(pool, from, pool.mean ? nullptr : places + at, plane, m.scratch);
    });
    gradient_by(norm, call.of(channels), call.dense(m.values, channels), call.from(x, channel), call.from(dx, channel),
                gamma, beta, channel, m.verbs);
  });
}

}  // namespace batchnorm
