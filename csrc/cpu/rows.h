// Rows of activations on a CPU: layer norm, and the way to 8-bit integers.  No torch in here.
#pragma once

#include <cstdint>

namespace impure_fast {

enum class Element { kFloat32, kBfloat16, kUint8 };

// y = (x - mean) / sqrt(variance + eps) * weight + bias along each row; without weight y = x.
// Integers are round(y * inverse_scale + zero), cut to 0..255.
struct RowsProblem {
  int64_t width;
  Element in, out;
  const void* x;
  const float *weight, *bias;  // [width], or null
  float eps, inverse_scale, zero;
  void* y;
};

// Works off the rows [begin, end).
void normalise_rows(const RowsProblem& p, int64_t begin, int64_t end);

}  // namespace impure_fast
