// The controls, and what they show: every number comes from `plan` (formulas.js).
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const say = (id, text) => { at(id).textContent = text; };
  const tell = (id, text, value) => { say(id, text); at(id).value = value; }; // <data>: the number in full

  // ---- numbers with units
  const digits = (value) => (value === 0 ? "0" : value.toLocaleString("en", { maximumSignificantDigits: 3 }));
  function scaled(value, units) {
    if (!Number.isFinite(value)) return "unlimited";
    const [size, name] = units.find(([size]) => value >= size * 0.9995) ?? units.at(-1);
    return `${digits(value / size)} ${name}`;
  }
  const prefixes = [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
  const si = (unit) => (value) => scaled(value, prefixes.map(([size, prefix]) => [size, prefix + unit]));
  const bytes = (value) => scaled(value, [...prefixes.slice(0, -1).map(([size, prefix]) => [size, `${prefix}B`]), [1, "bytes"]]);
  const seconds = (value) => scaled(value, [[3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]]);
  const rate = (value) => scaled(value, [[1, "tokens/s"]]);
  const share = (value) => `${digits(100 * value)} %`;
  const whole = (value) => (Number.isFinite(value) ? value.toLocaleString("en") : "unlimited");

  // ---- controls: `stops` are a slider's positions, `state` holds the exact values
  const doubling = (low, high) => {
    const all = [];
    for (let n = low; n <= high; n *= 2) all.push(n, ...(n > 1 && n * 1.5 <= high ? [n * 1.5] : []));
    return all;
  };
  const steps = (low, high, by) => Array.from({ length: Math.round((high - low) / by) + 1 }, (_, n) => Number((low + n * by).toFixed(6)));
  const ordered = (values) => [...new Set(values)].sort((a, b) => a - b);
  const start = data.start;
  const numbers = {
    batch: { stops: doubling(1, 4096), low: 1, high: 1e6, whole: true, unit: "sequences" },
    context: { stops: doubling(64, Math.min(1048576, Math.max(131072, data.shape.max_context))), low: 1, high: 1e8, whole: true, unit: "tokens" },
    tokens: { stops: [0, ...doubling(1, 16384)], low: 0, high: 1e8, whole: true, unit: "tokens" },
    draft: { stops: steps(0, 16, 1), low: 0, high: 64, whole: true, unit: "tokens" },
    acceptance: { stops: steps(0, 1, 0.05), low: 0, high: 1, unit: "of the drafted tokens" },
    cost: { stops: steps(0, 1, 0.05), low: 0, high: 10, unit: "steps" },
  };
  for (const [name, control] of Object.entries(numbers)) {
    control.stops = ordered([...control.stops, start[name]]);
  }
  const names = { weights: Object.keys(data.weights), kv: Object.keys(data.kv) };
  const OWN = data.devices.length; // the device that the user describes
  let state, saying;

  // How many devices can share the model as it now is, over the link that the device has.
  function sharing() {
    const shape = plan.withMethod(data.shape, state.method, state.detail);
    return data.devices_together.filter((many) => many === 1 || (chosen().link > 0 && plan.divides(shape, many)));
  }

  function nearest(stops, value) {
    return stops.reduce((best, stop, n) => (Math.abs(stop - value) < Math.abs(stops[best] - value) ? n : best), 0);
  }

  function showControls() {
    for (const [name, { stops, unit, whole }] of Object.entries(numbers)) {
      const slider = at(name);
      slider.max = stops.length - 1;
      slider.value = nearest(stops, state[name]);
      slider.setAttribute("aria-valuetext", `${state[name].toLocaleString("en")} ${unit}`);
      if (document.activeElement !== at(`${name}-number`)) at(`${name}-number`).value = whole ? state[name] : Number(state[name].toPrecision(4));
    }
    for (const [name, list] of Object.entries(names)) {
      const slider = at(name), bits = name === "kv" ? data.kv[state.kv] : data.weights[state.weights].weights;
      slider.max = list.length - 1;
      slider.value = list.indexOf(state[name]);
      const text = state[name].endsWith(" bits") ? state[name] : `${state[name]}, ${bits} bits`;
      say(`${name}-output`, text);
      slider.setAttribute("aria-valuetext", text);
    }
    const together = sharing(), many = `${state.devices} ${state.devices === 1 ? "device" : "devices"}`;
    Object.assign(at("devices"), { max: together.length - 1, disabled: together.length === 1 });
    at("devices").value = together.indexOf(state.devices);
    at("devices").setAttribute("aria-valuetext", many);
    say("devices-output", many);
    const method = data.methods[state.method], slider = at("detail");
    at("method").value = state.method;
    at("detail-control").hidden = method.stops.length === 0;
    say("method-hint", method.hint);
    if (method.stops.length) {
      const text = `${whole(state.detail)} ${method.unit}`;
      slider.max = method.stops.length - 1;
      slider.value = method.stops.indexOf(state.detail);
      slider.setAttribute("aria-valuetext", text);
      slider.setAttribute("aria-label", method.label);
      document.querySelector("label[for=detail]").textContent = method.label;
      say("detail-output", text);
    }
    at("device").value = state.device;
    at("custom").hidden = state.device !== OWN;
    say("device-source", state.device === OWN ? "Your own numbers." : chosen().source);
    for (const [name, { get, unit }] of Object.entries(custom)) {
      const input = at(`custom-${name}`);
      if (document.activeElement !== input) input.value = Number((get(state.custom) / unit).toPrecision(5));
    }
    for (const id of ["acceptance", "cost"]) at(id).disabled = at(`${id}-number`).disabled = state.draft === 0;
  }

  const custom = {
    memory: { unit: 1e9, get: (d) => d.memory, set: (d, v) => ({ ...d, memory: v }) },
    bandwidth: { unit: 1e9, get: (d) => d.bandwidth, set: (d, v) => ({ ...d, bandwidth: v }) },
    link: { unit: 1e9, get: (d) => d.link ?? 0, set: (d, v) => ({ ...d, link: v }) },
  };
  for (const name of data.rates) {
    custom[name] = { unit: 1e12, get: (d) => d.rates[name], set: (d, v) => ({ ...d, rates: { ...d.rates, [name]: v } }) };
  }

  function change(update) {
    state = { ...state, ...update };
    state.devices = sharing().findLast((many) => many <= state.devices);
    showControls();
    show();
  }

  function listen() {
    for (const [name, { stops, low, high, whole }] of Object.entries(numbers)) {
      at(name).addEventListener("input", (event) => change({ [name]: stops[event.target.value] }));
      const number = at(`${name}-number`);
      Object.assign(number, { min: low, max: high, step: whole ? 1 : "any" });
      accept(number, (value) => value >= low && value <= high && (!whole || Number.isInteger(value)), (value) => ({ [name]: value }));
    }
    for (const [name, list] of Object.entries(names)) {
      at(name).addEventListener("input", (event) => change({ [name]: list[event.target.value] }));
    }
    at("method").addEventListener("input", (event) => change({ method: event.target.value, detail: data.methods[event.target.value].start }));
    at("detail").addEventListener("input", (event) => change({ detail: data.methods[state.method].stops[event.target.value] }));
    at("devices").addEventListener("input", (event) => change({ devices: sharing()[event.target.value] }));
    at("device").addEventListener("input", (event) => {
      const device = Number(event.target.value);
      // a device of one's own begins as the one that was chosen before it
      change({ device, ...(device === OWN ? { custom: completed(chosen()) } : {}) });
    });
    for (const [name, { unit, set }] of Object.entries(custom)) {
      accept(at(`custom-${name}`), (value) => value > 0 || (value === 0 && name === "link"), (value) => ({ custom: set(state.custom, value * unit) }));
    }
    at("controls").addEventListener("reset", (event) => { event.preventDefault(); change(begin()); });
    at("controls").addEventListener("submit", (event) => event.preventDefault());
    new ResizeObserver(() => show()).observe(at("results"));
  }

  // A typed number counts while it is allowed; one that is not is marked, and goes on leaving.
  function accept(input, allowed, update) {
    input.addEventListener("input", () => {
      const value = input.valueAsNumber, fine = Number.isFinite(value) && allowed(value);
      input.setAttribute("aria-invalid", String(!fine));
      if (fine) change(update(value));
    });
    input.addEventListener("blur", () => { input.removeAttribute("aria-invalid"); showControls(); });
  }

  // ---- results

  // A device as its fields show it: a rate of each kind, and nothing measured.
  function completed(device) {
    const rates = Object.fromEntries(data.rates.map((name) => [name, plan.rateOf(device, name)]));
    return { ...device, rates, efficiency: { bandwidth: 1, matmul: 1, overhead: 0 } };
  }

  function chosen() {
    return state.device === OWN ? state.custom : data.devices[state.device];
  }

  // The state in the terms of `plan.predict`.
  function setup() {
    const precision = { ...data.precision, ...data.weights[state.weights], kv: data.kv[state.kv] };
    const shape = plan.withMethod(data.shape, state.method, state.detail);
    return { ...state, shape, precision, device: chosen(), drafter: data.drafter };
  }

  const limits = {
    memory: "memory bandwidth", compute: "compute", link: "the link between devices", overhead: "overhead of a step",
  };

  function show() {
    const given = setup(), { device, precision, shape } = given, found = plan.predict(given);
    showFacts(given, found);
    showMemory(given, found);
    showRoofline(device, precision, found);
    showParts(found);
    say("strip", `${seconds(found.latency)} a token · ${rate(found.throughput)} · ` +
      `${bytes(found.memory.total)} of ${bytes(device.memory)}${found.memory.free < 0 ? ": does not fit" : ""}`);
    clearTimeout(saying); // read out once a slider rests, not at each of its steps
    saying = setTimeout(() => say("said", summary(given, found, shape)), 300);
  }

  function summary({ context, tokens, device, devices }, { memory, latency, throughput, steps }, shape) {
    const each = devices > 1 ? " on each device" : "";
    const fits = memory.free >= 0
      ? `It fits: ${bytes(memory.total)} of ${bytes(device.memory)}${each}.`
      : `It does not fit: it needs ${bytes(memory.total)} of ${bytes(device.memory)}${each}; the times are as if it did.`;
    const long = context + tokens > shape.max_context
      ? ` ${whole(context + tokens)} tokens are more than the model was made for (${whole(shape.max_context)}).` : "";
    return `${fits} ${seconds(latency)} a token, ${rate(throughput)}. Most of the time of decode goes to ` +
      `${limits[steps.decode.limit]}, of prefill to ${limits[steps.prefill.limit]}.${long}`;
  }

  function showFacts({ batch, context, tokens, draft, acceptance }, found) {
    const { steps } = found;
    tell("latency", seconds(found.latency), found.latency);
    say("latency-note", draft === 0 ? "one decode step"
      : `with drafts ${digits(Math.max(found.speedup, 1 / found.speedup))}x as ${found.speedup < 1 ? "slow" : "fast"}, ` +
        `${digits(plan.expectedTokens(acceptance, draft))} tokens a pass`);
    tell("throughput", rate(found.throughput), found.throughput);
    say("throughput-note", batch === 1 ? "of the one sequence" : `of ${whole(batch)} sequences, ${rate(found.throughput / batch)} each`);
    tell("first", seconds(found.first), found.first);
    say("first-note", batch === 1 ? `prefill of ${whole(context)} tokens` : `prefill of ${whole(batch)} x ${whole(context)} tokens`);
    tell("answer", seconds(found.answer), found.answer);
    say("answer-note", `prefill and ${whole(tokens)} new tokens`);
    tell("largest", whole(found.largest), found.largest);
    say("largest-note", found.largest === 0 ? "not even one sequence" : `of ${whole(context + tokens)} tokens each` + (found.largest < batch ? ", fewer than now" : ""));
    at("largest-note").className = found.largest < batch ? "warn" : "";
    tell("limit", limits[steps.decode.limit], steps.decode.limit);
    say("limit-note", `${share(steps.decode.share)} of a step; prefill: ${limits[steps.prefill.limit]}, ${share(steps.prefill.share)}`);
  }

  function showMemory({ batch, context, tokens, device, devices }, found) {
    const { weights, kv, draft, total, free } = found.memory, capacity = device.memory;
    const fits = free >= 0 ? `${bytes(free)} free of ${bytes(capacity)}` : `${bytes(-free)} too much for ${bytes(capacity)}`;
    const drafted = draft ? `, draft model ${bytes(draft)}` : "";
    draw.bar(at("bar"), { weights, kv, draft, capacity }, `Weights ${bytes(weights)}, KV cache ${bytes(kv)}${drafted}: ${fits}.`);
    at("bar-draft").parentNode.hidden = !draft;
    tell("bar-draft", `${bytes(draft)}, ${share(draft / capacity)}`, draft);
    tell("bar-weights", `${bytes(weights)}, ${share(weights / capacity)}`, weights);
    tell("bar-kv", `${bytes(kv)}, ${share(kv / capacity)}`, kv);
    tell("bar-free", fits, free);
    at("bar-free").className = free >= 0 ? "" : "warn";
    say("kv-note", `${whole(found.parameters)} parameters. KV: ${bytes(found.kvPerToken)} a token, ` +
      `${bytes(found.kvPerSequence)} a sequence of ${whole(context + tokens)} tokens.`);
    say("memory-each", devices > 1 ? `On each of ${devices} devices:` : "");
    const { largest, slope } = found, floor = total - slope * batch;
    draw.growth(at("growth"), { weights: floor, kv: slope, capacity, batch, largest },
      `Memory over batch: ${bytes(floor)} of weights and ${bytes(slope)} a sequence; ` +
      `${whole(largest)} sequences fit into ${bytes(capacity)}.`);
    say("growth-capacity", `capacity ${bytes(capacity)}, reached after ${whole(largest)} sequences`);
    say("growth-here", `now: ${whole(batch)} ${batch === 1 ? "sequence" : "sequences"}, ${bytes(total)}${draft ? ", with the draft model" : ""}`);
  }

  function showRoofline(device, precision, { works, steps }) {
    const top = plan.rateOf(device, precision.compute), { bandwidth, matmul } = device.efficiency;
    const roofs = [{ rate: top, bandwidth: device.bandwidth }];
    if (bandwidth !== 1 || matmul !== 1) {
      roofs.push({ rate: top * matmul, bandwidth: device.bandwidth * bandwidth, measured: true });
    }
    const points = ["prefill", "decode"].map((name) => {
      const flops = plan.sum(works[name].flops), moved = plan.sum(works[name].bytes);
      return { name, intensity: flops / moved, attained: flops / steps[name].seconds };
    });
    const told = points.map((p) => `${digits(p.intensity)} FLOPs a byte, ${si("FLOP/s")(p.attained)}`);
    const even = `Roof: ${si("B/s")(device.bandwidth)}, ${si("FLOP/s")(top)} (${precision.compute}); ` +
      `the limit changes at ${digits(top / device.bandwidth)} FLOPs a byte`;
    draw.roofline(at("roofline"), { roofs, points }, `${even}. Prefill: ${told[0]}. Decode: ${told[1]}.`);
    say("roofline-prefill", told[0]);
    say("roofline-decode", told[1]);
    say("roofline-even", even + (roofs.length > 1 ? "; dashed: what was measured of it" : ""));
  }

  const partNames = { attention_projections: "attention's linears", mlp: "MLP", link: "link" };

  function showParts({ works, steps }) {
    at("parts").tBodies[1]?.remove();
    at("parts").tBodies[0]?.remove();
    for (const [name, title] of [["prefill", "Prefill"], ["decode", "Decode step"]]) {
      const body = at("parts").createTBody(), work = works[name];
      const row = (cells) => {
        const line = body.insertRow();
        cells.forEach((text, n) => {
          const cell = document.createElement(n ? "td" : "th");
          if (n === 0) Object.assign(cell, cells.length > 1 ? { scope: "row" } : { scope: "rowgroup", colSpan: 6 });
          if (n > 0 && n < 5) cell.className = "n";
          cell.textContent = text;
          line.append(cell);
        });
      };
      row([title]);
      for (const [part, { seconds: time, limit }] of Object.entries(steps[name].parts)) {
        const flops = work.flops[part], moved = work.bytes[part], has = moved > 0;
        row([partNames[part] ?? part, has ? si("FLOP")(flops) : "", has ? bytes(moved) : "",
          has ? digits(flops / moved) : "", seconds(time), limit]);
      }
    }
  }

  // ---- beginning

  function begin() {
    return { ...start, method: "model", detail: null, custom: completed(data.devices[start.device]) };
  }

  function options(id, entries) {
    at(id).append(...entries.map(([value, label]) => new Option(label, value)));
  }

  options("method", Object.entries(data.methods).map(([name, { title }]) => [name, title]));
  options("device", [...data.devices.map(({ name }, n) => [n, name]), [OWN, "custom"]]);
  state = begin();
  listen();
  showControls();
  show();
})();
