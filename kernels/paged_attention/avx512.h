// Attention over the paged cache, causal, for any number of new tokens a sequence.
//
//   out[t, h] = sum_j softmax_j(q[t, h] · k[j, h / G]) v[j, h / G],   j = first..position of t
//
// with G = N / K query heads a key head, and first = position - window + 1 under a sliding window.
// One pass over the blocks with a running maximum (Milakov and Gimelshein, 2018, arXiv:1805.02867),
// 16 keys, a vector, at a time. The context is cut into parts of 256 positions, each with sums of its
// own, which are then added up in order (Dao et al., Flash-Decoding, 2023). Probabilities are rounded
// to the values' dtype, and it is the rounded ones that the sum below the line adds up. A token's sums
// and their order are the same whatever else is in the batch. Layouts: rope/avx512.h.
//
// Keys and values in 8 bits become bfloat16 (or float32) in registers, once for all heads that go
// through them, by exact conversions (rope/codes.h). Key scales multiply scores. Value scales multiply
// probabilities before they are rounded; the sum below the line takes the rounded ones over the scale.
//
// Heads of a key head, and those of neighbouring tokens with them, go through the keys together: what
// bounds one alone is how long each step waits for the one before it.
#pragma once

#include <algorithm>

#include "../rope/avx512.h"

namespace compress {

constexpr int PART = 256;           // tokens of a part, always the same ones
constexpr int MOST_PARTS = 1 << 11;  // parts of a step that threads may share out

// Activations are of type T; C is T too where keys and values are not codes.
template <class T, class C>
struct PagedAttentionArguments {
  HeadShape shape;
  int32_t window;  // 0: none
  const T* queries;
  const C *keys, *values;
  const float *key_scales, *value_scales;  // null without codes
  float* parts;  // [MOST_PARTS, N / K, P + 2]: what threads found in a part
  T* out;        // [M, N * H]
};

template <class T, class C>
struct PagedAttention : Operation, PagedAttentionArguments<T, C> {
  using Arguments = PagedAttentionArguments<T, C>;
  explicit PagedAttention(const Arguments& a) : Arguments(a) {}
  using Arguments::shape, Arguments::window, Arguments::queries, Arguments::keys;
  using Arguments::values, Arguments::key_scales, Arguments::value_scales;
  using Arguments::parts, Arguments::out;

  // With few tokens threads share out parts of the context, and put them together afterwards;
  // with many a thread does all parts of some heads. The sums and their order are the same.
  int phases() const override { return 2; }
  bool needed(const Batch& batch, Worker worker, int phase) const override {
    return phase == 0 || shared_out(batch, worker);
  }
  void run(const Batch& batch, Worker worker, int phase) override {
    if (phase == 1) return merge_shared(batch, worker);
    bool shared = shared_out(batch, worker);
    int most = most_parts(batch), together = tokens_together();
    const int32_t* tables = batch.tables_of(shape.group);
    int item = 0;  // items go round the threads, since later tokens have more keys
    for (int s = 0; s < batch.sequences; s++)
      for (int row = batch.starts[s]; row < batch.starts[s + 1]; row += together) {
        int tokens = std::min(together, batch.starts[s + 1] - row);
        Query query{tables + s * batch.table_width, row, tokens,
                    int(batch.positions[row]), 0, most, -1};
        int last_part = (query.position + tokens - 1) / PART;
        for (query.kv_head = 0; query.kv_head < shape.kv_heads; query.kv_head++) {
          if (!shared && item++ % worker.count == worker.index) all_heads(query);
          if (!shared) continue;
          for (query.part = first_of(query.position) / PART; query.part <= last_part; query.part++)
            if (item++ % worker.count == worker.index) all_heads(query);
        }
      }
  }

 private:
  static constexpr bool CODED = !std::is_same_v<T, C>;
  static constexpr int WHOLE = 64 / int(sizeof(T));  // numbers of a vector

  struct Query {
    const int32_t* table;
    int row, tokens, position;  // the first of some neighbours, and its position
    int kv_head;
    int most;  // parts that there is room for
    int part;  // the one to compute, or -1 for all
  };

  struct Head {  // of one token
    const T* query;
    int row, head, position, first;
  };

  static int most_parts(const Batch& batch) {
    int most = 0;
    for (int s = 0; s < batch.sequences; s++)
      most = std::max(most, (batch.contexts[s] + PART - 1) / PART);
    return most;
  }

  bool shared_out(const Batch& batch, Worker worker) const {
    int items = int(batch.tokens_count) * shape.kv_heads, most = most_parts(batch);
    return items < 8 * worker.count && most > 1 && items * most <= MOST_PARTS;
  }

  int first_of(int position) const {
    return window && position >= window ? position - window + 1 : 0;
  }

  // Heads whose sums fit into registers, with what they are multiplied with.
  static constexpr int most_heads(int vectors) {
    return vectors == 4 ? 6 : vectors == 5 ? 5 : vectors == 6 ? 4 : vectors == 8 ? 3 : 1;
  }
  int tokens_together() const {
    return std::max(1, std::min(4, most_heads(vectors_of_head()) / group()));
  }

  int vectors_of_head() const { return shape.padded_dim / LANES; }
  int group() const { return shape.heads / shape.kv_heads; }
  int64_t part_size() const { return int64_t(group()) * (shape.padded_dim + 2); }

  // What was found in some keys: sum of e^(score - maximum) v, and of e^(score - maximum).
  template <int MOST>
  struct Found {
    __m512 sum[MOST];
    float below, maximum;

    void add(const __m512* more, float more_below, float more_maximum, int vectors) {
      float highest = std::max(maximum, more_maximum);
      __m512 mine = exponential(_mm512_set1_ps(maximum - highest));
      __m512 theirs = exponential(_mm512_set1_ps(more_maximum - highest));
      for (int v = 0; v < vectors; v++)
        sum[v] = _mm512_fmadd_ps(more[v], theirs, _mm512_mul_ps(sum[v], mine));
      below = below * _mm512_cvtss_f32(mine) + more_below * _mm512_cvtss_f32(theirs);
      maximum = highest;
    }
  };

  // Heads of one key head, in groups of about one size.
  void all_heads(const Query& query) const {
    int vectors = vectors_of_head(), heads = query.tokens * group();
    int groups = (heads + most_heads(vectors) - 1) / most_heads(vectors);
    int size = (heads + groups - 1) / groups;
    for (int begin = 0; begin < heads; begin += size) {
      int count = std::min(size, heads - begin);
      switch (vectors) {
        case 4: up_to<most_heads(4), 4>(count, query, begin); break;
        case 5: up_to<most_heads(5), 5>(count, query, begin); break;
        case 6: up_to<most_heads(6), 6>(count, query, begin); break;
        case 8: up_to<most_heads(8), 8>(count, query, begin); break;
        case 16: up_to<1, 16>(count, query, begin); break;
        default: up_to<1, 0>(count, query, begin);
      }
    }
  }

  template <int HEADS, int VECTORS>
  void up_to(int count, const Query& query, int begin) const {
    if (count == HEADS) return some<HEADS, VECTORS>(query, begin);
    if constexpr (HEADS > 1) up_to<HEADS - 1, VECTORS>(count, query, begin);
  }

  // HEADS heads, counted from the first token's first; VECTORS of 16 dimensions, 0 when that is
  // known only at run time.
  template <int HEADS, int VECTORS>
  void some(const Query& query, int begin) const {
    constexpr int MOST = VECTORS ? VECTORS : WIDEST / LANES;
    const int vectors = VECTORS ? VECTORS : vectors_of_head();
    Head heads[HEADS];
    for (int h = 0; h < HEADS; h++) {
      int token = (begin + h) / group(), head = query.kv_head * group() + (begin + h) % group();
      int row = query.row + token, position = query.position + token;
      heads[h] = {queries + (int64_t(row) * shape.heads + head) * shape.padded_dim, row, head,
                  position, first_of(position)};
    }
    Found<MOST> all[HEADS], part[HEADS];
    bool one = query.part >= 0;
    int from = one ? query.part : heads[0].first / PART;
    int to = one ? query.part : heads[HEADS - 1].position / PART;
    for (int p = from; p <= to; p++) {
      one_part<HEADS, MOST>(query, heads, p, vectors, part);
      for (int h = 0; h < HEADS; h++) {
        const Head& head = heads[h];
        if (p < head.first / PART || p > head.position / PART) continue;
        if (one) {
          float* room = room_of(head.row, query.kv_head, query.most, p, head.head % group());
          for (int v = 0; v < vectors; v++) _mm512_storeu_ps(room + v * LANES, part[h].sum[v]);
          room[shape.padded_dim] = part[h].below, room[shape.padded_dim + 1] = part[h].maximum;
        } else if (p == head.first / PART) {
          all[h] = part[h];
        } else {
          all[h].add(part[h].sum, part[h].below, part[h].maximum, vectors);
        }
      }
    }
    if (one) return;
    for (int h = 0; h < HEADS; h++)
      write(heads[h].row, heads[h].head, all[h].sum, 1.f / all[h].below);
  }

  // Where a part of a token's head is kept for `merge_shared`.
  float* room_of(int row, int kv_head, int most, int part, int head) const {
    int64_t of_row = (int64_t(row) * shape.kv_heads + kv_head) * most + part;
    return parts + (of_row * group() + head) * (shape.padded_dim + 2);
  }

  void merge_shared(const Batch& batch, Worker worker) const {
    constexpr int MOST = WIDEST / LANES;
    const int vectors = vectors_of_head(), most = most_parts(batch);
    int items = int(batch.tokens_count) * shape.heads;
    for (int item = worker.index; item < items; item += worker.count) {
      int row = item / shape.heads, head = item % shape.heads;
      int position = int(batch.positions[row]), from = first_of(position) / PART;
      Found<MOST> all;
      for (int p = from; p <= position / PART; p++) {
        const float* room = room_of(row, head / group(), most, p, head % group());
        __m512 sum[MOST];
        for (int v = 0; v < vectors; v++) sum[v] = load(room + v * LANES);
        float below = room[shape.padded_dim], maximum = room[shape.padded_dim + 1];
        if (p > from) {
          all.add(sum, below, maximum, vectors);
          continue;
        }
        for (int v = 0; v < vectors; v++) all.sum[v] = sum[v];
        all.below = below, all.maximum = maximum;
      }
      write(row, head, all.sum, 1.f / all.below);
    }
  }

  // The keys of part `p` that the heads see; where one sees none its sums are 0.
  template <int HEADS, int MOST>
  void one_part(const Query& query, const Head* heads, int p, int vectors,
                Found<MOST>* found) const {
    const Head &earliest = heads[0], &latest = heads[HEADS - 1];
    __m512 below[HEADS];  // the sum below the line, by lane
    __m512 sum[HEADS][MOST];
    float maximum[HEADS];
    for (int h = 0; h < HEADS; h++) {
      below[h] = _mm512_setzero_ps(), maximum[h] = -INFINITY;
      for (int v = 0; v < vectors; v++) sum[h][v] = _mm512_setzero_ps();
    }
    int64_t stride = int64_t(vectors) * LANES * BLOCK;
    int block = std::max(earliest.first, p * PART) / BLOCK;
    int end = std::min(latest.position + 1, (p + 1) * PART);
    for (; block * BLOCK < end; block++) {
      int begin = block * BLOCK;
      int64_t place = int64_t(query.table[block]) * shape.kv_heads + query.kv_head;
      int64_t at = place * stride;
      if (begin + BLOCK <= latest.position) prefetch(query, block + 1, stride);
      __m512 score[HEADS];
      scores<HEADS>(heads, keys + at, vectors, score);
      [[maybe_unused]] __m512 value_scale, inverse;  // a token a lane
      if constexpr (CODED) {
        __m512 factor = _mm512_set1_ps(CodeRange<C>::factor);
        __m512 key_scale = _mm512_mul_ps(load(key_scales + place * BLOCK), factor);
        for (int h = 0; h < HEADS; h++) score[h] = _mm512_mul_ps(score[h], key_scale);
        value_scale = _mm512_mul_ps(load(value_scales + place * BLOCK), factor);
        inverse = _mm512_div_ps(_mm512_set1_ps(1.f), value_scale);
      }
      bool whole = begin >= latest.first && begin + BLOCK <= earliest.position + 1;
      __mmask16 seen[HEADS];
      alignas(64) T weight[HEADS][LANES];
#pragma GCC unroll 6
      for (int h = 0; h < HEADS; h++) {
        seen[h] = 0xffff;
        if (!whole) {
          seen[h] = first_lanes(heads[h].position + 1 - begin);
          seen[h] &= ~first_lanes(heads[h].first - begin);
          score[h] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen[h], score[h]);
        }
        if (_mm512_cmp_ps_mask(score[h], _mm512_set1_ps(maximum[h]), _CMP_GT_OQ)) {
          float highest = _mm512_reduce_max_ps(score[h]);
          __m512 shrink = exponential(_mm512_set1_ps(maximum[h] - highest));
          below[h] = _mm512_mul_ps(below[h], shrink);
          for (int v = 0; v < vectors; v++) sum[h][v] = _mm512_mul_ps(sum[h][v], shrink);
          maximum[h] = highest;
        }
        __m512 weights = exponential(_mm512_sub_ps(score[h], _mm512_set1_ps(maximum[h])));
        if constexpr (CODED) {
          store(0xffff, weight[h], _mm512_maskz_mul_ps(seen[h], weights, value_scale));
          below[h] = _mm512_add_ps(below[h],
                                   _mm512_maskz_mul_ps(seen[h], load(weight[h]), inverse));
        } else {
          store(0xffff, weight[h], _mm512_maskz_mov_ps(seen[h], weights));
          below[h] = _mm512_add_ps(below[h], load(weight[h]));
        }
      }
      if constexpr (CODED)  // no code is NaN, whoever left it, so a weight of 0 takes it away
        add_values<HEADS, MOST>(values + at, weight, vectors, sum);
      else if (whole)
        add_values<HEADS, MOST>(values + at, weight, vectors, sum);
      else
        for (int h = 0; h < HEADS; h++) add_seen(values + at, weight[h], seen[h], vectors, &sum[h]);
    }
    for (int h = 0; h < HEADS; h++) {
      for (int v = 0; v < vectors; v++) found[h].sum[v] = sum[h][v];
      found[h].below = _mm512_reduce_add_ps(below[h]), found[h].maximum = maximum[h];
    }
  }

  // One head's values of a block of which it sees some.
  template <int MOST>
  void add_seen(const T* block, const T* weight, __mmask16 seen, int vectors,
                __m512 (*sum)[MOST]) const {
    if (seen == 0) return;
    alignas(64) T clean[MOST * LANES * BLOCK];
    if (seen != 0xffff) only_seen(block, seen, vectors, clean);
    add_values<1, MOST>(seen == 0xffff ? block : clean,
                        reinterpret_cast<const T(*)[LANES]>(weight), vectors, sum);
  }

  // A weight of 0 does not take away what another request left here: it may be NaN.
  static void only_seen(const T* block, __mmask16 seen, int vectors, T* clean) {
    constexpr int BESIDE = 4 / int(sizeof(T));
    for (int s = 0; s < BLOCK / BESIDE; s++) {
      __mmask32 even = seen >> (s * BESIDE) & 1 ? 0x55555555 : 0;
      __mmask32 odd = seen >> (s * BESIDE + BESIDE - 1) & 1 ? 0xaaaaaaaa : 0;
      for (int v = 0; v < vectors; v++) {
        const int64_t at = (int64_t(s) * vectors + v) * LANES * BESIDE;
        _mm512_store_si512(clean + at, _mm512_maskz_mov_epi16(even | odd, _mm512_loadu_si512(block + at)));
      }
    }
  }

  // Blocks lie anywhere, which the hardware cannot foresee.
  void prefetch(const Query& query, int block, int64_t stride) const {
    int64_t at = (int64_t(query.table[block]) * shape.kv_heads + query.kv_head) * stride;
    for (int64_t i = 0; i < stride; i += 64 / int64_t(sizeof(C))) {
      _mm_prefetch(keys + at + i, _MM_HINT_T0);
      _mm_prefetch(values + at + i, _MM_HINT_T0);
    }
    if constexpr (CODED) {
      _mm_prefetch(key_scales + at / stride * BLOCK, _MM_HINT_T0);
      _mm_prefetch(value_scales + at / stride * BLOCK, _MM_HINT_T0);
    }
  }

  template <int HEADS>
  static inline __attribute__((always_inline)) void scores(const Head* heads, const C* block,
                                                           int vectors, __m512* score) {
    const int elements = vectors * LANES * int(sizeof(T)) / 4;
    __m512 odd[HEADS];  // two sums a head, since a multiplication waits for the one before it
    for (int h = 0; h < HEADS; h++) score[h] = odd[h] = _mm512_setzero_ps();
    const int32_t* words[HEADS];
    for (int h = 0; h < HEADS; h++) words[h] = reinterpret_cast<const int32_t*>(heads[h].query);
    for (int e = 0; e < elements; e += 2) {
      __m512i key[2] = {numbers<T>(block + e * WHOLE), numbers<T>(block + e * WHOLE + WHOLE)};
#pragma GCC unroll 6
      for (int h = 0; h < HEADS; h++) {
        score[h] = product(score[h], _mm512_set1_epi32(words[h][e]), key[0]);
        odd[h] = product(odd[h], _mm512_set1_epi32(words[h][e + 1]), key[1]);
      }
    }
    for (int h = 0; h < HEADS; h++) score[h] = _mm512_add_ps(score[h], odd[h]);
  }

  template <int HEADS, int MOST>
  static inline __attribute__((always_inline)) void add_values(const C* block,
                                                               const T (*weight)[LANES],
                                                               int vectors, __m512 (*sum)[MOST]) {
    constexpr int STEPS = BLOCK * int(sizeof(T)) / 4;
    for (int s = 0; s < STEPS; s++) {
      __m512i factor[HEADS];
      for (int h = 0; h < HEADS; h++)
        factor[h] = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(weight[h])[s]);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; v++) {
        __m512i value = numbers<T>(block + (int64_t(s) * vectors + v) * WHOLE);
#pragma GCC unroll 6
        for (int h = 0; h < HEADS; h++) sum[h][v] = product(sum[h][v], factor[h], value);
      }
    }
  }

  static __m512 product(__m512 sum, __m512i a, __m512i b) {
    if constexpr (sizeof(T) == 4)
      return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    else
      return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b));
  }

  void write(int row, int head, const __m512* sum, float factor) const {
    T* to = out + (int64_t(row) * shape.heads + head) * shape.head_dim;
    for (int i = 0; i < shape.head_dim; i += LANES)
      store(first_lanes(shape.head_dim - i), to + i,
            _mm512_mul_ps(sum[i / LANES], _mm512_set1_ps(factor)));
  }
};

}  // namespace compress
