"use strict";
// Text from outside (names, expressions, messages) only ever becomes textContent or an attribute.
const risam = (() => {
  const PER_PAGE = 48, KEPT = 192, SHOWN = 6, AT_ONCE = 8;
  const SVG = "http://www.w3.org/2000/svg";
  const find = (id) => document.getElementById(id);
  const head = JSON.parse(find("head").textContent);
  const number = new Intl.NumberFormat("en");
  const rows = [];
  const items = new Map(); // small pictures in memory, the least recently used first
  const hidden = new Set(); // "row:expression" of masks that were put out
  let view = [], page = 0, filesIn = 0, lost = [], observer = null, large = -1, due = 0;

  // --- building --------------------------------------------------------------------------------

  function make(tag, className, text, more = {}) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(more)) node.setAttribute(name, value);
    return node;
  }
  function draw(tag, more) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(more)) node.setAttribute(name, value);
    return node;
  }
  const tint = (index) => head.colors[index % head.colors.length];
  const percent = (score) => (score === null ? "no score" : `${Math.round(100 * score)} %`);
  const address = (path) => path.split("/").map(encodeURIComponent).join("/");

  // --- files beside the page -------------------------------------------------------------------

  function script(path, done, failed) {
    const node = document.createElement("script");
    node.src = address(path);
    node.dataset.path = path;
    node.onload = () => { node.remove(); done(); };
    node.onerror = () => { node.remove(); failed(); };
    document.head.append(node);
  }
  function item(value) {
    const path = document.currentScript.dataset.path;
    items.set(path, value);
    for (const old of items.keys()) {
      if (items.size <= KEPT) break;
      items.delete(old);
    }
  }
  function withItem(path, use, failed) {
    if (items.has(path)) {
      const value = items.get(path);
      items.delete(path);
      items.set(path, value);
      use(value);
    } else script(path, () => items.has(path) && use(items.get(path)), failed);
  }
  function data(index, more) {
    for (const row of more) rows.push(row);
  }
  function loadData(index) {
    if (index >= head.files) return;
    const path = `data/${String(index).padStart(5, "0")}.js`;
    const next = () => { filesIn = index + 1; refresh(); setTimeout(loadData, 0, index + 1); };
    script(path, next, () => { lost.push(path); next(); });
  }

  // --- what is shown ---------------------------------------------------------------------------

  function wanted() {
    const state = document.querySelector("input[name=state]:checked").value;
    const bound = (id, usual) => {
      const value = find(id).valueAsNumber;
      return Number.isNaN(value) ? usual : Math.min(100, Math.max(0, value));
    };
    return {
      words: find("text").value.toLowerCase().split(/\s+/).filter(Boolean),
      state, low: bound("low", 0) / 100, high: bound("high", 100) / 100, sort: find("sort").value,
    };
  }
  function entryOf(index, w) {
    const row = rows[index], name = row.i.toLowerCase();
    const says = (text) => {
      const all = `${text.toLowerCase()} ${name}`;
      return w.words.every((word) => all.includes(word));
    };
    const whole = w.low <= 0 && w.high >= 1;
    const answers = [], failures = [];
    (row.e || []).forEach(([, text, score, none], k) => {
      const fits = w.state === "all" || (w.state === "none" && none !== 0) || (w.state === "mask" && none === 0);
      const within = score === null ? whole : score >= w.low && score <= w.high;
      if (fits && within && says(text)) answers.push(k);
    });
    (row.f || []).forEach(([, text, message], k) => {
      const fits = w.state === "failed" || (w.state === "all" && whole);
      if (fits && says(`${text} ${message}`)) failures.push(k);
    });
    return answers.length || failures.length ? { index, answers, failures } : null;
  }
  function select() {
    const w = wanted(), found = [];
    for (let index = 0; index < rows.length; index++) {
      const entry = entryOf(index, w);
      if (entry) found.push(entry);
    }
    if (w.sort === "order") return found;
    const scores = (entry) => entry.answers.map((k) => rows[entry.index].e[k][2]).filter((score) => score !== null);
    const keys = {
      low: (entry) => (scores(entry).length ? Math.min(...scores(entry)) : 2),
      high: (entry) => (scores(entry).length ? -Math.max(...scores(entry)) : 2),
      many: (entry) => -(entry.answers.length + entry.failures.length),
    };
    if (w.sort === "name") {
      const order = new Intl.Collator("en", { numeric: true }).compare;
      return found.sort((a, b) => order(rows[a.index].i, rows[b.index].i) || a.index - b.index);
    }
    for (const entry of found) entry.key = keys[w.sort](entry);
    return found.sort((a, b) => a.key - b.key || a.index - b.index);
  }

  function region(index, k, outline) {
    const group = draw("g", { class: `region${hidden.has(`${index}:${k}`) ? " off" : ""}` });
    group.dataset.k = k;
    group.style.setProperty("--tint", tint(k));
    group.append(draw("path", { class: "rim", d: outline }), draw("path", { class: "mask", d: outline }));
    return group;
  }
  function fill(svg, entry, value) {
    svg.setAttribute("viewBox", `0 0 ${value.w} ${value.h}`);
    const picture = draw("image", { width: value.w, height: value.h });
    picture.setAttribute("href", value.src);
    const outlines = entry.answers.filter((k) => value.paths[k]).map((k) => region(entry.index, k, value.paths[k]));
    svg.replaceChildren(picture, ...outlines);
    svg.dataset.state = "there";
  }
  function light(svg, k, on) {
    svg.classList.toggle("faint", on);
    for (const group of svg.querySelectorAll(".region")) group.classList.toggle("lit", on && group.dataset.k === String(k));
  }

  function answerLine(entry, k, svg) {
    const [, text, score, none] = rows[entry.index].e[k];
    const key = `${entry.index}:${k}`, line = make("li");
    const ask = make(none ? "div" : "button", `ask${none ? " plain" : ""}`);
    const swatch = make("span", `swatch${none ? " empty" : ""}`, undefined, { "aria-hidden": "true" });
    swatch.style.setProperty("--tint", tint(k));
    ask.append(swatch, make("span", "words", text), make("span", "score", `${["", "no target · ", "empty mask · "][none]}${percent(score)}`));
    if (!none) {
      ask.type = "button";
      ask.title = "show or hide this mask";
      ask.setAttribute("aria-pressed", String(!hidden.has(key)));
      ask.addEventListener("click", () => {
        if (!hidden.delete(key)) hidden.add(key);
        ask.setAttribute("aria-pressed", String(!hidden.has(key)));
        for (const group of svg.querySelectorAll(`.region[data-k="${k}"]`)) group.classList.toggle("off", hidden.has(key));
      });
      for (const [event, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
        ask.addEventListener(event, () => light(svg, k, on && !hidden.has(key)));
      }
    }
    line.append(ask);
    return line;
  }
  function failureLine(entry, k) {
    const [, text, message] = rows[entry.index].f[k];
    const line = make("li", "failed");
    line.append(make("b", "", text ? `failed: ${text}` : "failed"), make("span", "", message));
    return line;
  }
  function lines(entry, svg) {
    return [
      ...entry.answers.map((k) => () => answerLine(entry, k, svg)),
      ...entry.failures.map((k) => () => failureLine(entry, k)),
    ];
  }

  function card(entry, place) {
    const row = rows[entry.index], article = make("article", "card");
    const svg = draw("svg", { class: "picture", role: "img", preserveAspectRatio: "xMidYMid meet" });
    svg.setAttribute("aria-label", row.i);
    const open = row.k ? make("button", "open", undefined, { type: "button", "aria-label": `${row.i}, large` }) : make("div", "open lost", "no picture");
    if (row.k) {
      open.append(svg);
      open.addEventListener("click", () => showLarge(place));
      article.dataset.place = place;
    }
    const list = make("ul", "says"), all = lines(entry, svg);
    list.append(...all.slice(0, SHOWN).map((build) => build()));
    article.append(open, list);
    if (all.length > SHOWN) {
      const more = make("button", "more", `${number.format(all.length - SHOWN)} more`, { type: "button" });
      more.addEventListener("click", () => { list.append(...all.slice(SHOWN).map((build) => build())); more.remove(); });
      article.append(more);
    }
    const filtered = (row.e || []).length + (row.f || []).length - all.length;
    article.append(make("p", "name", filtered ? `${row.i} · ${number.format(filtered)} not shown by the filters` : row.i));
    article.fill = () => withItem(row.k, (value) => fill(svg, entry, value), () => open.replaceChildren(make("span", "lost", `${row.k} is missing`)));
    return article;
  }

  function render() {
    const pages = Math.max(1, Math.ceil(view.length / PER_PAGE));
    page = Math.min(Math.max(0, page), pages - 1);
    const start = page * PER_PAGE, shown = view.slice(start, start + PER_PAGE);
    observer?.disconnect();
    observer = new IntersectionObserver((seen) => {
      for (const one of seen) if (one.isIntersecting) { observer.unobserve(one.target); one.target.fill(); }
    }, { rootMargin: "400px" });
    const built = shown.map((entry, k) => card(entry, start + k));
    find("cards").replaceChildren(...built);
    const pictured = built.filter((article) => article.dataset.place !== undefined);
    for (const article of pictured.slice(0, AT_ONCE)) article.fill();
    for (const article of pictured.slice(AT_ONCE)) observer.observe(article);
    tell(pages);
  }
  function tell(pages) {
    const start = page * PER_PAGE, count = Math.min(PER_PAGE, view.length - start);
    const range = count > 0 ? `${number.format(start + 1)}–${number.format(start + count)} of ${number.format(view.length)} images` : "no images";
    const loading = filesIn < head.files ? ` (loading, ${number.format(rows.length)} of ${number.format(head.counts.images)} read)` : "";
    const text = `${range}, page ${number.format(page + 1)} of ${number.format(pages)}${loading}`;
    for (const node of document.querySelectorAll(".where")) if (node.textContent !== text) node.textContent = text;
    for (const node of document.querySelectorAll("[data-go]")) {
      node.disabled = ["first", "back"].includes(node.dataset.go) ? page === 0 : page >= pages - 1;
    }
    find("nothing").hidden = view.length > 0 || filesIn < head.files;
    if (lost.length) find("counts").textContent = `${counted()} Missing beside this page: ${lost.join(", ")}.`;
  }

  // Once a frame at most: data comes in many files, and typing in many keys.
  let before = "";
  function refresh(keepPage = true) {
    if (!keepPage) page = 0;
    if (due) return;
    due = requestAnimationFrame(() => {
      due = 0;
      view = select();
      const start = page * PER_PAGE;
      const now = JSON.stringify(view.slice(start, start + PER_PAGE));
      const same = now === before && view.length > start;
      before = now;
      if (same) tell(Math.max(1, Math.ceil(view.length / PER_PAGE)));
      else render();
      remember();
    });
  }

  // --- one image, large ------------------------------------------------------------------------

  function showLarge(place) {
    large = place;
    const entry = view[place], row = rows[entry.index];
    const svg = draw("svg", { class: "picture", role: "img", preserveAspectRatio: "xMidYMid meet" });
    svg.setAttribute("aria-label", row.i);
    const frame = make("div", "frame"), side = make("div", "side"), list = make("ul", "says");
    frame.append(svg);
    for (const k of entry.answers) {
      const [id, , , , mask, notes] = row.e[k], facts = make("p", "facts soft", id);
      if (mask) { facts.append(" · "); facts.append(link(mask, "mask")); }
      if (notes) facts.append(` · ${notes.join("; ")}`);
      list.append(answerLine(entry, k, svg), facts);
    }
    list.append(...entry.failures.map((k) => failureLine(entry, k)));
    side.append(make("p", "name", row.s ? `${row.i} · ${row.s[0]} × ${row.s[1]}` : row.i), list);
    if (row.o) side.append(link(row.o, "overlay"));
    const dialog = find("large");
    dialog.querySelector(".detail").replaceChildren(frame, side);
    dialog.querySelector(".where-large").textContent = `${number.format(place + 1)} of ${number.format(view.length)}`;
    for (const button of dialog.querySelectorAll("[data-step]")) button.disabled = !pictureFrom(place, Number(button.dataset.step));
    if (row.k) withItem(row.k, (value) => fill(svg, entry, value), () => frame.replaceChildren(make("p", "lost", `${row.k} is missing`)));
    if (!dialog.open) dialog.showModal();
  }
  function link(path, text) {
    return make("a", "", text, { href: `../${address(path)}`, target: "_blank", rel: "noopener" });
  }
  function pictureFrom(place, step) {
    for (let next = place + step; next >= 0 && next < view.length; next += step) if (rows[view[next].index].k) return next + 1;
    return 0;
  }
  function step(by) {
    const next = pictureFrom(large, by);
    if (next) showLarge(next - 1);
  }

  // --- controls --------------------------------------------------------------------------------

  function go(where) {
    const last = Math.ceil(view.length / PER_PAGE) - 1;
    page = { first: 0, back: page - 1, on: page + 1, last }[where];
    page = Math.min(Math.max(0, page), Math.max(0, last));
    refresh();
    const top = document.querySelector(".pager").getBoundingClientRect().top;
    if (top < 0) scrollBy(0, top - 8);
  }
  function showMasks(on) {
    find("masks").checked = on;
    document.body.classList.toggle("bare", !on);
  }
  const FIELDS = ["text", "low", "high", "sort"];
  function remember() {
    const state = new URLSearchParams();
    for (const id of FIELDS) if (find(id).value !== usual[id]) state.set(id, find(id).value);
    const show = document.querySelector("input[name=state]:checked").value;
    if (show !== "all") state.set("show", show);
    if (!find("masks").checked) state.set("masks", "off");
    if (page) state.set("page", page + 1);
    try { history.replaceState(null, "", `#${state}`); } catch { /* some browsers: not on file: */ }
  }
  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const id of FIELDS) find(id).value = state.get(id) ?? usual[id];
    if (!find("sort").value) find("sort").value = usual.sort;
    const shown = [...document.querySelectorAll("input[name=state]")];
    (shown.find((radio) => radio.value === state.get("show")) ?? shown[0]).checked = true;
    showMasks(state.get("masks") !== "off");
    page = Math.max(0, (Number.parseInt(state.get("page"), 10) || 1) - 1);
  }
  const usual = {};
  function counted() {
    const c = head.counts, part = (count, one, many) => `${number.format(count)} ${count === 1 ? one : many}`;
    const by = head.model ? `By the model ${head.model}: ` : "";
    return `${by}${part(c.images, "image", "images")}, ${part(c.expressions, "expression", "expressions")}: ` +
      `${part(c.masks, "mask", "masks")}, ${number.format(c.no_target)} with no target, ` +
      (c.empty ? `${number.format(c.empty)} with an empty mask, ` : "") + `${number.format(c.failures)} failed.`;
  }
  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (find("large").open) {
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
      else if (event.key === "m") { showMasks(!find("masks").checked); remember(); }
      else return;
      event.preventDefault();
      return;
    }
    if (event.target.matches("input:not([type=checkbox], [type=radio]), select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "/") find("text").focus();
    else if (event.key === "n") go("on");
    else if (event.key === "p") go("back");
    else if (event.key === "m") { showMasks(!find("masks").checked); remember(); }
    else return;
    event.preventDefault();
  }

  function start() {
    for (const id of FIELDS) usual[id] = find(id).value;
    recall();
    find("counts").textContent = counted();
    find("warning").textContent = head.warning;
    find("warning").hidden = !head.warning;
    for (const [name, value] of Object.entries(head.about)) find("about").append(` · ${name} ${value}`);
    const controls = find("controls");
    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.addEventListener("input", (event) => {
      if (event.target.id === "masks") { showMasks(event.target.checked); remember(); } else refresh(false);
    });
    controls.addEventListener("reset", () => setTimeout(() => { hidden.clear(); before = ""; showMasks(true); refresh(false); }));
    for (const button of document.querySelectorAll("[data-go]")) button.addEventListener("click", () => go(button.dataset.go));
    for (const button of document.querySelectorAll("[data-step]")) button.addEventListener("click", () => step(Number(button.dataset.step)));
    find("large").addEventListener("close", () => {
      const place = large;
      before = "";
      page = Math.floor(place / PER_PAGE);
      refresh();
      requestAnimationFrame(() => requestAnimationFrame(() => document.querySelector(`[data-place="${place}"] .open`)?.focus()));
    });
    addEventListener("hashchange", () => { recall(); refresh(); });
    document.addEventListener("keydown", onKey);
    if (head.files === 0) refresh();
    loadData(0);
  }
  return { data, item, start };
})();
risam.start();
