// The CPU implementations of the operators whose schemas are in src/batchnorm/ops/schemas.py, through LibTorch's
// stable ABI: tensors become operands, memory is allocated, torch's own threads run the core.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "boxed.h"
#include "dtypes.h"
#include "merging.h"
#include "operators.h"
#include "running.h"

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

batchnorm::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return batchnorm::Dtype::float32;
    case ScalarType::Double: return batchnorm::Dtype::float64;
    case ScalarType::BFloat16: return batchnorm::Dtype::bfloat16;
    case ScalarType::Half: return batchnorm::Dtype::float16;
    default: throw std::runtime_error("batchnorm: expected a float32, float64, bfloat16 or float16 tensor");
  }
}

batchnorm::Vector vector_of(const OptionalTensor& t) {
  if (!t) return {};
  return {t->const_data_ptr(), dtype_of(*t)};
}

// gamma and beta are nearly always contiguous; where not, a copy is kept alive here.
OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

// Fresh memory. By the shim, which does not look the operator up by its name at each call.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) {
  int32_t code = 0;
  switch (dtype) {
    case ScalarType::Float: code = aoti_torch_dtype_float32(); break;
    case ScalarType::Double: code = aoti_torch_dtype_float64(); break;
    case ScalarType::BFloat16: code = aoti_torch_dtype_bfloat16(); break;
    case ScalarType::Half: code = aoti_torch_dtype_float16(); break;
    default: code = aoti_torch_dtype_uint8();
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_of(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8] = {}, next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = next;
    next *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return empty_strided(sizes.begin(), strides, int64_t(sizes.size()), dtype);
}

// Values of one sample and channel.
int64_t inner_of(const Tensor& t) {
  int64_t inner = 1;
  for (int64_t i = 2; i < t.dim(); ++i) inner *= t.size(i);
  return inner;
}

// ---------------------------------------------------------------------------------------------- huge pages
// A fresh large block costs a page fault every 4 KB; one of 2 MB costs a five-hundredth of them. But a virtual machine
// may give free memory back to its host, and has to fetch it again at the first touch, ten times as slowly as it is
// cleared: small pages are mostly such as were freed last, huge ones are not. So calls with huge pages are timed, and
// after a slow one some do without, twice as many each time.
class HugePages {
 public:
  std::atomic<bool> on{true};

  // Asks for them; the bytes of the block, or 0 where none are asked for.
  size_t advise(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = 2 << 20;
    const size_t bytes = size_t(t.numel()) * t.element_size();
    if (!on || bytes < 2 * huge) return 0;
    if (pause_.load(std::memory_order_relaxed) > 0) {
      pause_.fetch_sub(1, std::memory_order_relaxed);
      return 0;
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + bytes;
    const uintptr_t first = (begin + huge - 1) & ~(huge - 1), last = end & ~(huge - 1);
    if (first < last && !madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE)) return bytes;
#else
    (void)t;
#endif
    return 0;
  }

  // What a call took that has written so many bytes of them: slow are 1 GB/s, a third of what small pages allow.
  void judge(size_t bytes, std::chrono::nanoseconds took) {
    const int64_t wait = wait_.load(std::memory_order_relaxed);
    const bool slow = took.count() > int64_t(bytes);
    wait_.store(slow ? std::min(2 * wait, kMost) : std::max(wait / 2, kLeast), std::memory_order_relaxed);
    if (slow) pause_.store(wait, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLeast = 8, kMost = 1 << 12;
  std::atomic<int64_t> pause_{0}, wait_{kLeast};
};
HugePages huge_pages;

// ---------------------------------------------------------------------------------------------- memory orders
// How a tensor (N, C, *space) lies in memory, where it can be walked as planar or interleaved; see batchnorm.h.
struct Walk {
  batchnorm::Order order;
  int64_t sample_stride, channel_stride;
};

// Stride of the axes [begin, end) seen as one, or -1; 0 axes or one element: `otherwise`.
int64_t joined_stride(const Tensor& t, int64_t begin, int64_t end, int64_t otherwise) {
  int64_t stride = -1, expected = -1;
  for (int64_t i = end - 1; i >= begin; --i) {
    const int64_t size = t.size(i);
    if (size == 1) continue;
    if (stride < 0)
      stride = t.stride(i);
    else if (t.stride(i) != expected)
      return -1;
    expected = t.stride(i) * size;
  }
  return stride < 0 ? otherwise : stride;
}

std::optional<Walk> interleaved_walk(const Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) return std::nullopt;
  int64_t row = joined_stride(t, 2, t.dim(), -2);
  if (row == -1) return std::nullopt;
  if (row == -2)
    row = t.size(0) == 1 ? t.size(1) : t.stride(0);
  else if (t.size(0) > 1 && t.stride(0) != row * inner_of(t))
    return std::nullopt;
  return Walk{batchnorm::Order::interleaved, row, 1};
}

std::optional<Walk> planar_walk(const Tensor& t) {
  if (joined_stride(t, 2, t.dim(), 1) != 1) return std::nullopt;
  return Walk{batchnorm::Order::planar, t.stride(0), t.stride(1)};
}

// Rows that lie side by side over the samples, place after place, as in (time, batch, channels).
std::optional<Walk> place_first_walk(const Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) return std::nullopt;
  if (joined_stride(t, 2, t.dim(), -2) != t.size(0) * t.stride(0)) return std::nullopt;
  return Walk{batchnorm::Order::interleaved, t.stride(0), 1};
}

// In which order a tensor is walked: planes; rows, sample after sample or place after place.
enum class Lie { planes, rows, places };

std::optional<Walk> walk_in(const Tensor& t, Lie lie) {
  if (lie == Lie::planes) return planar_walk(t);
  return lie == Lie::rows ? interleaved_walk(t) : place_first_walk(t);
}
// How a tensor lies, where it can't be walked in planes.
std::optional<Lie> rows_of(const Tensor& t) {
  if (t.size(1) == 1 || planar_walk(t)) return std::nullopt;
  if (interleaved_walk(t)) return Lie::rows;
  if (place_first_walk(t)) return Lie::places;
  return std::nullopt;
}

// The memory format that torch gives the results of its own batch normalization: channels last where x is, else
// contiguous (the rule of at::Tensor::suggest_memory_format).
MemoryFormat suggested_format(const Tensor& t) {
  if (t.dim() != 4 && t.dim() != 5) return MemoryFormat::Contiguous;
  if (t.stride(1) == 0) return MemoryFormat::Contiguous;
  int64_t smallest = 0;
  const int64_t last[] = {1, t.dim() - 1, t.dim() - 2, t.dim() - 3, 0};
  for (int k = 0; k < t.dim(); ++k) {
    const int64_t axis = k + 1 == t.dim() ? 0 : last[k], size = t.size(axis), stride = t.stride(axis);
    if (size == 0 || stride < smallest) return MemoryFormat::Contiguous;
    // N111 and the like fit every format: contiguous, unless the batch says otherwise.
    if (axis == 0 && smallest == t.stride(1)) return MemoryFormat::Contiguous;
    smallest = stride * (size > 1 ? size : 1);
  }
  return t.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

Lie order_of_results(const Tensor& x) {
  return suggested_format(x) == MemoryFormat::Contiguous ? Lie::planes : Lie::rows;
}

// Sizes of a tensor, and the strides of a dense one of them.
struct Dense {
  static constexpr int64_t most = 16;
  int64_t dim, sizes[most], strides[most];

  Dense(const Tensor& t, Lie lie) : dim(t.dim()) {
    int64_t next = 1;
    for (int64_t i = 0; i < dim; ++i) sizes[i] = t.size(i);
    auto place = [&](int64_t axis) {
      strides[axis] = next;
      next *= std::max<int64_t>(sizes[axis], 1);
    };
    if (lie != Lie::planes) place(1);
    if (lie == Lie::places) place(0);
    for (int64_t i = dim - 1; i > 1; --i) place(i);
    if (lie == Lie::planes && dim > 1) place(1);
    if (lie != Lie::places) place(0);
  }

  // Whether a tensor is one of these; the stride of an axis of one element says nothing.
  bool is_that_of(const Tensor& t) const {
    if (t.dim() != dim) return false;
    for (int64_t i = 0; i < dim; ++i)
      if (t.size(i) != sizes[i] || (sizes[i] > 1 && t.stride(i) != strides[i])) return false;
    return true;
  }
};

Tensor empty_as(const Tensor& t, Lie lie) {
  if (t.dim() > Dense::most) return torch::stable::empty(t.sizes(), t.scalar_type());
  const Dense dense(t, lie);
  return empty_strided(dense.sizes, dense.strides, dense.dim, t.scalar_type());
}

// Copies a small tensor whose elements are one in memory, as the gradient of a sum is, into a dense one. `copy_` would
// take as long as the kernel.
bool fill(const Tensor& dense, const Tensor& t) {
  constexpr size_t small = 1 << 15;
  const size_t bytes = size_t(t.numel()) * t.element_size();
  if (bytes == 0 || bytes > small || t.scalar_type() != dense.scalar_type()) return false;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1 && t.stride(i) != 0) return false;
  auto* const to = static_cast<char*>(dense.data_ptr());
  size_t done = t.element_size();
  std::memcpy(to, t.const_data_ptr(), done);
  for (; done < bytes; done = std::min(2 * done, bytes)) std::memcpy(to + done, to, std::min(done, bytes - done));
  return true;
}

batchnorm::Operand operand(const Tensor& t, const Walk& walk) {
  return {t.data_ptr(), walk.sample_stride, walk.channel_stride};
}

// ---------------------------------------------------------------------------------------------- one call
struct Threads {
  static void run(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }
  static batchnorm::Parallel parallel() { return {&Threads::run, nullptr}; }
  static batchnorm::Parallel none() {
    return {[](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, count); },
            nullptr};
  }
};

// The order of an input whose results would lie in another, if the other operands lie in it, too.
std::optional<Lie> own_order(const Tensor& x, std::initializer_list<OptionalTensor> others) {
  const auto lie = rows_of(x);
  for (const OptionalTensor& t : others)
    if (lie && t && !walk_in(*t, *lie)) return std::nullopt;
  return lie;
}

// The input of a call, and the order that it is walked in: that of the results, or its own, if that is allowed
// (`along`). (N, C, L) in rows has planar results, as torch has them. Other operands are brought into the order of the
// walk.
class Call {
 public:
  Call(const Tensor& x, int64_t pool_size, const OptionalTensor& mask = std::nullopt,
       std::optional<Lie> along = std::nullopt)
      : x_(x), result_(order_of_results(x)), lie_(result_) {
    const int64_t samples = x.size(0), inner = inner_of(x);
    const int64_t pool = pool_size <= 0 || pool_size >= samples ? samples : pool_size;
    const bool is_one_pool = pool == samples && !mask;
    if (result_ == Lie::planes && inner > 1 && along && (*along == Lie::rows || is_one_pool)) lie_ = *along;
    const bool rows = inner == 1 || (lie_ != Lie::planes && x.size(1) > 1);
    if (rows != (lie_ != Lie::planes)) lie_ = rows ? Lie::rows : Lie::planes;  // which are one then
    shape.order = rows ? batchnorm::Order::interleaved : batchnorm::Order::planar;
    shape.dtype = dtype_of(x);
    shape.channels = x.size(1);
    shape.samples = rows ? samples * inner : samples;
    shape.pool_size = rows ? pool * inner : pool;
    shape.inner = rows ? 1 : inner;
    if (mask) set_valid(torch::stable::contiguous(*mask), samples, inner);
    input_ = read(x);
  }
  ~Call() {
    if (advised_) huge_pages.judge(advised_, std::chrono::steady_clock::now() - began_);
  }
  Call(const Call&) = delete;

  batchnorm::Shape shape;

  const Tensor& x() const { return x_; }
  // Made when it is first asked for, behind the results: before them it would take a corner of the free memory that
  // held the last call's results, which then fit no more, and all pages of a large result would be new ones.
  double* workspace() const {
    if (!workspace_) workspace_.reset(new double[batchnorm::workspace_size(shape)]);
    return workspace_.get();
  }
  batchnorm::Operand input() const { return input_; }

  // An operand that is read; copied where it lies in another order.
  batchnorm::Operand read(const OptionalTensor& t) {
    if (!t) return {};
    if (auto walk = walk_in(*t, lie_)) return operand(*t, *walk);
    Tensor copy = empty_in_order();
    if (!fill(copy, *t) && !transpose(copy, *t)) torch::stable::copy_(copy, *t);
    kept_.push_back(copy);
    return write_in_order(copy);
  }

  // A result: of the shape, dtype and memory format of x.
  Tensor empty() const { return empty_lying(result_); }
  // What lies in the order of the walk, as gradients may.
  Tensor empty_in_order() const { return empty_lying(is_across() ? lie_ : result_); }
  // Whether a tensor lies in memory as one of these would.
  bool is_as_result(const Tensor& t) const { return lies(t, result_); }
  bool is_in_order(const Tensor& t) const { return lies(t, is_across() ? lie_ : result_); }
  batchnorm::Operand write_in_order(const Tensor& t) const { return operand(t, *walk_in(t, lie_)); }
  // Across the order of the walk, where it is not that of results.
  batchnorm::Operand write(const Tensor& t) const {
    if (!is_across()) return write_in_order(t);
    batchnorm::Operand o = operand(t, *planar_walk(t));
    o.places = inner_of(t);
    return o;
  }

  // Whether the input is walked in rows, though results are planar.
  bool is_across() const {
    return result_ == Lie::planes && shape.order == batchnorm::Order::interleaved && inner_of(x_) > 1;
  }
  bool is_place_first() const { return lie_ == Lie::places; }
  // Whose rows come sample after sample, as those of results do.
  batchnorm::Operand input_by_samples() const {
    if (!is_place_first()) return input_;
    return {input_.data, x_.size(0) * input_.sample_stride, 1, inner_of(x_), input_.sample_stride};
  }

  Tensor statistics() const {
    Tensor t = empty_of({shape.pools(), shape.channels}, ScalarType::Double);
    advised_ += huge_pages.advise(t);
    return t;
  }

 private:
  Tensor empty_lying(Lie lie) const {
    Tensor t = empty_as(x_, lie);
    advised_ += huge_pages.advise(t);
    return t;
  }
  bool lies(const Tensor& t, Lie lie) const {
    return t.scalar_type() == x_.scalar_type() && t.dim() <= Dense::most && Dense(x_, lie).is_that_of(t);
  }

  // Copies a tensor that lies in the other order.
  bool transpose(const Tensor& copy, const Tensor& t) const {
    if (lie_ == Lie::places) return false;
    const bool to_rows = lie_ == Lie::rows;
    const auto from = walk_in(t, to_rows ? Lie::planes : Lie::rows), to = walk_in(copy, lie_);
    if (!from || !to || t.numel() == 0 || t.scalar_type() != copy.scalar_type()) return false;
    const int64_t inner = inner_of(t), channels = t.size(1);
    const auto matrix = [&](const Tensor& of, const Walk& walk) {
      return walk.order == batchnorm::Order::planar
                 ? batchnorm::Matrix{of.data_ptr(), walk.sample_stride, walk.channel_stride}
                 : batchnorm::Matrix{of.data_ptr(), walk.sample_stride * inner, walk.sample_stride};
    };
    batchnorm::transpose(int64_t(t.element_size()), t.size(0), to_rows ? channels : inner, to_rows ? inner : channels,
                         matrix(t, *from), matrix(copy, *to),
                         batchnorm::takes_threads(shape) ? Threads::parallel() : Threads::none());
    return true;
  }

  // The runs of true in a mask (N, *space), each within a sample.
  void set_valid(const Tensor& mask, int64_t samples, int64_t inner) {
    if (mask.scalar_type() != ScalarType::Bool || mask.numel() != samples * inner)
      throw std::runtime_error("batchnorm: expected a boolean mask with an element for each position of the input");
    const auto* const positions = static_cast<const uint8_t*>(mask.const_data_ptr());
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t at = n * inner, end = at + inner; at < end;) {
        const void* const on = std::memchr(positions + at, 1, size_t(end - at));
        if (!on) break;
        const int64_t begin = static_cast<const uint8_t*>(on) - positions;
        const void* const off = std::memchr(positions + begin, 0, size_t(end - begin));
        at = off ? static_cast<const uint8_t*>(off) - positions : end;
        if (shape.order == batchnorm::Order::interleaved && !valid_.empty() && valid_.back().end == begin)
          valid_.back().end = at;
        else
          valid_.push_back({begin, at});
      }
    shape.valid_count = int64_t(valid_.size());
    if (valid_.empty()) valid_.push_back({0, 0});  // something to point at
    shape.valid = valid_.data();
  }

  Tensor x_;
  Lie result_, lie_;  // of results, and of the walk
  batchnorm::Operand input_;
  mutable std::unique_ptr<double[]> workspace_;
  std::vector<Tensor> kept_;
  std::vector<batchnorm::Range> valid_;
  mutable size_t advised_ = 0;  // bytes of outputs in huge pages
  std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

batchnorm::Fusion fusion_of(Call& call, const OptionalTensor& residual, int64_t activation, double slope,
                            const OptionalTensor& signs) {
  batchnorm::Fusion f;
  f.activation = static_cast<batchnorm::Activation>(activation);
  f.slope = slope;
  f.residual = call.read(residual);
  if (signs && signs->numel() > 0) f.signs = static_cast<uint8_t*>(signs->data_ptr());
  return f;
}

// One bit an element, each plane or row from a whole byte on; the size depends on the shape alone.
Tensor make_signs(const Tensor& x, bool save) {
  if (!save) return empty_of({0}, ScalarType::Byte);
  const int64_t n = x.size(0), c = x.size(1), inner = inner_of(x);
  const int64_t size = std::max({n * c * ((inner + 7) / 8), n * inner * ((c + 7) / 8), c * ((n * inner + 7) / 8)});
  Tensor signs = empty_of({size}, ScalarType::Byte);
  std::memset(signs.data_ptr(), 0, size_t(size));  // the bits between runs too: the same bits each time
  return signs;
}

// Statistics in any dtype, (C) or (pools, C), as float64 (pools, C).
class Statistics {
 public:
  Statistics(const Tensor& t, const batchnorm::Shape& shape) {
    const int64_t count = shape.pools() * shape.channels, given = t.numel();
    if (t.scalar_type() == ScalarType::Double && t.is_contiguous() && given == count) {
      data_ = static_cast<const double*>(t.const_data_ptr());
      return;
    }
    const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
    copy_.resize(count);
    batchnorm::convert(dtype_of(dense), dense.const_data_ptr(), given, copy_.data());
    for (int64_t i = given; i < count; ++i) copy_[i] = copy_[i - given];
    data_ = copy_.data();
  }
  const double* data() const { return data_; }

 private:
  const double* data_;
  std::vector<double> copy_;
};

double* doubles_of(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

// What an operator that normalizes has in common with the others: gamma, beta, and what is fused.
struct Affine {
  OptionalTensor weight, bias;
  batchnorm::Fusion fusion;
  template <class Arguments>
  Affine(Call& call, const Arguments& a, const OptionalTensor& residual, const OptionalTensor& signs)
      : weight(contiguous(a.weight)),
        bias(contiguous(a.bias)),
        fusion(fusion_of(call, residual, a.activation, a.slope, signs)) {}
  batchnorm::Vector gamma() const { return vector_of(weight); }
  batchnorm::Vector beta() const { return vector_of(bias); }
};

// The order in which an input can be read to write its results in theirs.
std::optional<Lie> order_across(const Tensor& x, const OptionalTensor& residual, bool saves_signs) {
  const auto lie = saves_signs ? std::nullopt : own_order(x, {residual});
  return residual && lie == Lie::places ? std::nullopt : lie;
}

// ---------------------------------------------------------------------------------------------- the operators
std::tuple<Tensor, Tensor> moments(const batchnorm::MomentsArguments& a) {
  Call call(a.x, a.pool_size, a.mask, own_order(a.x, {}));
  Tensor mean = call.statistics(), m2 = call.statistics();
  batchnorm::moments(call.shape, call.input(), doubles_of(mean), doubles_of(m2), call.workspace(), Threads::parallel());
  return {mean, m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_into(const batchnorm::ForwardArguments& a,
                                                        const OptionalTensor& given) {
  Call call(a.x, a.pool_size, a.mask, order_across(a.x, a.residual, a.save_signs));
  Tensor y = given && call.is_as_result(*given) ? *given : call.empty();
  Tensor mean = call.statistics(), var = call.statistics(), signs = make_signs(a.x, a.save_signs);
  const Affine affine(call, a, a.residual, signs);
  if (!call.is_place_first()) {
    batchnorm::forward(call.shape, call.input(), call.write(y), doubles_of(mean), doubles_of(var), affine.gamma(),
                       affine.beta(), a.eps, affine.fusion, call.workspace(), Threads::parallel());
    return {y, mean, var, signs};
  }
  batchnorm::moments(call.shape, call.input(), doubles_of(mean), doubles_of(var), call.workspace(),
                     Threads::parallel());
  for (int64_t c = 0; c < call.shape.channels; ++c) doubles_of(var)[c] /= double(call.shape.samples);
  batchnorm::normalize(call.shape, call.input_by_samples(), call.write(y), doubles_of(mean), doubles_of(var),
                       affine.gamma(), affine.beta(), a.eps, affine.fusion, call.workspace(), Threads::parallel(),
                       true);
  return {y, mean, var, signs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const batchnorm::ForwardArguments& a) {
  return forward_into(a, std::nullopt);
}

std::tuple<Tensor, Tensor> normalize(const batchnorm::NormalizeArguments& a) {
  Call call(a.x, a.pool_size, a.mask, order_across(a.x, a.residual, a.save_signs));
  Tensor y = call.empty(), signs = make_signs(a.x, a.save_signs);
  const Affine affine(call, a, a.residual, signs);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape);
  batchnorm::normalize(call.shape, call.input_by_samples(), call.write(y), mean.data(), var.data(), affine.gamma(),
                       affine.beta(), a.eps, affine.fusion, call.workspace(), Threads::parallel(), a.own);
  return {y, signs};
}

std::tuple<Tensor, Tensor> backward_reduce(const batchnorm::BackwardReduceArguments& a) {
  Call call(a.x, a.pool_size, a.mask);
  const Affine affine(call, a, a.residual, a.signs);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape);
  Tensor sum = call.statistics(), centered = call.statistics();
  batchnorm::backward_reduce(call.shape, call.read(a.dy), call.input(), mean.data(), var.data(), affine.gamma(),
                             affine.beta(), a.eps, affine.fusion, doubles_of(sum), doubles_of(centered),
                             call.workspace(), Threads::parallel());
  return {sum, centered};
}

std::tuple<Tensor, Tensor> backward_apply(const batchnorm::BackwardApplyArguments& a) {
  Call call(a.x, a.pool_size, a.mask);
  Tensor dx = call.empty();
  OptionalTensor d_residual;
  if (a.want_residual) d_residual = call.empty();
  const Affine affine(call, a, a.residual, a.signs);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape);
  const Statistics k1(a.k1, call.shape), k2(a.k2, call.shape), k3(a.k3, call.shape);
  batchnorm::backward_apply(call.shape, call.read(a.dy), call.input(), call.write(dx),
                            d_residual ? call.write(*d_residual) : batchnorm::Operand{}, mean.data(), var.data(),
                            affine.gamma(), affine.beta(), a.eps, affine.fusion, k1.data(), k2.data(), k3.data(),
                            call.workspace(), Threads::parallel());
  return {dx, d_residual ? *d_residual : empty_of({0}, a.x.scalar_type())};
}

// The gradient of a parameter in its own dtype; empty where there is no parameter.
Tensor parameter_gradient(const OptionalTensor& parameter, const double* gradient, const Tensor& x) {
  if (!parameter) return empty_of({0}, x.scalar_type());
  const int64_t channels = x.size(1);
  Tensor t = empty_of({channels}, parameter->scalar_type());
  batchnorm::convert(gradient, channels, dtype_of(t), t.data_ptr());
  return t;
}

// The gradients with respect to x, residual, weight and bias; those not wanted, and those of absent parameters, are
// empty tensors. `in_order` allows gradients of the values to lie as x and dy do, and not as a result.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const batchnorm::BackwardArguments& a, bool over_dy, bool in_order,
                                                     bool want_parameters) {
  const bool has_signs = a.signs && a.signs->numel() > 0;  // which lie in the order of the result
  Call call(a.x, a.pool_size, a.mask, in_order && !has_signs ? own_order(a.x, {a.dy, a.residual}) : std::nullopt);
  const auto nothing = [&] { return empty_of({0}, a.x.scalar_type()); };
  const bool over = over_dy && !a.mask && call.is_in_order(a.dy);
  OptionalTensor dx, d_residual;
  if (a.want_residual) d_residual = over ? a.dy : call.empty_in_order();
  if (a.want_x || a.want_residual) dx = over && !a.want_residual ? a.dy : call.empty_in_order();
  const Affine affine(call, a, a.residual, a.signs);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape);
  std::vector<double> gradients(2 * call.shape.channels);
  double *d_gamma = gradients.data(), *d_beta = d_gamma + call.shape.channels;
  const auto write = [&](const OptionalTensor& t) { return t ? call.write_in_order(*t) : batchnorm::Operand{}; };
  batchnorm::backward(call.shape, call.read(a.dy), call.input(), write(dx), write(d_residual), mean.data(), var.data(),
                      affine.gamma(), affine.beta(), a.eps, affine.fusion, a.population, nullptr, nullptr,
                      want_parameters ? d_gamma : nullptr, d_beta, call.workspace(), Threads::parallel());
  const auto parameter = [&](const OptionalTensor& of, const double* gradient) {
    return want_parameters ? parameter_gradient(of, gradient, a.x) : nothing();
  };
  return {a.want_x ? *dx : nothing(), d_residual ? *d_residual : nothing(), parameter(a.weight, d_gamma),
          parameter(a.bias, d_beta)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> eager_gradients(const batchnorm::BackwardArguments& a, bool over_dy,
                                                           bool want_parameters) {
  return gradients(a, over_dy, true, want_parameters);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const batchnorm::BackwardArguments& a) {
  return gradients(a, false, false, a.weight || a.bias);
}

// ---------------------------------------------------------------------------------------------- merged over ranks
// Values of each pool, which are the same in every channel.
std::vector<double> counts_of(const Tensor& x, int64_t pool_size, int64_t pools, const OptionalTensor& mask) {
  const int64_t samples = x.size(0), inner = inner_of(x), size = pools == 1 ? samples : pool_size;
  const OptionalTensor dense = contiguous(mask);
  const auto* const valid = dense ? static_cast<const bool*>(dense->const_data_ptr()) : nullptr;
  std::vector<double> counts(pools);
  for (int64_t n = 0; n < samples; ++n)
    counts[n / size] += double(valid ? std::count(valid + n * inner, valid + (n + 1) * inner, true) : inner);
  return counts;
}

// Counts, means and sums of squares, (3, pools, channels).
Tensor count_moments(const batchnorm::CountMomentsArguments& a) {
  Call call(a.x, a.pool_size, a.mask);
  const int64_t pools = call.shape.pools(), channels = call.shape.channels, size = pools * channels;
  Tensor found = empty_of({3, pools, channels}, ScalarType::Double);
  double* const to = doubles_of(found);
  batchnorm::moments(call.shape, call.input(), to + size, to + 2 * size, call.workspace(), Threads::parallel());
  const std::vector<double> counts = counts_of(a.x, a.pool_size, pools, a.mask);
  for (int64_t p = 0; p < pools; ++p) std::fill_n(to + p * channels, channels, counts[p]);
  return found;
}

// y, and counts, means and variances of the pools, which the ranks' parts (ranks, 3, pools, channels) merge into.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_merged(const batchnorm::NormalizeMergedArguments& a) {
  Call call(a.x, a.pool_size, a.mask);
  const int64_t size = call.shape.pools() * call.shape.channels;
  if (a.groups) throw std::runtime_error("batchnorm: channel groups are merged before this operator on a CPU");
  if (a.parts.scalar_type() != ScalarType::Double || a.parts.dim() != 4 ||
      a.parts.numel() != 3 * size * a.parts.size(0))
    throw std::runtime_error("batchnorm: expected float64 parts of shape (ranks, 3, pools, channels)");
  const Tensor parts = torch::stable::contiguous(a.parts);
  Tensor y = call.empty(), signs = make_signs(a.x, a.save_signs);
  Tensor count = call.statistics(), mean = call.statistics(), var = call.statistics();
  batchnorm::merge_parts(parts.size(0), size, static_cast<const double*>(parts.const_data_ptr()), doubles_of(count),
                         doubles_of(mean), doubles_of(var));
  const Affine affine(call, a, a.residual, signs);
  batchnorm::normalize(call.shape, call.input(), call.write(y), doubles_of(mean), doubles_of(var), affine.gamma(),
                       affine.beta(), a.eps, affine.fusion, call.workspace(), Threads::parallel());
  return {y, count, mean, var, signs};
}

// gamma in float64; empty where there is none.
std::vector<double> gamma_of(const OptionalTensor& weight, int64_t channels) {
  if (!weight) return {};
  std::vector<double> gamma(channels);
  batchnorm::convert(dtype_of(*weight), weight->const_data_ptr(), channels, gamma.data());
  return gamma;
}

// gamma times the sums of dz and of dz (x - mean), (2, pools, channels), and the gradients of this rank's parameters.
std::tuple<Tensor, Tensor, Tensor> reduce_merged(const batchnorm::ReduceMergedArguments& a) {
  Call call(a.x, a.pool_size, a.mask);
  const Affine affine(call, a, a.residual, a.signs);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape);
  const int64_t pools = call.shape.pools(), channels = call.shape.channels;
  Tensor sums = empty_of({2, pools, channels}, ScalarType::Double);
  double *const sum = doubles_of(sums), *const centered = sum + pools * channels;
  batchnorm::backward_reduce(call.shape, call.read(a.dy), call.input(), mean.data(), var.data(), affine.gamma(),
                             affine.beta(), a.eps, affine.fusion, sum, centered, call.workspace(), Threads::parallel());
  const std::vector<double> gamma = gamma_of(affine.weight, channels);
  std::vector<double> gradients(2 * channels);
  batchnorm::weigh_sums(pools, channels, var.data(), a.eps, a.weight ? gamma.data() : nullptr, sum, centered,
                        gradients.data(), gradients.data() + channels);
  return {sums, parameter_gradient(a.weight, gradients.data(), a.x),
          parameter_gradient(a.bias, gradients.data() + channels, a.x)};
}

// The gradients of the values out of these sums over all ranks.
std::tuple<Tensor, Tensor> backward_merged(const batchnorm::BackwardMergedArguments& a) {
  Call call(a.x, a.pool_size, a.mask);
  const int64_t pools = call.shape.pools(), channels = call.shape.channels, size = pools * channels;
  const Affine affine(call, a, a.residual, a.signs);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape), count(a.count, call.shape);
  const Tensor sums = torch::stable::contiguous(a.sums);
  if (sums.scalar_type() != ScalarType::Double || sums.numel() != 2 * size)
    throw std::runtime_error("batchnorm: expected float64 sums of shape (2, pools, channels)");
  const auto* const sum = static_cast<const double*>(sums.const_data_ptr());
  const std::vector<double> gamma = gamma_of(affine.weight, channels);
  std::vector<double> k(3 * size);
  batchnorm::merged_coefficients(pools, channels, var.data(), a.eps, a.weight ? gamma.data() : nullptr, sum, sum + size,
                                 count.data(), k.data(), k.data() + size, k.data() + 2 * size);
  Tensor dx = call.empty();
  OptionalTensor d_residual;
  if (a.want_residual) d_residual = call.empty();
  batchnorm::backward_apply(call.shape, call.read(a.dy), call.input(), call.write(dx),
                            d_residual ? call.write(*d_residual) : batchnorm::Operand{}, mean.data(), var.data(),
                            affine.gamma(), affine.beta(), a.eps, affine.fusion, k.data(), k.data() + size,
                            k.data() + 2 * size, call.workspace(), Threads::parallel());
  return {dx, d_residual ? *d_residual : empty_of({0}, a.x.scalar_type())};
}

// ---------------------------------------------------------------------------------------------- inputs in parts
// What belongs to the channels from `channel` on.
batchnorm::Operand from_channel(batchnorm::Operand all, int64_t channel, const Tensor& t) {
  all.data = static_cast<char*>(all.data) + channel * all.channel_stride * int64_t(t.element_size());
  return all;
}
batchnorm::Vector from_channel(const OptionalTensor& t, int64_t channel) {
  if (!t) return {};
  return {static_cast<const char*>(t->const_data_ptr()) + channel * int64_t(t->element_size()), dtype_of(*t)};
}
batchnorm::Fusion activation_alone(int64_t activation, double slope) {
  batchnorm::Fusion f;
  f.activation = static_cast<batchnorm::Activation>(activation);
  f.slope = slope;
  return f;
}

// A call for each part of an input.
class PartCalls {
 public:
  explicit PartCalls(const std::vector<Tensor>& parts) {
    int64_t channel = 0;
    for (const Tensor& part : parts) {
      calls_.emplace_back(part, 0);
      channels_.push_back(channel);
      channel += part.size(1);
    }
  }
  const Call& operator[](size_t i) const { return calls_[i]; }

  // run(i, channel, call, parallel) for each part i, whose first channel is given. Parts that are worth all threads
  // have them in turn; of the others each thread takes some.
  template <class Run>
  void each(const Run& run) {
    std::vector<size_t> small;
    batchnorm::Shape together = calls_[0].shape;
    together.channels = 0;
    for (size_t i = 0; i < calls_.size(); ++i) {
      if (batchnorm::takes_threads(calls_[i].shape)) {
        run(i, channels_[i], calls_[i], Threads::parallel());
        continue;
      }
      calls_[i].workspace();  // before other threads ask, whose memory the C library keeps apart
      small.push_back(i);
      together.channels += calls_[i].shape.channels;
    }
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) run(small[k], channels_[small[k]], calls_[small[k]], Threads::none());
    };
    const auto count = int64_t(small.size());
    if (batchnorm::takes_threads(together))
      torch::stable::parallel_for(0, count, 1, some);
    else
      some(0, count);
  }

 private:
  std::deque<Call> calls_;
  std::vector<int64_t> channels_;
};

void forward_parts(const batchnorm::ForwardParts& a) {
  PartCalls calls(a.parts);
  const batchnorm::Operand y = calls[0].write(a.y);
  const batchnorm::Fusion fusion = activation_alone(a.activation, a.slope);
  calls.each([&](size_t i, int64_t channel, const Call& call, batchnorm::Parallel parallel) {
    const batchnorm::Operand to = from_channel(y, channel, a.y);
    const batchnorm::Vector gamma = from_channel(a.weight, channel), beta = from_channel(a.bias, channel);
    double *mean = doubles_of(a.mean) + channel, *var = doubles_of(a.var) + channel;
    if (a.are_measured[i])
      batchnorm::normalize(call.shape, call.input(), to, mean, var, gamma, beta, a.eps, fusion, call.workspace(),
                           parallel, !a.population);
    else
      batchnorm::forward(call.shape, call.input(), to, mean, var, gamma, beta, a.eps, fusion, call.workspace(),
                         parallel);
  });
}

std::vector<OptionalTensor> backward_parts(const batchnorm::BackwardParts& a) {
  // Gradients outlive the calls, whose scratch memory would leave gaps between them.
  std::vector<OptionalTensor> gradients(a.parts.size());
  for (size_t i = 0; i < a.parts.size(); ++i)
    if (a.wanted[i]) gradients[i] = empty_as(a.parts[i], order_of_results(a.parts[i]));
  PartCalls calls(a.parts);
  const batchnorm::Operand dy = calls[0].write(a.dy);
  const batchnorm::Fusion fusion = activation_alone(a.activation, a.slope);
  calls.each([&](size_t i, int64_t channel, const Call& call, batchnorm::Parallel parallel) {
    const OptionalTensor& dx = gradients[i];
    batchnorm::backward(call.shape, from_channel(dy, channel, a.dy), call.input(),
                        dx ? call.write(*dx) : batchnorm::Operand{}, {}, doubles_of(a.mean) + channel,
                        doubles_of(a.var) + channel, from_channel(a.weight, channel), from_channel(a.bias, channel),
                        a.eps, fusion, a.population, nullptr, nullptr, a.d_weight + channel, a.d_bias + channel,
                        call.workspace(), parallel);
  });
  return gradients;
}

void normalize_into(const batchnorm::NormalizeArguments& a, const Tensor& y) {
  Call call(a.x, a.pool_size, a.mask, order_across(a.x, a.residual, false));
  const Affine affine(call, a, a.residual, std::nullopt);
  const Statistics mean(a.mean, call.shape), var(a.var, call.shape);
  batchnorm::normalize(call.shape, call.input_by_samples(), call.write(y), mean.data(), var.data(), affine.gamma(),
                       affine.beta(), a.eps, affine.fusion, call.workspace(), Threads::parallel(), a.own);
}

void advise(const Tensor& t) { huge_pages.advise(t); }

// The running mean (0) or variance (1) of `size` channels, and what rounding left of it: written in place, or where
// they are not dense, in a copy that goes back.
class Running {
 public:
  Running(const OptionalTensor& t, const OptionalTensor& carry, int64_t which, int64_t size) {
    if (!t) return;
    if (t->numel() != size)
      throw std::runtime_error("batchnorm: expected running statistics with one value for each channel");
    values_ = dense(*t);
    statistic_ = {values_->data_ptr(), dtype_of(*t)};
    if (!carry) return;
    const ScalarType beside = t->scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    if (carry->scalar_type() != beside || carry->numel() != 2 * size || carry->size(0) != 2)
      throw std::runtime_error(
          "batchnorm: expected a carry of shape (2, *running_mean.shape), float64 beside float64 statistics, else "
          "float32");
    if (carry->is_contiguous()) {
      statistic_.carry = static_cast<char*>(carry->data_ptr()) + which * size * int64_t(carry->element_size());
      return;
    }
    carry_ = dense(torch::stable::select(*carry, 0, which));
    statistic_.carry = carry_->data_ptr();
  }
  ~Running() {
    for (auto& [copy, original] : copies_) torch::stable::copy_(original, copy);
  }
  Running(const Running&) = delete;
  const batchnorm::RunningStatistic& statistic() const { return statistic_; }

 private:
  Tensor dense(const Tensor& t) {
    if (t.is_contiguous()) return t;
    const Tensor copy = torch::stable::contiguous(t);
    copies_.emplace_back(copy, t);
    return copy;
  }
  batchnorm::RunningStatistic statistic_;
  OptionalTensor values_, carry_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

// Counts one batch, whose share is the momentum, or where there is none, one over the number of batches.
void update_statistics(const batchnorm::UpdateStatisticsArguments& a) {
  double share = a.momentum.value_or(1.0);
  if (a.num_batches_tracked) {
    int64_t& batches = *static_cast<int64_t*>(a.num_batches_tracked->data_ptr());
    ++batches;
    if (!a.momentum) share = 1.0 / double(batches);
  }
  const batchnorm::BatchStatistics batch{a.mean.dim() == 2 ? a.mean.size(0) : 1,
                                         a.mean.size(-1),
                                         a.count,
                                         a.pool_count,
                                         static_cast<const double*>(a.mean.const_data_ptr()),
                                         static_cast<const double*>(a.var.const_data_ptr())};
  const Running mean(a.running_mean, a.carry, 0, batch.channels), var(a.running_var, a.carry, 1, batch.channels);
  batchnorm::update_statistics(batch, share, a.unbiased, mean.statistic(), var.statistic(), Threads::parallel());
}

// Where the values for each row and channel lie in a tensor that expands to (rows, channels).
batchnorm::RowSteps steps_of(const Tensor& t) {
  if (t.dim() > 2) throw std::runtime_error("batchnorm: expected a value, one for each row, or one for each statistic");
  const auto step = [&](int64_t axis) { return axis < 0 || t.size(axis) == 1 ? 0 : t.stride(axis); };
  return {step(t.dim() - 2), step(t.dim() - 1)};
}

void mix_statistics(const batchnorm::MixStatisticsArguments& a) {
  const int64_t channels = a.mean.size(-1), rows = a.mean.numel() / std::max<int64_t>(channels, 1);
  const Tensor mean = torch::stable::contiguous(a.mean), var = torch::stable::contiguous(a.var);
  for (const Tensor* each : {&mean, &var, &a.momentum})
    if (each->scalar_type() != ScalarType::Double) throw std::runtime_error("batchnorm: expected float64 statistics");
  if (a.accepted.scalar_type() != ScalarType::Bool)
    throw std::runtime_error("batchnorm: expected accepted as booleans");
  const auto mix = [&](const Tensor& batch, const Tensor& running, int64_t which) {
    batchnorm::mix_statistics({rows, channels, static_cast<const double*>(batch.const_data_ptr()),
                               static_cast<const double*>(a.momentum.const_data_ptr()), steps_of(a.momentum),
                               static_cast<const bool*>(a.accepted.const_data_ptr()), steps_of(a.accepted)},
                              Running(running, a.carry, which, rows * channels).statistic());
  };
  mix(mean, a.running_mean, 0);
  mix(var, a.running_var, 1);
}

// The same into tensors of the caller's, of the shape and memory format of x: what a kernel costs without its memory.
void forward_out(const batchnorm::ForwardOutArguments& a) {
  Call call(a.x, a.pool_size);
  const Affine affine(call, a, a.residual, std::nullopt);
  batchnorm::forward(call.shape, call.input(), call.write(a.y), doubles_of(a.mean), doubles_of(a.var), affine.gamma(),
                     affine.beta(), a.eps, affine.fusion, call.workspace(), Threads::parallel());
}

void backward_out(const batchnorm::BackwardOutArguments& a) {
  Call call(a.x, a.pool_size);
  const Affine affine(call, a, std::nullopt, std::nullopt);
  batchnorm::backward(call.shape, call.read(a.dy), call.input(), call.write(a.dx), {}, doubles_of(a.mean),
                      doubles_of(a.var), affine.gamma(), affine.beta(), a.eps, affine.fusion, false,
                      doubles_of(a.sum_dz), doubles_of(a.sum_dz_centered), nullptr, nullptr, call.workspace(),
                      Threads::parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("moments", &batchnorm::Boxed<&moments>::call);
  m.impl("normalize", &batchnorm::Boxed<&normalize>::call);
  m.impl("forward", &batchnorm::Boxed<&forward>::call);
  m.impl("backward_reduce", &batchnorm::Boxed<&backward_reduce>::call);
  m.impl("backward_apply", &batchnorm::Boxed<&backward_apply>::call);
  m.impl("backward", &batchnorm::Boxed<&backward>::call);
  m.impl("forward_out", &batchnorm::Boxed<&forward_out>::call);
  m.impl("backward_out", &batchnorm::Boxed<&backward_out>::call);
  m.impl("count_moments", &batchnorm::Boxed<&count_moments>::call);
  m.impl("normalize_merged", &batchnorm::Boxed<&normalize_merged>::call);
  m.impl("reduce_merged", &batchnorm::Boxed<&reduce_merged>::call);
  m.impl("backward_merged", &batchnorm::Boxed<&backward_merged>::call);
  m.impl("update_statistics", &batchnorm::Boxed<&update_statistics>::call);
  m.impl("mix_statistics", &batchnorm::Boxed<&mix_statistics>::call);
}

// For kernels/cpu.py, by ctypes.
extern "C" __attribute__((visibility("default"))) const void* batchnorm_operators() {
  static const batchnorm::Operators operators{&forward_into,
                                              &normalize,
                                              &eager_gradients,
                                              &moments,
                                              &backward_reduce,
                                              &backward_apply,
                                              &update_statistics,
                                              &normalize_into,
                                              &forward_parts,
                                              &backward_parts,
                                              &advise,
                                              &Threads::parallel,
                                              &batchnorm::depthwise_workspace_size,
                                              &batchnorm::depthwise_forward,
                                              &batchnorm::depthwise_backward,
                                              &batchnorm::pooled_workspace_size,
                                              &batchnorm::pooled_forward,
                                              &batchnorm::pooled_backward};
  return &operators;
}
extern "C" __attribute__((visibility("default"))) const char* batchnorm_instruction_set() {
  return batchnorm::instruction_set();
}
extern "C" __attribute__((visibility("default"))) bool batchnorm_select_instruction_set(const char* name) {
  return batchnorm::select_instruction_set(name);
}
extern "C" __attribute__((visibility("default"))) bool batchnorm_huge_pages(bool on) {
  return huge_pages.on.exchange(on);
}
extern "C" __attribute__((visibility("default"))) int64_t batchnorm_cache_size(int level) {
  const batchnorm::Caches& c = batchnorm::caches();
  return level == 1 ? c.l1 : level == 2 ? c.l2 : c.l3;
}
