/* 3. The running average: what is kept for inference, batch after batch. */
(() => {
  const batches = data.batches.map(([count, mean, m2]) => ({ count, mean, m2 }));
  const whole = batches.reduce(numbers.merge);
  const COLOR = { moving: "--batch-norm", debiased: "--green", cumulative: "--purple", exact: "--orange" };
  const NAME = { moving: "moving average", debiased: "debiased", cumulative: "cumulative", exact: "exact so far" };
  const setting = (id) => byId(`running-${id}`).value;

  function options() {
    return {
      kind: setting("kind"), momentum: Number(setting("momentum")), dtype: setting("dtype"), unbiased: setting("variance") === "unbiased",
    };
  }

  const keras = () => byId("running-decay-as").getAttribute("aria-pressed") === "true";
  const decay = (momentum) => Number((1 - momentum).toPrecision(12));

  function code({ kind, momentum, unbiased, dtype }) {
    if (kind === "exact") return "bn.calibrate(net, batches)";
    const words = ["C"];
    if (dtype.endsWith("16") && unbiased && kind !== "debiased") return `torch.nn.BatchNorm2d(C, momentum=${kind === "cumulative" ? "None" : momentum}).to(torch.${dtype})`;
    if (kind === "cumulative") words.push("momentum=None");
    else words.push(keras() ? `decay=${decay(momentum)}` : `momentum=${momentum}`);
    if (kind === "debiased") words.push('running="debiased"');
    if (!unbiased) words.push('running_var="biased"');
    return `bn.BatchNorm2d(${words.join(", ")})`;
  }

  function plot(id, key, kept, { kind }, at) {
    const of = key === "mean" ? (batch) => batch.mean : (batch) => numbers.varianceOf(batch, options().unbiased);
    const points = (values, from = 1) => values.map((value, i) => [i + from, value]);
    const exact = key === "mean" ? whole.mean : numbers.varianceOf(whole, true);
    const first = kind === "moving" ? [[0, key === "mean" ? 0 : 1]] : [];
    const every = [...batches.map(of), ...kept.map((item) => item[key]), exact, ...first.map(([, value]) => value)];
    const [low, high] = [Math.min(...every), Math.max(...every)];
    const margin = (high - low || 1) * 0.06;
    chart(byId(id), {
      x: { low: 0, high: batches.length, label: "batch", least: 1 },
      y: { low: low - margin, high: high + margin, label: key === "mean" ? "mean" : "variance" },
      dots: [{ points: points(batches.map(of)), color: "--gray" }],
      lines: [
        { name: "all data", color: "--quiet", dash: "5 4", points: [[0, exact], [batches.length, exact]] },
        { name: NAME[kind], color: COLOR[kind], points: [...first, ...points(kept.map((item) => item[key]))] },
      ],
      mark: at,
      height: 210,
    });
  }

  function draw() {
    const chosen = options();
    const at = Number(setting("at"));
    const kept = numbers.runningStatistics(batches, chosen);
    plot("running-means", "mean", kept, chosen, at);
    plot("running-variances-plot", "variance", kept, chosen, at);
    const [batch, running] = [batches[at - 1], kept[at - 1]];
    const x = Number(setting("x"));
    const spread = Math.sqrt(numbers.varianceOf(whole, true));
    const value = whole.mean + x * spread;
    const [train] = numbers.inference([value], batch.mean, numbers.varianceOf(batch, false));
    const [evaluation] = numbers.inference([value], running.mean, running.variance);
    show("running-code", code(chosen));
    show("running-momentum-value", chosen.momentum);
    show("running-decay", decay(chosen.momentum));
    show("running-kind-of-variance", chosen.unbiased ? "variance, unbiased" : "variance, unbiased; kept: biased");
    byId("running-momentum").setAttribute("aria-valuetext", format(keras() ? decay(chosen.momentum) : chosen.momentum));
    show("running-at-value", at);
    show("running-x-value", value);
    show("running-batch-mean", batch.mean);
    show("running-batch-variance", numbers.varianceOf(batch, false));
    show("running-batch-unbiased", numbers.varianceOf(batch, true));
    show("running-mean", running.mean);
    show("running-variance-kept", running.variance);
    show("running-exact-mean", whole.mean);
    show("running-exact-variance", numbers.varianceOf(whole, true));
    show("running-train", train);
    show("running-eval", evaluation);
    show("running-apart", evaluation - train);
    byId("running-momentum").disabled = chosen.kind === "cumulative" || chosen.kind === "exact";
    says(chosen, kept, at);
  }

  /* How many of the last batches left the kept value where it was, though they differed from it. */
  function stuck(key, kept, of) {
    let count = 0;
    for (let i = kept.length - 1; i > 0 && kept[i][key] === kept[i - 1][key] && of(batches[i]) !== kept[i][key]; i--) count += 1;
    return count;
  }

  function says(chosen, kept, at) {
    const moved = chosen.kind !== "exact";
    const frozen = {
      mean: moved ? stuck("mean", kept, (batch) => batch.mean) : 0,
      variance: moved ? stuck("variance", kept, (batch) => numbers.varianceOf(batch, chosen.unbiased)) : 0,
    };
    const worst = frozen.mean >= frozen.variance ? "mean" : "variance";
    const left = (1 - chosen.momentum) ** at;
    const error = (item) => Math.abs(item.mean - whole.mean) / Math.sqrt(numbers.varianceOf(whole, true));
    const last = kept[kept.length - 1];
    const wide = numbers.runningStatistics(batches, { ...chosen, dtype: "float64" });
    const lost = Math.abs(last.mean - wide[wide.length - 1].mean) / Math.sqrt(numbers.varianceOf(whole, true));
    show("running-stuck", frozen[worst]);
    show("running-lost", lost);
    if (frozen[worst] > 2) verdict("running-says", "bad", `It sticks: the last ${frozen[worst]} batches did not move the ${worst}, because their share of the difference is less than half the distance between two numbers of ${chosen.dtype}. Layers of torch.nn do this after .half() or .bfloat16(); those of this package keep float32 there, and carry what rounding leaves.`);
    else if (chosen.dtype.endsWith("16")) verdict("running-says", lost > 0.02 ? "bad" : "", `Kept in ${chosen.dtype}, the mean is ${format(lost)} standard deviations from what float64 keeps. With a smaller momentum it sticks.`);
    else if (chosen.kind === "moving" && left > 0.05) verdict("running-says", "bad", `After ${at} batches ${format(100 * left)} % of what is kept are still the initial values 0 and 1, which no data ever had.`);
    else if (chosen.kind === "moving") verdict("running-says", "", `The last ${format(1 / chosen.momentum)} batches or so count; it ends ${format(error(last))} standard deviations from the mean of all data.`);
    else if (chosen.kind === "debiased") verdict("running-says", "", "Divided by 1 − (1 − momentum)ᵗ, the share that data have in it: after one batch it is that batch's, and the initial values are gone.");
    else if (chosen.kind === "cumulative") verdict("running-says", "", "All batches count alike, also the early ones of a network that has changed since. The variance between batches is not in it.");
    else verdict("running-says", "good", "All values of all batches are one pool, so the variance between batches is in it, too: this is what bn.calibrate gives.");
  }

  const redraw = later(draw);
  for (const control of controls("running")) control.addEventListener("input", redraw);
  byId("running-decay-as").addEventListener("click", (event) => {
    const old = !keras();
    event.currentTarget.setAttribute("aria-pressed", old);
    byId("running-convention").textContent = old ? "momentum of Keras and Flax: the share of the old" : "momentum of torch: the share of the new";
    byId("running-shown-momentum").hidden = old;
    byId("running-shown-decay").hidden = !old;
    redraw();
  });
  byId("running-at").max = batches.length;
  byId("running-at").value = Math.min(20, batches.length);
  redraws.push(draw);
  draw();
})();
