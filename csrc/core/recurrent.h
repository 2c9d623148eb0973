// Recurrences with batch normalization inside, and their gradients: on raw pointers, as batchnorm.h.
//
// Sequences lie one time step after another: step t has sizes[t] rows, those of the sequences that are not over, the
// longest first. A frame is one row of one step; F is the number of all frames, N = sizes[0], H the number of units,
// G the number of gates: i, f, g, o of an LSTM, r, z, n of a GRU, one of an Elman network. Every matrix is contiguous.
#pragma once

#include "batchnorm.h"

namespace batchnorm {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru };

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
// What the backward needs of each unit: the gates after their activations, and the tanh of an LSTM's cell or the
// product that a GRU's reset gate is multiplied with. The output itself is enough for an Elman network.
constexpr int kept_of(Cell cell) { return cell == Cell::lstm ? 5 : cell == Cell::gru ? 4 : 0; }

struct Recurrence {
  Cell cell;
  Dtype dtype;  // float32 or float64
  int64_t hidden, steps;
  const int64_t* sizes;  // never rise, and are at least 1
  bool normalize_hh;     // W_hh h, over the rows of each step
  bool normalize_c;      // the cell before its output tanh
  bool population;       // by given statistics
  double eps_hh, eps_c;
};

// Elements of the dtype; absent: bias_hn and beta_c are 0, gammas 1.
struct RecurrentInput {
  const void* gates;      // (F, G H): what the input adds to the gates
  const void* weight_hh;  // (G H, H)
  const void* bias_hn;    // (H): of a GRU's candidate
  const void *h0, *c0;    // (N, H)
  const void* gamma_hh;   // (G H)
  const void *gamma_c, *beta_c;
};

// What the forward writes and the backward reads. Statistics, (steps, G H) and (steps, H), are read where they are the
// population's.
struct RecurrentStates {
  void* output;  // (F, H)
  void* kept;    // (F, kept H)
  void* cells;   // (F, H): of an LSTM
  void* hh;      // (F, G H): W_hh h before its normalization
  double *mean_hh, *var_hh, *mean_c, *var_c;
};

struct RecurrentGradients {
  const void* output;  // (F, H)
  void *gates, *hh;    // (F, G H); the same memory where W_hh h is added to the gates as it is
  void *h0, *c0;       // (N, H): on entry the gradients of the last states (those of h: of a sequence's last frame,
                       // beside that of the output), on return those of the first
  double *gamma_hh, *beta_hh;  // (G H), zero on entry
  double *gamma_c, *beta_c;    // (H), zero on entry
};

// Bytes of scratch memory that both need.
size_t recurrent_workspace_size(const Recurrence&);

void recurrent_forward(const Recurrence&, const RecurrentInput&, const RecurrentStates&, void* workspace, Parallel);

// The gradient of W_hh is (gradients.hh)^T times the states before: one product over all frames, left to the caller.
void recurrent_backward(const Recurrence&, const RecurrentInput&, const RecurrentStates&, const RecurrentGradients&,
                        void* workspace, Parallel);

// What one instruction set provides.
struct RecurrentKernels {
  int64_t vector_bytes;
  void (*forward)(const Recurrence&, const RecurrentInput&, const RecurrentStates&, void* workspace, Parallel);
  void (*backward)(const Recurrence&, const RecurrentInput&, const RecurrentStates&, const RecurrentGradients&,
                   void* workspace, Parallel);
};

const RecurrentKernels* recurrent_baseline();
const RecurrentKernels* recurrent_avx2();
const RecurrentKernels* recurrent_avx512();
const RecurrentKernels* recurrent_neon();

}  // namespace batchnorm
