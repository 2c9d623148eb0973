// The verbs of batch normalization on raw pointers. No torch, no Python, no allocation, no threads of its own.
//
// A tensor is seen as samples x channels x inner. In planar order (N, C, *space) the inner axis is contiguous; in
// interleaved order (N, C) and (N, *space, C) the channels are contiguous, a sample is one row and inner is 1.
// A pool is a run of `pool_size` samples: values of one channel in one pool share one mean and one variance.
// Statistics are float64, of shape (pools, channels).
// A result may take the place of an operand that has its strides: y that of x or of the residual (normalize, forward),
// dx or d_residual that of dy (backward, backward_apply); not where only some positions are valid.
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm {

enum class Dtype : int { float32, float64, bfloat16, float16 };
enum class Order : int { planar, interleaved };
enum class Activation : int {
  identity,
  relu,
  relu6,
  leaky_relu,
  silu,
  gelu,
  hardswish,
  sigmoid,
  tanh,
  elu,
  mish,
  gelu_tanh
};

// Positions [begin, end), a position being sample * inner + place; in planar order all of one sample.
struct Range {
  int64_t begin, end;
};

struct Shape {
  Order order;
  Dtype dtype;
  int64_t samples, channels, inner;
  int64_t pool_size;  // samples a pool, 1..samples; the last pool may be smaller
  // Where given: the positions that are in the pools, sorted and apart. Nothing is read elsewhere, and zeros are
  // written there. Not together with signs.
  const Range* valid = nullptr;
  int64_t valid_count = 0;
  int64_t pools() const { return samples == 0 ? 1 : (samples + pool_size - 1) / pool_size; }
};

// One operand of that shape; strides in elements. Interleaved: channel_stride is 1.
struct Operand {
  void* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0;
  // For y of interleaved input that is to lie in planar order: so many rows are one sample of it, and its strides are
  // those of planar order. Then x, too, may have rows of several samples beside one another, which are `outer` apart.
  int64_t places = 0, outer = 0;
  explicit operator bool() const { return data != nullptr; }
};

// gamma or beta: float32, float64, bfloat16 or float16, of shape (channels); absent means 1 or 0.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

struct Fusion {
  Activation activation = Activation::identity;
  double slope = 0.01;       // of leaky_relu
  Operand residual;          // added before the activation
  uint8_t* signs = nullptr;  // one bit an element, set where the activation's derivative is that of its linear part;
                             // each run starts at a whole byte: a row (interleaved), a plane of more than
                             // kTogether elements, or all of a sample's planes, which lie together if they are smaller
};

constexpr int64_t kTogether = 256;

// Runs body(context, begin, end) over a partition of [0, count), in any order and on any threads.
struct Parallel {
  void (*run)(void* self, int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  void* self;
};

// Whether a tensor is worth several threads; smaller ones stay on the caller's.
bool takes_threads(const Shape&);

// Doubles of scratch memory that any verb needs for this shape.
size_t workspace_size(const Shape& shape);

// Sum over each pool of x and (x - mean)^2; the count is known from the shape: mean and m2 are (pools, channels).
void moments(const Shape&, const Operand& x, double* mean, double* m2, double* workspace, Parallel);

// y = activation((x - mean) * gamma / sqrt(var + eps) + beta + residual), var biased. If the statistics are x's `own`,
// as `forward` finds them, y has the bits of `forward`.
void normalize(const Shape&, const Operand& x, const Operand& y, const double* mean, const double* var, Vector gamma,
               Vector beta, double eps, const Fusion&, double* workspace, Parallel, bool own = false);

// moments, then normalize; x is read from cache the second time where the pool fits. Writes mean and biased var.
void forward(const Shape&, const Operand& x, const Operand& y, double* mean, double* var, Vector gamma, Vector beta,
             double eps, const Fusion&, double* workspace, Parallel);

// Sums over each pool of dz and dz * (x - mean), where dz = dy * activation'(z).
void backward_reduce(const Shape&, const Operand& dy, const Operand& x, const double* mean, const double* var,
                     Vector gamma, Vector beta, double eps, const Fusion&, double* sum_dz, double* sum_dz_centered,
                     double* workspace, Parallel);

// dx = k1 * dz + k2 * (x - mean) + k3 with coefficients of shape (pools, channels); d_residual = dz where wanted.
void backward_apply(const Shape&, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
                    const double* mean, const double* var, Vector gamma, Vector beta, double eps, const Fusion&,
                    const double* k1, const double* k2, const double* k3, double* workspace, Parallel);

// backward_reduce, then backward_apply with the coefficients of batch statistics (or, where population is set, of
// constant statistics: dx = gamma / s * dz). Absent may be dx, the sums, and the gradients of gamma and beta,
// (channels).
void backward(const Shape&, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
              const double* mean, const double* var, Vector gamma, Vector beta, double eps, const Fusion&,
              bool population, double* sum_dz, double* sum_dz_centered, double* d_gamma, double* d_beta,
              double* workspace, Parallel);

// Matrices, one a sample, whose rows become columns; elements of 2, 4 or 8 bytes.
struct Matrix {
  void* data;
  int64_t sample_stride, row_stride;  // in elements
};
void transpose(int64_t size, int64_t samples, int64_t rows, int64_t columns, const Matrix& from, const Matrix& to,
               Parallel);

// The instruction set in use, and the choice of another (for tests): returns whether the machine has it.
const char* instruction_set();
bool select_instruction_set(const char* name);

// Cache sizes in bytes, as the operating system tells them, else defaults.
struct Caches {
  int64_t l1, l2, l3;
};
const Caches& caches();

}  // namespace batchnorm
