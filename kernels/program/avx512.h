// What the AVX-512 kernels share: vector types, 16-bit conversions, the shape of an operation.
//
// Every operation here computes each row (token) by itself and in one fixed order, whatever else is
// in the batch and however many threads there are. So a token's result has the same bits alone, in
// a batch, in a chunk of a prompt or computed a second time after a preemption.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace compress {

constexpr int LANES = 16;  // 32-bit lanes of a vector

using bf16 = uint16_t;

inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}


inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load(const bf16* from) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m512 load(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(__mmask16 mask, const bf16* from) {
  __m256i half = _mm256_maskz_loadu_epi16(mask, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store(__mmask16 mask, float* to, __m512 value) {
  _mm512_mask_storeu_ps(to, mask, value);
}
inline void store(__mmask16 mask, bf16* to, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, __m256i(_mm512_cvtneps_pbh(value)));
}

inline __mmask16 first_lanes(int count) {
  return count >= LANES ? __mmask16(0xffff) : __mmask16((1u << (count < 0 ? 0 : count)) - 1);
}

// e^x to about 1 unit in the last place for x <= 0; 0 for -infinity. 2^(x log2 e) with the
// fraction in [-1/2, 1/2] by its Taylor series in x ln 2 (error under 2^-26).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));  // below, float32 has no number left but 0
  __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0x08);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  const float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  __m512 sum = _mm512_set1_ps(1.f / 5040);
  for (float term : terms) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, whole);
}

// One step's flat batch (compress.runtime.batch.Batch says what the fields are).
struct Batch {
  int64_t tokens_count, sequences, rows_count, table_width;
  const int64_t *tokens, *positions, *slots;
  const int32_t *starts, *contexts, *block_tables;
  const int64_t* rows;
  float* logits;

  // A group of layers has slots and block tables of its own.
  const int64_t* slots_of(int group) const { return slots + group * tokens_count; }
  const int32_t* tables_of(int group) const {
    return block_tables + group * sequences * table_width;
  }
};

// A part of the work of an operation: thread `index` of `count`.
struct Worker {
  int index, count;
  int begin(int items) const { return int(int64_t(items) * index / count); }
  int end(int items) const { return int(int64_t(items) * (index + 1) / count); }
};

struct Operation {
  virtual ~Operation() = default;
  // Called once, with the number of threads that will run it.
  virtual void prepare(int /*threads*/) {}
  // Phases run one after the other, each when all threads have ended the one before.
  virtual int phases() const { return 1; }
  virtual bool needed(const Batch&, Worker, int /*phase*/) const { return true; }
  virtual void run(const Batch& batch, Worker worker, int phase) = 0;
};

// Where threads wait for each other. OpenMP's own barrier sends threads to sleep at once when a
// process has more of them than there are processors, as one with an engine in a thread has, and
// waking them takes longer than most operations here.
class Barrier {
 public:
  void wait(int threads) {
    int before = generation.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      generation.store(before + 1, std::memory_order_release);
      return;
    }
    for (int turn = 0; generation.load(std::memory_order_acquire) == before; turn++)
      turn < PATIENCE ? _mm_pause() : std::this_thread::yield();
  }

 private:
  static constexpr int PATIENCE = 5000;  // some 50 microseconds
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> generation{0};
};

}  // namespace compress
