/** The page on which `.vae` files are dropped. `?src=x.vae` shows one that lies beside it. */

import { readHeader } from "./container.js";
import { decode, draw, stop, toImageData } from "./vae.js";

const MOST = 2 ** 26; // pixels that are shown at once
const KINDS = ["", "lossy", "lossless", "PCA"];

const [says, canvas, form] = ["says", "picture", "region"].map((id) => /** @type {any} */ (document.getElementById(id)));
/** @type {Uint8Array | undefined} */
let data;

/** @param {import("./types").Region} [region] */
async function show(region) {
  if (!data) return;
  const start = performance.now();
  says.className = "";
  try {
    const header = readHeader(data);
    const { width, height } = header;
    const side = Math.sqrt(MOST);
    if (!region && width * height > MOST) region = { x: 0, y: 0, width: Math.min(width, side), height: Math.min(height, side) };
    const wanted = region ?? { x: 0, y: 0, width, height };
    for (const [name, value] of Object.entries(wanted)) form.elements[name].value = value;
    form.hidden = false;
    const quality = header.kind === 2 ? "" : ` at quality ${header.quality / 100}`;
    let [facts, pixels] = [`${width} x ${height}, ${KINDS[header.kind]}${quality}, ${data.length} bytes`, 0];
    says.textContent = facts;
    await draw(data, canvas, {
      region,
      onFile: ({ notes }) => (says.textContent = facts = [facts, ...notes].join("; ")),
      onPart: (part) => {
        pixels += part.width * part.height;
        says.textContent = `${facts} - ${Math.floor((100 * pixels) / wanted.width / wanted.height)} %`;
      },
    });
    says.textContent = `${facts} - decoded in ${((performance.now() - start) / 1000).toFixed(1)} s`;
  } catch (error) {
    const { kind = "failed", message } = /** @type {import("./container.js").VaeError} */ (error);
    says.className = "failed";
    says.textContent = `${kind}: ${message}`;
  }
  says.dataset.done = String(Number(says.dataset.done ?? 0) + 1);
}

/** @param {Blob | Response} source */
async function take(source) {
  data = new Uint8Array(await source.arrayBuffer());
  await show();
}

document.getElementById("file")?.addEventListener("change", ({ target }) => {
  const file = /** @type {HTMLInputElement} */ (target).files?.[0];
  if (file) take(file);
});
document.getElementById("stop")?.addEventListener("click", () => stop());
form.addEventListener("submit", (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  const [x, y, width, height] = ["x", "y", "width", "height"].map((name) => Number(form.elements[name].value));
  show({ x, y, width, height });
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const file = event.dataTransfer?.files[0];
  if (file) take(file);
});
const src = new URLSearchParams(location.search).get("src");
if (src) fetch(src).then(take);
Object.assign(globalThis, { vae: { decode, draw, stop, toImageData } }); // to be tried in the console
