// Greedy tokens of llama.cpp for some prompts: node llama_cpp.mjs PACKAGES REQUEST ANSWER
// PACKAGES: folder with node_modules. REQUEST: JSON with model, lora (a file or null), prompts (text, ids), tokens.
// ANSWER: JSON, for each prompt the ids of its text and the tokens that follow its ids.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [packages, requestFile, answerFile] = process.argv.slice(2);
const entry = path.join(packages, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const cannotRun = 3;
const request = JSON.parse(fs.readFileSync(requestFile, "utf8"));

// One thread: those of llama.cpp wait by spinning, and on cores that others use too they take fifty times as long.
let llama;
try {
    llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
} catch (error) {
    console.error(String(error));
    process.exit(cannotRun);
}
const model = await llama.loadModel({modelPath: request.model});
const longest = Math.max(...request.prompts.map((prompt) => prompt.ids.length));
const context = await model.createContext({
    contextSize: longest + request.tokens + 8,
    threads: 1,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
    lora: request.lora == null ? undefined : {adapters: [{filePath: request.lora, scale: 1}]}
});
const sequence = context.getSequence();
const answers = [];
for (const prompt of request.prompts) {
    await sequence.clearHistory();
    const generated = [];
    for await (const token of sequence.evaluate(prompt.ids, {temperature: 0, yieldEogToken: true})) {
        generated.push(token);
        if (generated.length >= request.tokens || model.isEogToken(token))
            break;
    }
    answers.push({ids: model.tokenize(prompt.text, true), generated});
}
fs.writeFileSync(answerFile, JSON.stringify({answers, prependsBos: model.tokens.shouldPrependBosToken}));
process.exit(0);
