"use strict";
// The page of a run: its parts one at a time, and controls in place of the pictures that they can draw.
{
  let data = page.data();
  let arrays = decoded(data.routing);
  const MOST_LINES = 24; // of one chart
  const AVERAGE = -1; // in place of a site: the mean over all
  const state = { view: null, site: AVERAGE, step: null, validation: null, row: 0, sorted: {} };
  const byId = (id) => document.getElementById(id);

  // Bytes of the arrays by name.
  function decoded(routing) {
    if (routing === null) return null;
    const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const starts = [0];
    routing.experts.forEach((count) => starts.push(starts[starts.length - 1] + count));
    const tokens = routing.tokens;
    const expert = bytes(tokens.expert);
    return {
      starts,
      all: starts[starts.length - 1],
      widest: Math.max(0, ...routing.experts),
      ...Object.fromEntries(["load", "largest", "entropy", "load_entropy", "phase_entropy", "domain_load"]
        .map((name) => [name, bytes(routing[name])])),
      weight: bytes(tokens.weight),
      mean: bytes(tokens.mean),
      expert: tokens.wide ? Uint16Array.from({ length: expert.length / 2 }, (_, i) => expert[2 * i] + 256 * expert[2 * i + 1]) : expert,
    };
  }

  const sites = () => data.routing.sites.length;
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  const percent = (share) => (100 * share).toFixed(1);
  const siteName = (site) => (site === AVERAGE ? "mean over all sites" : data.routing.sites[site]);
  const expertName = (expert) => (data.routing.names[expert] === String(expert) ? `${expert}` : `${expert} ${data.routing.names[expert]}`);
  const label = (expert) => page.element("span", { class: experts.classes(expert).join(" ") }, expertName(expert));

  // Loads of the experts of a site, out of a part of an array that begins at a place; of all sites the mean over those that have an expert.
  function loads(array, begin, site) {
    const { experts: counts } = data.routing;
    const { starts, widest } = arrays;
    if (site !== AVERAGE) return Array.from({ length: counts[site] }, (_, e) => array[begin + starts[site] + e] / 255);
    const [sum, having] = [new Array(widest).fill(0), new Array(widest).fill(0)];
    for (let s = 0; s < counts.length; s += 1) {
      for (let e = 0; e < counts[s]; e += 1) {
        sum[e] += array[begin + starts[s] + e];
        having[e] += 1;
      }
    }
    return sum.map((one, e) => one / having[e] / 255);
  }

  const loadAt = (step, site) => loads(arrays.load, step * arrays.all, site);
  const figure = (name, step, site) => arrays[name][step * sites() + site] / 255;

  // Index of the phase that made a step.
  function phaseOf(step) {
    let found = 0;
    data.phases.forEach(([, start], index) => { if (step > start) found = index; });
    return found;
  }

  // What the watch for collapse looks at: experts in use, how many must be, the entropy of the load and below what it must not fall.
  function gates(step, site) {
    const limits = data.routing.gates;
    const count = data.routing.experts[site];
    const least = Math.min(limits.in_use, limits.in_use_of_uniform / count);
    const phase = phaseOf(data.routing.steps[step]);
    const used = loadAt(step, site).filter((share) => share > least).length;
    const largest = figure("largest", step, site);
    const entropy = figure("load_entropy", step, site);
    const begun = data.routing.phase_steps[phase] > 0;
    const start = begun ? arrays.phase_entropy[phase * sites() + site] / 255 : 0;
    const over = {
      largest: largest > limits.dominant,
      used: used < Math.min(limits.fewest, count),
      entropy: entropy < limits.lost_entropy * start,
    };
    const judged = data.routing.judged[phase] && count > 1;
    return { used, fewest: Math.min(limits.fewest, count), largest, entropy, lowest: limits.lost_entropy * start, judged, over };
  }

  // ---- tables that are sorted by a click on a head

  const NUMBER = /^[\u2212+-]?[\d,]*\.?\d+/;
  function value(cell) {
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = NUMBER.test(text) ? Number.parseFloat(text.replace("\u2212", "-").replaceAll(",", "")) : NaN;
    return { text, number };
  }

  function compare(a, b, sign) {
    const [one, other] = [value(a), value(b)];
    const [first, second] = [Number.isNaN(one.number), Number.isNaN(other.number)];
    if (first !== second) return first ? 1 : -1; // what is no number comes last
    return sign * (first ? one.text.localeCompare(other.text) : one.number - other.number);
  }

  // The order of a table; one by a column that is not there any more is forgotten.
  function orderOf(table, key) {
    const order = state.sorted[key];
    if (order === undefined || table.tHead.rows[0].cells[order?.column] !== undefined) return order;
    delete state.sorted[key];
    return undefined;
  }

  function sort(table, key) {
    const order = table.tHead === null ? undefined : orderOf(table, key);
    if (order === undefined) return;
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      if (index === order.column) head.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => compare(a.cells[order.column], b.cells[order.column], order.sign)));
  }

  function sortable(table, key) {
    if (table.tHead === null) return;
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      const button = page.element("button", { type: "button" }, ...head.childNodes);
      button.addEventListener("click", () => {
        const before = state.sorted[key];
        const again = before !== undefined && before.column === index;
        state.sorted[key] = { column: index, sign: again ? -before.sign : index === 0 ? 1 : -1 };
        sort(table, key);
      });
      head.replaceChildren(button);
    });
    sort(table, key);
  }

  // Fills a table: heads are texts or elements, cells too.
  function fill(table, heads, rows) {
    const focused = document.activeElement;
    const at = table.tHead?.contains(focused) ? focused.closest("th").cellIndex : null;
    const made = page.table(heads, rows);
    table.replaceChildren(...made.childNodes);
    sortable(table, table.id);
    if (at !== null) table.tHead.rows[0].cells[at]?.querySelector("button").focus();
  }

  const td = (content, attributes = {}) => page.element("span", attributes, content);

  // ---- colours of loads: below, at and above the uniform share

  function mixed(from, to, share) {
    return from.map((one, i) => Math.round(one + (to[i] - one) * share));
  }
  const [LESS, EVEN, MORE] = [[67, 147, 195], [247, 247, 247], [214, 96, 77]];
  function heat(share, count) {
    const ratio = Math.min(2, share * count);
    return `rgb(${(ratio < 1 ? mixed(LESS, EVEN, ratio) : mixed(EVEN, MORE, ratio - 1)).join(", ")})`;
  }

  // ---- parts of the page

  function losses() {
    const { train, val, domains, more_domains: more } = data.losses;
    const common = { phases: data.phases, last: data.max_steps, unit: "loss" };
    byId("losses-said").textContent = `${data.measure}. A point at step 0 has the adapters off.`
      + (more ? ` Of the domains the first ${domains.length} are drawn.` : "");
    charts.draw(byId("chart-losses"), [
      { label: "training", points: train, ...charts.look(5) },
      { label: "validation", points: val, ...charts.look(3), pointRadius: 4 },
    ], common);
    charts.draw(byId("chart-domain-losses"),
      domains.map(([name, points], n) => ({ label: name, points, ...charts.look(n), pointRadius: 3 })), common);
  }

  function stepSaid() {
    const step = data.routing.steps[state.step];
    const { phases } = data;
    return `${step.toLocaleString("en")} of ${data.max_steps.toLocaleString("en")}`
      + (phases.length ? `, phase ${phases[phaseOf(step)][0]}` : "");
  }

  function slider(id, count, chosen) {
    const input = byId(id);
    if (input === null) return;
    input.max = Math.max(0, count - 1);
    input.value = chosen;
  }

  function steps() {
    slider("step", data.routing.steps.length, state.step);
    slider("gate-step", data.routing.steps.length, state.step);
    for (const id of ["step-said", "gate-step-said"]) byId(id).textContent = stepSaid();
    for (const id of ["step", "gate-step"]) byId(id).setAttribute("aria-valuetext", stepSaid());
  }

  function map() {
    const canvas = byId("map");
    const count = sites();
    const high = Math.max(3, Math.min(22, Math.floor(600 / count)));
    const wide = Math.max(1, canvas.clientWidth);
    const dense = window.devicePixelRatio || 1;
    canvas.style.height = `${high * count}px`;
    canvas.width = wide * dense;
    canvas.height = high * count * dense;
    const ink = canvas.getContext("2d");
    ink.scale(dense, dense);
    ink.fillStyle = charts.colour("panel");
    ink.fillRect(0, 0, wide, high * count);
    const cell = wide / arrays.widest;
    for (let site = 0; site < count; site += 1) {
      loadAt(state.step, site).forEach((share, expert) => {
        ink.fillStyle = heat(share, data.routing.experts[site]);
        ink.fillRect(expert * cell, site * high, cell - (cell > 4 ? 1 : 0), high - (high > 4 ? 1 : 0));
      });
    }
    if (state.site !== AVERAGE) {
      ink.strokeStyle = charts.colour("ink");
      ink.lineWidth = 2;
      ink.strokeRect(1, state.site * high, wide - 2, high);
    }
    canvas.setAttribute("aria-label", `Load of each expert at ${count} sites, step ${stepSaid()}`);
    byId("scale").style.background = `linear-gradient(to right, ${heat(0, 1)}, ${heat(1, 1)}, ${heat(2, 1)})`;
  }

  // The experts that had the most load at any step.
  function busiest(all) {
    const most = new Array(all.length ? all[0].length : 0).fill(0);
    for (const row of all) row.forEach((share, expert) => { most[expert] = Math.max(most[expert], share); });
    const order = most.map((_, expert) => expert).sort((a, b) => most[b] - most[a]);
    return order.slice(0, MOST_LINES).sort((a, b) => a - b);
  }

  function overTime() {
    const all = data.routing.steps.map((_, step) => loadAt(step, state.site));
    const shown = busiest(all);
    byId("over-time").textContent = `Load of the experts over the steps: ${siteName(state.site)}`
      + (all.length && shown.length < all[0].length ? ` (the ${shown.length} busiest of ${all[0].length})` : "");
    charts.draw(byId("chart-load"), shown.map((expert) => ({
      label: expertName(expert),
      points: all.map((row, step) => [data.routing.steps[step], row[expert]]),
      ...charts.look(expert),
    })), { phases: data.phases, last: data.max_steps, unit: "share of assignments", low: 0, chosen: (_, step) => goTo(step) });
  }

  function sitesView() {
    overTime();
    sitesAtStep();
  }

  // What follows the slider.
  function sitesAtStep() {
    steps();
    map();
    siteTable();
  }

  function gatesAtStep() {
    steps();
    gateTable();
  }

  function siteTable() {
    const rows = data.routing.sites.map((name, site) => {
      const row = loadAt(state.step, site);
      const top = row.indexOf(Math.max(...row));
      const idle = row.filter((share) => share < 0.01 / row.length).length;
      return [name, td(expertName(top), { "data-value": top }), percent(row[top]), percent(Math.min(...row)), String(idle),
        figure("load_entropy", state.step, site).toFixed(2), figure("entropy", state.step, site).toFixed(2)];
    });
    fill(byId("table-sites"), ["site", "busiest expert", "its load in %", "least load in %", "dead", "load entropy", "router entropy"], rows);
  }

  function domainsView() {
    const { validations, domains } = data.routing;
    slider("validation", validations.length, state.validation);
    const said = `${validations[state.validation].toLocaleString("en")}`;
    byId("validation-said").textContent = said;
    byId("validation").setAttribute("aria-valuetext", said);
    const wide = domains.length * arrays.all;
    const found = domains.map((_, domain) => loads(arrays.domain_load, state.validation * wide + domain * arrays.all, state.site));
    const count = found.length ? found[0].length : 0;
    const there = found.filter((row) => row.some((share) => share > 0));
    const mean = Array.from({ length: count }, (_, e) => there.reduce((sum, row) => sum + row[e], 0) / Math.max(1, there.length));
    byId("domains-said").textContent = `${sentence(siteName(state.site))}: share of each domain's assignments that each expert gets, in %. `
      + "Unlike the mean: the share that would have to move for the domain to be routed like the average one.";
    const rows = domains.map((name, domain) => {
      const far = found[domain].reduce((sum, share, e) => sum + Math.abs(share - mean[e]), 0) / 2;
      return [name, percent(far), ...found[domain].map(percent)];
    });
    const table = byId("table-domains");
    fill(table, ["domain", "unlike the mean", ...mean.map((_, e) => label(e))], rows);
    for (const row of table.tBodies[0].rows) {
      [...row.cells].slice(2).forEach((cell) => {
        cell.className = "heat";
        cell.style.background = heat(Number(cell.textContent) / 100, count);
      });
    }
  }

  function gatesView() {
    const limits = data.routing.gates;
    const series = (name, site) => data.routing.steps.map((step, index) => [step, figure(name, index, site)]);
    const all = data.routing.sites.map((_, site) => site);
    const last = data.routing.steps.length - 1;
    const worst = (name, sign) => [...all].sort((a, b) => sign * (figure(name, last, a) - figure(name, last, b))).slice(0, MOST_LINES);
    const lines = (name, sign) => (state.site === AVERAGE ? worst(name, sign) : [state.site])
      .map((site, n) => ({ label: data.routing.sites[site], points: series(name, site), ...charts.look(n), borderWidth: 1.5 }));
    byId("gates-said").textContent = (state.site === AVERAGE
      ? `The sites with the lowest entropies and the largest shares, at most ${MOST_LINES}; point at a line for its name, or choose a site. `
      : `${siteName(state.site)}. `) + "A gate is a red line: a site counts as collapsed where one expert has more than "
      + `${percent(limits.dominant)} % of the routing weight, where fewer than ${limits.fewest} experts are in use, or where the entropy of `
      + `the load is below ${limits.lost_entropy} of what it was when the phase began. `
      + "The watch judges means of ten steps; drawn are single steps.";
    const gate = (points, name) => ({ label: name, points, borderColor: "#d55e00", borderDash: [3, 3], borderWidth: 2, pointRadius: 0 });
    const common = { phases: data.phases, last: data.max_steps, low: 0, high: 1, legend: state.site !== AVERAGE };
    const pick = (drawn) => ({ ...common, chosen: (line, step) => { if (line < drawn.length) goTo(step); } });
    const entropy = lines("load_entropy", 1);
    charts.draw(byId("chart-load-entropy"), [...entropy, ...lostEntropy(gate)], { ...pick(entropy), unit: "load entropy / ln E" });
    const largest = lines("largest", -1);
    charts.draw(byId("chart-largest"), [...largest, gate([[0, limits.dominant], [data.max_steps, limits.dominant]], "gate")],
      { ...pick(largest), unit: "largest weight share" });
    const own = lines("entropy", 1);
    charts.draw(byId("chart-entropy"), own, { ...pick(own), unit: "router entropy / ln E" });
    gatesAtStep();
  }

  // The gate of the entropy of the load of the chosen site, in each phase that has begun and is judged.
  function lostEntropy(gate) {
    if (state.site === AVERAGE) return [];
    return data.phases.flatMap(([, start], phase) => {
      const { phase_steps: begun, judged, gates: limits } = data.routing;
      if (!begun[phase] || !judged[phase]) return [];
      const height = (limits.lost_entropy * arrays.phase_entropy[phase * sites() + state.site]) / 255;
      const end = phase + 1 < data.phases.length ? data.phases[phase + 1][1] : data.max_steps;
      return [gate([[start, height], [end, height]], "gate")];
    });
  }

  function gateTable() {
    const rows = data.routing.sites.map((name, site) => {
      const found = gates(state.step, site);
      const marked = (text, over, more) => td(text, { class: over && found.judged ? "over" : null, "data-value": text, title: more });
      const over = Object.values(found.over).some(Boolean);
      return [name, marked(percent(found.largest), found.over.largest, null), marked(String(found.used), found.over.used, `at least ${found.fewest}`),
        marked(found.entropy.toFixed(2), found.over.entropy, null), found.lowest.toFixed(2),
        found.judged ? (over ? "beyond a gate" : "within") : "not judged"];
    });
    fill(byId("table-gates"), ["site", "largest weight share in %", "experts in use", "load entropy", "its gate", "verdict"], rows);
  }

  // ---- tokens

  // First token of a row among those of all rows.
  function firstToken(row) {
    return data.routing.tokens.rows.slice(0, row).reduce((sum, one) => sum + one.texts.length, 0);
  }

  function meanWeights(token) {
    return Array.from(arrays.mean.subarray(token * arrays.widest, (token + 1) * arrays.widest), (one) => one / 255);
  }

  // The expert of a token, and its share: at a site, or on the mean over all.
  function routed(token, site) {
    if (site === AVERAGE) {
      const mean = meanWeights(token);
      const expert = experts.largest(mean);
      return { expert, share: expert === null ? 0 : mean[expert] };
    }
    const share = arrays.weight[token * sites() + site] / 255;
    return { expert: share ? arrays.expert[token * sites() + site] : null, share };
  }

  let shownRow = null; // what stands there now
  let items = [];
  const both = document.querySelector(".both");
  const detail = both === null ? null : page.panel(byId("detail"), {
    opened: () => both.classList.add("open"),
    closed: () => {
      both.classList.remove("open");
      select(null);
    },
  });

  function select(item) {
    for (const one of items) one.setAttribute("aria-selected", String(one === item));
  }

  function tokensView() {
    const { rows, step, left_out: leftOut } = data.routing.tokens;
    const chooser = byId("row");
    if (chooser.options.length !== rows.length) {
      chooser.replaceChildren(...rows.map((row, index) => page.element("option", { value: index }, row.name)));
    }
    chooser.value = String(state.row);
    const row = rows[state.row];
    const key = JSON.stringify([state.row, row.texts]);
    const first = firstToken(state.row);
    if (shownRow !== key) {
      detail.close();
      items = row.texts.map((text, index) => page.element("span", { class: "token", "data-i": index }, text));
      for (const item of items) if (item.textContent.trim() === "") item.setAttribute("aria-label", "white space");
      const list = page.element("div", { class: "list", "aria-label": `Tokens of ${row.name}` },
        page.element("p", { class: "tokens", dir: "ltr", role: "group" }, ...items));
      document.querySelector("#view-tokens .list").replaceWith(list);
      page.listbox(list, items, (item, byKey) => openToken(item, byKey));
      shownRow = key;
    }
    byId("tokens-said").textContent = `As routed in the validation after step ${step.toLocaleString("en")}, ${siteName(state.site)}. A token has the `
      + "colour, line and number of the expert with the largest routing weight; the fuller the colour, the larger that weight."
      + (row.cut ? ` ${row.cut.toLocaleString("en")} more tokens of the row are not kept.` : "")
      + (leftOut ? ` ${leftOut} more rows are in routing.npz.` : "");
    byId("experts").replaceChildren(...data.routing.names.slice(0, 64).map((_, expert) => page.element("li", {}, label(expert))));
    experts.paint(items.map((item, index) => ({ item, ...routed(first + index, state.site) })));
  }

  function openToken(item, byKey) {
    const token = firstToken(state.row) + Number(item.dataset.i);
    select(item);
    const mean = meanWeights(token).map((share, expert) => [label(expert), percent(share)]);
    const where = data.routing.sites.map((name, site) => {
      const { expert, share } = routed(token, site);
      return [name, expert === null ? "-" : label(expert), percent(share)];
    });
    detail.open(`Token \u201c${item.textContent}\u201d`, [
      page.element("h3", {}, "Share of the routing weight, mean over sites"),
      page.scroll("Mean share of each expert", page.table(["expert", "share in %"], mean)),
      page.element("h3", {}, "The expert with the largest weight at each site"),
      page.scroll("Expert at each site", page.table(["site", "expert", "its share in %"], where)),
    ], item, byKey);
  }

  // ---- site, parts, and what is drawn when

  const chooser = document.querySelector(".chooser");
  let siteItems = [];
  function fillSites() {
    siteItems = [AVERAGE, ...data.routing.sites.keys()].map((site) => page.element("div", { "data-site": site }, siteName(site)));
    chooser.replaceChildren(...siteItems);
    page.listbox(chooser, siteItems, (item) => choose(Number(item.dataset.site)));
    markSite();
  }

  function markSite() {
    for (const item of siteItems) item.setAttribute("aria-selected", String(Number(item.dataset.site) === state.site));
  }

  function choose(site) {
    state.site = site;
    markSite();
    drawView();
  }

  const ofStep = { "view-sites": sitesAtStep, "view-gates": gatesAtStep };

  function goTo(step) {
    state.step = step;
    ofStep[state.view]();
    remember();
  }

  const views = [...document.querySelectorAll(".view")];
  const drawn = { "view-losses": losses, "view-sites": sitesView, "view-domains": domainsView, "view-gates": gatesView, "view-tokens": tokensView };

  function drawView() {
    const view = byId(state.view);
    if (view.querySelector(".live") !== null) drawn[state.view]?.();
    remember();
  }

  const tabs = views.map((view) => {
    const tab = page.element("button", { type: "button", role: "tab", id: `tab-${view.id}`, "aria-controls": view.id }, view.dataset.name);
    tab.addEventListener("click", () => show(view.id));
    view.setAttribute("role", "tabpanel");
    view.setAttribute("aria-labelledby", tab.id);
    return tab;
  });

  function show(id) {
    state.view = id;
    views.forEach((view, index) => {
      const here = view.id === id;
      view.hidden = !here;
      tabs[index].setAttribute("aria-selected", String(here));
      tabs[index].tabIndex = here ? 0 : -1;
      if (here) {
        const bySite = "sites" in view.dataset && data.routing !== null && view.querySelector(".live") !== null;
        document.querySelector(".frame").classList.toggle("with-sites", bySite);
        document.querySelector(".side").hidden = !bySite;
      }
    });
    drawView();
  }

  document.querySelector(".parts").addEventListener("keydown", (event) => {
    const at = tabs.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const tab = tabs[(to + tabs.length) % tabs.length];
    tab.focus();
    tab.click();
  });

  // ---- a run under way: its page is given news (watch.js), and keeps what was chosen

  const watched = data.watched !== null;
  const KEPT = `lmoe run page ${data.watched?.run}`; // of this run: the next one may be watched at the same address
  function remember() {
    if (!watched) return;
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(state));
    } catch {
      // the browser keeps nothing: the page begins anew when it is loaded anew
    }
  }

  function recall() {
    if (!watched) return;
    try {
      Object.assign(state, JSON.parse(sessionStorage.getItem(KEPT)) ?? {});
    } catch {
      // what is there was not written by this page
    }
    bound();
  }

  // Keeps every choice within what there is.
  function bound() {
    if (!views.some((view) => view.id === state.view)) state.view = views[0].id;
    state.sorted ??= {};
    const { routing } = data;
    if (routing === null) return;
    const within = (at, count) => (Number.isInteger(at) && at < count ? at : count - 1);
    if (!(Number.isInteger(state.site) && state.site < routing.sites.length)) state.site = AVERAGE;
    state.step = within(state.step, routing.steps.length);
    state.validation = within(state.validation, routing.validations.length);
    if (!(Number.isInteger(state.row) && state.row < routing.tokens.rows.length)) state.row = 0;
  }

  // Shows what is new; what was chosen stays.
  function take(news) {
    const before = data.routing;
    const [step, validation] = before === null ? [null, null] : [before.steps[state.step], before.validations[state.validation]];
    const atEnd = before === null || state.step === before.steps.length - 1;
    const atLast = before === null || state.validation === before.validations.length - 1;
    data = news.data;
    arrays = decoded(data.routing);
    for (const [name, rows] of Object.entries(news.tables)) refill(name, rows, news.tables.mean);
    if (data.routing !== null) {
      // Who looks at the newest goes on with it; others stay at their step, or the nearest that is still there.
      const nearest = (all, wanted) => all.reduce((best, one, at) => (Math.abs(one - wanted) < Math.abs(all[best] - wanted) ? at : best), 0);
      state.step = atEnd ? null : nearest(data.routing.steps, step);
      state.validation = atLast ? null : nearest(data.routing.validations, validation);
    }
    bound();
    drawView();
  }

  function refill(name, rows, mean) {
    const table = document.querySelector(`[data-table="${name}"] table`);
    if (table === null) return;
    const made = (all) => all.map((cells) => page.element("tr", {}, ...cells.map((cell) => page.element("td", {}, cell))));
    table.tBodies[0].replaceChildren(...made(rows));
    if (name === "losses" && table.tFoot !== null) table.tFoot.replaceChildren(...made(mean));
    sort(table, `table ${name}`);
  }

  page.news = take;

  // ---- the beginning

  document.body.classList.add("scripted");
  for (const live of document.querySelectorAll(".live")) live.hidden = false;
  document.querySelector(".parts").append(...tabs);
  document.querySelector(".parts").hidden = false;
  page.showControls();
  bound();
  recall();
  document.querySelectorAll("[data-sorted]").forEach((place) => {
    const table = place.tagName === "TABLE" ? null : place.querySelector("table");
    if (table !== null) sortable(table, `table ${place.dataset.table ?? "targets"}`);
  });
  if (data.routing !== null) {
    fillSites();
    for (const id of ["step", "gate-step"]) byId(id)?.addEventListener("input", (event) => goTo(Number(event.target.value)));
    byId("validation")?.addEventListener("input", (event) => {
      state.validation = Number(event.target.value);
      drawView();
    });
    byId("row")?.addEventListener("change", (event) => {
      state.row = Number(event.target.value);
      drawView();
    });
    byId("map")?.addEventListener("click", (event) => {
      const box = event.target.getBoundingClientRect();
      choose(Math.max(0, Math.min(sites() - 1, Math.floor(((event.clientY - box.top) / box.height) * sites()))));
    });
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawView);
  let resized = null;
  window.addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(() => { if (state.view === "view-sites" && byId("map") !== null) map(); }, 100);
  });
  show(state.view);
}
