// A batch normalization as a part of a larger call.
#pragma once

#include "batchnorm.h"

namespace batchnorm {

// By the given statistics of the population, or by the batch's, which a forward writes.
struct NormCall {
  double *mean, *var;
  Vector gamma, beta;
  double eps;
  Fusion fusion;  // without a residual
  bool population;
};

}  // namespace batchnorm
