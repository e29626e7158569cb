"use strict";
/* Which address shows which page, and the search. */

(() => {
  const { h, pages } = npprune;
  const MOST = 12; // results shown
  const main = document.getElementById("main");
  let shown = 0; // counts pages, so that a slow one does not replace a later one

  async function show() {
    const mine = ++shown;
    let words;
    try { words = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent); }
    catch { words = ["nowhere"]; }
    const [name = "start", ...rest] = words;
    const page = Object.hasOwn(pages, name) ? await pages[name](...rest) : null;
    if (mine !== shown) return;
    const [title, ...content] = page || ["Nothing here", h("h1", {}, "Nothing here"),
      h("p", {}, "This run has no such class, neuron or image. ", h("a", { href: "#/" }, "To the start"))];
    document.title = `${title} – neuron paths`;
    document.body.classList.toggle("broad", name === "compare");
    main.replaceChildren(...content.flat(Infinity).filter(Boolean));
    for (const link of document.querySelectorAll(".bar nav a")) {
      const here = { class: "classes", neuron: "neurons" }[name] || name;
      if (link.getAttribute("href") === `#/${here}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (mine > 1) {
      window.scrollTo(0, 0);
      main.focus({ preventScroll: true });
    }
  }

  /* ------------------------------------------------------------ search */

  const box = document.getElementById("search"), list = document.getElementById("found");

  function results(text) {
    const wanted = text.trim().toLowerCase(), found = [];
    if (!wanted) return found;
    const neuron = /^(\d+)\s*[/, ]\s*(\d+)$/.exec(wanted);
    if (neuron && neuron[1] < npprune.blocks && neuron[2] < npprune.run.widths[neuron[1]]) {
      found.push([`#/neuron/${Number(neuron[1])}/${Number(neuron[2])}`, `Block ${Number(neuron[1])}, neuron ${Number(neuron[2])}`, "neuron"]);
    }
    const ranked = [];
    for (const [c] of npprune.run.classes) {
      const [name, synset] = npprune.run.labels[c] || [String(c), null];
      const place = name.toLowerCase().indexOf(wanted);
      const exact = String(c) === wanted || synset === wanted;
      if (exact || place >= 0) ranked.push([exact ? -1 : place, c]);
    }
    ranked.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    for (const [, c] of ranked) found.push([`#/class/${encodeURIComponent(npprune.keys.get(c))}`, npprune.title(c), `class ${c}`]);
    for (let row = 0; row < npprune.images.length && found.length < MOST; row++) {
      if (npprune.images[row].id.toLowerCase().includes(wanted)) found.push([`#/image/${row}`, npprune.images[row].id, "image"]);
    }
    return found.slice(0, MOST);
  }

  function search() {
    const found = results(box.value);
    list.hidden = !box.value.trim();
    list.replaceChildren(...(found.length
      ? found.map(([href, text, kind]) => h("li", {}, h("a", { href }, text, h("small", {}, ` ${kind}`))))
      : [h("li", {}, h("span", {}, "nothing found"))]));
  }

  function close() { list.hidden = true; }

  box.addEventListener("input", search);
  box.addEventListener("focus", search);
  box.form.addEventListener("submit", (event) => {
    event.preventDefault();
    const first = list.querySelector("a");
    if (first) { location.hash = first.getAttribute("href"); box.value = ""; close(); }
  });
  box.form.addEventListener("keydown", (event) => {
    const links = [...list.querySelectorAll("a")], at = links.indexOf(document.activeElement);
    if (event.key === "Escape") { close(); box.focus(); close(); }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || list.hidden) return;
    event.preventDefault();
    (links[at + step] || (step < 0 ? box : links[at]))?.focus();
  });
  list.addEventListener("click", (event) => { if (event.target.closest("a")) { box.value = ""; close(); } });
  document.addEventListener("click", (event) => { if (!box.form.contains(event.target)) close(); });
  document.addEventListener("keydown", (event) => {
    const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey) { event.preventDefault(); box.focus(); }
  });

  function menu() {
    if (npprune.run.plan && npprune.known) {
      document.querySelector(".bar nav").append(h("a", { href: "#/flips" }, "Who pays"));
    }
  }

  Promise.all([npprune.open(), npprune.picturesReady()]).then(() => {
    menu();
    window.addEventListener("hashchange", show);
    show();
  });
})();
