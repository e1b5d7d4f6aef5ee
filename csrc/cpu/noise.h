// Random numbers from Philox4x32-10 counters on a CPU.  No torch in here.
#pragma once

#include <cstdint>

namespace impure_fast {

// Elements 0..count-1 of each stream: key = seed, counter = (element / 4, stream, purpose).
struct NoiseProblem {
  const int64_t* seeds;
  int64_t seed_step;  // from one stream to the next: 0 or 1
  const int64_t* streams;
  uint32_t purpose;
  int64_t count;
  bool gaussian;  // Box-Muller on the words (0, 1) and (2, 3); else uniforms in [0, 1)
  float* out;     // [streams, count]
};

// Works off the streams [begin, end).
void fill_noise(const NoiseProblem& p, int64_t begin, int64_t end);

}  // namespace impure_fast
