// The page: a bar with the choices, the view that was chosen, and the details of what is selected.
import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import { useEffect, useState } from "preact/hooks";
import { Refused, signIn, signOut } from "./api";
import { ChangeHistory } from "./changes";
import { Configuration } from "./configuration";
import { GraphView } from "./graph";
import { Panel } from "./panel";
import { report, save } from "./report";
import { changes, choices, choose, edges, me, needsToken, now, overflowed, restart, start, trouble, type View } from "./state";
import "./style.css";
import { clock, rate, share } from "./text";
import { Traces } from "./traces";

const VIEWS: [View, string][] = [
  ["graph", "Graph"],
  ["traces", "Requests"],
  ["configuration", "Configuration"],
  ["changes", "Changes"],
];

function Bar() {
  const { view, seconds, services, find, end, theme } = choices.value;
  // Each request once: what services serve, not what they pass on.
  const entering = [...edges.value.values()].filter((edge) => !services || !edge.source.startsWith("service:"));
  const rps = entering.reduce((sum, edge) => sum + edge.rates.rps, 0);
  const failed = entering.reduce((sum, edge) => sum + edge.rates.rps * edge.rates.errors, 0);
  return (
    <header>
      <h1>meshlib</h1>
      <nav aria-label="Views">
        {VIEWS.map(([name, title]) => (
          <button key={name} type="button" aria-current={view === name ? "page" : undefined} onClick={() => choose({ view: name })}>
            {title}
            {name === "changes" && changes.value.length ? ` (${changes.value.length})` : ""}
          </button>
        ))}
      </nav>
      <span class="total" data-testid="total" title="All calls between services">
        {rps ? `${rate(rps)}, ${share(1 - failed / rps)} ok` : "no requests"}
      </span>
      <span class="grow" />
      <label>
        <span class="hidden">Find</span>
        <input id="find" type="search" placeholder="Find  /" value={find} onInput={(event) => choose({ find: event.currentTarget.value })} />
      </label>
      {(view === "graph" || view === "changes") && (<label>
        {view === "graph" ? "last" : "compare"}{" "}
        <select value={String(seconds)} onChange={(event) => choose({ seconds: Number(event.currentTarget.value) })}>
          {[10, 30, 60, 300, 900, 3600].map((each) => (
            <option key={each} value={String(each)}>
              {each < 120 ? `${each} s` : `${each / 60} min`}
            </option>
          ))}
        </select>
      </label>)}
      {view === "graph" && (<label>
        <input type="checkbox" checked={services} onChange={() => choose({ services: !services })} /> services
      </label>)}
      <button type="button" onClick={() => choose({ theme: theme === "dark" ? "light" : "dark" })} aria-label="Dark or light">
        ◐
      </button>
      {view === "graph" && <Replay end={end} />}
      <Me />
    </header>
  );
}

function Replay({ end }: { end: number }) {
  const latest = Date.now() / 1000;
  const [isPlaying, setPlaying] = useState(false);
  useEffect(() => {
    if (!isPlaying) return;
    // Ten times as fast as it was, until it is now.
    const timer = setInterval(() => {
      const next = choices.value.end + 5;
      const isNow = !choices.value.end || next >= Date.now() / 1000 - 3;
      choose({ end: isNow ? 0 : next });
      if (isNow) setPlaying(false);
    }, 500);
    return () => clearInterval(timer);
  }, [isPlaying]);
  return (
    <span class="replay">
      <label>
        <span>{end ? new Date(end * 1000).toLocaleTimeString([], { hour12: false }) : "live"}</span>{" "}
        <input
          type="range"
          min="-840"
          max="0"
          step="5"
          aria-label="Replay: how long ago"
          value={end ? Math.round(end - latest) : 0}
          onInput={(event) => {
            const back = Number(event.currentTarget.value);
            choose({ end: back < -3 ? Math.round(Date.now() / 1000 + back) : 0 });
          }}
        />
      </label>
      {end > 0 && (
        <>
          <button type="button" onClick={() => setPlaying(!isPlaying)} title={isPlaying ? "Pause" : "Play, ten times as fast as it was"} aria-label={isPlaying ? "Pause the replay" : "Play from here"} data-testid="play">
            {isPlaying ? "❚❚" : "▶"}
          </button>
          <button
            type="button"
            onClick={() => {
              setPlaying(false);
              choose({ end: 0 });
            }}
          >
            Live
          </button>
        </>
      )}
    </span>
  );
}

// Who the reader is; nothing where nobody is asked.
function Me() {
  const who = me.value;
  if (!who || who.access === "open") return null;
  const roles = who.roles.map(({ role, namespaces }) => `${role} in ${namespaces.map((each) => (each === "*" ? "all namespaces" : each)).join(", ")}`);
  return (
    <span class="me" data-testid="me" title={roles.join("; ")}>
      {who.name}{" "}
      {who.csrf && (
        <button
          type="button"
          onClick={() =>
            void signOut().then(() => {
              me.value = null;
              needsToken.value = true;
              restart.value += 1;
            })
          }
        >
          Sign out
        </button>
      )}
    </span>
  );
}

function SignIn() {
  const [reason, setReason] = useState("");
  const send = async (token: string) => {
    try {
      me.value = await signIn(token);
      needsToken.value = false;
      restart.value += 1;
    } catch (error) {
      setReason(error instanceof Refused ? error.message : "The control plane does not answer.");
    }
  };
  return (
    <form
      class="empty"
      onSubmit={(event) => {
        event.preventDefault();
        void send(String(new FormData(event.currentTarget).get("token") ?? ""));
      }}
    >
      <h2>This control plane wants a token</h2>
      <label>
        Token <input name="token" type="password" autocomplete="off" />
      </label>{" "}
      <button type="submit">Sign in</button>
      {reason && (
        <p class="problem error" role="alert">
          {reason}
        </p>
      )}
      <p class="dim">It is exchanged for a cookie that no script can read, good for eight hours at most.</p>
    </form>
  );
}

function App() {
  const { view } = choices.value;
  return (
    <>
      <Bar />
      {trouble.value && (
        <p class="trouble" role="alert">
          {trouble.value}
        </p>
      )}
      {overflowed.value > 0 && (
        <p class="trouble" role="status">
          {overflowed.value} requests belong to more series than are kept, and are not drawn.
        </p>
      )}
      <main>
        {needsToken.value ? (
          <SignIn />
        ) : view === "graph" ? (
          <GraphView />
        ) : view === "traces" ? (
          <Traces />
        ) : view === "configuration" ? (
          <Configuration />
        ) : (
          <ChangeHistory />
        )}
        {view === "graph" && !needsToken.value && <Panel />}
      </main>
      <footer class="dim">
        <span>{now.value ? `as of ${clock(now.value)}` : ""}</span>
        <button
          type="button"
          title="The graph, problems, clients and changes as one file, without credentials"
          data-testid="report"
          onClick={() =>
            void report().then(
              (text) => save(`meshlib-${new Date().toISOString().slice(0, 19).replace(/:/g, "")}.html`, text),
              (error: unknown) => (trouble.value = `No report: ${error instanceof Error ? error.message : String(error)}`),
            )
          }
        >
          Report
        </button>
      </footer>
    </>
  );
}

window.addEventListener("keydown", (event) => {
  const isTyping = event.target instanceof HTMLInputElement || event.target instanceof HTMLTextAreaElement;
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    document.getElementById("find")?.focus();
  } else if (event.key === "Escape") {
    choose({ selected: "", find: "" });
  }
});

start();
render(<App />, document.getElementById("app")!);
