"use strict";
// The playground of `lmoe play`: a conversation with one mixture, or with two side by side.
{
  const at = (id) => document.getElementById(id);
  const SIDES = ["a", "b"];
  const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
  const NEAR = 120; // pixels from the end of the page within which it follows an answer

  let server = null;
  let exchanges = []; // {prompt, answers: {a, b}, elements}
  let under = null; // AbortController of the answers under way
  const message = at("message");
  const mixture = Object.fromEntries(SIDES.map((side) =>
    [side, new mixtures.Mixture(at(`side-${side}`), (presets = false) => changed(presets))]));
  const showExperts = shelf.start(refresh, askForKey);

  const both = () => at("both").checked;
  const shown = () => (both() ? SIDES : ["a"]);
  const log = (side) => at(`side-${side}`).querySelector(".log");

  // Settings

  function settings() {
    const sampling = Object.fromEntries(SAMPLING.map((name) => [name, at(name).value]));
    return { both: both(), a: mixture.a.state, b: mixture.b.state, sampling };
  }

  function changed(presets) {
    if (presets) {
      for (const one of Object.values(mixture)) {
        one.makePresets();
        one.show();
      }
    }
    history.replaceState(null, "", link.fragment(settings()));
    const last = message.value || exchanges.at(-1)?.prompt || null;
    const whole = { ...settings(), prompt: at("with-message").checked ? last : null };
    at("link").value = location.origin + location.pathname + link.fragment(whole);
  }

  function useSettings(found) {
    if (!found.any) return;
    for (const side of SIDES) if (found[side] !== undefined) mixture[side].state = found[side];
    for (const [name, value] of Object.entries(found.sampling)) at(name).value = value;
    at("both").checked = found.both;
    if (found.prompt !== null) message.value = found.prompt;
    arrange();
  }

  function arrange() {
    at("side-b").hidden = !both();
    at("sides").className = `sides ${both() ? "two" : "one"}`;
    for (const side of SIDES) at(`title-${side}`).hidden = !both();
    changed();
  }

  // What is sent

  // Turns of a side; an exchange that it has not answered goes on from the other's answer.
  function turnsOf(side) {
    return exchanges.slice(0, -1).flatMap(({ prompt, answers: given }) => {
      const answer = [given[side], given.a, given.b].find((one) => one && one.text !== "");
      return answer === undefined ? []
        : [{ role: "user", content: prompt }, { role: "assistant", content: answer.text }];
    });
  }

  function body(side, prompt) {
    const asked = {
      model: server.model, stream: true, stream_options: { include_usage: true }, lmoe: "tokens",
    };
    for (const name of SAMPLING) if (at(name).value !== "") asked[name] = at(name).valueAsNumber;
    const weights = mixture[side].ofRequest();
    if (weights !== null) asked.experts = weights;
    if (server.chat) asked.messages = [...turnsOf(side), { role: "user", content: prompt }];
    else asked.prompt = prompt;
    return asked;
  }

  async function answer(side, exchange, signal) {
    const made = new answers.Answer(server.experts, mixture[side].label(), following);
    exchange.answers[side] = made;
    place(side, exchange, made.element);
    let [why, decided, used] = [null, null, null];
    const path = server.chat ? "/v1/chat/completions" : "/v1/completions";
    try {
      for await (const event of api.stream(path, body(side, exchange.prompt), signal)) {
        used = event.usage ?? used;
        const [choice] = event.choices;
        if (choice === undefined) continue;
        decided = event.lmoe ?? decided;
        why = choice.finish_reason ?? why;
        const text = server.chat ? choice.delta.content ?? "" : choice.text;
        if (text !== "" || choice.lmoe) made.add(text, choice.lmoe?.tokens ?? []);
      }
      following(() => made.finish(why ?? "stop", decided, used));
    } catch (error) {
      if (error.name === "AbortError") made.finish("stopped", null, null);
      else {
        following(() => made.fail(error.message));
        if (error.status === 401) askForKey();
        if (error.status === 404) await refresh().catch(() => {}); // another tab has changed the experts
      }
    }
  }

  // The page stays at its end while it grows, where it was there.
  function following(grow) {
    const end = document.documentElement;
    const isAtEnd = end.scrollHeight - end.clientHeight - window.scrollY < NEAR;
    grow();
    if (isAtEnd) window.scrollTo(0, end.scrollHeight);
  }

  // What is shown

  function place(side, exchange, element) {
    const own = exchange.elements[side] ?? (exchange.elements[side] = page.element("div", { class: "exchange" }));
    if (!own.isConnected) log(side).append(own);
    own.replaceChildren(page.element("p", { class: "user said", dir: "auto" }, page.visible(exchange.prompt)), element);
  }

  function hello() {
    const words = server.experts.length
      ? "Write something below. Each piece of the answer has the colour, line and number of the expert that counted most where it was chosen."
      : "Write something below.";
    for (const side of SIDES) log(side).replaceChildren(page.element("p", { class: "hello" }, words));
  }

  function enable() {
    const running = under !== null;
    at("send").hidden = running;
    at("stop").hidden = !running;
    for (const id of ["retry", "edit"]) at(id).disabled = running || exchanges.length === 0;
    at("new").disabled = running;
    at("both").disabled = running;
  }

  // What is done

  async function run(prompt) {
    if (exchanges.length === 0) for (const side of SIDES) log(side).replaceChildren();
    const exchange = { prompt, answers: { a: null, b: null }, elements: {} };
    exchanges.push(exchange);
    under = new AbortController();
    enable();
    at("status").textContent = "The answer is being written.";
    if (!both()) place("b", exchange, page.element("p", { class: "answer of" }, "Mixture B was not asked this; it goes on from the answer of A."));
    const { signal } = under;
    const sides = shown();
    const all = sides.map((side) => answer(side, exchange, signal));
    window.scrollTo(0, document.documentElement.scrollHeight);
    await Promise.all(all);
    under = null;
    enable();
    changed();
    const texts = sides.map((side) => exchange.answers[side].text.slice(0, 500));
    at("status").textContent = texts.length === 1 ? `Answer: ${texts[0]}` : `Answer of A: ${texts[0]}. Answer of B: ${texts[1]}`;
  }

  // Whether the sampling is one that can be asked for; else the field is shown.
  function checked() {
    const wrong = SAMPLING.map(at).find((field) => !field.checkValidity());
    if (wrong === undefined) return true;
    at("sampling").open = true;
    wrong.reportValidity();
    return false;
  }

  function send() {
    const prompt = message.value;
    if (under !== null || server === null || prompt.trim() === "") return;
    if (!checked()) return;
    message.value = "";
    run(prompt);
  }

  // The last exchange is taken back; returns what was asked in it.
  function takeBack() {
    const { prompt, elements } = exchanges.pop();
    for (const element of Object.values(elements)) element.remove();
    return prompt;
  }

  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // of an input method
    event.preventDefault();
    send();
  });
  message.addEventListener("input", () => { if (at("with-message").checked) changed(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && under !== null) under.abort();
  });
  at("stop").addEventListener("click", () => {
    under?.abort();
    message.focus();
  });
  at("retry").addEventListener("click", () => {
    if (!checked()) return;
    message.focus();
    run(takeBack());
  });
  at("edit").addEventListener("click", () => {
    message.value = takeBack();
    if (exchanges.length === 0) hello();
    enable();
    message.focus();
  });
  at("new").addEventListener("click", () => {
    exchanges = [];
    hello();
    enable();
    message.focus();
  });
  at("both").addEventListener("change", arrange);
  at("with-message").addEventListener("change", () => changed());
  at("sharing").addEventListener("toggle", () => changed());
  for (const name of SAMPLING) at(name).addEventListener("change", () => changed());
  at("copy").addEventListener("click", async () => {
    changed();
    at("link").select();
    try {
      await navigator.clipboard.writeText(at("link").value);
      at("copy").textContent = "Copied";
    } catch {
      at("copy").textContent = "Press Ctrl+C"; // a browser that lets no page write there: the link is selected
    }
    setTimeout(() => { at("copy").textContent = "Copy link"; }, 2000);
  });

  // The server

  function askForKey() {
    at("key").hidden = false;
    at("key-text").focus();
  }

  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    api.useKey(at("key-text").value);
    at("key-text").value = "";
    at("key").hidden = true;
    begin();
  });

  function about() {
    const count = server.experts.length;
    const names = count === 0 ? "no experts" : count === 1 ? "1 expert" : `${count} experts`;
    return `${page.visible(server.model)}: ${names}, mixed by ${page.visible(server.own_mixture)}`
      + (server.chat ? "" : "; it has no chat template, so it continues your text");
  }

  async function refresh() {
    const [found, experts] = await Promise.all([api.json("/v1/server"), api.json("/v1/experts")]);
    server = found;
    for (const one of Object.values(mixture)) one.use(server);
    showExperts(server, experts.data);
    at("about").textContent = about();
    at("max_tokens").max = server.max_tokens;
    if (at("max_tokens").valueAsNumber > server.max_tokens) at("max_tokens").value = server.max_tokens;
    document.querySelector("label[for=message]").textContent = server.chat ? "Message" : "Text to continue";
    changed();
  }

  async function begin() {
    const found = link.parsed(location.hash);
    try {
      await refresh();
    } catch (error) {
      at("about").textContent = error.status === 401 ? "" : error.message;
      if (error.status === 401) askForKey();
      return;
    }
    at("app").hidden = false;
    useSettings(found);
    if (exchanges.length === 0) hello();
    enable();
    message.focus();
  }

  function open() {
    const { key } = link.parsed(location.hash);
    if (key !== null) {
      api.keepKey(key);
      const rest = new URLSearchParams(location.hash.slice(1));
      rest.delete("key");
      history.replaceState(null, "", `#${rest}`); // so that no copied address holds it
    }
    begin();
  }

  window.addEventListener("hashchange", open);
  open();
}
