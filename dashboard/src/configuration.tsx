// What is in force, and what is wrong with it? The objects with their problems, each where it stands.
import { useEffect, useState } from "preact/hooks";
import { get, type Problem, type StoredObject } from "./api";
import { changeNumber, choices } from "./state";
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
