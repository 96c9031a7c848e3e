// SigLIP's encoder on a CPU in int8: all layers of the vision tower over the patches of one picture.
//
//   matrices   int8 times int8, a scale for each 128 of a row on both sides; sums int32 within a group, fp32 between
//   attention  int8 too: q and k with a scale a row, v with one for each channel of 128 keys, chances uint8 with one
//              for each query and 128 keys; softmax on the way through the keys (FlashAttention's)
//   the rest   norms, GELU and the residual stream are fp32
//
// What all patches share is taken out before rounding, W x = W (x - mu) + W mu, where mu is the mean of some rows of
// x and the second product is (almost) exact: it has the weights' rounding errors, `rest`, too. Any mu is right; this
// one leaves small numbers to round. Keys need no W mu at all (a softmax does not change when every score does) and
// values get theirs after attention, whose chances sum to one.
//
// Shapes: T patches, C width (padded to a multiple of 16), H heads, D head dim, F feed-forward width.

#include "common.h"

namespace {

typedef uint8_t b64 __attribute__((vector_size(64)));
typedef uint8_t b16 __attribute__((vector_size(16)));

constexpr int LANES = 48;   // rows of a matrix that are multiplied side by side
constexpr int GROUP = 128;  // columns that share a scale
constexpr int CHUNK = 128;  // patches that go through a matrix together
constexpr int KEYS = 128;   // patches in a block of keys and values
constexpr int QUERIES = 16; // that share a pass over the keys

inline int up(int n, int to) { return (n + to - 1) / to * to; }

inline b64 load_bytes(const void* p) {  // not by memcpy: gcc 12 would then keep arrays of them in memory
  typedef uint8_t anywhere __attribute__((vector_size(64), aligned(1), may_alias));
  return *(const anywhere*)p;
}
inline int32_t four(const void* p) { int32_t x; std::memcpy(&x, p, 4); return x; }
inline v16 floats(i16 n) { return __builtin_convertvector(n, v16); }

// --- sums of products of four bytes in each of sixteen lanes
//
// `signed_products`: w holds 128 + an integer, x four integers for all lanes. VNNI takes w as it is: what it adds is
// too large by 128 times the sum of x, which `start` makes up for. `products`: p (at most MOST) times integers.

#if defined(__AVX512VNNI__)
constexpr int TILE = 8, QUERY_TILE = 4;  // rows of activations, and queries, in a tile of registers
constexpr float MOST = 255;
inline i16 start(int32_t total) { return (i16)_mm512_set1_epi32(-128 * total); }
inline i16 signed_products(i16 sum, b64 w, int32_t x) {
  return (i16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
inline i16 products(i16 sum, int32_t p, b64 v) {
  return (i16)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(p), (__m512i)v);
}
#elif defined(__AVX2__)
constexpr int TILE = 2, QUERY_TILE = 1;
constexpr float MOST = 127;  // two products of at most 127 * 128 fit an int16
inline i16 start(int32_t) { return i16{}; }
inline i16 add_pairs(i16 sum, const __m256i unsigned_[2], const __m256i signed_[2]) {
  __m256i s[2];
  std::memcpy(s, &sum, sizeof s);
  for (int i = 0; i < 2; i++)
    s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_[i], signed_[i]), _mm256_set1_epi16(1)));
  std::memcpy(&sum, s, sizeof s);
  return sum;
}
inline i16 signed_products(i16 sum, b64 w, int32_t x) {  // |x| times w with the sign of x
  const __m256i wide = _mm256_set1_epi32(x), size = _mm256_abs_epi8(wide), sizes[2] = {size, size};
  __m256i v[2];
  std::memcpy(v, &w, sizeof v);
  for (__m256i& one : v) one = _mm256_sign_epi8(_mm256_xor_si256(one, _mm256_set1_epi8(-128)), wide);
  return add_pairs(sum, sizes, v);
}
inline i16 products(i16 sum, int32_t p, b64 v) {
  const __m256i wide = _mm256_set1_epi32(p), wides[2] = {wide, wide};
  __m256i halves[2];
  std::memcpy(halves, &v, sizeof halves);
  return add_pairs(sum, wides, halves);
}
#else
constexpr int TILE = 1, QUERY_TILE = 1;
constexpr float MOST = 255;
inline i16 start(int32_t) { return i16{}; }
inline i16 signed_products(i16 sum, b64 w, int32_t x) {
  int8_t bytes[4];
  std::memcpy(bytes, &x, 4);
  for (int i = 0; i < 64; i++) sum[i / 4] += (w[i] - 128) * bytes[i % 4];
  return sum;
}
inline i16 products(i16 sum, int32_t p, b64 v) {
  uint8_t bytes[4];
  std::memcpy(bytes, &p, 4);
  for (int i = 0; i < 64; i++) sum[i / 4] += bytes[i % 4] * (int8_t)v[i];
  return sum;
}
#endif

// --- int8 matrices

// q (128 + the integer), rest (what rounding lost, in 256ths of a step) [n / 48][k / 4][48][4];
// scale [n / 48][k / 128][48]; bias [n]. Padded with zeros to such n and k.
struct Matrix {
  const uint8_t* q;
  const int8_t* rest;
  const float *scale, *bias;
  int32_t n, k;
};

// A chunk of activations, quantised: row r is scale[r][g] * q[r][...] in each group g of columns.
struct Quantised {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> total;  // of the q of a group
  int k = 0, groups = 0;

  void shape(int columns) {
    k = columns;
    groups = k / GROUP;
    q.resize((size_t)CHUNK * k), scale.resize((size_t)CHUNK * groups), total.resize((size_t)CHUNK * groups);
  }

  // n floats (a multiple of 16) less those of `mean`.
  void row(int r, const float* x, const float* mean, int n) {
    for (int g = 0; g < groups; g++) {
      const int from = g * GROUP, count = std::clamp(n - from, 0, GROUP) / 16;
      v16 v[GROUP / 16] = {}, top{};
      for (int i = 0; i < count; i++) {
        v[i] = load(x + from + 16 * i) - load(mean + from + 16 * i);
        top = maximum(top, maximum(v[i], -v[i]));
      }
      const float most = largest(top), inverse = most > 0 ? 127.0f / most : 0.0f;
      i16 added{};
      for (int i = 0; i < GROUP / 16; i++) {
        v16 y = v[i] * inverse;
        i16 n = __builtin_convertvector(y + (y < 0.0f ? all(-0.5f) : all(0.5f)), i16);
        added += n;
        b16 bytes = __builtin_convertvector(n, b16);
        std::memcpy(q.data() + (size_t)r * k + from + 16 * i, &bytes, 16);
      }
      scale[(size_t)r * groups + g] = most / 127.0f;
      int32_t whole = 0;
      for (int i = 0; i < 16; i++) whole += added[i];
      total[(size_t)r * groups + g] = whole;
    }
  }
};

// out [TILE][48] += rows r.. of the activations times a block of the matrix, over group g.
inline void tile(const Matrix& w, int block, const Quantised& a, int r, int g, float (*out)[LANES]) {
  const uint8_t* p = w.q + ((size_t)block * w.k + (size_t)g * GROUP) * LANES;
  const int8_t* x = a.q.data() + (size_t)r * a.k + g * GROUP;
  i16 c[TILE][LANES / 16];
  for (int m = 0; m < TILE; m++)
    for (int b = 0; b < LANES / 16; b++) c[m][b] = start(a.total[(size_t)(r + m) * a.groups + g]);
  for (int j = 0; j < GROUP; j += 4) {
    b64 v[LANES / 16];
    for (int b = 0; b < LANES / 16; b++) v[b] = load_bytes(p + j * LANES + 64 * b);
    for (int m = 0; m < TILE; m++)
      for (int b = 0; b < LANES / 16; b++) c[m][b] = signed_products(c[m][b], v[b], four(x + (size_t)m * a.k + j));
  }
  const float* scale = w.scale + ((size_t)block * a.groups + g) * LANES;
  for (int m = 0; m < TILE; m++)
    for (int b = 0; b < LANES / 16; b++) {
      v16 s = load(scale + 16 * b) * a.scale[(size_t)(r + m) * a.groups + g];
      store(out[m] + 16 * b, load(out[m] + 16 * b) + floats(c[m][b]) * s);
    }
}

// Calls take(first column, [rows][48] results) for every block of the matrix.
template <class Take>
void multiply(const Matrix& w, const Quantised& a, int rows, Take take) {
  alignas(64) float out[CHUNK][LANES];
  for (int block = 0; block < w.n / LANES; block++) {
    std::memset(out, 0, sizeof out);
    for (int g = 0; g < a.groups; g++)
      for (int r = 0; r < rows; r += TILE) tile(w, block, a, r, g, out + r);
    take(block * LANES, out);
  }
}

// shared[i] = bias + W mean for the rows of some blocks: what `multiply` leaves out.
void shared_part(const Matrix& w, const float* mean, float* shared, Share blocks) {
  for (int block = blocks.first; block < blocks.last; block++) {
    float sums[LANES] = {};
    for (int g = 0; g < w.k / GROUP; g++) {
      v16 part[LANES / 4] = {};  // four bytes of four lanes
      for (int j = g * GROUP; j < (g + 1) * GROUP; j += 4) {
        const size_t at = ((size_t)block * w.k + j) * LANES;
        v16 x;
        for (int i = 0; i < 4; i++) std::memcpy((char*)&x + 16 * i, mean + j, 16);
        for (int b = 0; b < LANES / 4; b++) {
          typedef int8_t s16 __attribute__((vector_size(16)));
          b16 q;
          s16 rest;
          std::memcpy(&q, w.q + at + 16 * b, 16), std::memcpy(&rest, w.rest + at + 16 * b, 16);
          v16 whole = __builtin_convertvector(q, v16) - 128.0f + __builtin_convertvector(rest, v16) * (1 / 256.0f);
          part[b] += whole * x;
        }
      }
      for (int i = 0; i < LANES; i++) {
        const v16& p = part[i / 4];
        const int at = i % 4 * 4;
        sums[i] += (p[at] + p[at + 1] + p[at + 2] + p[at + 3]) * w.scale[((size_t)block * (w.k / GROUP) + g) * LANES + i];
      }
    }
    for (int i = 0; i < LANES; i++) shared[block * LANES + i] = w.bias[block * LANES + i] + sums[i];
  }
}

// --- norm

// y = (x - mean) / deviation * weight + bias over the first n; the rest of x, weight and bias up to `padded` is zero.
void layer_norm(const float* x, const float* weight, const float* bias, float* y, int n, int padded, float eps) {
  v16 added{}, squares{};
  for (int i = 0; i < padded; i += 16) added += load(x + i);
  const float mean = total_of(added) / n;
  for (int i = 0; i < padded; i += 16) {
    v16 v = load(x + i) - mean;
    squares += v * v;
  }
  const float scale = 1.0f / std::sqrt((total_of(squares) - (padded - n) * mean * mean) / n + eps);
  for (int i = 0; i < padded; i += 16) store(y + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
}

// --- attention

// 2^x for x <= 8, relative error 1e-4, 0 (or as good as) far below: 2^n * 2^r with |r| <= 1 / 2.
inline v16 power_of_two(v16 x) {
  x = maximum(x, all(-120.0f));
  const v16 shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are n
  const v16 r = x - (shifted - 12582912.0f);
  const v16 e = ((0.05592204f * r + 0.24264008f) * r + 0.69312102f) * r + 0.99992450f;
  return (v16)((i16)e + ((i16)shifted << 23));
}

// One head. Rows of q [T][D4] and k [T / 16][D4 / 4][16][4] (128 + the integer), D4 being D up to a multiple of 4;
// v [T / 4][W][4], W being D + 1 up to a multiple of 16: a column of ones behind the D, so that the chances' sum comes
// with the products. v_scale [T / 128][W]. away [T] (of all heads): -1e30 for what is no patch.
struct Head {
  std::vector<int8_t> q, v;
  std::vector<uint8_t> k;
  std::vector<float> q_scale, k_scale, v_scale;
  std::vector<int32_t> q_total;

  void shape(int patches, int D4, int W) {
    q.resize((size_t)patches * D4), k.resize((size_t)patches * D4), v.resize((size_t)patches * W);
    q_scale.resize(patches), k_scale.resize(patches), v_scale.resize((size_t)patches / KEYS * W);
    q_total.resize(patches);
  }
};

inline float scale_of(const float* x, int n, int stride = 1) {
  float most = 0;
  for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[(size_t)i * stride]));
  return std::max(most, 1e-20f) / 127.0f;
}
inline int rounded(float x) { return (int)(x + (x < 0 ? -0.5f : 0.5f)); }

// Blocks of patches [first, first + CHUNK) into a head; q, k, v: rows of fp32, `stride` apart.
void fill(Head& head, int first, const float* q, const float* k, const float* v, size_t stride, int D, int D4, int W,
          float factor) {
  for (int i = 0; i < CHUNK; i++) {
    const int t = first + i;
    const float *x = q + i * stride, step = scale_of(x, D), inverse = 1 / step;
    int8_t* to = head.q.data() + (size_t)t * D4;
    int32_t total = 0;
    std::memset(to, 0, D4);
    for (int d = 0; d < D; d++) total += to[d] = rounded(x[d] * inverse);
    head.q_total[t] = total;
    head.q_scale[t] = step * factor;
  }
  for (int i = 0; i < CHUNK; i++) {
    const int t = first + i;
    const float *x = k + i * stride, step = scale_of(x, D), inverse = 1 / step;
    uint8_t* to = head.k.data() + (size_t)(t / 16) * 16 * D4 + t % 16 * 4;
    for (int d = 0; d < D; d++) to[d / 4 * 64 + d % 4] = 128 + rounded(x[d] * inverse);
    head.k_scale[t] = step;
  }
  for (int block = 0; block < CHUNK; block += KEYS) {
    float* scales = head.v_scale.data() + (size_t)(first + block) / KEYS * W;
    std::vector<float> most(D), inverse(D);
    for (int i = block; i < block + KEYS; i++)
      for (int d = 0; d < D; d++) most[d] = std::max(most[d], std::fabs(v[i * stride + d]));
    for (int d = 0; d < D; d++) scales[d] = std::max(most[d], 1e-20f) / 127.0f, inverse[d] = 1 / scales[d];
    scales[D] = 1;
    for (int i = block; i < block + KEYS; i++) {
      int8_t* to = head.v.data() + (size_t)((first + i) / 4) * 4 * W + (first + i) % 4;
      for (int d = 0; d < D; d++) to[4 * d] = rounded(v[i * stride + d] * inverse[d]);
      to[4 * D] = 1;
    }
  }
}

// sums [QUERY_TILE][W] = sums * shrink + chances times B times 16 columns of a block of values.
template <int B>
void add_values(const uint8_t (*chance)[KEYS], const int8_t* v, const float* scale, int W, const float* shrink,
                const float* grow, float* sums) {
  i16 c[QUERY_TILE][B] = {};
  for (int j = 0; j < KEYS / 4; j++) {
    b64 column[B];
    for (int b = 0; b < B; b++) column[b] = load_bytes(v + (size_t)j * 4 * W + 64 * b);
    for (int m = 0; m < QUERY_TILE; m++)
      for (int b = 0; b < B; b++) c[m][b] = products(c[m][b], four(chance[m] + 4 * j), column[b]);
  }
  for (int m = 0; m < QUERY_TILE; m++)
    for (int b = 0; b < B; b++) {
      float* to = sums + (size_t)m * W + 16 * b;
      store(to, load(to) * shrink[m] + floats(c[m][b]) * (load(scale + 16 * b) * grow[m]));
    }
}

// out rows (`stride` apart) of `count` queries from `first` on.
void attend(const Head& head, const float* away, int patches, int first, int count, int D, int D4, int W, float* sums,
            float* out, size_t stride) {
  std::memset(sums, 0, sizeof(float) * QUERIES * W);
  const v16 q_scale = load(head.q_scale.data() + first);
  const int8_t* q = head.q.data() + (size_t)first * D4;
  v16 top = all(-1e30f);  // of the scores so far, as powers of two
  for (int block = 0; block < patches / KEYS; block++) {
    const uint8_t* k = head.k.data() + (size_t)block * KEYS * D4;
    const float *k_scale = head.k_scale.data() + block * KEYS, *add = away + block * KEYS;
    alignas(64) float score[QUERIES][KEYS];
    alignas(64) uint8_t chance[QUERIES][KEYS];
    for (int m0 = 0; m0 < QUERIES; m0 += QUERY_TILE)
      for (int j0 = 0; j0 < KEYS / 16; j0 += 4) {
        i16 c[QUERY_TILE][4];
        for (int m = 0; m < QUERY_TILE; m++)
          for (int j = 0; j < 4; j++) c[m][j] = start(head.q_total[first + m0 + m]);
        for (int d = 0; d < D4; d += 4) {
          b64 column[4];
          for (int j = 0; j < 4; j++) column[j] = load_bytes(k + (size_t)(j0 + j) * 16 * D4 + d * 16);
          for (int m = 0; m < QUERY_TILE; m++)
            for (int j = 0; j < 4; j++)
              c[m][j] = signed_products(c[m][j], column[j], four(q + (size_t)(m0 + m) * D4 + d));
        }
        for (int m = 0; m < QUERY_TILE; m++)
          for (int j = 0; j < 4; j++) {
            const int at = 16 * (j0 + j);
            store(score[m0 + m] + at, floats(c[m][j]) * load(k_scale + at) + load(add + at));
          }
      }
    v16 most;
    for (int m = 0; m < QUERIES; m++) {
      v16 high = load(score[m]);
      for (int j = 1; j < KEYS / 16; j++) high = maximum(high, load(score[m] + 16 * j));
      most[m] = largest(high);
    }
    most *= q_scale;
    const v16 base = std::log2(MOST) - most;
    for (int m = 0; m < QUERIES; m++)
      for (int j = 0; j < KEYS / 16; j++) {
        v16 e = power_of_two(load(score[m] + 16 * j) * q_scale[m] + base[m]);
        b16 bytes = __builtin_convertvector(__builtin_convertvector(e + 0.5f, i16), b16);
        std::memcpy(chance[m] + 16 * j, &bytes, 16);
      }
    const v16 higher = maximum(top, most);
    const v16 shrink = power_of_two(top - higher), grow = power_of_two(most - higher);
    top = higher;
    const int8_t* v = head.v.data() + (size_t)block * KEYS * W;
    const float* scale = head.v_scale.data() + (size_t)block * W;
    for (int m = 0; m < QUERIES; m += QUERY_TILE)
      for (int w = 0; w < W;) {
        float s[QUERIES], g[QUERIES];
        store(s, shrink), store(g, grow);
        const bool five = W - w >= 80;
        (five ? add_values<5> : add_values<1>)(chance + m, v + 4 * w, scale + w, W, s + m, g + m, sums + m * W + w);
        w += five ? 80 : 16;
      }
  }
  for (int m = 0; m < count; m++)
    for (int d = 0; d < D; d++) out[m * stride + d] = sums[m * W + d] / sums[m * W + D];
}

struct Layer {
  Matrix qkv, o, fc1, fc2;
  const float *norm1, *norm1_bias, *norm2, *norm2_bias;
};

struct Vision {
  const Layer* layers;
  int32_t num_layers, width, heads, hidden;
  float eps;
};

struct Scratch {
  std::vector<Head> heads;
  std::vector<float> mixed, hidden, away, mean, shared;
};

}  // namespace

extern "C" {

// float [rows, columns] -> a Matrix's q, rest and scale, for n and k as padded.
void seavlm_vision_pack(const float* w, int32_t rows, int32_t columns, int32_t n, int32_t k, uint8_t* q, int8_t* rest,
                        float* scale, int32_t threads) {
  team(threads).run([=](int id) {
    const Share mine = share(n, id, threads);
    for (int row = mine.first; row < mine.last; row++) {
      const int block = row / LANES, lane = row % LANES;
      for (int g = 0; g < k / GROUP; g++) {
        const int from = g * GROUP, count = row < rows ? std::clamp(columns - from, 0, GROUP) : 0;
        const float* x = w + (size_t)row * columns + from;
        const float step = scale_of(x, count);
        scale[((size_t)block * (k / GROUP) + g) * LANES + lane] = count ? step : 0;
        for (int j = 0; j < GROUP; j++) {
          const size_t at = ((size_t)block * k + (from + j) / 4 * 4) * LANES + lane * 4 + j % 4;
          const float exact = j < count ? x[j] / step : 0.0f;
          const int whole = rounded(exact);
          q[at] = 128 + whole;
          rest[at] = std::clamp(rounded((exact - whole) * 256), -128, 127);
        }
      }
    }
  });
}

// x float [T, C], C being the width up to a multiple of 16 with zeros: embedded patches in, the last layer's out.
void seavlm_vision_forward(const Vision* model, float* x, int32_t T, int32_t threads) {
  const int width = model->width, C = up(width, 16), F = up(model->hidden, LANES), H = model->heads, D = width / H;
  const int D4 = up(D, 4), W = up(D + 1, 16), patches = up(T, CHUNK), chunks = patches / CHUNK;
  const float factor = 1.44269504f / std::sqrt((float)D);  // scores as powers of two
  static Scratch scratch;                                  // one picture at a time
  Scratch& s = scratch;
  s.heads.resize(H);
  for (Head& head : s.heads) head.shape(patches, D4, W);
  s.mixed.assign((size_t)T * C, 0), s.hidden.resize((size_t)T * F), s.away.assign(patches, 0);
  std::fill(s.away.begin() + T, s.away.end(), -1e30f);
  const int widest = std::max(up(3 * width, LANES), up(std::max(C, F), GROUP));
  s.mean.resize(widest), s.shared.resize(widest);
  std::vector<std::atomic<int>> counters((size_t)5 * model->num_layers);

  Team& crew = team(threads);
  crew.run([&](int id) {
    Quantised act;
    std::vector<float> row(std::max(C, F)), sums((size_t)QUERIES * W), qkv((size_t)CHUNK * up(3 * width, LANES));
    auto wait = [&] { crew.between.wait(); };
    int phase = 0;
    auto each = [&](int count, auto work) {  // calls work(0 .. count - 1), each once, on whichever thread is free
      std::atomic<int>& next = counters[phase++];
      for (int i; (i = next.fetch_add(1)) < count;) work(i);
      wait();
    };
    // The mean of 64 rows into s.mean, and what it adds to every product into s.shared.
    auto prepare = [&](const Matrix& w, int n, auto read) {
      if (id == 0) {
        std::fill(s.mean.begin(), s.mean.end(), 0.0f);
        const int samples = std::min(T, 64);
        for (int i = 0; i < samples; i++) {
          const float* from = read((int)((int64_t)T * i / samples));
          for (int j = 0; j < n; j += 16) store(&s.mean[j], load(&s.mean[j]) + load(from + j) * (1.0f / samples));
        }
      }
      wait();
      shared_part(w, s.mean.data(), s.shared.data(), share(w.n / LANES, id, threads));
      wait();
    };
    auto quantise = [&](const Matrix& w, int n, int first, int rows, auto read) {
      act.shape(w.k);
      for (int r = 0; r < rows; r++) act.row(r, read(first + r), s.mean.data(), n);
    };
    auto rows_of = [&](int chunk) { return std::min(CHUNK, T - chunk * CHUNK); };
    auto add = [&](const Matrix& w, int first, int rows) {  // products onto the residual stream
      multiply(w, act, rows, [&](int column, const float(*found)[LANES]) {
        const int count = std::min(LANES, C - column);
        for (int r = 0; r < rows; r++)
          for (int i = 0; i < count; i += 16) {
            float* to = x + (size_t)(first + r) * C + column + i;
            store(to, load(to) + load(found[r] + i) + load(&s.shared[column + i]));
          }
      });
    };

    for (int l = 0; l < model->num_layers; l++) {
      const Layer& layer = model->layers[l];
      auto norm1 = [&](int t) {
        layer_norm(x + (size_t)t * C, layer.norm1, layer.norm1_bias, row.data(), width, C, model->eps);
        return row.data();
      };
      prepare(layer.qkv, C, norm1);
      each(chunks, [&](int chunk) {
        const int first = chunk * CHUNK, rows = rows_of(chunk);
        quantise(layer.qkv, C, first, rows, norm1);
        const int stride = layer.qkv.n;
        multiply(layer.qkv, act, rows, [&](int column, const float(*found)[LANES]) {
          for (int r = 0; r < rows; r++)
            for (int i = 0; i < LANES; i++)
              qkv[(size_t)r * stride + column + i] = found[r][i] + (column + i < width ? s.shared[column + i] : 0.0f);
        });
        std::fill(qkv.begin() + (size_t)rows * stride, qkv.end(), 0.0f);
        for (int h = 0; h < H; h++) {
          const float* q = qkv.data() + h * D;
          fill(s.heads[h], first, q, q + width, q + 2 * width, stride, D, D4, W, factor);
        }
      });

      const int tiles = (T + QUERIES - 1) / QUERIES;
      each(tiles * H, [&](int unit) {
        const int h = unit / tiles, first = unit % tiles * QUERIES, count = std::min(QUERIES, T - first);
        float* out = s.mixed.data() + (size_t)first * C + h * D;
        attend(s.heads[h], s.away.data(), patches, first, count, D, D4, W, sums.data(), out, C);
        for (int m = 0; m < count; m++)
          for (int d = 0; d < D; d++) out[(size_t)m * C + d] += s.shared[2 * width + h * D + d];
      });

      auto mixed = [&](int t) { return s.mixed.data() + (size_t)t * C; };
      prepare(layer.o, C, mixed);
      each(chunks, [&](int chunk) {
        quantise(layer.o, C, chunk * CHUNK, rows_of(chunk), mixed);
        add(layer.o, chunk * CHUNK, rows_of(chunk));
      });

      auto norm2 = [&](int t) {
        layer_norm(x + (size_t)t * C, layer.norm2, layer.norm2_bias, row.data(), width, C, model->eps);
        return row.data();
      };
      prepare(layer.fc1, C, norm2);
      each(chunks, [&](int chunk) {
        const int first = chunk * CHUNK, rows = rows_of(chunk);
        quantise(layer.fc1, C, first, rows, norm2);
        multiply(layer.fc1, act, rows, [&](int column, const float(*found)[LANES]) {
          for (int r = 0; r < rows; r++)
            for (int i = 0; i < LANES; i += 16)
              store(&s.hidden[(size_t)(first + r) * F + column + i], gelu(load(found[r] + i) + load(&s.shared[column + i])));
        });
      });

      auto hidden = [&](int t) { return s.hidden.data() + (size_t)t * F; };
      prepare(layer.fc2, F, hidden);
      each(chunks, [&](int chunk) {
        quantise(layer.fc2, F, chunk * CHUNK, rows_of(chunk), hidden);
        add(layer.fc2, chunk * CHUNK, rows_of(chunk));
      });
    }
  });
}

}  // extern "C"
