"use strict";
(() => {
const facts = JSON.parse(document.getElementById("facts").textContent);
const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// ---- small helpers: every text goes through textContent, never through markup
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name === "class") node.className = value;
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null) node.append(child);
  return node;
}
function number(value, digits) { // with a true minus sign, and none before zero
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}
const signed = (value, digits) => (Number(value.toFixed(digits)) > 0 ? "+" : "") + number(value, digits);
const percent = (value, digits = 1) => number(100 * value, digits) + "%";

// ---- colours of the theme
const css = name => getComputedStyle(root).getPropertyValue("--" + name).trim();
const rgb = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
function mix(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
  const a = rgb(stops[low]), b = rgb(stops[low + 1]);
  return "#" + a.map((x, i) => Math.round(x + (b[i] - x) * part).toString(16).padStart(2, "0")).join("");
}
function ink(background) { // black or white, whichever stands out more: 4.5 to 1 at least
  const [r, g, b] = rgb(background).map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}
const scales = () => ({
  sequential: [css("neutral"), css("blue"), css("deep-blue")],
  diverging: [css("deep-orange"), css("orange"), css("neutral"), css("blue"), css("deep-blue")],
});

// ---- components
function strip(images) {
  return make("div", { class: "strip" }, images.map(([id, value]) => {
    const [name, label] = facts.images[id];
    return make("img", {
      src: facts.thumbnails[id], alt: label, title: `${label} · ${name} · ${signed(value, 2)}`,
      class: facts.small ? "small" : null,
    });
  }));
}
function end(name, words, classes, images) {
  const who = classes.map(([label, score]) => `${label} ${signed(score, 1)} σ`).join(", ");
  return make("div", { class: "end" },
    make("b", {}, name), who ? make("span", { class: "who" }, "  " + who) : null,
    words.length ? make("ul", { class: "words", "aria-label": "words" }, words.map(word => make("li", {}, word))) : null,
    images ? strip(images) : null);
}
function card(component, unit) {
  const direction = component.weight > 1 ? "up" : "down";
  return make("article", { class: "card" },
    make("header", {},
      make("h4", {}, `${unit.name}, component ${component.place}`),
      make("span", { class: "weight " + direction, title: "learned weight; 1 is unchanged" }, "× " + number(component.weight, 2))),
    make("p", {}, `${percent(component.explained)} of the ${unit.kind}'s variance · reach ${number(Math.abs(component.effect), 2)}` +
      ` · ${percent(component.separation, 0)} of its spread is between classes`),
    end("High end", component.high, component.classes[0], component.strip && component.strip[0]),
    end("Low end", component.low, component.classes[1], component.strip && component.strip[1]));
}
for (const place of document.querySelectorAll("[data-cards]"))
  for (const [index, at] of facts.cards[place.dataset.cards])
    place.append(card(facts.units[index].components[at], facts.units[index]));

// ---- the weight map
const buttons = [...document.querySelectorAll(".grid button")];
let measure = facts.measures[0];
function paint() {
  const all = scales();
  const stops = measure.centre === null ? all.sequential : all.diverging;
  const values = buttons.map(button => facts.units[button.dataset.unit].values[measure.key]);
  const centre = measure.centre ?? 0;
  const reach = Math.max(...values.map(v => Math.abs(v - centre)), 1e-9);
  buttons.forEach((button, i) => {
    const share = measure.centre === null ? values[i] / reach : 0.5 + (values[i] - centre) / reach / 2;
    const background = mix(stops, share), text = measure.signed ? signed : number;
    button.style.background = background;
    button.style.color = ink(background);
    button.textContent = text(measure.factor * values[i], measure.digits);
    button.setAttribute("aria-label", `${facts.units[button.dataset.unit].name}: ${measure.name} ${button.textContent}${measure.unit}`);
  });
  const text = value => (measure.signed ? signed : number)(measure.factor * value, measure.digits) + measure.unit;
  const low = measure.centre === null ? 0 : centre - reach;
  document.getElementById("legend").replaceChildren(
    text(low), make("i", { style: { background: `linear-gradient(90deg, ${stops.join(", ")})` } }), text(centre + reach));
  document.getElementById("measure-hint").textContent = measure.hint;
}
function table(unit) {
  const most = Math.max(...unit.components.map(c => Math.abs(c.effect)), 1e-9);
  const head = ["component", "variance", "weight", "reach", "", "tells apart"];
  const rows = unit.components.map(c => {
    const width = 50 * Math.abs(c.effect) / most + "%";
    const side = c.effect >= 0 ? { left: "50%" } : { right: "50%" };
    const apart = [c.classes[0][0], c.classes[1][0]].filter(Boolean).map(([name]) => name).join(" from ");
    return make("tr", {},
      make("th", { scope: "row" }, String(c.place)), make("td", { class: "optional" }, percent(c.explained)), make("td", {}, number(c.weight, 2)),
      make("td", {}, signed(c.effect, 2)),
      make("td", { class: "bar optional", "aria-hidden": "true" },
        make("span", {}, make("i", { style: { width, ...side, background: `var(--${c.effect >= 0 ? "blue" : "orange"})` } }))),
      make("td", { class: "left" }, apart));
  });
  return make("div", { class: "scroll" }, make("table", { class: "numbers" },
    make("thead", {}, make("tr", {}, head.map((text, i) =>
      make("th", { scope: "col", class: i === 4 || i === 1 ? "optional" : null, style: i === 5 ? { textAlign: "left" } : {} }, text)))),
    make("tbody", {}, rows)));
}
function choose(button, scroll) {
  for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
  const unit = facts.units[button.dataset.unit], panel = document.getElementById("panel");
  const lead = facts.measures.map(m => `${m.name} ${(m.signed ? signed : number)(m.factor * unit.values[m.key], m.digits)}${m.unit}`);
  if (unit.dimension) lead.push(unit.dimension);
  panel.replaceChildren(make("h3", {}, unit.name[0].toUpperCase() + unit.name.slice(1)), make("p", { class: "lead" }, lead.join(" · ")));
  panel.dataset.unit = button.dataset.unit;
  if (unit.components.length) {
    panel.append(table(unit));
    if (unit.total > unit.components.length)
      panel.append(make("p", { class: "lead" }, `The ${unit.components.length} of ${unit.total} components that reach farthest.`));
    const told = unit.components.filter(c => c.strip || c.high.length);
    if (told.length) panel.append(make("div", { class: "cards" }, told.map(c => card(c, unit))));
  }
  if (scroll) panel.scrollIntoView({ block: "nearest" });
}
function move(button, rows, columns) {
  const cell = button.closest("td"), row = cell.closest("tr");
  const target = row.parentNode.rows[row.sectionRowIndex + rows]?.cells[cell.cellIndex + columns]?.querySelector("button");
  if (target) focusOn(target);
}
function focusOn(button) {
  for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
  button.focus();
}
if (buttons.length) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  for (const button of buttons) {
    button.addEventListener("click", () => { focusOn(button); choose(button, true); });
    button.addEventListener("keydown", event => {
      if (event.key in steps) { event.preventDefault(); move(button, ...steps[event.key]); }
    });
  }
  for (const input of document.querySelectorAll("[name=measure]"))
    input.addEventListener("change", () => { measure = facts.measures.find(m => m.key === input.value); paint(); });
  paint();
  const first = buttons.find(button => button.dataset.unit === String(facts.first)) ?? buttons[0];
  first.tabIndex = 0;
  choose(first, false);
}

for (const button of document.querySelectorAll("[data-save]"))
  button.addEventListener("click", () => {
    const text = new XMLSerializer().serializeToString(document.querySelector(`#chart-${button.dataset.save} svg`));
    const drawn = text.replace(/var\(--([a-z-]+)\)/g, (_, name) => css(name)); // colours as they are now
    const link = make("a", { download: button.dataset.save + ".svg", href: URL.createObjectURL(new Blob([drawn], { type: "image/svg+xml" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  });
dark.addEventListener("change", () => { if (buttons.length) paint(); });
root.dataset.ready = "true";
})();
