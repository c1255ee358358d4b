// x Φ(x) with the tanh form of Φ: the three passes, elementwise. All tensors contiguous, of one
// dtype. (PyTorch is as quick at the exact form's value and first derivative.)
#include "common.h"

namespace gdprompt {
namespace {

// gelu = x Φ, gelu' = Φ + x d and gelu'' = 2 d + x d' with d = Φ', for Φ = ½ (1 + tanh(u)) = σ(2u),
// u = K (x + C x³).
template <class A>
struct Gelu {
  A value, first, second;

  INLINE explicit Gelu(A x) {
    constexpr A K = 0.7978845608028654, C = 0.044715;
    const A e = exponential(-2 * K * x * (1 + C * x * x)), cdf = 1 / (1 + e);
    const A slope = e * cdf * cdf, du = 2 * K * (1 + 3 * C * x * x);  // slope: σ(2u) σ(−2u)
    const A density = slope * du;
    value = x * cdf;
    first = cdf + x * density;
    second = 2 * density + x * slope * (12 * K * C * x + (e - 1) * cdf * du * du);
  }
};

// y = x Φ(x)
template <class T>
VECTORISED void forward(const T* x, T* y, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) store(y + i, Gelu(wide(x[i])).value);
}

// dx = dy ∘ gelu'(x)
template <class T>
VECTORISED void backward(const T* dy, const T* x, T* dx, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) store(dx + i, wide(dy[i]) * Gelu(wide(x[i])).first);
}

// Of a cotangent a of dx:  cot dy = a ∘ gelu'(x);  cot x = a ∘ dy ∘ gelu''(x)
template <class T>
VECTORISED void double_backward(const T* a, const T* dy, const T* x, T* cot_dy, T* cot_x,
                                int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Gelu gelu(wide(x[i]));
    store(cot_dy + i, wide(a[i]) * gelu.first);
    store(cot_x + i, wide(a[i]) * wide(dy[i]) * gelu.second);
  }
}

void gelu_forward(Tensor x, Tensor y) {
  expect_like(x, {{"y", y}});
  elementwise(x, [&]<class T>(T, int64_t begin, int64_t end) {
    forward(in<T>(x), out<T>(y), begin, end);
  });
}
CPU_OP(gelu_forward, "Tensor x, Tensor(a!) y")

void gelu_backward(Tensor dy, Tensor x, Tensor dx) {
  expect_like(x, {{"dy", dy}, {"dx", dx}});
  elementwise(x, [&]<class T>(T, int64_t begin, int64_t end) {
    backward(in<T>(dy), in<T>(x), out<T>(dx), begin, end);
  });
}
CPU_OP(gelu_backward, "Tensor dy, Tensor x, Tensor(a!) dx")

void gelu_double_backward(Tensor a, Tensor dy, Tensor x, Tensor cot_dy, Tensor cot_x) {
  expect_like(x, {{"a", a}, {"dy", dy}, {"cot_dy", cot_dy}, {"cot_x", cot_x}});
  elementwise(x, [&]<class T>(T, int64_t begin, int64_t end) {
    double_backward(in<T>(a), in<T>(dy), in<T>(x), out<T>(cot_dy), out<T>(cot_x), begin, end);
  });
}
CPU_OP(gelu_double_backward, "Tensor a, Tensor dy, Tensor x, Tensor(a!) cot_dy, Tensor(b!) cot_x")

}  // namespace
}  // namespace gdprompt
