(() => {
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const root = document.documentElement, tip = $("tip"), charts = new Map();
const order = ["unplanned", "planned"].filter((key) => key in data.programs);
const state = {by: "scope", which: order.at(-1), lit: "", scale: "one"};
const count = new Intl.NumberFormat("en-US");

const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0, n = bytes;
  while (Math.abs(n) >= 1024 && i < 4) { n /= 1024; i += 1; }
  return i ? `${n.toFixed(n < 10 ? 3 : n < 100 ? 2 : 1)} ${units[i]}` : `${bytes} B`;
};
// Text is only ever put in as text.
const node = (name, attrs = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attrs)) key === "color" ? made.style.background = value : made.setAttribute(key, value);
  made.append(...children);
  return made;
};
// Charts: Vega-Lite with the strings that begin with a dollar sign filled in.
const fill = (spec, values) => {
  if (typeof spec === "string") return spec.startsWith("$") && spec.slice(1) in values ? values[spec.slice(1)] : spec;
  if (Array.isArray(spec)) return spec.map((part) => fill(part, values));
  if (spec && typeof spec === "object") return Object.fromEntries(Object.entries(spec).map(([k, v]) => [k, fill(v, values)]));
  return spec;
};
const config = () => {
  const css = getComputedStyle(root), of = (name) => css.getPropertyValue(name).trim();
  const ink = of("--ink"), soft = of("--soft"), line = of("--line"), card = of("--card");
  const axis = {labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11, titleFontSize: 11.5, titleFontWeight: "normal", titlePadding: 8};
  return {
    background: null, font: "system-ui, sans-serif", view: {stroke: null}, axis,
    text: {color: ink, fontSize: 11.5}, rule: {color: ink, opacity: .85}, point: {color: ink}, style: {buffer: {stroke: card}},
  };
};
const draw = async (place, name, values, datasets, options = {}) => {
  const css = getComputedStyle(root), colors = {card: css.getPropertyValue("--card").trim(), accent: css.getPropertyValue("--accent").trim()};
  const spec = {...fill(data.specs[name], {...values, ...colors}), datasets, description: place.getAttribute("aria-label") || name};
  charts.get(place.id)?.finalize();
  const made = await vegaEmbed(place.querySelector(".canvas") || place, spec, {actions: false, renderer: "svg", config: config(), ast: true, ...options});
  charts.set(place.id, made);
  made.view.resize();
  return made.view;
};

// Timelines.
const scaled = (bytes) => bytes / data.unit.size;
const bandRows = (program, by) => data.by[by].labels.map((band, i) => ({
  band, place: i, color: data.by[by].colors[i], x: [...program.x, program.steps],
  v: [...program.bands[by][i], program.bands[by][i].at(-1)].map(scaled),
}));
const limitRows = (most) => data.limits.filter((l) => l.bytes <= most).map((l) => ({...l, y: scaled(l.bytes)}));
const drawTimeline = async (key) => {
  const place = $(`plot-${key}`), program = data.programs[key];
  const phases = program.phases.map(([x, x2, phase]) => ({x, x2, phase, color: data.phases.colors[phase]}));
  const left = program.peak < program.steps / 2;
  const peak = [{x: program.peak, y: scaled(program.peakLive), label: `peak ${size(program.peakLive)}`, side: left ? "left" : "right"}];
  await draw(place, "timeline", {steps: program.steps, most: scaled(state.scale === "one" ? data.most : 1.12 * program.total), unit: data.unit.name},
    {bands: bandRows(program, state.by), phases, limits: limitRows(state.scale === "one" ? data.most : 1.12 * program.total), peak});
  light(place.id);
};
const light = (id) => { const view = charts.get(id)?.view; if (view) view.signal("lit", state.lit).runAsync(); };
const bufferText = (b, i, text) => b.texts[text][b[text][i]];
const describe = (program, i) => {
  const b = program.buffers, box = node("div", {class: "buffer"}), where = [bufferText(b, i, "source"), bufferText(b, i, "scope")].filter(Boolean);
  const padding = b.padding[i] ? `, ${size(b.padding[i])} of it padding` : "";
  box.append(node("b", {}, size(b.size[i])), ` ${bufferText(b, i, "shape")}${padding}`);
  box.append(node("p", {}, where.join(" · ") || bufferText(b, i, "role")));
  const again = b.again[i];
  const said = !again ? "" : again[0] === 1 ? `, made again at step ${count.format(again[1])}`
    : `, its kind made again ${again[0]} times in steps ${count.format(again[1])} to ${count.format(again[2])}`;
  const made = bufferText(b, i, "role") === "argument" ? "there from the start" : `${data.phases.labels[b.phase[i]]}, made at step ${count.format(b.made[i])}`;
  box.append(node("p", {}, `${made}, last read at ${count.format(b.read[i])}${said}`));
  return box;
};
const largest = (program, by, band, step, most) => {
  const b = program.buffers, found = [];
  for (let i = 0; i < b.size.length; i += 1) if (b.bands[by][i] === band && b.made[i] <= step && step <= b.held[i]) found.push(i);
  return found.sort((x, y) => b.size[y] - b.size[x]).slice(0, most);
};
const phaseAt = (program, step) => data.phases.labels[(program.phases.find(([a, z]) => a <= step && step < z) || [0, 0, 4])[2]];
const content = (program, column, band) => {
  const step = program.at[column], {labels, colors} = data.by[state.by], made = [];
  made.push(node("h4", {}, `Step ${count.format(step)}, ${phaseAt(program, step)}: ${size(program.live[column])} live`));
  made.push(node("p", {class: "mono"}, program.names[column]));
  if (band < 0) {
    const order = labels.map((_, i) => i).filter((i) => program.bands[state.by][i][column]).sort((a, z) => program.bands[state.by][z][column] - program.bands[state.by][a][column]);
    for (const i of order.slice(0, 5)) made.push(node("div", {}, node("i", {color: colors[i]}), `${labels[i]}: ${size(program.bands[state.by][i][column])}`));
    return made;
  }
  made.push(node("div", {}, node("i", {color: colors[band]}), node("b", {}, labels[band]), `: ${size(program.bands[state.by][band][column])}`));
  for (const i of largest(program, state.by, band, step, 3)) made.push(describe(program, i));
  return made;
};
const showTip = (children, x, y) => {
  tip.replaceChildren(...children);
  tip.style.display = "block";
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 16 : x + 16)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 6))}px`;
};
const hideTip = () => { tip.style.display = "none"; };
const columnAt = (program, step) => {
  let low = 0, high = program.x.length - 1;
  while (low < high) { const mid = (low + high + 1) >> 1; program.x[mid] <= step ? low = mid : high = mid - 1; }
  return low;
};
const frame = (place) => {
  const view = charts.get(place.id).view, box = place.querySelector("svg").getBoundingClientRect(), [ox, oy] = view.origin();
  return {view, left: box.left + ox, top: box.top + oy, over: place.getBoundingClientRect()};
};
const point = (place, program, column, band, at) => {
  const {view, left, top, over} = frame(place), x = left + view.scale("x")(program.x[column]);
  const cursor = place.querySelector(".cursor");
  cursor.style.display = "block";
  cursor.style.left = `${x - over.left}px`;
  place.column = column;
  place.setAttribute("aria-valuenow", program.at[column]);
  showTip(content(program, column, band), at ? at[0] : x, at ? at[1] : top + 10);
  place.setAttribute("aria-valuetext", tip.textContent);
};
const watch = (place) => {
  const key = place.dataset.program, program = data.programs[key];
  place.append(node("div", {class: "canvas"}), node("div", {class: "cursor", "aria-hidden": "true"}));
  place.setAttribute("aria-valuemax", program.steps - 1);
  place.addEventListener("pointermove", (event) => {
    if (!charts.get(place.id)) return;
    const {view, left, top} = frame(place), step = view.scale("x").invert(event.clientX - left);
    if (step < 0 || step > program.steps) return leave(place);
    const column = columnAt(program, step), bytes = view.scale("y").invert(event.clientY - top) * data.unit.size;
    let sum = 0, band = -1;
    if (bytes >= 0) band = program.bands[state.by].findIndex((row) => { sum += row[column]; return bytes < sum; });
    point(place, program, column, band, [event.clientX, event.clientY]);
  });
  place.addEventListener("pointerleave", () => leave(place));
  place.addEventListener("blur", () => leave(place));
  place.addEventListener("keydown", (event) => {
    const last = program.x.length - 1, now = place.column ?? 0, far = Math.ceil(last / 20);
    const moved = {ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1, PageDown: now - far, PageUp: now + far,
      Home: 0, End: last, p: columnAt(program, program.peak), P: columnAt(program, program.peak)}[event.key];
    if (event.key === "Escape") return leave(place);
    if (moved === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    point(place, program, Math.max(0, Math.min(last, moved)), -1);
  });
};
const leave = (place) => { hideTip(); place.querySelector(".cursor").style.display = "none"; };

const drawHeap = async () => {
  const place = $("plot-heap"), program = data.programs[state.which], b = program.buffers, {labels, colors} = data.by[state.by], rows = [];
  const unit = data.unit;
  for (let i = 0; i < b.size.length; i += 1) if (b.offset[i] >= 0) rows.push({i, x: b.made[i], x2: b.held[i] + 1, y: b.offset[i] / unit.size,
    y2: (b.offset[i] + b.size[i]) / unit.size, band: labels[b.bands[state.by][i]], color: colors[b.bands[state.by][i]]});
  const view = await draw(place, "heap", {steps: program.steps, most: program.heap / unit.size, address: `address, ${unit.name}`}, {buffers: rows},
    {renderer: "canvas", tooltip: (_, event, item) => {
      if (!item?.datum || item.datum.i === undefined) return hideTip();
      const i = item.datum.i;
      showTip([node("h4", {}, node("i", {color: item.datum.color}), item.datum.band), node("p", {class: "mono"}, b.name[i]), describe(program, i)], event.clientX, event.clientY);
    }});
  // The handler hears of marks that are entered, and a tip belongs to one.
  view.addEventListener("mousemove", (_, item) => { if (!item?.datum || item.datum.i === undefined) hideTip(); });
  place.onpointerleave = hideTip;
  light(place.id);
};
const drawFrontier = () => {
  const f = data.frontier, points = f.points.map((p) => ({...p, peak: p.bytes / f.unit.size}));
  const limits = f.budget ? [{x: f.budget / f.unit.size}] : [];
  return draw($("plot-frontier"), "frontier", {peak: `peak, ${f.unit.name}`}, {points, limits, chosen: points.filter((p) => p.chosen)}, {tooltip: {theme: root.dataset.theme}});
};
const drawRegions = (place) => {
  const plan = data.regions[place.dataset.plan], tall = Math.min(240, 34 + 34 * plan.depth);
  return draw(place, "regions", {blocks: plan.blocks, depth: plan.depth, tall}, {regions: plan.rows}, {tooltip: {theme: root.dataset.theme}});
};

// Legends and tables.
const drawLegend = () => {
  const {labels, colors} = data.by[state.by], program = data.programs[order.at(-1)];
  const made = labels.map((label, i) => {
    const press = node("button", {type: "button", "aria-pressed": String(state.lit === label), title: `${label}: bytes at the ${order.at(-1)} peak`},
      node("i", {color: colors[i]}), label, node("small", {}, size(program.peakBands[state.by][i])));
    press.addEventListener("click", () => { state.lit = state.lit === label ? "" : label; drawLegend(); relight(); });
    return node("li", {}, press);
  });
  $("legend").replaceChildren(...made);
  const head = node("tr", {}, node("th", {scope: "col"}, `by ${state.by}`), ...order.map((name) => node("th", {scope: "col", class: "n"}, name)));
  $("bands").tHead.replaceChildren(head);
  $("bands").tBodies[0].replaceChildren(...labels.map((label, i) => node("tr", {}, node("td", {}, label),
    ...order.map((key) => node("td", {class: "n"}, size(data.programs[key].peakBands[state.by][i]))))));
};
const relight = () => { for (const key of order) light(`plot-${key}`); light("plot-heap"); };
const sortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const body = table.tBodies[0], rows = [...body.rows], value = (row) => row.cells[i].dataset.v;
    const isNumber = rows.length && value(rows[0]) !== undefined;
    const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") !== "descending" : isNumber;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const open = rows.filter((row) => !row.hidden).length;
    rows.sort((a, z) => (isNumber ? value(a) - value(z) : a.cells[i].textContent.localeCompare(z.cells[i].textContent)) * (down ? -1 : 1));
    rows.forEach((row, k) => { row.hidden = k >= open; });
    body.append(...rows);
  }));
};
const drawAll = async () => {
  const done = [];
  if (order.length) {
    drawLegend();
    done.push(...order.map(drawTimeline), drawHeap());
  }
  if (data.frontier) done.push(drawFrontier());
  done.push(...[...document.querySelectorAll(".regions")].map(drawRegions));
  await Promise.all(done);
  root.dataset.drawn = "true";
};
const theme = (name) => {
  root.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
};
const preferred = matchMedia("(prefers-color-scheme: dark)");
theme(preferred.matches ? "dark" : "light");
preferred.addEventListener("change", () => { theme(preferred.matches ? "dark" : "light"); drawAll(); });
$("theme").addEventListener("click", () => { theme(root.dataset.theme === "dark" ? "light" : "dark"); drawAll(); });
for (const key of order) {
  const program = data.programs[key];
  watch($(`plot-${key}`));
  const gap = program.total - program.peakLive;
  $(`sum-${key}`).textContent = `${count.format(program.steps)} steps, ${size(program.total)} in all: ${size(program.peakLive)} live at the peak, ${size(gap)} gaps and reserved`;
}
if ($("phases")) $("phases").replaceChildren(...data.phases.labels.map((label, i) => node("span", {}, node("i", {color: data.phases.colors[i]}), label)));
document.querySelectorAll("input[name=by]").forEach((input) => input.addEventListener("change", () => { state.by = input.value; state.lit = ""; drawAll(); }));
document.querySelectorAll("input[name=scale]").forEach((input) => input.addEventListener("change", () => { state.scale = input.value; order.forEach(drawTimeline); }));
document.querySelectorAll("input[name=which]").forEach((input) => input.addEventListener("change", () => { state.which = input.value; drawHeap(); }));
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("button.more").forEach((button) => button.addEventListener("click", () => {
  for (const row of $(button.dataset.table).tBodies[0].rows) row.hidden = false;
  button.remove();
}));
drawAll();
})();
