// y = x Wᵀ + bias for weights in 4 or 8 bits (with scales), bfloat16 or float32.
//
//   x    [M, K] bfloat16, or float32 with a float32 weight
//   W    [N, K] in tiles of 32 rows (columns of the product), padded with zeros
//   y    [M, N] float32; with `silu_mul`, [M, N / 2] in x's dtype: silu(gate) * up, where tiles of
//        gate and up alternate
//
// The reduction over K is cut into chunks (a group of the grid, at most 128 wide). Inside a chunk
// codes, which bfloat16 holds exactly, are multiplied with x and summed in float32 by vdpbf16ps;
// then  y += scale * sum + shift * sum(x),  in float32. No weight is ever rounded to 16 bits.
// The order of these sums is the same for every M, so rows do not depend on each other.
//
// Layout of a tile, "element" meaning 32 bits of x (two bfloat16 of one row, or one float32):
//   4 bits    [K / 8][32] uint32: nibble i of the low half is the code + 8 of k = 8 s + 2 i, of the
//             high half that of k = 8 s + 2 i + 1
//   8 bits    [K / 4][2][2][16][2] int8: two vectors of 16 columns, two elements each, k inside
//   bfloat16  [K / 2][32][2],  float32 [K][32]
//   scales    [chunks][32] in float16, bfloat16 or float32, whichever is the least that is exact
#pragma once

#include <algorithm>
#include <type_traits>

#include "../program/avx512.h"

namespace compress {

constexpr int TILE = 2 * LANES;
constexpr int MAX_ROWS = 8;      // of a block: sums and what decoding needs are registers
constexpr int DIRECT_ROWS = 8;   // that are read where they are: packing them takes a barrier
constexpr int MAX_DECODED = 12;  // of a block where the weights are decoded already
constexpr int DECODE_FIRST = 64;  // rows from which a tile is decoded once, not for each block

enum WeightKind { INT4 = 0, INT8 = 1, BF16 = 2, FP32 = 3 };
enum ScaleKind { SCALE_FP16 = 0, SCALE_BF16 = 1, SCALE_FP32 = 2, NO_SCALE = 3 };

// 16 numbers of a ScaleKind.
inline __m512 load_number(int kind, const uint8_t* from, int64_t at) {
  if (kind == SCALE_FP32) return load(reinterpret_cast<const float*>(from) + at);
  if (kind == SCALE_BF16) return load(reinterpret_cast<const bf16*>(from) + at);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * at)));
}

// silu(g) = g / (1 + e^-g) through e^-|g|, which cannot overflow; times up.
inline __m512 silu_times(__m512 g, __m512 up) {
  __m512 e = exponential(_mm512_or_ps(g, _mm512_set1_ps(-0.f)));
  __m512 one = _mm512_set1_ps(1.f);
  __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
  __m512 above = _mm512_mask_mov_ps(one, negative, e);
  return _mm512_mul_ps(_mm512_div_ps(_mm512_mul_ps(g, above), _mm512_add_ps(one, e)), up);
}

struct Stream {  // a tile's vectors in the order in which they are read
  static void prefetch(const uint8_t* tile, int step, int vector) {
    _mm_prefetch(tile + (step * 2 + vector) * 64, _MM_HINT_T0);
  }
  static __m512i fetch(const uint8_t* tile, int step, int vector) {
    return _mm512_loadu_si512(tile + (step * 2 + vector) * 64);
  }
};

struct Int4 : Stream {
  static constexpr int ELEMENTS = 4;  // of x, for one vector of weights
  static __m512i element(__m512i raw, int i) {
    // vpermw looks at 5 bits of each 16-bit lane: 4 of this code and one of the next, hence twice.
    const __m512i codes = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, short(0xbf80), short(0xc000),
        short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0), short(0xc100),
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, short(0xbf80), short(0xc000),
        short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0), short(0xc100));
    return _mm512_permutexvar_epi16(i == 0 ? raw : _mm512_srli_epi16(raw, 4 * i), codes);
  }
};

struct Int8 : Stream {
  static constexpr int ELEMENTS = 2;
  static __m512i element(__m512i raw, int i) {
    __m256i pair = i == 0 ? _mm512_castsi512_si256(raw) : _mm512_extracti64x4_epi64(raw, 1);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(pair)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(pair, 1)));
    return __m512i(_mm512_cvtne2ps_pbh(high, low));
  }
};

struct Bf16 : Stream {
  static constexpr int ELEMENTS = 1;
  static __m512i element(__m512i raw, int) { return raw; }
};

struct Fp32 : Bf16 {};

template <class Weight>
inline __m512 multiply_add(__m512 sum, __m512i x, __m512i weight) {
  return _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(weight));
}
template <>
inline __m512 multiply_add<Fp32>(__m512 sum, __m512i x, __m512i weight) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weight), sum);
}

struct LinearArguments {
  int32_t kind, scale_kind, n, k, chunk;  // chunk in columns of W
  int32_t silu_mul, over_rows, most_rows; // over_rows: x is of batch.rows, the wanted tokens
  const uint8_t *weight, *scale, *shift;  // shift may be null
  const float* bias;                      // [tiles * 32] in the tiles' order, or null
  const uint32_t* x;                      // [M, elements]
  void* y;                                // null: batch.logits
};

struct Linear : Operation, LinearArguments {
  using Arguments = LinearArguments;
  int elements, chunk_elements, chunks, tiles;
  std::vector<uint32_t> packed;  // x as [blocks of rows][elements][rows], for many rows
  std::vector<float> sums;       // sum of x by row and chunk, for shifts
  std::vector<std::vector<uint8_t>> decoded;  // a thread's tiles in bfloat16

  explicit Linear(const Arguments& a) : Arguments(a) {
    elements = kind == FP32 ? k : k / 2;
    chunk_elements = kind == FP32 ? chunk : chunk / 2;
    chunks = (elements + chunk_elements - 1) / chunk_elements;
    tiles = silu_mul ? 2 * ((n / 2 + TILE - 1) / TILE) : (n + TILE - 1) / TILE;
    packed.resize(int64_t(most_rows) * elements);
    if (shift) sums.resize(int64_t(most_rows) * chunks);
  }

  void prepare(int threads) override {
    if (kind != INT4 && kind != INT8) return;
    decoded.resize(threads);
    for (auto& room : decoded) room.resize(2 * int64_t(elements) * 128);
  }

  int rows(const Batch& batch) const {
    return int(over_rows ? batch.rows_count : batch.tokens_count);
  }
  int phases() const override { return 2; }
  bool needed(const Batch& batch, Worker, int phase) const override {
    int m = rows(batch);  // 0: a chunk in the middle of a prompt wants no logits
    return phase == 0 ? m > DIRECT_ROWS || (m > 0 && shift) : m > 0;
  }
  void run(const Batch& batch, Worker worker, int phase) override {
    int m = rows(batch);
    if (phase == 0) return pack(m, worker);
    switch (kind) {
      case INT4: return multiply<Int4>(batch, m, worker);
      case INT8: return multiply<Int8>(batch, m, worker);
      case BF16: return multiply<Bf16>(batch, m, worker);
      default: return multiply<Fp32>(batch, m, worker);
    }
  }

 private:
  // Blocks of rows beside each other, so that a block is one stream.
  void pack(int m, Worker worker) {
    int size = rows_of_block(m), blocks = (m + size - 1) / size;
    if (shift)
      for (int row = worker.begin(m); row < worker.end(m); row++)
        for (int c = 0; c < chunks; c++) sums[row * chunks + c] = sum_of(row, c);
    if (m <= DIRECT_ROWS) return;
    for (int block = worker.begin(blocks); block < worker.end(blocks); block++) {
      int first = block * size, count = std::min(size, m - first);
      uint32_t* to = packed.data() + int64_t(first) * elements;
      for (int e = 0; e < elements; e++)
        for (int r = 0; r < count; r++) to[e * count + r] = x[int64_t(first + r) * elements + e];
    }
  }

  // Rows are cut into blocks of about one size: a small rest would be slow.
  static int rows_of_block(int m) {
    int most = m < DECODE_FIRST ? MAX_ROWS : MAX_DECODED;
    int blocks = (m + most - 1) / most;
    return (m + blocks - 1) / blocks;
  }

  float sum_of(int row, int c) const {
    const uint32_t* from = x + int64_t(row) * elements;
    int end = std::min(elements, (c + 1) * chunk_elements);
    float sum = 0;
    for (int e = c * chunk_elements; e < end; e++) {
      float value;
      if (kind == FP32) {
        std::memcpy(&value, from + e, 4);
        sum += value;
      } else {
        sum += to_float(bf16(from[e])) + to_float(bf16(from[e] >> 16));
      }
    }
    return sum;
  }

  int64_t tile_bytes() const {
    return int64_t(elements) * 128 / (kind == INT4 ? 4 : kind == INT8 ? 2 : 1);
  }

  __m512 scale_at(const uint8_t* from, int tile, int c, int vector) const {
    if (scale_kind == NO_SCALE) return _mm512_set1_ps(1.f);
    return load_number(scale_kind, from, (int64_t(tile) * chunks + c) * TILE + vector * LANES);
  }

  // COUNT rows by TILES tiles, into out [COUNT][TILES * 32]; rows are packed, or as in x if DIRECT.
  template <class Weight, int COUNT, int TILES, bool DIRECT>
  void block(const uint8_t* const* weights, const uint32_t* rows, int first_row, int tile,
             float* out) const {
    constexpr int VECTORS = 2 * TILES;
    const int64_t ahead = TILES * tile_bytes();  // a tile is too short a stream for the hardware
    __m512 total[COUNT][VECTORS];
    for (auto& row : total)
      for (auto& value : row) value = _mm512_setzero_ps();
    for (int c = 0; c < chunks; c++) {
      __m512 sum[COUNT][VECTORS];
      for (auto& row : sum)
        for (auto& value : row) value = _mm512_setzero_ps();
      int end = std::min(elements, (c + 1) * chunk_elements);
      for (int e = c * chunk_elements; e < end; e += Weight::ELEMENTS) {
        __m512i raw[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
          raw[v] = Weight::fetch(weights[v / 2], e / Weight::ELEMENTS, v % 2);
          if (Weight::ELEMENTS > 1 || COUNT <= 4)
            Weight::prefetch(weights[v / 2] + ahead, e / Weight::ELEMENTS, v % 2);
        }
#pragma GCC unroll 4
        for (int i = 0; i < Weight::ELEMENTS; i++) {
          __m512i w[VECTORS];
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) w[v] = Weight::element(raw[v], i);
#pragma GCC unroll 12
          for (int r = 0; r < COUNT; r++) {
            int at = DIRECT ? r * elements + e + i : (e + i) * COUNT + r;
            __m512i value = _mm512_set1_epi32(int(rows[at]));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
              sum[r][v] = multiply_add<Weight>(sum[r][v], value, w[v]);
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        __m512 factor = scale_at(scale, tile + v / 2, c, v % 2);
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; r++) total[r][v] = _mm512_fmadd_ps(factor, sum[r][v], total[r][v]);
      }
      if (!shift) continue;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        __m512 offset = scale_at(shift, tile + v / 2, c, v % 2);
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; r++) {
          __m512 of_x = _mm512_set1_ps(sums[int64_t(first_row + r) * chunks + c]);
          total[r][v] = _mm512_fmadd_ps(offset, of_x, total[r][v]);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        _mm512_storeu_ps(out + (r * VECTORS + v) * LANES, total[r][v]);
  }

  template <class Weight, int TILES, bool DIRECT, int COUNT>
  void block_of(int count, const uint8_t* const* weights, const uint32_t* rows, int first_row,
                int tile, float* out) const {
    if (count == COUNT)
      return block<Weight, COUNT, TILES, DIRECT>(weights, rows, first_row, tile, out);
    if constexpr (COUNT > 1)
      block_of<Weight, TILES, DIRECT, COUNT - 1>(count, weights, rows, first_row, tile, out);
  }

  template <class Weight>
  void multiply(const Batch& batch, int m, Worker worker) {
    // Two tiles at a time: gate and up belong together, and a lone row has sums to overlap.
    int together = silu_mul ? 2 : 1;
    int begin = together * worker.begin(tiles / together);
    int end = together * worker.end(tiles / together);
    for (int tile = begin; tile < end; tile += 2) {
      int count = std::min(2, end - tile);
      const uint8_t* weights[2];
      for (int t = 0; t < 2; t++) weights[t] = weight + (tile + t) * tile_bytes();
      if (m < DECODE_FIRST || Weight::ELEMENTS == 1) {
        multiply_tiles<Weight>(batch, m, tile, count, weights);
      } else {
        for (int t = 0; t < count; t++)
          weights[t] = decode<Weight>(weights[t], decoded[worker.index].data(), t);
        multiply_tiles<Bf16>(batch, m, tile, count, weights);
      }
    }
  }

  // For many rows a tile's codes become bfloat16 once.
  template <class Weight>
  const uint8_t* decode(const uint8_t* from, uint8_t* room, int t) const {
    uint8_t* to = room + int64_t(t) * elements * 128;
    for (int e = 0; e < elements; e += Weight::ELEMENTS)
      for (int v = 0; v < 2; v++) {
        __m512i raw = Weight::fetch(from, e / Weight::ELEMENTS, v);
#pragma GCC unroll 4
        for (int i = 0; i < Weight::ELEMENTS; i++)
          _mm512_storeu_si512(to + ((e + i) * 2 + v) * 64, Weight::element(raw, i));
      }
    return to;
  }

  template <class Weight>
  void multiply_tiles(const Batch& batch, int m, int tile, int count,
                      const uint8_t* const* weights) const {
    if (m <= DIRECT_ROWS)
      return multiply_rows<Weight, true, DIRECT_ROWS>(batch, 0, m, x, tile, count, weights);
    int size = rows_of_block(m);
    for (int first = 0; first < m; first += size)
      multiply_rows<Weight, false, MAX_DECODED>(batch, first, std::min(size, m - first),
                                                packed.data() + int64_t(first) * elements, tile,
                                                count, weights);
  }

  // A block of at most MOST rows.
  template <class Weight, bool DIRECT, int MOST>
  void multiply_rows(const Batch& batch, int first, int rows, const uint32_t* from, int tile,
                     int count, const uint8_t* const* weights) const {
    alignas(64) float out[2 * MAX_DECODED * TILE];
    if (count == 2 && rows <= 2) {
      block_of<Weight, 2, DIRECT, 2>(rows, weights, from, first, tile, out);
      return put(batch, first, rows, tile, 2, out, 2 * TILE, TILE);
    }
    for (int t = 0; t < count; t++)
      block_of<Weight, 1, DIRECT, MOST>(rows, weights + t, from, first, tile + t,
                                        out + t * rows * TILE);
    put(batch, first, rows, tile, count, out, TILE, rows * TILE);
  }

  // Totals of `count` tiles, `next_row` and `next_tile` floats apart.
  void put(const Batch& batch, int first, int rows, int tile, int count, const float* total,
           int next_row, int next_tile) const {
    float* to = y ? static_cast<float*>(y) : batch.logits;
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < 2; v++) {
        __m512 value[2];
        for (int t = 0; t < count; t++) {
          value[t] = load(total + r * next_row + t * next_tile + v * LANES);
          if (bias) value[t] = _mm512_add_ps(value[t], load(bias + (tile + t) * TILE + v * LANES));
        }
        if (silu_mul) {
          put_silu(value[0], value[1], first + r, int64_t(tile / 2) * TILE + v * LANES);
          continue;
        }
        for (int t = 0; t < count; t++) {
          int at = (tile + t) * TILE + v * LANES;
          store(first_lanes(n - at), to + int64_t(first + r) * n + at, value[t]);
        }
      }
  }

  void put_silu(__m512 g, __m512 up, int row, int64_t at) const {
    __m512 value = silu_times(g, up);
    int width = n / 2;
    __mmask16 mask = first_lanes(int(width - at));
    if (kind == FP32)
      store(mask, static_cast<float*>(y) + int64_t(row) * width + at, value);
    else
      store(mask, static_cast<bf16*>(y) + int64_t(row) * width + at, value);
  }
};

}  // namespace compress
