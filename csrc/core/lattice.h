// How planes are laid out for a depthwise convolution, and the kernels that walk them.
//
// A plane with its border of zeros is parted by the strides into phases: phase (a, b) holds every stride-th row from a
// on and every stride-th column from b on. Then the value of tap t for output i lies at i + shift[t] of one phase: a
// convolution is a sum of shifted runs, whatever its stride, and so are both of its gradients. Output i is row
// i / pitch and column i % pitch; what lies in columns or rows beyond the output's is computed and left.
#pragma once

#include "depthwise.h"

namespace batchnorm {

struct Lattice {
  Depthwise d;
  int64_t pitch, rows, plane;  // of one phase of a plane: values of a row, rows, all
  int64_t phases, group;       // samples that are walked as one run
  int64_t phase;               // values from one phase of a group to the next
  int64_t reach;               // the largest shift
  int64_t taps;
  int64_t at[kMostTaps], shift[kMostTaps], phase_of[kMostTaps];  // at: phase_of * phase + shift

  explicit Lattice(const Depthwise&, int64_t samples);
  // Kernels of 3 x 3 and 5 x 5 without steps are unrolled, some rows of the output at a time.
  bool is_unrolled() const {
    const auto steps = [&](int axis) { return d.stride[axis] != 1 || d.dilation[axis] != 1; };
    return d.kernel[0] == d.kernel[1] && (d.kernel[0] == 3 || d.kernel[0] == 5) && !steps(0) && !steps(1) &&
           d.padding[0] < d.kernel[0] && d.padding[1] < d.kernel[1] && d.out[0] >= kRows && d.size[0] >= kRows;
  }
  // Values of scratch memory: all phases; a run for each column of them; a run with `reach` zeros before it.
  int64_t input_size() const { return phases * phase; }
  int64_t run_size() const { return phase; }
  int64_t results_size() const { return d.stride[1] * run_size(); }
  int64_t scratch_size() const { return input_size() + results_size() + reach_before() + run_size(); }
  int64_t reach_before() const { return (reach + kSlack - 1) / kSlack * kSlack; }
  static constexpr int64_t kSlack = 64;  // values that a walk may go too far
  static constexpr int64_t kRows = 4;    // of the output, at a time
  static constexpr int64_t kRun = 4096;  // values of a group, if planes are short
};

// Planes of one channel: those of so many samples.
struct Planes {
  void* data;
  int64_t stride;  // in elements
};

// Rows of as many channels as a vector of float32 or float64 has lanes, one row a place; strides in elements.
struct ChannelRows {
  void* data;
  int64_t sample, place;
};

// Planes of as many channels, or of fewer.
struct ChannelPlanes {
  void* data;
  int64_t sample, channel;
};

// Of planes of one channel.
struct DepthwisePlanes {
  // out = bias + convolution of x. The scratch memory is zero at first, and only these write to it.
  void (*convolve)(const Lattice&, int64_t samples, Planes x, const void* weights, const void* bias, Planes out,
                   void* scratch);
  // The gradient of x, or none; adds the gradient of the weights to d_weights, if there is a place for it. `back` is
  // the lattice of the convolution that turns the gradient of an unrolled one back into that of x.
  void (*gradients)(const Lattice&, const Lattice& back, int64_t samples, Planes x, const void* weights, Planes d_out,
                    Planes dx, double* d_weights, double* d_bias, void* scratch);
};

// Of a vector of channels: weights (taps, lanes), and the bias (lanes) or none.
struct DepthwiseRows {
  void (*convolve)(const Depthwise&, int64_t samples, ChannelRows x, const void* weights, const void* bias,
                   ChannelRows out);
  // dx takes the place of x, or of nothing. Adds to d_weights, (taps, lanes), and to d_bias.
  void (*gradients)(const Depthwise&, int64_t samples, ChannelRows x, const void* weights, ChannelRows d_out,
                    ChannelRows dx, double* d_weights, double* d_bias);
  // Planes of so many channels, at most `lanes`, as rows, and back.
  void (*turn)(int64_t samples, int64_t channels, int64_t places, const ChannelPlanes&, const ChannelRows&);
  void (*turn_back)(int64_t samples, int64_t channels, int64_t places, const ChannelRows&, const ChannelPlanes&);
  int64_t lanes;
};

}  // namespace batchnorm
