// The AR's step on a CPU in float32: without it, a small model's step is mostly calls of small kernels.
//
// Every sum is made in one order, whatever rows are beside it and however many threads share the work. Weights come as
// panels of 8 outputs [O/8, C, 8]: a panel's sums are the lanes of one register, and each weight is read once for up to
// 8 rows. Few rows wait for weights to be read: those that fit into two bytes, or one, come as such.
//
// Legend as in trunk.py: R rows, O outputs, A heads, D channels a head, C channels, H hidden channels, P positions;
// Q members, K codes, k tokens of a block.

#include "common.h"

#include <functional>

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

// How weights are kept: each kind gives 8 of them as floats, exactly
struct Floats {
  using Number = float;
  static inline Lanes of(const float* from) { return load(from); }
};

struct Halves {
  using Number = uint16_t;
#ifdef __F16C__
  static inline Lanes of(const uint16_t* from) { return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#else
  static inline Lanes of(const uint16_t*) { __builtin_unreachable(); }  // not offered: see `kinds`
#endif
};

struct Brains {  // bfloat16: the first half of a float
  using Number = uint16_t;
  static inline Lanes of(const uint16_t* from) {
#ifdef __AVX2__
    return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    Ints bits;
    for (int n = 0; n < 8; n++) bits[n] = int32_t(uint32_t(from[n]) << 16);
    return (Lanes)bits;
#endif
  }
};

struct Bytes {  // with a scale for each output
  using Number = int8_t;
  static inline Lanes of(const int8_t* from) {
#ifdef __AVX2__
    return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    Lanes x;
    for (int n = 0; n < 8; n++) x[n] = from[n];
    return x;
#endif
  }
};

struct Weights {
  const void* panels;
  const float* scale;  // [O], or none
  int64_t kind;        // 0 floats, 1 halves, 2 brains, 3 bytes
};

// So many bytes ahead, weights are asked for while rows are multiplied
constexpr int64_t AHEAD = 2048;

// 8 outputs of a row, of their sums: scaled and added to, where that is asked for
static inline void finish(Lanes y, const float* scale, const float* added, float* out) {
  if (scale) y *= load(scale);
  store(out, added ? y + load(added) : y);
}

// R rows [., C] with P panels
template <class Kind, int R, int P>
static inline void tile(const float* x, int64_t C, const typename Kind::Number* panels, const float* scale, float* out,
                        const float* added, int64_t O) {
  Lanes sums[R][P] = {};
  for (int64_t c = 0; c < C; c++)
    for (int p = 0; p < P; p++) {
      const auto* eight = panels + (p * C + c) * 8;
      Lanes weights = Kind::of(eight);
      if (R > 2) __builtin_prefetch((const char*)eight + AHEAD);
      for (int r = 0; r < R; r++) sums[r][p] = fma(weights, all(x[r * C + c]), sums[r][p]);
    }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      finish(sums[r][p], scale ? scale + p * 8 : scale, added ? added + r * O + p * 8 : added, out + r * O + p * 8);
}

#ifdef __AVX512F__
static inline Wide side_by_side(Lanes a, Lanes b) {
  __m512d first = _mm512_castpd256_pd512(_mm256_castps_pd(a));
  return _mm512_castpd_ps(_mm512_insertf64x4(first, _mm256_castps_pd(b), 1));
}

// The same sums, of two panels in a register
template <class Kind, int R, int P>
static inline void wide_tile(const float* x, int64_t C, const typename Kind::Number* panels, const float* scale,
                             float* out, const float* added, int64_t O) {
  Wide sums[R][P / 2] = {};
  for (int64_t c = 0; c < C; c++) {
    Wide weights[P / 2];
    for (int p = 0; p < P / 2; p++) {
      const auto *eight = panels + (2 * p * C + c) * 8, *others = eight + C * 8;
      weights[p] = side_by_side(Kind::of(eight), Kind::of(others));
    }
    for (int r = 0; r < R; r++) {
      Wide one = wide(x[r * C + c]);
      for (int p = 0; p < P / 2; p++) sums[r][p] = fma(weights[p], one, sums[r][p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      Lanes y;
      memcpy(&y, (const char*)&sums[r][p / 2] + p % 2 * sizeof y, sizeof y);
      finish(y, scale ? scale + p * 8 : scale, added ? added + r * O + p * 8 : added, out + r * O + p * 8);
    }
}
#endif

// Sums at a time: enough to hide how long one takes, and what is read of a row or a panel serves several of them; they
// and what they need fit the registers.
#ifdef __AVX512VL__
constexpr int SUMS = 16;
#else
constexpr int SUMS = 8;
#endif

constexpr int panels_for(int rows, int count = 8) { return rows * count <= SUMS ? count : panels_for(rows, count / 2); }

// R rows with `count` panels
template <class Kind, int R>
static void rows_of(const float* x, int64_t C, const typename Kind::Number* panels, const float* scale, int64_t count,
                    float* out, const float* added, int64_t O) {
  constexpr int P = panels_for(R);
  int64_t p = 0;
  auto some = [&](auto tile, int panels_of_one) {
    for (; p + panels_of_one <= count; p += panels_of_one)
      tile(x, C, panels + p * C * 8, scale ? scale + p * 8 : scale, out + p * 8, added ? added + p * 8 : added, O);
  };
#ifdef __AVX512F__
  // fewer rows wait for weights
  if constexpr (R >= 3) some(wide_tile<Kind, R, 2 * P>, 2 * P);
#endif
  some(tile<Kind, R, P>, P);
  some(tile<Kind, R, 1>, 1);
}

// panels [first, end) of out [R, O] = x [R, C] · weights (+ added [R, O])
template <class Kind>
static void product_of(const float* x, int64_t R, int64_t C, const Weights& weights, int64_t first, int64_t end,
                       float* out, const float* added, int64_t O) {
  static constexpr decltype(&rows_of<Kind, 1>) ROWS[] = {
      rows_of<Kind, 1>, rows_of<Kind, 2>, rows_of<Kind, 3>, rows_of<Kind, 4>,
      rows_of<Kind, 5>, rows_of<Kind, 6>, rows_of<Kind, 7>, rows_of<Kind, 8>};
  const auto* panels = (const typename Kind::Number*)weights.panels;
  int64_t blocks = (R + 7) / 8;
  for (int64_t p = first; p < end; p += 8)
    for (int64_t b = 0; b < blocks; b++) {
      int64_t r = R * b / blocks, until = R * (b + 1) / blocks, at = r * O + p * 8;
      ROWS[until - r - 1](x + r * C, C, panels + p * C * 8, weights.scale ? weights.scale + p * 8 : nullptr,
                          std::min<int64_t>(8, end - p), out + at, added ? added + at : added, O);
    }
}

static void product_of(const float* x, int64_t R, int64_t C, const Weights& weights, int64_t first, int64_t end,
                       float* out, const float* added, int64_t O) {
  static constexpr decltype(&product_of<Floats>) KINDS[] = {product_of<Floats>, product_of<Halves>,
                                                            product_of<Brains>, product_of<Bytes>};
  KINDS[weights.kind](x, R, C, weights, first, end, out, added, O);
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

// hidden [R, H] = silu(gate) · up, of both in turns
static void gated(const float* gate_up, int64_t R, int64_t H, Part part, float* hidden) {
  for (int64_t r = 0; r < R; r++)
    for (int64_t p = part.first; p < part.end; p++) {
      Lanes gate = load(gate_up + r * 2 * H + p * 16), up = load(gate_up + r * 2 * H + p * 16 + 8);
      store(hidden + r * H + p * 8, gate / (exponential(-gate) + 1.0f) * up);
    }
}

struct Layer {
  Weights qkv, proj, gate_up, down;                       // gate's and up's panels in turns
  const float *before_attention, *before_mlp, *of_heads;  // norms: [C], [C], [2, D]
  float *keys, *values;                                   // [R, A, P, D]
};

struct Trunk {
  const Layer* layers;
  int64_t count, A, D, H, P;
  float eps, eps_of_heads;
  const float* turns;      // [R, P, 2, D/2] complex
  const int64_t* filled;   // [R]
  const uint8_t* visible;  // [R, P]
};

// 8 · N channels of Σ chance · value over positions
template <int N>
static inline void mixed(const float* values, int64_t D, const float* chances, int64_t count, float total, float* out) {
  Lanes even[N] = {}, odd[N] = {};
  int64_t p = 0;
  for (; p + 2 <= count; p += 2)
    for (int n = 0; n < N; n++) {
      even[n] = fma(load(values + p * D + n * 8), all(chances[p]), even[n]);
      odd[n] = fma(load(values + (p + 1) * D + n * 8), all(chances[p + 1]), odd[n]);
    }
  if (p < count)
    for (int n = 0; n < N; n++) even[n] = fma(load(values + p * D + n * 8), all(chances[p]), even[n]);
  for (int n = 0; n < N; n++) store(out + n * 8, (even[n] + odd[n]) / total);
}

static void attend(const Trunk& t, const Layer& layer, int64_t r, int64_t a, const float* qkv, float* out,
                   std::vector<float>& memory) {
  const int64_t D = t.D, C = t.A * D, filled = t.filled[r], count = filled + 1, padded = (count + 7) / 8 * 8;
  memory.resize(padded + 2 * D);
  float *chances = memory.data(), *q = chances + padded, *turned = q + D;
  float* keys = layer.keys + (r * t.A + a) * t.P * D;
  float* values = layer.values + (r * t.A + a) * t.P * D;
  for (int which = 0; which < 2; which++) {  // query, key
    const float* turn = t.turns + ((r * t.P + filled) * 2 + which) * D;
    normed(qkv + r * 3 * C + which * C + a * D, layer.of_heads + which * D, D, t.eps_of_heads, turned);
    float* to = which ? keys + filled * D : q;
    for (int64_t i = 0; i < D; i += 2) {
      to[i] = turned[i] * turn[i] - turned[i + 1] * turn[i + 1];
      to[i + 1] = turned[i] * turn[i + 1] + turned[i + 1] * turn[i];
    }
  }
  memcpy(values + filled * D, qkv + r * 3 * C + 2 * C + a * D, D * sizeof(float));
  const float scale = 1.0f / std::sqrt(float(D));
  float most = -INFINITY;
  for (int64_t p = 0; p < padded; p += 8) {
    Lanes products[8] = {};
    const float* eight[8];
    for (int n = 0; n < 8; n++) eight[n] = keys + std::min(p + n, filled) * D;
    for (int64_t i = 0; i < D; i += 8)
      for (int n = 0; n < 8; n++) products[n] = fma(load(q + i), load(eight[n] + i), products[n]);
    Lanes scores = sums(products) * scale;
    for (int n = 0; n < 8; n++) {
      bool seen = p + n < count && t.visible[r * t.P + p + n];
      chances[p + n] = seen ? scores[n] : -INFINITY;
      most = std::max(most, chances[p + n]);
    }
  }
  Lanes summed = {};
  for (int64_t p = 0; p < padded; p += 8) {
    Lanes e = exponential(load(chances + p) - most);
    store(chances + p, e);
    summed += e;
  }
  const float total = sum(summed);
  out += r * C + a * D;
  int64_t i = 0;
  for (; i + 32 <= D; i += 32) mixed<4>(values + i, D, chances, count, total, out + i);
  for (; i + 16 <= D; i += 16) mixed<2>(values + i, D, chances, count, total, out + i);
  for (; i < D; i += 8) mixed<1>(values + i, D, chances, count, total, out + i);
}

struct Head {
  Weights logits, gate_up, down;  // gate's and up's panels in turns; none of the latter where a block is one token
  const Weights* before;          // [k - 1]: of each earlier token
  const float *before_logits, *before_mlp, *place, *codes;  // norms [C], [C]; [k, C], [K, C]
  int64_t C, H, K, k;
  float eps, eps_of_mlp;
  const int64_t *owners, *first, *away;  // whose each row is [R]; each member's row with its text, and without [Q]
  const float *scale, *temperature;      // [Q]
  const int64_t* top_k;
  const float* top_p;
  uint8_t* fine;  // turns false where logits are not finite [Q]
};

// As `decoder.draw`: a token of logits [K], and whether they are finite numbers. Chances are sorted as the bits of
// positive numbers are.
static int64_t drawn_of(const float* logits, int64_t K, float temperature, int64_t top_k, float top_p, float number,
                        uint8_t& fine) {
  static thread_local std::vector<float> chances;
  static thread_local std::vector<uint64_t> order;
  const int64_t padded = (K + 7) / 8 * 8, kept = top_k > 0 ? std::min(top_k, K) : K;
  chances.assign(padded, -INFINITY), order.resize(K);
  float most = -INFINITY;
  for (int64_t k = 0; k < K; k++) {
    fine &= std::isfinite(logits[k]);
    most = std::max(most, chances[k] = logits[k] / temperature);
  }
  for (int64_t k = 0; k < padded; k += 8) store(&chances[k], exponential(load(&chances[k]) - most));
  for (int64_t k = 0; k < K; k++) {
    uint32_t bits;
    memcpy(&bits, &chances[k], sizeof bits);
    order[k] = uint64_t(bits) << 32 | uint32_t(K - 1 - k);
  }
  std::sort(order.begin(), order.end(), std::greater<uint64_t>());
  auto code = [&](int64_t place) { return K - 1 - int64_t(order[place] & 0xffffffff); };
  double total = 0, nucleus = 0, passed = 0;
  for (int64_t n = 0; n < kept; n++) total += chances[code(n)];
  for (int64_t n = 0; n < kept && (n == 0 || nucleus < top_p * total); n++) nucleus += chances[code(n)];
  int64_t place = 0;
  while (place < kept - 1 && (passed += chances[code(place)]) <= number * nucleus) place++;
  return code(place);
}

extern "C" {

// which kinds of weights, as bits, are worth it where they say the same: those that one instruction widens
int kinds() {
  int found = 1;
#ifdef __F16C__
  found |= 2;
#endif
#if defined __AVX2__ || defined __aarch64__
  found |= 4;
#endif
  return found;
}

// out [R, O] = x [R, C], normed if there is a norm, · weights (+ added)
void product(const float* x, int64_t R, int64_t C, const Weights* weights, int64_t O, const float* added,
             const float* norm, float eps, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> row;
    if (norm) {
      row.resize(R * C);
      for (int64_t r = 0; r < R; r++) normed(x + r * C, norm, C, eps, row.data() + r * C);
    }
    Part part(O / 8);
    product_of(norm ? row.data() : x, R, C, *weights, part.first, part.end, out, added, O);
  }
}

// x [R, C], in place
void trunk(const Trunk* trunk, float* x, int64_t R, int threads) {
  const Trunk& t = *trunk;
  const int64_t C = t.A * t.D, H = t.H;
  static thread_local std::vector<float> memory;
  memory.resize(R * (3 * C + C + 2 * H + H));
  float *qkv = memory.data(), *attended = qkv + R * 3 * C, *gate_up = attended + R * C, *hidden = gate_up + R * 2 * H;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> row, chances;
    row.resize(R * C);
    Part qkv_part(3 * C / 8), heads(R * t.A), out_part(C / 8), hidden_part(H / 8);
    for (int64_t l = 0; l < t.count; l++) {
      const Layer& layer = t.layers[l];
      for (int64_t r = 0; r < R; r++) normed(x + r * C, layer.before_attention, C, t.eps, row.data() + r * C);
      product_of(row.data(), R, C, layer.qkv, qkv_part.first, qkv_part.end, qkv, nullptr, 3 * C);
#pragma omp barrier
      for (int64_t n = heads.first; n < heads.end; n++) attend(t, layer, n / t.A, n % t.A, qkv, attended, chances);
#pragma omp barrier
      product_of(attended, R, C, layer.proj, out_part.first, out_part.end, x, x, C);
#pragma omp barrier
      for (int64_t r = 0; r < R; r++) normed(x + r * C, layer.before_mlp, C, t.eps, row.data() + r * C);
      product_of(row.data(), R, C, layer.gate_up, 2 * hidden_part.first, 2 * hidden_part.end, gate_up, nullptr, 2 * H);
      gated(gate_up, R, H, hidden_part, hidden);
#pragma omp barrier
      product_of(hidden, R, H, layer.down, out_part.first, out_part.end, x, x, C);
#pragma omp barrier
    }
  }
}

// The next block of Q members, token by token, of the trunk's output x [R, C], which is used up. numbers, inner and
// drawn [Q, k]: random numbers, whether a token lies within the grid, and the tokens.
void block(const Head* head, float* x, int64_t R, int64_t Q, const float* numbers, const uint8_t* inner, int64_t* drawn,
           int threads) {
  const Head& h = *head;
  const int64_t C = h.C, H = h.H, K = h.K, padded = (K + 7) / 8 * 8;
  static thread_local std::vector<float> memory;
  memory.resize(R * (2 * H + H + C + padded));
  float *gate_up = memory.data(), *hidden = gate_up + R * 2 * H, *feature = hidden + R * H, *logits = feature + R * C;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> row, other, guided;
    row.resize(R * C), other.resize(R * C), guided.resize(padded);
    Part hidden_part(H / 8), out_part(C / 8), codes_part(padded / 8), members(Q);
    for (int64_t n = 0; n < h.k; n++) {
      const float* found = x;
      if (h.gate_up.panels) {
        for (int64_t r = 0; r < R; r++) {
          for (int64_t c = 0; c < C; c++) other[r * C + c] = x[r * C + c] + h.place[n * C + c];
          normed(other.data() + r * C, h.before_mlp, C, h.eps_of_mlp, row.data() + r * C);
        }
        product_of(row.data(), R, C, h.gate_up, 2 * hidden_part.first, 2 * hidden_part.end, gate_up, nullptr, 2 * H);
        gated(gate_up, R, H, hidden_part, hidden);
#pragma omp barrier
        product_of(hidden, R, H, h.down, out_part.first, out_part.end, feature, other.data(), C);
        found = feature;
#pragma omp barrier
      }
      for (int64_t r = 0; r < R; r++) normed(found + r * C, h.before_logits, C, h.eps, row.data() + r * C);
      product_of(row.data(), R, C, h.logits, codes_part.first, codes_part.end, logits, nullptr, padded);
#pragma omp barrier
      for (int64_t q = members.first; q < members.end; q++) {
        const float *with = logits + h.first[q] * padded, *away = logits + h.away[q] * padded;
        for (int64_t c = 0; c < K; c++) guided[c] = with == away ? away[c] : away[c] + h.scale[q] * (with[c] - away[c]);
        int64_t token = drawn_of(guided.data(), K, h.temperature[q], h.top_k[q], h.top_p[q], numbers[q * h.k + n],
                                 h.fine[q]);
        drawn[q * h.k + n] = inner[q * h.k + n] ? token : K;
      }
#pragma omp barrier
      if (n + 1 == h.k) break;
      for (int64_t r = 0; r < R; r++)
        memcpy(row.data() + r * C, h.codes + std::min(drawn[h.owners[r] * h.k + n], K - 1) * C, C * sizeof(float));
      product_of(row.data(), R, C, h.before[n], out_part.first, out_part.end, x, x, C);
#pragma omp barrier
    }
  }
}
}
