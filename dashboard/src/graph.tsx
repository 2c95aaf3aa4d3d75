// What does the traffic look like? The graph: who calls whom, how often, how well. SVG, so that it can be read and tested.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { MeshEdge, MeshNode } from "./api";
import type { Asked, Placed } from "./layout.worker";
import { choices, choose, condition, edges, matches, nodes, topology } from "./state";
import { milliseconds, rate, share, shortName } from "./text";

// A node is as wide as its name wants, within reason.
const NARROWEST = 126;
const WIDEST = 172;
const HEIGHT = 54;
// Of a letter of a name, at most: names are bold, 13 px.
const LETTER = 7.6;
// Below this the text is no longer read: then the graph is scrolled instead.
const LEAST_SCALE = 0.86;
const MOST_SCALE = 1.25;
const SIGN = { idle: "–", healthy: "✓", degraded: "!", failure: "✕" } as const;
const BADGES: Record<string, string> = {
  fault: "⚡ fault injected",
  "circuit-breaker": "⛨ circuit breaker",
  shifting: "⇄ traffic shifting",
  mirror: "⧉ mirrored",
  timeout: "◷ timeout",
  retries: "↻ retries",
  routing: "⑂ request routing",
  "virtual-service": "⎇ virtual service",
  "breaker-open": "⊘ breaker open",
  ejected: "⏏ endpoints ejected",
};

export function badgeText(badge: string): string {
  return BADGES[badge] ?? badge;
}

function widthOf({ name }: MeshNode): number {
  return Math.ceil(Math.min(WIDEST, Math.max(NARROWEST, name.length * LETTER + 20)));
}

// `name`, or as much of it as there is room for.
function fitted(name: string, width: number): string {
  const room = Math.floor((width - 20) / LETTER);
  return name.length > room ? `${name.slice(0, room - 1)}…` : name;
}

function useLayout(): Placed {
  const [placed, setPlaced] = useState<Placed>({ nodes: {}, ways: {}, width: 0, height: 0 });
  const worker = useRef<Worker | null>(null);
  const wanted = topology.value;
  useEffect(() => {
    worker.current = new Worker("/dashboard/layout.js");
    worker.current.onmessage = (event: MessageEvent<Placed>) => setPlaced(event.data);
    return () => worker.current?.terminate();
  }, []);
  useEffect(() => {
    const asked: Asked = {
      nodes: [...nodes.value.values()].map((node) => ({ id: node.id, width: widthOf(node), height: HEIGHT })).sort((a, b) => (a.id < b.id ? -1 : 1)),
      edges: [...edges.value.values()].map(({ source, target }) => ({ source, target })),
    };
    worker.current?.postMessage(asked);
  }, [wanted]);
  return placed;
}

function outline(kind: MeshNode["kind"], wide: number): string {
  const w = wide / 2;
  const h = HEIGHT / 2;
  switch (kind) {
    case "service":
      return `M${-w} 0 L${-w + 16} ${-h} H${w - 16} L${w} 0 L${w - 16} ${h} H${-w + 16}Z`;
    case "external":
      return `M${-w} ${-h} H${w - 18} L${w} 0 L${w - 18} ${h} H${-w}Z`;
    case "gateway":
      return `M${-w} ${-h} H${w} V${h} H${-w}Z M${-w + 4} ${-h + 4} H${w - 4} V${h - 4} H${-w + 4}Z`;
    default:
      return `M${-w + 12} ${-h} H${w - 12} Q${w} ${-h} ${w} ${-h + 12} V${h - 12} Q${w} ${h} ${w - 12} ${h} H${-w + 12} Q${-w} ${h} ${-w} ${h - 12} V${-h + 12} Q${-w} ${-h} ${-w + 12} ${-h}Z`;
  }
}

interface Curve {
  path: string;
  middle: [number, number];
}

// Between the right side of one and the left of the other.
function curve([from, y1]: [number, number], [to, y2]: [number, number], way: [number, number][] = []): Curve {
  const through = way.filter(([x]) => x > from && x < to);
  if (to - from > 2 * NARROWEST && through.length) {
    const points: [number, number][] = [[from, y1], ...through, [to, y2]];
    let path = `M${from} ${y1}`;
    points.forEach(([x, y], index) => {
      const before = points[index - 1];
      if (before) path += ` C${(before[0] + x) / 2} ${before[1]} ${(before[0] + x) / 2} ${y} ${x} ${y}`;
    });
    return { path, middle: through[Math.floor(through.length / 2)]! };
  }
  if (to >= from) {
    const bend = Math.max(24, (to - from) / 2);
    return {
      path: `M${from} ${y1} C${from + bend} ${y1} ${to - bend} ${y2} ${to} ${y2}`,
      middle: [(from + to) / 2, (y1 + y2) / 2],
    };
  }
  const down = Math.max(y1, y2) + HEIGHT + 20;
  return {
    path: `M${from} ${y1} C${from + 60} ${down} ${to - 60} ${down} ${to} ${y2}`,
    middle: [(from + to) / 2, (y1 + y2 + 6 * down) / 8],
  };
}

function told(edge: MeshEdge): string {
  const { rates } = edge;
  const parts = [rate(rates.rps)];
  if (rates.errors) parts.push(`${share(rates.errors)} err`);
  if (rates.p95 !== null) parts.push(`p95 ${milliseconds(rates.p95)}`);
  return parts.join(" · ");
}

function NodeMark({ node, at, dimmed }: { node: MeshNode; at: [number, number]; dimmed: boolean }) {
  const wide = widthOf(node);
  const chosen = choices.value.selected === node.id;
  const name = shortName(node.id);
  const title = `${node.kind} ${name}: ${node.health}, ${rate(node.incoming.rps)}${node.incoming.errors ? `, ${share(node.incoming.errors)} errors` : ""}`;
  const open = () => choose({ selected: chosen ? "" : node.id });
  return (
    <g
      class={`node ${node.kind} ${node.health}${chosen ? " chosen" : ""}${dimmed ? " dimmed" : ""}`}
      transform={`translate(${at[0]} ${at[1]})`}
      data-testid={`node:${name}`}
      data-kind={node.kind}
      data-health={node.health}
      data-rps={node.incoming.rps}
      data-err={node.incoming.errors}
      tabindex={0}
      role="button"
      aria-pressed={chosen}
      aria-label={title}
      onClick={open}
      onKeyDown={(event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          open();
        }
      }}
    >
      <title>{title}</title>
      <path d={outline(node.kind, wide)} class="outline" />
      <text class="name" y={-4} text-anchor="middle">
        {fitted(node.name, wide)}
      </text>
      <text class="detail" y={14} text-anchor="middle">
        {node.kind === "unknown" ? "outside the mesh" : node.namespace || node.kind}
        {node.instances > 1 ? ` ×${node.instances}` : ""}
      </text>
      <g class="sign" transform={`translate(${wide / 2 - 14} ${-HEIGHT / 2})`}>
        <circle r="9" />
        <text text-anchor="middle" y="4">
          {SIGN[node.health]}
        </text>
      </g>
      {node.badges
        .filter((badge) => badge !== "virtual-service" || node.badges.length === 1)
        .map((badge, index) => (
          <text key={badge} class={`badge ${badge}`} data-badge={badge} x={-wide / 2 + 12 + index * 18} y={HEIGHT / 2 + 14}>
            {badgeText(badge).slice(0, 1)}
            <title>{badgeText(badge)}</title>
          </text>
        ))}
    </g>
  );
}

function EdgeMark({ edge, along, dimmed, moves }: { edge: MeshEdge; along: Curve; dimmed: boolean; moves: boolean }) {
  const { path } = along;
  const chosen = choices.value.selected === edge.id;
  const name = `${shortName(edge.source)}>${shortName(edge.target)}`;
  const reference = `path-${edge.id.replace(/[^A-Za-z0-9]/g, "-")}`;
  const text = told(edge);
  const seconds = Math.min(6, Math.max(1.2, 1 + (edge.rates.p50 ?? 20) / 100));
  const dots = edge.rates.rps && moves ? Math.min(4, Math.max(1, Math.round(Math.log2(1 + edge.rates.rps)))) : 0;
  const open = () => choose({ selected: chosen ? "" : edge.id });
  return (
    <g
      class={`edge ${edge.health}${chosen ? " chosen" : ""}${dimmed ? " dimmed" : ""}`}
      data-testid={`edge:${name}`}
      data-rps={edge.rates.rps}
      data-err={edge.rates.errors}
      data-p95={edge.rates.p95 ?? ""}
      data-mtls={edge.mtls}
      data-health={edge.health}
      tabindex={0}
      role="button"
      aria-pressed={chosen}
      aria-label={`${name}, ${edge.protocol}: ${text}${edge.mtls >= 0.999 ? ", mutual TLS" : ""}`}
      onClick={open}
      onKeyDown={(event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          open();
        }
      }}
    >
      <path d={path} class="reach" />
      <path d={path} id={reference} class="line" marker-end={`url(#arrow-${edge.health})`} />
      {Array.from({ length: dots }, (_, index) => (
        <circle key={index} r={edge.rates.errors >= 0.1 ? 4 : 3} class="dot">
          <animateMotion dur={`${seconds}s`} begin={`${(-seconds * index) / dots}s`} repeatCount="indefinite">
            <mpath href={`#${reference}`} />
          </animateMotion>
        </circle>
      ))}
    </g>
  );
}

// What an edge says, above all lines, so that none strikes it through. For the eye: the edge's own name tells the same.
function EdgeWords({ edge, middle, dimmed }: { edge: MeshEdge; middle: [number, number]; dimmed: boolean }) {
  return (
    <g class={`words${dimmed ? " dimmed" : ""}`} aria-hidden="true">
      {edge.rates.rps > 0 && (
        <text class="label" text-anchor="middle" x={middle[0]} y={middle[1] - 6}>
          {edge.rates.errors > 0 && (
            <tspan x={middle[0]} dy="-13" class="failed">
              {share(edge.rates.errors)} err
            </tspan>
          )}
          <tspan x={middle[0]} dy={edge.rates.errors > 0 ? 13 : 0}>
            {rate(edge.rates.rps)}
          </tspan>
        </text>
      )}
      {edge.mtls > 0 && (
        <g class={edge.mtls >= 0.999 ? "lock" : "lock partly"} transform={`translate(${middle[0]} ${middle[1] + 11})`}>
          <rect x="-5" y="-3" width="10" height="8" rx="1.5" />
          <path d={edge.mtls >= 0.999 ? "M-3 -3 V-6 A3 3 0 0 1 3 -6 V-3" : "M-3 -3 V-6 A3 3 0 0 1 3 -7"} />
        </g>
      )}
    </g>
  );
}

function Empty() {
  const known = condition.value;
  if (!known) return <p class="empty">Asking the control plane…</p>;
  const lines: [boolean, string][] = [
    [true, "the control plane answers"],
    [known.clients > 0, known.clients ? `${known.clients} processes are connected` : "no process is connected: start one with MESHLIB_CONTROL_PLANE set, or make demo"],
    [
      known.last_push !== null,
      known.last_push === null ? "no telemetry has arrived: is MESHLIB_TELEMETRY off?" : `telemetry arrived ${known.last_push.toFixed(0)} s ago`,
    ],
    [false, `no request in the last ${choices.value.seconds} s: send one, or make demo DEMO="--traffic 5"`],
  ];
  return (
    <section class="empty" data-testid="empty">
      <h2>No traffic to draw yet</h2>
      <ul>
        {lines.map(([good, text]) => (
          <li key={text} class={good ? "good" : "missing"}>
            {good ? "✓" : "○"} {text}
          </li>
        ))}
      </ul>
    </section>
  );
}

export function GraphView() {
  const { find, selected } = choices.value;
  const moves = useMemo(() => !matchMedia("(prefers-reduced-motion: reduce)").matches, []);
  const [zoom, setZoom] = useState(1);
  const known = nodes.value;
  const all = [...edges.value.values()];
  const placed = useLayout();
  // What touches the selected node, or is found, stands out; the rest steps back.
  const near = useMemo(() => {
    if (!selected || !known.has(selected)) return null;
    const found = new Set([selected]);
    for (const edge of all) if (edge.source === selected || edge.target === selected) found.add(edge.source).add(edge.target);
    return found;
  }, [selected, topology.value]);
  // The panel takes a third of the page: what was chosen must not be behind its edge.
  useEffect(() => {
    if (selected) document.querySelector("svg .chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [selected]);
  const isDimmed = (node: MeshNode) => (find ? !matches(node, find) : near ? !near.has(node.id) : false);
  if (!all.length && !known.size) return <Empty />;
  const width = Math.max(placed.width, 400);
  const height = Math.max(placed.height, 240);
  // Hundreds of edges with moving dots would freeze the page: then they stand still.
  const isLarge = all.length > 300;
  const drawn = all.flatMap((edge) => {
    const from = placed.nodes[edge.source];
    const to = placed.nodes[edge.target];
    const source = known.get(edge.source);
    const target = known.get(edge.target);
    if (!from || !to || !source || !target) return [];
    const dimmed = near ? edge.source !== selected && edge.target !== selected : isDimmed(source) && isDimmed(target);
    const ends: [[number, number], [number, number]] = [
      [from[0] + widthOf(source) / 2, from[1]],
      [to[0] - widthOf(target) / 2, to[1]],
    ];
    return [{ edge, along: curve(...ends, placed.ways[`${edge.source} ${edge.target}`]), dimmed }];
  });
  return (
    <div class="stage">
      <div class="zoom" role="group" aria-label="Zoom">
        <button type="button" onClick={() => setZoom(zoom * 1.25)} aria-label="Larger">
          +
        </button>
        <button type="button" onClick={() => setZoom(zoom / 1.25)} aria-label="Smaller">
          −
        </button>
        <button type="button" onClick={() => setZoom(1)}>
          Fit
        </button>
      </div>
      <div class="canvas">
      {!all.length && <Empty />}
      <svg
        viewBox={`0 0 ${width} ${height}`}
        width={zoom === 1 ? "100%" : width * zoom}
        height={zoom === 1 ? undefined : height * zoom}
        style={zoom === 1 ? { minWidth: `${width * LEAST_SCALE}px`, maxWidth: `${width * MOST_SCALE}px` } : {}}
        role="group"
        aria-label="Graph of the mesh"
        data-testid="graph"
      >
        <defs>
          {(["idle", "healthy", "degraded", "failure"] as const).map((health) => (
            <marker id={`arrow-${health}`} key={health} class={`arrow ${health}`} viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="13" markerHeight="13" orient="auto">
              <path d="M0 0 L8 4 L0 8Z" />
            </marker>
          ))}
        </defs>
        {drawn.map((each) => (
          <EdgeMark key={each.edge.id} {...each} moves={moves && !isLarge} />
        ))}
        {drawn.map(({ edge, along, dimmed }) => (
          <EdgeWords key={edge.id} edge={edge} middle={along.middle} dimmed={dimmed} />
        ))}
        {[...known.values()].map((node) => {
          const at = placed.nodes[node.id];
          return at ? <NodeMark key={node.id} node={node} at={at} dimmed={isDimmed(node)} /> : null;
        })}
      </svg>
      </div>
    </div>
  );
}
