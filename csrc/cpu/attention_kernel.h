// Softmax attention of one head at a time, forward and backward, for any vector type.
//
// All sums run through one product, C[i][lanes] = sum_j A[i, j] * B[j][lanes]: the factor A is one
// word broadcast from memory, B a few vectors, C a tile of sums in registers.  Its uses are
//   scores   S^T[key][queries]  = K[key][d] * Q^T[d][queries]          lanes over queries, so that
//   weights  dP^T[key][queries] = V[key][d] * dO^T[d][queries]         max and sum are vertical;
//   values   out[query][d]      = P^T[key][query] * V[key][d]          lanes over the width,
//   gradients dV[key][d] = P^T[key][query] * dO[query][d], dK likewise, dQ as the values.
// A word holds one element, or a pair of bf16 adjacent along the summed axis.  AMX has a forward
// pass and a product of its own (attention_amx.cpp), and sums dQ transposed, K^T dS, to take dS as
// it lies.
//
// Queries are taken in strips whose scores against all keys stay in the cache, so the softmax is
// exact at once and nothing is rescaled.  Rows are packed first: to the vector type's words, padded
// with zeros to whole vectors, whatever the strides, the row map or the type in memory.
//
// Scratch of a head, fp32, rows padded to whole vectors: forward k, v, a strip of queries with its
// scores, its sums; backward also q, grad, the strip's slopes, dq, dk, dv (and in the shared form
// their totals over 2L + K rows).  Words of bf16 pairs take half, but values are kept paired both
// along the width and along the rows.  At 257 x 32 in fp32 it is 0.15 and 0.4 MB: second cache.
#pragma once

#include "cpu/attention.h"
#include "cpu/simd.h"

namespace impure_fast {
namespace {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out aligned parts of a block; run once from address 0 it measures the block.
struct Carver {
  uintptr_t at;
  template <class Real>
  Real* take(int64_t count) {
    const uintptr_t part = at;
    at += round_up(count * sizeof(Real), 64);
    return reinterpret_cast<Real*>(part);
  }
};

// The factor A: A[i, j] at data[i * row + j * column], in words.
template <class Real>
struct Factor {
  const Real* data;
  int64_t row, column;
};

// Rows of whole vectors, in words.
template <class Real>
struct Rows2D {
  Real* data;
  int64_t row;
  Real* operator[](int64_t i) const { return data + i * row; }
};

template <class S, int kRows, int kVectors>
__attribute__((always_inline)) inline void multiply_tile(Factor<typename S::Real> a,
                                                         const typename S::Real* b, int64_t b_row,
                                                         typename S::Real* c, int64_t c_row,
                                                         int64_t length, bool add) {
  typename S::Vector sums[kRows][kVectors] = {};
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[i][n] = S::load(c + i * c_row + n * S::kLanes);
    }
  }
  for (int64_t j = 0; j < length; ++j) {
    typename S::Vector x[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) x[n] = S::load(b + n * S::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename S::Real factor = a.data[i * a.row];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[i][n] = S::multiply_add(sums[i][n], factor, x[n]);
    }
    a.data += a.column;
    b += b_row;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) S::store(c + i * c_row + n * S::kLanes, sums[i][n]);
  }
}

template <class S, int kRows, int kVectors>
__attribute__((noinline)) void multiply_rows(int64_t rows, Factor<typename S::Real> a,
                                             const typename S::Real* b, int64_t b_row,
                                             typename S::Real* c, int64_t c_row, int64_t length,
                                             bool add) {
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row) {
    multiply_tile<S, kRows, kVectors>(a, b, b_row, c, c_row, length, add);
  }
  if constexpr (kRows > 1) {
    if (rows) multiply_rows<S, (kRows + 1) / 2, kVectors>(rows, a, b, b_row, c, c_row, length, add);
  }
}

// C = A B, or C + A B.
template <class S>
void multiply(int64_t rows, int64_t lanes, int64_t length, Factor<typename S::Real> a,
              Rows2D<typename S::Real> b, Rows2D<typename S::Real> c, bool add = false) {
  if constexpr (S::kTiled) {
    S::multiply(rows, lanes, length, a, b, c, add);
  } else {
    constexpr int kMost = S::kSums / 2 < 12 ? S::kSums / 2 : 12;
    for (int64_t at = 0, left = lanes / S::kLanes; left > 0;) {
      const int64_t parts = (left + 3) / 4, vectors = (left + parts - 1) / parts;
      const auto go = vectors == 1   ? multiply_rows<S, kMost, 1>
                      : vectors == 2 ? multiply_rows<S, S::kSums / 2, 2>
                      : vectors == 3 ? multiply_rows<S, S::kSums / 3, 3>
                                     : multiply_rows<S, S::kSums / 4, 4>;
      go(rows, a, b.data + at, b.row, c.data + at, c.row, length, add);
      at += vectors * S::kLanes;
      left -= vectors;
    }
  }
}

// Stores the transpose of a square of words, made by rounds of perfect shuffles.
template <class S>
void store_transposed(typename S::Vector (&x)[S::kLanes], Rows2D<typename S::Real> to) {
#pragma GCC unroll 4
  for (int round = 1; round < S::kLanes; round *= 2) {
    typename S::Vector y[S::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      y[i] = i % 2 ? S::template interleave<1>(x[i / 2], x[i / 2 + S::kLanes / 2])
                   : S::template interleave<0>(x[i / 2], x[i / 2 + S::kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < S::kLanes; ++i) S::store(to[i], x[i]);
}

// Whole vectors of rows and of columns.
template <class S>
void transpose(Rows2D<typename S::Real> from, int64_t rows, int64_t columns,
               Rows2D<typename S::Real> to) {
  for (int64_t i = 0; i < rows; i += S::kLanes) {
    for (int64_t at = 0; at < columns; at += S::kLanes) {
      typename S::Vector x[S::kLanes];
      for (int r = 0; r < S::kLanes; ++r) x[r] = S::load(from[i + r] + at);
      store_transposed<S>(x, {to[at] + i, to.row});
    }
  }
}

// The words of up to a vector of elements; what is missing is zero.
template <class S, class T>
typename S::Vector load_words(const T* from, int64_t count) {
  if constexpr (sizeof(T) * S::kPair == sizeof(typename S::Real)) {
    return count >= S::kLanes * S::kPair ? S::load(from) : S::load_part(from, count * sizeof(T));
  } else {
    T part[S::kLanes] = {};
    if (count < S::kLanes) {
      __builtin_memcpy(part, from, count * sizeof(T));
      from = part;
    }
    typename S::Real wide[S::kLanes];
    for (int i = 0; i < S::kLanes; ++i) wide[i] = widen(from[i]);
    return S::load(wide);
  }
}

template <class S>
void store_elements(typename S::Real* to, typename S::Vector x, int64_t count) {
  count >= S::kLanes ? S::store(to, x) : S::store_part(to, x, count * sizeof(typename S::Real));
}

template <class S>
void store_elements(Bfloat16* to, typename S::Vector x, int64_t count) {
  if (count >= S::kLanes) return S::store_narrow(to, x);
  Bfloat16 part[S::kLanes];
  S::store_narrow(part, x);
  __builtin_memcpy(to, part, count * sizeof(Bfloat16));
}

// One head of one sequence (backward: of one image).  S: a vector over the width; S::Half: over
// the few queries that may be left after whole vectors.  T: elements in memory.
template <class S, class T>
class Head {
 public:
  static void forward(const AttentionProblem& p, const AttentionArrays& x, int64_t begin,
                      int64_t end) {
    Head head(p, x, false);
    [[maybe_unused]] const typename S::Shapes shapes;
    for (int64_t task = begin; task < end; ++task) {
      head.touch(task, begin, end, false);
      head.forward(task / p.heads, task % p.heads);
    }
  }
  static void backward(const AttentionProblem& p, const AttentionArrays& x, int64_t begin,
                       int64_t end) {
    Head head(p, x, true);
    [[maybe_unused]] const typename S::Shapes shapes;
    for (int64_t task = begin; task < end; ++task) {
      head.touch(task, begin, end, true);
      head.backward(task / p.heads, task % p.heads);
    }
  }

 protected:
  using Real = typename S::Real;
  using Vector = typename S::Vector;
  using Matrix = Rows2D<Real>;
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr int64_t kUnit = S::kTiled ? 2 * S::kLanes : S::kPair;  // of rows in the scratch
  static constexpr int64_t kTouched = 512 * 1024;                         // bytes

  // Without scratch.
  Head(const AttentionProblem& problem, const AttentionArrays& arrays) : p_(problem), x_(arrays) {}
  Head(const AttentionProblem& problem, const AttentionArrays& arrays, bool gradients)
      : Head(problem, arrays) {
    carve(reinterpret_cast<uintptr_t>(attention_scratch(carve(0, gradients))), gradients);
  }

  uintptr_t carve(uintptr_t base, bool gradients) {
    Carver block{base};
    const int64_t words = round_up(words_, S::kLanes), width = round_up(p_.width, S::kLanes);
    const auto take = [&](int64_t rows, int64_t row) {
      return Matrix{block.take<Real>(rows * row), row};
    };
    const auto take_pairs = [&](int64_t rows, Matrix same) {
      return S::kPair == 1 ? same : take(rows / S::kPair, width);
    };
    strip_ = smaller(4 * S::kLanes, round_up(p_.queries, S::kLanes));
    const int64_t queries = round_up(p_.queries, kUnit), keys = round_up(p_.keys, kUnit);
    k_ = take(keys, words), v_ = take(keys, words);
    q_lanes_ = take(words, strip_), scores_ = take(keys, strip_);
    sums_ = take(gradients ? queries : strip_, width);
    norm_ = block.take<Real>(strip_);
    if (S::kTiled) sums_lanes_ = take(width, strip_), k_columns_ = take(width, keys / S::kPair);
    if (!gradients) {
      v_pairs_ = take_pairs(keys, v_);
      return block.at;
    }
    q_ = take(queries, words), g_ = take(queries, words);
    g_lanes_ = take(words, strip_), slopes_ = take(keys, strip_);
    q_pairs_ = take_pairs(queries, q_), k_pairs_ = take_pairs(keys, k_);
    g_pairs_ = take_pairs(queries, g_);
    p_rows_ = S::kPair == 1 ? scores_ : take(keys, strip_ / S::kPair);
    s_rows_ = S::kPair == 1 ? slopes_ : take(keys, strip_ / S::kPair);
    dk_ = take(keys, width), dv_ = take(keys, width);
    if (p_.chunks) {
      for (Matrix& total : total_) total = take(packed_rows(), width);
    }
    return block.at;
  }

  int64_t packed_rows() const { return 2 * (p_.keys - 1) + p_.chunks; }

  // The rows of a sequence's tokens in one head.
  struct Tokens {
    const AttentionProblem& p;
    const T* data;
    int64_t stride, sequence;
    bool mapped;
    const T* operator[](int64_t t) const {
      return data + (mapped ? p.row(sequence, t) : t) * stride;
    }
  };
  Tokens tokens(const void* data, const Rows& strides, int64_t sequence, int64_t head) const {
    return {p_,
            static_cast<const T*>(data) + p_.image(sequence) * strides.batch + head * strides.head,
            strides.row, sequence, p_.chunks > 0};
  }
  Tokens gradients(int64_t sequence, int64_t head) const {
    const int64_t stride = p_.heads * p_.width;
    return {p_, static_cast<const T*>(x_.grad) + sequence * p_.queries * stride + head * p_.width,
            stride, sequence, false};
  }

  // Reads of one head are strided, so slow; where heads adjoin, read the rows of several at once,
  // in the order of memory, as many as the second cache keeps until their turn.
  void touch(int64_t task, int64_t begin, int64_t end, bool backward) const {
    const int64_t sequence = task / p_.heads * (backward && p_.chunks ? p_.chunks : 1);
    const int64_t head = task % p_.heads, bytes = p_.width * sizeof(T);
    const int64_t tokens_read = (backward ? 2 : 1) * p_.queries + 2 * p_.keys;
    const int64_t group = larger(1, kTouched / (tokens_read * bytes));
    const bool adjoin = p_.q.head == p_.width && p_.k.head == p_.width && p_.v.head == p_.width;
    if (!adjoin || (task != begin && head % group)) return;
    const int64_t heads = smaller(smaller(group - head % group, p_.heads - head), end - task);
    const auto read = [&](const T* row) {
      const auto* const at = reinterpret_cast<const volatile char*>(row);
      for (int64_t i = 0; i < heads * bytes; i += 64) at[i];
    };
    const Tokens q = tokens(x_.q, p_.q, sequence, head), k = tokens(x_.k, p_.k, sequence, head);
    const Tokens v = tokens(x_.v, p_.v, sequence, head);
    for (int64_t t = 0; t < p_.queries || t < p_.keys; ++t) {
      if (t < p_.queries) read(q[t]);
      if (t < p_.keys) read(k[t]), read(v[t]);
    }
    if (!backward) return;
    const Tokens g = gradients(sequence, head);
    for (int64_t t = 0; t < p_.queries; ++t) read(g[t]);
  }

  // Rows in words; where words are pairs, an even number of rows.
  void pack(const Tokens& from, int64_t count, Matrix to, int64_t first = 0) const {
    for (int64_t t = 0; t < count; ++t) {
      const T* const row = from[first + t];
      for (int64_t w = 0; w < words_; w += S::kLanes) {
        S::store(to[t] + w, load_words<S>(row + w * S::kPair, p_.width - w * S::kPair));
      }
    }
    zero(to, count, round_up(count, kUnit));
  }

  static void zero(Matrix x, int64_t begin, int64_t end) {
    if (begin < end) __builtin_memset(x[begin], 0, (end - begin) * x.row * sizeof(Real));
  }

  // Rows [i], [i + 1] of pairs along the width -> row [i / 2] of pairs along the rows.
  static void pair_rows(Matrix from, int64_t rows, Matrix to) {
    if constexpr (S::kPair == 2) {
      using Integers = typename S::Integers;
      for (int64_t i = 0; i < round_up(rows, kUnit); i += 2) {
        for (int64_t at = 0; at < to.row; at += 2 * S::kLanes) {
          const Integers a = (Integers)S::load(from[i] + at / 2);
          const Integers b = (Integers)S::load(from[i + 1] + at / 2);
          const Vector even = (Vector)((a & 0xffff) | (b << 16));
          const Vector odd = (Vector)(((a >> 16) & 0xffff) | (b & ~0xffff));
          S::store(to[i / 2] + at, S::template interleave<0>(even, odd));
          if (at + S::kLanes < to.row) {
            S::store(to[i / 2] + at + S::kLanes, S::template interleave<1>(even, odd));
          }
        }
      }
    }
  }

  // Words x queries; lanes without a query are zero.
  template <class Q>
  void pack_lanes(const Tokens& from, int64_t first, int64_t queries, Matrix to) const {
    for (int64_t i = 0; i < queries; i += Q::kLanes) {
      const T* rows[Q::kLanes];
      for (int r = 0; r < Q::kLanes; ++r) rows[r] = i + r < queries ? from[first + i + r] : nullptr;
      for (int64_t w = 0; w < words_; w += Q::kLanes) {
        typename Q::Vector x[Q::kLanes] = {};
        for (int r = 0; r < Q::kLanes && rows[r]; ++r) {
          x[r] = load_words<Q>(rows[r] + w * Q::kPair, p_.width - w * Q::kPair);
        }
        store_transposed<Q>(x, {to[w] + i, to.row});
      }
    }
  }

  // Calls work<Q>(first, queries, lanes) on every strip; a few queries over make one of half
  // vectors, which saves up to half a vector of padding.
  template <class Work>
  void for_strips(Work work) {
    constexpr int64_t kHalf = S::Half::kLanes;
    for (int64_t first = 0, queries; first < p_.queries; first += queries) {
      queries = smaller(strip_, p_.queries - first);
      const int64_t rest = queries % S::kLanes;
      const bool half = kHalf < S::kLanes && rest && rest <= kHalf;
      if (half && queries > rest) queries -= rest;
      if (half && queries == rest) {
        work.template operator()<typename S::Half>(first, queries, kHalf);
      } else {
        work.template operator()<S>(first, queries, round_up(queries, S::kLanes));
      }
    }
  }

  void forward(int64_t sequence, int64_t head) {
    static_assert(!S::kTiled);
    const Tokens q = tokens(x_.q, p_.q, sequence, head);
    pack(tokens(x_.k, p_.k, sequence, head), p_.keys, k_);
    pack(tokens(x_.v, p_.v, sequence, head), p_.keys, v_);
    pair_rows(v_, p_.keys, v_pairs_);
    T* const out = static_cast<T*>(x_.out) + (sequence * p_.queries * p_.heads + head) * p_.width;
    Real* const lse = static_cast<Real*>(x_.lse) + (sequence * p_.heads + head) * p_.queries;
    for_strips([&]<class Q>(int64_t first, int64_t queries, int64_t lanes) {
      const Matrix scores{scores_.data, lanes}, q_lanes{q_lanes_.data, lanes};
      pack_lanes<Q>(q, first, queries, q_lanes);
      multiply<Q>(p_.keys, lanes, words_, {k_.data, k_.row, 1}, q_lanes, scores);
      softmax<Q>(scores, lanes, lse + first, queries);
      sum_values(scores, lanes, queries, v_pairs_, {}, sums_);
      for (int64_t i = 0; i < queries; ++i) {
        store_row(sums_[i], norm_[i], out + (first + i) * p_.heads * p_.width);
      }
    });
  }

  // sums[query] = sum_key weights[key][query] values[key].  weights: words of keys, lanes over
  // queries; values as words of keys: pairs [key word][width], columns [width][key word].
  void sum_values(Matrix weights, int64_t lanes, int64_t queries, Matrix pairs, Matrix columns,
                  Matrix sums) const {
    if constexpr (S::kTiled) {  // tiles take the weights as they lie if they come second
      const Matrix sums_lanes{sums_lanes_.data, lanes};
      zero(weights, key_words_, columns.row);
      multiply<S>(sums.row, lanes, columns.row, {columns.data, columns.row, 1}, weights,
                  sums_lanes);
      transpose<S>(sums_lanes, sums.row, lanes, sums);
    } else {
      multiply<S>(queries, sums.row, key_words_, {weights.data, 1, lanes}, pairs, sums);
    }
  }

  void store_row(const Real* from, Real factor, T* to) const {
    for (int64_t at = 0; at < p_.width; at += S::kLanes) {
      store_elements<S>(to + at, factor * S::load(from + at), p_.width - at);
    }
  }

  // Scores -> unnormalised weights, as words of keys; norm_ = 1 / sum.
  template <class Q>
  void softmax(Matrix scores, int64_t lanes, Real* lse, int64_t queries) {
    using V = typename Q::Vector;
    const Real scale2 = static_cast<Real>(p_.scale * kLog2E);
    const bool negative = p_.scale < 0;
    const auto pick = [&](V a, V b) { return negative ? Q::min(a, b) : Q::max(a, b); };
    for (int64_t at = 0; at < lanes; at += Q::kLanes) {
      Real* from = scores.data + at;
      const Real* const last = scores[p_.keys - 1] + at;
      V peak = Q::load(from), other = peak;
      for (const Real* score = from; score < last; score += 2 * lanes) {
        peak = pick(peak, Q::load(score)), other = pick(other, Q::load(score + lanes));
      }
      peak = pick(pick(peak, other), Q::load(last));
      V sum{};
      const auto weight = [&](const Real* score) {
        const V w = exp2<Q>(Q::load(score) - peak, scale2);
        sum += w;
        return w;
      };
      for (Real* to = from; from <= last; from += Q::kPair * lanes, to += lanes) {
        V word = weight(from);
        if constexpr (Q::kPair == 2) word = Q::pack(word, from < last ? weight(from + lanes) : V{});
        Q::store(to, word);
      }
      Q::store(norm_ + at, 1 / sum);
      store_elements<Q>(lse + at, peak * static_cast<Real>(p_.scale) + log<Q>(sum), queries - at);
    }
  }

  void backward(int64_t image, int64_t head) {
    const int64_t replicas = p_.chunks ? p_.chunks : 1;
    if (p_.chunks) {
      for (Matrix total : total_) zero(total, 0, packed_rows());
    }
    for (int64_t sequence = image * replicas; sequence < (image + 1) * replicas; ++sequence) {
      differentiate(sequence, head);
      if (!p_.chunks) continue;
      const Matrix parts[] = {sums_, dk_, dv_};
      for (int64_t t = 0; t < p_.keys; ++t) {
        for (int i = 0; i < 3; ++i) {
          Real* const to = total_[i][p_.row(sequence, t)];
          for (int64_t at = 0; at < sums_.row; at += S::kLanes) {
            S::store(to + at, S::load(to + at) + S::load(parts[i][t] + at));
          }
        }
      }
    }
    const auto store = [&](Matrix from, Real factor, void* data, int64_t rows) {
      T* to = static_cast<T*>(data) + (image * rows * p_.heads + head) * p_.width;
      for (int64_t i = 0; i < rows; ++i, to += p_.heads * p_.width) store_row(from[i], factor, to);
    };
    const Real scale = static_cast<Real>(p_.scale);
    store(p_.chunks ? total_[0] : sums_, scale, x_.dq, p_.chunks ? packed_rows() : p_.queries);
    store(p_.chunks ? total_[1] : dk_, scale, x_.dk, p_.chunks ? packed_rows() : p_.keys);
    store(p_.chunks ? total_[2] : dv_, 1, x_.dv, p_.chunks ? packed_rows() : p_.keys);
  }

  // One sequence's gradients, into sums_ (dq), dk_ and dv_; dq and dk still lack the scale.
  void differentiate(int64_t sequence, int64_t head) {
    const Tokens q = tokens(x_.q, p_.q, sequence, head), g = gradients(sequence, head);
    if (!p_.queries) zero(dk_, 0, p_.keys), zero(dv_, 0, p_.keys);
    pack(q, p_.queries, q_);
    pack(tokens(x_.k, p_.k, sequence, head), p_.keys, k_);
    pack(tokens(x_.v, p_.v, sequence, head), p_.keys, v_);
    pack(g, p_.queries, g_);
    pair_rows(q_, p_.queries, q_pairs_);
    pair_rows(k_, p_.keys, k_pairs_);
    if constexpr (S::kTiled) transpose<S>(k_pairs_, k_columns_.row, k_pairs_.row, k_columns_);
    pair_rows(g_, p_.queries, g_pairs_);
    const Real* const lse =
        static_cast<const Real*>(x_.lse) + (sequence * p_.heads + head) * p_.queries;
    for_strips([&]<class Q>(int64_t first, int64_t queries, int64_t lanes) {
      const Matrix scores{scores_.data, lanes}, slopes{slopes_.data, lanes};
      const Matrix q_lanes{q_lanes_.data, lanes}, g_lanes{g_lanes_.data, lanes};
      const Matrix p_rows{p_rows_.data, lanes / S::kPair}, s_rows{s_rows_.data, lanes / S::kPair};
      pack_lanes<Q>(q, first, queries, q_lanes);
      pack_lanes<Q>(g, first, queries, g_lanes);
      multiply<Q>(p_.keys, lanes, words_, {k_.data, k_.row, 1}, q_lanes, scores);
      multiply<Q>(p_.keys, lanes, words_, {v_.data, v_.row, 1}, g_lanes, slopes);
      softmax_backward<Q>(scores, slopes, p_rows, s_rows, lanes, lse + first, queries);
      const int64_t pairs = (queries + S::kPair - 1) / S::kPair;
      const auto pair_at = [&](Matrix x) { return Matrix{x[first / S::kPair], x.row}; };
      multiply<S>(p_.keys, dv_.row, pairs, {p_rows.data, p_rows.row, 1}, pair_at(g_pairs_), dv_,
                  first > 0);
      multiply<S>(p_.keys, dk_.row, pairs, {s_rows.data, s_rows.row, 1}, pair_at(q_pairs_), dk_,
                  first > 0);
      sum_values(slopes, lanes, queries, k_pairs_, k_columns_, {sums_[first], sums_.row});
    });
  }

  // S -> P and dP -> dS = P (dP - sum_key P dP), without the scale.  P goes to p_rows as words of
  // queries, dS to s_rows likewise and to slopes as words of keys.
  template <class Q>
  void softmax_backward(Matrix scores, Matrix slopes, Matrix p_rows, Matrix s_rows, int64_t lanes,
                        const Real* lse, int64_t queries) {
    using V = typename Q::Vector;
    const Real scale = static_cast<Real>(p_.scale);
    for (int64_t at = 0; at < lanes; at += Q::kLanes) {
      const int64_t here = smaller(queries - at, Q::kLanes);
      const V sums = Q::load_part(lse + at, here * sizeof(Real));
      V mean{};
      for (int64_t key = 0; key < p_.keys; ++key) {
        const V w = exp2<Q>(Q::load(scores[key] + at) * scale - sums, kLog2E);
        mean += w * Q::load(slopes[key] + at);
        Q::store(scores[key] + at, w);
        if constexpr (Q::kPair == 2) Q::store_narrow(halves(p_rows[key]) + at, w);
      }
      const auto slope = [&](int64_t key) {
        const V s = Q::load(scores[key] + at) * (Q::load(slopes[key] + at) - mean);
        if constexpr (Q::kPair == 2) Q::store_narrow(halves(s_rows[key]) + at, s);
        return s;
      };
      for (int64_t key = 0; key < p_.keys; key += Q::kPair) {
        const V s = slope(key);
        if constexpr (Q::kPair == 1) {
          Q::store(slopes[key] + at, s);
        } else {
          Q::store(slopes[key / 2] + at, Q::pack(s, key + 1 < p_.keys ? slope(key + 1) : V{}));
        }
      }
    }
  }

  static Bfloat16* halves(Real* words) { return reinterpret_cast<Bfloat16*>(words); }

  const AttentionProblem& p_;
  const AttentionArrays& x_;
  const int64_t words_ = round_up(p_.width, S::kTiled ? kUnit : S::kPair) / S::kPair;
  const int64_t key_words_ = (p_.keys + S::kPair - 1) / S::kPair;
  int64_t strip_;  // queries taken at a time
  Matrix q_, k_, v_, g_, q_lanes_, g_lanes_, q_pairs_, k_pairs_, v_pairs_, g_pairs_;
  Matrix k_columns_, sums_lanes_;  // of tiles alone
  Matrix scores_, slopes_, p_rows_, s_rows_, sums_, dk_, dv_, total_[3];
  Real* norm_;
};

}  // namespace
}  // namespace impure_fast
