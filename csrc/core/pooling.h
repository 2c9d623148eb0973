// A batch normalization and the largest values or the means of windows of its output, some channels at a time: the
// output itself lies in the caches alone.
#pragma once

#include "norm_call.h"

namespace batchnorm {

constexpr int64_t kMostPlaces = 255;  // of a window

// Windows on planes; of each pair the first is that of the rows. Around the planes lies what is smaller than all else;
// a window may reach beyond it.
struct Pooling {
  int64_t size[2], out[2];  // of a plane, and of the result
  int64_t kernel[2], stride[2], padding[2];
  bool mean;  // of the windows, which then lie inside; else their largest values
};

// Bytes of scratch memory for so many threads. The shape is that of the input, all of whose samples are one pool.
size_t pooled_workspace_size(const Shape&, const Pooling&, int64_t threads);

// y = the mean of each window of norm(x), or its largest value: the first, or the last that is no number. Of that
// `places` tells which, for each value of y, counted from the window's first; it is dense.
void pooled_forward(const Shape&, const Pooling&, const Operand& x, const NormCall&, const Operand& y, uint8_t* places,
                    void* workspace, int64_t threads, Parallel);

// dx may be absent.
void pooled_backward(const Shape&, const Pooling&, const Operand& dy, const uint8_t* places, const Operand& x,
                     const NormCall&, const Operand& dx, double* gamma, double* beta, void* workspace, int64_t threads,
                     Parallel);

// Of planes of one channel.
struct PoolingKernels {
  void (*reduce)(const Pooling&, const void* plane, void* y, uint8_t* places, void* scratch);
  // The gradient of a plane; the scratch memory is one plane of the type that is computed in.
  void (*scatter)(const Pooling&, const void* dy, const uint8_t* places, void* plane, void* scratch);
};

}  // namespace batchnorm
