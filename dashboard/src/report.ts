// What would somebody who was not there need to see? One file of what the page knows now: readable without the mesh, a script or a network.
import { get, type Change, type Graph, type Problem } from "./api";
import { choices, now } from "./state";
import { milliseconds, rate, share, shortName } from "./text";

interface Client {
  name: string;
  kind: string;
  user_agent: string;
  ready: boolean;
  types: Record<string, string>;
  errors: string[];
}

function escaped(text: unknown): string {
  return String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

function table(title: string, heads: string[], rows: unknown[][]): string {
  const cells = (tag: string, row: unknown[]) => row.map((each) => `<${tag}>${escaped(each)}</${tag}>`).join("");
  const body = rows.map((row) => `<tr>${cells("td", row)}</tr>`).join("\n");
  return `<h2>${escaped(title)} (${rows.length})</h2>\n<table><thead><tr>${cells("th", heads)}</tr></thead><tbody>\n${body}</tbody></table>\n`;
}

// The graph as it is drawn now, whole and still; "" in another view. Colours are those of the page's theme.
function picture(): string {
  const shown = document.querySelector<SVGSVGElement>("[data-testid=graph]");
  if (!shown) return "";
  const copy = shown.cloneNode(true) as SVGSVGElement;
  copy.querySelectorAll("animateMotion, .dot, .reach").forEach((each) => each.remove());
  copy.querySelectorAll("[tabindex], [role], [aria-pressed]").forEach((each) => ["tabindex", "role", "aria-pressed"].forEach((name) => each.removeAttribute(name)));
  const group = copy.querySelector(":scope > g")!;
  const box = shown.querySelector<SVGGElement>(":scope > g")!.getBBox();
  group.removeAttribute("transform");
  copy.setAttribute("viewBox", [box.x - 8, box.y - 8, box.width + 16, box.height + 16].join(" "));
  copy.setAttribute("role", "img");
  copy.setAttribute("class", "canvas");
  copy.removeAttribute("style");
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules].map((rule) => rule.cssText));
  const own = rules.filter((text) => /^(svg text|\.(node|edge|words|arrow|dimmed))/.test(text));
  const colours = ["back", "card", "text", "dim", "line", "accent", "healthy", "degraded", "failure", "idle"];
  const known = colours.map((name) => `--${name}:${getComputedStyle(document.documentElement).getPropertyValue(`--${name}`)}`);
  return `<style>.picture{${known.join(";")};background:var(--back);padding:8px}.picture svg{max-width:100%;max-height:80vh}${own.join("")}</style>
<div class="picture">${new XMLSerializer().serializeToString(copy)}</div>`;
}

// Changes come without secrets' values, credentials in headers and private keys: the control plane keeps none of them.
export async function report(): Promise<string> {
  const { seconds, services, end } = choices.value;
  const [version, graph, problems, clients, changes] = await Promise.all([
    get<{ version: string }>("/version"),
    get<Graph>("/v1/graph", { seconds, services: String(services), ...(end ? { end } : {}) }),
    get<{ problems: Problem[] }>("/v1/problems"),
    get<{ clients: Client[] }>("/v1/clients"),
    get<{ changes: Change[] }>("/v1/changes"),
  ]);
  const at = new Date((end || now.value || Date.now() / 1000) * 1000).toISOString();
  const known = { version: version.version, at, seconds, graph, ...problems, ...clients, ...changes };
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>meshlib ${escaped(version.version)}, ${at}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>:root{color-scheme:light dark}body{font:14px/1.45 system-ui,sans-serif;margin:24px}table{border-collapse:collapse}td,th{border:1px solid #888;padding:2px 8px;text-align:left;vertical-align:top}pre{white-space:pre-wrap;overflow-wrap:anywhere}</style>
</head><body><main><h1>meshlib ${escaped(version.version)}</h1>
<p>As of ${at}, traffic of ${seconds} s. Credentials were taken out; names, addresses and the configuration's other values are in here.</p>
${picture()}
${table(
  "Problems",
  ["level", "object", "field", "reason", "source"],
  problems.problems.map((each) => [each.level, each.object, each.field, each.reason, each.source]),
)}${table(
  "Edges",
  ["from", "to", "health", "requests", "errors", "p95", "mutual TLS", "codes"],
  graph.edges.map((each) => [
    shortName(each.source),
    shortName(each.target),
    each.health,
    rate(each.rates.rps),
    share(each.rates.errors),
    milliseconds(each.rates.p95),
    share(each.mtls),
    Object.keys(each.codes).join(", "),
  ]),
)}${table(
  "Nodes",
  ["name", "kind", "health", "requests", "connected", "marks"],
  graph.nodes.map((each) => [shortName(each.id), each.kind, each.health, rate(each.incoming.rps), each.instances, each.badges.join(", ")]),
)}${table(
  "Clients",
  ["name", "kind", "program", "ready", "configuration", "errors"],
  clients.clients.map((each) => [
    each.name,
    each.kind,
    each.user_agent,
    each.ready,
    Object.entries(each.types).map(([type, state]) => `${type} ${state}`).join(", "),
    each.errors.join("; "),
  ]),
)}<h2>Changes (${changes.changes.length})</h2>
${changes.changes
  .map(
    (each) =>
      `<details><summary>${escaped(new Date(each.at * 1000).toISOString())} ${escaped(each.object)}, ${escaped(each.origin)}, ${escaped(each.source)}, by ${escaped(each.who)}</summary><h3>before</h3><pre>${escaped(each.before)}</pre><h3>after</h3><pre>${escaped(each.after)}</pre></details>`,
  )
  .join("\n")}
<h2>For programs</h2>
<details><summary>The same as JSON</summary><pre id="json">${escaped(JSON.stringify(known, null, 1))}</pre></details>
</main></body></html>
`;
}

export function save(name: string, text: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
