// The table that one instruction set fills: what the verbs call on a slab of one pool.
#pragma once

#include "batchnorm.h"

namespace batchnorm {

// Neighbouring places of one sample, counted from a slab's first.
struct Span {
  int64_t sample, first, inner;
};

// A slab: `samples` x `channels` x `inner` of one pool, pointers already at its first element.
struct Slab {
  int64_t samples, channels, inner;
  bool few;                     // the pool has so few values that roundings do not average out: see kernels.cpp
  const Span* spans = nullptr;  // planar: where given, so many spans in place of the samples
  Span span(int64_t n) const { return spans ? spans[n] : Span{n, 0, inner}; }
};

constexpr int64_t kMaxPlanarChannels = 64;  // of one planar slab

// Coefficients of a slab's channels, in the type that elements are computed in. A forward may read no mean: see
// `lines`.
struct NormalizeCoefficients {
  const void *mean, *scale, *shift;
  // For the gradient of relu, in the type of the vectors (float32, float64 for float64): z > 0 just where
  // (x xor flip) > threshold, flip being 0.0 or -0.0.
  const void *threshold, *flip;
  // Where a forward of float32 is computed in float32: mean, scale and shift are float32 (see `two_parts`), and these
  // are what scale and shift have lost. Absent: they are float64.
  const void *scale_rest = nullptr, *shift_rest = nullptr;
};

struct ApplyCoefficients {
  const void *k1, *k2, *k3;
};

// Whether gradients take no mean off: dx = k1 * dz + (k2 * x + k3), where k3 has the product of mean and k2. Values of
// bfloat16 that differ are at least 2^-8 of their mean apart, so what float32 loses of that product is little.
constexpr bool is_line_of_gradient(Dtype element) { return element == Dtype::bfloat16; }

// Whether an activation takes as long as several plain elements.
constexpr bool takes_exponential(Activation a) {
  return a == Activation::silu || a == Activation::gelu || a >= Activation::sigmoid;
}

// Which values the derivative of the activation is taken from.
enum class Gate : int { none, recompute, residual, signs };

struct KernelFusion {
  Activation activation;
  double slope;
  Operand residual;
  uint8_t* signs;         // at the slab's first bit
  int64_t signs_sample;   // their strides: in bytes
  int64_t signs_channel;  // and, of planes, in bits
  bool stream;            // write around the cache
  bool near;              // that of the plan
};

struct Kernels {
  // sums[c], sums[channels + c] += sum of (x - shift[c]) and of its square
  void (*moments)(const Slab&, const Operand& x, const double* shift, double* sums);
  void (*normalize)(const Slab&, const Operand& x, const Operand& y, const NormalizeCoefficients&, const KernelFusion&);
  // sums[c], sums[channels + c] += sum of dz and of dz * x; of float64 elements, and of 16-bit ones that are not few,
  // of dz * (x - mean[c]), where that mean must be a value of float32 for 16 bits. dz is kept where there is a place
  // for it, which may be that of dy.
  void (*reduce)(const Slab&, const Operand& dy, const Operand& x, const Operand& kept, const double* mean,
                 const NormalizeCoefficients&, const KernelFusion&, Gate, double* sums);
  void (*apply)(const Slab&, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                const NormalizeCoefficients&, const ApplyCoefficients&, const KernelFusion&, Gate);
  bool line;       // whether `normalize` takes the coefficients of `lines`
  bool two_parts;  // whether it takes those of `two_parts`, too
};

// What sums of a run of channels become; coefficients are in the compute type of the kernels.
struct CoefficientKernels {
  // mean, and sum of (x - mean)^2 / divisor, of `count` values whose sums are those of `moments`
  void (*statistics)(int64_t channels, double count, double divisor, const double* shift, const double* sum,
                     const double* square, double* mean, double* spread);
  // Zero in place of what is not finite.
  void (*finite)(int64_t channels, double* values);
  // The mean of NormalizeCoefficients alone.
  void (*means)(int64_t channels, const double* mean, void* to);
  // Those of NormalizeCoefficients: where the mean is rounded, what is left of it joins the shift.
  void (*normalize)(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta,
                    double eps, void* means, void* scales, void* shifts);
  // Scale and shift of NormalizeCoefficients where no mean is taken off: the shift of 0. It has the rounding of the
  // product of mean and scale, so a channel whose `own` variance is 0 has no scale, and gives beta.
  void (*lines)(int64_t channels, const double* mean, const double* var, const double* gamma, const double* beta,
                double eps, bool own, void* scales, void* shifts);
  // For z = (x - center) * scale + shift in float32, scale and shift in two parts each: center, both parts of the scale
  // and both of the shift, of scales that `lines` gives and of x's own statistics.
  void (*two_parts)(int64_t channels, const double* scales, const double* mean, const double* var, const double* beta,
                    float* const parts[5]);
  // Those of ApplyCoefficients, of given ones and of the sums of `reduce` over `count` values; of a `line` k3 has the
  // product of mean and k2.
  void (*apply)(int64_t channels, const double* mean, const double* k1, const double* k2, const double* k3, bool line,
                void* to_k1, void* to_k2, void* to_k3);
  // Adds what the sums of one pool are of the gradients of gamma and beta, as `parameters` does alone.
  void (*gradient)(int64_t channels, double count, const double* mean, const double* var, const double* gamma,
                   double eps, const double* sum_dz, const double* sum_dz_centered, bool line, void* k1, void* k2,
                   void* k3, double* d_gamma, double* d_beta);
  void (*parameters)(int64_t channels, const double* var, double eps, const double* sum_dz,
                     const double* sum_dz_centered, double* d_gamma, double* d_beta);
  // Thresholds and flips of NormalizeCoefficients, of type float32 or float64 by their size in bytes.
  void (*relu_gates)(int64_t channels, int64_t size, const double* mean, const double* var, const double* gamma,
                     const double* beta, double eps, void* thresholds, void* flips);
  // Values of `size` bytes, one a channel, for columns: each `each` times, and all of that `times` times.
  void (*spread)(int64_t channels, int64_t each, int64_t times, int64_t size, const void* from, void* to);
  // Values of such columns, added to those of their channels.
  void (*fold)(int64_t channels, int64_t each, int64_t times, const double* from, double* to);
  // Running statistics with carries, which take in the batch's times the factor: see running.h.
  void (*blend)(int64_t channels, double momentum, const double* batch, double factor, float* values, float* carries);
};

struct DepthwisePlanes;  // lattice.h
struct DepthwiseRows;
struct PoolingKernels;  // pooling.h

// [order][dtype]
struct KernelTable {
  const Kernels* of[2];
  const CoefficientKernels* coefficients;   // in float32, in float64
  const DepthwisePlanes* depthwise_planes;  // [dtype]
  const DepthwiseRows* depthwise_rows;
  const PoolingKernels* pooling;
  int64_t lanes;  // float32 values in a vector
};

const KernelTable& kernel_table();  // dispatch.cpp: that of the instruction set in use

const KernelTable* kernels_baseline();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_neon();

}  // namespace batchnorm
