"use strict";
// Tables of class "sortable" get a button in each heading, those of class "filtered" a field above them.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const textOf = (row, column) => row.cells[column].textContent.trim();
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const rows = [...body.rows];
      const keys = new Map(rows.map((row) => [row, textOf(row, column)]));
      const told = [...keys.values()].filter((text) => text !== "–");
      const numeric = told.length > 0 && told.every((text) => /^[-+]?\d/.test(text));
      const before = heading.getAttribute("aria-sort");
      const ascending = before ? before === "descending" : !numeric;
      const compare = numeric
        ? (one, other) => parseFloat(one) - parseFloat(other)
        : (one, other) => one.localeCompare(other, undefined, { numeric: true });
      rows.sort((first, second) => {
        const [one, other] = [keys.get(first), keys.get(second)];
        if (one === "–" || other === "–") return (one === "–") - (other === "–"); // what is undefined stays below
        return ascending ? compare(one, other) : compare(other, one);
      });
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      table.classList.add("sorted");
      body.append(...rows);
    });
  });
}
for (const table of document.querySelectorAll("table.filtered")) {
  const rows = [...table.tBodies[0].rows];
  const texts = new Map(rows.map((row) => [row, row.cells[0].textContent.toLowerCase()]));
  const field = document.createElement("div");
  field.className = "filter";
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  input.type = "search";
  label.append(`Show only ${table.tHead.rows[0].cells[0].textContent.trim()} with `, input);
  count.textContent = `${rows.length} rows`;
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !texts.get(row).includes(wanted);
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  field.append(label, count);
  table.closest(".scroll").before(field);
}
