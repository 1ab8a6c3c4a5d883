// State, events and the address: everything that changes on the page goes through here.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const NODES = new Map(DATA.nodes.map((node) => [node.name, node]));
const INSTANCES = new Map();
const READERS = new Map();
for (const node of DATA.nodes) {
  if (node.counterpart !== null) INSTANCES.set(node.counterpart, [...(INSTANCES.get(node.counterpart) || []), node]);
  for (const name of node.inputs) READERS.set(name, [...(READERS.get(name) || []), node]);
}
const SPOTS = ["both", "training", "inference"];
const PASSES = ["captured", "split", "rewritten", "pruned"];
const READABLE = 45; // nodes and closed boxes
const LEGIBLE = 0.6; // of the natural size

const $ = (id) => document.getElementById(id);
const svg = $("drawing");
const world = $("world");
const state = { spot: "both", pass: 2, selected: null, view: { x: 0, y: 0, k: 1 }, table: false, folded: false };
let items = [];
let tree = grown(false);
state.folded = countShown(tree.root) > READABLE || fittingScale() < LEGIBLE; // closed modules alone don't do
for (let limit = READABLE; state.folded && limit > 10; limit -= 10) {
  tree = grown(true);
  for (const item of tree.all) if (item.kind === "module") item.open = false;
  openUpTo(tree.root, limit);
  if (fittingScale() >= LEGIBLE) break;
}
const initiallyFolded = state.folded;
const initiallyOpen = new Set(openIds());

function grown(folded) {
  const made = buildGroups(DATA, NODES, folded);
  distributeEdges(made, DATA);
  return made;
}

function openIds() {
  return tree.all.filter((item) => item.children && item.open && item.kind !== "root").map((item) => item.id);
}

function redraw() {
  const focused = document.activeElement?.dataset.id;
  items = draw(world, tree);
  if (focused !== undefined) drawnAs({ id: focused })?.focus({ preventScroll: true });
  drawMinimap();
  mark();
  look();
}

/** Classes that change without moving anything. */
function mark() {
  document.body.dataset.spot = state.spot;
  document.body.dataset.pass = PASSES[state.pass];
  $("fold").setAttribute("aria-pressed", String(state.folded));
  for (const spot of SPOTS) $(`spot-${spot}`).setAttribute("aria-pressed", String(state.spot === spot));
  $("pass").value = String(state.pass);
  $("pass-name").textContent = PASSES[state.pass];
  const node = NODES.get(state.selected);
  const shown = node && representative(tree.find(node.name));
  for (const drawn of world.querySelectorAll(".selected")) drawn.classList.remove("selected");
  for (const drawn of world.querySelectorAll("[aria-current]")) drawn.removeAttribute("aria-current");
  const drawn = shown && drawnAs(shown);
  if (drawn) {
    drawn.classList.add("selected");
    drawn.setAttribute("aria-current", "true");
  }
  for (const edge of world.querySelectorAll(".edge")) {
    edge.classList.toggle("touched", Boolean(shown) && (edge.dataset.from === shown.id || edge.dataset.to === shown.id));
  }
  twins(node);
  remember();
}

function twins(node) {
  lightUp(!node || node.counterpart === null ? [] : instancesOf(node).map((twin) => tree.find(twin.name)));
}

function lightUp(alike) {
  for (const drawn of world.querySelectorAll(".twin")) drawn.classList.remove("twin");
  for (const item of alike) drawnAs(representative(item))?.classList.add("twin");
}

/** Of a module's box, without its branch. */
function pathOf(group) {
  return group.id.slice(group.id.indexOf("|"));
}

function drawnAs(item) {
  return world.querySelector(`[data-id="${CSS.escape(item.id)}"]`);
}

function select(name, show = false) {
  state.selected = name;
  const node = NODES.get(name);
  if (node && show) {
    const closed = ancestors(tree.find(name)).filter((group) => !group.open);
    for (const group of closed) toggle(group, true, false);
    if (closed.length) redraw();
    bring(tree.find(name));
  }
  describe(node);
  mark();
}

function describe(node) {
  if (node) showDetails($("details"), node, select);
  else showOverview($("details"), tree.root, showBranch);
}

function showBranch(group) {
  if (group.kind === "root") return fit();
  const closed = ancestors(group).filter((outer) => !outer.open);
  for (const outer of closed) toggle(outer, true, false);
  if (closed.length) redraw();
  bring(group);
}

/** Runs of what is unchanged become boxes, or their members stand free again; what was open stays open. */
function setFolded(folded) {
  const opened = new Set(openIds());
  state.folded = folded;
  tree = grown(folded);
  for (const item of tree.all) if (item.children && item.kind !== "root" && item.kind !== "run") item.open = opened.has(item.id);
  redraw();
  fit();
}

function toggle(group, open = !group.open, thenDraw = true) {
  const before = group.box && { ...group.box };
  group.open = open;
  forget(group);
  if (!thenDraw) return;
  redraw();
  if (before) {
    state.view.x += (before.x - group.box.x) * state.view.k; // what was clicked stays under the pointer
    state.view.y += (before.y - group.box.y) * state.view.k;
    look();
  }
}

function setAll(open) {
  const inner = tree.all.filter((item) => item.kind === "module" || item.kind === "run");
  for (const item of inner) item.open = open;
  for (const item of tree.all) item.layout = null;
  if (open && countShown(tree.root) > 3000) {
    for (const item of inner) item.open = false;
    openUpTo(tree.root, 1000);
    say("too much to open at once: opened as far as 1,000 nodes");
  }
  redraw();
  fit();
}

// The view.

function look() {
  const { x, y, k } = state.view;
  world.setAttribute("transform", `translate(${x},${y}) scale(${k})`);
  drawViewport();
}

/** At which all would be seen. */
function fittingScale() {
  const { width, height } = svg.getBoundingClientRect();
  const all = layoutOf(tree.root);
  return Math.min(1.25, (width - 24) / all.width, (height - 24) / all.height);
}

function fit() {
  const { width, height } = svg.getBoundingClientRect();
  const { box } = tree.root;
  const k = fittingScale();
  const readable = Math.max(k, 0.55); // a large graph begins in the middle of its top
  state.view = { k: readable, x: (width - box.width * readable) / 2, y: k < readable ? 12 : Math.max(12, (height - box.height * readable) / 2) };
  look();
  remember();
}

function zoom(factor, cx, cy) {
  const { view } = state;
  const bounds = svg.getBoundingClientRect();
  const [x, y] = [cx ?? bounds.width / 2, cy ?? bounds.height / 2];
  const k = Math.min(4, Math.max(0.03, view.k * factor));
  state.view = { k, x: x - ((x - view.x) * k) / view.k, y: y - ((y - view.y) * k) / view.k };
  look();
}

function bring(item) {
  const { width, height } = svg.getBoundingClientRect();
  const { box } = representative(item);
  state.view.k = Math.max(state.view.k, 0.6);
  state.view.x = width / 2 - (box.x + box.width / 2) * state.view.k;
  state.view.y = height / 2 - (box.y + box.height / 2) * state.view.k;
  look();
}

function drawMinimap() {
  const { box } = tree.root;
  const map = $("minimap");
  map.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  const rects = items.filter((item) => !(item.children && item.open)).map((item) => element("rect", { ...item.box, class: changeOf(item) }));
  map.replaceChildren(...rects, element("rect", { id: "viewport" }));
}

function drawViewport() {
  const { width, height } = svg.getBoundingClientRect();
  const { x, y, k } = state.view;
  const frame = $("viewport");
  if (!frame) return;
  const { box } = tree.root;
  const whole = x >= -1 && y >= -1 && x + box.width * k <= width + 1 && y + box.height * k <= height + 1;
  $("minimap").classList.toggle("needless", whole);
  for (const [key, value] of Object.entries({ x: -x / k, y: -y / k, width: width / k, height: height / k })) frame.setAttribute(key, value);
}

// Finding.

let matches = [];
let match = -1;

function search(text) {
  const wanted = text.trim().toLowerCase();
  matches = wanted ? DATA.nodes.filter((node) => [node.name, node.target, node.label].some((value) => String(value).toLowerCase().includes(wanted))) : [];
  match = -1;
  $("found").textContent = wanted ? `${matches.length} found` : "";
}

function nextMatch(step) {
  if (!matches.length) return;
  match = (match + step + matches.length) % matches.length;
  select(matches[match].name, true);
  $("found").textContent = `${match + 1} of ${matches.length}`;
}

const changes = DATA.nodes.filter((node) => INSERTED.has(node.change) || node.change === "cloned");

function nextChange(step) {
  if (!changes.length) return;
  const at = changes.findIndex((node) => node.name === state.selected);
  state.pass = 2; // the only one that shows them
  const next = at < 0 ? (step > 0 ? 0 : changes.length - 1) : (at + step + changes.length) % changes.length;
  select(changes[next].name, true);
}

function say(text) {
  $("said").textContent = text;
}

// The address.

function remember() {
  const parts = new URLSearchParams();
  if (state.spot !== "both") parts.set("spot", state.spot);
  if (state.pass !== 2) parts.set("pass", PASSES[state.pass]);
  if (state.selected) parts.set("node", state.selected);
  if (state.table) parts.set("table", "1");
  if (state.folded !== initiallyFolded) parts.set("fold", state.folded ? "1" : "0");
  const now = new Set(openIds());
  const opened = [...now].filter((id) => !initiallyOpen.has(id));
  const closed = [...initiallyOpen].filter((id) => !now.has(id));
  for (const id of opened) parts.append("open", id);
  for (const id of closed) parts.append("closed", id);
  if (location.protocol === "about:") return; // in a notebook's frame there is no address
  const hash = parts.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", `${location.pathname}${location.search}${hash ? `#${hash}` : ""}`);
}

function parameters() {
  return new URLSearchParams(location.hash.slice(1));
}

function recall() {
  const parts = parameters();
  state.spot = SPOTS.includes(parts.get("spot")) ? parts.get("spot") : "both";
  state.pass = PASSES.includes(parts.get("pass")) ? PASSES.indexOf(parts.get("pass")) : 2;
  state.table = parts.get("table") === "1";
  const folded = parts.has("fold") ? parts.get("fold") === "1" : initiallyFolded;
  if (folded !== state.folded) setFolded(folded);
  const opened = new Set([...initiallyOpen, ...parts.getAll("open")]);
  for (const id of parts.getAll("closed")) opened.delete(id);
  for (const item of tree.all) if (item.children && item.kind !== "root") item.open = opened.has(item.id);
  for (const item of tree.all) item.layout = null;
  return NODES.has(parts.get("node")) ? parts.get("node") : null;
}

// Taking it away.

function standalone() {
  const { box } = tree.root;
  const copy = svg.cloneNode(true);
  copy.querySelector("#world").removeAttribute("transform");
  copy.dataset.spot = state.spot;
  copy.dataset.pass = PASSES[state.pass];
  copy.setAttribute("viewBox", `-12 -12 ${box.width + 24} ${box.height + 24}`);
  copy.setAttribute("width", box.width + 24);
  copy.setAttribute("height", box.height + 24);
  const style = getComputedStyle(document.body);
  const colours = [...document.styleSheets[0].cssRules].flatMap((rule) => rule.cssText.match(/--[a-z-]+/g) || []);
  const values = [...new Set(colours)].map((name) => `${name}:${style.getPropertyValue(name)}`).join(";");
  copy.prepend(element("style", {}, `:root{${values}} ${$("style").textContent}`), element("rect", { x: -12, y: -12, width: "100%", height: "100%", fill: style.getPropertyValue("--page") }));
  return new XMLSerializer().serializeToString(copy);
}

function download(name, url) {
  const link = html("a", { href: url, download: name });
  link.click();
}

function saveSvg() {
  download("diff.svg", URL.createObjectURL(new Blob([standalone()], { type: "image/svg+xml" })));
}

function savePng() {
  const image = new Image();
  const { box } = tree.root;
  image.onload = () => {
    const scale = Math.min(2, 8000 / Math.max(box.width, box.height));
    const canvas = html("canvas", { width: Math.ceil((box.width + 24) * scale), height: Math.ceil((box.height + 24) * scale) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    download("diff.png", canvas.toDataURL("image/png"));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone())}`;
}

// Events.

function itemAt(target) {
  const drawn = target.closest("[data-id]");
  return drawn && tree.get(drawn.dataset.id);
}

function act(item) {
  if (!item) select(null);
  else if (item.children) toggle(item);
  else select(item.node.name);
}

let drag = null;
const fingers = new Map(); // pointers that are down, by id: two of them pinch
svg.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, event);
  if (fingers.size > 1) drag = null;
  else if (event.button === 0) drag = { x: event.clientX, y: event.clientY, view: { ...state.view }, moved: false, target: event.target };
});
window.addEventListener("pointermove", (event) => {
  if (fingers.size === 2 && fingers.has(event.pointerId)) return pinch(event);
  if (!drag) return;
  const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
  if (Math.abs(dx) + Math.abs(dy) > 4) drag.moved = true;
  if (drag.moved) {
    state.view.x = drag.view.x + dx;
    state.view.y = drag.view.y + dy;
    look();
  }
});
window.addEventListener("pointerup", (event) => {
  fingers.delete(event.pointerId);
  if (drag && !drag.moved) act(itemAt(drag.target));
  drag = null;
});
window.addEventListener("pointercancel", (event) => {
  fingers.delete(event.pointerId);
  drag = null;
});

function pinch(event) {
  const [other] = [...fingers.values()].filter((finger) => finger.pointerId !== event.pointerId);
  const far = (finger) => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY);
  const bounds = svg.getBoundingClientRect();
  const [before, after] = [far(fingers.get(event.pointerId)), far(event)];
  if (before) zoom(after / before, (event.clientX + other.clientX) / 2 - bounds.left, (event.clientY + other.clientY) / 2 - bounds.top);
  fingers.set(event.pointerId, event);
}
svg.addEventListener("wheel", (event) => {
  event.preventDefault();
  const bounds = svg.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY * 0.0016), event.clientX - bounds.left, event.clientY - bounds.top);
}, { passive: false });
svg.addEventListener("pointerover", (event) => {
  const item = itemAt(event.target);
  if (item && item.kind === "module" && !item.open) lightUp(tree.all.filter((other) => other.kind === "module" && pathOf(other) === pathOf(item)));
  else twins(item && item.node ? item.node : NODES.get(state.selected));
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=search]")) {
    if (event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 60;
  const keys = {
    "/": () => $("search").focus(), n: () => nextChange(1), p: () => nextChange(-1), "+": () => zoom(1.25), "=": () => zoom(1.25),
    "-": () => zoom(0.8), 0: fit, 1: () => spot("both"), 2: () => spot("training"), 3: () => spot("inference"), t: flipTable, f: () => setFolded(!state.folded),
    Escape: () => select(null),
  };
  const pans = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
  const drawn = event.target.closest && event.target.closest("#drawing [data-id]");
  if ((event.key === "Enter" || event.key === " ") && drawn) {
    const { id } = drawn.dataset;
    act(itemAt(drawn));
    world.querySelector(`[data-id="${CSS.escape(id)}"]`)?.focus();
  } else if (keys[event.key] && !event.target.matches("button, input, select")) keys[event.key]();
  else if (keys[event.key] && event.key.length === 1 && event.key !== " ") keys[event.key]();
  else if (pans[event.key] && (event.target === document.body || event.target.closest("#drawing"))) {
    state.view.x += pans[event.key][0];
    state.view.y += pans[event.key][1];
    look();
  } else return;
  event.preventDefault();
});

document.addEventListener("focusin", (event) => {
  const item = event.target.closest("#drawing [data-id]") && event.target.matches(":focus-visible") && itemAt(event.target);
  if (item && item.box && !inView(item.box)) bring(item);
});

function inView(box) {
  const { width, height } = svg.getBoundingClientRect();
  const { x, y, k } = state.view;
  return box.x * k + x >= 0 && box.y * k + y >= 0 && (box.x + box.width) * k + x <= width && (box.y + box.height) * k + y <= height;
}

function spot(name) {
  state.spot = name;
  mark();
}

function flipTable() {
  state.table = !state.table;
  showTable();
  remember();
}

function showTable() {
  document.body.classList.toggle("with-table", state.table);
  $("table-button").setAttribute("aria-pressed", String(state.table));
  if (state.table && !$("rows").children.length) fillTable($("rows"), select);
  if (!state.table) look();
}

function flipTheme() {
  const dark = getComputedStyle(document.body).colorScheme.trim() === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

for (const name of SPOTS) $(`spot-${name}`).addEventListener("click", () => spot(name));
$("pass").addEventListener("input", (event) => { state.pass = Number(event.target.value); mark(); });
$("search").addEventListener("input", (event) => search(event.target.value));
$("next").addEventListener("click", () => nextChange(1));
$("previous").addEventListener("click", () => nextChange(-1));
$("fit").addEventListener("click", fit);
$("closer").addEventListener("click", () => zoom(1.25));
$("farther").addEventListener("click", () => zoom(0.8));
$("fold").addEventListener("click", () => setFolded(!state.folded));
$("open-all").addEventListener("click", () => setAll(true));
$("close-all").addEventListener("click", () => setAll(false));
$("table-button").addEventListener("click", flipTable);
$("theme").addEventListener("click", flipTheme);
$("save-svg").addEventListener("click", saveSvg);
$("save-png").addEventListener("click", savePng);
$("minimap").addEventListener("click", (event) => {
  const bounds = $("minimap").getBoundingClientRect();
  const { box } = tree.root;
  const k = Math.min(bounds.width / box.width, bounds.height / box.height);
  const { width, height } = svg.getBoundingClientRect();
  const x = (event.clientX - bounds.left - (bounds.width - box.width * k) / 2) / k;
  const y = (event.clientY - bounds.top - (bounds.height - box.height * k) / 2) / k;
  state.view.x = width / 2 - x * state.view.k;
  state.view.y = height / 2 - y * state.view.k;
  look();
});
window.addEventListener("resize", look);
window.addEventListener("hashchange", () => {
  const closes = parameters().has("closed"); // then what is selected may be inside
  const node = recall();
  redraw();
  select(node, !closes);
  showTable();
});

for (const key of document.querySelectorAll("footer [data-change]")) key.hidden = !DATA.nodes.some((node) => node.change === key.dataset.change);
const [text, kind] = proofText(DATA.proof);
$("proof").textContent = text;
$("proof").className = kind;
const closes = parameters().has("closed");
const wanted = recall();
redraw();
fit();
describe(null);
if (wanted) select(wanted, !closes);
showTable();
