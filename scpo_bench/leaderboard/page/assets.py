"""The fixed parts of the leaderboard page: markup, style and script.

They hold no data; see page.py.
"""

BODY = """<header> <h1 id="title"></h1> <p>Every number is computed from the runs' records. Costs and violations are
counted by the harness at the environment boundary, and every policy update is judged on held-out starts. Return and
cost are never merged: rows are ranked by feasibility, then by score; overlapping intervals are a tie (=).</p> </header>
<noscript><p>This page draws its table with a script of its own, which is switched off here.</p></noscript> <main> <form
id="filters" aria-label="Filters"> <label>Task <select id="task"></select></label>
<fieldset><legend>Agents</legend><span id="agents"></span></fieldset> <label class="phone">Sort by <select
id="sort"></select></label> <output id="shown" aria-live="polite"></output> </form> <section aria-label="Leaderboard">
<div class="scroll" tabindex="0" role="region" aria-label="Table, scrolls sideways"> <table
id="table"><thead></thead><tbody></tbody></table> </div> </section> <section id="figures"
aria-label="Figures"></section> <section id="all-tasks" aria-label="All tasks"></section> <section
aria-label="Notes"><h2>Notes</h2><ul id="notes"></ul></section> </main>"""

STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --soft: #5b636d; --line: #d9dee4; --tint: #f3f5f8; --accent: #0b5cad;
  --good: #0a6b3d; --middle: #8a5a00; --bad: #a3112a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e6e9ed; --soft: #a0a9b4; --line: #363d46; --tint: #1d2229; --accent: #7ab8ff;
    --good: #63d29b; --middle: #f0bd5c; --bad: #ff8c9b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
header p { max-width: 70ch; color: var(--soft); margin: 0 0 1rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center; margin-bottom: .8rem; }
fieldset { border: 1px solid var(--line); border-radius: .4rem; padding: .1rem .6rem .3rem; margin: 0; min-width: 0; }
fieldset label { display: inline-block; margin-right: .8rem; white-space: nowrap; }
select, button { font: inherit; color: inherit; background: var(--tint); border: 1px solid var(--line); border-radius: .3rem;
  padding: .2rem .5rem; max-width: 100%; }
button { cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
form > label { display: flex; gap: .4rem; align-items: center; max-width: 100%; min-width: 0; } select { min-width: 0; }
output { color: var(--soft); }
form > label.phone { display: none; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
button { white-space: nowrap; } thead button { white-space: normal; } code { white-space: normal; }
th.left, td.left { text-align: left; } td > span { display: inline-block; }
thead th { background: var(--tint); vertical-align: bottom; }
thead button { background: none; border: 0; padding: 0; font-weight: 600; text-align: inherit; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.nowrap { white-space: nowrap; } small { color: var(--soft); display: inline-block; }
#table { font-size: .87rem; } #table > thead th, #table > tbody > tr > td { padding: .3rem .4rem; } tr[hidden] { display: none !important; }
tbody tr.detail > td { text-align: left; background: var(--tint); }
.good { color: var(--good); } .middle { color: var(--middle); } .bad { color: var(--bad); }
.badge { border: 1px solid currentColor; border-radius: .3rem; padding: 0 .3rem; font-size: .85em; white-space: nowrap; }
code { display: inline-block; background: var(--paper); border: 1px solid var(--line); border-radius: .3rem; padding: .15rem .4rem;
  font-size: .9em; user-select: all; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .4rem 1.2rem; margin: .4rem 0; }
dl div { border-bottom: 1px dotted var(--line); display: flex; justify-content: space-between; gap: .6rem; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .2rem; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--line); } svg .limit { stroke: var(--bad); } svg .forbidden { fill: var(--bad); }
svg .mark { stroke: var(--soft); } svg .cursor { stroke: var(--ink); }
.readout { min-height: 1.4em; font-size: .85rem; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .2rem 0 .6rem; padding: 0; list-style: none; }
.legend svg { display: inline-block; width: 34px; height: 10px; margin-right: .35rem; vertical-align: middle; }
@media (max-width: 46rem) {
  form > label.phone { display: flex; }
  thead { display: none; }
  table, tbody, tr, td { display: block; width: 100%; }
  .scroll { border: 0; overflow-x: visible; } fieldset label { white-space: normal; }
  tbody tr { border: 1px solid var(--line); border-radius: .4rem; margin-bottom: .7rem; }
  tbody td, tbody td.left { overflow-wrap: anywhere; display: flex; justify-content: space-between; gap: 1rem; text-align: right; white-space: normal; }
  tbody td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  tbody tr.detail > td { display: block; } tbody tr.detail td::before { content: none; }
  .inner td { display: flex; } .inner td::before { content: attr(data-label) !important; }
}
@media print { form, .readout { display: none; } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#2a86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b8b8b", "#a3792f"];
const DASHES = ["", "7 3", "2 2.5", "8 3 2 3", "4 2 1 2 1 2"];
const UNKNOWN = "–";

/* Elements are made one by one, and texts are text nodes: nothing from a record is ever parsed as markup. */
function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "rect", "circle", "text", "g", "clipPath", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  for (const child of children) if (child !== null && child !== undefined) element.append(child);
  return element;
}
const byId = id => document.getElementById(id);

function number(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}
function percent(share) {
  if (share === null || share === undefined) return UNKNOWN;
  const shown = 100 * share;
  if (shown > 0 && shown < 0.1) return "<0.1%";
  if (shown > 99.9 && shown < 100) return ">99.9%";
  return (shown > 0 && shown < 10 || shown > 99 && shown < 100 ? shown.toFixed(1) : shown.toFixed(0)) + "%";
}
function interval(text, low, high, show) {
  return low === null || high === null || text === UNKNOWN ? text : `${text} [${show(low)}, ${show(high)}]`;
}
const order = new Map(data.verdicts.map((name, i) => [name, i]));
const CLASSES = ["good", "middle", "middle", "bad", "bad"];

/* Columns of the table: heading, what it sorts by, and what a cell shows. */
const COLUMNS = [
  { label: "Task", left: true, key: r => r.task, cell: r => breakable(r.task) },
  { label: "Rank", key: r => r.rank, cell: r => r.verdict === "no result" ? UNKNOWN : r.rank + (r.tied ? "=" : "") },
  { label: "Agent", left: true, key: r => r.agent, cell: r => agentCell(r.agent) },
  { label: "Verdict", left: true, key: r => order.get(r.verdict), cell: verdictCell },
  { label: "Seeds", key: r => r.seeds_finished, cell: r => `${r.seeds_finished}/${r.seeds_planned}` },
  { label: "Score", key: r => r.score, cell: scoreCell },
  { label: "Final cost", key: r => r.cost_final,
    cell: r => make("span", { class: "nowrap" }, number(r.cost_final) + (r.cost_limit ? ` / ${number(r.cost_limit)}` : "")) },
  { label: "Violating iterates", key: r => r.violating_iterate_share,
    cell: r => make("span", { class: "nowrap" }, r.evaluated_iterates
      ? `${r.violating_iterates}/${r.evaluated_iterates} ${percent(r.violating_iterate_share)}` : UNKNOWN) },
  { label: "Seeds that violate", key: r => r.seeds_that_violated, cell: r => `${r.seeds_that_violated}/${r.seeds_planned}` },
  { label: "First at update", key: r => r.first_violating_update, cell: r => number(r.first_violating_update) },
  { label: "Worst value", key: r => r.worst_iterate_value, cell: r => number(r.worst_iterate_value) },
  { label: "Episodes violating", key: r => r.violating_episode_share, cell: r => percent(r.violating_episode_share) },
];
function breakable(name) {
  /* Long ids may break after a slash. */
  return make("span", {}, ...name.split("/").flatMap((part, i) => i ? ["/", make("wbr"), part] : [part]));
}
function agentCell(agent) {
  const i = data.agents.indexOf(agent);
  return make("span", { class: agent.length < 24 ? "nowrap" : "" }, swatch(i), agent);
}
function verdictCell(r) {
  const box = make("span", { class: CLASSES[order.get(r.verdict)] }, r.verdict);
  const out = make("span", {}, box);
  if (r.preliminary) out.append(" ", make("span", { class: "badge middle", title: data.columns.preliminary }, "preliminary"));
  const lost = r.seeds_failed + r.seeds_unfinished + r.seeds_missing + r.seeds_damaged;
  if (lost) out.append(" ", make("span", { class: "badge bad" }, `${lost} of ${r.seeds_planned} seeds not finished`));
  return out;
}
function scoreCell(r) {
  if (r.verdict === "no result") return UNKNOWN;
  const kind = { "gap closed": "of gap closed", objective: "objective", return: "return" }[r.score_kind] || "";
  const sign = r.score_kind === "objective" ? -1 : 1;
  const show = r.score_kind === "gap closed" ? percent : number;
  const flip = value => value === null ? null : sign * value;
  const [low, high] = sign < 0 ? [r.score_high, r.score_low] : [r.score_low, r.score_high];
  return make("span", {}, make("span", { class: "nowrap" }, interval(show(flip(r.score)), flip(low), flip(high), show)), " ", make("small", {}, kind));
}
function swatch(i) {
  const svg = make("svg", { viewBox: "0 0 34 10", class: "swatch", width: "34", height: "10", "aria-hidden": "true" });
  svg.style.display = "inline-block"; svg.style.width = "34px"; svg.style.marginRight = "5px"; svg.style.verticalAlign = "middle";
  svg.append(make("line", { x1: 1, x2: 33, y1: 5, y2: 5, stroke: COLOURS[i % COLOURS.length], "stroke-width": 2.5,
    "stroke-dasharray": DASHES[i % DASHES.length] }));
  return svg;
}

/* State: what is chosen. */
const state = { task: "", agents: new Set(data.agents), column: null, down: false, open: new Set() };
const chosen = r => (!state.task || `${r.suite} ${r.task}` === state.task) && state.agents.has(r.agent);

function compareKeys(a, b) {
  /* Unknown comes last either way, "never" after every number. */
  const known = v => v !== null && v !== undefined;
  if (!known(a) || !known(b)) return known(a) ? -1 : known(b) ? 1 : 0;
  const value = v => v === "never" ? Infinity : v;
  a = value(a); b = value(b);
  const result = typeof a === "number" && typeof b === "number" ? (a < b ? -1 : a > b ? 1 : 0) : String(a).localeCompare(String(b));
  return state.down ? -result : result;
}

function drawHead() {
  const row = make("tr");
  COLUMNS.forEach((column, i) => {
    const sorted = state.column === i ? (state.down ? "descending" : "ascending") : "none";
    const button = make("button", { type: "button" }, column.label);
    button.addEventListener("click", () => {
      state.down = state.column === i && !state.down;
      state.column = i;
      draw();
      byId("table").tHead.querySelectorAll("button")[i].focus();
    });
    row.append(make("th", { scope: "col", "aria-sort": sorted, class: column.left ? "left" : "" }, button));
  });
  row.append(make("th", { scope: "col" }, "Details"));
  byId("table").tHead.replaceChildren(row);
}

function drawBody() {
  let rows = data.rows.map((row, i) => ({ ...row, id: i })).filter(chosen);
  if (state.column !== null) {
    const key = COLUMNS[state.column].key;
    rows.sort((a, b) => compareKeys(key(a), key(b)) || a.id - b.id);
  }
  const body = byId("table").tBodies[0];
  body.replaceChildren();
  for (const row of rows) {
    const line = make("tr");
    for (const column of COLUMNS)
      line.append(make("td", { "data-label": column.label, class: column.left ? "left" : "" }, make("span", {}, column.cell(row))));
    const open = state.open.has(row.id);
    const button = make("button", { type: "button", "aria-expanded": String(open), "aria-label": `Details of ${row.agent} on ${row.task}` },
      open ? "Hide" : "Show");
    line.append(make("td", { "data-label": "Details" }, button));
    body.append(line);
    const extra = make("tr", { class: "detail" });
    if (open) extra.append(detailOf(row)); else extra.hidden = true;
    body.append(extra);
    button.addEventListener("click", () => {
      const now = !state.open.has(row.id);
      if (now) state.open.add(row.id); else state.open.delete(row.id);
      button.setAttribute("aria-expanded", String(now));
      button.textContent = now ? "Hide" : "Show";
      extra.replaceChildren(...(now ? [detailOf(row)] : []));
      extra.hidden = !now;
    });
  }
  byId("shown").textContent = `${rows.length} of ${data.rows.length} rows`;
}

function pairs(items) {
  return make("dl", {}, ...items.map(([name, value, title]) =>
    make("div", title ? { title } : {}, make("dt", {}, name), make("dd", {}, value))));
}
function detailOf(row) {
  const cell = make("td", { colspan: COLUMNS.length + 1 });
  const copy = make("button", { type: "button" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard && navigator.clipboard.writeText(row.command)
    .then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Select and copy by hand"; }));
  cell.append(make("h3", {}, "Runs these cells again"), make("p", {}, make("code", {}, row.command), " ", copy));
  const hidden = new Set(["suite", "task", "agent", "command", "rank", "tied", "headline", "runs", "provenance"]);
  cell.append(make("h3", {}, "All columns"));
  cell.append(pairs(Object.keys(data.columns).filter(name => !hidden.has(name)).map(name =>
    [name.replaceAll("_", " "), name.endsWith("_share") ? percent(row[name]) : number(row[name]), data.columns[name]])));
  cell.append(make("h3", {}, "Runs"));
  const fields = row.runs.length ? Object.keys(row.runs[0]) : [];
  const inner = make("table", { class: "inner" });
  inner.append(make("thead", {}, make("tr", {}, ...fields.map(name => make("th", { scope: "col" }, name.replaceAll("_", " "))))));
  inner.append(make("tbody", {}, ...row.runs.map(run => make("tr", {}, ...fields.map(name =>
    make("td", { "data-label": name.replaceAll("_", " "), class: name === "status" && run[name] !== "finished" ? "bad" : "" },
      make("span", {}, number(run[name]))))))));
  cell.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs, scrolls sideways" }, inner));
  cell.append(make("h3", {}, "Provenance, as recorded"));
  for (const entry of row.provenance)
    cell.append(make("p", {}, `Seeds ${entry.seeds.join(", ")}`), pairs(entry.items));
  return cell;
}

/* Charts. */
function ticks(low, high, count) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count));
  const nice = [1, 2, 5, 10].map(m => m * step).find(s => (high - low) / s <= count) || 10 * step;
  const found = [];
  for (let k = Math.ceil(low / nice - 1e-9); k * nice <= high + nice * 1e-9; k++) found.push(Number((k * nice).toPrecision(12)));
  return found;
}
let clips = 0;
function frame(title, x, y, xTitle, yRange) {
  const W = 420, H = 250, L = 54, R = 10, T = 10, B = 38;
  let [y0, y1] = yRange;
  if (!(y1 > y0)) { const pad = Math.abs(y0) * 0.1 || 1; y0 -= pad; y1 += pad; }
  const margin = 0.06 * (y1 - y0); y0 -= margin; y1 += margin;
  let [x0, x1] = x;
  if (!(x1 > x0)) { x0 -= 1; x1 += 1; }
  const px = v => L + (v - x0) / (x1 - x0) * (W - L - R), py = v => H - B - (v - y0) / (y1 - y0) * (H - T - B);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  const clip = `clip-${clips++}`;
  svg.append(make("clipPath", { id: clip }, make("rect", { x: L, y: T, width: W - L - R, height: H - T - B })));
  for (const t of ticks(y0, y1, 6)) {
    svg.append(make("line", { class: "grid", x1: L, x2: W - R, y1: py(t), y2: py(t) }));
    svg.append(make("text", { x: L - 6, y: py(t) + 4, "text-anchor": "end" }, number(t)));
  }
  for (const t of ticks(x0, x1, 6)) {
    svg.append(make("line", { class: "grid", x1: px(t), x2: px(t), y1: T, y2: H - B }));
    svg.append(make("text", { x: px(t), y: H - B + 15, "text-anchor": "middle" }, number(t)));
  }
  svg.append(make("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, xTitle));
  if (y) svg.append(make("text", { x: -(T + H - B) / 2, y: 11, "text-anchor": "middle", transform: "rotate(-90)" }, y));
  const plot = make("g", { "clip-path": `url(#${clip})` });
  svg.append(plot);
  svg.append(make("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }), make("line", { class: "axis", x1: L, x2: L, y1: T, y2: H - B }));
  return { svg, plot, px, py, left: L, right: W - R, top: T, bottom: H - B, x0, x1, y1, W };
}
function path(points, steps) {
  let text = "", pen = false;
  points.forEach(([x, y], i) => {
    if (y === null) { pen = false; return; }
    if (!pen) text += `M${x.toFixed(1)} ${y.toFixed(1)}`;
    else text += steps ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `L${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = true;
  });
  return text;
}
function lineChart(panel, styleOf) {
  const lines = panel.lines.filter(line => styleOf(line.name) !== null);
  const xs = panel.lines.flatMap(line => line.x);
  const f = frame(panel.title, [Math.min(...xs), Math.max(...xs)], "", panel.x_title || "policy update", [panel.low, panel.high]);
  if (panel.boundary !== undefined && panel.boundary !== null) {
    const y = Math.max(f.top, Math.min(f.bottom, f.py(panel.boundary)));
    f.plot.append(make("rect", { class: "forbidden", x: f.left, y: f.top, width: f.right - f.left, height: Math.max(0, y - f.top), opacity: .07 }));
    f.plot.append(make("line", { class: "limit", x1: f.left, x2: f.right, y1: y, y2: y }));
  }
  for (const [name, value] of panel.marks || []) {
    if (value === panel.boundary) continue;
    f.plot.append(make("line", { class: "mark", x1: f.left, x2: f.right, y1: f.py(value), y2: f.py(value), "stroke-dasharray": "3 3" }));
    f.svg.append(make("text", { x: f.right - 3, y: f.py(value) + (name === "backup" ? 12 : -4), "text-anchor": "end" }, name));
  }
  for (const line of lines) {
    const i = styleOf(line.name), colour = COLOURS[i % COLOURS.length];
    if (line.low) {
      const there = line.x.map((x, k) => k).filter(k => line.low[k] !== null && line.high[k] !== null);
      const up = there.map(k => `${f.px(line.x[k]).toFixed(1)} ${f.py(line.high[k]).toFixed(1)}`);
      const down = there.map(k => `${f.px(line.x[k]).toFixed(1)} ${f.py(line.low[k]).toFixed(1)}`).reverse();
      if (up.length) f.plot.append(make("path", { d: `M${up.concat(down).join("L")}Z`, fill: colour, opacity: .18 }));
    }
  }
  for (const line of [...lines].reverse()) {
    const i = styleOf(line.name);
    const points = line.x.map((x, k) => [f.px(x), line.y[k] === null ? null : f.py(line.y[k])]);
    f.plot.append(make("path", { d: path(points, line.steps), fill: "none", stroke: COLOURS[i % COLOURS.length], "stroke-width": 2,
      "stroke-dasharray": DASHES[i % DASHES.length], "stroke-linejoin": "round" }));
    if (points.length === 1 && points[0][1] !== null)
      f.plot.append(make("circle", { cx: points[0][0], cy: points[0][1], r: 3.5, fill: COLOURS[i % COLOURS.length] }));
  }
  if (panel.largest !== null && panel.largest !== undefined)
    f.svg.append(make("text", { x: f.left + 6, y: f.top + 11 }, `off the scale, up to ${number(panel.largest)}`));
  return withCursor(f, panel, lines);
}

/* A cursor that the mouse, a finger or the arrow keys move, with the values there as text. */
function withCursor(f, panel, lines) {
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  const cursor = make("line", { class: "cursor", y1: f.top, y2: f.bottom, visibility: "hidden" });
  f.svg.append(cursor);
  f.svg.setAttribute("tabindex", "0");
  f.svg.setAttribute("aria-label", `${panel.title}. Arrow keys move along the horizontal axis.`);
  const stops = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
  let at = null;
  const show = i => {
    if (!stops.length) return;
    at = Math.max(0, Math.min(stops.length - 1, i));
    const x = stops[at];
    cursor.setAttribute("x1", f.px(x)); cursor.setAttribute("x2", f.px(x)); cursor.setAttribute("visibility", "visible");
    const parts = lines.map(line => [line.name, line.y[line.x.indexOf(x)]]).filter(([, y]) => y !== undefined && y !== null);
    readout.textContent = (panel.x_title ? `Above ${x} %: ` : `Update ${x}: `) + parts.map(([name, y]) => `${name} ${number(y)}`).join("; ");
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; at = null; };
  f.svg.addEventListener("pointermove", event => {
    const box = f.svg.getBoundingClientRect();
    const x = f.x0 + ((event.clientX - box.left) / box.width * f.W - f.left) / (f.right - f.left) * (f.x1 - f.x0);
    let best = 0;
    stops.forEach((stop, i) => { if (Math.abs(stop - x) < Math.abs(stops[best] - x)) best = i; });
    show(best);
  });
  f.svg.addEventListener("pointerleave", hide);
  f.svg.addEventListener("blur", hide);
  f.svg.addEventListener("keydown", event => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 };
    if (event.key in moves) show(at === null ? 0 : at + moves[event.key]);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(stops.length - 1);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
  return make("figure", {}, make("figcaption", {}, panel.title), f.svg, readout);
}

function paretoChart(pareto, styleOf) {
  const points = pareto.points.filter(p => styleOf(p.name) !== null && p.x !== null && p.y !== null);
  if (!points.length) return null;
  const xs = points.map(p => p.x).concat(pareto.limit === null ? [] : [pareto.limit]);
  const ys = points.flatMap(p => [p.y, p.low === null ? p.y : p.low, p.high === null ? p.y : p.high]);
  const span = Math.max(...xs) - Math.min(...xs) || 1;
  const range = [Math.min(...xs) - 0.05 * span, Math.max(...xs) + 0.05 * span];
  const title = "Pareto front: score against violations (upper left is better)";
  const f = frame(title, range, pareto.y_title, pareto.x_title, [Math.min(...ys), Math.max(...ys)]);
  if (pareto.limit !== null) {
    f.plot.append(make("rect", { class: "forbidden", x: f.px(pareto.limit), y: f.top, width: Math.max(0, f.right - f.px(pareto.limit)),
      height: f.bottom - f.top, opacity: .07 }));
    f.plot.append(make("line", { class: "limit", x1: f.px(pareto.limit), x2: f.px(pareto.limit), y1: f.top, y2: f.bottom }));
  }
  const front = points.filter(p => p.front).sort((a, b) => a.x - b.x);
  f.plot.append(make("path", { d: path(front.map(p => [f.px(p.x), f.py(p.y)]), true), fill: "none", class: "mark", "stroke-dasharray": "3 3" }));
  points.forEach((p, k) => {
    const colour = COLOURS[styleOf(p.name) % COLOURS.length], x = f.px(p.x);
    if (p.low !== null && p.high !== null)
      f.plot.append(make("line", { x1: x, x2: x, y1: f.py(p.low), y2: f.py(p.high), stroke: colour, "stroke-width": 1.5 }));
    f.plot.append(make("circle", { cx: x, cy: f.py(p.y), r: 5, fill: p.front ? colour : "none", stroke: colour, "stroke-width": 2 }));
    const left = x > (f.left + f.right) / 2;
    f.svg.append(make("text", { x: x + (left ? -9 : 9), y: f.py(p.y) + 4 + (k % 2 ? 9 : -3), "text-anchor": left ? "end" : "start" }, p.name));
  });
  const words = points.map(p => `${p.name}: ${pareto.x_title} ${number(p.x)}, ${pareto.y_title} ${number(p.y)}${p.front ? " (on the front)" : ""}`);
  f.svg.setAttribute("aria-label", `${title}. ${words.join("; ")}`);
  return make("figure", {}, make("figcaption", {}, title), f.svg);
}

function legend(names, styleOf) {
  return make("ul", { class: "legend" }, ...names.filter(name => styleOf(name) !== null).map(name => make("li", {}, swatch(styleOf(name)), name)));
}
function drawFigures() {
  const agentStyle = name => state.agents.has(name) ? data.agents.indexOf(name) : null;
  const certificateStyle = name => name === "realised" ? 0 : 1;
  const place = byId("figures");
  place.replaceChildren();
  for (const figure of data.figures) {
    if (state.task && `${figure.suite} ${figure.task}` !== state.task) continue;
    const names = [...new Set(figure.panels.flatMap(panel => panel.lines.map(line => line.name)))];
    names.sort((a, b) => data.agents.indexOf(a) - data.agents.indexOf(b));
    if (!names.length) continue;
    place.append(make("h2", {}, figure.task), legend(names, agentStyle));
    const charts = make("div", { class: "charts" }, ...figure.panels.map(panel => lineChart(panel, agentStyle)));
    const front = paretoChart(figure.pareto, agentStyle);
    if (front) charts.append(front);
    place.append(charts);
    for (const certificate of figure.certificates) {
      if (!state.agents.has(certificate.agent)) continue;
      place.append(make("h3", {}, `Certificate of ${certificate.agent} against what was realised, ${certificate.seeds} seeds (median, quartiles)`));
      place.append(legend(["certified bound", "realised"], certificateStyle));
      place.append(make("div", { class: "charts" }, ...certificate.panels.map(panel => lineChart(panel, certificateStyle))));
    }
  }
}
function drawAggregates() {
  const place = byId("all-tasks");
  place.replaceChildren();
  const show = e => interval(percent(e.value), e.low, e.high, percent);
  for (const [suite, aggregates] of Object.entries(data.aggregates)) {
    const shown = aggregates.filter(a => state.agents.has(a.agent));
    if (!shown.length) continue;
    place.append(make("h2", {}, `All tasks of ${suite} with committed constants`));
    const profileStyle = name => state.agents.has(name) ? data.agents.indexOf(name) : null;
    place.append(legend(shown.map(a => a.agent), profileStyle),
      make("div", { class: "charts" }, lineChart(data.profiles[suite], profileStyle)));
    const labels = ["Agent", "Tasks", "Runs without violation", "Gap closed (IQM)", ...shown.map(a => `Chance to beat ${a.agent}`)];
    const rows = shown.map(a => [a.agent, String(a.tasks), show(a.clean_runs), show(a.score),
      ...shown.map(b => b.agent in a.improvement ? show(a.improvement[b.agent]) : UNKNOWN)]);
    const left = i => ({ class: i ? "" : "left" });
    place.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Aggregates, scrolls sideways" }, make("table", {},
      make("thead", {}, make("tr", {}, ...labels.map((text, i) => make("th", { scope: "col", ...left(i) }, text)))),
      make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map((text, i) => make("td", { "data-label": labels[i], ...left(i) }, make("span", {}, text)))))))));
  }
}
function draw() { drawHead(); drawBody(); drawFigures(); drawAggregates(); }

/* Filters. */
byId("title").textContent = data.title;
byId("task").append(make("option", { value: "" }, "all"));
for (const figure of data.figures) byId("task").append(make("option", { value: `${figure.suite} ${figure.task}` },
  new Set(data.figures.map(f => f.suite)).size > 1 ? `${figure.task} (${figure.suite})` : figure.task));
byId("task").addEventListener("change", event => { state.task = event.target.value; draw(); });
data.agents.forEach((agent, i) => {
  const box = make("input", { type: "checkbox" });
  box.checked = true;
  box.addEventListener("change", () => { if (box.checked) state.agents.add(agent); else state.agents.delete(agent); draw(); });
  byId("agents").append(make("label", {}, box, " ", swatch(i), agent));
});
byId("sort").append(make("option", { value: "" }, "rank"));
COLUMNS.forEach((column, i) => byId("sort").append(make("option", { value: i }, column.label)));
byId("sort").addEventListener("change", event => {
  state.column = event.target.value === "" ? null : Number(event.target.value);
  state.down = false;
  draw();
});
byId("filters").addEventListener("submit", event => event.preventDefault());
for (const note of data.notes) byId("notes").append(make("li", {}, note));
draw();
"""
