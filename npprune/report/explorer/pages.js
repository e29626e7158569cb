"use strict";
/* The pages: start, classes, one class, neurons, one neuron, one image. Each returns its elements. */

(() => {
  const { h, s, percent, points, number, plural, pages } = npprune;

  const own = () => npprune.run.methods[0];

  function section(title, ...children) {
    return h("section", {}, h("h2", {}, title), children);
  }

  function lead(...children) { return h("p", { class: "lead" }, children); }

  function absent(what) {
    const known = npprune.known ? "this image was not read" : "the images were not at hand when this was built";
    return h("p", { class: "missing" }, `${what}: ${known}.`);
  }

  /* ------------------------------------------------------------ start */

  pages.start = () => {
    const { run } = npprune;
    const labels = [...npprune.rows.keys()];
    const example = labels.map((c) => [followed(npprune.rows.get(c)), c]).sort((a, b) => b[0] - a[0] || a[1] - b[1])[0][1];
    const rows = npprune.rows.get(example);
    return [`Neuron paths of ${run.name}`,
      h("h1", {}, "Neuron paths of ", h("span", { class: "name" }, run.name)),
      lead("Every block of the network computes with hidden units, its neurons. A ", h("b", {}, "neuron path"),
        ` names the ${run.topk > 1 ? `${run.topk} neurons` : "one neuron"} of each block that together carry one image to its class; `
        + "what the paths of a class's images have in common is the class's own path."),
      run.notes.map((note) => h("p", { class: "note" }, note)),
      inShort(labels),
      section(["For example, the class ", h("span", { class: "name" }, npprune.title(example))],
        strip(npprune.pictured(rows, 6)),
        npprune.graph(own(), rows),
        h("p", {}, npprune.classLink(example, "All about this class"))),
      run.plan && planSection(),
      section("Classes", classCards(labels, "name", 24), labels.length > 24 && h("p", {}, h("a", { href: "#/classes" }, `All ${labels.length} classes`)))];
  };

  /* What one wants to know within a minute, as pairs of a word and a sentence. */
  function inShort(labels) {
    const { run } = npprune, { plan } = run, facts = [["Looked at",
      `${plural(npprune.images.length, "image")} of ${plural(labels.length, "class", "classes")} in the ${npprune.blocks} blocks of ${run.network}; `
      + `paths found by ${run.methods[0]} at ${npprune.tokens().replace(" (mean)", "")}.`]];
    if (plan) {
      const { all, stay } = counts(), paths = pathsLost();
      const merged = plan.merged ? plan.merged.reduce((a, b) => a + b) : 0;
      const heads = plan.heads ? plan.heads.reduce((n, [k, d]) => n + d - k, 0) : 0;
      facts.push(["Removed", `${(all - stay).toLocaleString("en")} of ${all.toLocaleString("en")} neurons (${percent(1 - stay / all)}), `
        + `${paths.removed.toLocaleString("en")} of the ${paths.held.toLocaleString("en")} that are on a path`
        + (heads ? `; ${heads} of ${plan.heads.reduce((n, [, d]) => n + d, 0)} attention heads` : "")
        + (merged ? `; ${plural(merged, "patch", "patches")} of an image merged into others` : "") + "."]);
      const [dense, pruned] = plan.top1 || [];
      facts.push(["What it cost", plan.top1
        ? `Top-1 accuracy ${percent(pruned[0], 1)} (95 % ${percent(pruned[1], 1)} to ${percent(pruned[2], 1)}) instead of ${percent(dense[0], 1)}, on ${plural(dense[3], "image")}`
          + (plan.macs ? `; for that, ${percent(plan.macs[1] / plan.macs[0])} of the MACs.` : ".")
        : ["Not measured in this run: ", h("code", {}, "npprune eval"), ` of ${plan.name} does it.`]]);
    }
    facts.push(["To doubt", doubt(labels)]);
    return h("dl", { class: "short" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text))));
  }

  /* Whether paths matter more than random ones here, and why that may be wrong. */
  function doubt(labels) {
    const found = labels.map((c) => npprune.effects[c]).filter(Boolean);
    if (!found.length) {
      return "A path is what a method scores highest; that the network needs it is not measured here"
        + (npprune.known ? ": that takes two images of a class." : ".");
    }
    const more = found.filter((effect) => effect[own()].remove.change[0] < effect.random.remove.change[0]).length;
    const fewest = Math.min(...found.map((effect) => effect.n));
    return `A path is what a method scores highest, not proof that the network needs it. Removing it costs more than removing a random path in ${more} of `
      + `${plural(found.length, "class", "classes")}` + (fewest < 10 ? `, on as few as ${plural(fewest, "image")} each: mind the intervals.` : ".");
  }

  function counts() {
    const { run } = npprune, sum = (list) => list.reduce((a, b) => a + b, 0);
    return { all: sum(run.widths), stay: sum(run.plan.keep.map((units) => units.length)) };
  }

  /* Neurons on any image's path, and those that the plan removed: per block, and in all. */
  function pathsLost(rows = npprune.images.map((_, row) => row)) {
    const sets = npprune.run.widths.map(() => new Set());
    for (const row of rows) sets.forEach((set, l) => npprune.pathOf(own(), row, l).forEach((j) => set.add(j)));
    const lost = sets.map((set, l) => [...set].filter((j) => !npprune.kept[l].has(j)).length);
    return { sets, lost, held: sets.reduce((n, set) => n + set.size, 0), removed: lost.reduce((a, b) => a + b, 0) };
  }

  /* How much of their paths images share: the mean share of each block's most frequent neuron. */
  function followed(rows) {
    if (rows.length < 2) return 0;
    const shares = npprune.shares(own(), rows);
    return shares.reduce((sum, block) => sum + (block.length ? block[0][1] : 0), 0) / npprune.blocks;
  }

  function planSection() {
    const { run } = npprune, { plan } = run;
    const { all, stay } = counts(), { sets, lost } = pathsLost();
    const pays = npprune.known && h("p", {}, h("a", { href: "#/flips" }, "Who pays: the images whose prediction changed"));
    return section(["What was removed: the plan ", h("span", { class: "name" }, plan.name)],
      lead(`${stay.toLocaleString("en")} of ${all.toLocaleString("en")} neurons stay (${percent(stay / all)})`
        + (plan.criterion ? `, chosen by ${plan.criterion}` : "")
        + (plan.compensation && plan.compensation !== "none" ? `, their weights refitted (${plan.compensation})` : "")
        + ". Read down the bars which blocks gave most, and in the last columns whether paths were spared."),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the plan" }, h("table", {},
        h("thead", {}, h("tr", {}, ["block", "neurons that stay", "on a path", "of these removed",
          plan.heads && "heads that stay", plan.merged && "patches merged"].filter(Boolean).map((name, i) => h("th", { scope: "col", colspan: i === 1 && 2, class: i === 1 && "words" }, name)))),
        h("tbody", {}, run.widths.map((width, l) => h("tr", {},
          h("th", { scope: "row" }, String(l)),
          h("td", {}, `${plan.keep[l].length} of ${width}`),
          h("td", { class: "barcell" }, bar(plan.keep[l].length / width)),
          h("td", {}, String(sets[l].size)),
          h("td", {}, String(lost[l])),
          plan.heads && h("td", {}, plan.heads[l].join(" of ")),
          plan.merged && h("td", {}, String(plan.merged[l]))))))), pays);
  }

  function bar(share, kind = "") {
    return h("span", { class: `meter ${kind}`, vars: { share: `${(100 * share).toFixed(1)}%` } });
  }

  function strip(rows) {
    return npprune.known && h("div", { class: "row" }, rows.map((row) => npprune.imageLink(row)));
  }

  /* ------------------------------------------------------------ who pays */

  pages.flips = () => {
    const { run, images } = npprune;
    if (!run.plan || !npprune.known) return null;
    const right = (best, label) => best[0][0] === label;
    const seen = images.map((image, row) => [image, row]).filter(([image]) => image.pruned);
    const lost = seen.filter(([i]) => right(i.dense, i.label) && !right(i.pruned, i.label));
    const gained = seen.filter(([i]) => !right(i.dense, i.label) && right(i.pruned, i.label));
    const fall = ([image]) => (image.q ?? 0) - image.p;
    lost.sort((a, b) => fall(a) - fall(b) || a[1] - b[1]);
    gained.sort((a, b) => fall(b) - fall(a) || a[1] - b[1]);
    const said = ([c, p]) => [npprune.title(c), ` ${percent(p)}`];
    const gallery = (entries) => h("ul", { class: "gallery pairs" }, entries.map(([image, row]) => h("li", {}, npprune.imageLink(row, {},
      h("span", {}, h("b", {}, npprune.title(image.label)), h("small", {}, "dense: ", said(image.dense[0])),
        h("small", { class: "warn" }, "pruned: ", said(image.pruned[0])))))));
    return ["Who pays", h("h1", {}, "Who pays for what was removed"),
      lead(`Of ${plural(seen.length, "image")} that the paths are of, ${run.plan.name} gets ${lost.length} wrong that were right, and ${gained.length} right that were wrong. `
        + "The images were perhaps among those it was made with: for its accuracy see the report."),
      section("Right before, wrong now", lost.length ? gallery(lost) : h("p", { class: "missing" }, "None.")),
      section("Wrong before, right now", gained.length ? gallery(gained) : h("p", { class: "missing" }, "None."))];
  };

  /* ------------------------------------------------------------ classes */

  const ORDERS = {
    name: ["name", (c) => npprune.title(c).toLowerCase()],
    index: ["index", (c) => c],
    shared: ["most shared path", (c) => -followed(npprune.rows.get(c))],
    lost: ["most lost without the path", (c) => (npprune.effects[c] ? npprune.effects[c][own()].remove.change[0] : 9)],
  };

  function classCards(labels, order, limit = Infinity) {
    const value = ORDERS[order][1];
    const sorted = labels.map((c) => [value(c), c]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]));
    return h("ul", { class: "cards" }, sorted.slice(0, limit).map(([, c]) => {
      const rows = npprune.rows.get(c), effect = npprune.effects[c];
      return h("li", {}, npprune.classLink(c,
        npprune.known && h("span", { class: "row", "aria-hidden": "true" }, npprune.pictured(rows, 3).map((row) => npprune.picture(row))),
        h("b", {}, npprune.title(c)),
        h("small", {}, plural(rows.length, "image"),
          effect && `, ${points(effect[own()].remove.change[0], 0)} points without its path`)));
    }));
  }

  pages.classes = () => {
    const labels = [...npprune.rows.keys()];
    const list = h("div", {}, classCards(labels, "name"));
    const choose = h("select", { on: { change: (event) => list.replaceChildren(classCards(labels, event.target.value)) } },
      Object.entries(ORDERS).filter(([key]) => key !== "lost" || npprune.known).map(([key, [name]]) => h("option", { value: key }, name)));
    return ["Classes", h("h1", {}, `${plural(labels.length, "class", "classes")} with paths`),
      h("p", {}, h("label", {}, "Sorted by ", choose)), list];
  };

  /* ------------------------------------------------------------ a class */

  pages.class = (key) => {
    const c = npprune.classes.get(key);
    if (c === undefined || !npprune.rows.has(c)) return null;
    const rows = npprune.rows.get(c), { run } = npprune;
    const name = npprune.fullName(c), title = npprune.title(c), synset = run.labels[c] && run.labels[c][1];
    return [title,
      h("p", { class: "kind" }, `class ${c}`, synset && synset !== name ? ` · ${synset}` : ""),
      h("h1", {}, title), name !== title && h("p", { class: "sub" }, name),
      section("Its path", run.plan && lead(classPlan(rows)), npprune.graph(own(), rows),
        h("p", {}, h("a", { href: `#/compare/${npprune.keys.get(c)}` }, "Compare with another class",
          run.methods.length > 1 ? " or method" : ""))),
      effectSection(c),
      followSection(rows),
    ];
  };

  /* What a plan did to a class's path and, on the images seen, to its predictions. */
  function classPlan(rows) {
    const path = npprune.shares(own(), rows).map((block) => block.slice(0, npprune.run.topk));
    const all = path.reduce((n, block) => n + block.length, 0);
    const gone = path.reduce((n, block, l) => n + block.filter(([j]) => !npprune.kept[l].has(j)).length, 0);
    const seen = rows.map((row) => npprune.images[row]).filter((image) => image.pruned);
    const right = (which) => seen.filter((image) => image[which][0][0] === image.label).length;
    return `Of the ${plural(all, "neuron")} that its images hold most often, the plan removed ${gone || "none"}.`
      + (seen.length ? ` Of ${plural(seen.length, "image")}, the dense network gets ${right("dense")} right, the pruned one ${right("pruned")}.` : "");
  }

  const EDITS = [
    ["dense", "nothing changed", ""],
    ["remove", "its path removed", "mark"],
    ["random remove", "a random path removed", "other"],
    ["keep", "only its path stays", "mark"],
    ["random keep", "only a random path stays", "other"],
  ];

  function effectSection(c) {
    const effect = npprune.effects[c];
    const title = "What the class loses without it, and keeps with nothing else";
    if (!effect) {
      return section(title, npprune.known
        ? h("p", { class: "missing" }, "Not measured: with one image, the path would be measured on the image that it came from.")
        : absent("Not measured"));
    }
    const rows = EDITS.map(([key, label, kind]) => {
      const [first, edit] = key.split(" ");
      const found = first === "dense" ? effect.dense : first === "random" ? effect.random[edit] : effect[own()][first];
      return { label, kind, ...found };
    });
    const removed = effect[own()].remove.change, random = effect.random.remove.change;
    return section(title,
      lead(`Without its path the true class's probability changes by ${points(removed[0])} points ${ends(removed)}, without a random path `
        + `of as many neurons by ${points(random[0])} ${ends(random)}.`),
      dots(rows, effect.n),
      h("p", { class: "caption" }, `Mean probability of the true class in % over ${plural(effect.n, "image")}; whiskers are 95 % intervals (Student's t). Neurons are set to 0 at `
        + `${npprune.tokens().replace(" (mean)", "")} alone; each image is measured with the path of the other half of the class's images. `
        + "Only the path stays: every other hidden unit of every block is 0 there."));
  }

  function ends(change) {
    if (change[1] === null) return "(one image: no interval)";
    return `(95 % ${points(change[1])} to ${points(change[2])})`;
  }

  /* Means with whiskers, one a line, from 0 to 1; the same numbers stand beside them. */
  function dots(rows, n) {
    return h("div", { class: "dots" }, rows.map(({ label, kind, p, right }) => {
      const [mean, low, high] = p;
      const at = (share) => `${(100 * share).toFixed(2)}%`;
      return h("div", { class: `dot-row ${kind}` },
        h("span", { class: "dot-label" }, label),
        h("span", { class: "track", "aria-hidden": "true" },
          low !== null && h("span", { class: "whisker", vars: { from: at(low), to: at(1 - high) } }),
          h("span", { class: "point", vars: { at: at(mean) } })),
        h("span", { class: "dot-value" }, percent(mean), h("small", {}, ` ${right}/${n} right`)));
    }), h("div", { class: "dot-row axis", "aria-hidden": "true" }, h("span", { class: "scale" },
      ["0", "25", "50", "75", "100"].map((text) => h("span", {}, text)))));
  }

  function followSection(rows) {
    const preferred = npprune.shares(own(), rows).map((block) => block[0][0]);
    const ranked = rows.map((row) => [preferred.filter((j, l) => npprune.pathOf(own(), row, l).includes(j)).length, row])
      .sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    const shown = ranked.filter(([, row]) => npprune.images[row].dense), others = ranked.filter(([, row]) => !npprune.images[row].dense);
    return section("Its images, from those that follow the path to those that leave it",
      h("p", { class: "caption" }, `In so many of the ${npprune.blocks} blocks an image's own path holds the class's most frequent neuron.`),
      shown.length > 0 && h("ul", { class: "gallery" }, shown.map(([held, row]) => h("li", {}, npprune.imageLink(row, {},
        h("span", {}, h("b", {}, `${held} of ${npprune.blocks} blocks`), verdict(row)))))),
      others.length > 0 && h("details", {}, h("summary", {}, `${plural(others.length, shown.length ? "more image" : "image")} without a picture`),
        h("ul", { class: "ids" }, others.map(([held, row]) => h("li", {}, h("a", { href: `#/image/${row}` }, npprune.images[row].id),
          h("small", {}, ` ${held} of ${npprune.blocks}`))))));
  }

  /* What the networks say of an image, in a few words. */
  function verdict(row) {
    const image = npprune.images[row];
    if (!image.dense) return h("small", {}, image.id);
    const [best] = image.dense[0];
    const right = best === image.label;
    const flipped = image.pruned && (image.pruned[0][0] === image.label) !== right;
    return [
      h("small", {}, right ? `right, ${percent(image.p)}` : ["taken for ", npprune.title(best)]),
      flipped && h("small", { class: "warn" }, right ? ["pruned: ", npprune.title(image.pruned[0][0])] : "pruned: right"),
    ];
  }

  /* ------------------------------------------------------------ neurons */

  pages.neurons = () => {
    const rows = npprune.images.map((_, row) => row);
    const shares = npprune.shares(own(), rows);
    return ["Neurons", h("h1", {}, "The neurons of most paths"),
      lead(`Of each block, the neurons that the paths of all ${plural(rows.length, "image")} hold most often, with what excites them.`),
      shares.map((block, l) => section(`Block ${l}`,
        h("ul", { class: "gallery neurons" }, block.slice(0, 8).map(([j, share]) => h("li", {},
          npprune.neuronLink(l, j, h("b", {}, `${l}/${j}`), h("small", {}, ` ${percent(share)} `), npprune.badge(l, j), npprune.exemplars(l, j, 3)))))))];
  };

  pages.neuron = async (block, unit) => {
    const l = Number(block), j = Number(unit), { run } = npprune;
    if (!(l < npprune.blocks && j < run.widths[l] && l >= 0 && j >= 0)) return null;
    const data = npprune.shown[l].has(j) ? (await npprune.piece(`neurons-${l}`))[j] : null;
    const holders = npprune.images.map((_, row) => row).filter((row) => npprune.pathOf(own(), row, l).includes(j));
    const others = run.neurons[l], at = others.indexOf(j);
    const name = `Block ${l}, neuron ${j}`;
    return [name,
      h("p", { class: "kind" }, `hidden unit ${j} of 0 to ${run.widths[l] - 1}, block ${l} of 0 to ${npprune.blocks - 1}`),
      h("h1", {}, name, " ", npprune.badge(l, j)),
      fateText(l, j, data, holders),
      exemplarSection(data),
      lensSection(data, l),
      holderSection(holders),
      at >= 0 && h("nav", { class: "steps", "aria-label": "Other neurons of the block" },
        at > 0 && h("a", { href: `#/neuron/${l}/${others[at - 1]}`, rel: "prev" }, `← ${l}/${others[at - 1]}`),
        at + 1 < others.length && h("a", { href: `#/neuron/${l}/${others[at + 1]}`, rel: "next" }, `${l}/${others[at + 1]} →`))];
  };

  function fateText(l, j, data, holders) {
    const fate = npprune.fate(l, j), said = [];
    said.push(`It is on the path of ${plural(holders.length, "image")}.`);
    if (fate) said.push(`The plan ${fate} it${fate === "removed" ? ", at every token" : ""}.`);
    if (data && data.alone) {
      const { n, change } = data.alone;
      said.push(`Set to 0 alone, at ${npprune.tokens().replace(" (mean)", "")}, it changes the true class's probability by ${points(change[0])} points `
        + `${ends(change)}, on ${plural(n, "image")} whose path holds it.`);
    }
    return lead(said.join(" "));
  }

  function exemplarSection(data) {
    const title = "The images that excite it most";
    if (!data || !data.rows) return section(title, h("p", { class: "missing" },
      npprune.known ? "Not kept: it is on too few paths. `--neurons` keeps more." : "Not known: the images were not at hand when this was built."));
    const lit = h("input", { type: "checkbox", checked: true });
    const list = h("ul", { class: "gallery big" }, data.rows.map((row, i) => h("li", {}, npprune.imageLink(row, { lit: data.lit && data.lit[i] },
      h("span", {}, h("b", {}, number(data.values[i])), h("small", {}, npprune.title(npprune.images[row].label)))))));
    lit.addEventListener("change", () => list.classList.toggle("plain", !lit.checked));
    return section(title,
      data.lit && h("p", {}, h("label", {}, lit, " lit where it fires")),
      list,
      h("p", { class: "caption" }, `The number is its activation at ${npprune.tokens()}, by which they are ranked`
        + (data.values[0] > 0 ? ". " : ": it is above 0 in no image, and these are the nearest. ")
        + "Patches are dark where it is silent and clear where it fires, on one scale for all pictures."));
  }

  function lensSection(data, l) {
    if (!data || !data.up || !data.up.length) return null;
    const most = Math.max(...[...data.up, ...data.down].map(([, value]) => Math.abs(value)));
    const list = (title, entries, kind) => h("div", {}, h("h3", {}, title), h("ol", { class: "labels" }, entries.map(([c, value]) => h("li", {},
      h("span", {}, npprune.classLink(c)), bar(Math.abs(value) / most, kind), h("span", { class: "value" }, `${value > 0 ? "+" : ""}${number(value)}`)))));
    const last = l === npprune.blocks - 1;
    return section("The labels it pushes", h("div", { class: "two" }, list("Up", data.up, ""), list("Down", data.down, "other")),
      h("p", { class: "caption" }, `Its column of fc2 through the last norm and the classifier (logit lens): logits for each unit of activation at ${npprune.tokens().replace(" (mean)", "")}`
        + (last ? "." : `, as if the ${plural(npprune.blocks - 1 - l, "block")} behind it passed it on unchanged; the earlier the block, the less that says.`)));
  }

  function holderSection(holders) {
    const counts = new Map();
    for (const row of holders) counts.set(npprune.images[row].label, (counts.get(npprune.images[row].label) || 0) + 1);
    const ranked = [...counts].map(([c, n]) => [n / npprune.rows.get(c).length, c, n]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    if (!ranked.length) return section("The classes whose paths hold it", h("p", { class: "missing" }, "None: it is on no image's path."));
    return section("The classes whose paths hold it", h("ol", { class: "labels" }, ranked.slice(0, 20).map(([share, c, n]) => h("li", {},
      h("span", {}, npprune.classLink(c)), bar(share), h("span", { class: "value" }, percent(share), h("small", {}, ` ${n} of ${npprune.rows.get(c).length}`))))),
      ranked.length > 20 && h("p", { class: "caption" }, `and ${ranked.length - 20} more`));
  }

  /* ------------------------------------------------------------ an image */

  pages.image = async (text) => {
    const row = Number(text), image = npprune.images[row];
    if (!image) return null;
    const file = image.dense && await npprune.piece(`lit-${Math.floor(row / npprune.run.per_file)}`);
    const seen = file && file[row];
    return [image.id,
      h("p", { class: "kind" }, `image ${row}`),
      h("h1", { class: "file" }, image.id),
      h("div", { class: "beside" },
        npprune.picture(row, { alt: `${npprune.title(image.label)}, as the network sees it`, size: "large" }),
        h("div", {},
          h("p", {}, "True class: ", npprune.classLink(image.label)),
          image.dense ? h("div", { class: "two" }, guesses("Dense network", image.dense, image.label, image.p),
            image.pruned && guesses(`Pruned: ${npprune.run.plan.name}`, image.pruned, image.label, image.q)) : absent("No predictions"))),
      pathSection(row, image, seen),
      h("nav", { class: "steps", "aria-label": "Other images" },
        row > 0 && h("a", { href: `#/image/${row - 1}`, rel: "prev" }, "← image ", String(row - 1)),
        row + 1 < npprune.images.length && h("a", { href: `#/image/${row + 1}`, rel: "next" }, `image ${row + 1} →`))];
  };

  function guesses(title, best, label, own_) {
    const entries = best.some(([c]) => c === label) || own_ === null || own_ === undefined ? best : [...best, [label, own_]];
    return h("div", {}, h("h2", { class: "minor" }, title), h("ol", { class: "labels" }, entries.map(([c, p]) => h("li", { class: c === label ? "true" : null },
      h("span", {}, npprune.classLink(c), c === label && h("small", {}, " true")), bar(p), h("span", { class: "value" }, percent(p, 1))))));
  }

  function pathSection(row, image, seen) {
    const { topk } = npprune.run;
    const shares = npprune.shares(own(), npprune.rows.get(image.label)).map((block) => new Map(block));
    const changes = image.ablated && image.ablated.map((block) => block.map((p) => p - image.p));
    const most = changes ? Math.max(0.01, ...changes.flat().map(Math.abs)) : 1;
    const rows = [];
    for (let l = 0; l < npprune.blocks; l++) {
      npprune.pathOf(own(), row, l).forEach((j, k) => {
        const change = changes && changes[l][k];
        rows.push(h("li", { class: k ? "lower" : "first" },
          h("span", { class: "where" }, k === 0 && h("b", {}, `Block ${l}`)),
          seen && seen.lit && seen.lit[l][k] ? npprune.picture(row, { lit: seen.lit[l][k], size: "tile" }) : h("span", { class: "tile" }),
          h("span", { class: "about" }, npprune.neuronLink(l, j, `neuron ${j}`), " ", npprune.badge(l, j),
            h("small", {}, `on the path of ${percent(shares[l].get(j))} of its class`,
              seen && seen.values[l][k] !== undefined && `; activation ${number(seen.values[l][k])}`)),
          changes && h("span", { class: "change" }, change === undefined ? null : [
            h("span", { class: `swing ${change < 0 ? "down" : "up"}`, "aria-hidden": "true", vars: { share: `${(50 * Math.abs(change) / most).toFixed(1)}%` } }),
            h("span", { class: "value" }, points(change))]),
          npprune.exemplars(l, j, 4)));
      });
    }
    return section("Its path, block by block",
      h("p", { class: "caption" }, seen && seen.lit ? "Of each neuron: this image, lit where it fires (on a scale of its own)" : "Of each neuron: on how many paths it is",
        npprune.known ? "; last, the images that excite it most. " : ". ",
        changes ? `The bar: points of the true class's probability (${percent(image.p, 1)}) that removing this neuron alone, at ${npprune.tokens().replace(" (mean)", "")}, adds or takes. ` : "",
        image.dense && !image.ablated ? "Single neurons were not removed for this image: `npprune explore --ablate N` does it for more." : ""),
      topk > 1 && h("p", { class: "caption" }, `${topk} neurons a block, the strongest first.`),
      h("ol", { class: changes ? "path-list changed" : "path-list" }, rows));
  }
})();
