/* What all parts of the page share: numbers as text, SVG, charts with names at the ends of their lines, and dots that are
 * moved with the pointer or the keyboard. */
const byId = (id) => document.getElementById(id);
const controls = (part) => document.querySelectorAll(`#${part} input, #${part} select, #${part} button`);
const reducedMotion = window.matchMedia("(prefers-reduced-motion: reduce)");

/* Four significant digits, with a true minus, and a dash for what is not there yet; the number itself stays in data-value. */
function format(value) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return String(value).replace("Infinity", "∞").replace("-", "−");
  const size = Math.abs(value);
  const text = value === 0 || (size >= 1e-3 && size < 1e5) ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  return text.replaceAll("-", "−");
}

function show(id, value) {
  const element = typeof id === "string" ? byId(id) : id;
  const text = typeof value === "number" ? format(value) : value;
  if (element.textContent !== text) element.textContent = text;
  if (element.htmlFor && element.htmlFor.length) byId(element.htmlFor.value).setAttribute("aria-valuetext", text);
  if (typeof value === "number") element.dataset.value = String(value);
}

/* Calls of one frame become one. */
function later(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
}

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const text = (x, y, content, attributes = {}) => svg("text", { x, y, ...attributes }, content);

/* An axis in pixels: value -> place, with round values to write on it; `least` between two of them. */
function scale(low, high, from, to, { log = false, apartBy = 70, least = 0 } = {}) {
  const warp = log ? Math.log10 : (value) => value;
  const [start, end] = [warp(low), warp(high)];
  const place = (value) => from + ((warp(value) - start) / (end - start || 1)) * (to - from);
  const ticks = [];
  if (log) {
    for (let power = Math.ceil(start - 1e-9); power <= Math.floor(end + 1e-9); power++) ticks.push(10 ** power);
    if (ticks.length < 2) ticks.splice(0, ticks.length, low, high);
  } else {
    const rough = (high - low) / Math.max(2, Math.abs(to - from) / apartBy);
    const size = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(least, size * [1, 2, 5, 10].find((factor) => size * factor >= rough));
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  }
  return { place, ticks };
}

/* Places of labels of one height, pushed apart so that none covers another. */
function apart(places, height, low, high) {
  const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
  const found = [...places];
  order.forEach((i, rank) => {
    found[i] = Math.max(found[i], low, rank ? found[order[rank - 1]] + height : low);
  });
  for (let rank = order.length - 1; rank >= 0; rank--) {
    const limit = rank === order.length - 1 ? high : found[order[rank + 1]] - height;
    found[order[rank]] = Math.min(found[order[rank]], limit);
  }
  return found;
}

/* A chart in an <svg>: lines [{name, color, dash, points}], dots, an x to mark; names stand at the ends of the lines. */
function chart(element, { lines, dots = [], x, y, mark = null, height = 220 }) {
  const width = element.clientWidth || 600;
  const longest = Math.max(...lines.map(({ name }) => name.length));
  const [left, right, top, bottom] = [46, Math.min(longest * 7.7 + 12, width * 0.4), 22, 34];
  const across = scale(x.low, x.high, left, width - right, { log: x.log, least: x.least });
  const up = scale(y.low, y.high, height - bottom, top, { log: y.log, apartBy: 36 });
  const inside = (value) => Math.min(Math.max(value, y.low), y.high);
  const parts = [];
  for (const tick of up.ticks)
    parts.push(
      svg("line", { x1: left, x2: width - right, y1: up.place(tick), y2: up.place(tick), class: "grid" }),
      text(left - 6, up.place(tick) + 4, format(tick), { class: "tick end" }),
    );
  for (const tick of across.ticks) parts.push(text(across.place(tick), height - bottom + 17, format(tick), { class: "tick middle" }));
  parts.push(text(0, 12, y.label, { class: "axis" }), text(width - right, height - 2, x.label, { class: "axis end" }));
  if (mark !== null) parts.push(svg("line", { x1: across.place(mark), x2: across.place(mark), y1: top, y2: height - bottom, class: "mark" }));
  for (const { points, color } of dots)
    for (const [a, b] of points) parts.push(svg("circle", { cx: across.place(a), cy: up.place(inside(b)), r: 2.4, fill: `var(${color})`, class: "dot" }));
  const shown = lines.filter(({ points }) => points.length);
  for (const { points, color, dash = "" } of shown)
    if (points.length === 1) // a line of one point is not to be seen
      parts.push(svg("circle", { cx: across.place(points[0][0]), cy: up.place(inside(points[0][1])), r: 2.4, fill: `var(${color})`, class: "dot" }));
    else parts.push(
      svg("polyline", {
        points: points.map(([a, b]) => `${across.place(a).toFixed(1)},${up.place(inside(b)).toFixed(1)}`).join(" "),
        class: "line",
        stroke: `var(${color})`,
        "stroke-dasharray": dash,
      }),
    );
  const ends = shown.map(({ points }) => up.place(inside(points[points.length - 1][1])) + 4);
  apart(ends, 15, top + 4, height - bottom + 4).forEach((place, i) => {
    parts.push(text(width - right + 7, place, shown[i].name, { fill: `var(${shown[i].color}-text)`, class: "name" }));
  });
  element.setAttribute("viewBox", `0 0 ${width} ${height}`);
  element.style.height = `${height}px`;
  element.replaceChildren(...parts);
}

/* A dot with a handle for pointer and keyboard: a slider of `low` to `high`. */
function handle(element, { label, low, high, step, value, toValue, onMove }) {
  const keys = {
    ArrowRight: step, ArrowUp: step, ArrowLeft: -step, ArrowDown: -step, PageUp: 10 * step, PageDown: -10 * step,
  };
  const bounded = (wanted) => Math.min(high, Math.max(low, wanted));
  const set = (attributes) => Object.entries(attributes).forEach(([key, content]) => element.setAttribute(key, content));
  set({ role: "slider", tabindex: 0, "aria-label": label, "aria-valuemin": low, "aria-valuemax": high });
  const update = () => set({ "aria-valuenow": Number(value().toPrecision(6)), "aria-valuetext": format(value()) });
  const move = (wanted) => {
    onMove(bounded(wanted));
    update();
  };
  element.addEventListener("keydown", (event) => {
    if (event.key === "Home" || event.key === "End") move(event.key === "Home" ? low : high);
    else if (event.key in keys) move(Number((value() + keys[event.key]).toPrecision(12)));
    else return;
    event.preventDefault();
  });
  element.addEventListener("pointerdown", (event) => {
    element.setPointerCapture(event.pointerId);
    element.focus();
    event.preventDefault();
  });
  element.addEventListener("pointermove", (event) => {
    if (!element.hasPointerCapture(event.pointerId)) return;
    move(Math.round(toValue(event) / step) * step);
  });
  return update;
}

/* Cells of a table's row, numbers as text. */
const cells = (values) => values.map((value) => {
  const cell = html("td", { class: "number" });
  show(cell, value);
  return cell;
});

/* A verdict: "good", "bad" or "" and the sentence. */
function verdict(id, kind, sentence) {
  const element = byId(id);
  element.className = `says ${kind}`;
  show(element, sentence);
}

const redraws = [];
let width = window.innerWidth;
window.addEventListener("resize", later(() => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  redraws.forEach((draw) => draw());
}));
