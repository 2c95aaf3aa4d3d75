// What is in force, and what is wrong with it? The objects with their problems, each where it stands; and what changed.
import { useEffect, useState } from "preact/hooks";
import { get, type Change, type Problem, type StoredObject } from "./api";
import { changeNumber, changes, choices, choose } from "./state";
import { clock } from "./text";
import { Editor } from "./whatif";

export function Configuration() {
  const [objects, setObjects] = useState<StoredObject[]>([]);
  const [problems, setProblems] = useState<Problem[]>([]);
  const [edited, setEdited] = useState("");
  const { find } = choices.value;
  useEffect(() => {
    get<{ objects: StoredObject[] }>("/v1/objects").then(
      (found) => setObjects(found.objects),
      () => undefined, // the stream tells what is wrong
    );
    get<{ problems: Problem[] }>("/v1/problems").then(
      (found) => setProblems(found.problems),
      () => undefined,
    );
  }, [changeNumber.value]);
  const title = (each: StoredObject) => `${each.kind} ${each.namespace}/${each.name}`;
  const shown = objects.filter((each) => title(each).toLowerCase().includes(find.toLowerCase()));
  const loose = problems.filter((problem) => !objects.some((each) => title(each) === problem.object));
  return (
    <section class="page" aria-label="Configuration">
      <h2>Configuration</h2>
      <Editor text={edited} onText={setEdited} />
      {loose.map((problem, index) => (
        <ProblemLine key={index} problem={problem} />
      ))}
      {shown.map((each) => {
        const own = problems.filter((problem) => problem.object === title(each));
        const sign = own.some((problem) => problem.level === "error") ? "✕" : own.length ? "!" : "✓";
        return (
          <details key={title(each)} open={shown.length === 1 || own.length > 0} class="object">
            <summary>
              <span class={`pill ${sign === "✓" ? "healthy" : sign === "!" ? "degraded" : "failure"}`}>{sign}</span> {title(each)}{" "}
              <span class="dim">
                {each.origin}, {each.source}
              </span>
            </summary>
            {own.map((problem, index) => (
              <ProblemLine key={index} problem={problem} />
            ))}
            <pre tabIndex={0}>{each.yaml}</pre>
            <p>
              <button
                type="button"
                onClick={() => {
                  setEdited(each.yaml);
                  document.getElementById("editor")?.focus();
                }}
              >
                Try a change
              </button>
            </p>
          </details>
        );
      })}
      {!shown.length && <p class="empty">No object fits {find ? `“${find}”` : ""}.</p>}
    </section>
  );
}

export function ProblemLine({ problem }: { problem: Problem }) {
  return (
    <p class={`problem ${problem.level}`}>
      <strong>{problem.level}</strong> {problem.object} <code>{problem.field}</code>: {problem.reason} <span class="dim">{problem.source}</span>
    </p>
  );
}

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
  const shown = [...changes.value].reverse();
  return (
    <section class="page" aria-label="Changes">
      <h2>Changes</h2>
      {shown.map((change) => (
        <ChangeEntry key={change.number} change={change} />
      ))}
      {!shown.length && <p class="empty">Nothing was changed since this control plane started.</p>}
    </section>
  );
}

function ChangeEntry({ change }: { change: Change }) {
  return (
    <details class="object" data-testid={`change:${change.number}`}>
      <summary>
        {clock(change.at)} {change.object} <span class="pill">{!change.before ? "created" : !change.after ? "deleted" : "changed"}</span>{" "}
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
  );
}
