"use strict";
// What carries one of these attributes is shown while each chosen value is among its own, separated by spaces.
const bar = document.getElementById("filters");
const keys = ["defense", "condition", "verdict", "seed"];
const counted = document.querySelectorAll("tbody[data-verdict], tr[data-seed]");
function apply() {
  const chosen = keys.map((key) => [key, bar.elements[key].value]).filter(([, value]) => value);
  for (const element of document.querySelectorAll(keys.map((key) => `[data-${key}]`).join(","))) {
    element.hidden = chosen.some(
      ([key, value]) => key in element.dataset && !element.dataset[key].split(" ").includes(value)
    );
  }
  const shown = [...counted].filter((element) => !element.closest("[hidden]")).length;
  bar.elements.count.value = chosen.length ? `${shown} of ${counted.length} rows` : "";
}
bar.addEventListener("change", apply);
bar.addEventListener("submit", (event) => event.preventDefault());
bar.closest("[hidden]").hidden = false;
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((item) => (item.open = true)));
apply(); // a reload may have kept the choices
