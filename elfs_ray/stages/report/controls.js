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

function drawGroups() {
  const groups = Object.entries(data.groupSizes).map(([group, pool]) => [group, pool, list.groupSizes[group]]);
  const options = groups.map(([group, pool, chosen]) => new Option(`group ${group}: ${count(chosen)} of ${count(pool)} chosen`, group));
  element("group").replaceChildren(new Option("all groups", -1), ...options);
  element("group").value = state.group;
  groups.sort((a, b) => b[1] - a[1]);
  element("groups").replaceChildren(...groups.slice(0, 20).map(groupButton));
  element("more-groups").textContent = groups.length > 20 ? `and ${groups.length - 20} smaller groups` : "";
}

function groupButton([group, pool, chosen]) {
  const button = document.createElement("button");
  button.value = group;
  button.title = `${count(chosen)} of ${count(pool)} chosen`;
  const key = document.createElement("span");
  key.className = "key";
  key.style.background = colourOf({ group: Number(group) });
  button.append(key, group);
  button.addEventListener("click", () => setGroup(Number(group) === state.group ? -1 : Number(group)));
  return button;
}

const showOptions = [...element("show").options];

function showList(position) {
  list = lists[position];
  for (const item of items) item.rank = -1;
  list.ids.forEach((id, i) => { itemOf.get(id).rank = list.ranks[i]; });
  element("list").value = position;
  element("first").max = list.total; // before the value, which it limits
  element("first").value = list.total;
  element("show").replaceChildren(...showOptions.filter((option) => items.some((item) => item.is(option.value))));
  element("show").value = "chosen";
  element("labelled-key").hidden = !items.some((item) => item.is("labelled"));
  Object.assign(state, { first: list.total, show: "chosen", page: 0 });
  if (hasGroups) drawGroups();
  draw();
  show(inGallery()[0] || null);
}

element("list").addEventListener("change", (event) => showList(Number(event.target.value)));
for (const button of document.querySelectorAll(".show-list")) {
  button.addEventListener("click", () => {
    showList(data.lists.findIndex((one) => one.name === button.value));
    element("list").focus(); // which also scrolls to it
  });
}
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
for (const part of document.querySelectorAll(".with-script")) part.hidden = false;
element("group-control").hidden = !hasGroups;
element("list-control").hidden = lists.length === 1;
gallery.setAttribute("role", "listbox");
gallery.setAttribute("aria-label", "Images");
gallery.setAttribute("aria-multiselectable", "true");
new ResizeObserver(drawMap).observe(map.parentElement);
isDark.addEventListener("change", drawMap);
showList(0);
