// What does the traffic look like? The graph: who calls whom, how often, how well. SVG, so that it can be read and tested.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import type { MeshEdge, MeshNode } from "./api";
import { Stage } from "./camera";
import type { Asked, Placed } from "./layout.worker";
import { choices, choose, condition, edges, matches, nodes, topology } from "./state";
import { milliseconds, rate, share, shortName } from "./text";

// A node is as wide as its name wants, within reason.
const NARROWEST = 108;
const WIDEST = 180;
const HEIGHT = 54;
// Of a letter of a name, at most: names are bold, 13 px.
const LETTER = 7.6;
const SIGN = { idle: "–", healthy: "✓", degraded: "!", failure: "✕" } as const;
// Signs that the usual fonts have; the word is always beside them, or in their title.
const BADGES: Record<string, string> = {
  fault: "⚡ fault injected",
  "circuit-breaker": "⊖ circuit breaker",
  shifting: "⇄ traffic shifting",
  mirror: "⇉ mirrored",
  timeout: "◷ timeout",
  retries: "↻ retries",
  routing: "⋔ request routing",
  "virtual-service": "⎇ virtual service",
  "breaker-open": "⊘ breaker open",
  ejected: "⏏ endpoints ejected",
};

export function badgeText(badge: string): string {
  return BADGES[badge] ?? badge;
}

// What the shape takes beside the name.
const EDGING: Record<MeshNode["kind"], number> = { workload: 20, unknown: 20, gateway: 24, service: 30, external: 38 };

function widthOf({ name, kind }: MeshNode): number {
  return Math.ceil(Math.min(WIDEST, Math.max(NARROWEST, name.length * LETTER + EDGING[kind])));
}

// `name`, or as much of it as there is room for.
function fitted({ name, kind }: MeshNode, width: number): string {
  const room = Math.floor((width - EDGING[kind]) / LETTER);
  return name.length > room ? `${name.slice(0, room - 1)}…` : name;
}

type Flow = "right" | "down";

function useLayout(flow: Flow): [Placed, Flow] {
  const [placed, setPlaced] = useState<[Placed, Flow]>([{ nodes: {}, ways: {}, width: 0, height: 0 }, flow]);
  const worker = useRef<Worker | null>(null);
  const wanted = topology.value;
  useEffect(() => {
    worker.current = new Worker("/dashboard/layout.js");
    return () => worker.current?.terminate();
  }, []);
  useEffect(() => {
    const asked: Asked = {
      nodes: [...nodes.value.values()].map((node) => ({ id: node.id, width: widthOf(node), height: HEIGHT })).sort((a, b) => (a.id < b.id ? -1 : 1)),
      edges: [...edges.value.values()].map(({ source, target }) => ({ source, target })),
      flow,
    };
    worker.current!.onmessage = (event: MessageEvent<Placed>) => setPlaced([event.data, flow]);
    worker.current!.postMessage(asked);
  }, [wanted, flow]);
  return placed;
}

const narrow = matchMedia("(max-width: 800px)");

// A phone is higher than it is wide.
function useFlow(): Flow {
  const [isNarrow, setNarrow] = useState(narrow.matches);
  useEffect(() => {
    const changed = () => setNarrow(narrow.matches);
    narrow.addEventListener("change", changed);
    return () => narrow.removeEventListener("change", changed);
  }, []);
  return choices.value.flow || (isNarrow ? "down" : "right");
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
  // Whether the line crosses what is written at its middle.
  crosses: boolean;
}

function bezier(at: number, a: number, b: number, c: number, d: number): number {
  const rest = 1 - at;
  return rest ** 3 * a + 3 * rest ** 2 * at * b + 3 * rest * at ** 2 * c + at ** 3 * d;
}

// Between the side of one from which calls go out and the side of the other at which they come in. Points are (along the
// flow, across it).
// share: where on the way the words stand.
function curve([from, y1]: [number, number], [to, y2]: [number, number], way: [number, number][], flow: Flow, share: number): Curve {
  const at = (along: number, across: number) => (flow === "down" ? `${across} ${along}` : `${along} ${across}`);
  const point = (along: number, across: number): [number, number] => (flow === "down" ? [across, along] : [along, across]);
  const crosses = flow === "down" || Math.abs(y2 - y1) > 24;
  const through = way.filter(([x]) => x > from && x < to);
  if (through.length && to - from > (flow === "down" ? 2 * HEIGHT : 2 * NARROWEST)) {
    const points: [number, number][] = [[from, y1], ...through, [to, y2]];
    let path = `M${at(from, y1)}`;
    points.forEach(([x, y], index) => {
      const before = points[index - 1];
      if (before) path += ` C${at((before[0] + x) / 2, before[1])} ${at((before[0] + x) / 2, y)} ${at(x, y)}`;
    });
    return { path, middle: point(...through[Math.floor(through.length / 2)]!), crosses: flow === "down" };
  }
  if (to >= from) {
    const bend = Math.max(24, (to - from) / 2);
    return {
      path: `M${at(from, y1)} C${at(from + bend, y1)} ${at(to - bend, y2)} ${at(to, y2)}`,
      middle: point(
        bezier(share, from, from + bend, to - bend, to),
        bezier(share, y1, y1, y2, y2),
      ),
      crosses,
    };
  }
  const down = Math.max(y1, y2) + (flow === "down" ? WIDEST / 2 : HEIGHT) + 20;
  return {
    path: `M${at(from, y1)} C${at(from + 60, down)} ${at(to - 60, down)} ${at(to, y2)}`,
    middle: point((from + to) / 2, (y1 + y2 + 6 * down) / 8),
    crosses: flow === "down",
  };
}

function told(edge: MeshEdge): string {
  const { rates } = edge;
  if (!rates.rps) return "no requests";
  const times = [rates.p50, rates.p95, rates.p99].map(milliseconds).join(" / ");
  return `${rate(rates.rps)}, ${share(1 - rates.errors)} ok${rates.p95 === null ? "" : `, p50 / p95 / p99 ${times}`}`;
}

function NodeMark({ node, at, dimmed, flow }: { node: MeshNode; at: [number, number]; dimmed: boolean; flow: Flow }) {
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
      <text class={node.name.length * LETTER * 1.1 + EDGING[node.kind] > wide ? "name long" : "name"} x={node.kind === "external" ? -6 : 0} y={-4} text-anchor="middle">
        {fitted(node, wide)}
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
          <text key={badge} class={`badge ${badge}`} data-badge={badge} x={flow === "down" ? wide / 2 + 5 : -wide / 2 + 12 + index * 18} y={flow === "down" ? index * 16 - 8 : HEIGHT / 2 + 14}>
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
      <title>{`${name}: ${text}`}</title>
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
function EdgeWords({ edge, along, dimmed }: { edge: MeshEdge; along: Curve; dimmed: boolean }) {
  const { rates, mtls } = edge;
  const hasErrors = rates.errors > 0;
  const below = rates.p95 === null ? "" : milliseconds(rates.p95);
  const lock = mtls > 0 ? 16 : 0;
  const wide = Math.max(rates.rps ? rate(rates.rps).length : 0, below.length + lock / 6, hasErrors ? 8 : 0) * 6.6 + 6;
  return (
    <g class={`words${dimmed ? " dimmed" : ""}`} aria-hidden="true" transform={`translate(${along.middle[0]} ${along.middle[1]})`}>
      <g class="grown">
        {along.crosses && rates.rps > 0 && <rect class="plate" x={-wide / 2} width={wide} y={hasErrors ? -31 : -18} height={hasErrors ? 50 : 37} rx="5" />}
        {rates.rps > 0 && (
          <text class="label" text-anchor="middle" y="-6">
            {hasErrors && (
              <tspan x="0" dy="-13" class="failed">
                ✕ {share(rates.errors)}
              </tspan>
            )}
            <tspan x="0" dy={hasErrors ? 13 : 0}>
              {rate(rates.rps)}
            </tspan>
          </text>
        )}
        {below && (
          <text class="label late" text-anchor={lock ? "start" : "middle"} x={lock ? lock - below.length * 3.2 - 4 : 0} y="15">
            {below}
          </text>
        )}
        {lock > 0 && (
          <g class={mtls >= 0.999 ? "lock" : "lock partly"} transform={`translate(${below ? 1 - below.length * 3.2 : 0} 12)`}>
            <rect x="-5" y="-3" width="10" height="8" rx="1.5" />
            <path d={mtls >= 0.999 ? "M-3 -3 V-6 A3 3 0 0 1 3 -6 V-3" : "M-3 -3 V-6 A3 3 0 0 1 3 -7"} />
          </g>
        )}
      </g>
    </g>
  );
}

const SHAPES: [MeshNode["kind"], string][] = [
  ["service", "service"],
  ["workload", "workload (a version)"],
  ["gateway", "gateway"],
  ["external", "host outside the mesh"],
];
const STATES: [keyof typeof SIGN, string][] = [
  ["healthy", "all went well"],
  ["degraded", "some requests failed"],
  ["failure", "a tenth or more failed"],
  ["idle", "nobody called"],
];

function Legend() {
  return (
    <details class="legend" data-testid="legend">
      <summary>Legend</summary>
      <div>
        <ul>
          {SHAPES.map(([kind, what]) => (
            <li key={kind}>
              <svg class="node idle" viewBox="-70 -34 140 68" width="44" height="21" aria-hidden="true">
                <path d={outline(kind, 126)} class="outline" />
              </svg>
              {what}
            </li>
          ))}
          {STATES.map(([health, what]) => (
            <li key={health}>
              <svg class={`edge ${health}`} viewBox="0 0 44 21" width="44" height="21" aria-hidden="true">
                <path d="M2 11 H26" class="line" />
                <svg class={`node ${health}`} x="35" y="11">
                  <g class="sign">
                    <circle r="8" />
                    <text text-anchor="middle" y="4">
                      {SIGN[health]}
                    </text>
                  </g>
                </svg>
              </svg>
              {what}
            </li>
          ))}
          <li>
            <svg viewBox="-22 -12 44 21" width="44" height="21" aria-hidden="true">
              <g class="words">
                <g class="lock">
                  <rect x="-5" y="-3" width="10" height="8" rx="1.5" />
                  <path d="M-3 -3 V-6 A3 3 0 0 1 3 -6 V-3" />
                </g>
              </g>
            </svg>
            all of it by mutual TLS; an open lock: a part
          </li>
        </ul>
        <p>An edge bears the share that failed (✕), requests a second, and the time that 95 of 100 calls stay under (p95).</p>
        <ul class="marks">
          {Object.values(BADGES).map((text) => (
            <li key={text}>{text}</li>
          ))}
        </ul>
        <p class="dim">Drag or arrow keys move, the wheel or + and − zoom, 0 shows all, / finds, Tab goes from one to the next.</p>
      </div>
    </details>
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
  const { find, selected, camera } = choices.value;
  const moves = useMemo(() => !matchMedia("(prefers-reduced-motion: reduce)").matches, []);
  const known = nodes.value;
  const all = [...edges.value.values()];
  const wanted = useFlow();
  const [placed, flow] = useLayout(wanted);
  const stage = useRef<Stage | null>(null);
  const root = useRef<SVGSVGElement>(null);
  const group = useRef<SVGGElement>(null);
  const isDrawn = all.length > 0 || known.size > 0;
  const width = Math.max(placed.width, 240);
  const height = Math.max(placed.height, 160);
  // What touches the selected node, or is found, stands out; the rest steps back.
  const near = useMemo(() => {
    if (!selected || !known.has(selected)) return null;
    const found = new Set([selected]);
    for (const edge of all) if (edge.source === selected || edge.target === selected) found.add(edge.source).add(edge.target);
    return found;
  }, [selected, topology.value]);
  useEffect(() => {
    if (!root.current || !group.current) return;
    const made = new Stage(root.current, group.current);
    stage.current = made;
    const stop = made.listen();
    const key = (event: KeyboardEvent) => {
      const target = event.target as Element;
      const isOurs = target === document.body || Boolean(target.closest(".stage"));
      if (isOurs && made.press(event)) event.preventDefault();
    };
    addEventListener("keydown", key);
    return () => {
      stop();
      removeEventListener("keydown", key);
      stage.current = null;
    };
  }, [isDrawn]);
  useLayoutEffect(() => stage.current?.show({ width, height }), [width, height, camera, isDrawn]);
  // The panel takes a third of the page: what was chosen must not be behind its edge.
  useEffect(() => {
    const chosen = document.querySelector("svg .chosen");
    if (selected && chosen) stage.current?.reveal(chosen);
  }, [selected]);
  const isDimmed = (node: MeshNode) => (find ? !matches(node, find) : near ? !near.has(node.id) : false);
  if (!isDrawn) return <Empty />;
  // Hundreds of edges with moving dots would freeze the page: then they stand still.
  const isLarge = all.length > 300;
  const turned = ([x, y]: [number, number]): [number, number] => (flow === "down" ? [y, x] : [x, y]);
  const half = (node: MeshNode) => (flow === "down" ? HEIGHT : widthOf(node)) / 2;
  const leaving = new Map<string, number>();
  const entering = new Map<string, number>();
  for (const { source, target } of all) {
    leaving.set(source, (leaving.get(source) ?? 0) + 1);
    entering.set(target, (entering.get(target) ?? 0) + 1);
  }
  const drawn = all.flatMap((edge) => {
    const from = placed.nodes[edge.source];
    const to = placed.nodes[edge.target];
    const source = known.get(edge.source);
    const target = known.get(edge.target);
    if (!from || !to || !source || !target) return [];
    const dimmed = near ? edge.source !== selected && edge.target !== selected : isDimmed(source) && isDimmed(target);
    const [one, two] = [turned(from), turned(to)];
    const way = (placed.ways[`${edge.source} ${edge.target}`] ?? []).map(turned);
    // Where many part, their words stand nearer to where they come in, and the other way round: there is more room.
    const fan = (leaving.get(edge.source) ?? 0) - (entering.get(edge.target) ?? 0);
    const share = fan > 0 ? 0.55 : fan < 0 ? 0.45 : 0.5;
    const along = curve([one[0] + half(source), one[1]], [two[0] - half(target), two[1]], way, flow, share);
    return [{ edge, along, dimmed }];
  });
  return (
    <div class="stage">
      <div class="zoom" role="group" aria-label="Zoom">
        <button type="button" onClick={() => stage.current?.zoom(1.25)} aria-label="Larger" title="Larger (+)">
          +
        </button>
        <button type="button" onClick={() => stage.current?.zoom(0.8)} aria-label="Smaller" title="Smaller (−)">
          −
        </button>
        <button type="button" onClick={() => stage.current?.fit()} aria-pressed={!camera} title="All of it (0)">
          Fit
        </button>
        <button
          type="button"
          onClick={() => choose({ flow: flow === "down" ? "right" : "down", camera: "" })}
          aria-label={flow === "down" ? "Draw calls to the right" : "Draw calls downwards"}
          title={flow === "down" ? "Draw calls to the right" : "Draw calls downwards"}
        >
          {flow === "down" ? "→" : "↓"}
        </button>
      </div>
      {!all.length && <Empty />}
      <svg
        ref={root}
        class="canvas"
        role="group"
        aria-label="Graph of the mesh"
        data-testid="graph"
        data-flow={flow}
        onFocusIn={(event) => {
          const mark = (event.target as Element).closest(".node, .edge");
          if (mark?.matches(":focus-visible")) stage.current?.reveal(mark);
        }}
      >
        <defs>
          {(["idle", "healthy", "degraded", "failure"] as const).map((health) => (
            <marker id={`arrow-${health}`} key={health} class={`arrow ${health}`} viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="13" markerHeight="13" orient="auto">
              <path d="M0 0 L8 4 L0 8Z" />
            </marker>
          ))}
        </defs>
        <g ref={group}>
          {drawn.map((each) => (
            <EdgeMark key={each.edge.id} {...each} moves={moves && !isLarge} />
          ))}
          {drawn.map(({ edge, along, dimmed }) => (
            <EdgeWords key={edge.id} edge={edge} along={along} dimmed={dimmed} />
          ))}
          {[...known.values()].map((node) => {
            const at = placed.nodes[node.id];
            return at ? <NodeMark key={node.id} node={node} at={at} dimmed={isDimmed(node)} flow={flow} /> : null;
          })}
        </g>
      </svg>
      <Legend />
    </div>
  );
}
