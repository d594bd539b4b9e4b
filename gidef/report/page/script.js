"use strict";
(() => {
  document.documentElement.classList.add("js");
  const byId = (id) => document.getElementById(id);

  // --- the table: sort by a header, filter by text and by name
  const table = byId("rows"), body = table.tBodies[0], rows = [...body.rows], form = byId("filters");
  const heads = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator(undefined, { numeric: true });

  function sortBy(column) {
    const number = heads[column].dataset.kind === "number", now = heads[column].getAttribute("aria-sort");
    const first = number ? "descending" : "ascending", second = number ? "ascending" : "descending";
    const order = now === first ? second : first, sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row, place) => ({ row, place, key: number ? row.cells[column].dataset.value : row.cells[column].textContent }));
    const missing = ({ key }) => key === undefined || key === "";
    keyed.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * (number ? a.key - b.key : collator.compare(a.key, b.key))) || a.place - b.place);
    body.append(...keyed.map(({ row }) => row));
    heads.forEach((head, place) => head.setAttribute("aria-sort", place === column ? order : "none"));
  }
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(column));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });

  const selects = ["run", "defence", "attack", "checkpoint"].map((name) => {
    const known = [...new Set(rows.filter((row) => name === "run" || !row.classList.contains("bound")).map((row) => row.dataset[name]))];
    const label = document.createElement("label"), select = document.createElement("select");
    select.append(new Option("all", ""), ...known.map((text) => new Option(text, text)));
    select.id = `by-${name}`;
    label.append(`${name} `, select);
    if (known.length > 1) byId("selects").append(label);
    return { name, select };
  });
  function filter() {
    const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, attacks = 0;
    for (const row of rows) {
      const bound = row.classList.contains("bound"), attack = !bound && !row.classList.contains("idle"), text = row.textContent.toLowerCase();
      const named = selects.every(({ name, select }) => (bound && name !== "run") || select.selectedIndex <= 0 || select.value === row.dataset[name]);
      row.hidden = !(named && (bound ? byId("bounds").checked : words.every((word) => text.includes(word))));
      attacks += attack;
      shown += attack && !row.hidden;
    }
    byId("shown").textContent = `${shown} of ${attacks} attacks shown`;
  }
  form.hidden = false;
  form.addEventListener("input", filter);
  byId("all").addEventListener("click", () => { form.reset(); filter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
  byId("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([byId("data").textContent], { type: "application/json" }));
    link.download = "results.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  // --- victims: pointing at one, or moving to it by keyboard, shows what every attack made of it
  for (const part of document.querySelectorAll(".victims")) {
    const faces = [...part.querySelectorAll(".faces a")];
    const show = (key) => {
      for (const face of faces) face.setAttribute("aria-current", String(face.dataset.victim === key));
      for (const detail of part.querySelectorAll(".detail")) detail.classList.toggle("active", detail.id === key);
      for (const dot of part.querySelectorAll(".dot")) dot.classList.toggle("active", dot.dataset.victim === key);
    };
    faces.forEach((face, place) => {
      face.addEventListener("pointerenter", () => show(face.dataset.victim));
      face.addEventListener("focus", () => show(face.dataset.victim));
      face.addEventListener("click", (event) => { event.preventDefault(); face.focus(); });
      face.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (step && faces[place + step]) { event.preventDefault(); faces[place + step].focus(); }
      });
    });
    for (const dot of part.querySelectorAll(".dot")) dot.addEventListener("pointerenter", () => show(dot.dataset.victim));
    if (faces.length) show(faces[0].dataset.victim);
  }
})();
