"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// clicking a header sorts the table
for (const table of all("table.sortable"))
  all("th", table).forEach((th, column) => {
    const button = document.createElement("button");
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      const up = th.getAttribute("aria-sort") !== "ascending";
      for (const other of all("th", table)) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent.trim(), number = (row) => parseFloat(text(row).replaceAll(",", ""));
      const compare = (a, b) => number(a) - number(b) || text(a).localeCompare(text(b)); // as text if one is not a number
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
    });
  });

// curves
if (data.charts) {
  let printing = false; // paper is white, whatever the screen's theme
  const color = (name, onPaper) => () =>
    printing ? onPaper : getComputedStyle(document.documentElement).getPropertyValue(name);
  const axis = { stroke: color("--ink", "#1f2328"), grid: { stroke: color("--grid", "#d0d7de"), width: 1 }, ticks: { show: false } };
  const short = (value) => (value == null ? "–" : Number(value.toPrecision(4)));
  const charts = data.charts.map((chart) => {
    const series = [{ label: "epoch", value: (_, value) => value ?? "–" }], values = [chart.epochs], bands = [], owners = [{}];
    for (const line of chart.lines) {
      const { color, name } = data.models[line.model];
      const stage = line.stage === "val" ? "validation" : "training";
      owners.push(line);
      values.push(line.mean);
      series.push({
        label: `${name}, ${stage}`, stroke: color, width: 2, dash: line.stage === "val" ? undefined : [6, 4],
        points: { show: true, size: chart.epochs.length > 40 ? 3 : 5, fill: color }, value: (_, value) => short(value),
      });
      if (!line.low) continue;
      bands.push({ series: [series.length, series.length + 1], fill: `${color}33` });
      for (const edge of [line.high, line.low]) {
        owners.push(line);
        values.push(edge);
        series.push({ class: "band", width: 0, points: { show: false } });
      }
    }
    const box = document.createElement("div");
    box.className = "chart";
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${chart.title} over the epochs`);
    byId("charts").append(box);
    const plot = new uPlot({
      title: chart.title, width: box.clientWidth, height: 300, series, bands,
      scales: { x: { time: false } },
      axes: [{ ...axis, label: "epoch", labelSize: 22, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }, { ...axis, size: 62 }],
      cursor: { sync: { key: "epochs" }, points: { size: 8 } },
    }, values, box);
    const fit = () => plot.width === box.clientWidth || plot.setSize({ width: box.clientWidth, height: 300 });
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(box); // deferred: it changes the observed height
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const at = plot.cursor.idx == null ? (step > 0 ? 0 : chart.epochs.length - 1) : plot.cursor.idx + step;
      if (at in chart.epochs) plot.setCursor({ left: plot.valToPos(chart.epochs[at], "x"), top: 0 });
    });
    // clicking the legend toggles the model in all charts, not the line in this one
    box.addEventListener("click", (event) => {
      const row = event.target.closest(".u-series");
      if (!row) return;
      event.stopPropagation();
      const { model } = owners[[...row.parentNode.children].indexOf(row)];
      if (model !== undefined) byModel[model].click();
    }, true);
    return { plot, owners };
  });
  const byModel = all("input[data-model]"), byStage = all("input[data-stage]");
  const update = () => {
    for (const { plot, owners } of charts)
      plot.batch(() => owners.forEach(({ model, stage }, index) => {
        if (index) plot.setSeries(index, { show: byModel[model].checked && byStage.find((box) => box.dataset.stage === stage).checked });
      }));
  };
  for (const box of [...byModel, ...byStage]) box.addEventListener("change", update);
  const redraw = (forPaper) => {
    printing = forPaper;
    for (const { plot } of charts) plot.redraw(false, true);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(false));
  addEventListener("beforeprint", () => redraw(true));
  addEventListener("afterprint", () => redraw(false));
}

// the gallery of mistakes
if (data.gallery) {
  const { width, height, columns, labels, indices, limit, classes } = data.gallery;
  const form = byId("filter"), scale = Math.max(1, Math.round(64 / width)), step = 60;
  const percent = (model, i) => `${(model.confidence[i] / 100).toFixed(1)} %`;
  const orders = data.models.map(({ predicted, confidence }) =>
    labels.map((_, i) => i).filter((i) => predicted[i] !== labels[i]).sort((a, b) => confidence[b] - confidence[a]).slice(0, limit));
  const explanations = data.models.map(({ explained }) => ({ ...explained, bytes: Uint8Array.from(atob(explained.base64), (c) => c.charCodeAt(0)) }));
  let found = [], shown = 0;
  /** Draw the evidence for the predicted class in orange, for the true class in blue. */
  const explain = (at, { height, width, bytes }) => {
    const picture = document.createElement("canvas"), size = height * width;
    Object.assign(picture, { width, height });
    const pixels = new ImageData(width, height);
    new Int8Array(bytes.buffer, at * size, size).forEach((value, pixel) => {
      const [red, green, blue] = value > 0 ? [213, 94, 0] : [0, 114, 178];
      pixels.data.set([red, green, blue, 2 * Math.abs(value)], 4 * pixel);
    });
    picture.getContext("2d").putImageData(pixels, 0, 0);
    return picture;
  };
  const tile = (i) => {
    const model = data.models[form.elements.model.value], figure = document.createElement("figure"), image = document.createElement("div");
    const said = `${classes[labels[i]]} → ${classes[model.predicted[i]]}`;
    image.className = "tile";
    image.role = "img";
    image.ariaLabel = `test image ${indices[i]}, true ${classes[labels[i]]}, predicted ${classes[model.predicted[i]]}`;
    image.title = `test image ${indices[i]}`;
    Object.assign(image.style, {
      width: `${scale * width}px`, height: `${scale * height}px`, backgroundSize: `${scale * width * columns}px auto`,
      backgroundPosition: `-${scale * width * (i % columns)}px -${scale * height * Math.floor(i / columns)}px`,
    });
    const caption = document.createElement("div"), lines = [[said, percent(model, i)]];
    for (const other of data.models) if (other !== model) lines.push([`${other.name} ${classes[other.predicted[i]]}`, percent(other, i)]);
    for (const [what, sure] of lines) {
      const line = caption.appendChild(document.createElement("div"));
      line.append(caption.childElementCount === 1 ? Object.assign(document.createElement("b"), { textContent: what }) : what, ` ${sure}`);
    }
    const button = document.createElement("button"), explanation = explanations[form.elements.model.value];
    button.className = "why";
    button.setAttribute("aria-pressed", "false");
    button.append(image);
    const at = explanation.indices.indexOf(indices[i]);
    button.disabled = at < 0;
    button.addEventListener("click", () => {
      const drawn = button.querySelector("canvas");
      if (drawn) drawn.remove();
      else button.append(explain(at, explanation));
      button.setAttribute("aria-pressed", String(!drawn));
    });
    figure.dataset.tile = i;
    figure.append(button, caption);
    return figure;
  };
  const more = () => {
    byId("gallery").append(...found.slice(shown, shown + step).map(tile));
    shown = Math.min(shown + step, found.length);
    byId("more").hidden = shown === found.length;
    byId("more").textContent = `Show more (${found.length - shown} left)`;
  };
  const filter = () => {
    const { model: who, true: truth, predicted: wanted, others } = form.elements, model = data.models[who.value];
    found = orders[who.value].filter((i) =>
      (truth.value === "" || labels[i] === +truth.value) && (wanted.value === "" || model.predicted[i] === +wanted.value) &&
      (!others?.value || data.models[others.value].predicted[i] === labels[i]));
    const cut = model.mistakes > limit ? `; the page has the ${limit.toLocaleString("en")} most confident` : "";
    byId("count").textContent = `${found.length} of the ${model.mistakes.toLocaleString("en")} mistakes of ${model.name}, the most confident first${cut}.`;
    for (const button of all(".confusion button"))
      button.setAttribute("aria-pressed", button.dataset.model === who.value && button.dataset.true === truth.value && button.dataset.predicted === wanted.value);
    byId("gallery").replaceChildren();
    shown = 0;
    more();
  };
  for (const button of all(".confusion button"))
    button.addEventListener("click", () => {
      for (const name of ["model", "true", "predicted"]) form.elements[name].value = button.dataset[name];
      if (form.elements.others) form.elements.others.value = "";
      filter();
      byId("count").focus({ preventScroll: true });
      form.scrollIntoView({ block: "start" });
    });
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter)); // the form is reset after the event
  byId("more").addEventListener("click", more);
  filter();
}
