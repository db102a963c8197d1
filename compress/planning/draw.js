// The three charts, drawn to the width that they have: text keeps its size on a narrow screen.
const draw = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const LEFT = 56, RIGHT = 12, TOP = 24, BOTTOM = 46; // room around a plot, px

  function add(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function canvas(svg, height, title) {
    const width = Math.max(240, svg.parentNode.clientWidth);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    add(svg, "title", { id: `${svg.id}-title` }, title);
    return width;
  }

  function line(svg, cls, points) {
    add(svg, "polyline", { class: cls, points: points.map((p) => p.join()).join(" ") });
  }

  // Dashed, on a lighter band, so that it shows on any colour.
  function capacityLine(svg, points) {
    line(svg, "band", points);
    line(svg, "capacity", points);
  }

  // About `count` round numbers from 0 to `top`.
  function ticks(top, count) {
    const raw = top / count, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= raw * (1 - 1e-9));
    return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, n) => n * step);
  }

  // Exponents from low to high, so many that each has room.
  function decades(low, high, room) {
    const by = Math.ceil(((high - low) * 40) / room);
    return Array.from({ length: Math.floor((high - low) / by) + 1 }, (_, n) => low + n * by);
  }

  const PREFIXES = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
  const level = (value) => Math.max(0, Math.min(8, Math.floor(Math.log10(value) / 3 + 1e-9)));
  const round = (value) => Number(value.toPrecision(6));
  const short = (value) => (value < 1e3 ? String(round(value)) : `${round(value / 1e3 ** level(value))}${PREFIXES[level(value)]}`);

  // One bar: weights, KV and a draft model, in the frame of the device's capacity.
  function bar(svg, { weights, kv, draft, capacity }, title) {
    const width = canvas(svg, 44, title), total = weights + kv + draft;
    const scale = (width - 2) / Math.max(capacity, total);
    let x = 1;
    for (const [cls, bytes] of Object.entries({ weights, kv, draft })) {
      add(svg, "rect", { class: cls, x, y: 4, width: bytes * scale, height: 36 });
      x += bytes * scale;
    }
    const end = 1 + capacity * scale;
    add(svg, "rect", { class: "frame", x: 1, y: 4, width: capacity * scale, height: 36 });
    if (total > capacity) capacityLine(svg, [[end, 0], [end, 44]]);
  }

  function axes(svg, width, height, x, y, labels) {
    for (const [at, text] of y) {
      line(svg, "grid", [[LEFT, at], [width - RIGHT, at]]);
      add(svg, "text", { class: "axis", x: LEFT - 6, y: at + 4, "text-anchor": "end" }, text);
    }
    for (const [at, text] of x) {
      line(svg, "grid", [[at, TOP], [at, height - BOTTOM]]);
      const anchor = at > width - RIGHT - 16 ? "end" : "middle";
      const right = anchor === "end" ? width : at;
      add(svg, "text", { class: "axis", x: right, y: height - BOTTOM + 20, "text-anchor": anchor }, text);
    }
    add(svg, "text", { class: "axis", x: 2, y: 12 }, labels.y);
    add(svg, "text", { class: "axis", x: (LEFT + width - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, labels.x);
  }

  // Memory over batch: weights as a floor, KV on it, capacity as a dashed line.
  function growth(svg, { weights, kv, capacity, batch, largest }, title) {
    const height = 260, width = canvas(svg, height, title);
    const last = Math.max(4, 1.25 * (Number.isFinite(largest) ? largest : 0), 1.25 * batch);
    const top = 1.08 * Math.max(capacity, weights + kv * last);
    const x = (n) => LEFT + ((width - LEFT - RIGHT) * n) / last;
    const y = (bytes) => TOP + (height - TOP - BOTTOM) * (1 - bytes / top);
    const unit = 1e3 ** level(top), name = unit === 1 ? "bytes" : `${PREFIXES[level(top)]}B`;
    const right = width - RIGHT, floor = y(0);
    const polygon = (cls, points) => add(svg, "polygon", { class: cls, points: points.join(" ") });
    polygon("weights", [[LEFT, floor], [LEFT, y(weights)], [right, y(weights)], [right, floor]]);
    polygon("kv", [[LEFT, y(weights)], [right, y(weights + kv * last)], [right, y(weights)]]);
    axes(
      svg, width, height,
      ticks(last, width < 480 ? 4 : 8).map((n) => [x(n), short(n)]),
      ticks(top / unit, 4).map((n) => [y(n * unit), String(round(n))]),
      { x: "batch B (sequences)", y: name },
    );
    capacityLine(svg, [[LEFT, y(capacity)], [right, y(capacity)]]);
    line(svg, "here", [[x(batch), TOP], [x(batch), floor]]);
    add(svg, "circle", { class: "decode", cx: x(batch), cy: y(weights + kv * batch), r: 6 });
  }

  // Log-log: attained FLOP/s over FLOPs a byte, under min(rate, bandwidth x intensity).
  function roofline(svg, { roofs, points }, title) {
    const height = 320, width = canvas(svg, height, title), log = Math.log10;
    const ridges = roofs.map((roof) => roof.rate / roof.bandwidth);
    const lowX = Math.floor(log(Math.min(1, ...points.map((p) => p.intensity))) - 0.3);
    const highX = Math.ceil(log(Math.max(...ridges, ...points.map((p) => p.intensity))) + 0.3);
    const peak = Math.max(...roofs.map((roof) => roof.rate));
    const slowest = Math.min(...roofs.map((roof) => roof.bandwidth * 10 ** lowX));
    const lowY = Math.floor(log(Math.min(slowest, ...points.map((p) => p.attained))));
    const highY = Math.ceil(log(peak) + 0.1);
    const x = (v) => LEFT + ((width - LEFT - RIGHT) * (log(v) - lowX)) / (highX - lowX);
    const y = (v) => TOP + ((height - TOP - BOTTOM) * (highY - log(v))) / (highY - lowY);
    axes(
      svg, width, height,
      decades(lowX, highX, width - LEFT - RIGHT).map((e) => [x(10 ** e), short(10 ** e)]),
      decades(lowY, highY, height).map((e) => [y(10 ** e), short(10 ** e)]),
      { x: "FLOPs a byte", y: "FLOP/s" },
    );
    roofs.forEach(({ rate, bandwidth, measured }, n) => {
      const corners = [10 ** lowX, ridges[n], 10 ** highX];
      line(svg, measured ? "measured" : "roof", corners.map((v) => [x(v), y(Math.min(rate, bandwidth * v))]));
    });
    const marks = points.map((p) => ({ ...p, x: x(p.intensity), y: y(p.attained) }));
    for (const mark of marks) {
      if (mark.name === "prefill") {
        add(svg, "rect", { class: mark.name, x: mark.x - 6, y: mark.y - 6, width: 12, height: 12 });
      } else add(svg, "circle", { class: mark.name, cx: mark.x, cy: mark.y, r: 6.5 });
    }
    // A label stands below its point and to its right, where the roof is not; else where there is room.
    const taken = marks.map((mark) => ({ left: mark.x - 8, right: mark.x + 8, top: mark.y - 8, bottom: mark.y + 8 }));
    for (const mark of marks) {
      const places = [10, -24, -58].flatMap((aside) => [8, 24, 40].map((down) => box(mark.x + aside, mark.y + down)));
      const free = places.find((place) => !taken.some((other) => meet(place, other)) && place.left >= LEFT &&
        place.right <= width - RIGHT && place.bottom <= height - BOTTOM) ?? box(mark.x - 58, mark.y - 26);
      add(svg, "text", { x: free.left, y: free.bottom - 4 }, mark.name);
      taken.push(free);
    }
  }

  function box(left, top) {
    return { left, right: left + 48, top, bottom: top + 16 };
  }

  function meet(a, b) {
    return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  }

  return { bar, growth, roofline };
})();
