// Gemma 3's decoder on a CPU, int8 weights: one pass over any tokens of any sequences.
//
// A pass takes R rows. A row is one token: its embedding, the sequence (slot of the cache) it belongs to, its position,
// and its reach, the last position it sees (its own, or inside a picture that of the picture's last soft token). Every
// key that a row sees therefore lies in one range of positions, [first, reach], and no mask is needed.
//
//   weights      int8, symmetric, one fp16 scale for each 32 of a row (GGUF's Q8_0 is kept exactly); activations alike
//   sums         int32 within a group, fp32 between groups; norms, rotation, softmax, residual stream in fp32
//   keys, values fp16, in pages of 64 positions; a table for each sequence and kind of layer says which page holds
//                which 64 positions (seavlm/engine/pages.py)
//
// The same source is compiled once for each instruction set; seavlm.engine.kernels picks the library that fits.
//
// Shapes: R rows, C width, H heads, G KV heads, D head dim, F feed-forward width, V vocabulary rows.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// --- sixteen floats: one AVX-512 register, two of AVX2, four of SSE2 or NEON

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t fp16;

inline v16 load(const float* p) { v16 v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, v16 v) { std::memcpy(p, &v, sizeof v); }
inline v16 all(float x) { return x - v16{}; }

inline float sum(v16 v) {
  float s = 0;
  for (int i = 0; i < 16; i++) s += v[i];
  return s;
}

inline v16 maximum(v16 a, v16 b) { return a > b ? a : b; }

inline float largest(v16 v) {
  float m = v[0];
  for (int i = 1; i < 16; i++) m = std::max(m, v[i]);
  return m;
}

#if defined(__AVX512F__)
inline v16 load_half(const fp16* p) { return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_half(fp16* p, v16 v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
inline fp16 to_half(float x) { return _cvtss_sh(x, 0); }
inline float from_half(fp16 x) { return _cvtsh_ss(x); }
#elif defined(__F16C__)
inline v16 load_half(const fp16* p) {
  __m256 half[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
  v16 v;
  std::memcpy(&v, half, sizeof v);
  return v;
}
inline void store_half(fp16* p, v16 v) {
  __m256 half[2];
  std::memcpy(half, &v, sizeof v);
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(half[0], 0));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(half[1], 0));
}
inline fp16 to_half(float x) { return _cvtss_sh(x, 0); }
inline float from_half(fp16 x) { return _cvtsh_ss(x); }
#else
inline float from_half(fp16 x) { _Float16 h; std::memcpy(&h, &x, 2); return (float)h; }
inline fp16 to_half(float x) { _Float16 h = (_Float16)x; fp16 b; std::memcpy(&b, &h, 2); return b; }
inline v16 load_half(const fp16* p) {
  v16 v;
  for (int i = 0; i < 16; i++) v[i] = from_half(p[i]);
  return v;
}
inline void store_half(fp16* p, v16 v) { for (int i = 0; i < 16; i++) p[i] = to_half(v[i]); }
#endif

// e^x, relative error 2e-7: 2^n * e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7.
inline v16 exponential(v16 x) {
  x = maximum(x, all(-87.0f));
  x = x < 88.0f ? x : all(88.0f);
  v16 y = x * 1.44269504f;
  i16 n = __builtin_convertvector(y + (y < 0.0f ? all(-0.5f) : all(0.5f)), i16);
  v16 whole = __builtin_convertvector(n, v16);
  v16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  v16 e = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + c;
  i16 power = (n + 127) << 23;
  return e * (v16)power;
}

// gelu(x), tanh form: x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline v16 gelu(v16 x) {
  v16 u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

// --- threads that wait for each other many times a token: spinning first, then sleeping

inline void breathe() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int i = 0; round_.load(std::memory_order_acquire) == round; i++) {
      if (i < 20000) breathe();
      else round_.wait(round);
    }
  }

 private:
  const int size_;
  std::atomic<int> arrived_{0}, round_{0};
};

class Team {
 public:
  explicit Team(int size) : size(size), between(size), start_(size), end_(size) {
    for (int id = 1; id < size; id++)
      std::thread([this, id] {
        for (;;) {
          start_.wait();
          job_(id);
          end_.wait();
        }
      }).detach();
  }
  void run(std::function<void(int)> job) {
    job_ = std::move(job);
    start_.wait();
    job_(0);
    end_.wait();
  }
  const int size;
  Barrier between;  // phases of a job

 private:
  Barrier start_, end_;
  std::function<void(int)> job_;
};

Team& team(int size) {  // kept for the life of the process: its threads sleep when there is nothing to do
  static std::vector<Team*> teams;
  for (Team* one : teams)
    if (one->size == size) return *one;
  teams.push_back(new Team(size));
  return *teams.back();
}

struct Share { int first, last; };

inline Share share(int count, int id, int size) {
  return {(int)((int64_t)count * id / size), (int)((int64_t)count * (id + 1) / size)};
}

// --- int8 matrices

constexpr int LANES = 16;  // rows of a matrix that are multiplied side by side
constexpr int GROUP = 32;  // columns that share a scale

// q uint8 [n / 16][k / 4][16][4]: 128 + the integer of row 16 i + lane, column 4 j + byte. scale [n / 16][k / 32][16].
struct Matrix { const uint8_t* q; const fp16* scale; int32_t n, k; };

// Rows of activations, quantised: row r is s[r][g] * q[r][...] in each group g of columns.
struct Quantised {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> total;  // of the q of a group
  int k = 0, groups = 0;

  void shape(int rows, int columns) {
    k = columns;
    groups = columns / GROUP;
    if (q.size() < (size_t)rows * k) q.resize((size_t)rows * k);
    if (scale.size() < (size_t)rows * groups) scale.resize((size_t)rows * groups), total.resize((size_t)rows * groups);
  }

  void row(int r, const float* x) {
    for (int g = 0; g < groups; g++) {
      const float* from = x + g * GROUP;
      v16 top{};
      for (int i = 0; i < GROUP; i += 16) {
        v16 v = load(from + i);
        top = maximum(top, maximum(v, -v));
      }
      float most = largest(top), inverse = most > 0 ? 127.0f / most : 0.0f;
      i16 added{};
      int8_t* to = q.data() + (size_t)r * k + g * GROUP;
      for (int i = 0; i < GROUP; i += 16) {
        v16 v = load(from + i) * inverse;
        i16 n = __builtin_convertvector(v + (v < 0.0f ? all(-0.5f) : all(0.5f)), i16);
        added += n;
        typedef int8_t b16 __attribute__((vector_size(16)));
        b16 bytes = __builtin_convertvector(n, b16);
        std::memcpy(to + i, &bytes, 16);
      }
      int32_t whole = 0;
      for (int i = 0; i < 16; i++) whole += added[i];
      scale[(size_t)r * groups + g] = most / 127.0f;
      total[(size_t)r * groups + g] = whole;
    }
  }
};

// out[m][16 b + lane] = row (first row of block) + 16 b + lane of the matrix, times row r + m of the activations.
template <int M, int B>
void tile(const Matrix& w, int block, const Quantised& a, int r, float out[M][16 * B]) {
  const size_t stride = (size_t)16 * w.k;  // bytes of a block
  const uint8_t* p = w.q + block * stride;
  const int8_t* x = a.q.data() + (size_t)r * a.k;
  const float* s = a.scale.data() + (size_t)r * a.groups;
  const fp16* scales = w.scale + (size_t)block * LANES * a.groups;
  const int32_t* t = a.total.data() + (size_t)r * a.groups;
  v16 f[M][B] = {};
  for (int g = 0; g < a.groups; g++) {
    v16 scale[B];
    for (int b = 0; b < B; b++) scale[b] = load_half(scales + ((size_t)b * a.groups + g) * LANES);
#if defined(__AVX512VNNI__)
    __m512i c[M][B];
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) c[m][b] = _mm512_set1_epi32(-128 * t[m * a.groups + g]);
    for (int j = g * GROUP / 4; j < (g + 1) * GROUP / 4; j++) {
      __m512i v[B];
      for (int b = 0; b < B; b++) {
        v[b] = _mm512_loadu_si512(p + b * stride + (size_t)j * 64);
        if (M == 1) _mm_prefetch((const char*)(p + b * stride + (size_t)j * 64 + 4096), _MM_HINT_T0);
      }
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, x + (size_t)m * a.k + j * 4, 4);
        for (int b = 0; b < B; b++) c[m][b] = _mm512_dpbusd_epi32(c[m][b], v[b], _mm512_set1_epi32(four));
      }
    }
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) f[m][b] += (v16)_mm512_cvtepi32_ps(c[m][b]) * (scale[b] * s[m * a.groups + g]);
#elif defined(__AVX2__)
    // |x| as unsigned times w with the sign of x: two products of at most 127 * 128 fit an int16.
    __m256i c[M][B][2];
    std::memset(c, 0, sizeof c);
    for (int j = g * GROUP / 4; j < (g + 1) * GROUP / 4; j++)
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, x + (size_t)m * a.k + j * 4, 4);
        const __m256i wide = _mm256_set1_epi32(four), positive = _mm256_abs_epi8(wide);
        for (int b = 0; b < B; b++)
          for (int half = 0; half < 2; half++) {
            __m256i v = _mm256_loadu_si256((const __m256i*)(p + b * stride + (size_t)j * 64 + half * 32));
            v = _mm256_sign_epi8(_mm256_xor_si256(v, _mm256_set1_epi8(-128)), wide);
            v = _mm256_madd_epi16(_mm256_maddubs_epi16(positive, v), _mm256_set1_epi16(1));
            c[m][b][half] = _mm256_add_epi32(c[m][b][half], v);
          }
      }
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) {
        i16 whole;
        std::memcpy(&whole, c[m][b], sizeof whole);
        f[m][b] += __builtin_convertvector(whole, v16) * (scale[b] * s[m * a.groups + g]);
      }
    (void)t;
#else
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) {
        i16 c = {};
        for (int j = g * GROUP / 4; j < (g + 1) * GROUP / 4; j++)
          for (int lane = 0; lane < 16; lane++)
            for (int byte = 0; byte < 4; byte++)
              c[lane] += (p[b * stride + (size_t)j * 64 + lane * 4 + byte] - 128) * x[(size_t)m * a.k + j * 4 + byte];
        f[m][b] += __builtin_convertvector(c, v16) * (scale[b] * s[m * a.groups + g]);
      }
    (void)t;
#endif
  }
  for (int b = 0; b < B; b++)
    for (int m = 0; m < M; m++) store(out[m] + b * LANES, f[m][b]);
}

constexpr int ROWS = 6;  // of activations in a tile: 12 sums of two blocks fit the registers

// Calls take(row, first column, 32 (or 16) results) for the blocks of this thread and all rows.
template <class Take>
void multiply(const Matrix& w, const Quantised& a, int rows, int id, int size, Take take) {
  int pairs = (w.n / LANES + 1) / 2;
  Share mine = share(pairs, id, size);
  float out[ROWS][2 * LANES];
  for (int pair = mine.first; pair < mine.last; pair++) {
    int block = 2 * pair, wide = std::min(2, w.n / LANES - block);
    auto go = [&](auto m, int r) {
      constexpr int M = decltype(m)::value;
      if (wide == 2) {
        tile<M, 2>(w, block, a, r, out);
        for (int i = 0; i < M; i++) take(r + i, block * LANES, out[i], 2 * LANES);
      } else {
        float narrow[M][LANES];
        tile<M, 1>(w, block, a, r, narrow);
        for (int i = 0; i < M; i++) take(r + i, block * LANES, narrow[i], LANES);
      }
    };
    for (int r = 0; r < rows; r += ROWS) switch (std::min(ROWS, rows - r)) {
        case 1: go(std::integral_constant<int, 1>(), r); break;
        case 2: go(std::integral_constant<int, 2>(), r); break;
        case 3: go(std::integral_constant<int, 3>(), r); break;
        case 4: go(std::integral_constant<int, 4>(), r); break;
        case 5: go(std::integral_constant<int, 5>(), r); break;
        default: go(std::integral_constant<int, 6>(), r);
      }
  }
}

// --- norms and rotation

// y = x / rms(x) * weight, weight being 1 + the checkpoint's. x and y may be the same.
void rms_norm(const float* x, const float* weight, float* y, int n, float eps) {
  v16 squares{};
  for (int i = 0; i < n; i += 16) squares += load(x + i) * load(x + i);
  float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
  for (int i = 0; i < n; i += 16) store(y + i, load(x + i) * scale * load(weight + i));
}

void rotate(float* x, const float* cos, const float* sin, int dim) {
  for (int i = 0; i < dim / 2; i += 16) {
    v16 a = load(x + i), b = load(x + dim / 2 + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + dim / 2 + i, b * c + a * s);
  }
}

// --- attention

constexpr int BLOCK = 64;   // positions in a page of the cache
constexpr int QUERIES = 6;  // that share a pass over the keys

// One layer's keys [page][G][D][64] and values [page][G][64][D].
struct Cache { fp16 *k, *v; };

// M queries of one sequence and one head, positions rising: softmax(q k^T) v over each query's own range of keys.
// keys, values: of the head in page 0; the next page is `stride` further.
template <int M>
void attend(const float* const q[M], float* const out[M], const int first[M], const int last[M], const fp16* keys,
            const fp16* values, const int32_t* table, size_t stride, int dim, float* work) {
  float* sums = work;  // [M][dim]
  std::memset(sums, 0, sizeof(float) * M * dim);
  float top[M], weight[M];
  for (int m = 0; m < M; m++) top[m] = -INFINITY, weight[m] = 0;
  int from = first[0], to = last[0];
  for (int m = 1; m < M; m++) from = std::min(from, first[m]), to = std::max(to, last[m]);

  for (int number = from / BLOCK; number <= to / BLOCK; number++) {
    const fp16* k = keys + table[number] * stride;
    const fp16* v = values + table[number] * stride;
    v16 score[M][4] = {};
    for (int d = 0; d < dim; d++) {
      v16 column[4];
      for (int i = 0; i < 4; i++) column[i] = load_half(k + (size_t)d * BLOCK + 16 * i);
      for (int m = 0; m < M; m++)
        for (int i = 0; i < 4; i++) score[m][i] += q[m][d] * column[i];
    }
    alignas(64) float chance[M][BLOCK];
    for (int m = 0; m < M; m++) {
      int low = first[m] - number * BLOCK, high = last[m] - number * BLOCK;
      for (int i = 0; i < 4; i++) store(chance[m] + 16 * i, score[m][i]);
      if (low > 0 || high < BLOCK - 1)
        for (int i = 0; i < BLOCK; i++)
          if (i < low || i > high) chance[m][i] = -INFINITY;
      v16 most = load(chance[m]);
      for (int i = 1; i < 4; i++) most = maximum(most, load(chance[m] + 16 * i));
      float new_top = std::max(top[m], largest(most));
      if (new_top == -INFINITY) {
        std::memset(chance[m], 0, sizeof chance[m]);
        continue;
      }
      float shrink = std::exp(top[m] - new_top);
      v16 added{};
      for (int i = 0; i < 4; i++) {
        v16 s = load(chance[m] + 16 * i), e = exponential(s - new_top);
        e = s == -INFINITY ? v16{} : e;
        store(chance[m] + 16 * i, e);
        added += e;
      }
      weight[m] = weight[m] * shrink + sum(added);
      top[m] = new_top;
      if (shrink != 1.0f)
        for (int d = 0; d < dim; d += 16) store(sums + m * dim + d, load(sums + m * dim + d) * shrink);
    }
    int low = std::max(0, from - number * BLOCK), high = std::min(BLOCK - 1, to - number * BLOCK);
    for (int d = 0; d < dim; d += 64) {
      int lanes = std::min(4, (dim - d) / 16);
      v16 part[M][4];
      for (int m = 0; m < M; m++)
        for (int i = 0; i < 4; i++) part[m][i] = i < lanes ? load(sums + m * dim + d + 16 * i) : v16{};
      for (int j = low; j <= high; j++) {
        v16 row[4];
        for (int i = 0; i < 4; i++) row[i] = i < lanes ? load_half(v + (size_t)j * dim + d + 16 * i) : v16{};
        for (int m = 0; m < M; m++)
          for (int i = 0; i < 4; i++) part[m][i] += chance[m][j] * row[i];
      }
      for (int m = 0; m < M; m++)
        for (int i = 0; i < lanes; i++) store(sums + m * dim + d + 16 * i, part[m][i]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int d = 0; d < dim; d += 16) store(out[m] + d, load(sums + m * dim + d) / weight[m]);
}

struct Row { int32_t slot, position, reach; };

struct Layer {
  Matrix qkv, o, gate_up, down;  // gate_up: blocks of 16 rows of gate and up in turn
  const float *input_norm, *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm, *q_norm, *k_norm;
  int32_t local;
};

struct Model {
  const Layer* layers;
  int32_t num_layers, width, heads, kv_heads, head_dim, hidden, window;
  float eps, attention_scale;
  const float* final_norm;
  const float *global_frequencies, *local_frequencies;  // [D / 2]
  Matrix embedding;                                      // the head too
};

struct Scratch {
  std::vector<float> qkv, mixed, y, hidden, normed, cos[2], sin[2];
  Quantised act;
  std::vector<int> tiles;  // first rows of the query tiles; the last entry is R
};

}  // namespace

extern "C" {

// The best instruction set that this processor has and that we build for.
const char* seavlm_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return "avx512vnni";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

// float [n, k] -> a Matrix's q and scale; n a multiple of 16, k of 32.
void seavlm_pack(const float* w, int32_t n, int32_t k, uint8_t* q, fp16* scale, int32_t threads) {
  team(threads).run([=](int id) {
    Share mine = share(n / LANES, id, threads);
    for (int block = mine.first; block < mine.last; block++)
      for (int lane = 0; lane < LANES; lane++) {
        int row = block * LANES + lane;
        const float* x = w + (size_t)row * k;
        for (int g = 0; g < k / GROUP; g++) {
          float most = 0;
          for (int j = g * GROUP; j < (g + 1) * GROUP; j++) most = std::max(most, std::fabs(x[j]));
          const fp16 rounded = to_half(most / 127.0f);
          scale[((size_t)block * (k / GROUP) + g) * LANES + lane] = rounded;
          const float step = from_half(rounded), inverse = step > 0 ? 1.0f / step : 0.0f;
          for (int j = g * GROUP; j < (g + 1) * GROUP; j++) {
            const long n = std::clamp(std::lrint(x[j] * inverse), -127l, 127l);
            q[(size_t)block * LANES * k + (size_t)(j / 4) * 64 + lane * 4 + j % 4] = 128 + n;
          }
        }
      }
  });
}

// float [rows, w.k] times the matrix -> float [rows, w.n]
void seavlm_multiply(const Matrix* w, const float* x, int32_t rows, float* y, int32_t threads) {
  Quantised act;
  act.shape(rows, w->k);
  Team& crew = team(threads);
  crew.run([&](int id) {
    Share mine = share(rows, id, threads);
    for (int r = mine.first; r < mine.last; r++) act.row(r, x + (size_t)r * w->k);
    crew.between.wait();
    multiply(*w, act, rows, id, threads, [&](int r, int column, const float* found, int count) {
      std::memcpy(y + (size_t)r * w->n + column, found, sizeof(float) * count);
    });
  });
}

// Embeddings of R token ids, times sqrt(C): float [R, C].
void seavlm_embed(const Model* model, const int64_t* ids, int32_t rows, float* x) {
  const Matrix& e = model->embedding;
  const float factor = std::sqrt((float)model->width);
  for (int r = 0; r < rows; r++) {
    const int64_t block = ids[r] / LANES, lane = ids[r] % LANES;
    const uint8_t* q = e.q + block * LANES * e.k;
    const fp16* scale = e.scale + block * LANES * (e.k / GROUP);
    for (int j = 0; j < e.k; j++)
      x[(size_t)r * e.k + j] =
          factor * from_half(scale[j / GROUP * LANES + lane]) * (q[j / 4 * 64 + lane * 4 + j % 4] - 128);
  }
}

// x float [R, C], overwritten by the last residual stream; caches one a layer; tables: of global and of local layers,
// [slots][blocks], the page of each 64 positions of each sequence; logits float [wanted, V] of the rows
// listed in `wanted`. Rows of one sequence stand together, positions rising, a picture whole.
void seavlm_forward(const Model* model, const Cache* caches, const int32_t* global_table, const int32_t* local_table,
                    int32_t blocks, float* x, const Row* rows, int32_t R, const int32_t* wanted, int32_t num_wanted,
                    float* logits, int32_t threads) {
  const int C = model->width, H = model->heads, G = model->kv_heads, D = model->head_dim, F = model->hidden;
  const int QKV = (H + 2 * G) * D;
  static Scratch scratch;  // one pass at a time
  Scratch& s = scratch;
  auto grow = [](std::vector<float>& v, size_t n) { if (v.size() < n) v.resize(n); };
  grow(s.qkv, (size_t)R * QKV), grow(s.mixed, (size_t)R * H * D), grow(s.y, (size_t)R * C);
  grow(s.hidden, (size_t)R * F), grow(s.normed, (size_t)R * C);
  for (int kind = 0; kind < 2; kind++) grow(s.cos[kind], (size_t)R * D / 2), grow(s.sin[kind], (size_t)R * D / 2);
  s.tiles.clear();
  for (int r = 0; r < R; r++)
    if (r == 0 || r - s.tiles.back() == QUERIES || rows[r].slot != rows[r - 1].slot ||
        rows[r].position != rows[r - 1].position + 1)
      s.tiles.push_back(r);
  const int num_tiles = s.tiles.size();
  s.tiles.push_back(R);

  Team& crew = team(threads);
  crew.run([&](int id) {
    const Share mine = share(R, id, threads);
    auto wait = [&] { crew.between.wait(); };
    auto matrix_into = [&](const Matrix& w, float* y) {
      multiply(w, s.act, R, id, threads, [&](int r, int column, const float* found, int count) {
        std::memcpy(y + (size_t)r * w.n + column, found, sizeof(float) * count);
      });
    };
    std::vector<float> work((size_t)QUERIES * D);

    for (int kind = 0; kind < 2; kind++) {
      const float* frequencies = kind ? model->local_frequencies : model->global_frequencies;
      for (int r = mine.first; r < mine.last; r++)
        for (int i = 0; i < D / 2; i++) {
          float angle = rows[r].position * frequencies[i];
          s.cos[kind][(size_t)r * (D / 2) + i] = std::cos(angle);
          s.sin[kind][(size_t)r * (D / 2) + i] = std::sin(angle);
        }
    }
    for (int l = 0; l < model->num_layers; l++) {
      const Layer& layer = model->layers[l];
      const Cache& cache = caches[l];
      const int32_t* tables = layer.local ? local_table : global_table;
      const size_t plane = (size_t)BLOCK * D;  // one KV head in a page

      // Norm, then queries, keys and values.
      if (id == 0) s.act.shape(R, C);
      wait();
      for (int r = mine.first; r < mine.last; r++) {
        float* normed = s.normed.data() + (size_t)r * C;
        rms_norm(x + (size_t)r * C, layer.input_norm, normed, C, model->eps);
        s.act.row(r, normed);
      }
      wait();
      matrix_into(layer.qkv, s.qkv.data());
      wait();

      // Norms and rotation of q and k; k and v into the cache.
      const float *cos = s.cos[layer.local ? 1 : 0].data(), *sin = s.sin[layer.local ? 1 : 0].data();
      for (int r = mine.first; r < mine.last; r++) {
        const float *c = cos + (size_t)r * (D / 2), *sn = sin + (size_t)r * (D / 2);
        float* head = s.qkv.data() + (size_t)r * QKV;
        for (int h = 0; h < H; h++, head += D) {
          rms_norm(head, layer.q_norm, head, D, model->eps);
          rotate(head, c, sn, D);
          for (int i = 0; i < D; i += 16) store(head + i, load(head + i) * model->attention_scale);
        }
        const int at = rows[r].position % BLOCK;
        const size_t page = tables[(size_t)rows[r].slot * blocks + rows[r].position / BLOCK];
        for (int g = 0; g < G; g++, head += D) {
          rms_norm(head, layer.k_norm, head, D, model->eps);
          rotate(head, c, sn, D);
          const size_t place = (page * G + g) * plane;
          for (int i = 0; i < D; i++) cache.k[place + (size_t)i * BLOCK + at] = to_half(head[i]);
          const float* value = head + (size_t)G * D;
          for (int i = 0; i < D; i += 16) store_half(cache.v + place + (size_t)at * D + i, load(value + i));
        }
      }
      wait();

      // Attention: a tile of queries and a head at a time.
      const Share units = share(num_tiles * H, id, threads);
      for (int unit = units.first; unit < units.last; unit++) {
        const int start = s.tiles[unit / H], count = s.tiles[unit / H + 1] - start, h = unit % H;
        const float* q[QUERIES];
        float* out[QUERIES];
        int first[QUERIES], last[QUERIES];
        for (int m = 0; m < count; m++) {
          const Row& row = rows[start + m];
          q[m] = s.qkv.data() + (size_t)(start + m) * QKV + (size_t)h * D;
          out[m] = s.mixed.data() + ((size_t)(start + m) * H + h) * D;
          first[m] = layer.local ? std::max(0, row.position - model->window + 1) : 0;
          last[m] = row.reach;
        }
        const size_t place = h / (H / G) * plane;
        const fp16 *k = cache.k + place, *v = cache.v + place;
        const int32_t* table = tables + (size_t)rows[start].slot * blocks;
        switch (count) {
          case 1: attend<1>(q, out, first, last, k, v, table, G * plane, D, work.data()); break;
          case 2: attend<2>(q, out, first, last, k, v, table, G * plane, D, work.data()); break;
          case 3: attend<3>(q, out, first, last, k, v, table, G * plane, D, work.data()); break;
          case 4: attend<4>(q, out, first, last, k, v, table, G * plane, D, work.data()); break;
          case 5: attend<5>(q, out, first, last, k, v, table, G * plane, D, work.data()); break;
          default: attend<6>(q, out, first, last, k, v, table, G * plane, D, work.data());
        }
      }
      if (id == 0) s.act.shape(R, H * D);
      wait();
      for (int r = mine.first; r < mine.last; r++) s.act.row(r, s.mixed.data() + (size_t)r * H * D);
      wait();
      matrix_into(layer.o, s.y.data());
      wait();

      // The residual, and the gated feed-forward.
      if (id == 0) s.act.shape(R, C);
      wait();
      for (int r = mine.first; r < mine.last; r++) {
        float *residual = x + (size_t)r * C, *y = s.y.data() + (size_t)r * C;
        rms_norm(y, layer.post_attention_norm, y, C, model->eps);
        for (int i = 0; i < C; i += 16) store(residual + i, load(residual + i) + load(y + i));
        rms_norm(residual, layer.pre_feedforward_norm, y, C, model->eps);
        s.act.row(r, y);
      }
      wait();
      multiply(layer.gate_up, s.act, R, id, threads, [&](int r, int column, const float* found, int) {
        store(s.hidden.data() + (size_t)r * F + column / 2, gelu(load(found)) * load(found + LANES));
      });
      wait();
      if (id == 0) s.act.shape(R, F);
      wait();
      for (int r = mine.first; r < mine.last; r++) s.act.row(r, s.hidden.data() + (size_t)r * F);
      wait();
      matrix_into(layer.down, s.y.data());
      wait();
      for (int r = mine.first; r < mine.last; r++) {
        float *residual = x + (size_t)r * C, *y = s.y.data() + (size_t)r * C;
        rms_norm(y, layer.post_feedforward_norm, y, C, model->eps);
        for (int i = 0; i < C; i += 16) store(residual + i, load(residual + i) + load(y + i));
      }
    }
    wait();
    if (!num_wanted) return;

    // The head, for the rows that are wanted.
    if (id == 0) s.act.shape(num_wanted, C);
    wait();
    const Share heads = share(num_wanted, id, threads);
    for (int i = heads.first; i < heads.last; i++) {
      float* normed = s.normed.data() + (size_t)i * C;
      rms_norm(x + (size_t)wanted[i] * C, model->final_norm, normed, C, model->eps);
      s.act.row(i, normed);
    }
    wait();
    const Matrix& head = model->embedding;
    multiply(head, s.act, num_wanted, id, threads, [&](int r, int column, const float* found, int count) {
      std::memcpy(logits + (size_t)r * head.n + column, found, sizeof(float) * count);
    });
  });
}

}  // extern "C"
