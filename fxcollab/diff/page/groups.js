// The boxes: branches of the head tree, and inside of them the modules that were opened.
"use strict";

/** A tree of boxes over the nodes of the training graph. Boxes with one box inside and nothing else are merged. */
function buildGroups(data) {
  const root = { id: "", title: "", kind: "root", branch: "", parent: null, children: [], open: true };
  const groups = new Map([["", root]]);
  const child = (parent, id, title, kind, branch) => {
    if (!groups.has(id)) {
      const group = { id, title, kind, branch, parent, children: [], open: kind === "branch" };
      groups.set(id, group);
      parent.children.push(group);
    }
    return groups.get(id);
  };
  const branchOf = (name) => {
    if (!name) return root;
    const cut = name.lastIndexOf("_");
    return child(branchOf(cut < 0 ? "" : name.slice(0, cut)), name, name, "branch", name);
  };
  for (const node of data.nodes) {
    let parent = branchOf(node.branch);
    const atoms = node.module ? node.module.split(".") : [];
    for (let depth = 1; depth <= atoms.length; depth++) {
      const path = atoms.slice(0, depth).join(".");
      parent = child(parent, `${node.branch}|${path}`, path, "module", node.branch);
    }
    const leaf = { id: node.name, kind: "node", node, parent, children: null };
    parent.children.push(leaf);
    groups.set(`node:${node.name}`, leaf);
  }
  mergeChains(root);
  for (const item of groups.values()) if (item.children) summarise(item);
  return { root, find: (name) => groups.get(`node:${name}`), get: (id) => groups.get(id), all: [...groups.values()] };
}

function mergeChains(group) {
  group.children.forEach((item, place) => {
    while (item.kind === "module" && item.children.length === 1 && item.children[0].kind === "module") {
      const inner = item.children[0];
      inner.parent = group;
      group.children[place] = item = inner;
    }
    if (item.children) mergeChains(item);
  });
}

/** What a closed box says of its inside. */
function summarise(group) {
  if (group.summary) return group.summary;
  const total = { nodes: 0, parameters: 0, changes: {} };
  for (const item of group.children) {
    const inner = item.children ? summarise(item) : { nodes: 1, parameters: item.node.parameters, changes: { [item.node.change]: 1 } };
    total.nodes += inner.nodes;
    total.parameters += inner.parameters;
    for (const [change, count] of Object.entries(inner.changes)) total.changes[change] = (total.changes[change] || 0) + count;
  }
  group.summary = total;
  return total;
}

/** Open boxes from the outside in, all of a depth or none, as long as a person can still read what is shown. */
function openUpTo(root, limit) {
  let depth = [root];
  while (depth.length) {
    const next = depth.flatMap((group) => group.children.filter((item) => item.children));
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

/** The innermost closed box around an item, or the item itself: what stands for it on the drawing. */
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
