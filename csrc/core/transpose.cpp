#include "transpose.h"

#include <cstring>
#include <utility>

#include "plan.h"

namespace batchnorm {
namespace {

// Vectors of 16 bytes, which every processor has.
template <class T>
struct Block {
  static constexpr int width = 16 / sizeof(T);
  typedef T V __attribute__((vector_size(16)));

  // The first halves of two vectors, or the second ones, element by element in turn.
  template <size_t first, size_t... i>
  static V zip(V a, V b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * width)...);
  }

  // Each round brings the rows of the second half between those of the first: after log2(width) rounds they are
  // columns.
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    using All = std::make_index_sequence<width>;
    V rows[width], next[width];
    for (int i = 0; i < width; ++i) std::memcpy(&rows[i], from + i * from_stride, 16);
    for (int round = 1; round < width; round *= 2) {
      for (int i = 0; i < width / 2; ++i) {
        next[2 * i] = zip<0>(rows[i], rows[i + width / 2], All{});
        next[2 * i + 1] = zip<width / 2>(rows[i], rows[i + width / 2], All{});
      }
      for (int i = 0; i < width; ++i) rows[i] = next[i];
    }
    for (int i = 0; i < width; ++i) std::memcpy(to + i * to_stride, &rows[i], 16);
  }
};

// Whole columns of the tile are written, one block after the other.
template <class T>
void transpose_tile(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int width = Block<T>::width;
  const int64_t whole_rows = rows / width * width, whole_columns = columns / width * width;
  for (int64_t c = 0; c < whole_columns; c += width) {
    for (int64_t r = 0; r < whole_rows; r += width)
      Block<T>::transpose(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (int64_t k = c; k < c + width; ++k)
      for (int64_t r = whole_rows; r < rows; ++r) to[k * to_stride + r] = from[r * from_stride + k];
  }
  for (int64_t c = whole_columns; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace

void transpose_tile(int64_t size, int64_t rows, int64_t columns, const void* from, int64_t from_stride, void* to,
                    int64_t to_stride) {
  const auto as = [&](auto element) {
    using T = decltype(element);
    transpose_tile(rows, columns, static_cast<const T*>(from), from_stride, static_cast<T*>(to), to_stride);
  };
  if (size == 8) return as(uint64_t{});
  if (size == 4) return as(uint32_t{});
  as(uint16_t{});
}

void transpose(int64_t size, int64_t samples, int64_t rows, int64_t columns, const Matrix& from, const Matrix& to,
               Parallel parallel) {
  const int64_t height = tile_rows(size), tiles = ceil_div(rows, height);
  for_each(samples * tiles, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = k / tiles, row = k % tiles * height, count = std::min(height, rows - row);
      const char* const source =
          static_cast<const char*>(from.data) + (n * from.sample_stride + row * from.row_stride) * size;
      char* const target = static_cast<char*>(to.data) + (n * to.sample_stride + row) * size;
      for (int64_t c = 0; c < columns; c += kTileColumns)
        transpose_tile(size, count, std::min(kTileColumns, columns - c), source + c * size, from.row_stride,
                       target + c * to.row_stride * size, to.row_stride);
    }
  });
}

}  // namespace batchnorm
