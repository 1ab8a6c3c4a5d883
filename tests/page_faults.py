"""What is wrong with a drawn page, measured in the browser."""

from __future__ import annotations

from typing import Any

FAULTS = """() => {
    const shown = (made) => made.getClientRects().length > 0;
    const boxes = [...plan.spots.values()].map((spot) => ({ spot, ...rect(spot.drawn.querySelector("rect")) }));
    function rect(made) {
        const { x, y, width, height } = made.getBBox();
        return { x, y, right: x + width, bottom: y + height };
    }
    const inside = (p, b, by) => p.x > b.x + by && p.x < b.right - by && p.y > b.y + by && p.y < b.bottom - by;
    const marked = "#world :is(.head, .note, .cut, .level, .fold):is(text)";
    const titles = [...document.querySelectorAll(marked)].filter(shown);
    const places = titles.map((title) => [title.textContent, rect(title)]);
    const under = [], crossed = new Set();
    for (const { from, to, drawn } of plan.wires.values()) {
        const path = drawn.firstChild;
        for (let at = 0; at <= path.getTotalLength(); at += 3) {
            const p = path.getPointAtLength(at);
            const foreign = boxes.filter(({ spot, ...box }) => spot !== from && spot !== to && inside(p, box, 1));
            if (foreign.length) under.push(`${from.key} ${to.key}`);
            for (const [text, box] of places) if (inside(p, box, 1)) crossed.add(text);
        }
    }
    const says = (made) => [...made.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const all = [...document.querySelectorAll("body *:not(script, style)")];
    const texts = all.filter((made) => says(made) && shown(made));
    const size = (made) => parseFloat(getComputedStyle(made).fontSize) * (made.closest("#world") ? state.k : 1);
    const spilled = [...document.querySelectorAll("#world .node text")].filter(shown).filter((text) => {
        const [t, box] = [rect(text), rect(text.parentNode.querySelector("rect"))];
        return t.right > box.right + 1 || t.x < box.x;
    });
    const meet = (a, b) => a.x < b.right && b.x < a.right && a.y < b.bottom && b.y < a.bottom;
    const overlaps = boxes.filter((a, n) => boxes.slice(n + 1).some((b) => meet(a, b)));
    const [wide, high] = [canvas.scrollWidth - canvas.clientWidth, canvas.scrollHeight - canvas.clientHeight];
    return {
        "edges under foreign nodes": new Set(under).size,
        "titles crossed": crossed.size,
        "nodes that overlap": overlaps.length,
        "texts that spill": spilled.length,
        "outside of the first view": Math.max(0, wide) + Math.max(0, high),
        "page wider than the window": Math.max(0, document.documentElement.scrollWidth - innerWidth),
        "smallest text": Math.round(10 * Math.min(...texts.map(size))) / 10,
        "rows": plan.rows.length,
        "lanes": plan.columns.length,
        "scale": Math.round(100 * state.k) / 100,
    };
}"""


def measured(page: Any) -> dict[str, float]:
    """Counts of what should not be, the smallest visible text in pixels, and how much is drawn."""
    return dict(page.evaluate(FAULTS))


def faults(page: Any) -> dict[str, float]:
    """Those of the counts that are above zero, and text that is too small."""
    found = measured(page)
    small = {"smallest text": found.pop("smallest text")}
    for name in ("rows", "lanes", "scale"):
        found.pop(name)
    return {name: value for name, value in found.items() if value} | {n: v for n, v in small.items() if v < 10}
