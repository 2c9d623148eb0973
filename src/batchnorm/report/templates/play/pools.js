/* 1. What shares statistics: the batch as a grid of values, of which one pool lights up. */
(() => {
  const { values, n, c, l, space, layouts } = data.grid;
  const state = { at: 0, counted: Infinity, timer: 0, masked: new Set(), weights: new Map() };
  const LENGTHS = Array.from({ length: n }, (_, i) => Math.max(1, l - ((i * 2) % l)));
  const option = (id) => byId(`pool-${id}`).value;

  /* The shape that is shown: dense input is the first position of each channel. */
  function shape() {
    const layout = option("layout");
    const length = layout === "dense" ? 1 : l;
    const x = [];
    for (let i = 0; i < n * c; i++) for (let t = 0; t < length; t++) x.push(values[i * l + t]);
    return { layout, n, c, l: length, x };
  }

  function valid({ l: length }) {
    const kind = option("valid");
    if (kind === "all" || kind === "weights") return null;
    return Array.from({ length: n * length }, (_, place) =>
      kind === "lengths" ? place % length < LENGTHS[Math.floor(place / length)] : !state.masked.has(place));
  }

  function options(view) {
    const samples = option("samples");
    return {
      ghost: { ghost2: 2, ghost4: 4 }[samples] || 0,
      ranks: samples === "ranks" ? 2 : 0,
      groups: { two: 2, one: 1 }[option("channels")] || 0,
      frame: option("time") === "step" && view.l > 1,
      valid: valid(view),
    };
  }

  function code(view) {
    const samples = option("samples");
    const kind = { dense: "1d", sequence: "1d", last: "1d", image: "2d" }[view.layout];
    const words = [String(c)];
    if (samples.startsWith("ghost")) words.push(`ghost_size=${samples.slice(5)}`);
    if (samples === "all") words.push('process_group="world"');
    if (samples === "domains") words.push("domains=2");
    if (option("channels") !== "each") words.push(`channel_groups=${option("channels") === "two" ? 2 : 1}`);
    if (view.layout === "last") words.push(`pool="${option("time") === "step" ? "frame" : "sequence"}"`);
    if (view.layout === "last" && option("time") === "step") words.push(`max_steps=${view.l}`);
    const extra = { all: "", lengths: ", lengths=lengths", mask: ", mask=mask", weights: ", weights=weights" }[option("valid")];
    return `bn.BatchNorm${kind}(${words.join(", ")})(x${extra})`;
  }

  const SHAPES = {
    dense: `(N, C) = (${n}, ${c})`,
    sequence: `(N, C, L) = (${n}, ${c}, ${l})`,
    last: `(N, L, C) = (${n}, ${l}, ${c})`,
    image: `(N, C, H, W) = (${n}, ${c}, ${space.join(", ")})`,
  };
  const ruledOut = () => ({
    dense: "Dense input has one value a sample and channel, so there are neither positions nor steps.",
    image: "An image has no time steps: all positions share.",
    sequence: 'A step of its own, pool="frame", takes (N, L, C).',
    last: option("time") === "step" ? "A time step is the pool already, so there are no ghost batches." : "",
  });

  /* What docs/pools.md rules out is switched off, and the choice goes back. */
  function restrict(layout) {
    const off = [];
    const switchOff = (select, choice, unless) => {
      const item = [...byId(`pool-${select}`).options].find(({ value }) => value === choice);
      item.disabled = !unless;
      if (!unless && option(select) === choice) byId(`pool-${select}`).value = byId(`pool-${select}`).options[0].value;
      if (!unless) off.push(choice);
    };
    switchOff("time", "step", layout === "last");
    switchOff("valid", "lengths", layout === "sequence" || layout === "last");
    const step = option("time") === "step";
    switchOff("samples", "ghost2", !step);
    switchOff("samples", "ghost4", !step);
    return off;
  }

  for (const item of byId("pool-layout").options) item.disabled = !layouts.includes(item.value);
  byId("pool-layout").value = layouts[0];
  byId("pool-channels").options[1].disabled = c < 2;
  for (const item of byId("pool-samples").options) item.disabled = n < 2 && item.value !== "batch";

  const places = byId("pool-grid");
  let built = "";

  function build(view) {
    if (built === view.layout) return;
    built = view.layout;
    const last = view.layout === "last";
    const blocks = [];
    for (let i = 0; i < n; i++) {
      const rows = [];
      const across = last ? c : view.l;
      for (let a = 0; a < (last ? view.l : c); a++) {
        const row = html("div", { role: "row", class: "cells", style: `--across:${across}` });
        for (let b = 0; b < across; b++) {
          const [k, t] = last ? [b, a] : [a, b];
          const place = (i * c + k) * view.l + t;
          const name = `sample ${i}, channel ${k}${view.l > 1 ? `, ${placeName(view, t)}` : ""}: ${format(view.x[place])}`;
          const cell = html("button", { role: "gridcell", type: "button", tabindex: -1, "data-place": place, "aria-label": name });
          cell.textContent = format(Number(view.x[place].toPrecision(2)));
          row.append(cell);
        }
        rows.push(row);
      }
      const title = html("div", { class: "quiet", id: `pool-sample-${i}` }, `sample ${i}`);
      blocks.push(html("div", { class: "sample" }, title, html("div", { role: "grid", "aria-labelledby": `pool-sample-${i}` }, ...rows)));
    }
    places.replaceChildren(...blocks);
    state.at = Math.min(state.at, view.x.length - 1);
  }

  function placeName({ layout }, t) {
    return layout === "image" ? `row ${Math.floor(t / space[1])}, column ${t % space[1]}` : `step ${t}`;
  }

  function draw() {
    const view = shape();
    const off = restrict(view.layout);
    build(view);
    const labels = numbers.poolLabels(view, options(view));
    const weights = option("valid") === "weights" ? labels.map((_, place) => state.weights.get(weightPlace(view, place)) || 1) : null;
    const { pools, xhat } = numbers.labelledBatchNorm(view.x, labels, weights);
    const label = labels[state.at];
    const pool = pools.get(label);
    const counted = pool ? Math.min(state.counted, pool.places.length) : 0;
    const lit = new Set(pool ? pool.places.slice(0, counted) : []);
    for (const cell of places.querySelectorAll("[role=gridcell]")) {
      const place = Number(cell.dataset.place);
      const own = labels[place];
      cell.dataset.pool = own;
      cell.style.setProperty("--hue", `var(--pool-${((own % 8) + 8) % 8})`);
      const look = own < 0 ? "absent" : own !== label ? "other" : lit.has(place) ? "lit" : "waiting";
      cell.className = look + (weights && weights[place] !== 1 ? " heavy" : "");
      cell.setAttribute("aria-selected", own >= 0 && own === label);
      cell.tabIndex = place === state.at ? 0 : -1;
    }
    show("pool-code", code(view));
    show("pool-shape", SHAPES[view.layout]);
    show("pool-count", pools.size);
    describe(view, pool, counted, weights, xhat);
    byId("pool-counted").max = pool ? pool.places.length : 0;
    byId("pool-counted").value = counted;
    byId("pool-counted").setAttribute("aria-valuetext", `${counted} of ${pool ? pool.places.length : 0} values counted`);
    show("pool-note", [note(view), off.length ? ruledOut()[view.layout] || "" : ""].join(" ").trim());
  }

  const weightPlace = (view, place) => Math.floor(place / (c * view.l)) * view.l + (place % view.l);

  function note(view) {
    const samples = option("samples");
    if (samples === "all") return "On all ranks: counts, means and sums of squares travel, and every rank gets the same result as one machine with the whole batch.";
    if (samples === "ranks") return "Two ranks of half the batch each, as in data-parallel training without process_group=.";
    if (samples === "domains") return "bn.use_domain: the batch is normalized as ever; running statistics are kept for each domain, and evaluation uses those of the domain in use.";
    if (samples.startsWith("ghost")) return "In training alone; the running statistics are merged over the ghosts, so they are those of the whole batch.";
    if (option("valid") === "lengths") return `Valid lengths: ${LENGTHS.join(", ")}. Padding is never read, its output is zero. A PackedSequence has the same pools.`;
    if (option("valid") === "mask") return "Choose a value to take its position out of the pool, and again to put it back.";
    if (option("valid") === "weights") return "Choose a value to count its position twice, and again to count it once.";
    if (view.layout === "last") return option("channels") === "one" ? "All channels of the batch share." : "Channels last: the same pools, the values of a position side by side.";
    return option("channels") === "one" ? "All channels of the batch share: one mean and one variance for everything." : "This is what torch.nn does.";
  }

  function describe(view, pool, counted, weights, xhat) {
    const chosen = byId("pool-chosen");
    const channel = Math.floor(state.at / view.l) % c;
    const where = `sample ${Math.floor(state.at / (c * view.l))}, channel ${channel}${view.l > 1 ? `, ${placeName(view, state.at % view.l)}` : ""}`;
    show(chosen, `${where}: x = ${format(view.x[state.at])}`);
    const partial = pool ? pool.places.slice(0, counted) : [];
    const of = (place) => (weights ? weights[place] : 1);
    const total = numbers.sum(partial.map(of));
    const first = numbers.sum(partial.map((place) => of(place) * view.x[place]));
    const mean = total > 0 ? first / total : NaN;
    const second = numbers.sum(partial.map((place) => of(place) * (view.x[place] - mean) ** 2));
    show("pool-m", total);
    show("pool-sum", first);
    show("pool-mean", mean);
    show("pool-squares", total > 0 ? second : NaN);
    show("pool-variance", total > 0 ? second / total : NaN);
    show("pool-xhat", xhat[state.at]);
    byId("pool-partial").hidden = !pool || counted === pool.places.length;
    if (!pool) verdict("pool-says", "", "This value is in no pool: it is not valid, so it is never read, and its output is zero.");
    else if (pool.places.length === 1) verdict("pool-says", "bad", "A pool of one value: its variance is 0, so it becomes 0, and then beta, whatever it was.");
    else verdict("pool-says", "", `${pool.places.length} values share this mean and this variance${weights ? ` (weights sum to ${format(total)})` : ""}.`);
  }

  const redraw = later(draw);

  function stop() {
    clearInterval(state.timer);
    state.timer = 0;
    byId("pool-play").textContent = "Count them";
  }

  function choose(place) {
    stop();
    const view = shape();
    const [kind, position] = [option("valid"), weightPlace(view, place)];
    if (place === state.at && kind === "mask") state.masked.has(position) ? state.masked.delete(position) : state.masked.add(position);
    if (place === state.at && kind === "weights") state.weights.set(position, state.weights.get(position) === 2 ? 1 : 2);
    state.at = place;
    state.counted = Infinity;
    draw();
  }

  places.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-place]");
    if (cell) choose(Number(cell.dataset.place));
  });
  places.addEventListener("keydown", (event) => {
    const view = shape();
    const last = view.layout === "last";
    const [sample, channel, time] = [Math.floor(state.at / (c * view.l)), Math.floor(state.at / view.l) % c, state.at % view.l];
    const [dc, dt] = { ArrowLeft: last ? [-1, 0] : [0, -1], ArrowRight: last ? [1, 0] : [0, 1], ArrowUp: last ? [0, -1] : [-1, 0], ArrowDown: last ? [0, 1] : [1, 0] }[event.key] || [0, 0];
    const ds = { PageUp: -1, PageDown: 1 }[event.key] || 0;
    if (!dc && !dt && !ds) return;
    event.preventDefault();
    const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
    const place = (within(sample + ds, n) * c + within(channel + dc, c)) * view.l + within(time + dt, view.l);
    if (place !== state.at) {
      state.at = place;
      state.counted = Infinity;
      draw();
    }
    places.querySelector(`[data-place="${state.at}"]`).focus();
  });
  byId("pool-counted").addEventListener("input", (event) => {
    stop();
    state.counted = Number(event.target.value);
    redraw();
  });
  byId("pool-play").addEventListener("click", () => {
    if (state.timer) return stop();
    const last = Number(byId("pool-counted").max);
    if (reducedMotion.matches) {
      state.counted = state.counted >= last ? 1 : state.counted + 1;
      return draw();
    }
    state.counted = 0;
    byId("pool-play").textContent = "Stop";
    state.timer = setInterval(() => {
      state.counted += 1;
      draw();
      if (state.counted >= Number(byId("pool-counted").max)) stop();
    }, 220);
    return draw();
  });
  for (const select of document.querySelectorAll("#pools select"))
    select.addEventListener("change", () => {
      stop();
      state.counted = Infinity;
      draw();
    });
  draw();
})();
