// Gemma 3's decoder on a CPU, int8 weights: one pass over any tokens of any sequences.
//
// A pass takes R rows. A row is one token: its embedding, the sequence (slot of the cache) it belongs to, its position,
// and its reach, the last position it sees (its own, or inside a picture that of the picture's last soft token). Every
// key that a row sees therefore lies in one range of positions, [first, reach], and no mask is needed.
//
//   weights      4, 5, 6 or 8 bits, fp16 scales for each 32 of a row (GGUF's blocks are kept as they are)
//   activations  int8, symmetric, an fp32 scale for each 32
//   sums         int32 within a group, fp32 between groups; norms, rotation, softmax, residual stream in fp32
//   attention    queries, keys and values int8, an fp32 scale for each of a head; weights of softmax int8, an fp32 scale
//                for each 64
//   pages        of 64 positions hold keys and values; a table for each sequence and kind of layer says which page holds
//                which 64 positions (seavlm/engine/pages.py)
//
// The same source is compiled once for each instruction set; seavlm.engine.kernels picks the library that fits.
//
// Shapes: R rows, C width, H heads, G KV heads, D head dim, F feed-forward width, V vocabulary rows.

#include "common.h"

namespace {

// --- matrices

constexpr int LANES = 16;  // rows of a matrix that are multiplied side by side
constexpr int GROUP = 32;  // columns that share a scale

// How a matrix holds the codes u of its weights. EIGHT: scale * (u - 128), u > 0. FOUR, FIVE: scale * u + least.
// SIX: scale * (u - 32), a scale for each 16 columns.
enum Kind : int32_t { EIGHT, FOUR, FIVE, SIX };

constexpr int lines_of(int kind) { return kind == EIGHT ? 8 : kind == SIX ? 6 : kind == FIVE ? 5 : 4; }

// q [n / 16][k / 32][lines][64]. Byte 4 lane + i of a line belongs to row 16 block + lane, and of a group's 32 columns
// to those 4 j + i. EIGHT: line j is the codes. Others: lines 0 to 3 hold the upper four bits, of j = line below and of
// j = line + 4 above; each line after them one bit more, of j in bit j. scale (of SIX two a group) and least
// [n / 16][k / 32][16].
struct Matrix {
  const uint8_t* q;
  const fp16 *scale, *least;
  int32_t n, k, kind;
};

inline b64 line(const uint8_t* p) { b64 v; std::memcpy(&v, p, sizeof v); return v; }
inline int32_t four_of(const int8_t* p) { int32_t n; std::memcpy(&n, p, sizeof n); return n; }

// Codes of columns 4 j to 4 j + 3 of a group, for 16 rows.
template <int KIND>
inline b64 codes(const uint8_t* q, int j) {
  if constexpr (KIND == EIGHT) return line(q + 64 * j);
  b64 v = line(q + 64 * (j % 4));
  v = j < 4 ? v & 15 : v >> 4;
  for (int i = 4; i < lines_of(KIND); i++) v = v + v + ((line(q + 64 * i) >> j) & 1);
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
  return scale * u + from_half(w.least[group * LANES + lane]);
}

// Rows of activations, quantised: row r is s[r][g] * q[r][...] in each group g of columns.
struct Quantised {
  std::vector<int8_t> q;
  std::vector<float> scale, sum;  // sum: of a group's numbers
  std::vector<int32_t> total;     // of the q of half a group
  int k = 0, groups = 0;

  void shape(int rows, int columns) {
    k = columns;
    groups = columns / GROUP;
    if (q.size() < (size_t)rows * k) q.resize((size_t)rows * k);
    const size_t all = (size_t)rows * groups;
    if (scale.size() < all) scale.resize(all), sum.resize(all), total.resize(2 * all);
  }

  void row(int r, const float* x) {
    for (int g = 0; g < groups; g++) {
      const size_t at = (size_t)r * groups + g;
      const v16 a = load(x + g * GROUP), b = load(x + g * GROUP + 16);
      const float most = largest(maximum(maximum(a, -a), maximum(b, -b))), inverse = most > 0 ? 127.0f / most : 0.0f;
      const i16 low = nearest(a * inverse), high = nearest(b * inverse);
      store_bytes(q.data() + at * GROUP, low), store_bytes(q.data() + at * GROUP + 16, high);
      total[2 * at] = total_of(low), total[2 * at + 1] = total_of(high);
      scale[at] = most / 127.0f;
      sum[at] = scale[at] * (total[2 * at] + total[2 * at + 1]);
    }
  }

  // Row r: the first columns of x, once more what rounding them left over, and the other columns.
  void row_and_rest(int r, const float* x, int n, int first) {
    std::vector<float> all(n + first);
    std::copy(x, x + first, all.data()), std::copy(x + first, x + n, all.data() + 2 * first);
    row(r, all.data());
    const size_t at = (size_t)r * k;
    for (int i = 0; i < first; i++) all[first + i] = x[i] - q[at + i] * scale[(at + i) / GROUP];
    row(r, all.data());
  }
};

// 16 columns of x [n] times a matrix [n][16].
inline v16 rotated(const float* x, const fp16* matrix, int n) {
  v16 sums[4] = {};
  for (int i = 0; i < n; i++) sums[i % 4] += x[i] * load_half(matrix + (size_t)i * LANES);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

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

// out[m][16 b + lane] += row 16 (block + b) + lane of the matrix, times row r + m of the activations from group `first`.
// q: codes of the block and those after it, as the matrix holds them, or OPEN, laid out as EIGHT's. The first turn fetches
// the next two blocks from memory; of several turns the first two, each every other group.
template <int KIND, bool OPEN, int M, int B>
__attribute__((noinline)) void tile(const Matrix& w, const uint8_t* q, int block, const Quantised& a, int first, int r,
                                    int mask, int turn, float* out) {
  constexpr bool WIDE = KIND == EIGHT, LEAST = KIND == FOUR || KIND == FIVE;
  constexpr int PARTS = KIND == SIX ? 2 : 1, LINES = OPEN ? 8 : lines_of(KIND);
  constexpr int ZERO = KIND == EIGHT ? OFFSET - 128 : KIND == SIX ? -32 : 0;  // less the code of 0
  const int groups = w.k / GROUP;
  const size_t begin = (size_t)r * a.groups + first;
  const int8_t* x = a.q.data() + begin * GROUP;
  const float *x_scale = a.scale.data() + begin, *x_sum = a.sum.data() + begin;
  const int32_t* x_total = a.total.data() + 2 * begin;
  const size_t stride = (size_t)groups * LINES * 64;  // bytes of a block
  const fp16* scales = w.scale + (size_t)block * LANES * groups * PARTS;
  const fp16* leasts = w.least + (size_t)block * LANES * groups;
  v16 f[M][B];
  for (int m = 0; m < M; m++)
    for (int b = 0; b < B; b++) f[m][b] = load(out + (m * B + b) * LANES);
  for (int g = 0; g < groups; g++) {
    auto total = [&](int m, int part) {
      const int32_t* half = x_total + ((size_t)m * a.groups + g) * 2;
      return PARTS == 2 ? half[part] : half[0] + half[1];
    };
    if ((g & mask) == turn)
      for (int b = 0; b < B; b++)
        for (int i = 0; i < LINES; i++) __builtin_prefetch(q + b * stride + ((size_t)g * LINES + i) * 64 + 2 * stride, 0, 2);
    for (int part = 0; part < PARTS; part++) {
      i16 c[M][B];
      for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) c[m][b] = ZERO * total(m, part) - i16{};
#pragma GCC unroll 8
      for (int j = 8 / PARTS * part; j < 8 / PARTS * (part + 1); j++) {
        b64 u[B];
        for (int b = 0; b < B; b++)
          u[b] = codes<OPEN ? EIGHT : KIND>(q + b * stride + (size_t)g * LINES * 64, j);
        for (int m = 0; m < M; m++) {
          const int32_t four = four_of(x + (size_t)m * a.k + g * GROUP + j * 4);
          for (int b = 0; b < B; b++) c[m][b] = dot<WIDE>(c[m][b], u[b], four);
        }
      }
      for (int b = 0; b < B; b++) {
        const v16 scale = load_half(scales + (((size_t)b * groups + g) * PARTS + part) * LANES);
        v16 least{};
        if (LEAST) least = load_half(leasts + ((size_t)b * groups + g) * LANES);
        for (int m = 0; m < M; m++) {
          f[m][b] += __builtin_convertvector(c[m][b], v16) * (scale * x_scale[(size_t)m * a.groups + g]);
          if (LEAST) f[m][b] += least * x_sum[(size_t)m * a.groups + g];
        }
      }
    }
  }
  for (int b = 0; b < B; b++)
    for (int m = 0; m < M; m++) store(out + (m * B + b) * LANES, f[m][b]);
}

constexpr int ROWS = 6;  // of activations in a tile: 12 sums of two blocks fit the registers

using Tile = void (*)(const Matrix&, const uint8_t*, int, const Quantised&, int, int, int, int, float*);

template <int KIND, bool OPEN, int B>
Tile tile_of(int m) {
  constexpr Tile of[] = {tile<KIND, OPEN, 1, B>, tile<KIND, OPEN, 2, B>, tile<KIND, OPEN, 3, B>,
                         tile<KIND, OPEN, 4, B>, tile<KIND, OPEN, 5, B>, tile<KIND, OPEN, 6, B>};
  return of[m - 1];
}

template <int KIND>
Tile tile_of(bool open, int b, int m) {
  if (b == 1) return tile_of<KIND, false, 1>(m);
  if constexpr (KIND != EIGHT)
    if (open) return tile_of<KIND, true, 2>(m);
  return tile_of<KIND, false, 2>(m);
}

// Two blocks of codes, laid out as EIGHT's.
template <int KIND>
void open_codes(const uint8_t* q, int groups, b64* to) {
  for (int g = 0; g < 2 * groups; g++, q += lines_of(KIND) * 64) {
    for (int i = 0; i < lines_of(KIND); i++) __builtin_prefetch(q + i * 64 + 1024);
    for (int j = 0; j < 8; j++) to[g * 8 + j] = codes<KIND>(q, j);
  }
}

#define OF_KIND(kind, function, ...)                    \
  (kind == EIGHT  ? function<EIGHT>(__VA_ARGS__)        \
   : kind == FOUR ? function<FOUR>(__VA_ARGS__)         \
   : kind == FIVE ? function<FIVE>(__VA_ARGS__)         \
                  : function<SIX>(__VA_ARGS__))

// A matrix, or the parts of one that stand side by side, times the activations. Calls take(row, first column, results,
// 32 (or 16)) for the blocks of this thread and all rows.
template <class Take>
void multiply(const Matrix* parts, int num_parts, const Quantised& a, int rows, int id, int size, Take take) {
  if (!rows) return;
  const int n = parts->n, tiles = (rows + ROWS - 1) / ROWS, step = (rows + tiles - 1) / tiles;
  const Share mine = share((n / LANES + 1) / 2, id, size);
  std::vector<b64> opened(tiles > 2 ? 2 * a.groups * 8 : 0);  // many rows: what unpacking costs is paid once
  float out[ROWS * 2 * LANES];
  for (int pair = mine.first; pair < mine.last; pair++) {
    const int block = 2 * pair, count = std::min(2, n / LANES - block);
    const bool open = tiles > 2 && count == 2;
    auto codes_of = [&](const Matrix& w) { return w.q + (size_t)block * (w.k / GROUP) * lines_of(w.kind) * 64; };
    if (open) {
      b64* to = opened.data();
      for (const Matrix* w = parts; w < parts + num_parts; to += 2 * w->k / GROUP * 8, w++)
        if (w->kind != EIGHT) OF_KIND(w->kind, open_codes, codes_of(*w), w->k / GROUP, to);
    }
    for (int r = 0, turn = 0; r < rows; r += step, turn++) {
      const int m = std::min(step, rows - r);
      std::memset(out, 0, sizeof(float) * m * count * LANES);
      int group = 0;
      for (const Matrix* w = parts; w < parts + num_parts; w++) {
        const uint8_t* q = open && w->kind != EIGHT ? (const uint8_t*)(opened.data() + 2 * group * 8) : codes_of(*w);
        OF_KIND(w->kind, tile_of, open, count, m)(*w, q, block, a, group, r, tiles > 1, turn, out);
        group += w->k / GROUP;
      }
      for (int i = 0; i < m; i++) take(r + i, block * LANES, out + i * count * LANES, count * LANES);
    }
  }
}

// --- norms and rotation

// y = x / rms(x) * weight, weight being 1 + the checkpoint's. x and y may be the same.
void rms_norm(const float* x, const float* weight, float* y, int n, float eps) {
  v16 squares{};
  for (int i = 0; i < n; i += 16) squares += load(x + i) * load(x + i);
  float scale = 1.0f / std::sqrt(total_of(squares) / n + eps);
  for (int i = 0; i < n; i += 16) store(y + i, load(x + i) * scale * load(weight + i));
}

void rotate(float* x, const float* cos, const float* sin, int dim) {
  for (int i = 0; i < dim / 2; i += 16) {
    v16 a = load(x + i), b = load(x + dim / 2 + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + dim / 2 + i, b * c + a * s);
  }
}

// x[dim] times a Hadamard matrix (of the largest power of two in dim, block by block). Two vectors rotated so have the
// product they had, times that power, but no outliers, which int8 could not bear (Ashkboos et al., QuaRot, 2024).
void mix(float* x, int dim) {
  const int size = dim & -dim;
  for (float* end = x + dim; x < end; x += size) {
    for (int half = size / 2; half >= 16; half /= 2)
      for (int i = 0; i < size; i += 2 * half)
        for (int j = i; j < i + half; j += 16) {
          const v16 a = load(x + j), b = load(x + j + half);
          store(x + j, a + b), store(x + j + half, a - b);
        }
    for (int i = 0; i < size; i += 16) {
      v16 v = load(x + i);
      v = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) + ((COUNT & 8) != 0 ? -v : v);
      v = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + ((COUNT & 4) != 0 ? -v : v);
      v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + ((COUNT & 2) != 0 ? -v : v);
      v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + ((COUNT & 1) != 0 ? -v : v);
      store(x + i, v);
    }
  }
}

// --- attention

constexpr int BLOCK = 64;   // positions in a page of the cache
constexpr int QUERIES = 6;  // multiplied side by side
constexpr int SPAN = 16;    // positions whose queries share a pass over the pages

// A page of one layer holds for each KV head 64 keys, 64 values, and their scales; scale * (u - 128) is the number.
//   keys u [D / 4][64][4], values u [64 / 4][D][4], scales of the keys [64], of the values [64]
struct Pages {
  uint8_t* base;
  size_t head, page;  // bytes

  Pages(uint8_t* base, int kv_heads, int dim) : base(base), head(2 * BLOCK * (dim + sizeof(float))), page(kv_heads * head) {}
  uint8_t* at(int number, int kv_head) const { return base + number * page + kv_head * head; }
};

// Rounds x[n] to whole numbers of at most 127; returns their scale.
inline float round_to(const float* x, int n, int8_t* q, int32_t& total) {
  v16 top{};
  for (int i = 0; i < n; i += 16) top = maximum(top, maximum(load(x + i), -load(x + i)));
  const float most = largest(top), inverse = most > 0 ? 127.0f / most : 0.0f;
  i16 all{};
  for (int i = 0; i < n; i += 16) {
    const i16 whole = nearest(load(x + i) * inverse);
    store_bytes(q + i, whole);
    all += whole;
  }
  total = total_of(all);
  return most / 127.0f;
}

// Key and value of one position, into its page.
void keep(uint8_t* page, int at, const float* key, const float* value, int dim, int8_t* work) {
  float* scales = (float*)(page + 2 * BLOCK * dim);
  int32_t total;
  scales[at] = round_to(key, dim, work, total);
  for (int d = 0; d < dim; d += 4)
    for (int i = 0; i < 4; i++) page[(size_t)d * BLOCK + at * 4 + i] = work[d + i] + 128;
  page += BLOCK * dim;
  scales[BLOCK + at] = round_to(value, dim, work, total);
  for (int d = 0; d < dim; d++) page[((size_t)(at / 4) * dim + d) * 4 + at % 4] = work[d] + 128;
}

// One position and head: which positions it sees, and what it has gathered so far from the pages before.
struct Query {
  const int8_t* q;
  float scale;
  int32_t total;  // of q
  int first, last;
  float* out;  // [D]: sum of weight * value
  float top, weight;
};

// M queries go on over one page: softmax(q k^T) v as it is done in pieces, each row rescaled when its maximum rises.
template <int M>
void visit(Query* query, const uint8_t* page, int number, int dim) {
  const uint8_t *keys = page, *values = page + BLOCK * dim;
  const float* scales = (const float*)(page + 2 * BLOCK * dim);
  i16 c[M][4];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < 4; i++) c[m][i] = (OFFSET - 128) * query[m].total - i16{};
  for (int d = 0; d < dim; d += 4) {
    b64 key[4];
    for (int i = 0; i < 4; i++) key[i] = line(keys + (size_t)d * BLOCK + 64 * i);
    for (int m = 0; m < M; m++) {
      const int32_t four = four_of(query[m].q + d);
      for (int i = 0; i < 4; i++) c[m][i] = dot<true>(c[m][i], key[i], four);
    }
  }
  int8_t chance[M][BLOCK];
  int32_t start[M];
  float scale[M];
  int from = BLOCK, to = -1;
  for (int m = 0; m < M; m++) {
    const int low = std::max(0, query[m].first - number * BLOCK);
    const int high = std::min(BLOCK - 1, query[m].last - number * BLOCK);
    from = std::min(from, low), to = std::max(to, high);
    v16 score[4], most = all(-INFINITY);
    for (int i = 0; i < 4; i++) {
      const i16 place = COUNT + 16 * i;
      score[i] = __builtin_convertvector(c[m][i], v16) * (load(scales + 16 * i) * query[m].scale);
      score[i] = (place >= low) & (place <= high) ? score[i] : all(-INFINITY);
      most = maximum(most, score[i]);
    }
    scale[m] = start[m] = 0;
    if (low > high) {
      std::memset(chance[m], 0, BLOCK);
      continue;
    }
    const float top = std::max(query[m].top, largest(most)), shrink = std::exp(query[m].top - top);
    v16 added{};
    most = v16{};
    for (int i = 0; i < 4; i++) {
      const v16 e = score[i] == -INFINITY ? v16{} : exponential(score[i] - top);
      added += e;
      score[i] = e > 0.0f ? e * load(scales + BLOCK + 16 * i) : v16{};  // not written yet: any scale, even NaN
      most = maximum(most, score[i]);
    }
    query[m].weight = query[m].weight * shrink + total_of(added);
    query[m].top = top;
    if (shrink != 1.0f)
      for (int d = 0; d < dim; d += 16) store(query[m].out + d, load(query[m].out + d) * shrink);
    const float limit = largest(most), inverse = limit > 0 ? 127.0f / limit : 0.0f;
    i16 whole{};
    for (int i = 0; i < 4; i++) {
      const i16 n = nearest(score[i] * inverse);
      store_bytes(chance[m] + 16 * i, n);
      whole += n;
    }
    scale[m] = limit / 127.0f;
    start[m] = (OFFSET - 128) * total_of(whole);
  }
  for (int d = 0; d < dim; d += 64) {
    const int lanes = std::min(4, (dim - d) / 16);
    i16 c[M][4];
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) c[m][i] = start[m] - i16{};
    for (int j = from / 4; j <= to / 4; j++) {
      b64 value[4];
      for (int i = 0; i < 4; i++) value[i] = i < lanes ? line(values + ((size_t)j * dim + d + 16 * i) * 4) : b64{};
      for (int m = 0; m < M; m++) {
        const int32_t four = four_of(chance[m] + 4 * j);
        for (int i = 0; i < 4; i++) c[m][i] = dot<true>(c[m][i], value[i], four);
      }
    }
    for (int m = 0; m < M; m++)
      for (int i = 0; i < lanes; i++) {
        float* out = query[m].out + d + 16 * i;
        store(out, load(out) + __builtin_convertvector(c[m][i], v16) * scale[m]);
      }
  }
}

// Queries of one sequence that share a KV head, over all pages that any of them sees.
void attend(Query* query, int count, const Pages& pages, int kv_head, const int32_t* table, int dim) {
  int from = query[0].first, to = query[0].last;
  for (int m = 0; m < count; m++) {
    from = std::min(from, query[m].first), to = std::max(to, query[m].last);
    query[m].top = -INFINITY, query[m].weight = 0;
    std::memset(query[m].out, 0, sizeof(float) * dim);
  }
  for (int number = from / BLOCK; number <= to / BLOCK; number++) {
    const uint8_t* page = pages.at(table[number], kv_head);
    for (int m = 0; m < count; m += QUERIES) switch (std::min(QUERIES, count - m)) {
        case 1: visit<1>(query + m, page, number, dim); break;
        case 2: visit<2>(query + m, page, number, dim); break;
        case 3: visit<3>(query + m, page, number, dim); break;
        case 4: visit<4>(query + m, page, number, dim); break;
        case 5: visit<5>(query + m, page, number, dim); break;
        default: visit<6>(query + m, page, number, dim);
      }
  }
  for (int m = 0; m < count; m++)
    for (int d = 0; d < dim; d += 16) store(query[m].out + d, load(query[m].out + d) / query[m].weight);
}

struct Row { int32_t slot, position, reach; };

struct Layer {
  Matrix qkv[3];  // one, or of several kinds one under the other; the unused have no rows
  Matrix o, gate_up, down;  // gate_up: blocks of 16 rows of gate and up in turn
  const float *input_norm, *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm, *q_norm, *k_norm;
  int32_t local;
};

struct Model {
  const Layer* layers;
  int32_t num_layers, width, heads, kv_heads, head_dim, hidden, window;
  float eps, attention_scale;
  const float* final_norm;
  const float *global_frequencies, *local_frequencies;  // [D / 2]
  Matrix embedding;
  // The head: the embedding, or, with a rotation fp16 [C / 16][C][16] of its columns, parts of falling importance. Of
  // the first part's columns, which hold nearly all of the activations' length, what int8 left over is multiplied too.
  Matrix head[4];
  int32_t num_head;
  const fp16* rotation;
};

struct Scratch {
  std::vector<float> qkv, mixed, y, hidden, normed, cos[2], sin[2];
  Quantised act;
  std::vector<int8_t> q;     // [R][H][D]
  std::vector<Query> query;  // [R][H]
  std::vector<int> spans;    // first rows of runs of positions; the last entry is R
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

// Codes uint8 [n, k] -> a Matrix's q; n a multiple of 16, k of 32.
void seavlm_arrange(const uint8_t* codes, int32_t n, int32_t k, int32_t kind, uint8_t* q, int32_t threads) {
  const int lines = lines_of(kind), bits = lines;
  team(threads).run([=](int id) {
    Share mine = share(n / LANES, id, threads);
    for (int row = mine.first * LANES; row < mine.last * LANES; row++)
      for (int g = 0; g < k / GROUP; g++) {
        const uint8_t* u = codes + (size_t)row * k + g * GROUP;
        uint8_t* to = q + ((size_t)(row / LANES) * (k / GROUP) + g) * lines * 64 + row % LANES * 4;
        for (int i = 0; i < 4; i++) {
          if (kind == EIGHT) {
            for (int j = 0; j < 8; j++) to[j * 64 + i] = u[4 * j + i];
            continue;
          }
          for (int j = 0; j < 4; j++) to[j * 64 + i] = u[4 * j + i] >> (bits - 4) | u[4 * j + 16 + i] >> (bits - 4) << 4;
          for (int bit = bits - 5; bit >= 0; bit--) {
            int byte = 0;
            for (int j = 0; j < 8; j++) byte |= (u[4 * j + i] >> bit & 1) << j;
            to[(bits - 1 - bit) * 64 + i] = byte;
          }
        }
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
    multiply(w, 1, act, rows, id, threads, [&](int r, int column, const float* found, int count) {
      std::memcpy(y + (size_t)r * w->n + column, found, sizeof(float) * count);
    });
  });
}

// Embeddings of R token ids, times sqrt(C): float [R, C].
void seavlm_embed(const Model* model, const int64_t* ids, int32_t rows, float* x) {
  seavlm_rows(&model->embedding, ids, rows, x);
  const float factor = std::sqrt((float)model->width);
  for (size_t i = 0; i < (size_t)rows * model->width; i++) x[i] *= factor;
}

// x float [R, C], overwritten by the last residual stream; caches: the pages of each layer; tables: of global and of local
// layers, [slots][blocks], the page of each 64 positions of each sequence; logits float [wanted, V] of the rows listed in
// `wanted`. Rows of one sequence stand together, positions rising, a picture whole.
void seavlm_forward(const Model* model, uint8_t* const* caches, const int32_t* global_table, const int32_t* local_table,
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
  s.q.resize(std::max(s.q.size(), (size_t)R * H * D)), s.query.resize(std::max(s.query.size(), (size_t)R * H));
  s.spans.clear();
  for (int r = 0; r < R; r++)
    if (r == 0 || r - s.spans.back() == SPAN || rows[r].slot != rows[r - 1].slot ||
        rows[r].position != rows[r - 1].position + 1)
      s.spans.push_back(r);
  const int num_spans = s.spans.size();
  s.spans.push_back(R);
  int parts = 1;  // of the heads that share a KV head, when there is not enough to do for all threads
  while (parts < H / G && (H / G % parts || (num_spans * G * parts % threads && num_spans * G * parts < 4 * threads)))
    parts++;

  Team& crew = team(threads);
  crew.run([&](int id) {
    const Share mine = share(R, id, threads);
    auto wait = [&] { crew.between.wait(); };
    auto matrix_into = [&](const Matrix& w, float* y) {
      multiply(&w, 1, s.act, R, id, threads, [&](int r, int column, const float* found, int count) {
        std::memcpy(y + (size_t)r * w.n + column, found, sizeof(float) * count);
      });
    };
    std::vector<int8_t> work(D);
    std::vector<Query> queries;

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
      const Pages pages(caches[l], G, D);
      const int32_t* tables = layer.local ? local_table : global_table;

      // Norm, then queries, keys and values.
      if (id == 0) s.act.shape(R, C);
      wait();
      for (int r = mine.first; r < mine.last; r++) {
        float* normed = s.normed.data() + (size_t)r * C;
        rms_norm(x + (size_t)r * C, layer.input_norm, normed, C, model->eps);
        s.act.row(r, normed);
      }
      wait();
      int offset = 0;
      for (const Matrix& part : layer.qkv) {
        if (part.n == 0) break;
        multiply(&part, 1, s.act, R, id, threads, [&](int r, int column, const float* found, int count) {
          std::memcpy(s.qkv.data() + (size_t)r * QKV + offset + column, found, sizeof(float) * count);
        });
        offset += part.n;
      }
      wait();

      // Norms and rotation of q and k; k and v into the cache.
      const float *cos = s.cos[layer.local ? 1 : 0].data(), *sin = s.sin[layer.local ? 1 : 0].data();
      for (int r = mine.first; r < mine.last; r++) {
        const float *c = cos + (size_t)r * (D / 2), *sn = sin + (size_t)r * (D / 2);
        float* head = s.qkv.data() + (size_t)r * QKV;
        for (int h = 0; h < H; h++, head += D) {
          rms_norm(head, layer.q_norm, head, D, model->eps);
          rotate(head, c, sn, D);
          const size_t place = (size_t)r * H + h;
          int8_t* q = s.q.data() + place * D;
          mix(head, D);
          int32_t total;
          const float scale = round_to(head, D, q, total) * model->attention_scale / (D & -D);
          const int first = layer.local ? std::max(0, rows[r].position - model->window + 1) : 0;
          s.query[place] = {q, scale, total, first, rows[r].reach, s.mixed.data() + place * D, 0, 0};
        }
        const int32_t page = tables[(size_t)rows[r].slot * blocks + rows[r].position / BLOCK];
        for (int g = 0; g < G; g++, head += D) {
          rms_norm(head, layer.k_norm, head, D, model->eps);
          rotate(head, c, sn, D);
          mix(head, D);
          keep(pages.at(page, g), rows[r].position % BLOCK, head, head + (size_t)G * D, D, work.data());
        }
      }
      wait();

      // Attention: the queries of some positions and the heads that share a KV head, or some of these.
      const int heads = H / G / parts;
      for (int unit = id; unit < num_spans * G * parts; unit += threads) {
        const int span = unit / (G * parts), kv_head = unit / parts % G, head = unit % (G * parts) * heads;
        queries.clear();
        for (int r = s.spans[span]; r < s.spans[span + 1]; r++)
          for (int h = 0; h < heads; h++) queries.push_back(s.query[(size_t)r * H + head + h]);
        const int32_t* table = tables + (size_t)rows[s.spans[span]].slot * blocks;
        attend(queries.data(), queries.size(), pages, kv_head, table, D);
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
      multiply(&layer.gate_up, 1, s.act, R, id, threads, [&](int r, int column, const float* found, int) {
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
    const int exact = model->rotation ? model->head[0].k : 0;  // columns that are multiplied twice
    if (id == 0) s.act.shape(num_wanted, C + exact);
    wait();
    const Share heads = share(num_wanted, id, threads);
    for (int i = heads.first; i < heads.last; i++) {
      float* normed = s.normed.data() + (size_t)i * C;
      rms_norm(x + (size_t)wanted[i] * C, model->final_norm, normed, C, model->eps);
      if (!model->rotation) s.act.row(i, normed);
    }
    wait();
    if (model->rotation) {
      const Share blocks = share(C / LANES, id, threads);
      for (int i = 0; i < num_wanted; i++)
        for (int b = blocks.first; b < blocks.last; b++)
          store(s.y.data() + (size_t)i * C + b * LANES,
                rotated(s.normed.data() + (size_t)i * C, model->rotation + (size_t)b * C * LANES, C));
      wait();
      for (int i = heads.first; i < heads.last; i++) s.act.row_and_rest(i, s.y.data() + (size_t)i * C, C, exact);
      wait();
    }
    multiply(model->head, model->num_head, s.act, num_wanted, id, threads,
             [&](int r, int column, const float* found, int count) {
               std::memcpy(logits + (size_t)r * model->embedding.n + column, found, sizeof(float) * count);
             });
  });
}

}  // extern "C"
