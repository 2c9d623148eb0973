// A depthwise convolution and the batch normalization of its output, some channels at a time: what the convolution
// makes of them is normalized in the cache, and the backward makes it again instead of reading it.
#pragma once

#include "batchnorm.h"

namespace batchnorm {

constexpr int64_t kMostTaps = 256;  // values of one kernel

// Each channel of x, planes of height x width, is convolved with a kernel of its own; around the planes lie zeros.
// Of each pair the first is that of the rows.
struct Depthwise {
  int64_t size[2], out[2];  // of a plane of x, and of the output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// Elements of the dtype of x: kernels (channels, taps), and a value that is added for each channel, or none.
struct DepthwiseInput {
  Operand x;
  const void *kernels, *bias;
};

struct DepthwiseGradients {
  Operand x;                        // or absent
  double *kernels, *bias;           // (channels, taps), (channels); or absent
  double *gamma, *beta;             // (channels)
};

// Bytes of scratch memory for so many threads. The shape is that of the output, all of whose samples are one pool.
size_t depthwise_workspace_size(const Shape&, const Depthwise&, int64_t threads);

// y = activation(BN(depthwise(x))); with `population` by the given statistics, else by the batch's, which it writes.
void depthwise_forward(const Shape&, const Depthwise&, const DepthwiseInput&, const Operand& y, double* mean,
                       double* var, Vector gamma, Vector beta, double eps, const Fusion&, bool population,
                       void* workspace, int64_t threads, Parallel);

void depthwise_backward(const Shape&, const Depthwise&, const DepthwiseInput&, const Operand& dy, const double* mean,
                        const double* var, Vector gamma, Vector beta, double eps, const Fusion&, bool population,
                        const DepthwiseGradients&, void* workspace, int64_t threads, Parallel);

}  // namespace batchnorm
