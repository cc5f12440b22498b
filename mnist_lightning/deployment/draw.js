"use strict";
// Run networks one image at a time: graphs from torch.export, with PyTorch's definition of each operation.
// A tensor is {shape, data}; an operation takes the shape of its result and its arguments, and returns the data.

const size = (shape) => shape.reduce((product, n) => product * n, 1);
const steps = (shape) => shape.map((_, i) => size(shape.slice(i + 1)));

/** Return the offset of each value of a result of this shape; a step in dimension i moves the offset by by[i]. */
function offsets(shape, by) {
  let found = Int32Array.of(0);
  shape.forEach((n, i) => {
    const longer = new Int32Array(found.length * n);
    for (let j = 0; j < longer.length; j++) longer[j] = found[Math.floor(j / n)] + (j % n) * by[i];
    found = longer;
  });
  return found;
}

/** Return a function that reads value i of a tensor broadcast to a shape, or of a number. */
function reader(value, shape) {
  if (!value?.shape) return () => value;
  const { data } = value;
  if (data.length === size(shape)) return (i) => data[i];
  const by = steps(value.shape), missing = shape.length - by.length;
  const at = offsets(shape, shape.map((_, i) => (i < missing || value.shape[i - missing] === 1 ? 0 : by[i - missing])));
  return (i) => data[at[i]];
}

const each = (compute) => (shape, ...values) => {
  const [a, b, c, d] = [0, 1, 2, 3].map((i) => reader(values[i], shape));
  return new Float32Array(size(shape)).map((_, i) => compute(a(i), b(i), c(i), d(i)));
};
const same = (_, x) => x.data;

/** Compute erf by Abramowitz and Stegun 7.1.26, accurate to 1.5e-7. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - p * Math.exp(-x * x));
}
const tanh = (x) => Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3);
const gelu = (x, kind) => (x / 2) * (1 + (kind === "tanh" ? Math.tanh(tanh(x)) : erf(x / Math.SQRT2)));

/** Normalize each run of `count` values to mean 0 and variance 1. */
function normalize(x, count, eps, scale) {
  const out = new Float32Array(x.data.length);
  for (let start = 0; start < out.length; start += count) {
    let mean = 0, variance = 0;
    for (let i = start; i < start + count; i++) mean += x.data[i] / count;
    for (let i = start; i < start + count; i++) variance += (x.data[i] - mean) ** 2 / count;
    for (let i = start; i < start + count; i++) out[i] = scale((x.data[i] - mean) / Math.sqrt(variance + eps), i);
  }
  return out;
}

const softmax = (finish) => (shape, x, dim) => {
  const by = steps(shape), axis = dim < 0 ? dim + shape.length : dim, out = new Float32Array(x.data.length);
  for (const start of offsets(shape.map((n, i) => (i === axis ? 1 : n)), by)) {
    const at = Array.from({ length: shape[axis] }, (_, i) => start + i * by[axis]);
    const highest = Math.max(...at.map((i) => x.data[i]));
    const sum = at.reduce((total, i) => total + Math.exp(x.data[i] - highest), 0);
    for (const i of at) out[i] = finish(x.data[i] - highest, sum);
  }
  return out;
};

const pool = (first, add, finish) => ([, channels, rows, columns], x, kernel, stride, padding, dilation) => {
  const [, , height, width] = x.shape, [down, right] = stride.length ? stride : kernel;
  const out = new Float32Array(channels * rows * columns);
  for (let target = 0; target < out.length; target++) {
    const column = target % columns, row = Math.floor(target / columns) % rows;
    const channel = Math.floor(target / columns / rows);
    let value = first, count = 0;
    for (let i = 0; i < kernel[0]; i++) {
      for (let j = 0; j < kernel[1]; j++) {
        const r = row * down - padding[0] + i * dilation[0], c = column * right - padding[1] + j * dilation[1];
        if (r < 0 || c < 0 || r >= height || c >= width) continue;
        value = add(value, x.data[(channel * height + r) * width + c]);
        count++;
      }
    }
    out[target] = finish(value, count);
  }
  return out;
};

function convolution([, channels, rows, columns], x, w, b, stride, padding, dilation, transposed, outputPadding, groups) {
  const [, , height, width] = x.shape, [, inputs, kernelRows, kernelColumns] = w.shape;
  const out = new Float32Array(channels * rows * columns), source = x.data;
  for (let channel = 0, weight = 0; channel < channels; channel++) {
    const start = channel * rows * columns, first = Math.floor((channel * groups) / channels) * inputs;
    if (b) out.fill(b.data[channel], start, start + rows * columns);
    for (let input = first; input < first + inputs; input++) {
      for (let i = 0; i < kernelRows; i++) {
        for (let j = 0; j < kernelColumns; j++, weight++) {
          const factor = w.data[weight], shift = j * dilation[1] - padding[1];
          const from = Math.max(0, Math.ceil(-shift / stride[1]));
          const to = Math.min(columns, Math.floor((width - 1 - shift) / stride[1]) + 1);
          for (let row = 0; row < rows; row++) {
            const r = row * stride[0] - padding[0] + i * dilation[0];
            if (r < 0 || r >= height) continue;
            const line = (input * height + r) * width + shift, target = start + row * columns;
            for (let c = from; c < to; c++) out[target + c] += factor * source[line + c * stride[1]];
          }
        }
      }
    }
  }
  return out;
}

function addmm([rows, columns], bias, a, b) {
  const inner = b.shape[0], add = reader(bias, [rows, columns]);
  return new Float32Array(rows * columns).map((_, i) => {
    const row = Math.floor(i / columns) * inner;
    let sum = add(i);
    for (let k = 0, at = i % columns; k < inner; k++, at += columns) sum += a.data[row + k] * b.data[at];
    return sum;
  });
}

function mean(shape, x, dims) {
  const reduced = dims.map((dim) => (dim < 0 ? dim + x.shape.length : dim));
  const kept = x.shape.map((n, i) => (reduced.includes(i) ? 1 : n)), by = steps(kept);
  const at = offsets(x.shape, by.map((step, i) => (reduced.includes(i) ? 0 : step)));
  const out = new Float32Array(size(shape)), count = x.data.length / out.length;
  x.data.forEach((value, i) => { out[at[i]] += value / count; });
  return out;
}

/* The supported operations: Python reads their names from here. */
const OPERATIONS = {
  "aten._log_softmax.default": softmax((x, sum) => x - Math.log(sum)),
  "aten._native_batch_norm_legit_no_training.default": (shape, x, w, b, mean, variance, momentum, eps) => {
    const count = size(shape.slice(2));
    return x.data.map((value, i) => {
      const c = Math.floor(i / count) % shape[1];
      const unit = (value - mean.data[c]) / Math.sqrt(variance.data[c] + eps);
      return unit * (w ? w.data[c] : 1) + (b ? b.data[c] : 0);
    });
  },
  "aten._softmax.default": softmax((x, sum) => Math.exp(x) / sum),
  "aten._to_copy.default": same,
  "aten.abs.default": each(Math.abs),
  "aten.add.Tensor": each((a, b, alpha) => a + b * alpha),
  "aten.addmm.default": addmm,
  "aten.as_strided.default": same, // Python accepts it only where it changes nothing
  "aten.avg_pool2d.default": (shape, x, kernel, stride, padding) =>
    pool(0, (a, b) => a + b, (sum, count) => sum / count)(shape, x, kernel, stride, padding, [1, 1]),
  "aten.clamp.default": each((x, low, high) => Math.min(Math.max(x, low ?? -Infinity), high ?? Infinity)),
  "aten.clone.default": same,
  "aten.convolution.default": convolution,
  "aten.div.Tensor": each((a, b) => a / b),
  "aten.elu.default": each((x, alpha, scale, factor) => scale * (x > 0 ? x : alpha * Math.expm1(x * factor))),
  "aten.exp.default": each(Math.exp),
  "aten.expm1.default": each(Math.expm1),
  "aten.full.default": (shape, _, value) => new Float32Array(size(shape)).fill(value),
  "aten.gelu.default": each(gelu),
  "aten.gt.Scalar": each((a, b) => a > b),
  "aten.hardtanh.default": each((x, low, high) => Math.min(Math.max(x, low), high)),
  "aten.le.Scalar": each((a, b) => a <= b),
  "aten.leaky_relu.default": each((x, slope) => (x > 0 ? x : x * slope)),
  "aten.log1p.default": each(Math.log1p),
  "aten.max_pool2d_with_indices.default": pool(-Infinity, Math.max, (highest) => highest),
  "aten.mean.dim": mean,
  "aten.minimum.default": each((a, b) => Math.min(a, b)),
  "aten.mul.Tensor": each((a, b) => a * b),
  "aten.native_group_norm.default": (shape, x, w, b, n, channels, pixels, groups, eps) => {
    const channel = (i) => Math.floor(i / pixels) % channels;
    return normalize(x, (channels / groups) * pixels, eps, (unit, i) =>
      unit * (w ? w.data[channel(i)] : 1) + (b ? b.data[channel(i)] : 0));
  },
  "aten.native_layer_norm.default": (shape, x, normalized, w, b, eps) => {
    const count = size(normalized);
    return normalize(x, count, eps, (unit, i) => unit * (w ? w.data[i % count] : 1) + (b ? b.data[i % count] : 0));
  },
  "aten.neg.default": each((x) => -x),
  "aten.permute.default": (shape, x, dims) => {
    const by = steps(x.shape);
    return new Float32Array(offsets(shape, dims.map((dim) => by.at(dim)))).map((at) => x.data[at]);
  },
  "aten.relu.default": each((x) => Math.max(x, 0)),
  "aten.scalar_tensor.default": (shape, value) => Float32Array.of(value),
  "aten.sigmoid.default": each((x) => 1 / (1 + Math.exp(-x))),
  "aten.sign.default": each(Math.sign),
  "aten.sub.Tensor": each((a, b, alpha) => a - b * alpha),
  "aten.tanh.default": each(Math.tanh),
  "aten.view.default": same,
  "aten.where.self": each((condition, a, b) => (condition ? a : b)),
  "getitem": same, // the first of several results
};

/** Decode base64 to float32 numbers: stored as float32, or as 16-bit integers with one unit per row. */
function decode({ shape, base64, units }) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  if (!units) return { shape, data: new Float32Array(bytes.buffer) };
  const row = size(shape) / units.length, integers = new Int16Array(bytes.buffer);
  return { shape, data: Float32Array.from(integers, (n, i) => n * units[Math.floor(i / row)]) };
}

const { shape: imageShape, classes, placing, inverted, doubtful, ...content } = JSON.parse(document.getElementById("networks").textContent);

/** Compute all nodes that the known values allow; every ten milliseconds, let the pen handle events. */
async function run(values, nodes) {
  let start = performance.now();
  const isKnown = (argument) => !argument?.node || argument.node in values;
  for (const { name, operation, shape, inputs } of nodes) {
    if (name in values || !inputs.every(isKnown)) continue;
    const given = inputs.map((argument) => (argument?.node ? values[argument.node] : argument));
    values[name] = { shape, data: OPERATIONS[operation](shape, ...given) };
    if (performance.now() - start > 10) {
      await new Promise((go) => setTimeout(go));
      start = performance.now();
    }
  }
  return values;
}

/** The networks, each with a function from an image (float32 in [0, 1], row by row) to the class probabilities. */
const networks = content.networks.map(({ name, weights, nodes, input, output, samples }) => {
  const decoded = Object.fromEntries(Object.entries(weights).map(([key, weight]) => [key, decode(weight)]));
  const constants = run(decoded, nodes); // nodes that do not depend on the image, such as transposed weights
  const classify = async (image) => {
    const values = await run({ ...(await constants), [input]: { shape: [1, ...imageShape], data: image } }, nodes);
    return values[output].data;
  };
  return { name, samples, classify };
});

// --- from strokes to an image -----------------------------------------------------------------------------------

/** Resize a part of a picture: each pixel is the mean of the area that it covers. */
function resize({ width, grey }, left, top, wide, high, columns, rows) {
  const overlap = (i, count, length, start) => {
    const from = (i * length) / count, to = ((i + 1) * length) / count, found = [];
    for (let at = Math.floor(from); at < Math.ceil(to); at++)
      found.push([start + at, (Math.min(at + 1, to) - Math.max(at, from)) / (to - from)]);
    return found;
  };
  const across = Array.from({ length: columns }, (_, i) => overlap(i, columns, wide, left));
  const down = Array.from({ length: rows }, (_, i) => overlap(i, rows, high, top));
  return new Float32Array(rows * columns).map((_, i) => {
    let sum = 0;
    for (const [y, share] of down[Math.floor(i / columns)])
      for (const [x, part] of across[i % columns]) sum += share * part * grey[y * width + x];
    return sum;
  });
}

/** Draw the strokes on a canvas, with a round pen of some width, moved and scaled. */
function trace(context, strokes, width, scale = 1, left = 0, top = 0) {
  Object.assign(context, { fillStyle: "#000", strokeStyle: "#fff", lineWidth: width, lineCap: "round", lineJoin: "round" });
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  for (const stroke of strokes) {
    const [first, ...points] = stroke.map(([x, y]) => [left + scale * x, top + scale * y]);
    context.beginPath();
    context.moveTo(...first);
    for (const point of points.length ? points : [first]) context.lineTo(...point);
    context.stroke();
  }
}

/** Return what is on a canvas as a picture {width, height, grey}, light on dark in [0, 1]. */
function read(context) {
  const { width, height } = context.canvas, { data } = context.getImageData(0, 0, width, height);
  return { width, height, grey: Float32Array.from({ length: width * height }, (_, i) => data[4 * i] / 255) };
}

const FINE = 10; // pixels of a character's picture for a pixel of the image
const fine = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

/** Return the smallest and the largest coordinate of points on an axis. */
const range = (points, axis) => points.reduce(([low, high], { [axis]: at }) => [Math.min(low, at), Math.max(high, at)], [Infinity, -Infinity]);

/** Return the picture of a character: whatever the size of the drawing, its strokes are as wide as the data set's. */
function character(strokes) {
  const [[left, right], [top, bottom]] = [0, 1].map((axis) => range(strokes.flat(), axis)), sides = [right - left, bottom - top];
  const longer = FINE * placing.share * Math.min(...imageShape.slice(1)), pen = Math.min(FINE * placing.stroke, longer / 2);
  const scale = (longer - pen) / Math.max(...sides, pad.width / 20); // a tap, which is smaller, stays a dot
  [fine.canvas.width, fine.canvas.height] = sides.map((side) => Math.ceil(scale * side + pen + 2));
  trace(fine, strokes, pen, scale, 1 + pen / 2 - scale * left, 1 + pen / 2 - scale * top);
  return read(fine);
}

/** Return how many characters strokes seem to be: groups of similar height, with clear gaps between them. */
function countCharacters(strokes) {
  const groups = [], boxes = strokes.map((stroke) => [0, 1].map((axis) => range(stroke, axis)));
  const side = Math.max(...boxes.map(([, [top, bottom]]) => bottom - top));
  for (const [[left, right], [top, bottom]] of boxes.sort((a, b) => a[0][0] - b[0][0])) {
    const last = groups.at(-1);
    if (!last || left > last.right + Math.max(side / 6, 1)) groups.push({ right, top, bottom });
    else Object.assign(last, { right: Math.max(last.right, right), top: Math.min(last.top, top), bottom: Math.max(last.bottom, bottom) });
  }
  return groups.filter(({ top, bottom }) => bottom - top > 0.6 * side).length;
}

/** Convert a picture to an image like the data set's, or null if it is empty. */
function prepare(picture) {
  const { width, height, grey } = picture, [, rows, columns] = imageShape;
  let left = width, right = -1, top = height, bottom = -1;
  grey.forEach((value, i) => {
    if (!value) return;
    const x = i % width, y = Math.floor(i / width);
    [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
  });
  if (right < 0) return null;
  if (!placing) return resize(picture, 0, 0, width, height, columns, rows);
  // as MNIST was made: the longer side of the ink takes 20 of 28 pixels, its center of mass is in the middle
  const wide = right - left + 1, high = bottom - top + 1;
  const factor = (placing.share * Math.min(rows, columns)) / Math.max(wide, high);
  const inner = [wide, high].map((side) => Math.max(1, Math.round(side * factor)));
  const small = resize(picture, left, top, wide, high, ...inner);
  let mass = 0, x = 0, y = 0;
  small.forEach((value, i) => {
    mass += value;
    x += value * ((i % inner[0]) + 0.5);
    y += value * (Math.floor(i / inner[0]) + 0.5);
  });
  // in every MNIST image, the center lies 14 to 15 (exclusive) pixels from the edge
  const shift = (moment, length, side) => {
    const start = placing.by_mass ? Math.ceil(side / 2 - moment / mass) : Math.round((side - length) / 2);
    return Math.min(Math.max(start, 0), side - length);
  };
  const [dx, dy] = [shift(x, inner[0], columns), shift(y, inner[1], rows)], image = new Float32Array(rows * columns);
  small.forEach((value, i) => { image[(Math.floor(i / inner[0]) + dy) * columns + (i % inner[0]) + dx] = value; });
  return image;
}

// --- the panel --------------------------------------------------------------------------------------------------

const pad = document.getElementById("pad"), seen = document.getElementById("seen");
const said = document.getElementById("said"), bars = [...document.querySelectorAll("#bars li")];
const pen = pad.getContext("2d", { willReadFrequently: true });
let strokes = [], pointer = null, isRunning = false, isStale = false;

/** Show the probabilities of a network for a drawing of some characters. */
function show(index, probabilities, count) {
  const best = probabilities ? probabilities.indexOf(Math.max(...probabilities)) : -1;
  bars.forEach((bar, i) => {
    const row = bar.querySelectorAll("div")[index], percent = probabilities ? 100 * probabilities[i] : 0;
    row.querySelector("i").style.width = `${percent}%`;
    row.querySelector("output").textContent = probabilities ? `${percent.toFixed(1)} %` : "";
    row.classList.toggle("best", i === best);
  });
  if (!probabilities) return "nothing drawn yet";
  const doubt = count > 1 ? `, but these seem to be ${count} characters` : probabilities[best] < doubtful ? ", unsure" : "";
  return `${classes[best]}, ${(100 * probabilities[best]).toFixed(1)} %${doubt}`;
}

/** Show the picture as the networks see it, and their answers; repeat if the drawing has changed meanwhile. */
async function update() {
  trace(pen, strokes, 24);
  isStale = true;
  if (isRunning) return;
  for (isRunning = true; isStale; ) {
    isStale = false;
    const image = prepare(placing && strokes.length ? character(strokes) : read(pen));
    const shown = new ImageData(seen.width, seen.height);
    shown.data.fill(255).forEach((_, i, all) => { if (i % 4 < 3) all[i] = image ? 255 * image[i >> 2] : 0; });
    seen.getContext("2d").putImageData(shown, 0, 0);
    const count = placing ? countCharacters(strokes) : 1;
    const given = image && inverted ? image.map((value) => 1 - value) : image, answers = [];
    for (const [index, { classify }] of networks.entries()) answers.push(show(index, given && (await classify(given)), count));
    if (pointer === null && !isStale) // otherwise a screen reader would never finish
      [...said.children].forEach((line, index) => { line.querySelector("b").textContent = answers[index]; });
  }
  isRunning = false;
}

function add(event) {
  const box = pad.getBoundingClientRect();
  const place = ({ clientX, clientY }) =>
    [((clientX - box.left) * pad.width) / box.width, ((clientY - box.top) * pad.height) / box.height];
  const events = event.getCoalescedEvents?.() ?? [];
  strokes.at(-1).push(...(events.length ? events : [event]).map(place));
  update();
}
pad.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button) return;
  pointer = event.pointerId;
  isDown = false;
  strokes.push([]);
  add(event);
});
addEventListener("pointermove", (event) => { if (event.pointerId === pointer) add(event); });
for (const name of ["pointerup", "pointercancel"])
  addEventListener(name, (event) => { if (event.pointerId === pointer) { pointer = null; update(); } });

// by keyboard: the arrow keys move the pen, the space bar puts it down and lifts it
const nib = document.getElementById("nib");
let place = [pad.width / 2, pad.height / 5], isDown = false;
function move(isNowDown, by = [0, 0]) {
  const sides = [pad.width, pad.height];
  place = place.map((value, i) => Math.min(Math.max(value + 10 * by[i], 0), sides[i]));
  if (isNowDown && !isDown) strokes.push([]);
  if (isNowDown) strokes.at(-1).push(place);
  isDown = isNowDown;
  Object.assign(nib.style, { left: `${(100 * place[0]) / sides[0]}%`, top: `${(100 * place[1]) / sides[1]}%` });
  nib.classList.toggle("down", isDown);
  update();
}
pad.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
  if (!by) return;
  event.preventDefault();
  move(event.key === " " ? !isDown : isDown, by);
});
document.getElementById("undo").addEventListener("click", () => { strokes.pop(); move(false); });
document.getElementById("clear").addEventListener("click", () => { strokes = []; move(false); });
move(false);

// warn if this browser does not reproduce PyTorch's results
for (const { name, samples, classify } of networks)
  (async () => {
    for (const { image, probabilities } of samples) {
      const found = await classify(decode(image).data);
      if (probabilities.every((value, i) => Math.abs(value - found[i]) < 1e-4)) continue;
      const warning = document.getElementById("wrong");
      warning.hidden = false;
      warning.textContent = `This browser does not reproduce the results of ${name} in PyTorch: do not trust its bars.`;
    }
  })();
