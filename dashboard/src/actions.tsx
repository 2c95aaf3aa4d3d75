// What can be done about a service? Shares, faults and a timeout: written as YAML first, applied by a button, taken back by another.
import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { apply, Refused, remove, told, type Results, type ServiceDetail } from "./api";
import { forbidden } from "./state";
import { WhatIf } from "./whatif";

type Steering = ServiceDetail["steering"];
interface Wish extends Steering {
  weights: Record<string, number>;
}
interface Field {
  name: keyof Steering;
  title: string;
  max: number;
  min?: number;
  step?: string;
}
const FIELDS: Field[] = [
  { name: "delay", title: "delay (s)", max: 60, step: "any" },
  { name: "delayed", title: "delayed (%)", max: 100, step: "any" },
  { name: "aborted", title: "aborted (%)", max: 100, step: "any" },
  { name: "abort", title: "abort with", max: 599, min: 200 },
  { name: "timeout", title: "timeout (s)", max: 600, step: "any" },
];

// What stood before the last change that was made here, by service: "" is that there was no rule.
const taken = signal<ReadonlyMap<string, { name: string; before: string }>>(new Map());

function remember(host: string, change: { name: string; before: string } | null): void {
  const known = new Map(taken.value);
  if (change) known.set(host, change);
  else known.delete(host);
  taken.value = known;
}

function nameOf(detail: ServiceDetail): string {
  return detail.rule_name || detail.name;
}

// The whole rule, as it will stand: what it replaces is shown beside it before anything is applied.
function written(detail: ServiceDetail, wish: Wish): string {
  const lines = [
    "apiVersion: networking.istio.io/v1",
    "kind: VirtualService",
    "metadata:",
    `  name: ${nameOf(detail)}`,
    `  namespace: ${detail.namespace}`,
    "spec:",
    "  hosts:",
    `  - ${detail.host}`,
    "  http:",
    "  - route:",
  ];
  const chosen = Object.entries(wish.weights).filter(([, weight]) => weight > 0);
  for (const [subset, weight] of chosen.length ? chosen : [["", 100] as [string, number]]) {
    lines.push("    - destination:", `        host: ${detail.host}`);
    if (subset) lines.push(`        subset: ${subset}`, `      weight: ${weight}`);
  }
  if (wish.timeout) lines.push(`    timeout: ${wish.timeout}s`);
  const isDelayed = wish.delay > 0 && wish.delayed > 0;
  if (isDelayed || wish.aborted > 0) lines.push("    fault:");
  if (isDelayed) lines.push("      delay:", `        fixedDelay: ${wish.delay}s`, "        percentage:", `          value: ${wish.delayed}`);
  if (wish.aborted > 0) lines.push("      abort:", `        httpStatus: ${wish.abort}`, "        percentage:", `          value: ${wish.aborted}`);
  return `${lines.join("\n")}\n`;
}

function inForce(detail: ServiceDetail): Wish {
  const { steering } = detail;
  return {
    ...steering,
    delayed: steering.delay ? steering.delayed : 100,
    abort: steering.abort || 503,
    weights: Object.fromEntries(
      detail.subsets.map(({ name }) => [name, detail.split.find((each) => each.subset === name)?.weight ?? 0]),
    ),
  };
}

export function Actions({ detail }: { detail: ServiceDetail }) {
  const [wish, setWish] = useState<Wish>(() => inForce(detail));
  const [message, setMessage] = useState("");
  const [isOpen, setOpen] = useState(false);
  const names = detail.subsets.map(({ name }) => name);
  useEffect(() => setWish(inForce(detail)), [JSON.stringify([detail.split, detail.steering]), names.join()]);
  const yaml = written(detail, wish);
  const lack = forbidden("steer", detail.namespace);
  const before = taken.value.get(detail.host);
  // One slider moves: the others share what is left in the proportion that they had.
  const move = (subset: string, weight: number) => {
    const others = names.filter((name) => name !== subset);
    const rest = 100 - weight;
    const sum = others.reduce((all, name) => all + (wish.weights[name] ?? 0), 0);
    const weights: Record<string, number> = { [subset]: weight };
    let left = rest;
    others.forEach((name, index) => {
      const part = index === others.length - 1 ? left : Math.round(sum ? ((wish.weights[name] ?? 0) / sum) * rest : rest / others.length);
      weights[name] = part;
      left -= part;
    });
    setWish({ ...wish, weights });
  };
  const ask = async (change: () => Promise<Results>, done: () => void) => {
    try {
      const found = await change();
      if (!found.problems.length) done();
      setMessage(told(found));
    } catch (error) {
      setMessage(error instanceof Refused ? `refused: ${error.message}` : String(error));
    }
  };
  const send = () => {
    const name = nameOf(detail);
    return ask(
      () => apply(yaml),
      () => remember(detail.host, { name, before: detail.rule_name ? detail.rule : "" }),
    );
  };
  const takeBack = (change: { name: string; before: string }) =>
    ask(
      () => (change.before ? apply(change.before) : remove("VirtualService", detail.namespace, change.name)),
      () => remember(detail.host, null),
    );
  return (
    <section class="actions" aria-label="Actions">
      <h3>
        <button type="button" aria-expanded={isOpen} onClick={() => setOpen(!isOpen)} data-testid="actions">
          Steer the traffic {isOpen ? "▾" : "▸"}
        </button>
      </h3>
      {isOpen && (
        <form onSubmit={(event) => event.preventDefault()}>
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
          {names.length > 0 && !names.some((name) => wish.weights[name]) && (
            <p class="dim">Nothing splits the traffic now: every endpoint takes its turn. Move a slider to split it.</p>
          )}
          {!names.length && <p class="dim">No DestinationRule names subsets of {detail.name}, so there is nothing to split.</p>}
          {FIELDS.map(({ name, title, min, max, step }) => (
            <label key={name} class="slider">
              <span>{title}</span>
              <input
                type="number"
                min={min ?? 0}
                max={max}
                step={step ?? "1"}
                required
                value={wish[name]}
                data-testid={name}
                onInput={(event) => setWish({ ...wish, [name]: Number(event.currentTarget.value) })}
              />
            </label>
          ))}
          <div class="preview">
            {detail.rule && (
              <figure>
                <figcaption>{detail.rule_name ? "in force now, replaced whole" : "in force now, and stays: it is not of this service alone"}</figcaption>
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
            {/* No submit button: Enter in a field must not change the mesh. */}
            <button
              type="button"
              class="primary"
              onClick={(event) => event.currentTarget.form?.reportValidity() && void send()}
              disabled={Boolean(lack)}
              aria-describedby={lack ? "apply-lack" : undefined}
              data-testid="apply"
            >
              Apply
            </button>{" "}
            {before && (
              <>
                <button type="button" onClick={() => void takeBack(before)} disabled={Boolean(lack)} data-testid="take-back">
                  Take back
                </button>{" "}
              </>
            )}
            <button type="button" onClick={() => void navigator.clipboard.writeText(yaml)}>
              Copy for meshctl apply -f -
            </button>
          </p>
          {lack && (
            <p class="dim" id="apply-lack" data-testid="lack">
              You can't apply this in {detail.namespace}: {lack}.
            </p>
          )}
          <WhatIf yaml={yaml} />
          <p role="status" data-testid="outcome">
            {message}
          </p>
        </form>
      )}
    </section>
  );
}
