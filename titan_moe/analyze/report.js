// Choices and search. Without this script the page shows the same figures, of one layer.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
document.documentElement.classList.add("has-script");

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const make = (name, text = "", className = "") => Object.assign(document.createElement(name), { textContent: text, className });

// --- Maps: numbers of single cells, and maps of other layers

// A place on a scale, 0 to 1, of a number, and back.
const place = (map, value) => {
  const share = map.isLog ? Math.log(Math.max(value, 1e-9) / map.low) / Math.log(map.high / map.low) : (value - map.low) / (map.high - map.low);
  return Math.min(1, Math.max(0, share));
};
const valueAt = (map, share) => map.isLog ? map.low * (map.high / map.low) ** share : map.low + share * (map.high - map.low);

// Numbers of many experts come as one byte each: what is off the scale stays unknown.
function unpack(map, values) {
  if (typeof values !== "string") return { values };
  const levels = [...bytesOf(values)];
  return { values: levels.map((level) => level === 255 ? null : valueAt(map, level / 254)), isRough: true };
}

function picture(map, values) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [map.columns.length, map.rows.length];
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height), last = map.palette.length / 6 - 1;
  values.forEach((value, index) => {
    if (value === null) return;
    const at = 6 * Math.round(place(map, value) * last);
    for (let part = 0; part < 3; part++) image.data[4 * index + part] = parseInt(map.palette.slice(at + 2 * part, at + 2 * part + 2), 16);
    image.data[4 * index + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

class Reader {
  constructor(figure, map) {
    [this.figure, this.map, this.row, this.column] = [figure, map, 0, 0];
    this.svg = figure.querySelector("svg");
    this.image = figure.querySelector("image[id$='-map']");
    this.output = make("output", "", "read");
    this.output.setAttribute("aria-live", "polite");
    this.svg.after(this.output);
    this.svg.setAttribute("tabindex", "0");
    this.cursor = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    this.cursor.setAttribute("class", "cursor");
    this.cursor.setAttribute("transform", this.image.getAttribute("transform"));
    this.cursor.setAttribute("visibility", "hidden");
    for (const side of ["width", "height"]) this.cursor.setAttribute(side, 1);
    this.image.after(this.cursor);
    this.image.addEventListener("pointermove", (event) => this.point(event));
    this.image.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("focus", () => { if (this.svg.matches(":focus-visible")) this.tell(); });
    this.svg.addEventListener("keydown", (event) => this.move(event));
    this.hint();
  }
  hint() {
    this.cursor.setAttribute("visibility", "hidden");
    this.output.textContent = "";
  }
  point(event) {
    const box = this.image.getBoundingClientRect();
    this.column = Math.floor((event.clientX - box.left) / box.width * this.map.columns.length);
    this.row = Math.floor((event.clientY - box.top) / box.height * this.map.rows.length);
    this.tell();
  }
  move(event) {
    const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [0, 0];
    if (!right && !down) return;
    event.preventDefault();
    [this.column, this.row] = [this.column + right, this.row + down];
    this.tell();
  }
  tell() {
    const { map, values, isRough } = this;
    this.column = Math.min(map.columns.length - 1, Math.max(0, this.column));
    this.row = Math.min(map.rows.length - 1, Math.max(0, this.row));
    this.cursor.setAttribute("x", this.column);
    this.cursor.setAttribute("y", this.row);
    this.cursor.setAttribute("visibility", "visible");
    const value = values[this.row * map.columns.length + this.column];
    let text = "no number";
    if (value !== null) {
      const sign = !isRough ? "" : value >= map.high ? "at least " : value <= map.low ? "at most " : "about ";
      text = sign + Number(value.toPrecision(isRough ? 2 : 3)) + map.unit;
    }
    this.output.textContent = `${map.row} ${map.rows[this.row]}, ${map.column} ${map.columns[this.column]}: ${text}`;
  }
}

for (const [name, map] of Object.entries(data.maps)) Object.assign(new Reader(byId(name), map), unpack(map, map.values));
const choices = Object.entries(data.choices).map(([name, map]) => new Reader(byId(name), map));

function showLayer(index) {
  byId("chosen-layer").textContent = data.layers[data.offered[index]];
  for (const reader of choices) {
    const values = reader.map.layers[index];
    reader.figure.hidden = values === null;
    if (values === null) continue;
    Object.assign(reader, unpack(reader.map, values));
    reader.image.setAttributeNS("http://www.w3.org/1999/xlink", "href", picture(reader.map, reader.values));
    reader.hint();
  }
}
byId("choose-layer").addEventListener("input", (event) => showLayer(Number(event.target.value)));
showLayer(data.offered.indexOf(data.first));

// --- Search: tokens by their text, experts by their number

const rows = [...document.querySelectorAll(".expert")].map((row) => ({
  row, layer: row.closest(".layer"), expert: row.dataset.expert,
  chips: [...row.querySelectorAll(".chip")].map((chip) => ({ chip, text: chip.firstChild.textContent.slice(0, -1).replaceAll("␣", " ").toLowerCase() })),
}));
const open = new Map([...document.querySelectorAll(".layer")].map((layer) => [layer, layer.open]));
let hits = [], current = -1;

function search(query) {
  const text = query.toLowerCase(), number = (names) => (text.match(new RegExp(`^(?:.*\\s)?(?:${names})\\s*(\\d+)\\b`)) || [])[1];
  const layer = number("layer|l"), expert = number("expert|e"), byNumber = layer !== undefined || expert !== undefined;
  [hits, current] = [[], -1];
  for (const one of rows) {
    let found = false;
    for (const { chip, text: token } of one.chips) {
      const hit = text !== "" && !byNumber && token.includes(text);
      chip.classList.toggle("hit", hit);
      found ||= hit;
    }
    if (byNumber) found = (layer === undefined || one.layer.dataset.layer === layer) && (expert === undefined || one.expert === expert);
    one.row.hidden = text !== "" && !found;
    if (text !== "" && found) hits.push(one);
  }
  for (const [element, before] of open) {
    const any = hits.some((one) => one.layer === element);
    element.open = text === "" ? before : any;
    element.hidden = text !== "" && !any;
  }
  byId("hits").textContent = text === "" ? "" : hits.length === 0 ? "none" : `${hits.length} ${hits.length === 1 ? "expert" : "experts"}`;
}
byId("query").addEventListener("input", (event) => search(event.target.value));
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!hits.length) return;
  current = (current + 1) % hits.length;
  hits[current].row.scrollIntoView({ block: "center" });
});

// --- The text in colours

if (data.sample) {
  const { topK, numExperts, none, numTokens, weightStep, classes, classNames } = data.sample;
  const bytes = bytesOf(data.sample.experts), experts = none === 255 ? bytes : new Uint16Array(bytes.buffer), weights = bytesOf(data.sample.weights);
  const tokens = [...document.querySelectorAll(".prose i")], prose = byId("prose"), legend = byId("legend");
  const at = (layer, token, k) => (layer * numTokens + token) * topK + k;
  let layer = data.first, k = 0, only = null, rank = new Map(), chosen = -1;

  const paint = (element, number) => {
    element.className = number === undefined ? "" : number < 8 ? `c${number}` : "o";
    if (number >= 8) element.style.setProperty("--h", Math.round(number * 137.508) % 360);
    else element.removeAttribute("style");
  };

  // Colours go by number while there are eight experts, else by use: the eight used most are told apart best.
  const colour = () => {
    const counts = new Map();
    for (let token = 0; token < numTokens; token++) {
      const expert = experts[at(layer, token, k)];
      if (expert !== none) counts.set(expert, (counts.get(expert) || 0) + 1);
    }
    const order = [...counts].sort((a, b) => numExperts <= 8 ? a[0] - b[0] : b[1] - a[1] || a[0] - b[0]);
    rank = new Map(order.map(([expert], index) => [expert, numExperts <= 8 ? expert : index]));
    tokens.forEach((element, token) => {
      const expert = experts[at(layer, token, k)];
      paint(element, rank.get(expert));
      if (expert === none) delete element.dataset.e;
      else element.dataset.e = expert;
      element.classList.toggle("lit", expert === only);
      element.classList.toggle("current", token === chosen);
    });
    legend.replaceChildren(...order.map(([expert, count]) => {
      const button = make("button", `${expert} · ${Math.round(100 * count / numTokens)}%`);
      button.type = "button";
      paint(button, rank.get(expert));
      button.setAttribute("aria-pressed", expert === only);
      button.setAttribute("aria-label", `Expert ${expert}, ${count} of ${numTokens} tokens`);
      button.dataset.expert = expert;
      return button;
    }));
    prose.classList.toggle("dim", only !== null);
    byId("text-layer").textContent = byId("coloured-layer").textContent = data.layers[layer];
    byId("text-choice").textContent = k === 0 ? "the one with the largest weight" : `the one with the largest weight but ${k}`;
  };

  const tell = (token) => {
    if (token < 0 || token >= numTokens) return;
    tokens[chosen]?.classList.remove("current");
    chosen = token;
    tokens[token].classList.add("current");
    const head = make("p"), chips = make("div", "", "legend"), path = make("p", "", "soft");
    head.append(make("strong", `“${tokens[token].textContent.replaceAll(" ", "␣").replaceAll("\n", "")}”`), ` ${classNames[classes[token]]}, layer ${data.layers[layer]}:`);
    for (let choice = 0; choice < topK; choice++) {
      const expert = experts[at(layer, token, choice)];
      if (expert === none) continue;
      const chip = make("span", `expert ${expert}, weight ${(weights[at(layer, token, choice)] * weightStep).toFixed(2)}`);
      if (rank.has(expert)) { const number = rank.get(expert); chip.className = number < 8 ? `c${number}` : "o"; if (number >= 8) chip.style.setProperty("--h", Math.round(number * 137.508) % 360); }
      chips.append(chip);
    }
    if (!chips.children.length) chips.append(make("span", "no expert"));
    const firsts = data.layers.map((_, index) => experts[at(index, token, 0)]).map((expert) => expert === none ? "–" : expert);
    if (firsts.length > 1) path.textContent = `first choice from layer to layer: ${firsts.join(" → ")}`;
    byId("about").replaceChildren(head, chips, path);
  };

  const number = new Map(tokens.map((element, token) => [element, token]));
  const pointed = (event) => { if (number.has(event.target)) tell(number.get(event.target)); };
  prose.addEventListener("pointerover", pointed);
  prose.addEventListener("click", pointed);
  prose.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    tell(Math.min(numTokens - 1, Math.max(0, chosen + step)));
    tokens[chosen].scrollIntoView({ block: "nearest" });
  });
  legend.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const expert = Number(button.dataset.expert);
    only = only === expert ? null : expert;
    colour();
    legend.querySelector(`[data-expert="${expert}"]`).focus();
  });
  byId("colour-layer").addEventListener("input", (event) => { [layer, only] = [Number(event.target.value), null]; colour(); tell(chosen); });
  byId("colour-choice")?.addEventListener("change", (event) => { [k, only] = [Number(event.target.value), null]; colour(); tell(chosen); });
  byId("numbers").addEventListener("change", (event) => prose.classList.toggle("numbered", event.target.checked));
  colour();
}
