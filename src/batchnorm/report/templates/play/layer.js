/* 2. One layer, live: a pool of a few values through the transform and its gradient. */
(() => {
  const start = data.layer;
  const state = { x: [...start.x], dy: [...start.dy] };
  const reach = Math.max(...start.x.map(Math.abs)) <= 10 ? [-10, 10] : around(start.x);
  const step = Number(((reach[1] - reach[0]) / 200).toPrecision(1));
  const gradientReach = Math.max(2, ...start.dy.map((value) => 2 * Math.abs(value)));
  const tiny = Math.max(...start.dy.map(Math.abs)) < 0.2 ? 2.5 * Math.max(...start.dy.map(Math.abs)) || 2 : gradientReach;
  const MOST = 12;

  function around(values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const size = high - low || 1;
    return [low - size / 2, high + size / 2];
  }

  const setting = (id) => Number(byId(`layer-${id}`).value);
  const eps = () => 10 ** setting("eps");

  /* Three values can be followed: the smallest, the middle and the largest, as in `batchnorm lab explain`. */
  function colors(x) {
    const order = x.map((_, i) => i).sort((a, b) => x[a] - x[b] || a - b);
    const found = x.map(() => "--gray");
    found[order[order.length - 1]] = "--baseline";
    found[order[Math.floor(order.length / 2)]] = "--green";
    found[order[0]] = "--batch-norm";
    return found;
  }

  /* As many parts as there are values: what is there stays, since it is what costs a frame. */
  function grow(parts, make) {
    while (parts.length < state.x.length) parts.push(make(parts.length));
    while (parts.length > state.x.length) parts.pop().remove();
  }

  const ROW = 74;
  const forward = byId("layer-forward");
  const lines = (() => {
    const names = ["before: x", "normalized: x̂", "scaled and shifted: y"];
    const parts = names.map((name, row) => svg("g", { class: "numberline" }, text(0, row * ROW + 12, name, { class: "axis" }), svg("g")));
    const links = svg("g", { class: "links" });
    const groups = names.map(() => svg("g"));
    forward.replaceChildren(links, ...parts, ...groups);
    return { axes: parts.map((part) => part.lastChild), links, groups, dots: names.map(() => []), handles: [] };
  })();

  /* Number lines of x, normalized and y; the dots of the first are handles. */
  function buildForward() {
    lines.dots.forEach((dots, row) => grow(dots, (i) => {
      const dot = svg("circle", { r: row ? 5 : 8, class: row ? "dot" : "dot handle" });
      lines.groups[row].append(dot);
      if (row === 0) lines.handles[i] = handleOf(dot, i);
      return dot;
    }));
    lines.handles.length = state.x.length;
  }

  function handleOf(dot, i) {
    return handle(dot, {
      label: `x of value ${i}`, low: reach[0], high: reach[1], step,
      value: () => state.x[i],
      toValue: (event) => valueAt(event, forward, reach),
      onMove: (value) => {
        state.x[i] = value;
        redraw();
      },
    });
  }

  const [LEFT, RIGHT] = [14, 14];

  function valueAt(event, element, [low, high]) {
    const box = element.getBoundingClientRect();
    return low + ((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * (high - low);
  }

  function drawForward(found, paint) {
    const wide = forward.clientWidth || 600;
    forward.setAttribute("viewBox", `0 0 ${wide} ${3 * ROW}`);
    const top = Math.max(4, ...found.y.map(Math.abs));
    const axes = [scale(...reach, LEFT, wide - RIGHT), scale(-4, 4, LEFT, wide - RIGHT), scale(-top, top, LEFT, wide - RIGHT)];
    const rows = [state.x, found.xhat, found.y];
    const at = rows.map((values, row) => values.map((value) => [axes[row].place(value), row * ROW + 34]));
    lines.axes.forEach((group, row) => {
      const y = row * ROW + 34;
      group.replaceChildren(
        svg("line", { x1: LEFT, x2: wide - RIGHT, y1: y, y2: y, class: "grid" }),
        ...axes[row].ticks.map((tick) => text(axes[row].place(tick), y + 24, format(tick), { class: "tick middle" })),
        ...spread(rows[row], axes[row], y),
      );
    });
    lines.links.replaceChildren(...state.x.flatMap((_, i) => [0, 1].map((row) =>
      svg("line", { x1: at[row][i][0], y1: at[row][i][1], x2: at[row + 1][i][0], y2: at[row + 1][i][1], stroke: `var(${paint[i]})` }))));
    at.forEach((row, r) => row.forEach(([x, y], i) => {
      const dot = lines.dots[r][i];
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", y);
      dot.setAttribute("fill", `var(${paint[i]})`);
    }));
    lines.handles.forEach((update) => update());
  }

  /* Mean and one standard deviation to both sides, under the line. */
  function spread(values, axis, y) {
    const { mean, variance } = numbers.batchNorm(values);
    const [from, to] = [mean - Math.sqrt(variance), mean + Math.sqrt(variance)].map(axis.place);
    return [
      svg("line", { x1: from, x2: to, y1: y + 8, y2: y + 8, class: "spread" }),
      svg("circle", { cx: axis.place(mean), cy: y + 8, r: 3, class: "center" }),
    ];
  }

  const BACK = {
    compact: [["arrives: dy", "dy"], ["dy − mean(dy)", "withoutMean"], ["… − x̂ mean(dy x̂)", "withoutBoth"], ["times γ/√(var + eps): dx", "dx"]],
    steps: [["dx̂ = γ dy", "dxhat"], ["by x̂ itself: dx̂/s", "direct"], ["by the variance: dvar · 2(x − mean)/m", "byVariance"], ["by the mean: dmean/m", "byMean"], ["the sum: dx", "dx"]],
  };
  const HIGH = 102;
  const back = byId("layer-backward");
  let arrows = [];
  let way = "";

  function buildBackward() {
    if (way !== byId("layer-way").value) {
      const rows = BACK[byId("layer-way").value];
      back.style.height = `${rows.length * HIGH}px`;
      arrows = rows.map(([name], row) => ({
        group: svg("g", {}, text(0, row * HIGH + 12, name, { class: "axis" }), svg("line", { class: "grid" })), bars: [],
      }));
      back.replaceChildren(...arrows.map(({ group }) => group));
    }
    for (const { group, bars } of arrows)
      grow(bars, () => {
        const bar = svg("g", {}, svg("path", { class: "arrow" }), text(0, 0, "", { class: "tick middle" }));
        group.append(bar);
        return bar;
      });
  }

  function drawBackward(values, paint) {
    const rows = BACK[byId("layer-way").value];
    const wide = back.clientWidth || 600;
    back.setAttribute("viewBox", `0 0 ${wide} ${rows.length * HIGH}`);
    const slot = wide / state.x.length;
    rows.forEach(([, key], row) => {
      const shown = values[key];
      const largest = Math.max(...shown.map(Math.abs), 1e-300);
      const unit = largest < 1e-12 ? 0 : 24 / largest;
      const zero = row * HIGH + 50;
      const line = arrows[row].group.children[1];
      Object.entries({ x1: 0, x2: wide, y1: zero, y2: zero }).forEach(([name, value]) => line.setAttribute(name, value));
      shown.forEach((value, i) => {
        const [arrow, label] = arrows[row].bars[i].children;
        const [x, tip] = [slot * (i + 0.5), zero - value * unit];
        const barb = Math.min(4, Math.abs(tip - zero)) * Math.sign(tip - zero);
        arrow.setAttribute("d", `M${x} ${zero}V${tip}M${x - 4} ${tip - barb}L${x} ${tip}L${x + 4} ${tip - barb}`);
        arrow.setAttribute("stroke", `var(${paint[i]})`);
        label.setAttribute("x", x);
        label.setAttribute("y", zero + 39);
        label.textContent = slot > 54 ? format(unit ? value : 0) : "";
      });
    });
  }

  const TABLE = { compact: [["x"], ["x̂", "xhat"], ["y"], ["dy"], ["dx"]], steps: [["x"], ["x̂", "xhat"], ["dx̂", "dxhat"], ["dx̂/s", "direct"], ["+ by var", "byVariance"], ["+ by mean", "byMean"], ["= dx", "dx"]] };

  const table = [];

  function buildTable() {
    const columns = TABLE[byId("layer-way").value];
    if (way !== byId("layer-way").value) {
      table.splice(0).forEach((row) => row.remove());
      byId("layer-head").replaceChildren(html("th", { scope: "col", role: "columnheader" }, "value"), ...columns.map(([name]) => html("th", { class: "number", scope: "col", role: "columnheader" }, name)));
    }
    way = byId("layer-way").value;
    grow(table, (i) => {
      const cellsOf = columns.map(([name, key = name]) => html("td", { class: "number", role: "cell", "data-of": key, "data-title": name }));
      const row = html("tr", { role: "row" }, html("th", { scope: "row", role: "rowheader" }, `value ${i}`), ...cellsOf);
      byId("layer-rows").append(row);
      return row;
    });
  }

  /* The gradient that arrives is set by sliders, one for each value. */
  const sliders = [];
  function buildSliders() {
    grow(sliders, (i) => {
      const input = html("input", { type: "range", min: -tiny, max: tiny, step: Number((tiny / 100).toPrecision(1)), "aria-label": `dy of value ${i}`, "data-dy": i });
      input.addEventListener("input", () => {
        state.dy[i] = Number(input.value);
        byId("layer-gradient").value = "own";
        redraw();
      });
      byId("layer-dy").append(html("label", {}, html("span", {}, `dy ${i}`), input));
      return input.parentNode;
    });
  }

  function presets(x, gamma, beta) {
    const kind = byId("layer-gradient").value;
    if (kind === "same") state.dy = x.map(() => tiny / 2);
    if (kind === "along") state.dy = numbers.batchNorm(x, 1, 0, eps()).xhat.map((value) => (value * tiny) / 4);
    if (kind === "rest") state.dy = x.map((_, i) => start.dy[i % start.dy.length]);
  }

  let stale = true;

  function draw() {
    if (stale) [buildForward, buildBackward, buildTable, buildSliders].forEach((build) => build());
    stale = false;
    const [gamma, beta] = [setting("gamma"), setting("beta")];
    presets(state.x, gamma, beta);
    const found = numbers.batchNorm(state.x, gamma, beta, eps());
    const steps = numbers.backwardStepwise(state.dy, state.x, gamma, eps());
    const compact = numbers.backward(state.dy, state.x, gamma, eps());
    const all = { ...steps, ...compact, ...found, x: state.x, dy: state.dy, dx: byId("layer-way").value === "steps" ? steps.dx : compact.dx };
    const paint = colors(state.x);
    drawForward(found, paint);
    drawBackward(all, paint);
    table.forEach((row, i) => row.querySelectorAll("td").forEach((cell) => show(cell, all[cell.dataset.of][i])));
    sliders.forEach(({ lastChild: input }, i) => {
      if (document.activeElement !== input) input.value = state.dy[i];
      input.setAttribute("aria-valuetext", format(state.dy[i]));
    });
    show("layer-m", state.x.length);
    show("layer-size-value", state.x.length);
    show("layer-gamma-value", gamma);
    show("layer-beta-value", beta);
    show("layer-eps-value", eps());
    show("layer-mean", found.mean);
    show("layer-variance", found.variance);
    show("layer-invstd", found.invStd);
    show("layer-dgamma", compact.dgamma);
    show("layer-dbeta", compact.dbeta);
    show("layer-dvar", steps.dvar);
    show("layer-dmean", steps.dmean);
    show("layer-sumdx", numbers.sum(all.dx));
    show("layer-gap", Math.max(...steps.dx.map((value, i) => Math.abs(value - compact.dx[i]))));
    says(found, compact);
  }

  function says(found, { dx }) {
    const largest = Math.max(...dx.map(Math.abs));
    const arriving = Math.max(...state.dy.map(Math.abs));
    const gradient = byId("layer-gradient").value;
    if (state.x.length === 1) verdict("layer-says", "bad", "A batch of one: the value is its own mean, so x̂ is 0 and y is β, whatever x is; no gradient leaves. torch refuses to train on it.");
    else if (found.variance === 0) verdict("layer-says", "bad", `A constant channel: the variance is 0, so y is β, and eps alone keeps the division finite: a gradient leaves multiplied by γ/√eps, ${format(setting("gamma") * found.invStd)}.`);
    else if (gradient === "same") verdict("layer-says", "", "The same gradient for all: moving all x together changes nothing that leaves the layer, so no gradient leaves.");
    else if (gradient === "along") verdict("layer-says", "", `A gradient along x̂: stretching all x changes nothing but for eps, so hardly any gradient leaves: ${format(largest)} of ${format(arriving)}.`);
    else if (Math.max(...found.xhat.map(Math.abs)) > 0.95 * Math.sqrt(state.x.length - 1) && state.x.length > 3) verdict("layer-says", "bad", `An outlier: it takes the mean and the variance with it and pushes the others together. No value of ${state.x.length} can be further out than √(m − 1) = ${format(Math.sqrt(state.x.length - 1))}.`);
    else if (setting("gamma") < 0) verdict("layer-says", "", "A negative γ turns the order of the values round.");
    else verdict("layer-says", "", "The values keep their order; their mean becomes β and their standard deviation |γ|, but for eps.");
  }

  const redraw = later(draw);
  function rebuild() {
    stale = true;
    redraw();
  }

  /* The given values again, each time moved a little, so that no dot hides another. */
  const another = (i) => Number((start.x[i % start.x.length] + 5 * step * Math.floor(i / start.x.length)).toPrecision(12));

  function setSize(size) {
    const old = state.x;
    state.x = Array.from({ length: size }, (_, i) => old[i] ?? another(i));
    state.dy = Array.from({ length: size }, (_, i) => state.dy[i] ?? start.dy[i % start.dy.length]);
    byId("layer-size").value = size;
    rebuild();
  }

  function reset() {
    state.x = [...start.x];
    state.dy = [...start.dy];
    for (const [id, value] of [["gamma", start.gamma], ["beta", start.beta], ["eps", Math.log10(start.eps)]]) {
      const input = byId(`layer-${id}`);
      input.min = Math.min(input.min, value);
      input.max = Math.max(input.max, value);
      input.value = value;
    }
    byId("layer-gradient").value = "rest";
    byId("layer-size").value = state.x.length;
    rebuild();
  }

  byId("layer-size").max = Math.max(MOST, start.x.length);
  for (const id of ["gamma", "beta", "eps"]) byId(`layer-${id}`).addEventListener("input", redraw);
  byId("layer-size").addEventListener("input", () => setSize(setting("size")));
  byId("layer-way").addEventListener("change", rebuild);
  byId("layer-gradient").addEventListener("change", redraw);
  byId("layer-one").addEventListener("click", () => setSize(1));
  byId("layer-constant").addEventListener("click", () => {
    state.x = state.x.map(() => (reach[0] + 3 * reach[1]) / 4);
    rebuild();
  });
  byId("layer-outlier").addEventListener("click", () => {
    if (state.x.length < 5) setSize(Math.max(5, start.x.length));
    const calm = (reach[0] + reach[1]) / 2;
    state.x = state.x.map((_, i) => (i ? calm + ((i % 5) - 2) * (reach[1] - reach[0]) * 0.005 : reach[1]));
    rebuild();
  });
  byId("layer-reset").addEventListener("click", reset);
  redraws.push(draw);
  reset();
  draw();
})();
