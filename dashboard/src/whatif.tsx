// What would a text do? Asked of the control plane before anything is applied.
import { useEffect, useState } from "preact/hooks";
import { apply, Refused, whatIf, type RouteShown, type WhatIfAnswer } from "./api";
import { ProblemLine } from "./configuration";
import { rate, share, shortName } from "./text";

export function WhatIf({ yaml }: { yaml: string }) {
  const [found, setFound] = useState<WhatIfAnswer | null>(null);
  const [trouble, setTrouble] = useState("");
  const forget = () => {
    setFound(null);
    setTrouble("");
  };
  useEffect(forget, [yaml]); // what was said is of another text
  const ask = async () => {
    forget();
    try {
      setFound(await whatIf(yaml));
    } catch (error) {
      setTrouble(error instanceof Refused ? `refused: ${error.message}` : String(error));
    }
  };
  return (
    <div class="whatif">
      <p>
        <button type="button" onClick={() => void ask()} data-testid="what-if">
          What would it do?
        </button>
      </p>
      <div role="status" data-testid="what-if-answer">
        {trouble && <p class="problem error">{trouble}</p>}
        {found && <Answer found={found} />}
      </div>
    </div>
  );
}

function Answer({ found }: { found: WhatIfAnswer }) {
  return (
    <>
      {[...found.problems, ...found.warnings].map((problem, index) => (
        <ProblemLine key={index} problem={problem} />
      ))}
      <TurnedAwayPart found={found} />
      {!found.hosts.length && !found.policies.length && <p>No route, and no policy, of anybody would change.</p>}
      {found.policies.map((each) => (
        <article key={`${each.what} ${each.workloads.join()}`} class="object" data-testid="policy-change">
          <strong>{each.what === "calls to" ? `calls to ${each.workloads.map(shortName).join(", ")}` : each.what}</strong>
          {each.what !== "calls to" && <p class="dim">as {each.workloads.map(shortName).join(", ")} call it</p>}
          <Lines title="now" lines={each.before} />
          <Lines title="then" lines={each.after} />
        </article>
      ))}
      {found.hosts.map((each) => (
        <article key={`${each.host} ${each.callers.join()}`} class="object">
          <strong>{each.host}</strong>
          <p class="dim">
            for {each.callers.map(shortName).join(", ")}; recorded: {rate(each.rps)}
            {each.rps > 0 && ` (${Object.entries(each.versions).map(([version, rps]) => `${version} ${rate(rps)}`).join(", ")})`}
          </p>
          <Routes title="now" routes={each.before} />
          <Routes title="then" routes={each.after} />
        </article>
      ))}
      {found.left_out > 0 && <p class="dim">{found.left_out} more groups of callers were not looked at.</p>}
    </>
  );
}

// Whom new rules would turn away, of those who called lately.
function TurnedAwayPart({ found }: { found: WhatIfAnswer }) {
  const minutes = `${(found.seconds / 60).toFixed(found.seconds % 60 ? 1 : 0)} minutes`;
  if (!found.turned_away.length) {
    if (!found.policies.some(({ what }) => what === "calls to")) return null;
    return (
      <p data-testid="turned-away">
        {found.judged
          ? `✓ None of the ${found.judged} recorded requests of the last ${minutes} to workloads whose rules change would be turned away.`
          : `Nothing was recorded in the last ${minutes} that could be held against the rules that change.`}
      </p>
    );
  }
  const certain = found.turned_away.filter((each) => each.is_certain).reduce((sum, each) => sum + each.requests, 0);
  const open = found.turned_away.reduce((sum, each) => sum + each.requests, 0) - certain;
  return (
    <article class="object away" data-testid="turned-away">
      <strong>
        {certain > 0 ? `✕ ${certain} of ${found.judged} recorded requests would be turned away` : `! ${open} of ${found.judged} recorded requests may be turned away`}
        {certain > 0 && open > 0 && `, and ${open} more may be`}
      </strong>
      <p class="dim">Of the last {minutes}. Who calls, and whether by mutual TLS, is recorded; method, path, headers and tokens are not.</p>
      <div class="scrolls" tabIndex={0} role="region" aria-label="Callers that would be turned away">
        <table>
          <thead>
            <tr>
              <th scope="col">caller</th>
              <th scope="col">callee</th>
              <th scope="col">requests</th>
              <th scope="col">by</th>
            </tr>
          </thead>
          <tbody>
            {found.turned_away.map((each, index) => (
              <tr key={index}>
                <td>
                  {each.caller === "unknown" ? "somebody outside the mesh" : shortName(each.caller)}
                  <br />
                  <span class="dim">{each.principal ? each.principal.replace("spiffe://", "") : "without an identity"}</span>
                </td>
                <td>{shortName(each.callee)}</td>
                <td class={each.is_certain ? "bad" : ""}>
                  {each.is_certain ? "✕ all" : "! some of"} {each.requests}
                </td>
                <td>
                  {each.rules.map((rule) => (
                    <div key={rule}>{rule}</div>
                  ))}
                  {each.depends_on.length > 0 && <span class="dim">depends on: {each.depends_on.join(", ")}</span>}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </article>
  );
}

function Lines({ title, lines }: { title: string; lines: string[] }) {
  return (
    <table>
      <caption>{title}</caption>
      <tbody>
        {(lines.length ? lines : ["nothing of the kind"]).map((line) => (
          <tr key={line}>
            <td>{line}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function Routes({ title, routes }: { title: string; routes: RouteShown[] }) {
  return (
    <table>
      <caption>{title}</caption>
      <tbody>
        {routes.map((route, index) => (
          <tr key={index}>
            <th scope="row">
              {route.name}
              {route.takes_all ? "" : " (what matches)"}
            </th>
            <td>
              {[...route.portions.map((each) => `${share(each.share)} to ${each.to}${each.rps === null ? "" : `: ${rate(each.rps)}`}`), ...route.does].join("; ")}
            </td>
          </tr>
        ))}
        {!routes.length && (
          <tr>
            <td>no such host</td>
          </tr>
        )}
      </tbody>
    </table>
  );
}

// A text of the reader's own: asked about, and applied.
export function Editor({ text, onText }: { text: string; onText: (text: string) => void }) {
  const [message, setMessage] = useState("");
  const send = async () => {
    try {
      const { results, problems } = await apply(text);
      setMessage([...results.map((each) => `${each.kind} ${each.name} ${each.outcome}`), ...problems.map((each) => `${each.object} ${each.field}: ${each.reason}`)].join("; "));
    } catch (error) {
      setMessage(error instanceof Refused ? `refused: ${error.message}` : String(error));
    }
  };
  return (
    <section class="editor" aria-label="Try a change">
      <label for="editor">Try a change: YAML that is not in force yet</label>
      <textarea id="editor" rows={text ? 16 : 2} spellcheck={false} placeholder="Paste YAML, or take an object below: you see what it would do before anything is applied." value={text} onInput={(event) => onText(event.currentTarget.value)} data-testid="editor" />
      {text.trim() && (
        <>
          <WhatIf yaml={text} />
          <p>
            <button type="button" class="primary" onClick={() => void send()} data-testid="apply-text">
              Apply
            </button>
          </p>
        </>
      )}
      <p role="status" data-testid="applied">
        {message}
      </p>
    </section>
  );
}
