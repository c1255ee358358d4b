// silu(gate) ∘ up: the three passes, elementwise. All tensors contiguous, of one dtype.
#include "common.h"

namespace gdprompt {
namespace {

// silu = g s and its derivatives, with s the sigmoid of g.
template <class A>
struct Silu {
  A value, first, second;
  INLINE explicit Silu(A g) {
    const A e = exponential(-g), s = 1 / (1 + e), slope = e * s * s;  // slope: s (1 − s)
    value = g * s;
    first = s + g * slope;
    second = slope * (2 + value * (e - 1));
  }
};

// y = silu(gate) ∘ up
template <class T>
VECTORISED void forward(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i)
    store(y + i, Silu(wide(gate[i])).value * wide(up[i]));
}

// dgate = dy ∘ up ∘ silu'(gate);  dup = dy ∘ silu(gate)
template <class T>
VECTORISED void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t begin,
                         int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Silu silu(wide(gate[i]));
    store(dgate + i, wide(dy[i]) * wide(up[i]) * silu.first);
    store(dup + i, wide(dy[i]) * silu.value);
  }
}

// Of cotangents a of dgate, b of dup:
//   cot dy = a ∘ up ∘ silu' + b ∘ silu;  cot up = a ∘ dy ∘ silu'
//   cot gate = dy ∘ (a ∘ up ∘ silu'' + b ∘ silu')
template <class T>
VECTORISED void double_backward(const T* a, const T* b, const T* dy, const T* gate, const T* up,
                                T* cot_dy, T* cot_gate, T* cot_up, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Silu silu(wide(gate[i]));
    const auto ai = wide(a[i]), bi = wide(b[i]), dyi = wide(dy[i]), upi = wide(up[i]);
    store(cot_dy + i, ai * upi * silu.first + bi * silu.value);
    store(cot_gate + i, dyi * (ai * upi * silu.second + bi * silu.first));
    store(cot_up + i, ai * dyi * silu.first);
  }
}

void swiglu_forward(Tensor gate, Tensor up, Tensor y) {
  expect_like(gate, {{"up", up}, {"y", y}});
  elementwise(gate, [&]<class T>(T, int64_t begin, int64_t end) {
    forward(in<T>(gate), in<T>(up), out<T>(y), begin, end);
  });
}
CPU_OP(swiglu_forward, "Tensor gate, Tensor up, Tensor(a!) y")

void swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  expect_like(gate, {{"dy", dy}, {"up", up}, {"dgate", dgate}, {"dup", dup}});
  elementwise(gate, [&]<class T>(T, int64_t begin, int64_t end) {
    backward(in<T>(dy), in<T>(gate), in<T>(up), out<T>(dgate), out<T>(dup), begin, end);
  });
}
CPU_OP(swiglu_backward, "Tensor dy, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup")

void swiglu_double_backward(Tensor a, Tensor b, Tensor dy, Tensor gate, Tensor up, Tensor cot_dy,
                            Tensor cot_gate, Tensor cot_up) {
  expect_like(gate, {{"a", a}, {"b", b}, {"dy", dy}, {"up", up}});
  expect_like(gate, {{"cot_dy", cot_dy}, {"cot_gate", cot_gate}, {"cot_up", cot_up}});
  elementwise(gate, [&]<class T>(T, int64_t begin, int64_t end) {
    double_backward(in<T>(a), in<T>(b), in<T>(dy), in<T>(gate), in<T>(up), out<T>(cot_dy),
                    out<T>(cot_gate), out<T>(cot_up), begin, end);
  });
}
CPU_OP(swiglu_double_backward,
       "Tensor a, Tensor b, Tensor dy, Tensor gate, Tensor up, Tensor(a!) cot_dy, "
       "Tensor(b!) cot_gate, Tensor(c!) cot_up")

}  // namespace
}  // namespace gdprompt
