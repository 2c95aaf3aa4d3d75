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
      <label for="editor">YAML that is not in force yet</label>
      <textarea id="editor" rows={text ? 16 : 3} spellcheck={false} value={text} onInput={(event) => onText(event.currentTarget.value)} data-testid="editor" />
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
