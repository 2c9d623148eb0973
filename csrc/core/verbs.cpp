// The verbs of batchnorm.h: which steps they take, and in which order these go over the pieces of a plan.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "columns.h"
#include "ranges.h"
#include "transpose.h"

namespace batchnorm {
namespace {

Gate gate_of(const Fusion& f) {
  if (f.activation == Activation::identity) return Gate::none;
  if (f.signs) return Gate::signs;
  return f.residual ? Gate::residual : Gate::recompute;
}

// Whether the derivative takes longer than to write an element and to read it again.
bool is_costly(Activation a) {
  return a != Activation::identity && a != Activation::relu && a != Activation::relu6 && a != Activation::leaky_relu;
}

// Rounded to so many binary digits behind the first. What is not finite stays as it is.
double rounded_to(double v, int digits) {
  if (v - v != 0) return v;
  const int cut = 52 - digits;
  uint64_t bits;
  std::memcpy(&bits, &v, 8);
  bits = (bits + (uint64_t(1) << (cut - 1))) >> cut << cut;
  std::memcpy(&v, &bits, 8);
  return v;
}

constexpr int64_t kSerialSums = 32768;  // of fewer, adding them up is not worth a second thread

enum class Verb { moments, normalize, forward_again, forward, backward_reduce, backward_apply, backward };

// ---------------------------------------------------------------------------------------------- steps
// What is done to one work, by the kernels of an instruction set.
struct Steps {
  Plan plan;
  Scratch scratch;
  const Kernels &kernels, &row_kernels;
  const CoefficientKernels& coefficients;
  Fusion fusion;
  double eps = 0;
  bool large, stream;  // around the cache go zeros; elements
  bool two_parts;      // of float32 in float32, by x's own statistics

  Steps(Verb verb, const Shape& shape, const Fusion& f, double* workspace)
      : plan(shape, verb == Verb::normalize || verb == Verb::forward_again || verb == Verb::backward_apply,
             takes_exponential(f.activation), f.signs),
        scratch(plan, workspace, element_size(shape.dtype) > 2 && (verb < Verb::backward_reduce || plan.wide())),
        kernels(kernel_table().of[int(shape.order)][int(shape.dtype)]),
        row_kernels(kernel_table().of[int(Order::interleaved)][int(shape.dtype)]),
        coefficients(kernel_table().coefficients[scratch.wide]),
        fusion(f),
        large(shape.samples * shape.channels * shape.inner * element_size(shape.dtype) > caches().l3 / 2),
        // Not where runs of valid values share lines with zeros.
        stream(large && (!shape.valid || shape.order == Order::interleaved)),
        two_parts(kernels.two_parts && plan.many_forward() && (verb == Verb::forward || verb == Verb::forward_again)) {
    if (!shape.valid) return;
    count_values(plan, scratch.counts);
    plan.counts = scratch.counts;
  }

  Steps(Verb verb, const Shape& shape, Vector gamma, Vector beta, double eps, const Fusion& f, double* workspace)
      : Steps(verb, shape, f, workspace) {
    this->eps = eps;
    const auto read = [&](const Vector& v, double absent, double* to) {
      v.data ? convert(v.dtype, v.data, shape.channels, to) : void(std::fill_n(to, shape.channels, absent));
    };
    read(gamma, 1, scratch.gamma);
    read(beta, 0, scratch.beta);
  }

  Gate gate() const { return gate_of(fusion); }
  double values(const Work& w) const { return double(std::max<int64_t>(plan.count(w.piece.pool), 1)); }
  bool is_padded() const { return plan.shape.valid && plan.shape.order == Order::planar; }

  // The fusion from a piece's first element on.
  KernelFusion fused(const Piece& p) const {
    KernelFusion f{fusion.activation, fusion.slope, plan.operand(fusion.residual, p), nullptr, 0, 0, stream, plan.near};
    if (has_signs()) {
      const int64_t channel = signs_of_channel(plan.shape);
      f.signs_sample = ceil_div(plan.shape.channels * channel, 8);
      f.signs_channel = channel;
      f.signs = fusion.signs + p.sample * f.signs_sample + (p.channel * channel + p.first) / 8;
    }
    return f;
  }
  KernelFusion fused(const LongRows& r) const {
    KernelFusion f = fused(r.piece);
    f.residual.sample_stride *= r.times;
    f.signs_sample *= r.times;
    return f;
  }
  bool has_signs() const { return fusion.signs != nullptr; }

  // A value of each channel, from which all others are taken: the first, or where sums have no digits to spare the
  // median of three, lest an outlier is taken from all.
  void set_shifts(const Work& w, const Operand& x) const {
    double* const shift = w.shift();
    if (!plan.count(w.piece.pool)) return void(std::fill_n(shift, w.piece.channels, 0.0));
    read_values(w, x, 0, shift);
    const int64_t size = element_size(plan.shape.dtype);
    if (size == 4 || (size == 2 && plan.few(w.piece.pool))) return;
    double *const middle = w.first, *const last = w.second;  // which have no sums yet
    read_values(w, x, 1, middle);
    read_values(w, x, 2, last);
    for (int64_t c = 0; c < w.piece.channels; ++c) {
      const double low = std::min(shift[c], middle[c]), high = std::max(shift[c], middle[c]);
      shift[c] = std::clamp(last[c], low, high);
    }
  }

  void read_values(const Work& w, const Operand& x, int half, double* to) const {
    Piece p = w.piece;
    const Place found = find_valid(plan, p.pool, half);
    p.sample = found.sample;
    p.first = found.place;
    const char* const first = static_cast<const char*>(plan.operand(x, p).data);
    const Dtype dtype = plan.shape.dtype;
    if (plan.shape.order == Order::interleaved)
      convert(dtype, first, p.channels, to);
    else
      for (int64_t c = 0; c < p.channels; ++c)
        convert(dtype, first + c * x.channel_stride * element_size(dtype), 1, to + c);
    coefficients.finite(p.channels, to);
  }

  void set_normalize(const Work& w, const double* mean, const double* var) const {
    const Coefficients& k = w.k();
    coefficients.normalize(w.piece.channels, mean + w.statistic, var + w.statistic, scratch.gamma + w.piece.channel,
                           scratch.beta + w.piece.channel, eps, k.at(0, w.slot), k.at(1, w.slot), k.at(2, w.slot));
  }

  // For `normalize`; by the statistics of x itself or by others.
  void set_forward(const Work& w, const double* mean, const double* var, bool own) const {
    if (!kernels.line) return set_normalize(w, mean, var);
    const Coefficients& k = w.k();
    coefficients.lines(w.piece.channels, mean + w.statistic, var + w.statistic, scratch.gamma + w.piece.channel,
                       scratch.beta + w.piece.channel, eps, own, k.at(1, w.slot), k.at(2, w.slot));
    if (!two_parts) return;
    float* const parts[] = {k.part(0, w.slot), k.part(1, w.slot), k.part(2, w.slot), k.part(3, w.slot),
                            k.part(4, w.slot)};
    coefficients.two_parts(w.piece.channels, reinterpret_cast<const double*>(k.at(1, w.slot)), mean + w.statistic,
                           var + w.statistic, scratch.beta + w.piece.channel, parts);
  }

  // For what is scaled alone.
  void clear_shifts(const Work& w) const {
    const Coefficients& k = w.k();
    for (int array : {0, 2}) std::fill_n(k.at(array, w.slot), w.piece.channels * k.size(), char(0));
  }

  // Whether the sums of a backward are taken in float32. The differences are then taken from centers: means with as few
  // digits as the elements have, so that float32 holds the differences exactly or nearly so.
  bool is_centered(const Work& w) const { return element_size(plan.shape.dtype) == 2 && !plan.few(w.piece.pool); }

  void set_centers(const Work& w, const double* mean) const {
    const int digits = plan.shape.dtype == Dtype::bfloat16 ? 7 : 10;
    for (int64_t c = 0; c < w.piece.channels; ++c) w.shift()[c] = rounded_to(mean[c], digits);
  }

  // The coefficients that a backward needs for the gate; all where set_gradient takes the scale from there
  // (`population`).
  void set_gated(const Work& w, const double* mean, const double* var, bool population = false) const {
    if (is_centered(w)) set_centers(w, mean + w.statistic);
    if (!population && gate() != Gate::recompute && gate() != Gate::residual)
      return coefficients.means(w.piece.channels, mean + w.statistic, w.k().at(0, w.slot));
    set_normalize(w, mean, var);
    if (gate() != Gate::recompute || fusion.activation != Activation::relu) return;
    const Coefficients& k = w.k();
    coefficients.relu_gates(w.piece.channels, k.gate_size, mean + w.statistic, var + w.statistic,
                            scratch.gamma + w.piece.channel, scratch.beta + w.piece.channel, eps, k.gate(0, w.slot),
                            k.gate(1, w.slot));
  }

  void add_moments(const Work& w, const Operand& x) const {
    std::fill_n(w.first, 2 * w.piece.channels, 0.0);
    for_valid_slabs(plan, w.piece, [&](const Piece& v, const Slab& slab) {
      in_long_rows(
          plan, v, slab, {x}, false,
          [&](const LongRows& r) {
            Columns columns(coefficients, w.k(), r);
            fold_columns(coefficients, r, w, [&](double* sums) {
              row_kernels.moments(r.slab, r.operand(plan, x), columns.of(w.shift()), sums);
            });
          },
          [&](const Piece& p, const Slab& s) { kernels.moments(s, plan.operand(x, p), w.shift(), w.first); });
    });
  }

  void add_reductions(const Work& w, const Operand& dy, const Operand& x, const double* mean,
                      const Operand& kept = {}) const {
    std::fill_n(w.first, 2 * w.piece.channels, 0.0);
    mean += w.statistic;
    const double* const center = is_centered(w) ? w.shift() : mean;
    const NormalizeCoefficients k = w.k().normalize(w.slot);
    for_valid_slabs(plan, w.piece, [&](const Piece& v, const Slab& slab) {
      in_long_rows(
          plan, v, slab, {dy, x, kept, fusion.residual}, has_signs(),
          [&](const LongRows& r) {
            Columns columns(coefficients, w.k(), r);
            fold_columns(coefficients, r, w, [&](double* sums) {
              row_kernels.reduce(r.slab, r.operand(plan, dy), r.operand(plan, x), r.operand(plan, kept),
                                 columns.of(center), columns.gated(k, gate(), fusion.activation), fused(r), gate(),
                                 sums);
            });
          },
          [&](const Piece& p, const Slab& s) {
            kernels.reduce(s, plan.operand(dy, p), plan.operand(x, p), plan.operand(kept, p), center, k, fused(p),
                           gate(), w.first);
          });
    });
    if (element_size(plan.shape.dtype) == 8) return;
    for (int64_t c = 0; c < w.piece.channels; ++c)
      w.second[c] += ((is_centered(w) ? center[c] : 0) - mean[c]) * w.first[c];
  }

  void finish_moments(const Work& w, double divisor, double* mean, double* spread) const {
    coefficients.statistics(w.piece.channels, values(w), divisor, w.shift(), w.first, w.second, mean + w.statistic,
                            spread + w.statistic);
  }

  void finish_reductions(const Work& w, double* sum_dz, double* sum_dz_centered) const {
    if (!sum_dz) return;
    std::copy_n(w.first, w.piece.channels, sum_dz + w.statistic);
    std::copy_n(w.second, w.piece.channels, sum_dz_centered + w.statistic);
  }

  // The row of gradients of gamma and beta that a pool adds to: zeros before its segment's first.
  double* gradient_row(const Work& w) const {
    const int64_t channels = plan.shape.channels, pool = w.piece.pool;
    double* const row = scratch.gradients + 2 * (pool / plan.segment) * channels + w.piece.channel;
    if (pool % plan.segment == 0)
      for (double* to : {row, row + channels}) std::fill_n(to, w.piece.channels, 0.0);
    return row;
  }

  // The coefficients of dx where the statistics are the batch's, or constants; adds to the gradients of gamma and beta.
  void set_gradient(const Work& w, const double* mean, const double* var, bool population) const {
    const Coefficients& k = w.k();
    const int64_t n = w.piece.channels;
    if (!population) {
      double* const row = gradient_row(w);
      return coefficients.gradient(n, values(w), mean + w.statistic, var + w.statistic, scratch.gamma + w.piece.channel,
                                   eps, w.first, w.second, is_line_of_gradient(plan.shape.dtype), k.at(3, w.slot),
                                   k.at(4, w.slot), k.at(5, w.slot), row, row + plan.shape.channels);
    }
    add_parameters(w, var);
    set_scaled(w);
  }

  // The coefficients of dx where the statistics are constants: it is dz times the scale.
  void set_scaled(const Work& w) const {
    const Coefficients& k = w.k();
    const int64_t bytes = w.piece.channels * k.size();
    std::copy_n(k.at(1, w.slot), bytes, k.at(3, w.slot));
    for (int array = 4; array < 6; ++array) std::fill_n(k.at(array, w.slot), bytes, char(0));
  }

  // The gradients of gamma and beta alone.
  void add_parameters(const Work& w, const double* var) const {
    double* const row = gradient_row(w);
    coefficients.parameters(w.piece.channels, var + w.statistic, eps, w.first, w.second, row,
                            row + plan.shape.channels);
  }

  // The rows of all segments added up in their order.
  void finish_parameters(double* d_gamma, double* d_beta) const {
    const int64_t channels = plan.shape.channels;
    std::fill_n(d_gamma, channels, 0.0);
    std::fill_n(d_beta, channels, 0.0);
    for (int64_t row = 0; row < plan.gradient_rows(); ++row) {
      const double* const gradients = scratch.gradients + 2 * row * channels;
      for (int64_t c = 0; c < channels; ++c) {
        d_gamma[c] += gradients[c];
        d_beta[c] += gradients[channels + c];
      }
    }
  }

  void set_apply(const Work& w, const double* mean, const double* k1, const double* k2, const double* k3) const {
    const Coefficients& k = w.k();
    const int64_t at = w.statistic;
    coefficients.apply(w.piece.channels, mean + at, k1 + at, k2 + at, k3 + at, is_line_of_gradient(plan.shape.dtype),
                       k.at(3, w.slot), k.at(4, w.slot), k.at(5, w.slot));
  }

  // Rows whose results lie in planar order: a tile of them at a time, out of the first cache.
  void normalize_across(const Work& w, const Operand& x, const Operand& y) const {
    alignas(64) char values[kTileBytes];
    const int64_t size = element_size(plan.shape.dtype), height = tile_rows(size);
    const auto for_tiles = [&](const Piece& rows, const auto& fill) {
      for (int64_t n = rows.sample, end = rows.sample + rows.samples, next; n < end; n = next) {
        const int64_t sample = n / y.places, place = n % y.places;
        next = std::min({n + height, end, (sample + 1) * y.places});
        for (int64_t c = 0; c < rows.channels; c += kTileColumns) {
          Piece tile = rows;
          tile.sample = n;
          tile.samples = next - n;
          tile.channel += c;
          tile.channels = std::min(kTileColumns, rows.channels - c);
          fill(tile, w.slot + c, sample * x.outer + place * x.sample_stride + tile.channel);
          char* const to =
              static_cast<char*>(y.data) + (sample * y.sample_stride + tile.channel * y.channel_stride + place) * size;
          if (!large) {
            transpose_tile(size, tile.samples, tile.channels, values, kTileColumns, to, y.channel_stride);
            continue;
          }
          alignas(64) char columns[kTileBytes];
          transpose_tile(size, tile.samples, tile.channels, values, kTileColumns, columns, height);
          for (int64_t k = 0; k < tile.channels; ++k)
            write(to + k * y.channel_stride * size, columns + k * height * size, tile.samples * size, true);
        }
      }
    };
    for_slabs(
        plan, w.piece,
        [&](const Piece& v, const Slab&) {
          for_tiles(v, [&](const Piece& tile, int64_t slot, int64_t at) {
            Operand from = plan.operand(x, tile);
            if (x.places) from.data = static_cast<char*>(x.data) + at * size;
            KernelFusion f = fused(tile);
            f.stream = false;
            const NormalizeCoefficients k = w.k().forward(two_parts, slot);
            kernels.normalize(plan.slab(tile), from, {values, kTileColumns, 1}, k, f);
          });
        },
        [&](const Piece& gap) {
          std::memset(values, 0, sizeof values);
          for_tiles(gap, [](const Piece&, int64_t, int64_t) {});
        });
  }

  void normalize(const Work& w, const Operand& x, const Operand& y) const {
    if (y.places) return normalize_across(w, x, y);
    if (is_padded())
      return for_padded_planes(
          plan, w.piece, y, {}, large,
          [&](const Piece& v, const Slab& slab, int64_t channel, const Operand& to, const Operand&) {
            const int64_t slot = w.slot + channel;
            const NormalizeCoefficients k = w.k().forward(two_parts, slot);
            kernels.normalize(slab, plan.operand(x, v), to, k, fused(v));
          });
    const NormalizeCoefficients k = w.k().forward(two_parts, w.slot);
    for_slabs(
        plan, w.piece,
        [&](const Piece& v, const Slab& slab) {
          in_long_rows(
              plan, v, slab, {x, y, fusion.residual}, has_signs(),
              [&](const LongRows& r) {
                Columns columns(coefficients, w.k(), r);
                row_kernels.normalize(r.slab, r.operand(plan, x), r.operand(plan, y), columns.forward(k), fused(r));
              },
              [&](const Piece& p, const Slab& s) {
                kernels.normalize(s, plan.operand(x, p), plan.operand(y, p), k, fused(p));
              });
        },
        [&](const Piece& gap) { clear(plan, gap, y, large); });
  }

  // Where the second phase finds dz: in the place of a result, into which the first has written it, since to compute it
  // once more costs more. A result of 16 bits rounds it, as the first phase's sums do.
  Operand keep(const Operand& dx, const Operand& d_residual) const {
    const bool is_worth_it = gate() == Gate::recompute ? is_costly(fusion.activation) : gate() == Gate::residual;
    if (!dx || is_padded() || !is_worth_it) return {};
    return d_residual ? d_residual : dx;
  }

  // From dz where it is kept, else from dy.
  void apply(const Work& w, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
             const Operand& kept = {}) const {
    const Operand none, &from = kept ? kept : dy, &of_residual = kept ? none : d_residual;
    const Operand& residual = kept ? none : fusion.residual;
    const Gate gate = kept ? Gate::none : this->gate();
    if (is_padded())
      return for_padded_planes(
          plan, w.piece, dx, of_residual, large,
          [&](const Piece& v, const Slab& slab, int64_t channel, const Operand& to, const Operand& also) {
            const int64_t slot = w.slot + channel;
            kernels.apply(slab, plan.operand(from, v), plan.operand(x, v), to, also, w.k().normalize(slot),
                          w.k().apply(slot), fused(v), gate);
          });
    const NormalizeCoefficients k = w.k().normalize(w.slot);
    const ApplyCoefficients a = w.k().apply(w.slot);
    for_slabs(
        plan, w.piece,
        [&](const Piece& v, const Slab& slab) {
          in_long_rows(
              plan, v, slab, {from, x, dx, of_residual, residual}, has_signs(),
              [&](const LongRows& r) {
                Columns columns(coefficients, w.k(), r);
                row_kernels.apply(r.slab, r.operand(plan, from), r.operand(plan, x), r.operand(plan, dx),
                                  r.operand(plan, of_residual), columns.gated(k, gate, fusion.activation),
                                  columns.apply(a), fused(r), gate);
              },
              [&](const Piece& p, const Slab& s) {
                kernels.apply(s, plan.operand(from, p), plan.operand(x, p), plan.operand(dx, p),
                              plan.operand(of_residual, p), k, a, fused(p), gate);
              });
        },
        [&](const Piece& gap) {
          clear(plan, gap, dx, large);
          clear(plan, gap, d_residual, large);
        });
  }
};

// ---------------------------------------------------------------------------------------------- phases
// Steps over all pieces of a plan, on all threads.
struct Phases {
  const Plan& plan;
  const Scratch& scratch;
  const Parallel parallel;
  const Slots all;  // where pieces are not whole

  Phases(const Steps& steps, Parallel parallel)
      : plan(steps.plan), scratch(steps.scratch), parallel(parallel), all(scratch.of(plan, 0)) {}

  // step on all pieces of a plan of whole ones, each thread with slots of its own.
  template <class Step>
  void for_whole_pieces(const Step& step) const {
    for_each(plan, plan.tasks(), parallel, [&](int64_t begin, int64_t end) {
      const Slots slots = scratch.of(plan, begin);
      double* const sums = slots.sums;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t size = plan.pieces_a_task(), first = plan.in_turn(k) * size;
        const int64_t last = std::min(first + size, plan.pieces());
        for (int64_t i = first; i < last; ++i) {
          const Piece p = plan.piece(i);
          step(Work{p, plan.statistic(p), 0, slots, sums, sums + p.channels});
        }
      }
    });
  }

  // step on piece i of a plan of parts, whose coefficients stand ready.
  template <class Step>
  void on_part(int64_t i, const Step& step) const {
    const int64_t turn = plan.in_turn(i);
    const Piece p = plan.piece(turn);
    const int64_t at = plan.statistic(p);
    double* const sums = all.sums + plan.sums_offset(turn, p);
    step(Work{p, at, at, all, sums, sums + p.channels});
  }

  template <class Step>
  void for_parts(const Step& step) const {
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) on_part(i, step);
    });
  }

  // Each thread's last first: what it read last is in its cache.
  template <class Step>
  void for_parts_in_reverse(const Step& step) const {
    for_each(plan, plan.pieces(), parallel, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) on_part(i, step);
    });
  }

  // step on all channels of all pools of a plan of parts, runs of channels at once; their sums are those of a group's
  // first part.
  template <class Step>
  void for_channels(const Step& step) const {
    const int64_t channels = plan.shape.channels;
    const auto visit = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t pool = i / channels, channel = i % channels, group = channel / plan.group;
        const int64_t first = plan.first_piece(pool, group);
        Piece p = plan.piece(first);
        const int64_t stride = p.channels;
        double* const sums = all.sums + plan.sums_offset(first, p) + (channel - p.channel);
        p.channels = std::min(end - i, p.channel + p.channels - channel);
        p.channel = channel;
        step(Work{p, i, i, all, sums, sums + stride});
        i += p.channels;
      }
    };
    plan.statistics() * (plan.parts() + 8) < kSerialSums ? visit(0, plan.statistics())
                                                         : for_each(plan, plan.statistics(), parallel, visit);
  }

  // Adds the sums of all parts to those of the first, in their order.
  void merge(const Work& w) const {
    const int64_t parts = plan.parts(), stride = w.second - w.first;
    for (int64_t k = 1; k < parts; ++k)
      for (double* sums : {w.first, w.second})
        for (int64_t c = 0; c < w.piece.channels; ++c) sums[c] += sums[2 * stride * k + c];
  }

  // prepare, reduce, finish, apply: on each piece where pieces are whole; else prepare and finish on all channels,
  // and apply on the pieces in reverse order within each thread.
  template <class Prepare, class Reduce, class Finish, class Apply>
  void two(Prepare prepare, Reduce reduce, Finish finish, Apply apply) const {
    if (plan.whole)
      return for_whole_pieces([&](const Work& w) {
        prepare(w);
        reduce(w);
        finish(w);
        apply(w);
      });
    for_channels(prepare);
    for_parts(reduce);
    for_channels([&](const Work& w) {
      merge(w);
      finish(w);
    });
    for_parts_in_reverse(apply);
  }

  template <class Prepare, class Apply>
  void one(Prepare prepare, Apply apply) const {
    if (!plan.pieces()) return;
    if (plan.whole)
      return for_whole_pieces([&](const Work& w) {
        prepare(w);
        apply(w);
      });
    for_channels(prepare);
    for_parts(apply);
  }
};

void nothing(const Work&) {}

}  // namespace

// ---------------------------------------------------------------------------------------------- verbs
size_t workspace_size(const Shape& shape) {
  const auto size = [&](bool signs) {
    return std::max(Scratch::size(Plan(shape, false, false, signs)), Scratch::size(Plan(shape, true, false, signs)));
  };
  const bool signs_cut_anew = shape.order == Order::planar && !shape.valid && channels_of_bytes(shape) > 1;
  return size_t(signs_cut_anew ? std::max(size(false), size(true)) : size(false));
}

void moments(const Shape& shape, const Operand& x, double* mean, double* m2, double* workspace, Parallel parallel) {
  const Steps steps(Verb::moments, shape, {}, workspace);
  Phases(steps, parallel)
      .two([&](const Work& w) { steps.set_shifts(w, x); }, [&](const Work& w) { steps.add_moments(w, x); },
           [&](const Work& w) { steps.finish_moments(w, 1, mean, m2); }, nothing);
}

void normalize(const Shape& shape, const Operand& x, const Operand& y, const double* mean, const double* var,
               Vector gamma, Vector beta, double eps, const Fusion& fusion, double* workspace, Parallel parallel,
               bool own) {
  const Steps steps(own ? Verb::forward_again : Verb::normalize, shape, gamma, beta, eps, fusion, workspace);
  Phases(steps, parallel)
      .one([&](const Work& w) { steps.set_forward(w, mean, var, own); },
           [&](const Work& w) { steps.normalize(w, x, y); });
}

void forward(const Shape& shape, const Operand& x, const Operand& y, double* mean, double* var, Vector gamma,
             Vector beta, double eps, const Fusion& fusion, double* workspace, Parallel parallel) {
  const Steps steps(Verb::forward, shape, gamma, beta, eps, fusion, workspace);
  Phases(steps, parallel)
      .two([&](const Work& w) { steps.set_shifts(w, x); }, [&](const Work& w) { steps.add_moments(w, x); },
           [&](const Work& w) {
             steps.finish_moments(w, steps.values(w), mean, var);
             steps.set_forward(w, mean, var, true);
           },
           [&](const Work& w) { steps.normalize(w, x, y); });
}

void backward_reduce(const Shape& shape, const Operand& dy, const Operand& x, const double* mean, const double* var,
                     Vector gamma, Vector beta, double eps, const Fusion& fusion, double* sum_dz,
                     double* sum_dz_centered, double* workspace, Parallel parallel) {
  const Steps steps(Verb::backward_reduce, shape, gamma, beta, eps, fusion, workspace);
  Phases(steps, parallel)
      .two([&](const Work& w) { steps.set_gated(w, mean, var); },
           [&](const Work& w) { steps.add_reductions(w, dy, x, mean); },
           [&](const Work& w) { steps.finish_reductions(w, sum_dz, sum_dz_centered); }, nothing);
}

void backward_apply(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx,
                    const Operand& d_residual, const double* mean, const double* var, Vector gamma, Vector beta,
                    double eps, const Fusion& fusion, const double* k1, const double* k2, const double* k3,
                    double* workspace, Parallel parallel) {
  const Steps steps(Verb::backward_apply, shape, gamma, beta, eps, fusion, workspace);
  Phases(steps, parallel)
      .one(
          [&](const Work& w) {
            steps.set_gated(w, mean, var);
            steps.set_apply(w, mean, k1, k2, k3);
          },
          [&](const Work& w) { steps.apply(w, dy, x, dx, d_residual); });
}

namespace {

// Where the statistics are constants and nobody wants the gradients of gamma and beta there are no sums to take: one
// walk, which without an activation does not even read x.
void backward_of_constants(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx,
                           const Operand& d_residual, const double* mean, const double* var, Vector gamma, Vector beta,
                           double eps, const Fusion& fusion, double* workspace, Parallel parallel) {
  if (gate_of(fusion) == Gate::none && !d_residual) {
    const Steps steps(Verb::normalize, shape, gamma, beta, eps, {}, workspace);
    return Phases(steps, parallel)
        .one(
            [&](const Work& w) {
              steps.set_forward(w, mean, var, false);
              steps.clear_shifts(w);
            },
            [&](const Work& w) { steps.normalize(w, dy, dx); });
  }
  const Steps steps(Verb::backward_apply, shape, gamma, beta, eps, fusion, workspace);
  Phases(steps, parallel)
      .one(
          [&](const Work& w) {
            steps.set_gated(w, mean, var, true);
            steps.set_scaled(w);
          },
          [&](const Work& w) { steps.apply(w, dy, x, dx, d_residual); });
}

}  // namespace

void backward(const Shape& shape, const Operand& dy, const Operand& x, const Operand& dx, const Operand& d_residual,
              const double* mean, const double* var, Vector gamma, Vector beta, double eps, const Fusion& fusion,
              bool population, double* sum_dz, double* sum_dz_centered, double* d_gamma, double* d_beta,
              double* workspace, Parallel parallel) {
  if (population && dx && !d_gamma && !sum_dz)
    return backward_of_constants(shape, dy, x, dx, d_residual, mean, var, gamma, beta, eps, fusion, workspace,
                                 parallel);
  const Steps steps(Verb::backward, shape, gamma, beta, eps, fusion, workspace);
  const Operand kept = steps.keep(dx, d_residual);
  Phases(steps, parallel)
      .two([&](const Work& w) { steps.set_gated(w, mean, var, population); },
           [&](const Work& w) { steps.add_reductions(w, dy, x, mean, kept); },
           [&](const Work& w) {
             steps.finish_reductions(w, sum_dz, sum_dz_centered);
             dx ? steps.set_gradient(w, mean, var, population) : steps.add_parameters(w, var);
           },
           [&](const Work& w) {
             if (dx) steps.apply(w, dy, x, dx, d_residual, kept);
           });
  if (d_gamma) steps.finish_parameters(d_gamma, d_beta);
}

}  // namespace batchnorm
