// The scratch memory of a verb: shifts, sums and coefficients.
#pragma once

#include "plan.h"

namespace batchnorm {

// Arrays of `count` coefficients in the compute type, one after the other.
struct Coefficients {
  bool wide;  // float64
  int64_t gate_size;
  char* base;
  int64_t count;
  int64_t size() const { return wide ? 8 : 4; }
  char* at(int array, int64_t i) const { return base + (array * count + i) * size(); }
  NormalizeCoefficients normalize(int64_t i) const { return {at(0, i), at(1, i), at(2, i), gate(0, i), gate(1, i)}; }
  // Two arrays more, behind six of eight bytes: float64 for float64, else float32.
  char* gate(int array, int64_t i) const { return base + 48 * count + (array * count + i) * gate_size; }
  // Those of `two_parts`, which lie where a forward has no coefficients of gradients.
  float* part(int k, int64_t i) const { return reinterpret_cast<float*>(base + 24 * count) + k * count + i; }
  NormalizeCoefficients forward(bool two_parts, int64_t i) const {
    if (!two_parts) return normalize(i);
    return {part(0, i), part(1, i), part(3, i), part(0, i), part(0, i), part(2, i), part(4, i)};
  }
  ApplyCoefficients apply(int64_t i) const { return {at(3, i), at(4, i), at(5, i)}; }
};

// Shifts, sums and coefficients: of all statistics, or of one whole piece, after which the next of its task takes them.
struct Slots {
  double *shift, *sums;
  Coefficients k;
};

struct Scratch {
  double *gamma, *beta;
  double* counts;     // of the pools
  double* gradients;  // of gamma and beta, rows of (2, channels)
  double* slots;
  bool wide;
  Scratch(const Plan& plan, double* workspace, bool wide)
      : gamma(first_line(workspace)),
        beta(gamma + lined(plan.shape.channels) + 48),
        counts(beta + lined(plan.shape.channels) + 48),
        gradients(counts + lined(plan.shape.pools())),
        slots(gradients + lined(2 * plan.gradient_rows() * plan.shape.channels)),
        wide(wide) {}
  static int64_t size(const Plan& plan) {
    return 8 + 2 * (lined(plan.shape.channels) + 48) + lined(plan.shape.pools()) +
           lined(2 * plan.gradient_rows() * plan.shape.channels) + (plan.whole ? plan.tasks() : 1) * slots_size(plan);
  }
  static int64_t slots_size(const Plan& plan) { return 9 * plan.slots() + lined(plan.sums()); }
  // Where a line of the cache begins: a vector of coefficients that lies in two takes twice the time to read.
  static double* first_line(double* from) { return from + -(reinterpret_cast<uintptr_t>(from) / sizeof(double)) % 8; }
  // Those of a task, or all.
  Slots of(const Plan& plan, int64_t task) const {
    double* const shift = slots + task * slots_size(plan);
    double* const k = shift + plan.slots();
    return {shift,
            k + 8 * plan.slots(),
            {wide, element_size(plan.shape.dtype) == 8 ? 8 : 4, reinterpret_cast<char*>(k), plan.slots()}};
  }
};

// What a step is done to: a piece, or runs of its channels alone.
struct Work {
  Piece piece;
  int64_t statistic;  // the first
  int64_t slot;       // the first
  const Slots& slots;
  double *first, *second;  // the two sums of its channels
  const Coefficients& k() const { return slots.k; }
  double* shift() const { return slots.shift + slot; }
};

}  // namespace batchnorm
