// The boxes: branches of the head tree, opened modules inside of them, and runs of nodes with one fate.
"use strict";

/** A tree of boxes and nodes, as DATA nests them; with `folded`, runs stand in boxes of their own. */
function buildGroups(data, nodes, folded) {
  const known = new Map();
  const add = (item) => {
    known.set(item.id, item);
    return item;
  };
  const leaf = (name, parent) => add({ id: `node:${name}`, kind: "node", node: nodes.get(name), parent, children: null });
  const box = (found, parent) => {
    const group = add({ ...found, parent });
    group.children = found.children.map((child) => (typeof child === "string" ? leaf(child, group) : box(child, group)));
    if (folded) fold(group, found.runs, add);
    return group;
  };
  const root = box(data.boxes, null);
  for (const item of known.values()) if (item.children) summarise(item);
  return { root, find: (name) => known.get(`node:${name}`), get: (id) => known.get(id), all: [...known.values()] };
}

function fold(group, runs, add) {
  for (const [start, stop, title, fate] of [...runs].reverse()) {
    const children = group.children.slice(start, stop);
    const id = `${group.id}|from ${children[0].id}`;
    const run = add({ id, kind: "run", title, fate, branch: group.branch, parent: group, children, open: false });
    for (const child of children) child.parent = run;
    group.children.splice(start, stop - start, run);
  }
}

/** What a closed box says of its inside. */
function summarise(group) {
  if (group.summary) return group.summary;
  const total = { nodes: 0, parameters: 0, flops: 0, changes: {} };
  for (const item of group.children) {
    const { node } = item;
    const inner = item.children ? summarise(item) : { nodes: 1, parameters: node.new_parameters, flops: node.flops || 0, changes: { [node.change]: 1 } };
    for (const key of ["nodes", "parameters", "flops"]) total[key] += inner[key];
    for (const [change, count] of Object.entries(inner.changes)) total.changes[change] = (total.changes[change] || 0) + count;
  }
  group.summary = total;
  return total;
}

/** Open boxes from the outside in, all of a depth or none, while a person can read what is shown; runs stay closed. */
function openUpTo(root, limit) {
  let depth = [root];
  while (depth.length) {
    const next = depth.flatMap((group) => group.children.filter((item) => item.children && item.kind !== "run"));
    const closed = next.filter((group) => !group.open);
    const more = closed.reduce((sum, group) => sum + group.children.length - 1, 0);
    if (closed.length && countShown(root) + more > limit) return;
    for (const group of closed) group.open = true;
    depth = next;
  }
}

function countShown(group) {
  return group.children.reduce((sum, item) => sum + (item.children && item.open ? countShown(item) : 1), 0);
}

/** The outermost closed box around an item, or the item itself: what stands for it on the drawing. */
function representative(item) {
  let shown = item;
  for (let group = item.parent; group; group = group.parent) if (!group.open) shown = group;
  return shown;
}

function ancestors(item) {
  const found = [];
  for (let group = item.parent; group; group = group.parent) found.push(group);
  return found;
}
