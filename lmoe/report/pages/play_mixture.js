"use strict";
// The mixture of one side: a slider for each expert, presets, or who decides where no weights are asked for.
const mixtures = (() => {
  const SAVED = "lmoe.play.presets";

  // Presets that the user has saved: [{name, weights}].
  const saved = {
    all() {
      try {
        const found = JSON.parse(localStorage.getItem(SAVED) ?? "[]");
        return Array.isArray(found) ? found.filter((one) => typeof one?.name === "string" && isWeights(one.weights)) : [];
      } catch {
        return [];
      }
    },
    keep(presets) {
      try {
        localStorage.setItem(SAVED, JSON.stringify(presets));
      } catch { /* a browser that keeps nothing */ }
    },
  };

  function isWeights(value) {
    return typeof value === "object" && value !== null && !Array.isArray(value)
      && Object.values(value).every((weight) => Number.isFinite(weight));
  }

  // Without the zeros: "code 0.7 + chat 0.3".
  function inWords(weights) {
    const parts = Object.entries(weights).filter(([, weight]) => weight !== 0);
    if (parts.length === 0) return "the base alone";
    return parts.map(([name, weight]) => `${page.visible(name)} ${String(Number(weight.toFixed(4))).replace("-", "\u2212")}`).join(" + ");
  }

  class Mixture {
    // The section of a side, and what is called when the mixture has changed.
    constructor(section, changed) {
      this.root = section.querySelector(".mixture");
      this.changed = changed;
      this.own = true;
      this.weights = new Map();
      this.presets = [];
      this.rows = new Map();
      this.select = this.root.querySelector(".preset");
      this.forget = this.root.querySelector(".forget");
      this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
      this.forget.addEventListener("click", () => this.forgetChosen());
      this.root.querySelector(".save").addEventListener("submit", (event) => this.save(event));
      if (matchMedia("(max-width: 35rem)").matches) this.root.open = false;
    }

    // What the server lets be weighed; weights of experts that are still there stay.
    use(server) {
      this.server = server;
      const kept = new Map(server.experts.map((name) => [name, this.weights.get(name) ?? this.ownWeight(name)]));
      this.weights = kept;
      if (!server.weights_by_request) this.own = true;
      if (this.own) this.takeOwn();
      const weighable = server.weights_by_request && server.experts.length > 0;
      this.root.querySelector(".weighable").hidden = !weighable;
      const names = this.root.querySelector(".experts");
      names.hidden = weighable || server.experts.length === 0;
      names.replaceChildren(...server.experts.map((_, expert) => page.element("li", {}, answers.label(server.experts, expert))));
      this.rows.clear();
      this.root.querySelector(".sliders").replaceChildren(...server.experts.map((name, expert) => this.slider(name, expert)));
      this.makePresets();
      this.show();
    }

    ownWeight(name) {
      const own = this.server.own_weights;
      return own !== null && Object.hasOwn(own, name) ? own[name] : 0;
    }

    // The server's own weights, where it has any.
    takeOwn() {
      if (this.server.own_weights === null) return;
      for (const name of this.weights.keys()) this.weights.set(name, this.ownWeight(name));
    }

    slider(name, expert) {
      const shown = page.visible(name);
      const range = page.element("input", { type: "range", min: "0", max: "1", step: "0.05", "aria-label": `Weight of ${shown}` });
      const box = page.element("input", { type: "number", step: "any", "aria-label": `Weight of ${shown}, as a number`, required: "" });
      range.addEventListener("input", () => this.set(name, Number(range.value)));
      box.addEventListener("input", () => {
        if (box.value !== "" && Number.isFinite(box.valueAsNumber)) this.set(name, box.valueAsNumber, box);
      });
      box.addEventListener("change", () => this.show());
      this.rows.set(name, { range, box });
      return page.element("li", {}, page.element("span", { class: "name" }, answers.label(this.server.experts, expert)), range, box);
    }

    set(name, weight, typing = null) {
      this.own = false;
      this.weights.set(name, weight);
      this.show(typing);
      this.changed();
    }

    makePresets() {
      const { experts, own_weights: own } = this.server;
      const weights = (of) => Object.fromEntries(experts.map((name) => [name, of(name)]));
      this.presets = [
        { name: own === null ? "The router decides" : "The server's own weights", own: true },
        ...experts.map((one) => ({ name: `${page.visible(one)} alone`, weights: weights((name) => (name === one ? 1 : 0)) })),
        ...(experts.length > 1 ? [{ name: "All equal", weights: weights(() => 1 / experts.length) }] : []),
        { name: "The base alone", weights: weights(() => 0) },
        ...saved.all().map((one) => ({
          name: `Saved: ${page.visible(one.name)}`,
          saved: one.name,
          weights: weights((name) => (Object.hasOwn(one.weights, name) ? one.weights[name] : 0)),
        })),
      ];
      const options = this.presets.map((preset, index) => page.element("option", { value: index }, preset.name));
      this.select.replaceChildren(...options, page.element("option", { value: -1 }, "Your own weights"));
    }

    choose(index) {
      const preset = this.presets[index];
      if (preset === undefined) this.own = false;
      else this.take(preset);
      this.show();
      this.changed();
    }

    take({ own = false, weights = {} }) {
      this.own = own;
      if (own) this.takeOwn();
      else for (const name of this.weights.keys()) this.weights.set(name, Object.hasOwn(weights, name) ? weights[name] : 0);
    }

    save(event) {
      event.preventDefault();
      const field = this.root.querySelector(".preset-name");
      const name = field.value.trim();
      if (name === "") return;
      saved.keep([...saved.all().filter((one) => one.name !== name), { name, weights: Object.fromEntries(this.weights) }]);
      field.value = "";
      this.own = false;
      this.changed(true);
      this.select.focus();
    }

    forgetChosen() {
      const chosen = this.presets[Number(this.select.value)];
      saved.keep(saved.all().filter((one) => one.name !== chosen?.saved));
      this.changed(true);
      this.select.focus();
    }

    // Which preset the weights are now, or -1.
    preset() {
      return this.presets.findIndex((preset) => (preset.own ? this.own : !this.own
        && [...this.weights].every(([name, weight]) => preset.weights[name] === weight)));
    }

    show(typing = null) {
      for (const [name, { range, box }] of this.rows) {
        const weight = this.weights.get(name);
        range.value = weight;
        range.setAttribute("aria-valuetext", page.plain(weight, 2));
        if (box !== typing) box.value = Number(weight.toFixed(4));
      }
      const index = this.preset();
      this.select.value = index;
      this.forget.hidden = this.presets[index]?.saved === undefined;
      this.root.querySelector(".summary-text").textContent = this.label();
      this.root.querySelector(".note").textContent = this.note();
    }

    note() {
      const { server } = this;
      if (server.experts.length === 0) {
        return server.own_mixture === "the trained adapter"
          ? "One adapter without a router: it is always on, and there is nothing to choose." : "There are no experts here.";
      }
      if (!server.weights_by_request) return "The router chooses among the experts; the colours of an answer show its choice.";
      if (this.own && server.own_weights === null) return "The router decides by the message. Move a slider to set the weights yourself.";
      return "How much each expert counts in the next answer.";
    }

    label() {
      if (this.own) return this.server.own_weights === null || !this.server.weights_by_request ? page.visible(this.server.own_mixture)
        : inWords(this.server.own_weights);
      return inWords(Object.fromEntries(this.weights));
    }

    // Weights for a request; null: the server's own mixture.
    ofRequest() {
      return this.own || !this.server.weights_by_request ? null : Object.fromEntries(this.weights);
    }

    // For a link: null for the server's own, and back.
    get state() {
      return this.own ? null : Object.fromEntries(this.weights);
    }

    set state(weights) {
      this.take(weights === null || !this.server.weights_by_request ? { own: true } : { weights });
      this.show();
    }
  }

  return { Mixture, isWeights };
})();
