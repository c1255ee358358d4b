// RMSNorm and LayerNorm: the three passes over x [B, N, D], with γ and β [B, D] of row stride ≥ 0
// in x's wide dtype, as are μ and r [B, N]. x̂ = (x − μ) r; μ = 0 unless centred.
//
// A chunk is up to CHUNK rows of one example; sums over an example's rows come out as one partial
// [D] for each chunk, so that they are the same with any number of threads.
#include <vector>

#include "common.h"

namespace gdprompt {
namespace {

constexpr int64_t CHUNK = 64;

// y = x̂ ∘ γ + β of one row
template <class T>
VECTORISED void forward_row(const T* x, const Wide<T>* weight, const Wide<T>* bias, T* y,
                            Wide<T>* mean, Wide<T>* rstd, int64_t D, Wide<T> eps) {
  using A = Wide<T>;
  A mu = 0, square = 0;
  if (mean) {
#pragma omp simd reduction(+ : mu)
    for (int64_t i = 0; i < D; ++i) mu += wide(x[i]);
    *mean = mu /= D;
  }
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < D; ++i) square += (wide(x[i]) - mu) * (wide(x[i]) - mu);
  const A r = *rstd = 1 / std::sqrt(square / D + eps);
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) store(y + i, (wide(x[i]) - mu) * r * weight[i] + bias[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) store(y + i, (wide(x[i]) - mu) * r * weight[i]);
  }
}

// dx = r (g − x̂ mean(g ∘ x̂) − [centred] mean(g)), g = dy ∘ γ;  dγ = Σ_t dy ∘ x̂;  dβ = Σ_t dy
template <class T>
VECTORISED void backward_chunk(const T* dy, const T* x, const Wide<T>* weight, const Wide<T>* mean,
                               const Wide<T>* rstd, T* dx, Wide<T>* dweight, Wide<T>* dbias,
                               int64_t rows, int64_t D) {
  using A = Wide<T>;
  std::fill_n(dweight, D, A(0));
  std::fill_n(dbias, D, A(0));
  for (int64_t row = 0; row < rows; ++row, dy += D, x += D, dx += D) {
    const A mu = mean ? mean[row] : 0, r = rstd[row];
    A g_xhat = 0, g_sum = 0;
#pragma omp simd reduction(+ : g_xhat, g_sum)
    for (int64_t i = 0; i < D; ++i) {
      const A xhat = (wide(x[i]) - mu) * r, d = wide(dy[i]), g = d * weight[i];
      g_xhat += g * xhat;
      g_sum += g;
      dweight[i] += d * xhat;
      dbias[i] += d;
    }
    g_xhat /= D;
    g_sum = mean ? g_sum / D : 0;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const A xhat = (wide(x[i]) - mu) * r, g = wide(dy[i]) * weight[i];
      store(dx + i, r * (g - xhat * g_xhat - g_sum));
    }
  }
}

// With P g = r (g − x̂ mean(g ∘ x̂) − [centred] mean(g)) and cotangents u of dx, v of dγ, w of dβ:
//   cot dy = (P u) ∘ γ + v ∘ x̂ + w;  cot γ = Σ_t (P u) ∘ dy
//   cot x  = P z − r x̂ mean(u ∘ dx),  z = v ∘ dy − r mean(g ∘ x̂) u − r mean(u ∘ x̂) g
template <class T>
VECTORISED void double_backward_chunk(const T* u, const Wide<T>* v, const Wide<T>* w, const T* dy,
                                      const T* x, const Wide<T>* weight, const Wide<T>* mean,
                                      const Wide<T>* rstd, T* cot_dy, T* cot_x, Wide<T>* cot_weight,
                                      int64_t rows, int64_t D) {
  using A = Wide<T>;
  std::fill_n(cot_weight, D, A(0));
  for (int64_t row = 0; row < rows;
       ++row, u += D, dy += D, x += D, cot_dy += D, cot_x += D) {
    const A mu = mean ? mean[row] : 0, r = rstd[row];
    A g_xhat = 0, g_sum = 0, u_xhat = 0, u_sum = 0, u_g = 0, vdy_xhat = 0, vdy_sum = 0;
#pragma omp simd reduction(+ : g_xhat, g_sum, u_xhat, u_sum, u_g, vdy_xhat, vdy_sum)
    for (int64_t i = 0; i < D; ++i) {
      const A xhat = (wide(x[i]) - mu) * r, d = wide(dy[i]), g = d * weight[i], ui = wide(u[i]);
      g_xhat += g * xhat;
      g_sum += g;
      u_xhat += ui * xhat;
      u_sum += ui;
      u_g += ui * g;
      vdy_xhat += v[i] * d * xhat;
      vdy_sum += v[i] * d;
    }
    g_xhat /= D;
    u_xhat /= D;
    g_sum = mean ? g_sum / D : 0;
    u_sum = mean ? u_sum / D : 0;
    const A u_dx = r * (u_g / D - g_xhat * u_xhat - g_sum * u_sum);  // means of products
    const A z_xhat = vdy_xhat / D - 2 * r * g_xhat * u_xhat;
    const A z_sum = mean ? vdy_sum / D - r * (g_xhat * u_sum + u_xhat * g_sum) : 0;
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) {
      const A xhat = (wide(x[i]) - mu) * r, d = wide(dy[i]), g = d * weight[i], ui = wide(u[i]);
      const A pu = r * (ui - xhat * u_xhat - u_sum);
      const A z = v[i] * d - r * (g_xhat * ui + u_xhat * g);
      cot_weight[i] += pu * d;
      store(cot_dy + i, pu * weight[i] + v[i] * xhat + w[i]);
      store(cot_x + i, r * (z - xhat * (z_xhat + u_dx) - z_sum));
    }
  }
}

struct Shape {
  int64_t examples, rows, D, chunks;  // rows and chunks of one example

  explicit Shape(const Tensor& x)
      : examples(x.size(0)),
        rows(x.numel() / std::max<int64_t>(1, x.size(0) * x.size(-1))),
        D(x.size(-1)),
        chunks((rows + CHUNK - 1) / CHUNK) {}

  std::array<int64_t, 3> partials() const { return {examples, chunks, D}; }

  // f(example, its first row, row of all, rows, chunk of all) for every chunk.
  template <class F>
  void for_chunks(const F& f) const {
    parallel(examples * chunks, CHUNK * D, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t example = chunk / chunks, first = chunk % chunks * CHUNK;
        f(example, example * rows + first, std::min(CHUNK, rows - first), chunk);
      }
    });
  }
};

// Refuses the statistics of x's rows, [B, …, 1] each, and the tensors [B, D] of γ's size if not so.
void expect_rows(const Tensor& x, std::initializer_list<Argument> statistics,
                 std::initializer_list<Argument> weights) {
  std::vector<int64_t> rows(x.sizes().begin(), x.sizes().end());
  rows.back() = 1;
  expect(wide_dtype(x), rows, statistics);
  expect(wide_dtype(x), {x.size(0), x.size(-1)}, weights);
}

// γ, β and their cotangents: row b of a matrix [B, D] with contiguous rows; null for none.
template <class A>
const A* row_of(const std::optional<Tensor>& t, int64_t b) {
  return t ? in<A>(*t) + b * t->stride(0) : nullptr;
}
template <class A>
const A* from(const std::optional<Tensor>& t, int64_t offset) {
  return t ? in<A>(*t) + offset : nullptr;
}

void norm_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps, Tensor y,
                  std::optional<Tensor> mean, Tensor rstd) {
  expect_like(x, {{"y", y}});
  expect_rows(x, {{"mean", mean.value_or(rstd)}, {"rstd", rstd}},
              {{"weight", weight}, {"bias", bias.value_or(weight)}});
  for_dtype(x, [&]<class T>(T) {
    using A = Wide<T>;
    const Shape shape(x);
    shape.for_chunks([&](int64_t b, int64_t first, int64_t rows, int64_t) {
      const A *gamma = row_of<A>(weight, b), *beta = row_of<A>(bias, b);
      for (int64_t row = first; row < first + rows; ++row)
        forward_row<T>(in<T>(x) + row * shape.D, gamma, beta, out<T>(y) + row * shape.D,
                       mean ? out<A>(*mean) + row : nullptr, out<A>(rstd) + row, shape.D, eps);
    });
  });
}
CPU_OP(norm_forward,
       "Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) y, Tensor(b!)? mean, "
       "Tensor(c!) rstd")

void norm_backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> mean, Tensor rstd,
                   Tensor dx, Tensor dweight, Tensor dbias) {
  const Shape shape(x);
  expect_like(x, {{"dy", dy}, {"dx", dx}});
  expect_rows(x, {{"mean", mean.value_or(rstd)}, {"rstd", rstd}}, {{"weight", weight}});
  expect(wide_dtype(x), shape.partials(), {{"dweight", dweight}, {"dbias", dbias}});
  for_dtype(x, [&]<class T>(T) {
    using A = Wide<T>;
    shape.for_chunks([&](int64_t b, int64_t first, int64_t rows, int64_t chunk) {
      const int64_t at = first * shape.D, sum = chunk * shape.D;
      backward_chunk<T>(in<T>(dy) + at, in<T>(x) + at, row_of<A>(weight, b), from<A>(mean, first),
                        in<A>(rstd) + first, out<T>(dx) + at, out<A>(dweight) + sum,
                        out<A>(dbias) + sum, rows, shape.D);
    });
  });
}
CPU_OP(norm_backward,
       "Tensor dy, Tensor x, Tensor weight, Tensor? mean, Tensor rstd, Tensor(a!) dx, "
       "Tensor(b!) dweight, Tensor(c!) dbias")

void norm_double_backward(Tensor u, Tensor v, Tensor w, Tensor dy, Tensor x, Tensor weight,
                          std::optional<Tensor> mean, Tensor rstd, Tensor cot_dy, Tensor cot_x,
                          Tensor cot_weight) {
  const Shape shape(x);
  expect_like(x, {{"u", u}, {"dy", dy}, {"cot_dy", cot_dy}, {"cot_x", cot_x}});
  expect_rows(x, {{"mean", mean.value_or(rstd)}, {"rstd", rstd}},
              {{"v", v}, {"w", w}, {"weight", weight}});
  expect(wide_dtype(x), shape.partials(), {{"cot_weight", cot_weight}});
  for_dtype(x, [&]<class T>(T) {
    using A = Wide<T>;
    shape.for_chunks([&](int64_t b, int64_t first, int64_t rows, int64_t chunk) {
      const int64_t at = first * shape.D;
      double_backward_chunk<T>(in<T>(u) + at, row_of<A>(v, b), row_of<A>(w, b), in<T>(dy) + at,
                               in<T>(x) + at, row_of<A>(weight, b), from<A>(mean, first),
                               in<A>(rstd) + first, out<T>(cot_dy) + at, out<T>(cot_x) + at,
                               out<A>(cot_weight) + chunk * shape.D, rows, shape.D);
    });
  });
}
CPU_OP(norm_double_backward,
       "Tensor u, Tensor v, Tensor w, Tensor dy, Tensor x, Tensor weight, Tensor? mean, "
       "Tensor rstd, Tensor(a!) cot_dy, Tensor(b!) cot_x, Tensor(c!) cot_weight")

}  // namespace
}  // namespace gdprompt
