// Root mean square norm of rows, after adding what the last operation gave; and the lookups of rows.
//
//   residual += delta;  out = residual / sqrt(mean(residual²) + eps) * gain
//
// residual and delta [M, D] float32, out [M, D] bfloat16 or float32. The residual stream stays in
// float32, which is more than checkpoints were trained with and costs nothing beside the weights.
#pragma once

#include "../program/avx512.h"

namespace compress {

// 1 / sqrt(mean(x²) + eps) of `width` numbers.
inline float inverse_rms(const float* x, int width, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < width; i += LANES) {
    __m512 value = load(first_lanes(width - i), x + i);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  return 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / float(width) + eps);
}

template <class T>
struct RmsNormArguments {
  int32_t width, stride;  // of a row of the residual: numbers that are normed, and all
  int32_t over_rows;      // rows are batch.rows, the tokens whose logits are wanted
  float eps;
  const float *delta, *gain;  // delta may be null
  float* residual;
  T* out;
};

template <class T>
struct RmsNorm : Operation, RmsNormArguments<T> {
  using Arguments = RmsNormArguments<T>;
  explicit RmsNorm(const Arguments& a) : Arguments(a) {}
  using Arguments::width, Arguments::eps, Arguments::delta, Arguments::gain, Arguments::out;

  void run(const Batch& batch, Worker worker, int) override {
    int m = int(this->over_rows ? batch.rows_count : batch.tokens_count);
    for (int row = worker.begin(m); row < worker.end(m); row++) {
      float* x = this->residual + int64_t(row) * this->stride;
      if (delta) add(x, delta + int64_t(row) * width);
      __m512 factor = _mm512_set1_ps(inverse_rms(x, width, eps));
      for (int i = 0; i < width; i += LANES) {
        __mmask16 mask = first_lanes(width - i);
        __m512 value = _mm512_mul_ps(load(mask, x + i), factor);
        store(mask, out + int64_t(row) * width + i, _mm512_mul_ps(value, load(mask, gain + i)));
      }
    }
  }

 private:
  void add(float* x, const float* more) const {
    for (int i = 0; i < width; i += LANES) {
      __mmask16 mask = first_lanes(width - i);
      store(mask, x + i, _mm512_add_ps(load(mask, x + i), load(mask, more + i)));
    }
  }
};

// out[i] = table[tokens[i]] in float32: the embeddings.
template <class T>
struct EmbedArguments {
  int32_t width;
  const T* table;
  float* out;
};

template <class T>
struct Embed : Operation, EmbedArguments<T> {
  using Arguments = EmbedArguments<T>;
  explicit Embed(const Arguments& a) : Arguments(a) {}
  using Arguments::width, Arguments::table, Arguments::out;

  void run(const Batch& batch, Worker worker, int) override {
    int m = int(batch.tokens_count);
    for (int row = worker.begin(m); row < worker.end(m); row++) {
      const T* from = table + batch.tokens[row] * width;
      for (int i = 0; i < width; i += LANES) {
        __mmask16 mask = first_lanes(width - i);
        store(mask, out + int64_t(row) * width + i, load(mask, from + i));
      }
    }
  }
};

// out[i] = from[rows[i]] + delta[rows[i]]: the tokens whose logits are wanted.
struct TakeRowsArguments {
  int32_t width;
  const float *from, *delta;
  float* out;
};

struct TakeRows : Operation, TakeRowsArguments {
  using Arguments = TakeRowsArguments;
  explicit TakeRows(const Arguments& a) : Arguments(a) {}

  void run(const Batch& batch, Worker worker, int) override {
    int m = int(batch.rows_count);
    for (int row = worker.begin(m); row < worker.end(m); row++) {
      int64_t at = batch.rows[row] * width;
      for (int i = 0; i < width; i++) out[int64_t(row) * width + i] = from[at + i] + delta[at + i];
    }
  }
};

}  // namespace compress
