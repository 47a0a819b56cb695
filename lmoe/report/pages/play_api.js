"use strict";
// What the playground asks of its server, and of no other: JSON, and answers as they are written.
const api = (() => {
  const KEY = "lmoe.key";
  let key = null;
  try {
    key = sessionStorage.getItem(KEY);
  } catch { /* a browser that keeps nothing: the key lives as long as the page */ }

  class Refused extends Error {
    constructor(message, status = 0) {
      super(message);
      this.status = status;
    }
  }

  async function ask(path, { method = "GET", body = null, signal = null } = {}) {
    const headers = {};
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    const isForm = body instanceof FormData;
    if (body !== null && !isForm) headers["Content-Type"] = "application/json";
    const content = body === null || isForm ? body : JSON.stringify(body);
    let response;
    try {
      response = await fetch(path, { method, headers, body: content, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server does not answer. Is lmoe play still running?");
    }
    if (!response.ok) throw new Refused(await reason(response), response.status);
    return response;
  }

  async function reason(response) {
    try {
      return (await response.json()).error.message;
    } catch {
      return `The server has refused this (status ${response.status}).`;
    }
  }

  // Each event of a stream of server-sent events, until it says that it is done.
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let left = "";
    try {
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (left + value).split("\n\n");
        left = parts.pop();
        for (const part of parts) {
          if (!part.startsWith("data: ")) continue; // a comment: still there
          const text = part.slice("data: ".length);
          if (text === "[DONE]") return;
          const event = JSON.parse(text);
          if (event.error) throw new Refused(event.error.message);
          yield event;
        }
      }
    } finally {
      reader.cancel().catch(() => {});
    }
    throw new Refused("The answer broke off: the server has ended the stream.");
  }

  const api = {
    Refused,

    // The key that the server is asked with, kept as long as this tab is open; a whole link with a key in it will do.
    useKey(text) {
      const isLink = /^\s*(https?:\/\/|#)/.test(text);
      api.keepKey(isLink ? new URLSearchParams(text.slice(text.indexOf("#") + 1)).get("key") ?? "" : text.trim());
    },

    // The very key; what no header can hold is none, so that the server asks for one.
    keepKey(text) {
      key = /^[\x21-\x7e]+$/.test(text) ? text : null;
      try {
        if (key === null) sessionStorage.removeItem(KEY);
        else sessionStorage.setItem(KEY, key);
      } catch { /* as above */ }
    },

    async json(path, options) {
      return (await ask(path, options)).json();
    },

    // Events of an answer as it is written.
    async* stream(path, body, signal) {
      yield* events(await ask(path, { method: "POST", body, signal }));
    },
  };
  return api;
})();
