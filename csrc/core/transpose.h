// Matrices whose rows become columns, a tile at a time.
#pragma once

#include <cstdint>

namespace batchnorm {

// A tile has as many rows as make a column of 512 bytes.
constexpr int64_t kTileColumns = 32, kTileBytes = 512 * kTileColumns;
constexpr int64_t tile_rows(int64_t size) { return 512 / size; }

// to[c * to_stride + r] = from[r * from_stride + c] for elements of 2, 4 or 8 bytes.
void transpose_tile(int64_t size, int64_t rows, int64_t columns, const void* from, int64_t from_stride, void* to,
                    int64_t to_stride);

}  // namespace batchnorm
