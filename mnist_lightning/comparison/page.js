"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

// the contents mark what is on the screen
const links = all("nav a");
const mark = () => {
  const current = links.filter((link) => document.querySelector(link.hash).getBoundingClientRect().top < innerHeight / 3).pop() ?? links[0];
  if (current.ariaCurrent) return;
  for (const link of links) link.ariaCurrent = link === current ? "true" : null;
  const list = current.closest("ol");
  list.scrollTo({ left: current.offsetLeft - list.clientWidth / 3 });
};
addEventListener("scroll", () => {
  byId("tip").hidden = true;
  mark();
}, { passive: true });
mark();
if (location.protocol === "about:") // in a notebook's frame, a link would load the notebook
  for (const link of links)
    link.addEventListener("click", (event) => {
      event.preventDefault();
      document.querySelector(link.hash).scrollIntoView();
    });

// clicking a header sorts the table
for (const table of all("table.sortable"))
  all("thead th", table).forEach((th, column) => {
    const button = element("button", {}, ...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      const up = th.ariaSort !== "ascending";
      for (const other of all("th", table)) other.ariaSort = null;
      th.ariaSort = up ? "ascending" : "descending";
      const text = (row) => row.cells[column].textContent.trim(), number = (row) => parseFloat(text(row).replaceAll(",", ""));
      const compare = (a, b) => number(a) - number(b) || text(a).localeCompare(text(b)); // as text if one is not a number
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
    });
  });

// charts: numbers come as they are, colors from the style sheet, which knows dark mode; paper is always white
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name.replace(/var\((.*)\)/, "$1"));
const short = (value) =>
  value == null ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
const swatch = (model) => {
  const made = element("span", { className: "swatch" });
  made.style.setProperty("--color", data.models[model].color);
  return made;
};
const plots = [];
let chosen = data.best;

/** Show the tip at a place of the window: lines of texts and elements. */
function tell(x, y, title, lines) {
  const tip = byId("tip");
  tip.replaceChildren(element("b", { textContent: title }), ...lines.map((line) => element("div", {}, ...line)));
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip, left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  Object.assign(tip.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px` });
}

/** Mark a trial in all charts and in the table. */
function choose(trial) {
  chosen = trial;
  for (const { plot } of plots) plot.redraw(false);
  for (const row of all("tr[data-trial]")) {
    const isChosen = row.dataset.trial === String(trial), box = row.closest(".scroll");
    row.classList.toggle("chosen", isChosen);
    row.querySelector("button").ariaPressed = isChosen;
    if (isChosen) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }
}

/** Draw a chart into its group on the page. */
function addChart(chart) {
  const isCurve = chart.group === "curves", series = [{}], bands = [], owners = [null];
  // the k-th point of a series at x is in row (x, k); missing values are bridged, null is a gap
  const rows = new Map(), columns = [];
  const add = (owner, values, options) => {
    const seen = {}, column = [];
    owner.x.forEach((x, i) => {
      if (x === null) return;
      const key = `${x} ${(seen[x] = (seen[x] ?? -1) + 1)}`;
      if (!rows.has(key)) rows.set(key, { x, key });
      column.push([key, values[i], i]);
    });
    columns.push(column);
    owners.push(owner);
    series.push(options);
  };
  for (const one of chart.series) {
    const isLine = !["points", "dots"].includes(one.kind);
    const stroke = () => color(one.model !== undefined ? data.models[one.model].color : isLine ? "--ink" : "--model-2"), size = one.kind === "dots" ? 4 : isLine ? (one.x.length > 40 ? 3 : 5) : 9;
    add(one, one.y, {
      stroke, width: isLine ? 2 : 0, dash: one.kind === "dashed" ? [6, 4] : undefined,
      paths: one.kind === "step" ? uPlot.paths.stepped({ align: 1 }) : isLine ? undefined : () => null,
      points: { show: one.kind !== "step" && one.name !== "perfect", size, fill: stroke, stroke, width: 0 },
    });
    if (!one.low) continue;
    bands.push({ series: [series.length, series.length + 1], fill: () => `${color(data.models[one.model].color)}33` });
    for (const edge of [one.high, one.low]) add(one, edge, { width: 0, points: { show: false }, isBand: true });
  }
  const sorted = [...rows.values()].sort((a, b) => a.x - b.x || a.key.localeCompare(b.key));
  const places = new Map(sorted.map(({ key }, i) => [key, i]));
  const points = []; // of each series but bands: at which row, and which of its own
  const values = columns.map((column, number) => {
    const full = new Array(sorted.length);
    for (const [key, value, i] of column) {
      full[places.get(key)] = value;
      if (value !== null && !series[number + 1].isBand && (isCurve || owners[number + 1].kind !== "step"))
        points.push({ row: places.get(key), series: number + 1, i });
    }
    return full;
  });
  const near = (plot, left, top) => {
    let best = null, least = 40 ** 2;
    for (const point of points) {
      const dx = plot.valToPos(sorted[point.row].x, "x") - left, dy = plot.valToPos(values[point.series - 1][point.row], "y") - top;
      if (plot.series[point.series].show && dx * dx + dy * dy < least) [best, least] = [point, dx * dx + dy * dy];
    }
    return best;
  };
  let at = null, isHovered = false;
  const say = (plot) => {
    const { left, top, idx } = plot.cursor;
    if (!isHovered || left < 0 || idx == null || (!isCurve && !at)) return isHovered && (byId("tip").hidden = true);
    const box = plot.over.getBoundingClientRect(), place = [box.left + left, box.top + top];
    if (isCurve)
      return tell(...place, `epoch ${sorted[idx].x}`, owners.flatMap((one, s) => !one || series[s].isBand || !plot.series[s].show ? [] :
        [[swatch(one.model), ` ${one.name}, ${one.stage === "val" ? "validation" : "training"} `, element("span", { textContent: short(values[s - 1][idx]) })]]));
    const one = owners[at.series], x = sorted[at.row].x, y = values[at.series - 1][at.row];
    if (one.trials) return tell(...place, `trial ${one.trials[at.i]}`, Object.entries(data.trials[one.trials[at.i]]).map(([name, value]) => [`${name}: ${value}`]));
    tell(...place, one.name, [[`${chart.x}: ${short(x)}`], [`${chart.y}: ${short(y)}`], ...(one.notes ? [[one.notes[at.i]]] : [])]);
  };
  const box = element("div", { className: "chart", tabIndex: 0, role: "group", ariaLabel: `${chart.title}: ${chart.y} over ${chart.x}; use the arrow keys` });
  const axis = { stroke: () => color("--faint"), grid: { stroke: () => color("--grid"), width: 1 }, ticks: { show: false } };
  const whole = ["epoch", "trial"].includes(chart.x) ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] } : {};
  const named = chart.labels ? { splits: () => chart.labels.map((_, i) => i), values: () => chart.labels } : { values: (_, found) => found.map((value) => (value === null ? "" : short(value))) };
  const sparse = chart.log ? { filter: ({ scales: { x } }, found) =>
    found.map((value) => ((x.max > 50 * x.min ? /^1e/ : /^[125]e/).test(value.toExponential()) ? value : null)) } : {};
  const range = isCurve || chart.log ? undefined : (_, low, high) => {
    const room = chart.labels ? 0.5 : (high - low || Math.abs(high) || 1) * 0.05;
    return [low - room, high + room];
  };
  document.querySelector(`[data-charts=${chart.group}]`).append(box);
  const height = () => (innerWidth < 700 ? 200 : 250);
  const plot = new uPlot({
    title: chart.title, width: box.clientWidth || 300, height: height(), series, bands, legend: { show: false },
    scales: { x: { time: false, distr: chart.log ? 3 : 1, range } },
    axes: [{ ...axis, ...whole, ...named, ...sparse, label: chart.group === "slices" ? undefined : chart.x, labelSize: 20, size: 30 }, { ...axis, size: 56 }],
    cursor: isCurve ? { y: false, sync: { key: "epochs" }, points: { size: 8 } } : {
      y: false, x: false, points: { size: 13 },
      dataIdx: (plot, s) => {
        if (s <= 1) at = near(plot, plot.cursor.left, plot.cursor.top);
        return at && at.series === s ? at.row : null;
      },
    },
    hooks: {
      setCursor: [say],
      draw: [(plot) => {
        const pen = plot.ctx, scale = devicePixelRatio;
        for (const { row, series: s, i } of points) {
          if (owners[s].kind !== "points" || !owners[s].trials || owners[s].trials[i] !== chosen) continue;
          pen.beginPath();
          pen.arc(plot.valToPos(sorted[row].x, "x", true), plot.valToPos(values[s - 1][row], "y", true), 9 * scale, 0, 7);
          Object.assign(pen, { strokeStyle: color("--accent"), lineWidth: 2.5 * scale });
          pen.stroke();
        }
      }],
    },
  }, [sorted.map(({ x }) => x), ...values], box);
  new ResizeObserver(() => requestAnimationFrame(() => { // deferred: it changes the observed height
    if (box.clientWidth && plot.width !== box.clientWidth) plot.setSize({ width: box.clientWidth, height: height() });
  })).observe(box);
  const leave = () => {
    isHovered = false;
    byId("tip").hidden = true;
  };
  for (const name of ["mouseenter", "mousemove"]) plot.over.addEventListener(name, () => { isHovered = true; }, true);
  plot.over.addEventListener("mouseleave", leave);
  box.addEventListener("blur", leave);
  const pick = () => { if (at && owners[at.series].trials) choose(owners[at.series].trials[at.i]); };
  plot.over.addEventListener("click", pick);
  // the arrow keys walk through the epochs, or through the points from left to right
  const stops = isCurve ? sorted.map((_, row) => ({ row })) : points.filter((point) => owners[point.series].kind !== "dots").sort((a, b) => a.row - b.row);
  let stop = -1;
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") return pick();
    if (event.key === "Escape") {
      leave();
      return plot.setData(plot.data);
    }
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    stop = stop < 0 ? (step > 0 ? 0 : stops.length - 1) : Math.min(Math.max(stop + step, 0), stops.length - 1);
    const { row, series: s } = stops[stop];
    isHovered = true;
    plot.setCursor({ left: plot.valToPos(sorted[row].x, "x"), top: s ? plot.valToPos(values[s - 1][row], "y") : 0 });
  });
  plots.push({ plot, owners });
}
data.charts.forEach(addChart);
const byModel = all("input[data-model]"), byStage = all("input[data-stage]");
for (const box of [...byModel, ...byStage])
  box.addEventListener("change", () => {
    for (const { plot, owners } of plots.filter(({ owners }) => owners[1]?.stage))
      plot.batch(() => owners.forEach((one, s) => {
        if (one) plot.setSeries(s, { show: byModel[one.model].checked && byStage.find((box) => box.dataset.stage === one.stage).checked });
      }));
  });
const redraw = (onPaper) => {
  document.documentElement.classList.toggle("on-paper", onPaper);
  for (const { plot } of plots) {
    const { clientWidth } = plot.root.parentElement;
    if (clientWidth) plot.setSize({ width: onPaper ? Math.min(clientWidth, 640) : clientWidth, height: plot.height });
    plot.redraw(false, true);
  }
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(false));
addEventListener("beforeprint", () => redraw(true));
addEventListener("afterprint", () => redraw(false));
for (const button of all(".trial")) button.addEventListener("click", () => choose(+button.textContent));
if (data.best !== undefined) choose(data.best);

// the gallery of mistakes
if (data.gallery) {
  const { width, height, columns, labels, indices, limit, classes, samples, bars, shown: listed, isGrey } = data.gallery;
  const form = byId("filter"), card = byId("card"), step = innerWidth < 700 ? 12 : 30;
  const numbers = (text) => new Uint16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const percent = (hundredths) => `${(hundredths / 100).toFixed(1)} %`;
  const probabilities = data.models.map((model) => numbers(model.probabilities));
  const listedClasses = listed && numbers(listed);
  let found = [], shown = 0;
  /** Return cell i of a sprite whose cells have a size, to be shown in another size. */
  const cell = (className, i, wide, high) => {
    const made = element("span", { className });
    Object.assign(made.style, {
      width: `${wide}px`, height: `${high}px`, backgroundSize: `${wide * columns}px auto`,
      backgroundPosition: `-${wide * (i % columns)}px -${high * Math.floor(i / columns)}px`,
    });
    return made;
  };
  const picture = (i, scale) => cell(isGrey ? "tile grey" : "tile", i, scale * width, scale * height);
  const says = (model, i) => `${classes[model.predicted[i]]}, ${percent(model.confidence[i])}`;
  /** Return what each model says of an image: green where it is right, red where it is wrong. */
  const answers = (i) => data.models.map((model, m) => {
    const isRight = model.predicted[i] === labels[i];
    return element("div", { className: isRight ? "right" : "wrong", title: model.name }, swatch(m), " ", element("b", { textContent: classes[model.predicted[i]] }), ` ${percent(model.confidence[i])} ${isRight ? "✓" : "✗"}`);
  });
  const tile = (i, among) => {
    const said = data.models.map((model) => `${model.name} says ${says(model, i)}`).join(", ");
    const button = element("button", { title: `test image ${indices[i]}`, ariaLabel: `test image ${indices[i]}, true ${classes[labels[i]]}, ${said}` },
      picture(i, width > 64 ? 64 / width : Math.round(64 / width)));
    button.addEventListener("click", () => open(i, among));
    const figure = element("figure", {}, button, element("div", {}, "true ", element("b", { textContent: classes[labels[i]] })), ...answers(i));
    figure.dataset.tile = i;
    return figure;
  };

  /** Open the card of an image: large, with the evidence, and all models' probabilities. */
  const open = (i, among, evidence) => {
    const scale = (innerWidth < 700 ? 168 : 252) / Math.max(width, height), image = picture(i, scale), at = among.indexOf(i);
    const explained = data.models.map(({ order, explained }) => { const rank = order.indexOf(i); return rank < explained ? rank : -1; });
    const whose = evidence ?? explained.findIndex((rank) => rank >= 0);
    byId("card-title").textContent = `Test image ${indices[i]}, true ${classes[labels[i]]}`;
    byId("card-image").replaceChildren(image);
    if (whose >= 0) {
      image.classList.add("faded");
      byId("card-image").append(cell(`evidence why-${whose}`, explained[whose], scale * width, scale * height));
    }
    byId("card-evidence").textContent = whose < 0 ? "" : `Orange pixels speak for ${classes[data.models[whose].predicted[i]]}, blue ones for ${classes[labels[i]]}, as ${data.models[whose].name} sees it.`;
    byId("card-said").replaceChildren(...data.models.map((model, m) => {
      const isRight = model.predicted[i] === labels[i];
      return element("div", {}, swatch(m), ` ${model.name}: `, element("b", { className: isRight ? "right" : "wrong", textContent: `${says(model, i)} ${isRight ? "✓" : "✗"}` }));
    }));
    const choices = [[-1, "the image alone"], ...data.models.map((model, m) => [m, `why ${model.name} is wrong`])].filter(([m]) => m < 0 || explained[m] >= 0);
    if (choices.length > 1)
      byId("card-said").append(element("p", {}, ...choices.map(([m, name]) => {
        const radio = element("input", { type: "radio", name: "evidence", checked: m === whose });
        radio.addEventListener("change", () => {
          open(i, among, m);
          card.querySelector("input:checked").focus();
        });
        return element("label", {}, radio, ` ${name}`);
      })));
    byId("card-bars").replaceChildren(...Array.from({ length: bars }, (_, bar) => {
      const name = listedClasses ? listedClasses[i * bars + bar] : bar;
      return element("li", { className: name === labels[i] ? "true" : "" }, element("b", { textContent: classes[name] }), ...data.models.map((model, m) => {
        const share = probabilities[m][i * bars + bar], fill = element("i");
        fill.style.width = `${share / 100}%`;
        const row = element("div", { className: name === model.predicted[i] ? "best" : "" }, element("span", { className: "track" }, fill), element("output", { textContent: percent(share) }));
        row.style.setProperty("--color", model.color);
        return row;
      }));
    }));
    byId("card-before").onclick = () => open(among[at - 1], among);
    byId("card-after").onclick = () => open(among[at + 1], among);
    byId("card-before").disabled = at <= 0;
    byId("card-after").disabled = at === among.length - 1;
    if (!card.open) card.showModal();
  };
  card.addEventListener("keydown", ({ key, target }) => {
    if (target.type !== "radio") byId({ ArrowLeft: "card-before", ArrowRight: "card-after" }[key])?.click();
  });
  card.addEventListener("click", ({ target }) => { if (target === card) card.close(); });
  byId("card-close").addEventListener("click", () => card.close());

  const more = () => {
    byId("gallery").append(...found.slice(shown, shown + step).map((i) => tile(i, found)));
    shown = Math.min(shown + step, found.length);
    byId("more").hidden = shown === found.length;
    byId("more").textContent = `Show more (${found.length - shown} left)`;
  };
  const filter = () => {
    const { model: who, true: truth, predicted: wanted, others } = form.elements, model = data.models[who.value];
    found = model.order.filter((i) =>
      (truth.value === "" || labels[i] === +truth.value) && (wanted.value === "" || model.predicted[i] === +wanted.value) &&
      (!others?.value || data.models[others.value].predicted[i] === labels[i]));
    const cut = model.mistakes > limit ? `; the page has the ${limit.toLocaleString("en")} most confident` : "";
    byId("count").textContent = `${found.length} of the ${model.mistakes.toLocaleString("en")} mistakes of ${model.name}, the most confident first${cut}.`;
    for (const button of all(".confusion button"))
      button.ariaPressed = button.dataset.model === who.value && button.dataset.true === truth.value && button.dataset.predicted === wanted.value;
    byId("gallery").replaceChildren();
    shown = 0;
    more();
  };
  for (const button of all(".confusion button, .filter"))
    button.addEventListener("click", () => {
      for (const name of ["model", "true", "predicted"]) form.elements[name].value = button.dataset[name];
      if (form.elements.others) form.elements.others.value = button.dataset.others ?? "";
      filter();
      byId("count").focus({ preventScroll: true });
      form.scrollIntoView({ block: "start" });
    });
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter)); // the form is reset after the event
  byId("more").addEventListener("click", more);
  filter();
  const fill = (box, some) => box.append(...some.map((i) => tile(i, some)));
  for (const box of all(".tiles[data-right]")) {
    const { right, wrong } = box.dataset;
    fill(box, data.models[wrong].order.filter((i) => data.models[right].predicted[i] === labels[i]).slice(0, 10));
  }
  fill(document.querySelector("[data-samples]"), indices.map((_, i) => i).slice(0, samples)); // the lowest indices
}
