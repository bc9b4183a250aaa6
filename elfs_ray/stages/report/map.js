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
  nameGroups(pen, shown, ink);
  for (const item of state.selected) disc(pen, ...place(item), 8, null, accent, 2);
  if (state.current) disc(pen, ...place(state.current), 11, null, ink, 3);
  element("on-map").textContent = `${count(chosen.length)} chosen and ${count(shown.length - chosen.length)} other images`;
}

function nameGroups(pen, shown, ink) {
  pen.font = "600 13px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.lineWidth = 3;
  pen.strokeStyle = css("--back");
  pen.fillStyle = ink;
  for (const button of element("groups").children) {
    const members = shown.filter((item) => item.group === Number(button.value)).map(place);
    if (!members.length) continue;
    const [x, y] = [0, 1].map((axis) => members.map((point) => point[axis]).sort((a, b) => a - b)[members.length >> 1]);
    pen.strokeText(button.value, x, y - 14);
    pen.fillText(button.value, x, y - 14);
  }
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
    const shown = inOrder(items.filter(isOnMap));
    const at = shown.indexOf(state.current);
    const next = at < 0 ? 0 : (at + step + shown.length) % shown.length;
    if (shown.length) show(shown[next]);
  } else return;
  event.preventDefault();
});
