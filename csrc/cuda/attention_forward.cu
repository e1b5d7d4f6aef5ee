// out = softmax(scale q k^T) v and its log-sum-exp: tensor-core products round an online softmax.
//
// A block takes one head of one sequence and some of its queries, a warp 16 queries at a time.
// Keys and values lie in shared memory: all of them where kOnChip says so (the loop over stages
// then runs once, and later queries find them there), else a stage at a time.  A warp walks them up
// to 64 keys at a time: scores in registers, running maximum and sum, output rescaled.
//
// Shared memory, in rows of the padded width: keys [stage] | values [stage] | per warp: queries,
// later the output [16].  Barriers: before a stage is filled every warp has left the last one;
// after it is filled it is there for all.
// Registers, bf16, sm_90a: 80 at width 32, 127 at 64; 3 and 2 blocks of 7 warps a multiprocessor.
#include <algorithm>
#include <iterator>

#include "cuda/attention_forward.h"
#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace impure_fast {
namespace {

// Keys whose scores a warp holds, and blocks that must fit a multiprocessor by their registers:
// narrow heads are bound by exponentials, which many warps keep busy.
template <class Format, int kWidth>
constexpr int kKeys = Format::kBytes == 4 ? 16 : (kWidth <= 32 ? 48 : 64);
template <class Format, int kWidth>
constexpr int kBlocks =
    kWidth * Format::kBytes <= 64 ? 3 : (kWidth * Format::kBytes <= 128 ? 2 : 1);

template <class Format, int kWidth>
__global__ void __launch_bounds__(kForwardThreads, kBlocks<Format, kWidth>)
    attention_forward(const ForwardArguments arguments) {
  using Matrix = Tile<Format, kWidth>;
  constexpr int kSteps = kWidth / kDepth<Format>, kColumns = kWidth / 16;
  constexpr int kChunk = kKeys<Format, kWidth>;
  const AttentionProblem& problem = arguments.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int queries = static_cast<int>(problem.queries), keys = static_cast<int>(problem.keys);
  const int heads = static_cast<int>(problem.heads);
  const int sequence = blockIdx.x / heads, head = blockIdx.x % heads;
  const int image = problem.chunks ? sequence / static_cast<int>(problem.chunks) : sequence;
  const RowMap map(problem, sequence);
  const auto of = [&](const void* data, const Rows& rows, int64_t batch) {
    return head_of<Format>(data, rows, batch, head, problem.width, arguments.aligned);
  };
  const Head q = of(arguments.q, problem.q, image);
  const Head k = of(arguments.k, problem.k, image);
  const Head v = of(arguments.v, problem.v, image);
  const Head out = of(arguments.out, contiguous(problem, queries), sequence);

  const int stage = arguments.stage;
  const Matrix key_rows{dynamic_shared()}, value_rows{key_rows.memory + stage * Matrix::kRowBytes};
  const Matrix own{value_rows.memory + (stage + 16 * warp) * Matrix::kRowBytes};

  // The maximum is taken of bare scores, so a negative scale goes into the queries; with a scale of
  // zero, minus infinity must stay what it is.
  const float scale = fabsf(static_cast<float>(problem.scale));
  const float scale2 = fmaxf(scale * kLog2e, 1e-37f);
  const uint32_t signs = problem.scale < 0 ? Format::kSigns : 0;

  const int begin = blockIdx.y * arguments.tiles;
  const int end = min(begin + arguments.tiles, (queries + 15) / 16);
  for (int tile = begin; tile < end; tile += warps) {
    const int query = 16 * (tile + warp);
    const bool active = tile + warp < end;
    if (active) own.fill(q, map, query, 16, queries, lane, 32);

    uint32_t factors[kSteps][4];
    float output[kColumns][2][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows lane / 4 and + 8
    for (int first = 0; first < keys; first += stage) {
      const int rows = min(stage, keys - first);
      if (tile == begin || stage < keys) {
        if (tile != begin || first) __syncthreads();
        const int padded = (rows + 15) / 16 * 16;
        key_rows.fill(k, map, first, padded, keys, threadIdx.x, blockDim.x);
        value_rows.fill(v, map, first, padded, keys, threadIdx.x, blockDim.x);
        copy_wait();
        __syncthreads();
      } else {
        copy_wait();
        __syncwarp();
      }
      if (!active) continue;
      if (first == 0) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          own.left(factors[step], 0, step);
#pragma unroll
          for (int i = 0; i < 4; ++i) factors[step][i] ^= signs;
        }
      }

#pragma unroll 1
      for (int key = 0; key < rows; key += kChunk) {
        const int left = rows - key;
        float score[kChunk / 16][2][4] = {};
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
          if (16 * j >= left) continue;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            uint32_t b[2][2];
            key_rows.right_along(b, key + 16 * j, step);
            Format::mma(score[j][0], factors[step], b[0]);
            Format::mma(score[j][1], factors[step], b[1]);
          }
        }

        float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int i = 0; i < kChunk / 16 * 8; ++i) {
          float& s = score[i / 8][i / 4 % 2][i % 4];
          if (left < kChunk && i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) s = -INFINITY;
          highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s);
        }
        float shift[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          highest[row] = fmaxf(highest[row], shuffle_xor(highest[row], 1));
          highest[row] = fmaxf(highest[row], shuffle_xor(highest[row], 2));
          shift[row] = highest[row] * scale2;
          const float rescale = exp2_fast(maximum[row] * scale2 - shift[row]);
          maximum[row] = highest[row];
          sum[row] *= rescale;
#pragma unroll
          for (int i = 0; i < kColumns * 4; ++i)
            output[i / 4][i / 2 % 2][row * 2 + i % 2] *= rescale;
        }
#pragma unroll
        for (int i = 0; i < kChunk / 16 * 8; ++i) {
          float& s = score[i / 8][i / 4 % 2][i % 4];
          s = i / 4 * 8 < left ? exp2_fast(fmaf(s, scale2, -shift[i / 2 % 2])) : 0;
          sum[i / 2 % 2] += s;
        }

#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
          if (16 * j >= left) continue;
#pragma unroll
          for (int depth = 0; depth < kDepths<Format>; ++depth) {
            uint32_t a[4], b[2][2];
            as_left<Format>(a, score[j], depth);
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
              value_rows.right_across(b, key + 16 * j + depth * kDepth<Format>, 16 * column);
              Format::mma(output[column][0], a, b[0]);
              Format::mma(output[column][1], a, b[1]);
            }
          }
        }
      }
    }
    if (!active) continue;

    __syncwarp();  // all lanes have their queries
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += shuffle_xor(sum[row], 1);
      sum[row] += shuffle_xor(sum[row], 2);
      const float inverse = 1 / sum[row];
#pragma unroll
      for (int i = 0; i < kColumns * 2; ++i) {
        const float* o = output[i / 2][i % 2] + row * 2;
        store_pair<Format>(own.element(lane / 4 + row * 8, i * 8 + lane % 4 * 2), o[0] * inverse,
                           o[1] * inverse);
      }
      const int index = query + lane / 4 + row * 8;
      if (lane % 4 == 0 && index < queries)
        arguments.lse[blockIdx.x * problem.queries + index] = maximum[row] * scale + logf(sum[row]);
    }
    __syncwarp();
    own.drain(out, query, 16, queries, lane, 32);  // the next fill gives each lane the same pieces
  }
}

// Most keys held on chip at once, by bytes of a row.  More than 288 (no preset has more than 257
// tokens) would leave a multiprocessor to one block.
struct OnChip {
  int arch, shared_bytes;
  int keys[6];
};
constexpr int kRowBytes[] = {32, 64, 128, 192, 256, 512};
constexpr OnChip kOnChip[] = {
    // width, 16 bits:   16   32   64   96  128
    //        32 bits:        16   32        64  128
    {80, 163 * 1024, {288, 288, 288, 288, 256, 96}},
    {86, 99 * 1024, {288, 288, 288, 192, 128, 32}},
    {90, 227 * 1024, {288, 288, 288, 288, 288, 160}},
    {120, 99 * 1024, {288, 288, 288, 192, 128, 32}},
};
constexpr int kMaxWarps = kForwardThreads / 32;

// Otherwise 48 KB at a time, so that several blocks share a multiprocessor; the widest rows less.
constexpr int stage_keys(int row_bytes) {
  return std::min(48 * 1024, 96 * 1024 - 16 * kMaxWarps * row_bytes) / (2 * row_bytes) / 16 * 16;
}

constexpr bool on_chip_fits() {
  for (const OnChip& entry : kOnChip)
    for (int i = 0; i < 6; ++i)
      if ((2 * entry.keys[i] + 16 * kMaxWarps) * kRowBytes[i] > entry.shared_bytes) return false;
  return true;
}
static_assert(on_chip_fits());

int keys_on_chip(int arch, int row_bytes) {
  int keys = 0;
  for (const OnChip& entry : kOnChip)
    if (entry.arch <= arch)
      keys =
          entry.keys[std::find(std::begin(kRowBytes), std::end(kRowBytes), row_bytes) - kRowBytes];
  return keys;
}

#define KERNEL(format, width)                                              \
  {"attention_forward<" #format ", " #width ">", Format::k##format, width, \
   attention_forward<format, width>}
const ForwardKernel kKernels[] = {
    KERNEL(Bfloat16, 16),      KERNEL(Bfloat16, 32),      KERNEL(Bfloat16, 64),
    KERNEL(Bfloat16, 96),      KERNEL(Bfloat16, 128),     KERNEL(Float16, 16),
    KERNEL(Float16, 32),       KERNEL(Float16, 64),       KERNEL(Float16, 96),
    KERNEL(Float16, 128),      KERNEL(Float32, 16),       KERNEL(Float32, 32),
    KERNEL(Float32, 64),       KERNEL(Float32, 128),      KERNEL(TensorFloat32, 16),
    KERNEL(TensorFloat32, 32), KERNEL(TensorFloat32, 64), KERNEL(TensorFloat32, 128),
};
#undef KERNEL

}  // namespace

const ForwardKernel* forward_kernels(int* count) {
  *count = std::size(kKernels);
  return kKernels;
}

const char* launch_attention_forward(const AttentionProblem& problem, Format format, const void* q,
                                     const void* k, const void* v, void* out, float* lse,
                                     void* stream) {
  const ForwardKernel* kernel = find_kernel(kKernels, format, problem.width);
  if (!kernel) return kUnsupportedWidth;
  const int64_t blocks = problem.sequences * problem.heads;
  if (!blocks || !problem.queries) return nullptr;

  const Device device = current_device();
  const int row_bytes = kernel->width * element_bytes(format);
  const int tiles = divide_up(problem.queries, 16), keys16 = divide_up(problem.keys, 16) * 16;
  int parts, stage;  // of a head's queries; keys at a time
  if (problem.keys <= keys_on_chip(device.arch, row_bytes)) {
    stage = keys16;  // a head is split only where there are too few to fill the device
    parts =
        static_cast<int>(std::clamp<int64_t>(device.multiprocessors / blocks, 1, (tiles + 3) / 4));
  } else {
    const int stages = divide_up(keys16, stage_keys(row_bytes));
    stage = divide_up(keys16, stages * 16) * 16;
    parts = divide_up(tiles, kMaxWarps);
  }
  const int block_tiles = divide_up(tiles, parts);
  const int warps = divide_up(block_tiles, divide_up(block_tiles, kMaxWarps));
  const int shared_bytes = (2 * stage + 16 * warps) * row_bytes;
  const ForwardArguments arguments{
      problem, q, k, v, out, lse, stage, block_tiles, is_aligned(problem, format, {q, k, v, out})};
  return launch(kernel->function, blocks, parts, 32 * warps, shared_bytes, stream, arguments);
}

}  // namespace impure_fast
