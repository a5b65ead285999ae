
"use strict";
// The table of selected documents: search, filter by label, sort, pages. Text enters the page as text alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const table = byId("table"), body = table.tBodies[0];
  const rows = data.rows.map(([id, text, label, confidence, gain, objective, nearest, distance], i) =>
    ({ rank: i + 1, id, text, label, confidence, gain, objective, nearest, distance, key: (text + "\n" + id).toLowerCase() }));
  if (!rows.length) return;
  const state = { query: "", label: "", sort: "rank", down: false, page: 0, size: 100 };
  let shown = rows;

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  // The same figures as engine/report/numbers.py.
  const figures = (x) => {
    if (x === null) return "–";
    const rounded = Number(x.toPrecision(3));
    return rounded !== 0 && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
  };

  const fixed = (x, decimals) => x === null ? "–" : x.toFixed(decimals);

  const documentCell = (row) => {
    const cell = element("td", "wide");
    const text = element("div", "text", row.text);
    text.dir = "auto";
    if (row.text.length > 200) {
      const details = element("details"), summary = element("summary");
      summary.append(element("span", "closed", row.text.slice(0, 180).replace(/\n/g, " ") + "…"), element("span", "open", "close"));
      details.append(summary, text);
      cell.append(details);
    } else cell.append(text);
    if (row.nearest) {
      const near = element("details", "near"), other = element("div", "text", row.nearest);
      other.dir = "auto";
      near.append(element("summary", "", `nearest true document, distance ${fixed(row.distance ?? null, 2)}`), other);
      cell.append(near);
    }
    cell.append(element("code", "id", row.id));
    return cell;
  };
  const tableRow = (row) => {
    const line = element("tr");
    line.append(
      element("td", "number", row.rank), documentCell(row), element("td", "", data.labels[row.label] ?? ""),
      element("td", "number", fixed(row.confidence, 2)), element("td", "number", figures(row.gain)),
      element("td", "number extra", fixed(row.objective, 4)));
    return line;
  };

  const compare = (a, b) => {
    const x = a[state.sort], y = b[state.sort];
    if (x === y) return a.rank - b.rank;
    if (x === null || y === null) return x === null ? 1 : -1;  // unknown last, either way
    return (x < y ? -1 : 1) * (state.down ? -1 : 1);
  };
  const update = () => {
    const query = state.query.toLowerCase();
    shown = rows.filter((row) => (state.label === "" || row.label === Number(state.label)) && row.key.includes(query));
    shown.sort(compare);
    state.page = 0;
    draw();
  };
  const draw = () => {
    const start = state.page * state.size, stop = Math.min(start + state.size, shown.length);
    body.replaceChildren(...shown.slice(start, stop).map(tableRow));
    const n = (x) => x.toLocaleString("en");
    byId("status").textContent = shown.length
      ? `${n(start + 1)} to ${n(stop)} of ${n(shown.length)}` : "No document matches.";
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = stop >= shown.length;
    for (const head of table.tHead.querySelectorAll("[data-sort]")) {
      if (head.dataset.sort === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  };
  const turn = (by) => { state.page += by; draw(); table.scrollIntoView({ block: "start" }); };

  for (const head of table.tHead.querySelectorAll("[data-sort]")) {
    const button = element("button", "", head.textContent);
    button.type = "button";
    button.setAttribute("aria-label", `Sort by ${head.dataset.sort}`);
    button.addEventListener("click", () => {
      const name = head.dataset.sort;
      // Numbers are wanted from the top first, rank and names from the start.
      state.down = state.sort === name ? !state.down : name !== "rank" && name !== "label";
      state.sort = name;
      update();
    });
    head.replaceChildren(button);
  }
  data.labels.forEach((name, i) => {
    const option = element("option", "", name);
    option.value = i;
    byId("label").append(option);
  });
  byId("label-control").hidden = !data.labels.length;
  let timer = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => { state.query = event.target.value; update(); }, 150);
  });
  byId("label").addEventListener("change", (event) => { state.label = event.target.value; update(); });
  byId("size").addEventListener("change", (event) => { state.size = Number(event.target.value); update(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("documents-note").textContent =
    `${rows.length.toLocaleString("en")} documents, in the order they were picked; all fields are in selection.parquet.`;
  byId("controls").hidden = byId("pages").hidden = false;
  draw();
})();
