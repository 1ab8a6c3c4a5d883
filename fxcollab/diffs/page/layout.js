// Where everything stands: every open box is laid out by itself, from the inside out.
"use strict";

const NODE = { height: 40, least: 100, character: 7.1, padding: 40, most: 290, apart: 22, glyph: 6.8 };
const BOX = { header: 24, padding: 12 };

function textWidth(text) {
  return Math.min(NODE.most, Math.max(NODE.least, [...text].length * NODE.character + NODE.padding));
}

function sizeOf(item) {
  if (item.children && item.open) return layoutOf(item);
  const [first, second] = labelOf(item);
  const badges = item.children ? 2 * badge(item).length * NODE.glyph : 0; // it stands on the left of a centred name
  return { width: Math.max(textWidth(first) + badges, textWidth(second)), height: NODE.height };
}

/** The layout of an open box: its size, where its children stand in it, the routes of edges between them. */
function layoutOf(group) {
  if (group.layout) return group.layout;
  const graph = new dagre.graphlib.Graph({ multigraph: false });
  graph.setGraph({ rankdir: "TB", nodesep: NODE.apart, ranksep: 26, marginx: BOX.padding, marginy: BOX.padding });
  graph.setDefaultEdgeLabel(() => ({}));
  group.children.forEach((item, place) => {
    item.place = place;
    graph.setNode(String(place), { ...sizeOf(item) });
  });
  for (const [source, target] of edgesInside(group)) graph.setEdge(String(source), String(target));
  dagre.layout(graph);
  const { width, height } = graph.graph();
  const header = group.kind === "root" ? 0 : BOX.header;
  group.children.forEach((item) => {
    const at = graph.node(String(item.place));
    item.at = { x: at.x - at.width / 2, y: at.y - at.height / 2 + header, width: at.width, height: at.height };
  });
  inPathOrder(group.children.filter((item) => item.kind === "branch"));
  const routes = new Map();
  for (const edge of graph.edges()) {
    routes.set(`${edge.v}>${edge.w}`, graph.edge(edge).points.map(({ x, y }) => [x, y + header]));
  }
  const least = group.kind === "root" ? 0 : textWidth(group.title) + 40;
  const wide = Math.max(width, least);
  if (wide > width) for (const item of group.children) item.at.x += (wide - width) / 2;
  if (wide > width) for (const points of routes.values()) for (const point of points) point[0] += (wide - width) / 2;
  group.layout = { width: wide, height: height + header, routes };
  return group.layout;
}

/** Sibling branches stand from left to right as heads count; the layout knows no such order. */
function inPathOrder(branches) {
  const taken = branches.map((item) => item.at.x).sort((a, b) => a - b);
  const gap = branches.length > 1 ? NODE.apart : 0;
  let x = taken[0];
  for (const branch of branches) {
    branch.at.x = x;
    x += branch.at.width + gap;
  }
}

/** Pairs of children between which values flow, whatever boxes they are in. */
function edgesInside(group) {
  const pairs = new Map();
  for (const [source, target] of group.edges || []) pairs.set(`${source.place}>${target.place}`, [source.place, target.place]);
  return pairs.values();
}

/** Give every box the edges between its own children, once: the box in which both ends' ways up meet. */
function distributeEdges(tree, data) {
  for (const node of data.nodes) {
    const target = tree.find(node.name);
    for (const name of node.inputs) {
      const [meeting, from, to] = meet(tree.find(name), target);
      (meeting.edges = meeting.edges || []).push([from, to]);
    }
  }
}

function meet(source, target) {
  const way = new Map();
  for (let item = source; item.parent; item = item.parent) way.set(item.parent, item);
  for (let item = target; item.parent; item = item.parent) if (way.has(item.parent)) return [item.parent, way.get(item.parent), item];
  throw new Error("nodes without a common box");
}

/** Forget the layouts that a box's opening or closing changes. */
function forget(group) {
  for (let item = group; item; item = item.parent) item.layout = null;
}

/** Absolute places of all that is shown, outer boxes first. */
function placed(root) {
  const found = [];
  const walk = (group, x, y) => {
    for (const item of group.children) {
      item.box = { x: x + item.at.x, y: y + item.at.y, width: item.at.width, height: item.at.height };
      found.push(item);
      if (item.children && item.open) walk(item, item.box.x, item.box.y);
    }
  };
  root.box = { x: 0, y: 0, ...layoutOf(root) };
  walk(root, 0, 0);
  return found;
}
