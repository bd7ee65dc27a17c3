"use strict";
// Search and sorting of the table of heads. Without a script, all rows are there, in the model's order.
const table = document.getElementById("every-head");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
// Without the last column: its texts have the same words in every row.
const words = rows.map((row) => Array.from(row.cells).slice(0, -1).map((cell) => cell.textContent).join(" ").toLowerCase());
const found = document.getElementById("found");

document.getElementById("search").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  rows.forEach((row, number) => {
    const fits = wanted.every((word) => words[number].includes(word));
    row.hidden = !fits;
    shown += fits ? 1 : 0;
  });
  found.textContent = `${shown} of ${rows.length} rows`;
});

const headings = Array.from(table.tHead.rows[0].cells);
headings.forEach((heading, column) => {
  heading.querySelector("button").addEventListener("click", () => {
    const rising = heading.getAttribute("aria-sort") === "descending" || heading.getAttribute("aria-sort") === "none";
    headings.forEach((other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const text = (row) => row.cells[column].textContent;
    const ordered = rows.slice().sort((one, other) => {
      const order = text(one).localeCompare(text(other), "en", { numeric: true });
      return rising ? order : -order;
    });
    body.append(...ordered);
  });
});
