"use strict";
/* The numbers of the page: batch normalization in float64, step by step, after batchnorm/reference.py, whose names it has
 * in camel case. It knows nothing of the page; tests/report/test_play.py runs it and the reference on the same inputs.
 * Arrays are plain; a pool is an array of numbers; `variance` is biased (1/m) unless a name says otherwise. */
const numbers = (() => {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const average = (values) => sum(values) / values.length;

  // Transform

  function batchNorm(x, gamma = 1, beta = 0, eps = 1e-5) {
    const mean = average(x);
    const centered = x.map((value) => value - mean);
    const variance = average(centered.map((value) => value ** 2));
    const invStd = 1 / Math.sqrt(variance + eps);
    const xhat = centered.map((value) => value * invStd);
    return { mean, variance, invStd, centered, xhat, y: xhat.map((value) => gamma * value + beta) };
  }

  function inference(x, mean, variance, gamma = 1, beta = 0, eps = 1e-5) {
    const invStd = 1 / Math.sqrt(variance + eps);
    return x.map((value) => gamma * ((value - mean) * invStd) + beta);
  }

  function inferenceAffine(mean, variance, gamma = 1, beta = 0, eps = 1e-5) {
    const scale = gamma / Math.sqrt(variance + eps);
    return { scale, shift: beta - scale * mean };
  }

  /* Which values share statistics is a label for each value of (n, c, l); what is absent has -1. */
  function poolLabels({ n, c, l }, { ghost = 0, groups = 0, frame = false, ranks = 0, valid = null } = {}) {
    const labels = new Array(n * c * l).fill(-1);
    const names = new Map();
    for (let i = 0; i < n; i++)
      for (let k = 0; k < c; k++)
        for (let t = 0; t < l; t++) {
          if (valid && !valid[i * l + t]) continue;
          const run = ghost ? Math.floor(i / ghost) : 0;
          const rank = ranks ? Math.floor((i * ranks) / n) : 0;
          const channel = groups ? Math.floor((k * groups) / c) : k;
          const name = [run, rank, channel, frame ? t : 0].join();
          if (!names.has(name)) names.set(name, names.size);
          labels[(i * c + k) * l + t] = names.get(name);
        }
    return labels;
  }

  /* Weighted mean and variance of the values with each value's label; absent values give 0. */
  function labelledBatchNorm(x, labels, weights = null, eps = 1e-5) {
    const pools = new Map();
    labels.forEach((label, i) => {
      if (label < 0 || (weights && !(weights[i] > 0))) return;
      if (!pools.has(label)) pools.set(label, { places: [], total: 0, mean: 0, variance: 0 });
      pools.get(label).places.push(i);
    });
    const xhat = x.map(() => 0);
    for (const pool of pools.values()) {
      const weight = (i) => (weights ? weights[i] : 1);
      pool.total = sum(pool.places.map(weight));
      pool.mean = sum(pool.places.map((i) => weight(i) * x[i])) / pool.total;
      pool.variance = sum(pool.places.map((i) => weight(i) * (x[i] - pool.mean) ** 2)) / pool.total;
      const invStd = 1 / Math.sqrt(pool.variance + eps);
      for (const i of pool.places) xhat[i] = (x[i] - pool.mean) * invStd;
    }
    return { pools, xhat };
  }

  // Gradient

  function backwardStepwise(dy, x, gamma = 1, eps = 1e-5) {
    const { variance, centered, xhat } = batchNorm(x, 1, 0, eps);
    const m = x.length;
    const s = Math.sqrt(variance + eps);
    const dxhat = dy.map((value) => value * gamma);
    const dvar = sum(dxhat.map((value, i) => value * centered[i])) * (-1 / 2) * (variance + eps) ** (-3 / 2);
    const dmean = -sum(dxhat) / s + dvar * average(centered.map((value) => -2 * value));
    const direct = dxhat.map((value) => value / s);
    const byVariance = centered.map((value) => (dvar * 2 * value) / m);
    const byMean = dxhat.map(() => dmean / m);
    const dx = direct.map((value, i) => value + byVariance[i] + byMean[i]);
    return { dx, dgamma: sum(dy.map((value, i) => value * xhat[i])), dbeta: sum(dy), dxhat, dvar, dmean, direct, byVariance, byMean };
  }

  function backward(dy, x, gamma = 1, eps = 1e-5) {
    const { invStd, xhat } = batchNorm(x, 1, 0, eps);
    const m = x.length;
    const dbeta = sum(dy);
    const dgamma = sum(dy.map((value, i) => value * xhat[i]));
    const withoutMean = dy.map((value) => value - dbeta / m);
    const withoutBoth = withoutMean.map((value, i) => value - (xhat[i] * dgamma) / m);
    return { dx: withoutBoth.map((value) => gamma * invStd * value), dgamma, dbeta, withoutMean, withoutBoth };
  }

  // Moments

  function moments(x) {
    const mean = average(x);
    return { count: x.length, mean, m2: sum(x.map((value) => (value - mean) ** 2)) };
  }

  function merge(a, b) {
    const count = a.count + b.count;
    if (count === 0) return { count, mean: 0, m2: 0 };
    const delta = b.mean - a.mean;
    return {
      count,
      mean: a.mean + (delta * b.count) / count,
      m2: a.m2 + b.m2 + (delta ** 2 * a.count * b.count) / count,
    };
  }

  function varianceOf({ count, m2 }, unbiased) {
    const divisor = unbiased && count > 1 ? count - 1 : count;
    return divisor > 0 ? m2 / divisor : 0;
  }

  // Statistics for inference

  const movingAverage = (running, batch, momentum) => (1 - momentum) * running + momentum * batch;

  /* Rounding to nearest, ties to even, to `bits` of significand; below 2^least spacing no longer shrinks. */
  function rounded(value, bits, least, largest) {
    if (value === 0 || !Number.isFinite(value)) return value;
    const exponent = Math.max(Math.floor(Math.log2(Math.abs(value))), least);
    const spacing = 2 ** (exponent - bits + 1);
    const quotient = value / spacing;
    const below = Math.floor(quotient);
    const rest = quotient - below;
    const up = rest > 0.5 || (rest === 0.5 && below % 2 !== 0);
    const result = (below + (up ? 1 : 0)) * spacing;
    return Math.abs(result) > largest ? Math.sign(result) * Infinity : result;
  }

  const stored = {
    float64: (value) => value,
    float32: Math.fround,
    float16: (value) => rounded(value, 11, -14, 65504),
    bfloat16: (value) => rounded(value, 8, -126, 2 ** 127 * (2 - 2 ** -7)),
  };

  /* What is kept after each of the batches (their moments): a list of {mean, variance}.
   * kind: "moving" from 0 and 1; "debiased", divided by 1 - (1 - momentum)^t; "cumulative"; "exact", all batches one pool. */
  function runningStatistics(batches, { kind = "moving", momentum = 0.1, unbiased = true, dtype = "float64" } = {}) {
    const keep = stored[dtype];
    let [mean, variance, whole] = [0, 1, { count: 0, mean: 0, m2: 0 }];
    return batches.map((batch, index) => {
      const t = index + 1;
      whole = merge(whole, batch);
      if (kind === "exact") return { mean: keep(whole.mean), variance: keep(varianceOf(whole, unbiased)) };
      if (kind === "debiased" && t === 1) variance = 0;
      const share = kind === "cumulative" ? 1 / t : momentum;
      mean = keep(movingAverage(mean, batch.mean, share));
      variance = keep(movingAverage(variance, varianceOf(batch, unbiased), share));
      const sofar = kind === "debiased" ? 1 - (1 - momentum) ** t : 1;
      return { mean: mean / sofar, variance: variance / sofar };
    });
  }

  // Folding: a convolution of one channel over one axis, y_i = bias + sum over j of w_j x_(i + j - padding)

  function convolve(x, weight, bias, padding = 0, paddedWith = 0) {
    const edge = new Array(padding).fill(paddedWith);
    const wide = [...edge, ...x, ...edge];
    const places = Math.max(0, wide.length - weight.length + 1);
    return Array.from({ length: places }, (_, i) => sum(weight.map((w, j) => w * wide[i + j])) + bias);
  }

  const foldAfter = (weight, bias, { scale, shift }) => ({ weight: weight.map((w) => w * scale), bias: bias * scale + shift });
  const foldBefore = (weight, bias, { scale, shift }) => ({
    weight: weight.map((w) => w * scale),
    bias: bias + sum(weight.map((w) => w * shift)),
  });
  const paddingValue = ({ scale, shift }) => -shift / scale;

  // A network of sigmoids that learns, with batch norm before each activation or without

  function generator(seed) {
    let state = seed >>> 0;
    const uniform = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
    return { uniform, normal };
  }

  const activations = {
    sigmoid: [(z) => 1 / (1 + Math.exp(-z)), (z, a) => a * (1 - a)],
    tanh: [Math.tanh, (z, a) => 1 - a * a],
    relu: [(z) => (z > 0 ? z : 0), (z) => (z > 0 ? 1 : 0)],
  };

  /* Weights (out, in) of mean 0 and standard deviation `spread`; every bias and beta 0, every gamma 1. */
  function makeNetwork(sizes, { seed = 0, spread = 0.5, normalized = false, activation = "sigmoid" } = {}) {
    const { normal } = generator(seed);
    const layers = sizes.slice(1).map((out, index) => {
      const norm = normalized && index < sizes.length - 2;
      const weight = Array.from({ length: out }, () => Array.from({ length: sizes[index] }, () => spread * normal()));
      const layer = { weight, bias: new Array(out).fill(0), norm };
      if (norm) Object.assign(layer, { gamma: new Array(out).fill(1), mean: new Array(out).fill(0), variance: new Array(out).fill(1) });
      return layer;
    });
    return { layers, activation, eps: 1e-5, momentum: 0.1 };
  }

  const transposed = (rows) => rows[0].map((_, j) => rows.map((row) => row[j]));

  /* Outputs of each layer for rows of x; `training` normalizes by the batch, and else the running statistics do. */
  function forward(network, x, training) {
    const [act] = activations[network.activation];
    const trace = [];
    let a = x;
    network.layers.forEach(({ weight, bias, norm, gamma, mean, variance }, index) => {
      const linear = a.map((row) => weight.map((w, k) => {
        let total = norm ? 0 : bias[k];
        for (let j = 0; j < w.length; j++) total += w[j] * row[j];
        return total;
      }));
      let z = linear;
      if (norm) {
        const columns = transposed(linear).map((column, k) => training
          ? batchNorm(column, gamma[k], bias[k], network.eps).y
          : inference(column, mean[k], variance[k], gamma[k], bias[k], network.eps));
        z = transposed(columns);
      }
      const last = index === network.layers.length - 1;
      const out = last ? z : z.map((row) => row.map(act));
      trace.push({ input: a, linear, z, out });
      a = out;
    });
    return trace;
  }

  /* Mean cross-entropy in nats, how many are right, and its gradient. */
  function crossEntropy(logits, labels) {
    let [loss, right] = [0, 0];
    const gradient = logits.map((row, i) => {
      const top = Math.max(...row);
      const total = sum(row.map((value) => Math.exp(value - top)));
      loss += (top + Math.log(total) - row[labels[i]]) / logits.length;
      if (row.indexOf(top) === labels[i]) right += 1;
      return row.map((value, k) => (Math.exp(value - top) / total - (k === labels[i] ? 1 : 0)) / logits.length);
    });
    return { loss, right, gradient };
  }

  /* Loss and gradients of a batch, in training: for each layer {weight, bias, gamma}; bias is beta where it normalizes. */
  function gradients(network, x, labels) {
    const trace = forward(network, x, true);
    const { loss, right, gradient } = crossEntropy(trace[trace.length - 1].out, labels);
    const slope = activations[network.activation][1];
    const found = [];
    let upper = gradient;
    for (let index = trace.length - 1; index >= 0; index--) {
      const { input, linear, z, out } = trace[index];
      const layer = network.layers[index];
      let dz = index === trace.length - 1 ? upper : upper.map((row, i) => row.map((v, k) => v * slope(z[i][k], out[i][k])));
      const grads = {};
      if (layer.norm) {
        const [columns, dColumns] = [transposed(linear), transposed(dz)];
        const back = columns.map((column, k) => backward(dColumns[k], column, layer.gamma[k], network.eps));
        grads.gamma = back.map(({ dgamma }) => dgamma);
        grads.bias = back.map(({ dbeta }) => dbeta);
        dz = transposed(back.map(({ dx }) => dx));
      } else grads.bias = transposed(dz).map(sum);
      grads.weight = layer.weight.map((row, k) => row.map((_, j) => {
        let total = 0;
        for (let i = 0; i < dz.length; i++) total += dz[i][k] * input[i][j];
        return total;
      }));
      found.unshift(grads);
      if (index > 0)
        upper = dz.map((row) => layer.weight[0].map((_, j) => {
          let total = 0;
          for (let k = 0; k < row.length; k++) total += row[k] * layer.weight[k][j];
          return total;
        }));
    }
    return { loss, right, trace, layers: found };
  }

  /* The network after a step against the gradient; running statistics are shared with it, not moved. */
  function moved(network, found, rate) {
    const step = (values, slopes) => values.map((value, k) => value - rate * slopes[k]);
    return {
      ...network,
      layers: network.layers.map((layer, index) => ({
        ...layer,
        weight: layer.weight.map((row, k) => step(row, found[index].weight[k])),
        bias: step(layer.bias, found[index].bias),
        ...(layer.norm ? { gamma: step(layer.gamma, found[index].gamma) } : {}),
      })),
    };
  }

  /* One step of gradient descent and of the running statistics (unbiased variance). Returns {network, loss, found}. */
  function trainStep(network, x, labels, rate) {
    const { loss, trace, layers } = gradients(network, x, labels);
    const next = moved(network, layers, rate);
    next.layers.forEach((layer, index) => {
      if (!layer.norm) return;
      const kept = transposed(trace[index].linear).map(moments);
      layer.mean = layer.mean.map((value, k) => movingAverage(value, kept[k].mean, network.momentum));
      layer.variance = layer.variance.map((value, k) => movingAverage(value, varianceOf(kept[k], true), network.momentum));
    });
    return { network: next, loss, found: layers };
  }

  /* The loss of the batch where the step would lead that is `rates` times the gradient. */
  const lossAlong = (network, x, labels, found, rates) => rates.map((rate) => {
    const trace = forward(moved(network, found, rate), x, true);
    return crossEntropy(trace[trace.length - 1].out, labels).loss;
  });

  function evaluate(network, x, labels) {
    const trace = forward(network, x, false);
    const { loss, right } = crossEntropy(trace[trace.length - 1].out, labels);
    return { loss, accuracy: right / labels.length, trace };
  }

  /* The value below which a share q of the values lies, between neighbours by a line. */
  function quantile(values, q) {
    const sorted = [...values].sort((a, b) => a - b);
    const place = q * (sorted.length - 1);
    const below = Math.floor(place);
    const above = Math.min(below + 1, sorted.length - 1);
    return sorted[below] + (place - below) * (sorted[above] - sorted[below]);
  }

  /* Places of a batch: a permutation of each epoch by the seed, cut into runs. */
  function batchPlaces(count, size, seed, step) {
    const perEpoch = Math.max(1, Math.floor(count / size));
    const { uniform } = generator(seed * 7919 + Math.floor(step / perEpoch) + 1);
    const order = Array.from({ length: count }, (_, i) => i);
    for (let i = count - 1; i > 0; i--) {
      const j = Math.floor(uniform() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    const start = (step % perEpoch) * size;
    return order.slice(start, start + size);
  }

  return {
    average, batchNorm, inference, inferenceAffine, poolLabels, labelledBatchNorm, backwardStepwise, backward, moments, merge,
    varianceOf, movingAverage, stored, runningStatistics, convolve, foldAfter, foldBefore, paddingValue, makeNetwork, forward,
    crossEntropy, gradients, moved, trainStep, lossAlong, evaluate, quantile, batchPlaces, sum,
  };
})();
