// Chooses the instruction set of a recurrence, as dispatch.cpp did for the verbs.
#include "recurrent.h"

#include <cstring>

namespace batchnorm {
namespace {

const RecurrentKernels& recurrent_kernels() {
  const char* name = instruction_set();
#if defined(__x86_64__)
#ifndef BATCHNORM_WITHOUT_AVX512
  if (std::strcmp(name, "avx512") == 0) return *recurrent_avx512();
#endif
  if (std::strcmp(name, "avx2") == 0) return *recurrent_avx2();
#elif defined(__aarch64__)
  if (std::strcmp(name, "neon") == 0) return *recurrent_neon();
#endif
  (void)name;
  return *recurrent_baseline();
}

}  // namespace

size_t recurrent_workspace_size(const Recurrence& r) {
  const int64_t bytes = r.dtype == Dtype::float64 ? 8 : 4, lanes = recurrent_kernels().vector_bytes / bytes;
  const int64_t blocks = (r.hidden + lanes - 1) / lanes, gates = gates_of(r.cell);
  const int64_t weights = blocks * lanes * gates * r.hidden;
  const int64_t tiles = blocks * r.sizes[0] * 5 * lanes;  // at most 4 gates, and the cell
  return size_t((weights + tiles) * bytes + r.steps * 8);
}

void recurrent_forward(const Recurrence& r, const RecurrentInput& in, const RecurrentStates& states, void* workspace,
                       Parallel parallel) {
  recurrent_kernels().forward(r, in, states, workspace, parallel);
}

void recurrent_backward(const Recurrence& r, const RecurrentInput& in, const RecurrentStates& states,
                        const RecurrentGradients& d, void* workspace, Parallel parallel) {
  recurrent_kernels().backward(r, in, states, d, workspace, parallel);
}

}  // namespace batchnorm
