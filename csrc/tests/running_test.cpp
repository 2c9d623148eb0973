// Running statistics against the formula in long double: dtype x pools and what is left of the last x momentum x biased
// and unbiased x either statistic absent; what the carry keeps; the same bits for every partition; memory beside the
// channels left alone. And the conversions of dtypes.h: every 16-bit value there and back, and the nearest of all
// values between two of them.
#include "running.h"

#include <cstdio>
#include <string>
#include <vector>

#include "dtypes.h"
#include "elements.h"

namespace test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
int64_t passed = 0, failed = 0;

void check(bool condition, const std::string& what) {
  if (condition)
    ++passed;
  else if (++failed <= 20)
    std::printf("FAILED %s\n", what.c_str());
}

// ---------------------------------------------------------------------------------------------- partitions
// Runs the body over `ranges` parts of the count, from the last to the first.
struct Partition {
  int64_t ranges;
  batchnorm::Parallel parallel() { return {&run, this}; }
  static void run(void* self, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t ranges = std::min(static_cast<Partition*>(self)->ranges, count);
    for (int64_t k = ranges - 1; k >= 0; --k) body(context, k * count / ranges, (k + 1) * count / ranges);
  }
};

// ---------------------------------------------------------------------------------------------- one update
struct Case {
  Dtype dtype;
  int64_t pools, channels, pool_count, last;  // values of a channel in each pool, and in the last
  double momentum;
  bool unbiased, has_mean, has_var;
  int64_t count() const { return (pools - 1) * pool_count + last; }
  std::string text() const {
    return std::string(format_of(dtype).name) + " pools " + std::to_string(pools) + " channels " +
           std::to_string(channels) + " count " + std::to_string(count()) + " momentum " + std::to_string(momentum) +
           (unbiased ? " unbiased" : " biased") + (has_mean ? " mean" : "") + (has_var ? " var" : "");
  }
};

// A running statistic with memory beside it that is not its own.
struct Buffer {
  Dtype dtype;
  int64_t channels;
  std::vector<char> bytes;
  Buffer(Dtype dtype, int64_t channels, Random& random, double low, double high)
      : dtype(dtype), channels(channels), bytes((channels + 2) * format_of(dtype).size, char(0x5a)) {
    for (int64_t c = 0; c < channels; ++c) encode(dtype, random.uniform(low, high), at(c));
  }
  char* at(int64_t c) { return bytes.data() + (c + 1) * format_of(dtype).size; }
  double operator[](int64_t c) { return decode(dtype, at(c)); }
  batchnorm::RunningStatistic running(bool there) {
    return there ? batchnorm::RunningStatistic{at(0), dtype} : batchnorm::RunningStatistic{};
  }
  bool guards_intact() const {
    const int64_t size = format_of(dtype).size;
    for (int64_t i = 0; i < size; ++i)
      if (bytes[i] != 0x5a || bytes[bytes.size() - 1 - i] != 0x5a) return false;
    return true;
  }
};

struct Expected {
  Real mean, var;
};

// All pools of a channel as one set of values: its mean and its variance.
Expected merged(const Case& c, const std::vector<double>& mean, const std::vector<double>& var, int64_t channel) {
  Real sum = 0, squares = 0;
  const auto part = [&](int64_t p) { return Real(p + 1 == c.pools ? c.last : c.pool_count); };
  for (int64_t p = 0; p < c.pools; ++p) sum += part(p) * mean[p * c.channels + channel];
  const Real all = sum / c.count();
  for (int64_t p = 0; p < c.pools; ++p) {
    const Real away = mean[p * c.channels + channel] - all;
    squares += part(p) * (var[p * c.channels + channel] + away * away);
  }
  return {all, squares / (c.unbiased && c.count() > 1 ? c.count() - 1 : c.count())};
}

void examine(const Case& c, uint64_t seed) {
  Random random(seed);
  std::vector<double> mean(c.pools * c.channels), var(mean.size());
  for (double& m : mean) m = random.uniform(-3, 5);
  for (double& v : var) v = random.uniform(0, 4);
  const Buffer mean_before(c.dtype, c.channels, random, -2, 2), var_before(c.dtype, c.channels, random, 0.1, 9);
  const batchnorm::BatchStatistics batch{c.pools, c.channels, c.count(), c.pool_count, mean.data(), var.data()};
  std::vector<char> first;
  for (int64_t ranges : {1, 2, 5, 1 << 20}) {
    Buffer running_mean = mean_before, running_var = var_before;
    Partition partition{ranges};
    batchnorm::update_statistics(batch, c.momentum, c.unbiased, running_mean.running(c.has_mean),
                                 running_var.running(c.has_var), partition.parallel());
    check(running_mean.guards_intact() && running_var.guards_intact(), c.text() + ": memory beside was written");
    std::vector<char> bytes = running_mean.bytes;
    bytes.insert(bytes.end(), running_var.bytes.begin(), running_var.bytes.end());
    if (first.empty()) first = bytes;
    check(bytes == first, c.text() + ": other bits with " + std::to_string(ranges) + " ranges");
    if (ranges > 1) continue;
    Buffer old_mean = mean_before, old_var = var_before;
    for (int64_t k = 0; k < c.channels; ++k) {
      const Expected e = merged(c, mean, var, k);
      const auto judge = [&](double got, double old, Real batch_value, bool there, const char* name) {
        const Real right = there ? (1 - Real(c.momentum)) * old + Real(c.momentum) * batch_value : Real(old);
        const Format& f = format_of(c.dtype);
        const Real rounding = f.unit_roundoff * std::fabs(right) + f.smallest / 2;
        check(std::fabs(got - right) <= (there ? 1.001L * rounding + 64 * 0x1p-53L * 9 : 0),
              c.text() + ": " + name + " of channel " + std::to_string(k) + " is " + std::to_string(got) + ", not " +
                  std::to_string(double(right)));
      };
      judge(running_mean[k], old_mean[k], e.mean, c.has_mean, "mean");
      judge(running_var[k], old_var[k], e.var, c.has_var, "variance");
    }
  }
}

void updates() {
  uint64_t seed = 0;
  for (Dtype dtype : kDtypes)
    for (int64_t pools : {1, 2, 7})
      for (int64_t channels : {1, 3, 64, 513})
        for (int64_t last : {1, 4})
          for (double momentum : {0.0, 0.1, 1.0 / 3, 1.0})
            for (int form = 0; form < 8; ++form)
              examine({dtype, pools, channels, 4, last, momentum, bool(form & 1), bool(form & 2), bool(form & 4)},
                      ++seed);
  // Enough for threads.
  for (Dtype dtype : kDtypes) examine({dtype, 40, 700, 9, 2, 0.1, true, true, true}, ++seed);
}

// ---------------------------------------------------------------------------------------------- the carry
// One statistic that takes in batches of one pool; its value and its carry.
struct Average {
  Dtype dtype;
  alignas(8) char value[8] = {}, carry[8] = {};
  explicit Average(Dtype dtype, double start = 0) : dtype(dtype) { set(start); }
  Dtype carry_dtype() const { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }
  void set(double v) { encode(dtype, v, value); }
  void set_carry(double v) { encode(carry_dtype(), v, carry); }
  double get() const { return decode(dtype, value); }
  double rest() const { return decode(carry_dtype(), carry); }
  void take(double batch, double momentum, bool carried = true) {
    const batchnorm::BatchStatistics statistics{1, 1, 5, 5, &batch, &batch};
    Partition one{1};
    batchnorm::update_statistics(statistics, momentum, false, {value, dtype, carried ? carry : nullptr}, {},
                                 one.parallel());
  }
  double nearest(double v) const {
    char bytes[8];
    encode(dtype, v, bytes);
    return decode(dtype, bytes);
  }
};

void carries() {
  for (Dtype dtype : kDtypes) {
    const Format& f = format_of(dtype);
    const std::string name = f.name;
    // Equal batches: to the value itself, whatever the step is beside a unit of it.
    for (double batch : {2026.0, 100.3, 0.1, -3e4, 1e-3})
      for (double momentum : {0.3, 0.1, 0.01}) {
        Average average(dtype, 1);
        for (int k = 0; k < 60 / momentum; ++k) average.take(batch, momentum);
        check(average.get() == average.nearest(batch),
              name + " does not reach " + std::to_string(batch) + ": " + std::to_string(average.get()));
      }
    // Against the average in long double: the carry has 24 digits more, or 53.
    Random random(7);
    for (double momentum : {0.001, 0.1, 0.5, 0.75, 1.0}) {
      Average average(dtype, 3);
      Real exact = 3, largest = 0;
      for (int k = 0; k < 3000; ++k) {
        const double batch = random.uniform(-40, 60);
        average.take(batch, momentum);
        exact += Real(momentum) * (batch - exact);
        const Real away = std::fabs(Real(average.get()) + average.rest() - exact);
        largest = std::max(largest, away);
        check(std::fabs(average.rest()) <= f.unit_roundoff * 64, name + " carries more than half a unit");
      }
      const Real unit = dtype == Dtype::float64 ? 0x1p-100L : f.unit_roundoff * 0x1p-24L;
      check(largest <= 64 * (unit + 0x1p-53L * (dtype == Dtype::float64 ? 4 : 1)) / momentum,
            name + " drifts by " + std::to_string(double(largest)) + " with momentum " + std::to_string(momentum));
    }
    // A value that somebody else has written has no carry; nor has one that is not finite.
    Average written(dtype, 8), fresh(dtype, 8);
    written.set_carry(3);
    written.take(9, 0.25);
    fresh.take(9, 0.25);
    check(written.get() == fresh.get() && written.rest() == fresh.rest(), name + " believes a carry of others");
    written.set_carry(NAN);
    written.take(9, 0.25);
    check(std::isfinite(written.rest()) && std::isfinite(written.get()), name + " takes in a carry that is NaN");
    for (double spoilt : {double(INFINITY), -double(INFINITY), double(NAN)})
      for (double momentum : {0.1, 0.9}) {
        Average average(dtype, 2);
        average.take(spoilt, momentum);
        check(!std::isfinite(average.get()) && average.rest() == 0, name + " carries what is not finite");
        // As (1 - momentum) old + momentum batch is: infinite for good, unless the other infinity comes.
        const bool number = !std::isnan(spoilt);
        for (double next : {5.0, spoilt}) {
          average.take(next, momentum);
          check(number ? average.get() == spoilt : std::isnan(average.get()), name + " loses an infinity");
        }
        average.take(-spoilt, momentum);
        check(std::isnan(average.get()) && average.rest() == 0, name + " makes a number of two infinities");
      }
    // Momentum 1 is the batch, whatever there was; momentum 0 changes nothing.
    Average replaced(dtype, f.largest < 1e30L ? 6e4 : 1e30);
    replaced.take(0.1, 1);
    check(replaced.get() == replaced.nearest(0.1), name + " with momentum 1 keeps something of the old value");
    Average still(dtype, 5);
    still.set_carry(double(f.unit_roundoff));
    const double before = still.rest();
    still.take(7, 0);
    check(still.get() == 5 && still.rest() == before, name + " moves with momentum 0");
    // Without a carry: the plain formula.
    Average plain(dtype, 1);
    for (int k = 0; k < 100; ++k) plain.take(1.7, 0.3, false);
    check(plain.rest() == 0, name + " writes a carry that is not there");
  }
}

// Many channels at once are what each is by itself, also beside values that are not finite or that others have written.
void vectors() {
  const double odd[] = {INFINITY, -INFINITY, NAN, 0, -0.0, 3e38, -3e38, 1e-40};
  for (const char* set : {"baseline", "avx2", "avx512", "neon"}) {
    if (!batchnorm::select_instruction_set(set)) continue;
    for (int64_t channels : {1, 7, 16, 17, 40, 75})
      for (double momentum : {0.0, 0.1, 0.5, 0.75, 1.0}) {
        Random random(uint64_t(channels) + 100);
        std::vector<Average> apart(channels, Average(Dtype::float32));
        std::vector<float> values(channels), carry(channels);
        std::vector<double> batch(channels);
        const auto any = [&](int64_t c) {
          return (c + channels) % 5 ? random.uniform(-4, 4) : odd[size_t(random.uniform(0, 7.99))];
        };
        for (int64_t c = 0; c < channels; ++c) {
          values[c] = float(any(c));
          carry[c] = float(random.uniform(-1, 1) * (c % 3 ? 1e-8 : 1e-5));
          apart[c].set(values[c]);
          apart[c].set_carry(carry[c]);
        }
        for (int k = 0; k < 4; ++k) {
          for (int64_t c = 0; c < channels; ++c) batch[c] = any(c);
          Partition one{1};
          batchnorm::update_statistics({1, channels, 5, 5, batch.data(), batch.data()}, momentum, false,
                                       {values.data(), Dtype::float32, carry.data()}, {}, one.parallel());
          for (int64_t c = 0; c < channels; ++c) {
            apart[c].take(batch[c], momentum);
            const bool same = std::isnan(values[c]) ? std::isnan(apart[c].get()) : values[c] == apart[c].get();
            check(same && carry[c] == apart[c].rest(), std::string(set) + ": channel " + std::to_string(c) + " of " +
                                                           std::to_string(channels) + " is another by itself");
          }
        }
      }
  }
}

// Rows that are given as they are, some of them refused, with momenta of rows and of values.
void mixtures() {
  for (Dtype dtype : kDtypes)
    for (bool by_value : {false, true})
      for (bool carried : {false, true}) {
        constexpr int64_t rows = 3, channels = 5;
        Random random(11);
        std::vector<double> batch(rows * channels), momentum(by_value ? rows * channels : rows);
        for (double& b : batch) b = random.uniform(-2, 2);
        for (double& m : momentum) m = random.uniform(0, 1);
        const bool accepted[rows] = {true, false, true};
        std::vector<Average> averages(rows * channels, Average(dtype, 1.5));
        Buffer values(dtype, rows * channels, random, 1.5, 1.5);
        std::vector<char> carry(rows * channels * 8);
        const batchnorm::RowSteps steps{by_value ? channels : 1, by_value ? 1 : 0};
        for (int k = 0; k < 3; ++k)
          batchnorm::mix_statistics({rows, channels, batch.data(), momentum.data(), steps, accepted, {1, 0}},
                                    {values.at(0), dtype, carried ? carry.data() : nullptr});
        for (int64_t i = 0; i < rows * channels; ++i) {
          const int64_t row = i / channels;
          for (int k = 0; k < 3 && accepted[row]; ++k)
            averages[i].take(batch[i], momentum[by_value ? i : row], carried);
          check(values[i] == averages[i].get(), std::string(format_of(dtype).name) + ": a row is mixed otherwise");
        }
        check(values.guards_intact(), "memory beside was written");
      }
}

// ---------------------------------------------------------------------------------------------- conversions
uint16_t stored(Dtype dtype, double v) {
  uint16_t bits = 0;
  batchnorm::convert(&v, 1, dtype, &bits);
  return bits;
}

void conversions() {
  for (Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    const Format& f = format_of(dtype);
    const int64_t infinity = int64_t((1 << f.exponent_bits) - 1) << f.fraction_bits;
    for (int64_t bits = 0; bits < 1 << 16; ++bits) {
      const uint16_t given = uint16_t(bits);
      double v = 0;
      batchnorm::convert(dtype, &given, 1, &v);
      const double right = decode16(f, given);
      const bool nan = std::isnan(right);
      check(nan ? std::isnan(v) : v == right && std::signbit(v) == std::signbit(right),
            std::string(f.name) + " is read wrongly: " + std::to_string(bits));
      if (nan) {
        check((stored(dtype, v) & 0x7fff) > infinity, std::string(f.name) + " loses a NaN");
        continue;
      }
      check(stored(dtype, v) == given, std::string(f.name) + " there and back: " + std::to_string(bits));
      if ((bits & 0x7fff) >= infinity) continue;
      // Towards the next: a quarter, the middle (to even), and just beside the middle.
      const uint16_t next = uint16_t(bits + 1);
      const bool last = (next & 0x7fff) == infinity;
      const double step = last ? v - decode16(f, uint16_t(bits - 1)) : decode16(f, next) - v;
      for (double share : {0.25, 0.4999, 0.5, 0.5001, 0.75}) {
        const double between = v + share * step;
        check(stored(dtype, between) == encode16(f, double(float(between))),
              std::string(f.name) + " between " + std::to_string(bits) + " and the next: " + std::to_string(share));
      }
    }
  }
}

}  // namespace
}  // namespace test

int main() {
  test::updates();
  test::carries();
  test::mixtures();
  test::conversions();
  test::vectors();
  std::printf("%lld passed, %lld failed\n", (long long)test::passed, (long long)test::failed);
  return test::failed ? 1 : 0;
}
