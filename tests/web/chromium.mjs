/** Decodes files on the page, in headless Chromium: `node chromium.mjs MODULES CHROMIUM PROFILE < {url, jobs}`. A job is a
 *  file's name on the server; for each comes a line of JSON. shot: where a picture of the page goes. */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [modules, executablePath, profile] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const { url, jobs, shot, source } = JSON.parse(readFileSync(0, "utf8"));
const args = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"];
args.push("--disable-component-update", "--disable-sync");
const browser = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args });
const page = await browser.newPage();
const complaints = [];
page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
page.on("pageerror", (error) => complaints.push(String(error)));
await page.goto(source ? `${url}?src=${source}` : url);
if (source) await page.waitForFunction(() => document.getElementById("says").dataset.done, null, { timeout: 300_000 });
if (shot) await page.screenshot({ path: shot, fullPage: true });
await page.waitForFunction(() => globalThis.vae);
for (const job of jobs) {
  const answer = await page.evaluate(async (name) => {
    const data = new Uint8Array(await (await fetch(name)).arrayBuffer());
    const start = performance.now();
    const parts = [];
    try {
      const { width, height, channels, depth, notes } = await vae.decode(data, { onSamples: (part) => parts.push(part) });
      const whole = new (depth > 8 ? Uint16Array : Uint8Array)(width * height * channels);
      for (const part of parts) {
        for (let i = 0; i < part.height; i++) {
          const row = part.samples.subarray(i * part.width * channels, (i + 1) * part.width * channels);
          whole.set(row, ((part.y + i) * width + part.x) * channels);
        }
      }
      const seconds = (performance.now() - start) / 1000;
      const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", whole));
      return { hash: Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join(""), seconds, notes };
    } catch (error) {
      return { kind: error.kind, message: error.message };
    }
  }, job);
  console.log(JSON.stringify(answer));
}
const says = await page.textContent("#says");
console.log(JSON.stringify({ says, complaints }));
await browser.close();
