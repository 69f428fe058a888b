// What the models' C++ shares: registers of 8 lanes, and products of few rows with panels of weights.
//
// Every sum is made in one order, whatever rows are beside it and however many threads share the work. Weights come as
// panels of 8 outputs [O/8, C, 8]: a panel's sums are the lanes of one register, and each weight is read once for up to
// 8 rows. Legend: R rows, C channels, O outputs.

#pragma once

#include <omp.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

constexpr int LANES = 8;
typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

static inline Lanes load(const float* from) { Lanes x; memcpy(&x, from, sizeof x); return x; }
static inline void store(float* to, Lanes x) { memcpy(to, &x, sizeof x); }

static inline Lanes all(float x) { return Lanes{x, x, x, x, x, x, x, x}; }

// a · b + c, rounded in one way everywhere: the compiler is told not to choose by itself (-ffp-contract=off)
static inline Lanes fma(Lanes a, Lanes b, Lanes c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

static inline float sum(Lanes x) {
  x += __builtin_shuffle(x, Ints{4, 5, 6, 7, 0, 1, 2, 3});
  x += __builtin_shuffle(x, Ints{2, 3, 0, 1, 6, 7, 4, 5});
  return x[0] + x[1];
}

// the sums of 8 times 8 lanes
static inline Lanes sums(const Lanes (&x)[8]) {
  Lanes pairs[4], fours[2];
  for (int n = 0; n < 4; n++)
    pairs[n] = __builtin_shuffle(x[2 * n], x[2 * n + 1], Ints{0, 8, 2, 10, 4, 12, 6, 14}) +
               __builtin_shuffle(x[2 * n], x[2 * n + 1], Ints{1, 9, 3, 11, 5, 13, 7, 15});
  for (int n = 0; n < 2; n++)
    fours[n] = __builtin_shuffle(pairs[2 * n], pairs[2 * n + 1], Ints{0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(pairs[2 * n], pairs[2 * n + 1], Ints{2, 3, 10, 11, 6, 7, 14, 15});
  return __builtin_shuffle(fours[0], fours[1], Ints{0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(fours[0], fours[1], Ints{4, 5, 6, 7, 12, 13, 14, 15});
}

static inline float dot(const float* a, const float* b, int64_t count) {
  Lanes total = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) total = fma(load(a + i), load(b + i), total);
  float rest = 0;
  for (; i < count; i++) rest += a[i] * b[i];
  return sum(total) + rest;
}

// e^x = 2^n · e^f with |f| ≤ ln 2 / 2, the latter by its Taylor series; 0 below 2^-126
static inline Lanes exponential(Lanes x) {
  Lanes bounded = x > 88.0f ? all(88.0f) : x;
  Lanes scaled = bounded * 1.44269504f;
  Ints n = __builtin_convertvector(scaled + (scaled > 0.0f ? all(0.5f) : all(-0.5f)), Ints);
  Lanes whole = __builtin_convertvector(n, Lanes), f = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
  Lanes y = all(1.0f / 5040);
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, f, all(factor));
  Lanes power;
  Ints bits = (n + 127) << 23;
  memcpy(&power, &bits, sizeof power);
  return bounded < -87.0f ? Lanes{} : y * power;
}

// So many numbers ahead, weights are asked for while rows are multiplied
constexpr int64_t AHEAD = 512;

// R rows [., C] with P panels
template <int R, int P>
static inline void tile(const float* x, int64_t C, const float* panels, float* out, const float* added, int64_t O) {
  Lanes sums[R][P] = {};
  for (int64_t c = 0; c < C; c++)
    for (int p = 0; p < P; p++) {
      Lanes weights = load(panels + (p * C + c) * 8);
      if (R > 2) __builtin_prefetch(panels + (p * C + c) * 8 + AHEAD);
      for (int r = 0; r < R; r++) sums[r][p] = fma(weights, all(x[r * C + c]), sums[r][p]);
    }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      Lanes y = sums[r][p];
      store(out + r * O + p * 8, added ? y + load(added + r * O + p * 8) : y);
    }
}

// R rows with `count` panels: 8 sums at a time hide how long one takes
template <int R>
static void rows_of(const float* x, int64_t C, const float* panels, int64_t count, float* out, const float* added,
                    int64_t O) {
  constexpr int P = R == 1 ? 8 : R == 2 ? 4 : R <= 4 ? 2 : 1;
  int64_t p = 0;
  for (; p + P <= count; p += P) tile<R, P>(x, C, panels + p * C * 8, out + p * 8, added ? added + p * 8 : added, O);
  for (; p < count; p++) tile<R, 1>(x, C, panels + p * C * 8, out + p * 8, added ? added + p * 8 : added, O);
}

using Rows = void (*)(const float*, int64_t, const float*, int64_t, float*, const float*, int64_t);
static const Rows ROWS[] = {rows_of<1>, rows_of<2>, rows_of<3>, rows_of<4>, rows_of<5>, rows_of<6>, rows_of<7>, rows_of<8>};

// panels [first, end) of out [R, O] = x [R, C] · panels (+ added [R, O])
static void product_of(const float* x, int64_t R, int64_t C, const float* panels, int64_t first, int64_t end,
                       float* out, const float* added, int64_t O) {
  int64_t blocks = (R + 7) / 8;
  for (int64_t p = first; p < end; p += 8)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t r = R * b / blocks, until = R * (b + 1) / blocks, at = r * O + p * 8;
      ROWS[until - r - 1](x + r * C, C, panels + p * C * 8, std::min<int64_t>(8, end - p), out + at,
                          added ? added + at : added, O);
    }
}

// this thread's part of `count` things
struct Part {
  int64_t first, end;
  explicit Part(int64_t count) {
    int64_t n = omp_get_thread_num(), threads = omp_get_num_threads();
    first = count * n / threads, end = count * (n + 1) / threads;
  }
};

// x · rsqrt(Σx² + eps) · weight
static void normed(const float* x, const float* weight, int64_t count, float eps, float* out) {
  float factor = 1.0f / std::sqrt(dot(x, x, count) + eps);
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}
