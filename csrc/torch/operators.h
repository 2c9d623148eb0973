// The operators as functions, for csrc/autograd, which calls them without the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace batchnorm {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Operators {
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*forward)(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                        OptionalTensor residual, int64_t pool_size, double eps,
                                                        int64_t activation, double slope, bool save_signs,
                                                        OptionalTensor mask);
  std::tuple<Tensor, Tensor> (*normalize)(Tensor x, Tensor mean, Tensor var, OptionalTensor weight, OptionalTensor bias,
                                          OptionalTensor residual, int64_t pool_size, double eps, int64_t activation,
                                          double slope, bool save_signs, OptionalTensor mask);
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*backward)(Tensor dy, Tensor x, OptionalTensor weight,
                                                         OptionalTensor bias, OptionalTensor residual,
                                                         OptionalTensor signs, Tensor mean, Tensor var,
                                                         int64_t pool_size, double eps, int64_t activation,
                                                         double slope, bool population, bool want_x, bool want_residual,
                                                         OptionalTensor mask);
  void (*update_statistics)(OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked,
                            Tensor mean, Tensor var, int64_t count, int64_t pool_count, std::optional<double> momentum,
                            bool unbiased);
};

}  // namespace batchnorm
