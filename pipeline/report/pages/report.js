"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { classes, images, tiles } = data; // tiles only with images
const SPLITS = ["train", "val", "test"];
const FIRST = 24; // pictures of a gallery before one asks for more
const MOST_CLASSES = 100; // of a matrix; and mistakes that are listed instead of a larger one
const PALETTE = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#17a2b8", "#d4a017", "#ff7fa8", "#7f7f7f"];

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Names come from outside and may be written in either direction: each is kept to itself.
function named(tag, className, text) {
  const element = made(tag, className);
  element.append(made("bdi", "", text));
  return element;
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0.9995 || share < 0.0005 ? 0 : 1)}%`;
}

function tile(i) {
  const element = made("span", `tile sheet${Math.floor(i / tiles.sheet)}`);
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", images.name[i]);
  const at = i % tiles.sheet, column = at % tiles.columns, row = Math.floor(at / tiles.columns);
  const rows = tiles.rows[Math.floor(i / tiles.sheet)];
  const share = (place, count) => (count > 1 ? `${(100 * place) / (count - 1)}%` : "0%");
  element.style.backgroundSize = `${100 * tiles.columns}% ${100 * rows}%`;
  element.style.backgroundPosition = `${share(column, tiles.columns)} ${share(row, rows)}`;
  return element;
}

function described(i, ...lines) {
  const item = made("div");
  item.append(tile(i), named("div", "", images.name[i]), ...lines);
  return item;
}

function answer(i) {
  const line = made("div");
  const wrong = images.predicted[i] !== images.label[i];
  line.append(named("span", wrong ? "tag wrong" : "tag", classes[images.predicted[i]]), ` ${percent(images.confidence[i])}`);
  if (wrong) line.append(made("br"), "is ", named("span", "tag", classes[images.label[i]]));
  return line;
}

// A list of pictures; those beyond the first are made when somebody asks for them.
function gallery(into, items, picture, className) {
  const list = made("ul", className ? `gallery ${className}` : "gallery");
  const more = made("button", "more");
  let shown = 0;
  function show() {
    for (const item of items.slice(shown, shown + FIRST)) {
      const entry = made("li");
      entry.append(picture(item));
      list.append(entry);
    }
    shown = Math.min(items.length, shown + FIRST);
    more.textContent = `Show more (${items.length - shown} left)`;
    more.hidden = shown >= items.length;
  }
  more.type = "button";
  more.addEventListener("click", show);
  into.replaceChildren(list, more);
  show();
  if (!items.length) into.replaceChildren(made("p", "quiet", "None."));
}

function colourOf(label) {
  if (classes.length <= PALETTE.length) return PALETTE[label];
  return `hsl(${(label * 137.508) % 360} ${55 + 30 * (label % 2)}% ${45 + 8 * (label % 3)}%)`; // turned by the golden angle
}

function order(rows, value) {
  return rows.sort((a, b) => value(b) - value(a));
}

function fillGalleries() {
  const said = images.predicted.map((guess, i) => i).filter((i) => images.predicted[i] >= 0 && images.split[i] === 2);
  const wrong = said.filter((i) => images.predicted[i] !== images.label[i]);
  gallery(document.getElementById("mistakes"), order(wrong, (i) => images.confidence[i]), (i) => described(i, answer(i)));
  gallery(document.getElementById("uncertain"), order([...said], (i) => -images.confidence[i]), (i) => described(i, answer(i)));
}

function fillFindings() {
  const suspects = document.getElementById("suspects");
  if (suspects) {
    gallery(suspects, data.suspects, ({ i, suggested, own }) => {
      const line = made("div");
      line.append("labelled ", named("span", "tag", classes[images.label[i]]), ` (${percent(own)})`, made("br"),
        "looks like ", named("span", "tag", classes[suggested]));
      return described(i, line, made("div", "quiet", SPLITS[images.split[i]]));
    });
  }
  const near = document.getElementById("near");
  if (near) {
    gallery(near, data.near, ([a, b]) => {
      const pair = made("div", "pair");
      for (const i of [a, b]) {
        const crossing = images.split[a] !== images.split[b];
        pair.append(described(i, named("div", "", classes[images.label[i]]), made("div", crossing ? "wrong" : "quiet", SPLITS[images.split[i]])));
      }
      return pair;
    }, "pairs");
  }
}

// What is taken for what, from the cells that are not 0: a matrix, or, where it would be too large to be looked at, its largest mistakes.
function fillConfusion() {
  const table = document.getElementById("confusion");
  const sums = classes.map(() => 0);
  for (const [truth, , count] of data.confusion) sums[truth] += count;
  if (classes.length <= MOST_CLASSES) fillMatrix(table, sums);
  else fillMistaken(table, sums);
}

function fillMatrix(table, sums) {
  const head = table.createTHead().insertRow();
  head.append(made("td"));
  for (const name of classes) head.append(headed("col", name));
  const body = table.createTBody();
  for (const name of classes) {
    const line = body.insertRow();
    line.append(headed("row", name));
    for (let i = 0; i < classes.length; i++) line.insertCell();
  }
  for (const [truth, guess, count] of data.confusion) {
    const shown = counted(truth, guess, count), strong = Math.round(100 * Math.max(0.08, count / sums[truth]));
    shown.style.background = `color-mix(in srgb, ${truth === guess ? "#1f5fbf" : "#b3261e"} ${strong}%, var(--soft))`;
    if (strong > 45) shown.style.color = "#fff";
    body.rows[truth].cells[guess + 1].append(shown);
  }
}

function fillMistaken(table, sums) {
  const found = data.confusion.filter(([truth, guess]) => truth !== guess);
  table.className = "sortable";
  const head = table.createTHead().insertRow();
  for (const name of ["is", "taken for", "images", "share"]) head.append(headed("col", name));
  [...head.cells].slice(2).forEach((cell) => cell.classList.add("number"));
  const body = table.createTBody();
  for (const [truth, guess, count] of order(found, ([, , count]) => count).slice(0, MOST_CLASSES)) {
    const line = body.insertRow();
    for (const name of [classes[truth], classes[guess]]) line.insertCell().append(made("bdi", "", name));
    for (const [value, shown] of [[count, counted(truth, guess, count)], [count / sums[truth], percent(count / sums[truth])]]) {
      const cell = line.insertCell();
      cell.className = "number";
      cell.dataset.value = value;
      cell.append(shown);
    }
  }
}

function headed(scope, name) {
  const cell = named("th", "", name);
  cell.scope = scope;
  cell.title = name;
  return cell;
}

// How many images of one class are taken for another: a button that shows them, if there are pictures.
function counted(truth, guess, count) {
  const label = `${count} of ${classes[truth]} taken for ${classes[guess]}`;
  if (!images) {
    const text = made("span", "count", String(count));
    text.title = label;
    return text;
  }
  const button = made("button", "count", String(count));
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", label);
  button.title = label;
  button.addEventListener("click", () => {
    document.querySelectorAll("#confusion [aria-pressed=true]").forEach((other) => other.setAttribute("aria-pressed", "false"));
    button.setAttribute("aria-pressed", "true");
    showCell(truth, guess, count);
  });
  return button;
}

function showCell(truth, guess, count) {
  const some = images.predicted.map((_, i) => i).filter((i) => images.split[i] === 2 && images.label[i] === truth && images.predicted[i] === guess);
  const title = made("h3"), found = made("div");
  title.append(named("span", "", classes[truth]), truth === guess ? " known as such: " : " taken for ",
    ...(truth === guess ? [] : [named("span", "", classes[guess]), ": "]), String(count),
    some.length < count ? ` (${some.length} on this page)` : "");
  gallery(found, order(some, (i) => images.confidence[i]), (i) => described(i, answer(i)));
  document.getElementById("cell").replaceChildren(title, found);
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = made("button", "", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending" || (!head.getAttribute("aria-sort") && !head.classList.contains("number"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const body = table.tBodies[0];
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => (head.classList.contains("number") ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b)));
      body.append(...[...body.rows].sort((a, b) => (down ? compare(a, b) : compare(b, a))));
    });
  });
}

function drawMap() {
  const canvas = document.getElementById("map");
  if (!canvas) return;
  const colour = document.getElementById("colour"), tip = document.getElementById("tip"), legend = document.getElementById("legend");
  const context = canvas.getContext("2d");
  let chosen = -1;
  const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const byLabel = (i) => colourOf(images.label[i]);
  const byError = (i) => (images.predicted[i] < 0 ? "#8a8f98" : images.predicted[i] === images.label[i] ? "#1f5fbf" : "#e0362c");
  const bySplit = (i) => ["#8a8f98", "#f28e2b", "#1f5fbf"][images.split[i]];
  const kinds = {
    label: { of: byLabel, entries: classes.map((name, i) => [name, colourOf(i)]) },
    error: { of: byError, entries: [["right", "#1f5fbf"], ["wrong", "#e0362c"], ["was not asked", "#8a8f98"]] },
    split: { of: bySplit, entries: [["train", "#8a8f98"], ["val", "#f28e2b"], ["test", "#1f5fbf"]] },
  };
  const place = (i) => [12 + (images.x[i] / 1000) * (canvas.clientWidth - 24), 12 + (images.y[i] / 1000) * (canvas.clientHeight - 24)];
  function draw() {
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const radius = images.x.length > 3000 ? 2 : 3.2;
    const { of } = kinds[colour.value];
    context.globalAlpha = 0.8;
    const late = (i) => (colour.value === "error" && images.predicted[i] >= 0 && images.predicted[i] !== images.label[i] ? 1 : 0);
    for (const turn of [0, 1]) {
      for (let i = 0; i < images.x.length; i++) {
        if (late(i) !== turn) continue;
        const [x, y] = place(i);
        context.fillStyle = of(i);
        context.beginPath();
        context.arc(x, y, radius, 0, 2 * Math.PI);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    if (chosen >= 0) {
      const [x, y] = place(chosen);
      context.strokeStyle = ink();
      context.lineWidth = 2;
      context.beginPath();
      context.arc(x, y, radius + 4, 0, 2 * Math.PI);
      context.stroke();
    }
  }
  function nearest(x, y, beyond) {
    let best = -1, least = Infinity;
    for (let i = 0; i < images.x.length; i++) {
      const [a, b] = place(i), distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least && (!beyond || beyond(a - x, b - y, i))) [best, least] = [i, distance];
    }
    return [best, Math.sqrt(least)];
  }
  function choose(i) {
    chosen = i;
    tip.hidden = i < 0;
    if (i >= 0) {
      const [x, y] = place(i);
      const lines = [named("div", "tag", classes[images.label[i]]), made("div", "quiet", SPLITS[images.split[i]])];
      if (images.predicted[i] >= 0) lines.push(answer(i));
      tip.replaceChildren(described(i, ...lines));
      tip.style.left = `${Math.max(0, Math.min(x + 12, canvas.clientWidth - 150))}px`;
      tip.style.top = `${y + 12}px`;
    }
    draw();
  }
  canvas.addEventListener("pointermove", (event) => {
    const [i, distance] = nearest(event.offsetX, event.offsetY);
    choose(distance < 16 ? i : -1);
  });
  canvas.addEventListener("pointerleave", () => choose(-1));
  canvas.addEventListener("blur", () => choose(-1));
  canvas.addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") choose(-1);
    if (!ways[event.key]) return;
    event.preventDefault();
    const [dx, dy] = ways[event.key];
    const from = chosen >= 0 ? place(chosen) : [canvas.clientWidth / 2, canvas.clientHeight / 2];
    const ahead = (a, b, i) => i !== chosen && dx * a + dy * b > 0 && Math.abs(dx * b) + Math.abs(dy * a) <= dx * a + dy * b;
    const [i] = nearest(...from, ahead);
    if (i >= 0) choose(i);
  });
  function recolour() {
    const shown = kinds[colour.value].entries.slice(0, 30).map(([name, value]) => {
      const entry = made("li"), dot = made("i");
      dot.style.background = value;
      entry.append(dot, named("span", "", name));
      return entry;
    });
    legend.replaceChildren(...shown);
    draw();
  }
  colour.addEventListener("change", recolour);
  window.addEventListener("resize", draw);
  document.addEventListener("themechange", draw);
  recolour();
}

function offerThemes() {
  const button = document.getElementById("theme");
  const dark = () => {
    const stated = document.documentElement.dataset.theme;
    return stated ? stated === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const tell = () => (button.textContent = dark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    tell();
    document.dispatchEvent(new Event("themechange"));
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    tell();
    document.dispatchEvent(new Event("themechange"));
  });
  tell();
}

offerThemes();
if (data.confusion) fillConfusion();
if (images) {
  fillGalleries();
  fillFindings();
  drawMap();
}
document.querySelectorAll("table.sortable").forEach(makeSortable);
