// Products with a matrix for each head: x[M, head] W[head], sums in float32, rows apart.
//
//   W  [N, words, outputs] of bfloat16 pairs or float32: a word is two inputs, or one; outputs are
//      rounded up to 16 with zeros
#pragma once

#include "strip.h"

namespace compress {

template <class T>
struct HeadProduct {
  static constexpr int MOST_ROWS = 6;
  static constexpr int BESIDE = 4 / int(sizeof(T));
  const T* weight;
  int inputs, outputs, head;  // outputs: a multiple of 16

  // put(row, at, sum): 16 outputs from `at` on of a row.
  template <class Put>
  void run(const float* const* x, int rows, const Put& put) const {
    alignas(64) T narrow[MOST_ROWS][WIDEST_RANK];
    const int32_t* words[MOST_ROWS];
    for (int row = 0; row < rows; row++) {
      for (int i = 0; i < inputs; i += LANES)
        store(0xffff, narrow[row] + i, load(first_lanes(inputs - i), x[row] + i));
      words[row] = reinterpret_cast<const int32_t*>(narrow[row]);
    }
    switch (rows) {
      case 6: return columns<6>(words, put);
      case 5: return columns<5>(words, put);
      case 4: return columns<4>(words, put);
      case 3: return columns<3>(words, put);
      case 2: return columns<2>(words, put);
      default: return columns<1>(words, put);
    }
  }

 private:
  template <int ROWS, class Put>
  void columns(const int32_t* const* x, const Put& put) const {
    int at = 0;
    for (; at + 4 * LANES <= outputs; at += 4 * LANES) some<ROWS, 4>(x, at, put);
    for (; at < outputs; at += LANES) some<ROWS, 1>(x, at, put);
  }

  template <int ROWS, int VECTORS, class Put>
  void some(const int32_t* const* x, int at, const Put& put) const {
    int words = (inputs + BESIDE - 1) / BESIDE;
    const T* from = weight + (int64_t(head) * words * outputs + at) * BESIDE;
    __m512 sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < VECTORS; j++) sum[i][j] = _mm512_setzero_ps();
    for (int w = 0; w < words; w++) {
      __m512i value[VECTORS];
      for (int j = 0; j < VECTORS; j++)
        value[j] = _mm512_loadu_si512(from + (int64_t(w) * outputs + j * LANES) * BESIDE);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        __m512i factor = _mm512_set1_epi32(x[i][w]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++)
          sum[i][j] = multiply_words(sum[i][j], factor, value[j], T{});
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < VECTORS; j++) put(i, at + j * LANES, sum[i][j]);
  }
};

// out[t, n] = W[n] attended[t, n]: values of the weighted sums of latents.
template <class T>
struct LatentValuesArguments {
  int32_t heads, rank, padded_rank, value;
  const T* up;            // [N, words of R, v rounded up to 16]
  const float* attended;  // [M, N, A]
  T* out;                 // [M, N v]
};

template <class T>
struct LatentValues : Operation, LatentValuesArguments<T> {
  using Arguments = LatentValuesArguments<T>;
  explicit LatentValues(const Arguments& a) : Arguments(a) {}
  using Arguments::heads, Arguments::padded_rank, Arguments::value;

  void run(const Batch& batch, Worker worker, int) override {
    constexpr int ROWS = HeadProduct<T>::MOST_ROWS;
    int m = int(batch.tokens_count), blocks = (m + ROWS - 1) / ROWS, items = blocks * heads;
    for (int item = worker.begin(items); item < worker.end(items); item++) {
      int head = item / blocks, first = item % blocks * ROWS, rows = std::min(ROWS, m - first);
      HeadProduct<T> product{this->up, this->rank, (value + LANES - 1) / LANES * LANES, head};
      const float* x[ROWS];
      for (int i = 0; i < rows; i++)
        x[i] = this->attended + (int64_t(first + i) * heads + head) * padded_rank;
      product.run(x, rows, [&](int row, int at, __m512 sum) {
        T* to = this->out + (int64_t(first + row) * heads + head) * value;
        store(first_lanes(value - at), to + at, sum);
      });
    }
  }
};

}  // namespace compress
