// llama.cpp under measurement: llama_peer.mjs NODE_MODULES FILE loads a GGUF file and says when it is ready, then answers requests, a
// line of JSON each, with the likeliest tokens.
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [modules, modelPath] = process.argv.slice(2);
const require = createRequire(path.join(modules, "x.js"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const start = performance.now();
const threads = os.cpus().length;
const llama = await getLlama({ gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error, maxThreads: threads });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 1024, batchSize: 512, threads });
console.log(JSON.stringify({ load: (performance.now() - start) / 1e3 }));
for await (const line of createInterface({ input: process.stdin })) {
    const request = JSON.parse(line);
    const sequence = context.getSequence();
    const tokens = [];
    const start = performance.now();
    let first = start;
    for await (const token of sequence.evaluate(request.prompt, { temperature: 0, yieldEogToken: true })) {
        if (tokens.length === 0) first = performance.now();
        tokens.push(token);
        if (tokens.length >= request.tokens) break;
    }
    const rest = (performance.now() - first) / 1e3;
    console.log(JSON.stringify({ first: (first - start) / 1e3, rate: (tokens.length - 1) / rest, tokens }));
    sequence.dispose();
}
process.exit(0);
