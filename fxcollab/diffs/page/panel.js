// Beside the drawing: details of what is selected, the table, the legend.
"use strict";

function html(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** What there is to know while nothing is selected: the head tree. */
function showOverview(panel, root, show) {
  const flops = root.summary.flops;
  const entry = (group) => {
    const own = ownSummary(group);
    const button = html("button", { type: "button" }, group.kind === "root" ? "trunk: all heads" : group.title);
    button.addEventListener("click", () => show(group));
    const share = flops ? `${Math.round((100 * own.flops) / flops)} % of FLOPs` : "";
    const facts = [`${own.nodes} node${own.nodes === 1 ? "" : "s"}`, own.parameters ? `${short(own.parameters)} parameters` : "", share];
    const branches = group.children.filter((item) => item.kind === "branch");
    const made = html("li", { class: changeOf(group) }, button, html("div", { class: "quiet" }, facts.filter(Boolean).join(", ")));
    if (branches.length) made.append(html("ul", {}, ...branches.map(entry)));
    return made;
  };
  panel.replaceChildren(
    html("h2", {}, "Head tree"),
    html("ul", { class: "heads" }, entry(root)),
    html("p", { class: "quiet" }, "Select a node to see what became of it."),
    ...(DATA.unknown ? [html("h3", {}, "shapes and FLOPs are unknown"), html("p", {}, DATA.unknown)] : []),
    ...(DATA.limitations.length ? [html("h3", {}, "limitations"), html("ul", {}, ...DATA.limitations.map((note) => html("li", {}, note)))] : []),
  );
}

/** A branch's, without the branches inside of it. */
function ownSummary(group) {
  const inside = group.children.filter((item) => item.kind === "branch").map((item) => item.summary);
  const without = (key) => inside.reduce((rest, one) => rest - one[key], group.summary[key]);
  return { nodes: without("nodes"), parameters: without("parameters"), flops: without("flops") };
}

function showDetails(panel, node, select) {
  const twins = instancesOf(node);
  const rows = [
    ["what became of it", `${GLYPHS[node.change]} ${WORDS[node.change]}`],
    ["in the training graph", node.name],
    ["in the inference graph", inferenceText(node)],
    ["branch", node.branch ? `${node.branch}, ${headsText(node.branch)}` : "trunk, shared by all heads"],
    ["does", `${node.label}${node.target && node.target !== node.label ? `  (${node.target})` : ""}`],
    ["gradient", node.factor === null ? null : `times ${fraction(node.factor)} on its way back to ${node.origin}`],
    ["shape", node.shape ? `${node.shape.join(" × ")}  ${node.dtype}` : null],
    ["parameters", node.parameters ? node.parameters.toLocaleString("en") : null],
    ["FLOPs", node.flops ? `${short(node.flops)}, forward` : null],
    ["source", node.source],
  ];
  const list = html("dl", {});
  for (const [label, value] of rows) if (value) list.append(html("dt", {}, label), html("dd", {}, value));
  panel.replaceChildren(html("h2", { tabindex: -1 }, node.counterpart || node.name), list);
  if (twins.length > 1) panel.append(html("h3", {}, `${twins.length} instances`), links(twins, select, (twin) => `${GLYPHS[twin.change]} ${twin.name}`));
  const before = [...new Set(node.inputs.map((name) => NODES.get(original(name)).counterpart))].filter((name) => name !== null);
  const same = before.length === node.inputs.length && before.every((name, place) => name === node.inputs[place]);
  if (node.inputs.length) panel.append(html("h3", {}, same ? "reads" : "reads, in the training graph"), links(node.inputs.map((name) => NODES.get(name)), select));
  if (!same && node.counterpart !== null) panel.append(html("h3", {}, "reads, in the inference graph"), links(before.map((name) => NODES.get(name)), select));
  const readers = READERS.get(node.name) || [];
  if (readers.length) panel.append(html("h3", {}, "is read by"), links(readers, select));
}

function links(nodes, select, text = (node) => node.name) {
  const list = html("ul", {});
  for (const node of nodes) {
    const button = html("button", { type: "button" }, text(node));
    button.addEventListener("click", () => {
      select(node.name, true);
      document.querySelector("#details h2").focus(); // the link itself is gone
    });
    list.append(html("li", {}, button));
  }
  return list;
}

function inferenceText(node) {
  if (NODES.get(original(node.name)).change === "state") return "nothing: the module has this parameter itself";
  if (node.counterpart === null) return `nothing: it is gone, and its readers read ${original(node.name)}`;
  return node.change === "cloned" ? `${node.counterpart} is left of it: head 0's instance` : node.counterpart;
}

function headsText(branch) {
  const heads = headsOf(branch);
  return heads.length > 1 ? `heads ${heads[0]} to ${heads[heads.length - 1]}` : `head ${heads[0]}`;
}

/** The same as a table, for reading without the drawing. */
function fillTable(body, select) {
  const rows = DATA.nodes.map((node) => {
    const button = html("button", { type: "button" }, node.name);
    button.addEventListener("click", () => select(node.name, true));
    const cells = [
      GLYPHS[node.change], WORDS[node.change], node.counterpart || "", node.branch || "trunk", node.label,
      node.shape ? node.shape.join("×") : "", node.parameters ? node.parameters.toLocaleString("en") : "",
      node.factor === null ? "" : fraction(node.factor), node.inputs.join(", "),
    ];
    return html("tr", { class: node.change, "data-name": node.name }, html("th", { scope: "row" }, button), ...cells.map((cell) => html("td", {}, cell)));
  });
  body.replaceChildren(...rows);
}

function proofText(proof) {
  if (!proof) return ["not proved here: fxcollab verify", "quiet"];
  const failed = proof.checks.filter((check) => !check.ok);
  if (failed.length) return [`${failed.length} of ${proof.checks.length} checks FAILED`, "failed"];
  return [`proved: all ${proof.checks.length} checks hold`, "proved"];
}
