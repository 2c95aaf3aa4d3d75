// What is known of the thing that was clicked? Rates, codes, endpoints, rules, and what can be done about it.
import { useEffect, useState } from "preact/hooks";
import { Actions } from "./actions";
import { get, type Endpoint, type MeshEdge, type MeshNode, type Overhead, type Rates, type ServiceDetail, type TraceHead } from "./api";
import { Chart } from "./chart";
import { Circuit } from "./circuit";
import { badgeText } from "./graph";
import { changeNumber, choose, choices, edges, nodes, now } from "./state";
import { clock, milliseconds, rate, share, shortName, span } from "./text";

function Figures({ rates }: { rates: Rates }) {
  return (
    <dl class="figures">
      <div>
        <dt>requests</dt>
        <dd data-testid="panel-rps">{rate(rates.rps)}</dd>
      </div>
      <div>
        <dt>success</dt>
        <dd>{rates.rps ? share(1 - rates.errors) : "–"}</dd>
      </div>
      <div>
        <dt>p50 / p95 / p99</dt>
        <dd>
          {milliseconds(rates.p50)} / {milliseconds(rates.p95)} / {milliseconds(rates.p99)}
        </dd>
      </div>
    </dl>
  );
}

export function Panel() {
  const { selected, wide } = choices.value;
  if (!selected) return null;
  const node = nodes.value.get(selected);
  const edge = edges.value.get(selected);
  return (
    <aside class={wide ? "panel wide" : "panel"} aria-label="Details" data-testid="panel">
      <button
        type="button"
        class="wider"
        aria-pressed={wide}
        onClick={() => choose({ wide: !wide })}
        aria-label={wide ? "Beside the graph" : "On the whole page"}
        title={wide ? "Beside the graph" : "On the whole page"}
        data-testid="wide"
      >
        {wide ? "⇥" : "⇤"}
      </button>
      <button type="button" class="close" onClick={() => choose({ selected: "", wide: false })} aria-label="Close details">
        ✕
      </button>
      <div class="content">{node ? <NodePanel node={node} /> : edge ? <EdgePanel edge={edge} /> : <p>Nothing is known of {selected} now.</p>}</div>
    </aside>
  );
}

function NodePanel({ node }: { node: MeshNode }) {
  const calls = [...edges.value.values()];
  const list = (found: MeshEdge[], end: "source" | "target") =>
    found.length ? (
      <ul class="calls">
        {found.map((edge) => (
          <li key={edge.id}>
            <button type="button" class="link" onClick={() => choose({ selected: edge.id })}>
              {shortName(edge[end])}
            </button>{" "}
            <span class={edge.rates.errors > 0 ? "bad" : ""}>
              {edge.rates.errors > 0 && "✕ "}
              {rate(edge.rates.rps)}, {share(1 - edge.rates.errors)} ok, p95 {milliseconds(edge.rates.p95)}
            </span>
          </li>
        ))}
      </ul>
    ) : (
      <p class="dim">nobody</p>
    );
  return (
    <>
      <h2>
        {node.name} <span class={`pill ${node.health}`}>{node.health}</span>
      </h2>
      <p class="dim about">
        {node.kind}
        {node.namespace && ` in ${node.namespace}`}
        {node.version && `, version ${node.version}`}
        {node.instances > 0 && `, ${node.instances} connected`}
      </p>
      <Figures rates={node.incoming} />
      {node.badges.length > 0 && (
        <ul class="badges">
          {node.badges.map((badge) => (
            <li key={badge}>{badgeText(badge)}</li>
          ))}
        </ul>
      )}
      <Chart query={{ node: node.id }} title="Inbound" />
      {calls.some((edge) => edge.source === node.id) && <Chart query={{ source: node.id }} title="Outbound" />}
      <h3>Called by</h3>
      {list(
        calls.filter((edge) => edge.target === node.id),
        "source",
      )}
      <h3>Calls</h3>
      {list(
        calls.filter((edge) => edge.source === node.id),
        "target",
      )}
      {node.kind === "service" && <ServicePart namespace={node.namespace} name={node.name} />}
    </>
  );
}

function EdgePanel({ edge }: { edge: MeshEdge }) {
  const codes = Object.entries(edge.codes);
  return (
    <>
      <h2>
        {shortName(edge.source)} → {shortName(edge.target)} <span class={`pill ${edge.health}`}>{edge.health}</span>
      </h2>
      <p class="dim about">
        {edge.protocol}, mutual TLS on {share(edge.mtls)} of the requests
      </p>
      <Figures rates={edge.rates} />
      <table>
        <caption>Answers</caption>
        <thead>
          <tr>
            <th scope="col">code and flags</th>
            <th scope="col">rate</th>
          </tr>
        </thead>
        <tbody>
          {codes.map(([code, rps]) => (
            <tr key={code}>
              <td>{code}</td>
              <td>{rate(rps)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <OnTheWay source={edge.source} target={edge.target} />
      <Chart query={{ source: edge.source, target: edge.target }} title="This edge" />
    </>
  );
}

// What the mesh and the network take of a call: its caller's time beyond the server's.
function OnTheWay({ source, target }: { source: string; target: string }) {
  const [found, setFound] = useState<Overhead | null>(null);
  const { end } = choices.value;
  const slot = end || Math.floor(now.value / 5);
  useEffect(() => {
    let wanted = true;
    get<Overhead>("/v1/overhead", { source, target, ...(end ? { end } : {}) }).then(
      (told) => wanted && setFound(told),
      () => undefined, // the stream tells what is wrong
    );
    return () => {
      wanted = false;
    };
  }, [source, target, slot]);
  if (!found) return null;
  return (
    <p data-testid="overhead">
      {found.calls ? (
        <>
          On the way, p50 / p95: {milliseconds(found.p50)} / {milliseconds(found.p95)}{" "}
          <span class="dim">
            of {found.calls} traced {found.calls === 1 ? "call" : "calls"}: the mesh at both ends, and the network
          </span>
        </>
      ) : (
        <span class="dim">No call that both ends have traced says what the mesh takes on the way.</span>
      )}
    </p>
  );
}

function EndpointRow({ endpoint, by }: { endpoint: Endpoint; by: string[] | undefined }) {
  const health = by ? `ejected by ${by.join(", ")}` : endpoint.health.toLowerCase();
  return (
    <tr data-testid={`endpoint:${endpoint.address}`} class={by ? "bad" : ""}>
      <td>{endpoint.address}</td>
      <td>{endpoint.workload}</td>
      <td>
        {by || endpoint.health !== "HEALTHY" ? "✕" : "✓"} {health}
      </td>
    </tr>
  );
}

// What the last route does, which takes what no other has taken.
function Routing({ detail }: { detail: ServiceDetail }) {
  const { split, steering, rule } = detail;
  const does = [
    ...split.filter(({ weight }) => weight > 0).map(({ subset, weight }) => `${weight} % to ${subset}`),
    ...(steering.timeout ? [`timeout ${steering.timeout} s`] : []),
    ...(steering.delay ? [`⚡ ${steering.delayed} % delayed by ${steering.delay} s`] : []),
    ...(steering.aborted ? [`⚡ ${steering.aborted} % aborted with ${steering.abort}`] : []),
  ];
  return (
    <>
      <h3>Routing</h3>
      <p data-testid="routing">{does.length ? does.join(", ") : rule ? "To all endpoints in turn, by a VirtualService." : "To all endpoints in turn: no VirtualService says otherwise."}</p>
    </>
  );
}

// The worst of what was traced lately: failed ones first, then the slowest.
function Requests({ name }: { name: string }) {
  const [heads, setHeads] = useState<TraceHead[]>([]);
  useEffect(() => {
    let wanted = true;
    get<{ traces: TraceHead[] }>("/v1/traces", { service: name, limit: 200 }).then(
      ({ traces }) => wanted && setHeads(traces.sort((a, b) => Number(b.failed) - Number(a.failed) || b.duration - a.duration).slice(0, 5)),
      () => undefined, // the stream tells what is wrong
    );
    return () => {
      wanted = false;
    };
  }, [name, Math.floor(now.value / 10)]);
  if (!heads.length) return null;
  return (
    <>
      <h3>Failed and slow requests</h3>
      <ul class="calls" data-testid="worst">
        {heads.map((head) => (
          <li key={head.trace_id}>
            <button type="button" class="link" onClick={() => choose({ view: "traces", trace: head.trace_id })}>
              {head.request || head.name}
            </button>{" "}
            <span class={head.failed ? "bad" : ""}>
              {head.failed ? "✕ failed" : "✓ ok"}, {milliseconds(head.duration * 1000)}
            </span>{" "}
            <span class="dim">{clock(head.began)}</span>
          </li>
        ))}
      </ul>
    </>
  );
}

function ServicePart({ namespace, name }: { namespace: string; name: string }) {
  const [detail, setDetail] = useState<ServiceDetail | null>(null);
  useEffect(() => {
    let wanted = true;
    get<ServiceDetail>(`/v1/services/${namespace}/${name}`).then(
      (found) => wanted && setDetail(found),
      () => wanted && setDetail(null),
    );
    return () => {
      wanted = false;
    };
  }, [namespace, name, changeNumber.value, Math.floor(now.value / 5)]);
  if (!detail) return null;
  return (
    <>
      <Routing detail={detail} />
      <h3>Endpoints</h3>
      <table>
        <thead>
          <tr>
            <th scope="col">address</th>
            <th scope="col">workload</th>
            <th scope="col">health</th>
          </tr>
        </thead>
        <tbody>
          {detail.endpoints.map((each) => (
            <EndpointRow key={`${each.address}${each.port}`} endpoint={each} by={detail.ejected.find(({ address }) => address === each.address)?.by} />
          ))}
        </tbody>
      </table>
      {!detail.endpoints.length && <p class="dim">No endpoint is known: calls get 503 UH.</p>}
      {detail.certificates.length > 0 && (
        <>
          <h3>Certificates</h3>
          <table data-testid="certificates">
            <thead>
              <tr>
                <th scope="col">process</th>
                <th scope="col">ends</th>
              </tr>
            </thead>
            <tbody>
              {detail.certificates.map(({ process, expires }) => (
                <tr key={process}>
                  <td class="small">{process}</td>
                  <td title={expires ? new Date(expires * 1000).toLocaleString() : ""}>{expires ? `in ${span(expires - now.value)}` : <span class="dim">none told of</span>}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </>
      )}
      {detail.objects.length > 0 && (
        <>
          <h3>Rules</h3>
          <ul class="rules">
            {detail.objects.map((each) => (
              <li key={each}>
                <button type="button" class="link" onClick={() => choose({ view: "configuration", find: each })}>
                  {each}
                </button>
              </li>
            ))}
          </ul>
        </>
      )}
      <Requests name={detail.name} />
      <Actions key={detail.host} detail={detail} />
      {detail.breaker && <Circuit key={`${detail.host} circuit`} detail={detail} breaker={detail.breaker} />}
    </>
  );
}
