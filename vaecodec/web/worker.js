/** Decodes in a worker: takes {id, data, region, raw}, gives {id, file}, then {id, part} for each part, {id, done} or
 *  {id, error}. */

import { Display } from "./colour.js";
import { VaeError, readContainer } from "./container.js";
import { Decoder } from "./decode.js";
import { ort } from "./runtime.js";

const decoder = new Decoder(ort, async (model) => {
  const response = await fetch(new URL(`weights/${model}.safetensors`, import.meta.url));
  if (!response.ok) throw new VaeError("weights", `this site lacks the weights that the file was made with, ${model}`);
  return new Uint8Array(await response.arrayBuffer());
});

/** @type {Promise<void>} */
let last = Promise.resolve();

/** @param {{id: number, data: Uint8Array, region?: import("./types").Region, raw?: boolean}} job */
async function decode({ id, data, region, raw }) {
  try {
    const file = readContainer(data);
    const display = new Display(file);
    const { width, height } = file.header;
    const shown = display.place(region ?? { x: 0, y: 0, width, height });
    const { colorSpace, notes } = display;
    postMessage({ id, file: { ...file.header, shown, colorSpace, notes } });
    for await (const part of decoder.parts(file, region)) {
      const given = raw ? part : { ...display.place(part), rgba: display.convert(part) };
      postMessage({ id, part: given }, { transfer: [("rgba" in given ? given.rgba : given.samples).buffer] });
    }
    postMessage({ id, done: true });
  } catch (error) {
    const { kind = "failed", message } = /** @type {VaeError} */ (error);
    postMessage({ id, error: { kind, message } });
  }
}

addEventListener("message", ({ data }) => (last = last.then(() => decode(data))));
