/* Controls of one name move together; a figure is drawn again when a control that it has changes, when the theme changes,
 and in light colours at one column's width for printing. */
// --- controls ---------------------------------------------------------------------------------------------------

function set(name, value) {
  if (name === "unit") {
    const units = decode(streamOf("units").units);
    if (!units.includes(Number(value))) {
      // a unit that the page does not hold: the nearest number that it does
      value = String(units.reduce((best, u) => (Math.abs(u - Number(value)) < Math.abs(best - Number(value)) ? u : best), units[0]));
    }
  }
  values[name] = value;
  for (const control of document.querySelectorAll(`[data-control="${name}"]`)) {
    if (control.type === "checkbox") control.checked = value === control.dataset.on;
    else if (control.type === "range") control.value = JSON.parse(control.dataset.values).indexOf(value);
    else control.value = value;
  }
  for (const output of document.querySelectorAll(`[data-shows="${name}"]`)) output.textContent = value;
  const follow = name === "unit" ? ["portrait", "place", "by_unit"] : name === "stream" ? ["portrait"] : [];
  for (const [id, plot] of Object.entries(page.plots)) {
    if (plot.controls.includes(name) || follow.includes(plot.widget)) draw(id);
  }
}

function listen() {
  for (const control of document.querySelectorAll("[data-control]")) {
    const name = control.dataset.control;
    control.addEventListener(control.type === "range" ? "input" : "change", () => {
      if (control.type === "checkbox") set(name, control.checked ? control.dataset.on : control.dataset.off);
      else if (control.type === "range") set(name, JSON.parse(control.dataset.values)[control.value]);
      else if (control.value !== "") set(name, control.value);
    });
  }
  for (const button of document.querySelectorAll("[data-save]")) {
    const { save } = button.dataset;
    button.addEventListener("click", () => Plotly.downloadImage(hosts.get(save), { format: "svg", filename: save, width: 900, height: 500 }));
  }
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => step(Number(button.dataset.step)));
  }
}

// --- drawing ----------------------------------------------------------------------------------------------------

const heard = new Set();
function draw(id) {
  const plot = page.plots[id], host = hosts.get(id);
  const made = plot.widget ? widgets[plot.widget](plot) : { traces: shown(plot), layout: plot.layout };
  if (made.said !== undefined) host.previousElementSibling.textContent = made.said;
  const looks = layout(made.layout);
  if (host.clientWidth < 480 && !made.layout.legend) {
    // the legend stands above the plot and takes a line a name or two: the plot keeps its height
    const named = made.traces.filter((trace) => trace.showlegend !== false && trace.type === "scatter").length;
    looks.height += 12 * named;
  }
  host.style.height = `${looks.height}px`; // what a figure goes by when the window's size changes
  const drawn = Plotly.react(host, themed(made.traces), looks, { ...options, staticPlot: printing });
  if (!heard.has(id)) {
    heard.add(id);
    if (made.drawn) made.drawn(host);
    if (plot.widget === "paths") follow(host);
  }
  return drawn;
}

/* The sequence under the pointer is drawn again over the others, in colour. */
function follow(host) {
  let last = -1;
  host.on("plotly_hover", (event) => {
    const point = event.points.find((one) => one.data.paths);
    if (!point || point.customdata === last) return;
    last = point.customdata;
    const length = point.data.paths, from = last * length;
    const part = (axis) => Array.from(decode(point.data[axis]).subarray(from, from + length - 1));
    const path = { type: "scatter", mode: "lines+markers", x: part("x"), y: part("y"), hoverinfo: "skip", name: point.data.text[from].split(",")[0],
      showlegend: false, line: { color: colour("@c1"), width: 2 }, marker: { size: 4, color: colour("@c1") }, followed: true };
    const old = host.data.findIndex((trace) => trace.followed);
    Plotly.react(host, host.data.filter((_, i) => i !== old).concat(path), host.layout, options);
  });
}

async function drawAll() {
  for (const id of Object.keys(page.plots)) await draw(id);
}

async function plotly() {
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (character) => character.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  if (typeof Plotly === "undefined") throw new Error("the drawing library did not start");
}

function ready(state) {
  document.documentElement.dataset.figures = state;
}

async function start() {
  try {
    await plotly();
    listen();
    await drawAll();
  } catch (error) {
    const trouble = document.getElementById("trouble");
    trouble.textContent = `The figures could not be drawn (${error.message}). A browser of 2023 or later is needed; the runs' own figures folders have pictures of them.`;
    trouble.hidden = false;
    ready("failed");
    throw error;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  for (const when of ["beforeprint", "afterprint"]) {
    addEventListener(when, () => {
      printing = when === "beforeprint";
      document.documentElement.toggleAttribute("data-printing", printing);
      Object.keys(page.plots).forEach(draw);
    });
  }
  ready("drawn");
}

start();
