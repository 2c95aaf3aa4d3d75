// What does the page know, and what has its reader chosen? Signals; the choices are the URL's, so that it can be shared.
import { batch, computed, effect, signal } from "@preact/signals";
import { events, get, Refused, whoAmI, type Change, type Condition, type Graph, type MeshEdge, type MeshNode, type WhoAmI } from "./api";

export type View = "graph" | "traces" | "configuration" | "changes";
export interface Choices {
  view: View;
  selected: string;
  seconds: number;
  services: boolean;
  find: string;
  trace: string;
  end: number;
  theme: "" | "light" | "dark";
  // What is selected takes the whole page.
  wide: boolean;
  // What of the graph is seen (camera.ts); "" is all of it.
  camera: string;
  // Which way calls are drawn; "" is what suits the screen.
  flow: "" | "right" | "down";
}

const DEFAULTS: Choices = {
  view: "graph",
  selected: "",
  seconds: 60,
  services: true,
  find: "",
  trace: "",
  end: 0,
  theme: "",
  wide: false,
  camera: "",
  flow: "",
};

function fromUrl(): Choices {
  const found = new URLSearchParams(location.hash.slice(1));
  const text = (name: string) => found.get(name) ?? "";
  const number = (name: string, otherwise: number) => Number(found.get(name)) || otherwise;
  return {
    view: (["graph", "traces", "configuration", "changes"] as View[]).find((each) => each === text("view")) ?? "graph",
    selected: text("selected"),
    seconds: number("seconds", DEFAULTS.seconds),
    services: text("services") !== "false",
    find: text("find"),
    trace: text("trace"),
    end: number("end", 0),
    theme: text("theme") === "dark" ? "dark" : text("theme") === "light" ? "light" : "",
    wide: text("wide") === "true",
    camera: text("camera"),
    flow: text("flow") === "down" ? "down" : text("flow") === "right" ? "right" : "",
  };
}

export const choices = signal<Choices>(fromUrl());

export function choose(some: Partial<Choices>): void {
  choices.value = { ...choices.value, ...some };
  const written = new URLSearchParams();
  for (const [name, value] of Object.entries(choices.value)) {
    if (value !== DEFAULTS[name as keyof Choices]) written.set(name, String(value));
  }
  history.replaceState(null, "", `#${written}`);
}

addEventListener("hashchange", () => {
  choices.value = fromUrl();
});

export const nodes = signal<ReadonlyMap<string, MeshNode>>(new Map());
export const edges = signal<ReadonlyMap<string, MeshEdge>>(new Map());
export const condition = signal<Condition | null>(null);
export const overflowed = signal(0);
export const trouble = signal("");
export const needsToken = signal(false);
export const me = signal<WhoAmI | null>(null);
export const changeNumber = signal(0);
export const changes = signal<Change[]>([]);
export const now = signal(0);

// Why the reader may not do this in a namespace; "" if they may. The control plane has the last word, not the page.
export function forbidden(ability: string, namespace: string): string {
  const found = me.value?.may[ability];
  if (!found) return "it is not known yet who you are";
  if (found.namespaces.includes("*") || found.namespaces.includes(namespace)) return "";
  return found.reason;
}

// Only what changes the layout: which nodes there are, and which edges join them.
export const topology = computed(
  () =>
    JSON.stringify([
      [...nodes.value.keys()].sort(),
      [...edges.value.values()].map((edge) => `${edge.source} ${edge.target}`).sort(),
    ]),
);

export function matches(node: MeshNode, wanted: string): boolean {
  return `${node.namespace}/${node.name} ${node.kind} ${node.version} ${node.health} ${node.badges.join(" ")}`
    .toLowerCase()
    .includes(wanted.toLowerCase());
}

let stream: AbortController | null = null;
export const restart = signal(0);

async function follow(seconds: number, services: boolean, signal: AbortSignal): Promise<void> {
  let pause = 500;
  while (!signal.aborted) {
    let isFirst = true;
    try {
      for await (const patch of events(`/v1/stream?seconds=${seconds}&services=${services}`, signal)) {
        pause = 500;
        batch(() => {
          const knownNodes = new Map(isFirst ? [] : nodes.value);
          const knownEdges = new Map(isFirst ? [] : edges.value);
          for (const node of patch.nodes) knownNodes.set(node.id, node);
          for (const edge of patch.edges) knownEdges.set(edge.id, edge);
          for (const id of patch.gone) knownNodes.delete(id) || knownEdges.delete(id);
          nodes.value = knownNodes;
          edges.value = knownEdges;
          condition.value = patch.condition;
          overflowed.value = patch.overflowed;
          changeNumber.value = patch.change;
          now.value = patch.end;
          trouble.value = "";
          needsToken.value = false;
        });
        isFirst = false;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status === 401) {
        needsToken.value = true;
        return;
      }
      trouble.value =
        error instanceof Refused ? error.message : "The control plane does not answer; what you see is the last that it told.";
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(pause * 2, 5000);
  }
}

export function start(): void {
  const asked = computed(() => {
    const { seconds, services, end } = choices.value;
    return JSON.stringify([seconds, services, end, restart.value]);
  });
  effect(() => {
    const [seconds, services, end] = JSON.parse(asked.value) as [number, boolean, number];
    stream?.abort();
    stream = new AbortController();
    if (end) {
      void replay(seconds, services, end, stream.signal);
    } else {
      void follow(seconds, services, stream.signal);
    }
  });
  effect(() => {
    void restart.value;
    whoAmI().then(
      (found) => (me.value = found),
      (error: unknown) => {
        me.value = null;
        if (error instanceof Refused && error.status === 401) needsToken.value = true;
      },
    );
  });
  effect(() => {
    if (changeNumber.value) {
      get<{ changes: Change[] }>("/v1/changes").then(
        (found) => (changes.value = found.changes),
        () => undefined, // the stream tells what is wrong
      );
    }
  });
  effect(() => {
    const { theme } = choices.value;
    if (theme) document.documentElement.dataset["theme"] = theme;
    else delete document.documentElement.dataset["theme"];
  });
}

async function replay(seconds: number, services: boolean, end: number, signal: AbortSignal): Promise<void> {
  let found: Graph;
  try {
    found = await get<Graph>("/v1/graph", { seconds, end, services: String(services) });
  } catch (error) {
    if (!signal.aborted) trouble.value = error instanceof Refused ? error.message : "The control plane does not answer.";
    return;
  }
  if (signal.aborted) return; // another moment was chosen meanwhile
  batch(() => {
    nodes.value = new Map(found.nodes.map((node) => [node.id, node]));
    edges.value = new Map(found.edges.map((edge) => [edge.id, edge]));
    now.value = end;
    trouble.value = "";
  });
}
