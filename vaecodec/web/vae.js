/** What a page uses: `decode`, `draw`, `toImageData`, and the element `<vae-image src="x.vae" alt="...">`. */

/** @import { Header, Part, Region } from "./types" */

import { VaeError } from "./container.js";

/**
 * @typedef {Header & {shown: Region, notes: string[], colorSpace: PredefinedColorSpace}} File shown: the region, upright
 * @typedef {Region & {rgba: Uint8ClampedArray<ArrayBuffer>}} Shown upright
 * @typedef {{region?: Region, onFile?: (file: File) => void, onPart?: (part: Shown) => void,
 *   onSamples?: (part: Part) => void}} Options region: in pixels as they are stored; onPart: is given each part when it
 *   is decoded; onSamples: the same as raw samples, in its place
 */

/** @type {Worker | undefined} */
let worker;
let count = 0;
/** @type {Map<number, (answer: any) => void>} */
const waiting = new Map();

/** Ends all that is being decoded. @param {string} [message] */
export function stop(message = "stopped") {
  worker?.terminate();
  worker = undefined;
  for (const [id, answer] of waiting) answer({ id, error: { kind: "failed", message } });
}

/** Decodes a file; gives what its header says when all is done. Throws VaeError.
 *  @param {Uint8Array} data @param {Options} [options] @returns {Promise<File>} */
export function decode(data, { region, onFile, onPart, onSamples } = {}) {
  if (!worker) {
    worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    worker.onmessage = ({ data }) => waiting.get(data.id)?.(data);
    worker.onerror = () => stop("the decoder could not be started");
  }
  return new Promise((resolve, reject) => {
    /** @type {any} */
    let file;
    waiting.set(++count, (answer) => {
      file ??= answer.file;
      if (answer.file) onFile?.(file);
      if (answer.part) (onSamples ?? onPart)?.(answer.part);
      if (!answer.error && !answer.done) return;
      waiting.delete(answer.id);
      if (answer.error) reject(new VaeError(answer.error.kind, answer.error.message));
      else resolve(file);
    });
    worker?.postMessage({ id: count, data, region, raw: Boolean(onSamples) });
  });
}

/** A picture, or a region of it. @param {Uint8Array} data @param {Region} [region] @returns {Promise<ImageData>} */
export async function toImageData(data, region) {
  /** @type {Shown[]} */
  const parts = [];
  const { shown, colorSpace } = await decode(data, { region, onPart: (part) => parts.push(part) });
  const whole = new ImageData(shown.width, shown.height, { colorSpace });
  for (const { x, y, width, height, rgba } of parts) {
    for (let i = 0; i < height; i++) {
      const row = rgba.subarray(4 * i * width, 4 * (i + 1) * width);
      whole.data.set(row, 4 * ((y - shown.y + i) * shown.width + x - shown.x));
    }
  }
  return whole;
}

/** Draws a file on a canvas, each part when it is decoded. @param {Uint8Array} data @param {HTMLCanvasElement} canvas
 *  @param {Options} [options] */
export function draw(data, canvas, { region, onFile, onPart } = {}) {
  /** @type {File} */
  let file;
  /** @type {CanvasRenderingContext2D | null} */
  let context;
  return decode(data, {
    region,
    onFile: (/** @type {File} */ opened) => {
      file = opened;
      [canvas.width, canvas.height] = [file.shown.width, file.shown.height];
      context = canvas.getContext("2d", { colorSpace: file.colorSpace });
      onFile?.(file);
    },
    onPart: (part) => {
      const { x, y, width, rgba } = part;
      const pixels = new ImageData(rgba, width, part.height, { colorSpace: file.colorSpace });
      context?.putImageData(pixels, x - file.shown.x, y - file.shown.y);
      onPart?.(part);
    },
  });
}

/** `<vae-image src alt>`: fires "load", or "error" with the VaeError as its `error`. */
class VaeImage extends HTMLElement {
  static observedAttributes = ["src"];

  async attributeChangedCallback() {
    const [src, alt] = [this.getAttribute("src") ?? "", this.getAttribute("alt") ?? ""];
    const canvas = document.createElement("canvas");
    canvas.style.maxWidth = "100%";
    Object.assign(canvas, { role: "img", ariaLabel: alt });
    try {
      const response = await fetch(new URL(src, document.baseURI));
      if (!response.ok) throw new VaeError("failed", `${src}: ${response.status}`);
      await draw(new Uint8Array(await response.arrayBuffer()), canvas, {
        onFile: ({ notes }) => {
          this.title = notes.join("; ");
          this.replaceChildren(canvas);
        },
      });
      this.dispatchEvent(new Event("load"));
    } catch (error) {
      const { message } = /** @type {Error} */ (error);
      this.replaceChildren(`${alt} (${message})`);
      this.dispatchEvent(new ErrorEvent("error", { error, message }));
    }
  }
}

customElements.define("vae-image", VaeImage);
