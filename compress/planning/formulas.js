// The formulas of compress/roofline.py, in pure functions on the same numbers; a test holds the two
// together. Sizes in bytes, times in seconds, rates in FLOP/s and bytes/s; shapes, precisions and
// devices have the fields that they have there. window.plan is all of it.
window.plan = (() => {
  const NORM_BITS = 16;
  const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);
  const seen = (context, window) => (window === null ? context : Math.min(context, window));

  // ---- shape

  // Windows of the layers behind each cache.
  function kvGroups({ windows, kv_share }) {
    const groups = [];
    for (let at = 0; at < windows.length; at += kv_share) groups.push(windows.slice(at, at + kv_share));
    return groups;
  }

  // Numbers that one cache holds for a token.
  function kvNumbers(shape) {
    return shape.mla ? shape.mla.kv_rank + shape.mla.rope_dim : 2 * shape.kv_heads * shape.head_dim;
  }

  function parameters(shape) {
    const { hidden: D, ffn: F, layers: L, vocab: V } = shape;
    const matrices = shape.gated ? 3 : 2;
    const mlp = matrices * D * F + (shape.mlp_bias ? (matrices - 1) * F + D : 0);
    const [attention, innerNorms] = shape.mla ? latent(shape) : plain(shape);
    return {
      embedding: (V + shape.positions) * D,
      attention,
      mlp: L * mlp,
      norms: (L * shape.norms + 1) * D * (shape.norm_bias ? 2 : 1) + innerNorms,
      head: (shape.tied ? 0 : V * D) + (shape.head_bias ? V : 0),
    };
  }

  // Parameters of attention's projections, and of the norms inside it, of all layers.
  function plain(shape) {
    const { hidden: D, layers: L } = shape, caches = kvGroups(shape).length;
    const queries = shape.heads * shape.head_dim, keys = shape.kv_heads * shape.head_dim;
    const rows = D + (shape.qkv_bias ? 1 : 0);
    const projections = L * (rows * queries + queries * D) + caches * 2 * rows * keys + (shape.out_bias ? L * D : 0);
    const widths = { none: [0, 0], head: [shape.head_dim, shape.head_dim], all: [queries, keys] };
    const [onQueries, onKeys] = widths[shape.qk_norm];
    return [projections, L * onQueries + caches * onKeys];
  }

  function latent(shape) {
    const { hidden: D, heads: N, layers: L, mla, qkv_bias } = shape, caches = kvGroups(shape).length;
    const queryWidth = N * (mla.nope_dim + mla.rope_dim), compressed = mla.kv_rank + mla.rope_dim;
    const queries = mla.q_rank === null
      ? D * queryWidth
      : D * mla.q_rank + mla.q_rank * queryWidth + (qkv_bias ? mla.q_rank : 0);
    const keys = D * compressed + mla.kv_rank * N * (mla.nope_dim + mla.v_dim) + (qkv_bias ? compressed : 0);
    const output = N * mla.v_dim * D + (shape.out_bias ? D : 0);
    return [L * (queries + output) + caches * keys, L * (mla.q_rank ?? 0) + caches * mla.kv_rank];
  }

  // The same model with its keys and values kept in another way.
  function withMethod(shape, method, detail) {
    const { heads, head_dim, layers } = shape;
    switch (method) {
      case "mha": return { ...shape, mla: null, kv_heads: heads };
      case "gqa": return { ...shape, mla: null, kv_heads: detail };
      case "mla": {
        const usual = { rope_dim: 64, nope_dim: head_dim, v_dim: head_dim, q_rank: null };
        return { ...shape, mla: { ...(shape.mla ?? usual), kv_rank: detail } };
      }
      case "window": return { ...shape, windows: shape.windows.map((window) => seen(detail, window)) };
      case "shared": return { ...shape, kv_share: Math.min(detail, layers) };
      default: return shape;
    }
  }

  // ---- memory

  function weightBytes(shape, precision) {
    const count = parameters(shape);
    const copied = shape.tied && precision.head !== precision.embeddings ? shape.vocab * shape.hidden : 0;
    return {
      embedding: (count.embedding * precision.embeddings) / 8,
      attention: (count.attention * precision.weights) / 8,
      mlp: (count.mlp * precision.weights) / 8,
      norms: (count.norms * NORM_BITS) / 8,
      head: ((count.head + copied) * precision.head) / 8,
    };
  }

  function kvBytesPerToken(shape, precision) {
    return (kvGroups(shape).length * kvNumbers(shape) * precision.kv) / 8;
  }

  // Held of one sequence.
  function kvBytes(shape, precision, context) {
    const held = sum(kvGroups(shape).map((group) => Math.max(...group.map((window) => seen(context, window)))));
    return (held * kvNumbers(shape) * precision.kv) / 8;
  }

  function memory(shape, precision, batch, context) {
    return { weights: sum(weightBytes(shape, precision)), kv: batch * kvBytes(shape, precision, context) };
  }

  // `models`: [shape, precision] of each that has to fit.
  function largestBatch(models, device, context) {
    const weights = sum(models.map(([shape, precision]) => sum(weightBytes(shape, precision))));
    const kv = sum(models.map(([shape, precision]) => kvBytes(shape, precision, context)));
    return Math.max(0, Math.floor((device.memory - weights) / kv));
  }

  // ---- work: FLOPs and bytes by part

  function prefill(shape, precision, batch, tokens) {
    const work = forward(shape, precision, batch, tokens, tokens, batch);
    const attention = work.bytes.attention + batch * kvBytes(shape, precision, tokens);
    return { ...work, bytes: { ...work.bytes, attention } };
  }

  function decode(shape, precision, batch, context, tokens = 1) {
    return forward(shape, precision, batch, context, tokens, batch * tokens);
  }

  function forward(shape, precision, batch, context, tokens, headRows) {
    const rows = batch * tokens, table = shape.vocab * shape.hidden;
    const count = parameters(shape), stored = weightBytes(shape, precision);
    const shared = shape.tied && precision.head === precision.embeddings ? table : 0; // with the embeddings
    const pairs = sum(shape.windows.map((window) => pairsSeen(context, tokens, window)));
    const read = sum(shape.windows.map((window) => keysRead(context, tokens, window)));
    return {
      flops: {
        embedding: 0,
        attention_projections: 2 * rows * count.attention,
        attention: batch * pairs * flopsAPair(shape, tokens < context),
        mlp: 2 * rows * count.mlp,
        norms: 0,
        head: 2 * headRows * table,
      },
      bytes: {
        embedding: (rows * shape.hidden * precision.embeddings) / 8,
        attention_projections: stored.attention,
        attention: (batch * read * kvNumbers(shape) * precision.kv) / 8,
        mlp: stored.mlp,
        norms: stored.norms,
        head: stored.head + (shared * precision.embeddings) / 8,
      },
    };
  }

  // One query and one key, all heads of a layer; `absorbed`: MLA on its latents themselves.
  function flopsAPair({ heads, head_dim, mla }, absorbed) {
    if (!mla) return 4 * heads * head_dim;
    if (absorbed) return 2 * heads * (2 * mla.kv_rank + mla.rope_dim);
    return 2 * heads * (mla.nope_dim + mla.rope_dim + mla.v_dim);
  }

  // Keys seen by the last `tokens` of `context` tokens, each seeing itself and those before it.
  function pairsSeen(context, tokens, window) {
    const first = context - tokens + 1;
    if (window === null || window >= context) return ((first + context) * tokens) / 2;
    const growing = Math.max(0, window - first + 1);
    return ((2 * first + growing - 1) * growing) / 2 + (tokens - growing) * window;
  }

  function keysRead(context, tokens, window) {
    return window === null ? context : Math.min(context, window + tokens - 1);
  }

  // ---- time

  // Each part at max(bytes / bandwidth, FLOPs / rate); attention computes in 16 bits.
  function timeOf(work, device, precision, linked = 0) {
    const { bandwidth, matmul, overhead } = device.efficiency, parts = {}, spent = {};
    for (const [part, moved] of Object.entries(work.bytes)) {
      const byMemory = moved / (device.bandwidth * bandwidth);
      const byCompute = work.flops[part] / (rateOf(device, part === "attention" ? "bf16" : precision.compute) * matmul);
      parts[part] = { seconds: Math.max(byMemory, byCompute), limit: byCompute > byMemory ? "compute" : "memory" };
    }
    if (linked) parts.link = { seconds: linked / device.link, limit: "link" };
    if (overhead) parts.overhead = { seconds: overhead, limit: "overhead" };
    for (const { seconds, limit } of Object.values(parts)) spent[limit] = (spent[limit] ?? 0) + seconds;
    const limit = Object.keys(spent).reduce((most, name) => (spent[name] > spent[most] ? name : most));
    return { seconds: sum(spent), limit, share: spent[limit] / sum(spent), parts };
  }

  function rateOf(device, compute) {
    return device.rates[compute] ?? device.rates.bf16;
  }

  // ---- several devices (tensor parallel)

  // What one of `many` holds and computes.
  function shard(shape, many) {
    const { heads, kv_heads, ffn, vocab } = shape;
    const part = { heads: heads / many, kv_heads: Math.max(1, Math.floor(kv_heads / many)), ffn: ffn / many };
    return { ...shape, ...part, vocab: Math.ceil(vocab / many) };
  }

  function divides({ heads, kv_heads, ffn }, many) {
    return heads % many === 0 && ffn % many === 0 && (kv_heads % many === 0 || many % kv_heads === 0);
  }

  // Bytes that each sends in a step: two all-reduces a layer, and one for the embeddings.
  function linkBytes(shape, rows, many) {
    return ((2 * shape.layers + 1) * rows * shape.hidden * 2 * 2 * (many - 1)) / many;
  }

  // ---- speculation

  // Tokens that a pass gives: 1 + a + ... + a^k.
  function expectedTokens(acceptance, length) {
    let expected = 0;
    for (let n = 0; n <= length; n++) expected += acceptance ** n;
    return expected;
  }

  // Against plain decode, where a pass over k + 1 tokens takes no longer than over one.
  function speculativeSpeedup(acceptance, length, cost) {
    return expectedTokens(acceptance, length) / (1 + length * cost);
  }

  // ---- all that the page shows of a setting

  // `drafter`: { shape, precision } of a draft model, or null; it is whole on each device.
  function predict({ shape, precision, device, devices, batch, context, tokens, draft, acceptance, cost, drafter }) {
    const part = shard(shape, devices); // memory and work are those of one device
    const models = [[part, precision], ...(drafter && draft ? [[drafter.shape, drafter.precision]] : [])];
    const time = (work, rows) => timeOf(work, device, precision, linkBytes(shape, rows, devices));
    // Seconds a token at a context: a step; or drafts, and a pass that checks them, over its tokens.
    const latencyAt = (at) => {
      const step = time(decode(part, precision, batch, at), batch).seconds;
      if (draft === 0) return step;
      const check = time(decode(part, precision, batch, at + draft, draft + 1), batch * (draft + 1)).seconds;
      return (check + draft * cost * step) / expectedTokens(acceptance, draft);
    };
    const works = { prefill: prefill(part, precision, batch, context), decode: decode(part, precision, batch, context) };
    const steps = { prefill: time(works.prefill, batch * context), decode: time(works.decode, batch) };
    const latency = latencyAt(context), first = steps.prefill.seconds;
    const [held, beside] = models.map(([one, bits]) => memory(one, bits, batch, context + tokens));
    const total = held.weights + held.kv + (beside ? beside.weights + beside.kv : 0);
    return {
      works, steps, latency, first,
      throughput: batch / latency,
      answer: first + tokens * latencyAt(context + Math.floor(tokens / 2)),
      speedup: steps.decode.seconds / latency,
      memory: { ...held, draft: total - held.weights - held.kv, total, free: device.memory - total },
      slope: (held.kv + (beside?.kv ?? 0)) / batch,
      largest: largestBatch(models, device, context + tokens),
      kvPerToken: kvBytesPerToken(shape, precision),
      kvPerSequence: kvBytes(shape, precision, context + tokens),
      parameters: sum(parameters(shape)),
    };
  }

  return {
    decode, divides, expectedTokens, kvBytes, kvBytesPerToken, largestBatch, memory, parameters, predict,
    prefill, rateOf, speculativeSpeedup, sum, timeOf, weightBytes, withMethod,
  };
})();
