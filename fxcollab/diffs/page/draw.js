// The drawing: boxes, nodes and edges as SVG.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const INSERTED = new Set(["rescaled", "copied", "state"]);
const GLYPHS = { shared: "=", own: "=", cloned: "+", rescaled: "~", copied: "!", state: "." };
const WORDS = {
  shared: "shared by all heads",
  own: "head 0's instance",
  cloned: "another head's instance",
  rescaled: "inserted: scales the gradient",
  copied: "inserted: copy before a write in place",
  state: "inserted: a shallower parameter",
};

function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  for (const child of children) made.append(child);
  return made;
}

function short(number) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (number >= size) return `${Number((number / size).toPrecision(3))}${unit}`;
  }
  return String(number);
}

function fraction(factor) {
  const parts = Math.round(1 / factor);
  return Math.abs(factor * parts - 1) < 1e-9 ? `1/${parts}` : String(Number(factor.toPrecision(3)));
}

function clip(text, most = 36) {
  const characters = [...text];
  return characters.length > most ? `${characters.slice(0, most - 1).join("")}…` : text;
}

/** The two lines of a node or a closed box. */
function labelOf(item) {
  if (item.children) {
    const { nodes, parameters } = item.summary;
    const what = item.fate || `node${nodes > 1 ? "s" : ""}`;
    return [`${clip(item.title)} ▸`, `${nodes} ${what}${parameters ? `, ${short(parameters)}` : ""}`];
  }
  const { node } = item;
  if (node.change === "rescaled") return [`gradient × ${fraction(node.factor)}`, clip(node.origin)];
  const shape = node.shape ? node.shape.join("×") : "";
  const second = [node.label === nameInside(node) ? "" : node.label, shape].filter(Boolean).join("  ");
  return [clip(node.counterpart === null ? `${node.change}: ${node.origin}` : nameInside(node)), clip(second, 40)];
}

/** A called module's path from the box in which it stands; other nodes have no shorter name. */
function nameInside(node) {
  const inside = node.op === "call_module" && node.module && node.target.startsWith(`${node.module}.`);
  return inside ? node.target.slice(node.module.length + 1) : node.counterpart;
}

/** Heads that descend from a branch: they count in path order. */
function headsOf(branch) {
  const { fanouts } = DATA;
  const path = branch ? branch.slice(1).split("_").map(Number) : [];
  let first = 0;
  let count = 1;
  fanouts.forEach((fanout, level) => {
    first = first * fanout + (level < path.length ? path[level] : 0);
    if (level >= path.length) count *= fanout;
  });
  return Array.from({ length: count }, (_, place) => first + place);
}

function draw(world, tree) {
  const items = placed(tree.root);
  const boxes = element("g", {});
  const edges = element("g", { class: "edges" });
  const titles = element("g", { class: "titles", "aria-hidden": "true" });
  const nodes = element("g", {});
  for (const item of items) {
    if (item.children && item.open) {
      boxes.append(drawBox(item));
      titles.append(drawTitle(item));
    } else nodes.append(drawNode(item));
  }
  for (const edge of shownEdges(tree)) edges.append(drawEdge(edge));
  world.replaceChildren(boxes, edges, titles, nodes);
  return items;
}

function drawBox(group) {
  const { x, y, width, height } = group.box;
  return element(
    "g",
    { class: `box ${group.kind} ${changeOf(group)}`, "data-id": group.id, tabindex: 0, role: "button", "aria-expanded": "true", "aria-label": `${group.title}, open` },
    element("rect", { x, y, width, height, rx: 8 }),
  );
}

/** Above the edges, so that none runs through it. */
function drawTitle(group) {
  const { x, y, width } = group.box;
  const text = `▾ ${clip(group.title, Math.max(8, Math.floor(width / 7.2)))}`;
  return element("text", { class: `title ${group.kind} ${changeOf(group)}`, x: x + 10, y: y + 16 }, text);
}

function drawNode(item) {
  const { x, y, width, height } = item.box;
  const [first, second] = labelOf(item);
  const change = changeOf(item);
  const glyph = item.children ? badge(item) : GLYPHS[change];
  const label = item.children ? `${item.title}, closed, ${second}` : `${item.node.name}: ${WORDS[change]}`;
  const made = element(
    "g",
    {
      class: `${item.children ? `closed ${item.kind}` : "node"} ${change}`,
      "data-id": item.id,
      "data-counterpart": item.children ? null : item.node.counterpart,
      tabindex: 0,
      role: "button",
      "aria-expanded": item.children ? "false" : null,
      "aria-label": label,
    },
    element("rect", { x, y, width, height, rx: item.children ? 3 : 7 }),
    element("text", { class: "first", x: x + width / 2, y: y + (second ? 17 : 24) }, first),
  );
  if (second) made.append(element("text", { class: "second", x: x + width / 2, y: y + 32 }, second));
  made.append(element("text", { class: "glyph", x: x + 7, y: y + 13 }, glyph));
  const stack = item.children ? 1 : instancesOf(item.node).length;
  if (stack > 1 && item.node.change === "own") made.append(element("text", { class: "stack", x: x + width - 6, y: y + 13 }, `×${stack}`));
  return made;
}

/** What changed inside of a closed box. */
function badge(group) {
  return Object.keys(GLYPHS)
    .filter((change) => group.summary.changes[change] && GLYPHS[change] !== "=")
    .map((change) => `${GLYPHS[change]}${group.summary.changes[change]}`)
    .join(" ");
}

/** A node's change; of a box that of its branch. */
function changeOf(item) {
  if (!item.children) return item.node.change;
  if (!item.branch) return "shared";
  return /^b0(_0)*$/.test(item.branch) ? "own" : "cloned";
}

function inInference(item) {
  const change = changeOf(item);
  return change === "shared" || change === "own";
}

/** Edges between what is shown: of the training graph, and those of the inference graph that skip inserted nodes. */
function shownEdges(tree) {
  const found = new Map();
  for (const node of DATA.nodes) {
    const target = tree.find(node.name);
    for (const name of node.inputs) {
      add(found, tree.find(name), target, "");
      const origin = original(name);
      if (origin !== name && node.change !== "cloned" && !INSERTED.has(node.change)) add(found, tree.find(origin), target, "direct");
    }
  }
  return found.values();
}

function original(name) {
  let node = NODES.get(name);
  while (INSERTED.has(node.change) && node.inputs.length) node = NODES.get(node.inputs[0]);
  return node.name;
}

function add(found, source, target, kind) {
  const [from, to] = [representative(source), representative(target)];
  if (from === to) return;
  const key = `${from.id}>${to.id}${kind}`;
  const factor = source.node.change === "rescaled" && from === source ? source.node.factor : null;
  if (!found.has(key)) found.set(key, { from, to, kind, factor, added: kind !== "direct" && !(inInference(source) && inInference(target)) });
}

function drawEdge({ from, to, kind, factor, added }) {
  const points = route(from, to);
  const made = element("g", { class: `edge ${kind} ${added ? "added" : "kept"}`, "data-from": from.id, "data-to": to.id });
  made.append(element("path", { d: curve(points), "marker-end": "url(#arrow)" }));
  if (factor !== null) {
    const [x, y] = [0, 1].map((axis) => (points[0][axis] + points[1][axis]) / 2); // near where the branches part
    made.append(element("text", { class: "factor", x: x + 5, y: y + 4 }, `× ${fraction(factor)}`));
  }
  return made;
}

/** Along the layout's way where both ends stand in one box, else straight from end to end. */
function route(from, to) {
  const { parent } = from;
  const ordered = from.kind === "branch" || to.kind === "branch"; // these were moved after the layout
  const known = !ordered && parent === to.parent && parent.layout.routes.get(`${from.place}>${to.place}`);
  if (known) return known.map(([x, y]) => [x + parent.box.x, y + parent.box.y]);
  const start = [from.box.x + from.box.width / 2, from.box.y + from.box.height];
  const end = [to.box.x + to.box.width / 2, to.box.y];
  return [start, [(start[0] + end[0]) / 2, (start[1] + end[1]) / 2], end];
}

function curve(points) {
  const [[x, y], ...rest] = points;
  if (points.length === 2) return `M${x},${y}L${rest[0]}`;
  let path = `M${x},${y}`;
  for (let place = 1; place < points.length - 1; place++) {
    const [cx, cy] = points[place];
    const last = place === points.length - 2;
    const [nx, ny] = points[place + 1];
    path += last ? `Q${cx},${cy} ${nx},${ny}` : `Q${cx},${cy} ${(cx + nx) / 2},${(cy + ny) / 2}`;
  }
  return path;
}

function instancesOf(node) {
  return node.counterpart === null ? [node] : INSTANCES.get(node.counterpart);
}
