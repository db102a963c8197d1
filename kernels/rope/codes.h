// Keys and values in 8 bits: a row (one token, one head) becomes codes and a scale, and codes become
// numbers again, in a vector register. paged_attention/cache.py says what they mean.
//
// Codes lie where the numbers would: 16 or 32 of them are read where those are a vector of 64 bytes.
// All codes are exact in bfloat16, so attention multiplies them as they are, and applies the scales to
// scores and weights.
#pragma once

#include <type_traits>

#include "../program/avx512.h"

namespace compress {

struct e4m3 {
  uint8_t bits;
};

// What a code type is used for, and what `numbers` leaves to the scale.
template <class C>
struct CodeRange {
  static constexpr float largest = 127.f, factor = 1.f;
};
template <>
struct CodeRange<e4m3> {
  static constexpr float largest = 448.f, factor = 256.f;
};

// 16 numbers of at most `largest`, rounded to even.
inline __m128i rounded(__m512 x, int8_t) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)); }
inline __m128i rounded(__m512 x, e4m3) {
  __m512 size = _mm512_abs_ps(x);
  __m512i bits = _mm512_castps_si512(size);
  // Up from 2^-6 three bits behind the first are kept, and the exponent's bias is 7 instead of 127;
  // below, codes are steps of 2^-9.
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff));
  __m512i code = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 20);
  code = _mm512_sub_epi32(code, _mm512_set1_epi32(120 << 3));
  __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
  __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(size, _mm512_set1_ps(512.f)));
  code = _mm512_mask_mov_epi32(code, small, steps);
  __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(x), 31);
  return _mm512_cvtepi32_epi8(_mm512_or_si512(code, _mm512_slli_epi32(sign, 7)));
}

// Codes of a row of `count` numbers, a multiple of 16, and its scale: `fixed`, or its own for 0.
// NaN and infinities make the scale NaN.
template <class C>
inline float encode(const float* x, int count, float fixed, C* codes) {
  constexpr float largest = CodeRange<C>::largest;
  __m512 most = _mm512_setzero_ps();
  __mmask16 broken = 0;
  for (int i = 0; i < count; i += LANES) {
    __m512 size = _mm512_abs_ps(load(x + i));
    broken |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, size);
  }
  if (broken) {
    std::memset(codes, 0, count);
    return NAN;
  }
  float scale = fixed ? fixed : std::max(_mm512_reduce_max_ps(most) / largest, 0x1p-126f);
  __m512 limit = _mm512_set1_ps(largest), least = _mm512_set1_ps(-largest);
  for (int i = 0; i < count; i += LANES) {
    __m512 steps = _mm512_div_ps(load(x + i), _mm512_set1_ps(scale));
    steps = _mm512_min_ps(_mm512_max_ps(steps, least), limit);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), rounded(steps, C{}));
  }
  return scale;
}

// What 16 codes stand for, over CodeRange::factor.
inline __m512 sixteen(const int8_t* at) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}
// The bits of e4m3 under those of float16, whose exponent is as wide and one more: 2^-8 of the number.
inline __m512 sixteen(const e4m3* at) {
  __m256i bits = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  bits = _mm256_and_si256(_mm256_slli_epi16(bits, 7), _mm256_set1_epi16(int16_t(0xbfff)));
  return _mm512_cvtph_ps(bits);
}

// 64 bytes of numbers of type T (bfloat16 or float32): what lies there, or as `sixteen`.
template <class T, class C>
inline __m512i numbers(const C* at) {
  if constexpr (std::is_same_v<T, C>)
    return _mm512_loadu_si512(at);
  else if constexpr (sizeof(T) == 4)
    return _mm512_castps_si512(sixteen(at));
  else
    return __m512i(_mm512_cvtne2ps_pbh(sixteen(at + LANES), sixteen(at)));
}

}  // namespace compress
