// A depthwise convolution and the batch normalization of its output, some channels at a time: what the convolution
// makes of them is normalized in the cache, and the backward makes it again instead of reading it. So may be the batch
// normalization of its input.
#pragma once

#include "norm_call.h"

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
  Operand x;                           // or absent
  double *kernels, *bias;              // (channels, taps), (channels); or absent
  double *gamma, *beta;                // (channels)
  double *before_gamma, *before_beta;  // the same of the normalization before it, where x is not absent
};

// Bytes of scratch memory for so many threads. The shape is that of the output (samples, channels, inner), all of whose
// samples are one pool; its order says how x, y and their gradients lie, those of rows without gaps: then the sample
// stride of an operand is that of all places of a sample.
size_t depthwise_workspace_size(const Shape&, const Depthwise&, bool has_before, int64_t threads);

// y = norm(depthwise(before(x))), each normalization with its activation; `before` may be absent.
void depthwise_forward(const Shape&, const Depthwise&, const DepthwiseInput&, const NormCall* before,
                       const NormCall& norm, const Operand& y, void* workspace, int64_t threads, Parallel);

void depthwise_backward(const Shape&, const Depthwise&, const DepthwiseInput&, const NormCall* before,
                        const NormCall& norm, const Operand& dy, const DepthwiseGradients&, void* workspace,
                        int64_t threads, Parallel);

}  // namespace batchnorm
