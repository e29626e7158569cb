"use strict";
/* Two paths side by side: two classes, or two methods on one class. */

(() => {
  const { h, percent, points, plural, pages } = npprune;

  pages.compare = (...words) => {
    const { run } = npprune, labels = [...npprune.rows.keys()].sort((a, b) => a - b);
    const classOf = (word, other) => (word && npprune.classes.has(word) ? npprune.classes.get(word) : other);
    const methodOf = (word) => (run.methods.includes(word) ? word : null);
    // addresses: CLASS, CLASS/CLASS, CLASS/METHOD/CLASS/METHOD
    const four = words.length === 4;
    const a = classOf(words[0], labels[0]);
    const sides = [
      { c: a, method: (four && methodOf(words[1])) || run.methods[0] },
      { c: classOf(four ? words[2] : words[1], run.methods.length > 1 ? a : labels.find((c) => c !== a) ?? a),
        method: (four && methodOf(words[3])) || (words.length < 2 && run.methods[1]) || run.methods[0] },
    ];
    const go = () => {
      location.hash = "#/compare/" + sides.map(({ c, method }) => `${encodeURIComponent(npprune.keys.get(c))}/${method}`).join("/");
    };
    const shares = sides.map(({ c, method }) => npprune.shares(method, npprune.rows.get(c)));
    const paths = shares.map((blocks) => blocks.map((block) => new Set(block.slice(0, run.topk).map(([j]) => j))));
    const common = paths[0].map((set, l) => [...set].filter((j) => paths[1][l].has(j)));
    const sum = common.reduce((n, block) => n + block.length, 0), all = paths[0].reduce((n, set) => n + set.size, 0);
    const marks = common.map((block) => new Set(block));
    return ["Compare", h("h1", {}, "Two paths side by side"),
      h("p", { class: "lead" }, `The two share ${sum} of the ${all} neurons that their images hold most often`,
        run.topk > 1 ? ` (${run.topk} a block)` : " (one a block)", sum ? "; as block/neuron: " : ".",
        common.map((block, l) => block.map((j) => [npprune.neuronLink(l, j), " "]))),
      h("div", { class: "sides" }, sides.map((side, k) => h("section", {},
        chooser(side, k, labels, go),
        h("h2", {}, npprune.classLink(side.c), h("small", {}, ` by ${side.method}`)),
        npprune.known && h("div", { class: "row" }, npprune.pictured(npprune.rows.get(side.c), 4).map((row) => npprune.imageLink(row))),
        npprune.graph(side.method, npprune.rows.get(side.c), { mark: marks, about: k ? "on the right" : "on the left", caption: "The larger a disc, the more of the class's images have the neuron on their path. Ringed: on both sides among those held most often."
          + (npprune.kept ? " Crossed out: removed by the plan." : "") }),
        effect(side))))];
  };

  function chooser(side, k, labels, go) {
    const sorted = [...labels].sort((a, b) => npprune.title(a).localeCompare(npprune.title(b), "en"));
    const select = (name, entries, chosen, set) => h("label", {}, `${name} `, h("select", {
      "aria-label": `${name} of the ${k ? "right" : "left"} side`,
      on: { change: (event) => { set(event.target.value); go(); } },
    }, entries.map(([value, text]) => h("option", { value, selected: String(value) === String(chosen) }, text))));
    return h("p", { class: "chooser" },
      select("Class", sorted.map((c) => [c, npprune.title(c)]), side.c, (v) => { side.c = Number(v); }),
      npprune.run.methods.length > 1 && select("Method", npprune.run.methods.map((m) => [m, m]), side.method, (v) => { side.method = v; }));
  }

  function effect({ c, method }) {
    const found = npprune.effects[c];
    if (!found || !found[method]) return null;
    const line = (edit, text) => {
      const { p, change } = found[method][edit], random = found.random[edit].p[0];
      return h("li", {}, `${text}: ${percent(p[0])} `,
        h("small", {}, change[1] === null ? "" : `(change ${points(change[0])} points, 95 % ${points(change[1])} to ${points(change[2])}; with a random path instead ${percent(random)})`));
    };
    return h("div", {}, h("p", {}, `Probability of the true class, ${percent(found.dense.p[0])} on ${plural(found.n, "image")}:`),
      h("ul", { class: "plain" }, line("remove", "without this path"), line("keep", "with this path alone")));
  }
})();
