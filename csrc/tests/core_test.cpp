// Every verb of batchnorm.h against a long double oracle: instruction set x order x dtype x activation x residual and
// signs x lengths around the vector widths x misalignment, padding and pools; and what must hold exactly: the same bits
// for every partition, channels that do not reach one another, memory that is not the core's own left alone.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <thread>

#include "verbs.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace test {
namespace {

constexpr batchnorm::Caches kOrdinaryCaches{32 << 10, 512 << 10, 32 << 20};
constexpr batchnorm::Caches kSmallCaches{4 << 10, 16 << 10, 64 << 10};  // pieces are cut sooner
constexpr batchnorm::Caches kTinyCaches{256, 512, 1 << 10};             // nearly everything is written around the cache
batchnorm::Caches test_caches = kOrdinaryCaches;

}  // namespace
}  // namespace test

namespace batchnorm {

// The cut follows from the shape and the cache sizes: with these it is the same on every machine.
const Caches& caches() { return test::test_caches; }
const Caches& machine_caches();  // what dispatch.cpp finds; CMakeLists.txt renames its caches() for this test

}  // namespace batchnorm

namespace test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
constexpr Order kOrders[] = {Order::planar, Order::interleaved};

// ---------------------------------------------------------------------------------------------- the tally
int64_t passed = 0, failed = 0;
std::string now;  // what is being checked, for the report of a sanitizer too

void tally(const std::string& fault) {
  if (fault.empty()) {
    ++passed;
  } else if (++failed <= 20) {
    std::printf("FAILED %s\n       %s\n", now.c_str(), fault.c_str());
  }
}

void check(bool condition, const char* what) { tally(condition ? "" : what); }

std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
  for (const char* name : {"avx512", "avx2", "neon", "baseline"})
    if (batchnorm::select_instruction_set(name)) found.push_back(name);
  return found;
}

// An emulated processor takes a hundred times as long, most of it for the oracle's long double, which aarch64 has in
// software alone. There one case of so many is examined. Which one is told by mixed bits of its number, so no loop of a
// grid is in step with them, and each value of each axis is met.
int64_t cases_for_one() {
  static const char* const given = std::getenv("BATCHNORM_TEST_CASES_FOR_ONE");
  return given ? std::max(1, std::atoi(given)) : 1;
}

bool is_left_out() {
  static uint64_t number = 0;
  uint64_t mixed = ++number * 0x9e3779b97f4a7c15;
  mixed = (mixed ^ mixed >> 31) * 0xbf58476d1ce4e5b9;
  return (mixed >> 33) % uint64_t(cases_for_one()) != 0;
}

// ---------------------------------------------------------------------------------------------- partitions
// Runs the body over `ranges` parts of the count, on a thread each or last to first on this one.
struct Partition {
  int64_t ranges = 1;
  bool threads = false;
  int64_t calls = 0;

  batchnorm::Parallel parallel() { return {&run, this}; }
  static void run(void* self, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    auto* p = static_cast<Partition*>(self);
    ++p->calls;
    const int64_t ranges = std::min(p->ranges, count);
    std::vector<std::thread> threads;
    for (int64_t k = ranges - 1; k >= 0; --k) {
      const int64_t begin = k * count / ranges, end = (k + 1) * count / ranges;
      if (p->threads)
        threads.emplace_back(body, context, begin, end);
      else
        body(context, begin, end);
    }
    for (std::thread& t : threads) t.join();
  }
};

// ---------------------------------------------------------------------------------------------- examination
bool is_zero_where_invalid(const Problem& p, const Tensor& t) {
  for (int64_t n = 0; n < p.c.shape.samples; ++n)
    for (int64_t i = 0; i < p.c.shape.inner; ++i)
      if (!p.is_valid(n, i))
        for (int64_t c = 0; c < p.c.shape.channels; ++c)
          if (t.get(n, c, i) != 0) return false;
  return true;
}

void run(const Verb& verb, Run& r) {
  now = std::string(batchnorm::instruction_set()) + " " + verb.name + ": " + r.p.c.text();
  verb.run(r);
  for (const Tensor& t : r.tensors) {
    r.expect(t.guards_intact(), "an output was written beside its elements");
    if (r.p.is_masked()) r.expect(is_zero_where_invalid(r.p, t), "an output is not zero where nothing is valid");
  }
}

// Each verb against the oracle, on each instruction set; what is only read stays as it is.
void examine(const Case& c) {
  if (is_left_out()) return;
  const Problem p(c);
  const std::vector<char> inputs = p.input_bytes();
  Partition serial;
  for (const char* name : instruction_sets()) {
    batchnorm::select_instruction_set(name);
    for (const Verb& verb : kVerbs) {
      Run r{p, serial.parallel(), true};
      run(verb, r);
      tally(r.fault);
    }
  }
  check(p.input_bytes() == inputs, "an input was written");
}

// The same, and the same bits for every partition of the work. Returns the most calls of Parallel that a verb made:
// none where it is run serially, one where each piece is whole, more where the phases are apart; -1 if left out.
int64_t examine_partitions(const Case& c) {
  if (is_left_out()) return -1;
  const Problem p(c);
  int64_t calls = 0;
  for (const char* name : instruction_sets()) {
    batchnorm::select_instruction_set(name);
    for (const Verb& verb : kVerbs) {
      Partition one;
      Run r{p, one.parallel(), true};
      run(verb, r);
      calls = std::max(calls, one.calls);
      const std::vector<char> bytes = r.bytes();
      for (Partition partition : {Partition{2, true}, {3, true}, {7, true}, {3, false}, {1 << 30, false}}) {
        Run again{p, partition.parallel(), false};
        run(verb, again);
        r.expect(again.fault.empty(), again.fault);
        r.expect(again.bytes() == bytes, "other bits with " + std::to_string(partition.ranges) + " ranges" +
                                             (partition.threads ? " on threads" : ", last to first"));
      }
      tally(r.fault);
    }
  }
  return calls;
}

// ---------------------------------------------------------------------------------------------- the grids
Shape planar(Dtype dtype, int64_t samples, int64_t channels, int64_t inner, int64_t pool) {
  return {Order::planar, dtype, samples, channels, inner, pool};
}
Shape interleaved(Dtype dtype, int64_t samples, int64_t channels, int64_t pool) {
  return {Order::interleaved, dtype, samples, channels, 1, pool};
}

constexpr Activation kSmooth[] = {Activation::silu, Activation::gelu, Activation::hardswish, Activation::sigmoid,
                                  Activation::tanh, Activation::elu,  Activation::mish,      Activation::gelu_tanh};

// One of each way through the kernels: identity, relu, and an activation chosen inside; alone, with residual, with
// signs.
std::vector<Fused> fusions(uint64_t k) {
  const Activation smooth = kSmooth[k % std::size(kSmooth)],
                   piecewise = k / 5 % 2 ? Activation::relu6 : Activation::leaky_relu;
  return {{Activation::identity},
          {Activation::identity, true},
          {Activation::relu},
          {Activation::relu, true},
          {piecewise},
          {Activation::relu, true, true},
          {smooth},
          {smooth, true},
          {piecewise, true},
          {piecewise, true, true}};
}

Fused fusion(uint64_t k) { return fusions(k / 10)[k % 10]; }

// Lengths of the contiguous axis around multiples of 2, 4, 8 and 16 lanes, with every way through the kernels, into the
// cache and around it.
void lengths() {
  uint64_t k = 0, round = 0, step = 0;
  for (int64_t length :
       {1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 100, 129, 143})
    for (Dtype dtype : kDtypes)
      for (Fused fused : fusions(++round)) {
        ++step;
        for (int variant = 0; variant < 4; ++variant) {
          test_caches = variant % 2 ? kTinyCaches : kOrdinaryCaches;
          const Layout layout = Layout((step + 3 * (variant / 2)) % 6);
          const int64_t few[] = {3, 5, 34}, rows = length < 63 ? few[++k % 3] : 4 + ++k % 6;
          examine({planar(dtype, 2 + variant / 2, 3, length, 2), layout, fused, k});
          examine({interleaved(dtype, rows, length, rows), layout, fused, k});
        }
      }
  test_caches = kOrdinaryCaches;
}

// A result in the place of an operand has the bits that it has beside it, whatever the partition.
void examine_in_place(const Case& c) {
  if (is_left_out()) return;
  const Problem p(c);
  for (const char* name : instruction_sets()) {
    batchnorm::select_instruction_set(name);
    for (const InPlace& each : kInPlace) {
      if (each.needs_residual && !c.fused.residual) continue;
      Partition one;
      Run apart{p, one.parallel(), false};
      run(each.apart, apart);
      for (Partition partition : {Partition{1}, {3, true}, {1 << 30, false}}) {
        Run over{p, partition.parallel(), false};
        run(each.over, over);
        over.expect(over.bytes() == apart.bytes(), "other bits than apart");
        tally(over.fault.empty() ? apart.fault : over.fault);
      }
    }
  }
}

void places() {
  uint64_t k = 0;
  for (Dtype dtype : kDtypes)
    for (int64_t length : {1, 3, 8, 15, 17, 33, 49, 70, 143})
      for (int variant = 0; variant < 5; ++variant) {
        test_caches = ++k % 2 ? kTinyCaches : kOrdinaryCaches;
        const Fused fused = fusion(10 * k + (2 * k + variant) % 10);
        const Layout layout = Layout((k + variant) % 4);  // no broadcast ones: these cannot be written
        examine_in_place({planar(dtype, 5, 7, length, variant % 2 ? 5 : 2), layout, fused, k});
        examine_in_place({interleaved(dtype, 40, length, variant % 2 ? 40 : 9), layout, fused, k});
      }
  test_caches = kSmallCaches;
  for (Dtype dtype : kDtypes) {
    examine_in_place({planar(dtype, 4, 2, 3001, 4), Layout::dense, fusion(++k), k});
    examine_in_place({interleaved(dtype, 2100, 19, 2100), Layout::dense, fusion(++k), k});
  }
  test_caches = kOrdinaryCaches;
}

// Planes and rows so short that several are walked at once, with what is left of them, from pieces of every kind.
void short_runs() {
  uint64_t k = 0;
  for (Dtype dtype : kDtypes)
    for (int variant = 0; variant < 3; ++variant) {
      test_caches = variant ? kTinyCaches : kOrdinaryCaches;
      for (int64_t inner : {2, 4, 9, 49, 81, 256, 257})
        for (int64_t channels : {1, 5, 23}) {
          const Fused fused = fusions(k / 3)[++k % 10];
          examine({planar(dtype, 8 + int64_t(k % 2), channels, inner, 8), Layout(k % 4), fused, k});
        }
      for (int64_t channels : {1, 2, 3, 5, 12, 17, 40})
        for (int64_t pool : {600, 1400}) {
          const Fused fused = fusions(k / 3)[++k % 10];
          examine({interleaved(dtype, 1400, channels, pool), Layout(k % 4), fused, k});
        }
    }
  const Fused plain[] = {{}, {Activation::relu}, {Activation::silu, true}};
  const Fused signs{Activation::relu, true, true};
  for (Dtype dtype : kDtypes) {
    for (const Shape& s :
         {planar(dtype, 9, 60, 144, 9), planar(dtype, 40, 130, 25, 20), interleaved(dtype, 24000, 3, 24000)})
      for (const Fused& fused : plain) examine_partitions({s, Layout(++k % 2), fused, k});
    for (const Shape& s :
         {planar(dtype, 9, 60, 100, 9), planar(dtype, 12, 171, 9, 12), interleaved(dtype, 2000, 16, 2000)})
      examine_partitions({s, Layout(++k % 2), signs, k});
  }
  test_caches = kOrdinaryCaches;
}

// The other axes: channels beside one another in planar order, rows in interleaved order; pools of each kind.
void counts() {
  uint64_t k = 0;
  for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 129})
    for (Dtype dtype : kDtypes)
      for (int64_t other : {1, 2, 9}) {
        const Fused fused = fusion(++k);
        examine({planar(dtype, 3, count, other, 3), Layout(k % 4), fused, k});
        examine({interleaved(dtype, count, 4 * other + 1, count), Layout(k % 4), fused, k});
      }
  for (Dtype dtype : kDtypes)
    for (int64_t pool : {1, 2, 3, 7, 11})
      for (Fused fused : fusions(++k)) {
        examine({planar(dtype, 11, 5, 13, pool), Layout(++k % 4), fused, k});
        examine({interleaved(dtype, 11, 19, pool), Layout(k % 4), fused, k});
      }
}

// Distributions that lose digits, with statistics of the batch and beside it.
void values() {
  uint64_t k = 0;
  for (Values v : {Values::far, Values::narrow, Values::constant, Values::outlier, Values::outlier_first,
                   Values::denormal, Values::huge})
    for (Dtype dtype : kDtypes)
      for (Fused fused : {Fused{}, Fused{Activation::relu}, Fused{Activation::silu, true}})
        for (double eps : {1e-5, 1e-12}) {
          examine({planar(dtype, 5, 4, 37, 5), Layout::dense, fused, ++k, v, eps});
          examine({interleaved(dtype, 70, 21, 35), Layout::dense, fused, k, v, eps});
        }
}

// Every activation, far beyond where it saturates, with a slope of its own.
void activations() {
  uint64_t k = 0;
  for (int a = 0; a <= int(Activation::gelu_tanh); ++a)
    for (Dtype dtype : kDtypes)
      for (Values v : {Values::ordinary, Values::wide})
        for (bool residual : {false, true}) {
          examine({planar(dtype, 2, 3, 301, 2), Layout::dense, {Activation(a), residual}, ++k, v, 1e-5, 0.2});
          examine({interleaved(dtype, 45, 19, 45), Layout::dense, {Activation(a), residual}, k, v, 1e-5, -0.3});
        }
}

// Large enough for every cut: pieces that are whole, parts of planes, blocks of samples and rows, pools of each.
std::vector<Shape> large_shapes(Dtype dtype) {
  return {planar(dtype, 2, 3, 40, 1),       planar(dtype, 2, 3, 6001, 2),       planar(dtype, 2100, 1, 33, 2100),
          planar(dtype, 1, 1, 66000, 1),    planar(dtype, 3, 1, 33003, 2),      planar(dtype, 10, 160, 49, 10),
          planar(dtype, 10, 140, 49, 3),    planar(dtype, 12, 130, 22, 12),     planar(dtype, 9, 2, 2500, 4),
          interleaved(dtype, 40, 17, 40),   interleaved(dtype, 4100, 17, 4100), interleaved(dtype, 5000, 9, 1700),
          interleaved(dtype, 20, 4000, 20), interleaved(dtype, 100, 700, 100),  interleaved(dtype, 7000, 9, 4000),
          planar(dtype, 300, 5, 49, 2),     interleaved(dtype, 700, 100, 5)};
}

void large() {
  uint64_t k = 0;
  std::set<std::pair<Order, int64_t>> reached;
  for (Dtype dtype : kDtypes) {
    const std::vector<Shape> shapes = large_shapes(dtype);
    for (size_t i = 0; i < shapes.size(); ++i) {
      test_caches = (i + size_t(dtype)) % 2 ? kSmallCaches : kOrdinaryCaches;
      const Fused fused = fusion(++k);
      const int64_t calls = examine_partitions({shapes[i], Layout(k % 4), fused, k});
      reached.insert({shapes[i].order, std::min<int64_t>(calls, 2)});
    }
  }
  test_caches = kOrdinaryCaches;
  if (cases_for_one() > 1) return;
  now = "the shapes of large() reach serial, whole and parted plans";
  for (Order order : kOrders)
    for (int64_t calls : {0, 1, 2}) check(reached.count({order, calls}) == 1, "a kind of plan is no longer reached");
}

// Some positions valid, NaN and infinity at the others: from none to nearly all, in pools of each kind and every cut.
void masks() {
  uint64_t k = 0;
  for (Dtype dtype : kDtypes)
    for (int percent : {0, 3, 25, 50, 95})
      for (Fused fused : fusions(++k)) {
        if (fused.signs) continue;
        const Layout layout = Layout(++k % 4);
        test_caches = k % 2 ? kTinyCaches : kOrdinaryCaches;
        examine({planar(dtype, 6, 3, 37, k % 3 ? 6 : 4), layout, fused, k, Values::ordinary, 1e-5, 0.01, percent});
        examine({interleaved(dtype, 90, 19, k % 3 ? 90 : 31), layout, fused, k, Values::far, 1e-5, 0.01, percent});
      }
  for (Dtype dtype : kDtypes)
    for (const Shape& s :
         {planar(dtype, 10, 70, 49, 3), planar(dtype, 3, 1, 33003, 2), interleaved(dtype, 2100, 17, 2100),
          interleaved(dtype, 2000, 9, 700), interleaved(dtype, 1500, 50, 9), planar(dtype, 40, 3, 601, 40),
          interleaved(dtype, 120, 640, 120)}) {
      test_caches = ++k % 2 ? kSmallCaches : kOrdinaryCaches;
      examine_partitions({s, Layout(k % 4), {Activation(k % 4), k % 2 == 0}, k, Values::ordinary, 1e-5, 0.01, 40});
    }
  test_caches = kOrdinaryCaches;
}

// Nothing in, nothing out: mean and m2 of no values are 0, sums too, and no operand is touched.
void empties() {
  for (const char* name : instruction_sets())
    for (Dtype dtype : kDtypes)
      for (uint64_t seed : {0, 1})
        for (const Shape& s : {planar(dtype, 0, 3, 5, 0), planar(dtype, 0, 3, 5, 2), planar(dtype, 4, 3, 0, 4),
                               planar(dtype, 4, 3, 0, 3), planar(dtype, 4, 0, 5, 4), interleaved(dtype, 0, 3, 0),
                               interleaved(dtype, 4, 0, 2)}) {
          batchnorm::select_instruction_set(name);
          Partition serial;
          const Problem p({s, Layout::dense, {Activation::relu, true, true}, seed});
          for (const Verb& verb : kVerbs) {
            Run r{p, serial.parallel(), true};
            run(verb, r);
            for (const Doubles& d : r.statistics)
              for (int64_t i = 0; i < d.size(); ++i) r.expect(d[i] == 0, "a statistic of no values is not 0");
            tally(r.fault);
          }
        }
}

// ---------------------------------------------------------------------------------------------- non-finite values
struct Place {
  int64_t n, c, i;
};

bool same_plane(const Tensor& a, const Tensor& b, int64_t n, int64_t c) {
  std::vector<char> first, second;
  a.append_plane(n, c, first);
  b.append_plane(n, c, second);
  return first == second;
}

enum class Spoilt { x, dy, residual };

// What a spoilt value does to the outputs of its own channel and pool. In x, by the batch's statistics: y all NaN, and
// by sums that are not finite, nor is dx; by constant coefficients it stays where it is.
std::string own_fault(const Run& before, const Run& after, const Verb& verb, Spoilt what, Place place, size_t t,
                      int64_t n) {
  const bool by_sums = verb.run == backward && t == 0;
  for (int64_t i = 0; i < after.shape().inner; ++i) {
    const double was = before.tensors[t].get(n, place.c, i), is = after.tensors[t].get(n, place.c, i);
    if (what == Spoilt::x && verb.run == forward) {
      if (!std::isnan(is)) return "y by a spoilt channel's statistics is not NaN";
    } else if (by_sums) {
      if (what == Spoilt::x && std::isfinite(is)) return "dx by a spoilt channel's sums is finite";
    } else if (n != place.n || i != place.i) {
      if (is != was) return "constant coefficients let it reach another element";
    } else if (verb.run == normalize && what == Spoilt::x && std::isnan(after.p.x.get(n, place.c, i))) {
      if (!std::isnan(is)) return "y of NaN is not NaN";
    }
  }
  return "";
}

std::string containment_fault(const Run& before, const Run& after, const Verb& verb, Spoilt what, Place place) {
  const Problem& p = before.p;
  const int64_t spoilt = p.statistic(place.n, place.c);
  const bool of_x = verb.run == moments || verb.run == forward;
  for (size_t t = 0; t < after.tensors.size(); ++t)
    for (int64_t n = 0; n < before.shape().samples; ++n)
      for (int64_t c = 0; c < before.shape().channels; ++c) {
        if (p.statistic(n, c) != spoilt) {
          if (!same_plane(before.tensors[t], after.tensors[t], n, c)) return "it reached another channel or pool";
        } else if (const std::string own = own_fault(before, after, verb, what, place, t, n); !own.empty()) {
          return own;
        }
      }
  for (size_t d = 0; d < after.statistics.size(); ++d)
    for (int64_t s = 0; s < after.statistics[d].size(); ++s) {
      const bool own = s == (after.statistics[d].size() == p.statistics() ? spoilt : place.c);
      if ((!own || (of_x && what != Spoilt::x)) && before.statistics[d][s] != after.statistics[d][s])
        return "it reached another channel's statistics";
    }
  if (of_x && what == Spoilt::x &&
      (std::isfinite(after.statistics[0][spoilt]) || !std::isnan(after.statistics[1][spoilt])))
    return "its own mean is finite or its variance not NaN";
  return "";
}

// One value of one channel and pool is not finite: everything of the others has the bits that it has without it.
void contain(const Case& c, Spoilt what, Place place, double value) {
  if (is_left_out()) return;
  const Problem clean(c), spoilt(c);
  const Tensor& operand = what == Spoilt::x ? spoilt.x : what == Spoilt::dy ? spoilt.dy : spoilt.residual;
  operand.set(place.n, place.c, place.i, value);
  Partition one;
  for (const char* name : instruction_sets()) {
    batchnorm::select_instruction_set(name);
    for (const Verb& verb : kVerbs) {
      Run before{clean, one.parallel(), false}, after{spoilt, one.parallel(), false};
      run(verb, before);
      run(verb, after);
      const char* operands[] = {"x", "dy", "the residual"};
      now += ", " + std::to_string(value) + " in " + operands[int(what)];
      tally(after.fault.empty() ? containment_fault(before, after, verb, what, place) : after.fault);
    }
  }
}

void nonfinite() {
  const double infinity = std::numeric_limits<double>::infinity();
  uint64_t k = 0;
  for (Dtype dtype : kDtypes)
    for (double value : {double(NAN), infinity, -infinity})
      for (int a = 0; a <= int(Activation::gelu_tanh); ++a)
        for (Spoilt what : {Spoilt::x, Spoilt::dy, Spoilt::residual}) {
          const Fused fused{Activation(a), what == Spoilt::residual || ++k % 2 == 0};
          const int64_t at = int64_t(++k);
          contain({planar(dtype, 5, 4, 19, 3), Layout::dense, fused, k}, what, {at % 5, at % 4, at % 19}, value);
          contain({interleaved(dtype, 9, 37, 5), Layout::dense, fused, k}, what, {at % 9, at % 37, 0}, value);
        }
  contain({planar(Dtype::float32, 2, 3, 6001, 2)}, Spoilt::x, {1, 1, 6000}, NAN);
  contain({interleaved(Dtype::float32, 4100, 17, 4100)}, Spoilt::x, {0, 16, 0}, infinity);
}

// ---------------------------------------------------------------------------------------------- exact laws
// With mean 0, var 1 and eps 0 the transform is x * gamma, rounded to float32 and once more to the element: every
// 16-bit value must come out as its definition says, bit by bit (but for the sign of zero).
std::string conversion_fault(Order order, Dtype dtype, float gamma) {
  const Shape s = order == Order::planar ? planar(dtype, 1, 1, 65536, 1) : interleaved(dtype, 1311, 50, 1311);
  const int64_t count = s.samples * s.channels * s.inner;
  const Tensor x(s, Layout::dense, 0), y(s, Layout::dense, 0);
  auto* const in = static_cast<uint16_t*>(x.operand().data);
  const auto* const out = static_cast<uint16_t*>(y.operand().data);
  for (int64_t k = 0; k < count; ++k) in[k] = uint16_t(k);
  const std::vector<double> mean(size_t(s.channels), 0), var(size_t(s.channels), 1);
  const std::vector<float> scale(size_t(s.channels), gamma);
  const Doubles work(int64_t(batchnorm::workspace_size(s)));
  Partition one;
  batchnorm::normalize(s, x.operand(), y.operand(), mean.data(), var.data(), {scale.data(), Dtype::float32}, {}, 0, {},
                       work.data(), one.parallel());
  const Format& format = format_of(dtype);
  for (int64_t k = 0; k < count; ++k) {
    const float right = float(decode16(format, in[k])) * gamma;
    const double given = decode16(format, out[k]);
    const bool same = right == 0          ? given == 0
                      : std::isnan(right) ? std::isnan(given)
                                          : out[k] == encode16(format, right);
    if (!same) return "bits " + std::to_string(in[k]) + " became bits " + std::to_string(out[k]);
  }
  return "";
}

// Forwards of float32, of many values a channel. The statistics are given, or called x's own: then elements are
// computed in float32, with scale and shift in two parts. Some channels have extreme scales and shifts, or such that
// are no numbers. Some values are infinite where the statistics are given.
struct Extreme {
  double mean, var;
  float gamma, beta;
};
const double kInf = std::numeric_limits<double>::infinity();
const Extreme kExtremes[] = {{0, 1, 1, 0},        {3, 4, -1.7f, 0.3f},    {1e6, 1, 1.1f, 0},     {-250, 0.01, 0.2f, 5},
                             {0, 1, 0, 2.5f},     {0, 1, 1, 0},           {1, 1, 0x1p-60f, 1},   {2, 1, 0x1.01p-70f, 0},
                             {1e30, 1, 1e30f, 0}, {0.5, 1, 3e38f, 1},     {0, 1, 1, -3e38f},     {kInf, 1, 1, 0},
                             {0, kInf, 1, 0.25f}, {0, 1, float(kInf), 0}, {0, 1, 1, float(NAN)}, {-0.1, 1e-30, 1, 0}};

std::string extreme_fault(Order order, int64_t from, int64_t channels, Activation activation, bool threads, bool own) {
  const int64_t samples = order == Order::planar ? 11 : 1100, inner = order == Order::planar ? 100 : 1;
  const Shape s = order == Order::planar ? planar(Dtype::float32, samples, channels, inner, samples)
                                         : interleaved(Dtype::float32, samples, channels, samples);
  const Tensor x(s, Layout::dense, 0), y(s, Layout::dense, 0);
  std::vector<double> mean, var;
  std::vector<float> gamma, beta;
  Random random(uint64_t(from) + 1);
  for (int64_t c = 0; c < channels; ++c) {
    const Extreme& e = kExtremes[size_t(from + c) % std::size(kExtremes)];
    mean.push_back(e.mean), var.push_back(e.var), gamma.push_back(e.gamma), beta.push_back(e.beta);
    const double middle = std::isinf(e.mean) ? 0 : e.mean, width = std::isinf(e.var) ? 1 : std::sqrt(e.var);
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < inner; ++i) x.set(n, c, i, middle + width * random.normal());
    if (!own) x.set(3, c, 0, kInf), x.set(7, c, 0, -kInf);  // of which x's own statistics would not be finite
    x.set(8, c, 0, NAN), x.set(9, c, 0, 3e38);
  }
  batchnorm::Fusion fusion;
  fusion.activation = activation;
  const Doubles work(int64_t(batchnorm::workspace_size(s)));
  Partition parts{5, threads};
  batchnorm::normalize(s, x.operand(), y.operand(), mean.data(), var.data(), {gamma.data(), Dtype::float32},
                       {beta.data(), Dtype::float32}, 0, fusion, work.data(), parts.parallel(), own);
  const Precision precision = Precision::of_forward(Dtype::float32, samples * inner, own);
  for (int64_t c = 0; c < channels; ++c) {
    const Coefficients k{mean[size_t(c)], var[size_t(c)], gamma[size_t(c)], beta[size_t(c)], 0};
    const Real scale = Real(double(gamma[size_t(c)]) / std::sqrt(var[size_t(c)]));
    const Real shift = Real(double(beta[size_t(c)]) - mean[size_t(c)] * double(scale));
    // Values so near to such a mean are all alike, and then there is no scale.
    if (own && std::isfinite(mean[size_t(c)]) && 0x1p-24L * std::fabs(mean[size_t(c)] * scale) > 0x1p100L) continue;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < inner; ++i) {
        Real z = Real(x.get(n, c, i)) * scale + shift;
        // What is lost before the last rounding, that one, and what float64 loses of the shift.
        const Real lost = two_parts_error(precision, k, Real(x.get(n, c, i)), z, 0);
        if (activation == Activation::relu && z < 0) z = 0;
        const double given = y.get(n, c, i);
        const Real error =
            lost + 0x1.0001p-24L * std::fabs(z) + 0x1p-44L * (std::fabs(shift) + std::fabs(z - shift)) + 0x1p-149L;
        const bool beyond = std::fabs(z) > 0x1.fffffep127L;
        const bool right = std::isnan(z) ? std::isnan(given)
                           : beyond      ? given == (z > 0 ? kInf : -kInf) || std::fabs(given) >= 0x1.fffffdp127
                                         : std::fabs(Real(given) - z) <= error;
        if (!right) {
          char text[120];
          std::snprintf(text, sizeof(text), "y[%d, %d] of x %.9g is %.9g, expected %.9Lg +- %.2Lg", int(n), int(c),
                        x.get(n, c, i), given, z, error);
          return text;
        }
      }
  }
  return "";
}

void extremes() {
  const int64_t all = std::size(kExtremes);
  for (const char* name : instruction_sets())
    for (Order order : kOrders)
      for (Activation activation : {Activation::identity, Activation::relu})
        for (int64_t from = 0; from < all; ++from)
          for (int64_t channels : {int64_t(1), int64_t(3), 2 * all + 1})
            for (bool own : {false, true}) {
              batchnorm::select_instruction_set(name);
              now = std::string(name) + (own ? " own" : "") + " extremes, " +
                    (order == Order::planar ? "planar" : "interleaved") + ", " + std::to_string(channels) +
                    " channels from " + std::to_string(from);
              tally(extreme_fault(order, from, channels, activation, from % 2 != 0, own));
            }
}

void conversions() {
  for (const char* name : instruction_sets())
    for (Dtype dtype : {Dtype::bfloat16, Dtype::float16})
      for (Order order : kOrders)
        for (float gamma : {1.f, 1 / 3.f, 1.5f, 0x1.8p-9f, 0x1p-120f, 37.f, 0x1.fp+127f}) {
          batchnorm::select_instruction_set(name);
          char text[80];
          std::snprintf(text, sizeof(text), "%s conversions of %s %s, gamma %g", name,
                        order == Order::planar ? "planar" : "interleaved", format_of(dtype).name, double(gamma));
          now = text;
          tally(conversion_fault(order, dtype, gamma));
        }
}

// One plane or one row of given values.
struct Line {
  Shape shape;
  Tensor tensor;
  Line(const Shape& s, const std::vector<double>& values) : shape(s), tensor(s, Layout::dense, 0) {
    for (int64_t k = 0; k < int64_t(values.size()); ++k)
      is_planar() ? tensor.set(0, 0, k, values[k]) : tensor.set(0, k, 0, values[k]);
  }
  bool is_planar() const { return shape.order == Order::planar; }
  double operator[](int64_t k) const { return is_planar() ? tensor.get(0, 0, k) : tensor.get(0, k, 0); }
};

// What a verb writes across, into planes, has the bits that it has in rows, whatever the partition; nothing beside the
// planes is written. Rows of x come sample after sample, or place after place, as the rows of a batch of sequences do.
std::string across_fault(Dtype dtype, int64_t samples, int64_t channels, int64_t inner, uint64_t k) {
  Random random(k);
  const int64_t rows = samples * inner;
  Shape s = interleaved(dtype, rows, channels, k % 3 ? rows : std::max<int64_t>(1, rows / 3));
  std::vector<batchnorm::Range> valid;
  for (int64_t at = random.below(3); k % 4 == 0 && at < rows; at += 2 + random.below(2 * inner)) {
    valid.push_back({at, std::min(rows, at + 1 + random.below(inner))});
    at = valid.back().end;
  }
  if (!valid.empty()) s.valid = valid.data(), s.valid_count = int64_t(valid.size());
  const Layout layout = Layout(k % 4);
  const Tensor x(s, layout, k), residual(s, layout, k + 1), of_all(s, Layout::dense, k),
      of_elements(s, Layout::dense, k);
  const Tensor turned(interleaved(dtype, rows, channels, rows), layout, k);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      x.set(row, c, 0, random.normal());
      residual.set(row, c, 0, random.normal());
      turned.set(row % inner * samples + row / inner, c, 0, x.get(row, c, 0));
    }
  Fusion f;
  f.activation = k % 2 ? Activation::relu : Activation::silu;
  if (k % 5 == 1) f.residual = residual.operand();
  const Doubles mean(s.pools() * channels), var(s.pools() * channels), work(int64_t(batchnorm::workspace_size(s)));
  Partition one;
  batchnorm::forward(s, x.operand(), of_all.operand(), mean.data(), var.data(), {}, {}, 1e-5, f, work.data(),
                     one.parallel());
  batchnorm::normalize(s, x.operand(), of_elements.operand(), mean.data(), var.data(), {}, {}, 1e-5, f, work.data(),
                       one.parallel());
  Operand by_place = turned.operand();
  by_place.places = inner;
  by_place.outer = by_place.sample_stride;
  by_place.sample_stride *= samples;
  enum Way { all, again, elements, by_places };
  for (const auto& [way, how] : {std::pair{all, "forward"},
                                 {again, "forward again"},
                                 {elements, "normalize"},
                                 {by_places, "normalize by places"}}) {
    if (way == by_places && f.residual) continue;
    for (Partition partition : {Partition{1}, {3, true}, {1 << 30, false}}) {
      const Tensor planes(planar(dtype, samples, channels, inner, samples), Layout((k + 1) % 4), k + 2);
      Operand to = planes.operand();
      to.places = inner;
      const Doubles found(s.pools() * channels), spread(s.pools() * channels);
      if (way == all)
        batchnorm::forward(s, x.operand(), to, found.data(), spread.data(), {}, {}, 1e-5, f, work.data(),
                           partition.parallel());
      else
        batchnorm::normalize(s, way == by_places ? by_place : x.operand(), to, mean.data(), var.data(), {}, {}, 1e-5, f,
                             work.data(), partition.parallel(), way == again);
      const std::string at = std::string(" by ") + how + " in " + std::to_string(partition.ranges) + " ranges";
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < channels; ++c)
          if (planes.get(row / inner, c, row % inner) !=
              (way == all || way == again ? of_all : of_elements).get(row, c, 0))
            return "other bits across" + at;
      if (!planes.guards_intact()) return "written beside the planes" + at;
    }
  }
  return "";
}

void across() {
  uint64_t k = 0;
  for (const char* name : instruction_sets())
    for (Dtype dtype : kDtypes)
      for (const auto& [samples, channels, inner] : {std::tuple{1, 1, 2},
                                                     {3, 5, 7},
                                                     {2, 33, 64},
                                                     {4, 31, 65},
                                                     {3, 70, 129},
                                                     {2, 9, 300},
                                                     {40, 3, 9},
                                                     {5, 6, 300}})
        for (const batchnorm::Caches& caches : {kOrdinaryCaches, kTinyCaches}) {
          test_caches = caches;
          batchnorm::select_instruction_set(name);
          now = std::string(name) + " across " + format_of(dtype).name + " samples " + std::to_string(samples) +
                " channels " + std::to_string(channels) + " places " + std::to_string(inner);
          tally(across_fault(dtype, samples, channels, inner, ++k));
        }
  test_caches = kOrdinaryCaches;
}

// Rows become columns, in tiles of every size, and nothing else is written.
template <class T>
std::string transposition_fault(int64_t samples, int64_t rows, int64_t columns, uint64_t k) {
  const int64_t from_row = columns + int64_t(k % 3), to_row = rows + int64_t(k % 4);
  std::vector<T> from(size_t(samples * rows * from_row)), to(size_t(samples * columns * to_row + 1), T(99));
  for (size_t i = 0; i < from.size(); ++i) from[i] = T(i * 40503 + k);
  std::vector<T> right = to;
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        right[size_t((n * columns + c) * to_row + r)] = from[size_t((n * rows + r) * from_row + c)];
  Partition partition{3, true};
  batchnorm::transpose(sizeof(T), samples, rows, columns, {from.data(), rows * from_row, from_row},
                       {to.data(), columns * to_row, to_row}, partition.parallel());
  return to == right ? "" : "not the columns";
}

void transpositions() {
  uint64_t k = 0;
  for (int64_t rows : {1, 3, 8, 16, 31, 64, 130, 257, 300})
    for (int64_t columns : {1, 2, 7, 8, 33, 64, 100}) {
      now = "a transposition of " + std::to_string(rows) + " x " + std::to_string(columns);
      const int64_t samples = 1 + int64_t(++k % 3);
      tally(transposition_fault<uint16_t>(samples, rows, columns, k));
      tally(transposition_fault<uint32_t>(samples, rows, columns, k));
      tally(transposition_fault<uint64_t>(samples, rows, columns, k));
    }
}

// At the corners of the piecewise activations, z being x exactly: the value and the derivative that torch takes, and a
// sign that agrees. A closed gate holds infinity back.
std::string corner_fault(Order order, Dtype dtype, Activation a, bool residual) {
  const std::vector<double> corner = {-7, -3, -1, -0.0, 0, 0.5, 3, 5.96875, 6, 6.03125, 9};
  const int64_t count = int64_t(corner.size());
  const Shape s = order == Order::planar ? planar(dtype, 1, 1, count, 1) : interleaved(dtype, 1, count, 1);
  const std::vector<double> zero(corner.size(), 0), one(corner.size(), 1), infinity(corner.size(), INFINITY);
  const Line x(s, corner), zeros(s, zero), y(s, {});
  const Doubles work(int64_t(batchnorm::workspace_size(s)));
  const bool with_signs = residual && a != Activation::hardswish;
  std::vector<uint8_t> signs((corner.size() + 7) / 8);
  Partition serial;
  Fusion f{a, 0.25, residual ? zeros.tensor.operand() : Operand{}, with_signs ? signs.data() : nullptr};
  batchnorm::normalize(s, x.tensor.operand(), y.tensor.operand(), zero.data(), one.data(), {}, {}, 0, f, work.data(),
                       serial.parallel());
  const auto gradient = [&](const std::vector<double>& dy, bool by_signs) {
    Line dx(s, {});
    f.signs = by_signs ? signs.data() : nullptr;
    batchnorm::backward_apply(s, Line(s, dy).tensor.operand(), x.tensor.operand(), dx.tensor.operand(), {}, zero.data(),
                              one.data(), {}, {}, 0, f, one.data(), zero.data(), zero.data(), work.data(),
                              serial.parallel());
    return dx;
  };
  const Line dx = gradient(one, false), dx_by_signs = gradient(one, with_signs), gated = gradient(infinity, with_signs);
  for (int64_t k = 0; k < count; ++k) {
    const double z = corner[k], derivative = double(derivative_at(a, z, 0.25));
    const std::string at = " at " + std::to_string(z);
    if (a == Activation::hardswish && std::fabs(z) < 3) continue;  // is rounded
    if (y[k] != double(activation_at(a, z, 0.25))) return "another value" + at;
    if (dx[k] != derivative) return "another derivative" + at;
    if (dx_by_signs[k] != derivative) return "another derivative by signs" + at;
    if (with_signs && bool(signs[k / 8] >> (k % 8) & 1) != (derivative == 1)) return "another sign" + at;
    const bool holds = a == Activation::relu || (a == Activation::relu6 && with_signs);
    if (holds && derivative == 0 && gated[k] != 0) return "an infinite gradient passes a closed gate" + at;
  }
  return "";
}

void corners() {
  for (const char* name : instruction_sets())
    for (Dtype dtype : kDtypes)
      for (Order order : kOrders)
        for (Activation a : {Activation::relu, Activation::relu6, Activation::leaky_relu, Activation::hardswish})
          for (bool residual : {false, true}) {
            batchnorm::select_instruction_set(name);
            now = std::string(name) + " corners of " + name_of(a) + (residual ? " + residual, " : ", ") +
                  (order == Order::planar ? "planar " : "interleaved ") + format_of(dtype).name;
            tally(corner_fault(order, dtype, a, residual));
          }
}

// The choice of the instruction set, and the sizes of the machine's caches.
void selection(const std::string& at_load) {
  const std::vector<const char*> found = instruction_sets();
  now = "instruction sets";
  check(!found.empty() && at_load == found.front(), "not the best one was chosen at load");
  for (const char* name : found) {
    check(batchnorm::select_instruction_set(name), "one that was there is gone");
    check(!batchnorm::select_instruction_set("abacus"), "one that does not exist was chosen");
    check(std::string(batchnorm::instruction_set()) == name, "the choice did not hold");
  }
  for (const char* name : {"avx512", "avx2", "neon", "baseline"})
    if (std::find_if(found.begin(), found.end(), [&](const char* f) { return std::string(f) == name; }) == found.end())
      std::printf("%s: not on this machine\n", name);
  const batchnorm::Caches& c = batchnorm::machine_caches();
  now = "cache sizes";
  check(c.l1 >= 4096 && c.l2 >= c.l1 && c.l3 >= 1 << 16, "not those of a machine");
}

}  // namespace
}  // namespace test

// All parts, or the one that is named.
int main(int count, char** arguments) {
  using namespace test;
  const std::pair<const char*, void (*)()> parts[] = {
      {"lengths", lengths},   {"places", places},           {"masks", masks},
      {"large", large},       {"short_runs", short_runs},   {"counts", counts},
      {"values", values},     {"empties", empties},         {"activations", activations},
      {"corners", corners},   {"conversions", conversions}, {"nonfinite", nonfinite},
      {"extremes", extremes}, {"across", across},           {"transpositions", transpositions}};
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "while checking %s\n", now.c_str()); });
#endif
  selection(batchnorm::instruction_set());
  const int64_t before = passed;
  for (const auto& [name, part] : parts)
    if (count == 1 || name == std::string(arguments[1])) part();
  now = "a part";
  check(passed > before, "there is none of that name");
  std::printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
  return failed ? 1 : 0;
}
