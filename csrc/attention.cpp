// Causal attention: the three passes over q [B, H, T, D] and k, v [B, K, T, D] with contiguous rows,
// H / K query heads to a key head, and lse [B, H, T] the log-sum-exp of each query's scores.
//
// A thread takes a key head of an example at a time, copies what it needs of it, widened and padded
// with zeros to whole vectors, and goes through its queries a block at a time. So there is one
// kernel for every product, scratch of a few [T, D] and [QUERIES, T] to a thread, and no tail.
#include <limits>

#include "common.h"
#include "products.h"

namespace gdprompt {
namespace {

constexpr int64_t QUERIES = 24;  // of a block

// Queries [first, end) of a head and the keys [key, end) that some of them see; the matrices
// [queries, keys] have all keys of the head for columns, and zeros where a query sees none.
struct Block {
  int32_t first, end, key, padded_end;  // the columns that are written: whole vectors
  const int32_t* first_key;             // of each query of the head, which sees from there to itself

  // s[queries, keys] = scale ([s +] a kᵀ)
  template <class A>
  void scores(const Matrix<A>& a, const Matrix<A>& k_transposed, const Matrix<A>& s, A scale = 1,
              bool add = false) const {
    product(a.at(0), a.stride, 1, k_transposed.at(0, key), k_transposed.stride, s.at(0, key),
            s.stride, end - first, padded_end - key, k_transposed.rows, scale, add);
  }
  // out[queries, D] (+)= p v
  template <class A>
  void weigh(const Matrix<A>& p, const Matrix<A>& v, const Matrix<A>& out, bool add = false) const {
    product(p.at(0, key), p.stride, 1, v.at(key), v.stride, out.at(0), out.stride, end - first,
            out.stride, end - key, A(1), add);
  }
  // out[keys, D] += pᵀ a
  template <class A>
  void spread(const Matrix<A>& p, const Matrix<A>& a, const Matrix<A>& out) const {
    product(p.at(0, key), 1, p.stride, a.at(0), a.stride, out.at(key), out.stride, end - key,
            out.stride, end - first, A(1), true);
  }
};

// P from the scores of a block, and lse
template <class A>
VECTORISED void softmax(const Block& block, A* s, int64_t stride, A* lse) {
  constexpr A hidden = -std::numeric_limits<A>::infinity();
  for (int32_t query = block.first; query < block.end; ++query, s += stride) {
    const int32_t first = block.first_key[query];
    A top = hidden, sum = 0;
#pragma omp simd reduction(max : top)
    for (int32_t j = block.key; j < block.padded_end; ++j) {
      s[j] = j >= first && j <= query ? s[j] : hidden;
      top = top < s[j] ? s[j] : top;
    }
#pragma omp simd reduction(+ : sum)
    for (int32_t j = block.key; j < block.padded_end; ++j) {
      s[j] = exponential(s[j] - top);
      sum += s[j];
    }
#pragma omp simd
    for (int32_t j = block.key; j < block.padded_end; ++j) s[j] /= sum;
    lse[query] = top + std::log(sum);
  }
}

// P = exp(s − lse) where the query sees the key, in place. Returns the key where it is greatest.
template <class A>
INLINE int32_t probabilities(const Block& block, int32_t query, A* s, A lse) {
  const int32_t first = block.first_key[query];
  A top = 0;
#pragma omp simd reduction(max : top)
  for (int32_t j = block.key; j < block.padded_end; ++j) {
    s[j] = j >= first && j <= query ? exponential(s[j] - lse) : 0;
    top = top < s[j] ? s[j] : top;
  }
  int32_t key = first;
  while (key < query && s[key] < top) ++key;
  return key;
}

// x − rowsum(P ∘ x), in place. By differences from the likeliest key's x, so that no digits are lost
// where one key has nearly all of P, and zero where it has all.
template <class A>
INLINE void centre(const Block& block, const A* p, A* x, int32_t likeliest) {
  const A reference = x[likeliest];
  A mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int32_t j = block.key; j < block.padded_end; ++j) {
    x[j] -= reference;
    mean += p[j] * x[j];
  }
#pragma omp simd
  for (int32_t j = block.key; j < block.padded_end; ++j) x[j] -= mean;
}

// In place, s ← P and dp ← dS = P ∘ (dP − δ), δ = rowsum(P ∘ dP)
template <class A>
VECTORISED void backward_rows(const Block& block, A* s, A* dp, int64_t stride, const A* lse) {
  for (int32_t query = block.first; query < block.end; ++query, s += stride, dp += stride) {
    const int32_t likeliest = probabilities(block, query, s, lse[query]);
    centre(block, s, dp, likeliest);
#pragma omp simd
    for (int32_t j = block.key; j < block.padded_end; ++j) dp[j] *= s[j];
  }
}

// In place, s ← P, dp ← dS, sdot ← Ṗ = P ∘ (Ṡ − σ) and x ← S̄ = P ∘ (P̄ − τ), of which
// P̄ = (dP − δ) ∘ (Ṡ − σ) + x, σ = rowsum(P ∘ Ṡ) and τ = rowsum(P ∘ P̄)
template <class A>
VECTORISED void double_backward_rows(const Block& block, A* s, A* dp, A* sdot, A* x, int64_t stride,
                                     const A* lse) {
  for (int32_t query = block.first; query < block.end;
       ++query, s += stride, dp += stride, sdot += stride, x += stride) {
    const int32_t likeliest = probabilities(block, query, s, lse[query]);
    centre(block, s, dp, likeliest);
    centre(block, s, sdot, likeliest);
#pragma omp simd
    for (int32_t j = block.key; j < block.padded_end; ++j) x[j] += dp[j] * sdot[j];
    centre(block, s, x, likeliest);
#pragma omp simd
    for (int32_t j = block.key; j < block.padded_end; ++j) {
      dp[j] *= s[j];
      sdot[j] *= s[j];
      x[j] *= s[j];
    }
  }
}

template <class T>
VECTORISED void read_row(const T* from, Wide<T>* to, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) to[d] = wide(from[d]);
}

template <class T>
VECTORISED void write_row(const Wide<T>* from, T* to, int64_t D, Wide<T> scale) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) store(to + d, from[d] * scale);
}

// A head [T, D] of a tensor [B, heads, T, D] with contiguous rows.
template <class T>
struct Head {
  using A = Wide<T>;
  T* data;
  int64_t stride, D;

  Head(const Tensor& t, int64_t b, int64_t h)
      : data(static_cast<T*>(t.data_ptr()) + b * t.stride(0) + h * t.stride(1)),
        stride(t.stride(2)),
        D(t.size(3)) {}

  // Rows [first, end) to the first rows of a matrix.
  void read(int64_t first, int64_t end, const Matrix<A>& to) const {
    for (int64_t t = first; t < end; ++t) read_row(data + t * stride, to.at(t - first), D);
  }
  // The first rows of a matrix, times scale, to rows [first, end).
  void write(int64_t first, int64_t end, const Matrix<A>& from, A scale = 1) const {
    for (int64_t t = first; t < end; ++t) write_row(from.at(t - first), data + t * stride, D, scale);
  }
};

// The keys or values of a head: rows [T, D] and their transpose.
template <class A>
struct Keys {
  Matrix<A> rows, transposed;
  Keys(int64_t T, int64_t D) : rows(T, D), transposed(D, T) {}

  template <class T>
  void read(const Head<T>& head) const {
    head.read(0, rows.rows, rows);
    for (int64_t t = 0; t < rows.rows; ++t)
      for (int64_t d = 0; d < head.D; ++d) *transposed.at(d, t) = *rows.at(t, d);
  }
};

struct Shape {
  int64_t B, H, K, T, D;
  Tensor first_key;  // [B, T], int32

  Shape(const Tensor& q, const Tensor& k, const Tensor& first_key)
      : B(q.size(0)),
        H(q.size(1)),
        K(k.size(1)),
        T(q.size(2)),
        D(q.size(3)),
        first_key(first_key) {}

  // f(workspace, example, key head) for every key head, with a workspace for each thread.
  template <class Workspace, class F>
  void for_key_heads(const F& f) const {
    parallel(B * K, T * T * D, [&](int64_t begin, int64_t end) {
      const Workspace workspace(T, D);
      for (int64_t item = begin; item < end; ++item) f(workspace, item / K, item % K);
    });
  }

  // f(query head, block) for every block of queries of every query head of a key head.
  template <class A, class F>
  void for_blocks(int64_t b, int64_t key_head, const F& f) const {
    const int32_t* first_keys = in<int32_t>(first_key) + b * T;
    for (int64_t head = key_head * (H / K); head < (key_head + 1) * (H / K); ++head)
      for (int64_t first = 0; first < T; first += QUERIES) {
        const int64_t end = std::min(T, first + QUERIES);
        const int64_t key = first_keys[first] / WIDTH<A> * WIDTH<A>;  // they never decrease
        f(head, Block{int32_t(first), int32_t(end), int32_t(key), int32_t(padded<A>(end)),
                      first_keys});
      }
  }

  template <class A>
  A* row(const Tensor& t, int64_t b, int64_t head) const {
    return static_cast<A*>(t.data_ptr()) + (b * H + head) * T;
  }
};

// Refuses k that does not fit q, tensors that are not like the one or the other, and statistics or
// first keys of other rows than q's.
void expect_heads(const Tensor& q, std::initializer_list<Argument> like_q, const Tensor& k,
                  std::initializer_list<Argument> like_k, const Tensor& lse,
                  const Tensor& first_key) {
  const int64_t B = q.size(0), H = q.size(1), K = k.size(1), T = q.size(2), D = q.size(3);
  expect(q.scalar_type(), {B, K, T, D}, {{"k", k}});
  STD_TORCH_CHECK(K > 0 && H % K == 0, "k: expected a divisor of ", H, " heads, got ", K);
  expect_like(q, like_q);
  expect_like(k, like_k);
  expect(wide_dtype(q), {B, H, T}, {{"lse", lse}});
  expect(ScalarType::Int, {B, T}, {{"first_key", first_key}});
}

// O = P V, and lse
template <class T>
void forward(const Shape& shape, Tensor q, Tensor k, Tensor v, Wide<T> scale, Tensor out,
             Tensor lse) {
  using A = Wide<T>;
  struct Workspace {
    Keys<A> k;
    Matrix<A> v, q, s, out;
    Workspace(int64_t T_, int64_t D)
        : k(T_, D), v(T_, D), q(QUERIES, D), s(QUERIES, T_), out(QUERIES, D) {}
  };
  shape.for_key_heads<Workspace>([&](const Workspace& w, int64_t b, int64_t key_head) {
    w.k.read(Head<T>(k, b, key_head));
    Head<T>(v, b, key_head).read(0, shape.T, w.v);
    shape.for_blocks<A>(b, key_head, [&](int64_t head, const Block& block) {
      Head<T>(q, b, head).read(block.first, block.end, w.q);
      block.scores(w.q, w.k.transposed, w.s, scale);
      softmax(block, w.s.at(0), w.s.stride, shape.row<A>(lse, b, head));
      block.weigh(w.s, w.v, w.out);
      Head<T>(out, b, head).write(block.first, block.end, w.out);
    });
  });
}

// dP = dO Vᵀ;  δ = rowsum(P ∘ dP);  dS = P ∘ (dP − δ)
// dQ = scale dS K;  dK = scale dSᵀ Q;  dV = Pᵀ dO
template <class T>
void backward(const Shape& shape, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse,
              Wide<T> scale, Tensor dq, Tensor dk, Tensor dv) {
  using A = Wide<T>;
  struct Workspace {
    Keys<A> k, v;
    Matrix<A> dk, dv, q, dout, s, dp, dq;
    Workspace(int64_t T_, int64_t D)
        : k(T_, D), v(T_, D), dk(T_, D), dv(T_, D), q(QUERIES, D), dout(QUERIES, D),
          s(QUERIES, T_), dp(QUERIES, T_), dq(QUERIES, D) {}
  };
  shape.for_key_heads<Workspace>([&](const Workspace& w, int64_t b, int64_t key_head) {
    w.k.read(Head<T>(k, b, key_head));
    w.v.read(Head<T>(v, b, key_head));
    w.dk.clear();
    w.dv.clear();
    shape.for_blocks<A>(b, key_head, [&](int64_t head, const Block& block) {
      Head<T>(q, b, head).read(block.first, block.end, w.q);
      Head<T>(dout, b, head).read(block.first, block.end, w.dout);
      block.scores(w.q, w.k.transposed, w.s, scale);
      block.scores(w.dout, w.v.transposed, w.dp);
      backward_rows(block, w.s.at(0), w.dp.at(0), w.s.stride, shape.row<A>(lse, b, head));
      block.weigh(w.dp, w.k.rows, w.dq);
      block.spread(w.dp, w.q, w.dk);
      block.spread(w.s, w.dout, w.dv);
      Head<T>(dq, b, head).write(block.first, block.end, w.dq, scale);
    });
    Head<T>(dk, b, key_head).write(0, shape.T, w.dk, scale);
    Head<T>(dv, b, key_head).write(0, shape.T, w.dv);
  });
}

// Of cotangents Q̇ of dQ, K̇ of dK, V̇ of dV:
//   Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ);  σ = rowsum(P ∘ Ṡ);  Ṗ = P ∘ (Ṡ − σ)
//   P̄ = (dP − δ) ∘ (Ṡ − σ) + dO V̇ᵀ;  S̄ = P ∘ (P̄ − τ);  τ = rowsum(P ∘ P̄)
//   cot dO = Ṗ V + P V̇;  cot V = Ṗᵀ dO
//   cot Q = scale (S̄ K + dS K̇);  cot K = scale (S̄ᵀ Q + dSᵀ Q̇)
template <class T>
void double_backward(const Shape& shape, Tensor cot_dq, Tensor cot_dk, Tensor cot_dv, Tensor dout,
                     Tensor q, Tensor k, Tensor v, Tensor lse, Wide<T> scale,
                     Tensor cot_dout, Tensor cot_q, Tensor cot_k, Tensor cot_v) {
  using A = Wide<T>;
  struct Workspace {
    Keys<A> k, v, kdot, vdot;
    Matrix<A> cot_k, cot_v, q, qdot, dout, s, dp, sdot, x, rows;
    Workspace(int64_t T_, int64_t D)
        : k(T_, D), v(T_, D), kdot(T_, D), vdot(T_, D), cot_k(T_, D), cot_v(T_, D), q(QUERIES, D),
          qdot(QUERIES, D), dout(QUERIES, D), s(QUERIES, T_), dp(QUERIES, T_), sdot(QUERIES, T_),
          x(QUERIES, T_), rows(QUERIES, D) {}
  };
  shape.for_key_heads<Workspace>([&](const Workspace& w, int64_t b, int64_t key_head) {
    w.k.read(Head<T>(k, b, key_head));
    w.v.read(Head<T>(v, b, key_head));
    w.kdot.read(Head<T>(cot_dk, b, key_head));
    w.vdot.read(Head<T>(cot_dv, b, key_head));
    w.cot_k.clear();
    w.cot_v.clear();
    shape.for_blocks<A>(b, key_head, [&](int64_t head, const Block& block) {
      Head<T>(q, b, head).read(block.first, block.end, w.q);
      Head<T>(cot_dq, b, head).read(block.first, block.end, w.qdot);
      Head<T>(dout, b, head).read(block.first, block.end, w.dout);
      block.scores(w.q, w.k.transposed, w.s, scale);
      block.scores(w.dout, w.v.transposed, w.dp);
      block.scores(w.qdot, w.k.transposed, w.sdot);
      block.scores(w.q, w.kdot.transposed, w.sdot, scale, true);
      block.scores(w.dout, w.vdot.transposed, w.x);
      double_backward_rows(block, w.s.at(0), w.dp.at(0), w.sdot.at(0), w.x.at(0), w.s.stride,
                           shape.row<A>(lse, b, head));
      block.weigh(w.sdot, w.v.rows, w.rows);
      block.weigh(w.s, w.vdot.rows, w.rows, true);
      Head<T>(cot_dout, b, head).write(block.first, block.end, w.rows);
      block.weigh(w.x, w.k.rows, w.rows);
      block.weigh(w.dp, w.kdot.rows, w.rows, true);
      Head<T>(cot_q, b, head).write(block.first, block.end, w.rows, scale);
      block.spread(w.x, w.q, w.cot_k);
      block.spread(w.dp, w.qdot, w.cot_k);
      block.spread(w.sdot, w.dout, w.cot_v);
    });
    Head<T>(cot_k, b, key_head).write(0, shape.T, w.cot_k, scale);
    Head<T>(cot_v, b, key_head).write(0, shape.T, w.cot_v);
  });
}

void attention_forward(Tensor q, Tensor k, Tensor v, double scale, Tensor first_key, Tensor out,
                       Tensor lse) {
  expect_heads(q, {{"out", out}}, k, {{"v", v}}, lse, first_key);
  for_dtype(q, [&]<class T>(T) {
    forward<T>(Shape(q, k, first_key), q, k, v, scale, out, lse);
  });
}
CPU_OP(attention_forward,
       "Tensor q, Tensor k, Tensor v, float scale, Tensor first_key, Tensor(a!) out, "
       "Tensor(b!) lse")

void attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse,
                        double scale, Tensor first_key, Tensor dq, Tensor dk, Tensor dv) {
  expect_heads(q, {{"dout", dout}, {"dq", dq}}, k, {{"v", v}, {"dk", dk}, {"dv", dv}}, lse,
               first_key);
  for_dtype(q, [&]<class T>(T) {
    backward<T>(Shape(q, k, first_key), dout, q, k, v, lse, scale, dq, dk, dv);
  });
}
CPU_OP(attention_backward,
       "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, float scale, Tensor first_key, "
       "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv")

void attention_double_backward(Tensor cot_dq, Tensor cot_dk, Tensor cot_dv, Tensor dout, Tensor q,
                               Tensor k, Tensor v, Tensor lse, double scale, Tensor first_key,
                               Tensor cot_dout, Tensor cot_q, Tensor cot_k, Tensor cot_v) {
  expect_heads(q, {{"cot_dq", cot_dq}, {"dout", dout}, {"cot_dout", cot_dout}, {"cot_q", cot_q}}, k,
               {{"cot_dk", cot_dk}, {"cot_dv", cot_dv}, {"v", v}, {"cot_k", cot_k},
                {"cot_v", cot_v}},
               lse, first_key);
  for_dtype(q, [&]<class T>(T) {
    double_backward<T>(Shape(q, k, first_key), cot_dq, cot_dk, cot_dv, dout, q, k, v, lse,
                       scale, cot_dout, cot_q, cot_k, cot_v);
  });
}
CPU_OP(attention_double_backward,
       "Tensor cot_dq, Tensor cot_dk, Tensor cot_dv, Tensor dout, Tensor q, Tensor k, Tensor v, "
       "Tensor lse, float scale, Tensor first_key, Tensor(a!) cot_dout, Tensor(b!) cot_q, "
       "Tensor(c!) cot_k, Tensor(d!) cot_v")

}  // namespace
}  // namespace gdprompt
