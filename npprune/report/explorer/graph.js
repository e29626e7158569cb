"use strict";
/* The path of a class (or of any images) as a graph: blocks from left to right, neurons as nodes. */

(() => {
  const { h, s, percent } = npprune;
  const SHOWN = 5; // nodes of a block
  const STEP = 92, ROW = 62, LEFT = 46, TOP = 34, RADIUS = 21;

  /* Per block: [neuron, share of the rows whose path holds it], most frequent first. */
  npprune.shares = (method, rows) => {
    const found = [];
    for (let l = 0; l < npprune.blocks; l++) {
      const counts = new Map();
      for (const row of rows) {
        for (const j of npprune.pathOf(method, row, l)) counts.set(j, (counts.get(j) || 0) + 1);
      }
      found.push([...counts].map(([j, n]) => [j, n / rows.length])
        .sort((a, b) => b[1] - a[1] || a[0] - b[0]));
    }
    return found;
  };

  /* How many of the rows hold both neuron i of block l and neuron j of block l + 1. */
  function together(method, rows, l, left, right) {
    const counts = new Map();
    for (const row of rows) {
      const a = npprune.pathOf(method, row, l).filter((j) => left.has(j));
      const b = npprune.pathOf(method, row, l + 1).filter((j) => right.has(j));
      for (const i of a) for (const j of b) counts.set(`${i} ${j}`, (counts.get(`${i} ${j}`) || 0) + 1);
    }
    return counts;
  }

  /* A figure: the graph, what a focused neuron looks like, and the same as a table.
     `mark`: per block, neurons to ring (those of another path); `about`: whose path, where a page has several. */
  npprune.graph = (method, rows, { mark = null, caption = null, about = "" } = {}) => {
    const shares = npprune.shares(method, rows);
    const shown = shares.map((block) => block.slice(0, SHOWN));
    const tallest = Math.max(...shown.map((block) => block.length));
    const width = 2 * LEFT + STEP * (npprune.blocks - 1), height = TOP + ROW * tallest + 16;
    const place = (l, i) => [LEFT + STEP * l, TOP + ROW * i + RADIUS + 4];
    const lines = [], nodes = [], preview = h("div", { class: "preview", "aria-live": "polite" });

    for (let l = 0; l + 1 < npprune.blocks; l++) {
      const sides = [l, l + 1].map((k) => new Map(shown[k].map(([j], i) => [j, i])));
      for (const [pair, count] of together(method, rows, l, ...sides)) {
        const [i, j] = pair.split(" ").map(Number);
        const [x1, y1] = place(l, sides[0].get(i)), [x2, y2] = place(l + 1, sides[1].get(j));
        const share = rows.length > 1 ? count / rows.length : 0.15, bend = (x2 - x1) / 2;
        lines.push([share, s("path", {
          d: `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`,
          class: "edge", "data-ends": `${l}/${i} ${l + 1}/${j}`,
          "stroke-width": (0.6 + 5 * share).toFixed(2), "stroke-opacity": (0.08 + 0.42 * share).toFixed(2),
        })]);
      }
    }
    lines.sort((a, b) => a[0] - b[0]);

    shown.forEach((block, l) => {
      nodes.push(s("text", { x: place(l, 0)[0], y: 16, class: "block" }, `block ${l}`));
      block.forEach(([j, share], i) => {
        const [x, y] = place(l, i), fate = npprune.fate(l, j), name = `${l}/${j}`;
        const also = mark && mark[l].has(j);
        const radius = 5 + (RADIUS - 5) * Math.sqrt(share);
        const say = `Block ${l}, neuron ${j}: on the path of ${percent(share)} of the images`
          + (fate ? `, ${fate} by the plan` : "") + (also ? ", on the other path too" : "");
        const node = s("a", {
          href: `#/neuron/${l}/${j}`, class: `node ${fate || "kept"}`, "aria-label": say,
          on: { focus: () => focus(l, j, share), mouseenter: () => focus(l, j, share), mouseleave: dim, blur: dim },
        },
          s("title", {}, say),
          s("circle", { cx: x, cy: y, r: RADIUS + 3, class: "hit" }),
          also && s("circle", { cx: x, cy: y, r: radius + 4, class: "also" }),
          s("circle", { cx: x, cy: y, r: radius.toFixed(1), class: "dot" }),
          fate === "removed" && s("path", { d: cross(x, y, radius * 0.45), class: "cross" }),
          s("text", { x, y: y + RADIUS + 14, class: "name" }, String(j)));
        nodes.push(node);
      });
      const more = shares[l].length - block.length;
      if (more > 0 && block.length === SHOWN) {
        nodes.push(s("text", { x: place(l, 0)[0], y: height - 2, class: "more" }, `+${more}`));
      }
    });

    const drawing = s("svg", {
      viewBox: `0 0 ${width} ${height}`, vars: { least: `${width}px` }, role: "group", class: "graph",
      "aria-label": `Path through ${npprune.blocks} blocks`,
    }, lines.map((line) => line[1]), nodes);

    function focus(l, j, share) {
      drawing.classList.add("focused");
      const name = `${l}/${j}`, near = new Set([name]);
      for (const [, line] of lines) {
        const ends = line.dataset.ends.split(" ");
        const on = ends.includes(name);
        line.classList.toggle("on", on);
        if (on) ends.forEach((end) => near.add(end));
      }
      for (const node of drawing.querySelectorAll(".node")) {
        node.classList.toggle("on", near.has(node.getAttribute("href").slice(9)));
      }
      preview.replaceChildren(
        h("p", {}, h("b", {}, `Block ${l}, neuron ${j}`), ` – on the path of ${percent(share)} of these images `,
          npprune.badge(l, j)),
        npprune.shown[l].has(j) ? npprune.exemplars(l, j, 6) : h("small", {}, "The images that excite it were not kept; --neurons keeps more."));
    }
    function dim() { drawing.classList.remove("focused"); }

    const first = shown.length - 1;
    if (shown[first].length) {
      focus(first, ...shown[first][0]);
      dim();
    }
    return h("figure", { class: "path" },
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Path graph ${about}, scrolls sideways` }, drawing),
      h("figcaption", {}, caption || captionText(rows.length)),
      npprune.known && preview,
      table(shares, about));
  };

  function captionText(count) {
    return "Each disc is a neuron: the larger, the more of the " + npprune.plural(count, "image")
      + " have it on their path. A line joins two neurons that share an image's path: the thicker, the more often."
      + (npprune.kept ? " Crossed-out neurons were removed by the plan." : "")
      + " Point at a neuron to see what excites it.";
  }

  function cross(x, y, r) {
    const d = r.toFixed(1);
    return `M${x - d},${y - d}L${x + +d},${y + +d}M${x + +d},${y - d}L${x - d},${y + +d}`;
  }

  function table(shares, about) {
    return h("details", {}, h("summary", {}, "As a table"),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table of the path ${about}` },
        h("table", {},
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "block"), h("th", { scope: "col" }, "neurons, and the share of the images"))),
          h("tbody", {}, shares.map((block, l) => h("tr", {}, h("th", { scope: "row" }, String(l)),
            h("td", { class: "words" }, block.slice(0, 12).map(([j, share], i) =>
              [i > 0 && ", ", npprune.neuronLink(l, j, String(j)), ` ${percent(share)}`]))))))));
  }
})();
