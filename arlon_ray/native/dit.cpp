// What the DiT does between its products of matrices, on a CPU in float32 (see dit.py).
//
// Legend: A heads, D channels a head, C channels, N tokens of a sequence, L keys.

#include "common.h"

static inline Wide load_wide(const float* from) { Wide x; memcpy(&x, from, sizeof x); return x; }
static inline void store_wide(float* to, Wide x) { memcpy(to, &x, sizeof x); }

static inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

static inline float most_of(Wide wide) {
  Lanes parts[WIDE / LANES];
  memcpy(parts, &wide, sizeof wide);
  Lanes x = parts[0];
  for (const Lanes& part : parts) x = larger(x, part);
  x = larger(x, __builtin_shuffle(x, Ints{4, 5, 6, 7, 0, 1, 2, 3}));
  x = larger(x, __builtin_shuffle(x, Ints{2, 3, 0, 1, 6, 7, 4, 5}));
  return std::max(x[0], x[1]);
}

static inline float sum_of(Wide wide) {
  Lanes parts[WIDE / LANES], x = {};
  memcpy(parts, &wide, sizeof wide);
  for (const Lanes& part : parts) x += part;
  return sum(x);
}

// 2^n · 2^f = e^x, the latter by a polynomial; 2^-126 at least. Half the time of `exponential`, within 3e-6 of it; tokens
// of the AR are drawn by that one.
static inline Wide quick_exponential(Wide x) {
  const Wide per_bit = wide(1.44269504f), magic = wide(12582912.0f);  // 1.5 · 2^23: a sum with it ends with whole bits
  x = x > -87.0f ? x : wide(-87.0f), x = x < 88.0f ? x : wide(88.0f);
  Wide rounded = fma(x, per_bit, magic), f = fma(x, per_bit, magic - rounded), y = wide(1.54035304e-4f);
  for (float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f})
    y = fma(y, f, wide(factor));
  WideInts bits, power;
  memcpy(&bits, &y, sizeof bits), memcpy(&power, &rounded, sizeof power);
  bits += power << 23;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// x · σ(2u) with u = √(2/π) · (x + 0.044715 · x³): GELU with tanh
static inline Wide gelu(Wide x) {
  const float twice = 1.59576912f;
  Wide u = x * fma(x * x, wide(0.044715f * twice), wide(twice));
  return x / (quick_exponential(-u) + 1.0f);
}

// out [R, O] = x [R, C] · panels [O/WIDE, C, WIDE]
template <int R>
static void wide_rows(const float* x, int64_t C, const float* panels, float* out, int64_t O) {
  for (int64_t o = 0; o < O; o += WIDE, panels += C * WIDE) {
    Wide sums[R] = {};
    for (int64_t c = 0; c < C; c++) {
      Wide weights = load_wide(panels + c * WIDE);
      for (int r = 0; r < R; r++) sums[r] = fma(weights, wide(x[r * C + c]), sums[r]);
    }
    for (int r = 0; r < R; r++) store_wide(out + r * O + o, sums[r]);
  }
}

using WideRows = void (*)(const float*, int64_t, const float*, float*, int64_t);
static const WideRows WIDE_ROWS[] = {wide_rows<1>, wide_rows<2>, wide_rows<3>, wide_rows<4>,
                                     wide_rows<5>, wide_rows<6>, wide_rows<7>, wide_rows<8>};

static inline int64_t whole(int64_t count) { return (count + WIDE - 1) / WIDE * WIDE; }

// Keys and values of one head, as panels: [L/WIDE, D, WIDE] and [D/WIDE, L, WIDE], filled up with zeros
struct Head {
  std::vector<float> memory;
  float *keys, *values, *queries, *chances, *attended;
  int64_t L, padded, D, channels;

  Head(int64_t L, int64_t D) : L(L), padded(whole(L)), D(D), channels(whole(D)) {
    memory.assign(padded * (D + channels) + 8 * (D + padded + channels), 0.0f);
    keys = memory.data(), values = keys + padded * D, queries = values + padded * channels;
    chances = queries + 8 * D, attended = chances + 8 * padded;
  }

  void set(int64_t l, const float* key, const float* value) {
    float *of_key = keys + l / WIDE * D * WIDE + l % WIDE, *of_value = values + l * WIDE;
    for (int64_t d = 0; d < D; d++) of_key[d * WIDE] = key[d];
    for (int64_t d = 0; d < D; d += 8) store(of_value + d / WIDE * padded * WIDE + d % WIDE, load(value + d));
  }

  // `count` of `queries` [8, D] to rows of `out` that are `stride` apart
  void attend(int64_t count, float* out, int64_t stride) {
    WIDE_ROWS[count - 1](queries, D, keys, chances, padded);
    for (int64_t r = 0; r < count; r++) {
      float *row = chances + r * padded;
      for (int64_t l = L; l < padded; l++) row[l] = -INFINITY;
      Wide largest = load_wide(row), total = {};
      for (int64_t l = WIDE; l < padded; l += WIDE) {
        Wide scores = load_wide(row + l);
        largest = scores > largest ? scores : largest;
      }
      const float most = most_of(largest);
      for (int64_t l = 0; l < padded; l += WIDE) {
        Wide e = quick_exponential(load_wide(row + l) - most);
        store_wide(row + l, e);
        total += e;
      }
      const float share = 1.0f / sum_of(total);
      for (int64_t l = 0; l < padded; l += WIDE) store_wide(row + l, load_wide(row + l) * share);
    }
    WIDE_ROWS[count - 1](chances, padded, values, attended, channels);
    for (int64_t r = 0; r < count; r++) memcpy(out + r * stride, attended + r * channels, D * sizeof(float));
  }
};

// The tokens of sequences: token n of sequence (o, i) is o · outer + i + n · step
struct Sequences {
  int64_t outers, inners, outer, step, N;
};

struct HeadNorm {
  const float* weight;  // [D], or none
  float eps;
};

// A head of one token: normed (x / rms · weight), turned by cos and sin [D] if there are any, times a factor
static inline void prepared(const float* x, int64_t D, HeadNorm norm, const float* cos, const float* sin, float factor,
                            float* out) {
  float scale = norm.weight ? factor / std::sqrt(dot(x, x, D) / D + norm.eps) : factor;
  for (int64_t d = 0; d < D; d++) out[d] = x[d] * (norm.weight ? scale * norm.weight[d] : scale);
  if (cos)
    for (int64_t d = 0; d < D; d += 2) {
      float even = out[d], odd = out[d + 1];
      out[d] = even * cos[d] - odd * sin[d];
      out[d + 1] = odd * cos[d + 1] + even * sin[d + 1];
    }
}

extern "C" {

// x [count, C] normed to mean 0 and deviation 1, · (1 + scale) + shift; with a gate: x + gate · that. Each row of shift,
// scale and gate, which are `strides` apart, is that of the next `every` tokens.
void modulated(const float* x, int64_t count, int64_t C, float eps, int64_t every, const float* shift,
               int64_t shift_stride, const float* scale, int64_t scale_stride, const float* gate, int64_t gate_stride,
               float* out, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < count; n++) {
    const float *row = x + n * C, *b = shift + n / every * shift_stride, *s = scale + n / every * scale_stride;
    const float* g = gate ? gate + n / every * gate_stride : nullptr;
    Lanes total = {}, squares = {};
    for (int64_t c = 0; c < C; c += 8) total += load(row + c);
    const Lanes mean = all(sum(total) / C);
    for (int64_t c = 0; c < C; c += 8) {
      Lanes centred = load(row + c) - mean;
      squares = fma(centred, centred, squares);
    }
    const Lanes factor = all(1.0f / std::sqrt(sum(squares) / C + eps));
    for (int64_t c = 0; c < C; c += 8) {
      Lanes y = fma((load(row + c) - mean) * factor, load(s + c) + 1.0f, load(b + c));
      store(out + n * C + c, g ? fma(load(g + c), y, load(row + c)) : y);
    }
  }
}

// GELU with tanh, in place
void gelu_in_place(float* x, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < count / WIDE; n++) store_wide(x + n * WIDE, gelu(load_wide(x + n * WIDE)));
  float rest[WIDE] = {};
  const int64_t done = count / WIDE * WIDE, left = (count - done) * sizeof(float);
  memcpy(rest, x + done, left);
  store_wide(rest, gelu(load_wide(rest)));
  memcpy(x + done, rest, left);
}

// out [., C] of queries, keys and values [., 3, A, D], each sequence by itself
void self_attention(const float* qkv, const Sequences* sequences, int64_t A, int64_t D, const float* query_norm,
                    const float* key_norm, float eps, const float* cos, const float* sin, float* out, int threads) {
  const Sequences s = *sequences;
  const int64_t C = A * D;
#pragma omp parallel for num_threads(threads)
  for (int64_t number = 0; number < s.outers * s.inners * A; number++) {
    const int64_t a = number % A, sequence = number / A;
    const int64_t first = sequence / s.inners * s.outer + sequence % s.inners;
    Head head(s.N, D);
    std::vector<float> key(D);
    for (int64_t n = 0; n < s.N; n++) {
      const float* of_token = qkv + (first + n * s.step) * 3 * C + a * D;
      prepared(of_token + C, D, {key_norm, eps}, cos ? cos + n * D : cos, sin ? sin + n * D : sin, 1.0f, key.data());
      head.set(n, key.data(), of_token + 2 * C);
    }
    for (int64_t n = 0; n < s.N; n += 8) {
      const int64_t count = std::min<int64_t>(8, s.N - n);
      for (int64_t r = 0; r < count; r++)
        prepared(qkv + (first + (n + r) * s.step) * 3 * C + a * D, D, {query_norm, eps}, cos ? cos + (n + r) * D : cos,
                 sin ? sin + (n + r) * D : sin, 1.0f / std::sqrt(float(D)), head.queries + r * D);
      head.attend(count, out + (first + n * s.step) * C + a * D, s.step * C);
    }
  }
}

// out [B, N, C] of queries [B, N, C] to keys and values [B, A, L, D], of which each sample has so many
void cross_attention(const float* queries, int64_t B, int64_t N, int64_t A, int64_t D, const float* keys,
                     const float* values, int64_t L, const int64_t* lengths, float* out, int threads) {
  const int64_t C = A * D;
#pragma omp parallel for num_threads(threads)
  for (int64_t number = 0; number < B * A; number++) {
    const int64_t a = number % A, b = number / A;
    Head head(lengths[b], D);
    for (int64_t l = 0; l < lengths[b]; l++) head.set(l, keys + (number * L + l) * D, values + (number * L + l) * D);
    for (int64_t n = 0; n < N; n += 8) {
      const int64_t count = std::min<int64_t>(8, N - n);
      for (int64_t r = 0; r < count; r++)
        prepared(queries + (b * N + n + r) * C + a * D, D, {}, nullptr, nullptr, 1.0f / std::sqrt(float(D)),
                 head.queries + r * D);
      head.attend(count, out + (b * N + n) * C + a * D, C);
    }
  }
}
}
