// y = x Wᵀ + bias where x is rounded to 8 bits token by token; reference.py has the arithmetic.
//
//   x    [M, K] bfloat16 or float32
//   W    [N, K] int8 or float8_e4m3fn in pairs of tiles of 32 rows, padded with zeros, one scale a
//        row
//   y    [M, N] float32; with `silu_mul`, [M, N / 2] in x's dtype: silu(gate) * up, where tiles of
//        gate and up alternate
//
// First every token is rounded, then its codes are multiplied:
//   VNNI   vpdpbusd, unsigned times signed in int32, which is exact. Weights are the unsigned side,
//          code + 128, so that codes of x are read by a broadcast; 128 times the sum of a token's
//          codes is taken off at the end.
//   FP8    codes of both become bfloat16, which holds them exactly, and are summed in float32 by
//          vdpbf16ps. Weights become so by a table in two registers (vpermi2b).
//   BF16   the same with weights in bfloat16 already: many rows of FP8, and int8 or fp8 codes on a
//          processor without the instruction above.
// The order of these sums is the same for every M, so rows do not depend on each other.
//
// Columns are padded to fours. Layout of a tile, of two vectors of 16 rows each:
//   VNNI   [K / 4][2][16][4] uint8
//   FP8    [K / 4][2][4][2][4][2] uint8: of 4 rows the columns 0 and 1, then 2 and 3, and so on, as
//          vpunpcklbw and vpunpckhbw take the bytes of a lane
//   BF16   [K / 2][2][16][2]
#pragma once

#include "../lowbit_matmul/avx512.h"

namespace compress {

constexpr int MOST_FOUND = 32;   // as in lowbit_matmul/weight.py
constexpr int ROUNDED_ROWS = 6;  // of a block: with two tiles, sums and operands are registers

enum CodeKind { CODES_VNNI = 0, CODES_FP8 = 1, CODES_BF16 = 2 };

// What is known of a token after rounding; the values of the stored outlier columns follow.
struct RoundedToken {
  float scale;
  int32_t sum, found;  // of its codes; elements that exceed the threshold
  int32_t index[MOST_FOUND];
  float value[MOST_FOUND];

  const float* outliers() const { return reinterpret_cast<const float*>(this + 1); }
  float* outliers() { return reinterpret_cast<float*>(this + 1); }
};

#ifdef __AVX512VNNI__
struct Vnni : Stream {
  static constexpr int ELEMENTS = 1;  // words of x, for one vector of weights
  static __m512i element(__m512i raw, int) { return raw; }
  static __m512i add(__m512i sum, __m512i x, __m512i weight) {
    return _mm512_dpbusd_epi32(sum, weight, x);
  }
  static __m512 total(__m512i sum, int32_t of_x) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(128 * of_x)));
  }
  static __m512 column(const uint8_t* tile, int k, int v) {
    __m512i raw = fetch(tile, k / 4, v);
    __m512i code = _mm512_and_si512(_mm512_srlv_epi32(raw, _mm512_set1_epi32(8 * (k % 4))),
                                    _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128)));
  }
};
#endif

struct Bf16Codes : Bf16 {
  static __m512i add(__m512i sum, __m512i x, __m512i weight) {
    return _mm512_castps_si512(multiply_add<Bf16>(_mm512_castsi512_ps(sum), x, weight));
  }
  static __m512 total(__m512i sum, int32_t) { return _mm512_castsi512_ps(sum); }
  static __m512 half(__m512i pairs, int k) {
    return _mm512_castsi512_ps(k % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))
                                     : _mm512_slli_epi32(pairs, 16));
  }
  static __m512 column(const uint8_t* tile, int k, int v) { return half(fetch(tile, k / 2, v), k); }
};

#ifdef __AVX512VBMI__
// The magnitudes of float8_e4m3fn in bfloat16: low bytes of all 128, then high bytes.
struct Fp8Table {
  alignas(64) uint8_t bytes[256] = {};
  constexpr Fp8Table() {
    for (int code = 0; code < 128; code++) {
      int bits = ((code >> 3) + 120) << 7 | (code & 7) << 4;  // 7 and 127 are the exponents' biases
      if (code == 127) bits = 0x7fc0;                         // NaN
      if (code < 8) bits = code < 1 ? 0 : 118 << 7;           // multiples of 2^-9
      if (code > 1 && code < 4) bits = 119 << 7 | (code - 2) << 6;
      if (code > 3 && code < 8) bits = 120 << 7 | (code - 4) << 5;
      bytes[code] = uint8_t(bits);
      bytes[128 + code] = uint8_t(bits >> 8);
    }
  }
};
constexpr Fp8Table FP8_TABLE;

struct Fp8 : Bf16Codes {
  static constexpr int ELEMENTS = 2;
  static __m512i element(__m512i raw, int i) {
    __m512i low = _mm512_permutex2var_epi8(table(0), raw, table(1));
    __m512i high = _mm512_permutex2var_epi8(table(2), raw, table(3));
    // the top bit of a code is its sign, as it is in bfloat16
    high = _mm512_ternarylogic_epi32(high, raw, _mm512_set1_epi8(char(0x80)), 0xf8);
    return i == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high);
  }
  static __m512 column(const uint8_t* tile, int k, int v) {
    return half(element(fetch(tile, k / 4, v), k / 2 % 2), k);
  }
  static __m512i table(int part) { return _mm512_load_si512(FP8_TABLE.bytes + 64 * part); }
};
#endif

struct RoundingLinearArguments {
  int32_t kind, fp8, scale_kind, n, k, outliers;  // scale_kind: of the outliers' weights
  int32_t silu_mul, over_rows, in_float;  // in_float: x is float32
  float largest, threshold;      // no |x| is at or above a threshold of NaN
  const uint8_t* weight;
  const float *scale, *bias;     // [pairs * 64] in the tiles' order; bias may be null
  const uint16_t* rounded;       // a bit for each column, 0 for stored outliers; null for all
  const int64_t* outlier_index;  // [outliers]
  const uint8_t* outlier_weight; // [pairs][outliers][64]
  int64_t* surplus;              // of all layers
  const void* x;
  uint32_t* codes;               // room for x as [blocks of rows][words][rows]
  uint32_t* tokens;              // room for a RoundedToken and its outliers each
  void* y;                       // null: batch.logits
};

struct RoundingLinear : Operation, RoundingLinearArguments {
  using Arguments = RoundingLinearArguments;
  int columns, words, pairs, token_words;  // pairs of tiles
  std::vector<std::vector<uint8_t>> decoded;  // a thread's tiles in bfloat16

  explicit RoundingLinear(const Arguments& a) : Arguments(a) {
    columns = (k + 3) / 4 * 4;
    words = kind == CODES_VNNI ? columns / 4 : columns / 2;
    pairs = silu_mul ? (n / 2 + TILE - 1) / TILE : (n + 2 * TILE - 1) / (2 * TILE);
    token_words = int(sizeof(RoundedToken) / 4) + outliers;
  }

  void prepare(int threads) override {
    if (kind != CODES_FP8) return;
    decoded.resize(threads);
    for (auto& room : decoded) room.resize(2 * int64_t(words) * 128);
  }

  int rows(const Batch& batch) const {
    return int(over_rows ? batch.rows_count : batch.tokens_count);
  }
  int phases() const override { return 2; }
  bool needed(const Batch& batch, Worker, int) const override { return rows(batch) > 0; }
  void run(const Batch& batch, Worker worker, int phase) override {
    int m = rows(batch);
    if (phase == 0) {
      for (int row = worker.begin(m); row < worker.end(m); row++)
        in_float ? round<float>(row, m) : round<bf16>(row, m);
      return;
    }
    switch (kind) {
#ifdef __AVX512VNNI__
      case CODES_VNNI: return multiply<Vnni>(batch, m, worker);
#endif
#ifdef __AVX512VBMI__
      case CODES_FP8: return multiply<Fp8>(batch, m, worker);
#endif
      default: return multiply<Bf16Codes>(batch, m, worker);
    }
  }

 private:
  // Rows are cut into blocks of about one size: a small rest would be slow.
  static int rows_of_block(int m) {
    int blocks = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS;
    return (m + blocks - 1) / blocks;
  }

  RoundedToken& token(int row) const {
    return *reinterpret_cast<RoundedToken*>(tokens + int64_t(row) * token_words);
  }

  __mmask16 taken(int at) const {
    return first_lanes(k - at) & (rounded ? __mmask16(rounded[at / LANES]) : __mmask16(0xffff));
  }

  // One token: its scale, its codes, and what is not rounded.
  template <class X>
  void round(int row, int m) {
    const X* from = static_cast<const X*>(x) + int64_t(row) * k;
    RoundedToken& to = token(row);
    find_scale(from, to);
    int size = rows_of_block(m), first = row / size * size, count = std::min(size, m - first);
    uint32_t* code = codes + int64_t(first) * words + (row - first);
    const __m512 scale_of = _mm512_set1_ps(to.scale);
    __m512i sum = _mm512_setzero_si512();
    for (int at = 0; at < columns; at += LANES) {
      __mmask16 here = taken(at);
      __m512 ratio = _mm512_maskz_div_ps(here, load(here, from + at), scale_of);
      __m512 value = fp8 ? to_fp8(ratio) : to_int8(ratio);
      for (int i = 0; i < to.found; i++)
        if (to.index[i] / LANES == at / LANES)
          value = _mm512_maskz_mov_ps(__mmask16(~(1u << (to.index[i] % LANES))), value);
      alignas(32) uint32_t packed[8];
      if (kind == CODES_VNNI) {
        __m512i whole = _mm512_cvtps_epi32(value);
        sum = _mm512_add_epi32(sum, whole);
        _mm_store_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(whole));
      } else {
        _mm256_store_si256(reinterpret_cast<__m256i*>(packed), __m256i(_mm512_cvtneps_pbh(value)));
      }
      int of_lanes = kind == CODES_VNNI ? LANES / 4 : LANES / 2, word = at / LANES * of_lanes;
      for (int i = 0; i < of_lanes && word + i < words; i++) code[int64_t(word + i) * count] = packed[i];
    }
    to.sum = _mm512_reduce_add_epi32(sum);
    for (int j = 0; j < outliers; j++) to.outliers()[j] = number(from[outlier_index[j]]);
  }

  template <class X>
  void find_scale(const X* from, RoundedToken& to) {
    const __m512 sign = _mm512_set1_ps(-0.f), least = _mm512_set1_ps(threshold);
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    int64_t over = 0;
    to.found = 0;
    for (int at = 0; at < k; at += LANES) {
      __mmask16 here = taken(at);
      __m512 value = load(here, from + at), size = _mm512_andnot_ps(sign, value);
      nan |= _mm512_mask_cmp_ps_mask(here, value, value, _CMP_UNORD_Q);
      unsigned exceeding = _mm512_mask_cmp_ps_mask(here, size, least, _CMP_GE_OQ);
      for (; exceeding; exceeding &= exceeding - 1) {
        int lane = __builtin_ctz(exceeding);
        if (to.found == MOST_FOUND) {
          over++;
          continue;
        }
        to.index[to.found] = at + lane;
        to.value[to.found++] = number(from[at + lane]);
        here &= __mmask16(~(1u << lane));
      }
      most = _mm512_mask_max_ps(most, here, most, size);
    }
    to.scale = _mm512_reduce_max_ps(most) / largest;
    if (to.scale == 0) to.scale = 1;
    if (nan) to.scale = NAN;
    if (over) __atomic_fetch_add(surplus, over, __ATOMIC_RELAXED);
  }

  static float number(float value) { return value; }
  static float number(bf16 value) { return to_float(value); }

  static __m512 to_int8(__m512 ratio) {
    __m512 whole = _mm512_roundscale_ps(ratio, 0x08);
    return _mm512_min_ps(_mm512_max_ps(whole, _mm512_set1_ps(-128.f)), _mm512_set1_ps(127.f));
  }

  // To 4 bits of significand, or to multiples of 2^-9 where that is coarser; halves to even.
  static __m512 to_fp8(__m512 ratio) {
    const __m512 sign = _mm512_set1_ps(-0.f);
    __m512 size = _mm512_min_ps(_mm512_andnot_ps(sign, ratio), _mm512_set1_ps(448.f));
    __m512i bits = _mm512_castps_si512(size);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32((1 << 19) - 1)));
    __m512 normal = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(~((1 << 20) - 1))));
    const __m512 magic = _mm512_set1_ps(16384.f);  // 2^-9 is its last bit
    __m512 small = _mm512_sub_ps(_mm512_add_ps(size, magic), magic);
    __mmask16 below = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    return _mm512_or_ps(_mm512_mask_mov_ps(normal, below, small), _mm512_and_ps(sign, ratio));
  }

  int64_t tile_bytes() const { return int64_t(columns) * TILE * (kind == CODES_BF16 ? 2 : 1); }

  template <class Weight>
  void multiply(const Batch& batch, int m, Worker worker) {
    for (int pair = worker.begin(pairs); pair < worker.end(pairs); pair++) {
      const uint8_t* from = weight + 2 * pair * tile_bytes();
      const uint8_t* weights[2] = {from, from + tile_bytes()};
      if (m <= 2 * ROUNDED_ROWS || Weight::ELEMENTS == 1) {
        multiply_rows<Weight>(batch, m, pair, weights, 2 * tile_bytes());
      } else {
        for (int t = 0; t < 2; t++)
          weights[t] = decode<Weight>(weights[t], decoded[worker.index].data(), t);
        multiply_rows<Bf16Codes>(batch, m, pair, weights, 0);
      }
    }
  }

  // For more than two blocks of rows a tile's codes become bfloat16 once.
  template <class Weight>
  const uint8_t* decode(const uint8_t* from, uint8_t* room, int t) const {
    uint8_t* to = room + int64_t(t) * words * 128;
    for (int e = 0; e < words; e += Weight::ELEMENTS)
      for (int v = 0; v < 2; v++) {
        __m512i raw = Weight::fetch(from, e / Weight::ELEMENTS, v);
        for (int i = 0; i < Weight::ELEMENTS; i++)
          _mm512_storeu_si512(to + ((e + i) * 2 + v) * 64, Weight::element(raw, i));
      }
    return to;
  }

  // `ahead`: bytes to the tiles after these, which a lone block of rows asks for
  template <class Weight>
  void multiply_rows(const Batch& batch, int m, int pair, const uint8_t* const* weights,
                     int64_t ahead) const {
    alignas(64) float out[ROUNDED_ROWS * 2 * TILE];
    int size = rows_of_block(m);
    for (int first = 0; first < m; first += size) {
      int rows = std::min(size, m - first);
      block_of<Weight, ROUNDED_ROWS>(rows, weights, codes + int64_t(first) * words,
                                     m > size ? 0 : ahead, out);
      for (int r = 0; r < rows; r++) {
        scale_row<Weight>(out + r * 2 * TILE, token(first + r), pair, weights);
        put(batch, first + r, pair, out + r * 2 * TILE);
      }
    }
  }

  template <class Weight, int COUNT>
  void block_of(int count, const uint8_t* const* weights, const uint32_t* rows, int64_t ahead,
                float* out) const {
    if (count == COUNT) return block<Weight, COUNT>(weights, rows, ahead, out);
    if constexpr (COUNT > 1)
      block_of<Weight, COUNT - 1>(count, weights, rows, ahead, out);
  }

  // Sums of COUNT rows by two tiles, int32 or float32 as Weight has them, into out [COUNT][64].
  template <class Weight, int COUNT>
  void block(const uint8_t* const* weights, const uint32_t* rows, int64_t ahead, float* out) const {
    constexpr int VECTORS = 4;
    __m512i sum[COUNT][VECTORS];
    for (auto& row : sum)
      for (auto& value : row) value = _mm512_setzero_si512();
    for (int e = 0; e < words; e += Weight::ELEMENTS) {
      __m512i raw[VECTORS];
      for (int v = 0; v < VECTORS; v++) {
        raw[v] = Weight::fetch(weights[v / 2], e / Weight::ELEMENTS, v % 2);
        if (ahead) Weight::prefetch(weights[v / 2] + ahead, e / Weight::ELEMENTS, v % 2);
      }
#pragma GCC unroll 2
      for (int i = 0; i < Weight::ELEMENTS; i++) {
        __m512i w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) w[v] = Weight::element(raw[v], i);
#pragma GCC unroll 6
        for (int r = 0; r < COUNT; r++) {
          __m512i value = _mm512_set1_epi32(int(rows[(e + i) * COUNT + r]));
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) sum[r][v] = Weight::add(sum[r][v], value, w[v]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        _mm512_storeu_si512(out + (r * VECTORS + v) * LANES, sum[r][v]);
  }

  // A row's sums [64] become its part of y, without bias.
  template <class Weight>
  void scale_row(float* row, const RoundedToken& of, int pair, const uint8_t* const* weights) const {
    __m512 total[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      total[v] = Weight::total(_mm512_loadu_si512(row + v * LANES), of.sum);
      total[v] = _mm512_mul_ps(total[v], _mm512_set1_ps(of.scale));
      for (int i = 0; i < of.found; i++)
        total[v] = _mm512_fmadd_ps(_mm512_set1_ps(of.value[i]),
                                   Weight::column(weights[v / 2], of.index[i], v % 2), total[v]);
      total[v] = _mm512_mul_ps(total[v], load(scale + (pair * 4 + v) * LANES));
    }
    for (int j = 0; j < outliers; j++) {
      __m512 value = _mm512_set1_ps(of.outliers()[j]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        int64_t at = (int64_t(pair) * outliers + j) * 2 * TILE + v * LANES;
        total[v] = _mm512_fmadd_ps(value, load_number(scale_kind, outlier_weight, at), total[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_storeu_ps(row + v * LANES, total[v]);
  }

  // One row of two tiles.
  void put(const Batch& batch, int row, int pair, const float* total) const {
    __m512 value[4];
    for (int v = 0; v < 4; v++) {
      value[v] = load(total + v * LANES);
      if (bias) value[v] = _mm512_add_ps(value[v], load(bias + (pair * 4 + v) * LANES));
    }
    if (!silu_mul) {
      float* to = (y ? static_cast<float*>(y) : batch.logits) + int64_t(row) * n;
      for (int v = 0; v < 4; v++) {
        int at = (pair * 4 + v) * LANES;
        store(first_lanes(n - at), to + at, value[v]);
      }
      return;
    }
    for (int v = 0; v < 2; v++) {
      int at = (pair * 2 + v) * LANES, width = n / 2;
      __m512 result = silu_times(value[v], value[2 + v]);
      __mmask16 here = first_lanes(width - at);
      if (in_float)
        store(here, static_cast<float*>(y) + int64_t(row) * width + at, result);
      else
        store(here, static_cast<bf16*>(y) + int64_t(row) * width + at, result);
    }
  }
};

}  // namespace compress
