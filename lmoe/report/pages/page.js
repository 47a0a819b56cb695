"use strict";
// What the scripts of every page share. A page's own script stands behind this one, inside a block or a function of its own.
// Texts go into a page as text (`element`), never as HTML; colours and sizes as classes and properties, never as markup.
const page = {
  // What `render` was given as data.
  data() {
    return JSON.parse(document.getElementById("data").textContent);
  },

  // An element with attributes and children; a child that is text stays text, and an attribute that is null is left out.
  element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  },

  // A table with a head of texts; a row is its cells, each a text or an element, the first of which names it.
  table(heads, rows) {
    const cell = (content, tag, scope) => page.element(tag, { scope }, content);
    return page.element("table", {},
      page.element("thead", {}, page.element("tr", {}, ...heads.map((head) => cell(head, "th", "col")))),
      page.element("tbody", {}, ...rows.map(([name, ...cells]) =>
        page.element("tr", {}, cell(name, "th", "row"), ...cells.map((one) => cell(one, "td", null))))));
  },

  // A region that scrolls sideways by itself and can be reached with the keyboard.
  scroll(label, content) {
    return page.element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, content);
  },

  // Text with marks for what cannot be seen or would turn the direction of what follows, [U+202E]; line breaks and tabs stay.
  visible(text) {
    return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (character) => ("\n\t\u200c\u200d".includes(character) ? character
      : `[U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`));
  },

  // A number with a true minus.
  plain(value, digits = 3) {
    return value.toFixed(digits).replace("-", "\u2212");
  },

  // A number with its sign; - for what is none.
  signed(value, digits = 3) {
    if (value === null) return "-";
    const text = Math.abs(value).toFixed(digits);
    return Number(text) === 0 ? text : (value < 0 ? "\u2212" : "+") + text;
  },

  // The items of a list box take one stop of the Tab key together; arrows, Home and End go from item to item, Enter and Space
  // and a click choose one; `choose` gets the item, and whether a key has chosen it.
  listbox(list, items, choose) {
    list.setAttribute("role", "listbox");
    items.forEach((item, index) => {
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", "false");
      item.tabIndex = index === 0 ? 0 : -1;
    });
    let current = 0;
    const go = (index) => {
      items[current].tabIndex = -1;
      current = Math.max(0, Math.min(items.length - 1, index));
      items[current].tabIndex = 0;
      items[current].focus();
    };
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10 };
    list.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key in steps) go(current + steps[event.key]);
      else if (event.key === "Home") go(0);
      else if (event.key === "End") go(items.length - 1);
      else if (event.key === "Enter" || event.key === " ") choose(items[current], true);
      else return;
      event.preventDefault();
    });
    list.addEventListener("click", (event) => {
      const index = items.indexOf(event.target.closest("[role=option]"));
      if (index < 0) return;
      go(index);
      choose(items[index], false);
    });
  },

  // A panel that Esc and its button close; focus then goes back to where it was opened from.
  panel(panel, { opened = () => {}, closed = () => {} } = {}) {
    let from = null;
    const close = () => {
      if (panel.hidden) return;
      panel.hidden = true;
      closed();
      if (from && from.isConnected) from.focus();
    };
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
    });
    return {
      close,
      // Shows content under a heading that names the panel; `focus`: who opened it with a key goes on inside.
      open(title, content, origin, focus) {
        from = origin;
        const button = page.element("button", { type: "button", class: "close" }, "Close");
        button.addEventListener("click", close);
        panel.replaceChildren(button, page.element("h2", { id: panel.getAttribute("aria-labelledby") }, title), ...content);
        panel.hidden = false;
        panel.scrollTop = 0;
        opened();
        if (focus) panel.focus();
      },
    };
  },

  // Shows what is of use with scripts alone.
  showControls() {
    for (const controls of document.querySelectorAll(".controls")) controls.hidden = false;
  },
};
