// Attention on latents over the paged cache, absorbed: what reads and writes the cache, and what goes
// before and after it. reference.py has the formula.
//
//   queries  [M, ...] float32, heads of P dimensions without a position and d that are turned
//   joint    [M, ...] float32, its last columns R of a latent and d of a key
//   absorbed [M, N, A + B] bfloat16 or float32: scale * (Uᵀ q, turned q), of A and B dimensions, which
//            are R and d rounded up to 16 with zeros
//   latents  [blocks, 16, A], keys [blocks, 16, B]: rows as tokens leave them, in the activations' dtype
//            or codes with scales [blocks, 16]
//   attended [M, N, A] float32: the weighted sums of latents
//   out      [M, N v] in the activations' dtype: V attended
//
// A latent is key and value in one, and all heads share it. So a strip of 32 positions is laid out
// twice in a thread's own memory, as keys (16 positions a vector) and as values (16 dimensions a
// vector), and then all heads, and those of a few neighbouring tokens, go through it: turning rows
// into columns costs a tenth of what nine heads take. The context is cut into parts of 256 positions
// as in paged_attention/avx512.h, and as there a token's sums and their order are the same whatever
// else is in the batch. Prefill is absorbed too: un-absorbed it would make keys and values from the
// cache for every chunk, and a token's bits would depend on how its prompt was cut.
#pragma once

#include <algorithm>

#include "../paged_attention/avx512.h"
#include "heads.h"

namespace compress {

struct LatentSizes {
  int32_t codes;  // of the cache: 0 none, 1 int8, 2 fp8
  int32_t heads, nope, rope, value, rank, padded_rank, padded_rope;
};

// Activations are of type T; C is T too where the cache is not codes.
template <class T, class C>
struct LatentWriteArguments {
  LatentSizes shape;
  int32_t queries_width, joint_width;
  float eps, softmax_scale, key_fixed, latent_fixed;  // fixed scales, or 0
  const float *angles, *queries, *joint, *gain;
  const T* up;  // [N, P rounded up to words, A], a word's dimensions beside each other
  T* absorbed;
  C *keys, *latents;
  float *key_scales, *latent_scales;  // null without codes
};

template <class T, class C>
struct LatentWrite : Operation, LatentWriteArguments<T, C> {
  using Arguments = LatentWriteArguments<T, C>;
  explicit LatentWrite(const Arguments& a) : Arguments(a) {}
  using Arguments::shape, Arguments::queries_width, Arguments::joint_width, Arguments::angles;

  void run(const Batch& batch, Worker worker, int) override {
    int m = int(batch.tokens_count);
    for (int row = worker.begin(m); row < worker.end(m); row++) write(row, batch.slots[row]);
    int blocks = (m + HeadProduct<T>::MOST_ROWS - 1) / HeadProduct<T>::MOST_ROWS;
    int items = blocks * shape.heads;
    for (int item = worker.begin(items); item < worker.end(items); item++) {
      int first = item % blocks * HeadProduct<T>::MOST_ROWS;
      int last = std::min(first + HeadProduct<T>::MOST_ROWS, m);
      absorb(item / blocks, first, last);
      for (int row = first; row < last; row++) turn_query(item / blocks, row);
    }
  }

 private:
  T* absorbed_at(int row, int head) const {
    int width = shape.padded_rank + shape.padded_rope;
    return this->absorbed + (int64_t(row) * shape.heads + head) * width;
  }
  const float* query_at(int row, int head) const {
    return this->queries + int64_t(row) * queries_width + head * (shape.nope + shape.rope);
  }

  void absorb(int head, int first, int last) const {
    HeadProduct<T> product{this->up, shape.nope, shape.padded_rank, head};
    const float* x[HeadProduct<T>::MOST_ROWS];
    for (int row = first; row < last; row++) x[row - first] = query_at(row, head);
    __m512 scale = _mm512_set1_ps(this->softmax_scale);
    product.run(x, last - first, [&](int row, int at, __m512 sum) {
      store(0xffff, absorbed_at(first + row, head) + at, _mm512_mul_ps(sum, scale));
    });
  }

  void turn_query(int head, int row) const {
    alignas(64) float turned[WIDEST] = {};
    turn(query_at(row, head) + shape.nope, row, turned);
    T* to = absorbed_at(row, head) + shape.padded_rank;
    __m512 scale = _mm512_set1_ps(this->softmax_scale);
    for (int i = 0; i < shape.padded_rope; i += LANES)
      store(0xffff, to + i, _mm512_mul_ps(load(turned + i), scale));
  }

  void turn(const float* x, int row, float* to) const {
    const int half = shape.rope / 2;
    const float* cosine = angles + int64_t(row) * 2 * half;
    const float* sine = cosine + half;
    for (int i = 0; i < half; i++) {
      to[i] = x[i] * cosine[i] - x[i + half] * sine[i];
      to[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
    }
  }

  // A token's normed latent and turned key.
  void write(int row, int64_t slot) const {
    const float* x = this->joint + int64_t(row + 1) * joint_width - shape.rank - shape.rope;
    alignas(64) float latent[WIDEST_RANK] = {};
    __m512 factor = _mm512_set1_ps(inverse_rms(x, shape.rank, this->eps));
    for (int i = 0; i < shape.rank; i += LANES) {
      __mmask16 mask = first_lanes(shape.rank - i);
      __m512 value = _mm512_mul_ps(load(mask, x + i), factor);
      store(mask, latent + i, _mm512_mul_ps(value, load(mask, this->gain + i)));
    }
    put(latent, shape.padded_rank, this->latent_fixed, this->latents, this->latent_scales, slot);
    alignas(64) float key[WIDEST] = {};
    turn(x + shape.rank, row, key);
    put(key, shape.padded_rope, this->key_fixed, this->keys, this->key_scales, slot);
  }

  static void put(const float* from, int width, float fixed, C* cache, float* scales,
                  int64_t slot) {
    C* to = cache + slot * width;
    if constexpr (std::is_same_v<T, C>)
      for (int i = 0; i < width; i += LANES) store(0xffff, to + i, load(from + i));
    else
      scales[slot] = encode(from, width, fixed, to);
  }
};

template <class T, class C>
struct LatentAttentionArguments {
  LatentSizes shape;
  const T* absorbed;
  const C *keys, *latents;
  const float *key_scales, *latent_scales;  // null without codes
  float* parts;                             // [MOST_PARTS, N, A + 2]: what threads found in a part
  float* attended;
};

template <class T, class C>
struct LatentAttention : Operation, LatentAttentionArguments<T, C> {
  using Arguments = LatentAttentionArguments<T, C>;
  explicit LatentAttention(const Arguments& a) : Arguments(a) {}
  using Arguments::shape, Arguments::absorbed, Arguments::latents, Arguments::parts;

  void prepare(int threads) override {
    for (int i = 0; i < threads; i++)
      memory.emplace_back(most_tokens() * shape.heads, shape.padded_rank, shape.padded_rope);
  }

  // As in PagedAttention: with few tokens threads share out parts of the context.
  int phases() const override { return 2; }
  bool needed(const Batch& batch, Worker worker, int phase) const override {
    return phase == 0 || shared_out(batch, worker);
  }
  void run(const Batch& batch, Worker worker, int phase) override {
    if (phase == 1) return merge_shared(batch, worker);
    bool shared = shared_out(batch, worker);
    int most = most_parts(batch), pieces = 1, item = 0;
    int items = int(batch.tokens_count) * (shared ? most : 1);
    while (items * pieces < worker.count && pieces < shape.heads) pieces++;
    for (int s = 0; s < batch.sequences; s++)
      for (int row = batch.starts[s]; row < batch.starts[s + 1]; row += most_tokens()) {
        int tokens = std::min(most_tokens(), batch.starts[s + 1] - row);
        int position = int(batch.positions[row]), last = (position + tokens - 1) / PART;
        for (int piece = 0; piece < pieces; piece++) {
          Run run{batch.block_tables + s * batch.table_width, row, tokens, position,
                  shape.heads * piece / pieces, shape.heads * (piece + 1) / pieces, most};
          for (int part = 0; part <= (shared ? last : 0); part++)
            if (item++ % worker.count == worker.index)
              shared ? one_part(run, part, memory[worker.index])
                     : all_parts(run, memory[worker.index]);
        }
      }
  }

 private:
  static constexpr bool CODED = !std::is_same_v<T, C>;
  static constexpr int BESIDE = 4 / int(sizeof(T));
  using Strip = LatentStrip<T>;
  std::vector<LatentMemory<T>> memory;

  // Some heads of neighbouring tokens; row i of it is token i / heads, head first_head + i % heads.
  struct Run {
    const int32_t* table;
    int row, tokens, position;  // the first token, and its position
    int first_head, end_head;
    int most;  // parts that there is room for
    int heads() const { return end_head - first_head; }
    int rows() const { return tokens * heads(); }
  };

  int most_tokens() const { return std::max(1, 36 / shape.heads); }

  static int most_parts(const Batch& batch) {
    int most = 0;
    for (int s = 0; s < batch.sequences; s++)
      most = std::max(most, (batch.contexts[s] + PART - 1) / PART);
    return most;
  }

  bool shared_out(const Batch& batch, Worker worker) const {
    int items = int(batch.tokens_count), most = most_parts(batch);
    return items < 8 * worker.count && most > 1 && items * most <= MOST_PARTS;
  }

  const T* query_of(const Run& run, int i) const {
    int64_t row = int64_t(run.row + i / run.heads()) * shape.heads;
    int64_t at = row + run.first_head + i % run.heads();
    return absorbed + at * (shape.padded_rank + shape.padded_rope);
  }

  void all_parts(const Run& run, LatentMemory<T>& own) {
    int last = (run.position + run.tokens - 1) / PART;
    for (int p = 0; p <= last; p++) {
      find(run, p, own);
      for (int i = 0; i < run.rows(); i++) {
        if (p > (run.position + i / run.heads()) / PART) continue;
        const float* sum = own.part.sum_of(i);
        float below = own.part.below[i], maximum = own.part.maximum[i];
        p == 0 ? own.all.set(i, sum, below, maximum) : own.all.add(i, sum, below, maximum);
      }
    }
    for (int i = 0; i < run.rows(); i++)
      own.all.write(i, this->attended + place_of(run, i) * shape.padded_rank);
  }

  int64_t place_of(const Run& run, int i) const {
    return int64_t(run.row + i / run.heads()) * shape.heads + run.first_head + i % run.heads();
  }

  void one_part(const Run& run, int p, LatentMemory<T>& own) {
    find(run, p, own);
    for (int i = 0; i < run.rows(); i++) {
      if (p > (run.position + i / run.heads()) / PART) continue;
      float* room = room_of(place_of(run, i), run.most, p);
      std::memcpy(room, own.part.sum_of(i), shape.padded_rank * sizeof(float));
      room[shape.padded_rank] = own.part.below[i];
      room[shape.padded_rank + 1] = own.part.maximum[i];
    }
  }

  float* room_of(int64_t place, int most, int part) const {
    return parts + (place * most + part) * (shape.padded_rank + 2);
  }

  void merge_shared(const Batch& batch, Worker worker) {
    LatentSums& all = memory[worker.index].all;
    int items = int(batch.tokens_count) * shape.heads, most = most_parts(batch);
    for (int item = worker.index; item < items; item += worker.count) {
      int last = int(batch.positions[item / shape.heads]) / PART;
      for (int p = 0; p <= last; p++) {
        const float* room = room_of(item, most, p);
        float below = room[shape.padded_rank], maximum = room[shape.padded_rank + 1];
        p == 0 ? all.set(0, room, below, maximum) : all.add(0, room, below, maximum);
      }
      all.write(0, this->attended + int64_t(item) * shape.padded_rank);
    }
  }

  // The sums of all rows over part `p`, in own.part; 0 for tokens that come before it.
  void find(const Run& run, int p, LatentMemory<T>& own) const {
    own.clear(run.rows());
    int end = std::min(run.position + run.tokens, (p + 1) * PART);
    for (int begin = p * PART; begin < end; begin += Strip::TOKENS) {
      int next = begin + Strip::TOKENS;
      prefetch(run, next, std::min(next + Strip::TOKENS, run.position + run.tokens));
      if (next <= run.position + 1) {  // all tokens see all of it
        lay_out(run, begin, next, own.strip);
        attend(run, 0, run.rows(), Strip::TOKENS, own);
        continue;
      }
      // What comes later may be NaN, which a weight of 0 does not take away.
      for (int t = std::max(0, begin - run.position); t < run.tokens; t++) {
        int seen = std::min(run.position + t + 1 - begin, Strip::TOKENS);
        lay_out(run, begin, begin + seen, own.strip);
        attend(run, t * run.heads(), (t + 1) * run.heads(), seen, own);
      }
    }
    own.finish(run.rows());
  }

  // Positions [begin, end) as keys and as values; the rest of the strip is zero.
  void lay_out(const Run& run, int begin, int end, Strip& strip) const {
    for (int b = 0; b < Strip::TOKENS / BLOCK; b++) {
      int position = begin + b * BLOCK, count = std::clamp(end - position, 0, BLOCK);
      int64_t block = count ? run.table[position / BLOCK] : 0;
      strip.put(latents + block * BLOCK * shape.padded_rank, count, shape.padded_rank, b, 0, true);
      strip.put(this->keys + block * BLOCK * shape.padded_rope, count, shape.padded_rope, b,
                shape.padded_rank, false);
      if constexpr (CODED) {
        strip.put_scales(this->latent_scales + block * BLOCK, this->key_scales + block * BLOCK, b,
                         first_lanes(count), CodeRange<C>::factor);
      }
    }
  }

  // Rows [from, to), all of which see the first `seen` positions of the strip; in groups of about one
  // size, since what bounds a few rows is how long each product waits for the one before it.
  void attend(const Run& run, int from, int to, int seen, LatentMemory<T>& own) const {
    int at_once = even_groups(to - from, 6);
    for (int row = from; row < to; row += at_once) {
      switch (std::min(at_once, to - row)) {
        case 6: weigh<6>(run, row, seen, own); break;
        case 5: weigh<5>(run, row, seen, own); break;
        case 4: weigh<4>(run, row, seen, own); break;
        case 3: weigh<3>(run, row, seen, own); break;
        case 2: weigh<2>(run, row, seen, own); break;
        default: weigh<1>(run, row, seen, own);
      }
    }
    int steps = (seen + BESIDE - 1) / BESIDE;
    at_once = even_groups(to - from, 4);
    for (int row = from; row < to; row += at_once) {
      switch (std::min(at_once, to - row)) {
        case 4: own.template add_values<4>(row, steps); break;
        case 3: own.template add_values<3>(row, steps); break;
        case 2: own.template add_values<2>(row, steps); break;
        default: own.template add_values<1>(row, steps);
      }
    }
  }

  static int even_groups(int rows, int most) {
    int groups = (rows + most - 1) / most;
    return (rows + groups - 1) / groups;
  }

  // Blocks lie anywhere, which the hardware cannot foresee.
  void prefetch(const Run& run, int begin, int end) const {
    for (int position = begin; position < end; position += BLOCK) {
      int64_t row = int64_t(run.table[position / BLOCK]) * BLOCK;
      for (int i = 0; i < BLOCK * shape.padded_rank; i += 64 / int(sizeof(C)))
        _mm_prefetch(latents + row * shape.padded_rank + i, _MM_HINT_T0);
      for (int i = 0; i < BLOCK * shape.padded_rope; i += 64 / int(sizeof(C)))
        _mm_prefetch(this->keys + row * shape.padded_rope + i, _MM_HINT_T0);
    }
  }

  // The weights of rows from `row` on, and the sum below the line of those as they are rounded.
  template <int ROWS>
  void weigh(const Run& run, int row, int seen, LatentMemory<T>& own) const {
    constexpr int BLOCKS = Strip::TOKENS / BLOCK;
    const int32_t* words[ROWS];
    for (int i = 0; i < ROWS; i++)
      words[i] = reinterpret_cast<const int32_t*>(query_of(run, row + i));
    __m512 score[ROWS][BLOCKS], turned[ROWS][BLOCKS];
    int split = shape.padded_rank / BESIDE;
    own.strip.template multiply<ROWS>(words, 0, split, score);
    own.strip.template multiply<ROWS>(words, split, split + shape.padded_rope / BESIDE, turned);
    for (int i = 0; i < ROWS; i++) {
      float highest = own.part.maximum[row + i];
      __mmask16 mask[BLOCKS];
      for (int b = 0; b < BLOCKS; b++) {
        if constexpr (CODED) {
          score[i][b] = _mm512_mul_ps(score[i][b], own.strip.latent_scale[b]);
          score[i][b] = _mm512_fmadd_ps(turned[i][b], own.strip.key_scale[b], score[i][b]);
        } else {
          score[i][b] = _mm512_add_ps(score[i][b], turned[i][b]);
        }
        mask[b] = first_lanes(seen - b * BLOCK);
        score[i][b] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask[b], score[i][b]);
        if (_mm512_cmp_ps_mask(score[i][b], _mm512_set1_ps(highest), _CMP_GT_OQ))
          highest = _mm512_reduce_max_ps(score[i][b]);
      }
      own.raise(row + i, highest);
      T* to = own.weights_of(row + i);
      for (int b = 0; b < BLOCKS; b++) {
        __m512 weight = exponential(_mm512_sub_ps(score[i][b], _mm512_set1_ps(highest)));
        if constexpr (CODED) weight = _mm512_mul_ps(weight, own.strip.latent_scale[b]);
        store(0xffff, to + b * BLOCK, _mm512_maskz_mov_ps(mask[b], weight));
        __m512 rounded = load(to + b * BLOCK);
        if constexpr (CODED)
          rounded = _mm512_maskz_div_ps(mask[b], rounded, own.strip.latent_scale[b]);
        own.lanes[row + i] = _mm512_add_ps(own.lanes[row + i], rounded);
      }
    }
  }
};

}  // namespace compress
