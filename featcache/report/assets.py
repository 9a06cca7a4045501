"""Style and script of the report's page, kept apart from the HTML that they serve."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --soft: #f3f5f7; --line: #d5dae0;
  --ink: #1b1f24; --quiet: #57606a; --accent: #0b5cad; --good: #2f7fd1; --bad: #d2622a;
  --heat: 11, 92, 173; --on-heat: #ffffff; }
@media (prefers-color-scheme: dark) { :root:not([data-theme="light"]) {
  --paper: #14171b; --soft: #1e2329; --line: #3a424c; --ink: #e8ebee; --quiet: #a5afba;
  --accent: #7ab8f5; --heat: 48, 108, 178; } }
:root[data-theme="dark"] { color-scheme: dark; --paper: #14171b; --soft: #1e2329; --line: #3a424c;
  --ink: #e8ebee; --quiet: #a5afba; --accent: #7ab8f5; --heat: 48, 108, 178; }
:root[data-theme="light"] { color-scheme: light; }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header > div { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header h1 { font-size: 1.6rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
.top { display: flex; gap: 1rem; align-items: start; justify-content: space-between; }
.top button { margin-top: 1.5rem; white-space: nowrap; }
nav { position: sticky; top: 0; z-index: 5; background: var(--paper);
  border-bottom: 1px solid var(--line); margin-top: 1rem; }
nav ul { max-width: 68rem; margin: 0 auto; padding: .5rem 1.25rem; display: flex; gap: 1.1rem;
  list-style: none; overflow-x: auto; white-space: nowrap; }
a { color: var(--accent); }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
section { margin: 2.5rem 0; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .875rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .75rem; margin: 1.25rem 0; padding: 0; }
.figures div { background: var(--soft); border-radius: 8px; padding: .75rem 1rem; }
.figures dt { color: var(--quiet); font-size: .875rem; }
.figures dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.figures small { display: block; font-size: .8125rem; color: var(--quiet); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; } thead th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.best th { color: var(--accent); }
th button { all: unset; cursor: pointer; font: inherit; font-weight: 600; }
th button:focus-visible { outline: 3px solid var(--accent); }
th[aria-sort] button::after { content: " \\2195"; color: var(--quiet); }
th[aria-sort="ascending"] button::after { content: " \\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: " \\2193"; color: inherit; }
svg { display: block; } svg text { fill: var(--quiet); font-size: 11px; }
.axis { stroke: var(--line); } .dash { stroke: var(--quiet); stroke-dasharray: 4 4; }
.cv { stroke: var(--quiet); fill: var(--quiet); } .held { stroke: var(--good); fill: var(--good); }
.bar { fill: var(--good); fill-opacity: .25; } .over { stroke: var(--bad); fill: var(--bad); }
.line { stroke: var(--good); fill: none; stroke-width: 2; } .dot { fill: var(--good); }
.matrix table { font-size: .875rem; } .matrix td { padding: 0; border: 0; text-align: center; }
.matrix th { border: 0; } .matrix thead th { max-width: 10rem; text-align: center; }
.matrix tbody th { text-align: right; } .matrix th span { display: inline-block; max-width: 9rem;
  overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
.matrix.many thead th span { writing-mode: vertical-rl; transform: rotate(180deg); }
.matrix td button, .matrix td span { display: block; width: 100%; min-width: 2.6rem;
  min-height: 2.4rem; line-height: 2.4rem; border: 2px solid transparent; padding: 0 .4rem;
  border-radius: 4px; font: inherit; line-height: 1; color: inherit; background: transparent; }
.matrix td span { color: var(--quiet); line-height: 2.4rem; }
.matrix td button { cursor: pointer; } .matrix td button[aria-pressed="true"] {
  border-color: var(--ink); }
.few td button, .few td span { min-width: 6.5rem; min-height: 3.6rem; font-size: 1.1rem; }
.few td span { line-height: 3.6rem; }
.many td button, .many td span { min-width: 1.6rem; min-height: 1.6rem; line-height: 1.6rem;
  padding: 0; font-size: .75rem; }
.matrix.many tbody th { position: sticky; left: 0; background: var(--paper); padding: 0 .4rem; }
.matrix.many tbody th span { max-width: 14rem; }
.matrix.many thead th { padding: .3rem 0; }
button, select, input { font: inherit; color: var(--ink); }
.plain, select, input[type=search] { background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .7rem; min-height: 2.25rem; max-width: 100%; }
.plain { cursor: pointer; }
.row { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center; margin: .6rem 0; }
.row label { display: flex; gap: .45rem; align-items: center; }
.cards { display: grid; gap: .9rem; padding: 0; margin: 1rem 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.cards li, .pair { background: var(--soft); border-radius: 8px; padding: .6rem; min-width: 0; }
.cards img, .cards .tile { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  display: block; border-radius: 4px; background-color: rgba(128, 128, 128, .15); }
.cards b, .cards span, .card b, .card span { display: block; font-size: .8125rem;
  line-height: 1.35; overflow-wrap: anywhere; }
.cards span, .card span { color: var(--quiet); }
.pairs { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr));
  padding: 0; list-style: none; }
.pair .cards { grid-template-columns: 1fr 1fr; margin: 0 0 .4rem; }
.pair .cards li { padding: 0; }
.map { display: grid; grid-template-columns: minmax(0, 1fr) 14rem; gap: 1rem; }
#map-plot { height: 34rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--soft); }
.legend { list-style: none; margin: 0; padding: 0; max-height: 16rem; overflow-y: auto; }
.legend button { all: unset; cursor: pointer; display: flex; gap: .5rem; align-items: center;
  padding: .15rem .3rem; font-size: .875rem; width: 100%; border-radius: 4px;
  box-sizing: border-box; overflow-wrap: anywhere; }
.legend button:focus-visible { outline: 3px solid var(--accent); }
.legend button[aria-pressed="false"] { opacity: .45; }
.legend i { width: .8rem; height: .8rem; border-radius: 50%; flex: none; }
.card { margin-top: .8rem; } #tip.card { margin: 0; }
.card .tile { width: 12rem; height: 12rem; margin-bottom: .4rem; border-radius: 4px; }
#tip { position: fixed; z-index: 10; pointer-events: none; background: var(--paper);
  border: 1px solid var(--line); border-radius: 8px; padding: .5rem; max-width: 13rem;
  box-shadow: 0 4px 16px rgba(0, 0, 0, .25); }
#tip[hidden] { display: none; }
#tip .tile { width: 8rem; height: 8rem; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto;
  font: .875rem/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.2rem; }
dl.facts dt { color: var(--quiet); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--quiet); font-size: .875rem; padding: 1rem 0 3rem; }
@media (max-width: 46rem) {
  main, header > div { padding: 0 .9rem; } nav ul { padding: .5rem .9rem; }
  .figures { grid-template-columns: 1fr 1fr; } .figures dd { font-size: 1.25rem; }
  .map { grid-template-columns: minmax(0, 1fr); } #map-plot { height: 24rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: .6rem; } .pairs { grid-template-columns: 1fr; }
  .few td button, .few td span { min-width: 4.6rem; }
  .matrix.many tbody th span { max-width: 7rem; }
  dl.facts { grid-template-columns: 1fr; } dl.facts dd { margin-bottom: .5rem; } }
@media print { nav, .top button, .row { display: none; } }
"""

SCRIPT = """
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
if (k > MOST) $("order").value = "errors";
$("order").addEventListener("change", drawMatrix);
drawMatrix();

// --- map ---
if (data.maps) {
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
"""
