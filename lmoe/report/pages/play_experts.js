"use strict";
// Experts that are added and removed while the server runs, by those who may.
const shelf = (() => {
  const CONFIGS = ["lmoe_config.json", "adapter_config.json"];
  const WEIGHTS = { "lmoe_config.json": "adapter.safetensors", "adapter_config.json": "adapter_model.safetensors" };
  const BESIDE = "centroid.safetensors";

  const at = (id) => document.getElementById(id);
  const megabytes = (bytes) => `${Number((bytes / 1e6).toPrecision(3))} MB`;

  // The files of one expert among those that were chosen, also from a folder with more in it; null: there is none.
  function filesOfExpert(files) {
    const folders = new Map();
    for (const file of files) {
      const path = file.webkitRelativePath || file.name;
      const folder = path.slice(0, path.length - file.name.length);
      folders.set(folder, [...(folders.get(folder) ?? []), file]);
    }
    const order = [...folders.keys()].sort((one, other) => one.length - other.length);
    for (const folder of order) {
      const inside = folders.get(folder);
      const config = CONFIGS.map((name) => inside.find((file) => file.name === name)).find(Boolean);
      if (config === undefined) continue;
      const tensors = inside.filter((file) => file.name.endsWith(".safetensors"));
      const known = tensors.filter((file) => file.name === WEIGHTS[config.name] || file.name === BESIDE);
      if (tensors.length > 0) return [config, ...(known.length > 0 ? known : tensors)];
    }
    return null;
  }

  function path(name, more = "") {
    return `/v1/experts/${encodeURIComponent(name)}${more}`;
  }

  // `changed` is called when there are other experts than before, `askForKey` where another key is to be given.
  function start(changed, askForKey) {
    const say = (text, wrong = false) => {
      at("change").textContent = page.visible(text);
      at("change").className = wrong ? "warning" : "quiet";
    };

    async function doing(form, before, work, after) {
      for (const button of form.querySelectorAll("button")) button.disabled = true;
      say(before);
      try {
        await work();
        await changed(); // what is said to be there, or gone, can be seen to be so
        say(after);
        return true;
      } catch (error) {
        say(error.message, true);
        if (error.status === 404) await changed().catch(() => {}); // another tab was faster
        return false;
      } finally {
        for (const button of form.querySelectorAll("button")) button.disabled = false;
      }
    }

    at("add").addEventListener("submit", async (event) => {
      event.preventDefault();
      const [name, place] = [at("add-name").value.trim(), at("add-place").value.trim()];
      const add = () => api.json("/v1/experts", { method: "POST", body: { name, place } });
      if (await doing(event.target, `Reading ${name} …`, add, `${name} is there.`)) event.target.reset();
    });

    at("upload").addEventListener("submit", async (event) => {
      event.preventDefault();
      const files = filesOfExpert([...at("upload-files").files, ...at("upload-folder").files]);
      if (files === null) {
        say("No expert is among these files: adapter_config.json or lmoe_config.json is needed, and a .safetensors beside it.", true);
        return;
      }
      const size = files.reduce((sum, file) => sum + file.size, 0);
      const most = Number(at("upload").dataset.most);
      if (size > most) {
        say(`These files have ${megabytes(size)}, and at most ${megabytes(most)} may be uploaded (--upload-size).`, true);
        return;
      }
      const [name, form] = [at("upload-name").value.trim(), new FormData()];
      for (const file of files) form.append("files", file, file.name);
      const add = () => api.json(path(name, "/files"), { method: "POST", body: form });
      if (await doing(event.target, `Uploading ${name}, ${megabytes(size)} …`, add, `${name} is there.`)) event.target.reset();
    });

    // What the server says of its experts, and what whoever asks may do with them.
    return (server, experts) => {
      const may = server.experts_change && server.admin;
      at("fixed").hidden = may;
      at("fixed").textContent = server.experts_change
        ? "Experts cannot be changed with this key: the server wants its admin token. "
        : "The experts here neither come nor go: start lmoe play with --model and --experts, without --head and --router arrow, for that.";
      if (server.experts_change) {
        const other = page.element("button", { type: "button" }, "Give another key");
        other.addEventListener("click", askForKey);
        at("fixed").append(other);
      }
      at("adding").hidden = !may;
      at("upload").hidden = server.upload_size === 0;
      at("upload").dataset.most = server.upload_size;
      at("upload-size").textContent = megabytes(server.upload_size);
      at("shelf").replaceChildren(...experts.map((expert) => {
        const name = page.visible(expert.name);
        const button = page.element("button", { type: "button", "aria-label": `Remove ${name}` }, "Remove");
        const item = page.element("li", { class: "row" }, page.element("span", {}, `${name}, rank ${expert.rank}`));
        if (may) item.append(button);
        button.addEventListener("click", async () => {
          const remove = () => api.json(path(expert.name), { method: "DELETE" });
          await doing(item, `Removing ${expert.name} …`, remove, `${expert.name} is gone.`);
          at("experts").querySelector("summary").focus();
        });
        return item;
      }));
    };
  }

  return { start };
})();
