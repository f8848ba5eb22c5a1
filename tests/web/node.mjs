/** Decodes files in Node, with ONNX Runtime Web's WebAssembly: `node node.mjs RUNTIME < jobs.json`, a line of JSON for each. */

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const web = new URL("../../vaecodec/web/", import.meta.url);
const { readContainer, VaeError } = await import(new URL("container.js", web));
const { Decoder } = await import(new URL("decode.js", web));
const { Display } = await import(new URL("colour.js", web));
const runtime = await import(pathToFileURL(process.argv[2]));
runtime.env.wasm.numThreads = 1;
runtime.env.logLevel = "error";

const decoders = new Map();

/** One decoder for each weights file. groups: of scales that tiles move, where it is not the weights' own. */
async function decoderWith(weights, groups) {
  const key = `${weights} ${groups}`;
  if (!decoders.has(key)) decoders.set(key, new Decoder(runtime, async () => new Uint8Array(readFileSync(weights))));
  return decoders.get(key);
}

/** What a canvas would hold: RGBA, upright. */
async function shown(decoder, opened) {
  const display = new Display(opened);
  const { width, height, x, y } = display.place({ x: 0, y: 0, ...opened.header });
  if (x || y) throw new Error("the picture does not begin at its corner");
  const samples = new Uint8ClampedArray(4 * width * height);
  for await (const part of decoder.parts(opened)) {
    const { x: left, y: top, width: w, height: h } = display.place(part);
    const rgba = display.convert(part);
    for (let i = 0; i < h; i++) samples.set(rgba.subarray(4 * i * w, 4 * (i + 1) * w), 4 * ((top + i) * width + left));
  }
  const { notes, colorSpace } = display;
  return { width, height, notes, colorSpace, first: [...samples.subarray(0, 4)], samples };
}

for (const { file, weights, groups, region, display } of JSON.parse(readFileSync(0, "utf8"))) {
  const start = performance.now();
  let answer;
  try {
    const opened = readContainer(new Uint8Array(readFileSync(file)));
    const decoder = await decoderWith(weights, groups);
    if (groups !== undefined) (await decoder.networks(opened.header)).config.groups = groups;
    const { samples, ...shape } = await (display ? shown(decoder, opened) : decoder.decode(opened, region));
    answer = { ...shape, hash: createHash("sha256").update(new Uint8Array(samples.buffer)).digest("hex") };
  } catch (error) {
    answer = error instanceof VaeError ? { kind: error.kind, message: error.message } : { crash: String(error.stack ?? error) };
  }
  console.log(JSON.stringify({ ...answer, seconds: (performance.now() - start) / 1000 }));
}
