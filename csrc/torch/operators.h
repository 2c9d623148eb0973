// The operators' arguments by name, in the order of their schemas in src/batchnorm/ops/schemas.py, and the operators as
// functions: csrc/autograd calls them without the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../core/depthwise.h"
#include "../core/pooling.h"

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
  bool own;  // the statistics are x's own: the bits of `forward`
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

struct CountMomentsArguments {
  Tensor x;
  int64_t pool_size;
  OptionalTensor mask;
};

struct NormalizeMergedArguments {
  Tensor x, parts;
  OptionalTensor weight, bias, residual;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  int64_t groups;
  bool save_signs;
  OptionalTensor mask;
};

struct ReduceMergedArguments {
  Tensor dy, x;
  OptionalTensor weight, bias, residual, signs;
  Tensor mean, var;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  OptionalTensor mask;
};

struct BackwardMergedArguments {
  Tensor dy, x;
  OptionalTensor weight, bias, residual, signs;
  Tensor mean, var, sums, count;
  int64_t pool_size;
  double eps;
  int64_t activation;
  double slope;
  bool want_residual;
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

// An input that lies in parts, one after the other along the channels. All else is of all channels.
struct ForwardParts {
  std::vector<Tensor> parts;
  std::vector<bool> are_measured;  // whether mean and var hold the statistics of a part already
  Tensor y, mean, var;
  OptionalTensor weight, bias;
  double eps;
  int64_t activation;
  double slope;
  bool population;
};

struct BackwardParts {
  Tensor dy;
  std::vector<Tensor> parts;
  Tensor mean, var;
  OptionalTensor weight, bias;
  double eps;
  int64_t activation;
  double slope;
  bool population;
  std::vector<bool> wanted;  // of which parts the gradient is
  double *d_weight, *d_bias;
};

struct Operators {
  // y, mean, var, signs. y is the given one, if that lies in memory as a result does.
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*forward)(const ForwardArguments&, const OptionalTensor& y);
  std::tuple<Tensor, Tensor> (*normalize)(const NormalizeArguments&);  // y, signs
  // dx, d_residual, d_weight, d_bias. If nobody else reads dy (`over_dy`), the residual's gradient, or else dx,
  // takes its place if dy lies in memory as it would. They lie as x and dy do, if these lie alike. Without
  // `want_parameters` the last two are empty.
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*backward)(const BackwardArguments&, bool over_dy, bool want_parameters);
  std::tuple<Tensor, Tensor> (*moments)(const MomentsArguments&);                 // mean, m2
  std::tuple<Tensor, Tensor> (*backward_reduce)(const BackwardReduceArguments&);  // sums of dz and of dz (x - mean)
  std::tuple<Tensor, Tensor> (*backward_apply)(const BackwardApplyArguments&);    // dx, d_residual
  void (*update_statistics)(const UpdateStatisticsArguments&);
  // Into a tensor that lies as a result does; it may be the residual.
  void (*normalize_into)(const NormalizeArguments&, const Tensor& y);
  void (*forward_parts)(const ForwardParts&);
  std::vector<OptionalTensor> (*backward_parts)(const BackwardParts&);  // the parts' gradients, where wanted
  void (*advise)(const Tensor&);                                        // asks for huge pages where a result is large
  Parallel (*parallel)();                                               // all threads of torch
  decltype(&batchnorm::depthwise_workspace_size) depthwise_workspace_size;
  decltype(&batchnorm::depthwise_forward) depthwise_forward;
  decltype(&batchnorm::depthwise_backward) depthwise_backward;
  decltype(&batchnorm::pooled_workspace_size) pooled_workspace_size;
  decltype(&batchnorm::pooled_forward) pooled_forward;
  decltype(&batchnorm::pooled_backward) pooled_backward;
};

}  // namespace batchnorm
