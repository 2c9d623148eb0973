/* 4. Fold it: a convolution and a batch norm become one convolution, where that is exact. */
(() => {
  const start = data.fold;
  const setting = (id) => Number(byId(`fold-${id}`).value);
  const FIELDS = ["w0", "w1", "w2", "bias", "gamma", "beta", "mean", "variance"];
  const kind = () => byId("fold-case").value;
  const maxPool = (z) => z.slice(0, -1).map((value, i) => Math.max(value, z[i + 1]));
  const relu = (z) => z.map((value) => Math.max(value, 0));
  const affineOf = (map, z) => z.map((value) => map.scale * value + map.shift);

  /* What each case computes, what the folded network would, and why it is refused where it is. */
  const CASES = {
    after(x, w, b, map, padding) {
      const z = numbers.convolve(x, w, b, padding);
      const folded = numbers.foldAfter(w, b, map);
      return { y: affineOf(map, z), folded, out: numbers.convolve(x, folded.weight, folded.bias, padding) };
    },
    before(x, w, b, map, padding) {
      const folded = numbers.foldBefore(w, b, map);
      const value = numbers.paddingValue(map);
      const mended = byId("fold-repair").checked && Number.isFinite(value);
      const y = numbers.convolve(affineOf(map, x), w, b, padding);
      const out = numbers.convolve(x, folded.weight, folded.bias, padding, mended ? value : 0);
      const wrong = padding && !mended && map.shift !== 0;
      const how = Number.isFinite(value) ? "Pad by −shift/scale, as bn.fold does." : "With γ = 0 no value to pad by becomes 0.";
      return { y, folded, out, wrong: wrong ? `The zeros of the padding come behind the batch norm, which must not shift them; folded, they come before the shift, and the border is wrong. ${how}` : "" };
    },
    pool(x, w, b, map, padding) {
      const z = numbers.convolve(x, w, b, padding);
      const folded = numbers.foldAfter(w, b, map);
      const why = map.scale < 0 ? "γ is negative: it turns the order round, so the largest value before it is the smallest after it. Folding needs no negative scale." : "";
      return { y: affineOf(map, maxPool(z)), folded, out: maxPool(numbers.convolve(x, folded.weight, folded.bias, padding)), why };
    },
    relu(x, w, b, map, padding) {
      const z = numbers.convolve(x, w, b, padding);
      const folded = numbers.foldAfter(w, b, map);
      const why = "Scale and shift do not pass through a ReLU: it cuts at 0, and the shift moves what lies at 0. It stays, as one scale and shift.";
      return { y: affineOf(map, relu(z)), folded, out: relu(numbers.convolve(x, folded.weight, folded.bias, padding)), why };
    },
    readers(x, w, b, map, padding) {
      const z = numbers.convolve(x, w, b, padding);
      const folded = numbers.foldAfter(w, b, map);
      const out = numbers.convolve(x, folded.weight, folded.bias, padding);
      const why = "Something else reads the convolution, too (a skip connection, a second head): it would get the batch norm's output instead.";
      return { y: [...affineOf(map, z), ...z], folded, out: [...out, ...out], why, split: z.length };
    },
  };

  function draw() {
    const values = Object.fromEntries(FIELDS.map((id) => [id, setting(id)]));
    const weight = [values.w0, values.w1, values.w2];
    const map = numbers.inferenceAffine(values.mean, values.variance, values.gamma, values.beta, start.eps);
    const padding = byId("fold-padding").checked ? 1 : 0;
    const found = CASES[kind()](start.signal, weight, values.bias, map, padding);
    const gap = Math.max(...found.y.map((value, i) => Math.abs(value - found.out[i])));
    for (const id of FIELDS) show(`fold-${id}-value`, values[id]);
    show("fold-scale", map.scale);
    show("fold-shift", map.shift);
    found.folded.weight.forEach((value, i) => show(`fold-w${i}-folded`, value));
    show("fold-bias-folded", found.folded.bias);
    show("fold-pad-value", numbers.paddingValue(map));
    show("fold-gap", gap);
    byId("fold-repair-label").hidden = kind() !== "before" || !padding;
    table(found);
    plot(found);
    says(found, gap);
  }

  function table({ y, out, split = y.length }) {
    byId("fold-rows").replaceChildren(...y.map((value, i) => {
      const name = i < split ? `output ${i}` : `other reader, ${i - split}`;
      return html("tr", {}, html("th", { scope: "row" }, name), ...cells([value, out[i], out[i] - value]));
    }));
  }

  function plot({ y, out }) {
    const every = [...y, ...out];
    const [low, high] = [Math.min(...every), Math.max(...every)];
    const margin = (high - low || 1) * 0.08;
    chart(byId("fold-plot"), {
      x: { low: 0, high: y.length - 1, label: "output", least: 1 },
      y: { low: low - margin, high: high + margin, label: "value" },
      dots: [{ points: y.map((value, i) => [i, value]), color: "--batch-norm" }],
      lines: [
        { name: "as it is", color: "--batch-norm", points: y.map((value, i) => [i, value]) },
        { name: "folded", color: "--baseline", dash: "6 4", points: out.map((value, i) => [i, value]) },
      ],
      height: 190,
    });
  }

  function says({ why, wrong, y }, gap) {
    const size = Math.max(1, ...y.map(Math.abs));
    if (wrong) verdict("fold-says", "bad", `Not like this. ${wrong} Outputs differ by up to ${format(gap)}.`);
    else if (why) verdict("fold-says", "bad", `Refused. ${why}${gap <= 1e-12 * size ? " Here no output shows it; another input would." : ` Outputs would differ by up to ${format(gap)}.`}`);
    else verdict("fold-says", "good", `Folds: one convolution gives the same outputs, but for rounding (${format(gap)}).`);
  }

  function reset() {
    const given = { w0: start.kernel[0], w1: start.kernel[1], w2: start.kernel[2], ...start };
    for (const id of FIELDS) {
      const input = byId(`fold-${id}`);
      const [low, high] = [Number(input.min), Number(input.max)];
      if (given[id] < low) input.min = 2 * given[id];
      if (given[id] > high) input.max = 2 * given[id];
      input.value = given[id];
    }
    draw();
  }

  const redraw = later(draw);
  for (const control of controls("fold")) if (control.type !== "button") control.addEventListener("input", redraw);
  byId("fold-reset").addEventListener("click", reset);
  redraws.push(draw);
  reset();
})();
