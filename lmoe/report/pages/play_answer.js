"use strict";
// An answer on the page: its tokens coloured by expert as they come, and what each expert had of it.
const answers = (() => {
  const [FAINT, FULL] = [10, 50]; // percent of an expert's colour; text on it stays readable
  const MOST_ROWS = 500;

  const classes = (expert) => ["routed", `x${expert % 8}`, `p${Math.floor(expert / 8) % 8}`];
  const name = (names, expert) => (names[expert] === String(expert) ? String(expert) : `${expert} ${page.visible(names[expert])}`);
  const label = (names, expert) => page.element("span", { class: classes(expert).join(" ") }, name(names, expert));

  // The expert with the largest weight, the first of equal ones; null where none has any.
  function largest(weights) {
    let best = null;
    weights.forEach((value, expert) => {
      if (value !== 0 && (best === null || Math.abs(value) > Math.abs(weights[best]))) best = expert;
    });
    return best;
  }

  // By name; 0 for those left out, whatever they are called.
  const byName = (names, weights) => names.map((one) => (Object.hasOwn(weights, one) ? weights[one] : 0));
  const total = (weights) => weights.reduce((sum, value) => sum + Math.abs(value), 0);

  // Weights in words, the largest first.
  function words(names, weights) {
    const order = names.map((_, expert) => expert).filter((expert) => weights[expert] !== 0);
    order.sort((one, other) => Math.abs(weights[other]) - Math.abs(weights[one]));
    return order.slice(0, 6).map((expert) => `${page.visible(names[expert])} ${page.plain(weights[expert])}`).join(", ");
  }

  class Answer {
    // Names of the experts, what mixes the answer, in words, and what is called with each growth of the answer on the page.
    constructor(names, mixture, grow) {
      this.names = names;
      this.grow = grow;
      this.characters = [];
      this.tokens = [];
      this.drawn = 0; // tokens that have their place on the page
      this.frame = null;
      this.said = page.element("p", { class: "said", dir: "auto" });
      this.about = page.element("p", { class: "of" }, mixture);
      this.element = page.element("article", { class: "answer under-way", "aria-busy": "true" }, this.about, this.said);
    }

    get text() {
      return this.characters.join("");
    }

    // The next text of it, and the tokens that begin in it. They are drawn with the next frame, all that came until then at
    // once: each time the browser lays out the whole answer.
    add(text, tokens) {
      for (const character of text) this.characters.push(character);
      for (const { offset, weights } of tokens) {
        this.tokens.push({ offset, weights: byName(this.names, weights), span: page.element("span", {}), text: "" });
      }
      if (this.frame === null) this.frame = requestAnimationFrame(() => this.grow(() => this.draw()));
    }

    draw() {
      if (this.frame !== null) cancelAnimationFrame(this.frame);
      this.frame = null;
      const first = Math.max(0, this.drawn - 1); // whose text may go on
      this.said.append(...this.tokens.slice(this.drawn).map((token) => token.span));
      this.drawn = this.tokens.length;
      for (let index = first; index < this.drawn; index += 1) this.show(index);
    }

    show(index) {
      const token = this.tokens[index];
      const end = this.tokens[index + 1]?.offset ?? this.characters.length;
      token.text = this.characters.slice(token.offset, end).join("");
      token.span.textContent = page.visible(token.text);
      const expert = largest(token.weights);
      if (expert === null || token.text === "") return;
      token.expert = expert;
      token.span.className = classes(expert).join(" ");
      const share = Math.abs(token.weights[expert]) / total(token.weights);
      token.span.style.setProperty("--share", `${Math.round(FAINT + (FULL - FAINT) * share)}%`);
      token.span.title = words(this.names, token.weights);
      let before = index - 1;
      while (before >= 0 && this.tokens[before].text === "") before -= 1;
      if (before < 0 || this.tokens[before].expert !== expert) token.span.dataset.who = String(expert);
    }

    // It has ended: why, what it was mixed by, and the tokens that were used.
    finish(why, decided, used) {
      this.over();
      const reasons = { stop: "", length: ", cut at the longest answer", stopped: ", stopped" };
      const count = used ? `${used.completion_tokens} tokens` : `${this.tokens.length} tokens`;
      const notes = [count + reasons[why]];
      if (why === "stop" && this.characters.length === 0) notes.push("the model said nothing");
      const mean = this.mean();
      const mixed = decided?.weights ? words(this.names, byName(this.names, decided.weights)) : "";
      if (mixed !== "") notes.push(`mixed by ${mixed}`);
      this.element.append(page.element("p", { class: "of" }, notes.join("; ")));
      if (total(mean) > 0) this.element.append(this.details(mean, decided?.load ?? null));
    }

    // It has failed: what the server says.
    fail(message) {
      this.over();
      this.element.append(page.element("p", { class: "warning", role: "alert" }, page.visible(message)));
    }

    over() {
      this.draw();
      this.element.classList.remove("under-way");
      this.element.removeAttribute("aria-busy");
    }

    // Mean weight of each expert over the tokens.
    mean() {
      return this.names.map((_, expert) =>
        this.tokens.reduce((sum, token) => sum + token.weights[expert], 0) / Math.max(1, this.tokens.length));
    }

    details(mean, load) {
      const made = page.element("details", {}, page.element("summary", {}, "What each expert had"), bar(mean));
      made.addEventListener("toggle", () => {
        if (made.open && made.querySelector("table") === null) made.append(...this.tables(mean, load));
      });
      return made;
    }

    tables(mean, load) {
      const heads = ["expert", "mean weight", ...(load === null ? [] : ["share of routed tokens"])];
      const loads = load === null ? null : byName(this.names, load);
      const rows = this.names.map((_, expert) => [label(this.names, expert), page.plain(mean[expert]),
        ...(loads === null ? [] : [page.plain(loads[expert])])]);
      const shown = this.tokens.filter((token) => token.text !== "");
      const byToken = shown.slice(0, MOST_ROWS).map((token) =>
        [page.element("span", { class: "said" }, page.visible(token.text)), words(this.names, token.weights) || "none"]);
      const all = page.element("details", {}, page.element("summary", {}, "Token by token"),
        page.scroll("Weights of the experts, token by token", page.table(["token", "weights where it was chosen"], byToken)));
      if (shown.length > MOST_ROWS) all.append(page.element("p", { class: "hint" }, `The first ${MOST_ROWS} of ${shown.length}.`));
      return [page.scroll("What each expert had of this answer", page.table(heads, rows)), all];
    }
  }

  // Parts of all weight as one bar; the table says the same in numbers.
  function bar(weights) {
    const made = page.element("div", { class: "bar", "aria-hidden": "true" });
    const sum = total(weights);
    weights.forEach((value, expert) => {
      const part = page.element("i", { class: `x${expert % 8}` });
      part.style.width = `${(100 * Math.abs(value)) / sum}%`;
      made.append(part);
    });
    return made;
  }

  return { Answer, label };
})();
