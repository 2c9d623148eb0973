// Recurrences against a plain oracle in float64: instruction set x cell x dtype x normalization x sizes of steps and of
// the state around the vector widths. Gradients against the oracle's differences along random directions, float32
// against float64; the same bits for every partition; buffers of exactly their size, misaligned.
#include "recurrent.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

using batchnorm::Cell;
using batchnorm::Dtype;
using batchnorm::Recurrence;
using Values = std::vector<double>;

struct Case {
  Cell cell;
  bool normalize_hh, normalize_c, population;
  int64_t hidden;
  std::vector<int64_t> sizes;

  int64_t frames() const {
    int64_t sum = 0;
    for (int64_t n : sizes) sum += n;
    return sum;
  }
  int64_t steps() const { return int64_t(sizes.size()); }
  int64_t gates() const { return batchnorm::gates_of(cell) * hidden; }
  int64_t start(int64_t t) const {
    int64_t at = 0;
    for (int64_t i = 0; i < t; ++i) at += sizes[i];
    return at;
  }
  Recurrence recurrence(Dtype dtype) const {
    return {cell, dtype, hidden, steps(), sizes.data(), normalize_hh, normalize_c, population, 1e-5, 1e-5};
  }
};

// gates, W_hh, b_hn, h0, c0, gamma_hh, gamma_c, beta_c
enum { kGates, kWeight, kBias, kH0, kC0, kGammaHh, kGammaC, kBetaC, kInputs };
using Inputs = std::vector<Values>;

struct Statistics {
  Values mean_hh, var_hh, mean_c, var_c;
  explicit Statistics(const Case& c)
      : mean_hh(c.steps() * c.gates(), 0.1),
        var_hh(c.steps() * c.gates(), 1.5),
        mean_c(c.steps() * c.hidden, -0.2),
        var_c(c.steps() * c.hidden, 0.7) {}
};

Inputs random_inputs(const Case& c, std::mt19937& engine) {
  std::normal_distribution<double> normal;
  const int64_t n = c.sizes[0], h = c.hidden;
  const int64_t counts[] = {c.frames() * c.gates(), c.gates() * h, h, n * h, n * h, c.gates(), h, h};
  Inputs inputs;
  for (int64_t count : counts) {
    Values v(count);
    for (double& x : v) x = float(normal(engine) * 0.7);  // exact in both dtypes
    inputs.push_back(v);
  }
  return inputs;
}

// ---------------------------------------------------------------------------------------------- the oracle
void normalize(const Case& c, std::vector<Values>& rows, const double* mean, const double* var, const double* gamma,
               const double* beta) {
  for (size_t j = 0; j < rows[0].size(); ++j) {
    double m = mean[j], v = var[j];
    if (!c.population) {
      m = v = 0;
      for (const Values& row : rows) m += row[j] / double(rows.size());
      for (const Values& row : rows) v += (row[j] - m) * (row[j] - m) / double(rows.size());
    }
    for (Values& row : rows) row[j] = (row[j] - m) / std::sqrt(v + 1e-5) * gamma[j] + (beta ? beta[j] : 0);
  }
}

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// Output (frames, H) and, behind it, the last cells (N, H).
Values oracle(const Case& c, const Inputs& in, const Statistics& given) {
  const int64_t H = c.hidden, N = c.sizes[0];
  Values h = in[kH0], cells = in[kC0], out;
  for (int64_t t = 0; t < c.steps(); ++t) {
    const int64_t n = c.sizes[t];
    std::vector<Values> of_state(n, Values(c.gates(), 0.0));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t g = 0; g < c.gates(); ++g)
        for (int64_t k = 0; k < H; ++k) of_state[r][g] += in[kWeight][g * H + k] * h[r * H + k];
    if (c.normalize_hh)
      normalize(c, of_state, &given.mean_hh[t * c.gates()], &given.var_hh[t * c.gates()], in[kGammaHh].data(), nullptr);
    std::vector<Values> shown(n, Values(H)), o(n, Values(H));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = 0; j < H; ++j) {
        const double* x = &in[kGates][(c.start(t) + r) * c.gates()];
        const auto z = [&](int g) { return x[g * H + j] + of_state[r][g * H + j]; };
        double& state = h[r * H + j];
        if (c.cell == Cell::lstm) {
          double& cell = cells[r * H + j];
          cell = sigmoid(z(1)) * cell + sigmoid(z(0)) * std::tanh(z(2));
          shown[r][j] = cell;
          o[r][j] = sigmoid(z(3));
        } else if (c.cell == Cell::gru) {
          const double candidate = std::tanh(x[2 * H + j] + sigmoid(z(0)) * (of_state[r][2 * H + j] + in[kBias][j])),
                       update = sigmoid(z(1));
          shown[r][j] = (1 - update) * candidate + update * state;
        } else {
          shown[r][j] = c.cell == Cell::rnn_tanh ? std::tanh(z(0)) : std::max(z(0), 0.0);
        }
      }
    if (c.normalize_c)
      normalize(c, shown, &given.mean_c[t * H], &given.var_c[t * H], in[kGammaC].data(), in[kBetaC].data());
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = 0; j < H; ++j) {
        h[r * H + j] = c.cell == Cell::lstm ? o[r][j] * std::tanh(shown[r][j]) : shown[r][j];
        out.push_back(h[r * H + j]);
      }
  }
  if (c.cell == Cell::lstm) out.insert(out.end(), cells.begin(), cells.begin() + N * H);
  return out;
}

// ---------------------------------------------------------------------------------------------- the kernels
// `count` elements of exactly their size, one element past an aligned address.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(size_t(count) + 1, T(NAN)) {}
  explicit Buffer(const Values& v) : Buffer(int64_t(v.size())) { std::copy(v.begin(), v.end(), data()); }
  T* data() { return data_.data() + 1; }
  Values values() const { return Values(data_.begin() + 1, data_.end()); }

 private:
  std::vector<T> data_;
};

void run_parts(void* self, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t parts = *static_cast<int64_t*>(self);  // the last first
  for (int64_t i = parts; i-- > 0;) {
    const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
    if (begin < end) body(context, begin, end);
  }
}

struct Result {
  Values output;     // and the last cells, as of the oracle
  Inputs gradients;  // of each input
};

// Forward, and backward from a gradient of output and last cells.
template <class T>
Result run(const Case& c, const Inputs& in, const Statistics& given, const Values& d, int64_t parts) {
  const Dtype dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
  const Recurrence r = c.recurrence(dtype);
  const int64_t H = c.hidden, N = c.sizes[0], F = c.frames(), G = c.gates();
  const bool is_lstm = c.cell == Cell::lstm;
  std::vector<Buffer<T>> inputs;
  for (const Values& v : in) inputs.emplace_back(v);
  Buffer<T> output(F * H), kept(F * batchnorm::kept_of(c.cell) * H), cells(is_lstm ? F * H : 0);
  Buffer<T> hh(c.normalize_hh ? F * G : 0);
  Statistics used = given;
  std::vector<char> workspace(batchnorm::recurrent_workspace_size(r));
  const batchnorm::RecurrentInput input{inputs[kGates].data(),  inputs[kWeight].data(), inputs[kBias].data(),
                                        inputs[kH0].data(),     inputs[kC0].data(),     inputs[kGammaHh].data(),
                                        inputs[kGammaC].data(), inputs[kBetaC].data()};
  const batchnorm::RecurrentStates states{output.data(),      kept.data(),         cells.data(),
                                          hh.data(),          used.mean_hh.data(), used.var_hh.data(),
                                          used.mean_c.data(), used.var_c.data()};
  batchnorm::recurrent_forward(r, input, states, workspace.data(), {run_parts, &parts});

  std::vector<int64_t> last(N);  // the last frame of each sequence
  for (int64_t t = 0; t < c.steps(); ++t)
    for (int64_t n = 0; n < c.sizes[t]; ++n) last[n] = c.start(t) + n;
  Result result{output.values(), {}};
  Values d_cells(N * H, 0.0);
  if (is_lstm)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t j = 0; j < H; ++j) {
        result.output.push_back(double(cells.data()[last[n] * H + j]));
        d_cells[n * H + j] = d[(F + n) * H + j];
      }
  const bool own = c.normalize_hh || c.cell == Cell::gru;
  Buffer<T> d_output(Values(d.begin(), d.begin() + F * H)), d_gates(F * G), d_hh(own ? F * G : 0);
  Buffer<T> d_h0(Values(N * H, 0.0)), d_c0(is_lstm ? d_cells : Values{});
  Values gamma_hh(G, 0.0), beta_hh(G, 0.0), gamma_c(H, 0.0), beta_c(H, 0.0);
  T* of_product = own ? d_hh.data() : d_gates.data();
  std::fill(workspace.begin(), workspace.end(), char(-1));
  batchnorm::recurrent_backward(r, input, states,
                                {d_output.data(), d_gates.data(), of_product, d_h0.data(), d_c0.data(), gamma_hh.data(),
                                 beta_hh.data(), gamma_c.data(), beta_c.data()},
                                workspace.data(), {run_parts, &parts});
  Values weight(G * H, 0.0), bias(H, 0.0);
  for (int64_t t = 0; t < c.steps(); ++t)
    for (int64_t n = 0; n < c.sizes[t]; ++n) {
      const T* before = t == 0 ? inputs[kH0].data() + n * H : output.data() + (c.start(t - 1) + n) * H;
      const T* dz = of_product + (c.start(t) + n) * G;
      for (int64_t g = 0; g < G; ++g)
        for (int64_t k = 0; k < H; ++k) weight[g * H + k] += double(dz[g]) * double(before[k]);
      if (c.cell == Cell::gru && !c.normalize_hh)
        for (int64_t j = 0; j < H; ++j) bias[j] += double(dz[2 * H + j]);
    }
  if (c.cell == Cell::gru && c.normalize_hh) std::copy(beta_hh.begin() + 2 * H, beta_hh.end(), bias.begin());
  result.gradients = {d_gates.values(), weight,  bias,  d_h0.values(), is_lstm ? d_c0.values() : Values(N * H, 0.0),
                      gamma_hh,         gamma_c, beta_c};
  return result;
}

// ---------------------------------------------------------------------------------------------- the checks
int64_t passed = 0, failed = 0;

void check(bool condition, const std::string& what) {
  condition ? ++passed : ++failed;
  if (!condition && failed <= 20) std::printf("FAILED %s\n", what.c_str());
}

double largest_difference(const Values& a, const Values& b) {
  if (a.size() != b.size()) return INFINITY;
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(a[i] - b[i]);
    if (!(difference <= most)) most = difference;  // NaN too
  }
  return most;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double largest(const Values& v) {
  double most = 1;
  for (double x : v) most = std::max(most, std::fabs(x));
  return most;
}

void check_case(const Case& c, const std::string& name, std::mt19937& engine) {
  std::normal_distribution<double> normal;
  const Inputs in = random_inputs(c, engine);
  const Statistics given(c);
  const Values expected = oracle(c, in, given);
  Values d(expected.size());
  for (double& x : d) x = float(normal(engine));
  const Result exact = run<double>(c, in, given, d, 1), coarse = run<float>(c, in, given, d, 1);
  check(largest_difference(exact.output, expected) < 1e-11, name + ": another output");
  check(largest_difference(coarse.output, expected) < 2e-4, name + ": another output in float32");
  for (int k = 0; k < kInputs; ++k)
    check(largest_difference(coarse.gradients[k], exact.gradients[k]) < 2e-3 * largest(exact.gradients[k]),
          name + ": another gradient in float32 of input " + std::to_string(k));
  const Result parts = run<float>(c, in, given, d, 3);
  check(parts.output == coarse.output && parts.gradients == coarse.gradients, name + ": other bits in parts");
  if (c.cell == Cell::rnn_relu) return;  // a difference may cross a kink
  Inputs up = in, down = in;
  double analytic = 0;
  const double width = 1e-6;
  for (int k = 0; k < kInputs; ++k) {
    Values direction(in[k].size());
    for (size_t i = 0; i < direction.size(); ++i) {
      direction[i] = normal(engine);
      up[k][i] += width * direction[i];
      down[k][i] -= width * direction[i];
    }
    analytic += dot(exact.gradients[k], direction);
  }
  const double numeric = (dot(oracle(c, up, given), d) - dot(oracle(c, down, given), d)) / (2 * width);
  check(std::fabs(numeric - analytic) < 1e-5 * (std::fabs(numeric) + 10),
        name + ": another gradient: " + std::to_string(analytic) + ", not " + std::to_string(numeric));
}

}  // namespace

int main() {
  std::mt19937 engine(1);
  const std::vector<std::vector<int64_t>> sizes = {{5, 5, 5}, {7, 4, 4, 2, 1}, {3}, {21, 20, 19, 13, 3}};
  for (const char* isa : {"avx512", "avx2", "neon", "baseline"}) {
    if (!batchnorm::select_instruction_set(isa)) continue;
    for (Cell cell : {Cell::rnn_tanh, Cell::rnn_relu, Cell::lstm, Cell::gru})
      for (int form = 0; form < 8; ++form)
        for (int64_t hidden : {1, 3, 8, 17, 37}) {
          const Case c{cell, bool(form & 1), bool(form & 2), bool(form & 4), hidden, sizes[(hidden + form) % 4]};
          if (c.normalize_c && cell != Cell::lstm) continue;
          if (c.population && !c.normalize_hh && !c.normalize_c) continue;
          check_case(c,
                     std::string(isa) + " cell " + std::to_string(int(cell)) + " form " + std::to_string(form) +
                         " hidden " + std::to_string(hidden),
                     engine);
        }
  }
  // Large enough for threads, by rows and by units.
  for (bool normalized : {false, true})
    check_case({Cell::lstm, normalized, normalized, false, 40, {24, 24, 11}}, "large", engine);
  std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
  return failed ? 1 : 0;
}
