"use strict";
// Without this script the page still shows everything; it adds zoom, sorting, and opening by link.
(() => {
  for (const map of document.querySelectorAll(".map")) {
    const svg = map.querySelector("svg");
    const width = svg.width.baseVal.value, height = svg.height.baseVal.value;
    const tools = map.previousElementSibling;
    let zoom = 1;
    const show = (wanted, x = map.clientWidth / 2, y = map.clientHeight / 2) => {
      const next = Math.min(4, Math.max(0.05, wanted));
      const left = (map.scrollLeft + x) / zoom, top = (map.scrollTop + y) / zoom;
      zoom = next;
      svg.setAttribute("width", width * zoom);
      svg.setAttribute("height", height * zoom);
      map.scrollTo(left * zoom - x, top * zoom - y);
      tools.querySelector("output").textContent = Math.round(100 * zoom) + " %";
    };
    const actions = {
      in: () => show(zoom * 1.25),
      out: () => show(zoom / 1.25),
      width: () => show(Math.min(1.5, (map.clientWidth - 2) / width)),
      all: () => show(Math.min((map.clientWidth - 2) / width, (map.clientHeight - 2) / height)),
    };
    tools.hidden = false;
    for (const button of tools.querySelectorAll("button")) {
      button.addEventListener("click", actions[button.dataset.zoom]);
    }
    map.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const box = map.getBoundingClientRect();
      show(zoom * (event.deltaY < 0 ? 1.1 : 1 / 1.1), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    map.addEventListener("keydown", (event) => {
      const key = { "+": "in", "=": "in", "-": "out", "0": "all", "1": "width" }[event.key];
      if (key && !event.ctrlKey && !event.metaKey) { event.preventDefault(); actions[key](); }
    });
    if (width > map.clientWidth) show(Math.max(0.6, (map.clientWidth - 2) / width), 0, 0);
    map.scrollTo((svg.clientWidth - map.clientWidth) / 2, 0);
  }
  const open = () => {
    const found = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!found) return;
    for (let at = found; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    found.scrollIntoView();
    const summary = found.querySelector("summary");
    if (found.tagName === "DETAILS" && summary) summary.focus({ preventScroll: true });
  };
  addEventListener("hashchange", open);
  open();
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = button.closest("table").tBodies[0];
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[head.cellIndex].textContent.trim();
      const number = (text) => parseFloat(text.replace(/,/g, ""));
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)], [p, q] = [number(x), number(y)];
        const order = isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  }
})();
