// Running statistics, the estimate of the population, on raw pointers.
#pragma once

#include "batchnorm.h"

namespace batchnorm {

// Of one batch: mean and biased variance of each pool, (pools, channels), and the number of values of a channel, in all
// pools and in each but the last, which has the rest.
struct BatchStatistics {
  int64_t pools, channels, count, pool_count;
  const double *mean, *var;
};

// A running statistic, (channels); none where there is no data. The carry is what rounding left of each value: the
// statistic is value + carry. It is float64 beside float64, else float32; without it, what rounding left is lost, and a
// step of less than half a unit in the last place changes nothing. A carry counts as 0 where value + carry does not
// round to the value: then somebody else has written the value.
struct RunningStatistic {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  void* carry = nullptr;
};

// running = (1 - momentum) * running + momentum * batch, the batch being all its pools merged; the variance biased, or
// unbiased. Rounded once, to the running statistic's type.
void update_statistics(const BatchStatistics&, double momentum, bool unbiased, const RunningStatistic& running_mean,
                       const RunningStatistic& running_var, Parallel);

// The same of rows of statistics that are given as they are, (rows, channels): the momentum of each row or value, and
// which values are taken in, the others staying as they are. Steps of 0 repeat a row, or a value.
struct RowSteps {
  int64_t row, channel;
};
struct Mixture {
  int64_t rows, channels;
  const double *batch, *momentum;
  RowSteps momentum_steps;
  const bool* accepted;
  RowSteps accepted_steps;
};
void mix_statistics(const Mixture&, const RunningStatistic&);

}  // namespace batchnorm
