// The controls, and what they show: every number comes from `plan` (formulas.js).
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const say = (id, text) => { at(id).textContent = text; };

  // ---- numbers with units
  const digits = (value) => (value === 0 ? "0" : value.toLocaleString("en", { maximumSignificantDigits: 3 }));
  function scaled(value, units) {
    if (!Number.isFinite(value)) return "unlimited";
    const [size, name] = units.find(([size]) => value >= size * 0.9995) ?? units.at(-1);
    return `${digits(value / size)} ${name}`;
  }
  const prefixes = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
  const si = (unit) => (value) => scaled(value, prefixes.map(([size, prefix]) => [size, prefix + unit]));
  const bytes = (value) => scaled(value, [...prefixes.slice(2, -1).map(([size, prefix]) => [size, `${prefix}B`]), [1, "bytes"]]);
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
    context: { stops: doubling(64, Math.max(131072, data.shape.max_context)), low: 1, high: 1e8, whole: true, unit: "tokens" },
    tokens: { stops: doubling(1, 16384), low: 1, high: 1e8, whole: true, unit: "tokens" },
    draft: { stops: steps(0, 16, 1), low: 0, high: 64, whole: true, unit: "tokens" },
    acceptance: { stops: steps(0, 1, 0.05), low: 0, high: 1, unit: "of the drafted tokens" },
    cost: { stops: steps(0, 1, 0.05), low: 0, high: 10, unit: "steps" },
  };
  for (const [name, control] of Object.entries(numbers)) {
    control.stops = ordered([...control.stops, start[name]]);
  }
  const names = { weights: Object.keys(data.weights), kv: Object.keys(data.kv) };
  let state;

  function nearest(stops, value) {
    return stops.reduce((best, stop, n) => (Math.abs(stop - value) < Math.abs(stops[best] - value) ? n : best), 0);
  }

  function showControls() {
    for (const [name, { stops, unit }] of Object.entries(numbers)) {
      const slider = at(name);
      slider.max = stops.length - 1;
      slider.value = nearest(stops, state[name]);
      slider.setAttribute("aria-valuetext", `${state[name].toLocaleString("en")} ${unit}`);
      if (document.activeElement !== at(`${name}-number`)) at(`${name}-number`).value = state[name];
    }
    for (const [name, list] of Object.entries(names)) {
      const slider = at(name), bits = name === "kv" ? data.kv[state.kv] : data.weights[state.weights].weights;
      slider.max = list.length - 1;
      slider.value = list.indexOf(state[name]);
      const text = state[name] === `${bits} bits` ? state[name] : `${state[name]}, ${digits(bits)} bits`;
      say(`${name}-output`, text);
      slider.setAttribute("aria-valuetext", text);
    }
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
    at("custom").hidden = state.device !== "custom";
    say("device-source", state.device === "custom" ? "Your own numbers." : data.devices[state.device].source);
    for (const [name, { get, unit }] of Object.entries(custom)) {
      const input = at(`custom-${name}`);
      if (document.activeElement !== input) input.value = Number((get(state.custom) / unit).toPrecision(9));
    }
    for (const id of ["acceptance", "cost"]) at(id).disabled = at(`${id}-number`).disabled = state.draft === 0;
  }

  const custom = {
    memory: { unit: 1e9, get: (d) => d.memory, set: (d, v) => ({ ...d, memory: v }) },
    bandwidth: { unit: 1e9, get: (d) => d.bandwidth, set: (d, v) => ({ ...d, bandwidth: v }) },
  };
  for (const name of data.rates) {
    custom[name] = { unit: 1e12, get: (d) => d.rates[name], set: (d, v) => ({ ...d, rates: { ...d.rates, [name]: v } }) };
  }

  function change(update) {
    state = { ...state, ...update };
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
    at("device").addEventListener("input", (event) => {
      const device = event.target.value;
      // a custom device begins as the one that was chosen before it
      change({ device, ...(device === "custom" ? { custom: completed(chosen()) } : {}) });
    });
    for (const [name, { unit, set }] of Object.entries(custom)) {
      accept(at(`custom-${name}`), (value) => value > 0, (value) => ({ custom: set(state.custom, value * unit) }));
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
