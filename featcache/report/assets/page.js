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
