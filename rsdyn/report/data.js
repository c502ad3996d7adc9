/* The numbers of the page, its colours, and how every figure looks. */
const page = JSON.parse(document.getElementById("data").textContent);
const values = page.values;
const hosts = new Map([...document.querySelectorAll("[data-plot]")].map((host) => [host.dataset.plot, host]));
const PRINTED = 660; // pixels: a column on A4, at a height that lets two figures stand on a page
let printing = false;

// --- data -------------------------------------------------------------------------------------------------------

const decoded = new Map();
function decode(packed) {
  if (!decoded.has(packed)) {
    const bytes = Uint8Array.from(atob(packed.bdata), (character) => character.charCodeAt(0));
    decoded.set(packed, new Float32Array(bytes.buffer));
  }
  return decoded.get(packed);
}

const told = (value, digits = 3) =>
  Number.isFinite(value) ? String(Number(value.toPrecision(digits))).replace("-", "\u2212") : "not defined";

// --- looks ------------------------------------------------------------------------------------------------------

function colour(name) {
  const [token, percent] = name.slice(1).split("/");
  const hex = getComputedStyle(document.documentElement).getPropertyValue("--" + token).trim();
  if (percent === undefined) return hex;
  const channel = (at) => parseInt(hex.slice(at, at + 2), 16);
  return `rgba(${channel(1)},${channel(3)},${channel(5)},${percent / 100})`;
}

function themed(thing) {
  if (typeof thing === "string") return /^@[a-z]/.test(thing) ? colour(thing) : thing;
  if (Array.isArray(thing)) return thing.map(themed);
  if (thing && typeof thing === "object" && !ArrayBuffer.isView(thing)) {
    // packed numbers, and the words of a run, are taken as they are
    if ("bdata" in thing) return thing;
    return Object.fromEntries(Object.entries(thing).map(([key, value]) => [key, WORDS.has(key) ? value : themed(value)]));
  }
  return thing;
}
const WORDS = new Set(["text", "name", "customdata", "y0", "hovertemplate", "ticktext"]);

function layout(own) {
  const { versions, ...rest } = own;
  let chosen = rest;
  for (const [control, each] of Object.entries(versions || {})) chosen = { ...chosen, ...each[values[control]] };
  const ruled = (axis = {}) => ({
    gridcolor: "@rule", linecolor: "@muted", zerolinecolor: "@rule", ticks: "outside", tickcolor: "@muted", ticklen: 4,
    automargin: true, ...axis, title: { standoff: 8, ...(axis.title || {}) },
  });
  return themed({
    height: 320,
    margin: { l: 52, r: 12, t: 8, b: 44 },
    paper_bgcolor: "@paper", plot_bgcolor: "@paper",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "@ink" },
    hoverlabel: { bgcolor: "@faint", bordercolor: "@rule", font: { color: "@ink", size: 12 }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left", font: { size: 11 } },
    hovermode: "closest",
    // zoom and what was switched off in a legend stay, but not for another stream or layer
    uirevision: own.versions ? Object.keys(own.versions).map((name) => values[name]).join() : "kept",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...chosen,
    xaxis: ruled(chosen.xaxis), yaxis: ruled(chosen.yaxis),
    ...(printing ? { width: PRINTED, height: 0.82 * (chosen.height || 320) } : {}),
  });
}

// without Plotly's own buttons: one of them would send the figure to a server
const options = { responsive: true, displayModeBar: false, showSendToCloud: false, displaylogo: false, showTips: false };
