// Shared by the kernels: vectors of 16 lanes, bfloat16, and integers rounded up.

#pragma once

#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

typedef uint16_t bfloat16;  // its bits

INLINE int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }
INLINE int64_t round_up(int64_t x, int64_t step) { return ceil_div(x, step) * step; }

INLINE Floats widened(Halves bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }
INLINE Halves rounded(Floats value) {  // to nearest, ties to even; a NaN stays a NaN
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
  Words bits = (Words)value, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest, Halves);
#endif
}

#ifdef __AVX512BF16__
INLINE bfloat16 rounded(float x) { return bfloat16(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0)); }
// The first `count` lanes, or all of them if there are fewer.
INLINE __mmask16 lanes_of(int64_t count) { return __mmask16(count >= LANES ? 0xffff : (1u << count) - 1); }
INLINE void prefetch(const void* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }
#endif

}  // namespace
