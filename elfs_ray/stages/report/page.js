"use strict";
// What is shown, and the gallery; map.js and controls.js follow it in the same script. Names of images are text of strangers: they are set as text, never as HTML.
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
const setsOf = (kinds) => Object.fromEntries(Object.entries(kinds).map(([kind, ids]) => [kind, new Set(ids)]));
const kinds = setsOf(data.kinds);
const items = data.ids.map((id, i) => ({
  id, uri: data.prefix + data.uris[i], rank: -1, group: data.groups[i], x: data.x[i], y: data.y[i],
  is(kind) {
    return kind === "chosen" ? this.rank >= 0 : [kinds, list.kinds].some((sets) => sets[kind] && sets[kind].has(id));
  },
}));
const itemOf = new Map(items.map((item) => [item.id, item]));
const lists = data.lists.map((one) => ({ ...one, kinds: setsOf(one.kinds) }));
let list = lists[0]; // the one that is shown
const hasGroups = items.some((item) => item.group >= 0);
const state = { first: 0, group: -1, show: "chosen", text: "", page: 0, current: null, selected: new Set() };

// What is shown -------------------------------------------------------------------------------------------------------
const isChosen = (item) => item.rank >= 0 && item.rank < state.first;
const matches = (item) => (state.group < 0 || item.group === state.group) && item.uri.toLowerCase().includes(state.text);
const isOnMap = (item) => matches(item) && (item.rank >= 0 || ["pool", "labelled", state.show].some((kind) => item.is(kind)));
// By their ranks; those that the list does not have stay in their order.
const inOrder = (shown) => shown.sort((a, b) => (a.rank < 0) - (b.rank < 0) || a.rank - b.rank);
const inGallery = () => inOrder(items.filter(
  (item) => matches(item) && item.is(state.show) && (state.show !== "chosen" || isChosen(item)),
));

function describe(item) {
  const parts = [];
  if (isChosen(item)) parts.push(`chosen, number ${count(item.rank + 1)} of ${count(list.total)}`);
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
  const all = state.show === "chosen" && listed < list.total
    ? ` (this page holds ${count(listed)} of the ${count(list.total)})` : "";
  element("shown").textContent = plural(shown.length, "image") + all;
  element("page").textContent = `page ${count(state.page + 1)} of ${count(numPages)}`;
  element("previous").disabled = state.page === 0;
  element("next").disabled = state.page === numPages - 1;
  element("first-label").textContent = state.first === list.total
    ? `all ${count(list.total)} of the list` : `the first ${count(state.first)} of the list`;
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
