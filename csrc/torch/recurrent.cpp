// The CPU implementations of the operators whose schemas are in src/batchnorm/ops/recurrent.py.
#include "recurrent.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

batchnorm::Parallel threads() {
  const auto run = [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, nullptr};
}

batchnorm::Dtype dtype_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return batchnorm::Dtype::float32;
  if (t.scalar_type() == ScalarType::Double) return batchnorm::Dtype::float64;
  throw std::runtime_error("batchnorm: expected a float32 or float64 tensor");
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : t; }

const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
double* doubles_of(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) { return torch::stable::empty(sizes, dtype); }
Tensor zeros(std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor t = empty(std::move(sizes), dtype);
  std::fill_n(static_cast<char*>(t.data_ptr()), t.numel() * t.element_size(), char(0));
  return t;
}
Tensor copy_of(const OptionalTensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  if (!t) return zeros({rows, columns}, dtype);
  Tensor copy = empty({rows, columns}, dtype);
  torch::stable::copy_(copy, *t);
  return copy;
}

// The sizes of the steps, checked: a recurrence reads and writes by them.
const int64_t* sizes_of(const Tensor& sizes, int64_t frames) {
  const int64_t* rows = static_cast<const int64_t*>(sizes.const_data_ptr());
  int64_t sum = 0;
  for (int64_t t = 0; t < sizes.numel(); ++t) {
    if (rows[t] < 1 || (t > 0 && rows[t] > rows[t - 1]))
      throw std::runtime_error("batchnorm: sizes of steps must be at least 1, and never rise");
    sum += rows[t];
  }
  if (sum != frames || sizes.numel() == 0) throw std::runtime_error("batchnorm: sizes must add up to the frames");
  return rows;
}

// ---------------------------------------------------------------------------------------------- recurrences
batchnorm::Recurrence recurrence_of(int64_t cell, const Tensor& weight_hh, const Tensor& sizes, int64_t frames,
                                    bool normalize_hh, bool normalize_c, bool population, double eps_hh, double eps_c) {
  const int64_t* rows = sizes_of(sizes, frames);
  return {static_cast<batchnorm::Cell>(cell),
          dtype_of(weight_hh),
          weight_hh.size(1),
          sizes.numel(),
          rows,
          normalize_hh,
          normalize_c,
          population,
          eps_hh,
          eps_c};
}

std::unique_ptr<char[]> workspace_of(const batchnorm::Recurrence& r) {
  return std::unique_ptr<char[]>(new char[batchnorm::recurrent_workspace_size(r)]);
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Output, what the backward needs (kept, cells, hh), and the statistics of each step where they are the batch's.
EightTensors recurrence(int64_t cell, Tensor gates, Tensor sizes, Tensor weight_hh, OptionalTensor bias_hn, Tensor h0,
                        OptionalTensor c0, OptionalTensor gamma_hh, OptionalTensor gamma_c, OptionalTensor beta_c,
                        OptionalTensor mean_hh, OptionalTensor var_hh, OptionalTensor mean_c, OptionalTensor var_c,
                        bool normalize_hh, bool normalize_c, bool population, double eps_hh, double eps_c) {
  gates = dense(gates);
  weight_hh = dense(weight_hh);
  h0 = dense(h0);
  for (OptionalTensor* t : {&bias_hn, &c0, &gamma_hh, &gamma_c, &beta_c, &mean_hh, &var_hh, &mean_c, &var_c})
    *t = dense(*t);
  const int64_t frames = gates.size(0), width = gates.size(1), hidden = weight_hh.size(1), steps = sizes.numel();
  const ScalarType dtype = gates.scalar_type();
  const auto r = recurrence_of(cell, weight_hh, sizes, frames, normalize_hh, normalize_c, population, eps_hh, eps_c);
  const int64_t kept = batchnorm::kept_of(r.cell);
  Tensor output = empty({frames, hidden}, dtype), of_gates = empty({kept ? frames : 0, kept * hidden}, dtype);
  Tensor cells = empty({r.cell == batchnorm::Cell::lstm ? frames : 0, hidden}, dtype);
  Tensor hh = empty({normalize_hh ? frames : 0, width}, dtype);
  const auto statistics = [&](bool wanted, int64_t columns) {
    return empty({wanted && !population ? steps : 0, columns}, ScalarType::Double);
  };
  Tensor made[] = {statistics(normalize_hh, width), statistics(normalize_hh, width), statistics(normalize_c, hidden),
                   statistics(normalize_c, hidden)};
  const auto of = [&](const OptionalTensor& given, const Tensor& own) {
    return population ? const_cast<double*>(static_cast<const double*>(data_of(given))) : doubles_of(own);
  };
  const batchnorm::RecurrentInput in{
      gates.const_data_ptr(), weight_hh.const_data_ptr(), data_of(bias_hn), h0.const_data_ptr(), data_of(c0),
      data_of(gamma_hh),      data_of(gamma_c),           data_of(beta_c)};
  const batchnorm::RecurrentStates states{output.data_ptr(),   of_gates.data_ptr(),  cells.data_ptr(),
                                          hh.data_ptr(),       of(mean_hh, made[0]), of(var_hh, made[1]),
                                          of(mean_c, made[2]), of(var_c, made[3])};
  batchnorm::recurrent_forward(r, in, states, workspace_of(r).get(), threads());
  return {output, of_gates, cells, hh, made[0], made[1], made[2], made[3]};
}

// The gradients of gates, of W_hh h (empty where it is that of the gates), h0, c0, and, in float64, of gamma_hh,
// beta_hh (a bias beside the normalized product), gamma_c and beta_c.
EightTensors recurrence_backward(Tensor d_output, OptionalTensor d_c_n, int64_t cell, Tensor sizes, Tensor weight_hh,
                                 Tensor h0, OptionalTensor c0, OptionalTensor gamma_hh, OptionalTensor gamma_c,
                                 Tensor output, Tensor kept, Tensor cells, Tensor hh, Tensor mean_hh, Tensor var_hh,
                                 Tensor mean_c, Tensor var_c, bool normalize_hh, bool normalize_c, bool population,
                                 double eps_hh, double eps_c) {
  for (Tensor* t : {&d_output, &weight_hh, &h0, &mean_hh, &var_hh, &mean_c, &var_c}) *t = dense(*t);
  for (OptionalTensor* t : {&c0, &gamma_hh, &gamma_c}) *t = dense(*t);
  const int64_t frames = output.size(0), hidden = weight_hh.size(1), width = weight_hh.size(0), samples = h0.size(0);
  const ScalarType dtype = output.scalar_type();
  const auto r = recurrence_of(cell, weight_hh, sizes, frames, normalize_hh, normalize_c, population, eps_hh, eps_c);
  const bool is_lstm = r.cell == batchnorm::Cell::lstm, own = normalize_hh || r.cell == batchnorm::Cell::gru;
  Tensor d_gates = empty({frames, width}, dtype), d_hh = empty({own ? frames : 0, width}, dtype);
  Tensor d_h0 = zeros({samples, hidden}, dtype), d_c0 = copy_of(d_c_n, is_lstm ? samples : 0, hidden, dtype);
  const auto sums = [](int64_t count) { return zeros({count}, ScalarType::Double); };
  Tensor made[] = {sums(width), sums(width), sums(hidden), sums(hidden)};
  const batchnorm::RecurrentInput in{nullptr,     weight_hh.const_data_ptr(), nullptr,          h0.const_data_ptr(),
                                     data_of(c0), data_of(gamma_hh),          data_of(gamma_c), nullptr};
  const batchnorm::RecurrentStates states{output.data_ptr(),  kept.data_ptr(),     cells.data_ptr(),
                                          hh.data_ptr(),      doubles_of(mean_hh), doubles_of(var_hh),
                                          doubles_of(mean_c), doubles_of(var_c)};
  const batchnorm::RecurrentGradients d{
      d_output.const_data_ptr(), d_gates.data_ptr(),  own ? d_hh.data_ptr() : d_gates.data_ptr(),
      d_h0.data_ptr(),           d_c0.data_ptr(),     doubles_of(made[0]),
      doubles_of(made[1]),       doubles_of(made[2]), doubles_of(made[3])};
  batchnorm::recurrent_backward(r, in, states, d, workspace_of(r).get(), threads());
  return {d_gates, d_hh, d_h0, d_c0, made[0], made[1], made[2], made[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("recurrence", TORCH_BOX(&recurrence));
  m.impl("recurrence_backward", TORCH_BOX(&recurrence_backward));
}
