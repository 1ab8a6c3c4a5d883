// Where things stand for what is open, as in picture.py, and the drawing of it.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const M = DATA.metrics;
const [NODE, ROW, LANE, KIND, FIRST, SECOND, REWIRED] = [0, 1, 2, 3, 4, 5, 6]; // of a cell
const SIGNS = Object.fromEntries(DATA.legend.map(([kind, sign]) => [kind, sign]));
const WORDS = Object.fromEntries(DATA.legend.map(([kind, , meaning]) => [kind, meaning]));
const KEPT = new Set(["shared", "own", "same", "changed", "rewired"]);
const GROUPS = [];
(function number(groups, around) {
  for (const [title, start, stop, children] of groups) {
    const group = { id: GROUPS.length, title, start, stop, around };
    GROUPS.push(group);
    number(children, [...around, group]);
  }
})(DATA.groups, []);

function element(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const label = (kind, x, y, text, more = {}) => element("text", { class: kind, x, y, ...more }, text);

function short(number) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (number >= size) return `${Number((number / size).toPrecision(3))}${unit}`;
  return String(number);
}

const pen = document.createElement("canvas").getContext("2d"), FONT = getComputedStyle(document.body).fontFamily;
/** Shortened until it fits: at its end, or a name in its middle, for paths differ at their ends. */
function clip(text, room, name = false) {
  pen.font = `${name ? "700 13px" : "11.5px"} ${FONT}`;
  const all = [...text], tail = (most) => (name && most > 1 ? all.slice(-(most >> 1)).join("") : "");
  const cut = (most) => (most >= all.length ? text : `${all.slice(0, name ? (most - 1) >> 1 : most - 1).join("")}…${tail(most)}`);
  let most = Math.min(all.length, Math.floor(room / 3));
  while (most > 1 && pen.measureText(cut(most)).width > room) most--;
  return cut(most);
}

/** Rows, columns and their places. `open` holds numbers of groups. */
function planned({ open, merged, narrow, spot }) {
  const only = ["a", "b"].indexOf(spot), seen = (lane) => only < 0 || DATA.lanes[lane][2] === only;
  const closed = GROUPS.filter((g) => !open.has(g.id) && g.around.every((outer) => open.has(outer.id)));
  const plan = { rows: [], rowOf: [], columns: [], spots: new Map(), wires: new Map(), width: narrow ? M.narrow : M.width, narrow, axis: narrow ? M.narrowAxis : M.axis };
  for (let row = 0, next = 0; row < DATA.rows; ) {
    const group = closed[next] && closed[next].start === row ? closed[next++] : null;
    const stop = group ? group.stop : row + 1;
    for (; row < stop; row++) plan.rowOf.push(plan.rows.length);
    plan.rows.push(group);
  }
  const alike = [], column = [];
  DATA.lanes.forEach(([, , side, merges], lane) => {
    if (!seen(lane)) return;
    if (merged && merges && alike[side]) alike[side].push(lane);
    else plan.columns.push(merges ? (alike[side] = [lane]) : [lane]);
  });
  plan.columns.forEach((lanes, c) => lanes.forEach((lane) => { column[lane] = c; }));
  plan.begins = plan.columns.map(() => Infinity);
  plan.ends = plan.columns.map(() => 0);
  const spotOf = DATA.cells.map((cell) => {
    if (!seen(cell[LANE])) return null;
    const [v, c] = [plan.rowOf[cell[ROW]], column[cell[LANE]]];
    const key = `${v},${c}`;
    if (!plan.spots.has(key)) plan.spots.set(key, { key, v, c, cells: [], ports: [], entries: 0, up: [], down: [] });
    plan.spots.get(key).cells.push(cell);
    plan.begins[c] = Math.min(plan.begins[c], v);
    plan.ends[c] = Math.max(plan.ends[c], v);
    return plan.spots.get(key);
  });
  for (const [source, target, mark, track, inserted] of DATA.wires) {
    const [from, to] = [spotOf[source], spotOf[target]];
    if (from === to || !from || !to) continue;
    const key = `${from.key}>${to.key}>${mark}`;
    const wire = plan.wires.get(key) || { from, to, mark, track: Infinity, inserted: new Set(), crosses: from.c !== to.c };
    if (track >= 0) wire.track = Math.min(wire.track, track);
    inserted.forEach((node) => wire.inserted.add(node));
    if (!plan.wires.has(key)) { from.down.push(to); to.up.push(from); }
    plan.wires.set(key, wire);
  }
  plan.begins = plan.begins.map((v) => (Number.isFinite(v) ? v : 0));
  const used = new Set();
  for (const wire of plan.wires.values()) {
    wire.direct = isDirect(plan, wire);
    if (!wire.direct) used.add(wire.track);
    if (wire.mark || wire.crosses) {
      const port = wire.from.ports.find(({ mark }) => mark === wire.mark);
      if (port) wire.inserted.forEach((node) => port.inserted.add(node));
      else wire.from.ports.push({ mark: wire.mark, inserted: new Set(wire.inserted) });
    }
    if (wire.direct && !wire.crosses) wire.from.straight = wire.mark;
  }
  const step = Math.min(M.track, M.tracks / Math.max(used.size, 1));
  plan.gutter = M.edge + used.size * step;
  plan.tracks = new Map([...used].sort((a, b) => a - b).map((track, n) => [track, M.edge + n * step]));
  placed(plan, open);
  return plan;
}

function isDirect(plan, { from, to, crosses }) {
  const header = crosses ? plan.begins[to.c] - 1 : -1;
  if (to.v <= from.v) return false;
  for (let v = from.v + 1; v < to.v; v++) if (v === header || plan.spots.has(`${v},${to.c}`)) return false;
  return true;
}

function placed(plan, open) {
  const marks = plan.rows.map(() => 0);
  for (const spot of plan.spots.values()) {
    const { straight, ports, v } = spot;
    ports.sort((a, b) => (b.mark === straight) - (a.mark === straight));
    const first = straight === undefined || (ports.length && ports[0].mark === straight) ? 0 : 1;
    ports.forEach((port, n) => { port.place = n + first; });
    marks[v] = Math.max(marks[v], ports.length);
  }
  plan.folds = GROUPS.filter((g) => open.has(g.id) && g.around.every((outer) => open.has(outer.id)))
    .map((group) => ({ group, first: plan.rowOf[group.start], last: plan.rowOf[group.stop - 1], depth: group.around.length }));
  const splits = new Set(DATA.splits.flat().map(([row]) => plan.rowOf[row]));
  const opening = plan.rows.map(() => 0);
  for (const { first } of plan.folds) opening[first]++;
  let y = M.top;
  plan.tops = plan.rows.map((_, v) => {
    const top = y + M.label * Math.max(0, opening[v] - 2);
    y = top + M.height + Math.max(M.between + M.mark * marks[v], splits.has(v + 1) ? M.split : 0);
    return top;
  });
  plan.high = y;
  let x = 0;
  plan.axes = []; // of each side that is seen
  plan.lefts = plan.columns.map(([lane]) => {
    const side = DATA.lanes[lane][2];
    if (plan.axes[side] === undefined) {
      x += x ? M.sides : 0;
      plan.axes[side] = x;
      x += side === 0 || DATA.splits[side].length ? plan.axis : 0;
    }
    const left = x + plan.gutter;
    x = left + plan.width + M.apart;
    return left;
  });
  plan.wide = x;
}

const bottom = (plan, v) => plan.tops[v] + M.height;
const isFirst = (plan, c) => c === 0 || DATA.lanes[plan.columns[c - 1][0]][2] !== sideOf(plan, c);
const sideOf = (plan, c) => DATA.lanes[plan.columns[c][0]][2];

function portAt(plan, spot, place) {
  const aside = Math.ceil(place / 2) * (place % 2 ? 1 : -1) * Math.max(46, plan.width * 0.34);
  const limit = plan.width / 2 - 16;
  const last = Math.max(...spot.ports.map((port) => port.place));
  const y = bottom(plan, spot.v) + 4 + M.mark * (last - place + 0.5);
  return [plan.lefts[spot.c] + plan.width / 2 + Math.max(-limit, Math.min(limit, aside)), y];
}

function pathOf(plan, { from, to, mark, track, direct, crosses }) {
  const [left, top, middle] = [plan.lefts[to.c], plan.tops[to.v], plan.width / 2];
  let [x, y] = [plan.lefts[from.c], bottom(plan, from.v) - 8];
  let start = direct ? `M${x + middle},${y + 8}` : `M${x},${y}`;
  if (mark || crosses) {
    [x, y] = portAt(plan, from, from.ports.find((port) => port.mark === mark).place);
    start = `M${x},${bottom(plan, from.v)}V${y}`;
  }
  if (direct && !(crosses && plan.spots.has(`${from.v},${to.c}`))) return `${start}${mark || crosses ? `H${left + middle}` : ""}V${top}`;
  return `${start}H${direct ? left - 6 : left - plan.tracks.get(track)}V${top + 7 + 6 * Math.min(to.entries++, 3)}H${left}`;
}

function drawn(plan) {
  const layers = ["lanes", "axes", "edges", "marks", "nodes"].map((name) => element("g", { class: name }));
  const [lanes, axes, edges, marks, nodes] = layers;
  plan.columns.forEach((_, c) => lanes.append(...drawnLane(plan, c)));
  axes.append(...drawnAxes(plan));
  for (const wire of plan.wires.values()) {
    const kinds = [...wire.from.cells, ...wire.to.cells].map((cell) => cell[KIND]);
    const kind = kinds.every((each) => KEPT.has(each)) ? "kept" : wire.to.cells[0][KIND];
    wire.drawn = element("g", { class: `edge ${kind} s${sideOf(plan, wire.to.c)}` }, element("path", { d: pathOf(plan, wire), "marker-end": "url(#arrow)" }));
    edges.append(wire.drawn);
  }
  for (const spot of plan.spots.values()) {
    for (const port of spot.ports) if (port.mark) marks.append(drawnMark(plan, spot, port));
    nodes.append((spot.drawn = drawnCell(plan, spot)));
  }
  return layers;
}

function drawnLane(plan, c) {
  const lanes = plan.columns[c], [x, begin, first] = [plan.lefts[c], plan.begins[c], isFirst(plan, c)];
  let [title, note] = DATA.lanes[lanes[0]];
  if (lanes.length > 1) [title, note] = [`${title} to ${DATA.lanes[lanes[lanes.length - 1]][0].split(" ").pop()}`, `× ${lanes.length} like head 0`];
  const y = plan.tops[begin], above = begin && !first ? plan.tops[begin - 1] : plan.tops[0] - M.height - 8;
  const ground = { x: x - plan.gutter + 4, y: y - 7, width: plan.gutter + plan.width + 2, height: bottom(plan, plan.ends[c]) - y + 14, rx: 8 };
  const kind = first ? "" : "peer";
  return [element("rect", { class: `lane ${first ? "first" : "peer"}`, ...ground }), label(`head ${kind}`, x + 4, above + 13, clip(title, plan.width, true)),
    label(`note ${kind}`, x + 4, above + 27, clip(note || (first ? "" : plan.narrow ? "training only" : "for training only, own weights"), plan.width + 4))];
}

function* drawnAxes(plan) {
  for (const [side, splits] of DATA.splits.entries()) {
    const x = plan.axes[side];
    if (x === undefined) continue;
    const end = Math.max(...plan.lefts.filter((_, c) => sideOf(plan, c) === side)) + plan.width;
    if (side === 0 && splits.length) yield label("level", x, plan.tops[0] - 14, "trunk, shared");
    for (const [row, title, note] of splits) {
      const y = plan.tops[plan.rowOf[row]] - 7;
      yield element("path", { class: "split", d: `M${x},${y}H${end}` });
      yield label("cut", x, y - 18, clip(plan.narrow ? title.replace("split ", "") : title, plan.axis - 8, true));
      yield label("level", x, y - 5, plan.narrow ? note.split(":")[0] : note);
    }
  }
  for (const { group, first, last, depth } of plan.folds) {
    const above = plan.folds.filter((other) => other.first === first && other.depth > depth).length;
    const [x, y] = [4 + 7 * depth, bottom(plan, first) - 12 - M.label * above];
    yield element("path", { class: "fold", d: `M${x},${y + 4}V${bottom(plan, last)}h4` });
    yield label("fold", x + 6, y, `▾ ${clip(group.title, plan.axis - 28 - 7 * depth, true)}`, { "data-close": group.id, role: "button", tabindex: 0, "aria-expanded": "true" });
  }
}

function drawnMark(plan, spot, port) {
  const [x, y] = portAt(plan, spot, port.place);
  const wide = 7.2 * port.mark.length + 12;
  return (port.drawn = element("g", { class: `mark ${DATA.nodes[[...port.inserted][0]][1]} s${sideOf(plan, spot.c)}`, "data-node": [...port.inserted][0] },
    element("rect", { x: x - wide / 2, y: y - 8, width: wide, height: 16, rx: 8 }), label("", x, y + 4, port.mark)));
}

/** What is written in a cell, or in those that stand as one. */
function linesOf(plan, { v, cells }) {
  if (!plan.rows[v]) return [cells[0][FIRST], cells[0][SECOND]];
  const own = cells.filter((cell) => cell[LANE] === cells[0][LANE]);
  const size = sum(own, "parameters");
  return [`▸ ${plan.rows[v].title}`, `${own.length} node${own.length > 1 ? "s" : ""}${size ? `, ${short(size)}` : ""}`];
}

function sum(cells, column) {
  const at = DATA.columns.indexOf(column);
  return at < 0 ? 0 : cells.reduce((total, cell) => total + (DATA.nodes[cell[NODE]][at] || 0), 0);
}

function drawnCell(plan, spot) {
  const { v, c, cells } = spot, [x, y, group] = [plan.lefts[c], plan.tops[v], plan.rows[v]];
  const [first, second] = linesOf(plan, spot);
  const many = new Set(cells.map((cell) => cell[LANE])).size;
  const kind = (cells.find((cell) => cell[KIND] !== "same") || cells[0])[KIND], rewired = cells.some((cell) => cell[REWIRED]);
  const factors = spot.ports.map(({ mark }) => mark).filter(Boolean);
  const told = [group ? "closed" : DATA.nodes[cells[0][NODE]][0], WORDS[kind], many > 1 && `${many} times`, rewired && WORDS.rewired, ...factors];
  const made = element("g", { class: `node ${kind} s${sideOf(plan, c)}${group ? " closed" : ""}${rewired ? " rewired" : ""}`, "data-at": spot.key, role: "button",
    tabindex: -1, "aria-expanded": group ? "false" : null },
    element("rect", { x, y, width: plan.width, height: M.height, rx: group ? 3 : 6 }),
    label("first", x + 24, y + (second ? 14 : 20), clip(first, plan.width - 29 - (many > 1 ? 24 : 0), true)),
    label("sign", x + 5, y + 13, SIGNS[kind]));
  if (second) made.append(label("second", x + 24, y + 27, clip(second, plan.width - 28)));
  if (rewired && kind !== "rewired") made.append(label("sign", x + 5, y + 27, SIGNS.rewired));
  if (many > 1) made.append(label("many", x + plan.width - 5, y + 13, `×${many}`));
  made.setAttribute("aria-label", [[...made.querySelectorAll("text")].map((text) => text.textContent).join(" "), ...told.filter(Boolean)].join(", "));
  return made;
}
