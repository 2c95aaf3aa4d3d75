// What goes into the wheel? The page, its worker and its styles, bundled: the same input gives the same bytes.
import { build } from "esbuild";
import { copyFile } from "node:fs/promises";

const out = "../src/meshlib/controlplane/dashboard";
await build({
  entryPoints: { app: "src/main.tsx", layout: "src/layout.worker.ts" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  legalComments: "eof",
  jsx: "automatic",
  jsxImportSource: "preact",
  logLevel: "warning",
});
await copyFile("src/index.html", `${out}/index.html`);
