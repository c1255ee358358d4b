// Rotary position embedding: a rotation and its adjoint, of x [B, H, T, D] by cos, sin
// [B or 1, T, R]; all with contiguous rows, of one dtype.
#include "common.h"

namespace gdprompt {
namespace {

// y₁ = x₁ ∘ cos₁ − x₂ ∘ sin₁;  y₂ = x₂ ∘ cos₂ + x₁ ∘ sin₂;  the rest of x as it is. Of the adjoint:
// dx₁ = dy₁ ∘ cos₁ + dy₂ ∘ sin₂;  dx₂ = dy₂ ∘ cos₂ − dy₁ ∘ sin₁
template <class T>
VECTORISED void rotate_heads(const T* x, int64_t x_head, const T* cos, const T* sin, T* y,
                             int64_t y_head, int64_t H, int64_t half, int64_t D, bool adjoint) {
  const T *to_1 = adjoint ? sin + half : sin, *to_2 = adjoint ? sin : sin + half;
  const Wide<T> sign = adjoint ? -1 : 1;
  for (int64_t h = 0; h < H; ++h, x += x_head, y += y_head) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const Wide<T> x1 = wide(x[i]), x2 = wide(x[half + i]);
      store(y + i, x1 * wide(cos[i]) - sign * x2 * wide(to_1[i]));
      store(y + half + i, x2 * wide(cos[half + i]) + sign * x1 * wide(to_2[i]));
    }
    for (int64_t i = 2 * half; i < D; ++i) y[i] = x[i];
  }
}

void rotary(Tensor x, Tensor cos, Tensor sin, bool adjoint, Tensor y) {
  const int64_t tables = cos.size(0) == 1 ? 1 : x.size(0);
  const int64_t rotated = std::min(cos.size(2), x.size(3));
  expect(x.scalar_type(), {tables, x.size(2), rotated}, {{"cos", cos}, {"sin", sin}});
  expect_like(x, {{"y", y}});
  const int64_t H = x.size(1), tokens = x.size(2), D = x.size(3), half = cos.size(2) / 2;
  const auto xs = x.strides(), cs = cos.strides(), ss = sin.strides(), ys = y.strides();
  for_dtype(x, [&]<class T>(T) {
    parallel(x.size(0) * tokens, H * D, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / tokens, t = item % tokens, table = cos.size(0) > 1 ? b : 0;
        rotate_heads(in<T>(x) + b * xs[0] + t * xs[2], xs[1], in<T>(cos) + table * cs[0] + t * cs[1],
                     in<T>(sin) + table * ss[0] + t * ss[1], out<T>(y) + b * ys[0] + t * ys[2],
                     ys[1], H, half, D, adjoint);
      }
    });
  });
}
CPU_OP(rotary, "Tensor x, Tensor cos, Tensor sin, bool adjoint, Tensor(a!) y")

}  // namespace
}  // namespace gdprompt
