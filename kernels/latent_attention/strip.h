// A thread's own memory for attention on latents: a strip of positions as keys and as values, the
// weights of some rows, and their sums. avx512.h says what for.
#pragma once

#include "../rope/avx512.h"

namespace compress {

constexpr int WIDEST_RANK = 2048;  // dimensions of a latent

// 16 vectors of 16 words: rows become columns.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {  // quarters of 128 bits
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

inline __m512 multiply_words(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
inline __m512 multiply_words(__m512 sum, __m512i a, __m512i b, bf16) {
  return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
}

// 64 bytes of numbers of type T, those beyond the first `dims` (a multiple of 16) zero.
template <class T, class C>
inline __m512i numbers_of(const C* at, int dims) {
  if constexpr (std::is_same_v<T, C>)
    return _mm512_maskz_loadu_epi32(first_lanes(dims * int(sizeof(T)) / 4), at);
  else if constexpr (sizeof(T) == 4)
    return _mm512_castps_si512(sixteen(at));
  else
    return __m512i(_mm512_cvtne2ps_pbh(dims > LANES ? sixteen(at + LANES) : _mm512_setzero_ps(),
                                       sixteen(at)));
}

template <class T>
struct LatentStrip {
  static constexpr int TOKENS = 2 * BLOCK;
  static constexpr int BESIDE = 4 / int(sizeof(T));  // numbers of a word
  int words, vectors;
  std::vector<__m512i> keys;    // [2][words of a latent and a key], 16 positions a vector
  std::vector<__m512i> values;  // [TOKENS / BESIDE][vectors], 16 dimensions of a latent a vector
  __m512 latent_scale[2], key_scale[2];  // of codes, a position a lane

  LatentStrip(int rank, int rope)
      : words((rank + rope) / BESIDE),
        vectors(rank / LANES),
        keys(2 * words),
        values(TOKENS / BESIDE * vectors) {}

  // The first `count` rows of a block of the cache, zeros behind them: as keys from dimension `at`
  // on, and as values where they are latents.
  template <class C>
  void put(const C* from, int count, int width, int b, int at, bool latents) {
    for (int d = 0; d < width; d += LANES * BESIDE) {
      __m512i row[BLOCK];
      if (count == BLOCK)
        for (int t = 0; t < BLOCK; t++) row[t] = numbers_of<T>(from + t * width + d, width - d);
      else
        for (int t = 0; t < BLOCK; t++)
          row[t] = t < count ? numbers_of<T>(from + t * width + d, width - d)
                             : _mm512_setzero_si512();
      if (latents) put_values(row, b, d, width - d);
      transpose(row);
      __m512i* to = &keys[b * words + (at + d) / BESIDE];
      if (width - d >= LANES * BESIDE)
        for (int i = 0; i < LANES; i++) to[i] = row[i];
      else
        for (int i = 0; i < (width - d) / BESIDE; i++) to[i] = row[i];
    }
  }

  void put_scales(const float* of_latents, const float* of_keys, int b, __mmask16 there,
                  float factor) {
    __m512 by = _mm512_set1_ps(factor);
    latent_scale[b] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, of_latents), by);
    key_scale[b] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, of_keys), by);
  }

  // Of ROWS queries, in words: their products with words [from, to) of all positions.
  template <int ROWS>
  void multiply(const int32_t* const* query, int from, int to, __m512 (*sum)[2]) const {
    for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int w = from; w < to; w++) {
      __m512i key[2] = {keys[w], keys[words + w]};
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        __m512i factor = _mm512_set1_epi32(query[i][w]);
        sum[i][0] = multiply_words(sum[i][0], factor, key[0], T{});
        sum[i][1] = multiply_words(sum[i][1], factor, key[1], T{});
      }
    }
  }

 private:
  void put_values(const __m512i* row, int b, int d, int dims) {
    __m512i* to = &values[b * BLOCK / BESIDE * vectors + d / LANES];
    if constexpr (sizeof(T) == 4) {
      for (int t = 0; t < BLOCK; t++) to[t * vectors] = row[t];
    } else {  // two positions beside each other
      __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39,
                                     7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (int t = 0; t < BLOCK; t += 2) {
        to[t / 2 * vectors] = _mm512_permutex2var_epi16(row[t], low, row[t + 1]);
        if (dims > LANES)
          to[t / 2 * vectors + 1] = _mm512_permutex2var_epi16(row[t], high, row[t + 1]);
      }
    }
  }
};

// For each row: the sum of e^(score - maximum) c, and of e^(score - maximum).
struct LatentSums {
  int width;
  std::vector<__m512> sums;
  std::vector<float> below, maximum;

  LatentSums(int rows, int width)
      : width(width), sums(rows * width / LANES), below(rows), maximum(rows) {}

  float* sum_of(int row) { return reinterpret_cast<float*>(sums.data()) + int64_t(row) * width; }

  void set(int row, const float* sum, float more_below, float more_maximum) {
    std::memcpy(sum_of(row), sum, width * sizeof(float));
    below[row] = more_below, maximum[row] = more_maximum;
  }

  void add(int row, const float* more, float more_below, float more_maximum) {
    float highest = std::max(maximum[row], more_maximum);
    __m512 mine = exponential(_mm512_set1_ps(maximum[row] - highest));
    __m512 theirs = exponential(_mm512_set1_ps(more_maximum - highest));
    float* sum = sum_of(row);
    for (int i = 0; i < width; i += LANES)
      store(0xffff, sum + i,
            _mm512_fmadd_ps(load(more + i), theirs, _mm512_mul_ps(load(sum + i), mine)));
    below[row] = below[row] * _mm512_cvtss_f32(mine) + more_below * _mm512_cvtss_f32(theirs);
    maximum[row] = highest;
  }

  void multiply(int row, __m512 by) {
    float* sum = sum_of(row);
    for (int i = 0; i < width; i += LANES)
      store(0xffff, sum + i, _mm512_mul_ps(load(sum + i), by));
  }

  void write(int row, float* to) {
    __m512 factor = _mm512_set1_ps(1.f / below[row]);
    const float* sum = sum_of(row);
    for (int i = 0; i < width; i += LANES)
      store(0xffff, to + i, _mm512_mul_ps(load(sum + i), factor));
  }
};

// What a thread keeps while rows go through a part of the context.
template <class T>
struct LatentMemory {
  LatentStrip<T> strip;
  LatentSums part, all;
  std::vector<__m512> lanes;    // of each row: its sum below the line, a position of 16 a lane
  std::vector<__m512> weights;  // of type T, [rows][LatentStrip::TOKENS]

  LatentMemory(int rows, int rank, int rope)
      : strip(rank, rope),
        part(rows, rank),
        all(rows, rank),
        lanes(rows),
        weights(rows * LatentStrip<T>::TOKENS * sizeof(T) / sizeof(__m512)) {}

  T* weights_of(int row) {
    return reinterpret_cast<T*>(weights.data()) + int64_t(row) * LatentStrip<T>::TOKENS;
  }

  void clear(int rows) {
    std::fill_n(part.sums.data(), rows * part.width / LANES, _mm512_setzero_ps());
    std::fill_n(part.maximum.data(), rows, -INFINITY);
    std::fill_n(lanes.data(), rows, _mm512_setzero_ps());
  }

  // A row's sums over e^highest, which is at least its maximum so far.
  void raise(int row, float highest) {
    if (!(highest > part.maximum[row])) return;
    __m512 shrink = exponential(_mm512_set1_ps(part.maximum[row] - highest));
    part.multiply(row, shrink);
    lanes[row] = _mm512_mul_ps(lanes[row], shrink);
    part.maximum[row] = highest;
  }

  void finish(int rows) {
    for (int row = 0; row < rows; row++) part.below[row] = _mm512_reduce_add_ps(lanes[row]);
  }

  // Add the strip's first `steps` words of positions, times their weights, to ROWS rows.
  template <int ROWS>
  void add_values(int row, int steps) {
    int v = 0;
    for (; v + 4 <= strip.vectors; v += 4) add_some<ROWS, 4>(row, v, steps);
    for (; v < strip.vectors; v++) add_some<ROWS, 1>(row, v, steps);
  }

 private:
  template <int ROWS, int VECTORS>
  void add_some(int row, int v, int steps) {
    __m512 sum[ROWS][VECTORS];
    const int32_t* weight[ROWS];
    for (int i = 0; i < ROWS; i++) {
      weight[i] = reinterpret_cast<const int32_t*>(weights_of(row + i));
      for (int j = 0; j < VECTORS; j++) sum[i][j] = load(part.sum_of(row + i) + (v + j) * LANES);
    }
    for (int s = 0; s < steps; s++) {
      __m512i value[VECTORS];
      for (int j = 0; j < VECTORS; j++) value[j] = strip.values[s * strip.vectors + v + j];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) {
        __m512i factor = _mm512_set1_epi32(weight[i][s]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++)
          sum[i][j] = multiply_words(sum[i][j], factor, value[j], T{});
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < VECTORS; j++)
        store(0xffff, part.sum_of(row + i) + (v + j) * LANES, sum[i][j]);
  }
};

}  // namespace compress
