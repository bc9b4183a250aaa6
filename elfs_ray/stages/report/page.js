"use strict";
// The map and the gallery. Names of images are text of strangers: they are set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en-US");
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const WHY = {
  near: "near the centre of its group", hard: "left out as too hard", easy: "left out as too easy",
  labelled: "labelled already", duplicate: "almost a copy of another image", pool: "not chosen",
  representative: "stands for near-duplicates",
};

const sources = new Map();
for (const image of document.querySelectorAll("img[data-id]")) sources.set(Number(image.dataset.id), image.src);
for (const [id, text] of Object.entries(data.thumbnails)) {
  sources.set(Number(id), `data:image/${text.startsWith("iVBOR") ? "png" : "jpeg"};base64,${text}`);
}
const kinds = Object.fromEntries(Object.entries(data.kinds).map(([kind, ids]) => [kind, new Set(ids)]));
const items = data.ids.map((id, i) => ({
  id, uri: data.prefix + data.uris[i], rank: data.ranks[i], group: data.groups[i], x: data.x[i], y: data.y[i],
  is: (kind) => kind === "chosen" ? data.ranks[i] >= 0 : Boolean(kinds[kind] && kinds[kind].has(id)),
}));
const hasGroups = items.some((item) => item.group >= 0);
const state = { first: data.total, group: -1, show: "chosen", text: "", page: 0, current: null, selected: new Set() };

// What is shown -------------------------------------------------------------------------------------------------------
const isChosen = (item) => item.rank >= 0 && item.rank < state.first;
const matches = (item) => (state.group < 0 || item.group === state.group) && item.uri.toLowerCase().includes(state.text);
const isOnMap = (item) => matches(item) && (isChosen(item) || item.rank >= 0 || item.is("pool") || item.is(state.show));
const inGallery = () => items.filter((item) => matches(item) && item.is(state.show) && (state.show !== "chosen" || isChosen(item)));

function describe(item) {
  const parts = [];
  if (isChosen(item)) parts.push(`chosen, number ${count(item.rank + 1)} of ${count(data.total)}`);
  else if (item.rank >= 0) parts.push(`number ${count(item.rank + 1)} of the list`);
  else parts.push(WHY[["labelled", "duplicate", "hard", "easy"].find((kind) => item.is(kind)) || "pool"]);
  parts.push(...["near", "representative"].filter(item.is).map((kind) => WHY[kind]));
  if (item.group >= 0) parts.push(`group ${item.group}`);
  return parts.join("; ");
}

function show(item) {
  state.current = item;
  const panel = element("detail");
  panel.replaceChildren();
  if (item) {
    if (sources.has(item.id)) panel.append(picture(item));
    const name = document.createElement("code");
    name.textContent = item.uri;
    const what = document.createElement("span");
    what.textContent = describe(item);
    panel.append(name, what);
  }
  drawMap();
}

function picture(item) {
  const image = document.createElement("img");
  image.src = sources.get(item.id);
  image.alt = item.uri;
  return image;
}

// The gallery ---------------------------------------------------------------------------------------------------------
function drawGallery() {
  const shown = inGallery();
  const numPages = Math.max(1, Math.ceil(shown.length / data.perPage));
  state.page = Math.min(state.page, numPages - 1);
  const start = state.page * data.perPage;
  const tiles = shown.slice(start, start + data.perPage).map(tile);
  element("gallery").replaceChildren(...tiles);
  if (tiles.length) tiles[0].tabIndex = 0;
  const listed = items.filter((item) => item.rank >= 0).length;
  const all = state.show === "chosen" && listed < data.total
    ? ` (this page holds ${count(listed)} of the ${count(data.total)}, spread evenly over the list)` : "";
  element("shown").textContent = plural(shown.length, "image") + all;
  element("page").textContent = `page ${count(state.page + 1)} of ${count(numPages)}`;
  element("previous").disabled = state.page === 0;
  element("next").disabled = state.page === numPages - 1;
  element("first-label").textContent = state.first === data.total
    ? `all ${count(data.total)} of the list` : `the first ${count(state.first)} of the list`;
  drawSelection();
}

function tile(item) {
  const box = document.createElement("div");
  box.className = "tile";
  box.tabIndex = -1;
  box.title = item.uri;
  box.setAttribute("role", "option");
  box.setAttribute("aria-label", `${item.uri}, ${describe(item)}`);
  box.setAttribute("aria-selected", state.selected.has(item));
  if (sources.has(item.id)) box.append(picture(item));
  else {
    const name = document.createElement("span");
    name.textContent = item.uri.slice(data.prefix.length) || item.uri;
    box.append(name);
  }
  const rank = document.createElement("small");
  rank.textContent = item.rank >= 0 ? item.rank + 1 : "";
  box.append(rank);
  box.item = item;
  return box;
}

function toggle(item) {
  if (!state.selected.delete(item)) state.selected.add(item);
  for (const box of element("gallery").children) box.setAttribute("aria-selected", state.selected.has(box.item));
  drawSelection();
  drawMap();
}

function drawSelection() {
  element("selected").textContent = plural(state.selected.size, "image") + " selected";
  element("copy").disabled = element("clear").disabled = state.selected.size === 0;
}

// A line is that of coreset.txt, where a name with a line break is escaped.
const line = (uri) => /[\n\r]|%0A|%0D|%25/.test(uri)
  ? uri.replaceAll("%", "%25").replaceAll("\n", "%0A").replaceAll("\r", "%0D") : uri;

function copySelected() {
  const area = document.createElement("textarea");
  area.value = [...state.selected].map((item) => line(item.uri)).join("\n") + "\n";
  document.body.append(area);
  area.select();
  document.execCommand("copy"); // navigator.clipboard is missing in files that some browsers open
  area.remove();
  element("copy").focus();
  element("selected").textContent = `${plural(state.selected.size, "name")} copied`;
}

const gallery = element("gallery");
gallery.addEventListener("click", (event) => {
  const box = event.target.closest(".tile");
  if (box) toggle(box.item);
});
gallery.addEventListener("mouseover", (event) => {
  const box = event.target.closest(".tile");
  if (box) show(box.item);
});
gallery.addEventListener("focusin", (event) => {
  for (const box of gallery.children) box.tabIndex = box === event.target ? 0 : -1;
  show(event.target.item);
});
gallery.addEventListener("keydown", (event) => {
  const boxes = [...gallery.children];
  const at = boxes.indexOf(event.target);
  const columns = boxes.filter((box) => box.offsetTop === boxes[0].offsetTop).length;
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns, Home: 0, End: boxes.length - 1 }[event.key];
  if (event.key === " " || event.key === "Enter") toggle(event.target.item);
  else if (to === undefined) return;
  else if (boxes[to]) boxes[to].focus();
  event.preventDefault();
});

// The map -------------------------------------------------------------------------------------------------------------
const map = element("map");
const view = { x: 0.5, y: 0.5, zoom: 1 };
const MARGIN = 16;
const colourOf = (item) => item.group < 0 ? css("--pool") : `hsl(${(210 + item.group * 137.508) % 360} 65% ${isDark.matches ? 62 : 45}%)`;
const isDark = matchMedia("(prefers-color-scheme: dark)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function place(item) {
  const width = map.clientWidth - 2 * MARGIN, height = map.clientHeight - 2 * MARGIN;
  return [
    MARGIN + ((item.x - view.x) * view.zoom + 0.5) * width,
    MARGIN + ((view.y - item.y) * view.zoom + 0.5) * height,
  ];
}

function drawMap() {
  const scale = window.devicePixelRatio || 1;
  map.width = map.clientWidth * scale;
  map.height = map.clientHeight * scale;
  const pen = map.getContext("2d");
  pen.scale(scale, scale);
  const shown = items.filter(isOnMap);
  const chosen = shown.filter(isChosen);
  // Many marks would hide each other and the pool; zooming in makes room for larger ones.
  const radius = Math.min(5, Math.max(2, 5 * Math.sqrt(300 * view.zoom / chosen.length)));
  const ink = css("--ink"), accent = css("--line"), chosenColour = css("--chosen");
  for (const item of shown) {
    if (isChosen(item)) continue;
    const [x, y] = place(item);
    pen.globalAlpha = 0.7;
    pen.fillStyle = colourOf(item);
    const side = item.is("labelled") ? 8 : Math.min(4, 1 + radius);
    pen.fillRect(x - side / 2, y - side / 2, side, side);
    if (side > 4) outline(pen, x, y, ink);
  }
  pen.globalAlpha = 1;
  for (const item of chosen) {
    disc(pen, ...place(item), radius, item.group < 0 ? chosenColour : colourOf(item), ink, radius * 0.3);
  }
  for (const item of state.selected) disc(pen, ...place(item), 8, null, accent, 2);
  if (state.current) disc(pen, ...place(state.current), 11, null, ink, 3);
  element("on-map").textContent = `${count(chosen.length)} chosen and ${count(shown.length - chosen.length)} other images`;
}

function disc(pen, x, y, radius, fill, stroke, width) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  if (fill) { pen.fillStyle = fill; pen.fill(); }
  pen.strokeStyle = stroke;
  pen.lineWidth = width;
  pen.stroke();
}

function outline(pen, x, y, ink) {
  pen.globalAlpha = 1;
  pen.strokeStyle = ink;
  pen.lineWidth = 1;
  pen.strokeRect(x - 4, y - 4, 8, 8);
}

function nearest(event) {
  const box = map.getBoundingClientRect();
  let best = null, least = 14;
  for (const item of items) {
    if (!isOnMap(item)) continue;
    const [x, y] = place(item);
    // A chosen image lies on top of others.
    const distance = Math.hypot(x - event.clientX + box.left, y - event.clientY + box.top) - (isChosen(item) ? 3 : 0);
    if (distance < least) [best, least] = [item, distance];
  }
  return best;
}

function zoomBy(factor) {
  view.zoom = Math.min(50, Math.max(1, view.zoom * factor));
  if (view.zoom === 1) view.x = view.y = 0.5;
  drawMap();
}

let drag = null;
map.addEventListener("pointerdown", (event) => {
  drag = { x: event.clientX, y: event.clientY, moved: false };
  map.setPointerCapture(event.pointerId);
});
map.addEventListener("pointermove", (event) => {
  if (!drag) {
    const item = nearest(event);
    if (item && item !== state.current) show(item);
    return;
  }
  const right = event.clientX - drag.x, down = event.clientY - drag.y;
  if (!drag.moved && Math.hypot(right, down) < 4) return;
  view.x -= right / (map.clientWidth - 2 * MARGIN) / view.zoom;
  view.y += down / (map.clientHeight - 2 * MARGIN) / view.zoom;
  drag = { x: event.clientX, y: event.clientY, moved: true };
  drawMap();
});
map.addEventListener("pointerup", (event) => {
  const item = drag && !drag.moved ? nearest(event) : null;
  drag = null;
  if (item) { show(item); toggle(item); }
});
map.addEventListener("pointercancel", () => { drag = null; });
map.addEventListener("wheel", (event) => {
  if (document.activeElement !== map && !event.ctrlKey) return; // else the page could not be scrolled past the map
  event.preventDefault();
  zoomBy(event.deltaY < 0 ? 1.25 : 0.8);
}, { passive: false });
map.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "+" || event.key === "=") zoomBy(1.5);
  else if (event.key === "-") zoomBy(1 / 1.5);
  else if ((event.key === " " || event.key === "Enter") && state.current) toggle(state.current);
  else if (step) {
    const shown = items.filter(isOnMap);
    const at = shown.indexOf(state.current);
    const next = at < 0 ? 0 : (at + step + shown.length) % shown.length;
    if (shown.length) show(shown[next]);
  } else return;
  event.preventDefault();
});

// The controls --------------------------------------------------------------------------------------------------------
function draw() {
  drawGallery();
  drawMap();
  for (const button of element("legend").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.value) === state.group);
  }
}

function change(name, value) {
  state[name] = value;
  state.page = 0;
  draw();
}

function turn(pages) {
  state.page += pages;
  drawGallery();
}

function setGroup(group) {
  element("group").value = group;
  change("group", group);
}

function addGroups() {
  const groups = Object.entries(data.groupSizes);
  for (const [group, [pool, chosen]] of groups) {
    element("group").add(new Option(`group ${group}: ${count(chosen)} of ${count(pool)} chosen`, group));
  }
  groups.sort((a, b) => b[1][0] - a[1][0]);
  for (const [group, [pool, chosen]] of groups.slice(0, 20)) {
    const button = document.createElement("button");
    button.value = group;
    button.title = `${count(chosen)} of ${count(pool)} chosen`;
    const key = document.createElement("span");
    key.className = "key";
    key.style.background = colourOf({ group: Number(group) });
    button.append(key, group);
    button.addEventListener("click", () => setGroup(Number(group) === state.group ? -1 : Number(group)));
    element("legend").append(button);
  }
  if (groups.length > 20) element("legend").append(`and ${groups.length - 20} smaller groups`);
}

element("first").max = data.total; // before the value, which it limits
element("first").value = data.total;
element("first").addEventListener("input", (event) => change("first", Number(event.target.value)));
element("group").addEventListener("change", (event) => setGroup(Number(event.target.value)));
element("show").addEventListener("change", (event) => change("show", event.target.value));
element("search").addEventListener("input", (event) => change("text", event.target.value.toLowerCase()));
element("previous").addEventListener("click", () => turn(-1));
element("next").addEventListener("click", () => turn(1));
element("all").addEventListener("click", () => { inGallery().forEach((item) => state.selected.add(item)); draw(); });
element("clear").addEventListener("click", () => { state.selected.clear(); draw(); });
element("copy").addEventListener("click", copySelected);
element("zoom-in").addEventListener("click", () => zoomBy(1.5));
element("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
element("zoom-reset").addEventListener("click", () => zoomBy(0));
for (const option of [...element("show").options]) {
  if (!items.some((item) => item.is(option.value))) option.remove();
}
for (const part of document.querySelectorAll(".with-script")) part.hidden = false;
if (hasGroups) addGroups();
element("group-control").hidden = !hasGroups;
element("labelled-key").hidden = !items.some((item) => item.is("labelled"));
gallery.setAttribute("role", "listbox");
gallery.setAttribute("aria-label", "Images");
gallery.setAttribute("aria-multiselectable", "true");
new ResizeObserver(drawMap).observe(map.parentElement);
isDark.addEventListener("change", drawMap);
drawGallery();
show(inGallery()[0] || null);
