// dq, dk, dv from the log-sum-exp: p = exp(scale q k^T - lse), ds = p (grad v^T - rowsum(grad
// out)), dv = p^T grad, dk = scale ds^T q, dq = scale ds k.  Five products, no atomics.
//
// A block takes one head of one sequence and 16 keys a warp, most often all of them, and walks the
// queries a stage at a time.  First the warps compute p^T and ds^T of their keys and add to dk and
// dv in registers; ds^T goes to shared memory.  Then they share the stage's dq among them.  Where
// keys need several blocks, dq is a sum of parts; where replicas share rows, all three gradients
// are: those go to a workspace in fp32 and a second kernel adds them in a fixed order.
//
// Shared memory, in rows of the padded width: keys, values [16 warps] | out [stage] | ds^T [16
// warps, stage] | once, or twice where there are several stages: q, grad, lse and rowsum [stage].
// Barriers: (1) lse and rowsum are there, and all have left the last stage's ds; the next stage is
// then fetched; (2) ds and the next stage's rows are there.
// Registers, bf16, sm_90a: 122 at width 32, 168 at 64.
#include <algorithm>
#include <iterator>

#include "cuda/attention_backward.h"
#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace impure_fast {
namespace {

IMPURE_FAST_HD constexpr int stage_queries(int row_bytes) { return row_bytes > 128 ? 32 : 64; }

constexpr int backward_shared_bytes(int row_bytes, int element, int warps, int buffers) {
  const int stage = stage_queries(row_bytes), keys = 16 * warps;
  return 2 * keys * row_bytes + stage * row_bytes +
         buffers * stage * (2 * row_bytes + static_cast<int>(sizeof(float2))) +
         keys * stage * element;
}

template <class Format>
__device__ __forceinline__ void store_gradient(void* to, float* parts, int64_t index, float x,
                                               float y) {
  if (parts)
    store_pair<Float32>(parts + index, x, y);
  else
    store_pair<Format>(static_cast<char*>(to) + index * Format::kBytes, x, y);
}

template <class Format, int kWidth>
__global__ void __launch_bounds__(backward_threads(kWidth* Format::kBytes))
    attention_backward(const BackwardArguments arguments) {
  using Matrix = Tile<Format, kWidth>;
  constexpr int kStage = stage_queries(Matrix::kRowBytes), kStageBytes = kStage * Matrix::kRowBytes;
  using Slopes = Tile<Format, kStage>;
  constexpr int kSteps = kWidth / kDepth<Format>, kColumns = kWidth / 16;
  constexpr bool kHold = Format::kBytes == 2 && kWidth <= 64;  // keys and values in registers
  const AttentionProblem& problem = arguments.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int queries = static_cast<int>(problem.queries), keys = static_cast<int>(problem.keys);
  const int width = static_cast<int>(problem.width);
  const int heads = static_cast<int>(problem.heads);
  const int sequence = blockIdx.x / heads, head = blockIdx.x % heads;
  const int image = problem.chunks ? sequence / static_cast<int>(problem.chunks) : sequence;
  const RowMap map(problem, sequence), identity;
  const auto of = [&](const void* data, const Rows& rows, int64_t batch) {
    return head_of<Format>(data, rows, batch, head, width, arguments.aligned);
  };
  const Head q = of(arguments.q, problem.q, image);
  const Head k = of(arguments.k, problem.k, image);
  const Head v = of(arguments.v, problem.v, image);
  const Head grad = of(arguments.grad, contiguous(problem, queries), sequence);
  const Head out = of(arguments.out, contiguous(problem, queries), sequence);
  const float* lse = arguments.lse + blockIdx.x * problem.queries;

  const Matrix key_rows{dynamic_shared()},
      value_rows{key_rows.memory + 16 * warps * Matrix::kRowBytes};
  const Matrix out_rows{value_rows.memory + 16 * warps * Matrix::kRowBytes};
  const Slopes slopes{out_rows.memory + kStageBytes};
  char* const buffers = slopes.memory + 16 * warps * Slopes::kRowBytes;
  constexpr int kBufferBytes = 2 * kStageBytes + kStage * sizeof(float2);
  const auto query_rows = [&](int stage) { return Matrix{buffers + stage % 2 * kBufferBytes}; };
  const auto grad_rows = [&](int stage) { return Matrix{query_rows(stage).memory + kStageBytes}; };
  const auto statistics = [&](int stage) {  // lse in base 2, rowsum(grad out)
    return reinterpret_cast<float2*>(grad_rows(stage).memory + kStageBytes);
  };
  const auto stage_rows = [&](int stage) {
    return (min(kStage, queries - stage * kStage) + 15) / 16 * 16;
  };

  const auto fetch = [&](int stage) {
    const int first = stage * kStage, rows = stage_rows(stage);
    query_rows(stage).fill(q, map, first, rows, queries, threadIdx.x, blockDim.x);
    grad_rows(stage).fill(grad, identity, first, rows, queries, threadIdx.x, blockDim.x);
    out_rows.fill(out, identity, first, rows, queries, threadIdx.x, blockDim.x);
  };
  const auto summarise = [&](int stage) {  // by the last threads: the first have more of dq
    const Matrix grads = grad_rows(stage);
    for (int row = blockDim.x - 1 - threadIdx.x; row < stage_rows(stage); row += blockDim.x) {
      const int query = stage * kStage + row;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Matrix::kPieces; ++i) {
        const uint4 x = *reinterpret_cast<const uint4*>(grads.piece(row, i));
        const uint4 y = *reinterpret_cast<const uint4*>(out_rows.piece(row, i));
        sum += Format::dot(x.x, y.x) + Format::dot(x.y, y.y) + Format::dot(x.z, y.z) +
               Format::dot(x.w, y.w);
      }
      statistics(stage)[row] = {query < queries ? lse[query] * kLog2e : INFINITY, sum};
    }
  };

  const int first_key = blockIdx.y * 16 * warps, block_keys = min(16 * warps, keys - first_key);
  const int own = 16 * warp;
  const bool active = own < block_keys;
  key_rows.fill(k, map, first_key, 16 * warps, keys, threadIdx.x, blockDim.x);
  value_rows.fill(v, map, first_key, 16 * warps, keys, threadIdx.x, blockDim.x);
  const int stages = (queries + kStage - 1) / kStage;
  if (stages) fetch(0);
  copy_wait();
  __syncthreads();
  if (stages) summarise(0);

  uint32_t held_keys[kHold ? kSteps : 1][4], held_values[kHold ? kSteps : 1][4];
  if constexpr (kHold) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      key_rows.left(held_keys[step], own, step);
      value_rows.left(held_values[step], own, step);
    }
  }
  const float scale = static_cast<float>(problem.scale), scale2 = scale * kLog2e;
  const bool valid[2] = {own + lane / 4 < block_keys, own + lane / 4 + 8 < block_keys};
  float dk[kColumns][2][4] = {}, dv[kColumns][2][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    __syncthreads();  // (1)
    if (stage + 1 < stages) fetch(stage + 1);
    const int rows = stage_rows(stage);
    const Matrix queries_here = query_rows(stage), grads_here = grad_rows(stage);
#pragma unroll 1
    for (int query = 0; active && query < rows; query += 16) {
      float p[2][4] = {}, ds[2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4], b[2][2];
        if constexpr (!kHold) key_rows.left(a, own, step);
        queries_here.right_along(b, query, step);
        Format::mma(p[0], kHold ? held_keys[kHold ? step : 0] : a, b[0]);
        Format::mma(p[1], kHold ? held_keys[kHold ? step : 0] : a, b[1]);
        if constexpr (!kHold) value_rows.left(a, own, step);
        grads_here.right_along(b, query, step);
        Format::mma(ds[0], kHold ? held_values[kHold ? step : 0] : a, b[0]);
        Format::mma(ds[1], kHold ? held_values[kHold ? step : 0] : a, b[1]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 row = statistics(stage)[query + i / 4 * 8 + lane % 4 * 2 + i % 2];
        float& x = p[i / 4][i % 4];
        x = valid[i / 2 % 2] ? exp2_fast(fmaf(x, scale2, -row.x)) : 0;
        ds[i / 4][i % 4] = x * (ds[i / 4][i % 4] - row.y);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_pair<Format>(
            slopes.element(own + lane / 4 + i % 2 * 8, query + i / 2 * 8 + lane % 4 * 2),
            ds[i / 2][i % 2 * 2], ds[i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int depth = 0; depth < kDepths<Format>; ++depth) {
        const int row = query + depth * kDepth<Format>;
        uint32_t a[4], b[2][2];
        as_left<Format>(a, p, depth);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          grads_here.right_across(b, row, 16 * column);
          Format::mma(dv[column][0], a, b[0]);
          Format::mma(dv[column][1], a, b[1]);
        }
        as_left<Format>(a, ds, depth);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          queries_here.right_across(b, row, 16 * column);
          Format::mma(dk[column][0], a, b[0]);
          Format::mma(dk[column][1], a, b[1]);
        }
      }
    }
    copy_wait();
    __syncthreads();  // (2)
    if (stage + 1 < stages) summarise(stage + 1);

#pragma unroll 1
    for (int unit = warp; unit < rows / 16 * kColumns; unit += warps) {
      const int query = unit / kColumns * 16, column = unit % kColumns * 16;
      float dq[2][4] = {};
#pragma unroll 1
      for (int key = 0; key < block_keys; key += 16)
#pragma unroll
        for (int depth = 0; depth < kDepths<Format>; ++depth) {
          uint32_t a[4], b[2][2];
          slopes.left_across(a, key + depth * kDepth<Format>, query);
          key_rows.right_across(b, key + depth * kDepth<Format>, column);
          Format::mma(dq[0], a, b[0]);
          Format::mma(dq[1], a, b[1]);
        }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = stage * kStage + query + lane / 4 + i / 2 * 8;
        const int at = column + i % 2 * 8 + lane % 4 * 2;
        if (row >= queries || at >= width) continue;
        const int64_t part = arguments.dq_parts ? blockIdx.y * problem.sequences : 0;
        const int64_t index = ((part + sequence) * queries + row) * problem.heads + head;
        store_gradient<Format>(arguments.dq, arguments.dq_parts, index * width + at,
                               dq[i % 2][i / 2 * 2] * scale, dq[i % 2][i / 2 * 2 + 1] * scale);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kColumns * 4; ++i) {
    const int row = first_key + own + lane / 4 + i % 2 * 8;
    const int column = i / 2 * 8 + lane % 4 * 2;
    if (row >= keys || column >= width) continue;
    const int64_t index = ((sequence * problem.keys + row) * problem.heads + head) * width + column;
    const float* x = dk[i / 4][i / 2 % 2] + i % 2 * 2;
    const float* y = dv[i / 4][i / 2 % 2] + i % 2 * 2;
    store_gradient<Format>(arguments.dk, arguments.dk_parts, index, x[0] * scale, x[1] * scale);
    store_gradient<Format>(arguments.dv, arguments.dv_parts, index, y[0], y[1]);
  }
}

// Adds what the parts, and in the shared form the replicas, hold for a row; a block a row.
template <class Format>
__global__ void sum_parts(const SumArguments arguments) {
  const AttentionProblem& problem = arguments.problem;
  const int64_t image = blockIdx.x / arguments.rows, columns = problem.heads * problem.width;
  const int row = static_cast<int>(blockIdx.x % arguments.rows);
  const int replicas = max(static_cast<int>(problem.chunks), 1);
  const int tokens =
      problem.chunks ? static_cast<int>(problem.keys) - 1 : static_cast<int>(arguments.rows);
  // In which token of a replica a row of the packed tensor can be, if in any.
  const int t = !problem.chunks ? row : row < 2 * tokens ? 1 + row % tokens : 0;
  const int64_t sequence_rows = problem.chunks ? tokens + 1 : arguments.rows;
  for (int64_t column = 2 * threadIdx.x; column < columns; column += 2 * blockDim.x) {
    float2 sum{};
    for (int part = 0; part < arguments.parts[blockIdx.y]; ++part)
      for (int replica = 0; replica < replicas; ++replica) {
        const int64_t sequence = image * replicas + replica;
        if (RowMap(problem, static_cast<int>(sequence)).row(t) != row) continue;
        const int64_t index = ((part * problem.sequences + sequence) * sequence_rows + t) * columns;
        const float2 x =
            *reinterpret_cast<const float2*>(arguments.from[blockIdx.y] + index + column);
        sum.x += x.x, sum.y += x.y;
      }
    char* to = static_cast<char*>(arguments.to[blockIdx.y]);
    store_pair<Format>(to + (blockIdx.x * columns + column) * Format::kBytes, sum.x, sum.y);
  }
}

#define KERNEL(format, width)                                               \
  {"attention_backward<" #format ", " #width ">", Format::k##format, width, \
   attention_backward<format, width>}
constexpr BackwardKernel kKernels[] = {
    KERNEL(Bfloat16, 16),      KERNEL(Bfloat16, 32),      KERNEL(Bfloat16, 64),
    KERNEL(Bfloat16, 96),      KERNEL(Bfloat16, 128),     KERNEL(Float16, 16),
    KERNEL(Float16, 32),       KERNEL(Float16, 64),       KERNEL(Float16, 96),
    KERNEL(Float16, 128),      KERNEL(Float32, 16),       KERNEL(Float32, 32),
    KERNEL(Float32, 64),       KERNEL(Float32, 128),      KERNEL(TensorFloat32, 16),
    KERNEL(TensorFloat32, 32), KERNEL(TensorFloat32, 64), KERNEL(TensorFloat32, 128),
};
#undef KERNEL
constexpr SumKernel kSums[] = {
    {"sum_parts<Bfloat16>", Format::kBfloat16, sum_parts<Bfloat16>},
    {"sum_parts<Float16>", Format::kFloat16, sum_parts<Float16>},
    {"sum_parts<Float32>", Format::kFloat32, sum_parts<Float32>},
};

struct Plan {
  const BackwardKernel* kernel;
  int warps = 0, parts = 0, shared_bytes = 0;
  int64_t dq_parts = 0, dk_parts = 0;  // floats in the workspace; dv as dk
};

Plan plan_backward(const AttentionProblem& problem, Format format) {
  Plan plan{find_kernel(kKernels, format, problem.width)};
  if (!plan.kernel) return plan;
  const int element = element_bytes(format), row_bytes = plan.kernel->width * element;
  const int buffers = problem.queries > stage_queries(row_bytes) ? 2 : 1;
  const int tiles = divide_up(problem.keys, 16), limit = current_device().shared_bytes;
  int warps = std::min(tiles, backward_threads(row_bytes) / 32);
  while (warps > 1 && backward_shared_bytes(row_bytes, element, warps, buffers) > limit) --warps;
  plan.parts = divide_up(tiles, warps);
  plan.warps = divide_up(tiles, plan.parts);
  plan.shared_bytes = backward_shared_bytes(row_bytes, element, plan.warps, buffers);
  const int64_t columns = problem.sequences * problem.heads * problem.width;
  if (plan.parts > 1 || problem.chunks) plan.dq_parts = plan.parts * columns * problem.queries;
  if (problem.chunks) plan.dk_parts = columns * problem.keys;
  return plan;
}

}  // namespace

const BackwardKernel* backward_kernels(int* count) {
  *count = std::size(kKernels);
  return kKernels;
}

const SumKernel* sum_kernels(int* count) {
  *count = std::size(kSums);
  return kSums;
}

int64_t attention_backward_workspace(const AttentionProblem& problem, Format format) {
  const Plan plan = plan_backward(problem, format);
  return (plan.dq_parts + 2 * plan.dk_parts) * sizeof(float);
}

const char* launch_attention_backward(const AttentionProblem& problem, Format format,
                                      const void* grad, const void* q, const void* k, const void* v,
                                      const void* out, const float* lse, void* dq, void* dk,
                                      void* dv, void* workspace, void* stream) {
  const Plan plan = plan_backward(problem, format);
  if (!plan.kernel) return kUnsupportedWidth;
  const int64_t blocks = problem.sequences * problem.heads;
  if (!blocks) return nullptr;

  float* dq_parts = plan.dq_parts ? static_cast<float*>(workspace) : nullptr;
  float* dk_parts = plan.dk_parts ? dq_parts + plan.dq_parts : nullptr;
  float* dv_parts = plan.dk_parts ? dk_parts + plan.dk_parts : nullptr;
  const BackwardArguments arguments{problem,  grad,
                                    q,        k,
                                    v,        out,
                                    lse,      dq,
                                    dk,       dv,
                                    dq_parts, dk_parts,
                                    dv_parts, is_aligned(problem, format, {grad, q, k, v, out})};
  const char* error = launch(plan.kernel->function, blocks, plan.parts, 32 * plan.warps,
                             plan.shared_bytes, stream, arguments);
  if (error || !dq_parts) return error;

  const int64_t images = problem.chunks ? problem.sequences / problem.chunks : problem.sequences;
  const int64_t rows = problem.chunks ? 2 * (problem.keys - 1) + problem.chunks : problem.queries;
  const SumArguments sum{
      problem, images, rows, {plan.parts, 1, 1}, {dq_parts, dk_parts, dv_parts}, {dq, dk, dv}};
  const Format stored = format == Format::kTensorFloat32 ? Format::kFloat32 : format;
  for (const SumKernel& kernel : kSums)
    if (kernel.format == stored)
      error = launch(kernel.function, images * rows, problem.chunks ? 3 : 1, 128, 0, stream, sum);
  return error;
}

}  // namespace impure_fast
