// Standard normals from Philox4x32-10 counters on a CPU.  No torch in here.
#pragma once

#include <cstdint>

namespace impure_fast {

// Elements 0..count-1 of each stream: key = seed, counter = (element / 4, stream, purpose), normals
// by Box-Muller on the words (0, 1) and (2, 3).
struct NoiseProblem {
  uint64_t seed;
  const int64_t* streams;
  uint32_t purpose;
  int64_t count;
  float* out;  // [streams, count]
};

// Works off the streams [begin, end).
void fill_noise(const NoiseProblem& p, int64_t begin, int64_t end);

}  // namespace impure_fast
