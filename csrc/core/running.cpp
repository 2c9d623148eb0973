#include "running.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "dtypes.h"
#include "kernels.h"

namespace batchnorm {
namespace {

constexpr int64_t kBlock = 64;            // channels that one thread takes at least
constexpr int64_t kSerialValues = 16384;  // statistics of pools that are not worth a second thread

// All pools of up to kMost channels as one, by Chan's merge in the order of the pools; until the end `var` holds sums
// of squares.
struct Merged {
  static constexpr int64_t kMost = 512;
  double count = 0, mean[kMost] = {}, var[kMost] = {};

  Merged(const BatchStatistics& batch, int64_t channel, int64_t channels) {
    for (int64_t pool = 0; pool < batch.pools; ++pool) {
      const double part = double(std::min(batch.pool_count, batch.count - pool * batch.pool_count));
      const double share_of_part = part / (count + part);
      const double* const means = batch.mean + pool * batch.channels + channel;
      const double* const vars = batch.var + pool * batch.channels + channel;
      for (int64_t k = 0; k < channels; ++k) {
        const double delta = means[k] - mean[k];
        var[k] += vars[k] * part + delta * delta * count * share_of_part;
        mean[k] += delta * share_of_part;
      }
      count += part;
    }
    for (int64_t k = 0; k < channels; ++k) var[k] /= count;
  }
};

template <class Value>
using CarryOf = std::conditional_t<std::is_same_v<Value, double>, double, float>;

// v as a value of that type, as float64.
template <class Value>
double rounded(double v) {
  Value value;
  store(v, &value);
  return value_of(value);
}

// What the batch's statistic is multiplied by comes last.
template <class Value>
void mix(Value* value, double momentum, double batch, double factor = 1) {
  store((1 - momentum) * value_of(*value) + momentum * batch * factor, value);
}

// The same of value + carry. It starts from the one of the two that has the larger share, so that little is lost where
// they cancel, and adds the change to it as a sum in two parts (Knuth's two-sum).
template <class Value>
void mix(Value* value, CarryOf<Value>* carry, double momentum, double batch) {
  const double old = value_of(*value);
  const double rest = rounded<Value>(old + *carry) == old ? double(*carry) : 0;
  const bool is_small = momentum <= 0.5;
  const double base = is_small ? old : batch;
  const double change = is_small ? rest + momentum * ((batch - old) - rest) : (1 - momentum) * ((old - batch) + rest);
  const double sum = base + change, added = sum - base;
  const double lost = (base - (sum - added)) + (change - added);
  // The difference of two infinite values is no number, where their weighted sum is infinite.
  store(sum - sum == 0 ? sum : (1 - momentum) * old + momentum * batch, value);
  const double kept = value_of(*value), left = (sum - kept) + lost;
  auto next = CarryOf<Value>(left - left == 0 ? left : 0);
  // Rounding the carry may have brought the sum to the middle between two values, and so to the other one.
  if (rounded<Value>(kept + next) != kept) next *= CarryOf<Value>(1) - 2 * std::numeric_limits<float>::epsilon();
  *carry = next;
}

// f(values, carries) on arrays of the statistic's type; carries are null where there are none.
template <class F>
void with_carry(const RunningStatistic& running, const F& f) {
  if (!running.data) return;
  with_type(running.dtype, running.data, [&](auto* values) {
    using Carry = CarryOf<std::remove_pointer_t<decltype(values)>>;
    f(values, static_cast<Carry*>(running.carry));
  });
}

// The batch's statistics are multiplied by the factor.
void mix(const RunningStatistic& running, int64_t channel, int64_t channels, double momentum, double factor,
         const double* batch) {
  with_carry(running, [&](auto* values, auto* carries) {
    values += channel;
    if (carries) carries += channel;
    if constexpr (std::is_same_v<decltype(values), float*>)
      if (carries) return kernel_table().coefficients->blend(channels, momentum, batch, factor, values, carries);
    for (int64_t k = 0; k < channels; ++k)
      carries ? mix(values + k, carries + k, momentum, batch[k] * factor) : mix(values + k, momentum, batch[k], factor);
  });
}

}  // namespace

void update_statistics(const BatchStatistics& batch, double momentum, bool unbiased,
                       const RunningStatistic& running_mean, const RunningStatistic& running_var, Parallel parallel) {
  const double correction = unbiased && batch.count > 1 ? double(batch.count) / double(batch.count - 1) : 1.0;
  const auto mix_channels = [&](int64_t begin, int64_t end) {
    if (batch.pools == 1) {
      mix(running_mean, begin, end - begin, momentum, 1, batch.mean + begin);
      mix(running_var, begin, end - begin, momentum, correction, batch.var + begin);
      return;
    }
    for (int64_t c = begin; c < end; c += Merged::kMost) {
      const int64_t width = std::min(Merged::kMost, end - c);
      const Merged merged(batch, c, width);
      mix(running_mean, c, width, momentum, 1, merged.mean);
      mix(running_var, c, width, momentum, correction, merged.var);
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

void mix_statistics(const Mixture& m, const RunningStatistic& running) {
  with_carry(running, [&](auto* values, auto* carries) {
    for (int64_t row = 0; row < m.rows; ++row)
      for (int64_t c = 0; c < m.channels; ++c) {
        if (!m.accepted[row * m.accepted_steps.row + c * m.accepted_steps.channel]) continue;
        const double momentum = m.momentum[row * m.momentum_steps.row + c * m.momentum_steps.channel];
        const int64_t i = row * m.channels + c;
        carries ? mix(values + i, carries + i, momentum, m.batch[i]) : mix(values + i, momentum, m.batch[i]);
      }
  });
}

}  // namespace batchnorm
