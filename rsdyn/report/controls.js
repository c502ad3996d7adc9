/* Controls of one name move together; a figure is drawn again when a control that it has changes, when the theme changes,
 and in light colours at one column's width for printing. */
// --- controls ---------------------------------------------------------------------------------------------------

function set(name, value) {
  const controls = document.querySelectorAll(`[data-control="${name}"]`);
  for (const control of controls) {
    if (control.type !== "number") continue;
    const known = JSON.parse(control.dataset.values);
    // a unit that the page does not hold: the nearest number that it does
    if (!known.includes(value)) value = known.reduce((best, u) => (Math.abs(u - value) < Math.abs(best - value) ? u : best));
  }
  values[name] = value;
  for (const control of controls) {
    if (control.type === "range") control.value = JSON.parse(control.dataset.values).indexOf(value);
    else control.value = value;
  }
  for (const output of document.querySelectorAll(`[data-shows="${name}"]`)) output.textContent = JSON.parse(output.dataset.labels)[value];
  for (const [id, plot] of Object.entries(page.plots)) if (plot.controls.includes(name)) draw(id);
}

/* The next option of a control whose options are in an order. */
function step(name, by) {
  const known = JSON.parse(document.querySelector(`[data-control="${name}"]`).dataset.values);
  const next = Math.min(Math.max(known.indexOf(values[name]) + by, 0), known.length - 1);
  set(name, known[next]);
}

function listen() {
  for (const control of document.querySelectorAll("[data-control]")) {
    const name = control.dataset.control;
    control.addEventListener(control.type === "range" ? "input" : "change", () => {
      if (control.type === "range") set(name, JSON.parse(control.dataset.values)[control.value]);
      else if (control.value !== "") set(name, control.value);
    });
  }
  for (const button of document.querySelectorAll("[data-save]")) {
    const { save } = button.dataset;
    button.addEventListener("click", () => Plotly.downloadImage(hosts.get(save), { format: "svg", filename: save, width: 900, height: 500 }));
  }
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => step(button.dataset.of, Number(button.dataset.step)));
  }
}

// --- drawing ----------------------------------------------------------------------------------------------------

const heard = new Set();
function draw(id) {
  const plot = page.plots[id], host = hosts.get(id);
  const made = shown(plot);
  host.previousElementSibling.textContent = made.said;
  const looks = layout(plot.layout);
  if (host.clientWidth < 480) {
    // the legend stands above the plot and takes a line a name or two: the plot keeps its height
    const named = made.traces.filter((trace) => trace.showlegend !== false && trace.type === "scatter").length;
    looks.height += 12 * named;
  }
  host.style.height = `${looks.height}px`; // what a figure goes by when the window's size changes
  const drawn = Plotly.react(host, themed(made.traces), looks, { ...options, staticPlot: printing });
  if (!heard.has(id)) {
    heard.add(id);
    follow(host);
    host.on("plotly_click", (event) => {
      const point = event.points.find((one) => one.data.picks);
      if (point) set(point.data.picks, String(point.customdata));
    });
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
