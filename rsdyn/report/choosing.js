/* What of a figure is drawn as its controls are: traces by "when", rows of their numbers by "rows". */
function shown(plot) {
  const traces = [], said = [];
  for (const { when, rows, ...trace } of plot.traces) {
    if (!Object.entries(when || {}).every(([control, value]) => values[control] === value)) continue;
    if (rows) {
      let at = rows.keys.indexOf(values[rows.control]);
      if (at < 0 && rows.last) at = rows.keys.length - 1; // the stream has ended by then
      if (at < 0) continue;
      pick(trace, at);
    }
    if (trace.said !== undefined) said.push(filled(trace.said, trace.numbers));
    else traces.push(trace.starts ? ways(trace) : trace);
  }
  return { traces, said: said.join("; ") };
}

/* One row of every array of a trace that has rows; what has none is the same for all. */
function pick(trace, at) {
  const row = (packed) => {
    if (!packed || !packed.bdata || !packed.shape) return packed;
    const n = Number(packed.shape.split(",")[1]);
    return decode(packed).subarray(at * n, (at + 1) * n);
  };
  for (const key of ["x", "y", "numbers"]) if (trace[key] !== undefined) trace[key] = row(trace[key]);
  if (trace.marker) trace.marker = { ...trace.marker, color: row(trace.marker.color) };
  if (trace.width && trace.width.bdata) trace.width = decode(trace.width)[at];
}

/* From where each point was put to where it is, one line with gaps. */
function ways(trace) {
  const { starts, ...rest } = trace;
  const numbers = (v) => (ArrayBuffer.isView(v) ? v : decode(v));
  const along = (axis) => {
    const start = numbers(starts[axis]), end = numbers(trace[axis]), way = [];
    for (let i = 0; i < start.length; i++) way.push(start[i], end[i], null);
    return way;
  };
  return { ...rest, x: along("x"), y: along("y") };
}

function filled(words, numbers) {
  const known = ArrayBuffer.isView(numbers) ? numbers : decode(numbers);
  return words.replace(/\{(\d)\}/g, (_, i) => told(known[i]));
}
