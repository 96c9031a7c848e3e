// The weighted mean of two rows of bf16 in fp32, rounded once to bf16; and how much was rounded, in one pass.
// Every bit of the mean is that of a product, a product and a sum, each rounded: no fused multiply-add.

#pragma GCC optimize("-ffp-contract=off")
#pragma STDC FP_CONTRACT OFF

#include "common.h"

#include <unistd.h>

namespace {

inline v16 widen(const uint16_t* p) {
  typedef uint16_t u16 __attribute__((vector_size(32)));
  typedef uint32_t u32 __attribute__((vector_size(64)));
  u16 half;
  std::memcpy(&half, p, sizeof half);
  return (v16)(__builtin_convertvector(half, u32) << 16);
}

bool read_all(int file, void* to, int64_t bytes, int64_t at) {
  for (char* p = (char*)to; bytes;) {
    const ssize_t done = pread(file, p, bytes, at);
    if (done <= 0) return false;
    p += done, at += done, bytes -= done;
  }
  return true;
}

bool write_all(int file, const void* from, int64_t bytes, int64_t at) {
  for (const char* p = (const char*)from; bytes;) {
    const ssize_t done = pwrite(file, p, bytes, at);
    if (done <= 0) return false;
    p += done, at += done, bytes -= done;
  }
  return true;
}

inline v16 magnitude(v16 v) { return (v16)((i16)v & 0x7fffffff); }

}  // namespace

extern "C" {

// figures: the sum of |rounding|, its largest, the sum of |a - b|. A NaN or infinity in the mean makes the first NaN.
void seavlm_mean(const uint16_t* a, const uint16_t* b, float wa, float wb, uint16_t* out, int64_t n, double* figures) {
  typedef uint16_t u16 __attribute__((vector_size(32)));
  typedef uint32_t u32 __attribute__((vector_size(64)));
  const v16 first = all(wa), second = all(wb);
  v16 largest = {};
  double rounded = 0, apart = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = std::min(n, begin + 4096);
    v16 rounding = {}, distance = {};
    for (int64_t i = begin; i < end; i += 16) {
      uint16_t left[16] = {}, right[16] = {}, made[16];
      const uint16_t *p = a + i, *q = b + i;
      const int64_t count = std::min<int64_t>(16, end - i);
      if (count < 16) {
        std::memcpy(left, p, 2 * count), std::memcpy(right, q, 2 * count);
        p = left, q = right;
      }
      const v16 x = widen(p), y = widen(q);
      const v16 total = x * first + y * second;
      const u32 bits = (u32)total;
      const u32 upper = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
      const u16 half = __builtin_convertvector(upper, u16);
      const v16 lost = magnitude((v16)(upper << 16) - total);
      rounding += lost;
      distance += magnitude(x - y);
      largest = lost > largest ? lost : largest;
      if (count == 16) {
        std::memcpy(out + i, &half, sizeof half);
      } else {
        std::memcpy(made, &half, sizeof half), std::memcpy(out + i, made, 2 * count);
      }
    }
    for (int k = 0; k < 16; k++) rounded += rounding[k], apart += distance[k];
  }
  float most = 0;
  for (int k = 0; k < 16; k++) most = std::max(most, largest[k]);
  figures[0] = rounded, figures[1] = most, figures[2] = apart;
}

// seavlm_mean of n numbers of file a, from byte at_a on, and of file b; `out` holds them and file o gets them, from
// byte at_o on. In blocks that a core's cache holds, so that only files and cache are between the three. False for
// an error of any file; then what was written is not to be used.
bool seavlm_mean_of_files(
    int a, int64_t at_a, int b, int64_t at_b, float wa, float wb, uint16_t* out, int64_t n, int o, int64_t at_o,
    double* figures) {
  constexpr int64_t block = 1 << 16;
  thread_local std::vector<uint16_t> left(block), right(block);
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = std::min(block, n - i), bytes = 2 * count;
    if (!read_all(a, left.data(), bytes, at_a + 2 * i) || !read_all(b, right.data(), bytes, at_b + 2 * i)) return false;
    double found[3];
    seavlm_mean(left.data(), right.data(), wa, wb, out + i, count, found);
    figures[0] += found[0], figures[1] = std::max(figures[1], found[1]), figures[2] += found[2];
    if (!write_all(o, out + i, bytes, at_o + 2 * i)) return false;
  }
  return true;
}

}  // extern "C"
