"use strict";
/* Shared by all pages: a run's data, elements made without HTML text, numbers as words.

   Strings from outside (class names, file names) only ever become text nodes or attributes of
   elements that cannot run anything: see `h`. */

const npprune = (() => {
  const pieces = new Map(); // name -> data
  const waiting = new Map(); // name -> [promise, resolve]

  /* Called by the scripts in data/: hands one piece of data over. */
  function take(name, data) {
    pieces.set(name, data);
    if (waiting.has(name)) waiting.get(name)[1](data);
  }

  /* A piece of data: from the page itself, or from its script in data/; null where there is none. */
  function piece(name) {
    if (pieces.has(name)) return Promise.resolve(pieces.get(name));
    const inside = document.querySelector(`script[data-name="${name}"]`);
    if (inside) {
      take(name, JSON.parse(inside.textContent));
      return Promise.resolve(pieces.get(name));
    }
    if (document.querySelector("script[data-name]")) return Promise.resolve(null);
    if (!waiting.has(name)) {
      let resolve;
      const promise = new Promise((done) => { resolve = done; });
      waiting.set(name, [promise, resolve]);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onerror = () => take(name, null);
      document.head.append(script);
    }
    return waiting.get(name)[0];
  }

  const SVG = "http://www.w3.org/2000/svg";

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") {
        for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
      } else if (name === "vars") {
        for (const [key, v] of Object.entries(value)) element.style.setProperty(`--${key}`, v);
      } else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
    return element;
  }

  /* An element with attributes and children; strings become text. */
  function h(tag, attributes, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  function s(tag, attributes, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  function percent(share, digits = 0) {
    if (share === null || share === undefined) return "–";
    const value = 100 * share;
    if (value > 0 && value < 0.5 * 10 ** -digits) return `<${10 ** -digits}\u00a0%`;
    return `${value.toFixed(digits)}\u00a0%`;
  }

  /* A change of a share in points, with its sign. */
  function points(change, digits = 1) {
    const text = (100 * change).toFixed(digits);
    const zero = Number(text) === 0;
    return `${zero ? "" : change > 0 ? "+" : "−"}${zero ? Math.abs(text).toFixed(digits) : text.replace("-", "")}`;
  }

  function number(value, digits = 2) {
    const text = value.toFixed(digits);
    const small = value !== 0 && Number(text) === 0; // as little as it is, rather than -0.00
    return (small ? Number(value.toPrecision(1)).toString() : Number(text) === 0 ? text.replace("-", "") : text).replaceAll("-", "−");
  }

  function plural(count, one, many) {
    return `${count.toLocaleString("en")} ${count === 1 ? one : many || `${one}s`}`;
  }

  return { take, piece, h, s, percent, points, number, plural, pages: {} };
})();

/* What the pages know of the run: set once by app.js, then read everywhere. */
npprune.open = async () => {
  const [run, images, paths, effects] = await Promise.all(
    ["run", "images", "paths", "effects"].map(npprune.piece));
  const rows = new Map(); // class -> rows of its images
  images.forEach((image, row) => {
    if (!rows.has(image.label)) rows.set(image.label, []);
    rows.get(image.label).push(row);
  });
  const keys = new Map(); // class -> its word in addresses, and back
  const classes = new Map();
  for (const [c] of run.classes) {
    const synset = run.labels[c] && run.labels[c][1];
    const key = synset && !classes.has(synset) ? synset : String(c);
    keys.set(c, key);
    classes.set(key, c);
    classes.set(String(c), c);
  }
  const kept = run.plan && run.plan.keep.map((units) => new Set(units));
  const shown = run.neurons.map((units) => new Set(units));
  Object.assign(npprune, { run, images, paths, effects: effects || {}, rows, keys, classes, kept, shown });
  npprune.blocks = run.widths.length;
  npprune.known = images.some((image) => image.dense);
};

/* A class's name without its synonyms. */
npprune.title = (c) => (npprune.run.labels[c] ? npprune.run.labels[c][0].split(",")[0] : String(c));
npprune.fullName = (c) => (npprune.run.labels[c] ? npprune.run.labels[c][0] : String(c));

npprune.classLink = (c, ...inside) => npprune.h("a",
  npprune.keys.has(c) ? { href: `#/class/${encodeURIComponent(npprune.keys.get(c))}` } : { class: "nowhere" },
  inside.length ? inside : npprune.title(c));

/* "kept", "removed", or null without a plan. */
npprune.fate = (l, j) => (npprune.kept ? (npprune.kept[l].has(j) ? "kept" : "removed") : null);

npprune.badge = (l, j) => {
  const fate = npprune.fate(l, j);
  return fate && npprune.h("span", { class: `badge ${fate}` }, fate);
};

npprune.neuronLink = (l, j, ...inside) => npprune.h("a",
  { href: `#/neuron/${l}/${j}`, class: `neuron ${npprune.fate(l, j) || ""}` },
  inside.length ? inside : `${l}/${j}`);

/* The neurons of an image's path in block l, best first. */
npprune.pathOf = (method, row, l) => {
  const { topk } = npprune.run;
  return npprune.paths[method][row].slice(l * topk, (l + 1) * topk);
};

/* Tokens that a neuron is read at, in words. */
npprune.tokens = () => ({ cls: "the class token", patch: "the patches (mean)", all: "all tokens (mean)" })[npprune.run.scope];
