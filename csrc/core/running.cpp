// Running statistics: what a batch makes of the estimate of the population.
#include <algorithm>

#include "dtypes.h"

namespace batchnorm {
namespace {

constexpr int64_t kBlock = 64;            // channels that one thread takes at least
constexpr int64_t kSerialValues = 16384;  // statistics of pools that are not worth a second thread

// All pools of up to kMost channels as one, by Chan's merge in the order of the pools.
struct Merged {
  static constexpr int64_t kMost = 512;
  double count = 0, mean[kMost] = {}, m2[kMost] = {};

  Merged(const BatchStatistics& batch, int64_t channel, int64_t channels) {
    for (int64_t pool = 0; pool < batch.pools; ++pool) {
      const double part = double(std::min(batch.pool_count, batch.count - pool * batch.pool_count));
      const double share_of_part = part / (count + part);
      const double* const means = batch.mean + pool * batch.channels + channel;
      const double* const vars = batch.var + pool * batch.channels + channel;
      for (int64_t k = 0; k < channels; ++k) {
        const double delta = means[k] - mean[k];
        m2[k] += vars[k] * part + delta * delta * count * share_of_part;
        mean[k] += delta * share_of_part;
      }
      count += part;
    }
  }
};

// batch(k) is the batch's statistic of the channel k after the first.
template <class Batch>
void mix(const RunningStatistic& running, int64_t channel, int64_t channels, double momentum, const Batch& batch) {
  if (!running.data) return;
  with_type(running.dtype, running.data, [&](auto* values) {
    for (int64_t k = 0; k < channels; ++k) {
      auto* const value = values + channel + k;
      store((1 - momentum) * value_of(*value) + momentum * batch(k), value);
    }
  });
}

}  // namespace

void update_statistics(const BatchStatistics& batch, double momentum, bool unbiased,
                       const RunningStatistic& running_mean, const RunningStatistic& running_var, Parallel parallel) {
  const double correction = unbiased && batch.count > 1 ? double(batch.count) / double(batch.count - 1) : 1.0;
  const auto mix_channels = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += Merged::kMost) {
      const int64_t width = std::min(Merged::kMost, end - c);
      const Merged merged(batch, c, width);
      mix(running_mean, c, width, momentum, [&](int64_t k) { return merged.mean[k]; });
      mix(running_var, c, width, momentum, [&](int64_t k) { return merged.m2[k] / merged.count * correction; });
    }
  };
  if (batch.pools * batch.channels < kSerialValues) return mix_channels(0, batch.channels);
  const auto body = [&](int64_t begin, int64_t end) {
    mix_channels(begin * kBlock, std::min(end * kBlock, batch.channels));
  };
  using Body = decltype(body);
  parallel.run(
      parallel.self, (batch.channels + kBlock - 1) / kBlock,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace batchnorm
