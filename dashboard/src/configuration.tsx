// What is in force, and what is wrong with it? The objects with their problems, each where it stands.
import { useEffect, useState } from "preact/hooks";
import { get, type Problem, type StoredObject } from "./api";
import { changeNumber, choices } from "./state";
import { lineOf } from "./place";
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
      <p class="dim" data-testid="configuration-count">
        {objects.length} {objects.length === 1 ? "object" : "objects"}, {problems.length ? `${problems.length} ${problems.length === 1 ? "problem" : "problems"}` : "no problems"}
        {find && `; ${shown.length} fit “${find}”`}
      </p>
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
              <span class={`state pill ${sign === "✓" ? "healthy" : sign === "!" ? "degraded" : "failure"}`}>{sign}</span> {title(each)}{" "}
              <span class="dim">
                {each.origin}, {each.source}
              </span>
            </summary>
            <Yaml text={each.yaml} problems={own} />
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
      {!shown.length && <p>No object fits {find ? `“${find}”` : ""}.</p>}
    </section>
  );
}

// Each problem below the line that it is about; above all of it, what is about none.
function Yaml({ text, problems }: { text: string; problems: Problem[] }) {
  const placed = problems.map((problem): [number, Problem] => [lineOf(text, problem.field), problem]);
  const of = (line: number) => placed.filter(([at]) => at === line).map(([, problem], index) => <ProblemLine key={index} problem={problem} isInPlace={line >= 0} />);
  const lines = text.trimEnd().split("\n");
  return (
    <>
      {of(-1)}
      <pre tabIndex={0} class="yaml">
        {lines.map((line, index) => {
          const own = of(index);
          return (
            <span key={index} class={own.length ? "marked" : ""}>
              {line}
              {"\n"}
              {own}
            </span>
          );
        })}
      </pre>
    </>
  );
}

// In a text it may be no paragraph.
export function ProblemLine({ problem, isInPlace = false }: { problem: Problem; isInPlace?: boolean }) {
  const Line = isInPlace ? "span" : "p";
  return (
    <Line class={`problem ${problem.level}`} data-testid={isInPlace ? "problem-in-place" : undefined}>
      <strong>
        {problem.level === "error" ? "✕" : "!"} {problem.level}
      </strong>{" "}
      {!isInPlace && problem.object} <code>{problem.field}</code>: {problem.reason} <span class="dim">{problem.source}</span>
    </Line>
  );
}
