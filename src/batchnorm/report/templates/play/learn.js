/* 5. A network learns: the same weights, the same batches, with batch norm and without. */
(() => {
  const { x, y, testX, testY, classes, hidden } = data.learn;
  const ARMS = [["batch norm", true, "--batch-norm"], ["without", false, "--baseline"]];
  const RATES = Array.from({ length: 9 }, (_, i) => i / 2);
  const BUDGET = 7; // milliseconds of a frame for steps; every other frame draws
  const ALONG = 16; // frames from one look along the gradient to the next, which takes a frame of its own
  const HUNDRED = 100; // steps of a press
  const MOST = 3000; // steps
  const setting = (id) => byId(`learn-${id}`).value;
  let state = null;
  let until = 0; // the step at which a run ends; none is under way once it is reached
  let seen = -1; // the step after which the batch's loss was last measured along the gradient

  const busy = () => state !== null && state.step < until;

  function start() {
    const layers = [x[0].length, ...hidden, classes];
    const make = (normalized) => numbers.makeNetwork(layers, {
      seed: Number(setting("seed")), spread: Number(setting("spread")), normalized, activation: setting("activation"),
    });
    state = { step: 0, frame: 0, along: [null, null], arms: ARMS.map(([name, normalized, color]) => ({ name, color, network: make(normalized), loss: [], accuracy: [], unit: [], along: null, mean: NaN })) };
    [until, seen] = [0, 0];
    state.arms.forEach(measure);
    draw();
  }

  const rate = () => 10 ** Number(setting("rate"));
  const every = () => (state.step < 100 ? 5 : 20);

  function batch() {
    const places = numbers.batchPlaces(x.length, Math.min(Number(setting("size")), x.length), Number(setting("seed")), state.step);
    return [places.map((i) => x[i]), places.map((i) => y[i])];
  }

  /* Test accuracy under the running statistics, and what one unit of the last hidden layer receives. */
  function measure(arm) {
    const { accuracy, loss, trace } = numbers.evaluate(arm.network, testX, testY);
    const unit = trace[trace.length - 2].z.map((row) => row[0]);
    arm.accuracy.push([state.step, 100 * accuracy]);
    arm.loss.push([state.step, loss]);
    arm.unit.push([state.step, [0.15, 0.5, 0.85].map((q) => numbers.quantile(unit, q))]);
  }

  function step() {
    const [bx, by] = batch();
    for (const arm of state.arms) {
      const before = arm.network;
      const { network, loss, found } = numbers.trainStep(before, bx, by, rate());
      arm.network = network;
      arm.mean = loss;
      arm.last = () => numbers.lossAlong(before, bx, by, found, RATES.map((factor) => factor * rate()));
    }
    state.step += 1;
    if (state.step % every() === 0) state.arms.forEach(measure);
  }

  const percent = (points) => points[points.length - 1][1];

  function draw() {
    const high = Math.max(20, state.step);
    const lossAxis = { low: 0, high: Math.max(1.3, ...state.arms.map(({ loss }) => Math.min(loss[0][1] * 1.3, Math.max(...loss.map(([, value]) => value))))), label: "test loss (nats)" };
    const lines = (key) => state.arms.map(({ name, color, ...arm }) => ({ name, color, points: arm[key], dash: name === "without" ? "6 3" : "" }));
    chart(byId("learn-loss"), { x: { low: 0, high, label: "step" }, y: lossAxis, lines: lines("loss"), height: 200 });
    chart(byId("learn-accuracy"), { x: { low: 0, high, label: "step" }, y: { low: 0, high: 100, label: "test accuracy (%)" }, lines: lines("accuracy"), height: 200 });
    for (const [i, arm] of state.arms.entries()) {
      const at = (k) => arm.unit.map(([where, values]) => [where, values[k]]);
      const flat = state.arms.flatMap(({ unit }) => unit.flatMap(([, values]) => values)).filter(Number.isFinite);
      const limit = Math.max(1, ...flat.map(Math.abs));
      chart(byId(`learn-unit-${i}`), {
        x: { low: 0, high, label: "step" }, y: { low: -limit, high: limit, label: `a hidden unit, ${i ? "without" : "with batch norm"}` },
        lines: [[2, "85 %"], [1, "50 %"], [0, "15 %"]].map(([k, name]) => ({ name, color: arm.color, dash: k === 1 ? "" : "4 3", points: at(k) })), height: 180,
      });
    }
    const { along } = state;
    const tops = along.flatMap((losses) => losses || []).filter(Number.isFinite);
    chart(byId("learn-along"), {
      x: { low: 0, high: RATES[RATES.length - 1], label: "times the step" },
      y: { low: 0, high: Math.max(1.3, Math.min(8, ...[Math.max(0, ...tops)])), label: "batch's loss along its gradient" },
      lines: state.arms.map(({ name, color }, i) => ({ name, color, dash: name === "without" ? "6 3" : "", points: along[i] ? RATES.map((factor, k) => [factor, along[i][k]]) : [] })),
      mark: 1, height: 200,
    });
    show("learn-step", state.step);
    show("learn-rate-value", rate());
    show("learn-spread-value", Number(setting("spread")));
    show("learn-size-value", Math.min(Number(setting("size")), x.length));
    show("learn-seed-value", Number(setting("seed")));
    state.arms.forEach((arm, i) => {
      show(`learn-batchloss-${i}`, arm.mean);
      show(`learn-testloss-${i}`, percent(arm.loss));
      show(`learn-testaccuracy-${i}`, percent(arm.accuracy));
      show(`learn-flat-${i}`, along[i] ? Math.max(...along[i]) - Math.min(...along[i]) : NaN);
      show(`learn-width-${i}`, arm.unit[arm.unit.length - 1][1][2] - arm.unit[arm.unit.length - 1][1][0]);
    });
    says();
  }

  function says() {
    const [ours, others] = state.arms.map(({ accuracy }) => percent(accuracy));
    const best = state.arms.map(({ accuracy }) => Math.max(...accuracy.map(([, value]) => value)));
    const reached = state.arms[0].accuracy.find(([, value]) => value >= best[1]);
    const mine = state.arms[1].accuracy.find(([, value]) => value >= best[1]);
    if (state.step === 0) verdict("learn-says", "", `Nothing learned yet: both have the same weights.`);
    else if (state.arms.some(({ mean }) => !Number.isFinite(mean))) verdict("learn-says", "bad", "A loss is not finite any more: the rate is too high for one of them.");
    else if (best[0] > best[1] && reached && mine[0] > reached[0]) verdict("learn-says", "good", `With batch norm ${format(ours)} % after ${state.step} steps, without ${format(others)} %; it had the other’s best, ${format(best[1])} %, at step ${reached[0]} instead of ${mine[0]}.`);
    else verdict("learn-says", "", `With batch norm ${format(ours)} % after ${state.step} steps, without ${format(others)} %. On this task and with this rate the lead is small or gone: it depends on both.`);
  }

  function look() {
    seen = state.step;
    state.along = state.arms.map((arm) => (arm.last ? arm.last() : null));
  }

  /* One frame of a run: steps, a drawing, or a look along the gradient, never two of them. After the last step come a look
   * and a drawing, and the section is no longer busy: only then does a screen reader say what was found. */
  function frame() {
    state.frame += 1;
    if (busy()) {
      if (state.frame % 2 === 0) draw();
      else if (state.frame % ALONG === 1) look();
      else {
        const end = performance.now() + BUDGET;
        do step(); while (busy() && performance.now() < end);
      }
    } else if (seen !== state.step) look();
    else {
      settle();
      return draw();
    }
    return requestAnimationFrame(frame);
  }

  function settle() {
    byId("learn").setAttribute("aria-busy", false);
    byId("learn-run").textContent = "Train";
  }

  function goOn() {
    const under = byId("learn").getAttribute("aria-busy") === "true";
    byId("learn").setAttribute("aria-busy", true);
    if (!under) requestAnimationFrame(frame);
  }

  function run(steps) {
    until = state.step + steps;
    goOn();
  }

  byId("learn-run").addEventListener("click", () => {
    if (busy()) return run(0);
    if (state.step >= MOST) start();
    byId("learn-run").textContent = "Pause";
    return run(MOST - state.step);
  });
  byId("learn-once").addEventListener("click", () => run(1));
  byId("learn-many").addEventListener("click", () => run(HUNDRED));
  const restart = later(start);
  byId("learn-reset").addEventListener("click", restart);
  for (const id of ["spread", "size", "seed", "activation"]) byId(`learn-${id}`).addEventListener("input", restart);
  byId("learn-rate").addEventListener("input", () => {
    seen = -1;
    goOn();
  });
  redraws.push(later(draw));
  start();
})();
