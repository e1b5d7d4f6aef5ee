// What every implementation of reconstruction_attention is given: sizes, strides and the row map.
//
// A sequence is one softmax domain.  Plain form: sequence b reads its own rows of q, k and v;
// queries and keys may differ in number (the last decoder block asks with the hidden chunk alone).
// Shared form (chunks = K > 0): image n holds 2L + K packed rows (clean L, noised L, heads K) and
// sequence n*K + i reads them as replica i, whose tokens are its head and then L patches, those of
// chunk i noised.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define IMPURE_FAST_HD __host__ __device__
#else
#define IMPURE_FAST_HD
#endif

namespace impure_fast {

// A tensor [batch, rows, heads, width]; strides in elements, width contiguous.
struct Rows {
  int64_t batch, row, head;
};

struct AttentionProblem {
  int64_t sequences;  // B; N*K in the shared form
  int64_t heads, queries, keys, width;
  int64_t chunks;  // 0: plain form; K: shared form, where queries = keys = L + 1
  double scale;
  Rows q, k, v;  // of the inputs; outputs are contiguous

  // Index along the batch axis of q, k and v.
  IMPURE_FAST_HD int64_t image(int64_t sequence) const {
    return chunks ? sequence / chunks : sequence;
  }

  // Row of the packed tensor that holds token t of this sequence.
  IMPURE_FAST_HD int64_t row(int64_t sequence, int64_t t) const {
    if (!chunks) return t;
    const int64_t tokens = keys - 1, chunk = tokens / chunks, replica = sequence % chunks;
    if (t == 0) return 2 * tokens + replica;
    const uint64_t in_chunk = static_cast<uint64_t>(t - 1 - replica * chunk);
    return t - 1 + (in_chunk < static_cast<uint64_t>(chunk) ? tokens : 0);
  }
};

// Shapes of the outputs: out [sequences, queries, heads, width]; lse [sequences, heads, queries],
// float (double for double inputs), the natural logarithm of the sum of exp(scale * score).
// Gradients have the shapes of q, k and v, rows that the shared form reads several times holding
// the sum.

}  // namespace impure_fast
