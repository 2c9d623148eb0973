// Normalizations whose results are pooled, against a plain oracle: instruction set x dtype x windows, steps, borders
// and windows that reach beyond the plane x layouts of the operands, for the largest values and for means.
//
// What the core pools is known to the bit: the verbs make the same of the same channels. They are judged by the oracle;
// from them follow the largest values and their places exactly, and means within (n + 1) u of the magnitudes of their n
// values. In a backward the places are given, and the gradient of each plane is a sum of elements, within (n + 1) u of
// their magnitudes, stored as an element: from there on calls.h goes through the normalization. Besides must hold
// exactly: the same bits for every number of threads and whatever the scratch memory holds, channels that do not reach
// one another, memory beside the elements left alone.
#include "pooling.h"

#include "calls.h"

namespace test {
namespace {

using batchnorm::Pooling;

// ---------------------------------------------------------------------------------------------- cases
struct Case {
  Pooling pool;
  Dtype dtype;
  int64_t samples, channels;
  bool wants_x;
  NormKind norm;
  Layout layout;
  uint64_t seed;

  int64_t inputs() const { return pool.size[0] * pool.size[1]; }
  int64_t outputs() const { return pool.out[0] * pool.out[1]; }
  int64_t taps() const { return pool.kernel[0] * pool.kernel[1]; }
  Shape shape(int64_t places) const { return {Order::planar, dtype, samples, channels, places, samples}; }
  Shape shape() const { return shape(inputs()); }

  std::string text() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "%s %s (%lld, %lld, %lld, %lld) to %lldx%lld kernel %lldx%lld stride %lldx%lld padding %lldx%lld "
                  "%s%s %s seed %llu",
                  format_of(dtype).name, pool.mean ? "means" : "largest", (long long)samples, (long long)channels,
                  (long long)pool.size[0], (long long)pool.size[1], (long long)pool.out[0], (long long)pool.out[1],
                  (long long)pool.kernel[0], (long long)pool.kernel[1], (long long)pool.stride[0],
                  (long long)pool.stride[1], (long long)pool.padding[0], (long long)pool.padding[1],
                  norm.text().c_str(), wants_x ? " dx" : "", name_of(layout), (unsigned long long)seed);
    return text;
  }
};

// f(place in the window, place in the plane) for each value of the window of an output.
template <class F>
void for_window(const Pooling& p, int64_t output, F f) {
  const int64_t row = output / p.out[1] * p.stride[0] - p.padding[0];
  const int64_t column = output % p.out[1] * p.stride[1] - p.padding[1];
  for (int64_t i = 0; i < p.kernel[0]; ++i)
    for (int64_t j = 0; j < p.kernel[1]; ++j) {
      const int64_t r = row + i, s = column + j;
      if (r < 0 || r >= p.size[0] || s < 0 || s >= p.size[1]) continue;
      f(i * p.kernel[1] + j, r * p.size[1] + s);
    }
}

// ---------------------------------------------------------------------------------------------- operands and results
struct Problem {
  Case c;
  Random random;
  Tensor x, dy;
  Norm norm;

  explicit Problem(const Case& given)
      : c(given),
        random(c.seed * 1000003 + 1),
        x(c.shape(), c.layout, c.seed),
        dy(c.shape(c.outputs()), c.layout, c.seed + 1),
        norm(c.norm, c.dtype, c.channels, c.samples * c.inputs(), random) {
    for (int64_t k = 0; k < c.channels; ++k) {
      norm.beta.set(k, random.uniform(-2, 1));  // often all of a window is less than zero
      const double offset = random.normal();
      const int64_t steps = random.below(3) ? 0 : 1;  // of one: equal values
      for (int64_t n = 0; n < c.samples; ++n) {
        for (int64_t i = 0; i < c.inputs(); ++i)
          x.set(n, k, i, steps ? double(random.below(3)) : offset + random.normal());
        for (int64_t i = 0; i < c.outputs(); ++i) dy.set(n, k, i, 0.3 + random.normal());
      }
      norm.take_moments(k, values_of(k));
    }
  }
  Boundeds values_of(int64_t k) const {
    Boundeds values;
    for (int64_t n = 0; n < c.samples; ++n)
      for (int64_t i = 0; i < c.inputs(); ++i) values.push_back({x.get(n, k, i), 0});
    return values;
  }
};

// Of exactly their size; NaN, and places that no window has, until they are written.
struct Result {
  Tensor y, dx;
  std::unique_ptr<uint8_t[]> places;
  NormResult norm;

  explicit Result(const Case& c)
      : y(c.shape(c.outputs()), c.layout, c.seed + 2), dx(c.shape(), c.layout, c.seed + 3), norm(c.channels) {
    if (c.pool.mean) return;
    const size_t count = size_t(c.samples * c.channels * c.outputs());
    places.reset(new uint8_t[count]);
    std::fill_n(places.get(), count, uint8_t(255));
  }
  Bytes channel(const Case& c, int64_t k) const {
    Bytes all;
    for (int64_t n = 0; n < c.samples; ++n) {
      y.append_plane(n, k, all);
      dx.append_plane(n, k, all);
      if (!places) continue;
      const uint8_t* const first = places.get() + (n * c.channels + k) * c.outputs();
      all.insert(all.end(), first, first + c.outputs());
    }
    norm.append_to(k, all);
    return all;
  }
  Bytes bytes(const Case& c) const {
    Bytes all;
    for (int64_t k = 0; k < c.channels; ++k) {
      const Bytes one = channel(c, k);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
  bool guards_intact() const { return y.guards_intact() && dx.guards_intact(); }
};

std::unique_ptr<Result> run(const Problem& p, const Manner& how) {
  const Case& c = p.c;
  auto r = std::make_unique<Result>(c);
  const size_t bytes = batchnorm::pooled_workspace_size(c.shape(), c.pool, how.threads);
  {
    const std::unique_ptr<char[]> memory = how.scratch(bytes);
    batchnorm::pooled_forward(c.shape(), c.pool, p.x.operand(), p.norm.call(r->norm), r->y.operand(), r->places.get(),
                              memory.get(), how.threads, how.partition->parallel());
  }
  const std::unique_ptr<char[]> memory = how.scratch(bytes);
  batchnorm::pooled_backward(c.shape(), c.pool, p.dy.operand(), r->places.get(), p.x.operand(), p.norm.call(),
                             c.wants_x ? r->dx.operand() : Operand{}, r->norm.d_gamma.data(), r->norm.d_beta.data(),
                             memory.get(), how.threads, how.partition->parallel());
  return r;
}

// ---------------------------------------------------------------------------------------------- the checks
// Channels that the core walks at once: the size of the second cache tells, which is nothing or has no end.
int64_t chunk_of(const Case& c) { return test_caches.l2 == 1 ? 1 : std::max<int64_t>(c.channels / 32, 1); }

batchnorm::Operand from_channel(Operand o, int64_t channel, Dtype dtype) {
  o.data = static_cast<char*>(o.data) + channel * o.channel_stride * format_of(dtype).size;
  return o;
}

// What the core pools, by the verbs: (samples, channels, inputs).
std::vector<double> pooled_values(const Problem& p) {
  const Case& c = p.c;
  std::vector<double> values(size_t(c.samples * c.channels * c.inputs()));
  for (int64_t first = 0; first < c.channels; first += chunk_of(c)) {
    Shape s = c.shape();
    s.channels = std::min(chunk_of(c), c.channels - first);
    const Tensor y(s, Layout::dense, 0);
    const Doubles workspace(int64_t(batchnorm::workspace_size(s))), mean(s.channels), var(s.channels);
    for (int64_t k = 0; k < s.channels; ++k) mean[k] = p.norm.mean[first + k], var[k] = p.norm.var[first + k];
    const Operand x = from_channel(p.x.operand(), first, c.dtype);
    const auto part = [&](const Block& of) {
      return c.norm.affine == kNone ? Vector{} : Vector{of.at(first), p.norm.affine_dtype()};
    };
    Partition partition;
    if (c.norm.population)
      batchnorm::normalize(s, x, y.operand(), mean.data(), var.data(), part(p.norm.gamma), part(p.norm.beta), kEps,
                           p.norm.fusion(), workspace.data(), partition.parallel());
    else
      batchnorm::forward(s, x, y.operand(), mean.data(), var.data(), part(p.norm.gamma), part(p.norm.beta), kEps,
                         p.norm.fusion(), workspace.data(), partition.parallel());
    for (int64_t n = 0; n < c.samples; ++n)
      for (int64_t k = 0; k < s.channels; ++k)
        for (int64_t i = 0; i < c.inputs(); ++i)
          values[size_t((n * c.channels + first + k) * c.inputs() + i)] = y.get(n, k, i);
  }
  return values;
}

bool are_same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

int64_t ties = 0, bests_that_are_none = 0, bests_that_are_least = 0;

// One value of y, with its place, from a plane.
std::string fault_of_largest(const Case& c, const double* plane, int64_t output, double given, int64_t given_place) {
  int64_t place = -1, equal = 0;
  double best = 0;
  for_window(c.pool, output, [&](int64_t t, int64_t i) {
    const double v = plane[i];
    if (place < 0 || v > best || std::isnan(v)) {  // nothing is larger than NaN
      place = t;
      best = v;
      equal = 0;
    } else {
      equal += v == best;
    }
  });
  ties += equal > 0;
  bests_that_are_none += std::isnan(best);
  bests_that_are_least += best == -INFINITY;
  if (are_same(best, given) && place == given_place) return "";
  char text[160];
  std::snprintf(text, sizeof(text), "largest value %lld is %.17g at %lld, expected %.17g at %lld", (long long)output,
                given, (long long)given_place, best, (long long)place);
  return text;
}

// y and places, by values that are pooled. Of means only those of numbers.
std::string fault_of_pooled(const Problem& p, const Result& r, const std::vector<double>& values) {
  const Case& c = p.c;
  Judge judge;
  for (int64_t n = 0; n < c.samples; ++n)
    for (int64_t k = 0; k < c.channels; ++k) {
      const int64_t at = n * c.channels + k;
      const double* const plane = values.data() + at * c.inputs();
      for (int64_t o = 0; o < c.outputs(); ++o) {
        if (!c.pool.mean) {
          const std::string fault = fault_of_largest(c, plane, o, r.y.get(n, k, o), r.places[at * c.outputs() + o]);
          if (!fault.empty()) return fault;
          continue;
        }
        double sum = 0, magnitude = 0;
        for_window(c.pool, o, [&](int64_t, int64_t i) { sum += plane[i], magnitude += std::fabs(plane[i]); });
        if (!std::isfinite(sum)) {
          if (std::isfinite(r.y.get(n, k, o))) return "a mean of what is not finite is";
          continue;
        }
        const Real count = Real(c.taps()), error = products_error(c.dtype, c.taps() + 1) * magnitude;
        judge.expect("y", n, k, o, r.y.get(n, k, o), stored({sum / count, error / count}, c.dtype));
      }
    }
  return judge.fault;
}

// The statistics, what is pooled, and the gradients through these places.
std::string fault_of(const Problem& p, const Result& r, const std::vector<double>& values) {
  const Case& c = p.c;
  Judge judge;
  for (int64_t k = 0; k < c.channels; ++k) {
    const std::string fault = p.norm.judge_statistics(judge, k, r.norm);
    if (!fault.empty()) return fault;
    const Coefficients coefficients = p.norm.coefficients(k, r.norm.mean[k], r.norm.var[k]);
    Boundeds of_planes;
    for (int64_t n = 0; n < c.samples; ++n) {
      const int64_t at = n * c.channels + k;
      for (int64_t i = 0; i < c.inputs(); ++i) {
        const Bounded right = stored(p.norm.result(coefficients, {p.x.get(n, k, i), 0}), c.dtype);
        judge.expect("pooled value", n, k, i, values[size_t(at * c.inputs() + i)], right);
      }
      std::vector<double> sum(size_t(c.inputs()), 0.0), magnitude = sum, terms = sum;
      for (int64_t o = 0; o < c.outputs(); ++o)
        for_window(c.pool, o, [&](int64_t t, int64_t i) {
          if (!c.pool.mean && r.places[at * c.outputs() + o] != t) return;
          const double share = p.dy.get(n, k, o) / (c.pool.mean ? double(c.taps()) : 1);
          sum[size_t(i)] += share;
          magnitude[size_t(i)] += std::fabs(share);
          ++terms[size_t(i)];
        });
      for (size_t i = 0; i < sum.size(); ++i)
        of_planes.push_back(element({sum[i], products_error(c.dtype, int64_t(terms[i]) + 1) * magnitude[i]}, c.dtype));
    }
    const Norm::Gradients right = p.norm.differentiate(k, p.values_of(k), of_planes);
    right.judge(judge, k, r.norm);
    for (int64_t n = 0; c.wants_x && n < c.samples; ++n)
      for (int64_t i = 0; i < c.inputs(); ++i)
        judge.expect("dx", n, k, i, r.dx.get(n, k, i), right.x[size_t(n * c.inputs() + i)]);
  }
  return judge.fault;
}

// One channel's values are not finite, some or all of them: they are pooled by the same rule, and other channels have
// the same bits as before.
std::string fault_of_nonfinite(const Problem& p, const Result& before, const Manner& how) {
  const Case& c = p.c;
  Random random(c.seed + 77);
  const int64_t k = random.below(c.channels), kind = random.below(3);
  const double values[] = {NAN, INFINITY, -INFINITY};
  std::vector<double> old;
  for (int64_t n = 0; n < c.samples; ++n)
    for (int64_t i = 0; i < c.inputs(); ++i) {
      old.push_back(p.x.get(n, k, i));
      if (kind == 1)
        p.x.set(n, k, i, values[1 + c.seed % 2]);
      else if (random.below(kind ? 3 : 12) == 0 || (n == 0 && i == 0))
        p.x.set(n, k, i, values[random.below(3)]);
    }
  const int64_t sample = random.below(c.samples), place = random.below(c.outputs());
  const double old_dy = p.dy.get(sample, k, place);
  p.dy.set(sample, k, place, values[random.below(3)]);
  const std::unique_ptr<Result> after = run(p, how);
  std::string fault = fault_of_pooled(p, *after, pooled_values(p));
  for (int64_t n = 0, at = 0; n < c.samples; ++n)
    for (int64_t i = 0; i < c.inputs(); ++i) p.x.set(n, k, i, old[size_t(at++)]);
  p.dy.set(sample, k, place, old_dy);
  for (int64_t other = 0; other < c.channels; ++other)
    if (other != k && before.channel(c, other) != after->channel(c, other))
      return "values of channel " + std::to_string(k) + " that are no numbers reach channel " + std::to_string(other);
  return fault;
}

int64_t cuts = 0;  // calls of Parallel

void examine_way(const Problem& p, const std::string& name) {
  const Case& c = p.c;
  now = name + " " + c.text();
  Partition partition;
  const Manner plain{1, char(-1), &partition};  // bytes of NaN
  const std::unique_ptr<Result> first = run(p, plain);
  const std::vector<double> values = pooled_values(p);
  tally(fault_of_pooled(p, *first, values));
  tally(fault_of(p, *first, values));
  const Bytes bits = first->bytes(c);
  for (int64_t threads : {2, 3}) {
    Partition parts{threads == 3 && c.seed % 8 == 0};
    const std::unique_ptr<Result> other = run(p, {threads, char(threads == 2 ? 0x3c : 0), &parts});
    check(other->bytes(c) == bits, threads == 2 ? "other bits with two threads" : "other bits with three threads");
    check(other->guards_intact(), "memory beside the results was written");
    cuts += parts.calls;
  }
  tally(fault_of_nonfinite(p, *first, plain));
  check(first->guards_intact(), "memory beside the results was written");
}

void examine(const Case& c) {
  const Problem p(c);
  Bytes before, after;
  const auto append_operands = [&](Bytes& to) {
    p.x.append_to(to);
    p.dy.append_to(to);
    p.norm.append_statistics(to);
  };
  append_operands(before);
  for (const char* isa : {"avx512", "avx2", "neon", "baseline"}) {
    if (!batchnorm::select_instruction_set(isa)) continue;
    test_caches.l2 = 1;
    examine_way(p, isa);
    if (c.channels < 64) continue;
    test_caches.l2 = int64_t(1) << 40;
    examine_way(p, isa + std::string(" chunks of channels"));
  }
  append_operands(after);
  check(before == after && p.x.guards_intact() && p.dy.guards_intact(), "operands were written");
}

// ---------------------------------------------------------------------------------------------- the cases
// Gives the result's size, whose last window may reach beyond the plane (`up`), but begins on it; whether there is one.
bool set_output(Pooling& p, bool up) {
  for (int axis : {0, 1}) {
    const int64_t moves = p.size[axis] + 2 * p.padding[axis] - p.kernel[axis] + (up ? p.stride[axis] - 1 : 0);
    if (moves < 0) return false;
    p.out[axis] = moves / p.stride[axis] + 1;
    if (up && (p.out[axis] - 1) * p.stride[axis] >= p.size[axis] + p.padding[axis]) --p.out[axis];
  }
  return true;
}

Case drawn(const Pooling& pool, Dtype dtype, int64_t samples, int64_t channels, uint64_t seed) {
  Random random(seed * 7919 + 13);
  const Layout layouts[] = {Layout::dense, Layout::misaligned, Layout::padded, Layout::aligned, Layout::transposed};
  const bool wants_x = random.below(5) != 0;
  const NormKind norm = NormKind::drawn(random);
  return {pool, dtype, samples, channels, wants_x, norm, layouts[random.below(5)], seed};
}

uint64_t seed = 0;
void examine_all(const Pooling& pool, int64_t samples, int64_t channels) {
  for (Dtype dtype : kDtypes)
    if (!is_left_out(++seed)) examine(drawn(pool, dtype, samples, channels, seed));
}

enum Kind { kDown, kUp, kMean };

// A geometry of that kind and of planes of at most that size.
Pooling geometry(Random& random, Kind kind, int64_t rows, int64_t columns, int64_t down, int64_t across,
                 int64_t most_rows, int64_t most_columns) {
  Pooling p{{}, {}, {rows, columns}, {down, across}, {}, kind == kMean};
  do {
    p.size[0] = 1 + random.below(most_rows);
    p.size[1] = 1 + random.below(most_columns);
    for (int axis : {0, 1}) p.padding[axis] = kind == kMean ? 0 : random.below(p.kernel[axis] / 2 + 1);
  } while (!set_output(p, kind == kUp));
  return p;
}

void geometries() {
  constexpr int64_t kernels[][2] = {{1, 1}, {2, 2}, {3, 3}, {3, 2}, {2, 5}, {7, 7}, {1, 4}, {5, 1}, {4, 6}};
  Random random(1);
  for (const auto& kernel : kernels)
    for (int64_t down = 1; down <= 4; ++down)
      for (int64_t across = 1; across <= 4; ++across)
        for (Kind kind : {kDown, kUp, kMean}) {
          const bool is_wide = random.below(3) == 0;
          const Pooling p =
              geometry(random, kind, kernel[0], kernel[1], down, across, is_wide ? 12 : 19, is_wide ? 70 : 21);
          examine_all(p, 1 + random.below(3), 1 + random.below(3));
        }
}

// As many places as there may be.
void large_windows() {
  constexpr int64_t kernels[][2] = {{16, 15}, {15, 17}, {1, batchnorm::kMostPlaces}, {batchnorm::kMostPlaces, 1}};
  Random random(2);
  for (const auto& kernel : kernels)
    for (Kind kind : {kDown, kUp, kMean})
      for (int64_t stride : {1, 3}) {
        const int64_t rows = kernel[0] > 99 ? 280 : 24, columns = kernel[1] > 99 ? 280 : 24;
        const Pooling p = geometry(random, kind, kernel[0], kernel[1], stride, 1 + random.below(4),
                                   kernel[1] > 99 ? 3 : rows, kernel[0] > 99 ? 3 : columns);
        examine_all(p, 1, 2);
      }
}

// Planes of one value and of one row; large ones, whose pools of 16-bit values are added up in float32; chunks of
// several channels, and a last one of fewer.
void sizes() {
  const auto each = [&](int64_t rows, int64_t columns, int64_t kernel, int64_t stride, Kind kind, int64_t samples,
                        int64_t channels) {
    Pooling p{{rows, columns}, {}, {kernel, kernel}, {stride, stride}, {}, kind == kMean};
    for (int axis : {0, 1}) p.padding[axis] = kind == kMean ? 0 : kernel / 2;
    if (set_output(p, kind == kUp)) examine_all(p, samples, channels);
  };
  for (Kind kind : {kDown, kUp, kMean}) {
    each(1, 1, 1, 1, kind, 5, 3);
    each(1, 1, 3, 2, kind, 2, 3);
    each(1, 33, 2, 2, kind, 3, 2);
    each(33, 1, 2, 1, kind, 3, 2);
    each(60, 57, 3, 2, kind, 3, 1);
    each(60, 57, 2, 2, kind, 1, 2);
    each(60, 57, 3, 1, kind, 3, 1);
    each(5, 6, 3, 2, kind, 2, 69);
    each(4, 4, 2, 2, kind, 3, 97);
  }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  begin_tally();
  geometries();
  large_windows();
  sizes();
  now = "coverage";
  check(cuts > 0, "no call was cut for threads");
  check(ties > 0 && bests_that_are_none > 0 && bests_that_are_least > 0, "values were never equal, NaN, or the least");
  return end_tally();
}
