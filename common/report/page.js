"use strict";
// Draws the figures in the colours of the theme, sorts tables, copies their text; keeps what was opened over a reload.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function theme() {
  const [ink, soft, grid, surface] = ["--ink", "--soft", "--grid", "--surface"].map(colour);
  const text = { labelColor: soft, titleColor: soft, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400 };
  return {
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    axis: { ...text, gridColor: grid, domainColor: grid, tickColor: grid, labelLimit: 160 },
    axisQuantitative: { labelOverlap: "greedy" },
    axisX: { tickCount: 5 },
    axisY: { tickCount: 5 },
    legend: { ...text, symbolStrokeWidth: 2, symbolFillColor: soft, symbolStrokeColor: soft },
    view: { stroke: null },
    bar: { color: colour("--c0") },
    text: { color: ink },
    point: { strokeWidth: 2 },
    style: {
      floor: { color: soft, size: 14 },
      ceiling: { color: ink, size: 14 },
      ring: { color: ink, fill: surface, strokeWidth: 1.5 },
      edge: { color: soft, opacity: 0.45, strokeWidth: 1.2 },
      node: { color: surface, strokeWidth: 2, cornerRadius: 4 },
    },
    range: {
      category: [0, 1, 2, 3, 4, 5, 6, 7].map((i) => colour(`--c${i}`)),
      ramp: [colour("--ramp-low"), colour("--ramp-high")],
      diverging: [colour("--minus"), surface, colour("--plus")],
      heatmap: [colour("--line-low"), colour("--line-high")],
    },
  };
}

async function draw() {
  const config = theme();
  for (const place of document.querySelectorAll(".chart")) {
    const spec = (place.spec ??= JSON.parse(place.querySelector("script").textContent));
    place.view?.finalize();
    try {
      const drawn = await vegaEmbed(place, structuredClone(spec), { actions: false, renderer: "svg", ast: true, config });
      place.view = drawn.view;
      place.dataset.drawn = "yes";
    } catch (error) {
      place.dataset.drawn = "no";
      console.error(error);
    }
    await new Promise((next) => setTimeout(next)); // the page answers meanwhile
  }
  document.body.dataset.drawn = "yes";
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  body.written ??= [...body.rows];
  const words = heads[column].textContent === "Method" || heads[column].textContent === "Run";
  const rows = body.written.slice();
  const value = (row) => (words ? row.cells[column].textContent : row.cells[column].dataset.order);
  if (direction !== "none") {
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what has no value is last
      return sign * (words ? x.localeCompare(y) : x - y);
    });
  }
  body.append(...rows);
  heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? direction : "none"));
  table.classList.toggle("sorted", direction !== "none");
}

async function copy(button) {
  const area = button.parentElement.querySelector("textarea");
  const said = button.parentElement.querySelector(".copy-said");
  let done = false;
  try {
    await navigator.clipboard.writeText(area.value);
    done = true;
  } catch {
    area.focus(); // without the right to the clipboard the text is selected
    area.select();
    done = document.execCommand("copy");
  }
  said.textContent = done ? "copied" : "selected: copy it with the keyboard";
}

const kept = {
  get: (key) => { try { return sessionStorage.getItem(`${location.pathname} ${key}`); } catch { return null; } },
  set: (key, value) => { try { sessionStorage.setItem(`${location.pathname} ${key}`, value); } catch { /* not kept */ } },
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const words = table.tBodies[0].rows[0].cells[column].dataset.order === undefined;
    const turns = words ? ["none", "ascending", "descending"] : ["none", "descending", "ascending"];
    const next = turns[(turns.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
    sort(table, column, next);
    kept.set(`sort ${table.dataset.key}`, `${column} ${next}`);
  }));
  const [column, direction] = (kept.get(`sort ${table.dataset.key}`) ?? "").split(" ");
  if (direction && heads[column]) sort(table, Number(column), direction);
}
for (const details of document.querySelectorAll("details[data-key]")) {
  details.open = kept.get(`open ${details.dataset.key}`) === "yes";
  details.addEventListener("toggle", () => kept.set(`open ${details.dataset.key}`, details.open ? "yes" : "no"));
}
for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", () => copy(button));

const written = document.querySelector("time");
const minutes = Math.round((Date.now() - Date.parse(written.dateTime)) / 60000);
if (written.dataset.refresh && minutes >= 10) {
  written.append(` That is ${minutes} minutes ago: one unit takes as long, or the run was killed.`);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
