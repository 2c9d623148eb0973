// Short rows seen as long ones. If the rows of a slab (interleaved) or its planes (planar) are short and lie beside
// one another, kernels of interleaved order walk several of them as one row. Each of its columns belongs to one
// channel, so that coefficients are spread over the columns, and sums of columns are folded into those of the channels.
#pragma once

#include <initializer_list>

#include "scratch.h"

namespace batchnorm {

// A slab seen as rows that are longer than its own: a channel of the piece has `each` columns side by side, and all
// channels come `times` over.
struct LongRows {
  Piece piece;
  Slab slab;
  int64_t channel;  // the first, counted from that of the work
  int64_t each, times;

  Operand operand(const Plan& plan, const Operand& o) const {
    Operand part = plan.operand(o, piece);
    part.sample_stride *= times;
    return part;
  }
};

// long_rows(rows) on a slab as such rows, where its operands allow it; direct(piece, slab) on what is left as it is.
// A long row begins at a whole byte of signs.
template <class Long, class Direct>
void in_long_rows(const Plan& plan, const Piece& p, const Slab& slab, std::initializer_list<Operand> operands,
                  bool has_signs, const Long& long_rows, const Direct& direct) {
  const int64_t inner = plan.shape.inner;
  const auto all = [&](int64_t Operand::* stride, int64_t size) {
    return std::all_of(operands.begin(), operands.end(), [&](const Operand& o) { return !o || o.*stride == size; });
  };
  if (slab.spans || (has_signs && plan.shape.order == Order::interleaved && plan.shape.channels % 8 != 0))
    return direct(p, slab);
  if (plan.shape.order == Order::planar) {
    if (!plan.flat || p.samples < flat_samples(inner) || !all(&Operand::channel_stride, inner)) return direct(p, slab);
    const int64_t most = flat_channels(inner);
    for (int64_t channel = 0; channel < p.channels; channel += most) {
      Piece part = p;
      part.channel += channel;
      part.channels = std::min(most, p.channels - channel);
      long_rows(LongRows{part, Slab{p.samples, part.channels * inner, 1, slab.few}, channel, inner, 1});
    }
    return;
  }
  const int64_t lanes = kernel_table().lanes, times = lanes * std::max<int64_t>(1, 256 / (lanes * p.channels));
  if (p.channels >= kFlatChannels || p.samples < kFlatSamples * times || !all(&Operand::sample_stride, p.channels))
    return direct(p, slab);
  Piece part = p, rest = p;
  part.samples = p.samples / times * times;
  long_rows(LongRows{part, Slab{part.samples / times, p.channels * times, 1, slab.few}, 0, 1, times});
  rest.sample += part.samples;
  rest.samples -= part.samples;
  if (rest.samples) direct(rest, plan.slab(rest));
}

// Coefficients of channels, spread over the columns of long rows.
struct Columns {
  alignas(64) double values[6][kFlatColumns];
  const CoefficientKernels& kernels;
  const Coefficients& k;
  const LongRows& rows;
  int64_t used = 0;
  Columns(const CoefficientKernels& kernels, const Coefficients& k, const LongRows& rows)
      : kernels(kernels), k(k), rows(rows) {}
  const void* of(const void* from, int64_t size) {
    double* const to = values[used++];
    kernels.spread(rows.piece.channels, rows.each, rows.times, size,
                   static_cast<const char*>(from) + rows.channel * size, to);
    return to;
  }
  const double* of(const double* from) { return static_cast<const double*>(of(from, 8)); }
  // The mean, and what else is asked for.
  NormalizeCoefficients normalize(const NormalizeCoefficients& from, bool line, bool gate) {
    const int64_t size = k.size(), gate_size = k.gate_size;
    const void* const mean = of(from.mean, size);
    return {mean, line ? of(from.scale, size) : mean, line ? of(from.shift, size) : mean,
            gate ? of(from.threshold, gate_size) : mean, gate ? of(from.flip, gate_size) : mean};
  }
  // Those of a forward.
  NormalizeCoefficients forward(const NormalizeCoefficients& from) {
    if (!from.scale_rest) return normalize(from, true, false);
    const void *const center = of(from.mean, 4), *const scale = of(from.scale, 4), *const shift = of(from.shift, 4);
    return {center, scale, shift, center, center, of(from.scale_rest, 4), of(from.shift_rest, 4)};
  }
  // What the gate of an activation needs of them.
  NormalizeCoefficients gated(const NormalizeCoefficients& from, Gate gate, Activation activation) {
    const bool relu = gate == Gate::recompute && activation == Activation::relu;
    return normalize(from, !relu && (gate == Gate::recompute || gate == Gate::residual), relu);
  }
  ApplyCoefficients apply(const ApplyCoefficients& from) {
    const int64_t size = k.size();
    return {of(from.k1, size), of(from.k2, size), of(from.k3, size)};
  }
};

// Sums of columns, which add(sums) makes, added to those of their channels.
template <class Add>
void fold_columns(const CoefficientKernels& kernels, const LongRows& r, const Work& w, const Add& add) {
  const int64_t columns = r.slab.channels;
  double sums[2 * kFlatColumns];
  std::fill_n(sums, 2 * columns, 0.0);
  add(sums);
  kernels.fold(r.piece.channels, r.each, r.times, sums, w.first + r.channel);
  kernels.fold(r.piece.channels, r.each, r.times, sums + columns, w.second + r.channel);
}

}  // namespace batchnorm
