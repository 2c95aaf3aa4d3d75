// Why did this call go where it went? What the mesh decided, as the caller's span tells it.
import type { Span } from "./api";
import { choose } from "./state";

// Envoy's response flags, as far as the mesh gives them (docs of Envoy, access log, %RESPONSE_FLAGS%).
const FLAGS: Record<string, string> = {
  UH: "no healthy endpoint",
  UF: "no connection to the endpoint",
  UO: "the circuit breaker was open",
  NR: "no route",
  NC: "the cluster is not known",
  URX: "no more tries were allowed",
  UT: "the endpoint did not answer in time",
  UC: "the endpoint closed the connection",
  UR: "the endpoint reset the request",
  UPE: "the endpoint's answer broke the protocol",
  LR: "reset by the mesh",
  DC: "the caller went away",
  DI: "delayed by an injected fault",
  FI: "aborted by an injected fault",
  RL: "rate limited",
  RLSE: "the rate limit service failed",
  UAEX: "not authorized",
  SI: "idle for too long",
  DT: "took longer than a request may",
};

function explained(flags: string): string {
  return flags
    .split(",")
    .map((flag) => (FLAGS[flag] ? `${flag}: ${FLAGS[flag]}` : flag))
    .join("; ");
}

// outbound|9080|v2|reviews.default.svc.cluster.local
function place(cluster: string): string {
  const [direction, port, subset, host] = cluster.split("|");
  if (direction !== "outbound" || !host) return cluster;
  return `${host}:${port}${subset ? `, subset ${subset}` : ", all of its endpoints"}`;
}

export function Decision({ span, tries }: { span: Span; tries: Span[] }) {
  const told = new Map(span.attributes);
  const route = told.get("mesh.route");
  const object = told.get("mesh.object");
  const cluster = told.get("mesh.cluster");
  const endpoint = told.get("mesh.endpoint");
  const flags = told.get("mesh.response_flags") ?? "-";
  const fault = told.get("mesh.fault");
  const attempts = tries.map((each) => new Map(each.attributes)).filter((each) => each.has("mesh.attempt"));
  if (span.kind !== "client" || !told.has("mesh.attempts")) return null;
  const title = object?.replace(/ \(.*$/, "") ?? "";
  return (
    <section class="decision" aria-label="What the mesh decided" data-testid="decision">
      <h3>What the mesh decided</h3>
      <ol>
        <li>
          {!route ? (
            "No route was found for this host."
          ) : object ? (
            <>
              The route {route} was the first that matched:{" "}
              <button type="button" onClick={() => choose({ view: "configuration", find: title })}>
                {title}
              </button>{" "}
              <span class="dim">{object.slice(title.length + 1)}</span>
            </>
          ) : (
            "The service's own route was taken: no object says anything about this call."
          )}
        </li>
        {fault && <li>A fault was injected: {fault}.</li>}
        {cluster && <li>It chose {place(cluster)}.</li>}
        {endpoint && <li>The load balancer picked {endpoint}{attempts.length > 1 ? " in the end" : ""}.</li>}
        {attempts.map((each) => (
          <li key={each.get("mesh.attempt")}>
            Try {each.get("mesh.attempt")}: {each.get("mesh.endpoint")} answered {each.get("http.response.status_code") ?? "nothing"}.
          </li>
        ))}
        {flags !== "-" && <li>{explained(flags)}.</li>}
      </ol>
    </section>
  );
}
