// What does the control plane tell the page? The shapes of its admin API (docs/reference/admin-api.md), and how to ask.

export interface Rates {
  rps: number;
  errors: number;
  p50: number | null;
  p95: number | null;
  p99: number | null;
  bytes_in: number;
  bytes_out: number;
}
export type Health = "idle" | "healthy" | "degraded" | "failure";
export interface MeshNode {
  id: string;
  kind: "workload" | "service" | "gateway" | "external" | "unknown";
  name: string;
  namespace: string;
  app: string;
  version: string;
  health: Health;
  badges: string[];
  incoming: Rates;
  instances: number;
}
export interface MeshEdge {
  id: string;
  source: string;
  target: string;
  protocol: string;
  rates: Rates;
  mtls: number;
  health: Health;
  codes: Record<string, number>;
}
export interface Condition {
  clients: number;
  last_push: number | null;
}
export interface Patch {
  start: number;
  end: number;
  nodes: MeshNode[];
  edges: MeshEdge[];
  gone: string[];
  overflowed: number;
  condition: Condition;
  change: number;
}
export interface Graph {
  start: number;
  end: number;
  nodes: MeshNode[];
  edges: MeshEdge[];
}
export interface Point {
  at: number;
  seconds: number;
  rates: Rates;
}
export interface Overhead {
  calls: number;
  p50: number | null;
  p95: number | null;
}
export interface TraceHead {
  trace_id: string;
  service: string;
  name: string;
  began: number;
  duration: number;
  spans: number;
  failed: boolean;
  request: string;
  status: number;
}
export interface Span {
  trace_id: string;
  span_id: string;
  parent_id: string;
  service: string;
  name: string;
  kind: string;
  began: number;
  ended: number;
  is_error: boolean;
  attributes: [string, string][];
}
export interface StoredObject {
  kind: string;
  resource: string;
  namespace: string;
  name: string;
  origin: string;
  source: string;
  created: number;
  changed: number;
  yaml: string;
}
export interface Problem {
  source: string;
  object: string;
  field: string;
  reason: string;
  level: string;
}
export interface Change {
  number: number;
  at: number;
  object: string;
  origin: string;
  source: string;
  before: string;
  after: string;
  who: string;
}
export interface Stretch {
  start: number;
  end: number;
  requests: number;
  rates: Rates;
}
export interface Touched {
  service: string;
  before: Stretch;
  after: Stretch;
  points: { at: number; rps: number; failed: number }[];
}
export interface BeforeAndAfter {
  number: number;
  at: number;
  seconds: number;
  remaining: number;
  others: number[];
  services: Touched[];
  silent: number;
  left_out: number;
}
export interface Ability {
  namespaces: string[];
  reason: string;
}
export interface WhoAmI {
  name: string;
  method: string;
  access: "open" | "controlled";
  until: number;
  roles: { role: string; namespaces: string[] }[];
  may: Record<string, Ability>;
  csrf: string;
}
export interface Endpoint {
  address: string;
  workload: string;
  labels: Record<string, string>;
  locality: string;
  health: string;
  port: string;
}
export interface Breaker {
  name: string;
  forced: "" | "OPEN" | "CLOSED";
  states: Record<string, number>;
  before: string;
  open: string;
  close: string;
  release: string;
}
export interface ServiceDetail {
  name: string;
  namespace: string;
  host: string;
  ports: number[];
  endpoints: Endpoint[];
  subsets: { name: string; labels: Record<string, string> }[];
  split: { subset: string; weight: number }[];
  objects: string[];
  rule: string;
  rule_name: string;
  breaker: Breaker | null;
  ejected: { address: string; by: string[] }[];
  certificates: { process: string; workload: string; expires: number }[];
  steering: { delay: number; delayed: number; abort: number; aborted: number; timeout: number };
}
export interface Results {
  results: { kind: string; namespace: string; name: string; outcome: string; note: string }[];
  problems: Problem[];
  warnings: Problem[];
}

export interface RouteShown {
  name: string;
  object: string;
  takes_all: boolean;
  portions: { to: string; share: number; rps: number | null }[];
  does: string[];
}
export interface WhatIfAnswer {
  objects: string[];
  problems: Problem[];
  warnings: Problem[];
  hosts: {
    host: string;
    callers: string[];
    rps: number;
    versions: Record<string, number>;
    before: RouteShown[];
    after: RouteShown[];
  }[];
  policies: { what: string; workloads: string[]; before: string[]; after: string[] }[];
  seconds: number;
  left_out: number;
  turned_away: TurnedAway[];
  judged: number;
}
export interface TurnedAway {
  caller: string;
  callee: string;
  principal: string;
  requests: number;
  is_certain: boolean;
  rules: string[];
  depends_on: string[];
}

export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

// Who signed in is known by a cookie that no script can read. A change repeats what came with it, which a page of
// another origin can't.
let csrf = "";

export async function whoAmI(): Promise<WhoAmI> {
  const me = await get<WhoAmI>("/v1/whoami");
  csrf = me.csrf;
  return me;
}

export async function signIn(token: string): Promise<WhoAmI> {
  const response = await answered(
    await fetch("/v1/login", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ token }),
    }),
  );
  const me = (await response.json()) as WhoAmI;
  csrf = me.csrf;
  return me;
}

export async function signOut(): Promise<void> {
  await fetch("/v1/logout", { method: "POST", headers: { "x-csrf-token": csrf } });
  csrf = "";
}

function changing(): Record<string, string> {
  const told = { "content-type": "application/yaml" };
  return csrf ? { ...told, "x-csrf-token": csrf } : told;
}

async function answered(response: Response): Promise<Response> {
  if (response.ok || response.status === 422) return response;
  let reason = response.statusText;
  try {
    reason = ((await response.json()) as { error?: string }).error ?? reason;
  } catch {
    // no JSON: the status says what there is to say
  }
  throw new Refused(response.status, reason);
}

export async function get<T>(path: string, query: Record<string, string | number> = {}): Promise<T> {
  const text = new URLSearchParams(Object.entries(query).map(([name, value]) => [name, String(value)])).toString();
  const response = await answered(await fetch(text ? `${path}?${text}` : path));
  return (await response.json()) as T;
}

export async function apply(yaml: string): Promise<Results> {
  const response = await answered(
    await fetch("/v1/apply?source=dashboard", {
      method: "POST",
      headers: changing(),
      body: yaml,
    }),
  );
  return (await response.json()) as Results;
}

// Changes nothing.
export async function whatIf(yaml: string): Promise<WhatIfAnswer> {
  const response = await answered(await fetch("/v1/what-if", { method: "POST", headers: changing(), body: yaml }));
  return (await response.json()) as WhatIfAnswer;
}

export async function remove(kind: string, namespace: string, name: string): Promise<Results> {
  const query = new URLSearchParams({ kind, namespace, name });
  const response = await answered(
    await fetch(`/v1/delete?${query}`, { method: "POST", headers: changing() }),
  );
  return (await response.json()) as Results;
}

// What became of a change, in a sentence.
export function told({ results, problems }: Results): string {
  if (problems.length) return problems.map((each) => `${each.field}: ${each.reason}`).join("; ");
  return results.map((each) => `${each.kind} ${each.name} ${each.outcome}`).join(", ");
}

// Server-sent events, read by fetch rather than EventSource, which does not tell why it was refused.
export async function* events(path: string, signal: AbortSignal): AsyncGenerator<Patch> {
  const response = await answered(await fetch(path, { signal }));
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop() ?? "";
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6)) as Patch;
    }
  }
}
