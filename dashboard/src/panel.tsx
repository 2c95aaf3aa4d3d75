// What is known of the thing that was clicked? Rates, codes, endpoints, rules, and what can be done about it.
import { useEffect, useState } from "preact/hooks";
import { apply, get, Refused, type MeshEdge, type MeshNode, type Rates, type ServiceDetail } from "./api";
import { Chart } from "./chart";
import { badgeText } from "./graph";
import { changeNumber, choose, choices, edges, forbidden, nodes } from "./state";
import { milliseconds, rate, share, shortName } from "./text";

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
  const { selected } = choices.value;
  if (!selected) return null;
  const node = nodes.value.get(selected);
  const edge = edges.value.get(selected);
  return (
    <aside class="panel" aria-label="Details" data-testid="panel">
      <button type="button" class="close" onClick={() => choose({ selected: "" })} aria-label="Close details">
        ✕
      </button>
      {node ? <NodePanel node={node} /> : edge ? <EdgePanel edge={edge} /> : <p>Nothing is known of {selected} now.</p>}
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
            <button type="button" onClick={() => choose({ selected: edge.id })}>
              {shortName(edge[end])}
            </button>{" "}
            {rate(edge.rates.rps)}, {share(1 - edge.rates.errors)} ok
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
      <p class="dim">
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
      <Chart query={{ node: node.id }} title="Served" />
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
      <p class="dim">
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
      <Chart query={{ source: edge.source, target: edge.target }} title="This edge" />
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
  }, [namespace, name, changeNumber.value]);
  if (!detail) return null;
  return (
    <>
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
            <tr key={`${each.address}${each.port}`}>
              <td>{each.address}</td>
              <td>{each.workload}</td>
              <td>{each.health.toLowerCase()}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {detail.objects.length > 0 && (
        <>
          <h3>Rules</h3>
          <ul>
            {detail.objects.map((each) => (
              <li key={each}>
                <button type="button" onClick={() => choose({ view: "configuration", find: each })}>
                  {each}
                </button>
              </li>
            ))}
          </ul>
        </>
      )}
      <Actions detail={detail} />
    </>
  );
}

interface Wish {
  weights: Record<string, number>;
  delay: number;
  abort: number;
  timeout: number;
}

// The whole rule, as it will stand: what it replaces is shown beside it before anything is applied.
function written(detail: ServiceDetail, wish: Wish): string {
  const lines = [
    "apiVersion: networking.istio.io/v1",
    "kind: VirtualService",
    "metadata:",
    `  name: ${detail.name}`,
    `  namespace: ${detail.namespace}`,
    "spec:",
    "  hosts:",
    `  - ${detail.name}`,
    "  http:",
    "  - route:",
  ];
  const chosen = Object.entries(wish.weights).filter(([, weight]) => weight > 0);
  for (const [subset, weight] of chosen.length ? chosen : [["", 100] as [string, number]]) {
    lines.push("    - destination:", `        host: ${detail.name}`);
    if (subset) lines.push(`        subset: ${subset}`, `      weight: ${weight}`);
  }
  if (wish.timeout) lines.push(`    timeout: ${wish.timeout}s`);
  if (wish.delay || wish.abort) {
    lines.push("    fault:");
    if (wish.delay) lines.push("      delay:", `        fixedDelay: ${wish.delay}s`, "        percentage:", "          value: 100");
    if (wish.abort) lines.push("      abort:", "        httpStatus: 503", "        percentage:", `          value: ${wish.abort}`);
  }
  return `${lines.join("\n")}\n`;
}

function Actions({ detail }: { detail: ServiceDetail }) {
  const start = (): Wish => ({
    weights: Object.fromEntries(
      detail.subsets.map(({ name }) => [name, detail.split.find((each) => each.subset === name)?.weight ?? 0]),
    ),
    delay: 0,
    abort: 0,
    timeout: 0,
  });
  const [wish, setWish] = useState<Wish>(start);
  const [message, setMessage] = useState("");
  const [isOpen, setOpen] = useState(false);
  const names = detail.subsets.map(({ name }) => name);
  useEffect(() => setWish(start()), [JSON.stringify(detail.split), names.join()]);
  const yaml = written(detail, wish);
  const lack = forbidden("steer", detail.namespace);
  // One slider moves: the others share what is left in the proportion that they had.
  const move = (subset: string, weight: number) => {
    const others = names.filter((name) => name !== subset);
    const rest = 100 - weight;
    const before = others.reduce((sum, name) => sum + (wish.weights[name] ?? 0), 0);
    const weights: Record<string, number> = { [subset]: weight };
    let left = rest;
    others.forEach((name, index) => {
      const part = index === others.length - 1 ? left : Math.round(before ? ((wish.weights[name] ?? 0) / before) * rest : rest / others.length);
      weights[name] = part;
      left -= part;
    });
    setWish({ ...wish, weights });
  };
  const send = async () => {
    try {
      const { results, problems } = await apply(yaml);
      setMessage(problems.length ? problems.map((each) => `${each.field}: ${each.reason}`).join("; ") : results.map((each) => `${each.kind} ${each.name} ${each.outcome}`).join(", "));
    } catch (error) {
      setMessage(error instanceof Refused ? `refused: ${error.message}` : String(error));
    }
  };
  return (
    <section class="actions" aria-label="Actions">
      <h3>
        <button type="button" aria-expanded={isOpen} onClick={() => setOpen(!isOpen)} data-testid="actions">
          Steer the traffic {isOpen ? "▾" : "▸"}
        </button>
      </h3>
      {isOpen && (
        <>
          {names.map((name) => (
            <label key={name} class="slider">
              <span>{name}</span>
              <input
                type="range"
                min="0"
                max="100"
                value={wish.weights[name] ?? 0}
                data-testid={`weight:${name}`}
                onInput={(event) => move(name, Number(event.currentTarget.value))}
              />
              <output>{wish.weights[name] ?? 0} %</output>
            </label>
          ))}
          {!names.length && <p class="dim">No DestinationRule names subsets of {detail.name}, so there is nothing to split.</p>}
          <label class="slider">
            <span>delay (s)</span>
            <input type="number" min="0" max="60" step="0.5" value={wish.delay} onInput={(event) => setWish({ ...wish, delay: Number(event.currentTarget.value) })} />
          </label>
          <label class="slider">
            <span>503 for (%)</span>
            <input type="number" min="0" max="100" value={wish.abort} onInput={(event) => setWish({ ...wish, abort: Number(event.currentTarget.value) })} />
          </label>
          <label class="slider">
            <span>timeout (s)</span>
            <input type="number" min="0" max="600" step="0.5" value={wish.timeout} onInput={(event) => setWish({ ...wish, timeout: Number(event.currentTarget.value) })} />
          </label>
          <div class="preview">
            {detail.rule && (
              <figure>
                <figcaption>in force now, replaced whole</figcaption>
                <pre tabIndex={0}>{detail.rule}</pre>
              </figure>
            )}
            <figure>
              <figcaption>will be applied</figcaption>
              <pre tabIndex={0} data-testid="preview">
                {yaml}
              </pre>
            </figure>
          </div>
          <p>
            <button
              type="button"
              class="primary"
              onClick={send}
              disabled={Boolean(lack)}
              aria-describedby={lack ? "apply-lack" : undefined}
              data-testid="apply"
            >
              Apply
            </button>{" "}
            <button type="button" onClick={() => void navigator.clipboard.writeText(yaml)}>
              Copy for meshctl apply -f -
            </button>
          </p>
          {lack && (
            <p class="dim" id="apply-lack" data-testid="lack">
              You can't apply this in {detail.namespace}: {lack}.
            </p>
          )}
          <p role="status" data-testid="outcome">
            {message}
          </p>
        </>
      )}
    </section>
  );
}
