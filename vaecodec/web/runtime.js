/** ONNX Runtime Web, as it lies beside this page. */

// @ts-ignore: it is no part of this package
import * as runtime from "./ort/ort.wasm.bundle.min.mjs";

runtime.env.wasm.numThreads = 1;
runtime.env.logLevel = "error";

/** @type {import("./types").Runtime} */
export const ort = runtime;
