// What can be done on the page: choosing, opening, finding, looking from near and far.
"use strict";

const $ = (id) => document.getElementById(id);
const [svg, world, canvas, table] = [$("drawing"), $("world"), $("canvas"), $("table")];
const at = (name) => DATA.columns.indexOf(name);
const nameOf = (node) => DATA.nodes[node][0], kindOf = (node) => DATA.nodes[node][1];
const READS = at("reads"), LEGIBLE = 0.87, MOST = 400; // the least scale at which all can be read; rows drawn at once
const LEAST = (M.height + M.between) * LEGIBLE; // of a row, in pixels
const SPOTS = DATA.sides.length > 1 ? ["both", "a", "b"] : ["both", "training", "inference"];
const readers = DATA.nodes.map(() => []), cellOf = new Map();
DATA.nodes.forEach((facts, node) => facts[READS].forEach((read) => readers[read].push(node)));
DATA.cells.forEach((cell) => cellOf.has(cell[NODE]) || cellOf.set(cell[NODE], cell));
for (const [source, , , , inserted] of DATA.wires) for (const node of inserted) cellOf.has(node) || cellOf.set(node, DATA.cells[source]);
const state = { open: new Set(), merged: false, narrow: false, k: 1, node: null, spot: "both", off: new Set(), colour: "kind", hits: [], hit: -1, hunk: -1, own: false };
let plan = null;

function html(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function button(text, act, more = {}) {
  const made = html("button", { type: "button", ...more }, text);
  made.addEventListener("click", act);
  return made;
}

const opened = (depth) => new Set(GROUPS.filter((group) => group.around.length < depth).map((group) => group.id));
const deepest = GROUPS.reduce((most, group) => Math.max(most, group.around.length + 1), 0);
const mergeable = DATA.lanes.some(([, , side, merges], n) => merges && DATA.lanes.slice(0, n).some((other) => other[2] === side && other[3]));

/** What is open at first: as much as fits and can be read; all heads if there is room for them. */
function choose() {
  const [width, height] = [canvas.clientWidth - 16, canvas.clientHeight - 16];
  const ways = [[false, false], [false, true], [true, false], [true, true]].filter(([merged]) => !merged || mergeable);
  const sides = DATA.sides.length > 1 && state.spot === "both" ? ["both", "b"] : [state.spot]; // one at a time where two are too many
  for (const spot of sides) for (const [merged, narrow] of ways) {
    const last = spot === sides[sides.length - 1] && merged === mergeable && narrow;
    for (let depth = Math.min(deepest, 12); depth >= 0; depth--) {
      const open = opened(depth);
      if (depth && rowsOf(open) * LEAST > height) continue;
      const tried = planned({ open, merged, narrow, spot });
      const fits = width >= tried.wide * LEGIBLE && height >= tried.high * LEGIBLE;
      if (fits || (last && !depth)) return Object.assign(state, { open: fits ? more({ open, merged, narrow, spot }, width, height) : open, merged, narrow, spot });
    }
  }
}

/** Runs of neighbours that can be opened besides; modules are alike, and open all of a depth or none. */
function more({ open, ...how }, width, height) {
  for (const group of GROUPS.filter(({ title, around }) => title.includes(" … ") && around.every(({ id }) => open.has(id)))) {
    const next = new Set([...open, group.id]);
    if (rowsOf(next) * LEAST > height) continue;
    const tried = planned({ ...how, open: next });
    if (width >= tried.wide * LEGIBLE && height >= tried.high * LEGIBLE) open.add(group.id);
  }
  return open;
}

function rowsOf(open) {
  let rows = DATA.rows;
  for (const g of GROUPS) if (!open.has(g.id) && g.around.every((outer) => open.has(outer.id))) rows -= g.stop - g.start - 1;
  return rows;
}

function redraw() {
  const focused = document.activeElement?.dataset?.at;
  plan = planned(state);
  world.replaceChildren(...drawn(plan));
  const first = plan.spots.get(focused) || plan.spots.values().next().value;
  first?.drawn.setAttribute("tabindex", 0);
  if (focused) first?.drawn.focus({ preventScroll: true });
  $("heads").hidden = !mergeable;
  $("heads").setAttribute("aria-pressed", String(!state.merged));
  colour();
  zoom(state.k);
  mark();
}

function fit() {
  const [width, height] = [canvas.clientWidth - 16, canvas.clientHeight - 16];
  zoom(Math.min(1.25, width / plan.wide, Math.max(height / plan.high, LEGIBLE)) - 1e-3);
  canvas.scrollTo(0, 0);
}

function zoom(k) {
  state.k = Math.max(0.05, Math.min(4, k));
  svg.setAttribute("viewBox", `0 0 ${plan.wide} ${plan.high}`);
  svg.setAttribute("width", plan.wide * state.k);
  svg.setAttribute("height", plan.high * state.k);
  svg.classList.toggle("far", state.k < LEGIBLE - 2e-3);
  svg.classList.toggle("farther", state.k < 0.769);
}

/** Classes that move nothing. */
function mark() {
  document.body.dataset.spot = state.spot;
  for (const each of $("spots").children) each.setAttribute("aria-pressed", String(each.textContent === state.spot));
  const chosen = new Set(state.node === null ? [] : [state.node]);
  const name = at("in inference") < 0 ? null : DATA.nodes[state.node]?.[at("in inference")];
  const twins = new Set(name ? instances(name) : []), hits = new Set(state.hits);
  const has = (nodes, cells) => cells.some((cell) => nodes.has(cell[NODE]));
  const dim = (spot) => spot.cells.every((cell) => state.off.has(cell[KIND]) || (state.off.has("rewired") && cell[REWIRED]));
  for (const spot of plan.spots.values()) {
    const { classList } = spot.drawn;
    classList.toggle("selected", has(chosen, spot.cells));
    classList.toggle("twin", has(twins, spot.cells));
    classList.toggle("hit", has(hits, spot.cells));
    classList.toggle("dim", dim(spot));
    spot.drawn.toggleAttribute("aria-current", has(chosen, spot.cells));
    for (const { inserted, drawn: made } of spot.ports) {
      made?.classList.toggle("selected", [...inserted].some((node) => chosen.has(node)));
      made?.classList.toggle("dim", [...inserted].every((node) => state.off.has(kindOf(node))));
    }
  }
  for (const { from, to, drawn: made } of plan.wires.values()) {
    made.classList.toggle("touched", has(chosen, from.cells) || has(chosen, to.cells));
    made.classList.toggle("dim", dim(from) || dim(to));
  }
  fillTable();
  remember();
}

const instances = (name) => DATA.nodes.flatMap((facts, node) => (facts[at("in inference")] === name ? [node] : []));

function colour() {
  const spots = [...plan.spots.values()], sizes = spots.map((spot) => sum(spot.cells, state.colour)), most = Math.max(1, ...sizes);
  spots.forEach(({ drawn: made }, n) => { made.firstChild.style.fill = state.colour === "kind" ? "" : `color-mix(in srgb, var(--mark-line) ${Math.round(45 * Math.sqrt(sizes[n] / most))}%, var(--page))`; });
}

function select(node, show = false) {
  state.node = node;
  if (node !== null && show) reveal(node);
  describe();
  mark();
}

/** Open what is around a node, and bring it into view. */
function reveal(node) {
  const cell = cellOf.get(node), side = DATA.lanes[cell[LANE]][2];
  if (side === 1 - ["a", "b"].indexOf(state.spot)) spotlight(side + 1);
  const around = GROUPS.filter((g) => g.start <= cell[ROW] && cell[ROW] < g.stop && !state.open.has(g.id));
  if (around.length) { around.forEach((group) => state.open.add(group.id)); state.own = true; redraw(); }
  const spot = [...plan.spots.values()].find(({ cells }) => cells.includes(cell));
  spot.drawn.scrollIntoView({ block: "center", inline: "center" });
}

function toggle(group, open = !state.open.has(group.id)) {
  const before = plan.tops[plan.rowOf[group.start]];
  if (open) state.open.add(group.id);
  else state.open.delete(group.id);
  state.own = true;
  redraw();
  canvas.scrollTop += (plan.tops[plan.rowOf[group.start]] - before) * state.k; // what was clicked stays where it was
}

function setAll(open) {
  state.own = true;
  let depth = open ? deepest : 0;
  while (depth && rowsOf(opened(depth)) > MOST) depth--;
  say(open && depth < deepest ? `more than ${MOST} rows: opened ${depth} of ${deepest} levels` : "");
  state.open = opened(depth);
  redraw();
  fit();
}

const say = (text) => { $("said").textContent = text; };

// Beside the drawing.

function describe() {
  const panel = $("details");
  panel.classList.toggle("empty", state.node === null && !state.hits.length);
  if (state.node === null) return panel.replaceChildren(...overview());
  const facts = DATA.nodes[state.node], list = html("dl", {});
  DATA.columns.forEach((column, n) => {
    let value = facts[n];
    if (value === null || n === 0 || n === READS) return;
    if (n === 1) value = `${SIGNS[value]} ${WORDS[value]}`;
    else if (value === true) value = WORDS.rewired;
    else if (typeof value === "number") value = column === "gradient" ? `× ${Number(value.toPrecision(3))} on its way back` : `${value.toLocaleString("en")}${column === "memory" ? " bytes" : ""}`;
    list.append(html("dt", {}, n === 1 ? "what became of it" : column), html("dd", {}, value));
  });
  const others = at("in inference") < 0 ? [] : instances(facts[at("in inference")] ?? NaN);
  panel.replaceChildren(html("h2", { tabindex: -1 }, nameOf(state.node)), list,
    ...links("instances", others.length > 1 ? others : []), ...links("reads", facts[READS]), ...links("is read by", readers[state.node]));
}

function overview() {
  const text = ([head, notes]) => [html("h3", {}, head), html("ul", {}, ...notes.map((note) => html("li", {}, note)))];
  return [html("h2", {}, "Overview"), ...links(`${state.hits.length} found`, state.hits), ...DATA.sides.filter(Boolean).map((side) => html("p", {}, side)), ...DATA.notes.flatMap(text),
    html("p", {}, "Select a node to see what became of it. ▸ opens, ▾ closes what is folded into a row.")];
}

function links(head, nodes) {
  if (!nodes.length) return [];
  const go = (node) => () => { select(node, true); $("details").querySelector("h2").focus(); };
  const shown = nodes.slice(0, 60).map((node) => html("li", {}, button(`${SIGNS[kindOf(node)]} ${nameOf(node)}`, go(node))));
  return [html("h3", {}, head), html("ul", {}, ...shown, ...(nodes.length > 60 ? [`and ${nodes.length - 60} more`] : []))];
}

let order = { column: -1, down: false }, listed = [];
function fillTable() {
  if (table.hidden) return;
  const seen = (node) => !state.off.has(kindOf(node)) && !(state.spot === "inference" && ["cloned", "rescaled", "copied", "state"].includes(kindOf(node)))
    && !(state.spot === "training" && ["shared", "own"].includes(kindOf(node))) && !(DATA.sides.length > 1 && state.spot !== "both" && DATA.nodes[node][at("graph")] !== state.spot);
  listed = DATA.nodes.flatMap((_, node) => (seen(node) ? [node] : []));
  const key = (node) => DATA.nodes[node][order.column] ?? "";
  const compare = (a, b) => (key(a) === key(b) ? 0 : key(a) < key(b) || (key(a) === "" && typeof key(b) !== "string") ? -1 : 1);
  if (order.column >= 0) listed.sort((a, b) => compare(a, b) * (order.down ? -1 : 1));
  table.querySelectorAll("th").forEach((th, n) => th.setAttribute("aria-sort", n !== order.column ? "none" : order.down ? "descending" : "ascending"));
  fillRows();
}

/** Only the rows that are in view. */
function fillRows() {
  const high = 27, from = Math.max(0, Math.floor(table.scrollTop / high) - 10), to = Math.min(listed.length, from + Math.ceil(table.clientHeight / high) + 20);
  const space = (rows) => html("tr", { "aria-hidden": "true" }, html("td", { style: `height:${rows * high}px;padding:0`, colspan: DATA.columns.length }));
  const text = (value, n) => (value === null ? "" : n === 1 ? `${SIGNS[value]} ${value}` : n === READS ? value.map(nameOf).join(", ") : typeof value === "number" ? value.toLocaleString("en") : String(value));
  const rows = listed.slice(from, to).map((node) => html("tr", { "aria-selected": String(node === state.node) },
    ...DATA.nodes[node].map((value, n) => html(n ? "td" : "th", n ? {} : { scope: "row" }, n ? text(value, n) : button(value, () => select(node, true))))));
  table.querySelector("table").setAttribute("aria-rowcount", listed.length + 1);
  table.querySelector("tbody").replaceChildren(...(from ? [space(from)] : []), ...rows, ...(to < listed.length ? [space(listed.length - to)] : []));
}

function showTable(show) {
  table.hidden = !show;
  canvas.style.visibility = show ? "hidden" : "";
  $("table-button").setAttribute("aria-pressed", String(show));
  mark();
}

// Finding.

function search(text) {
  const wanted = text.trim().toLowerCase(), names = [0, at("target"), at("does")].filter((n) => n >= 0);
  state.hits = wanted ? DATA.nodes.flatMap((facts, node) => (names.some((n) => String(facts[n]).toLowerCase().includes(wanted)) ? [node] : [])) : [];
  state.hit = -1;
  say(wanted ? `${state.hits.length} found` : "");
  select(null);
}

function nextHit(step) {
  if (!state.hits.length) return;
  state.hit = (state.hit + step + state.hits.length) % state.hits.length;
  select(state.hits[state.hit], true);
  say(`${state.hit + 1} of ${state.hits.length}`);
}

function nextHunk(step) {
  const many = DATA.hunks.length;
  if (!many) return;
  state.hunk = state.hunk < 0 ? (step > 0 ? 0 : many - 1) : (state.hunk + step + many) % many;
  if (DATA.sides.length === 1) state.spot = "both"; // else changes can't be seen
  select(DATA.hunks[state.hunk][0], true);
  $("hunk").textContent = `${state.hunk + 1} of ${many}`;
}

/** Along an edge, or to the next in the row. */
function walk(key) {
  const spot = plan.spots.get(document.activeElement.dataset.at);
  const row = [...plan.spots.values()].filter(({ v }) => v === spot.v).sort((a, b) => a.c - b.c);
  const next = { ArrowDown: spot.down[0], ArrowUp: spot.up[0], ArrowRight: row[row.indexOf(spot) + 1] || spot.down[1], ArrowLeft: row[row.indexOf(spot) - 1] }[key];
  if (!next) return;
  spot.drawn.setAttribute("tabindex", -1);
  next.drawn.setAttribute("tabindex", 0);
  next.drawn.focus();
}

// The address, and what is remembered.

function remember() {
  if (location.protocol === "about:") return; // in a notebook's frame there is no address
  const parts = new URLSearchParams();
  if (state.spot !== "both") parts.set("spot", state.spot);
  if (state.node !== null) parts.set("node", nameOf(state.node));
  if (!table.hidden) parts.set("table", "1");
  if (state.own) parts.set("open", [...state.open].sort((a, b) => a - b).join("."));
  if (state.own && state.merged) parts.set("heads", "one");
  const hash = parts.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", `${location.pathname}${location.search}${hash ? `#${hash}` : ""}`);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.spot = SPOTS.includes(parts.get("spot")) ? parts.get("spot") : "both";
  choose();
  state.own = parts.has("open");
  if (state.own) {
    state.open = new Set(parts.get("open").split(".").filter(Boolean).map(Number).filter((id) => id < GROUPS.length));
    state.merged = mergeable && parts.get("heads") === "one";
  }
  redraw();
  fit();
  const node = DATA.nodes.findIndex(([name]) => name === parts.get("node"));
  select(node < 0 ? null : node, node >= 0);
  showTable(parts.get("table") === "1");
}

function kept(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(`fxcollab-${key}`);
    localStorage.setItem(`fxcollab-${key}`, value);
  } catch { /* frames have none */ }
  return null;
}

// Events.

canvas.addEventListener("click", (event) => {
  const fold = event.target.closest("[data-close]"), spot = plan.spots.get(event.target.closest("[data-at]")?.dataset.at), pill = event.target.closest(".mark");
  if (fold) return toggle(GROUPS[fold.dataset.close], false);
  if (spot && plan.rows[spot.v] && event.target.matches(".first")) return toggle(plan.rows[spot.v], true);
  if (pill) return select(Number(pill.dataset.node));
  if (spot) select(spot.cells[0][NODE]);
  else if (!moved) select(null);
});
canvas.addEventListener("dblclick", (event) => {
  const group = plan.rows[plan.spots.get(event.target.closest("[data-at]")?.dataset.at)?.v];
  if (group) toggle(group, true);
});
let drag = null, moved = false;
canvas.addEventListener("pointerdown", (event) => { moved = false; drag = event.pointerType === "mouse" && event.button === 0 ? [event.clientX + canvas.scrollLeft, event.clientY + canvas.scrollTop] : null; });
window.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = [drag[0] - event.clientX, drag[1] - event.clientY];
  moved ||= Math.abs(x - canvas.scrollLeft) + Math.abs(y - canvas.scrollTop) > 4;
  if (moved) canvas.scrollTo(x, y);
});
window.addEventListener("pointerup", () => { drag = null; });
canvas.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoom(state.k * Math.exp(-event.deltaY * 0.003));
}, { passive: false });
document.addEventListener("keydown", (event) => {
  const focused = event.target.dataset?.at && plan.spots.get(event.target.dataset.at);
  if (event.target.id === "search") {
    if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = { "/": () => $("search").focus(), n: () => nextHunk(1), p: () => nextHunk(-1), "+": () => zoom(state.k * 1.25), "=": () => zoom(state.k * 1.25), "-": () => zoom(state.k / 1.25),
    0: fit, 1: () => spotlight(0), 2: () => spotlight(1), 3: () => spotlight(2), t: () => showTable(table.hidden) };
  if (event.key === "Escape") select(null);
  else if ((event.key === "Enter" || event.key === " ") && event.target.dataset?.close) toggle(GROUPS[event.target.dataset.close], false);
  else if ((event.key === "Enter" || event.key === " ") && focused) {
    if (plan.rows[focused.v]) toggle(plan.rows[focused.v], true);
    else select(focused.cells[0][NODE]);
  } else if (event.key.startsWith("Arrow") && focused) walk(event.key);
  else if (keys[event.key] && $("keys").checked && !event.target.matches("input, select")) keys[event.key]();
  else return;
  event.preventDefault();
});

function spotlight(number) {
  state.spot = SPOTS[number];
  if (DATA.sides.length > 1) redraw();
  mark();
}

function filter(kind, pressed) {
  if (pressed) state.off.add(kind);
  else state.off.delete(kind);
  mark();
}

SPOTS.forEach((name, n) => $("spots").append(button(name, () => spotlight(n))));
for (const [kind, sign, meaning, count] of DATA.legend) {
  const sample = element("svg", { viewBox: "0 0 20 14", "aria-hidden": "true", class: "art" }, element("g", { class: `node ${kind}` }, element("rect", { x: 1, y: 1, width: 18, height: 12, rx: 3 })));
  const key = button("", () => { key.setAttribute("aria-pressed", String(!state.off.has(kind))); filter(kind, !state.off.has(kind)); }, { "aria-pressed": "false" });
  key.append(sample, `${sign} ${meaning}: ${count}`);
  $("legend").append(key);
}
for (const name of ["kind", "parameters", "FLOPs", "memory"]) if (name === "kind" || at(name) >= 0) $("colour").append(html("option", { value: name }, name === "kind" ? "colour: kind" : name));
$("colour").hidden = $("colour").options.length < 2;
$("colour").addEventListener("change", (event) => { state.colour = event.target.value; colour(); });
DATA.columns.forEach((column, n) => table.querySelector("thead tr").append(html("th", { scope: "col" }, button(column, () => {
  order = { column: n, down: order.column === n && !order.down };
  fillTable();
}))));
table.addEventListener("scroll", fillRows);
$("search").addEventListener("input", (event) => search(event.target.value));
for (const [id, act] of Object.entries({
  next: () => nextHunk(1), previous: () => nextHunk(-1), fit, closer: () => zoom(state.k * 1.25), farther: () => zoom(state.k / 1.25), "open-all": () => setAll(true), "close-all": () => setAll(false),
  "table-button": () => showTable(table.hidden), heads: () => { state.merged = !state.merged; state.own = true; redraw(); fit(); },
  theme: () => { const dark = getComputedStyle(document.documentElement).colorScheme === "dark"; kept("theme", (document.documentElement.dataset.theme = dark ? "light" : "dark")); },
})) $(id).addEventListener("click", act);
if (kept("theme")) document.documentElement.dataset.theme = kept("theme");
$("keys").checked = kept("keys") !== "off";
$("keys").addEventListener("change", (event) => kept("keys", event.target.checked ? "on" : "off"));
$("hunk").textContent = `${DATA.hunks.length} change${DATA.hunks.length === 1 ? "" : "s"}`;
$("proof").hidden = !DATA.checks;
if (DATA.checks) {
  const failed = DATA.checks.filter(([, ok]) => !ok).length, all = DATA.checks.length;
  $("proof").firstElementChild.textContent = failed ? `${failed} of ${all} checks FAILED` : `proved: all ${all} checks hold`;
  $("proof").firstElementChild.className = failed ? "failed" : "proved";
  $("proof").lastElementChild.append(...DATA.checks.map(([name, ok, detail]) => html("li", { class: ok ? "" : "failed" }, `${ok ? "ok" : "FAILED"}  ${name}: ${detail}`)));
}
recall();
window.addEventListener("hashchange", recall);
let size = [canvas.clientWidth, canvas.clientHeight].join();
new ResizeObserver(() => {
  const now = [canvas.clientWidth, canvas.clientHeight].join();
  if (now === size || !canvas.clientWidth || matchMedia("print").matches) return; // paper has what was on the screen
  size = now;
  if (!state.own) choose();
  redraw();
  fit();
}).observe(canvas);
