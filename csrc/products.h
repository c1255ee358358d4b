// Matrices in whole aligned vectors, and their product.
#pragma once

#include <memory>
#include <new>

#include "common.h"

namespace gdprompt {
namespace {

constexpr int64_t ROWS = 6;      // of a product, whose sums fill the registers of AVX2
constexpr std::align_val_t ALIGNED{64};

template <class A>
constexpr int64_t WIDTH = 64 / sizeof(A);
template <class A>
int64_t padded(int64_t size) {
  return (size + WIDTH<A> - 1) / WIDTH<A> * WIDTH<A>;
}

// Rows padded with zeros to whole aligned vectors.
template <class A>
struct Matrix {
  struct Free {
    void operator()(A* data) const { ::operator delete[](data, ALIGNED); }
  };
  int64_t rows, stride;
  std::unique_ptr<A[], Free> data;

  Matrix(int64_t rows, int64_t columns)
      : rows(rows),
        stride(padded<A>(columns)),
        data(new (ALIGNED) A[std::max<int64_t>(1, rows * stride)]()) {}
  A* at(int64_t row, int64_t column = 0) const { return &data[row * stride + column]; }
  void clear() const { std::fill_n(data.get(), rows * stride, A(0)); }
};

// c[R, WIDTH] = scale ([c +] a b), of which a has any strides
template <int R, class A>
INLINE void tile(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_row, A* c,
                 int64_t c_row, int64_t depth, A scale, bool add) {
  typedef A Vector __attribute__((vector_size(64), may_alias));
  Vector sum[R];
  for (int r = 0; r < R; ++r) sum[r] = add ? *(const Vector*)(c + r * c_row) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector bk = *(const Vector*)(b + k * b_row);
    for (int r = 0; r < R; ++r) sum[r] += a[r * a_row + k * a_column] * bk;
  }
  for (int r = 0; r < R; ++r) *(Vector*)(c + r * c_row) = scale * sum[r];
}

// c[rows, columns] = scale ([c +] a[rows, depth] b[depth, columns]); columns are whole vectors
template <class A>
VECTORISED void product(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_row,
                        A* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth,
                        A scale, bool add) {
  for (int64_t j = 0; j < columns; j += WIDTH<A>) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      tile<ROWS>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, depth,
                 scale, add);
    for (; i < rows; ++i)
      tile<1>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, depth, scale,
              add);
  }
}

}  // namespace
}  // namespace gdprompt
