/* Figures that are made here from numbers, as the controls say. */
const widgets = {
  paths(plot) {
    return { traces: shown(plot), layout: plot.layout };
  },

  portrait(plot) {
    const { stream, at } = unit(plot);
    const n = stream.sublayers.length;
    const path = decode(stream.paths).subarray(at * n, (at + 1) * n);
    const slope = Array.from(path, (_, s) =>
      s === 0 ? path[1] - path[0] : s === n - 1 ? path[n - 1] - path[n - 2] : (path[s + 1] - path[s - 1]) / 2);
    const x = Array.from(path, (value) => value - path[0]);
    const y = slope.map((value) => value - slope[0]);
    const ring = (s, width) => ({
      type: "scatter", mode: "markers", x: [x[s]], y: [y[s]], hoverinfo: "skip", showlegend: false,
      marker: { size: 13, symbol: "circle-open", color: "@ink", line: { width } },
    });
    return {
      traces: [
        {
          type: "scatter", mode: "lines+markers", x, y, showlegend: false,
          text: stream.sublayers, hovertemplate: "%{text}<br>activation %{x:.3g}, gradient %{y:.3g}<extra></extra>",
          line: { color: "@muted", width: 1 },
          marker: {
            color: stream.sublayers.map((_, s) => s / stream.sites), colorscale: "Viridis", size: 7,
            symbol: stream.sublayers.map((_, s) => (stream.sites === 2 && s % 2 ? "square" : "circle")),
            colorbar: { title: { text: "layer", side: "right" }, thickness: 10, outlinewidth: 0, len: 0.9 },
          },
        },
        ring(0, 1), ring(n - 1, 2.5),
      ],
      said: `unit ${decode(stream.units)[at]}: ${told(decode(stream.turns)[at])} clockwise turns`,
      layout: {
        height: 340,
        xaxis: { title: { text: "activation, from its start" }, zeroline: true, zerolinecolor: "@muted" },
        yaxis: { title: { text: "gradient, from its start" }, zeroline: true, zerolinecolor: "@muted" },
      },
    };
  },

  place(plot) {
    const { stream, at } = unit(plot);
    const null_ = stream.nulls[values.null];
    const own = decode(stream.turns)[at];
    const number = decode(stream.units)[at];
    if (!null_) {
      return {
        traces: [], said: `${stream.label} was not tested against this null`,
        layout: { height: 340, xaxis: { title: { text: "clockwise turns" } }, yaxis: { title: { text: "surrogates" } } },
      };
    }
    const of = (name) => decode(null_[name])[at];
    const mean = of("mean"), spread = 1.96 * of("std");
    const traces = [];
    const place = null_.counts ? decode(null_.counted).indexOf(at) : -1;
    let top = 1;
    if (place >= 0) {
      const all = decode(null_.counts);
      const bins = all.length / decode(null_.counted).length;
      const counts = Array.from(all.subarray(place * bins, (place + 1) * bins));
      const low = decode(null_.low)[place], high = decode(null_.high)[place];
      const width = (high - low) / bins;
      top = Math.max(...counts);
      traces.push({
        type: "bar", x: counts.map((_, i) => low + (i + 0.5) * width), y: counts, width, name: `${null_.n} surrogates`,
        marker: { color: "@muted/60", line: { width: 0 } }, hovertemplate: "about %{x:.2f} turns<br>%{y} surrogates<extra></extra>",
      });
    }
    traces.push({
      type: "scatter", mode: "lines+markers", name: "null: mean \u00b1 1.96 SD", x: [mean - spread, mean, mean + spread],
      y: [0, 0, 0].map(() => -0.05 * top), line: { color: "@ink", width: 1.5 }, marker: { symbol: ["line-ns-open", "circle", "line-ns-open"], size: 8, color: "@ink" },
      hovertemplate: "%{x:.3g}<extra>null</extra>",
    });
    traces.push({
      type: "scatter", mode: "lines", name: `unit ${number}`, x: [own, own], y: [0, 1.05 * top], line: { color: "@c1", width: 2.5 },
      hovertemplate: "%{x:.3g} turns<extra>%{fullData.name}</extra>",
    });
    return {
      traces,
      said: `unit ${number}: ${told(own)} turns, null ${told(mean)} \u00b1 ${told(of("std"), 2)}; p = ${told(of("p"), 2)}, q = ${told(of("q_normal"), 2)}`,
      layout: {
        height: 340, bargap: 0, showlegend: false,
        xaxis: { title: { text: "clockwise turns" }, zeroline: false },
        yaxis: { title: { text: place >= 0 ? "surrogates" : "" }, showticklabels: place >= 0, range: [-0.12 * top, 1.1 * top], zeroline: false },
      },
    };
  },

  by_unit(plot) {
    const { stream, at } = unit(plot);
    const turns = decode(stream.turns), units = decode(stream.units), null_ = stream.nulls[values.null];
    const order = ranked(stream);
    const x = order.map((_, i) => i + 1);
    const traces = [];
    let outside = "";
    if (null_) {
      const mean = decode(null_.mean), std = decode(null_.std);
      const known = order.filter((u) => Number.isFinite(mean[u]) && Number.isFinite(std[u]));
      const rank = new Map(order.map((u, i) => [u, i + 1]));
      const ends = (sign) => known.map((u) => mean[u] + sign * 1.96 * std[u]);
      const along = known.map((u) => rank.get(u));
      traces.push({
        type: "scatter", mode: "lines", x: along.concat([...along].reverse()), y: ends(1).concat(ends(-1).reverse()), fill: "toself",
        fillcolor: "@muted/30", line: { width: 0 }, hoverinfo: "skip", name: "null \u00b1 1.96 SD",
      });
      traces.push({
        type: "scatter", mode: "markers", x: along, y: known.map((u) => mean[u]), name: `${flat(null_.label)}: mean`,
        marker: { size: 3, color: "@muted" }, hoverinfo: "skip",
      });
      outside = `${told(null_.beyond)} % of ${null_.tested} units have p < .05 (5 % if the null held)`;
    }
    const p = null_ ? decode(null_.p) : null;
    traces.push({
      type: "scatter", mode: "lines+markers", x, y: order.map((u) => turns[u]), name: flat(stream.label), line: { color: "@ink", width: 1.2 },
      marker: { size: 4.5, color: "@ink" }, customdata: order.map((u) => units[u]),
      text: order.map((u) => `unit ${units[u]}: ${told(turns[u])} turns` + (p ? `<br>p = ${told(p[u], 2)}` : "")),
      hovertemplate: "%{text}<extra></extra>",
    });
    const here = order.indexOf(at);
    traces.push({
      type: "scatter", mode: "markers", x: [here + 1], y: [turns[at]], name: `unit ${units[at]}`, hoverinfo: "skip",
      marker: { size: 15, symbol: "circle-open", color: "@c1", line: { width: 3 } },
    });
    return {
      traces, said: outside,
      layout: {
        height: 340,
        xaxis: { title: { text: "units, sorted by their turns" }, zeroline: false },
        yaxis: { title: { text: "clockwise turns" } },
        legend: { orientation: "h", x: 0, y: -0.22, yanchor: "top", font: { size: 11 } },
      },
      drawn(host) {
        host.on("plotly_click", (event) => {
          const point = event.points.find((one) => one.customdata !== undefined);
          if (point) set("unit", String(point.customdata));
        });
      },
    };
  },

  plane(plot) {
    const data = page.shared[plot.source];
    const [layerName, conditionName, stepsName] = plot.controls;
    const conditions = data.layers[values[layerName]];
    const name = conditions[values[conditionName]] ? values[conditionName] : Object.keys(conditions)[0];
    const found = conditions[name];
    const k = Math.min(Number(values[stepsName]), found.steps - 1);
    const latents = decode(found.latents), relative = decode(found.relative), reference = decode(data.reference);
    const at = data.sublayers - found.steps;
    const x = [], y = [], from = [], to = [], colours = [], text = [];
    for (let point = 0; point < found.points; point++) {
      const here = (step, axis) => latents[(point * found.steps + step) * 2 + axis];
      x.push(here(0, 0), here(k, 0), null);
      y.push(here(0, 1), here(k, 1), null);
      from.push(here(k, 0));
      to.push(here(k, 1));
      const put = relative[point * found.steps], end = relative[point * found.steps + k];
      colours.push(end > 0 ? Math.log10(end) : NaN);
      text.push(`point ${point}<br>distance / norm: ${told(put)} when put in, ${told(end)} after ${k}`);
    }
    const known = colours.filter(Number.isFinite);
    const low = Math.min(...known), high = Math.max(...known);
    const ticks = [-2, -1, -0.5, 0, 0.5, 1, 2].filter((t) => t >= low - 0.01 && t <= high + 0.01);
    const some = ticks.length > 1 ? ticks : [low, high];
    const line = Array.from({ length: data.sublayers }, (_, s) => s);
    const mark = (s, label, filled) => ({
      type: "scatter", mode: "markers", x: [reference[2 * s]], y: [reference[2 * s + 1]], name: label,
      marker: { size: 11, color: "@ink", symbol: filled ? "circle" : "circle-open", line: { width: 2 } }, hoverinfo: "name",
    });
    const note = values[conditionName] === name ? "" : `${values[conditionName]} was not possible at this layer; `;
    return {
      traces: [
        { type: "scatter", mode: "lines", x: line.map((s) => reference[2 * s]), y: line.map((s) => reference[2 * s + 1]),
          name: "unperturbed", line: { color: "@muted", width: 2.5 }, hoverinfo: "skip" },
        { type: "scatter", mode: "lines", x, y, line: { color: "@muted/60", width: 0.9 }, hoverinfo: "skip", showlegend: false },
        { type: "scatter", mode: "markers", x: from, y: to, text, hovertemplate: "%{text}<extra></extra>", showlegend: false,
          marker: { size: 7, color: colours, colorscale: "Viridis", cmin: low, cmax: high, line: { width: 0 },
            colorbar: { title: { text: "distance / norm", side: "right" }, thickness: 10, outlinewidth: 0, len: 0.9,
              tickvals: some, ticktext: some.map((t) => told(10 ** t, 2)) } } },
        mark(at, "at the injection", false), mark(Math.min(at + k, data.sublayers - 1), "then", true),
      ],
      said: `${note}${name} at layer ${values[layerName]}, ${k} sublayer${k === 1 ? "" : "s"} later`,
      layout: {
        height: 440,
        xaxis: { title: { text: data.axes[0] }, zeroline: false }, yaxis: { title: { text: data.axes[1] }, zeroline: false },
        legend: { orientation: "h", x: 0, y: -0.16, yanchor: "top", font: { size: 11 } },
      },
    };
  },
};

function shown(plot) {
  return plot.traces
    .filter((trace) => Object.entries(trace.when || {}).every(([control, value]) => values[control] === value))
    .map(({ when, ...trace }) => trace);
}

// --- units ------------------------------------------------------------------------------------------------------

function streamOf(source) {
  const { streams } = page.shared[source];
  return streams[values.stream] || Object.values(streams)[0];
}

function unit(plot) {
  const stream = streamOf(plot.source);
  const at = decode(stream.units).indexOf(Number(values.unit));
  return { stream, at: at < 0 ? ranked(stream)[0] : at };
}

function ranked(stream) {
  const turns = decode(stream.turns);
  return Array.from(turns.keys()).filter((u) => Number.isFinite(turns[u])).sort((a, b) => turns[a] - turns[b]);
}

function step(by) {
  const stream = streamOf("units"), units = decode(stream.units), order = ranked(stream);
  const now = order.findIndex((u) => units[u] === Number(values.unit));
  const next = Math.min(Math.max((now < 0 ? 0 : now) + by, 0), order.length - 1);
  set("unit", String(units[order[next]]));
}
