"use strict";
(() => {
  const tip = document.getElementById("tip");

  function show(dot) {
    hide();
    tip.textContent = dot.dataset.tip;
    tip.hidden = false;
    dot.setAttribute("aria-describedby", "tip");
    const at = dot.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left + at.width / 2 - tip.offsetWidth / 2, width - tip.offsetWidth - 8));
    const above = at.top - tip.offsetHeight - 10;
    const top = above > 0 ? above : at.bottom + 10;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${top + window.scrollY}px`;
  }

  function hide() {
    tip.hidden = true;
    for (const dot of document.querySelectorAll(".dot[aria-describedby]")) dot.removeAttribute("aria-describedby");
  }

  for (const area of document.querySelectorAll(".plot .area")) {
    const dots = [...area.querySelectorAll(".dot")];
    if (!dots.length) continue;
    dots[0].tabIndex = 0; // one stop for the tabulator; arrows go on from there
    dots.forEach((dot, i) => {
      dot.addEventListener("mouseenter", () => show(dot));
      dot.addEventListener("mouseleave", () => { if (document.activeElement !== dot) hide(); });
      dot.addEventListener("focus", () => show(dot));
      dot.addEventListener("blur", hide);
      dot.addEventListener("click", () => { dot.focus(); show(dot); });
      dot.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (!step) return;
        event.preventDefault();
        const next = dots[(i + step + dots.length) % dots.length];
        dot.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
  }

  const table = document.getElementById("operations");
  const heads = [...table.tHead.rows[0].cells];
  const scroll = table.parentElement;

  // On a phone the names stay at the left while the numbers scroll: beside them, not under them.
  function reveal(head) {
    if (head === heads[0]) return;
    const covered = getComputedStyle(heads[0]).position === "sticky" ? heads[0].getBoundingClientRect().width : 0;
    const box = head.getBoundingClientRect(), left = scroll.getBoundingClientRect().left;
    const before = box.left - left - covered, after = box.right - left - scroll.clientWidth;
    if (before < 0) scroll.scrollLeft += Math.floor(before);
    else if (after > 0) scroll.scrollLeft += Math.ceil(after);
  }

  heads.forEach((head, column) => {
    const number = head.classList.contains("num");
    head.querySelector("button").addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const order = before ? (before === "descending" ? "ascending" : "descending") : number ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const value = (row) => (number ? Number(row.cells[column].dataset.value) : row.cells[column].dataset.value);
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = value(a), y = value(b);
        return (x < y ? -1 : x > y ? 1 : 0) * (order === "descending" ? -1 : 1);
      });
      table.tBodies[0].append(...rows);
      reveal(head);
    });
  });
})();
