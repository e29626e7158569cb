"use strict";
/* Pictures of images, and the patches of them at which a neuron fires. */

(() => {
  const { h } = npprune;
  const SMALL = 64; // pixels of an input below which a picture is drawn with hard edges
  let inside; // pictures within the page, as one file has them

  npprune.picturesReady = async () => {
    if (document.querySelector("script[data-name]")) inside = await npprune.piece("pictures");
  };

  function source(row) {
    if (inside) return inside[row];
    return `thumbs/${String(row).padStart(6, "0")}.${npprune.run.ending}`;
  }

  /* One image; `lit`: a hexadecimal digit for each patch. `alt` "" where a text stands beside it. */
  npprune.picture = (row, { lit = null, alt = "", size = "" } = {}) => {
    const image = npprune.images[row];
    const [height, width] = npprune.run.size;
    const frame = h("span", { class: `picture ${size}`, vars: { shape: `${width} / ${height}` } });
    if (!image.dense) {
      frame.classList.add("missing");
      frame.append(h("span", {}, "no picture"));
      return frame;
    }
    frame.append(h("img", {
      src: source(row), alt, loading: "lazy", decoding: "async", width, height,
      class: Math.max(width, height) < SMALL ? "hard" : null,
    }));
    if (lit && npprune.run.grid) frame.append(veil(lit));
    return frame;
  };

  /* Dark where a neuron is silent, clear where it fires. */
  function veil(lit) {
    const [down, across] = npprune.run.grid;
    const canvas = h("canvas", { class: "veil", width: across, height: down, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(across, down);
    for (let i = 0; i < lit.length; i++) {
      const level = parseInt(lit[i], 16) / 15;
      pixels.data.set([8, 12, 18, Math.round(190 * (1 - level) ** 2)], 4 * i);
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  /* The first images of some rows that have a picture. */
  npprune.pictured = (rows, count) => rows.filter((row) => npprune.images[row].dense).slice(0, count);

  npprune.imageLink = (row, options, ...inside) => h("a",
    { href: `#/image/${row}`, class: "thumb", "aria-label": inside.length ? null : `image ${npprune.images[row].id}` },
    npprune.picture(row, options), inside);

  /* The images that excite a neuron most, as small pictures; filled in when its data is there. */
  npprune.exemplars = (l, j, count) => {
    const strip = h("span", { class: "strip" });
    if (!npprune.known || !npprune.shown[l].has(j)) return strip;
    for (let i = 0; i < count; i++) strip.append(h("span", { class: "picture waiting", vars: { shape: "1 / 1" } }));
    const show = async () => {
      const data = (await npprune.piece(`neurons-${l}`))[j];
      strip.replaceChildren(...(data.rows || []).slice(0, count).map((row, i) =>
        npprune.picture(row, { lit: data.lit && data.lit[i], alt: npprune.title(npprune.images[row].label) })));
    };
    whenSeen(strip, show);
    return strip;
  };

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      entry.target.whenSeen();
    }
  }, { rootMargin: "300px" });

  function whenSeen(element, act) {
    element.whenSeen = act;
    watcher.observe(element);
  }
  npprune.whenSeen = whenSeen;
})();
