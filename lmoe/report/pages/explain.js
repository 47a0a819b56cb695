"use strict";
// The page of `lmoe explain`: tokens coloured by expert, and what is known of the one that is clicked.
{
  const data = page.data();
  const site = document.getElementById("site");
  const whose = document.getElementById("whose");
  const panel = document.getElementById("detail");
  const both = document.querySelector(".both");

  // Where colours come from: the mean over all sites, over those of one layer, or one site; each a list of numbers of sites.
  const views = [{ name: "mean over all sites", sites: null }];
  const layers = [...new Set(data.sites.map((one) => one.layer))].filter((layer) => layer !== null);
  for (const layer of layers) {
    const sites = data.sites.flatMap((one, index) => (one.layer === layer ? [index] : []));
    if (sites.length > 1) views.push({ name: `layer ${layer}, mean`, sites });
  }
  data.sites.forEach((one, index) => {
    views.push({ name: one.layer === null ? one.part : `layer ${one.layer}, ${one.part}`, sites: [index] });
  });
  views.forEach((view, index) => site.append(page.element("option", { value: index }, view.name)));

  const name = (of, expert) => (of.experts[expert] === String(expert) ? String(expert) : `${expert} ${of.experts[expert]}`);
  const label = (of, expert) => page.element("span", { class: experts.classes(expert).join(" ") }, name(of, expert));

  // Routing weights of a token: one number for each expert.
  function weights(of, text, token, sites) {
    const found = of.texts[text];
    if (sites === null) return found.mean[token];
    const total = new Array(of.experts.length).fill(0);
    for (const index of sites) {
      found.weights[index][token].forEach((value, expert) => { total[expert] += value / sites.length; });
    }
    return total;
  }

  // Views of the first are those of the other where both have the same sites.
  const sameSites = data.other !== null
    && JSON.stringify(data.other.sites.map((one) => one.name)) === JSON.stringify(data.sites.map((one) => one.name));
  const chosen = () => (whose !== null && whose.value === "other" ? data.other : data);

  function colour() {
    const view = views[Number(site.value) || 0];
    const difference = whose !== null && whose.value === "difference";
    const of = chosen();
    const sites = of === data || sameSites ? view.sites : null;
    for (const section of document.querySelectorAll(".text")) {
      const text = Number(section.dataset.text);
      const tokens = [...section.querySelectorAll(".token")].map((item) => {
        const values = weights(of, text, Number(item.dataset.i), sites);
        const expert = experts.largest(values);
        const sum = values.reduce((total, value) => total + Math.abs(value), 0);
        return { item, expert, share: expert === null ? 0 : Math.abs(values[expert]) / sum };
      });
      if (difference) tokens.forEach(({ item }) => paintDifference(item, text));
      else experts.paint(tokens);
    }
  }

  function paintDifference(item, text) {
    experts.clear(item);
    const change = differs(text, Number(item.dataset.i));
    if (change === null || Math.abs(change) < 0.1) return;
    item.classList.add(change > 0 ? "more" : "less");
    item.dataset.who = page.signed(change, 1);
  }

  // How much likelier the other one makes a token.
  function differs(text, token) {
    const first = data.texts[text].mixture[token];
    const other = data.other.texts[text].mixture[token];
    return first === null || other === null ? null : other - first;
  }

  function expertTable(of, text, token) {
    const found = of.texts[text];
    const rows = of.experts.map((_, expert) => [
      label(of, expert),
      page.plain(found.mean[token][expert]),
      page.signed(found.text[token][expert]),
      page.signed(found.token[token][expert]),
    ]);
    return page.scroll("What each expert does to this token",
      page.table(["expert", "mean weight", "text", "token"], rows));
  }

  // Layers by Linears; each cell has the largest weight, or that of one expert.
  function grid(of, text, token, expert) {
    const found = of.texts[text];
    const parts = [...new Set(of.sites.map((one) => one.part))];
    const rows = [...new Set(of.sites.map((one) => one.layer))].map((layer) => [
      layer === null ? "whole model" : `layer ${layer}`,
      ...parts.map((part) => {
        const index = of.sites.findIndex((one) => one.layer === layer && one.part === part);
        return index < 0 ? "" : cell(of, found.weights[index][token], expert);
      }),
    ]);
    const table = page.table(["", ...parts], rows);
    table.classList.add("sites");
    return page.scroll("Routing weights at every site", table);
  }

  function cell(of, values, expert) {
    const all = values.map((value, one) => `${name(of, one)}: ${page.plain(value)}`).join(", ");
    const shown = expert === null ? experts.largest(values) : expert;
    const value = shown === null ? undefined : values[shown];
    if (value === undefined) return page.element("span", { title: all }, "-");
    const sum = values.reduce((total, one) => total + Math.abs(one), 0);
    const bar = page.element("span", { class: "bar", "aria-hidden": "true" });
    values.forEach((one, index) => {
      if (one === 0) return;
      const part = page.element("i", { class: `x${index % 8}` });
      part.style.width = `${(100 * Math.abs(one)) / sum}%`;
      bar.append(part);
    });
    const text = expert === null ? `${shown}: ${page.plain(value)}` : page.plain(value);
    return page.element("span", { title: all },
      page.element("span", { class: value === 0 ? "" : experts.classes(shown).join(" ") }, text), bar);
  }

  function routing(of, text, token) {
    if (!of.sites.length) return [];
    const select = page.element("select", {},
      page.element("option", { value: "" }, "largest weight"),
      ...of.experts.map((_, expert) => page.element("option", { value: expert }, `weight of ${name(of, expert)}`)));
    const place = page.element("div");
    const fill = () => place.replaceChildren(grid(of, text, token, select.value === "" ? null : Number(select.value)));
    select.addEventListener("change", fill);
    fill();
    return [page.element("h3", {}, "Routing weights at every site"), page.element("label", {}, "Show ", select), place];
  }

  function numbers(of, text, token) {
    const found = of.texts[text];
    const shown = (value) => (value === null ? "- (nothing predicts the first token)" : page.plain(value));
    const rows = [["with the mixture", shown(found.mixture[token])], ["with the adapters off", shown(found.base[token])]];
    if (of.experts.length) rows.push(["with all experts silenced", shown(found.none[token])]);
    return page.table(["log-probability", "nats"], rows);
  }

  const detail = page.panel(panel, {
    opened: () => both.classList.add("open"),
    closed: () => {
      both.classList.remove("open");
      select(null);
    },
  });

  function select(item) {
    for (const other of document.querySelectorAll(".token[aria-selected=true]")) other.setAttribute("aria-selected", "false");
    if (item !== null) item.setAttribute("aria-selected", "true");
  }

  function open(item, text, byKey) {
    const token = Number(item.dataset.i);
    const of = chosen();
    const found = data.texts[text];
    select(item);
    const facts = `number ${token}, id ${found.ids[token]}, ${found.answer[token] ? "answer" : "prompt"}`
      + (found.special[token] ? ", special" : "");
    const content = [page.element("p", { class: "quiet" }, facts), numbers(of, text, token)];
    if (data.other !== null) {
      content.push(page.element("p", {}, `${data.other.name} less ${data.name}: ${page.signed(differs(text, token))}`));
    }
    if (of.experts.length) {
      content.push(
        page.element("h3", {}, "What each expert does to it"),
        page.element("p", { class: "quiet" }, "Change of the log-probability where the expert is silenced: text, over the whole "
          + "text; token, only while this token is predicted. Below 0 the expert makes the token likelier."),
        expertTable(of, text, token), ...routing(of, text, token));
    }
    detail.open(`Token \u201c${item.textContent}\u201d`, content, item, byKey);
  }

  for (const section of document.querySelectorAll(".text")) {
    const text = Number(section.dataset.text);
    for (const part of section.querySelectorAll(".list > .tokens")) part.setAttribute("role", "group");
    for (const heading of section.querySelectorAll(".list > .part")) heading.setAttribute("role", "presentation");
    const items = [...section.querySelectorAll(".token")];
    for (const item of items) {
      if (item.textContent.trim() === "") item.setAttribute("aria-label", "white space");
    }
    page.listbox(section.querySelector(".list"), items, (item, byKey) => open(item, text, byKey));
  }

  // An expert that is linked to is opened.
  function showExpert() {
    const target = document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.querySelector("summary").focus();
    }
  }
  window.addEventListener("hashchange", showExpert);
  document.querySelector(".experts")?.addEventListener("click", () => setTimeout(showExpert));
  site.addEventListener("change", colour);
  whose?.addEventListener("change", () => {
    detail.close();
    colour();
  });
  page.showControls();
  colour();
}
