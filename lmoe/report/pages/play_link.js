"use strict";
// Settings behind the # of a link, which no browser sends to a server. The key stands there once, when the page is opened.
const link = (() => {
  const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

  // "own", or weights as JSON.
  const written = (weights) => (weights === null ? "own" : JSON.stringify(weights));

  function read(text) {
    if (text === "own") return null;
    try {
      const found = JSON.parse(text);
      return mixtures.isWeights(found) ? found : undefined;
    } catch {
      return undefined;
    }
  }

  return {
    // What a fragment holds; what cannot be is left out.
    parsed(fragment) {
      const given = new URLSearchParams(fragment.replace(/^#/, ""));
      const found = { key: given.get("key"), prompt: given.get("prompt"), both: given.get("both") === "1", sampling: {} };
      for (const side of ["a", "b"]) found[side] = given.has(side) ? read(given.get(side)) : undefined;
      for (const name of NUMBERS) {
        const value = given.get(name);
        if (value !== null && (value === "" || Number.isFinite(Number(value)))) found.sampling[name] = value;
      }
      found.any = [...given.keys()].some((name) => name !== "key");
      return found;
    },

    fragment({ both, a, b, sampling, prompt = null }) {
      const made = new URLSearchParams();
      if (both) made.set("both", "1");
      made.set("a", written(a));
      if (both) made.set("b", written(b));
      for (const name of NUMBERS) made.set(name, sampling[name]);
      if (prompt) made.set("prompt", prompt);
      return `#${made}`;
    },
  };
})();
