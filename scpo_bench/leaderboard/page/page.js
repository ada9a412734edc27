"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const hidden = new Set();
let charts = [];

/* Tables: sorting by the raw values in data-key, which need not be what a cell shows. */
const compare = (a, b) => {
  if (a === "" || b === "") return 0;
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] === numbers[1] ? 0 : numbers[0] - numbers[1];
};
function sort(table, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = body => body.rows[0].cells[head.cellIndex].dataset.key;
  const bodies = [...table.tBodies].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
  // What was not measured comes last in either direction.
  table.append(...bodies.filter(body => key(body) !== ""), ...bodies.filter(body => key(body) === ""));
}
for (const table of document.querySelectorAll(".sortable")) {
  for (const head of table.tHead.rows[0].cells)
    head.firstElementChild.addEventListener("click", () => sort(table, head));
}
for (const button of document.querySelectorAll(".toggle")) {
  button.addEventListener("click", () => {
    const details = button.closest("tr").nextElementSibling;
    details.hidden = !details.hidden;
    button.setAttribute("aria-expanded", String(!details.hidden));
  });
}
for (const box of document.querySelectorAll("input")) {
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(box.value); else hidden.add(box.value);
    for (const body of document.querySelectorAll("tbody[data-agent]")) body.hidden = hidden.has(body.dataset.agent);
    draw();
  });
}

/* Charts. What they show is computed in figures.py; here it is only drawn. */
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name);

function drawLines(u, panel) {
  const { left, top, width } = u.bbox, c = u.ctx, ratio = devicePixelRatio;
  const lines = Object.entries(panel.marks).map(([name, value]) => [name, value, color("--soft"), [4, 4]]);
  c.save();
  if (panel.limit !== null) {
    lines.push(["limit", panel.limit, color("--bad"), []]);
    c.globalAlpha = 0.08;
    c.fillStyle = color("--bad");
    c.fillRect(left, top, width, u.valToPos(panel.limit, "y", true) - top);
    c.globalAlpha = 1;
  }
  c.font = `${11 * ratio}px system-ui, sans-serif`;
  c.textBaseline = "middle";
  c.textAlign = "left";
  c.lineWidth = ratio;
  for (const [name, value, ink, dash] of lines) {
    const y = u.valToPos(value, "y", true);
    c.strokeStyle = c.fillStyle = ink;
    c.setLineDash(dash.map(length => length * ratio));
    c.beginPath();
    c.moveTo(left, y);
    c.lineTo(left + width, y);
    c.stroke();
    c.fillText(name, left + width + 4 * ratio, y);
  }
  c.restore();
}

function seriesOf(one) {
  const stroke = one.style.color, points = one.kind === "points";
  const paths = points ? () => null : one.kind === "steps" ? uPlot.paths.stepped({ align: 1 }) : uPlot.paths.linear();
  const value = (u, v) => v === null || v === undefined ? "–" : String(Number(v.toPrecision(3)));
  const line = {
    label: one.name, stroke, paths, value, width: one.kind === "steps" ? 1.2 : 2,
    dash: one.style.dashes.map(length => 2 * length),
    points: { show: points || one.x.length === 1, size: one.x.length > 1 ? 4 : 9, fill: stroke },
  };
  const end = { class: "band", paths: uPlot.paths.linear(), points: { show: false } };
  return one.low.length ? [line, end, end] : [line];
}

function chart(panel, place) {
  // The last one drawn is on top; the legend's order is turned round again below.
  const shown = panel.series.filter(one => !hidden.has(one.name)).reverse();
  if (!shown.length) return;
  const axis = { stroke: () => color("--ink"), labelFont: "12px system-ui, sans-serif", grid: { stroke: () => color("--rule"), width: 1 }, ticks: { show: false } };
  const ticks = panel.ticks.length ? { splits: () => panel.ticks, filter: (u, splits) => splits, values: (u, splits) => splits.map(String) } : {};
  const scale = panel.linear_width === null ? { distr: 1 } : { distr: 4, asinh: panel.linear_width };
  const bands = [];
  const series = [{ label: panel.x_label }];
  for (const one of shown) {
    if (one.low.length) bands.push({ series: [series.length + 2, series.length + 1], fill: one.style.color + "2e" });
    series.push(...seriesOf(one));
  }
  const room = panel.limit !== null || Object.keys(panel.marks).length ? 52 : 12;
  const u = new uPlot({
    width: place.clientWidth, height: 250, padding: [10, room, 0, 0], series, bands,
    scales: { x: { time: false, range: panel.x_bounds }, y: { ...scale, range: panel.bounds } },
    axes: [{ ...axis, label: panel.x_label, labelSize: 20, size: 30 }, { ...axis, ...ticks, label: panel.y_label, labelSize: 20, size: 48 }],
    cursor: { y: false, drag: { x: false } }, legend: { markers: { fill: (u, i) => u.series[i].stroke() } },
    hooks: { drawAxes: [u => drawLines(u, panel)] },
  }, uPlot.join(shown.map(one => one.low.length ? [one.x, one.y, one.low, one.high] : [one.x, one.y])), place);
  [...u.root.querySelectorAll(".u-series")].slice(1).forEach((row, i) => { row.style.order = series.length - i; });
  u.root.querySelector(".u-legend").setAttribute("aria-live", "polite");
  u.over.tabIndex = 0;
  u.over.setAttribute("aria-label", `${panel.title}: arrow keys move along the horizontal axis`);
  u.over.addEventListener("keydown", event => moveCursor(u, event));
  charts.push(u);
}

/* The legend says the values at the cursor, which the keyboard can move, too. */
function moveCursor(u, event) {
  const last = u.data[0].length - 1, at = u.cursor.idx ?? -1;
  const to = { ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last }[event.key];
  if (to === undefined) return;
  u.setCursor({ left: u.valToPos(u.data[0][to], "x"), top: 0 });
  event.preventDefault();
}

function draw() {
  charts.forEach(u => u.destroy());
  charts = [];
  for (const place of document.querySelectorAll(".chart"))
    chart(figures[place.dataset.figure].panels[place.dataset.panel], place);
}
addEventListener("resize", () => charts.forEach(u => u.setSize({ width: u.root.parentElement.clientWidth, height: 250 })));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(u => u.redraw()));
draw();
