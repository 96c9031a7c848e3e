// Gemma 3's decoder on a CPU, int8 weights: one pass over any tokens of any sequences.
//
// A pass takes R rows. A row is one token: its embedding, the sequence (slot of the cache) it belongs to, its position,
// and its reach, the last position it sees (its own, or inside a picture that of the picture's last soft token). Every
// key that a row sees therefore lies in one range of positions, [first, reach], and no mask is needed.
//
//   weights      4, 5, 6 or 8 bits, fp16 scales for each 32 of a row (GGUF's blocks are kept as they are)
//   activations  int8, symmetric, an fp32 scale for each 32
//   sums         int32 within a group, fp32 between groups; norms, rotation, softmax, residual stream in fp32
//   keys, values fp16, in blocks of 64 positions; local layers keep a ring of blocks, position p in block (p / 64) % n
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
  v = maximum(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = maximum(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = maximum(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return std::max(v[0], v[1]);
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

// --- matrices

constexpr int LANES = 16;  // rows of a matrix that are multiplied side by side
constexpr int GROUP = 32;  // columns that share a scale

// How a matrix holds the codes u of its weights. EIGHT and SCREENED: scale * (u - 128), u > 0. FOUR, FIVE: scale * u + least.
// SIX: scale * (u - 32), a scale for each 16 columns. COARSE reads SCREENED's upper five bits only.
enum Kind : int32_t { EIGHT, SCREENED, FOUR, FIVE, SIX, COARSE };

constexpr int lines_of(int kind) { return kind == EIGHT ? 8 : kind == FOUR ? 4 : kind == SIX ? 6 : 5; }
constexpr int FINE = 3;  // lines of SCREENED's lower bits

// q [n / 16][k / 32][lines][64]. Byte 4 lane + i of a line belongs to row 16 block + lane, and of a group's 32 columns
// to those 4 j + i. EIGHT: line j is the codes. Others: lines 0 to 3 hold the upper four bits, of j = line below and of
// j = line + 4 above; each line after them one bit more, of j in bit j. fine [n / 16][k / 32][3][64]: SCREENED's last
// three bits. scale (of SIX two a group) and least [n / 16][k / 32][16].
// norm uint8 [n]: eighths, rounded up; no group of the row has a larger norm of (u & 7) - 3.5. See `screen`.
struct Matrix {
  const uint8_t *q, *fine, *norm;
  const fp16 *scale, *least;
  int32_t n, k, kind;
};

typedef uint8_t b64 __attribute__((vector_size(64)));

inline b64 line(const uint8_t* p) { b64 v; std::memcpy(&v, p, sizeof v); return v; }

// Codes of columns 4 j to 4 j + 3 of a group, for 16 rows.
template <int KIND>
inline b64 codes(const uint8_t* q, const uint8_t* fine, int j) {
  if constexpr (KIND == EIGHT) return line(q + 64 * j);
  b64 v = line(q + 64 * (j % 4));
  v = j < 4 ? v & 15 : v >> 4;
  for (int i = 4; i < lines_of(KIND); i++) v = v + v + ((line(q + 64 * i) >> j) & 1);
  if constexpr (KIND == SCREENED)
    for (int i = 0; i < FINE; i++) v = v + v + ((line(fine + 64 * i) >> j) & 1);
  return v;
}

// Row and column of a matrix, as a number.
float weight(const Matrix& w, int64_t row, int column) {
  const int64_t group = row / LANES * (w.k / GROUP) + column / GROUP, lane = row % LANES;
  const int j = column % GROUP / 4, byte = lane * 4 + column % 4;
  const uint8_t* q = w.q + group * lines_of(w.kind) * 64 + byte;
  const float scale = from_half(w.scale[group * LANES + lane]);
  if (w.kind == EIGHT) return scale * (q[j * 64] - 128);
  int u = j < 4 ? q[j * 64] & 15 : q[(j - 4) * 64] >> 4;
  for (int i = 4; i < lines_of(w.kind); i++) u = 2 * u + (q[i * 64] >> j & 1);
  if (w.kind == SIX) return from_half(w.scale[(2 * group + j / 4) * LANES + lane]) * (u - 32);
  if (w.kind != SCREENED) return scale * u + from_half(w.least[group * LANES + lane]);
  for (int i = 0; i < FINE; i++) u = 2 * u + (w.fine[(group * FINE + i) * 64 + byte] >> j & 1);
  return scale * (u - 128);
}

// Rows of activations, quantised: row r is s[r][g] * q[r][...] in each group g of columns.
struct Quantised {
  std::vector<int8_t> q;
  std::vector<float> scale, norm;  // norm: the length of a group
  std::vector<int32_t> total;      // of the q of half a group
  int k = 0, groups = 0;

  void shape(int rows, int columns) {
    k = columns;
    groups = columns / GROUP;
    if (q.size() < (size_t)rows * k) q.resize((size_t)rows * k);
    if (scale.size() < (size_t)rows * groups)
      scale.resize((size_t)rows * groups), norm.resize((size_t)rows * groups), total.resize((size_t)rows * groups * 2);
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
      i16 squares{};
      int8_t* to = q.data() + (size_t)r * k + g * GROUP;
      for (int i = 0; i < GROUP; i += 16) {
        v16 v = load(from + i) * inverse;
        i16 n = __builtin_convertvector(v + (v < 0.0f ? all(-0.5f) : all(0.5f)), i16);
        squares += n * n;
        typedef int8_t b16 __attribute__((vector_size(16)));
        b16 bytes = __builtin_convertvector(n, b16);
        std::memcpy(to + i, &bytes, 16);
        int32_t whole = 0;
        for (int j = 0; j < 16; j++) whole += n[j];
        total[((size_t)r * groups + g) * 2 + i / 16] = whole;
      }
      int32_t squared = 0;
      for (int i = 0; i < 16; i++) squared += squares[i];
      scale[(size_t)r * groups + g] = most / 127.0f;
      norm[(size_t)r * groups + g] = most / 127.0f * std::sqrt((float)squared);
    }
  }
};

// c + four columns of codes u of 16 rows, times four activations; of codes of eight bits (u - OFFSET) are multiplied.
#if defined(__AVX512VNNI__)
constexpr int OFFSET = 0;
template <bool WIDE>
inline i16 dot(i16 c, b64 u, int32_t four) {
  return (i16)_mm512_dpbusd_epi32((__m512i)c, (__m512i)u, _mm512_set1_epi32(four));
}
#elif defined(__AVX2__)
constexpr int OFFSET = 128;
template <bool WIDE>
inline i16 dot(i16 c, b64 u, int32_t four) {
  __m256i sums[2], v[2];
  std::memcpy(sums, &c, sizeof c), std::memcpy(v, &u, sizeof u);
  const __m256i x = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; half++) {
    __m256i pairs;
    if (WIDE) {  // |x| as unsigned times u - 128 with the sign of x: two products of at most 127 * 128 fit an int16
      const __m256i w = _mm256_xor_si256(v[half], _mm256_set1_epi8(-128));
      pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    } else {
      pairs = _mm256_maddubs_epi16(v[half], x);
    }
    sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, one));
  }
  std::memcpy(&c, sums, sizeof c);
  return c;
}
#else
constexpr int OFFSET = 0;
template <bool WIDE>
inline i16 dot(i16 c, b64 u, int32_t four) {
  int8_t x[4];
  std::memcpy(x, &four, 4);
  for (int lane = 0; lane < 16; lane++)
    for (int i = 0; i < 4; i++) c[lane] += u[lane * 4 + i] * x[i];
  return c;
}
#endif

// out[m][16 b + lane] = row 16 (block + b) + lane of the matrix, times row r + m of the activations. COARSE: the middle
// of what the product can be, and after these 16 B the sums over groups of scale * norm of the activations.
template <int KIND, int M, int B>
__attribute__((noinline)) void tile(const Matrix& w, int block, const Quantised& a, int r, float* out) {
  constexpr bool WIDE = KIND == EIGHT || KIND == SCREENED, LEAST = KIND == FOUR || KIND == FIVE;
  constexpr int PARTS = KIND == SIX ? 2 : 1, LINES = lines_of(KIND);
  const size_t stride = (size_t)a.groups * LINES * 64, fine_stride = (size_t)a.groups * FINE * 64;  // of a block
  const uint8_t *q = w.q + block * stride, *fine = w.fine + block * fine_stride;
  const int8_t* x = a.q.data() + (size_t)r * a.k;
  const fp16* scales = w.scale + (size_t)block * LANES * a.groups * PARTS;
  const fp16* leasts = w.least + (size_t)block * LANES * a.groups;
  v16 f[M][B] = {}, bound[M][B] = {};
  for (int g = 0; g < a.groups; g++) {
    if (M == 1)
      for (int b = 0; b < B; b++)
        for (int i = 0; i < LINES + (KIND == SCREENED ? FINE : 0); i++)
          __builtin_prefetch(i < LINES ? q + b * stride + ((size_t)g * LINES + i) * 64 + 4096
                                       : fine + b * fine_stride + ((size_t)g * FINE + i - LINES) * 64 + 4096);
    for (int part = 0; part < PARTS; part++) {
      i16 c[M][B] = {};
#pragma GCC unroll 8
      for (int j = 8 / PARTS * part; j < 8 / PARTS * (part + 1); j++) {
        b64 u[B];
        for (int b = 0; b < B; b++)
          u[b] = codes<KIND>(q + b * stride + (size_t)g * LINES * 64, fine + b * fine_stride + (size_t)g * FINE * 64, j);
        for (int m = 0; m < M; m++) {
          int32_t four;
          std::memcpy(&four, x + (size_t)m * a.k + g * GROUP + j * 4, 4);
          for (int b = 0; b < B; b++) c[m][b] = dot<WIDE>(c[m][b], u[b], four);
        }
      }
      for (int b = 0; b < B; b++) {
        const v16 scale = load_half(scales + (((size_t)b * a.groups + g) * PARTS + part) * LANES);
        v16 least{};
        if (LEAST) least = load_half(leasts + ((size_t)b * a.groups + g) * LANES);
        for (int m = 0; m < M; m++) {
          const size_t at = (size_t)(r + m) * a.groups + g;
          const int32_t* half = a.total.data() + 2 * at;
          const int32_t total = PARTS == 2 ? half[part] : half[0] + half[1];
          const float s = a.scale[at];
          i16 whole = c[m][b];
          if (WIDE) whole -= (128 - OFFSET) * total;
          if (KIND == SIX) whole -= 32 * total;
          if (KIND == COARSE) whole = 16 * whole - 249 * total;  // twice 8 u + 3.5 - 128
          f[m][b] += __builtin_convertvector(whole, v16) * (scale * (KIND == COARSE ? 0.5f * s : s));
          if (LEAST) f[m][b] += least * (s * total);
          if (KIND == COARSE) bound[m][b] += scale * a.norm[at];
        }
      }
    }
  }
  constexpr int wide = LANES * B * (KIND == COARSE ? 2 : 1);
  for (int b = 0; b < B; b++)
    for (int m = 0; m < M; m++) {
      store(out + m * wide + b * LANES, f[m][b]);
      if (KIND == COARSE) store(out + m * wide + (B + b) * LANES, bound[m][b]);
    }
}

constexpr int ROWS = 6;  // of activations in a tile: 12 sums of two blocks fit the registers

// Calls take(row, first column, results, 32 (or 16)) for the blocks of this thread and all rows.
template <int KIND, class Take>
void multiply_as(const Matrix& w, const Quantised& a, int rows, int id, int size, Take take) {
  Share mine = share((w.n / LANES + 1) / 2, id, size);
  float out[ROWS * 4 * LANES];
  for (int pair = mine.first; pair < mine.last; pair++) {
    const int block = 2 * pair, count = std::min(2, w.n / LANES - block) * LANES;
    auto go = [&](auto m, int r) {
      constexpr int M = decltype(m)::value;
      if (count == 2 * LANES) tile<KIND, M, 2>(w, block, a, r, out);
      else tile<KIND, M, 1>(w, block, a, r, out);
      for (int i = 0; i < M; i++) take(r + i, block * LANES, out + i * count * (KIND == COARSE ? 2 : 1), count);
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

template <class Take>
void multiply(const Matrix& w, const Quantised& a, int rows, int id, int size, Take take) {
  switch (w.kind) {
    case EIGHT: return multiply_as<EIGHT>(w, a, rows, id, size, take);
    case SCREENED: return multiply_as<SCREENED>(w, a, rows, id, size, take);
    case FOUR: return multiply_as<FOUR>(w, a, rows, id, size, take);
    case FIVE: return multiply_as<FIVE>(w, a, rows, id, size, take);
    default: return multiply_as<SIX>(w, a, rows, id, size, take);
  }
}

// The `top[r]` largest products of each row of activations, exact, and whatever is found on the way; -inf elsewhere.
// With u = 8 h + l, a product lies within the norm of l - 3.5 times that of the activations (Cauchy-Schwarz, group by
// group) of the one with l = 3.5 throughout, which needs five bits of eight. Blocks that cannot reach the top[r]-th
// largest product known are left out. `exact[r]` counts the products made exact. A `top` of 0 wants them all: so does
// a row where more than half the blocks remain, and with one row all rows. y float [rows, n].
struct Screen {
  std::vector<float> middle, upper;     // [rows][n / 16]: the largest of a block, as the coarse product has it, at most
  std::vector<std::atomic<int>> counts;  // [rows], blocks done
  std::vector<uint8_t> done;            // [rows][n / 16]
  std::atomic<bool> full;

  void shape(const Matrix& w, const int32_t* top, int rows) {
    const size_t blocks = w.n / LANES;
    if (done.size() < rows * blocks)
      middle.resize(rows * blocks), upper.resize(rows * blocks), done.resize(rows * blocks);
    if (counts.size() < (size_t)rows) counts = std::vector<std::atomic<int>>(rows);
    full = w.kind != SCREENED;
    for (int r = 0; r < rows; r++) {
      counts[r] = 0;
      if (top[r] <= 0 || (size_t)top[r] > blocks / 4) full = true;
    }
  }

  // Called by all threads at once, after `shape` was by one.
  void run(const Matrix& w, const Quantised& a, const int32_t* top, int rows, float* y, int32_t* exact, int id,
           Team& crew) {
    const int blocks = w.n / LANES;
    if (!full) {
      multiply_as<COARSE>(w, a, rows, id, crew.size, [&](int r, int column, const float* found, int count) {
        for (int i = 0; i < count; i += LANES) {
          typedef uint8_t b16 __attribute__((vector_size(16)));
          b16 eighths;
          std::memcpy(&eighths, w.norm + column + i, sizeof eighths);
          const v16 norm = __builtin_convertvector(eighths, v16) * (1.0001f / 8);
          const v16 coarse = load(found + i);
          const size_t at = (size_t)r * blocks + (column + i) / LANES;
          middle[at] = largest(coarse);
          upper[at] = largest(coarse + load(found + count + i) * norm);
          done[at] = 0;
          store(y + (size_t)r * w.n + column + i, all(-INFINITY));
        }
      });
      crew.between.wait();
      auto finish = [&](int r, int block) {
        tile<SCREENED, 1, 1>(w, block, a, r, y + (size_t)r * w.n + block * LANES);
        done[(size_t)r * blocks + block] = 1;
        counts[r]++;
      };
      // Each thread makes exact the `top` blocks of its own that look best,
      const Share mine = share(blocks, id, crew.size);
      std::vector<float> order;
      for (int r = 0; r < rows; r++) {
        const float* best = middle.data() + (size_t)r * blocks;
        order.assign(best + mine.first, best + mine.last);
        const int some = std::min<int>(top[r], order.size());
        if (!some) continue;
        std::nth_element(order.begin(), order.begin() + some - 1, order.end(), std::greater<float>());
        const float bar = order[some - 1];
        for (int block = mine.first, left = some; block < mine.last && left; block++)
          if (best[block] >= bar) finish(r, block), left--;
      }
      crew.between.wait();
      // which gives a least value for the top[r]-th largest; every block that may reach it follows.
      std::vector<std::vector<int>> left(rows);
      std::vector<float> known;
      for (int r = 0; r < rows; r++) {
        known.clear();
        for (int block = 0; block < blocks; block++)
          if (done[(size_t)r * blocks + block]) {
            const float* first = y + (size_t)r * w.n + block * LANES;
            known.insert(known.end(), first, first + LANES);
          }
        std::nth_element(known.begin(), known.begin() + top[r] - 1, known.end(), std::greater<float>());
        const float least = known[top[r] - 1];
        int remain = 0;
        for (int block = 0; block < blocks; block++)
          if (!done[(size_t)r * blocks + block] && !(upper[(size_t)r * blocks + block] < least)) {
            if (remain++ % crew.size == id) left[r].push_back(block);
          }
        if (remain > blocks / 2) full = true;
      }
      crew.between.wait();
      if (!full)
        for (int r = 0; r < rows; r++)
          for (int block : left[r]) finish(r, block);
    }
    if (full) {
      multiply(w, a, rows, id, crew.size, [&](int r, int column, const float* found, int count) {
        std::memcpy(y + (size_t)r * w.n + column, found, sizeof(float) * count);
      });
    }
    crew.between.wait();
    if (id == 0)
      for (int r = 0; r < rows; r++) exact[r] = full ? w.n : counts[r] * LANES;
  }
};

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

constexpr int BLOCK = 64;    // positions of the cache in a block
constexpr int QUERIES = 6;   // that share a pass over the keys

// One layer's keys [slot][G][block][D][64] and values [slot][G][block][64][D].
struct Cache { fp16 *k, *v; int32_t blocks; };

// M queries of one sequence and one head, positions rising: softmax(q k^T) v over each query's own range of keys.
template <int M>
void attend(const float* const q[M], float* const out[M], const int first[M], const int last[M], const fp16* keys,
            const fp16* values, int blocks, int dim, float* work) {
  float* sums = work;  // [M][dim]
  std::memset(sums, 0, sizeof(float) * M * dim);
  float top[M], weight[M];
  for (int m = 0; m < M; m++) top[m] = -INFINITY, weight[m] = 0;
  int from = first[0], to = last[0];
  for (int m = 1; m < M; m++) from = std::min(from, first[m]), to = std::max(to, last[m]);

  for (int number = from / BLOCK; number <= to / BLOCK; number++) {
    const fp16* k = keys + (size_t)(number % blocks) * dim * BLOCK;
    const fp16* v = values + (size_t)(number % blocks) * dim * BLOCK;
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
  Screen screen;
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

// Codes uint8 [n, k] -> a Matrix's q, and of SCREENED its fine and norm; n a multiple of 16, k of 32.
void seavlm_arrange(const uint8_t* codes, int32_t n, int32_t k, int32_t kind, uint8_t* q, uint8_t* fine, uint8_t* norm,
                    int32_t threads) {
  const int lines = lines_of(kind), bits = kind == EIGHT || kind == SCREENED ? 8 : lines;
  // The norm covers the rounding of fp32 sums too: k / 32 + 4 steps of 2^-23 of at most 128 sqrt(32) times the length.
  const double rounding = 724.1 * (k / GROUP + 4) / (1 << 23);
  team(threads).run([=](int id) {
    Share mine = share(n / LANES, id, threads);
    for (int row = mine.first * LANES; row < mine.last * LANES; row++) {
      double most = 0;
      for (int g = 0; g < k / GROUP; g++) {
        const uint8_t* u = codes + (size_t)row * k + g * GROUP;
        const size_t group = (size_t)(row / LANES) * (k / GROUP) + g;
        uint8_t* to = q + group * lines * 64 + row % LANES * 4;
        double squares = 0;
        for (int i = 0; i < 4; i++) {
          if (kind == EIGHT) {
            for (int j = 0; j < 8; j++) to[j * 64 + i] = u[4 * j + i];
            continue;
          }
          for (int j = 0; j < 4; j++) to[j * 64 + i] = u[4 * j + i] >> (bits - 4) | u[4 * j + 16 + i] >> (bits - 4) << 4;
          for (int bit = bits - 5; bit >= 0; bit--) {
            int byte = 0;
            for (int j = 0; j < 8; j++) byte |= (u[4 * j + i] >> bit & 1) << j;
            const int number = bits - 1 - bit;
            if (number < lines) to[number * 64 + i] = byte;
            else fine[(group * FINE + number - lines) * 64 + row % LANES * 4 + i] = byte;
          }
        }
        for (int i = 0; i < GROUP; i++) squares += ((u[i] & 7) - 3.5) * ((u[i] & 7) - 3.5);
        most = std::max(most, squares);
      }
      if (kind == SCREENED) norm[row] = std::ceil(8 * (std::sqrt(most) + rounding));
    }
  });
}

// float [n, k] -> codes uint8 [n, k] of eight bits, and their scale [n, k / 32]
void seavlm_round(const float* w, int32_t n, int32_t k, uint8_t* codes, fp16* scale, int32_t threads) {
  team(threads).run([=](int id) {
    Share mine = share(n, id, threads);
    for (size_t group = (size_t)mine.first * (k / GROUP); group < (size_t)mine.last * (k / GROUP); group++) {
      const float* x = w + group * GROUP;
      float most = 0;
      for (int i = 0; i < GROUP; i++) most = std::max(most, std::fabs(x[i]));
      scale[group] = to_half(most / 127.0f);
      const float step = from_half(scale[group]), inverse = step > 0 ? 1.0f / step : 0.0f;
      for (int i = 0; i < GROUP; i++)
        codes[group * GROUP + i] = 128 + std::clamp(std::lrint(x[i] * inverse), -127l, 127l);
    }
  });
}

// The matrix's rows of these ids, as numbers: float [rows, w.k].
void seavlm_rows(const Matrix* w, const int64_t* ids, int32_t rows, float* x) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < w->k; j++) x[(size_t)r * w->k + j] = weight(*w, ids[r], j);
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

// The same, but as seavlm_forward does the head: the top[r] largest of each row, and how many are exact.
void seavlm_screen(const Matrix* w, const float* x, int32_t rows, const int32_t* top, float* y, int32_t* exact,
                   int32_t threads) {
  Quantised act;
  act.shape(rows, w->k);
  Screen screen;
  screen.shape(*w, top, rows);
  Team& crew = team(threads);
  crew.run([&](int id) {
    Share mine = share(rows, id, threads);
    for (int r = mine.first; r < mine.last; r++) act.row(r, x + (size_t)r * w->k);
    crew.between.wait();
    screen.run(*w, act, top, rows, y, exact, id, crew);
  });
}

// Embeddings of R token ids, times sqrt(C): float [R, C].
void seavlm_embed(const Model* model, const int64_t* ids, int32_t rows, float* x) {
  seavlm_rows(&model->embedding, ids, rows, x);
  const float factor = std::sqrt((float)model->width);
  for (size_t i = 0; i < (size_t)rows * model->width; i++) x[i] *= factor;
}

// x float [R, C], overwritten by the last residual stream; caches one a layer; logits float [wanted, V] of the rows
// listed in `wanted`: all of them, or the top[i] largest and -inf for those that were not computed (a `top` of 0 wants
// all); exact[i] says how many were. Rows of one sequence stand together, positions rising, a picture whole.
void seavlm_forward(const Model* model, const Cache* caches, float* x, const Row* rows, int32_t R, const int32_t* wanted,
                    const int32_t* top, int32_t num_wanted, float* logits, int32_t* exact, int32_t threads) {
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
      const size_t plane = (size_t)cache.blocks * BLOCK * D;  // of one slot and KV head

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
        const int block = rows[r].position / BLOCK % cache.blocks, at = rows[r].position % BLOCK;
        for (int g = 0; g < G; g++, head += D) {
          rms_norm(head, layer.k_norm, head, D, model->eps);
          rotate(head, c, sn, D);
          const size_t place = ((size_t)rows[r].slot * G + g) * plane + (size_t)block * BLOCK * D;
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
        const size_t place = ((size_t)rows[start].slot * G + h / (H / G)) * plane;
        const fp16 *k = cache.k + place, *v = cache.v + place;
        switch (count) {
          case 1: attend<1>(q, out, first, last, k, v, cache.blocks, D, work.data()); break;
          case 2: attend<2>(q, out, first, last, k, v, cache.blocks, D, work.data()); break;
          case 3: attend<3>(q, out, first, last, k, v, cache.blocks, D, work.data()); break;
          case 4: attend<4>(q, out, first, last, k, v, cache.blocks, D, work.data()); break;
          case 5: attend<5>(q, out, first, last, k, v, cache.blocks, D, work.data()); break;
          default: attend<6>(q, out, first, last, k, v, cache.blocks, D, work.data());
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
    if (id == 0) s.act.shape(num_wanted, C), s.screen.shape(model->embedding, top, num_wanted);
    wait();
    const Share heads = share(num_wanted, id, threads);
    for (int i = heads.first; i < heads.last; i++) {
      float* normed = s.normed.data() + (size_t)i * C;
      rms_norm(x + (size_t)wanted[i] * C, model->final_norm, normed, C, model->eps);
      s.act.row(i, normed);
    }
    wait();
    s.screen.run(model->embedding, s.act, top, num_wanted, logits, exact, id, crew);
  });
}

}  // extern "C"
