// Memory that shows every access beside the elements: allocated to the byte, NaN guards between and before the
// elements that must come back unchanged, and poisoned for AddressSanitizer wherever no element lies.
#pragma once

#include <algorithm>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "elements.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace test {

using batchnorm::Operand;
using batchnorm::Order;
using batchnorm::Shape;

// `count` slots of one element type; the first `offset` hold no element and stand before one aligned to a cache line.
class Block {
 public:
  Block(Dtype dtype, int64_t count, int64_t offset) : dtype_(dtype), count_(count), offset_(offset) {
    data_ = static_cast<char*>(::operator new(bytes(), std::align_val_t{64}));
    const size_t all = bytes(), one = size_t(format().size);
    if (all) std::memcpy(data_, &format().guard, one);
    for (size_t done = one; done < all; done *= 2) std::memcpy(data_ + done, data_, std::min(done, all - done));
    poison(-offset_, offset_);
  }
  Block(Block&& other) noexcept : dtype_(other.dtype_), count_(other.count_), offset_(other.offset_) {
    data_ = std::exchange(other.data_, nullptr);
  }
  Block(const Block&) = delete;
  ~Block() {
    if (!data_) return;
    unpoison();
    ::operator delete(data_, std::align_val_t{64});
  }

  const Format& format() const { return format_of(dtype_); }
  size_t bytes() const { return size_t(slots() * format().size); }
  void* at(int64_t element) const { return slot(offset_ + element); }
  double get(int64_t element) const { return decode(dtype_, at(element)); }
  void set(int64_t element, double value) const { encode(dtype_, value, at(element)); }
  bool are_guards(int64_t begin, int64_t end) const {
    const size_t one = size_t(format().size);
    return begin == end || (std::memcmp(at(begin), &format().guard, one) == 0 &&
                            std::memcmp(at(begin), at(begin + 1), size_t(end - begin - 1) * one) == 0);
  }
  void poison(int64_t element, int64_t count) const { ASAN_POISON_MEMORY_REGION(at(element), count * format().size); }
  void unpoison() const { ASAN_UNPOISON_MEMORY_REGION(data_, bytes()); }
  int64_t count() const { return count_; }
  int64_t offset() const { return offset_; }

 private:
  int64_t slots() const { return count_ + offset_; }
  char* slot(int64_t i) const { return data_ + i * format().size; }

  Dtype dtype_;
  int64_t count_, offset_;
  char* data_;
};

// Statistics, coefficients and scratch memory, aligned to a double and no better.
class Doubles {
 public:
  explicit Doubles(int64_t count) : block_(Dtype::float64, count, 1) {}
  double* data() const { return static_cast<double*>(block_.at(0)); }
  double& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return block_.count(); }

 private:
  Block block_;
};

enum class Layout { dense, misaligned, padded, aligned, transposed, broadcast };

inline const char* name_of(Layout layout) {
  static const char* names[] = {"dense", "misaligned", "padded", "aligned", "transposed", "broadcast"};
  return names[int(layout)];
}

// What can be written: samples that are all one cannot.
inline Layout unshared(Layout layout) { return layout == Layout::broadcast ? Layout::padded : layout; }

struct Strides {
  int64_t sample, channel;
};

// `salt` makes the operands of one case differ. Aligned: each plane or row begins a cache line. Transposed: the
// channels lie outermost. Broadcast: all samples are one, which can be read only.
inline Strides strides_of(const Shape& s, Layout layout, uint64_t salt) {
  const bool planar = s.order == Order::planar;
  const int64_t gap = 1 + int64_t(salt % 5), plane = planar ? s.inner : 1, line = 64 / format_of(s.dtype).size;
  switch (layout) {
    case Layout::padded:
      if (planar) return {s.channels * (plane + gap) + gap, plane + gap};
      return {s.channels + gap, 1};
    case Layout::aligned:
      if (planar) return {s.channels * (plane / line + 1) * line, (plane / line + 1) * line};
      return {(s.channels / line + 1) * line, 1};
    case Layout::transposed:
      if (planar) return {plane + gap, s.samples * (plane + gap)};
      return {s.channels, 1};
    case Layout::broadcast: return {0, plane};
    default: return {s.channels * plane, plane};
  }
}

// An operand with guards. All its elements are guards too until they are set or written.
class Tensor {
 public:
  Tensor(const Shape& shape, Layout layout, uint64_t salt)
      : shape_(shape),
        salt_(salt),
        strides_(strides_of(shape, layout, salt)),
        block_(shape.dtype, extent(), offset(shape, layout, salt)) {
    for_each_gap([&](int64_t begin, int64_t end) { block_.poison(begin, end - begin); });
  }

  // An empty tensor may have an address or none.
  Operand operand() const { return {empty() && salt_ % 2 ? nullptr : block_.at(0), strides_.sample, strides_.channel}; }
  double get(int64_t n, int64_t c, int64_t i) const { return block_.get(index(n, c, i)); }
  void set(int64_t n, int64_t c, int64_t i, double value) const { block_.set(index(n, c, i), value); }

  // Whether every slot that holds no element is as it was made. Ends the protection by AddressSanitizer.
  bool guards_intact() const {
    block_.unpoison();
    bool intact = true;
    for_each_gap([&](int64_t begin, int64_t end) { intact = intact && block_.are_guards(begin, end); });
    return intact;
  }

  // The bytes of the elements, in their order.
  void append_to(std::vector<char>& out) const {
    for (int64_t n = 0; n < shape_.samples; ++n)
      for (int64_t c = 0; c < shape_.channels; ++c) append_plane(n, c, out);
  }
  void append_plane(int64_t n, int64_t c, std::vector<char>& out) const {
    const char* first = static_cast<const char*>(block_.at(index(n, c, 0)));
    out.insert(out.end(), first, first + shape_.inner * block_.format().size);
  }

 private:
  static int64_t offset(const Shape& s, Layout layout, uint64_t salt) {
    const int64_t line = 64 / format_of(s.dtype).size;
    if (layout == Layout::dense || layout == Layout::aligned) return 0;
    return 1 + int64_t(salt % uint64_t(line - 1));
  }
  bool empty() const { return shape_.samples == 0 || shape_.channels == 0 || shape_.inner == 0; }
  int64_t index(int64_t n, int64_t c, int64_t i) const { return n * strides_.sample + c * strides_.channel + i; }
  int64_t extent() const { return empty() ? 0 : index(shape_.samples - 1, shape_.channels - 1, shape_.inner - 1) + 1; }

  // gap(begin, end) for the runs of slots between one plane or row and the next, the offset first.
  template <class Gap>
  void for_each_gap(Gap gap) const {
    gap(-block_.offset(), 0);
    if (empty()) return;
    const bool planar = shape_.order == Order::planar;
    const int64_t run = planar ? shape_.inner : shape_.channels, samples = strides_.sample ? shape_.samples : 1;
    std::vector<int64_t> begins;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = 0; c < (planar ? shape_.channels : 1); ++c) begins.push_back(index(n, c, 0));
    std::sort(begins.begin(), begins.end());
    for (size_t k = 0; k + 1 < begins.size(); ++k)
      if (begins[k] + run < begins[k + 1]) gap(begins[k] + run, begins[k + 1]);
  }

  Shape shape_;
  uint64_t salt_;
  Strides strides_;
  Block block_;
};

}  // namespace test
