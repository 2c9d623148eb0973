// The operators' arguments by name, in the order of their schemas in src/batchnorm/ops/schemas.py, and the operators as
// functions: csrc/autograd calls them without the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace batchnorm {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct MomentsArguments {
  Tensor x;
  int64_t pool_size;
  OptionalTensor mask;
};

struct NormalizeArguments {
  Tensor x, mean, var;
  OptionalTensor weight, bias, residual;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  bool save_signs;
  OptionalTensor mask;
};

struct ForwardArguments {
  Tensor x;
  OptionalTensor weight, bias, residual;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  bool save_signs;
  OptionalTensor mask;
};

struct BackwardReduceArguments {
  Tensor dy, x;
  OptionalTensor weight, bias, residual, signs;
  Tensor mean, var;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  OptionalTensor mask;
};

struct BackwardApplyArguments {
  Tensor dy, x;
  OptionalTensor weight, bias, residual, signs;
  Tensor mean, var, k1, k2, k3;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  bool want_residual;
  OptionalTensor mask;
};

struct BackwardArguments {
  Tensor dy, x;
  OptionalTensor weight, bias, residual, signs;
  Tensor mean, var;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  bool population, want_x, want_residual;
  OptionalTensor mask;
};

struct UpdateStatisticsArguments {
  OptionalTensor running_mean, running_var, num_batches_tracked;
  Tensor mean, var;
  int64_t count, pool_count;
  std::optional<double> momentum;
  bool unbiased;
  OptionalTensor carry;
};

struct MixStatisticsArguments {
  Tensor running_mean, running_var, mean, var, momentum, accepted;
  OptionalTensor carry;
};

struct ForwardOutArguments {
  Tensor x;
  OptionalTensor weight, bias, residual;
  Tensor y, mean, var;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
};

struct BackwardOutArguments {
  Tensor dy, x;
  OptionalTensor weight, bias;
  Tensor mean, var, dx, sum_dz, sum_dz_centered;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
};

struct Operators {
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*forward)(const ForwardArguments&);    // y, mean, var, signs
  std::tuple<Tensor, Tensor> (*normalize)(const NormalizeArguments&);                // y, signs
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*backward)(const BackwardArguments&);  // dx, d_residual, d_weight, d_bias
  void (*update_statistics)(const UpdateStatisticsArguments&);
};

}  // namespace batchnorm
