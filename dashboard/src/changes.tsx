// What was changed, and what became of the traffic? A timeline, with each touched service before and after the change.
import type { RefObject } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { get, type BeforeAndAfter, type Change, type Stretch, type Touched } from "./api";
import { Chart } from "./chart";
import { changes, choices, choose, now } from "./state";
import { clock, milliseconds, rate, share, shortName, span } from "./text";

// Of fewer requests a share or a quantile is an anecdote.
const ENOUGH = 20;

// Lines that are in only one of the two, in order; enough for objects of a few dozen lines.
function differences(before: string, after: string): [string, string][] {
  const one = before.split("\n");
  const two = after.split("\n");
  const longest: number[][] = Array.from({ length: one.length + 1 }, () => new Array<number>(two.length + 1).fill(0));
  for (let i = one.length - 1; i >= 0; i--)
    for (let j = two.length - 1; j >= 0; j--)
      longest[i]![j] = one[i] === two[j] ? longest[i + 1]![j + 1]! + 1 : Math.max(longest[i + 1]![j]!, longest[i]![j + 1]!);
  const lines: [string, string][] = [];
  let i = 0;
  let j = 0;
  while (i < one.length || j < two.length) {
    if (i < one.length && j < two.length && one[i] === two[j]) lines.push([" ", one[i++]!]), j++;
    else if (j < two.length && (i === one.length || longest[i]![j + 1]! >= longest[i + 1]![j]!)) lines.push(["+", two[j++]!]);
    else lines.push(["-", one[i++]!]);
  }
  return lines.filter(([, text]) => text);
}

export function ChangeHistory() {
  const { find } = choices.value;
  const shown = [...changes.value].reverse().filter((each) => `${each.object} ${each.who} ${each.source}`.toLowerCase().includes(find.toLowerCase()));
  return (
    <section class="page" aria-label="Changes">
      <h2>Changes</h2>
      {shown.length > 0 && (
        <>
          <p class="dim">Each with the traffic of the services that it touches, {span(choices.value.seconds)} before and after it (“compare” above says how long).</p>
          <Chart query={{}} title="All calls in the mesh" />
          <ol class="timeline">
            {shown.map((change) => (
              <ChangeEntry key={change.number} change={change} />
            ))}
          </ol>
        </>
      )}
      {!changes.value.length && <p>Nothing was changed since this control plane started.</p>}
      {changes.value.length > 0 && !shown.length && <p>No change fits “{find}”.</p>}
    </section>
  );
}

// Whether it has been seen: what is far below asks for nothing.
function useSeen(): [RefObject<HTMLLIElement | null>, boolean] {
  const place = useRef<HTMLLIElement>(null);
  const [isSeen, setSeen] = useState(false);
  useEffect(() => {
    const watched = new IntersectionObserver((entries) => entries.some((each) => each.isIntersecting) && setSeen(true));
    if (place.current) watched.observe(place.current);
    return () => watched.disconnect();
  }, []);
  return [place, isSeen];
}

function ChangeEntry({ change }: { change: Change }) {
  const [place, isSeen] = useSeen();
  const [found, setFound] = useState<BeforeAndAfter | null>(null);
  const { seconds } = choices.value;
  // Until what comes after is whole, it is asked again.
  const slot = found && found.seconds >= seconds && found.remaining === 0 ? 0 : Math.floor(now.value / 5);
  useEffect(() => {
    if (!isSeen) return;
    let wanted = true;
    get<BeforeAndAfter>(`/v1/changes/${change.number}`, { seconds }).then(
      (told) => wanted && setFound(told),
      () => undefined, // the stream tells what is wrong
    );
    return () => {
      wanted = false;
    };
  }, [isSeen, change.number, seconds, slot]);
  const did = !change.before ? "created" : !change.after ? "deleted" : "changed";
  return (
    <li ref={place} data-testid={`change:${change.number}`}>
      <details>
        <summary>
          <time>{clock(change.at)}</time> <strong>{change.object}</strong> <span class="pill">{did}</span>{" "}
          <span class="dim">
            {change.origin}, {change.source}
            {change.who && change.who !== change.origin && `, by ${change.who}`}
          </span>
        </summary>
        <p>
          <button type="button" onClick={() => choose({ view: "graph", end: change.at, selected: "" })}>
            Graph before
          </button>{" "}
          <button type="button" onClick={() => choose({ view: "graph", end: change.at + choices.value.seconds, selected: "" })}>
            Graph after
          </button>
        </p>
        <pre class="difference" tabIndex={0}>
          {differences(change.before, change.after).map(([sign, text], index) => (
            <span key={index} class={sign === "+" ? "added" : sign === "-" ? "removed" : ""}>
              {sign} {text}
              {"\n"}
            </span>
          ))}
        </pre>
      </details>
      {found && <Traffic found={found} />}
    </li>
  );
}

function Traffic({ found }: { found: BeforeAndAfter }) {
  const { services, silent, others, remaining, seconds } = found;
  return (
    <div class="effect" data-testid={`effect:${found.number}`}>
      {services.length > 0 && (
        <div class="scrolls" tabIndex={0} role="region" aria-label={`Traffic before and after change ${found.number}`}>
          <table>
            <thead>
              <tr>
                <th scope="col">service</th>
                <th scope="col">
                  <span class="hidden">course</span>
                </th>
                <th scope="col">requests/s</th>
                <th scope="col">success</th>
                <th scope="col">p95</th>
                <th scope="col">of requests</th>
              </tr>
            </thead>
            <tbody>
              {services.map((each) => (
                <ServiceRow key={each.service} each={each} found={found} />
              ))}
            </tbody>
          </table>
        </div>
      )}
      <p class="dim">
        {!services.length &&
          (silent
            ? `${silent === 1 ? "The service" : `None of the ${silent} services`} that it touches had ${silent === 1 ? "no" : "a"} request in the ${span(seconds)} before or after it.`
            : "It touches no service that is known now.")}
        {services.length > 0 && silent > 0 && `${silent} more ${silent === 1 ? "service" : "services"} that it touches had no request. `}
        {found.left_out > 0 && `${found.left_out} more services are not shown. `}
        {remaining > 0 && services.length > 0 && `What comes after is not over: ${span(remaining)} to go. `}
        {others.length > 0 &&
          services.length > 0 &&
          `${others.length} other ${others.length === 1 ? "change falls" : "changes fall"} into this time: what is seen here may be ${others.length === 1 ? "its" : "their"} doing.`}
      </p>
    </div>
  );
}

type Sense = "same" | "worse" | "better";

function ServiceRow({ each, found }: { each: Touched; found: BeforeAndAfter }) {
  const { before, after } = each;
  const isFew = Math.min(before.requests, after.requests) < ENOUGH;
  const sense = (was: number | null, is: number | null, least: number, isMoreWorse: boolean): Sense =>
    isFew || was === null || is === null || Math.abs(is - was) < least ? "same" : is > was === isMoreWorse ? "worse" : "better";
  const failed = sense(before.rates.errors, after.rates.errors, 0.01, true);
  const slower = sense(before.rates.p95, after.rates.p95, Math.max(5, (before.rates.p95 ?? 0) * 0.25), true);
  const ok = ({ requests, rates }: Stretch) => (requests ? share(1 - rates.errors) : "–");
  const late = ({ requests, rates }: Stretch) => (requests ? milliseconds(rates.p95) : "–");
  return (
    <tr>
      <th scope="row">
        <button type="button" class="link" onClick={() => choose({ view: "graph", selected: each.service, end: 0 })}>
          {shortName(each.service)}
        </button>
      </th>
      <td>
        <Course each={each} changed={found.at} />
      </td>
      <td>
        {rate(before.rates.rps).replace(" rps", "")} → {rate(after.rates.rps).replace(" rps", "")}
      </td>
      <td class={failed}>
        {ok(before)} → {ok(after)} <Mark sense={failed} up={after.rates.errors < before.rates.errors} />
      </td>
      <td class={slower}>
        {late(before)} → {late(after)} <Mark sense={slower} up={(after.rates.p95 ?? 0) > (before.rates.p95 ?? 0)} />
      </td>
      <td>
        {before.requests} → {after.requests}
        {isFew && <span class="dim"> {found.remaining > 0 ? "too few yet" : "too few to judge"}</span>}
      </td>
    </tr>
  );
}

function Mark({ sense, up }: { sense: Sense; up: boolean }) {
  return sense === "same" ? null : (
    <span class="mark">
      {up ? "▲" : "▼"} {sense}
    </span>
  );
}

// Requests by time, what failed of them at the bottom, and the change as a line. The figures beside it tell the same.
function Course({ each, changed }: { each: Touched; changed: number }) {
  const [wide, high] = [150, 30];
  const { before, after, points } = each;
  const start = before.start;
  const whole = before.end - before.start + (after.start - before.end) + (before.end - before.start);
  const most = Math.max(...points.map(({ rps }) => rps), 1e-9);
  const x = (at: number) => ((at - start) / whole) * wide;
  const width = Math.max(1, x(start + (after.start - before.end)) - 0.6);
  const bar = (at: number, of: number) => ({ x: x(at), width, y: high - (of / most) * high, height: (of / most) * high });
  return (
    <svg class="course" viewBox={`0 0 ${wide} ${high}`} width={wide} height={high} aria-hidden="true">
      <line x1="0" x2={wide} y1={high} y2={high} class="ground" />
      {points.map(({ at, rps, failed }) => (
        <g key={at}>
          <rect {...bar(at, rps)} class={at < changed ? "was" : "is"} />
          {failed > 0 && <rect {...bar(at, failed)} class="failed" />}
        </g>
      ))}
      <line x1={x(changed)} x2={x(changed)} y1="0" y2={high} class="change" />
    </svg>
  );
}
