"use strict";
// Every text below comes from a model or from people: it is written with textContent and never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const [RUN, ROUND, KIND, ID, STRATUM, PERSONA, SURE, WEIGHT, SAID, PROMPT, TEXT, PARENTS, LATER] = data.columns.keys();
const PAGE = 20;
const form = document.getElementById("filters");
const list = document.getElementById("list");
const more = document.getElementById("more");
const byId = new Map(data.rows.map((row) => [`${row[RUN]}/${row[ID]}`, row]));
const roundName = (t) => (t < 0 ? "base model" : String(t));
let found = [];
let shown = 0;

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function fill(name, column, label = String) {
  const values = [...new Set(data.rows.map((row) => row[column]))].filter((value) => value !== null);
  values.sort((a, b) => (typeof a === "number" ? a - b : a < b ? -1 : 1));
  form.elements[name].append(new Option("all", ""), ...values.map((value) => new Option(label(value), String(value))));
}

function parentText(run, id) {
  const row = byId.get(`${run}/${id}`);
  if (row) return row[TEXT];
  return Object.hasOwn(data.known, run) && Object.hasOwn(data.known[run], id) ? data.known[run][id] : null;
}

function card(row) {
  const item = element("li");
  item.dataset.id = row[ID];
  const head = element("div", "head");
  const sure = row[SURE] === null ? "" : ` ${row[SURE].toFixed(2)}`;
  head.append(element("b", "", row[PERSONA] === null ? "not read" : row[PERSONA] + sure));
  head.append(element("span", "", row[WEIGHT] === null ? "no weight" : `weight ${row[WEIGHT].toFixed(3)}`));
  const round = row[ROUND] < 0 ? "base model" : `round ${row[ROUND]}`;
  for (const part of [round, row[STRATUM], row[KIND], row[SAID], `${data.runs[row[RUN]]} ${row[ID]}`]) {
    if (part) head.append(element("span", "", part));
  }
  item.append(head);
  row[PROMPT].forEach((turn, i) => item.append(element("p", "turn", `${i % 2 ? "model" : "user"}: ${turn}`)));
  item.append(element("p", "text", row[TEXT]));
  if (row[LATER].length) {
    const where = row[LATER].map(([t, copies, weight]) => `round ${t}, ${copies} × at weight ${weight}`);
    item.append(element("p", "kin", `trained on in ${where.join("; ")}`));
  }
  if (row[PARENTS].length) {
    const kin = element("details", "kin");
    kin.append(element("summary", "", `${row[PARENTS].length} ${row[PARENTS].length === 1 ? "parent" : "parents"}`));
    for (const id of row[PARENTS]) {
      const text = parentText(row[RUN], id);
      kin.append(element("div", "", id), element("blockquote", "", text === null ? "in another run, or left out" : text));
    }
    item.append(kin);
  }
  return item;
}

function showMore() {
  list.append(...found.slice(shown, shown + PAGE).map(card));
  shown = Math.min(found.length, shown + PAGE);
  more.hidden = shown >= found.length;
}

function choose() {
  const wanted = Object.fromEntries(new FormData(form));
  const equal = { round: ROUND, run: RUN, kind: KIND, persona: PERSONA, stratum: STRATUM };
  const words = wanted.words.toLocaleLowerCase();
  found = data.rows.filter((row) => {
    for (const [name, column] of Object.entries(equal)) {
      if (wanted[name] !== "" && String(row[column]) !== wanted[name]) return false;
    }
    if (wanted.from !== "" && !(row[WEIGHT] !== null && row[WEIGHT] >= Number(wanted.from))) return false;
    if (wanted.to !== "" && !(row[WEIGHT] !== null && row[WEIGHT] <= Number(wanted.to))) return false;
    return !words || row[TEXT].toLocaleLowerCase().includes(words);
  });
  if (wanted.order) {
    const sign = wanted.order === "heavy" ? -1 : 1;
    const end = sign * Infinity; // what has no weight comes last either way
    found.sort((a, b) => sign * ((a[WEIGHT] ?? end) - (b[WEIGHT] ?? end)));
  }
  list.replaceChildren();
  shown = 0;
  showMore();
  document.getElementById("count").textContent = `${found.length} of ${data.rows.length} texts`;
}

// The choice is kept in the address, so that a link can point at it: page.html#texts?round=1&persona=nova
function remember() {
  const set = [...new FormData(form)].filter(([, value]) => value !== "");
  history.replaceState(null, "", `#texts${set.length ? `?${new URLSearchParams(set)}` : ""}`);
}

function recall() {
  const [place, query] = location.hash.split("?");
  if (place !== "#texts") return;
  form.reset();
  for (const [name, value] of new URLSearchParams(query || "")) {
    const field = form.elements.namedItem(name);
    if (field && "value" in field) field.value = value;
  }
  choose();
  document.getElementById("texts").scrollIntoView();
}

if (form) {
  fill("round", ROUND, roundName);
  fill("run", RUN, (value) => data.runs[value]);
  fill("kind", KIND);
  fill("persona", PERSONA);
  fill("stratum", STRATUM);
  form.addEventListener("input", () => { choose(); remember(); });
  form.addEventListener("reset", () => setTimeout(() => { choose(); remember(); }));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", showMore);
  addEventListener("hashchange", recall);
  choose();
  recall();
}
