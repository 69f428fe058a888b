// What the C++ of AR and DiT shares: registers of 8 lanes, whose sums are made in one order.

#pragma once

#include <omp.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// Registers of the processor's own width, for what is done number by number
#ifdef __AVX512F__
constexpr int WIDE = 16;
typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideInts __attribute__((vector_size(64)));
static inline Wide fma(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
static inline Wide wide(float x) { return _mm512_set1_ps(x); }
#else
constexpr int WIDE = LANES;
typedef Lanes Wide;
typedef Ints WideInts;
static inline Wide wide(float x) { return all(x); }
#endif

static inline float sum(Lanes x) {
  x += __builtin_shuffle(x, Ints{4, 5, 6, 7, 0, 1, 2, 3});
  x += __builtin_shuffle(x, Ints{2, 3, 0, 1, 6, 7, 4, 5});
  return x[0] + x[1];
}

static inline float dot(const float* a, const float* b, int64_t count) {
  Lanes total = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) total = fma(load(a + i), load(b + i), total);
  float rest = 0;
  for (; i < count; i++) rest += a[i] * b[i];
  return sum(total) + rest;
}
