"use strict";
// Experts by colour, line and number (experts.html.jinja), as scripts set them.
const experts = {
  // Percent of an expert's colour; text on it stays readable.
  FAINT: 10,
  FULL: 50,

  classes(expert) {
    return ["routed", `x${expert % 8}`, `p${Math.floor(expert / 8) % 8}`];
  },

  // The expert with the largest weight, the first of equal ones; null where no expert acts.
  largest(values) {
    let best = null;
    values.forEach((value, expert) => {
      if (value !== 0 && (best === null || Math.abs(value) > Math.abs(values[best]))) best = expert;
    });
    return best;
  },

  // Takes all marks from a token.
  clear(item) {
    item.classList.remove("routed", "more", "less", ...[0, 1, 2, 3, 4, 5, 6, 7].flatMap((n) => [`x${n}`, `p${n}`]));
    item.removeAttribute("data-who");
    item.style.removeProperty("--share");
  },

  // Marks tokens, each with its expert (null: none) and the share of its weight; the fuller, the larger beside the others'.
  paint(tokens) {
    const most = Math.max(...tokens.map((one) => one.share));
    let before = null;
    for (const { item, expert, share } of tokens) {
      experts.clear(item);
      if (expert !== null) {
        item.classList.add(...experts.classes(expert));
        item.style.setProperty("--share", `${Math.round(experts.FAINT + ((experts.FULL - experts.FAINT) * share) / most)}%`);
        if (expert !== before) item.dataset.who = String(expert);
      }
      before = expert;
    }
  },
};
