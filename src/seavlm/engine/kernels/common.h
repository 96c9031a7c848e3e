// What the kernels share: sixteen floats at a time, threads that wait for each other.

#pragma once

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
typedef uint8_t b64 __attribute__((vector_size(64)));
typedef uint16_t fp16;

constexpr i16 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline v16 load(const float* p) { v16 v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, v16 v) { std::memcpy(p, &v, sizeof v); }
inline v16 all(float x) { return x - v16{}; }

// Lane i meets lane i + 8, then + 4, + 2 and + 1.
template <class Vector, class Merge>
inline auto fold(Vector v, Merge merge) {
  v = merge(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = merge(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = merge(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return merge(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))[0];
}

inline v16 maximum(v16 a, v16 b) { return a > b ? a : b; }

inline float largest(v16 v) { return fold(v, maximum); }
template <class Vector>
inline auto total_of(Vector v) { return fold(v, [](Vector a, Vector b) { return a + b; }); }

// To the nearest whole number.
inline i16 nearest(v16 v) {
#if defined(__AVX512F__)
  return (i16)_mm512_cvtps_epi32((__m512)v);
#else
  return __builtin_convertvector(v + (v < 0.0f ? all(-0.5f) : all(0.5f)), i16);
#endif
}

inline void store_bytes(int8_t* p, i16 v) {
  typedef int8_t b16 __attribute__((vector_size(16)));
  const b16 bytes = __builtin_convertvector(v, b16);
  std::memcpy(p, &bytes, sizeof bytes);
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
  i16 n = nearest(y);
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

}  // namespace
