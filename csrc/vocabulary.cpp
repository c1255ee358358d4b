// The passes between two matrix products over a tile of logits z [G, N, v], its columns first, …,
// first + v − 1 of the vocabulary. Rows are contiguous and evenly spaced; statistics of a row are in
// z's wide dtype; a tile that goes into a product is contiguous,
// and may be of half precision where z is fp32.
#include "common.h"

namespace gdprompt {
namespace {

// Returns max z, given the greatest so far.
template <class Z>
INLINE Wide<Z> greatest(const Z* z, int64_t v, Wide<Z> top) {
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < v; ++i) top = top < wide(z[i]) ? wide(z[i]) : top;
  return top;
}

// e = e^(z − top), summed
template <class Z, class T>
INLINE Wide<Z> exponentials(const Z* z, T* e, int64_t v, Wide<Z> top) {
  Wide<Z> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < v; ++i) {
    const Wide<Z> power = exponential(wide(z[i]) - top);
    store(e + i, power);
    sum += power;
  }
  return sum;
}

// A row of an online softmax: its statistics with these columns, and what older sums shrink by.
template <class Z, class T>
VECTORISED void online_row(const Z* z, T* e, int64_t v, Wide<Z> top_before, Wide<Z> total_before,
                           Wide<Z>* top, Wide<Z>* total, Wide<Z>* shrink) {
  *top = greatest(z, v, top_before);
  *shrink = std::exp(top_before - *top);
  *total = exponentials(z, e, v, *top) + total_before * *shrink;
}

// Σ e^(teacher z − top) ∘ (teacher z − z), where the teacher's logit is not −∞
template <class Z>
VECTORISED Wide<Z> gap_row(const Z* z, const Z* teacher_z, int64_t v, Wide<Z> top) {
  Wide<Z> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < v; ++i) {
    const Wide<Z> t = exponential(wide(teacher_z[i]) - top);
    const Wide<Z> share = t * (wide(teacher_z[i]) - wide(z[i]));
    sum += t == 0 ? 0 : share;
  }
  return sum;
}

// sum = shrink · sum + share
template <class A, class T>
VECTORISED void accumulate_row(A* sum, const T* share, int64_t size, A shrink) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) sum[i] = sum[i] * shrink + wide(share[i]);
}

// p = e^(z − lse)
template <class Z, class T>
VECTORISED void softmax_row(const Z* z, T* p, int64_t v, Wide<Z> lse) {
#pragma omp simd
  for (int64_t i = 0; i < v; ++i) store(p + i, exponential(wide(z[i]) - lse));
}

// f = e^(z − lse) − e^(teacher z − teacher lse)
template <class Z, class T>
VECTORISED void difference_row(const Z* z, const Z* teacher_z, T* f, int64_t v, Wide<Z> lse,
                               Wide<Z> teacher_lse) {
#pragma omp simd
  for (int64_t i = 0; i < v; ++i)
    store(f + i, exponential(wide(z[i]) - lse) - exponential(wide(teacher_z[i]) - teacher_lse));
}

// z̄ = b ∘ (b̄ − center + weight)
template <class Z, class T>
VECTORISED void cotangent_row(const Z* b_bar, const T* b, T* z_bar, int64_t v, Wide<Z> shift) {
#pragma omp simd
  for (int64_t i = 0; i < v; ++i) store(z_bar + i, wide(b[i]) * (wide(b_bar[i]) + shift));
}

// Row g N + n of a tile [G, N, v] whose rows are evenly spaced.
template <class T>
const T* row(const Tensor& t, int64_t index) {
  return in<T>(t) + index * t.stride(1);
}

// f(row) for the rows of a tile, a share to each thread.
template <class F>
void for_rows(const Tensor& tile, const F& f) {
  parallel(tile.size(0) * tile.size(1), tile.size(2), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) f(index);
  });
}

void online_softmax(Tensor z, Tensor ids, int64_t first, Tensor top_before, Tensor total_before,
                    Tensor picked_before, Tensor e, Tensor top, Tensor total, Tensor picked,
                    Tensor shrink) {
  const int64_t G = z.size(0), N = z.size(1);
  expect(e.scalar_type(), z.sizes(), {{"e", e}});
  expect(ScalarType::Long, {G, N}, {{"ids", ids}});
  expect(wide_dtype(z), {G, N},
         {{"top", top_before}, {"total", total_before}, {"picked", picked_before}});
  expect(wide_dtype(z), {G, N},
         {{"top", top}, {"total", total}, {"picked", picked}, {"shrink", shrink}});
  for_dtypes(z, e, [&]<class Z, class T>(Z, T) {
    using A = Wide<Z>;
    const int64_t v = z.size(2);
    for_rows(z, [&](int64_t i) {
      online_row(row<Z>(z, i), out<T>(e) + i * v, v, in<A>(top_before)[i], in<A>(total_before)[i],
                 out<A>(top) + i, out<A>(total) + i, out<A>(shrink) + i);
      const int64_t column = in<int64_t>(ids)[i] - first;
      const A here = column >= 0 && column < v ? wide(row<Z>(z, i)[column]) : A(0);
      out<A>(picked)[i] = in<A>(picked_before)[i] + here;
    });
  });
}
CPU_OP(online_softmax,
       "Tensor z, Tensor ids, int first, Tensor top_before, Tensor total_before, "
       "Tensor picked_before, Tensor(a!) e, Tensor(b!) top, Tensor(c!) total, Tensor(d!) picked, "
       "Tensor(e!) shrink")

void online_kl(Tensor z, Tensor teacher_z, Tensor top_before, Tensor total_before,
               Tensor gap_before, Tensor e, Tensor top, Tensor total, Tensor gap, Tensor shrink) {
  const int64_t G = z.size(0), N = z.size(1), v = z.size(2);
  expect_like(z, {{"teacher_z", teacher_z}});
  expect(e.scalar_type(), {G, 2 * N, v}, {{"e", e}});
  expect(wide_dtype(z), {G, 2 * N}, {{"top", top_before}, {"total", total_before}});
  expect(wide_dtype(z), {G, 2 * N}, {{"top", top}, {"total", total}, {"shrink", shrink}});
  expect(wide_dtype(z), {G, N}, {{"gap", gap_before}, {"gap", gap}});
  for_dtypes(z, e, [&]<class Z, class T>(Z, T) {
    using A = Wide<Z>;
    for_rows(z, [&](int64_t i) {
      const int64_t student = i + i / N * N, teacher = student + N;  // rows of [G, 2 N]
      const auto online = [&](const Tensor& logits, int64_t to) {
        online_row(row<Z>(logits, i), out<T>(e) + to * v, v, in<A>(top_before)[to],
                   in<A>(total_before)[to], out<A>(top) + to, out<A>(total) + to,
                   out<A>(shrink) + to);
      };
      online(z, student);
      online(teacher_z, teacher);
      const A share = gap_row(row<Z>(z, i), row<Z>(teacher_z, i), v, out<A>(top)[teacher]);
      out<A>(gap)[i] = share + in<A>(gap_before)[i] * out<A>(shrink)[teacher];
    });
  });
}
CPU_OP(online_kl,
       "Tensor z, Tensor teacher_z, Tensor top_before, Tensor total_before, Tensor gap_before, "
       "Tensor(a!) e, Tensor(b!) top, Tensor(c!) total, Tensor(d!) gap, Tensor(e!) shrink")

void accumulate(Tensor sum, Tensor share, Tensor shrink) {
  expect(wide_dtype(sum), share.sizes(), {{"sum", sum}});
  expect(wide_dtype(sum), {sum.size(0), sum.size(1)}, {{"shrink", shrink}});
  for_dtypes(sum, share, [&]<class A, class T>(A, T) {
    const int64_t size = sum.size(2);
    for_rows(sum, [&](int64_t i) {
      accumulate_row<Wide<A>>(out<Wide<A>>(sum) + i * size, row<T>(share, i), size,
                              in<Wide<A>>(shrink)[i]);
    });
  });
}
CPU_OP(accumulate, "Tensor(a!) sum, Tensor share, Tensor shrink")

void softmax_minus_one_hot(Tensor z, Tensor lse, Tensor ids, int64_t first, Tensor p) {
  expect(p.scalar_type(), z.sizes(), {{"p", p}});
  expect(wide_dtype(z), {z.size(0), z.size(1)}, {{"lse", lse}});
  expect(ScalarType::Long, {z.size(0), z.size(1)}, {{"ids", ids}});
  for_dtypes(z, p, [&]<class Z, class T>(Z, T) {
    using A = Wide<Z>;
    const int64_t v = z.size(2);
    for_rows(z, [&](int64_t i) {
      const A lse_i = in<A>(lse)[i];
      softmax_row(row<Z>(z, i), out<T>(p) + i * v, v, lse_i);
      const int64_t column = in<int64_t>(ids)[i] - first;
      if (column >= 0 && column < v)
        store(out<T>(p) + i * v + column, std::exp(wide(row<Z>(z, i)[column]) - lse_i) - 1);
    });
  });
}
CPU_OP(softmax_minus_one_hot, "Tensor z, Tensor lse, Tensor ids, int first, Tensor(a!) p")

void softmax_difference(Tensor z, Tensor lse, Tensor teacher_z, Tensor teacher_lse, Tensor f) {
  expect_like(z, {{"teacher_z", teacher_z}});
  expect(f.scalar_type(), z.sizes(), {{"f", f}});
  expect(wide_dtype(z), {z.size(0), z.size(1)}, {{"lse", lse}, {"teacher_lse", teacher_lse}});
  for_dtypes(z, f, [&]<class Z, class T>(Z, T) {
    using A = Wide<Z>;
    const int64_t v = z.size(2);
    for_rows(z, [&](int64_t i) {
      difference_row(row<Z>(z, i), row<Z>(teacher_z, i), out<T>(f) + i * v, v, in<A>(lse)[i],
                     in<A>(teacher_lse)[i]);
    });
  });
}
CPU_OP(softmax_difference,
       "Tensor z, Tensor lse, Tensor teacher_z, Tensor teacher_lse, Tensor(a!) f")

// p ∘ (b̄ − center) + weight ∘ b with b = p − onehot(id)
void logit_cotangent(Tensor b_bar, Tensor center, Tensor weight, Tensor b, Tensor ids,
                     int64_t first, Tensor z_bar) {
  expect_like(b, {{"z_bar", z_bar}});
  expect(b.scalar_type(), b_bar.sizes(), {{"b", b}});
  expect(wide_dtype(b_bar), {b.size(0), b.size(1)}, {{"center", center}, {"weight", weight}});
  expect(ScalarType::Long, {b.size(0), b.size(1)}, {{"ids", ids}});
  for_dtypes(b_bar, b, [&]<class Z, class T>(Z, T) {
    using A = Wide<Z>;
    const int64_t v = b_bar.size(2);
    for_rows(b_bar, [&](int64_t i) {
      const A center_i = in<A>(center)[i], weight_i = in<A>(weight)[i];
      cotangent_row(row<Z>(b_bar, i), row<T>(b, i), out<T>(z_bar) + i * v, v, weight_i - center_i);
      const int64_t column = in<int64_t>(ids)[i] - first;
      if (column >= 0 && column < v) {
        const A b_id = wide(row<T>(b, i)[column]), bar = wide(row<Z>(b_bar, i)[column]) - center_i;
        store(out<T>(z_bar) + i * v + column, (b_id + 1) * bar + weight_i * b_id);
      }
    });
  });
}
CPU_OP(logit_cotangent,
       "Tensor b_bar, Tensor center, Tensor weight, Tensor b, Tensor ids, int first, "
       "Tensor(a!) z_bar")

}  // namespace
}  // namespace gdprompt
