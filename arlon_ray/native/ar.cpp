// The AR's step on a CPU in float32: without it, a small model's step is mostly calls of small kernels.
//
// Legend as in trunk.py: R rows, A heads, D channels a head, C channels, H hidden channels, P positions.

#include "common.h"

struct Layer {
  const float *qkv, *proj, *gate_up, *down;               // panels; gate's and up's in turns
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

extern "C" {

// out [R, O] = x [R, C], normed if there is a norm, · panels (+ added)
void product(const float* x, int64_t R, int64_t C, const float* panels, int64_t O, const float* added,
             const float* norm, float eps, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> row;
    if (norm) {
      row.resize(R * C);
      for (int64_t r = 0; r < R; r++) normed(x + r * C, norm, C, eps, row.data() + r * C);
    }
    Part part(O / 8);
    product_of(norm ? row.data() : x, R, C, panels, part.first, part.end, out, added, O);
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
      for (int64_t r = 0; r < R; r++)
        for (int64_t p = hidden_part.first; p < hidden_part.end; p++) {
          Lanes gate = load(gate_up + r * 2 * H + p * 16), up = load(gate_up + r * 2 * H + p * 16 + 8);
          store(hidden + r * H + p * 8, gate / (exponential(-gate) + 1.0f) * up);
        }
#pragma omp barrier
      product_of(hidden, R, H, layer.down, out_part.first, out_part.end, x, x, C);
#pragma omp barrier
    }
  }
}

// As `decoder.draw`: a token of logits [Q, K] for each member, and whether they are finite numbers, if they were `fine`. Chances are sorted as the bits of positive numbers are.
void draw(const float* logits, int64_t Q, int64_t K, const float* temperature, const int64_t* top_k,
          const float* top_p, const float* numbers, uint8_t* fine, int64_t* tokens, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t q = 0; q < Q; q++) {
    static thread_local std::vector<float> chances;
    static thread_local std::vector<uint64_t> order;
    const int64_t padded = (K + 7) / 8 * 8, kept = top_k[q] > 0 ? std::min(top_k[q], K) : K;
    chances.assign(padded, -INFINITY), order.resize(K);
    float most = -INFINITY;
    for (int64_t k = 0; k < K; k++) {
      fine[q] &= std::isfinite(logits[q * K + k]);
      most = std::max(most, chances[k] = logits[q * K + k] / temperature[q]);
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
    for (int64_t n = 0; n < kept && (n == 0 || nucleus < top_p[q] * total); n++) nucleus += chances[code(n)];
    int64_t place = 0;
    while (place < kept - 1 && (passed += chances[code(place)]) <= numbers[q] * nucleus) place++;
    tokens[q] = code(place);
  }
}
}
