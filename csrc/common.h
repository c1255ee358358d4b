// What every op here shares: run-time choice of the vector instructions, dtypes, and exp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

// A loop with this attribute is compiled for each of these and the best one is taken at run time.
// What it calls must be INLINE: a function or lambda that is not inlined has the default code only.
#if defined(__x86_64__) && defined(__linux__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINE inline __attribute__((always_inline))

// Registers a function of this file as torch.ops.gdprompt_fast.<its name>, which returns nothing, on
// a CPU; the arguments as in a schema of torch.library.
#define CPU_OP(function, arguments) \
  STABLE_TORCH_LIBRARY_FRAGMENT(gdprompt_fast, m) { m.def(#function "(" arguments ") -> ()"); } \
  STABLE_TORCH_LIBRARY_IMPL(gdprompt_fast, CPU, m) { m.impl(#function, TORCH_BOX(&function)); }

namespace gdprompt {

using bf16 = torch::headeronly::BFloat16;
using half = torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// What a dtype is computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

INLINE float wide(float x) { return x; }
INLINE double wide(double x) { return x; }
INLINE float wide(half x) { return x; }
INLINE float wide(bf16 x) { return std::bit_cast<float>(uint32_t(x.x) << 16); }

template <class T>
INLINE void store(T* at, Wide<T> x) {
  *at = x;
}
template <>
INLINE void store(bf16* at, float x) {
  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  at->x = uint16_t(x == x ? rounded : 0x7fc0);
}

constexpr auto INVERSE_FACTORIALS = [] {
  std::array<double, 14> inverse{1};
  for (int n = 1; n < 14; ++n) inverse[n] = inverse[n - 1] / n;
  return inverse;
}();

// e^x within two ulp; 0 where it would be subnormal, no more than e^limit, and NaN of NaN. Without a
// branch, so that loops of it vectorise: those of the C library's do not.
template <class A>
INLINE A exponential(A x) {
  constexpr bool narrow = std::is_same_v<A, float>;
  using Bits = std::conditional_t<narrow, int32_t, int64_t>;
  constexpr int mantissa = narrow ? 23 : 52, bias = narrow ? 127 : 1023, degree = narrow ? 7 : 13;
  constexpr A limit = narrow ? 87.0 : 708.0;
  constexpr A rounding = narrow ? 12582912.0 : 6755399441055744.0;  // 1.5 · 2^mantissa
  constexpr A log2_high = narrow ? 0.693359375 : 6.93145751953125e-1;
  constexpr A log2_low = narrow ? -2.12194440e-4 : 1.42860682030941723212e-6;
  const bool vanishes = x < -limit;
  x = vanishes ? -limit : x;
  x = x > limit ? limit : x;
  const A shifted = x * A(1.4426950408889634) + rounding, k = shifted - rounding;
  const A r = (x - k * log2_high) - k * log2_low;  // x = k log 2 + r, |r| ≤ ½ log 2
  A taylor = INVERSE_FACTORIALS[degree];
  for (int n = degree - 1; n >= 0; --n) taylor = taylor * r + A(INVERSE_FACTORIALS[n]);
  const Bits exponent = std::bit_cast<Bits>(shifted) << mantissa;  // k, in the mantissa's last bits
  const A power = taylor * std::bit_cast<A>(exponent + (Bits(bias) << mantissa));
  return vanishes ? 0 : power;
}

using Argument = std::pair<const char*, Tensor>;  // with its name

// Refuses arguments that are not of this dtype and these sizes, as which a kernel would take them.
inline void expect(ScalarType dtype, Sizes sizes, std::initializer_list<Argument> arguments) {
  const auto text = [](Sizes of) {
    std::string all;
    for (const int64_t size : of) all += (all.empty() ? "" : ", ") + std::to_string(size);
    return "[" + all + "]";
  };
  for (const auto& [name, t] : arguments)
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.sizes() == sizes, name, ": expected ", dtype, " ",
                    text(sizes), ", got ", t.scalar_type(), " ", text(t.sizes()));
}
inline void expect_like(const Tensor& like, std::initializer_list<Argument> arguments) {
  expect(like.scalar_type(), like.sizes(), arguments);
}

// What a dtype is computed in, as Wide.
inline ScalarType wide_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// f(T()) for the dtype of a tensor.
template <class F>
void for_dtype(const Tensor& like, F f) {
  switch (like.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(bf16());
    default: STD_TORCH_CHECK(false, "expected float32, float64 or bfloat16");
  }
}

// f(Z(), T()) for a tensor computed with and one that goes into a product: of one dtype, or fp32 and
// half precision.
template <class F>
void for_dtypes(const Tensor& z, const Tensor& product, F f) {
  for_dtype(z, [&]<class Z>(Z) {
    if (z.scalar_type() == product.scalar_type()) return f(Z(), Z());
    if constexpr (std::is_same_v<Z, float>) {
      if (product.scalar_type() == ScalarType::BFloat16) return f(Z(), bf16());
      if (product.scalar_type() == ScalarType::Half) return f(Z(), half());
    }
    STD_TORCH_CHECK(false, "expected tensors of one dtype, or of float32 and half precision");
  });
}

// f(begin, end) over shares of 0, …, items − 1, on PyTorch's threads; an item touches this many
// elements.
template <class F>
void parallel(int64_t items, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, items, grain, f);
}

// f(T(), begin, end) over shares of a tensor's elements.
template <class F>
void elementwise(const Tensor& like, const F& f) {
  for_dtype(like, [&]<class T>(T) {
    parallel(like.numel(), 1, [&](int64_t begin, int64_t end) { f(T(), begin, end); });
  });
}

}  // namespace gdprompt
