// The table that one instruction set fills: what the scheduler calls on a slab of one pool.
#pragma once

#include "batchnorm.h"

namespace batchnorm {

// A slab: `samples` x `channels` x `inner` of one pool, pointers already at its first element.
struct Slab {
  int64_t samples, channels, inner;
  bool few;  // the pool has so few values that roundings do not average out: see kernels.cpp
};

constexpr int64_t kMaxPlanarChannels = 64;  // of one planar slab

// Coefficients of a slab's channels, in the type that elements are computed in.
struct NormalizeCoefficients {
  const void *mean, *scale, *shift;
  // For the gradient of relu, in the type of the vectors (float32, float64 for float64): z > 0 just where
  // (x xor flip) > threshold, flip being 0.0 or -0.0.
  const void *threshold, *flip;
};

struct ApplyCoefficients {
  const void *k1, *k2, *k3;
};

// Which values the derivative of the activation is taken from.
enum class Gate : int { none, recompute, residual, signs };

struct KernelFusion {
  Activation activation;
  double slope;
  Operand residual;
  uint8_t* signs;                       // at the slab's first run
  int64_t signs_sample, signs_channel;  // strides of runs in bytes
  bool stream;                          // write around the cache
};

struct Kernels {
  // sums[c], sums[channels + c] += sum of (x - shift[c]) and of its square
  void (*moments)(const Slab&, const Operand& x, const double* shift, double* sums);
  void (*normalize)(const Slab&, const Operand& x, const Operand& y, const NormalizeCoefficients&, const KernelFusion&);
  // sums[c], sums[channels + c] += sum of dz and of dz * (x - mean[c]); where 16-bit elements are not few, the mean is
  // rounded to float32
  void (*reduce)(const Slab&, const Operand& dy, const Operand& x, const double* mean, const NormalizeCoefficients&,
                 const KernelFusion&, Gate, double* sums);
  void (*apply)(const Slab&, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                const NormalizeCoefficients&, const ApplyCoefficients&, const KernelFusion&, Gate);
};

// [order][dtype]
struct KernelTable {
  Kernels of[2][4];
  int64_t lanes;  // float32 values in a vector
};

const KernelTable* kernels_baseline();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_neon();

}  // namespace batchnorm
