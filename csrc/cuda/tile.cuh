// Rows of a matrix in shared memory, read as operands of mma: formats, layout, fill and drain.
//
// A tile's row is cut into pieces of 16 bytes; piece p of row r lies where piece p ^ f(r) would, so
// that 8 consecutive rows meet all 32 banks once at every p: ldmatrix, transposed or not, and the
// 16-byte copies are free of conflicts.  mma contracts 32 bytes of a row, whatever the format
// (16 or 8 elements), so ldmatrix serves 32-bit elements too where rows are contracted along.
// Where rows are contracted across, 32-bit operands take them in the order 0 2 4 6 1 3 5 7: the
// accumulators of one product are then the other product's operand as they stand.
#pragma once

#include "common/attention.h"
#include "cuda/attention.h"
#include "cuda/device.cuh"

namespace impure_fast {

constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float dot2(float2 x, float2 y) { return x.x * y.x + x.y * y.y; }

struct Bfloat16 {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kSigns = 0x80008000;
  using Element = uint16_t;
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_bf16(c, a, b);
  }
  static __device__ __forceinline__ uint32_t pack(float x, float y) { return pack_bf16(x, y); }
  // Products of the elements that two words hold.
  static __device__ __forceinline__ float dot(uint32_t x, uint32_t y) {
    return dot2(unpack_bf16(x), unpack_bf16(y));
  }
  static __device__ __forceinline__ uint32_t factor(uint32_t x) { return x; }
};

struct Float16 : Bfloat16 {
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_f16(c, a, b);
  }
  static __device__ __forceinline__ uint32_t pack(float x, float y) { return pack_f16(x, y); }
  static __device__ __forceinline__ float dot(uint32_t x, uint32_t y) {
    return dot2(unpack_f16(x), unpack_f16(y));
  }
};

struct Float32 {
  static constexpr int kBytes = 4;
  static constexpr uint32_t kSigns = 0x80000000;
  using Element = float;
  // The product that mma_tf32 computes, in exact fp32: the quad's operands go round by shuffles.
  // A quarter of the FMA rate, in exchange for one kernel for all formats.
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    const int lane = threadIdx.x % 32, rows = lane & ~3, columns = lane % 4 * 8;
#pragma unroll 1
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = shuffle(as_float(a[2 * half]), rows + t);
        const float high = shuffle(as_float(a[2 * half + 1]), rows + t);
        const float left = shuffle(as_float(b[half]), columns + t);
        const float right = shuffle(as_float(b[half]), columns + 4 + t);
        c[0] = fmaf(low, left, c[0]);
        c[1] = fmaf(low, right, c[1]);
        c[2] = fmaf(high, left, c[2]);
        c[3] = fmaf(high, right, c[3]);
      }
  }
  static __device__ __forceinline__ float dot(uint32_t x, uint32_t y) {
    return as_float(x) * as_float(y);
  }
  static __device__ __forceinline__ uint32_t factor(uint32_t x) { return x; }
};

struct TensorFloat32 : Float32 {
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_tf32(c, a, b);
  }
  static __device__ __forceinline__ uint32_t factor(uint32_t x) { return round_tf32(x); }
};

// Depth of one mma, and how many of them contract 16.
template <class Format>
constexpr int kDepth = 32 / Format::kBytes;
template <class Format>
constexpr int kDepths = 16 / kDepth<Format>;

// Accumulators of 16 rows x 16 columns as the left operand of mma number `depth` of kDepths.
template <class Format>
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c)[2][4], int depth) {
  if constexpr (Format::kBytes == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Format::pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Format::factor(as_bits(c[depth][i % 2 * 2 + i / 2]));
  }
}

template <class Format>
__device__ __forceinline__ void store_pair(void* to, float x, float y) {
  if constexpr (Format::kBytes == 2)
    *static_cast<uint32_t*>(to) = Format::pack(x, y);
  else
    *static_cast<float2*>(to) = {x, y};
}

// AttentionProblem::row for one sequence, its divisions done once.
struct RowMap {
  int tokens = -1, replica = 0, first = 0, count = 0;

  RowMap() = default;  // the identity
  __device__ __forceinline__ RowMap(const AttentionProblem& problem, int sequence) {
    const int chunks = static_cast<int>(problem.chunks);
    if (!chunks) return;
    tokens = static_cast<int>(problem.keys) - 1;
    replica = sequence % chunks;
    count = tokens / chunks;
    first = replica * count;
  }
  __device__ __forceinline__ int row(int t) const {
    if (tokens < 0) return t;
    if (t == 0) return 2 * tokens + replica;
    const unsigned in_chunk = t - 1 - first;
    return t - 1 + (in_chunk < static_cast<unsigned>(count) ? tokens : 0);
  }
};

// One head of one sequence in global memory.
struct Head {
  char* base;
  int64_t stride;  // of a row, in bytes
  int bytes;       // of a row
  bool aligned;    // base, stride and bytes are multiples of 16
};

template <class Format>
__device__ __forceinline__ Head head_of(const void* data, const Rows& rows, int64_t batch, int head,
                                        int64_t width, bool aligned) {
  const int64_t offset = batch * rows.batch + head * rows.head;
  return {static_cast<char*>(const_cast<void*>(data)) + offset * Format::kBytes,
          rows.row * Format::kBytes, static_cast<int>(width) * Format::kBytes, aligned};
}

// Strides of a contiguous tensor [sequences, rows, heads, width].
__device__ __forceinline__ Rows contiguous(const AttentionProblem& problem, int64_t rows) {
  const int64_t row = problem.heads * problem.width;
  return {rows * row, row, problem.width};
}

template <class Format_, int kWidth>
struct Tile {
  using Format = Format_;
  static constexpr int kRowBytes = kWidth * Format::kBytes;
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kCycle = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2;

  char* memory;

  __device__ __forceinline__ char* piece(int row, int index) const {
    return memory + 16 * (row * kPieces + (index ^ (row / (8 / kCycle)) % kCycle));
  }
  __device__ __forceinline__ char* element(int row, int column) const {
    const int byte = column * Format::kBytes;
    return piece(row, byte / 16) + byte % 16;
  }

  // Rows 0..rows-1 take the head's rows first, first + 1, ...; from `end` on, and beyond its width,
  // zeros: they meet probabilities of zero, and zero times what lay there might be NaN.
  __device__ __forceinline__ void fill(const Head& head, const RowMap& map, int first, int rows,
                                       int end, int thread, int threads) const {
#pragma unroll 1
    for (int i = thread; i < rows * kPieces; i += threads) {
      const int row = i / kPieces, index = i % kPieces;
      const bool valid = first + row < end && 16 * index < head.bytes;
      const char* from =
          valid ? head.base + map.row(first + row) * head.stride + 16 * index : head.base;
      if (head.aligned) {
        copy_async(piece(row, index), from, valid);
      } else {
        using Element = typename Format::Element;
        const int count = valid ? (head.bytes - 16 * index) / Format::kBytes : 0;
        auto* to = reinterpret_cast<Element*>(piece(row, index));
#pragma unroll 1
        for (int e = 0; e < 16 / Format::kBytes; ++e)
          to[e] = e < count ? reinterpret_cast<const Element*>(from)[e] : Element(0);
      }
    }
  }

  // The other way, to rows first, first + 1, ... below `end`.
  __device__ __forceinline__ void drain(const Head& head, int first, int rows, int end, int thread,
                                        int threads) const {
#pragma unroll 1
    for (int i = thread; i < rows * kPieces; i += threads) {
      const int row = i / kPieces, index = i % kPieces;
      if (first + row >= end || 16 * index >= head.bytes) continue;
      char* to = head.base + (first + row) * head.stride + 16 * index;
      if (head.aligned) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(piece(row, index));
      } else {
        const int words = min(16, head.bytes - 16 * index) / 4;
        const auto* from = reinterpret_cast<const uint32_t*>(piece(row, index));
#pragma unroll 1
        for (int e = 0; e < words; ++e) reinterpret_cast<uint32_t*>(to)[e] = from[e];
      }
    }
  }

  // Left operand: rows row..row+15, contracted along, at depth `step`.
  __device__ __forceinline__ void left(uint32_t (&a)[4], int row, int step) const {
    const int lane = threadIdx.x % 32;
    load_matrices(a, piece(row + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Format::factor(a[i]);
  }

  // Two right operands: columns are rows row..row+7 and row+8..row+15, contracted along.
  __device__ __forceinline__ void right_along(uint32_t (&b)[2][2], int row, int step) const {
    const int lane = threadIdx.x % 32;
    uint32_t x[4];
    load_matrices(x, piece(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = Format::factor(x[i]);
  }

  // Two right operands: columns column..column+7 and column+8..column+15, contracted across rows
  // row..row+kDepth-1.
  __device__ __forceinline__ void right_across(uint32_t (&b)[2][2], int row, int column) const {
    const int lane = threadIdx.x % 32;
    if constexpr (Format::kBytes == 2) {
      uint32_t x[4];
      load_matrices_transposed(x, piece(row + lane % 16, column / 8 + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = x[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i / 2][i % 2] = Format::factor(*reinterpret_cast<const uint32_t*>(
            element(row + lane % 4 * 2 + i % 2, column + i / 2 * 8 + lane / 4)));
    }
  }

  // Left operand: rows are columns column..column+15, contracted across rows row..row+kDepth-1.
  __device__ __forceinline__ void left_across(uint32_t (&a)[4], int row, int column) const {
    uint32_t b[2][2];
    right_across(b, row, column);
    a[0] = b[0][0], a[1] = b[1][0], a[2] = b[0][1], a[3] = b[1][1];
  }
};

}  // namespace impure_fast
