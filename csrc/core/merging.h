// Statistics whose pools reach over ranks: what was gathered becomes one mean and variance, and sums that go out and
// come back become gradients. Plain loops over a few values for each channel.
#pragma once

#include <cmath>
#include <cstdint>

namespace batchnorm {

// Chan's merge of `ranks` parts, each of counts, means and sums of squares for `size` statistics one after the other.
// A part without values has no say, whatever its mean. One part alone stays as it is.
inline void merge_parts(int64_t ranks, int64_t size, const double* parts, double* count, double* mean, double* var) {
  for (int64_t i = 0; i < size; ++i) {
    const double* const own = parts + i;
    double total = 0, merged = 0, m2 = 0;
    for (int64_t r = 0; r < ranks; ++r) total += own[3 * r * size];
    const double divisor = total > 0 ? total : 1;
    if (ranks == 1) {
      merged = own[size];
      m2 = own[2 * size];
    } else {
      for (int64_t r = 0; r < ranks; ++r)
        if (const double n = own[3 * r * size]; n > 0) merged += n / divisor * own[(3 * r + 1) * size];
      for (int64_t r = 0; r < ranks; ++r) {
        const double n = own[3 * r * size], away = own[(3 * r + 1) * size] - merged;
        m2 += n > 0 ? own[(3 * r + 2) * size] + n * (away * away) : own[(3 * r + 2) * size];
      }
    }
    count[i] = total;
    mean[i] = merged;
    var[i] = m2 / divisor;
  }
}

// Sums of dz and of dz (x - mean), (pools, channels) each: the gradients of beta and gamma of this rank, and in place
// gamma times the sums, which all ranks add up. gamma is null where it is 1.
inline void weigh_sums(int64_t pools, int64_t channels, const double* var, double eps, const double* gamma, double* sum,
                       double* centered, double* d_gamma, double* d_beta) {
  for (int64_t c = 0; c < channels; ++c) d_gamma[c] = d_beta[c] = 0;
  for (int64_t p = 0; p < pools; ++p)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = p * channels + c;
      d_gamma[c] += centered[i] * (1 / std::sqrt(var[i] + eps));
      d_beta[c] += sum[i];
      if (!gamma) continue;
      sum[i] *= gamma[c];
      centered[i] *= gamma[c];
    }
}

// The coefficients of backward_apply out of these sums over all ranks and the number of values.
inline void merged_coefficients(int64_t pools, int64_t channels, const double* var, double eps, const double* gamma,
                                const double* sum, const double* centered, const double* count, double* k1, double* k2,
                                double* k3) {
  for (int64_t p = 0; p < pools; ++p)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = p * channels + c;
      const double inv_std = 1 / std::sqrt(var[i] + eps), n = count[i] > 0 ? count[i] : 1;
      k1[i] = gamma ? gamma[c] * inv_std : inv_std;
      k2[i] = -(inv_std * inv_std * inv_std) * centered[i] / n;
      k3[i] = -inv_std * sum[i] / n;
    }
}

}  // namespace batchnorm
