// Is a service's circuit open, and who says so? An operator opens it, closes it, or lets it decide again; the object first.
import { useState } from "preact/hooks";
import { apply, Refused, remove, told, type Breaker, type Results, type ServiceDetail } from "./api";
import { forbidden } from "./state";

type Wish = "" | "open" | "close" | "release";

export function Circuit({ detail, breaker }: { detail: ServiceDetail; breaker: Breaker }) {
  const [wish, setWish] = useState<Wish>("");
  const [message, setMessage] = useState("");
  const lack = forbidden("steer", detail.namespace);
  const states = Object.entries(breaker.states).map(([state, number]) => `${number} ${state}`);
  const yaml = wish ? breaker[wish] : "";
  const send = async () => {
    try {
      const found: Results = yaml ? await apply(yaml) : await remove("BackendTrafficPolicy", detail.namespace, breaker.name);
      setMessage(told(found));
      if (!found.problems.length) setWish("");
    } catch (error) {
      setMessage(error instanceof Refused ? `refused: ${error.message}` : String(error));
    }
  };
  const choice = (name: Wish, title: string) => (
    <button type="button" aria-pressed={wish === name} onClick={() => setWish(wish === name ? "" : name)} data-testid={`circuit-${name}`}>
      {title}
    </button>
  );
  return (
    <section class="actions" aria-label="Circuit breaker">
      <h3>Circuit breaker</h3>
      <p data-testid="circuit">
        {breaker.forced ? `held ${breaker.forced.toLowerCase()} by ${breaker.name}` : breaker.before.includes("breaker:") ? `decides by ${breaker.name}` : "none"}
        <span class="dim">{states.length ? `; callers: ${states.join(", ")}` : ""}</span>
      </p>
      <p role="group" aria-label="What to do with the circuit">
        {breaker.forced !== "OPEN" && <>{choice("open", "Open it…")} </>}
        {breaker.forced !== "CLOSED" && <>{choice("close", "Hold it closed…")} </>}
        {breaker.forced && choice("release", "Let it decide…")}
      </p>
      {wish && (
        <>
          <p class="dim">
            {wish === "open"
              ? `Every call to ${detail.name} will be answered 503 by its caller, and not be sent.`
              : wish === "close"
                ? `Calls to ${detail.name} will be sent however many fail.`
                : "It will open and close by what calls do, if it has rules."}
          </p>
          <div class="preview">
            {breaker.before && (
              <figure>
                <figcaption>in force now, replaced whole</figcaption>
                <pre tabIndex={0}>{breaker.before}</pre>
              </figure>
            )}
            <figure>
              <figcaption>{yaml ? "will be applied" : `BackendTrafficPolicy ${breaker.name} will be deleted`}</figcaption>
              {yaml && (
                <pre tabIndex={0} data-testid="circuit-preview">
                  {yaml}
                </pre>
              )}
            </figure>
          </div>
          <button
            type="button"
            class="primary"
            onClick={() => void send()}
            disabled={Boolean(lack)}
            aria-describedby={lack ? "circuit-lack" : undefined}
            data-testid="circuit-apply"
          >
            Apply
          </button>
          {lack && (
            <p class="dim" id="circuit-lack">
              You can't apply this in {detail.namespace}: {lack}.
            </p>
          )}
        </>
      )}
      <p role="status" data-testid="circuit-outcome">
        {message}
      </p>
    </section>
  );
}
