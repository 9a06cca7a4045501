"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, text, attributes) => {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
};
const say = (n) => n.toLocaleString("en-US");
const images = (n) => `${say(n)} image${n === 1 ? "" : "s"}`;

const add = (parent, tag, text, attributes) => parent.appendChild(make(tag, text, attributes));
const draw = (parent, tag, attributes, text) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
};
const three = (value) => (value === null ? "" : value.toFixed(3));
const brackets = (ends) => (ends === null || ends[0] === null ? ""
  : `[${three(ends[0])}, ${three(ends[1])}]`);
const addHeader = (table, names) => {
  const row = table.createTHead().insertRow();
  for (const name of names) add(row, "th", name, {scope: "col"});
};

// --- sections without anything to show, and links to the others ---
if (!data.leaderboard) $("leaderboard").remove();
if (!data.maps) $("map").remove();
if (!data.facts.length && !data.commands.length) $("run").remove();
for (const section of document.querySelectorAll("section")) {
  add(add($("links"), "li"), "a", section.querySelector("h2").textContent,
    {href: `#${section.id}`});
}

// --- figures ---
const found = data.evaluation;
const figures = [
  ["accuracy", three(found.accuracy), brackets(found.accuracy_interval)],
  ["balanced accuracy", three(found.balanced_accuracy),
    brackets(found.balanced_accuracy_interval)],
  ["macro F1", three(found.macro_f1), brackets(found.macro_f1_interval)],
  ...Object.entries(found.top_k).filter(([k]) => k > 1).map(([k, value]) =>
    [`top-${k} accuracy`, three(value), `the label is among the ${k} likeliest`]),
  ["log loss", three(found.log_loss), "natural logarithm"],
  ["calibration error", three(found.ece), `${three(found.classwise_ece)} by class`],
  ["Brier score", three(found.brier), "0 is perfect"],
  ["images", say(found.images), `${say(found.mistakes)} mistakes`],
];
for (const [name, value, small] of figures) {
  const box = add($("figures"), "div");
  add(box, "dt", name);
  add(add(box, "dd", value), "small", small);
}
$("notes").textContent = [
  `Brackets are 95 % intervals over ${found.resampled}.`,
  ...found.notes.map((note) => `${note}.`)].join(" ");
$("version").textContent = data.version;

// --- leaderboard ---
if (data.leaderboard) {
  const board = data.leaderboard, best = board.rows[0];
  const other = board.scoring !== "accuracy", held = board.n_test > 0;
  const params = Object.entries(best.params).map(([name, value]) =>
    `${name} ${typeof value === "number" ? Number(value.toPrecision(4)) : value}`).join(", ");
  $("best").textContent = best.head;
  $("best").after(`${params && ` (${params})`}; ${say(board.n_fit)} images to train on, `
    + `${board.folds}, ${say(board.n_test)} held out`
    + `${board.n_unlabelled ? `, ${say(board.n_unlabelled)} without a label left out` : ""}.`);
  const ends = board.rows.flatMap((row) => [row.cv_accuracy, ...row.cv_accuracy_interval,
    row.accuracy, ...(row.accuracy_interval || [])]).filter((end) => end !== null);
  const low = Math.min(...ends), high = Math.max(...ends);
  const x = (value) => 6 + 148 * (value - low) / Math.max(high - low, 1e-9);
  const whiskers = (cell, row) => {
    const svg = draw(cell, "svg", {width: 160, height: 24, "aria-hidden": "true"});
    const mark = (kind, y, value, interval) => {
      const g = draw(svg, "g", {class: kind});
      if (interval[0] !== null) draw(g, "line",
        {x1: x(interval[0]), x2: x(interval[1]), y1: y, y2: y, "stroke-width": 2});
      draw(g, "circle", {cx: x(value), cy: y, r: 4});
    };
    mark("cv", 7, row.cv_accuracy, row.cv_accuracy_interval);
    if (row.accuracy !== null) mark("held", 17, row.accuracy, row.accuracy_interval);
  };
  addHeader($("heads"), ["head", ...(other ? [`CV ${board.scoring}`] : []), "CV accuracy",
    "difference", "corrected", ...(held ? ["held-out accuracy", "balanced", "macro F1"] : []), "fit s", "predict µs",
    `${low.toFixed(2)} to ${high.toFixed(2)}`]);
  const body = $("heads").createTBody();
  for (const row of board.rows) {
    const line = body.insertRow();
    if (row === best) line.className = "best";
    add(line, "th", row.head, {scope: "row"});
    if (other) add(line, "td", ({balanced_accuracy: row.cv_balanced_accuracy,
      f1_macro: row.cv_macro_f1}[board.scoring] ?? row.cv_score).toFixed(4));
    add(line, "td", `${three(row.cv_accuracy)} ${brackets(row.cv_accuracy_interval)}`);
    add(line, "td", row === best || row.difference === null ? "" : `${three(row.difference)} ${
      brackets([row.difference_low, row.difference_high])}`);
    add(line, "td", `${three(row.cv_accuracy_corrected)} ${
      brackets(row.cv_accuracy_corrected_interval)}`);
    if (held) {
      add(line, "td", `${three(row.accuracy)} ${brackets(row.accuracy_interval)}`);
      add(line, "td", three(row.balanced_accuracy));
      add(line, "td", three(row.macro_f1));
    }
    add(line, "td", (row.search_seconds + row.fit_seconds).toFixed(1));
    add(line, "td", row.predict_us.toFixed(0));
    whiskers(add(line, "td"), row);
  }
  for (const note of data.remarks) add($("heads-notes"), "p", note, {class: "quiet"});
}

// --- classes ---
addHeader($("scores"), ["class", "precision", "recall", "F1", "images", "predicted"]);
const scores = $("scores").createTBody();
for (const one of found.per_class) {
  const row = scores.insertRow();
  add(row, "th", one.label, {scope: "row"});
  for (const value of [one.precision, one.recall, one.f1]) add(row, "td", three(value));
  for (const n of [one.support, one.predicted]) add(row, "td", say(n), {"data-value": n});
}

// --- reliability diagram (Niculescu-Mizil and Caruana, ICML 2005) ---
{
  const bins = found.calibration, most = Math.max(...bins.map((bin) => bin.count));
  const x = (value) => 40 + 270 * value, y = (value) => 290 - 270 * value;
  const told = (bin) => `confidence ${bin.confidence.toFixed(2)}: accuracy `
    + `${bin.accuracy.toFixed(2)} of ${images(bin.count)}`;
  const svg = draw($("reliability"), "svg", {viewBox: "0 0 320 330", width: "100%",
    style: "max-width: 28rem", role: "img",
    "aria-label": `Reliability diagram. ${bins.map(told).join("; ")}`});
  for (const t of [0, .2, .4, .6, .8, 1]) {
    draw(svg, "line", {class: "axis", x1: x(t), x2: x(t), y1: y(0), y2: y(1)});
    draw(svg, "line", {class: "axis", x1: x(0), x2: x(1), y1: y(t), y2: y(t)});
    draw(svg, "text", {x: x(t), y: 306, "text-anchor": "middle"}, t.toFixed(1));
    draw(svg, "text", {x: 34, y: y(t) + 4, "text-anchor": "end"}, t.toFixed(1));
  }
  for (const bin of bins) {
    const height = 60 * bin.count / most;
    draw(svg, "rect", {class: "bar", x: x(bin.low), width: x(bin.high) - x(bin.low) - 1,
      y: 290 - height, height});
  }
  draw(svg, "line", {class: "dash", x1: x(0), y1: y(0), x2: x(1), y2: y(1)});
  draw(svg, "polyline", {class: "line",
    points: bins.map((bin) => `${x(bin.confidence)},${y(bin.accuracy)}`).join(" ")});
  for (const bin of bins) {
    const dot = draw(svg, "circle", {class: "dot", cx: x(bin.confidence), cy: y(bin.accuracy),
      r: 4});
    draw(dot, "title", {}, told(bin));
  }
  draw(svg, "text", {x: 175, y: 324, "text-anchor": "middle"}, "confidence");
  draw(svg, "text", {x: 12, y: 160, "text-anchor": "middle", transform: "rotate(-90 12 160)"},
    "accuracy");
}

// --- galleries ---
const addCard = (list, card) => {
  const li = add(list, "li");
  if (card.picture) {
    const alt = `${card.id}: ${card.label}${card.second && `, ${card.second}`}`;
    add(li, "img", null, {src: `data:image/webp;base64,${card.picture}`, alt});
  }
  add(li, "b", card.label);
  if (card.second) add(li, "span", card.second);
  add(li, "span", card.id);
};
for (const name of ["mistakes", "suspects"]) {
  $(name).querySelector("p").textContent = data[name].note;
  for (const card of data[name].cards) addCard($(name).querySelector("ul"), card);
}
$("duplicates").querySelector("p").textContent = data.duplicates.note;
for (const pair of data.duplicates.pairs) {
  const li = add($("duplicates").querySelector("ul"), "li", null, {class: "pair"});
  const list = add(li, "ul", null, {class: "cards"});
  for (const card of pair.cards) addCard(list, card);
  const line = add(li, "span", `similarity ${three(pair.similarity)}`, {class: "quiet"});
  if (pair.cards[0].label !== pair.cards[1].label) line.append(", ", make("b", "other label"));
}

// --- what was run ---
if ($("run")) {
  for (const [name, value] of data.facts) {
    add($("facts"), "dt", name);
    add($("facts"), "dd", value);
  }
  $("commands").textContent = data.commands.join("\n");
  if (!data.commands.length) $("again").remove();
}

// --- light and dark ---
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// --- pictures: a tile is a part of a sheet ---
const urls = [];
const sheetUrl = (k) => {
  if (!urls[k]) {
    const bytes = Uint8Array.from(atob(data.sheets.pictures[k]), (c) => c.charCodeAt(0));
    urls[k] = URL.createObjectURL(new Blob([bytes], {type: "image/webp"}));
  }
  return urls[k];
};
const tile = (item, alt) => {
  const number = data.tiles ? data.tiles[item] : -1;
  if (number < 0) return null;
  const columns = data.sheets.columns, each = columns * columns;
  const place = number % each, row = Math.floor(place / columns), column = place % columns;
  const box = make("div", null, {class: "tile", role: "img", "aria-label": alt});
  box.style.backgroundImage = `url(${sheetUrl(Math.floor(number / each))})`;
  box.style.backgroundSize = `${columns * 100}% ${columns * 100}%`;
  box.style.backgroundPosition =
    `${100 * column / (columns - 1)}% ${100 * row / (columns - 1)}%`;
  return box;
};
const labelOf = (item) => data.label[item] < 0 ? "no label" : data.classes[data.label[item]];
const describe = (item) => {
  const text = [labelOf(item)];
  if (data.predicted[item] >= 0) {
    text.push(`predicted ${data.classes[data.predicted[item]]} (${data.sure[item].toFixed(3)})`);
  }
  text.push(data.splits[data.split[item]]);
  return text;
};
const fill = (element, item) => {
  const text = describe(item);
  const parts = [make("b", text[0]), ...text.slice(1).map((line) => make("span", line)),
    make("span", data.ids[item])];
  const picture = tile(item, `${data.ids[item]}: ${text.join(", ")}`);
  element.replaceChildren(...(picture ? [picture] : []), ...parts);
};

// --- tables: a click on a header sorts ---
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", head.textContent, {type: "button"});
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const x = Number(key(a)), y = Number(key(b));
        const order = Number.isNaN(x) || Number.isNaN(y)
          ? key(a).localeCompare(key(b)) : x - y;
        return down ? -order : order;
      });
      body.replaceChildren(...rows);
    });
  });
}

// --- confusion matrix ---
const MOST = 30;
const k = data.scored;
const support = new Array(k).fill(0), given = new Array(k).fill(0), right = new Array(k).fill(0);
const cells = new Map();
for (const [i, j, n] of data.confusion) {
  cells.set(i * k + j, n);
  support[i] += n; given[j] += n;
  if (i === j) right[i] = n;
}
const errors = support.map((n, i) => n + given[i] - 2 * right[i]);
const ORDERS = {
  name: (a, b) => a - b,
  errors: (a, b) => errors[b] - errors[a] || a - b,
  recall: (a, b) => right[a] / (support[a] || 1) - right[b] / (support[b] || 1) || a - b,
  images: (a, b) => support[b] - support[a] || a - b,
};
const showImages = (i, j, button) => {
  for (const other of $("matrix").querySelectorAll("button")) {
    other.setAttribute("aria-pressed", String(other === button));
  }
  const items = [];
  data.label.forEach((label, item) => {
    if (label === i && data.predicted[item] === j) items.push(item);
  });
  items.sort((a, b) => data.sure[b] - data.sure[a]);
  const some = items.slice(0, 48);
  const n = cells.get(i * k + j) || 0;
  $("cell-title").textContent = `${images(n)} of ${data.classes[i]} predicted `
    + `${data.classes[j]}` + (some.length < n ? `, the ${say(some.length)} surest` : "");
  $("cell-images").replaceChildren(...some.map((item) => {
    const li = make("li");
    fill(li, item);
    return li;
  }));
};
const drawMatrix = () => {
  const order = [...Array(k).keys()].sort(ORDERS[$("order").value]);
  const shown = order.slice(0, MOST);
  const table = make("table");
  table.append(make("caption", "Rows: the label. Columns: what was predicted."
    + (shown.length < k ? ` The first ${MOST} of ${say(k)} classes in this order.` : "")));
  const head = table.createTHead().insertRow();
  head.append(make("td"));
  for (const j of shown) {
    const th = make("th", null, {scope: "col", title: data.classes[j]});
    th.append(make("span", data.classes[j]));
    head.append(th);
  }
  const body = table.createTBody();
  for (const i of shown) {
    const row = body.insertRow();
    const th = make("th", null, {scope: "row", title: data.classes[i]});
    th.append(make("span", data.classes[i]));
    row.append(th);
    for (const j of shown) {
      const n = cells.get(i * k + j) || 0;
      const td = row.insertCell();
      if (!n) { td.append(make("span", "0")); continue; }
      const share = n / support[i];
      const button = make("button", say(n), {type: "button", "aria-pressed": "false",
        title: `${(100 * share).toFixed(1)} % of ${data.classes[i]}`,
        "aria-label": `${images(n)} of ${data.classes[i]} predicted ${data.classes[j]}`});
      // No shade between the two ends: neither dark nor white figures could be read on it.
      const dark = share > 0.6;
      const alpha = dark ? 0.85 + 0.375 * (share - 0.6) : 0.06 + 0.65 * share;
      button.style.background = `rgba(var(--heat), ${alpha.toFixed(3)})`;
      if (dark) button.style.color = "var(--on-heat)";
      button.addEventListener("click", () => showImages(i, j, button));
      td.append(button);
    }
  }
  $("matrix").className = "wide matrix " + (k > 8 ? "many" : k < 5 ? "few" : "");
  $("matrix").replaceChildren(table);
};
const confused = data.confusion.filter(([i, j]) => i !== j).sort((a, b) => b[2] - a[2]);
if (k < 3 || !confused.length) $("confused").remove();
else for (const [i, j, n] of confused.slice(0, 8)) {
  const li = add($("confused").querySelector("ul"), "li", `${images(n)} of `);
  li.append(make("b", data.classes[i]), " predicted ", make("b", data.classes[j]));
}
if (k > MOST) $("order").value = "errors";
$("order").addEventListener("change", drawMatrix);
drawMatrix();

// --- map ---
if (data.maps) {
  for (const name of Object.keys(data.maps)) add($("layout"), "option", name);
  const COLORS = ["#3f83d6", "#d9822b", "#2f9e5b", "#d64550", "#8e63ce", "#a0705a", "#d4619f",
    "#6f8a99", "#9c9a1e", "#1ba3b5"];
  const GREY = "#8a939c";
  const count = data.ids.length;
  const isRight = (item) => data.predicted[item] < 0 ? 2
    : data.predicted[item] === data.label[item] ? 0 : 1;
  const COLOURINGS = {
    class: {names: [...data.classes, "no label"],
      of: (item) => data.label[item] < 0 ? data.classes.length : data.label[item],
      color: (c) => c === data.classes.length ? GREY : COLORS[c % COLORS.length]},
    correctness: {names: ["right", "wrong", "not scored"], of: isRight,
      color: (c) => ["#3f83d6", "#e0561f", GREY][c]},
    split: {names: data.splits, of: (item) => data.split[item],
      color: (c) => COLORS[c % COLORS.length]},
  };
  let plot = null, source = null, hidden = new Set();
  const usable = [];
  const refresh = (moved) => {
    const colouring = COLOURINGS[$("colour").value];
    const [x, y] = data.maps[$("layout").value];
    usable.length = 0;
    for (let item = 0; item < count; item++) {
      if (x[item] !== null && !hidden.has(colouring.of(item))) usable.push(item);
    }
    // Wrong ones, and what is scored, lie on top.
    const rank = (item) => [1, 2, 0][isRight(item)];
    usable.sort((a, b) => rank(a) - rank(b));
    source.selected.indices = [];
    source.data = {
      x: usable.map((item) => x[item]), y: usable.map((item) => y[item]),
      color: usable.map((item) => colouring.color(colouring.of(item))),
      alpha: usable.map((item) =>
        $("colour").value === "correctness" && isRight(item) === 2 ? 0.3 : 0.8),
    };
    if (moved) {
      plot.x_range.setv({start: -1.08, end: 1.08});
      plot.y_range.setv({start: -1.08, end: 1.08});
    }
  };
  const drawLegend = () => {
    const colouring = COLOURINGS[$("colour").value];
    const counts = new Array(colouring.names.length).fill(0);
    for (let item = 0; item < count; item++) counts[colouring.of(item)]++;
    $("legend").replaceChildren(...colouring.names.flatMap((name, c) => {
      if (!counts[c]) return [];
      const li = make("li"), button = make("button", null, {type: "button",
        "aria-pressed": "true"});
      const spot = make("i");
      spot.style.background = colouring.color(c);
      button.append(spot, make("span", `${name} (${say(counts[c])})`));
      button.addEventListener("click", () => {
        if (hidden.has(c)) hidden.delete(c); else hidden.add(c);
        button.setAttribute("aria-pressed", String(!hidden.has(c)));
        refresh(false);
      });
      li.append(button);
      return [li];
    }));
  };
  const pick = (item) => { fill($("picked"), item); };
  const tip = $("tip");
  let pointer = [0, 0];
  $("map-plot").addEventListener("pointermove", (event) => {
    pointer = [event.clientX, event.clientY];
  }, true);
  $("map-plot").addEventListener("pointerleave", () => { tip.hidden = true; });
  const hover = () => {
    const indices = source.inspected.indices;
    if (!indices.length) { tip.hidden = true; return; }
    fill(tip, usable[indices[indices.length - 1]]);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(pointer[0] + 16, innerWidth - box.width - 8);
    const top = Math.min(pointer[1] + 16, innerHeight - box.height - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  };
  Bokeh.embed.embed_item(JSON.parse($("map-item").textContent)).then((views) => {
    plot = [...views.roots][0].model;
    source = plot.renderers[0].data_source;
    refresh(true);
    drawLegend();
    source.inspect.connect(hover);
    source.selected.change.connect(() => {
      const indices = source.selected.indices;
      if (indices.length) pick(usable[indices[indices.length - 1]]);
    });
    // A finger that drags shall scroll the page; the buttons zoom.
    if (matchMedia("(pointer: coarse)").matches) plot.toolbar.active_drag = null;
    document.documentElement.dataset.map = "ready";
  });
  $("layout").addEventListener("change", () => refresh(true));
  $("colour").addEventListener("change", () => {
    hidden = new Set();
    drawLegend();
    refresh(false);
  });
  $("find").addEventListener("change", () => {
    const wanted = $("find").value.trim().toLowerCase();
    if (!wanted) return;
    const at = usable.findIndex((item) => data.ids[item].toLowerCase().includes(wanted));
    if (at < 0) {
      $("picked").replaceChildren(make("span", `No image on the map: ${wanted}`));
      return;
    }
    source.selected.indices = [at];
    pick(usable[at]);
  });
}
})();
