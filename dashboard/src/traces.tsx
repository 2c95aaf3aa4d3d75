// Which requests were slow or failed, and why? The last traces, and one of them as a waterfall with each span's reasons.
import { useEffect, useState } from "preact/hooks";
import { get, type Span, type TraceHead } from "./api";
import { Decision } from "./decision";
import { choices, choose, now } from "./state";
import { clock, milliseconds } from "./text";

export function Traces() {
  const [heads, setHeads] = useState<TraceHead[]>([]);
  const [isFailed, setFailed] = useState(false);
  const [slower, setSlower] = useState(0);
  const { trace, find } = choices.value;
  useEffect(() => {
    void get<{ traces: TraceHead[] }>("/v1/traces", {
      ...(isFailed ? { failed: "true" } : {}),
      ...(slower ? { slower: slower / 1000 } : {}),
    }).then((found) => setHeads(found.traces));
  }, [isFailed, slower, Math.floor(now.value / 3)]);
  const shown = heads.filter((head) => `${head.service} ${head.request} ${head.name}`.toLowerCase().includes(find.toLowerCase()));
  return (
    <section class="page" aria-label="Traces">
      <h2>Requests</h2>
      <p class="filters">
        <label>
          <input type="checkbox" checked={isFailed} onChange={() => setFailed(!isFailed)} /> only failed
        </label>
        <label>
          slower than{" "}
          <input type="number" min="0" step="50" value={slower} onInput={(event) => setSlower(Number(event.currentTarget.value))} /> ms
        </label>
      </p>
      {trace && <Waterfall id={trace} />}
      {shown.length ? (
        <table data-testid="traces">
          <thead>
            <tr>
              <th scope="col">time</th>
              <th scope="col">began at</th>
              <th scope="col">request</th>
              <th scope="col">took</th>
              <th scope="col">spans</th>
              <th scope="col">result</th>
            </tr>
          </thead>
          <tbody>
            {shown.map((head) => (
              <tr key={head.trace_id} class={head.trace_id === trace ? "chosen" : ""}>
                <td>{clock(head.began)}</td>
                <td>{head.service}</td>
                <td>
                  <button type="button" onClick={() => choose({ trace: head.trace_id })}>
                    {head.request || head.name}
                  </button>
                </td>
                <td>{milliseconds(head.duration * 1000)}</td>
                <td>{head.spans}</td>
                <td class={head.failed ? "bad" : ""}>
                  {head.failed ? "✕ failed" : "✓ ok"}
                  {head.status > 0 && <span class="dim"> {head.status}</span>}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      ) : (
        <p class="empty">No trace fits. Sampling decides how many requests are traced: see docs/how-to/tracing.md.</p>
      )}
    </section>
  );
}

function Waterfall({ id }: { id: string }) {
  const [spans, setSpans] = useState<Span[]>([]);
  const [open, setOpen] = useState("");
  useEffect(() => {
    get<{ spans: Span[] }>(`/v1/traces/${id}`).then(
      (found) => setSpans(found.spans),
      () => setSpans([]),
    );
  }, [id]);
  if (!spans.length) return <p class="dim">This trace is not known any more.</p>;
  const start = Math.min(...spans.map((span) => span.began));
  const end = Math.max(...spans.map((span) => span.ended));
  const whole = end - start || 1e-6;
  const byId = new Map(spans.map((span) => [span.span_id, span]));
  const children = new Map<string, Span[]>();
  for (const span of spans) {
    const parent = byId.has(span.parent_id) ? span.parent_id : "";
    children.set(parent, [...(children.get(parent) ?? []), span]);
  }
  const rows: [Span, number][] = [];
  const walk = (parent: string, depth: number) => {
    for (const span of children.get(parent) ?? []) {
      rows.push([span, depth]);
      walk(span.span_id, depth + 1);
    }
  };
  walk("", 0);
  return (
    <div class="waterfall" data-testid="waterfall">
      <p>
        <code>{id}</code> {milliseconds(whole * 1000)}{" "}
        <button type="button" onClick={() => choose({ trace: "" })}>
          close
        </button>
      </p>
      <ol>
        {rows.map(([span, depth]) => (
          <li key={span.span_id} class={span.is_error ? "failure" : ""}>
            <button type="button" aria-expanded={open === span.span_id} onClick={() => setOpen(open === span.span_id ? "" : span.span_id)}>
              <span class="who" ref={(element) => element?.style.setProperty("padding-left", `${depth * 14}px`)}>
                {span.is_error ? "✕ " : ""}
                {span.service} · {span.kind} · {span.name}
              </span>
              <span class="bar">
                <span
                  ref={(element) => {
                    element?.style.setProperty("left", `${((span.began - start) / whole) * 100}%`);
                    element?.style.setProperty("width", `${Math.max(0.4, ((span.ended - span.began) / whole) * 100)}%`);
                  }}
                />
              </span>
              <span class="took">{milliseconds((span.ended - span.began) * 1000)}</span>
            </button>
            {open === span.span_id && <Decision span={span} tries={children.get(span.span_id) ?? []} />}
            {open === span.span_id && (
              <dl class="attributes">
                {span.attributes.map(([name, value]) => (
                  <div key={name}>
                    <dt>{name}</dt>
                    <dd>{value}</dd>
                  </div>
                ))}
              </dl>
            )}
          </li>
        ))}
      </ol>
    </div>
  );
}
