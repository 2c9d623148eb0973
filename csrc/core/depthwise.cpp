// Depthwise convolutions with their normalization: chunks of channels, each convolved into the cache and walked there
// by the verbs. Short planes, and those whose channels lie side by side, are turned into rows of channels; long ones
// are walked one by one.
#include "depthwise.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "chunks.h"
#include "kernels.h"
#include "lattice.h"

namespace batchnorm {

Lattice::Lattice(const Depthwise& d, int64_t samples) : d(d), taps(d.taps()) {
  const auto values = [&](int axis) {  // of a phase, so that all phases together cover the plane
    const int64_t stride = d.stride[axis];
    return std::max(d.out[axis] + (d.kernel[axis] - 1) * d.dilation[axis] / stride,
                    ceil_div(d.size[axis] + d.padding[axis], stride));
  };
  rows = values(0);
  pitch = values(1);
  plane = rows * pitch;
  phases = d.stride[0] * d.stride[1];
  group = std::clamp<int64_t>(kRun / plane, 1, samples);
  reach = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t row = t / d.kernel[1] * d.dilation[0], column = t % d.kernel[1] * d.dilation[1];
    phase_of[t] = row % d.stride[0] * d.stride[1] + column % d.stride[1];
    shift[t] = row / d.stride[0] * pitch + column / d.stride[1];
    reach = std::max(reach, shift[t]);
  }
  phase = ceil_div(group * plane + reach + kSlack, 16) * 16 + 16;
  for (int64_t t = 0; t < taps; ++t) at[t] = phase_of[t] * phase + shift[t];
}

namespace {

// The convolution of the gradient with the kernel from its end, without steps.
Depthwise backwards(const Depthwise& d) {
  Depthwise back = d;
  for (int axis : {0, 1}) {
    back.size[axis] = d.out[axis];
    back.out[axis] = d.size[axis];
    back.stride[axis] = 1;
    back.padding[axis] = std::max<int64_t>((d.kernel[axis] - 1) * d.dilation[axis] - d.padding[axis], 0);
  }
  return back;
}

// A call: how its channels are cut into chunks, which hang on the shape alone, and the memory of a thread.
class Call {
 public:
  Call(const Shape& s, const Depthwise& d, bool has_before)
      : shape_(s),
        d_(d),
        of_planes_(kernel_table().depthwise_planes[int(s.dtype)]),
        of_rows_(kernel_table().depthwise_rows[int(s.dtype)]),
        lattice_(d, s.samples),
        back_(backwards(d), s.samples),
        size_(element_size(s.dtype)),
        wide_(size_ == 8 ? 8 : 4) {
    const int64_t lanes = of_rows_.lanes, inputs = s.samples * input_places() * size_;
    const int64_t outputs = 2 * s.samples * s.inner * size_;
    const bool strides = d.stride[0] > 1 || d.stride[1] > 1;  // which rows of channels take more easily
    lie_in_rows_ = s.order == Order::interleaved;
    shape_.order = Order::planar;
    in_rows_ = lie_in_rows_ || (s.channels >= 2 * lanes && lanes * outputs <= (strides ? 4 : 1) * caches().l2);
    const int64_t fit = caches().l2 / 2 / std::max<int64_t>(inputs + outputs, 1), share = s.channels / 32;
    if (in_rows_) {
      chunk_ = std::max(std::min(fit, share) / lanes, int64_t(1)) * lanes;
      chunk_ = std::min(chunk_, ceil_div(s.channels, lanes) * lanes);
      group_ = std::clamp<int64_t>(caches().l2 / 4 / (input_places() * chunk_ * size_), 1, s.samples);
      if (has_before) group_ = s.samples;
    } else {
      chunk_ = std::clamp<int64_t>(std::min(fit, share), 1, s.channels);
      group_ = std::min(lattice_.group, back_.group);
    }
    const int64_t kernels = in_rows_ ? chunk_ : 1;
    size_t verbs = 0;
    for (const int64_t channels : {std::min(chunk_, s.channels), s.channels % chunk_}) {
      if (!channels) continue;
      verbs = std::max(verbs, workspace_size(walked(channels)));
      if (!has_before) continue;
      for (const Shape& input : {input_as_it_lies(channels), input_walked(channels)})
        verbs = std::max(verbs, workspace_size(input));
    }
    verbs_ = lines(8 * int64_t(verbs));
    values_ = lines(s.samples * chunk_ * s.inner * size_);
    inputs_ = has_before ? lines(chunk_ * inputs) : in_rows_ ? lines(group_ * chunk_ * input_places() * size_) : 0;
    weights_ = lines((lattice_.taps + 1) * kernels * wide_);
    sums_ = in_rows_ ? lines((lattice_.taps + 1) * chunk_ * 8) : 0;
    const int64_t planes =
        lattice_.is_unrolled() ? lattice_.input_size() + back_.input_size() : lattice_.scratch_size();
    planes_ = in_rows_ ? 0 : lines(planes * wide_);
  }

  int64_t chunks() const { return ceil_div(shape_.channels, chunk_); }
  int64_t bytes() const { return verbs_ + 2 * values_ + inputs_ + weights_ + sums_ + planes_; }

  // The memory of one thread.
  struct Memory {
    double* verbs;
    char *z, *dz;   // of the chunk's outputs
    char* x;        // of its inputs: those of a group of samples in rows; all where they are normalized first
    char* weights;  // taps and bias, of as many channels as are walked at once
    double* sums;   // their gradients, in rows
    char* planes;   // else: of the kernels
  };

  // f(first channel, channels, memory) for each chunk, on so many threads.
  template <class F>
  void each(void* workspace, int64_t threads, Parallel parallel, const F& f) const {
    for_chunks(chunks(), threads, parallel, [&](int64_t worker, int64_t begin, int64_t end) {
      char* next = static_cast<char*>(workspace) + worker * bytes();
      const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
      Memory m;
      m.verbs = reinterpret_cast<double*>(take(verbs_));
      m.z = take(values_);
      m.dz = take(values_);
      m.x = take(inputs_);
      m.weights = take(weights_);
      m.sums = reinterpret_cast<double*>(take(sums_));
      m.planes = take(planes_);
      std::memset(m.planes, 0, size_t(planes_));
      for (int64_t k = begin; k < end; ++k) f(k * chunk_, std::min(chunk_, shape_.channels - k * chunk_), m);
    });
  }

  // What the verbs walk: so many channels of the output; of the input.
  Shape walked(int64_t channels) const {
    Shape s = shape_;
    s.channels = channels;
    return in_rows_ ? as_rows(s) : s;
  }
  Shape input_in_planes(int64_t channels) const {
    Shape s = shape_;
    s.channels = channels;
    s.inner = input_places();
    return s;
  }
  // The input where it lies.
  Shape input_as_it_lies(int64_t channels) const {
    const Shape s = input_in_planes(channels);
    return lie_in_rows_ ? as_rows(s) : s;
  }
  Operand as_it_lies(const Operand& o, int64_t channel) const {
    Operand part = from(o, channel);
    if (lie_in_rows_) part.sample_stride = shape_.channels;
    return part;
  }
  Shape input_walked(int64_t channels) const {
    const Shape s = input_in_planes(channels);
    return in_rows_ ? as_rows(s) : s;
  }
  static Shape as_rows(Shape s) {
    s.order = Order::interleaved;
    s.samples *= s.inner;
    s.pool_size = s.samples;
    s.inner = 1;
    return s;
  }

  // A chunk's values in its memory.
  Operand chunk(char* values, int64_t channels) const { return chunk(values, channels, shape_.inner); }
  Operand chunk(char* values, int64_t channels, int64_t places) const {
    if (in_rows_) return {values, chunk_, 1};
    return {values, channels * places, places};
  }
  Operand from(const Operand& o, int64_t channel) const { return from_channel(o, channel, size_); }

  // Planes of so many places as rows of a chunk, and back; those of some samples. Short planes are turned in tiles of
  // many channels.
  void turn(const Operand& planes, int64_t channel, int64_t channels, int64_t sample, int64_t samples, int64_t places,
            char* to) const {
    if (lie_in_rows_) {
      char* const from = row(planes, channel, sample);
      return copy_rows(samples * places, channels, from, shape_.channels, to, chunk_);
    }
    const ChannelPlanes all = channel_planes(planes, channel, sample);
    if (are_short(places))
      return transpose(size_, samples, channels, places, {all.data, all.sample, all.channel},
                       {to, places * chunk_, chunk_}, alone());
    for (int64_t c = 0; c < channels; c += of_rows_.lanes)
      of_rows_.turn(samples, std::min(of_rows_.lanes, channels - c), places,
                    channel_planes(planes, channel + c, sample), rows(to, 0, c, places));
  }
  void turn_back(char* from, const Operand& planes, int64_t channel, int64_t channels, int64_t sample, int64_t samples,
                 int64_t places) const {
    if (lie_in_rows_) {
      char* const to = row(planes, channel, sample);
      return copy_rows(samples * places, channels, from, chunk_, to, shape_.channels);
    }
    const ChannelPlanes all = channel_planes(planes, channel, sample);
    if (are_short(places))
      return transpose(size_, samples, places, channels, {from, places * chunk_, chunk_},
                       {all.data, all.sample, all.channel}, alone());
    for (int64_t c = 0; c < channels; c += of_rows_.lanes)
      of_rows_.turn_back(samples, std::min(of_rows_.lanes, channels - c), places, rows(from, 0, c, places),
                         channel_planes(planes, channel + c, sample));
  }
  char* row(const Operand& o, int64_t channel, int64_t sample) const {
    return static_cast<char*>(o.data) + (sample * o.sample_stride + channel) * size_;
  }
  void copy_rows(int64_t rows, int64_t channels, const char* from, int64_t from_stride, char* to,
                 int64_t to_stride) const {
    const auto copy = [&](auto bytes) {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_stride * size_, from + i * from_stride * size_, bytes);
    };
    switch (channels * size_) {  // of a vector or two: the compiler knows how
      case 32: return copy(std::integral_constant<size_t, 32>{});
      case 64: return copy(std::integral_constant<size_t, 64>{});
      case 128: return copy(std::integral_constant<size_t, 128>{});
      default: copy(size_t(channels * size_));
    }
  }
  bool are_short(int64_t places) const { return places < 8 * of_rows_.lanes; }
  void turn_result(const Operand& y, int64_t channel, int64_t channels, char* from) const {
    turn_back(from, y, channel, channels, 0, shape_.samples, shape_.inner);
  }
  void turn_gradient(const Operand& dy, int64_t channel, int64_t channels, char* rows) const {
    turn(dy, channel, channels, 0, shape_.samples, shape_.inner, rows);
  }

  // The input of a chunk's convolution into its memory, normalized; by the statistics that a forward has found if
  // there was one.
  void normalize_input(const DepthwiseInput& in, const NormCall& before, bool are_known, int64_t channel,
                       int64_t channels, const Memory& m) const {
    const Operand values = chunk(m.x, channels, input_places());
    if (in_rows_) turn(in.x, channel, channels, 0, shape_.samples, input_places(), m.x);
    normalize_by(before, are_known, input_walked(channels), in_rows_ ? values : from(in.x, channel), values, channel,
                 m.verbs);
  }

  // z of a chunk, out of x or (`is_ready`) of what `normalize_input` has left.
  void convolve(const DepthwiseInput& in, bool is_ready, int64_t channel, int64_t channels, const Memory& m) const {
    if (in_rows_) {
      read_weights(in, channel, channels, m);
      for_groups([&](int64_t n, int64_t samples) {
        if (!is_ready) turn(in.x, channel, channels, n, samples, input_places(), m.x);
        for_vectors(channels, m, [&](int64_t c, const Kernel& k) {
          of_rows_.convolve(d_, samples, rows(m.x, 0, c, input_places()), k.weights, in.bias ? k.bias : nullptr,
                            rows(m.z, n, c, shape_.inner));
        });
      });
      return;
    }
    const Operand z = chunk(m.z, channels);
    for (int64_t c = 0; c < channels; ++c) {
      read_weights(in, channel + c, 1, m);
      for_groups([&](int64_t n, int64_t samples) {
        of_planes_.convolve(lattice_, samples, input_planes(in, is_ready, channels, channel, n, c, m), m.weights,
                            in.bias ? bias(m, 0) : nullptr, planes(z, n, c), m.planes);
      });
    }
  }

  // The gradients of a chunk's inputs and kernels, from that of z; behind `convolve`.
  void gradients(const DepthwiseInput& in, bool is_ready, int64_t channel, int64_t channels,
                 const DepthwiseGradients& to, const Memory& m) const {
    const int64_t taps = lattice_.taps;
    if (in_rows_) {
      std::fill_n(m.sums, (taps + 1) * chunk_, 0.0);
      for_groups([&](int64_t n, int64_t samples) {
        if (group_ < shape_.samples && to.kernels) turn(in.x, channel, channels, n, samples, input_places(), m.x);
        for_vectors(channels, m, [&](int64_t c, const Kernel& k) {
          const ChannelRows x = rows(m.x, 0, c, input_places());
          of_rows_.gradients(d_, samples, x, k.weights, rows(m.dz, n, c, shape_.inner), to.x ? x : ChannelRows{},
                             to.kernels ? k.sums : nullptr, to.bias ? k.sums + taps * of_rows_.lanes : nullptr);
        });
        if (to.x) turn_back(m.x, to.x, channel, channels, n, samples, input_places());
      });
      for_vectors(channels, m, [&](int64_t c, const Kernel& k) {
        const int64_t lanes = of_rows_.lanes;
        for (int64_t i = 0, at = channel + c; i < std::min(lanes, channels - c); ++i, ++at) {
          for (int64_t t = 0; to.kernels && t < taps; ++t) to.kernels[at * taps + t] = k.sums[t * lanes + i];
          if (to.bias) to.bias[at] = k.sums[taps * lanes + i];
        }
      });
      return;
    }
    const Operand dz = chunk(m.dz, channels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t k = channel + c;
      read_weights(in, k, 1, m);
      double* const d_kernel = to.kernels ? to.kernels + k * taps : nullptr;
      double* const d_bias = to.bias ? to.bias + k : nullptr;
      if (d_kernel) std::fill_n(d_kernel, taps, 0.0);
      if (d_bias) *d_bias = 0;
      for_groups([&](int64_t n, int64_t samples) {
        of_planes_.gradients(lattice_, back_, samples, input_planes(in, is_ready, channels, channel, n, c, m),
                             m.weights, planes(dz, n, c), planes(to.x, n, k), d_kernel, d_bias, m.planes);
      });
    }
  }

  bool in_rows() const { return in_rows_; }

 private:
  int64_t input_places() const { return d_.size[0] * d_.size[1]; }

  ChannelRows rows(char* values, int64_t sample, int64_t channel, int64_t places) const {
    return {values + (sample * places * chunk_ + channel) * size_, places * chunk_, chunk_};
  }
  ChannelPlanes channel_planes(const Operand& planes, int64_t channel, int64_t sample) const {
    return {static_cast<char*>(planes.data) + (sample * planes.sample_stride + channel * planes.channel_stride) * size_,
            planes.sample_stride, planes.channel_stride};
  }
  // The planes of channel c of a chunk.
  Planes input_planes(const DepthwiseInput& in, bool is_ready, int64_t channels, int64_t channel, int64_t sample,
                      int64_t c, const Memory& m) const {
    return is_ready ? planes(chunk(m.x, channels, input_places()), sample, c) : planes(in.x, sample, channel + c);
  }
  Planes planes(const Operand& o, int64_t sample, int64_t channel) const {
    if (!o) return {nullptr, 0};
    return {static_cast<char*>(o.data) + (sample * o.sample_stride + channel * o.channel_stride) * size_,
            o.sample_stride};
  }

  // Weights, bias and sums of the channels of one vector, or of one channel.
  struct Kernel {
    char *weights, *bias;
    double* sums;
  };
  int64_t lanes() const { return in_rows_ ? of_rows_.lanes : 1; }
  char* bias(const Memory& m, int64_t channel) const {
    return m.weights + ((lattice_.taps + 1) * channel + lattice_.taps * lanes()) * wide_;
  }

  // f(first channel, kernel) for each vector of a chunk's channels.
  template <class F>
  void for_vectors(int64_t channels, const Memory& m, const F& f) const {
    const int64_t each = lattice_.taps + 1;
    for (int64_t c = 0; c < channels; c += of_rows_.lanes)
      f(c, Kernel{m.weights + each * c * wide_, bias(m, c), m.sums + each * c});
  }

  // Kernels and biases of some channels in the type that is computed in, tap by tap.
  void read_weights(const DepthwiseInput& in, int64_t channel, int64_t channels, const Memory& m) const {
    const int64_t taps = lattice_.taps;
    double values[kMostTaps];
    const auto write = [&](char* to, int64_t i, double value) {
      wide_ == 8 ? void(reinterpret_cast<double*>(to)[i] = value)
                 : void(reinterpret_cast<float*>(to)[i] = float(value));
    };
    for (int64_t c = 0; c < ceil_div(channels, lanes()) * lanes(); ++c) {
      const int64_t lane = c % lanes(), first = c - lane;
      const auto read = [&](const void* from, int64_t count) {
        if (c < channels)
          convert(shape_.dtype, static_cast<const char*>(from) + (channel + c) * count * size_, count, values);
        else
          std::fill_n(values, count, 0.0);
      };
      read(in.kernels, taps);
      for (int64_t t = 0; t < taps; ++t) write(m.weights + (taps + 1) * first * wide_, t * lanes() + lane, values[t]);
      if (!in.bias) continue;
      read(in.bias, 1);
      write(bias(m, first), lane, values[0]);
    }
  }

  // f(first sample, samples) for each group of them.
  template <class F>
  void for_groups(const F& f) const {
    for (int64_t n = 0; n < shape_.samples; n += group_) f(n, std::min(group_, shape_.samples - n));
  }

  Shape shape_;
  Depthwise d_;
  const DepthwisePlanes& of_planes_;
  const DepthwiseRows& of_rows_;
  Lattice lattice_, back_;      // of the convolution; of its gradient, where there are no steps
  int64_t size_, wide_;         // bytes of an element, and of a value that is computed with
  bool lie_in_rows_, in_rows_;  // in memory; as they are walked
  int64_t chunk_, group_;       // channels; samples
  int64_t verbs_, values_, inputs_, weights_, sums_, planes_;  // bytes
};

}  // namespace

size_t depthwise_workspace_size(const Shape& shape, const Depthwise& d, bool has_before, int64_t threads) {
  const Call call(shape, d, has_before);
  return size_t(std::min(threads, call.chunks()) * call.bytes());
}

void depthwise_forward(const Shape& shape, const Depthwise& d, const DepthwiseInput& in, const NormCall* before,
                       const NormCall& norm, const Operand& y, void* workspace, int64_t threads, Parallel parallel) {
  const Call call(shape, d, before);
  call.each(workspace, threads, parallel, [&](int64_t channel, int64_t channels, const Call::Memory& m) {
    const Operand z = call.chunk(m.z, channels), to = call.in_rows() ? z : call.from(y, channel);
    if (before) call.normalize_input(in, *before, false, channel, channels, m);
    call.convolve(in, before, channel, channels, m);
    normalize_by(norm, false, call.walked(channels), z, to, channel, m.verbs);
    if (call.in_rows()) call.turn_result(y, channel, channels, m.z);
  });
}

void depthwise_backward(const Shape& shape, const Depthwise& d, const DepthwiseInput& in, const NormCall* before,
                        const NormCall& norm, const Operand& dy, const DepthwiseGradients& to, void* workspace,
                        int64_t threads, Parallel parallel) {
  const Call call(shape, d, before);
  call.each(workspace, threads, parallel, [&](int64_t channel, int64_t channels, const Call::Memory& m) {
    const Operand z = call.chunk(m.z, channels), dz = call.chunk(m.dz, channels);
    Operand from = call.from(dy, channel);
    if (before) call.normalize_input(in, *before, true, channel, channels, m);
    call.convolve(in, before, channel, channels, m);
    if (call.in_rows()) {
      call.turn_gradient(dy, channel, channels, m.dz);
      from = dz;
    }
    gradient_by(norm, call.walked(channels), from, z, dz, to.gamma, to.beta, channel, m.verbs);
    call.gradients(in, before, channel, channels, to, m);
    if (!before || !to.x) return;
    const Operand dx = call.as_it_lies(to.x, channel);
    gradient_by(*before, call.input_as_it_lies(channels), dx, call.as_it_lies(in.x, channel), dx, to.before_gamma,
                to.before_beta, channel, m.verbs);
  });
}

}  // namespace batchnorm
