"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const stage = at("stage"), canvas = at("heat"), words = at("words"), readout = at("readout");
  const [rows, columns] = data.grid, [tall, wide] = data.extent;
  // Until something is pointed at or held, the most telling word is lit.
  const state = { expression: 0, hover: null, held: null, opening: true };
  const introduction = readout.cloneNode(true), introductionTitle = at("side-title").textContent;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const percent = (share) =>
    share >= 0.0995 ? `${Math.round(100 * share)} %` : `${(100 * share).toFixed(1)} %`;
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const chosen = (id) => (at(id) ? at(id).value : "mean");
  const current = () => data.expressions[state.expression];

  // --- the maps: bytes in the page, unpacked once -------------------------------------------------

  const maps = () => {
    const all = current().maps, key = `${chosen("block")}/${chosen("head")}`;
    const found = all[key] || all["mean/mean"];
    if (found && !found.open) {
      found.open = true;
      if (found.regions) found.regions.bytes = bytes(found.regions.data);
      if (found.words) found.words.bytes = bytes(found.words.data);
    }
    return found;
  };
  const weightOf = (map, word, cell) =>
    (map.words.bytes[cell * current().words.length + word] / 255) * map.words.peak;

  // --- drawing ------------------------------------------------------------------------------------

  const paint = (pixel) => {
    canvas.width = columns;
    canvas.height = rows;
    canvas.style.width = `${(100 * columns) / wide}%`;
    canvas.style.height = `${(100 * rows) / tall}%`;
    canvas.classList.toggle("cells", !at("smooth") || !at("smooth").checked);
    const image = new ImageData(columns, rows);
    for (let cell = 0; cell < rows * columns; cell++) image.data.set(pixel(cell), 4 * cell);
    canvas.getContext("2d").putImageData(image, 0, 0);
    stage.classList.add("lit");
  };
  const heat = (share) => {
    const color = data.heat[Math.round(255 * Math.min(1, share))];
    return [color[0], color[1], color[2], Math.round(230 * Math.sqrt(Math.min(1, share)))];
  };

  const lightWord = (word) => {
    const map = maps();
    if (!map || !map.regions) return;
    words.children[word].classList.add("shown");
    const one = map.regions, cells = rows * columns, peak = one.peaks[word];
    const end = chosen("scale") === "common" ? Math.max(...one.peaks) : peak;
    paint((cell) => heat(end ? ((one.bytes[word * cells + cell] / 255) * peak) / end : 0));
    const facts = [
      ["highest weight of a region", percent(peak)],
      ["times that of even attention", (peak * data.cells).toFixed(1)],
      ["as spread out as", `${one.spread[word].toFixed(0)} of ${cells} regions`],
      ["in the padding beside the picture", percent(one.padding[word])],
    ].filter((fact) => fact[0][0] !== "i" || one.padding[word] >= 0.0005);
    const told = current().words[word];
    const more = told.special
      ? "A special token of the text encoder, not a word of the expression."
      : told.unknown
        ? "Not in the model's vocabulary: all such words are read as one and the same."
        : "";
    tell(`“${told.text}” looks at`, facts, null, more);
  };

  const lightRegion = (cell) => {
    const map = maps(), told = current().words;
    if (!map || !map.words) return;
    const weights = told.map((_, word) => weightOf(map, word, cell));
    const most = Math.max(...weights);
    const order = weights.map((_, word) => word).sort((a, b) => weights[b] - weights[a]);
    const first = order.find((word) => !told[word].special);
    [...words.children].forEach((button, word) => {
      button.style.setProperty("--w", weights[word] / most);
      button.classList.add("heard");
      button.classList.toggle("first", word === first);
      button.querySelector(".of").textContent = percent(weights[word]);
    });
    const row = Math.floor(cell / columns), column = cell % columns;
    const cursor = at("cursor"), box = stage.querySelector("svg").viewBox.baseVal;
    const high = box.height / tall, broad = box.width / wide;
    cursor.setAttribute("x", column * broad);
    cursor.setAttribute("y", row * high);
    cursor.setAttribute("width", Math.min(broad, box.width - column * broad));
    cursor.setAttribute("height", Math.min(high, box.height - row * high));
    cursor.setAttribute("visibility", "visible");
    const lines = order.map((word) => [told[word], percent(weights[word]), weights[word] / most]);
    tell(`The region in row ${row + 1}, column ${column + 1} is informed by`, lines, true, "");
    return order.slice(0, 3).map((word) => `${told[word].text} ${percent(weights[word])}`).join(", ");
  };

  const overview = () => {
    const map = maps(), told = current().words;
    if (!map || !map.words) return;
    const real = told.map((_, word) => word).filter((word) => !told[word].special);
    if (!real.length) return;
    const best = [];
    for (let cell = 0; cell < rows * columns; cell++) {
      best.push(real.reduce((a, b) => (weightOf(map, b, cell) > weightOf(map, a, cell) ? b : a)));
    }
    const top = Math.max(...best.map((word, cell) => weightOf(map, word, cell)));
    paint((cell) => {
      const share = weightOf(map, best[cell], cell) / top;
      return [...told[best[cell]].color, Math.round(60 + 170 * share)];
    });
    canvas.classList.add("cells");
    const lines = real.map((word) => {
      const count = best.filter((other) => other === word).length;
      return [told[word], `${count} region${count === 1 ? "" : "s"}`, count / best.length, told[word].color];
    });
    const found = lines.filter((line) => line[2] > 0).sort((a, b) => b[2] - a[2]);
    tell("The word that informs most", found, true, "The stronger the colour, the greater its weight.");
  };

  const tell = (title, lines, gauges, more) => {
    at("side-title").textContent = title;
    const table = element("table"), body = element("tbody");
    for (const [name, figure, share, color] of lines) {
      const line = element("tr");
      const head = element("th", "", name.text === undefined ? name : name.text);
      if (name.special) head.append(" ", element("i", "", "special"));
      line.append(head, element("td", "n", figure));
      if (gauges) {
        const cell = element("td", "gauge"), bar = element("i");
        bar.style.setProperty("--w", share);
        if (color) bar.style.background = `rgb(${color.join(",")})`;
        cell.append(bar);
        line.append(cell);
      }
      body.append(line);
    }
    table.append(body);
    readout.replaceChildren(table);
    if (more) readout.append(element("p", "small", more));
  };

  const clear = () => {
    stage.classList.remove("lit");
    at("cursor").setAttribute("visibility", "hidden");
    for (const button of words.children) {
      button.classList.remove("heard", "first", "shown");
      button.style.removeProperty("--w");
      button.querySelector(".of").textContent = " ";
    }
    at("side-title").textContent = introductionTitle;
    readout.replaceChildren(...introduction.cloneNode(true).childNodes);
  };

  // What is pointed at goes before what is held; both may be lit, a word and a region.
  const show = () => {
    clear();
    if (state.held || state.hover) state.opening = false;
    const first = state.opening ? current().telling : null;
    const opening = first === null || (at("overview") && at("overview").checked) ? null : { word: first };
    const lit = [opening, state.held, state.hover].filter(Boolean);
    const word = lit.filter((one) => one.word !== undefined).pop();
    const region = lit.filter((one) => one.cell !== undefined).pop();
    const whole = Boolean(at("overview")) && at("overview").checked && !word;
    if (whole) overview();
    for (const legend of document.querySelectorAll(".legend")) legend.style.visibility = whole ? "hidden" : "";
    if (word) lightWord(word.word);
    if (word && word === opening) {
      readout.append(element("h2", "", introductionTitle), ...introduction.cloneNode(true).childNodes);
    }
    let said = "";
    if (region) said = lightRegion(region.cell);
    if (word && state.hover && state.hover.word !== undefined) lightWord(word.word);
    [...words.children].forEach((button, k) =>
      button.setAttribute("aria-pressed", String(Boolean(state.held) && state.held.word === k)));
    for (const button of at("points").children) {
      const own = Number(button.dataset.cell);
      button.setAttribute("aria-pressed", String(Boolean(state.held) && state.held.cell === own));
    }
    return said;
  };
  const same = (a, b) => a && b && a.word === b.word && a.cell === b.cell;
  const hover = (what) => {
    if (same(what, state.hover) || (!what && !state.hover)) return;
    state.hover = what;
    show();
  };
  const hold = (what) => {
    state.held = same(what, state.held) ? null : what;
    show();
  };

  // --- the expression -----------------------------------------------------------------------------

  const fill = () => {
    const one = current();
    state.hover = state.held = null;
    state.opening = true;
    words.replaceChildren(
      ...one.words.map((told, k) => {
        const button = element("button", told.special ? "word special" : "word");
        button.type = "button";
        button.disabled = !data.looks;
        button.setAttribute("aria-pressed", "false");
        if (told.special) button.title = "a special token of the text encoder, not a word";
        if (told.unknown) button.title = "not in the model's vocabulary";
        const text = element("span", told.unknown ? "strange" : "", told.text);
        button.append(element("span", "bar"), text, element("span", "of", " "));
        button.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && hover({ word: k }));
        button.addEventListener("pointerleave", () => hover(null));
        button.addEventListener("focus", () => button.matches(":focus-visible") && hover({ word: k }));
        button.addEventListener("blur", () => hover(null));
        button.addEventListener("click", () => hold({ word: k }));
        return button;
      }),
    );
    at("answer").textContent = one.answer;
    at("ring").setAttribute("d", one.outline);
    at("ring-halo").setAttribute("d", one.outline);
    show();
  };

  // --- the image ----------------------------------------------------------------------------------

  const clamp = (value, top) => Math.min(top, Math.max(0, value));
  const cellAt = (x, y) =>
    clamp(Math.floor(y * tall), rows - 1) * columns + clamp(Math.floor(x * wide), columns - 1);
  const cellOf = (event) => {
    const box = stage.getBoundingClientRect();
    return cellAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  if (stage.hasAttribute("tabindex")) {
    stage.addEventListener("pointermove", (event) => event.pointerType !== "touch" && hover({ cell: cellOf(event) }));
    stage.addEventListener("pointerleave", () => hover(null));
    stage.addEventListener("blur", () => hover(null));
    stage.addEventListener("click", (event) => hold({ cell: cellOf(event) }));
    stage.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const step = steps[event.key], from = [state.hover, state.held].find((one) => one && one.cell !== undefined);
      if (event.key === "Enter" && from) hold({ cell: from.cell });
      if (!step) return;
      event.preventDefault();
      const cell = from ? from.cell : Math.floor(rows / 2) * columns + Math.floor(columns / 2);
      const row = clamp(Math.floor(cell / columns) + (from ? step[0] : 0), rows - 1);
      const column = clamp((cell % columns) + (from ? step[1] : 0), columns - 1);
      state.hover = { cell: row * columns + column };
      at("said").textContent = `row ${row + 1}, column ${column + 1}: ${show()}`;
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    state.hover = state.held = null;
    state.opening = false;
    if (at("overview")) at("overview").checked = false;
    show();
  });

  data.points.forEach(([x, y], k) => {
    const spot = element("span", "spot", String(k + 1));
    spot.style.left = `${100 * x}%`;
    spot.style.top = `${100 * y}%`;
    stage.append(spot);
    const button = element("button", "point", `point ${k + 1}`), cell = cellAt(x, y);
    button.type = "button";
    button.dataset.cell = cell;
    button.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && hover({ cell }));
    button.addEventListener("pointerleave", () => hover(null));
    button.addEventListener("focus", () => button.matches(":focus-visible") && hover({ cell }));
    button.addEventListener("blur", () => hover(null));
    button.addEventListener("click", () => hold({ cell }));
    at("points").append(button);
  });

  // --- controls -----------------------------------------------------------------------------------

  for (const id of ["block", "head", "scale", "smooth", "overview"]) {
    if (at(id)) at(id).addEventListener("change", show);
  }
  if (at("scale")) {
    at("scale").addEventListener("change", () => {
      at("ramp-end").textContent = chosen("scale") === "own" ? "the map's peak" : "the highest peak of all words";
    });
  }
  at("outline").addEventListener("change", () => {
    for (const id of ["ring", "ring-halo"]) at(id).style.display = at("outline").checked ? "" : "none";
  });
  if (at("expression")) {
    at("expression").addEventListener("change", () => {
      state.expression = Number(chosen("expression"));
      fill();
    });
  }
  for (const [id, value] of Object.entries(data.start)) if (at(id)) at(id).value = value;
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  fill();
})();
