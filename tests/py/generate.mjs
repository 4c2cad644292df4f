// Generates tokens with llama.cpp, always the likeliest: generate.mjs NODE_MODULES FILE... prints a line of tokens for each.
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [modules, ...files] = process.argv.slice(2);
const require = createRequire(path.join(modules, "x.js"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const llama = await getLlama({ gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error });
for (const modelPath of files) {
    const model = await llama.loadModel({ modelPath });
    const context = await model.createContext({ contextSize: 64, threads: 1 });
    const sequence = context.getSequence();
    const tokens = [];
    for await (const token of sequence.evaluate([1, 40, 50, 60], { temperature: 0, yieldEogToken: true })) {
        tokens.push(token);
        if (tokens.length >= 16) break;
    }
    console.log(tokens.join(","));
    await context.dispose();
    await model.dispose();
}
process.exit(0);
