// Rotary positions on queries and keys, norms of their heads where a model has them, and the
// writing of keys and values into the paged cache.
//
//   qkv      [M, (N + 2 K) H] float32: queries, keys, values as their projection gives them
//   queries  [M, N, P] bfloat16 or float32, scaled by 1 / sqrt(H); P = H rounded up to 16, zeros after H
//   keys     [blocks, K, P / 2, 16, 2] bfloat16, or [blocks, K, P, 16] float32: 16 tokens a vector
//   values   [blocks, K, 8, P, 2] bfloat16 (two tokens beside each other), or [blocks, K, 16, P]
//            keys and values in 8 bits are codes in the same places, with scales [blocks, K, 16]
//
// The pair (i, i + R / 2) of a head is turned by position * inverse_frequency[i] (R dimensions are
// rotary), cosine and sine times `attention_scaling`, as Llama's "rotate half" does.
#pragma once

#include "../rms_norm/avx512.h"
#include "codes.h"

namespace compress {

constexpr int BLOCK = 16;     // tokens of a cache block
constexpr int WIDEST = 512;  // dimensions of a head

struct HeadShape {
  int32_t codes;  // of keys and values: 0 none, 1 int8, 2 fp8
  int32_t heads, kv_heads, head_dim, padded_dim;
  int32_t group;  // of layers, whose slots and block tables these are
};

// cos and sin of every token's angles, once a step.
struct AnglesArguments {
  int32_t half;  // R / 2
  float attention_scaling;
  const float* inverse_frequency;
  float* out;  // [M, 2, R / 2]
};

struct Angles : Operation, AnglesArguments {
  using Arguments = AnglesArguments;
  explicit Angles(const Arguments& a) : Arguments(a) {}

  void run(const Batch& batch, Worker worker, int) override {
    int m = int(batch.tokens_count);
    for (int row = worker.begin(m); row < worker.end(m); row++)
      for (int i = 0; i < half; i++) {
        float angle = float(batch.positions[row]) * inverse_frequency[i];
        out[(int64_t(row) * 2) * half + i] = std::cos(angle) * attention_scaling;
        out[(int64_t(row) * 2 + 1) * half + i] = std::sin(angle) * attention_scaling;
      }
  }
};

// Activations are of type T; C is T too where keys and values are not codes.
template <class T, class C>
struct RopeAndWriteArguments {
  HeadShape shape;
  int32_t half;
  float eps, softmax_scale, key_fixed, value_fixed;  // fixed scales, or 0
  const float *angles, *qkv, *q_gain, *k_gain;       // gains [H], or null
  T* queries;
  C *keys, *values;
  float *key_scales, *value_scales;  // null without codes
};

template <class T, class C>
struct RopeAndWrite : Operation, RopeAndWriteArguments<T, C> {
  using Arguments = RopeAndWriteArguments<T, C>;
  explicit RopeAndWrite(const Arguments& a) : Arguments(a) {}
  using Arguments::shape, Arguments::half, Arguments::angles, Arguments::qkv;
  using Arguments::queries, Arguments::keys, Arguments::values, Arguments::softmax_scale;

  void run(const Batch& batch, Worker worker, int) override {
    int per_token = shape.heads + 2 * shape.kv_heads;
    int items = int(batch.tokens_count) * per_token;
    const int64_t* slots = batch.slots_of(shape.group);
    for (int item = worker.begin(items); item < worker.end(items); item++) {
      int row = item / per_token, head = item % per_token;
      const float* x = qkv + int64_t(item) * shape.head_dim;
      if (head < shape.heads)
        write_query(x, row, head);
      else if (head < shape.heads + shape.kv_heads)
        write_key(x, row, head - shape.heads, slots[row]);
      else
        write_value(x, head - shape.heads - shape.kv_heads, slots[row]);
    }
  }

 private:
  void turn(const float* x, const float* gain, int row, float* to) const {
    float factor = gain ? inverse_rms(x, shape.head_dim, this->eps) : 1.f;
    for (int i = 0; i < shape.head_dim; i++) to[i] = gain ? x[i] * factor * gain[i] : x[i];
    const float* cosine = angles + int64_t(row) * 2 * half;
    const float* sine = cosine + half;
    for (int i = 0; i < half; i++) {
      float a = to[i], b = to[i + half];
      to[i] = a * cosine[i] - b * sine[i];
      to[i + half] = b * cosine[i] + a * sine[i];
    }
  }

  void write_query(const float* x, int row, int head) const {
    alignas(64) float turned[WIDEST] = {};
    turn(x, this->q_gain, row, turned);
    T* to = queries + (int64_t(row) * shape.heads + head) * shape.padded_dim;
    for (int i = 0; i < shape.padded_dim; i += LANES)
      store(0xffff, to + i, _mm512_mul_ps(load(turned + i), _mm512_set1_ps(softmax_scale)));
  }

  int64_t head_of(int64_t slot, int head) const {
    return (slot / BLOCK * shape.kv_heads + head) * shape.padded_dim * BLOCK;
  }

  // Dimensions of a key, or tokens of a value, that lie beside each other: those of 32 bits of T.
  static constexpr int BESIDE = 4 / int(sizeof(T));

  // What lies beside each other goes a vector apart.
  void write_key(const float* x, int row, int head, int64_t slot) const {
    alignas(64) float turned[WIDEST] = {};
    turn(x, this->k_gain, row, turned);
    alignas(64) C narrow[WIDEST];
    narrowed(turned, narrow, this->key_fixed, this->key_scales, head, slot);
    C* to = keys + head_of(slot, head) + slot % BLOCK * BESIDE;
    for (int e = 0; e < shape.padded_dim / BESIDE; e++)
      std::memcpy(to + e * BLOCK * BESIDE, narrow + e * BESIDE, BESIDE * sizeof(C));
  }

  // A value lies as it is in float32; in bfloat16 two tokens alternate.
  void write_value(const float* x, int head, int64_t slot) const {
    alignas(64) float wide[WIDEST] = {};
    std::memcpy(wide, x, shape.head_dim * sizeof(float));
    alignas(64) C narrow[WIDEST];
    narrowed(wide, narrow, this->value_fixed, this->value_scales, head, slot);
    int offset = int(slot % BLOCK);
    C* to = values + head_of(slot, head) + offset / BESIDE * BESIDE * shape.padded_dim;
    for (int i = 0; i < shape.padded_dim; i++) to[i * BESIDE + offset % BESIDE] = narrow[i];
  }

  // A row as the cache holds it; writes its scale, if it has one.
  void narrowed(const float* from, C* to, float fixed, float* scales, int head,
                int64_t slot) const {
    if constexpr (std::is_same_v<T, C>)
      for (int i = 0; i < shape.padded_dim; i += LANES) store(0xffff, to + i, load(from + i));
    else
      scales[(slot / BLOCK * shape.kv_heads + head) * BLOCK + slot % BLOCK] =
          encode(from, shape.padded_dim, fixed, to);
  }
};

}  // namespace compress
