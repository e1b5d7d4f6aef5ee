// Layer norm and quantisation of rows: one pass over memory, the row in between in the first cache.
//
// Vectors of 16 lanes, which the compiler makes of what each instruction set has; the loader
// chooses the set.
#include "cpu/rows.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/clones.h"

namespace impure_fast {
namespace {

constexpr int kLanes = 16, kRows = 4;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

IMPURE_FAST_INLINE float total(Vector x) {
#ifdef __clang__
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#else
  x += __builtin_shuffle(x, Integers{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  x += __builtin_shuffle(x, Integers{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
#endif
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// Means of x, or of (x - mean)^2, along kRows rows padded to whole vectors (by 0, or by the mean):
// several rows at once, because a sum waits for itself.
template <bool kSquares>
IMPURE_FAST_INLINE void average(const float* rows, int64_t width, int64_t padded, float* mean) {
  Vector sums[kRows] = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      Vector d;
      std::memcpy(&d, rows + j * padded + i, sizeof d);
      if (kSquares) d -= mean[j];
      sums[j] += kSquares ? d * d : d;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) mean[j] = total(sums[j]) / width;
}

// Writes a value a row behind its end.
IMPURE_FAST_INLINE void pad(float* rows, int64_t width, int64_t padded, const float* value) {
  for (int j = 0; j < kRows; ++j) {
    for (int64_t i = width; i < padded; ++i) rows[j * padded + i] = value[j];
  }
}

IMPURE_FAST_INLINE void load(const RowsProblem& p, int64_t r, float* __restrict row) {
  if (p.in == Element::kFloat32) {
    std::memcpy(row, static_cast<const float*>(p.x) + r * p.width, p.width * sizeof(float));
    return;
  }
  const uint16_t* __restrict x = static_cast<const uint16_t*>(p.x) + r * p.width;
  for (int64_t i = 0; i < p.width; ++i) {
    row[i] = std::bit_cast<float>(static_cast<uint32_t>(x[i]) << 16);
  }
}

IMPURE_FAST_INLINE void normalise(const RowsProblem& p, float* __restrict rows, int64_t padded) {
  const float* __restrict weight = p.weight;
  const float* __restrict bias = p.bias;
  constexpr float kZeros[kRows] = {};
  float mean[kRows], variance[kRows];
  pad(rows, p.width, padded, kZeros);
  average<false>(rows, p.width, padded, mean);
  pad(rows, p.width, padded, mean);
  std::memcpy(variance, mean, sizeof mean);
  average<true>(rows, p.width, padded, variance);
  for (int j = 0; j < kRows; ++j) {
    float* __restrict row = rows + j * padded;
    const float factor = 1 / std::sqrt(variance[j] + p.eps), center = mean[j];
    for (int64_t i = 0; i < p.width; ++i) row[i] = (row[i] - center) * factor * weight[i] + bias[i];
  }
}

IMPURE_FAST_INLINE void store(const RowsProblem& p, int64_t r, const float* __restrict row) {
  if (p.out == Element::kFloat32) {
    std::memcpy(static_cast<float*>(p.y) + r * p.width, row, p.width * sizeof(float));
  } else if (p.out == Element::kBfloat16) {
    uint16_t* __restrict y = static_cast<uint16_t*>(p.y) + r * p.width;
    for (int64_t i = 0; i < p.width; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(row[i]);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      y[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
  } else {
    uint8_t* __restrict y = static_cast<uint8_t*>(p.y) + r * p.width;
    for (int64_t i = 0; i < p.width; ++i) {
      float v = row[i] * p.inverse_scale + p.zero + 0.5f;
      v = v > 0 ? v : 0;
      v = v < 255 ? v : 255;
      y[i] = static_cast<uint8_t>(static_cast<int32_t>(v));
    }
  }
}

}  // namespace

IMPURE_FAST_CLONES void normalise_rows(const RowsProblem& problem, int64_t begin, int64_t end) {
  const RowsProblem p = problem;
  const int64_t padded = (p.width + kLanes - 1) / kLanes * kLanes;
  thread_local std::vector<float> buffer;
  buffer.resize(kRows * padded);
  float* const rows = buffer.data();
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = end - first < kRows ? end - first : kRows;
    for (int64_t j = 0; j < count; ++j) load(p, first + j, rows + j * padded);
    if (p.weight) normalise(p, rows, padded);
    for (int64_t j = 0; j < count; ++j) store(p, first + j, rows + j * padded);
  }
}

}  // namespace impure_fast
